//! What the parts of a layer do, from the model's own forward pass.
//!
//! One rank's schedule runs on `Meta` at two batch sizes, on a model of one layer of each kind. Sizes of ops are affine in
//! the rows of the batch, so two runs give them for every batch. Nothing here knows how a layer is built.

use std::sync::{Arc, LazyLock};

use moesaic_device::OpCall;
use moesaic_model::{LoadDType, MetaModel, SeqShape, StepShape};
use moesaic_plan::plan::{Mesh, Pool};
use moesaic_plan::{Plan, PlanFile, Rank, Work};
use moesaic_spec::{Bytes, Cluster, Ffn, Gpu, LayerAttention, ModelSpec, PlanningOnly};

use crate::PlannerError;
use crate::cost::{Op, Precision};

/// A kind of action that costs time on a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// Token ids to rows.
    Embed,
    /// Norm, projections, the core, output projection.
    Attention,
    /// A dense layer's MLP.
    Mlp,
    /// Norm, router, and which row goes where.
    Route,
    /// The expert that every token passes.
    SharedExpert,
    /// What surrounds the routed experts on their rank: rows are put in order.
    Experts,
    /// The weighted sum of the answers.
    Combine,
    /// Norm and logits.
    Head,
    /// The next token.
    Sample,
}

impl Part {
    /// All, in order.
    pub const ALL: [Part; 9] = [
        Part::Embed,
        Part::Attention,
        Part::Mlp,
        Part::Route,
        Part::SharedExpert,
        Part::Experts,
        Part::Combine,
        Part::Head,
        Part::Sample,
    ];

    /// The part that an action belongs to; exchange belongs to none.
    pub(crate) fn of(work: &Work) -> Option<Part> {
        Some(match work {
            Work::Embed => Part::Embed,
            Work::Attention | Work::Project | Work::Attend => Part::Attention,
            Work::Mlp => Part::Mlp,
            Work::Route => Part::Route,
            Work::SharedExpert => Part::SharedExpert,
            Work::Experts { .. } => Part::Experts,
            Work::Combine { .. } => Part::Combine,
            Work::Head => Part::Head,
            Work::Sample => Part::Sample,
            _ => return None,
        })
    }
}

/// An amount that grows with the rows of the batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Affine {
    /// Without rows.
    pub fixed: f64,
    /// For each row.
    pub per_row: f64,
}

impl Affine {
    /// At so many rows.
    pub fn at(self, rows: f64) -> f64 {
        self.fixed + self.per_row * rows
    }

    fn through(low: f64, high: f64) -> Affine {
        let per_row = (high - low) / (HIGH - LOW) as f64;
        Affine { fixed: low - per_row * LOW as f64, per_row }
    }
}

/// One op of a part.
#[derive(Clone, Debug, PartialEq)]
pub enum PartOp {
    /// `[rows, k] · [k, n]`.
    Gemm {
        /// Rows of the product.
        rows: Affine,
        /// Columns.
        n: u64,
        /// Inner width.
        k: u64,
    },
    /// Attention over the KV cache of this many heads.
    AttentionCore {
        /// Query heads.
        heads: u64,
        /// Key and value heads.
        kv_heads: u64,
        /// Width of a head.
        head_dim: u64,
    },
    /// Attention over the latent cache.
    MlaCore {
        /// Query heads.
        heads: u64,
        /// Width of the latent.
        latent: u64,
        /// Width of the rotary key.
        rope: u64,
    },
    /// The routed experts: priced for the ranks that share them, not from this rank's trace.
    RoutedExperts {
        /// Hidden width of an expert on this rank.
        intermediate: u64,
    },
    /// Everything else: bounded by the bytes it moves.
    Stream {
        /// Floating-point operations.
        flops: Affine,
        /// Bytes of memory traffic.
        bytes: Affine,
    },
}

/// How attention and experts are cut: what decides the ops of a rank.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cut {
    /// Ranks that share the heads.
    pub tp: usize,
    /// Query heads of each of them; even when absent.
    pub heads: Option<Vec<usize>>,
    /// Whole experts are placed on ranks; otherwise each is cut by `tp`.
    pub placed: bool,
}

/// What each part does on one rank, for a model cut in one way.
#[derive(Clone, Debug)]
pub struct Parts {
    ops: Vec<(Part, Vec<PartOp>)>,
    bytes: PartBytes,
}

/// Bytes of one rank's parts, as stored on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PartBytes {
    /// Embedding, head and the last norm.
    pub embedding_and_head: f64,
    /// Attention and norms of one layer.
    pub attention: f64,
    /// The MLP of one dense layer.
    pub dense_mlp: f64,
    /// The router of one MoE layer.
    pub router: f64,
    /// The shared expert of one MoE layer.
    pub shared_experts: f64,
    /// One routed expert of one layer: whole where it is placed, a part where it is cut.
    pub expert: f64,
    /// One token in the KV cache of one layer, in 16 bits.
    pub kv_per_token: f64,
    /// Activations, by the rows of a micro-batch.
    pub activations: Affine,
}

