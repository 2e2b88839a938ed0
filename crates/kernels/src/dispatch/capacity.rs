//! Which pairs keep their place: what is decided about tokens before they go to their experts.

use std::ops::Range;

use moesaic_spec::{Capacity, DType, DropPolicy};

use super::OP;
use crate::KernelError;
use crate::contract::{check, require};
use crate::router::Routing;

/// The expert of each pair (token, slot), `[T * A]`, or -1 where it lost its place. Decided on the host, from the routing
/// of all of a sequence's rows in this step; empty on `Meta`.
///
/// **Capacity.** Of a sequence's n tokens in this step, at most `ceil(factor * A * n / E)` go to one expert. Under
/// [`DropPolicy::Probs`] the lowest weights lose their place first (among equals the later token), under
/// [`DropPolicy::Position`] the latest tokens. A sequence is limited by its own tokens only, so the result does not depend
/// on what else is in the step. `capacity` comes with the rows of each sequence, which must tile `0..T` in order; without
/// one every pair is kept.
///
/// # Errors
/// Sizes that do not fit together.
pub fn keep_pairs(
    routing: &Routing,
    num_experts: usize,
    capacity: Option<(&Capacity, &[Range<usize>])>,
) -> Result<Vec<i32>, KernelError> {
    let dims = routing.topk_idx.dims();
    require(dims.len() == 2 && dims[1] > 0, OP, "topk_idx", || "[T, A]".into(), || format!("{dims:?}"))?;
    let (t, a) = routing.topk_idx.dims2();
    check(OP, "topk_idx", &routing.topk_idx, &[t, a], DType::I32)?;
    check(OP, "topk_weights", &routing.topk_weights, &[t, a], DType::F32)?;
    require(num_experts > 0, OP, "num_experts", || "at least 1".into(), || num_experts.to_string())?;
    if let Some((capacity, seqs)) = capacity {
        check_capacity(capacity, seqs, t)?;
    }
    if routing.topk_idx.is_meta() {
        return Ok(Vec::new());
    }
    let mut expert_of = routing.topk_idx.i32().to_vec();
    if let Some((capacity, seqs)) = capacity {
        let weights = routing.topk_weights.f32();
        seqs.iter().for_each(|seq| drop_overflow(capacity, seq, num_experts, (&mut expert_of, weights, a)));
    }
    Ok(expert_of)
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
pub(super) fn places(factor: f32, a: usize, n: usize, e: usize) -> usize {
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

fn expert_idx(expert: i32, num_experts: usize) -> usize {
    assert!((0..num_experts as i32).contains(&expert), "the router chose expert {expert} of {num_experts}");
    expert as usize
}
