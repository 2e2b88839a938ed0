//! What programs that were measured make of iterations.

use moesaic_planner::cost::Stack;
use moesaic_planner::iteration::{ExpertLayout, Layout};
use moesaic_planner::memory::DEFAULT_UTILIZATION;
use moesaic_planner::predict::Predictor;
use moesaic_planner::search::{Goals, Search, Space};
use moesaic_planner::serving::Requests;
use moesaic_planner::simulate::{self, Limits, Simulation, simulate};
use moesaic_planner::system::{Seen, System};
use moesaic_spec::{Arrival, Cluster, ModelSpec, TokenRange, Workload};

const PROGRAMS: [Stack; 3] = [Stack::Sglang, Stack::Vllm, Stack::Trtllm];

fn model() -> ModelSpec {
    moesaic_spec::preset("deepseek-v3").unwrap().spec().unwrap()
}

fn cluster(nodes: usize) -> Cluster {
    moesaic_spec::cluster_preset("hgx-h200").unwrap().with_gpus(8 * nodes).unwrap()
}

fn requests(concurrency: f64) -> Requests {
    Requests { input: 1024.0, output: 256.0, concurrency, prefix_hit: 0.0, step_tokens: 8192.0, common_rhythm: true }
}

fn layouts() -> [Layout; 2] {
    let placed = Layout { dp: 16, experts: ExpertLayout::Placed { ep: 16 }, ..Layout::single(8) };
    [Layout { tp: 16, ..Layout::single(8) }, placed]
}

/// Measurements may say that a program is faster than its iterations are priced, but not that it is faster than physics.
#[test]
fn no_program_is_faster_than_the_peak_and_the_bandwidth() {
    let (model, cluster) = (model(), cluster(2));
    for stack in PROGRAMS {
        let mut predictor = Predictor::new(&model, &cluster, stack, None);
        for layout in &layouts() {
            for concurrency in [1.0, 64.0, 2048.0] {
                let prediction = predictor.predict(layout, &requests(concurrency)).unwrap();
                assert!(
                    prediction.mbu <= 1.0 && prediction.mfu <= 1.0,
                    "{stack:?}, {concurrency} users: {prediction:?}"
                );
                for estimate in [prediction.ttft_s, prediction.tpot_s, prediction.tokens_per_s] {
                    assert!(estimate.low <= estimate.value && estimate.value <= estimate.high, "{estimate:?}");
                }
                assert!((0.0..=1.0).contains(&prediction.gpu_utilization));
            }
        }
    }
}

/// What was measured is known better than what was not.
#[test]
fn a_program_that_was_measured_has_narrower_intervals_where_its_model_was() {
    let (model, cluster) = (model(), cluster(1));
    let other = moesaic_spec::preset("mixtral-8x7b").unwrap().spec().unwrap();
    let layout = Layout { tp: 8, ..Layout::single(8) };
    let sd = |model: &ModelSpec| {
        let mut predictor = Predictor::new(model, &cluster, Stack::Trtllm, None);
        predictor.predict(&layout, &requests(64.0)).unwrap().tpot_s.sd()
    };
    assert!(sd(&model) < 0.7 * sd(&other), "{} {}", sd(&model), sd(&other));
}

#[test]
fn requests_of_users_obey_little_s_law() {
    let (model, cluster) = (model(), cluster(2));
    for system in [System::Measured, System::UNMEASURED] {
        let mut predictor = Predictor { system, ..Predictor::new(&model, &cluster, Stack::Sglang, None) };
        for layout in &layouts() {
            let requests = requests(512.0);
            let prediction = predictor.predict(layout, &requests).unwrap();
            let request_s = prediction.ttft_s.value + (requests.output - 1.0) * prediction.tpot_s.value;
            let little = requests.concurrency * requests.output / request_s;
            let throughput = prediction.tokens_per_s.value;
            assert!((throughput / little - 1.0).abs() < 0.01, "{system:?}: {throughput} for {little}");
        }
    }
}

/// A change that halves an iteration halves what the program does not add.
#[test]
fn what_a_program_adds_stays_when_iterations_change() {
    let (model, cluster) = (model(), cluster(2));
    let mut predictor = Predictor::new(&model, &cluster, Stack::Sglang, None);
    let (before, prediction) = predictor.predict_serving(&layouts()[1], &requests(512.0)).unwrap();
    let seen = Seen { ttft: prediction.ttft_s, tpot: prediction.tpot_s };
    let after = moesaic_planner::serving::Serving { tpot: before.tpot / 2.0, ttft: before.ttft / 2.0, ..before };
    let changed = seen.changed(&before, &after);
    for (seen, changed, before, after) in
        [(seen.tpot, changed.tpot, before.tpot, after.tpot), (seen.ttft, changed.ttft, before.ttft, after.ttft)]
    {
        let expected = if seen.value > before { seen.value - before + after } else { seen.value / 2.0 };
        assert!((changed.value / expected - 1.0).abs() < 1e-9, "{seen:?} {changed:?}");
    }
}

/// On all GPUs of a cluster.
fn search<'a>(model: &'a ModelSpec, cluster: &'a Cluster, requests: Requests, goals: Goals) -> Search<'a> {
    let gpus = cluster.num_gpus();
    Search {
        space: Space { model, cluster, gpus: gpus..=gpus, compress: true, uneven: false, tolerate_failures: 0 },
        requests,
        longest: requests.input + requests.output,
        goals,
        concurrencies: None,
        utilization: DEFAULT_UTILIZATION,
        prune: true,
    }
}

