//! The decoder: embed, layers, head.

use moesaic_device::{Ctx, Tensor};
use moesaic_kernels::add_rms_norm::add_rms_norm;
use moesaic_kernels::gather_rows::gather_rows;
use moesaic_kernels::paged::PagedBatch;
use moesaic_kernels::rms_norm::rms_norm;
use moesaic_kernels::rope::RopeTable;
use moesaic_plan::{ExpertId, Slice};
use moesaic_spec::model::tensors::Role;
use moesaic_spec::{Attention, Bytes, DType, ModelSpec};

use crate::kv_cache::LayerCache;
use crate::layers::{AttentionStep, Embedding, FeedForward, FfnPart, GqaAttention, MlaAttention};
use crate::load::WeightSource;
use crate::{KvCache, ModelError};

/// A model with its weights.
pub struct Transformer {
    spec: ModelSpec,
    dtype: DType,
    rope: RopeTable,
    embedding: Embedding,
    layers: Vec<DecoderLayer>,
    final_norm: Tensor, // [D]
}

struct DecoderLayer {
    input_norm: Tensor, // [D]
    attention: AttentionLayer,
    post_attention_norm: Tensor, // [D]
    feed_forward: FeedForward,
}

enum AttentionLayer {
    Gqa(GqaAttention),
    Mla(MlaAttention),
}

/// What one step computes: `T` tokens of several sequences, rows of a sequence together and in order.
pub struct StepInput<'a> {
    /// Token ids, `T` of them.
    pub token_ids: &'a [u32],
    /// Which sequence each row belongs to, and where its keys and values are.
    pub batch: PagedBatch,
    /// The rows whose logits are wanted.
    pub logit_rows: &'a [usize],
}

impl Transformer {
    /// Takes the weights from `source`, in the order in which they are used.
    pub fn load(source: &WeightSource, max_model_len: usize) -> Result<Transformer, ModelError> {
        let spec = source.spec().clone();
        let rotary_dim = match &spec.attention {
            Attention::Gqa(gqa) => gqa.head_dim,
            Attention::Mla(mla) => mla.qk_rope_head_dim,
        };
        let embedding = Embedding::load(source, spec.tie_word_embeddings, Slice::WHOLE, true, true)?;
        let mut layers = Vec::with_capacity(spec.layers.len());
        let norm = |role| source.vector(&[source.whole(role)]);
        for (idx, ffn) in spec.layers.iter().enumerate() {
            let heads = 0..spec.attention.num_heads();
            let num_experts = ffn.as_moe().map_or(0, |moe| moe.num_experts as u32);
            let experts: Vec<ExpertId> = (0..num_experts).map(ExpertId).collect();
            let part = FfnPart { mlp: Slice::WHOLE, experts: &experts, expert: Slice::WHOLE };
            layers.push(DecoderLayer {
                input_norm: norm(Role::InputNorm(idx))?,
                attention: match &spec.attention {
                    Attention::Gqa(gqa) => AttentionLayer::Gqa(GqaAttention::load(source, idx, gqa, heads)?),
                    Attention::Mla(mla) => AttentionLayer::Mla(MlaAttention::load(source, idx, mla, heads)?),
                },
                post_attention_norm: norm(Role::PostAttentionNorm(idx))?,
                feed_forward: FeedForward::load(source, idx, ffn, part)?,
            });
        }
        Ok(Transformer {
            dtype: source.compute_dtype(),
            rope: match source.is_meta() {
                true => RopeTable::meta(&spec.rope, rotary_dim, max_model_len)?,
                false => RopeTable::new(&spec.rope, rotary_dim, max_model_len)?,
            },
            embedding,
            layers,
            final_norm: norm(Role::FinalNorm)?,
            spec,
        })
    }

    /// What the model is.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Element type of activations between ops, and of the cache.
    pub fn compute_dtype(&self) -> DType {
        self.dtype
    }

    /// Memory outside the weights' arena for each position that a sequence may have: RoPE's table.
    pub fn position_bytes(&self) -> Bytes {
        self.rope.position_bytes()
    }

    /// One step: `[logit_rows, V]` in F32. Keys and values of this step's tokens go into `kv`.
    pub fn forward(&self, ctx: &Ctx, input: &StepInput, kv: &mut KvCache) -> Result<Tensor, ModelError> {
        let (eps, dtype) = (self.spec.rms_norm_eps, self.dtype);
        let batch = &input.batch;
        let mut residual = self.embedding.embed(ctx, input.token_ids)?; // [T, D]
        let mut delta: Option<Tensor> = None;
        for (layer, cache) in self.layers.iter().zip(&mut kv.layers) {
            let x = match delta.take() {
                None => rms_norm(ctx, &residual, &layer.input_norm, eps, dtype)?,
                Some(delta) => add_rms_norm(ctx, &mut residual, &delta, &layer.input_norm, eps, dtype)?,
            };
            let step = AttentionStep { batch, rope: &self.rope, out_dtype: dtype };
            let attended = match (&layer.attention, cache) {
                (AttentionLayer::Gqa(gqa), LayerCache::Gqa(kv)) => gqa.forward(ctx, &x, kv, step)?,
                (AttentionLayer::Mla(mla), LayerCache::Mla(latent)) => mla.forward(ctx, &x, latent, step)?,
                _ => unreachable!("the cache was made for this model"),
            };
            let x = add_rms_norm(ctx, &mut residual, &attended, &layer.post_attention_norm, eps, dtype)?;
            delta = Some(layer.feed_forward.forward(ctx, &x, batch)?);
        }
        let delta = delta.expect("a model has a layer");
        let x = add_rms_norm(ctx, &mut residual, &delta, &self.final_norm, eps, dtype)?;
        let x = gather_rows(ctx, &x, input.logit_rows)?;
        self.embedding.logits(ctx, &x)
    }
}
