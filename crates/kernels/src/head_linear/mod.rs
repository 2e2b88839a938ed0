//! A linear of its own for every head: `y [T, H * N]`, where `y[t, h] = x[t, h] · W[h] [N, K]ᵀ`.
//!
//! Multi-head latent attention absorbs its up-projections into the queries and the outputs this way. Head `h` of x begins
//! at column `x.start + h * stride` and has `K` columns. Types as for [`linear`](crate::linear).

pub mod reference;
#[cfg(test)]
mod tests;

use moesaic_device::{Ctx, OpCall, Tensor};
use moesaic_spec::DType;

use crate::KernelError;
use crate::cols::Cols;
use crate::contract::require;
use crate::linear::{check_out, check_x};
use crate::matrix::PackedMatrix;
use crate::matrix::product::{self, Columns, Job, Operand, Out, padded};

const OP: &str = "head_linear";

/// `w` has one matrix a head, all of one shape and type; `head_stride` is the distance of heads in x's columns.
pub fn head_linear<'a>(
    ctx: &Ctx,
    x: impl Into<Cols<'a>>,
    head_stride: usize,
    w: &[PackedMatrix],
    out_dtype: DType,
) -> Result<Tensor, KernelError> {
    let x: Cols = x.into();
    require(!w.is_empty(), OP, "heads", || "at least 1".into(), || "0".into())?;
    let (t, h, n, k, dtype) = (x.rows(), w.len(), w[0].n(), w[0].k(), w[0].dtype());
    check_x(OP, &x, &w[0])?;
    check_out(OP, out_dtype)?;
    for w in w {
        let same = (w.n(), w.k(), w.dtype()) == (n, k, dtype);
        let got = || format!("{} [{}, {}]", w.dtype(), w.n(), w.k());
        require(same, OP, "weights of a head", || format!("{dtype} [{n}, {k}]"), got)?;
    }
    let end = (h - 1) * head_stride + k;
    require(end <= x.len, OP, "columns of x", || format!("at least {end}"), || x.len.to_string())?;
    ctx.record(|| {
        let weights: u64 = w.iter().map(|w| w.size_bytes().0).sum();
        let rows = t * h * (k * x.tensor.dtype().size_bytes() + n * out_dtype.size_bytes());
        let flops = 2 * (t * h) as u64 * (n * k) as u64;
        OpCall::compute(OP, &[("T", t), ("H", h), ("N", n), ("K", k)], flops, weights + rows as u64)
    });
    let mut y = ctx.empty(&[t, h * n], out_dtype)?;
    let copy = product::padded_copy(ctx, x, h, head_stride, k)?;
    if ctx.is_meta() || t == 0 {
        return Ok(y);
    }
    let jobs: Vec<Job> = (w.iter().enumerate())
        .map(|(head, w)| {
            let x = match &copy {
                Some(copy) => Operand::new(copy, head * padded(k, dtype), copy.dims2().1, t),
                None => Operand::new(x.tensor, x.start + head * head_stride, x.width(), t),
            };
            Job { x, w }
        })
        .collect();
    let out = Out::new(&mut y);
    product::run(ctx, &jobs, &|done| {
        // SAFETY: each head has columns of its own.
        unsafe { product::store(&done, &out, Columns { stride: h * n, first: done.job * n, num: n }, None) };
    });
    Ok(y)
}
