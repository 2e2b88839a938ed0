//! What each rank's memory holds, by part, from shapes alone: before a checkpoint is opened or a tensor exists.
//!
//! It is an estimate for choosing and refusing plans. Weights and KV cache are exact for weights as they stand on disk;
//! the exchange counts the rows of one step under uniform routing. What a rank really takes is settled by its ledger
//! ([`MemoryLedger`](crate::MemoryLedger)).

use std::collections::HashMap;
use std::ops::Range;

use moesaic_spec::{
    Attention, Bytes, Cluster, Ffn, Gqa, LayerAttention, Mla, ModelSpec, Proj, QkNorm, Role, TensorSpec,
};

use crate::{AttentionShard, ExpertShard, Plan, PlanError, Rank, RankShard, Slice, rules::cut_unit};

/// Share of the GPU's memory that a plan may use when it does not say.
pub const DEFAULT_UTILIZATION: f64 = 0.9;

/// Tokens of a group in one step when a plan does not say; the engine's default.
pub const DEFAULT_BATCHED_TOKENS: usize = 2048;

/// What one rank's memory holds, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankMemory {
    /// Embedding and head with its norm.
    pub embedding_and_head: u64,
    /// Projections and norms of attention, the norms of the residual stream included.
    pub attention: u64,
    /// MLPs of dense layers.
    pub dense_mlp: u64,
    /// Routers.
    pub router: u64,
    /// Experts that every token passes.
    pub shared_experts: u64,
    /// Experts that tokens are routed to, replicas included.
    pub routed_experts: u64,
    /// Attention's weights that are held for other ranks.
    pub backup_attention: u64,
    /// One token in the KV cache of all layers of the stage.
    pub kv_bytes_per_token: u64,
    /// Rows on their way between ranks in one micro-batch.
    pub exchange_bytes: u64,
}

impl RankMemory {
    /// Parts that are weights, with their names.
    pub fn parts(&self) -> [(&'static str, u64); 7] {
        [
            ("embedding and head", self.embedding_and_head),
            ("attention", self.attention),
            ("dense MLPs", self.dense_mlp),
            ("routers", self.router),
            ("shared experts", self.shared_experts),
            ("routed experts", self.routed_experts),
            ("backup attention", self.backup_attention),
        ]
    }

    /// All weights.
    pub fn weights(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }

    /// The KV cache of so many tokens.
    pub fn kv_cache(&self, tokens: usize) -> u64 {
        self.kv_bytes_per_token.saturating_mul(tokens as u64)
    }

    /// The part of the weights that takes most.
    pub fn largest_part(&self) -> (&'static str, u64) {
        self.parts().into_iter().max_by_key(|(_, bytes)| *bytes).expect("there are parts")
    }
}

/// Key and value heads that a range of query heads looks at. Ranks that share a group of query heads hold its key/value
/// head each.
pub fn kv_heads(heads: &Range<usize>, gqa: &Gqa) -> Range<usize> {
    let per_group = gqa.num_heads / gqa.num_kv_heads;
    heads.start / per_group..heads.end.div_ceil(per_group)
}

impl Plan {
    /// What the memory of each rank holds, by rank. `model` is the one that the plan was made for.
    pub fn rank_memory(&self, model: &ModelSpec) -> Vec<RankMemory> {
        let sizes = Sizes::new(self, model);
        self.shards.iter().map(|shard| sizes.of(shard)).collect()
    }

    /// Refuses a plan whose fullest rank does not hold its weights, the exchange and one sequence of `max_model_len` (of one
    /// token when the plan does not say).
    pub(crate) fn check_memory(&self, model: &ModelSpec, cluster: &Cluster) -> Result<(), PlanError> {
        let tokens = self.file.memory.max_model_len.unwrap_or(1);
        let share = self.file.memory.utilization.unwrap_or(DEFAULT_UTILIZATION);
        let budget = Bytes((cluster.gpu.memory.0 as f64 * share) as u64);
        let needed = |memory: &RankMemory| memory.weights() + memory.kv_cache(tokens) + memory.exchange_bytes;
        let memory = self.rank_memory(model);
        let mut fullest = 0;
        for rank in 1..memory.len() {
            if needed(&memory[rank]) > needed(&memory[fullest]) {
                fullest = rank;
            }
        }
        if needed(&memory[fullest]) <= budget.0 {
            return Ok(());
        }
        Err(PlanError::Memory {
            rank: Rank(fullest as u32),
            memory: Box::new(memory[fullest]),
            tokens,
            budget,
            gpu: cluster.gpu.memory,
        })
    }
}

/// The tensors of one layer, one expert standing for all.
#[derive(Default)]
struct Layer {
    attention: Vec<TensorSpec>,
    router: u64,
    dense: Vec<TensorSpec>,
    shared: Vec<TensorSpec>,
    expert: Vec<TensorSpec>,
}

/// Shapes of a model, and how a plan cuts them.
struct Sizes<'a> {
    plan: &'a Plan,
    model: &'a ModelSpec,
    layers: Vec<Layer>,
    embedding: u64,
    final_norm: u64,
    /// Physical experts of each rank, by layer.
    held: HashMap<(Rank, usize), usize>,
}

