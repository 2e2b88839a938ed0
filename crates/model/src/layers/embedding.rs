//! Token ids to rows, and rows to logits: two tables, or one that is read both ways.

use moesaic_device::{Ctx, Tensor};
use moesaic_kernels::embedding::{embedding, embedding_packed};
use moesaic_kernels::linear::linear;
use moesaic_kernels::matrix::PackedMatrix;
use moesaic_plan::Slice;
use moesaic_spec::DType;
use moesaic_spec::model::tensors::Role;

use crate::ModelError;
use crate::load::WeightSource;

/// The two ends of the model, or one of them.
pub struct Embedding {
    /// `[V, D]`; `None` when the head is read instead (tied), or where nothing is embedded.
    table: Option<Tensor>,
    /// `[V, D]`, or this rank's rows of it.
    head: Option<PackedMatrix>,
}

impl Embedding {
    /// The table if `embeds`, and the rows of the head that `vocab` cuts out if `has_head`. Where both are one (`tied`) and all
    /// of it is here, the packed head is read both ways; a cut head has not all tokens, so the table stands beside it.
    pub(crate) fn load(
        source: &WeightSource,
        tied: bool,
        vocab: Slice,
        embeds: bool,
        has_head: bool,
    ) -> Result<Embedding, ModelError> {
        let one_for_both = tied && has_head && vocab.is_whole();
        let head = if tied { Role::Embed } else { Role::LmHead };
        let rows = || source.rows(head, vocab.range(source.spec().vocab_size, 1));
        Ok(Embedding {
            table: (embeds && !one_for_both).then(|| source.table(Role::Embed)).transpose()?,
            head: has_head.then(|| source.matrix(&[rows()])).transpose()?,
        })
    }

    /// `ids [T] → [T, D]` in F32, the residual stream.
    ///
    /// # Panics
    /// Where neither a table nor a whole head was loaded.
    pub fn embed(&self, ctx: &Ctx, ids: &[u32]) -> Result<Tensor, ModelError> {
        Ok(match (&self.table, &self.head) {
            (Some(table), _) => embedding(ctx, table, ids)?,
            (None, Some(head)) => embedding_packed(ctx, head, ids)?,
            (None, None) => panic!("the embedding is on another rank"),
        })
    }

    /// `x [T, D] → [T, V]` in F32; of a cut head the logits of its rows.
    ///
    /// # Panics
    /// Where no head was loaded.
    pub fn logits(&self, ctx: &Ctx, x: &Tensor) -> Result<Tensor, ModelError> {
        let head = self.head.as_ref().expect("the head is on another rank");
        Ok(linear(ctx, x, head, DType::F32)?)
    }
}
