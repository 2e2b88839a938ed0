//! What the engine's tests share: the goldens' folders and a loop that runs requests to their ends.

#![allow(dead_code, reason = "no test file uses all of it")]

pub(crate) mod children;
pub(crate) mod moves;
pub(crate) mod plans;
pub(crate) mod router;

use std::path::{Path, PathBuf};

use moesaic_engine::{Engine, EngineConfig, Launch, Request, SamplingParams, TokenEvent, launch};
use moesaic_model::Checkpoint;
use moesaic_spec::{Ffn, ModelSpec};

/// One of `tests/goldens`.
pub(crate) struct GoldenModel {
    pub name: String,
    pub folder: PathBuf,
    /// As `config.json` says, a capacity included.
    pub spec: ModelSpec,
    pub checkpoint: Checkpoint,
}

impl GoldenModel {
    pub(crate) fn open(name: &str) -> GoldenModel {
        GoldenModel::in_folder(&goldens().join(name))
    }

    /// Any model folder.
    pub(crate) fn in_folder(folder: &Path) -> GoldenModel {
        let config = folder.join("config.json");
        let json = std::fs::read_to_string(&config).unwrap();
        GoldenModel {
            name: folder.file_name().unwrap().to_str().unwrap().to_string(),
            spec: ModelSpec::from_config_json(&json, &config.display().to_string()).unwrap(),
            checkpoint: Checkpoint::open(folder).unwrap(),
            folder: folder.to_path_buf(),
        }
    }

    /// The model with room for every token at every expert.
    pub(crate) fn without_capacity(&self) -> ModelSpec {
        let mut spec = self.spec.clone();
        for ffn in &mut spec.layers {
            if let Ffn::Moe(moe) = ffn {
                moe.capacity = None;
            }
        }
        spec
    }

    pub(crate) fn launch(&self, spec: &ModelSpec, config: &EngineConfig) -> Engine {
        let engine = launch(spec, &Launch::Checkpoint(&self.checkpoint), config, |_| ());
        engine.unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }
}

/// Every committed folder.
pub(crate) fn golden_names() -> Vec<String> {
    let folders = std::fs::read_dir(goldens()).unwrap().map(|entry| entry.unwrap());
    let mut names: Vec<String> = folders
        .filter(|entry| entry.path().join("golden.safetensors").exists())
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() >= 20, "the goldens are missing: {names:?}");
    names
}

/// The small trained model's folder.
pub(crate) fn tiny_moe() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/tiny-moe")
}

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens")
}

/// Settings that leave room for everything that a test does not mean to limit.
pub(crate) fn config() -> EngineConfig {
    EngineConfig { num_threads: Some(2), ..EngineConfig::default() }
}

pub(crate) fn greedy(prompt: &[u32], max_tokens: usize) -> Request {
    Request { prompt: prompt.to_vec(), sampling: SamplingParams::greedy(), max_tokens, stop_token_ids: Vec::new() }
}

/// Adds all requests at once and runs them to their ends; the tokens of each, in the order of the requests.
pub(crate) fn run(engine: &mut Engine, requests: &[Request]) -> Vec<Vec<TokenEvent>> {
    let ids: Vec<_> = requests.iter().map(|request| engine.add(request.clone()).unwrap()).collect();
    let mut answers = vec![Vec::new(); ids.len()];
    while !engine.is_idle() {
        for event in engine.step().unwrap().events {
            let idx = ids.iter().position(|&id| id == event.id).unwrap();
            answers[idx].push(event);
        }
    }
    answers
}

/// Token ids that only `seed` decides.
pub(crate) fn prompt(seed: u64, len: usize, vocab_size: usize) -> Vec<u32> {
    use rand_chacha::rand_core::{Rng, SeedableRng};
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.next_u32() % vocab_size as u32).collect()
}
