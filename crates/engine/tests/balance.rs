//! The balancer on real steps: what a router's preferences do to real ranks, before and after experts have moved.

mod common;

use std::path::Path;

use common::plans::{Results, Subject, assert_same_bits, ep, exact_config, results, results_with, separate};
use common::{GoldenModel, prompt};
use moesaic_engine::balance::BalanceReport;
use moesaic_engine::{EngineConfig, Launch, Request, SamplingParams, StepRecord};
use moesaic_model::checkpoint::RandomWeights;
use moesaic_plan::eplb::max_over_mean;
use moesaic_plan::plan::{Balance, MoePlan};
use moesaic_plan::{Plan, PlanFile, Rank, Work};
use moesaic_spec::model::tensors::Role;
use moesaic_spec::{DType, Ffn, ModelSpec, Scale};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

const NUM_EXPERTS: usize = 16;
const TOP_K: usize = 2;
/// A dense start of one.
const NUM_LAYERS: usize = 3;
/// By MoE layer and expert, what is added to scores before experts are chosen.
type Biases = Vec<[f32; NUM_EXPERTS]>;

/// DeepSeek's kind of router, because its bias steers the load and nothing else.
fn spec() -> ModelSpec {
    let scale = Scale { layers: Some(NUM_LAYERS), experts: Some(NUM_EXPERTS), top_k: Some(TOP_K), ..Scale::default() };
    let mut spec = GoldenModel::open("deepseek_v3").spec.scaled(&scale).unwrap();
    spec.dtype = DType::F32;
    for ffn in &mut spec.layers {
        if let Ffn::Moe(moe) = ffn {
            (moe.router.n_group, moe.router.topk_group) = (1, 1);
        }
    }
    spec
}

/// Random weights with routers' biases as given.
fn write(folder: &Path, spec: &ModelSpec, biases: &Biases) {
    let tensors = spec.tensors();
    let data: Vec<Vec<u8>> = tensors
        .iter()
        .map(|tensor| match tensor.role {
            Role::RouterBias(layer) => biases[layer - 1].iter().flat_map(|bias| bias.to_le_bytes()).collect(),
            _ => RandomWeights { seed: 5 }.tensor(tensor, DType::F32),
        })
        .collect();
    let view = |bytes, shape: &[usize]| TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap();
    let views = tensors.iter().zip(&data).map(|(tensor, bytes)| (tensor.name.clone(), view(bytes, &tensor.shape)));
    safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    std::fs::write(folder.join("config.json"), spec.to_config_json()).unwrap();
}

/// Independent sequences of tokens that are drawn, not the likeliest ones: those would soon repeat themselves.
fn traffic(spec: &ModelSpec, first_seed: u64, num: u64) -> Vec<Request> {
    let request = |seed: u64| Request {
        prompt: prompt(seed, 8 + seed as usize % 5, spec.vocab_size),
        sampling: SamplingParams { seed, ..SamplingParams::default() },
        max_tokens: 12 + seed as usize % 7,
        stop_token_ids: Vec::new(),
    };
    (first_seed..first_seed + num).map(request).collect()
}

fn config() -> EngineConfig {
    EngineConfig { max_num_seqs: 6, record_calls: true, ..exact_config() }
}

/// Share of the load of each expert of each MoE layer, on one rank.
fn shares(model: &GoldenModel, requests: &[Request]) -> Vec<Vec<f64>> {
    let mut engine = model.launch(&model.spec, &EngineConfig { max_num_seqs: 48, ..exact_config() });
    let mut loads = vec![vec![0.0; NUM_EXPERTS]; NUM_LAYERS - 1];
    for request in requests {
        engine.add(request.clone()).unwrap();
    }
    while !engine.is_idle() {
        engine.step().unwrap();
        for (&layer, counts) in &engine.last_step().expert_counts {
            loads[layer as usize - 1].iter_mut().zip(counts).for_each(|(sum, &count)| *sum += f64::from(count));
        }
    }
    for loads in &mut loads {
        let total: f64 = loads.iter().sum();
        loads.iter_mut().for_each(|load| *load /= total);
    }
    loads
}

/// A model whose experts have these shares of the load, up to a few percent: biases are raised where a share is too small,
/// as in training without an auxiliary loss.
fn model_with(target: &[f64; NUM_EXPERTS]) -> (tempfile::TempDir, GoldenModel) {
    let folder = tempfile::tempdir().unwrap();
    let spec = spec();
    let requests = traffic(&spec, 1_000_000, 150);
    let mut biases: Biases = vec![[0.0; NUM_EXPERTS]; NUM_LAYERS - 1];
    for round in 0.. {
        write(folder.path(), &spec, &biases);
        let model = GoldenModel::in_folder(folder.path());
        let shares = shares(&model, &requests);
        let off = |shares: &Vec<f64>| shares.iter().zip(target).map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f64::max);
        let worst = shares.iter().map(off).fold(0.0, f64::max);
        if worst < 0.04 {
            return (folder, model);
        }
        assert!(round < 100, "shares are still off by {worst}: {shares:?}");
        for (biases, shares) in biases.iter_mut().zip(&shares) {
            for ((bias, share), target) in biases.iter_mut().zip(shares).zip(target) {
                *bias += 0.05 * (target / share.max(1e-3)).ln() as f32;
            }
        }
    }
    unreachable!()
}

