//! Token ids to rows, and rows to logits: two tables, or one that is read both ways.

use moesaic_device::{Ctx, Tensor};
use moesaic_kernels::embedding::{embedding, embedding_packed};
use moesaic_kernels::linear::linear;
use moesaic_kernels::matrix::PackedMatrix;
use moesaic_spec::DType;
use moesaic_spec::model::tensors::Role;

use crate::ModelError;
use crate::load::WeightSource;

/// The two ends of the model.
pub struct Embedding {
    /// `[V, D]`; `None` when the head is read instead (tied).
    table: Option<Tensor>,
    head: PackedMatrix, // [V, D]
}

impl Embedding {
    pub(crate) fn load(source: &WeightSource, tied: bool) -> Result<Embedding, ModelError> {
        Ok(Embedding {
            table: if tied { None } else { Some(source.table(Role::Embed)?) },
            head: source.matrix(&[if tied { Role::Embed } else { Role::LmHead }])?,
        })
    }

    /// `ids [T] → [T, D]` in F32, the residual stream.
    pub fn embed(&self, ctx: &Ctx, ids: &[u32]) -> Result<Tensor, ModelError> {
        Ok(match &self.table {
            Some(table) => embedding(ctx, table, ids)?,
            None => embedding_packed(ctx, &self.head, ids)?,
        })
    }

    /// `x [T, D] → [T, V]` in F32.
    pub fn logits(&self, ctx: &Ctx, x: &Tensor) -> Result<Tensor, ModelError> {
        Ok(linear(ctx, x, &self.head, DType::F32)?)
    }
}
