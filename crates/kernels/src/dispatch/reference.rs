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

/// Offsets `[E + 1]`, and of each row the source and the pair there.
pub fn sort(sources: &[&[(u32, u32)]], num_experts: usize) -> (Vec<usize>, Vec<(usize, usize)>) {
    let (mut offsets, mut rows) = (vec![0], Vec::new());
    for expert in 0..num_experts as u32 {
        for (source, pairs) in sources.iter().enumerate() {
            let taken = (0..pairs.len()).filter(|&pair| pairs[pair].1 == expert);
            rows.extend(taken.map(|pair| (source, pair)));
        }
        offsets.push(rows.len());
    }
    (offsets, rows)
}
