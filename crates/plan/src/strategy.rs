//! The five strategies as plan files, for any number of ranks.

use moesaic_spec::{Ffn, ModelSpec, Workload};

use crate::plan::{AttentionPlan, InitialPlacement, MemoryPlan, Mesh, MoePlan, Overlap, Pool};
use crate::{PlanError, PlanFile, rules::cut_unit};

/// Ranks that share heads at most, where tensor parallelism is the strategy: those of the usual node.
const MAX_TP: usize = 8;

/// A way of spreading a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// Tensor parallelism: heads and widths are cut; groups of 8 ranks.
    Tp,
    /// Two pipeline stages of data-parallel ranks.
    Pp,
    /// Both: two stages of groups of 8 ranks.
    TpPp,
    /// Large expert parallelism: attention is data-parallel, experts are spread over all ranks.
    Ep,
    /// Attention and experts on ranks of their own, three quarters and one quarter.
    Ma,
}

impl Strategy {
    /// All, in the order of comparisons.
    pub const ALL: [Strategy; 5] = [Strategy::Tp, Strategy::Pp, Strategy::TpPp, Strategy::Ep, Strategy::Ma];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Strategy::Tp => "tp",
            Strategy::Pp => "pp",
            Strategy::TpPp => "tp+pp",
            Strategy::Ep => "ep",
            Strategy::Ma => "ma",
        }
    }
}

/// What a strategy is applied to.
#[derive(Clone, Copy, Debug)]
pub struct Setting<'a> {
    /// What the plan file calls the model.
    pub model_name: &'a str,
    /// The model.
    pub model: &'a ModelSpec,
    /// What the plan file calls the cluster.
    pub cluster_name: &'a str,
    /// What the plan file calls the workload.
    pub workload_name: &'a str,
    /// The workload; its longest sequence is what memory must hold.
    pub workload: &'a Workload,
    /// World size.
    pub ranks: usize,
}

impl PlanFile {
    /// The plan of a strategy. On 16 ranks: TP = 8 (dp 2), PP = 2 (dp 8), TP = 8 with PP = 2, EP = 16, MA 12 + 4; on other
    /// numbers what comes nearest. Whether it can be followed, [`Plan::new`](crate::Plan::new) says.
    ///
    /// # Errors
    /// [`PlanError::Invalid`]: the strategy needs more ranks, another number of ranks, or a model with more layers or with
    /// experts.
    pub fn preset(strategy: Strategy, setting: &Setting) -> Result<PlanFile, PlanError> {
        if setting.ranks == 0 {
            return Err(PlanError::invalid("ranks", 0, "at least 1"));
        }
        match strategy {
            Strategy::Tp => Ok(tp(setting)),
            Strategy::Pp => pp(setting),
            Strategy::TpPp => tp_pp(setting),
            Strategy::Ep => Ok(ep(setting)),
            Strategy::Ma => ma(setting),
        }
    }
}

fn tp(setting: &Setting) -> PlanFile {
    let tp = largest_tp(setting.model, setting.ranks, MAX_TP);
    file(setting, Mesh { tp, pp: 1, dp: setting.ranks / tp, ep: 1 })
}

fn pp(setting: &Setting) -> Result<PlanFile, PlanError> {
    let (ranks, num_layers) = (setting.ranks, stages_at_most(setting.model)?);
    let pp = (2..=num_layers).find(|stages| ranks.is_multiple_of(*stages));
    let pp = pp.ok_or_else(|| {
        let right = format!("a multiple of a number of stages from 2 to {num_layers}, the model's layers");
        PlanError::invalid("ranks of strategy pp", ranks, right)
    })?;
    let mesh = Mesh { tp: 1, pp, dp: ranks / pp, ep: 1 };
    Ok(PlanFile { micro_batches: pp.min(4), ..file(setting, mesh) })
}

fn tp_pp(setting: &Setting) -> Result<PlanFile, PlanError> {
    let ranks = setting.ranks;
    stages_at_most(setting.model)?;
    if ranks < 4 || !ranks.is_multiple_of(2) {
        return Err(PlanError::invalid("ranks of strategy tp+pp", ranks, "an even number of at least 4"));
    }
    let tp = largest_tp(setting.model, ranks / 2, MAX_TP);
    let mesh = Mesh { tp, pp: 2, dp: ranks / 2 / tp, ep: 1 };
    Ok(PlanFile { micro_batches: 2, ..file(setting, mesh) })
}

fn ep(setting: &Setting) -> PlanFile {
    let ranks = setting.ranks;
    let ep = if has_experts(setting.model) { ranks } else { 1 };
    let max_experts_per_rank = experts_per_rank(setting.model, ep);
    let moe = MoePlan { max_experts_per_rank, ..MoePlan::default() };
    // Two halves of a step take turns: one is exchanged while the other is computed.
    let micro_batches = if ranks > 1 { 2 } else { 1 };
    let overlap = Overlap::Arrivals;
    PlanFile { moe, micro_batches, overlap, ..file(setting, Mesh { tp: 1, pp: 1, dp: ranks, ep }) }
}

