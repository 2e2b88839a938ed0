//! The residual stream takes a block's result.
//!
//! `residual[t, i] += delta[t, i]`, in F32.
//!
//! | | shape | type |
//! | --- | --- | --- |
//! | `residual` | `[T, D]`, updated | F32 |
//! | `delta` | `[T, D]` | F32 or BF16 |
//!
//! Flops T D. Bytes: both in, one out. Exact on every path.

use half::bf16;
use moesaic_device::{Ctx, OpCall, Tensor};
use moesaic_spec::DType;

use crate::KernelError;
use crate::contract::{check, require};
use crate::elementwise::{Element, check_activation, multi_isa};
use crate::rows::for_rows;

pub mod reference;

const OP: &str = "add";

/// `residual += delta`.
pub fn add(ctx: &Ctx, residual: &mut Tensor, delta: &Tensor) -> Result<(), KernelError> {
    let (t, d) = check_addends(OP, residual, delta)?;
    let row_bytes = d * (8 + delta.dtype().size_bytes());
    ctx.record(|| OpCall::compute(OP, &[("T", t), ("D", d)], (t * d) as u64, (t * row_bytes) as u64));
    if !ctx.is_meta() {
        let isa = ctx.isa();
        for_rows(ctx, residual.f32_mut(), d, row_bytes, |first, residual| match delta.dtype() {
            DType::F32 => add_to::<f32>(isa, residual, &delta.f32()[first * d..]),
            _ => add_to::<bf16>(isa, residual, &delta.bf16()[first * d..]),
        });
    }
    Ok(())
}

/// Checks the two matrices; their dims.
pub(crate) fn check_addends(
    op: &'static str,
    residual: &Tensor,
    delta: &Tensor,
) -> Result<(usize, usize), KernelError> {
    check_activation(op, "delta", delta.dtype())?;
    let rank2 = delta.dims().len() == 2 && delta.dims()[1] > 0;
    require(rank2, op, "delta", || "[T, D]".into(), || format!("{:?}", delta.dims()))?;
    check(op, "residual", residual, delta.dims(), DType::F32)?;
    Ok(delta.dims2())
}

multi_isa! {
    fn add_to<X: Element>(residual: &mut [f32], delta: &[X]) = add_rows
}

/// As many elements as `residual` has.
#[inline(always)]
pub(crate) fn add_rows<X: Element>(residual: &mut [f32], delta: &[X]) {
    for (residual, delta) in residual.iter_mut().zip(delta) {
        *residual += delta.to_f32();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ACTIVATIONS, WIDTHS, contexts, random, tensor, values};

    #[test]
    fn sums_are_exact() {
        for ctx in contexts() {
            for d in WIDTHS {
                for dtype in ACTIVATIONS {
                    let mut residual = tensor(&ctx, &[41, d], DType::F32, &random(1, 41 * d));
                    let delta = tensor(&ctx, &[41, d], dtype, &random(2, 41 * d));
                    let mut expected = residual.f32().to_vec();
                    reference::add(&mut expected, &values(&delta));
                    add(&ctx, &mut residual, &delta).unwrap();
                    assert_eq!(residual.f32(), expected);
                }
            }
        }
    }

    #[test]
    fn sizes_must_agree() {
        let ctx = Ctx::meta();
        let mut residual = ctx.empty(&[2, 8], DType::F32).unwrap();
        let delta = ctx.empty(&[2, 7], DType::BF16).unwrap();
        let error = add(&ctx, &mut residual, &delta).unwrap_err().to_string();
        assert_eq!(error, "add: residual is F32 [2, 8], expected F32 [2, 7]");
    }
}
