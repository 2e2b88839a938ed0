//! The papers' deployments at reduced width and with their structure whole: the plan files of `specs/plans` on models of the
//! same depth, the same dense start and the same numbers of experts and heads, held against one rank.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::plans::{Results, Subject, assert_same_bits, exact_config, relative_error, results};
use common::{greedy, prompt};
use moesaic_engine::{EngineConfig, Launch, Ranks, Request, launch_plan};
use moesaic_model::checkpoint::RandomWeights;
use moesaic_plan::plan::{AttentionPlan, ExchangePrecision, Mesh, Overlap};
use moesaic_plan::{ExpertShard, Plan, PlanFile};
use moesaic_spec::{Attention, Bytes, Ffn, ModelSpec, Scale, cluster_preset, preset as model_preset};

const WEIGHTS: Launch = Launch::Random(RandomWeights { seed: 7 });

/// One of `specs/plans`.
fn plan_file(name: &str) -> PlanFile {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../specs/plans").join(name);
    PlanFile::from_yaml(&std::fs::read_to_string(&path).unwrap(), name).unwrap()
}

/// A preset as narrow as it can be, with as many layers as it has.
fn narrow(preset: &str, scale: Scale) -> ModelSpec {
    let full = model_preset(preset).unwrap().spec().unwrap();
    let narrow = Scale { hidden: Some(64), intermediate: Some(32), vocab: Some(512), ..scale };
    let mut spec = full.scaled(&narrow).unwrap();
    assert_eq!(spec.layers.len(), full.layers.len(), "the structure is whole");
    for ffn in &mut spec.layers {
        if let Ffn::Moe(moe) = ffn {
            // Capacity counts the tokens of a step, and the comparison is of other steps.
            moe.capacity = None;
        }
    }
    spec
}

fn config() -> EngineConfig {
    EngineConfig {
        max_model_len: Some(32),
        max_num_seqs: 2,
        max_num_batched_tokens: 8,
        // The bounds of 928 ranks' stacks and messages come to several GiB, of which next to nothing is ever touched.
        memory_limit: Some(Bytes(64 << 30)),
        ..exact_config()
    }
}

fn prompts(spec: &ModelSpec, num: usize) -> Vec<Request> {
    (0..num).map(|seed| greedy(&prompt(seed as u64, 3 + 5 * seed % 13, spec.vocab_size), 2 + seed % 2)).collect()
}

fn single(spec: &ModelSpec, requests: &[Request]) -> Results {
    results(&mut Subject { name: "one rank", spec, weights: &WEIGHTS }.single(&config()), requests)
}

fn many(spec: &ModelSpec, file: PlanFile, requests: &[Request]) -> Results {
    let cluster = cluster_preset(&file.cluster).unwrap();
    let plan = Arc::new(Plan::new(file, spec, &cluster).unwrap());
    let mut engine = launch_plan(spec, &WEIGHTS, &plan, &config(), Ranks::Threads, |_| ()).unwrap();
    results(&mut engine, requests)
}

fn num_dense(spec: &ModelSpec) -> usize {
    spec.layers.iter().filter(|ffn| ffn.as_dense().is_some()).count()
}

/// Paper 000: MLA, 61 layers with a dense start of 3, and ranks of its own for each of the 58 MoE layers, one expert on each.
#[test]
fn gpus_for_each_layer_are_928_ranks_with_one_expert_each() {
    let spec = narrow("paper-000", Scale { heads: Some(4), experts: Some(16), ..Scale::default() });
    assert_eq!((spec.layers.len(), num_dense(&spec)), (61, 3));
    assert!(matches!(spec.attention, Attention::Mla(_)));
    let file = plan_file("paper-000-reduced.yaml");
    assert_eq!((file.ranks, file.mesh), (928, Mesh { tp: 1, pp: 58, dp: 16, ep: 16 }));
    let plan = Plan::new(file.clone(), &spec, &cluster_preset("h100-paper").unwrap()).unwrap();
    for shard in &plan.shards {
        assert_eq!(shard.experts, ExpertShard::Placed);
        let experts: usize = plan.experts_of(shard.rank).iter().map(Vec::len).sum();
        assert_eq!(experts, 1, "rank {} has one expert in all", shard.rank);
    }
    let requests = prompts(&spec, 20);
    assert_same_bits("928 ranks", &single(&spec, &requests), &many(&spec, file, &requests));
}

