//! Root-mean-square norm (Zhang & Sennrich 2019).
//!
//! `out[t, i] = x[t, i] / sqrt(mean_j(x[t, j]^2) + eps) * weight[i]`
//!
//! | | shape | type |
//! | --- | --- | --- |
//! | `x` | `[T, D]`, or D columns of a wider matrix | F32 or BF16 |
//! | `weight` | `[D]` | F32 |
//! | out | `[T, D]` | F32 or BF16 |
//!
//! Flops 4 T D. Bytes: input, weight and output once. The sum of squares is in F32, in 16 partial sums and a fixed tree, so
//! all paths give the same bits; the only rounding to the output's type is the last step.

use half::bf16;
use moesaic_device::{Ctx, OpCall, Tensor};
use moesaic_spec::DType;

use crate::contract::check;
use crate::elementwise::{Element, check_activation, multi_isa, sum_by};
use crate::rows::for_rows;
use crate::{Cols, KernelError};

pub mod reference;

const OP: &str = "rms_norm";

/// Normalises the rows of `x` `[T, D]`.
pub fn rms_norm(ctx: &Ctx, x: &Tensor, weight: &Tensor, eps: f32, out_dtype: DType) -> Result<Tensor, KernelError> {
    rms_norm_cols(ctx, Cols::all(x), weight, eps, out_dtype)
}

/// Normalises a range of columns of each row: `[T, x.len]`.
pub fn rms_norm_cols(
    ctx: &Ctx,
    x: Cols<'_>,
    weight: &Tensor,
    eps: f32,
    out_dtype: DType,
) -> Result<Tensor, KernelError> {
    let (t, _) = x.check(OP, "x")?;
    let d = x.len;
    check_activation(OP, "x", x.tensor.dtype())?;
    check_activation(OP, "out_dtype", out_dtype)?;
    check(OP, "weight", weight, &[d], DType::F32)?;
    let row_bytes = d * (x.tensor.dtype().size_bytes() + out_dtype.size_bytes());
    let bytes = (t * row_bytes + 4 * d) as u64;
    ctx.record(|| OpCall::compute(OP, &[("T", t), ("D", d)], (4 * t * d) as u64, bytes));
    let mut out = ctx.empty(&[t, d], out_dtype)?;
    if !ctx.is_meta() {
        match (x.tensor.dtype(), out_dtype) {
            (DType::F32, DType::F32) => run::<f32, f32>(ctx, x, weight, eps, &mut out),
            (DType::F32, _) => run::<f32, bf16>(ctx, x, weight, eps, &mut out),
            (_, DType::F32) => run::<bf16, f32>(ctx, x, weight, eps, &mut out),
            (_, _) => run::<bf16, bf16>(ctx, x, weight, eps, &mut out),
        }
    }
    Ok(out)
}

fn run<X: Element, O: Element>(ctx: &Ctx, x: Cols<'_>, weight: &Tensor, eps: f32, out: &mut Tensor) {
    let (isa, weight, width) = (ctx.isa(), weight.f32(), x.tensor.dims2().1);
    let input = X::of(x.tensor);
    let row_bytes = x.len * (size_of::<X>() + size_of::<O>());
    for_rows(ctx, O::of_mut(out), x.len, row_bytes, |first, out| {
        normalize::<X, O>(isa, &input[first * width..], (width, x.start), weight, eps, out);
    });
}

multi_isa! {
    fn normalize<X: Element, O: Element>(
        x: &[X], width_start: (usize, usize), weight: &[f32], eps: f32, out: &mut [O],
    ) = normalize_rows
}

#[inline(always)]
fn normalize_rows<X: Element, O: Element>(
    x: &[X],
    (width, start): (usize, usize),
    weight: &[f32],
    eps: f32,
    out: &mut [O],
) {
    let d = weight.len();
    for (row, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(d)) {
        normalize_row(&row[start..start + d], weight, eps, out);
    }
}