fn zipf(exponent: f64) -> [f64; NUM_EXPERTS] {
    let mut shares = std::array::from_fn(|rank| (rank as f64 + 1.0).powf(-exponent));
    let total: f64 = shares.iter().sum();
    shares.iter_mut().for_each(|share| *share /= total);
    shares
}

fn balanced(file: PlanFile) -> PlanFile {
    let moe = MoePlan { redundant_experts: 4, max_experts_per_rank: Some(5), ..file.moe };
    let balance = Balance { interval: 25, threshold: 0.05, significance: 0.01, bytes_per_step: Some(8 << 10) };
    PlanFile { moe, balance: Some(balance), ..file }
}

/// Rows that experts really computed in some steps of a run: `[layer][rank]`, by the plan's schedules and the op log.
struct RankLoads<'a> {
    plan: &'a Plan,
    spec: &'a ModelSpec,
    rows: Vec<Vec<f64>>,
}

impl RankLoads<'_> {
    fn new<'a>(plan: &'a Plan, spec: &'a ModelSpec) -> RankLoads<'a> {
        RankLoads { plan, spec, rows: vec![vec![0.0; plan.world_size()]; NUM_LAYERS - 1] }
    }

    fn count(&mut self, record: &StepRecord) {
        let num_micro_batches = record.sequences[0].len();
        for (rank, of_rank) in record.ranks.iter().enumerate() {
            let schedule = self.plan.schedule(self.spec, Rank(rank as u32), num_micro_batches);
            for (action, calls) in schedule.actions.iter().zip(&of_rank.calls) {
                let Work::Experts { .. } = action.work else { continue };
                for call in calls.iter().filter(|call| call.op == "experts") {
                    let rows = call.dims.iter().find(|(letter, _)| *letter == "R").unwrap().1;
                    self.rows[action.layer as usize - 1][rank] += rows as f64;
                }
            }
        }
    }

    /// Of the worst layer, over the ranks that have experts.
    fn max_over_mean(&self) -> f64 {
        let ranks = self.plan.expert_slots().into_iter().flatten().next().unwrap();
        let of_layer =
            |rows: &Vec<f64>| max_over_mean(&ranks.iter().map(|one| rows[one.rank.idx()]).collect::<Vec<_>>());
        self.rows.iter().map(of_layer).fold(0.0, f64::max)
    }
}

/// What one run of a balanced plan came to.
struct Balanced {
    results: Results,
    report: BalanceReport,
    /// Max/mean of the steps before the first move, and of those after it but the first interval.
    before: f64,
    after: f64,
    steps_after: usize,
    rows_after: f64,
}

fn run_balanced(subject: &Subject, file: PlanFile, requests: &[Request]) -> Balanced {
    let plan = subject.plan(balanced(file));
    let mut engine = subject.many(&plan, &config());
    let (mut before, mut after) = (RankLoads::new(&plan, subject.spec), RankLoads::new(&plan, subject.spec));
    let mut steps_after = 0;
    let mut is_first = true;
    let results = results_with(&mut engine, requests, |engine| {
        if std::mem::take(&mut is_first) {
            return;
        }
        let record = engine.last_step();
        if record.placement_epoch == 0 {
            before.count(record);
        } else {
            after.count(record);
            steps_after += 1;
        }
    });
    let report = engine.adaptation().balance_report().unwrap().clone();
    let rows_after = after.rows[0].iter().sum();
    let (before, after) = (before.max_over_mean(), after.max_over_mean());
    Balanced { results, report, before, after, steps_after, rows_after }
}

#[test]
fn a_skewed_router_is_balanced_and_no_token_changes() {
    let (_folder, model) = model_with(&zipf(0.6));
    let weights = Launch::Checkpoint(&model.checkpoint);
    let subject = Subject { name: "zipf", spec: &model.spec, weights: &weights };
    let requests = traffic(&model.spec, 0, 400);
    let single = results(&mut subject.single(&config()), &requests);
    for (what, file) in [("EP", ep(4, &model.spec)), ("MA", separate(1, 4, 4, &model.spec))] {
        let run = run_balanced(&subject, file, &requests);
        eprintln!("{what}: {:.3} {:.3} {} {} {:?}", run.before, run.after, run.steps_after, run.rows_after, run.report);
        assert_same_bits(what, &single, &run.results);
        assert!(run.before > 1.5, "{what}: {}", run.before);
        assert!(run.after < 1.15, "{what}: {}", run.after);
    }
}

#[test]
fn a_level_router_is_left_alone() {
    let (_folder, model) = model_with(&[1.0 / NUM_EXPERTS as f64; NUM_EXPERTS]);
    let weights = Launch::Checkpoint(&model.checkpoint);
    let subject = Subject { name: "level", spec: &model.spec, weights: &weights };
    let requests = traffic(&model.spec, 0, 400);
    for (what, file) in [("EP", ep(4, &model.spec)), ("MA", separate(1, 4, 4, &model.spec))] {
        let run = run_balanced(&subject, file, &requests);
        eprintln!("{what}: {:.3} {:?}", run.before, run.report);
        assert!(run.report.intervals >= 10, "{what}: {:?}", run.report);
        assert!(run.report.decisions.is_empty(), "{what}: {:?}", run.report.decisions);
    }
}
