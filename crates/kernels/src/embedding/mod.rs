//! Rows of the embedding table.
//!
//! `out[t, :] = table[ids[t], :]`, widened to F32: the start of the residual stream.
//!
//! | | shape | type |
//! | --- | --- | --- |
//! | `table` | `[V, D]` | F32 or BF16 |
//! | `ids` | `[T]`, each below V | u32 |
//! | out | `[T, D]` | F32 |
//!
//! Flops 0. Bytes: the T rows, once in and once out, and the ids. Exact on every path.

use half::bf16;
use moesaic_device::{Ctx, OpCall, Tensor};
use moesaic_spec::DType;

use crate::KernelError;
use crate::contract::require;
use crate::elementwise::{Element, check_activation, multi_isa};
use crate::matrix::PackedMatrix;
use crate::rows::for_rows;

pub mod reference;

const OP: &str = "embedding";

/// The rows `ids` of `table`, in F32 `[T, D]`.
pub fn embedding(ctx: &Ctx, table: &Tensor, ids: &[u32]) -> Result<Tensor, KernelError> {
    check_activation(OP, "table", table.dtype())?;
    let rank2 = table.dims().len() == 2 && table.dims()[1] > 0;
    require(rank2, OP, "table", || "[V, D]".into(), || format!("{:?}", table.dims()))?;
    let (v, d) = table.dims2();
    let isa = ctx.isa();
    look_up(ctx, (v, d), table.dtype(), ids, |ids, out| match table.dtype() {
        DType::F32 => gather::<f32>(isa, table.f32(), ids, d, out),
        _ => gather::<bf16>(isa, table.bf16(), ids, d, out),
    })
}

/// The same of a packed matrix `[V, D]`: a head that is its own embedding (tied).
pub fn embedding_packed(ctx: &Ctx, table: &PackedMatrix, ids: &[u32]) -> Result<Tensor, KernelError> {
    let d = table.k();
    look_up(ctx, (table.n(), d), table.dtype(), ids, |ids, out| {
        out.chunks_exact_mut(d).zip(ids).for_each(|(out, &id)| table.row_to_f32(id as usize, out));
    })
}

/// Checks, records, and has `gather` write the rows of some ids.
fn look_up(
    ctx: &Ctx,
    (v, d): (usize, usize),
    dtype: DType,
    ids: &[u32],
    gather: impl Fn(&[u32], &mut [f32]) + Sync,
) -> Result<Tensor, KernelError> {
    if let Some((t, &id)) = ids.iter().enumerate().find(|&(_, &id)| id as usize >= v) {
        let got = format!("{id} at position {t}");
        return Err(KernelError::Contract { op: OP, what: "token id", expected: format!("below {v}"), got });
    }
    let t = ids.len();
    let row_bytes = d * (dtype.size_bytes() + 4);
    ctx.record(|| OpCall::compute(OP, &[("T", t), ("D", d)], 0, (t * (row_bytes + 4)) as u64));
    let mut out = ctx.empty(&[t, d], DType::F32)?;
    if !ctx.is_meta() {
        for_rows(ctx, out.f32_mut(), d, row_bytes, |first, out| gather(&ids[first..], out));
    }
    Ok(out)
}

multi_isa! {
    fn gather<X: Element>(table: &[X], ids: &[u32], d: usize, out: &mut [f32]) = gather_rows
}

#[inline(always)]
fn gather_rows<X: Element>(table: &[X], ids: &[u32], d: usize, out: &mut [f32]) {
    for (out, &id) in out.chunks_exact_mut(d).zip(ids) {
        let row = &table[id as usize * d..][..d];
        for (out, x) in out.iter_mut().zip(row) {
            *out = x.to_f32();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ACTIVATIONS, WIDTHS, contexts, random, tensor, values};

    #[test]
    fn rows_are_those_of_the_table() {
        for ctx in contexts() {
            for d in WIDTHS {
                for dtype in ACTIVATIONS {
                    let table = tensor(&ctx, &[11, d], dtype, &random(1, 11 * d));
                    let ids: Vec<u32> = (0..130).map(|i| i * 7 % 11).collect();
                    let out = embedding(&ctx, &table, &ids).unwrap();
                    assert_eq!(out.f32(), reference::embedding(&values(&table), d, &ids));
                }
            }
            let table = ctx.empty(&[3, 4], DType::F32).unwrap();
            assert_eq!(embedding(&ctx, &table, &[]).unwrap().dims(), [0, 4]);
        }
    }

    #[test]
    fn an_id_beyond_the_table_is_named() {
        for ctx in [Ctx::cpu(1, 1 << 12).unwrap(), Ctx::meta()] {
            let table = ctx.empty(&[3, 4], DType::F32).unwrap();
            let error = embedding(&ctx, &table, &[0, 3]).err().unwrap().to_string();
            assert_eq!(error, "embedding: token id is 3 at position 1, expected below 3");
        }
    }
}
