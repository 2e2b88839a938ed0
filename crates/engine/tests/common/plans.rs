//! Plans for tests, a run of one, and how results of many ranks are held against those of one.

use std::sync::Arc;

use moesaic_engine::{Engine, EngineConfig, Launch, Ranks, Request, launch, launch_plan};
use moesaic_model::LoadDType;
use moesaic_plan::plan::{Mesh, MoePlan, Pool};
use moesaic_plan::{Plan, PlanFile};
use moesaic_spec::{Cluster, Ffn, ModelSpec, cluster_preset};

use super::{greedy, prompt};

const MAX_MODEL_LEN: usize = 64;

/// Everything in F32 on one thread a rank, all logits kept.
pub(crate) fn exact_config() -> EngineConfig {
    EngineConfig {
        num_threads: Some(1),
        max_model_len: Some(MAX_MODEL_LEN),
        max_num_seqs: 8,
        max_num_batched_tokens: 48,
        block_size: 8,
        dtype: LoadDType::Float32,
        keep_logits: true,
        ..EngineConfig::default()
    }
}

/// Four nodes of four.
pub(crate) fn cluster() -> Cluster {
    cluster_preset("a100-4x4").unwrap()
}

pub(crate) fn num_experts(spec: &ModelSpec) -> usize {
    spec.layers.iter().filter_map(Ffn::as_moe).map(|moe| moe.num_experts).max().unwrap()
}

/// A plan file with nothing but a mesh.
pub(crate) fn file(mesh: Mesh, ranks: usize) -> PlanFile {
    let names = ("golden".into(), "a100-4x4".into(), "chat-small".into());
    PlanFile { model: names.0, cluster: names.1, workload: names.2, ..PlanFile::new("test", mesh, ranks) }
}

/// Every rank has requests of its own and its share of the experts.
pub(crate) fn ep(ranks: usize, spec: &ModelSpec) -> PlanFile {
    let moe = MoePlan { max_experts_per_rank: Some(num_experts(spec).div_ceil(ranks)), ..MoePlan::default() };
    let mesh = Mesh { tp: 1, pp: 1, dp: ranks, ep: ranks };
    PlanFile { moe, ..file(mesh, ranks) }
}

/// Experts on `ep` ranks of their own, after `tp * dp` with attention.
pub(crate) fn separate(tp: usize, dp: usize, ep: usize, spec: &ModelSpec) -> PlanFile {
    let max_experts_per_rank = Some(num_experts(spec).div_ceil(ep));
    let moe = MoePlan { pool: Pool::Separate, max_experts_per_rank, ..MoePlan::default() };
    PlanFile { moe, ..file(Mesh { tp, pp: 1, dp, ep }, tp * dp + ep) }
}

/// Seven requests of different lengths.
pub(crate) fn requests(spec: &ModelSpec) -> Vec<Request> {
    let lens = [3, 17, 1, 30, 9, 22, 5];
    let request = |(seed, &len): (usize, &usize)| greedy(&prompt(seed as u64, len, spec.vocab_size), 4 + seed % 3);
    lens.iter().enumerate().map(request).collect()
}

/// A model with its weights.
#[derive(Clone, Copy)]
pub(crate) struct Subject<'a> {
    pub name: &'a str,
    pub spec: &'a ModelSpec,
    pub weights: &'a Launch<'a>,
}

impl Subject<'_> {
    pub(crate) fn single(&self, config: &EngineConfig) -> Engine {
        launch(self.spec, self.weights, config, |_| ()).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }

    pub(crate) fn plan(&self, file: PlanFile) -> Arc<Plan> {
        let what = format!("{} {:?} {:?}", self.name, file.mesh, file.moe);
        Arc::new(Plan::new(file, self.spec, &cluster()).unwrap_or_else(|e| panic!("{what}: {e}")))
    }

    /// Ranks as threads.
    pub(crate) fn many(&self, plan: &Arc<Plan>, config: &EngineConfig) -> Engine {
        let engine = launch_plan(self.spec, self.weights, plan, config, Ranks::Threads, |_| ());
        engine.unwrap_or_else(|e| panic!("{} {:?}: {e}", self.name, plan.file.mesh))
    }
}

/// Logits of all positions and the tokens, by request.
pub(crate) type Results = Vec<(Vec<f32>, Vec<u32>)>;

/// Runs requests to their ends; `before_step` is called before each step.
pub(crate) fn results_with(
    engine: &mut Engine,
    requests: &[Request],
    mut before_step: impl FnMut(&mut Engine),
) -> Results {
    let ids: Vec<_> = requests.iter().map(|request| engine.add(request.clone()).unwrap()).collect();
    let mut tokens = vec![Vec::new(); ids.len()];
    while !engine.is_idle() {
        before_step(engine);
        for event in engine.step().unwrap().events {
            tokens[ids.iter().position(|&id| id == event.id).unwrap()].push(event.token);
        }
    }
    let logits = |id| engine.take_logits(id).into_values().flatten().collect();
    ids.into_iter().map(logits).zip(tokens).collect()
}

/// Runs requests to their ends.
pub(crate) fn results(engine: &mut Engine, requests: &[Request]) -> Results {
    results_with(engine, requests, |_| ())
}

pub(crate) fn assert_same_bits(what: &str, single: &Results, many: &Results) {
    assert_eq!(single.len(), many.len(), "{what}");
    for (idx, ((logits, tokens), (many_logits, many_tokens))) in single.iter().zip(many).enumerate() {
        assert_eq!(tokens, many_tokens, "{what}, request {idx}");
        assert_eq!(logits.len(), many_logits.len(), "{what}, request {idx}");
        let differ = logits.iter().zip(many_logits).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(differ, None, "{what}, request {idx}: element of the logits that differs");
    }
}

/// ‖a − b‖ / ‖b‖ of all logits.
pub(crate) fn relative_error(single: &Results, many: &Results) -> f64 {
    let (mut error, mut total) = (0.0, 0.0);
    for ((a, _), (b, _)) in single.iter().zip(many) {
        for (a, b) in a.iter().zip(b) {
            error += (f64::from(*a) - f64::from(*b)).powi(2);
            total += f64::from(*a).powi(2);
        }
    }
    (error / total).sqrt()
}
