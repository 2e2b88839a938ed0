//! Grouped-query attention (GQA; multi-head attention when every query head has its own key/value head), over all heads or
//! over those of one rank.

use std::ops::Range;

use moesaic_device::{Ctx, Tensor};
use moesaic_kernels::attention::attention;
use moesaic_kernels::linear::linear_bias;
use moesaic_kernels::matrix::PackedMatrix;
use moesaic_kernels::paged::PagedKv;
use moesaic_kernels::rope::{QkNormWeights, QkvLayout, QkvPost, qk_sums, rope_and_store};
use moesaic_spec::model::tensors::Role;
use moesaic_spec::{Gqa, QkNorm};

use super::AttentionStep;
use super::heads::{columns_of, counted_kv_heads, kv_heads_of, model_kv_heads};
use crate::ModelError;
use crate::load::{Part, WeightSource};

/// One layer's attention. Below, H and G are the query and key/value heads that are here.
pub struct GqaAttention {
    spec: Gqa,
    eps: f32,
    softmax_scale: f32,
    qkv: PackedMatrix,        // [(H + 2G) C, D]
    qkv_bias: Option<Tensor>, // [(H + 2G) C]
    q_norm: Option<Tensor>,   // [C] or [H C]
    k_norm: Option<Tensor>,   // [C] or [G C]
    shared_norm: Option<SharedNorm>,
    output: PackedMatrix,        // [D, H C]
    output_bias: Option<Tensor>, // [D]
}

/// A norm over all heads of the model, where some of them are elsewhere.
struct SharedNorm {
    /// Key heads whose squares this rank sums up.
    counted: Vec<usize>,
    /// Columns of all queries and of all keys of the model.
    query_width: usize,
    key_width: usize,
}

/// What is between the two halves of attention.
pub struct Projected {
    /// Queries, keys and values `[T, (H + 2G) C]`.
    pub qkv: Tensor,
    /// Where the norm on queries and keys goes over heads of several ranks: this rank's sums of squares `[T, 2]` in F32,
    /// to be added up over the ranks.
    pub norm_sums: Option<Tensor>,
}

impl GqaAttention {
    /// Attention over the query heads `heads` of the model, with the key/value heads that serve them
    /// ([`kv_heads_of`]). With some of the heads the result is a part of a sum over ranks; the output's bias is in that of
    /// the rank with head 0.
    pub(crate) fn load(
        source: &WeightSource,
        layer: usize,
        spec: &Gqa,
        heads: Range<usize>,
    ) -> Result<GqaAttention, ModelError> {
        let c = spec.head_dim;
        let query = heads.start * c..heads.end * c;
        let kv = columns_of(&model_kv_heads(spec, &heads), c);
        let rows = |role: Role| kv.iter().map(move |rows| source.rows(role, rows.clone()));
        let cols = |role: Role| kv.iter().map(move |cols| source.cols(role, cols.clone()));
        let mut qkv = vec![source.rows(Role::Q(layer), query.clone())];
        qkv.extend(rows(Role::K(layer)).chain(rows(Role::V(layer))));
        let (mut qkv_bias, mut output_bias): (Vec<Part>, Vec<Part>) = (vec![], vec![]);
        if spec.bias {
            qkv_bias.push(source.cols(Role::QBias(layer), query.clone()));
            qkv_bias.extend(cols(Role::KBias(layer)).chain(cols(Role::VBias(layer))));
            if heads.start == 0 {
                output_bias.push(source.whole(Role::OBias(layer)));
            }
        }
        let (q_norm, k_norm) = match spec.qk_norm {
            QkNorm::None => (vec![], vec![]),
            QkNorm::PerHead => (vec![source.whole(Role::QNorm(layer))], vec![source.whole(Role::KNorm(layer))]),
            QkNorm::FullWidth => {
                (vec![source.cols(Role::QNorm(layer), query.clone())], cols(Role::KNorm(layer)).collect())
            }
        };
        let shared = spec.qk_norm == QkNorm::FullWidth && heads.len() < spec.num_heads;
        Ok(GqaAttention {
            spec: kv_heads_of(spec, heads.clone()),
            eps: source.spec().rms_norm_eps,
            softmax_scale: source.spec().softmax_scale() as f32,
            qkv: source.matrix(&qkv)?,
            qkv_bias: source.vector_if_any(&qkv_bias)?,
            q_norm: source.vector_if_any(&q_norm)?,
            k_norm: source.vector_if_any(&k_norm)?,
            shared_norm: shared.then(|| SharedNorm {
                counted: counted_kv_heads(spec, &heads),
                query_width: spec.num_heads * c,
                key_width: spec.num_kv_heads * c,
            }),
            output: source.matrix(&[source.cols(Role::O(layer), query)])?,
            output_bias: source.vector_if_any(&output_bias)?,
        })
    }

    /// The heads that are here.
    pub fn spec(&self) -> &Gqa {
        &self.spec
    }

    fn layout(&self) -> QkvLayout {
        let Gqa { num_heads, num_kv_heads, head_dim, .. } = self.spec;
        QkvLayout { num_heads, num_kv_heads, head_dim }
    }

    /// `x [T, D] → [T, D]`; this step's keys and values go into `kv`.
    pub fn forward(&self, ctx: &Ctx, x: &Tensor, kv: &mut PagedKv, step: AttentionStep) -> Result<Tensor, ModelError> {
        let projected = self.project(ctx, x)?;
        self.attend(ctx, projected, kv, step)
    }

    /// The first half, from `x [T, D]`.
    pub fn project(&self, ctx: &Ctx, x: &Tensor) -> Result<Projected, ModelError> {
        let qkv = linear_bias(ctx, x, &self.qkv, self.qkv_bias.as_ref(), x.dtype())?;
        let sums = |norm: &SharedNorm| qk_sums(ctx, &qkv, self.layout(), &norm.counted);
        let norm_sums = self.shared_norm.as_ref().map(sums).transpose()?;
        Ok(Projected { qkv, norm_sums })
    }

    /// The second half: `[T, D]`. Where there are `norm_sums`, they must have become those of all ranks.
    pub fn attend(
        &self,
        ctx: &Ctx,
        projected: Projected,
        kv: &mut PagedKv,
        step: AttentionStep,
    ) -> Result<Tensor, ModelError> {
        let layout = self.layout();
        let Projected { mut qkv, norm_sums } = projected;
        let norm = match (self.spec.qk_norm, &self.q_norm, &self.k_norm) {
            (QkNorm::PerHead, Some(query), Some(key)) => QkNormWeights::PerHead { query, key },
            (QkNorm::FullWidth, Some(query), Some(key)) => match (&self.shared_norm, &norm_sums) {
                (Some(norm), Some(sums)) => {
                    let &SharedNorm { query_width, key_width, .. } = norm;
                    QkNormWeights::FullWidthOf { query, key, sums, query_width, key_width }
                }
                _ => QkNormWeights::FullWidth { query, key },
            },
            _ => QkNormWeights::None,
        };
        let AttentionStep { batch, rope, out_dtype } = step;
        let post = QkvPost { layout, norm, eps: self.eps, clip: self.spec.clip_qkv, rope };
        rope_and_store(ctx, &mut qkv, &post, kv, batch)?;
        let window = self.spec.sliding_window;
        let values = attention(ctx, &qkv, layout, kv, batch, self.softmax_scale, window)?; // [T, H C]
        Ok(linear_bias(ctx, &values, &self.output, self.output_bias.as_ref(), out_dtype)?)
    }
}
