//! Experts move while requests run, and no bit of any result shows it.

mod common;

use std::collections::BTreeSet;

use common::moves::{movable, move_on};
use common::plans::{
    Results, Subject, assert_same_bits, ep, exact_config, file, num_experts, results, results_with, separate,
};
use common::{GoldenModel, golden_names, greedy, prompt, tiny_moe};
use moesaic_engine::{EngineConfig, Launch, Request, StepRecord};
use moesaic_kernels::experts::ExpertWeight;
use moesaic_model::LoadDType;
use moesaic_plan::plan::{Exchange, ExchangeRoute, ExplicitLayer, InitialPlacement, Mesh, MoePlan, Overlap};
use moesaic_plan::{MessageKind, PlanFile, Rank, Tag};
use moesaic_spec::{Activation, Bytes, DType, Ffn, ModelSpec};

fn long_requests(spec: &ModelSpec) -> Vec<Request> {
    (0..8).map(|seed| greedy(&prompt(seed, 20 + seed as usize, spec.vocab_size), 16)).collect()
}

/// With two places for replicas.
fn with_replicas(file: PlanFile, spec: &ModelSpec) -> PlanFile {
    let moe = MoePlan { redundant_experts: 2, max_experts_per_rank: Some(num_experts(spec) + 2), ..file.moe };
    movable(PlanFile { moe, ..file })
}

/// What moved in a run.
#[derive(Debug, Default)]
struct Moved {
    experts: usize,
    bytes: u64,
    epochs: BTreeSet<u64>,
    preemptions: u64,
}

impl Moved {
    /// A step is over. What is logged of moves are weights, and the bytes that are counted.
    fn note(&mut self, record: &StepRecord, is_logged: bool) {
        self.bytes += record.weights_sent;
        self.epochs.insert(record.placement_epoch);
        let mut logged = 0;
        for call in record.ranks.iter().flat_map(|rank| &rank.background) {
            let peer = call.peer.expect("a message");
            assert_eq!(Tag::from_code(peer.tag, record.step).unwrap().kind, MessageKind::Weights);
            logged += if peer.outbound { call.bytes.bound } else { 0 };
        }
        assert!(!is_logged || logged == record.weights_sent);
    }
}

/// Runs a plan whose experts move from one placement to the next all the time.
fn run_moving(subject: &Subject, file: PlanFile, config: &EngineConfig) -> (Results, Moved) {
    let plan = subject.plan(file);
    let mut engine = subject.many(&plan, config);
    let mut moved = Moved::default();
    let mut is_first = true;
    let results = results_with(&mut engine, &long_requests(subject.spec), |engine| {
        if !std::mem::take(&mut is_first) {
            moved.note(engine.last_step(), config.record_calls);
        }
        moved.experts += move_on(engine, &plan);
    });
    moved.note(engine.last_step(), config.record_calls);
    moved.preemptions = engine.stats().preemptions;
    (results, moved)
}

/// Bytes of an expert's matrices without padding, and with it.
fn expert_bytes(spec: &ModelSpec, dtype: DType) -> (u64, u64) {
    let moe = spec.layers.iter().find_map(Ffn::as_moe).unwrap();
    let (d, f) = (spec.hidden_size, moe.intermediate_size);
    let num_matrices = if moe.activation == Activation::SwiGlu { 3 } else { 2 };
    ((num_matrices * d * f * dtype.size_bytes()) as u64, ExpertWeight::packed_bytes(d, f, dtype, moe.activation).0)
}

#[test]
fn experts_on_the_move_change_no_bit_of_any_model() {
    for name in golden_names() {
        let model = GoldenModel::open(&name);
        let spec = model.without_capacity();
        let weights = Launch::Checkpoint(&model.checkpoint);
        let subject = Subject { name: &name, spec: &spec, weights: &weights };
        for dtype in [LoadDType::Float32, LoadDType::Auto] {
            let config = EngineConfig { dtype, record_calls: true, ..exact_config() };
            let single = results(&mut subject.single(&config), &long_requests(&spec));
            let (many, moved) = run_moving(&subject, with_replicas(ep(3, &spec), &spec), &config);
            assert_same_bits(&format!("{name} {dtype:?}"), &single, &many);
            assert!(moved.epochs.len() > 3 && moved.experts > 10, "{name}: {moved:?}");
            // The last ones may still be on their way; nothing is sent twice.
            let (bare, padded) = expert_bytes(&spec, dtype.weights(spec.dtype));
            assert!(moved.bytes <= moved.experts as u64 * padded, "{name}: {moved:?} of {padded}");
            assert!(dtype == LoadDType::Auto || moved.bytes > moved.experts as u64 / 2 * bare, "{name}: {moved:?}");
        }
    }
}

