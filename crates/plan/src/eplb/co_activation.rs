//! Which experts are chosen by the same tokens, and how often a placement puts them on different nodes.

use super::ExpertRank;
use crate::LayerPlacement;

/// How often two experts of a layer were chosen by the same token: a symmetric `[E, E]` matrix without its diagonal, of
/// which the part above it is stored, row by row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CoActivation<'a> {
    num_experts: usize,
    pairs: &'a [u64],
}

impl<'a> CoActivation<'a> {
    /// `pairs` is `(0, 1), (0, 2), …, (1, 2), …`; it must have `E (E - 1) / 2` entries.
    pub fn new(num_experts: usize, pairs: &'a [u64]) -> Self {
        assert_eq!(pairs.len(), num_pairs(num_experts), "pairs of {num_experts} experts");
        CoActivation { num_experts, pairs }
    }

    /// E.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// Tokens that chose both; 0 for an expert and itself.
    pub fn get(&self, a: usize, b: usize) -> u64 {
        if a == b { 0 } else { self.pairs[pair_idx(self.num_experts, a, b)] }
    }
}

/// Pairs of different experts.
pub(super) fn num_pairs(num_experts: usize) -> usize {
    num_experts * num_experts.saturating_sub(1) / 2
}

/// Where the pair of two different experts is stored.
pub(super) fn pair_idx(num_experts: usize, a: usize, b: usize) -> usize {
    let (low, high) = (a.min(b), a.max(b));
    low * (2 * num_experts - low - 1) / 2 + (high - low - 1)
}

/// Of all pairs of experts that tokens chose, the share whose replicas are on two different nodes, each expert's tokens
/// spread evenly over its replicas; 0 when no token chose two.
///
/// A token that is sent to each node once, from a node that knows nothing of its experts, crosses `nodes visited × (1 - 1 /
/// nodes)` times. Two choices visit `1 + split` nodes; more choices visit fewer the fewer of their pairs are split.
pub fn split_pairs(placement: &LayerPlacement, co_activation: CoActivation, ranks: &[ExpertRank]) -> f64 {
    let mut nodes: Vec<usize> = ranks.iter().map(|r| r.node).collect();
    nodes.sort_unstable();
    nodes.dedup();
    let shares: Vec<Vec<f64>> = (placement.replicas.iter())
        .map(|holders| {
            let mut shares = vec![0.0; nodes.len()];
            for rank in ranks.iter().filter(|r| holders.contains(&r.rank)) {
                shares[nodes.binary_search(&rank.node).expect("a node of the ranks")] += 1.0 / holders.len() as f64;
            }
            shares
        })
        .collect();
    let (mut all, mut together) = (0.0, 0.0);
    for a in 0..co_activation.num_experts() {
        for b in a + 1..co_activation.num_experts() {
            let pairs = co_activation.get(a, b) as f64;
            all += pairs;
            together += pairs * shares[a].iter().zip(&shares[b]).map(|(x, y)| x * y).sum::<f64>();
        }
    }
    // Rounding may leave a little less than nothing.
    if all > 0.0 { (1.0 - together / all).max(0.0) } else { 0.0 }
}
