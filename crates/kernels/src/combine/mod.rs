//! The experts' answers come back to their tokens.
//!
//! `out[t, :] = base[t, :] + Σ_a topk_weights[t, a] * y[row_of[t, a], :]`, over the slots that were not dropped. `y` is all
//! answers one below the other; they are read where they are, this rank's own and each message's.
//!
//! | | shape | type |
//! | --- | --- | --- |
//! | `ys`, together `y` | `[r, D]` each, `[R, D]` | F32 or BF16 |
//! | `row_of` | `[T, A]`, -1 where dropped | I32 |
//! | `topk_weights` | `[T, A]` | F32 |
//! | `base` (the shared expert's answer) | `[T, D]` | that of `y` |
//! | out | `[T, D]` | that of `y` |
//!
//! Flops 2 R D (+ T D with a base), R at most T A. Bytes: everything once. The sum is in F32, base first and then slot by slot, whatever
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
    ys: &[&Tensor],
    row_of: &Tensor,
    topk_weights: &Tensor,
    base: Option<&Tensor>,
) -> Result<Tensor, KernelError> {
    let (r, d, dtype) = check_answers(ys)?;
    let rank2 = row_of.dims().len() == 2 && row_of.dims()[1] > 0;
    require(rank2, OP, "row_of", || "[T, A]".into(), || format!("{:?}", row_of.dims()))?;
    let (t, a) = row_of.dims2();
    check(OP, "row_of", row_of, &[t, a], DType::I32)?;
    check(OP, "topk_weights", topk_weights, &[t, a], DType::F32)?;
    if let Some(base) = base {
        check(OP, "base", base, &[t, d], dtype)?;
    }
    let based = usize::from(base.is_some());
    let element = dtype.size_bytes();
    ctx.record(|| {
        // On Meta each rank may have answered all pairs.
        let r = r.min(t * a);
        let flops = (2 * r * d + based * t * d) as u64;
        let bytes = (r * d * element + (1 + based) * t * d * element + 8 * t * a) as u64;
        OpCall::compute(OP, &[("T", t), ("A", a), ("D", d)], flops, bytes)
    });
    let mut out = ctx.empty(&[t, d], dtype)?;
    if !ctx.is_meta() {
        let slots = (row_of.i32(), topk_weights.f32(), a);
        match dtype {
            DType::F32 => run::<f32>(ctx, ys, slots, base, &mut out),
            _ => run::<bf16>(ctx, ys, slots, base, &mut out),
        }
    }
    Ok(out)
}

/// Rows of all answers together, their width and type.
fn check_answers(ys: &[&Tensor]) -> Result<(usize, usize, DType), KernelError> {
    require(!ys.is_empty(), OP, "answers", || "at least 1".into(), || "0".into())?;
    let (first, dtype) = (ys[0], ys[0].dtype());
    check_activation(OP, "y", dtype)?;
    let rank2 = first.dims().len() == 2 && first.dims()[1] > 0;
    require(rank2, OP, "y", || "[R, D]".into(), || format!("{:?}", first.dims()))?;
    let (_, d) = first.dims2();
    let mut r = 0;
    for y in ys {
        let rows = y.dims().first().copied().unwrap_or(0);
        check(OP, "y", y, &[rows, d], dtype)?;
        r += rows;
    }
    Ok((r, d, dtype))
}

/// Rows one below the other, in several pieces.
struct Answers<'a, X> {
    pieces: Vec<&'a [X]>,
    /// The first row of each piece.
    starts: Vec<usize>,
    d: usize,
}

