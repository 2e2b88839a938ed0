//! How long the pools of attention and experts take, from what ranks or a clock say, for the synchroniser.

use moesaic_plan::plan::MAX_MICRO_BATCHES;
use moesaic_plan::{Plan, Rank, Work};
use moesaic_spec::{Ffn, ModelSpec};

use crate::record::StepRecord;
use crate::routing;
use crate::synchronize::{Features, Pool, Synchronizer};

/// What keeps the pools in step.
pub(super) struct InStep {
    pub(super) synchronizer: Synchronizer,
    /// Layers with experts.
    num_layers: usize,
    num_experts: usize,
    /// By number of micro-batches (from 1) and rank.
    pool_of: Vec<Vec<PoolsOfActions>>,
    /// Times come from somebody else's clock.
    pub(super) external_times: bool,
    /// The last step, all of it and by micro-batch.
    whole: Features,
    parts: Vec<Features>,
}

/// By action of a schedule: which micro-batch's time it is, and which pool's.
type PoolsOfActions = Vec<Option<(usize, Pool)>>;

/// What the slowest rank of each pool took for one micro-batch in one layer, seconds; 0 is not measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PoolSeconds {
    /// Attention and all that stays with the tokens.
    pub attention: f64,
    /// Routed experts.
    pub experts: f64,
    /// The way between the two, one direction.
    pub exchange: f64,
}

impl PoolSeconds {
    /// The time of one pool.
    pub fn of(&mut self, pool: Pool) -> &mut f64 {
        match pool {
            Pool::Attention => &mut self.attention,
            Pool::Experts => &mut self.experts,
            Pool::Exchange => &mut self.exchange,
        }
    }
}

/// Whose time an action takes; `None` for what a step has once, before the first layer and after the last.
pub fn pool_of(work: &Work) -> Option<Pool> {
    match work {
        Work::Attention
        | Work::Project
        | Work::Attend
        | Work::AllReduce { .. }
        | Work::Mlp
        | Work::Route
        | Work::SharedExpert
        | Work::Combine { .. }
        | Work::AllGather { .. } => Some(Pool::Attention),
        Work::Experts { .. } => Some(Pool::Experts),
        Work::Dispatch { .. } | Work::Relay { .. } | Work::Answer { .. } => Some(Pool::Exchange),
        _ => None,
    }
}

impl InStep {
    pub(super) fn new(plan: &Plan, spec: &ModelSpec, external_times: bool) -> Option<InStep> {
        let settings = plan.file.synchronize?;
        let (num_layers, num_experts) =
            (spec.layers.iter().filter(|ffn| matches!(ffn, Ffn::Moe(_))).count(), routing::num_experts(spec));
        let of_rank = |rank: u32, num: usize| {
            let schedule = plan.schedule(spec, Rank(rank), num);
            let of = |action: &moesaic_plan::Action| Some((action.micro_batch as usize, pool_of(&action.work)?));
            schedule.actions.iter().map(of).collect()
        };
        let ranks = 0..plan.world_size() as u32;
        Some(InStep {
            synchronizer: Synchronizer::new(settings, num_layers, num_experts, plan.file.micro_batches),
            num_layers,
            num_experts,
            pool_of: (1..=MAX_MICRO_BATCHES)
                .map(|num| ranks.clone().map(|rank| of_rank(rank, num)).collect())
                .collect(),
            external_times,
            whole: Features::default(),
            parts: Vec::new(),
        })
    }

    /// The size of the last step and of its micro-batches.
    pub(super) fn take_in(&mut self, record: &StepRecord) {
        let active = record.expert_counts.values().map(|counts| counts.iter().filter(|&&count| count > 0).count());
        self.whole = Features {
            active_experts: active.sum::<usize>() as f64 / self.num_layers as f64,
            micro_batches: 1.0,
            ..record.whole
        };
        let num = record.micro_batches.len();
        let active_experts = self.whole.part(num, self.num_experts).active_experts;
        let part = |part: &Features| Features { active_experts, micro_batches: num as f64, ..*part };
        self.parts = record.micro_batches.iter().map(part).collect();
    }

    /// What ranks measured of a step.
    pub(super) fn measured(&self, record: &StepRecord) -> Vec<PoolSeconds> {
        let num = self.parts.len();
        let mut slowest = vec![PoolSeconds::default(); num];
        for (rank, actions) in record.ranks.iter().zip(&self.pool_of[num - 1]) {
            let mut own = vec![PoolSeconds::default(); num];
            for (seconds, pool) in rank.action_s.iter().zip(actions) {
                if let Some((mb, pool)) = *pool {
                    *own[mb].of(pool) += seconds / self.num_layers as f64;
                }
            }
            for (slowest, mut own) in slowest.iter_mut().zip(own) {
                for pool in [Pool::Attention, Pool::Experts, Pool::Exchange] {
                    let seconds = *own.of(pool);
                    let most = slowest.of(pool);
                    *most = most.max(seconds);
                }
            }
        }
        slowest
    }

    /// The next number of micro-batches, if an interval is over.
    pub(super) fn observe(&mut self, times: &[PoolSeconds]) -> Option<usize> {
        for (part, times) in self.parts.iter().zip(times).filter(|(part, _)| part.tokens > 0.0) {
            for pool in [Pool::Attention, Pool::Experts, Pool::Exchange] {
                let seconds = *times.clone().of(pool);
                if seconds > 0.0 {
                    self.synchronizer.observe(pool, *part, seconds);
                }
            }
        }
        Some(self.synchronizer.end_step(&self.whole)?.to)
    }
}
