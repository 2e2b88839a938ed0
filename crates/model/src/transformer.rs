//! The decoder: the part of its weights that one rank has.
//!
//! What a rank computes with them is in [`step`](crate::step), one action of its schedule at a time.

use std::collections::HashMap;
use std::hash::Hash;
use std::ops::Range;
use std::sync::Arc;

use moesaic_device::{Arena, Tensor};
use moesaic_kernels::experts::{ExpertWeight, ExpertWeights};
use moesaic_kernels::rope::RopeTable;
use moesaic_plan::{AttentionShard, ExpertId, ExpertShard, RankShard, Slice};
use moesaic_spec::model::tensors::Role;
use moesaic_spec::{Activation, Attention, Bytes, DType, ModelSpec};

use crate::ModelError;
use crate::layers::{Embedding, FeedForward, GqaAttention, MlaAttention, attention_of};
use crate::load::WeightSource;

/// The weights of one rank.
pub struct Transformer {
    spec: ModelSpec,
    dtype: DType,
    pub(crate) shard: RankShard,
    pub(crate) rope: Option<Arc<RopeTable>>,
    pub(crate) embedding: Option<Arc<Embedding>>,
    /// Of the rank's stage.
    pub(crate) layers: Vec<DecoderLayer>,
    pub(crate) final_norm: Option<Arc<Tensor>>, // [D]
    /// Type of the weights of routed experts, by layer of the stage.
    expert_dtypes: Vec<DType>,
}

/// What a rank has of one layer.
pub(crate) struct DecoderLayer {
    pub attention: Option<Arc<AttentionHalf>>,
    pub feed_forward: Option<Arc<FeedForward>>,
    pub experts: LocalExperts,
}

/// Everything up to the feed-forward half's own weights.
pub(crate) struct AttentionHalf {
    pub input_norm: Tensor, // [D]
    pub attention: AttentionLayer,
    pub post_attention_norm: Tensor, // [D]
    /// Heads that another rank computes, held in case that it is lost.
    #[allow(dead_code, reason = "held, not computed with, while nothing fails")]
    pub backups: Vec<AttentionLayer>,
}

pub(crate) enum AttentionLayer {
    Gqa(GqaAttention),
    Mla(MlaAttention),
}

/// The routed experts that a rank has.
pub(crate) struct LocalExperts {
    /// Ascending.
    pub which: Vec<ExpertId>,
    /// In the order of `which`; `None` when there is none.
    pub weights: Option<Arc<ExpertWeights>>,
}

impl LocalExperts {
    /// Place of an expert among those of the rank.
    pub(crate) fn place_of(&self, expert: ExpertId) -> Option<usize> {
        self.which.binary_search(&expert).ok()
    }
}

/// What ranks of one process have in common: equal parts of the model are loaded once and shared.
#[derive(Default)]
pub struct PartCache {
    rope: Option<Arc<RopeTable>>,
    embeddings: HashMap<(Slice, bool, bool), Arc<Embedding>>,
    final_norm: Option<Arc<Tensor>>,
    attention: HashMap<AttentionKey, Arc<AttentionHalf>>,
    feed_forward: HashMap<(usize, Slice), Arc<FeedForward>>,
    experts: HashMap<(usize, Slice), Arc<ExpertWeights>>,
}

/// Layer, heads, and heads held for others.
type AttentionKey = (usize, Range<usize>, Vec<Range<usize>>);

/// The part that is there, or the one that `load` makes.
fn shared<K: Hash + Eq, T>(
    parts: &mut HashMap<K, Arc<T>>,
    key: K,
    load: impl FnOnce() -> Result<T, ModelError>,
) -> Result<Arc<T>, ModelError> {
    if let Some(part) = parts.get(&key) {
        return Ok(part.clone());
    }
    let part = Arc::new(load()?);
    parts.insert(key, part.clone());
    Ok(part)
}

