//! Many ranks against one: the same bits wherever the arithmetic is the same, near where sums are cut.

mod common;

use std::sync::Arc;

use common::plans::{
    Results, Subject, assert_same_bits, cluster, ep, exact_config, file, num_experts, relative_error, requests,
    results, separate,
};
use common::{GoldenModel, golden_names, greedy, prompt};
use moesaic_engine::{EngineConfig, Launch, Ranks, Request, launch_plan};
use moesaic_model::LoadDType;
use moesaic_plan::plan::{AttentionPlan, Exchange, ExchangePrecision, ExchangeRoute, Mesh, MoePlan, Overlap};
use moesaic_plan::{Plan, PlanFile};
use moesaic_spec::{Bytes, ModelSpec};

fn run_plan(model: &GoldenModel, spec: &ModelSpec, file: PlanFile, config: &EngineConfig) -> Results {
    let weights = Launch::Checkpoint(&model.checkpoint);
    let subject = Subject { name: &model.name, spec, weights: &weights };
    results(&mut subject.many(&subject.plan(file), config), &requests(spec))
}

fn run_single(model: &GoldenModel, spec: &ModelSpec, config: &EngineConfig) -> Results {
    results(&mut model.launch(spec, config), &requests(spec))
}

#[test]
fn expert_parallelism_gives_the_same_bits_on_any_number_of_ranks() {
    for name in golden_names() {
        let model = GoldenModel::open(&name);
        let spec = model.without_capacity();
        let single = run_single(&model, &spec, &exact_config());
        for ranks in [1, 2, 3, 4, 8, 16] {
            let many = run_plan(&model, &spec, ep(ranks, &spec), &exact_config());
            assert_same_bits(&format!("{name} on {ranks} ranks"), &single, &many);
        }
    }
}

#[test]
fn experts_anywhere_give_the_same_bits() {
    for name in golden_names() {
        let model = GoldenModel::open(&name);
        let spec = model.without_capacity();
        // In the checkpoint's own types, too: BF16 values are rounded at the same places.
        for dtype in [LoadDType::Float32, LoadDType::Auto] {
            let config = EngineConfig { dtype, ..exact_config() };
            let single = run_single(&model, &spec, &config);
            let check = |what: &str, file: PlanFile| {
                let many = run_plan(&model, &spec, file, &config);
                assert_same_bits(&format!("{name} {dtype:?} {what}"), &single, &many);
            };
            for overlap in [Overlap::None, Overlap::MicroBatches, Overlap::Arrivals] {
                for route in [ExchangeRoute::Direct, ExchangeRoute::TwoLevel] {
                    let exchange = Exchange { route, ..Exchange::default() };
                    let file = PlanFile { overlap, exchange, micro_batches: 3, ..ep(9, &spec) };
                    check(&format!("{overlap:?} {route:?}"), file);
                }
            }
            // Two replicas of some experts.
            let redundant = ep(5, &spec);
            let moe =
                MoePlan { redundant_experts: 2, max_experts_per_rank: Some(num_experts(&spec) + 2), ..redundant.moe };
            check("with replicas", PlanFile { moe, ..redundant });
            check("MA by requests", PlanFile { micro_batches: 2, ..separate(1, 5, 3, &spec) });
            check(
                "MA by requests, relayed",
                PlanFile {
                    exchange: Exchange { route: ExchangeRoute::TwoLevel, ..Exchange::default() },
                    ..separate(1, 7, 3, &spec)
                },
            );
            check("pipeline", PlanFile { micro_batches: 2, ..file(Mesh { tp: 1, pp: 2, dp: 1, ep: 1 }, 2) });
            check("replicas of the model", file(Mesh { tp: 1, pp: 1, dp: 3, ep: 1 }, 3));
            // Every layer has ranks of its own, one for each expert.
            let layers = spec.layers.len();
            let experts = num_experts(&spec);
            if layers * experts <= 16 {
                let mesh = Mesh { tp: 1, pp: layers, dp: experts, ep: experts };
                check("GPUs for each layer", file(mesh, layers * experts));
            }
        }
    }
}

