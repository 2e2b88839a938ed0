//! Multi-head latent attention in its absorbed form (DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C).
//!
//! A head's key is `W_UK c` for the token's latent `c`, so `q · W_UK c = (W_UKᵀ q) · c`: the query is taken to the latent
//! space once, and the cache holds latents only. Values come out as latents and are expanded by `W_UV` after the sum.

use std::ops::Range;

use moesaic_device::{Ctx, Tensor};
use moesaic_kernels::head_linear::head_linear;
use moesaic_kernels::linear::linear;
use moesaic_kernels::matrix::PackedMatrix;
use moesaic_kernels::mla::{LatentPost, mla_attention, rope_queries, store_latent};
use moesaic_kernels::paged::PagedLatent;
use moesaic_kernels::rms_norm::rms_norm;
use moesaic_spec::Mla;
use moesaic_spec::model::tensors::Role;

use super::AttentionStep;
use crate::ModelError;
use crate::load::{LatentHeads, WeightSource};

/// One layer's attention. Below, `H` are the heads that are here, `L` is `kv_lora_rank`, `P` the rotary and `Q` the position-free width of a head.
pub struct MlaAttention {
    spec: Mla,
    softmax_scale: f32,
    query: Query,
    kv_a: PackedMatrix,          // [L + P, D]
    kv_a_norm: Tensor,           // [L]
    key_up: Vec<PackedMatrix>,   // a head: W_UKᵀ [L, Q]
    value_up: Vec<PackedMatrix>, // a head: W_UV [V, L]
    output: PackedMatrix,        // [D, H V]
}

enum Query {
    Direct(PackedMatrix), // [H (Q + P), D]
    LowRank { a: PackedMatrix, norm: Tensor, b: PackedMatrix },
}

impl MlaAttention {
    /// Attention over the heads `heads` of the model. Latents are shared by all heads, so every rank computes and keeps them;
    /// with some of the heads the result is a part of a sum over ranks.
    pub(crate) fn load(
        source: &WeightSource,
        layer: usize,
        spec: &Mla,
        heads: Range<usize>,
    ) -> Result<MlaAttention, ModelError> {
        assert!(!heads.is_empty() && heads.end <= spec.num_heads, "heads {heads:?} of {}", spec.num_heads);
        let columns = |width: usize| heads.start * width..heads.end * width;
        let query_rows = |role| source.rows(role, columns(spec.qk_head_dim()));
        let query = match spec.q_lora_rank {
            None => Query::Direct(source.matrix(&[query_rows(Role::Q(layer))])?),
            Some(_) => Query::LowRank {
                a: source.matrix(&[source.whole(Role::QA(layer))])?,
                norm: source.vector(&[source.whole(Role::QANorm(layer))])?,
                b: source.matrix(&[query_rows(Role::QB(layer))])?,
            },
        };
        let LatentHeads { key_up, value_up } = source.latent_heads(layer, spec, &heads)?;
        Ok(MlaAttention {
            spec: Mla { num_heads: heads.len(), ..spec.clone() },
            softmax_scale: source.spec().softmax_scale() as f32,
            query,
            kv_a: source.matrix(&[source.whole(Role::KvA(layer))])?,
            kv_a_norm: source.vector(&[source.whole(Role::KvANorm(layer))])?,
            key_up,
            value_up,
            output: source.matrix(&[source.cols(Role::O(layer), columns(spec.v_head_dim))])?,
        })
    }

    /// The heads that are here.
    pub fn spec(&self) -> &Mla {
        &self.spec
    }

    /// `x [T, D] → [T, D]`; this step's latents go into `latent`.
    pub fn forward(
        &self,
        ctx: &Ctx,
        x: &Tensor,
        latent: &mut PagedLatent,
        step: AttentionStep,
    ) -> Result<Tensor, ModelError> {
        let AttentionStep { batch, rope, out_dtype } = step;
        let spec = &self.spec;
        let mut q = match &self.query {
            Query::Direct(w) => linear(ctx, x, w, x.dtype())?,
            Query::LowRank { a, norm, b } => {
                let q_a = linear(ctx, x, a, x.dtype())?;
                let q_a = rms_norm(ctx, &q_a, norm, Mla::LATENT_NORM_EPS, x.dtype())?;
                linear(ctx, &q_a, b, x.dtype())?
            }
        }; // [T, H (Q + P)]
        rope_queries(ctx, &mut q, spec.num_heads, rope, batch)?;

        let kv_a = linear(ctx, x, &self.kv_a, x.dtype())?; // [T, L + P]
        let post = LatentPost { norm_weight: &self.kv_a_norm, eps: Mla::LATENT_NORM_EPS, rope };
        store_latent(ctx, (&kv_a).into(), &post, latent, batch)?;

        let q_latent = head_linear(ctx, &q, spec.qk_head_dim(), &self.key_up, x.dtype())?; // [T, H L]
        let values = mla_attention(ctx, &q_latent, &q, spec.num_heads, latent, batch, self.softmax_scale)?; // [T, H L]
        let values = head_linear(ctx, &values, spec.kv_lora_rank, &self.value_up, x.dtype())?; // [T, H V]
        Ok(linear(ctx, &values, &self.output, out_dtype)?)
    }
}
