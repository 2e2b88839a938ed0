//! Opening what a user names: a model folder, a preset, a config file, or the model inside the binary.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use moesaic_engine::{Engine, EngineConfig, Launch, Ranks, launch_plan};
use moesaic_model::Checkpoint;
use moesaic_model::checkpoint::RandomWeights;
use moesaic_plan::Plan;
use moesaic_spec::model::presets::preset;
use moesaic_spec::{Capacity, Ffn, GenerationConfig, ModelSpec};
use moesaic_text::{Tokenizer, TokenizerFiles};

use crate::args::{LoadFormat, ModelArgs};
use crate::plans::EMBEDDED;
use crate::progress;

/// The small trained model that the binary carries.
mod embedded {
    pub(super) const NAME: &str = "tiny-moe (inside the binary)";
    pub(super) const CONFIG: &str = include_str!("../../../examples/tiny-moe/config.json");
    pub(super) const GENERATION_CONFIG: &str = include_str!("../../../examples/tiny-moe/generation_config.json");
    pub(super) const TOKENIZER: &[u8] = include_bytes!("../../../examples/tiny-moe/tokenizer.json");
    pub(super) const TOKENIZER_CONFIG: &[u8] = include_bytes!("../../../examples/tiny-moe/tokenizer_config.json");
    pub(super) const WEIGHTS: &[u8] = include_bytes!("../../../examples/tiny-moe/model.safetensors");
}

/// A JSON description larger than this is not one.
const MAX_JSON_BYTES: u64 = 16 << 20;

/// Everything but the loaded weights.
pub(crate) struct OpenModel {
    pub name: String,
    pub spec: ModelSpec,
    pub generation: GenerationConfig,
    /// A folder without `tokenizer.json` runs on token ids.
    pub tokenizer: Option<Tokenizer>,
    weights: Weights,
}

enum Weights {
    Checkpoint(Checkpoint),
    Random(RandomWeights),
}

impl OpenModel {
    /// Opens the named model, or the one inside the binary. Weights are mapped, not read.
    pub(crate) fn open(args: &ModelArgs) -> Result<OpenModel> {
        let dummy = args.load_format == LoadFormat::Dummy;
        let mut model = match args.model() {
            None => OpenModel::embedded()?,
            Some(path) if path.is_dir() => OpenModel::folder(path, dummy)?,
            Some(path) if dummy => OpenModel {
                name: path.display().to_string(),
                spec: spec_of(path)?,
                generation: GenerationConfig::default(),
                tokenizer: None,
                weights: Weights::Random(RandomWeights { seed: 0 }),
            },
            Some(path) if preset(&path.to_string_lossy()).is_ok() => {
                bail!("{}: is a preset, which has no weights; --load-format dummy takes random ones", path.display())
            }
            Some(path) => bail!("{}: is neither a model folder nor a preset", path.display()),
        };
        model.set_capacity(args)?;
        if let Some(tokenizer) = &model.tokenizer {
            tokenizer.check_vocab(model.spec.vocab_size)?;
        }
        Ok(model)
    }

    /// Dropping tokens is for training: a model whose config has a capacity answers with all of them unless asked not to.
    fn set_capacity(&mut self, args: &ModelArgs) -> Result<()> {
        let factor = args.moe_expert_capacity_factor;
        ensure!(
            factor.is_none_or(|factor| factor.is_finite() && factor > 0.0),
            "--moe-expert-capacity-factor is {}; a number above 0 is right",
            factor.unwrap_or_default()
        );
        let policy = args.moe_token_drop_policy.into();
        for ffn in &mut self.spec.layers {
            if let Ffn::Moe(moe) = ffn {
                moe.capacity = factor.map(|factor| Capacity { factor, policy });
            }
        }
        Ok(())
    }

    fn embedded() -> Result<OpenModel> {
        Ok(OpenModel {
            name: embedded::NAME.to_string(),
            spec: ModelSpec::from_config_json(embedded::CONFIG, "examples/tiny-moe/config.json")?,
            generation: GenerationConfig::from_json(
                embedded::GENERATION_CONFIG,
                "examples/tiny-moe/generation_config.json",
            )?,
            tokenizer: Some(Tokenizer::from_bytes(TokenizerFiles {
                tokenizer_json: embedded::TOKENIZER,
                tokenizer_config_json: Some(embedded::TOKENIZER_CONFIG),
                chat_template_jinja: None,
            })?),
            weights: Weights::Checkpoint(Checkpoint::embedded(
                "examples/tiny-moe/model.safetensors",
                embedded::WEIGHTS,
            )?),
        })
    }

