//! Routed experts: route, dispatch, experts, combine.

use moesaic_device::{Amount, Ctx, Tensor};
use moesaic_kernels::combine::combine;
use moesaic_kernels::dispatch::{DispatchSource, Pairs, dispatch, keep_pairs};
use moesaic_kernels::experts::{ExpertWeights, RowsPerExpert, experts};
use moesaic_kernels::linear::linear;
use moesaic_kernels::matrix::PackedMatrix;
use moesaic_kernels::paged::PagedBatch;
use moesaic_kernels::router::router;
use moesaic_spec::model::tensors::Role;
use moesaic_spec::{DType, Moe};

use super::ffn::{FfnPart, dense};
use crate::ModelError;
use crate::load::WeightSource;

/// One layer's router and experts.
pub struct MoeLayer {
    spec: Moe,
    gate: PackedMatrix,              // [E, D]
    correction_bias: Option<Tensor>, // [E]
    experts: ExpertWeights,
    shared: Option<ExpertWeights>,
}

impl MoeLayer {
    pub(crate) fn load(source: &WeightSource, layer: usize, spec: &Moe, part: FfnPart) -> Result<MoeLayer, ModelError> {
        let bias = spec.router.correction_bias.then(|| source.whole(Role::RouterBias(layer)));
        let shared = || source.mlp(|proj| Role::Shared(layer, proj), spec.activation, part.mlp);
        Ok(MoeLayer {
            spec: spec.clone(),
            gate: source.matrix(&[source.whole(Role::Router(layer))])?,
            correction_bias: source.vector_if_any(bias.as_slice())?,
            experts: source.routed_experts(layer, spec, part.experts, part.expert)?,
            shared: (spec.shared_intermediate_size > 0).then(shared).transpose()?,
        })
    }

    /// `x [T, D] → [T, D]`.
    pub fn forward(&self, ctx: &Ctx, x: &Tensor, batch: &PagedBatch) -> Result<Tensor, ModelError> {
        let spec = &self.spec;
        let logits = linear(ctx, x, &self.gate, DType::F32)?; // [T, E]
        let routing = router(ctx, &logits, &spec.router, spec.top_k, self.correction_bias.as_ref())?; // [T, A]
        let sequences: Vec<_> = batch.seqs().iter().map(|seq| seq.row0..seq.row0 + seq.num_rows).collect();
        let capacity = spec.capacity.as_ref().map(|capacity| (capacity, sequences.as_slice()));
        let (t, a) = (x.dims()[0], spec.top_k);
        let kept = keep_pairs(&routing, spec.num_experts, capacity)?; // [T A]
        let pairs: Vec<(u32, u32)> = kept
            .iter()
            .enumerate()
            .filter(|&(_, &expert)| expert >= 0)
            .map(|(pair, &expert)| ((pair / a) as u32, expert as u32))
            .collect();
        let pairs = match ctx.is_meta() {
            true => Pairs::Counted(Amount::exact((t * a) as u64)),
            false => Pairs::Known(&pairs),
        };
        let sorted = dispatch(ctx, &[DispatchSource { x, pairs }], spec.num_experts)?; // [R, D]
        let rows = match ctx.is_meta() {
            true => RowsPerExpert::Uniform { num_tokens: t, top_k: a, num_experts: spec.num_experts },
            false => RowsPerExpert::Known(&sorted.offsets),
        };
        let y = experts(ctx, &sorted.x, rows, &self.experts, x.dtype())?; // [R, D]
        let shared = self.shared.as_ref().map(|weights| dense(ctx, x, weights)).transpose()?;
        let mut row_of = ctx.empty(&[t, a], DType::I32)?;
        if !ctx.is_meta() {
            let mut rows = sorted.row_of[0].iter();
            let row = |&expert: &i32| if expert < 0 { -1 } else { *rows.next().expect("a row for each pair") as i32 };
            row_of.i32_mut().iter_mut().zip(kept.iter().map(row)).for_each(|(to, row)| *to = row);
        }
        Ok(combine(ctx, &[&y], &row_of, &routing.topk_weights, shared.as_ref())?) // [T, D]
    }
}
