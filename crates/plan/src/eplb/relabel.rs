//! Which rank is called which is free as long as nodes stay together: names are chosen so that few experts move.

use super::ExpertRank;
use super::packing::Packing;

/// Gives the contents of places to others of the same number of slots, whole nodes together, so that much of what places
/// hold is there already.
pub(super) fn like<'a>(packing: &Packing<'a>, current: &Packing<'a>, ranks: &[ExpertRank]) -> Packing<'a> {
    let mut nodes: Vec<usize> = ranks.iter().map(|r| r.node).collect();
    nodes.sort_unstable();
    nodes.dedup();
    let places: Vec<Vec<usize>> =
        nodes.iter().map(|&node| (0..ranks.len()).filter(|&place| ranks[place].node == node).collect()).collect();
    let slots = |node: usize| {
        let mut slots: Vec<usize> = places[node].iter().map(|&place| ranks[place].slots).collect();
        slots.sort_unstable();
        slots
    };
    let shared =
        |new: usize, old: usize| packing.held[new].iter().filter(|&&expert| current.holds(old, expert)).count();
    let shared_nodes = |new: usize, old: usize| {
        let holds = |node: usize, of: &Packing, expert| places[node].iter().any(|&place| of.holds(place, expert));
        (0..packing.num_experts()).filter(|&e| holds(new, packing, e) && holds(old, current, e)).count()
    };
    let node_slots: Vec<Vec<usize>> = (0..nodes.len()).map(slots).collect();
    let new_node =
        match_greedily(nodes.len(), |new, old| (node_slots[new] == node_slots[old]).then(|| shared_nodes(new, old)));
    let mut relabelled = Packing::empty_like(packing);
    for (new, old) in new_node.into_iter().enumerate() {
        let (from, to) = (&places[new], &places[old]);
        let names = match_greedily(from.len(), |a, b| {
            (ranks[from[a]].slots == ranks[to[b]].slots).then(|| shared(from[a], to[b]))
        });
        for (a, b) in names.into_iter().enumerate() {
            packing.held[from[a]].iter().for_each(|&expert| relabelled.add(expert, to[b]));
        }
    }
    relabelled
}

/// For each of `n` things one of `n` others, pairs of the greatest value first; `None` pairs never. What may be paired must
/// fall into classes of equal size, so that nothing is left over.
fn match_greedily(n: usize, value: impl Fn(usize, usize) -> Option<usize>) -> Vec<usize> {
    let all = (0..n).flat_map(|a| (0..n).map(move |b| (a, b)));
    let mut pairs: Vec<(usize, usize, usize)> =
        all.filter_map(|(a, b)| value(a, b).map(|value| (value, a, b))).collect();
    pairs.sort_by(|x, y| y.0.cmp(&x.0).then((x.1, x.2).cmp(&(y.1, y.2))));
    let mut partner = vec![None; n];
    let mut taken = vec![false; n];
    for (_, a, b) in pairs {
        if partner[a].is_none() && !taken[b] {
            partner[a] = Some(b);
            taken[b] = true;
        }
    }
    partner.into_iter().map(|b| b.expect("classes of equal size")).collect()
}