impl<'a, X: Element> Answers<'a, X> {
    fn new(ys: &[&'a Tensor], d: usize) -> Answers<'a, X> {
        let ends = ys.iter().scan(0, |end, y| {
            *end += y.dims2().0;
            Some(*end)
        });
        let starts = std::iter::once(0).chain(ends).take(ys.len()).collect();
        Answers { pieces: ys.iter().map(|y| X::of(y)).collect(), starts, d }
    }

    #[inline(always)]
    fn row(&self, row: usize) -> &'a [X] {
        // Among pieces without rows the last one that starts here has it.
        let piece = if self.pieces.len() == 1 { 0 } else { self.starts.partition_point(|&start| start <= row) - 1 };
        &self.pieces[piece][(row - self.starts[piece]) * self.d..][..self.d]
    }
}

fn run<X: Element>(
    ctx: &Ctx,
    ys: &[&Tensor],
    (row_of, weights, a): (&[i32], &[f32], usize),
    base: Option<&Tensor>,
    out: &mut Tensor,
) {
    let (isa, d) = (ctx.isa(), out.dims2().1);
    let (answers, base) = (Answers::<X>::new(ys, d), base.map(X::of));
    for_rows(ctx, X::of_mut(out), d, (a + 2) * d * size_of::<X>(), |first, out| {
        let base = base.map(|base| &base[first * d..]);
        weighted_sums::<X>(isa, &answers, (&row_of[first * a..], &weights[first * a..], a), base, out);
    });
}

multi_isa! {
    fn weighted_sums<X: Element>(
        answers: &Answers<X>, slots: (&[i32], &[f32], usize), base: Option<&[X]>, out: &mut [X],
    ) = weighted_sum_rows
}

/// Columns that are summed in registers before they are rounded.
const BLOCK: usize = 64;

#[inline(always)]
fn weighted_sum_rows<X: Element>(
    answers: &Answers<X>,
    (row_of, weights, a): (&[i32], &[f32], usize),
    base: Option<&[X]>,
    out: &mut [X],
) {
    let d = answers.d;
    // A token's answers are found once, not for every block.
    let mut found: Vec<(&[X], f32)> = vec![(&[], 0.0); a];
    for (t, out) in out.chunks_exact_mut(d).enumerate() {
        let mut num_found = 0;
        for (&row, &weight) in row_of[t * a..][..a].iter().zip(&weights[t * a..][..a]) {
            if row >= 0 {
                found[num_found] = (answers.row(row as usize), weight);
                num_found += 1;
            }
        }
        let found = &found[..num_found];
        for (block, out) in out.chunks_mut(BLOCK).enumerate() {
            let start = block * BLOCK;
            let mut sums = [0f32; BLOCK];
            if let Some(base) = base {
                sums.iter_mut().zip(&base[t * d + start..][..out.len()]).for_each(|(sum, x)| *sum = x.to_f32());
            }
            for &(y, weight) in found {
                let y = &y[start..][..out.len()];
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
                    let out = combine(&ctx, &[&y], &row_of, &weights, base.as_ref()).unwrap();
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
            outs.push(values(&combine(&ctx, &[&y], &row_of, &weights, None).unwrap()));
        }
        assert!(outs.iter().all(|out| *out == outs[0]));
    }

    #[test]
    fn answers_are_read_where_they_are() {
        for ctx in contexts() {
            for (d, dtype) in WIDTHS.iter().flat_map(|&d| ACTIVATIONS.map(|dtype| (d, dtype))) {
                let (t, a) = (20, 3);
                let data = random(1, t * a * d);
                let weights = tensor(&ctx, &[t, a], DType::F32, &random(2, t * a));
                let mut row_of = ctx.empty(&[t, a], DType::I32).unwrap();
                row_of.i32_mut().copy_from_slice(&rows(t, a, t * a));
                let whole = tensor(&ctx, &[t * a, d], dtype, &data);
                let expected = values(&combine(&ctx, &[&whole], &row_of, &weights, None).unwrap());
                // Pieces without rows among them, at both ends too.
                for cuts in [&[0, 0, 7, 7, 7, 59, 60, 60][..], &[0, 60], &[0, 1, 60]] {
                    let piece =
                        |cut: &[usize]| tensor(&ctx, &[cut[1] - cut[0], d], dtype, &data[cut[0] * d..cut[1] * d]);
                    let pieces: Vec<Tensor> = cuts.windows(2).map(piece).collect();
                    let ys: Vec<&Tensor> = pieces.iter().collect();
                    let out = combine(&ctx, &ys, &row_of, &weights, None).unwrap();
                    assert_eq!(values(&out), expected, "{cuts:?} {d} {dtype}");
                }
            }
        }
    }

    #[test]
    fn on_meta_no_more_is_counted_than_there_are_pairs() {
        let ctx = Ctx::meta();
        let y = ctx.empty(&[8, 16], DType::BF16).unwrap();
        let (row_of, weights) = (ctx.empty(&[4, 2], DType::I32).unwrap(), ctx.empty(&[4, 2], DType::F32).unwrap());
        combine(&ctx, &[&y], &row_of, &weights, None).unwrap();
        combine(&ctx, &[&y, &y, &y], &row_of, &weights, None).unwrap();
        let calls = ctx.take_log();
        assert_eq!(calls[0], calls[1]);
        assert_eq!(calls[0].flops.bound, 2 * 8 * 16);
    }

    #[test]
    fn wrong_arguments_are_named() {
        let ctx = Ctx::meta();
        let y = ctx.empty(&[8, 16], DType::BF16).unwrap();
        let row_of = ctx.empty(&[4, 2], DType::I32).unwrap();
        let weights = ctx.empty(&[4, 2], DType::F32).unwrap();
        let base = ctx.empty(&[4, 16], DType::F32).unwrap();
        let error = combine(&ctx, &[&y], &row_of, &weights, Some(&base)).err().unwrap().to_string();
        assert_eq!(error, "combine: base is F32 [4, 16], expected BF16 [4, 16]");
        let error = combine(&ctx, &[&y], &row_of, &base, None).err().unwrap().to_string();
        assert_eq!(error, "combine: topk_weights is F32 [4, 16], expected F32 [4, 2]");
        let error = combine(&ctx, &[&y, &base], &row_of, &weights, None).err().unwrap().to_string();
        assert_eq!(error, "combine: y is F32 [4, 16], expected BF16 [4, 16]");
        let error = combine(&ctx, &[], &row_of, &weights, None).err().unwrap().to_string();
        assert_eq!(error, "combine: answers is 0, expected at least 1");
    }
}