#[test]
fn experts_move_wherever_they_are_placed() {
    for name in ["qwen3_moe", "deepseek_v3", "mixtral", "olmoe", "paper"] {
        let model = GoldenModel::open(name);
        let spec = model.without_capacity();
        let weights = Launch::Checkpoint(&model.checkpoint);
        let subject = Subject { name, spec: &spec, weights: &weights };
        let config = exact_config();
        let single = results(&mut subject.single(&config), &long_requests(&spec));
        let two_level = Exchange { route: ExchangeRoute::TwoLevel, ..Exchange::default() };
        let far = PlanFile { exchange: two_level, overlap: Overlap::Arrivals, micro_batches: 2, ..ep(6, &spec) };
        let stages = Mesh { tp: 1, pp: 2, dp: 3, ep: 3 };
        let by_requests = PlanFile { micro_batches: 3, ..separate(1, 3, 3, &spec) };
        for (what, file) in [("two nodes", far), ("MA by requests", by_requests), ("stages", file(stages, 6))] {
            let (many, moved) = run_moving(&subject, with_replicas(file, &spec), &config);
            assert_same_bits(&format!("{name} {what}"), &single, &many);
            assert!(moved.epochs.len() > 3, "{name} {what}: {moved:?}");
        }
        // Where heads are split, results are those of the same plan with its experts at rest.
        let heads = with_replicas(file(Mesh { tp: 2, pp: 1, dp: 2, ep: 4 }, 4), &spec);
        let at_rest = results(&mut subject.many(&subject.plan(heads.clone()), &config), &long_requests(&spec));
        let (many, moved) = run_moving(&subject, heads, &config);
        assert_same_bits(&format!("{name} split heads"), &at_rest, &many);
        assert!(moved.epochs.len() > 3, "{name}: {moved:?}");
    }
}

#[test]
fn experts_move_through_preemption() {
    for name in ["qwen3_moe", "deepseek_v3", "mixtral", "olmoe", "paper"] {
        let model = GoldenModel::open(name);
        let spec = model.without_capacity();
        let weights = Launch::Checkpoint(&model.checkpoint);
        let subject = Subject { name, spec: &spec, weights: &weights };
        let single = results(&mut subject.single(&exact_config()), &long_requests(&spec));
        let file = with_replicas(ep(2, &spec), &spec);
        let ledger = *subject.many(&subject.plan(file.clone()), &exact_config()).ledger();
        // A little more than the longest sequence, for four of them.
        let kv_cache = Some(Bytes(9 * ledger.kv_cache_bytes / ledger.num_blocks as u64));
        let (many, moved) = run_moving(&subject, file, &EngineConfig { kv_cache, ..exact_config() });
        assert!(moved.preemptions > 0 && moved.epochs.len() > 3, "{name}: {moved:?}");
        assert_same_bits(name, &single, &many);
    }
}

/// Every expert in its whole width, and nothing else: matrices of this model need no padding.
#[test]
fn bytes_that_move_are_those_of_the_weights() {
    let folder = tiny_moe();
    let model = GoldenModel::in_folder(&folder);
    let weights = Launch::Checkpoint(&model.checkpoint);
    let subject = Subject { name: "tiny-moe", spec: &model.spec, weights: &weights };
    for (dtype, size) in [(LoadDType::Float32, 4), (LoadDType::Auto, 2)] {
        let config = EngineConfig { dtype, record_calls: true, ..exact_config() };
        let plan = subject.plan(with_replicas(ep(4, &model.spec), &model.spec));
        let mut engine = subject.many(&plan, &config);
        let mut num_moves = 0;
        let mut bytes = 0;
        let mut is_first = true;
        let many = results_with(&mut engine, &long_requests(&model.spec), |engine| {
            if std::mem::take(&mut is_first) {
                num_moves = move_on(engine, &plan);
            } else {
                bytes += engine.last_step().weights_sent;
            }
        });
        assert!(num_moves > 20);
        assert_eq!((bytes, engine.adaptation().placement().epoch), (num_moves as u64 * 3 * 128 * 96 * size, 1));
        assert_same_bits("tiny-moe", &results(&mut subject.single(&config), &long_requests(&model.spec)), &many);
        let report = engine.adaptation().balance_report().unwrap();
        assert_eq!(report.moved_bytes, bytes);
    }
}

/// Memory is settled for as many experts as a rank may come to hold, not for those that it begins with.
#[test]
fn a_rank_that_begins_with_one_expert_has_room_for_its_share() {
    let folder = tiny_moe();
    let model = GoldenModel::in_folder(&folder);
    let weights = Launch::Checkpoint(&model.checkpoint);
    let subject = Subject { name: "tiny-moe", spec: &model.spec, weights: &weights };
    let config = exact_config();
    let single = results(&mut subject.single(&config), &long_requests(&model.spec));
    let experts: Vec<Vec<Rank>> = (0..16).map(|expert| vec![Rank(u32::from(expert > 0))]).collect();
    let layers = (0..4).map(|layer| ExplicitLayer { layer, experts: experts.clone() }).collect();
    let moe =
        MoePlan { max_experts_per_rank: Some(15), placement: InitialPlacement::Explicit(layers), ..MoePlan::default() };
    let (many, moved) = run_moving(&subject, movable(PlanFile { moe, ..ep(2, &model.spec) }), &config);
    assert_same_bits("tiny-moe", &single, &many);
    assert!(moved.epochs.len() > 1, "{moved:?}");
}
