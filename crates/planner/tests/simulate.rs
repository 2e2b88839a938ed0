//! The simulation of events: what it keeps, what it equals, and what can only make it faster.

use std::collections::HashMap;

use moesaic_planner::cost::{CostModel, Precision, Stack};
use moesaic_planner::iteration::{Batch, ExpertLayout, Formats, Iterations, Layout};
use moesaic_planner::load::{ExpertLoad, LoadModel};
use moesaic_planner::network::{Library, Network};
use moesaic_planner::predict::Predictor;
use moesaic_planner::serving::Requests;
use moesaic_planner::simulate::{Goals, Limits, Simulation, simulate, simulate_watched, trials};
use moesaic_planner::system::System;
use moesaic_spec::{Arrival, Cluster, ModelSpec, TokenRange, Workload};

const LIMITS: Limits =
    Limits { max_num_seqs: 512, max_num_batched_tokens: 2048, block_size: 32, enable_chunked_prefill: true };

fn model() -> ModelSpec {
    moesaic_spec::preset("qwen3-30b-a3b").unwrap().spec().unwrap()
}

fn cluster() -> Cluster {
    moesaic_spec::cluster_preset("dgx-h100-x2").unwrap()
}

fn predictor<'a>(model: &'a ModelSpec, cluster: &'a Cluster) -> Predictor<'a> {
    let formats = Formats { dense: Precision::Bf16, experts: Precision::Bf16, kv: Precision::Bf16 };
    let load = ExpertLoad::new(LoadModel::Zipf(0.4), 128, 8).unwrap();
    let (costs, network) = (CostModel::new(&cluster.gpu, Stack::Sglang), Network::new(cluster, Library::Custom));
    let iterations = Iterations::new(model, cluster, formats, costs, network, Some(load.into()));
    Predictor { iterations, utilization: 0.9, system: System::UNMEASURED }
}

fn layout(tp: usize, dp: usize) -> Layout {
    let experts = if dp > 1 { ExpertLayout::Placed { ep: tp * dp } } else { ExpertLayout::Cut };
    Layout { tp, dp, experts, ..Layout::single(8) }
}

