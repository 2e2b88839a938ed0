//! The balancer on real routers: a skewed one becomes level and no token differs, a uniform one is left alone.

mod common;

use std::collections::BTreeMap;

use common::plans::{Results, Subject, assert_same_bits, ep, exact_config, results, separate};
use common::router::{model_with_loads, random_requests};
use moesaic_engine::{Engine, EngineConfig, Launch, SeqId, StepRecord};
use moesaic_plan::plan::{Balance, MoePlan};
use moesaic_plan::{Plan, PlanFile, Rank, Work};
use moesaic_spec::ModelSpec;

/// Zipf's law.
fn zipf(exponent: f64) -> Vec<f64> {
    let weights: Vec<f64> = (0..16).map(|expert| f64::from(expert + 1).powf(-exponent)).collect();
    let total: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / total).collect()
}

fn config() -> EngineConfig {
    EngineConfig { max_num_batched_tokens: 96, record_calls: true, ..exact_config() }
}

fn balanced(file: PlanFile, redundant_experts: usize) -> PlanFile {
    let balance = Balance { interval: 20, threshold: 0.05, significance: 0.01, bytes_per_step: None };
    let moe = MoePlan { redundant_experts, max_experts_per_rank: Some(4 + redundant_experts / 4), ..file.moe };
    PlanFile { moe, balance: Some(balance), ..file }
}

/// Rows that each rank's experts really computed, by layer.
type Rows = BTreeMap<u32, Vec<f64>>;

fn count_rows(plan: &Plan, spec: &ModelSpec, record: &StepRecord, rows: &mut Rows) {
    for (rank, of_rank) in record.ranks.iter().enumerate() {
        let schedule = plan.schedule(spec, Rank(rank as u32), record.sequences[0].len());
        for (action, calls) in schedule.actions.iter().zip(&of_rank.calls) {
            if !matches!(action.work, Work::Experts { .. }) {
                continue;
            }
            for call in calls.iter().filter(|call| call.op == "experts") {
                let (_, computed) = call.dims.iter().find(|(name, _)| *name == "R").unwrap();
                rows.entry(action.layer).or_insert_with(|| vec![0.0; record.ranks.len()])[rank] += *computed as f64;
            }
        }
    }
}

/// The worst layer's fullest rank by the mean of the four ranks that have experts.
fn max_over_mean(rows: &Rows) -> f64 {
    let of_layer = |rows: &Vec<f64>| rows.iter().copied().fold(0.0, f64::max) * 4.0 / rows.iter().sum::<f64>();
    rows.values().map(of_layer).fold(0.0, f64::max)
}

/// Requests that are open at a time.
const NUM_OPEN: u64 = 32;

/// Runs requests, of which so many are always open, and calls `after_step` until it wants no more; those that are open then
/// run to their ends. Results by request.
fn serve(engine: &mut Engine, spec: &ModelSpec, mut after_step: impl FnMut(&mut Engine) -> bool) -> Results {
    let mut open: Vec<(usize, SeqId)> = Vec::new();
    let mut all = Results::new();
    let mut goes_on = true;
    while goes_on || !engine.is_idle() {
        while goes_on && (open.len() as u64) < NUM_OPEN {
            let seed = all.len() as u64;
            let request = random_requests(spec, seed..seed + 1).remove(0);
            open.push((all.len(), engine.add(request).unwrap()));
            all.push((Vec::new(), Vec::new()));
        }
        for event in engine.step().unwrap().events {
            let at = open.iter().position(|&(_, id)| id == event.id).unwrap();
            all[open[at].0].1.push(event.token);
            if event.finish.is_some() {
                let (request, id) = open.swap_remove(at);
                all[request].0 = engine.take_logits(id).into_values().flatten().collect();
            }
        }
        goes_on = goes_on && after_step(engine);
    }
    all
}

