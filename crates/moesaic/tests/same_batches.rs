//! The simulation runs what the engine runs: the same requests make the same steps.

use std::sync::Arc;

use moesaic_engine::{EngineConfig, Launch, Ranks, Request, SamplingParams, launch_plan};
use moesaic_model::checkpoint::RandomWeights;
use moesaic_plan::plan::{Mesh, Pool};
use moesaic_plan::{Plan, PlanFile};
use moesaic_planner::cost::Stack;
use moesaic_planner::iteration::Layout;
use moesaic_planner::predict::Predictor;
use moesaic_planner::simulate::{Goals, Limits, Simulation, simulate_watched};
use moesaic_spec::{Arrival, ModelSpec, TokenRange, Workload};

const MAX_NUM_SEQS: usize = 5;
const STEP_TOKENS: usize = 48;

/// Tokens of answers and of prompts in each step, all groups together.
type Steps = Vec<(usize, usize)>;

fn workload() -> Workload {
    let (input_tokens, output_tokens) = (TokenRange { min: 1, max: 90 }, TokenRange { min: 1, max: 12 });
    let name = "mixed".into();
    Workload {
        name,
        num_requests: 24,
        input_tokens,
        output_tokens,
        seed: 9,
        arrival: Arrival::AtStart,
        prefix_hit: 0.0,
    }
}

fn run(spec: &ModelSpec, plan: &Arc<Plan>) -> Steps {
    let config = EngineConfig {
        max_num_seqs: MAX_NUM_SEQS,
        max_num_batched_tokens: STEP_TOKENS,
        max_model_len: Some(workload().longest()),
        enable_prefix_caching: false,
        num_threads: Some(1),
        ..EngineConfig::default()
    };
    let weights = Launch::Random(RandomWeights { seed: 1 });
    let mut engine = launch_plan(spec, &weights, plan, &config, Ranks::Threads, |_| ()).unwrap();
    for (prompt, max_tokens) in workload().requests(spec.vocab_size) {
        let sampling = SamplingParams::greedy();
        engine.add(Request { prompt, sampling, max_tokens, stop_token_ids: Vec::new() }).unwrap();
    }
    let mut steps = Vec::new();
    while !engine.is_idle() {
        let step = engine.step().unwrap();
        steps.push((step.num_decode_tokens, step.num_prefill_tokens));
    }
    steps
}

fn simulate(spec: &ModelSpec, file: &PlanFile) -> Steps {
    let cluster = moesaic_spec::cluster_preset("dgx-h100").unwrap();
    let limits = Limits {
        max_num_seqs: MAX_NUM_SEQS,
        max_num_batched_tokens: STEP_TOKENS,
        block_size: EngineConfig::default().block_size,
        enable_chunked_prefill: true,
    };
    let (layout, workload) = (Layout::of(file, &cluster), workload());
    let simulation =
        Simulation { layout: &layout, workload: &workload, limits, goals: Goals::default(), stragglers: None };
    let mut steps = Vec::new();
    simulate_watched(&mut Predictor::new(spec, &cluster, Stack::Moesaic, None), &simulation, |groups| {
        let seqs = || groups.iter().flat_map(|group| &group.batch.seqs);
        let all: usize = seqs().map(|seq| seq.token_ids.len()).sum();
        let answers = seqs().filter(|seq| seq.samples && seq.token_ids.len() == 1).count();
        steps.push((answers, all - answers));
    })
    .unwrap();
    steps
}

#[test]
fn the_simulation_makes_the_steps_that_the_engine_makes() {
    let config = include_str!("../../../examples/tiny-moe/config.json");
    let spec = ModelSpec::from_config_json(config, "config.json").unwrap();
    let cluster = moesaic_spec::cluster_preset("dgx-h100").unwrap();
    let mesh = |tp, dp, ep| Mesh { tp, pp: 1, dp, ep };
    for (mesh, pool, ranks) in
        [(mesh(1, 1, 1), Pool::Shared, 1), (mesh(1, 3, 3), Pool::Shared, 3), (mesh(1, 2, 2), Pool::Separate, 4)]
    {
        let mut file = PlanFile::new("steps", mesh, ranks);
        file.moe.pool = pool;
        file.moe.max_experts_per_rank = (mesh.ep > 1).then_some(64);
        let plan = Arc::new(Plan::new(file.clone(), &spec, &cluster).unwrap());
        let (ours, theirs) = (simulate(&spec, &file), run(&spec, &plan));
        assert!(theirs.iter().any(|&(answers, prompts)| answers > 0 && prompts > 0), "{theirs:?}");
        assert_eq!(ours, theirs, "{mesh:?}");
    }
}