/// The search promises what the prediction says, and keeps goals by it.
#[test]
fn the_best_plan_keeps_goals_as_users_see_them() {
    let (model, cluster) = (model(), cluster(2));
    for (stack, tpot) in [(Stack::Sglang, 0.04), (Stack::Trtllm, 0.03), (Stack::Vllm, 0.05)] {
        let mut predictor = Predictor::new(&model, &cluster, stack, None);
        let goals = Goals { ttft: None, tpot: Some(tpot) };
        let found = search(&model, &cluster, requests(1.0), goals).run_seen(&mut predictor).unwrap();
        let best = found.best().expect("something keeps the goal");
        assert!(best.tpot <= tpot, "{stack:?}: {} for {tpot}", best.tpot);
        // Time that is left would be more requests: iterations get a goal that the program just keeps.
        assert!(best.tpot >= 0.75 * tpot, "{stack:?}: {} for {tpot}", best.tpot);
        let copies = best.shape.copies as f64;
        let asked = Requests { concurrency: best.concurrency / copies, ..requests(1.0) };
        let prediction = predictor.predict(&best.layout, &asked).unwrap();
        assert_eq!((prediction.tpot_s.value, prediction.ttft_s.value), (best.tpot, best.ttft));
        assert!((prediction.tokens_per_s.value * copies / best.throughput - 1.0).abs() < 1e-9);
        assert!(prediction.memory.total() <= prediction.gpu_memory, "{:?}", prediction.memory);
    }
}

/// Steps of the simulation take what those of the measured program do, so the closed form and it agree.
#[test]
fn the_simulation_has_the_pace_of_the_program() {
    let (model, cluster) = (model(), cluster(2));
    let range = |tokens| TokenRange { min: tokens, max: tokens };
    let workload = Workload {
        name: "test".into(),
        num_requests: 512,
        input_tokens: range(1024),
        output_tokens: range(256),
        seed: 1,
        arrival: Arrival::Closed { concurrency: 128 },
        prefix_hit: 0.0,
    };
    let limits =
        Limits { max_num_seqs: 512, max_num_batched_tokens: 8192, block_size: 32, enable_chunked_prefill: true };
    let layout = &layouts()[1];
    let simulation =
        Simulation { layout, workload: &workload, limits, goals: simulate::Goals::default(), stragglers: None };
    let shown = |system: System| {
        let mut predictor = Predictor { system, ..Predictor::new(&model, &cluster, Stack::Sglang, None) };
        let closed = predictor.predict(layout, &requests(128.0)).unwrap();
        (simulate(&mut predictor, &simulation).unwrap(), closed)
    };
    let ((bare, closed_bare), (paced, closed_paced)) = (shown(System::UNMEASURED), shown(System::Measured));
    let factor = closed_paced.tpot_s.value / closed_bare.tpot_s.value;
    assert!((factor - 1.0).abs() > 0.01, "the program is as fast as its iterations: nothing to see");
    let simulated = paced.tpot_s.mean / bare.tpot_s.mean;
    assert!((simulated / factor - 1.0).abs() < 0.02, "{simulated} for {factor}");
    // What the program needs for a request beside its steps is in the first token's time.
    assert!(paced.ttft_s.mean > 0.9 * closed_paced.ttft_s.value, "{:?} {:?}", paced.ttft_s, closed_paced.ttft_s);
    assert!(paced.tokens_per_s < bare.tokens_per_s / factor * 1.02);
}

/// Prompts and answers on GPUs of their own: within the goals, on no more GPUs than there are, and with more readers where there
/// is more to read.
#[test]
fn pools_share_gpus_by_what_there_is_to_do() {
    let (model, cluster) = (model(), cluster(4));
    let goals = Goals { ttft: Some(5.0), tpot: Some(0.05) };
    for stack in [Stack::Sglang, Stack::Moesaic] {
        let mut predictor = Predictor::new(&model, &cluster, stack, None);
        let mut shares = Vec::new();
        for (input, output) in [(512.0, 1024.0), (4096.0, 512.0)] {
            let requests = Requests { input, output, ..requests(1.0) };
            let pair = search(&model, &cluster, requests, goals)
                .best_pair(&mut predictor.iterations)
                .unwrap()
                .expect("a pair");
            assert!(
                pair.prefill.gpus() + pair.decode.gpus() <= pair.gpus && pair.gpus == cluster.num_gpus(),
                "{pair:?}"
            );
            assert!(goals.missed_by(pair.seen.ttft.value, pair.seen.tpot.value) <= 1.0, "{pair:?}");
            // Answers are no more than prompts that the readers read.
            let layout = &pair.prefill.layout;
            let batch = moesaic_planner::iteration::Batch::prefill(1.0, input);
            let read_s = predictor.iterations.price(layout, &batch).unwrap().seconds;
            let prompts_per_s = (layout.dp * pair.prefill.count) as f64 / read_s;
            assert!(pair.throughput / output <= 1.001 * prompts_per_s, "{pair:?}: {prompts_per_s}");
            shares.push(pair.prefill.gpus() as f64 / pair.gpus as f64);
        }
        assert!(shares[0] < shares[1], "{stack:?}: {shares:?}");
    }
}