/// The other reading of papers 000 and 002: each of 16 ranks has one expert of *every* layer.
#[test]
fn one_expert_of_each_of_61_layers_on_16_ranks() {
    for (preset, scale) in [
        ("paper-000", Scale { heads: Some(4), experts: Some(16), ..Scale::default() }),
        ("paper-002", Scale { heads: Some(4), experts: Some(16), ..Scale::default() }),
    ] {
        let spec = narrow(preset, scale);
        assert_eq!((spec.layers.len(), num_dense(&spec)), (61, 3));
        let file = plan_file("paper-001-ep.yaml");
        let memory = Default::default();
        let file = PlanFile { model: preset.into(), memory, ..file };
        assert_eq!(file.max_experts_per_rank(), 1);
        let requests = prompts(&spec, 9);
        assert_same_bits(preset, &single(&spec, &requests), &many(&spec, file, &requests));
    }
}

/// Paper 001: 16 layers of 16 experts on 16 ranks, one expert of each layer on a rank; and its baseline, TP = 8 with PP = 2.
#[test]
fn sixteen_layers_of_sixteen_experts() {
    let spec = narrow("paper-001", Scale { heads: Some(8), head_dim: Some(8), ..Scale::default() });
    let moe = spec.layers[0].as_moe().unwrap();
    assert_eq!((spec.layers.len(), num_dense(&spec), moe.num_experts, moe.top_k), (16, 0, 16, 2));
    let requests = prompts(&spec, 20);
    let single = single(&spec, &requests);
    for overlap in [Overlap::None, Overlap::Arrivals] {
        let file = PlanFile { overlap, memory: Default::default(), ..plan_file("paper-001-ep.yaml") };
        assert_same_bits("EP=16", &single, &many(&spec, file, &requests));
    }
    let baseline = PlanFile { memory: Default::default(), ..plan_file("paper-001-tp-pp.yaml") };
    let many = many(&spec, baseline, &requests);
    let error = relative_error(&single, &many);
    // Sums of F32 in another order, over 16 layers.
    assert!(error > 0.0 && error < 1e-5, "TP=8, PP=2: {error}");
}

/// Papers 003 and 004: 4 layers of 16 experts, 32 heads over 12 ranks as 3,3,3,3,3,3,3,3,2,2,2,2, experts on 4 ranks; and the
/// pool of attention by requests instead.
#[test]
fn attention_of_32_heads_on_twelve_ranks_and_experts_on_four() {
    for preset in ["paper-003-gelu", "paper-003-swiglu"] {
        let spec = narrow(preset, Scale { heads: Some(32), head_dim: Some(8), ..Scale::default() });
        let moe = spec.layers[0].as_moe().unwrap();
        assert_eq!((spec.layers.len(), moe.num_experts, spec.attention.num_heads()), (4, 16, 32));
        let requests = prompts(&spec, 14);
        let single = single(&spec, &requests);
        let file = plan_file("paper-003-ma.yaml");
        assert_eq!(file.attention.heads.as_deref(), Some(&[3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2][..]));
        assert_eq!((file.attention.replication, file.max_experts_per_rank()), (Some(2), 4));
        assert_eq!(file.exchange.precision, ExchangePrecision::Int8);
        let mut exact = PlanFile { memory: Default::default(), ..file };
        exact.exchange.precision = ExchangePrecision::Full;
        let by_heads = many(&spec, exact.clone(), &requests);
        let error = relative_error(&single, &by_heads);
        assert!(error > 0.0 && error < 1e-5, "{preset} by heads: {error}");
        assert_same_bits("twice the same", &by_heads, &many(&spec, exact.clone(), &requests));
        // Each rank with requests of its own has all heads; those of the next one, too.
        let attention = AttentionPlan { heads: None, replication: Some(2) };
        let by_requests = PlanFile { mesh: Mesh { tp: 1, pp: 1, dp: 12, ep: 4 }, attention, ..exact };
        assert_same_bits(preset, &single, &many(&spec, by_requests, &requests));
    }
}
