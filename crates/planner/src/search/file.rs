//! A layout as a plan file.

use moesaic_plan::PlanFile;
use moesaic_plan::plan::{AttentionPlan, Balance, Exchange, ExchangeRoute, MemoryPlan, Mesh, MoePlan, Overlap, Pool};
use moesaic_spec::ModelSpec;

use crate::iteration::{ExpertLayout, Layout};
use crate::memory::DEFAULT_UTILIZATION;

/// What the file says beside the layout.
#[derive(Clone, Copy, Debug)]
pub struct Names<'a> {
    /// What it calls the model.
    pub model: &'a str,
    /// What it calls the cluster.
    pub cluster: &'a str,
    /// What it calls the workload.
    pub workload: &'a str,
}

/// Limits of one rank's memory.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Longest sequence, tokens.
    pub max_model_len: usize,
    /// Sequences of one group at a time.
    pub max_num_seqs: usize,
    /// Tokens of one group in one step.
    pub max_num_batched_tokens: usize,
    /// Share of a GPU's memory that may be used.
    pub utilization: f64,
}

/// When experts move, where the search found that placing them by load pays: the load is looked at now and then, and small
/// or doubtful gains are left alone.
const BALANCE: Balance = Balance { interval: 100, threshold: 0.05, significance: 0.01, bytes_per_step: None };

/// The plan file of a layout. [`Layout::of`] reads it back.
pub fn plan_file(layout: &Layout, model: &ModelSpec, names: &Names, limits: &Limits) -> PlanFile {
    let (ep, pool) = match layout.experts {
        ExpertLayout::Cut | ExpertLayout::Summed { .. } => (1, Pool::Shared),
        ExpertLayout::Placed { ep } => (ep, Pool::Shared),
        ExpertLayout::Pool { ep } => (ep, Pool::Separate),
    };
    let experts = model.layers.iter().find_map(|ffn| ffn.as_moe()).map_or(0, |moe| moe.num_experts);
    let held = (experts + layout.redundant_experts).div_ceil(ep);
    let Layout { tp, pp, dp, .. } = *layout;
    PlanFile {
        model: names.model.to_owned(),
        cluster: names.cluster.to_owned(),
        workload: names.workload.to_owned(),
        stage_layers: layout.stage_layers.clone(),
        attention: AttentionPlan {
            heads: layout.heads.clone(),
            replication: (layout.attention_replicas > 1).then_some(layout.attention_replicas),
        },
        moe: MoePlan {
            pool,
            max_experts_per_rank: (layout.experts.exchanges() && held > 1).then_some(held),
            redundant_experts: layout.redundant_experts,
            ..MoePlan::default()
        },
        micro_batches: layout.micro_batches,
        overlap: layout.overlap,
        exchange: Exchange {
            precision: layout.precision,
            route: if layout.two_level { ExchangeRoute::TwoLevel } else { ExchangeRoute::Direct },
        },
        all_reduce: layout.all_reduce,
        balance: layout.balanced.then_some(BALANCE),
        memory: MemoryPlan {
            max_model_len: Some(limits.max_model_len),
            max_num_seqs: Some(limits.max_num_seqs),
            max_num_batched_tokens: Some(limits.max_num_batched_tokens),
            utilization: (limits.utilization != DEFAULT_UTILIZATION).then_some(limits.utilization),
        },
        ..PlanFile::new(&name(layout), Mesh { tp, pp, dp, ep }, layout.ranks())
    }
}

/// A layout in a few words: `MA 12+4, TP=12`, `EP=32, 2 micro-batches`.
pub fn name(layout: &Layout) -> String {
    let Layout { tp, pp, dp, .. } = *layout;
    let spread = match layout.experts {
        ExpertLayout::Pool { ep } => format!("MA {}+{ep}", tp * dp),
        ExpertLayout::Placed { ep } => format!("EP={ep}"),
        ExpertLayout::Summed { ep } => format!("TP={tp}, EP={ep} summed"),
        ExpertLayout::Cut if dp > 1 => format!("TP={tp}, DP={dp}"),
        ExpertLayout::Cut => format!("TP={tp}"),
    };
    let said = [
        (tp > 1 && layout.experts.exchanges()).then(|| format!("TP={tp}")),
        (pp > 1).then(|| format!("PP={pp}")),
        (layout.micro_batches > 1).then(|| format!("{} micro-batches", layout.micro_batches)),
        (layout.redundant_experts > 0).then(|| format!("{} replicas", layout.redundant_experts)),
        layout.two_level.then(|| "two-level".to_owned()),
        (layout.overlap == Overlap::Arrivals).then(|| "on arrival".to_owned()),
        layout.balanced.then(|| "balanced".to_owned()),
    ];
    std::iter::once(spread).chain(said.into_iter().flatten()).collect::<Vec<_>>().join(", ")
}
