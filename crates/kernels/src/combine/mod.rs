//! The experts' answers come back to their tokens.
//!
//! `out[t, :] = base[t, :] + Σ_a topk_weights[t, a] * y[row_of[t, a], :]`, over the slots that were not dropped.
//!
//! | | shape | type |
//! | --- | --- | --- |
//! | `y` | `[R, D]` | F32 or BF16 |
//! | `row_of` | `[T, A]`, -1 where dropped | I32 |
//! | `topk_weights` | `[T, A]` | F32 |
//! | `base` (the shared expert's answer) | `[T, D]` | that of `y` |
//! | out | `[T, D]` | that of `y` |
//!
//! Flops 2 R D (+ T D with a base). Bytes: everything once. The sum is in F32, base first and then slot by slot, whatever
//! rows the answers lie in, and is rounded once: the bits do not depend on where experts live.

use half::bf16;
use moesaic_device::{Ctx, OpCall, Tensor};
use moesaic_spec::DType;

use crate::KernelError;
use crate::contract::{check, require};
use crate::elementwise::{Element, check_activation, multi_isa};
use crate::rows::for_rows;

pub mod reference;

const OP: &str = "combine";

/// The weighted sum of each token's answers, `[T, D]`.
pub fn combine(
    ctx: &Ctx,
    y: &Tensor,
    row_of: &Tensor,
    topk_weights: &Tensor,
    base: Option<&Tensor>,
) -> Result<Tensor, KernelError> {
    check_activation(OP, "y", y.dtype())?;
    let rank2 = y.dims().len() == 2 && y.dims()[1] > 0;
    require(rank2, OP, "y", || "[R, D]".into(), || format!("{:?}", y.dims()))?;
    let (r, d) = y.dims2();
    let rank2 = row_of.dims().len() == 2 && row_of.dims()[1] > 0;
    require(rank2, OP, "row_of", || "[T, A]".into(), || format!("{:?}", row_of.dims()))?;
    let (t, a) = row_of.dims2();
    check(OP, "row_of", row_of, &[t, a], DType::I32)?;
    check(OP, "topk_weights", topk_weights, &[t, a], DType::F32)?;
    if let Some(base) = base {
        check(OP, "base", base, &[t, d], y.dtype())?;
    }
    let based = usize::from(base.is_some());
    let element = y.dtype().size_bytes();
    ctx.record(|| {
        let flops = (2 * r * d + based * t * d) as u64;
        let bytes = (r * d * element + (1 + based) * t * d * element + 8 * t * a) as u64;
        OpCall::compute(OP, &[("T", t), ("A", a), ("D", d)], flops, bytes)
    });
    let mut out = ctx.empty(&[t, d], y.dtype())?;
    if !ctx.is_meta() {
        match y.dtype() {
            DType::F32 => run::<f32>(ctx, y, (row_of.i32(), topk_weights.f32(), a), base, &mut out),
            _ => run::<bf16>(ctx, y, (row_of.i32(), topk_weights.f32(), a), base, &mut out),
        }
    }
    Ok(out)
}

fn run<X: Element>(
    ctx: &Ctx,
    y: &Tensor,
    (row_of, weights, a): (&[i32], &[f32], usize),
    base: Option<&Tensor>,
    out: &mut Tensor,
) {
    let (isa, d) = (ctx.isa(), y.dims2().1);
    let (y, base) = (X::of(y), base.map(X::of));
    for_rows(ctx, X::of_mut(out), d, (a + 2) * d * size_of::<X>(), |first, out| {
        let base = base.map(|base| &base[first * d..]);
        weighted_sums::<X>(isa, y, (&row_of[first * a..], &weights[first * a..], a), base, d, out);
    });
}

multi_isa! {
    fn weighted_sums<X: Element>(
        y: &[X], slots: (&[i32], &[f32], usize), base: Option<&[X]>, d: usize, out: &mut [X],
    ) = weighted_sum_rows
}

/// Columns that are summed in registers before they are rounded.
const BLOCK: usize = 64;

