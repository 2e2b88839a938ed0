//! What a rank's memory holds under a layout, in closed form: what decides whether a plan fits before anything is priced.
//!
//! Bytes of each part come from the plan's own account of a rank ([`moesaic_plan::RankMemory`]), activations from the forward
//! pass on `Meta`; both are read once for each way of cutting a model ([`Parts`]) and multiplied here.

use moesaic_spec::{LayerAttention, ModelSpec};
use serde::{Deserialize, Serialize};

use crate::iteration::parts::Parts;
use crate::iteration::{ExpertLayout, Formats, Layout};

/// Share of a GPU's memory that is used when nobody says otherwise; as in vLLM.
pub const DEFAULT_UTILIZATION: f64 = 0.9;

/// Memory of one rank by part, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// Weights of everything but routed experts, copies held for other ranks included.
    pub attention_weights: f64,
    /// Weights of routed experts.
    pub expert_weights: f64,
    /// Keys and values.
    pub kv_cache: f64,
    /// Rows between ops.
    pub activations: f64,
    /// Rows on their way between ranks.
    pub exchange: f64,
}

impl Memory {
    /// All parts.
    pub fn total(&self) -> f64 {
        self.attention_weights + self.expert_weights + self.kv_cache + self.activations + self.exchange
    }
}

/// What the ranks of a layout need.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Footprint {
    /// A rank with attention, without its KV cache.
    pub attention_rank: Memory,
    /// A rank of an expert pool.
    pub expert_rank: Option<Memory>,
    /// Bytes of one token in the KV cache of a rank with attention.
    pub kv_bytes_per_token: f64,
}

impl Footprint {
    /// For steps of at most so many tokens of one data-parallel group.
    pub fn new(model: &ModelSpec, layout: &Layout, formats: Formats, parts: &Parts, step_tokens: f64) -> Footprint {
        let bytes = parts.bytes();
        let stages = layout.stages(model);
        let most_layers = stages.iter().map(|(moe, dense)| moe + dense).max().unwrap_or(0) as f64;
        // The trace has weights as the checkpoint stores them.
        let stored = Formats::of(model);
        let held = formats.dense.bytes() / stored.dense.bytes();
        let routed = formats.experts.bytes() / stored.experts.bytes();
        let copies = layout.attention_replicas as f64;
        let weights = |&(moe, dense): &(usize, usize)| {
            bytes.embedding_and_head
                + moe as f64 * bytes.router
                + held
                    * ((moe + dense) as f64 * bytes.attention * copies
                        + dense as f64 * bytes.dense_mlp
                        + moe as f64 * bytes.shared_experts)
        };
        let attention_weights = stages.iter().map(weights).fold(0.0, f64::max);
        let moe = stages.iter().map(|(moe, _)| *moe).max().unwrap_or(0);
        let spec = model.layers.iter().find_map(|ffn| ffn.as_moe());
        let experts = spec.map_or(0.0, |moe| (moe.num_experts + layout.redundant_experts) as f64);
        let expert_weights =
            routed * moe as f64 * bytes.expert * (experts / layout.expert_ranks() as f64).ceil() / summed_cut(layout);
        let rows = step_tokens / layout.micro_batches as f64;
        let width = model.hidden_size as f64 * 2.0;
        let top_k = spec.map_or(0.0, |moe| moe.top_k as f64);
        let sent = rows / layout.tp as f64 * top_k;
        let arriving = rows * layout.dp as f64 * top_k / layout.expert_ranks() as f64;
        // Rows out and answers in; and where experts are on the same rank, rows in and answers out.
        let travelling = match layout.experts {
            ExpertLayout::Placed { .. } => 2.0 * (sent + arriving) * width,
            ExpertLayout::Pool { .. } => 2.0 * sent * width,
            _ => 0.0,
        };
        let summed = if layout.tp > 1 { 2.0 * rows * width } else { 0.0 };
        let own = Memory {
            attention_weights,
            expert_weights,
            kv_cache: 0.0,
            activations: bytes.activations.at(rows),
            exchange: travelling.max(summed),
        };
        // Windows and states hold as much for any length; they are part of what every sequence takes, and small.
        let grows =
            |layer: &usize| matches!(model.layer_attention(*layer), LayerAttention::Full | LayerAttention::Sparse(_));
        let growing = (0..model.layers.len()).filter(grows).count() as f64 / model.layers.len() as f64;
        let per_token = most_layers * growing * bytes.kv_per_token * formats.kv.bytes() / 2.0;
        match layout.experts {
            ExpertLayout::Pool { .. } => {
                let pool = Memory {
                    expert_weights,
                    // Rows in, what is between the products, answers out.
                    activations: arriving * spec.map_or(0.0, |moe| 2.0 * moe.intermediate_size as f64) * 2.0,
                    exchange: 2.0 * arriving * width,
                    ..Memory::default()
                };
                Footprint {
                    attention_rank: Memory { expert_weights: 0.0, ..own },
                    expert_rank: Some(pool),
                    kv_bytes_per_token: per_token,
                }
            }
            _ => Footprint { attention_rank: own, expert_rank: None, kv_bytes_per_token: per_token },
        }
    }

    /// Weights of the rank that has most of everything.
    pub fn fullest_weights(&self) -> f64 {
        let weights = |memory: &Memory| memory.attention_weights + memory.expert_weights;
        self.expert_rank.iter().map(weights).fold(weights(&self.attention_rank), f64::max)
    }

    /// What the fullest rank needs for one sequence of so many tokens.
    pub fn fullest(&self, tokens: f64) -> f64 {
        let attention = self.attention_rank.total() + tokens * self.kv_bytes_per_token;
        self.expert_rank.iter().map(Memory::total).fold(attention, f64::max)
    }

    /// Tokens that the KV cache of one data-parallel group can hold on GPUs of this memory; `None` where weights and
    /// activations alone do not fit.
    pub fn kv_tokens(&self, gpu_bytes: f64) -> Option<f64> {
        let fits = self.expert_rank.is_none_or(|memory| memory.total() <= gpu_bytes);
        let left = gpu_bytes - self.attention_rank.total();
        (fits && left >= self.kv_bytes_per_token).then(|| (left / self.kv_bytes_per_token).floor())
    }
}

/// Parts that summed experts are cut into beyond what the trace of a tensor-parallel rank has cut.
fn summed_cut(layout: &Layout) -> f64 {
    match layout.experts {
        // The trace has experts cut by `tp`; whole ones on `ep` ranks are `ep` times wider.
        ExpertLayout::Summed { ep } => 1.0 / ep as f64,
        _ => 1.0,
    }
}