impl<'a> Sizes<'a> {
    fn new(plan: &'a Plan, model: &'a ModelSpec) -> Self {
        let mut layers: Vec<Layer> = model.layers.iter().map(|_| Layer::default()).collect();
        let mut sizes = Sizes { plan, model, layers: Vec::new(), embedding: 0, final_norm: 0, held: HashMap::new() };
        for tensor in model.tensors() {
            let bytes = sizes.bytes(&tensor, &tensor.shape);
            match tensor.role {
                Role::Embed => sizes.embedding = bytes,
                Role::FinalNorm => sizes.final_norm = bytes,
                // As large as the embedding.
                Role::LmHead => {}
                Role::Router(l) | Role::RouterBias(l) => layers[l].router += bytes,
                Role::Dense(l, _) => layers[l].dense.push(tensor),
                Role::Shared(l, _) => layers[l].shared.push(tensor),
                Role::Expert { layer, expert: 0, .. } => layers[layer].expert.push(tensor),
                Role::Expert { .. } => {}
                role => layers[attention_layer(role)].attention.push(tensor),
            }
        }
        sizes.layers = layers;
        for (layer, placed) in plan.placement.layers.iter().enumerate() {
            for &rank in placed.iter().flat_map(|placed| placed.replicas.iter().flatten()) {
                *sizes.held.entry((rank, layer)).or_default() += 1;
            }
        }
        sizes
    }

    fn of(&self, shard: &RankShard) -> RankMemory {
        let mut memory = RankMemory { exchange_bytes: self.exchange(shard), ..RankMemory::default() };
        if let Some(attention) = &shard.attention {
            self.add_ends(attention, &mut memory);
            let kv = match &self.model.attention {
                Attention::Gqa(gqa) => kv_heads(&attention.heads, gqa).len() * 2 * gqa.head_dim,
                Attention::Mla(_) => self.model.attention.kv_values_per_token(),
            };
            let element = self.model.dtype.compute().size_bytes();
            let is_linear = |layer: &usize| matches!(self.model.layer_attention(*layer), LayerAttention::Linear(_));
            let num_layers = shard.layers.clone().filter(|layer| !is_linear(layer)).count();
            memory.kv_bytes_per_token = (num_layers * kv * element) as u64;
        }
        for idx in shard.layers.clone() {
            let layer = &self.layers[idx];
            if let Some(attention) = &shard.attention {
                memory.attention += self.attention(layer, &attention.heads);
                memory.backup_attention +=
                    attention.backup_heads.iter().map(|heads| self.projections(layer, heads)).sum::<u64>();
                memory.router += layer.router;
                memory.dense_mlp += self.cut(&layer.dense, attention.tp);
                // Where tokens are sent to experts each rank has rows of its own, and the whole shared expert for them.
                let tp = if self.plan.file.places_experts() { Slice::WHOLE } else { attention.tp };
                memory.shared_experts += self.cut(&layer.shared, tp);
            }
            memory.routed_experts += match shard.experts {
                ExpertShard::None => 0,
                ExpertShard::Cut(slice) => {
                    let num_experts = self.model.layers[idx].as_moe().map_or(0, |moe| moe.num_experts);
                    num_experts as u64 * self.cut(&layer.expert, slice)
                }
                ExpertShard::Placed => {
                    let held = self.held.get(&(shard.rank, idx)).copied().unwrap_or(0);
                    held as u64 * self.cut(&layer.expert, Slice::WHOLE)
                }
            };
        }
        memory
    }

    /// The embedding is whole on every rank of the first stage; the head is cut by rows of the vocabulary.
    fn add_ends(&self, attention: &AttentionShard, memory: &mut RankMemory) {
        if attention.embeds {
            memory.embedding_and_head += self.embedding;
        }
        if attention.has_head {
            memory.embedding_and_head += self.final_norm;
            if !(self.model.tie_word_embeddings && attention.embeds) {
                let rows = attention.tp.range(self.model.vocab_size, 1).len() as u64;
                memory.embedding_and_head += self.embedding / self.model.vocab_size as u64 * rows;
            }
        }
    }

    /// Everything of one layer's attention that these heads need.
    fn attention(&self, layer: &Layer, heads: &Range<usize>) -> u64 {
        layer.attention.iter().map(|tensor| self.bytes(tensor, &self.heads_shape(tensor, heads))).sum()
    }

    /// What more heads add: the tensors that are cut by heads.
    fn projections(&self, layer: &Layer, heads: &Range<usize>) -> u64 {
        let by_heads = |tensor: &&TensorSpec| self.heads_shape(tensor, heads) != tensor.shape;
        layer.attention.iter().filter(by_heads).map(|tensor| self.bytes(tensor, &self.heads_shape(tensor, heads))).sum()
    }

