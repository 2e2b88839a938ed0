//! `y [T, N] = x [T, K] · W [N, K]ᵀ (+ bias [N])`.
//!
//! x is in the compute type of the weights (F32 for F32, BF16 for BF16 and F8 E4M3), the bias F32, y F32 or BF16; BF16
//! results are rounded once, after the bias. The order of the sums is that of [`matrix`](crate::matrix).

pub mod reference;
#[cfg(test)]
mod tests;

use moesaic_device::{Ctx, OpCall, Tensor};
use moesaic_spec::DType;

use crate::KernelError;
use crate::cols::Cols;
use crate::contract::{check, require};
use crate::matrix::PackedMatrix;
use crate::matrix::product::{self, Columns, Job, Operand, Out};

const OP: &str = "linear";

/// `x Wᵀ`, as `out_dtype`.
pub fn linear<'a>(
    ctx: &Ctx,
    x: impl Into<Cols<'a>>,
    w: &PackedMatrix,
    out_dtype: DType,
) -> Result<Tensor, KernelError> {
    linear_bias(ctx, x, w, None, out_dtype)
}

/// `x Wᵀ + bias`, as `out_dtype`.
pub fn linear_bias<'a>(
    ctx: &Ctx,
    x: impl Into<Cols<'a>>,
    w: &PackedMatrix,
    bias: Option<&Tensor>,
    out_dtype: DType,
) -> Result<Tensor, KernelError> {
    let x: Cols = x.into();
    let (t, n, k) = (x.rows(), w.n(), w.k());
    check_x(OP, &x, w)?;
    require(x.len == k, OP, "columns of x", || k.to_string(), || x.len.to_string())?;
    check_out(OP, out_dtype)?;
    if let Some(bias) = bias {
        check(OP, "bias", bias, &[n], DType::F32)?;
    }
    ctx.record(|| {
        let bytes = w.size_bytes().0 as usize
            + t * (k * x.tensor.dtype().size_bytes() + n * out_dtype.size_bytes())
            + bias.map_or(0, Tensor::size_bytes);
        OpCall::compute(OP, &[("T", t), ("N", n), ("K", k)], 2 * (t * n) as u64 * k as u64, bytes as u64)
    });
    let mut y = ctx.empty(&[t, n], out_dtype)?;
    let copy = product::padded_copy(ctx, x, 1, 0, k)?;
    if ctx.is_meta() || t == 0 {
        return Ok(y);
    }
    let operand = match &copy {
        Some(copy) => Operand::new(copy, 0, copy.dims2().1, t),
        None => Operand::new(x.tensor, x.start, x.width(), t),
    };
    let out = Out::new(&mut y);
    let bias = bias.map(Tensor::f32);
    product::run(ctx, &[Job { x: operand, w }], &|done| {
        // SAFETY: one job.
        unsafe { product::store(&done, &out, Columns { stride: n, first: 0, num: n }, bias) };
    });
    Ok(y)
}

/// x must be in the compute type of the weights.
pub(crate) fn check_x(op: &'static str, x: &Cols, w: &PackedMatrix) -> Result<(), KernelError> {
    let expected = w.dtype().compute();
    let got = x.tensor.dtype();
    require(got == expected, op, "type of x", || format!("{expected} for {} weights", w.dtype()), || got.to_string())
}

/// Results are F32 or BF16.
pub(crate) fn check_out(op: &'static str, dtype: DType) -> Result<(), KernelError> {
    let ok = matches!(dtype, DType::F32 | DType::BF16);
    require(ok, op, "type of the result", || "F32 or BF16".into(), || dtype.to_string())
}
