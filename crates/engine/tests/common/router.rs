//! A model whose router has the load that a test wants: a random one with a correction bias that is fitted to it.

use std::path::Path;

use moesaic_engine::{EngineConfig, Launch, Request, launch};
use moesaic_model::Checkpoint;
use moesaic_model::checkpoint::{RandomWeights, write_random};
use moesaic_spec::{Ffn, ModelSpec, Scale, preset};
use tempfile::TempDir;

use super::plans::exact_config;
use super::{GoldenModel, greedy, prompt};

/// Two MoE layers of 16 experts, of which a token goes to 2.
fn spec() -> ModelSpec {
    let scale = Scale {
        layers: Some(3),
        hidden: Some(64),
        heads: Some(4),
        experts: Some(16),
        top_k: Some(2),
        intermediate: Some(32),
        vocab: Some(512),
        ..Scale::default()
    };
    let mut spec = preset("deepseek-v3").unwrap().spec().unwrap().scaled(&scale).unwrap();
    for ffn in &mut spec.layers {
        if let Ffn::Moe(moe) = ffn {
            // Every expert can be chosen with every other one.
            (moe.router.n_group, moe.router.topk_group) = (1, 1);
        }
    }
    spec
}

/// Prompts of random tokens, and one token of answer: what routers see of them depends on little but the tokens.
pub(crate) fn random_requests(spec: &ModelSpec, seeds: std::ops::Range<u64>) -> Vec<Request> {
    seeds.map(|seed| greedy(&prompt(seed, 24 + (seed % 7) as usize, spec.vocab_size), 1)).collect()
}

/// The share of each expert that is wanted in every layer; fitted on other tokens than tests use.
pub(crate) fn model_with_loads(shares: &[f64]) -> (TempDir, GoldenModel) {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec();
    let path = folder.path().join("model");
    write_random(&path, &spec, RandomWeights { seed: 3 }, u64::MAX, |_| ()).unwrap();
    let layers: Vec<u32> = (0..3).filter(|&layer| spec.layers[layer as usize].as_moe().is_some()).collect();
    let mut biases = vec![vec![0.0f32; shares.len()]; layers.len()];
    let requests = random_requests(&spec, 1_000_000..1_000_300);
    for round in 0..15 {
        // First roughly, then on so many tokens that chance is a few percent of an expert's load.
        let requests = if round < 12 { &requests[..60] } else { &requests };
        for (layer, bias) in layers.iter().zip(&biases) {
            write_bias(&path, *layer, bias);
        }
        let checkpoint = Checkpoint::open(&path).unwrap();
        let config = EngineConfig {
            max_num_batched_tokens: 512,
            max_num_seqs: 32,
            max_num_waiting: requests.len(),
            keep_logits: false,
            ..exact_config()
        };
        let mut engine = launch(&spec, &Launch::Checkpoint(&checkpoint), &config, |_| ()).unwrap();
        requests.iter().for_each(|request| {
            engine.add(request.clone()).unwrap();
        });
        let mut counts = vec![vec![0.0; shares.len()]; layers.len()];
        while !engine.is_idle() {
            engine.step().unwrap();
            for (layer, sums) in layers.iter().zip(&mut counts) {
                let of_step = &engine.last_step().expert_counts[layer];
                sums.iter_mut().zip(of_step).for_each(|(sum, n)| *sum += f64::from(*n));
            }
        }
        for (bias, counts) in biases.iter_mut().zip(&counts) {
            let total: f64 = counts.iter().sum();
            // Scores are between 0 and 1, a fifth apart: steps that become smaller.
            let step = 0.2 / (1.0 + f64::from(round) / 3.0);
            for ((bias, count), share) in bias.iter_mut().zip(counts).zip(shares) {
                *bias += (step * (share * total / count.max(1.0)).ln().clamp(-2.0, 2.0)) as f32;
            }
        }
    }
    let model = GoldenModel::in_folder(&path);
    (folder, model)
}

/// Overwrites a layer's correction bias, which is in F32.
fn write_bias(folder: &Path, layer: u32, bias: &[f32]) {
    let file = folder.join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let info = metadata.info(&format!("model.layers.{layer}.mlp.gate.e_score_correction_bias")).unwrap();
    assert_eq!((info.dtype, &info.shape[..]), (safetensors::Dtype::F32, &[bias.len()][..]));
    let start = 8 + header + info.data_offsets.0;
    for (place, value) in bytes[start..].chunks_exact_mut(4).zip(bias) {
        place.copy_from_slice(&value.to_le_bytes());
    }
    // Anew, because the old file is mapped by whoever read it.
    let fresh = folder.join("fresh");
    std::fs::write(&fresh, bytes).unwrap();
    std::fs::rename(fresh, file).unwrap();
}