impl Transformer {
    /// Takes a rank's weights from `source`, in the order in which they are used. `experts` are those that the rank holds
    /// of each layer of the model, where they are placed one by one.
    pub fn load(
        source: &WeightSource,
        shard: &RankShard,
        experts: &[Vec<ExpertId>],
        max_model_len: usize,
        parts: &mut PartCache,
    ) -> Result<Transformer, ModelError> {
        let spec = source.spec().clone();
        let mut transformer = Transformer {
            dtype: source.compute_dtype(),
            shard: shard.clone(),
            rope: None,
            embedding: None,
            layers: Vec::with_capacity(shard.layers.len()),
            final_norm: None,
            expert_dtypes: shard.layers.clone().map(|layer| source.expert_dtype(layer)).collect(),
            spec,
        };
        let spec = &transformer.spec;
        if let Some(attention) = &shard.attention {
            transformer.rope = Some(rope(source, max_model_len, parts)?);
            if attention.embeds || attention.has_head {
                let key = (attention.tp, attention.embeds, attention.has_head);
                let tied = spec.tie_word_embeddings;
                let load = || Embedding::load(source, tied, attention.tp, attention.embeds, attention.has_head);
                transformer.embedding = Some(shared(&mut parts.embeddings, key, load)?);
            }
        }
        for idx in shard.layers.clone() {
            let (attention, feed_forward) = match &shard.attention {
                None => (None, None),
                Some(attention) => {
                    let key = (idx, attention.heads.clone(), attention.backup_heads.clone());
                    let half = shared(&mut parts.attention, key, || AttentionHalf::load(source, idx, attention))?;
                    let slice = match (&spec.layers[idx].as_moe(), shard.experts) {
                        // Where experts are whole, every rank has rows of its own for the shared one.
                        (Some(_), ExpertShard::Placed | ExpertShard::None) => Slice::WHOLE,
                        _ => attention.tp,
                    };
                    let load = || FeedForward::load(source, idx, &spec.layers[idx], slice);
                    (Some(half), Some(shared(&mut parts.feed_forward, (idx, slice), load)?))
                }
            };
            let experts = LocalExperts::load(source, shard, idx, experts, parts)?;
            transformer.layers.push(DecoderLayer { attention, feed_forward, experts });
        }
        if shard.attention.as_ref().is_some_and(|attention| attention.has_head) {
            if parts.final_norm.is_none() {
                parts.final_norm = Some(Arc::new(source.vector(&[source.whole(Role::FinalNorm)])?));
            }
            transformer.final_norm = parts.final_norm.clone();
        }
        Ok(transformer)
    }

    /// What the whole model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Which part of it this is.
    pub fn shard(&self) -> &RankShard {
        &self.shard
    }

    /// Element type of activations between ops, and of the cache.
    pub fn compute_dtype(&self) -> DType {
        self.dtype
    }

    /// Memory outside the weights' arena for each position that a sequence may have: RoPE's table.
    pub fn position_bytes(&self) -> Bytes {
        self.rope.as_ref().map_or(Bytes(0), |rope| rope.position_bytes())
    }

    /// What the cache of this rank is for: its heads, and its layers (none without attention).
    pub(crate) fn cached(&self) -> (Attention, usize) {
        match &self.shard.attention {
            Some(attention) => (attention_of(&self.spec.attention, attention.heads.clone()), self.shard.layers.len()),
            None => (self.spec.attention.clone(), 0),
        }
    }

    pub(crate) fn layer(&self, layer: u32) -> &DecoderLayer {
        &self.layers[layer as usize - self.shard.layers.start]
    }

    /// One of the routed experts that live here.
    pub fn expert(&self, layer: u32, expert: ExpertId) -> Option<&ExpertWeight> {
        let local = &self.layer(layer).experts;
        Some(&local.weights.as_ref()?.experts[local.place_of(expert)?])
    }

    /// Memory for a routed expert of a layer that comes from another rank.
    pub fn empty_expert(&self, arena: &Arena, layer: u32) -> Result<ExpertWeight, ModelError> {
        let (d, f, activation, dtype) = self.expert_shape(layer as usize).expect("a layer with experts");
        Ok(ExpertWeight::empty(arena, d, f, dtype, activation)?)
    }

    /// Memory of all routed experts that are here.
    pub fn expert_bytes(&self) -> Bytes {
        let bytes = self.shard.layers.clone().filter_map(|layer| {
            let (d, f, activation, dtype) = self.expert_shape(layer)?;
            let held = self.layer(layer as u32).experts.which.len() as u64;
            Some(held * ExpertWeight::packed_bytes(d, f, dtype, activation).0)
        });
        Bytes(bytes.sum())
    }

