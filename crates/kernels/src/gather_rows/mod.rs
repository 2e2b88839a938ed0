//! Some rows of a matrix: those whose logits are wanted.
//!
//! `out[i, :] = x[rows[i], :]`
//!
//! | | shape | type |
//! | --- | --- | --- |
//! | `x` | `[T, D]` | any |
//! | `rows` | `[S]`, each below T | usize |
//! | out | `[S, D]` | that of `x` |
//!
//! Flops 0. Bytes: S rows in and out. Exact.

use moesaic_device::{Ctx, OpCall, Tensor};

use crate::KernelError;
use crate::contract::require;
use crate::rows::copy_rows;

pub mod reference;

const OP: &str = "gather_rows";

/// The rows `rows` of `x`.
pub fn gather_rows(ctx: &Ctx, x: &Tensor, rows: &[usize]) -> Result<Tensor, KernelError> {
    let rank2 = x.dims().len() == 2 && x.dims()[1] > 0;
    require(rank2, OP, "x", || "[T, D]".into(), || format!("{:?}", x.dims()))?;
    let (t, d) = x.dims2();
    if let Some(&row) = rows.iter().find(|&&row| row >= t) {
        return Err(KernelError::Contract {
            op: OP,
            what: "row",
            expected: format!("below {t}"),
            got: row.to_string(),
        });
    }
    let row_bytes = d * x.dtype().size_bytes();
    let s = rows.len();
    ctx.record(|| OpCall::compute(OP, &[("S", s), ("D", d)], 0, (2 * s * row_bytes) as u64));
    let mut out = ctx.empty(&[s, d], x.dtype())?;
    if !ctx.is_meta() {
        copy_rows(ctx, x.bytes(), out.bytes_mut(), row_bytes, |i| rows[i]);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ACTIVATIONS, WIDTHS, contexts, random, tensor, values};

    #[test]
    fn rows_are_those_asked_for() {
        for ctx in contexts() {
            for (d, dtype) in WIDTHS.iter().flat_map(|&d| ACTIVATIONS.map(|dtype| (d, dtype))) {
                let x = tensor(&ctx, &[60, d], dtype, &random(1, 60 * d));
                for rows in [vec![], vec![59], (0..60).rev().chain([3, 3]).collect()] {
                    let out = gather_rows(&ctx, &x, &rows).unwrap();
                    assert_eq!(out.dims(), [rows.len(), d]);
                    assert_eq!(values(&out), reference::gather_rows(&values(&x), d, &rows));
                }
            }
        }
    }

    #[test]
    fn a_row_beyond_the_matrix_is_named() {
        let ctx = Ctx::meta();
        let x = ctx.empty(&[4, 8], moesaic_spec::DType::BF16).unwrap();
        let error = gather_rows(&ctx, &x, &[1, 4]).err().unwrap().to_string();
        assert_eq!(error, "gather_rows: row is 4, expected below 4");
    }
}