#[test]
fn preemption_and_the_prefix_cache_change_no_bit() {
    for name in ["qwen3_moe", "deepseek_v3", "mixtral", "olmoe", "paper"] {
        let model = GoldenModel::open(name);
        let spec = model.without_capacity();
        let long: Vec<Request> =
            (0..8).map(|seed| greedy(&prompt(seed, 20 + seed as usize, spec.vocab_size), 16)).collect();
        // Kept logits are of every position, so the prefix cache is off with them: tokens and their logprobs are held then.
        for keep_logits in [true, false] {
            let roomy = EngineConfig { keep_logits, ..exact_config() };
            let mut engine = model.launch(&spec, &roomy);
            let single = results(&mut engine, &long);
            assert_eq!(engine.stats().preemptions, 0);
            let plan = Arc::new(Plan::new(ep(2, &spec), &spec, &cluster()).unwrap());
            let weights = Launch::Checkpoint(&model.checkpoint);
            let launch =
                |config: &EngineConfig| launch_plan(&spec, &weights, &plan, config, Ranks::Threads, |_| ()).unwrap();
            let ledger = *launch(&roomy).ledger();
            let block = ledger.kv_cache_bytes / ledger.num_blocks as u64;
            // A little more than the longest sequence, for four of them.
            let mut engine = launch(&EngineConfig { kv_cache: Some(Bytes(9 * block)), ..roomy });
            let many = results(&mut engine, &long);
            assert!(engine.stats().preemptions > 0, "{name}: nothing was preempted");
            assert_same_bits(&format!("{name}, logits {keep_logits}"), &single, &many);
        }
    }
}

#[test]
fn where_sums_are_cut_the_results_are_near_and_repeatable() {
    let mut checked = 0;
    for name in golden_names() {
        let model = GoldenModel::open(&name);
        let spec = model.without_capacity();
        let single = run_single(&model, &spec, &exact_config());
        let heads = spec.attention.num_heads();
        let mut plans = Vec::new();
        for tp in [2, 3, 4].into_iter().filter(|&tp| tp <= heads) {
            plans.push((format!("TP {tp}"), file(Mesh { tp, pp: 1, dp: 1, ep: 1 }, tp)));
            plans.push((
                format!("TP {tp}, PP 2"),
                PlanFile { micro_batches: 2, ..file(Mesh { tp, pp: 2, dp: 2, ep: 1 }, 4 * tp) },
            ));
            let mut uneven = vec![1; tp];
            uneven[0] = heads - (tp - 1);
            let attention = AttentionPlan { heads: Some(uneven), replication: Some(2) };
            let ma = separate(tp, 1, 3, &spec);
            plans.push((format!("MA by {tp} parts of the heads"), PlanFile { attention, micro_batches: 2, ..ma }));
            let mesh = Mesh { tp, pp: 1, dp: 2, ep: 2 * tp };
            let moe = MoePlan { max_experts_per_rank: Some(num_experts(&spec)), ..MoePlan::default() };
            plans.push((format!("TP {tp} attention, EP"), PlanFile { moe, ..file(mesh, 2 * tp) }));
        }
        for (what, file) in plans {
            // A few of these models have fewer FP8 blocks than ranks.
            let Ok(_) = Plan::new(file.clone(), &spec, &cluster()) else { continue };
            let many = run_plan(&model, &spec, file.clone(), &exact_config());
            let error = relative_error(&single, &many);
            // Sums of F32 in another order: a few units in the last place, grown over two to four layers.
            assert!(error < 1e-5, "{name}, {what}: {error}");
            let again = run_plan(&model, &spec, file, &exact_config());
            assert_same_bits(&format!("{name}, {what}, again"), &many, &again);
            checked += 1;
        }
    }
    assert!(checked > 100, "{checked}");
}

#[test]
fn an_exchange_in_eight_bits_is_near_and_says_how_near() {
    for name in ["qwen3_moe", "deepseek_v3", "mixtral"] {
        let model = GoldenModel::open(name);
        let spec = model.without_capacity();
        let single = run_single(&model, &spec, &exact_config());
        // One factor for 128 values: int8 errs by 1/254 of the largest, E4M3 by 1/16 of each; sums make it smaller.
        for (precision, limit) in [(ExchangePrecision::Int8, 0.02), (ExchangePrecision::Fp8, 0.05)] {
            let exchange = Exchange { precision, ..Exchange::default() };
            let plan = Plan::new(PlanFile { exchange, ..ep(4, &spec) }, &spec, &cluster()).unwrap();
            let weights = Launch::Checkpoint(&model.checkpoint);
            let mut engine =
                launch_plan(&spec, &weights, &Arc::new(plan), &exact_config(), Ranks::Threads, |_| ()).unwrap();
            engine.add(requests(&spec)[3].clone()).unwrap();
            let mut sums = (0.0, 0.0);
            while !engine.is_idle() {
                engine.step().unwrap();
                let (error, total) = engine.last_step().quantization;
                sums = (sums.0 + error, sums.1 + total);
            }
            let reported = (sums.0 / sums.1).sqrt();
            assert!(reported > 1e-4 && reported < limit, "{name} {precision:?}: {reported}");
            let many = run_plan(&model, &spec, PlanFile { exchange, ..ep(4, &spec) }, &exact_config());
            let prompt_len = 17 * spec.vocab_size;
            let (a, b) = (&single[1].0[..prompt_len], &many[1].0[..prompt_len]);
            let error = relative_error(&vec![(a.to_vec(), vec![])], &vec![(b.to_vec(), vec![])]);
            assert!(error > 0.0 && error < 4.0 * limit, "{name} {precision:?}: {error}");
        }
    }
}