fn plans() -> [(&'static str, Layout); 5] {
    let pools = Layout { dp: 4, experts: ExpertLayout::Pool { ep: 4 }, micro_batches: 2, ..Layout::single(8) };
    [
        ("one GPU", layout(1, 1)),
        ("TP4", layout(4, 1)),
        ("DP4 EP8", layout(2, 4)),
        ("DP8 EP8", layout(1, 8)),
        ("4 + 4 pools", pools),
    ]
}

fn workload(num_requests: usize, input: (usize, usize), output: (usize, usize), arrival: Arrival) -> Workload {
    let tokens = |(min, max)| TokenRange { min, max };
    let (input_tokens, output_tokens) = (tokens(input), tokens(output));
    let name = "test".into();
    Workload { name, num_requests, input_tokens, output_tokens, seed: 11, arrival, prefix_hit: 0.0 }
}

fn simulation<'a>(layout: &'a Layout, workload: &'a Workload) -> Simulation<'a> {
    Simulation { layout, workload, limits: LIMITS, goals: Goals::default(), stragglers: Some(5) }
}

#[test]
fn every_request_gets_exactly_its_tokens() {
    let (model, cluster) = (model(), cluster());
    let mut predictor = predictor(&model, &cluster);
    for (name, layout) in &plans() {
        for arrival in
            [Arrival::AtStart, Arrival::Closed { concurrency: 13 }, Arrival::Poisson { requests_per_s: 40.0 }]
        {
            let workload = workload(150, (1, 3000), (1, 60), arrival);
            let (mut answers, mut read) = (HashMap::new(), 0);
            let result = simulate_watched(&mut predictor, &simulation(layout, &workload), |groups| {
                for group in groups {
                    group.updates.iter().for_each(|update| *answers.entry(update.id.0).or_insert(0) += 1);
                    let new = group.batch.seqs.iter().filter(|seq| seq.num_generated == 0);
                    read += new.map(|seq| seq.token_ids.len()).sum::<usize>();
                }
            });
            let result = result.unwrap();
            let lengths: Vec<_> = workload.lengths().collect();
            for (idx, &(_, output)) in lengths.iter().enumerate() {
                assert_eq!(answers[&(idx as u64)], output, "{name}, {arrival:?}: request {idx}");
            }
            let inputs: usize = lengths.iter().map(|&(input, _)| input).sum();
            assert_eq!((read, result.preemptions), (inputs, 0), "{name}, {arrival:?}");
            assert_eq!(result.tokens, lengths.iter().map(|&(_, output)| output as u64).sum::<u64>());
            assert!(result.gpu_utilization > 0.0 && result.gpu_utilization <= 1.0, "{name}: {result:?}");
        }
    }
}

/// The simulation has the closed form's mean, once all has settled: time per token and throughput within 8 %, for plans of
/// every kind, few users and many, equal lengths and random ones. What remains is that groups differ in their answers, too,
/// and that equal requests come in bunches.
#[test]
fn the_closed_form_is_the_mean_of_the_simulation() {
    let (model, cluster) = (model(), cluster());
    let mut predictor = predictor(&model, &cluster);
    for (name, layout) in &plans() {
        for users in [1, 16, 96] {
            for equal in [true, false] {
                let (input, output) = if equal { ((600, 600), (100, 100)) } else { ((300, 900), (50, 150)) };
                let workload = workload(24 * users + 40, input, output, Arrival::Closed { concurrency: users });
                let steady = simulate(&mut predictor, &simulation(layout, &workload)).unwrap().steady.unwrap();
                let requests = Requests {
                    input: 600.0,
                    output: 100.0,
                    concurrency: users as f64,
                    prefix_hit: 0.0,
                    step_tokens: 2048.0,
                    common_rhythm: equal,
                };
                let closed = predictor.predict(layout, &requests).unwrap();
                let tpot = closed.tpot_s.value / steady.tpot_s - 1.0;
                let throughput = closed.tokens_per_s.value / steady.tokens_per_s - 1.0;
                println!("{name}, {users} users, equal {equal}: TPOT {tpot:+.3}, throughput {throughput:+.3}");
                // Equal lengths fall into a rhythm of groups that read together, more or less, which the closed form takes for
                // perfect.
                let within = if equal { 0.12 } else { 0.04 };
                assert!(tpot.abs() < within, "{name}, {users} users, equal {equal}: TPOT {tpot:+.3}");
                assert!(throughput.abs() < within, "{name}, {users} users, equal {equal}: throughput {throughput:+.3}");
            }
        }
    }
}

#[test]
fn one_request_alone_takes_its_iterations() {
    let (model, cluster) = (model(), cluster());
    let mut predictor = predictor(&model, &cluster);
    for (name, layout) in &plans() {
        let workload = workload(1, (5000, 5000), (40, 40), Arrival::AtStart);
        let alone = Simulation { stragglers: None, ..simulation(layout, &workload) };
        let result = simulate(&mut predictor, &alone).unwrap();
        // Other groups have nothing to do.
        let mut seconds = |batch: Batch| {
            let shortfall = batch.rows() * (1.0 - 1.0 / layout.dp as f64);
            predictor.iterations.price(layout, &Batch { shortfall, ..batch }).unwrap().seconds
        };
        let chunk = |tokens: f64, before: f64, last: f64| Batch {
            prefill_context: before,
            finished_prefills: last,
            ..Batch::prefill(1.0, tokens)
        };
        let ttft =
            seconds(chunk(2048.0, 0.0, 0.0)) + seconds(chunk(2048.0, 2048.0, 0.0)) + seconds(chunk(904.0, 4096.0, 1.0));
        let decodes: f64 = (1..40).map(|token| seconds(Batch::decode(1.0, f64::from(5000 + token)))).sum();
        assert!((result.ttft_s.mean / ttft - 1.0).abs() < 1e-9, "{name}: {} {ttft}", result.ttft_s.mean);
        assert!((result.tpot_s.mean / (decodes / 39.0) - 1.0).abs() < 1e-9, "{name}: {}", result.tpot_s.mean);
        assert_eq!((result.steps, result.itl_s.percentiles.len()), (42, 101), "{name}");
    }
}

#[test]
fn more_room_for_the_cache_is_not_slower() {
    let (model, cluster) = (model(), cluster());
    let mut predictor = predictor(&model, &cluster);
    let layout = layout(1, 8);
    let workload = workload(400, (2000, 6000), (100, 400), Arrival::AtStart);
    let mut before: Option<moesaic_planner::simulate::Simulated> = None;
    for utilization in [0.24, 0.28, 0.35, 0.5, 0.9] {
        predictor.utilization = utilization;
        let result = simulate(&mut predictor, &simulation(&layout, &workload)).unwrap();
        println!(
            "{utilization}: {:.2} s, {} preemptions, KV {:.2}",
            result.seconds, result.preemptions, result.kv_use_max
        );
        assert!(result.kv_use_max <= 1.0);
        if let Some(before) = before {
            // A later request may meet other company: a percent.
            assert!(result.seconds <= 1.01 * before.seconds, "{utilization}: {} {}", result.seconds, before.seconds);
        } else {
            assert!(result.preemptions > 0 && result.kv_use_max > 0.95, "the cache is full: {result:?}");
            assert_eq!(result.tokens, workload.lengths().map(|(_, output)| output as u64).sum::<u64>());
        }
        before = Some(result);
    }
    assert_eq!(before.map(|result| result.preemptions), Some(0));
}

/// Answers of one token: prompts are all there is, few at a time or many.
#[test]
fn prompts_alone_are_read_as_fast_as_in_closed_form() {
    let (model, cluster) = (model(), cluster());
    let mut predictor = predictor(&model, &cluster);
    for (name, layout) in &plans() {
        for users in [1, 64] {
            let workload = workload(24 * users + 40, (1500, 1500), (1, 1), Arrival::Closed { concurrency: users });
            let steady = simulate(&mut predictor, &simulation(layout, &workload)).unwrap().steady.unwrap();
            let requests = Requests {
                input: 1500.0,
                output: 1.0,
                concurrency: users as f64,
                prefix_hit: 0.0,
                step_tokens: 2048.0,
                common_rhythm: true,
            };
            let closed = predictor.predict(layout, &requests).unwrap();
            let ttft = closed.ttft_s.value / steady.ttft_s - 1.0;
            assert!(ttft.abs() < 0.1, "{name}, {users} users: TTFT {ttft:+.3}");
        }
    }
}

/// Where the cache is full, users wait for a place in it; the closed form knows how many are answered, and
/// how long the others wait.
#[test]
fn a_full_cache_makes_users_wait() {
    let (model, cluster) = (model(), cluster());
    let mut predictor = predictor(&model, &cluster);
    predictor.utilization = 0.3;
    let layout = layout(1, 8);
    let workload = workload(4000, (2000, 6000), (100, 300), Arrival::Closed { concurrency: 400 });
    let result = simulate(&mut predictor, &simulation(&layout, &workload)).unwrap();
    let steady = result.steady.unwrap();
    let requests = Requests {
        input: 4000.0,
        output: 200.0,
        concurrency: 400.0,
        prefix_hit: 0.0,
        step_tokens: 2048.0,
        common_rhythm: false,
    };
    let closed = predictor.predict(&layout, &requests).unwrap();
    let off = |closed: f64, simulated: f64| closed / simulated - 1.0;
    let (throughput, ttft) =
        (off(closed.tokens_per_s.value, steady.tokens_per_s), off(closed.ttft_s.value, steady.ttft_s));
    println!(
        "KV {:.2} of {}, running {:.1}: throughput {throughput:+.3}, TTFT {ttft:+.3}, TPOT {:+.3}",
        result.kv_use_mean,
        result.kv_tokens,
        result.running,
        off(closed.tpot_s.value, steady.tpot_s)
    );
    assert!(result.kv_use_mean > 0.8, "{}", result.kv_use_mean);
    assert!(throughput.abs() < 0.08 && ttft.abs() < 0.12, "throughput {throughput:+.3}, TTFT {ttft:+.3}");
}

#[test]
fn the_same_seed_gives_the_same_and_another_another() {
    let (model, cluster) = (model(), cluster());
    let layout = layout(1, 8);
    let workload = workload(200, (100, 900), (10, 90), Arrival::Poisson { requests_per_s: 30.0 });
    let run = |stragglers| {
        let mut predictor = predictor(&model, &cluster);
        simulate(&mut predictor, &Simulation { stragglers, ..simulation(&layout, &workload) }).unwrap()
    };
    assert_eq!(run(Some(5)), run(Some(5)));
    let (mean, drawn, other) = (run(None), run(Some(5)), run(Some(6)));
    assert_ne!(drawn, other);
    assert!((drawn.seconds / mean.seconds - 1.0).abs() < 0.02, "{} {}", drawn.seconds, mean.seconds);
    let mut predictor = predictor(&model, &cluster);
    let (first, all) = trials(&mut predictor, &simulation(&layout, &workload), 5).unwrap();
    assert_eq!((first, all.trials), (drawn, 5));
    assert!(all.tpot_s.low < all.tpot_s.value && all.tpot_s.value < all.tpot_s.high, "{all:?}");
}

#[test]
fn prompts_that_begin_alike_are_read_once() {
    let (model, cluster) = (model(), cluster());
    let mut predictor = predictor(&model, &cluster);
    let layout = layout(1, 8);
    let none = workload(200, (2048, 2048), (20, 20), Arrival::Closed { concurrency: 16 });
    let half = Workload { prefix_hit: 0.5, ..none.clone() };
    let [none, half] = [none, half].map(|workload| simulate(&mut predictor, &simulation(&layout, &workload)).unwrap());
    assert_eq!(none.prefix_hit, 0.0);
    // The first prompts of each group find nothing.
    assert!(half.prefix_hit > 0.4 && half.prefix_hit <= 0.5, "{}", half.prefix_hit);
    assert!(half.ttft_s.mean < none.ttft_s.mean && half.tokens_per_s > none.tokens_per_s);
}

#[test]
fn goodput_counts_who_got_what_they_wanted() {
    let (model, cluster) = (model(), cluster());
    let mut predictor = predictor(&model, &cluster);
    let layout = layout(4, 1);
    let share = |predictor: &mut Predictor, rate: f64, goals: Goals| {
        let workload = workload(300, (500, 1500), (50, 150), Arrival::Poisson { requests_per_s: rate });
        let result = simulate(predictor, &Simulation { goals, ..simulation(&layout, &workload) }).unwrap();
        let goodput = result.goodput.unwrap();
        assert!((goodput.requests_per_s - goodput.share * result.requests_per_s).abs() < 1e-9);
        goodput.share
    };
    let goals = Goals { ttft_s: Some(0.3), tpot_s: Some(0.02), e2e_s: None };
    let [idle, busy, full] = [1.0, 15.0, 200.0].map(|rate| share(&mut predictor, rate, goals));
    assert!(idle > 0.99 && busy <= idle && full < 0.5, "{idle} {busy} {full}");
    let never = Goals { e2e_s: Some(1e-6), ..Goals::default() };
    assert_eq!(share(&mut predictor, 1.0, never), 0.0);
}

#[test]
fn groups_wait_for_the_fullest() {
    let (model, cluster) = (model(), cluster());
    let mut predictor = predictor(&model, &cluster);
    let layout = layout(1, 8);
    let seconds = |predictor: &mut Predictor, requests: usize| {
        let workload = workload(requests, (2000, 2000), (1, 1), Arrival::AtStart);
        simulate(predictor, &simulation(&layout, &workload)).unwrap().seconds
    };
    // One prompt for each group takes longer than one alone only because experts have more to do; nine take two rounds.
    let [one, eight, nine] = [1, 8, 9].map(|requests| seconds(&mut predictor, requests));
    assert!(one < eight && nine > 1.2 * eight && nine < eight + 1.2 * one, "{one} {eight} {nine}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let (model, cluster) = (model(), cluster());
    let mut predictor = predictor(&model, &cluster);
    let layout = layout(1, 8);
    let long = workload(2, (2_000_000, 2_000_000), (10, 10), Arrival::AtStart);
    let error = simulate(&mut predictor, &simulation(&layout, &long)).unwrap_err().to_string();
    assert!(error.contains("does not fit on 8 GPUs") && error.contains("2000010 tokens"), "{error}");
    let limits = Limits { max_num_batched_tokens: 100, ..LIMITS };
    let short = workload(2, (20, 20), (10, 10), Arrival::AtStart);
    let error = simulate(&mut predictor, &Simulation { limits, ..simulation(&layout, &short) }).unwrap_err();
    assert!(error.to_string().contains("max_num_batched_tokens is 100"), "{error}");
}
