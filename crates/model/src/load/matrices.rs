//! Packed matrices, tables and vectors, whole or in part.

use std::ops::Range;

use half::bf16;
use moesaic_device::{Pool, Tensor};
use moesaic_kernels::KernelError;
use moesaic_kernels::matrix::{PackedMatrix, SourceMatrix};
use moesaic_spec::model::tensors::Role;
use moesaic_spec::{DType, Mla};

use super::{Cut, Part, WeightSource};
use crate::ModelError;

impl WeightSource<'_> {
    /// The type that a part takes in memory: as the whole matrix, but FP8 that does not begin with the first column of a
    /// block is dequantised, because packed factors stand for whole blocks.
    pub(super) fn part_dtype(&self, role: Role, cols: &Range<usize>) -> DType {
        let aligned = self.spec.fp8_block.is_none_or(|[_, width]| cols.start.is_multiple_of(width));
        if aligned { self.matrix_dtype(role) } else { self.plain_dtype() }
    }

    /// One matrix of these parts, one below the other.
    pub(crate) fn matrix(&self, parts: &[Part]) -> Result<PackedMatrix, ModelError> {
        let rows = parts.iter().map(|part| part.cut.rows.len()).sum();
        let Part { role, cut } = &parts[0];
        let dtype = self.part_dtype(*role, &cut.cols);
        let mut matrix = PackedMatrix::empty(self.arena, rows, cut.cols.len(), dtype)?;
        let mut row = 0;
        self.take_parts(parts, |source, pool| {
            matrix.pack_rows(pool, row, source)?;
            row += source.rows;
            Ok(())
        })?;
        Ok(matrix)
    }

    /// A row-major table, for looking rows up.
    pub(crate) fn table(&self, role: Role) -> Result<Tensor, ModelError> {
        let mut table = Tensor::empty(self.arena, &self.tensors[&role].shape, self.plain_dtype())?;
        self.take_parts(&[self.whole(role)], |source, _| {
            match table.dtype() {
                dtype if dtype == source.dtype => table.bytes_mut().copy_from_slice(source.bytes),
                DType::F32 => source.to_f32(table.f32_mut()),
                _ => {
                    let mut row_f32 = vec![0.0; source.cols];
                    for (row, out) in table.bf16_mut().chunks_mut(source.cols).enumerate() {
                        source.row_range(row..row + 1).to_f32(&mut row_f32);
                        out.iter_mut().zip(&row_f32).for_each(|(out, &x)| *out = bf16::from_f32(x));
                    }
                }
            }
            Ok(())
        })?;
        Ok(table)
    }

    /// F32 vectors or parts of them, one behind the other.
    pub(crate) fn vector(&self, parts: &[Part]) -> Result<Tensor, ModelError> {
        let len = parts.iter().map(|part| part.cut.cols.len()).sum();
        let mut vector = Tensor::empty(self.arena, &[len], DType::F32)?;
        let mut start = 0;
        self.take_parts(parts, |source, _| {
            source.to_f32(&mut vector.f32_mut()[start..start + source.cols]);
            start += source.cols;
            Ok(())
        })?;
        Ok(vector)
    }

    /// The same; nothing of no parts.
    pub(crate) fn vector_if_any(&self, parts: &[Part]) -> Result<Option<Tensor>, ModelError> {
        (!parts.is_empty()).then(|| self.vector(parts)).transpose()
    }

    /// Hands the parts to `pack` in order.
    fn take_parts(
        &self,
        parts: &[Part],
        mut pack: impl FnMut(&SourceMatrix, &Pool) -> Result<(), KernelError>,
    ) -> Result<(), ModelError> {
        for of_role in parts.chunk_by(|a, b| a.role == b.role) {
            let cuts: Vec<Cut> = of_role.iter().map(|part| part.cut.clone()).collect();
            self.take(of_role[0].role, &cuts, |_, source, pool| pack(source, pool))?;
        }
        Ok(())
    }

    /// MLA's `kv_b_proj [H (Q + V), L]` as kernels want it, for some heads: per head `W_UKᵀ [L, Q]` and `W_UV [V, L]`. FP8
    /// blocks are dequantised: a transposed block would need its scale along the other axis, and these matrices are small.
    pub(crate) fn latent_heads(
        &self,
        layer: usize,
        spec: &Mla,
        heads: &Range<usize>,
    ) -> Result<LatentHeads, ModelError> {
        let (rank, nope, value) = (spec.kv_lora_rank, spec.qk_nope_head_dim, spec.v_head_dim);
        let empty = |rows, cols| PackedMatrix::empty(self.arena, rows, cols, self.plain_dtype());
        let mut key_up = heads.clone().map(|_| empty(rank, nope)).collect::<Result<Vec<_>, _>>()?;
        let mut value_up = heads.clone().map(|_| empty(value, rank)).collect::<Result<Vec<_>, _>>()?;
        let width = nope + value;
        self.take_parts(&[self.rows(Role::KvB(layer), heads.start * width..heads.end * width)], |source, pool| {
            let mut plain = vec![0.0; source.rows * source.cols];
            source.to_f32(&mut plain);
            let plain: Vec<u8> = plain.into_iter().flat_map(f32::to_le_bytes).collect();
            let plain = SourceMatrix::new(&plain, DType::F32, source.rows, source.cols);
            for (head, (key, value)) in key_up.iter_mut().zip(&mut value_up).enumerate() {
                let row = head * width;
                key.pack_rows(pool, 0, &plain.row_range(row..row + nope).transposed())?;
                value.pack_rows(pool, 0, &plain.row_range(row + nope..row + width))?;
            }
            Ok(())
        })?;
        Ok(LatentHeads { key_up, value_up })
    }
}

/// MLA's up-projections, by head.
pub(crate) struct LatentHeads {
    /// `W_UKᵀ [L, Q]`
    pub(crate) key_up: Vec<PackedMatrix>,
    /// `W_UV [V, L]`
    pub(crate) value_up: Vec<PackedMatrix>,
}
