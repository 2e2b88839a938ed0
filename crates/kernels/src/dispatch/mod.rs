//! Tokens are copied to their experts: the rows of one expert lie together, so each expert is one matrix product.
//!
//! For each pair (token t, slot a) that is kept, `out[row_of[t, a], :] = x[t, :]`; rows are sorted by expert, then by token.
//! Rows of expert e are `offsets[e] .. offsets[e + 1]`.
//!
//! | | shape | type |
//! | --- | --- | --- |
//! | `x` | `[T, D]` | any |
//! | `routing` | `[T, A]` | I32, F32 |
//! | out `x` | `[R, D]` | that of `x` |
//! | `row_of` | `[T, A]`, -1 where dropped | I32 |
//!
//! **Capacity.** Of a sequence's n tokens in this step, at most `ceil(factor * A * n / E)` go to one expert. Under
//! [`DropPolicy::Probs`] the lowest weights lose their place first (among equals the later token), under
//! [`DropPolicy::Position`] the latest tokens. A sequence is limited by its own tokens only, so the result does not depend
//! on what else is in the step. Without a capacity R = T A.
//!
//! Flops 0. Bytes: routing in, R rows in and out, `row_of` out. On `Meta` nothing is dropped, which is the bound. Exact.

use std::ops::Range;

use moesaic_device::{Ctx, OpCall, Tensor};
use moesaic_spec::{Capacity, DType, DropPolicy};

use crate::KernelError;
use crate::contract::{check, require};
use crate::router::Routing;
use crate::rows::copy_rows;

pub mod reference;

const OP: &str = "dispatch";

/// Tokens sorted by expert.
pub struct Dispatched {
    /// `[R, D]`.
    pub x: Tensor,
    /// Where each expert's rows start, and the end: E + 1 numbers. Empty on `Meta`.
    pub offsets: Vec<usize>,
    /// The row in `x` of each pair, or -1: I32 `[T, A]`.
    pub row_of: Tensor,
    /// Pairs that lost their place.
    pub dropped: usize,
}

impl Dispatched {
    /// Whether only shapes are known (R is then its bound, T A).
    pub fn is_meta(&self) -> bool {
        self.x.is_meta()
    }
}

/// Sorts the rows of `x` by expert. `capacity` comes with the rows of each sequence, which must tile `0..T` in order.
pub fn dispatch(
    ctx: &Ctx,
    x: &Tensor,
    routing: &Routing,
    num_experts: usize,
    capacity: Option<(&Capacity, &[Range<usize>])>,
) -> Result<Dispatched, KernelError> {
    let rank2 = x.dims().len() == 2 && x.dims()[1] > 0;
    require(rank2, OP, "x", || "[T, D]".into(), || format!("{:?}", x.dims()))?;
    let (t, d) = x.dims2();
    let a = routing.topk_idx.dims().last().copied().unwrap_or(0);
    require(a > 0, OP, "topk_idx", || "[T, A]".into(), || format!("{:?}", routing.topk_idx.dims()))?;
    check(OP, "topk_idx", &routing.topk_idx, &[t, a], DType::I32)?;
    check(OP, "topk_weights", &routing.topk_weights, &[t, a], DType::F32)?;
    require(num_experts > 0, OP, "num_experts", || "at least 1".into(), || num_experts.to_string())?;
    if let Some((capacity, seqs)) = capacity {
        check_capacity(capacity, seqs, t)?;
    }
    let mut row_of = ctx.empty(&[t, a], DType::I32)?;
    let (offsets, tokens) = if ctx.is_meta() {
        (Vec::new(), Vec::new())
    } else {
        row_of.i32_mut().copy_from_slice(routing.topk_idx.i32());
        if let Some((capacity, seqs)) = capacity {
            let weights = routing.topk_weights.f32();
            seqs.iter().for_each(|seq| drop_overflow(capacity, seq, num_experts, (row_of.i32_mut(), weights, a)));
        }
        sort_by_expert(row_of.i32_mut(), num_experts, a)
    };
    let r = if ctx.is_meta() { t * a } else { tokens.len() };
    let row_bytes = d * x.dtype().size_bytes();
    let dims = [("T", t), ("A", a), ("E", num_experts), ("D", d)];
    ctx.record(|| OpCall::compute(OP, &dims, 0, (2 * r * row_bytes + 12 * t * a) as u64));
    let mut sorted = ctx.empty(&[r, d], x.dtype())?;
    if !ctx.is_meta() {
        copy_rows(ctx, x.bytes(), sorted.bytes_mut(), row_bytes, |row| tokens[row] as usize);
    }
    Ok(Dispatched { x: sorted, offsets, row_of, dropped: t * a - r })
}

