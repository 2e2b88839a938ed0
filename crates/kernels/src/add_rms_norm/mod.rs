//! The residual stream takes a block's result, and the next block's norm is made while the row is at hand.
//!
//! `residual[t, i] += delta[t, i]`, then `out = rms_norm(residual)`.
//!
//! | | shape | type |
//! | --- | --- | --- |
//! | `residual` | `[T, D]`, updated | F32 |
//! | `delta` | `[T, D]` | F32 or BF16 |
//! | `weight` | `[D]` | F32 |
//! | out | `[T, D]` | F32 or BF16 |
//!
//! Flops 5 T D. Bytes: residual in and out, delta, weight and output once. The bits are those of [`add`](crate::add) followed
//! by [`rms_norm`](crate::rms_norm); what it saves is one trip of the residual through memory. The reference is that pair.

use half::bf16;
use moesaic_device::{Ctx, OpCall, Tensor};
use moesaic_spec::DType;

use crate::KernelError;
use crate::add::{add_rows, check_addends};
use crate::contract::check;
use crate::elementwise::{Element, check_activation, multi_isa};
use crate::rms_norm::normalize_row;
use crate::rows::for_rows2;

pub mod reference;

const OP: &str = "add_rms_norm";

/// `residual += delta`, and the norm of the sum.
pub fn add_rms_norm(
    ctx: &Ctx,
    residual: &mut Tensor,
    delta: &Tensor,
    weight: &Tensor,
    eps: f32,
    out_dtype: DType,
) -> Result<Tensor, KernelError> {
    let (t, d) = check_addends(OP, residual, delta)?;
    check(OP, "weight", weight, &[d], DType::F32)?;
    check_activation(OP, "out_dtype", out_dtype)?;
    let bytes = (t * d * (8 + delta.dtype().size_bytes() + out_dtype.size_bytes()) + 4 * d) as u64;
    ctx.record(|| OpCall::compute(OP, &[("T", t), ("D", d)], (5 * t * d) as u64, bytes));
    let mut out = ctx.empty(&[t, d], out_dtype)?;
    if !ctx.is_meta() {
        match (delta.dtype(), out_dtype) {
            (DType::F32, DType::F32) => run::<f32, f32>(ctx, residual, delta, weight, eps, &mut out),
            (DType::F32, _) => run::<f32, bf16>(ctx, residual, delta, weight, eps, &mut out),
            (_, DType::F32) => run::<bf16, f32>(ctx, residual, delta, weight, eps, &mut out),
            (_, _) => run::<bf16, bf16>(ctx, residual, delta, weight, eps, &mut out),
        }
    }
    Ok(out)
}

fn run<X: Element, O: Element>(
    ctx: &Ctx,
    residual: &mut Tensor,
    delta: &Tensor,
    weight: &Tensor,
    eps: f32,
    out: &mut Tensor,
) {
    let (isa, weight, delta) = (ctx.isa(), weight.f32(), X::of(delta));
    let d = weight.len();
    let row_bytes = d * (8 + size_of::<X>() + size_of::<O>());
    for_rows2(ctx, (residual.f32_mut(), d), (O::of_mut(out), d), row_bytes, |first, residual, out| {
        add_normalize::<X, O>(isa, residual, &delta[first * d..], weight, eps, out);
    });
}

multi_isa! {
    fn add_normalize<X: Element, O: Element>(
        residual: &mut [f32], delta: &[X], weight: &[f32], eps: f32, out: &mut [O],
    ) = add_normalize_rows
}

#[inline(always)]
fn add_normalize_rows<X: Element, O: Element>(
    residual: &mut [f32],
    delta: &[X],
    weight: &[f32],
    eps: f32,
    out: &mut [O],
) {
    let d = weight.len();
    let rows = residual.chunks_exact_mut(d).zip(delta.chunks_exact(d)).zip(out.chunks_exact_mut(d));
    for ((residual, delta), out) in rows {
        add_rows(residual, delta);
        normalize_row(residual, weight, eps, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ACTIVATIONS, WIDTHS, assert_same_bytes, contexts, random, relative_error, tensor, values};
    use crate::{add, rms_norm};

    #[test]
    fn the_bits_of_add_and_then_norm() {
        const T: usize = 43;
        for ctx in contexts() {
            for (d, dtype) in WIDTHS.iter().flat_map(|&d| ACTIVATIONS.map(|dtype| (d, dtype))) {
                let delta = tensor(&ctx, &[T, d], dtype, &random(2, T * d));
                let weight = tensor(&ctx, &[d], DType::F32, &random(3, d));
                let fresh = || tensor(&ctx, &[T, d], DType::F32, &random(1, T * d));
                let (mut a, mut b) = (fresh(), fresh());
                let fused = add_rms_norm(&ctx, &mut a, &delta, &weight, 1e-5, dtype).unwrap();
                add::add(&ctx, &mut b, &delta).unwrap();
                let apart = rms_norm::rms_norm(&ctx, &b, &weight, 1e-5, dtype).unwrap();
                assert_same_bytes(&a, &b, "residual");
                assert_same_bytes(&fused, &apart, "norm");
                let mut residual = random(1, T * d);
                let expected = reference::add_rms_norm(&mut residual, &values(&delta), weight.f32(), 1e-5);
                assert_eq!(a.f32(), residual);
                // The limits of the norm alone.
                let limit = if dtype == DType::F32 { 2e-6 } else { 2f64.powi(-8) };
                assert!(relative_error(&values(&fused), &expected) < limit);
            }
        }
    }
}
