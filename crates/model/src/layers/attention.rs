//! Grouped-query attention (GQA; multi-head attention when every query head has its own key/value head).

use moesaic_device::{Ctx, Tensor};
use moesaic_kernels::attention::attention;
use moesaic_kernels::linear::linear_bias;
use moesaic_kernels::matrix::PackedMatrix;
use moesaic_kernels::paged::{PagedBatch, PagedKv};
use moesaic_kernels::rope::{QkNormWeights, QkvLayout, QkvPost, RopeTable, rope_and_store};
use moesaic_spec::model::tensors::Role;
use moesaic_spec::{Gqa, QkNorm};

use crate::ModelError;
use crate::load::WeightSource;

/// One layer's attention.
pub struct GqaAttention {
    spec: Gqa,
    eps: f32,
    softmax_scale: f32,
    qkv: PackedMatrix,           // [(H + 2G) C, D]
    qkv_bias: Option<Tensor>,    // [(H + 2G) C]
    q_norm: Option<Tensor>,      // [C] or [H C]
    k_norm: Option<Tensor>,      // [C] or [G C]
    output: PackedMatrix,        // [D, H C]
    output_bias: Option<Tensor>, // [D]
}

impl GqaAttention {
    pub(crate) fn load(source: &WeightSource, layer: usize, spec: &Gqa) -> Result<GqaAttention, ModelError> {
        let normed = spec.qk_norm != QkNorm::None;
        Ok(GqaAttention {
            spec: spec.clone(),
            eps: source.spec().rms_norm_eps,
            softmax_scale: source.spec().softmax_scale() as f32,
            qkv: source.matrix(&[Role::Q(layer), Role::K(layer), Role::V(layer)])?,
            qkv_bias: source.vector_if(spec.bias, &[Role::QBias(layer), Role::KBias(layer), Role::VBias(layer)])?,
            q_norm: source.vector_if(normed, &[Role::QNorm(layer)])?,
            k_norm: source.vector_if(normed, &[Role::KNorm(layer)])?,
            output: source.matrix(&[Role::O(layer)])?,
            output_bias: source.vector_if(spec.bias, &[Role::OBias(layer)])?,
        })
    }

    /// `x [T, D] → [T, D]`; this step's keys and values go into `kv`.
    pub fn forward(
        &self,
        ctx: &Ctx,
        x: &Tensor,
        kv: &mut PagedKv,
        batch: &PagedBatch,
        rope: &RopeTable,
    ) -> Result<Tensor, ModelError> {
        let Gqa { num_heads, num_kv_heads, head_dim, qk_norm, clip_qkv, sliding_window, .. } = self.spec;
        let layout = QkvLayout { num_heads, num_kv_heads, head_dim };
        let norm = match (qk_norm, &self.q_norm, &self.k_norm) {
            (QkNorm::PerHead, Some(query), Some(key)) => QkNormWeights::PerHead { query, key },
            (QkNorm::FullWidth, Some(query), Some(key)) => QkNormWeights::FullWidth { query, key },
            _ => QkNormWeights::None,
        };
        let mut qkv = linear_bias(ctx, x, &self.qkv, self.qkv_bias.as_ref(), x.dtype())?; // [T, (H + 2G) C]
        let post = QkvPost { layout, norm, eps: self.eps, clip: clip_qkv, rope };
        rope_and_store(ctx, &mut qkv, &post, kv, batch)?;
        let values = attention(ctx, &qkv, layout, kv, batch, self.softmax_scale, sliding_window)?; // [T, H C]
        Ok(linear_bias(ctx, &values, &self.output, self.output_bias.as_ref(), x.dtype())?)
    }
}