/// The same requests on one rank.
fn serve_single(subject: &Subject, num_requests: usize) -> Results {
    let config = EngineConfig { max_num_seqs: NUM_OPEN as usize, max_num_waiting: num_requests, ..config() };
    results(&mut subject.single(&config), &random_requests(subject.spec, 0..num_requests as u64))
}

/// Four ranks with experts: those of attention, and a pool of their own.
fn plans(spec: &ModelSpec) -> [(&'static str, PlanFile); 2] {
    [("EP", ep(4, spec)), ("MA by requests", separate(1, 4, 4, spec))]
}

#[test]
fn a_skewed_router_becomes_level_and_no_token_differs() {
    let (_folder, model) = model_with_loads(&zipf(0.6));
    let weights = Launch::Checkpoint(&model.checkpoint);
    let subject = Subject { name: "zipf", spec: &model.spec, weights: &weights };
    let mut single = Results::new();
    for (what, file) in plans(&model.spec) {
        let plan = subject.plan(balanced(file, 4));
        let mut engine = subject.many(&plan, &config());
        let (mut before, mut after) = (Rows::new(), Rows::new());
        let mut counts = vec![0u64; 16];
        let mut measured = 0;
        let many = serve(&mut engine, &model.spec, |engine| {
            let record = engine.last_step();
            let rows = if record.placement_epoch == 0 { &mut before } else { &mut after };
            count_rows(&plan, &model.spec, record, rows);
            let of_layer = record.expert_counts.values().next().unwrap();
            counts.iter_mut().zip(of_layer).for_each(|(sum, n)| *sum += u64::from(*n));
            measured += u32::from(record.placement_epoch > 0);
            assert!(record.step < 200, "{what}: nothing moved");
            measured < 50
        });
        // The router is what it should be: Zipf's law, for each expert within what it was fitted to.
        let total: u64 = counts.iter().sum();
        for (share, count) in zipf(0.6).iter().zip(&counts) {
            let off = *count as f64 / total as f64 / share - 1.0;
            assert!(off.abs() < 0.15, "{what}: {off} off {share}: {counts:?}");
        }
        let (before, after) = (max_over_mean(&before), max_over_mean(&after));
        assert!(before > 1.5 && after < 1.15, "{what}: {before} before, {after} after");
        let report = engine.adaptation().balance_report().unwrap().clone();
        assert_eq!((report.decisions[0].step, report.decisions[0].layers), (20, 2), "{what}: at the first interval");
        assert!(report.moved_bytes > 0);
        if single.len() < many.len() {
            single = serve_single(&subject, many.len());
        }
        assert_same_bits(what, &single[..many.len()].to_vec(), &many);
    }
}

#[test]
fn a_uniform_router_is_left_alone() {
    let (_folder, model) = model_with_loads(&[1.0 / 16.0; 16]);
    let weights = Launch::Checkpoint(&model.checkpoint);
    let subject = Subject { name: "uniform", spec: &model.spec, weights: &weights };
    // With replicas, too: they begin where they make no rank's share larger than another's.
    for redundant_experts in [0, 4] {
        let plan = subject.plan(balanced(ep(4, &model.spec), redundant_experts));
        let few = EngineConfig { max_num_batched_tokens: 32, record_calls: false, keep_logits: false, ..config() };
        let mut engine = subject.many(&plan, &few);
        serve(&mut engine, &model.spec, |engine| {
            assert_eq!(engine.last_step().placement_epoch, 0);
            assert!(!engine.adaptation().is_migrating());
            engine.last_step().step < 300
        });
        let report = engine.adaptation().balance_report().unwrap();
        assert!(report.intervals >= 15 && report.quiet_intervals == report.intervals, "{report:?}");
        assert_eq!(report.moved_bytes, 0);
        // Not because nothing was to be seen: short windows are uneven.
        assert!(report.quiet.iter().any(|quiet| quiet.max_over_mean > 1.02), "{report:?}");
    }
}
