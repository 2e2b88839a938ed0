//! The feed-forward half of a layer: a dense MLP or routed experts.

use moesaic_device::{Ctx, Tensor};
use moesaic_kernels::experts::{ExpertWeights, RowsPerExpert, experts};
use moesaic_kernels::paged::PagedBatch;
use moesaic_plan::{ExpertId, Slice};
use moesaic_spec::Ffn;
use moesaic_spec::model::tensors::Role;

use crate::ModelError;
use crate::layers::MoeLayer;
use crate::load::WeightSource;

/// One layer's feed-forward half.
pub enum FeedForward {
    /// One expert that every token goes to.
    Dense(ExpertWeights),
    /// A router and its experts.
    Moe(Box<MoeLayer>),
}

/// Which part of a feed-forward half is loaded. With a cut hidden width, results are parts of a sum over ranks.
#[derive(Clone, Copy, Debug)]
pub struct FfnPart<'a> {
    /// Of the hidden width of a dense MLP and of the shared expert.
    pub mlp: Slice,
    /// Routed experts, ascending.
    pub experts: &'a [ExpertId],
    /// Of the hidden width of each of them.
    pub expert: Slice,
}

impl FeedForward {
    pub(crate) fn load(
        source: &WeightSource,
        layer: usize,
        spec: &Ffn,
        part: FfnPart,
    ) -> Result<FeedForward, ModelError> {
        Ok(match spec {
            Ffn::Dense(mlp) => {
                FeedForward::Dense(source.mlp(|proj| Role::Dense(layer, proj), mlp.activation, part.mlp)?)
            }
            Ffn::Moe(moe) => FeedForward::Moe(Box::new(MoeLayer::load(source, layer, moe, part)?)),
        })
    }

    /// `x [T, D] → [T, D]`.
    pub fn forward(&self, ctx: &Ctx, x: &Tensor, batch: &PagedBatch) -> Result<Tensor, ModelError> {
        match self {
            FeedForward::Dense(weights) => dense(ctx, x, weights),
            FeedForward::Moe(moe) => moe.forward(ctx, x, batch),
        }
    }
}

/// An MLP is a group of one expert.
pub(super) fn dense(ctx: &Ctx, x: &Tensor, weights: &ExpertWeights) -> Result<Tensor, ModelError> {
    Ok(experts(ctx, x, RowsPerExpert::Known(&[0, x.dims()[0]]), weights, x.dtype())?)
}