    fn expert_shape(&self, layer: usize) -> Option<(usize, usize, Activation, DType)> {
        let moe = self.spec.layers[layer].as_moe()?;
        let dtype = self.expert_dtypes[layer - self.shard.layers.start];
        Some((self.spec.hidden_size, moe.intermediate_size, moe.activation, dtype))
    }

    /// From now on exactly these routed experts (ascending) live here: those that are new come from `arrived`, those that
    /// are not among them are dropped.
    pub fn place_experts(
        &mut self,
        layer: u32,
        held: &[ExpertId],
        mut arrived: impl FnMut(ExpertId) -> Option<ExpertWeight>,
    ) {
        let activation = self.spec.layers[layer as usize].as_moe().expect("a layer with experts").activation;
        let local = &mut self.layers[layer as usize - self.shard.layers.start].experts;
        let weights = local
            .weights
            .take()
            .map(|weights| Arc::into_inner(weights).expect("placed experts belong to one rank").experts);
        let mut old: HashMap<ExpertId, ExpertWeight> =
            std::mem::take(&mut local.which).into_iter().zip(weights.into_iter().flatten()).collect();
        let place = |&expert: &ExpertId| {
            let weight = old.remove(&expert).or_else(|| arrived(expert));
            weight.unwrap_or_else(|| panic!("expert {expert} of layer {layer} neither was here nor has arrived"))
        };
        let experts: Vec<ExpertWeight> = held.iter().map(place).collect();
        local.which = held.to_vec();
        local.weights = (!experts.is_empty()).then(|| Arc::new(ExpertWeights { experts, activation }));
    }
}

fn rope(source: &WeightSource, max_model_len: usize, parts: &mut PartCache) -> Result<Arc<RopeTable>, ModelError> {
    if let Some(rope) = &parts.rope {
        return Ok(rope.clone());
    }
    let spec = source.spec();
    let rotary_dim = match &spec.attention {
        Attention::Gqa(gqa) => gqa.head_dim,
        Attention::Mla(mla) => mla.qk_rope_head_dim,
    };
    let rope = Arc::new(match source.is_meta() {
        true => RopeTable::meta(&spec.rope, rotary_dim, max_model_len)?,
        false => RopeTable::new(&spec.rope, rotary_dim, max_model_len)?,
    });
    parts.rope = Some(rope.clone());
    Ok(rope)
}

impl AttentionHalf {
    fn load(source: &WeightSource, layer: usize, shard: &AttentionShard) -> Result<AttentionHalf, ModelError> {
        let attention = |heads: Range<usize>| {
            Ok::<_, ModelError>(match &source.spec().attention {
                Attention::Gqa(gqa) => AttentionLayer::Gqa(GqaAttention::load(source, layer, gqa, heads)?),
                Attention::Mla(mla) => AttentionLayer::Mla(MlaAttention::load(source, layer, mla, heads)?),
            })
        };
        let norm = |role| source.vector(&[source.whole(role)]);
        Ok(AttentionHalf {
            input_norm: norm(Role::InputNorm(layer))?,
            attention: attention(shard.heads.clone())?,
            post_attention_norm: norm(Role::PostAttentionNorm(layer))?,
            backups: shard.backup_heads.iter().cloned().map(attention).collect::<Result<_, _>>()?,
        })
    }
}

impl LocalExperts {
    fn load(
        source: &WeightSource,
        shard: &RankShard,
        layer: usize,
        placed: &[Vec<ExpertId>],
        parts: &mut PartCache,
    ) -> Result<LocalExperts, ModelError> {
        let none = LocalExperts { which: Vec::new(), weights: None };
        let Some(moe) = source.spec().layers[layer].as_moe() else { return Ok(none) };
        match shard.experts {
            ExpertShard::None => Ok(none),
            ExpertShard::Cut(slice) => {
                let which: Vec<ExpertId> = (0..moe.num_experts as u32).map(ExpertId).collect();
                let load = || source.routed_experts(layer, moe, &which, slice);
                let weights = shared(&mut parts.experts, (layer, slice), load)?;
                Ok(LocalExperts { which, weights: Some(weights) })
            }
            ExpertShard::Placed => {
                let which = placed[layer].clone();
                let weights = match which.is_empty() {
                    true => None,
                    false => Some(Arc::new(source.routed_experts(layer, moe, &which, Slice::WHOLE)?)),
                };
                Ok(LocalExperts { which, weights })
            }
        }
    }
}
