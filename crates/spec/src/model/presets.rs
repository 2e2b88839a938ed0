//! Published and described models, by name; where each figure comes from is in `specs/models/README.md`.

use super::ModelSpec;
use crate::SpecError;
use crate::fields::shorten;
use crate::nearest::nearest;

/// A model by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preset {
    /// As on the command line.
    pub name: &'static str,
    /// Its `config.json`.
    pub config_json: &'static str,
}

impl Preset {
    /// The description, read.
    ///
    /// # Errors
    /// None for our own presets, which a test reads; the type is that of any description.
    pub fn spec(&self) -> Result<ModelSpec, SpecError> {
        ModelSpec::from_config_json(self.config_json, &format!("specs/models/{}.json", self.name))
    }
}

macro_rules! presets {
    ($($name:literal),* $(,)?) => {
        &[$(Preset {
            name: $name,
            config_json: include_str!(concat!("../../../../specs/models/", $name, ".json")),
        }),*]
    };
}

const PRESETS: &[Preset] = presets![
    "mixtral-8x7b",
    "mixtral-8x22b",
    "qwen3-30b-a3b",
    "qwen3-235b-a22b",
    "olmoe-1b-7b",
    "deepseek-v3",
    "kimi-k2",
    "paper-000",
    "paper-001",
    "paper-002",
    "paper-003-gelu",
    "paper-003-swiglu",
    "deepseek-r1",
    "qwen3-235b-a22b-fp8",
    "llama-3.1-8b",
    "llama-3.1-70b",
    "llama-3.1-405b",
    "qwen3-8b",
    "qwen3-32b",
    "gpt-oss-20b",
    "gpt-oss-120b",
    "minimax-m2.5",
    "glm-4.5",
    "glm-5",
    "qwen3.5-397b-a17b",
    "kimi-k2.5",
    "deepseek-v3.2",
];

/// All presets.
pub fn presets() -> &'static [Preset] {
    PRESETS
}

/// The preset of this name; case does not matter.
///
/// # Errors
/// [`SpecError::UnknownPreset`] with the name that is spelled most alike.
pub fn preset(name: &str) -> Result<Preset, SpecError> {
    let lower = name.to_ascii_lowercase();
    PRESETS.iter().find(|preset| preset.name == lower).copied().ok_or_else(|| SpecError::UnknownPreset {
        name: format!("{:?}", shorten(name)),
        nearest: nearest(&lower, PRESETS.iter().map(|preset| preset.name)).to_owned(),
        known: PRESETS.iter().map(|preset| preset.name).collect::<Vec<_>>().join(", "),
    })
}