    /// The shape of an attention tensor for a range of heads.
    fn heads_shape(&self, tensor: &TensorSpec, heads: &Range<usize>) -> Vec<usize> {
        let mut shape = tensor.shape.clone();
        match (&self.model.attention, tensor.role) {
            (Attention::Gqa(gqa), Role::Q(_) | Role::QBias(_)) => shape[0] = heads.len() * gqa.head_dim,
            (Attention::Gqa(gqa), Role::K(_) | Role::V(_) | Role::KBias(_) | Role::VBias(_)) => {
                shape[0] = kv_heads(heads, gqa).len() * gqa.head_dim;
            }
            (Attention::Gqa(gqa), Role::O(_)) => shape[1] = heads.len() * gqa.head_dim,
            (Attention::Gqa(gqa), Role::QNorm(_)) if gqa.qk_norm == QkNorm::FullWidth => {
                shape[0] = heads.len() * gqa.head_dim;
            }
            (Attention::Gqa(gqa), Role::KNorm(_)) if gqa.qk_norm == QkNorm::FullWidth => {
                shape[0] = kv_heads(heads, gqa).len() * gqa.head_dim;
            }
            (Attention::Mla(mla), role) => shape_of_mla(mla, role, heads.len(), &mut shape),
            _ => {}
        }
        shape
    }

    /// A part of the hidden width of an MLP or expert.
    fn cut(&self, tensors: &[TensorSpec], slice: Slice) -> u64 {
        let bytes = |tensor: &TensorSpec| {
            let mut shape = tensor.shape.clone();
            let dim = match tensor.role {
                Role::Dense(_, Proj::Down) | Role::Shared(_, Proj::Down) | Role::Expert { proj: Proj::Down, .. } => 1,
                _ => 0,
            };
            shape[dim] = slice.range(shape[dim], cut_unit(self.model)).len();
            self.bytes(tensor, &shape)
        };
        tensors.iter().map(bytes).sum()
    }

    /// Bytes of a tensor of this type and another shape, scales included.
    fn bytes(&self, tensor: &TensorSpec, shape: &[usize]) -> u64 {
        self.model.stored_bytes(tensor.role, tensor.dtype_class, shape)
    }

    /// Rows on their way in one micro-batch: to the experts and back, or partial results to be summed, or the residual
    /// stream between stages, whichever takes most.
    fn exchange(&self, shard: &RankShard) -> u64 {
        let file = &self.plan.file;
        let tokens = file.memory.max_num_batched_tokens.unwrap_or(DEFAULT_BATCHED_TOKENS).div_ceil(file.micro_batches);
        let row = (self.model.hidden_size * self.model.dtype.compute().size_bytes()) as f64;
        let (mut to_experts, mut top_k) = (0.0f64, 0);
        for idx in shard.layers.clone() {
            let Ffn::Moe(moe) = &self.model.layers[idx] else { continue };
            top_k = top_k.max(moe.top_k);
            let held = self.held.get(&(shard.rank, idx)).copied().unwrap_or(0);
            let slots: usize = self.plan.placement.layers[idx].iter().flat_map(|l| &l.replicas).map(Vec::len).sum();
            if held > 0 {
                to_experts = to_experts.max((tokens * file.mesh.dp * moe.top_k * held) as f64 / slots as f64);
            }
        }
        let mut rows = 2.0 * to_experts;
        if shard.attention.is_some() {
            let sent = match file.places_experts() {
                true => (tokens.div_ceil(file.mesh.tp) * top_k) as f64,
                false => 0.0,
            };
            let reduced = if file.mesh.tp > 1 { tokens as f64 } else { 0.0 };
            // The residual stream is F32.
            let residual = if file.mesh.pp > 1 { (tokens * self.model.hidden_size * 4) as f64 / row } else { 0.0 };
            rows += (2.0 * sent).max(2.0 * reduced).max(residual);
        }
        (rows * row) as u64
    }
}

fn shape_of_mla(mla: &Mla, role: Role, num_heads: usize, shape: &mut [usize]) {
    match role {
        Role::Q(_) | Role::QB(_) => shape[0] = num_heads * mla.qk_head_dim(),
        Role::KvB(_) => shape[0] = num_heads * (mla.qk_nope_head_dim + mla.v_head_dim),
        Role::O(_) => shape[1] = num_heads * mla.v_head_dim,
        _ => {}
    }
}

/// The layer of a tensor of attention or a norm around it.
fn attention_layer(role: Role) -> usize {
    match role {
        Role::InputNorm(l)
        | Role::PostAttentionNorm(l)
        | Role::Q(l)
        | Role::K(l)
        | Role::V(l)
        | Role::O(l)
        | Role::QBias(l)
        | Role::KBias(l)
        | Role::VBias(l)
        | Role::OBias(l)
        | Role::QNorm(l)
        | Role::KNorm(l)
        | Role::QA(l)
        | Role::QANorm(l)
        | Role::QB(l)
        | Role::KvA(l)
        | Role::KvANorm(l)
        | Role::KvB(l) => l,
        other => unreachable!("{other:?} is no tensor of attention"),
    }
}