    fn folder(folder: &Path, dummy: bool) -> Result<OpenModel> {
        let spec = spec_of(folder)?;
        let generation = folder.join("generation_config.json");
        Ok(OpenModel {
            name: folder.display().to_string(),
            generation: match generation.exists() {
                true => GenerationConfig::from_json(&read_json(&generation)?, &generation.display().to_string())?,
                false => GenerationConfig::default(),
            },
            tokenizer: match folder.join("tokenizer.json").exists() {
                true => Some(Tokenizer::from_folder(folder)?),
                false => None,
            },
            weights: match dummy {
                true => Weights::Random(RandomWeights { seed: 0 }),
                false => Weights::Checkpoint(Checkpoint::open(folder)?),
            },
            spec,
        })
    }

    /// The tokenizer, or a sentence that says what can be done without one.
    pub(crate) fn tokenizer(&self) -> Result<&Tokenizer> {
        let missing = || format!("{}: holds no tokenizer.json; --prompt-ids works without one", self.name);
        self.tokenizer.as_ref().with_context(missing)
    }

    /// Where the weights are.
    pub(crate) fn launch_from(&self) -> Launch<'_> {
        match &self.weights {
            Weights::Checkpoint(checkpoint) => Launch::Checkpoint(checkpoint),
            Weights::Random(random) => Launch::Random(*random),
        }
    }

    /// Settles the memory and loads the weights behind a progress bar, on one rank.
    pub(crate) fn launch(&self, config: &EngineConfig, quiet: bool) -> Result<Engine> {
        self.launch_plan(&Arc::new(Plan::single(&self.spec)), config, Ranks::Threads, quiet)
    }

    /// The same on all ranks of a plan.
    pub(crate) fn launch_plan(
        &self,
        plan: &Arc<Plan>,
        config: &EngineConfig,
        ranks: Ranks,
        quiet: bool,
    ) -> Result<Engine> {
        let total = match &self.weights {
            Weights::Checkpoint(checkpoint) => checkpoint.size_bytes(),
            Weights::Random(_) => self.spec.counts().bytes_total,
        };
        let bar = progress::bytes_bar("loading", total, quiet);
        let load = |done| bar.set_position(done);
        let engine = launch_plan(&self.spec, &self.launch_from(), plan, config, ranks, load)?;
        bar.finish_and_clear();
        Ok(engine)
    }
}

/// The description behind a preset's name, a model folder, a config file, or (without a name, or by the one that plans have for
/// it) the model inside.
pub(crate) fn named_spec(name: Option<&Path>) -> Result<(String, ModelSpec)> {
    match name {
        None => Ok((embedded::NAME.to_string(), OpenModel::embedded()?.spec)),
        Some(path) if path == Path::new(EMBEDDED) => Ok((EMBEDDED.to_owned(), OpenModel::embedded()?.spec)),
        Some(path) => Ok((path.display().to_string(), spec_of(path)?)),
    }
}

fn spec_of(path: &Path) -> Result<ModelSpec> {
    let file = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
    if file.exists() {
        return Ok(ModelSpec::from_config_json(&read_json(&file)?, &file.display().to_string())?);
    }
    if path.is_dir() {
        bail!("{}: holds no config.json", path.display());
    }
    let name = path.to_string_lossy();
    if name.contains(['/', '\\']) || name.ends_with(".json") {
        bail!("{name}: there is no such file or folder");
    }
    Ok(preset(&name).with_context(|| format!("{name}: is neither a folder nor a preset"))?.spec()?)
}

fn read_json(path: &Path) -> Result<String> {
    let metadata = fs::metadata(path).with_context(|| path.display().to_string())?;
    if !metadata.is_file() || metadata.len() > MAX_JSON_BYTES {
        bail!("{}: is not a file of at most {MAX_JSON_BYTES} bytes", path.display());
    }
    fs::read_to_string(path).with_context(|| path.display().to_string())
}
