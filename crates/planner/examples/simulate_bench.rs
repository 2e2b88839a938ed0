//! How many simulations a second one core runs, and how near the closed form is to them.
//!
//! A trial is 1,000 requests of 1,024 tokens in and 128 out, 64 at a time, on 16 GPUs: from drawing the requests to the
//! summed-up result. Curves of prices are there from a trial before, as in a search.

use std::time::Instant;

use moesaic_planner::cost::{CostModel, Precision, Stack};
use moesaic_planner::iteration::{ExpertLayout, Formats, Iterations, Layout};
use moesaic_planner::load::{ExpertLoad, LoadModel};
use moesaic_planner::network::{Library, Network};
use moesaic_planner::predict::Predictor;
use moesaic_planner::serving::Requests;
use moesaic_planner::simulate::{Goals, Limits, Simulated, Simulation, simulate};
use moesaic_planner::system::System;
use moesaic_spec::{Arrival, TokenRange, Workload};

const INPUT: usize = 1024;
const OUTPUT: usize = 128;
const STEP_TOKENS: usize = 2048;

/// Lengths around the mean by up to this share of it.
fn workload(users: usize, requests: usize, around: f64) -> Workload {
    let tokens = |mean: usize| {
        let off = (mean as f64 * around) as usize;
        TokenRange { min: mean - off, max: mean + off }
    };
    let (input_tokens, output_tokens) = (tokens(INPUT), tokens(OUTPUT));
    let arrival = Arrival::Closed { concurrency: users };
    let name = "bench".into();
    Workload { name, num_requests: requests, input_tokens, output_tokens, seed: 1, arrival, prefix_hit: 0.0 }
}

fn run(predictor: &mut Predictor, layout: &Layout, workload: &Workload) -> Simulated {
    let limits = Limits {
        max_num_seqs: 1024,
        max_num_batched_tokens: STEP_TOKENS,
        block_size: 32,
        enable_chunked_prefill: true,
    };
    let simulation = Simulation { layout, workload, limits, goals: Goals::default(), stragglers: Some(1) };
    simulate(predictor, &simulation).unwrap()
}

fn main() {
    let model = moesaic_spec::preset("qwen3-235b-a22b").unwrap().spec().unwrap();
    let cluster = moesaic_spec::cluster_preset("dgx-h100-x2").unwrap();
    let formats = Formats { dense: Precision::Bf16, experts: Precision::Bf16, kv: Precision::Bf16 };
    let iterations = Iterations::new(
        &model,
        &cluster,
        formats,
        CostModel::new(&cluster.gpu, Stack::Sglang),
        Network::new(&cluster, Library::Custom),
        Some(ExpertLoad::new(LoadModel::Uniform, 128, 8).unwrap().into()),
    );
    let mut predictor = Predictor { iterations, utilization: 0.9, system: System::UNMEASURED };
    let plan = |tp: usize, dp: usize, placed: bool| Layout {
        tp,
        dp,
        experts: if placed { ExpertLayout::Placed { ep: tp * dp } } else { ExpertLayout::Cut },
        ..Layout::single(8)
    };
    let plans = [
        ("TP16", plan(16, 1, false)),
        ("TP8 DP2 EP16", plan(8, 2, true)),
        ("TP4 DP4 EP16", plan(4, 4, true)),
        ("DP16 EP16", plan(1, 16, true)),
    ];
    for (name, layout) in &plans {
        let workload = workload(64, 1000, 0.0);
        let steps = run(&mut predictor, layout, &workload).steps;
        let (start, mut trials) = (Instant::now(), 0);
        while start.elapsed().as_secs_f64() < 1.0 {
            run(&mut predictor, layout, &workload);
            trials += 1;
        }
        println!("{name:<13} {:>6.1} trials/s of {steps} steps", f64::from(trials) / start.elapsed().as_secs_f64());
    }
    println!("\nsimulated (closed form, difference)   TPOT ms               TTFT ms               tokens/s");
    for users in [16, 64, 256, 1024] {
        for around in [0.0, 0.5] {
            for (name, layout) in &plans {
                let simulated = run(&mut predictor, layout, &workload(users, 16 * users, around)).steady.unwrap();
                let requests = Requests {
                    input: INPUT as f64,
                    output: OUTPUT as f64,
                    concurrency: users as f64,
                    prefix_hit: 0.0,
                    step_tokens: STEP_TOKENS as f64,
                    common_rhythm: around == 0.0,
                };
                let closed = predictor.predict(layout, &requests).unwrap();
                let figures = [
                    (1e3 * simulated.tpot_s, 1e3 * closed.tpot_s.value),
                    (1e3 * simulated.ttft_s, 1e3 * closed.ttft_s.value),
                    (simulated.tokens_per_s, closed.tokens_per_s.value),
                ];
                let cell = |(ours, closed): (f64, f64)| {
                    format!("{ours:>6.0} ({closed:>6.0}, {:>+4.0} %)", 100.0 * (closed / ours - 1.0))
                };
                let lengths = if around > 0.0 { "random" } else { "equal" };
                println!("{name:<13} {users:>4} users, {lengths:<7} {}", figures.map(cell).join(" "));
            }
        }
    }
}
