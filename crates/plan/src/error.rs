//! Everything that can be wrong with a plan, as facts.

use std::ops::Range;

use moesaic_spec::{Bytes, SpecError};

use crate::footprint::RankMemory;
use crate::{ExpertId, Rank};

/// A plan that cannot be followed. Every message is one sentence that names the key, the value and what would be right.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// The text is no plan file.
    #[error(transparent)]
    File(#[from] SpecError),
    /// A setting is out of range, or at odds with the model or another setting.
    #[error("{field} is {got}, but must be {right}")]
    Invalid {
        /// Dotted path of the key.
        field: String,
        /// The value found.
        got: String,
        /// What would be right, and why.
        right: String,
    },
    /// `ranks` is not what mesh and pools give.
    #[error("ranks is {ranks}, but the mesh makes {world} ({product}); write `ranks: {world}` or change the mesh")]
    WorldSize {
        /// As the file says.
        ranks: usize,
        /// As the mesh says.
        world: usize,
        /// How the mesh says it.
        product: String,
    },
    /// The cluster is too small.
    #[error(
        "ranks is {ranks}, but cluster {cluster} has {gpus} GPUs ({nodes} × {gpus_per_node}); use fewer ranks or a larger \
         cluster"
    )]
    TooFewGpus {
        /// As the file says.
        ranks: usize,
        /// The cluster's name.
        cluster: String,
        /// Its GPUs.
        gpus: usize,
        /// Its nodes.
        nodes: usize,
        /// GPUs of a node.
        gpus_per_node: usize,
    },
    /// The experts of the shared pool are on some ranks of a stage only.
    #[error(
        "mesh.ep is {ep}, but with `pool: shared` all {attention} ranks of a stage (tp {tp} × dp {dp}) hold experts; write \
         `ep: {attention}`, or `ep: 1` to cut every expert by tp, or `pool: separate`"
    )]
    SharedPool {
        /// As the file says.
        ep: usize,
        /// As the file says.
        tp: usize,
        /// As the file says.
        dp: usize,
        /// Their product.
        attention: usize,
    },
    /// A setting for experts, and no experts.
    #[error("{setting}, but the model has no MoE layer; {instead}")]
    NoMoeLayers {
        /// The setting.
        setting: String,
        /// What would be right.
        instead: &'static str,
    },
    /// An expert pool that would never work.
    #[error(
        "stage {stage} has layers {} to {}, none of them with experts, so its {ep} expert ranks would idle; choose \
         stage_layers such that each stage has a MoE layer, or `pool: shared`",
        layers.start, layers.end - 1
    )]
    IdlePool {
        /// Pipeline stage.
        stage: usize,
        /// Its layers.
        layers: Range<usize>,
        /// Ranks of the pool.
        ep: usize,
    },
    /// A setting for experts that are placed one by one, while they are cut.
    #[error("{setting}, but with `ep: 1` and `pool: shared` every expert is cut by tp; {instead}")]
    ExpertsAreCut {
        /// The setting.
        setting: String,
        /// What would be right.
        instead: &'static str,
    },
    /// Fewer parts than ranks.
    #[error("mesh.tp is {tp}, but {what} {parts}, and each rank needs at least one; write `tp: {most}` or less")]
    CannotCut {
        /// As the file says.
        tp: usize,
        /// What is cut: "the model", "the dense MLP of layer 0".
        what: String,
        /// How many parts it has: "has 8 query heads".
        parts: String,
        /// The largest `tp` that could be.
        most: usize,
    },
    /// More experts than places for them.
    #[error(
        "{physical} experts{} of layer {layer} on {ranks} ranks need max_experts_per_rank {needed}, but moe.max_experts_per_rank \
         is {max}; write `max_experts_per_rank: {needed}` or give experts {} ranks",
        if *redundant > 0 { format!(" ({redundant} redundant)") } else { String::new() },
        physical.div_ceil(*max)
    )]
    TooManyExperts {
        /// Decoder layer.
        layer: usize,
        /// Experts with their replicas.
        physical: usize,
        /// Replicas among them.
        redundant: usize,
        /// Ranks of the stage that hold experts.
        ranks: usize,
        /// As the file says, or 1.
        max: usize,
        /// What would do.
        needed: usize,
    },
    /// More replicas than ranks to hold them apart.
    #[error(
        "moe.redundant_experts is {redundant}, but the {experts} experts of layer {layer} have at most {most} replicas more \
         on {ranks} ranks, each on another; write at most that"
    )]
    TooManyReplicas {
        /// Decoder layer.
        layer: usize,
        /// As the file says.
        redundant: usize,
        /// Logical experts.
        experts: usize,
        /// Ranks of the stage that hold experts.
        ranks: usize,
        /// The largest number that could be.
        most: usize,
    },
    /// A placement of a layer that the model does not have, has as a dense one, or that is there twice.
    #[error("the placement names layer {layer}, but {why}; is this a plan for another model?")]
    PlacedLayer {
        /// Decoder layer.
        layer: usize,
        /// What is wrong with it.
        why: String,
    },
    /// A placement of more or fewer experts than the layer has.
    #[error(
        "the placement of layer {layer} has {got} experts, but the model's has {experts}; is this a plan for another model?"
    )]
    PlacedExperts {
        /// Decoder layer.
        layer: usize,
        /// Experts of the placement.
        got: usize,
        /// Experts of the layer.
        experts: usize,
    },
    /// An expert that no rank has.
    #[error("expert {expert} of layer {layer} is nowhere; give it at least one of ranks {ranks}")]
    ExpertNowhere {
        /// Decoder layer.
        layer: usize,
        /// Which.
        expert: ExpertId,
        /// Ranks of the stage that hold experts.
        ranks: String,
    },
    /// An expert on a rank that is not for it.
    #[error("expert {expert} of layer {layer} is on rank {rank}, but experts of that layer live on ranks {ranks}")]
    NotAnExpertRank {
        /// Decoder layer.
        layer: usize,
        /// Which.
        expert: ExpertId,
        /// Where.
        rank: Rank,
        /// Ranks of the stage that hold experts.
        ranks: String,
    },
    /// Two replicas of an expert on one rank.
    #[error("expert {expert} of layer {layer} is on rank {rank} twice; a second replica needs another rank")]
    TwiceOnRank {
        /// Decoder layer.
        layer: usize,
        /// Which.
        expert: ExpertId,
        /// Where.
        rank: Rank,
    },
    /// More experts on a rank than it may hold.
    #[error(
        "rank {rank} has {held} experts of layer {layer} ({experts}), but moe.max_experts_per_rank is {max}; move some to \
         another rank or write `max_experts_per_rank: {held}`"
    )]
    CrowdedRank {
        /// Decoder layer.
        layer: usize,
        /// Where.
        rank: Rank,
        /// How many.
        held: usize,
        /// Which.
        experts: String,
        /// As the file says, or 1.
        max: usize,
    },
    /// More replicas than the file provides for.
    #[error(
        "the placement of layer {layer} has {got} physical experts, but {experts} experts with moe.redundant_experts \
         {redundant} are {}; write `redundant_experts: {}`",
        experts + redundant, got - experts
    )]
    PhysicalExperts {
        /// Decoder layer.
        layer: usize,
        /// Physical experts of the placement.
        got: usize,
        /// Experts of the layer.
        experts: usize,
        /// As the file says.
        redundant: usize,
    },
    /// A rank needs more memory than it has.
    #[error(
        "rank {rank} needs {}: weights {} + KV cache {} (one sequence of {tokens} tokens) + exchange {}, but only {budget} of \
         its {gpu} may be used; {}",
        Bytes(needed(memory, *tokens)), Bytes(memory.weights()), Bytes(memory.kv_cache(*tokens)),
        Bytes(memory.exchange_bytes), memory_advice(memory, *budget)
    )]
    Memory {
        /// Which rank; the one that needs most.
        rank: Rank,
        /// What it needs.
        memory: Box<RankMemory>,
        /// Tokens of the longest sequence.
        tokens: usize,
        /// What may be used.
        budget: Bytes,
        /// What there is.
        gpu: Bytes,
    },
}