const LOW: usize = 64;
const HIGH: usize = 128;
/// Tokens in the cache of each sequence of the traces.
const CONTEXT: usize = 256;
const BLOCK: usize = 16;

impl Parts {
    /// Runs the rank with the most heads on `Meta`, twice.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be cut like this.
    pub fn trace(model: &ModelSpec, cut: &Cut) -> Result<Parts, PlannerError> {
        let model = one_layer_of_each_kind(model);
        let (plan, rank) = surrogate(&model, cut)?;
        let plan = Arc::new(plan);
        let meta = MetaModel::of_rank(&model, LoadDType::Auto, CONTEXT, &plan, rank)?;
        let run = |rows: usize| {
            let seqs = vec![SeqShape { num_tokens: 1, context_len: CONTEXT, samples: true }; rows];
            meta.trace_actions(StepShape { seqs: &seqs, block_size: BLOCK, all_logits: false, num_micro_batches: 1 })
        };
        let mut ops: Vec<(Part, Vec<PartOp>)> = Vec::new();
        // Attention of the second layer is that of the first.
        let mut seen = Vec::new();
        for (low, high) in run(LOW)?.into_iter().zip(run(HIGH)?) {
            let Some(part) = Part::of(&low.action.work) else { continue };
            let of_layer = (part, low.action.layer);
            if seen.iter().any(|&(other, layer)| other == part && layer != low.action.layer) {
                continue;
            }
            seen.push(of_layer);
            let calls = low.calls.iter().zip(&high.calls).filter(|(call, _)| call.peer.is_none());
            let found = calls.flat_map(|(low, high)| part_ops(part, low, high));
            match ops.iter_mut().find(|(other, _)| *other == part) {
                Some((_, ops)) => ops.extend(found),
                None => ops.push((part, found.collect())),
            }
        }
        // The largest steps read prompts, few of which end in them: one row has logits.
        let bound = |rows: usize| {
            let seq = |idx| SeqShape { num_tokens: 1, context_len: CONTEXT, samples: idx == 0 };
            let seqs: Vec<SeqShape> = (0..rows).map(seq).collect();
            let bounds =
                meta.bounds(StepShape { seqs: &seqs, block_size: BLOCK, all_logits: false, num_micro_batches: 1 })?;
            Ok::<f64, PlannerError>(bounds.activations.0 as f64)
        };
        let activations = Affine::through(bound(LOW)?, bound(HIGH)?);
        Ok(Parts { ops, bytes: part_bytes(&model, &plan, rank, activations) })
    }

    /// Bytes of the parts.
    pub fn bytes(&self) -> &PartBytes {
        &self.bytes
    }

    /// The ops of a part, in order; none where the model has no such part.
    pub fn ops(&self, part: Part) -> &[PartOp] {
        self.ops.iter().find(|(other, _)| *other == part).map_or(&[], |(_, ops)| ops)
    }
}

/// The first dense and the first MoE layer.
fn one_layer_of_each_kind(model: &ModelSpec) -> ModelSpec {
    few_layers(model, 1, 1)
}

/// A model of so many dense and MoE layers, as far as it has the kind, whose layers look at all tokens: other ways of attending
/// are priced apart.
pub(crate) fn few_layers(model: &ModelSpec, dense: usize, moe: usize) -> ModelSpec {
    let of_kind = |is_moe: bool, count: usize| {
        let layer = model.layers.iter().find(|ffn| ffn.as_moe().is_some() == is_moe);
        std::iter::repeat_n(layer, count).flatten().cloned()
    };
    let layers: Vec<Ffn> = of_kind(false, dense).chain(of_kind(true, moe)).collect();
    let full = |planning: &PlanningOnly| PlanningOnly {
        attention: vec![LayerAttention::Full; layers.len()],
        ..planning.clone()
    };
    let planning_only = model.planning_only.as_ref().map(full);
    ModelSpec { layers, num_mtp_layers: 0, planning_only, ..model.clone() }
}

