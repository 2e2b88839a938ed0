//! The feed-forward half of a layer, but for routed experts: a dense MLP, or what stays with the tokens of those.

use moesaic_device::{Ctx, Tensor};
use moesaic_kernels::experts::{ExpertWeights, RowsPerExpert, experts};
use moesaic_plan::Slice;
use moesaic_spec::model::tensors::Role;
use moesaic_spec::{DType, Ffn};

use crate::ModelError;
use crate::layers::MoeLayer;
use crate::load::WeightSource;

/// One layer's feed-forward half.
pub enum FeedForward {
    /// One expert that every token goes to.
    Dense(ExpertWeights),
    /// A router and a shared expert.
    Moe(Box<MoeLayer>),
}

impl FeedForward {
    /// `slice` is of the hidden width of a dense MLP or of the shared expert. With a cut width, results are parts of a sum
    /// over ranks.
    pub(crate) fn load(
        source: &WeightSource,
        layer: usize,
        spec: &Ffn,
        slice: Slice,
    ) -> Result<FeedForward, ModelError> {
        Ok(match spec {
            Ffn::Dense(mlp) => {
                FeedForward::Dense(source.mlp(|proj| Role::Dense(layer, proj), mlp.activation, slice)?)
            }
            Ffn::Moe(moe) => FeedForward::Moe(Box::new(MoeLayer::load(source, layer, moe, slice)?)),
        })
    }
}

/// An MLP is a group of one expert.
pub(crate) fn dense(ctx: &Ctx, x: &Tensor, weights: &ExpertWeights, out_dtype: DType) -> Result<Tensor, ModelError> {
    Ok(experts(ctx, x, RowsPerExpert::Known(&[0, x.dims()[0]]), weights, out_dtype)?)
}