#[inline(always)]
fn weighted_sum_rows<X: Element>(
    y: &[X],
    (row_of, weights, a): (&[i32], &[f32], usize),
    base: Option<&[X]>,
    d: usize,
    out: &mut [X],
) {
    for (t, out) in out.chunks_exact_mut(d).enumerate() {
        let slots = row_of[t * a..][..a].iter().zip(&weights[t * a..][..a]);
        for (block, out) in out.chunks_mut(BLOCK).enumerate() {
            let start = block * BLOCK;
            let mut sums = [0f32; BLOCK];
            if let Some(base) = base {
                sums.iter_mut().zip(&base[t * d + start..][..out.len()]).for_each(|(sum, x)| *sum = x.to_f32());
            }
            for (&row, &weight) in slots.clone().filter(|&(&row, _)| row >= 0) {
                let y = &y[row as usize * d + start..][..out.len()];
                sums.iter_mut().zip(y).for_each(|(sum, y)| *sum += weight * y.to_f32());
            }
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = X::from_f32(sum));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ACTIVATIONS, WIDTHS, contexts, random, tensor, values};

    /// Rows in an order of their own, every seventh pair dropped.
    fn rows(t: usize, a: usize, r: usize) -> Vec<i32> {
        (0..t * a).map(|pair| if pair % 7 == 3 { -1 } else { (pair * 31 % r) as i32 }).collect()
    }

    #[test]
    fn the_bits_of_the_reference_on_every_path() {
        for ctx in contexts() {
            for (d, dtype) in WIDTHS.iter().flat_map(|&d| ACTIVATIONS.map(|dtype| (d, dtype))) {
                for (t, a, based) in [(1, 1, false), (40, 3, true), (40, 8, false)] {
                    let r = t * a;
                    let y = tensor(&ctx, &[r, d], dtype, &random(1, r * d));
                    let weights = tensor(&ctx, &[t, a], DType::F32, &random(2, t * a));
                    let mut row_of = ctx.empty(&[t, a], DType::I32).unwrap();
                    row_of.i32_mut().copy_from_slice(&rows(t, a, r));
                    let base = based.then(|| tensor(&ctx, &[t, d], dtype, &random(3, t * d)));
                    let out = combine(&ctx, &y, &row_of, &weights, base.as_ref()).unwrap();
                    let base = base.as_ref().map(values);
                    let sums = reference::combine(&values(&y), d, row_of.i32(), weights.f32(), a, base.as_deref());
                    assert_eq!(values(&out), values(&tensor(&ctx, &[t, d], dtype, &sums)), "{d} {dtype} {t} {a}");
                }
            }
        }
    }

    #[test]
    fn the_bits_do_not_depend_on_where_answers_lie() {
        let ctx = Ctx::cpu(1, 1 << 16).unwrap();
        let (t, a, d) = (6, 4, 33);
        let data = random(1, t * a * d);
        let weights = tensor(&ctx, &[t, a], DType::F32, &random(2, t * a));
        let mut outs = Vec::new();
        for stride in [1, 5, 7, 23] {
            let mut y = ctx.empty(&[t * a, d], DType::F32).unwrap();
            let mut row_of = ctx.empty(&[t, a], DType::I32).unwrap();
            for pair in 0..t * a {
                let row = pair * stride % (t * a);
                row_of.i32_mut()[pair] = row as i32;
                y.f32_mut()[row * d..][..d].copy_from_slice(&data[pair * d..][..d]);
            }
            outs.push(values(&combine(&ctx, &y, &row_of, &weights, None).unwrap()));
        }
        assert!(outs.iter().all(|out| *out == outs[0]));
    }

    #[test]
    fn wrong_arguments_are_named() {
        let ctx = Ctx::meta();
        let y = ctx.empty(&[8, 16], DType::BF16).unwrap();
        let row_of = ctx.empty(&[4, 2], DType::I32).unwrap();
        let weights = ctx.empty(&[4, 2], DType::F32).unwrap();
        let base = ctx.empty(&[4, 16], DType::F32).unwrap();
        let error = combine(&ctx, &y, &row_of, &weights, Some(&base)).err().unwrap().to_string();
        assert_eq!(error, "combine: base is F32 [4, 16], expected BF16 [4, 16]");
        let error = combine(&ctx, &y, &row_of, &base, None).err().unwrap().to_string();
        assert_eq!(error, "combine: topk_weights is F32 [4, 16], expected F32 [4, 2]");
    }
}