/// One row; [`add_rms_norm`](crate::add_rms_norm) ends in it too.
#[inline(always)]
pub(crate) fn normalize_row<X: Element, O: Element>(x: &[X], weight: &[f32], eps: f32, out: &mut [O]) {
    let mean = sum_by(x, |x| x * x) / x.len() as f32;
    let scale = 1.0 / (mean + eps).sqrt();
    for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
        *out = O::from_f32(x.to_f32() * scale * w);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ACTIVATIONS, WIDTHS, assert_same_bytes, contexts, random, relative_error, tensor, values};

    /// F32: a sum of 1000 squares in 16 lanes is off by some 1e-6 at most. BF16: half a unit of 8 bits.
    fn limit(dtype: DType) -> f64 {
        if dtype == DType::F32 { 2e-6 } else { 2f64.powi(-8) }
    }

    #[test]
    fn near_the_reference_and_the_same_on_every_path() {
        const T: usize = 67;
        let contexts = contexts();
        for (d, x_dtype, out_dtype) in
            WIDTHS.iter().flat_map(|&d| ACTIVATIONS.iter().flat_map(move |&x| ACTIVATIONS.map(|out| (d, x, out))))
        {
            let mut first: Option<Tensor> = None;
            for ctx in &contexts {
                let x = tensor(ctx, &[T, d], x_dtype, &random(1, T * d));
                let weight = tensor(ctx, &[d], DType::F32, &random(2, d));
                let out = rms_norm(ctx, &x, &weight, 1e-5, out_dtype).unwrap();
                let expected = reference::rms_norm(&values(&x), weight.f32(), 1e-5);
                let error = relative_error(&values(&out), &expected);
                assert!(error < limit(out_dtype), "{d} {x_dtype} {out_dtype}: {error:e}");
                match &first {
                    Some(first) => assert_same_bytes(&out, first, &format!("rms_norm on {}", ctx.isa())),
                    None => first = Some(out),
                }
            }
        }
    }

    #[test]
    fn columns_of_a_wider_matrix_are_like_a_copy_of_them() {
        for ctx in contexts() {
            for (width, start, len) in [(9, 2, 7), (130, 30, 100), (1064, 64, 1000), (5, 4, 1)] {
                let data = random(3, 50 * width);
                let wide = tensor(&ctx, &[50, width], DType::BF16, &data);
                let cut: Vec<f32> = data.chunks(width).flat_map(|row| row[start..start + len].to_vec()).collect();
                let cut = tensor(&ctx, &[50, len], DType::BF16, &cut);
                let weight = tensor(&ctx, &[len], DType::F32, &random(4, len));
                let a = rms_norm_cols(&ctx, Cols { tensor: &wide, start, len }, &weight, 1e-6, DType::F32).unwrap();
                let b = rms_norm(&ctx, &cut, &weight, 1e-6, DType::F32).unwrap();
                assert_same_bytes(&a, &b, "columns");
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_others() {
        for ctx in contexts() {
            let data = random(5, 300 * 100);
            let weight = tensor(&ctx, &[100], DType::F32, &random(6, 100));
            let all = tensor(&ctx, &[300, 100], DType::F32, &data);
            let all = rms_norm(&ctx, &all, &weight, 1e-6, DType::BF16).unwrap();
            let one = tensor(&ctx, &[1, 100], DType::F32, &data[17 * 100..18 * 100]);
            let one = rms_norm(&ctx, &one, &weight, 1e-6, DType::BF16).unwrap();
            assert_eq!(one.bf16(), &all.bf16()[17 * 100..18 * 100]);
        }
    }

    #[test]
    fn wrong_arguments_are_named() {
        let ctx = Ctx::meta();
        let x = ctx.empty(&[2, 8], DType::F32).unwrap();
        let weight = ctx.empty(&[7], DType::F32).unwrap();
        let error = rms_norm(&ctx, &x, &weight, 1e-6, DType::F32).err().unwrap().to_string();
        assert_eq!(error, "rms_norm: weight is F32 [7], expected F32 [8]");
        let cols = Cols { tensor: &x, start: 4, len: 7 };
        let error = rms_norm_cols(&ctx, cols, &weight, 1e-6, DType::F32).err().unwrap().to_string();
        assert_eq!(error, "rms_norm: x is columns 4 to 11, expected at least one column, and all inside a width of 8");
        assert!(rms_norm_cols(&ctx, Cols { len: 0, ..cols }, &weight, 1e-6, DType::F32).is_err());
        assert!(ctx.take_log().is_empty(), "a refused call is not recorded");
    }
}