/// The smallest plan that cuts the model like this, and its rank with the most heads, or with most of the cache among those.
fn surrogate(model: &ModelSpec, cut: &Cut) -> Result<(Plan, Rank), PlannerError> {
    let places = cut.placed && model.num_moe_layers() > 0;
    // One rank alone exchanges nothing, but the same ops surround its experts.
    let dp = if places && cut.tp == 1 { 2 } else { 1 };
    let ranks = cut.tp * dp;
    let mesh = Mesh { tp: cut.tp, pp: 1, dp, ep: if places { ranks } else { 1 } };
    let mut file = PlanFile::new("parts", mesh, ranks);
    file.moe.pool = Pool::Shared;
    file.moe.max_experts_per_rank = Some(usize::MAX);
    file.attention.heads.clone_from(&cut.heads);
    let plan = Plan::new(file, model, &boundless(ranks, ranks))?;
    let memory = plan.rank_memory(model);
    let heads = |rank: usize| plan.shards[rank].attention.as_ref().map_or(0, |attention| attention.heads.len());
    let fullest = |&rank: &usize| (heads(rank), memory[rank].kv_bytes_per_token, usize::MAX - rank);
    let rank = (0..ranks).max_by_key(fullest).expect("there are ranks");
    Ok((plan, Rank(rank as u32)))
}

/// A cluster on which every plan fits: only its shape matters.
pub(crate) fn boundless(gpus: usize, gpus_per_node: usize) -> Cluster {
    static CLUSTER: LazyLock<Cluster> = LazyLock::new(|| {
        let cluster = moesaic_spec::cluster_preset("dgx-h100-x2").expect("a preset");
        let gpu = Gpu { memory: Bytes(u64::MAX), ..cluster.gpu };
        Cluster { gpu, rank_map: Vec::new(), ..cluster }
    });
    Cluster { nodes: gpus.div_ceil(gpus_per_node), gpus_per_node, ..CLUSTER.clone() }
}

/// What the plan says of the rank's memory, for one layer of each kind.
fn part_bytes(model: &ModelSpec, plan: &Plan, rank: Rank, activations: Affine) -> PartBytes {
    let ranks = plan.rank_memory(model);
    let memory = ranks[rank.idx()];
    let layers = model.layers.len() as f64;
    let moe = model.layers.iter().find_map(|ffn| ffn.as_moe());
    let held = |rank: usize| match plan.file.places_experts() {
        true => plan.experts_of(Rank(rank as u32)).iter().map(Vec::len).sum(),
        false => moe.map_or(0, |moe| moe.num_experts),
    };
    // With more ranks than experts, some have none.
    let expert = ranks.iter().enumerate().find(|&(rank, _)| held(rank) > 0);
    let expert = expert.map_or(0.0, |(rank, memory)| memory.routed_experts as f64 / held(rank) as f64);
    // One layer of each kind at most, so what only one kind has is of one layer.
    PartBytes {
        embedding_and_head: memory.embedding_and_head as f64,
        attention: memory.attention as f64 / layers,
        dense_mlp: memory.dense_mlp as f64,
        router: memory.router as f64,
        shared_experts: memory.shared_experts as f64,
        expert,
        kv_per_token: memory.kv_bytes_per_token as f64 / layers / model.dtype.compute().size_bytes() as f64 * 2.0,
        activations,
    }
}

/// The same call of two runs as ops of any size.
fn part_ops(part: Part, low: &OpCall, high: &OpCall) -> Vec<PartOp> {
    assert_eq!(low.op, high.op, "a schedule does the same at any size");
    let dim = |name: &str| {
        let (_, size) = low.dims.iter().find(|(dim, _)| *dim == name).expect("ops keep their contract's letters");
        *size
    };
    let rows = |name: &str| {
        let high = high.dims.iter().find(|(dim, _)| *dim == name).expect("the same letters");
        Affine::through(dim(name) as f64, high.1 as f64)
    };
    match low.op {
        "linear" => vec![PartOp::Gemm { rows: rows("T"), n: dim("N"), k: dim("K") }],
        // One product a head: the same weights and operations as one that is as wide as all of them.
        "head_linear" => vec![PartOp::Gemm { rows: rows("T"), n: dim("H") * dim("N"), k: dim("K") }],
        "attention" => {
            vec![PartOp::AttentionCore { heads: dim("H"), kv_heads: dim("G"), head_dim: dim("C") }]
        }
        "mla_attention" => vec![PartOp::MlaCore { heads: dim("H"), latent: dim("L"), rope: dim("P") }],
        "experts" if part == Part::Experts => vec![PartOp::RoutedExperts { intermediate: dim("F") }],
        "experts" => dense_mlp(low, rows("R"), dim("D"), dim("F")),
        _ => vec![PartOp::Stream {
            flops: Affine::through(low.flops.expected, high.flops.expected),
            bytes: Affine::through(low.bytes.expected, high.bytes.expected),
        }],
    }
}

