//! Local search that brings experts of the same tokens to one node, without giving up balance.

use super::packing::Packing;
use super::{CoActivation, ExpertRank};

/// Sweeps over all replicas; few are needed, and each costs the square of their number.
const SWEEPS: usize = 8;

/// Swaps replicas between nodes while fewer pairs are split by it and no place exceeds `limit`.
pub(super) fn gather(packing: &mut Packing, co_activation: CoActivation, ranks: &[ExpertRank], limit: f64) {
    let mut affinity = Affinity::new(packing, co_activation, ranks);
    for _ in 0..SWEEPS {
        let mut changed = false;
        for place in 0..packing.num_places() {
            for idx in 0..packing.held[place].len() {
                let expert = packing.held[place][idx];
                let Some((other_place, other)) = best_partner(packing, &affinity, (place, expert), limit) else {
                    continue;
                };
                affinity.moved(packing, expert, place, other_place);
                affinity.moved(packing, other, other_place, place);
                packing.swap((place, expert), (other_place, other));
                changed = true;
            }
        }
        if !changed {
            return;
        }
    }
}

/// The replica of another node whose swap with this one brings most pairs together.
fn best_partner(
    packing: &Packing,
    affinity: &Affinity,
    (place, expert): (usize, usize),
    limit: f64,
) -> Option<(usize, usize)> {
    let load = packing.replica_load(expert, 0);
    let mut best: Option<(f64, (usize, usize))> = None;
    for other_place in 0..packing.num_places() {
        if affinity.node_of[other_place] == affinity.node_of[place] || packing.holds(other_place, expert) {
            continue;
        }
        for &other in packing.held[other_place].iter().filter(|&&other| !packing.holds(place, other)) {
            let change = packing.replica_load(other, 0) - load;
            if packing.loads[place] + change > limit || packing.loads[other_place] - change > limit {
                continue;
            }
            let gain = affinity.gain(packing, (place, expert), (other_place, other));
            // Gains are sums of counts; less than a thousandth of a token is rounding.
            if gain > 1e-3 && best.is_none_or(|(most, _)| gain > most) {
                best = Some((gain, (other_place, other)));
            }
        }
    }
    best.map(|(_, partner)| partner)
}

/// For each expert and node, the expected number of its tokens that also have an expert there. `[E, nodes]`
struct Affinity<'a> {
    co_activation: CoActivation<'a>,
    /// By place, as an index.
    node_of: Vec<usize>,
    to_node: Vec<Vec<f64>>,
}

impl<'a> Affinity<'a> {
    fn new(packing: &Packing, co_activation: CoActivation<'a>, ranks: &[ExpertRank]) -> Self {
        let mut nodes: Vec<usize> = ranks.iter().map(|r| r.node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        let node_of: Vec<usize> =
            ranks.iter().map(|r| nodes.binary_search(&r.node).expect("a node of the ranks")).collect();
        let mut to_node = vec![vec![0.0; nodes.len()]; packing.num_experts()];
        for (expert, row) in to_node.iter_mut().enumerate() {
            for (other, places) in packing.holders.iter().enumerate() {
                let each = co_activation.get(expert, other) as f64 / places.len() as f64;
                places.iter().for_each(|&place| row[node_of[place]] += each);
            }
        }
        Affinity { co_activation, node_of, to_node }
    }

    /// Pairs that a swap brings together, less those it parts.
    fn gain(&self, packing: &Packing, (p, a): (usize, usize), (q, b): (usize, usize)) -> f64 {
        let (x, y) = (self.node_of[p], self.node_of[q]);
        let replicas = |expert: usize| packing.holders[expert].len() as f64;
        let a_moves = (self.to_node[a][y] - self.to_node[a][x]) / replicas(a);
        let b_moves = (self.to_node[b][x] - self.to_node[b][y]) / replicas(b);
        // Each term counts the other expert where it was before.
        let both = 2.0 * self.co_activation.get(a, b) as f64 / (replicas(a) * replicas(b));
        a_moves + b_moves - both
    }

    /// Keeps the table when one replica of an expert goes to another place.
    fn moved(&mut self, packing: &Packing, expert: usize, from: usize, to: usize) {
        let replicas = packing.holders[expert].len() as f64;
        for (other, row) in self.to_node.iter_mut().enumerate() {
            let each = self.co_activation.get(other, expert) as f64 / replicas;
            row[self.node_of[from]] -= each;
            row[self.node_of[to]] += each;
        }
    }
}
