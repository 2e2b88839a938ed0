//! Dispatch, plainly: every question is answered by looking at all pairs.

use std::ops::Range;

use moesaic_spec::{Capacity, DropPolicy};

/// Whether each pair `[T, A]` keeps its place: fewer pairs of its sequence and expert go before it than there are places.
pub fn kept(
    idx: &[i32],
    weights: &[f32],
    a: usize,
    num_experts: usize,
    capacity: &Capacity,
    seqs: &[Range<usize>],
) -> Vec<bool> {
    let mut kept = vec![false; idx.len()];
    for seq in seqs {
        let pairs = seq.start * a..seq.end * a;
        let places = f64::from(capacity.factor) * (a * seq.len()) as f64 / num_experts as f64;
        for pair in pairs.clone() {
            let goes_before = |&other: &usize| match capacity.policy {
                DropPolicy::Position => other < pair,
                DropPolicy::Probs => weights[other] > weights[pair] || weights[other] == weights[pair] && other < pair,
            };
            let before = pairs.clone().filter(|&other| idx[other] == idx[pair]).filter(goes_before).count();
            kept[pair] = (before as f64) < places;
        }
    }
    kept
}

/// Offsets `[E + 1]`, token of each row `[R]` and row of each pair `[T, A]`.
pub fn sort(idx: &[i32], kept: &[bool], a: usize, num_experts: usize) -> (Vec<usize>, Vec<usize>, Vec<i32>) {
    let (mut offsets, mut tokens, mut row_of) = (vec![0], Vec::new(), vec![-1; idx.len()]);
    for expert in 0..num_experts {
        for pair in (0..idx.len()).filter(|&pair| kept[pair] && idx[pair] == expert as i32) {
            row_of[pair] = tokens.len() as i32;
            tokens.push(pair / a);
        }
        offsets.push(tokens.len());
    }
    (offsets, tokens, row_of)
}