/// An MLP for all rows: one or two products up, one down, and what is kept between them.
fn dense_mlp(call: &OpCall, rows: Affine, hidden: u64, intermediate: u64) -> Vec<PartOp> {
    let per_matrix = 2.0 * rows.at(LOW as f64) * (hidden * intermediate) as f64;
    let up = (call.flops.expected / per_matrix).round() as u64 - 1;
    let kept = |width: u64| Affine { fixed: 0.0, per_row: rows.per_row * width as f64 };
    vec![
        PartOp::Gemm { rows, n: up * intermediate, k: hidden },
        PartOp::Stream { flops: kept(4 * intermediate), bytes: kept(2 * (up + 1) * intermediate) },
        PartOp::Gemm { rows, n: hidden, k: intermediate },
    ]
}

impl PartOp {
    /// Attention's core for sequences that get one more token.
    ///
    /// # Panics
    /// For another op.
    pub(crate) fn decode(&self, seqs: f64, context: f64, kv: Precision) -> Op {
        match *self {
            PartOp::AttentionCore { heads, kv_heads, head_dim } => {
                Op::AttentionDecode { seqs, context, heads, kv_heads, head_dim, kv }
            }
            PartOp::MlaCore { heads, latent, rope } => Op::MlaDecode { seqs, context, heads, latent, rope, kv },
            _ => panic!("{self:?} is no core of attention"),
        }
    }

    /// The same for prompts of `new_tokens`, the last of which sees `context`.
    ///
    /// # Panics
    /// For another op.
    pub(crate) fn prefill(&self, seqs: f64, new_tokens: f64, context: f64, kv: Precision) -> Op {
        match *self {
            PartOp::AttentionCore { heads, kv_heads, head_dim } => {
                Op::AttentionPrefill { seqs, new_tokens, context, heads, kv_heads, head_dim, kv }
            }
            PartOp::MlaCore { heads, latent, rope } => {
                Op::MlaPrefill { seqs, new_tokens, context, heads, latent, rope, kv }
            }
            _ => panic!("{self:?} is no core of attention"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(name: &str, tp: usize, placed: bool) -> Parts {
        let model = moesaic_spec::preset(name).unwrap().spec().unwrap();
        Parts::trace(&model, &Cut { tp, heads: None, placed }).unwrap()
    }

    fn gemms(parts: &Parts, part: Part) -> Vec<(u64, u64)> {
        let gemm = |op: &PartOp| match op {
            PartOp::Gemm { n, k, .. } => Some((*n, *k)),
            _ => None,
        };
        parts.ops(part).iter().filter_map(gemm).collect()
    }

    #[test]
    fn mixtral_is_cut_by_heads_and_width() {
        let whole = parts("mixtral-8x7b", 1, false);
        assert_eq!(gemms(&whole, Part::Attention), [(6144, 4096), (4096, 4096)]);
        assert_eq!(gemms(&whole, Part::Route), [(8, 4096)]);
        assert_eq!(gemms(&whole, Part::Head), [(32000, 4096)]);
        let cut = parts("mixtral-8x7b", 4, false);
        assert_eq!(gemms(&cut, Part::Attention), [(1536, 4096), (4096, 1024)]);
        assert!(cut.ops(Part::Experts).contains(&PartOp::RoutedExperts { intermediate: 3584 }));
        let placed = parts("mixtral-8x7b", 1, true);
        assert!(placed.ops(Part::Experts).contains(&PartOp::RoutedExperts { intermediate: 14336 }));
    }

    #[test]
    fn deepseek_has_dense_and_shared_experts() {
        let parts = parts("deepseek-v3", 1, true);
        assert_eq!(gemms(&parts, Part::Mlp), [(36864, 7168), (7168, 18432)]);
        assert_eq!(gemms(&parts, Part::SharedExpert), [(4096, 7168), (7168, 2048)]);
        assert!(parts.ops(Part::Attention).contains(&PartOp::MlaCore { heads: 128, latent: 512, rope: 64 }));
    }

    /// Every preset can be priced, whatever it has that cannot be run.
    #[test]
    fn every_preset_has_parts() {
        for preset in moesaic_spec::presets() {
            let model = preset.spec().unwrap();
            let placed = model.num_moe_layers() > 0;
            let parts = Parts::trace(&model, &Cut { tp: 2, heads: None, placed }).unwrap();
            assert!(!gemms(&parts, Part::Attention).is_empty() && parts.bytes().kv_per_token > 0.0, "{}", preset.name);
        }
    }

    #[test]
    fn unequal_heads_are_those_of_the_fullest_rank() {
        let model = moesaic_spec::preset("paper-003-gelu").unwrap().spec().unwrap();
        let heads = Some(vec![3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2]);
        let parts = Parts::trace(&model, &Cut { tp: 12, heads, placed: true }).unwrap();
        let core = parts.ops(Part::Attention).iter().find(|op| matches!(op, PartOp::AttentionCore { .. }));
        assert!(matches!(core, Some(PartOp::AttentionCore { heads: 3, .. })), "{core:?}");
    }
}
