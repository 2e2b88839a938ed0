//! Models by the names that they have on the Hugging Face hub, as files of measurements name them.

use super::ModelSpec;
use super::planning::{WeightFormat, WeightFormats};
use super::presets::{Preset, preset, presets};
use crate::SpecError;
use crate::fields::shorten;
use crate::nearest::nearest;

/// A preset, with its weights stored as the hub's name says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HubModel {
    /// The model's shape.
    pub preset: Preset,
    /// How matrices are stored, where that differs from the preset.
    pub formats: Option<WeightFormats>,
}

impl HubModel {
    /// The description, with these formats.
    ///
    /// # Errors
    /// None for our own presets, which a test reads; the type is that of any description.
    pub fn spec(&self) -> Result<ModelSpec, SpecError> {
        let spec = self.preset.spec()?;
        Ok(match self.formats {
            None => spec,
            Some(formats) => spec.with_formats(formats),
        })
    }
}

/// Parts of a name that change neither shape nor format: how a model was trained further, and when.
const DECORATIONS: [&str; 13] =
    ["meta", "instruct", "thinking", "base", "chat", "hf", "v0.1", "0324", "0528", "0905", "0924", "2507", "dynamic"];

/// Models of the same shape as a preset of another name.
const SAME_SHAPE: [(&str, &str); 5] = [
    ("llama-3-8b", "llama-3.1-8b"),
    ("llama-3-70b", "llama-3.1-70b"),
    ("llama-3.3-70b", "llama-3.1-70b"),
    ("deepseek-v3.1", "deepseek-v3"),
    ("minimax-m2", "minimax-m2.5"),
];

/// The model of a name on the hub: `Qwen/Qwen3-235B-A22B-FP8`, `nvidia/Llama-3.1-8B-Instruct-FP8`. Case does not matter, the
/// organisation may be left out, and so may what says only how the model was trained (`Instruct`, `0528`). A format at the
/// end (`FP8`, `NVFP4`, `AWQ`, …) is that of the weights.
///
/// # Errors
/// [`SpecError::UnknownName`] with the name that is spelled most alike.
pub fn preset_by_hub_name(name: &str) -> Result<HubModel, SpecError> {
    let lower = name.to_ascii_lowercase();
    let (organisation, model) = lower.rsplit_once('/').unwrap_or(("", &lower));
    let parts: Vec<&str> = model.split('-').filter(|part| !DECORATIONS.contains(part)).collect();
    let known = |parts: &[&str]| {
        let plain = parts.join("-");
        let same = SAME_SHAPE.iter().find(|(name, _)| *name == plain).map(|(_, same)| *same);
        preset(same.unwrap_or(&plain)).ok()
    };
    if let Some(preset) = known(&parts) {
        return Ok(HubModel { preset, formats: None });
    }
    // NVIDIA's FP8 has one scale for a tensor, the makers' own one for a block.
    let fp8 = if organisation == "nvidia" { WeightFormat::Fp8 } else { WeightFormat::Fp8Block };
    let (shape, format) = match parts.as_slice() {
        [shape @ .., "fp8", "static", "pertensor"] => (shape, Some(WeightFormat::Fp8)),
        [shape @ .., "fp8"] => (shape, Some(fp8)),
        [shape @ .., "nvfp4" | "fp4"] => (shape, Some(WeightFormat::Nvfp4)),
        [shape @ .., "awq" | "gptq" | "int4"] => (shape, Some(WeightFormat::Int4)),
        [shape @ .., "bf16"] => (shape, Some(WeightFormat::Bf16)),
        shape => (shape, None),
    };
    let (Some(preset), Some(format)) = (known(shape), format) else {
        return Err(SpecError::UnknownName {
            what: "model",
            name: format!("{:?}", shorten(name)),
            nearest: nearest(&parts.join("-"), presets().iter().map(|preset| preset.name)).to_owned(),
            known: presets().iter().map(|preset| preset.name).collect::<Vec<_>>().join(", "),
        });
    };
    // Four bits are for experts where there are any; attention keeps its own.
    let four_bits = !matches!(format, WeightFormat::Fp8 | WeightFormat::Fp8Block | WeightFormat::Bf16);
    let formats = match four_bits && preset.spec()?.num_moe_layers() > 0 {
        true => WeightFormats { dense: WeightFormat::Bf16, experts: format },
        false => WeightFormats::uniform(format),
    };
    Ok(HubModel { preset, formats: Some(formats) })
}