fn needed(memory: &RankMemory, tokens: usize) -> u64 {
    memory.weights() + memory.kv_cache(tokens) + memory.exchange_bytes
}

/// What would help: shorter sequences or smaller steps where the weights fit, else another way to spread the largest part.
fn memory_advice(memory: &RankMemory, budget: Bytes) -> String {
    let fixed = memory.weights() + memory.exchange_bytes;
    if fixed <= budget.0 && memory.kv_bytes_per_token > 0 {
        let fitting = (budget.0 - fixed) / memory.kv_bytes_per_token;
        return format!("write `max_model_len: {fitting}` or less, or spread the model over more ranks");
    }
    if memory.weights() <= budget.0 {
        return "write a smaller `max_num_batched_tokens` or more micro_batches".to_owned();
    }
    let (part, bytes) = memory.largest_part();
    let how = match part {
        "routed experts" => "more ranks with experts (ep), more stages (pp) or, where experts are cut, a larger tp",
        "backup attention" => "a smaller attention.replication, a larger tp or more stages (pp)",
        _ => "a larger tp or more stages (pp)",
    };
    format!("its largest part is {part} with {}, which {how} would make smaller", Bytes(bytes))
}

impl PlanError {
    pub(crate) fn invalid(field: impl Into<String>, got: impl ToString, right: impl Into<String>) -> PlanError {
        PlanError::Invalid { field: field.into(), got: got.to_string(), right: right.into() }
    }
}