fn check_capacity(capacity: &Capacity, seqs: &[Range<usize>], t: usize) -> Result<(), KernelError> {
    let factor = capacity.factor;
    let ok = factor.is_finite() && factor > 0.0;
    require(ok, OP, "capacity factor", || "a number above 0".into(), || factor.to_string())?;
    let mut end = 0;
    let tiled = seqs.iter().all(|seq| seq.start == std::mem::replace(&mut end, seq.end) && seq.start <= seq.end);
    require(
        tiled && end == t,
        OP,
        "seqs",
        || format!("ranges that follow each other from 0 to {t}"),
        || format!("{seqs:?}"),
    )
}

/// How many of a sequence's `n` tokens may go to one expert.
pub(crate) fn places(factor: f32, a: usize, n: usize, e: usize) -> usize {
    (f64::from(factor) * (a * n) as f64 / e as f64).ceil() as usize
}

/// Marks with -1 the pairs of one sequence that find their expert full. `expert_of` and `weights` are `[T, A]`.
fn drop_overflow(
    capacity: &Capacity,
    seq: &Range<usize>,
    num_experts: usize,
    (expert_of, weights, a): (&mut [i32], &[f32], usize),
) {
    let places = places(capacity.factor, a, seq.len(), num_experts);
    let mut takers: Vec<Vec<usize>> = vec![Vec::new(); num_experts];
    for pair in seq.start * a..seq.end * a {
        takers[expert_idx(expert_of[pair], num_experts)].push(pair);
    }
    for takers in takers.iter_mut().filter(|takers| takers.len() > places) {
        // Pairs are in the order of tokens, and the sort is stable: among equals the later one loses.
        if capacity.policy == DropPolicy::Probs {
            let rank = |pair: usize| if weights[pair].is_nan() { f32::NEG_INFINITY } else { weights[pair] };
            takers.sort_by(|&x, &y| rank(y).total_cmp(&rank(x)));
        }
        takers[places..].iter().for_each(|&pair| expert_of[pair] = -1);
    }
}

/// Turns the expert of each pair into its row, in place; returns the offsets and the token of each row.
fn sort_by_expert(row_of: &mut [i32], num_experts: usize, a: usize) -> (Vec<usize>, Vec<u32>) {
    let mut offsets = vec![0usize; num_experts + 1];
    for &expert in row_of.iter().filter(|&&expert| expert != -1) {
        offsets[expert_idx(expert, num_experts) + 1] += 1;
    }
    (0..num_experts).for_each(|e| offsets[e + 1] += offsets[e]);
    let mut next = offsets.clone();
    let mut tokens = vec![0u32; offsets[num_experts]];
    for (pair, row) in row_of.iter_mut().enumerate().filter(|(_, row)| **row != -1) {
        let place = &mut next[*row as usize];
        tokens[*place] = (pair / a) as u32;
        *row = *place as i32;
        *place += 1;
    }
    (offsets, tokens)
}

fn expert_idx(expert: i32, num_experts: usize) -> usize {
    assert!((0..num_experts as i32).contains(&expert), "the router chose expert {expert} of {num_experts}");
    expert as usize
}

#[cfg(test)]
mod tests;