fn ma(setting: &Setting) -> Result<PlanFile, PlanError> {
    let (ranks, model) = (setting.ranks, setting.model);
    if ranks < 2 {
        return Err(PlanError::invalid(
            "ranks of strategy ma",
            ranks,
            "at least 2, one for attention and one for experts",
        ));
    }
    if !has_experts(model) {
        let setting = "the strategy is ma".to_owned();
        return Err(PlanError::NoMoeLayers { setting, instead: "choose tp, pp or tp+pp" });
    }
    let ep = (ranks / 4).max(1);
    let attention = ranks - ep;
    // By heads where every rank gets one, else by requests.
    let by_heads = can_cut(model, attention, false);
    let (tp, dp) = if by_heads { (attention, 1) } else { (1, attention) };
    let heads = by_heads.then(|| uneven_heads(model.attention.num_heads(), tp));
    let replication = (attention > 1).then_some(2);
    let moe = MoePlan {
        pool: Pool::Separate,
        max_experts_per_rank: experts_per_rank(model, ep),
        redundant_experts: 0,
        placement: InitialPlacement::Linear,
    };
    let attention = AttentionPlan { heads, replication };
    Ok(PlanFile { attention, moe, micro_batches: 2, ..file(setting, Mesh { tp, pp: 1, dp, ep }) })
}

/// Stages that the model's layers allow.
fn stages_at_most(model: &ModelSpec) -> Result<usize, PlanError> {
    match model.layers.len() {
        one @ ..2 => Err(PlanError::invalid("the number of layers", one, "at least 2, one for each pipeline stage")),
        layers => Ok(layers),
    }
}

/// What all have in common.
fn file(setting: &Setting, mesh: Mesh) -> PlanFile {
    PlanFile {
        model: setting.model_name.to_owned(),
        cluster: setting.cluster_name.to_owned(),
        workload: setting.workload_name.to_owned(),
        memory: MemoryPlan {
            max_model_len: Some(setting.workload.longest().min(setting.model.max_position_embeddings)),
            ..MemoryPlan::default()
        },
        ..PlanFile::new(&name(mesh, setting.ranks), mesh, setting.ranks)
    }
}

/// As the papers write them: `TP=8`, `TP=8, PP=2`, `EP=16`, `MA 12+4`.
fn name(mesh: Mesh, ranks: usize) -> String {
    let Mesh { tp, pp, dp, ep } = mesh;
    match (tp > 1, pp > 1, ep > 1) {
        _ if ranks != pp * tp * dp => format!("MA {}+{ep}", tp * dp),
        (_, _, true) => format!("EP={ep}"),
        (true, true, _) => format!("TP={tp}, PP={pp}"),
        (_, true, _) => format!("PP={pp}"),
        _ => format!("TP={tp}"),
    }
}

/// The largest divisor of `ranks` up to `most` that heads and widths can be cut into.
fn largest_tp(model: &ModelSpec, ranks: usize, most: usize) -> usize {
    let fits = |tp: &usize| ranks.is_multiple_of(*tp) && can_cut(model, *tp, true);
    (1..=most.min(ranks)).rev().find(fits).unwrap_or(1)
}

/// Whether every one of `tp` ranks gets a part of heads, vocabulary and dense MLPs, and of experts if they are cut, too.
pub fn can_cut(model: &ModelSpec, tp: usize, cut_experts: bool) -> bool {
    let unit = cut_unit(model);
    let width_fits = |ffn: &Ffn| match ffn {
        Ffn::Dense(mlp) => mlp.intermediate_size.div_ceil(unit) >= tp,
        Ffn::Moe(moe) if cut_experts => {
            let shared = moe.shared_intermediate_size;
            moe.intermediate_size.div_ceil(unit) >= tp && (shared == 0 || shared.div_ceil(unit) >= tp)
        }
        Ffn::Moe(_) => true,
    };
    tp <= model.attention.num_heads() && tp <= model.vocab_size && model.layers.iter().all(width_fits)
}

fn has_experts(model: &ModelSpec) -> bool {
    model.num_moe_layers() > 0
}

/// Experts of a layer that a rank must hold; nothing where it is one or experts are cut.
fn experts_per_rank(model: &ModelSpec, ep: usize) -> Option<usize> {
    let most = model.layers.iter().filter_map(Ffn::as_moe).map(|moe| moe.num_experts.div_ceil(ep)).max();
    most.filter(|&experts| experts > 1)
}

/// Heads as equal as can be, more of them first: 32 over 12 ranks are 3,3,3,3,3,3,3,3,2,2,2,2.
pub fn uneven_heads(num_heads: usize, ranks: usize) -> Vec<usize> {
    (0..ranks).map(|rank| num_heads / ranks + usize::from(rank < num_heads % ranks)).collect()
}
