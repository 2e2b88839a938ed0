//! What stays with the tokens of a layer of routed experts: the router, and the expert that every token passes.

use moesaic_device::{Ctx, Tensor};
use moesaic_kernels::dispatch::keep_pairs;
use moesaic_kernels::experts::ExpertWeights;
use moesaic_kernels::linear::linear;
use moesaic_kernels::matrix::PackedMatrix;
use moesaic_kernels::paged::PagedBatch;
use moesaic_kernels::router::{Routing, router};
use moesaic_plan::Slice;
use moesaic_spec::model::tensors::Role;
use moesaic_spec::{DType, Moe};

use super::ffn::dense;
use crate::ModelError;
use crate::load::WeightSource;

/// One layer's router and shared expert.
pub struct MoeLayer {
    spec: Moe,
    gate: PackedMatrix,              // [E, D]
    correction_bias: Option<Tensor>, // [E]
    shared: Option<ExpertWeights>,
}

impl MoeLayer {
    pub(crate) fn load(source: &WeightSource, layer: usize, spec: &Moe, slice: Slice) -> Result<MoeLayer, ModelError> {
        let bias = || source.vector(&[source.whole(Role::RouterBias(layer))]);
        let shared = || source.mlp(|proj| Role::Shared(layer, proj), spec.activation, slice);
        Ok(MoeLayer {
            spec: spec.clone(),
            gate: source.matrix(&[source.whole(Role::Router(layer))])?,
            correction_bias: if spec.router.correction_bias { Some(bias()?) } else { None },
            shared: if spec.shared_intermediate_size > 0 { Some(shared()?) } else { None },
        })
    }

    /// The experts of each row of `x [T, D]`: with their weights `[T, A]`, and without the pairs that lost their place
    /// (-1; empty on `Meta`).
    pub fn route(&self, ctx: &Ctx, x: &Tensor, batch: &PagedBatch) -> Result<(Routing, Vec<i32>), ModelError> {
        let spec = &self.spec;
        let logits = linear(ctx, x, &self.gate, DType::F32)?; // [T, E]
        let routing = router(ctx, &logits, &spec.router, spec.top_k, self.correction_bias.as_ref())?; // [T, A]
        if ctx.is_meta() {
            return Ok((routing, Vec::new()));
        }
        let sequences: Vec<_> = batch.seqs().iter().map(|seq| seq.row0..seq.row0 + seq.num_rows).collect();
        let capacity = spec.capacity.as_ref().map(|capacity| (capacity, sequences.as_slice()));
        let expert_of = keep_pairs(&routing, spec.num_experts, capacity)?;
        Ok((routing, expert_of))
    }

    /// The shared expert, `x [T, D] → [T, D]`.
    pub fn shared(&self, ctx: &Ctx, x: &Tensor, out_dtype: DType) -> Result<Tensor, ModelError> {
        dense(ctx, x, self.shared.as_ref().expect("the model has a shared expert"), out_dtype)
    }
}
