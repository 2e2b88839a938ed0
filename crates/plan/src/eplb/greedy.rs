//! The published greedy steps: replicas for the heaviest, heaviest first onto the emptiest, groups onto nodes.

use super::packing::Packing;
use super::{ExpertRank, PlaceError};

/// Replicates and packs from nothing.
pub(super) fn pack(packing: &mut Packing) {
    // (expert, how many of it)
    let mut replicas: Vec<(usize, usize)> = replicate(packing).into_iter().enumerate().collect();
    let load = |&(expert, count): &(usize, usize)| packing.expert_load(expert) / count as f64;
    replicas.sort_by(|a, b| load(b).total_cmp(&load(a)).then(a.0.cmp(&b.0)));
    // A replica's load is its share of the whole number from the start, not of those placed so far.
    let mut sums = vec![0.0_f64; packing.num_places()];
    for (expert, count) in replicas {
        for _ in 0..count {
            let places = (0..packing.num_places()).filter(|&place| packing.accepts(place, expert));
            let emptiest = places.min_by(|&a, &b| sums[a].total_cmp(&sums[b]));
            // No place: all that have a slot left hold it already. A first replica always finds one, because there are no
            // more replicas than slots.
            let Some(place) = emptiest else { break };
            packing.add(expert, place);
            sums[place] += packing.expert_load(expert) / count as f64;
        }
    }
    fill(packing);
}

/// How many replicas each expert gets: the next one goes to the expert whose replicas are the heaviest.
fn replicate(packing: &Packing) -> Vec<usize> {
    let experts = packing.num_experts();
    let slots: usize = (0..packing.num_places()).map(|place| packing.free_slots(place)).sum();
    let mut counts = vec![1; experts];
    for _ in experts..slots {
        let load = |expert: usize| packing.expert_load(expert) / counts[expert] as f64;
        let open = (0..experts).filter(|&expert| counts[expert] < packing.num_places());
        // The first of equals, so that it does not depend on anything but the loads.
        let Some(next) = open.reduce(|a, b| if load(b) > load(a) { b } else { a }) else { break };
        counts[next] += 1;
    }
    counts
}

/// Uses slots that are still free, as far as some expert is not yet on their place.
fn fill(packing: &mut Packing) {
    loop {
        let mut heaviest: Option<(usize, usize)> = None;
        for place in (0..packing.num_places()).filter(|&place| packing.free_slots(place) > 0) {
            for expert in (0..packing.num_experts()).filter(|&expert| !packing.holds(place, expert)) {
                let load = packing.replica_load(expert, 0);
                if heaviest.is_none_or(|(_, other)| load > packing.replica_load(other, 0)) {
                    heaviest = Some((place, expert));
                }
            }
        }
        let Some((place, expert)) = heaviest else { return };
        packing.add(expert, place);
    }
}

/// Gives a place to each expert that has none, heaviest first: in a free slot of the emptiest place, or in place of a
/// replica that its expert can spare. For what is left of a placement after ranks were lost.
pub(super) fn complete(packing: &mut Packing) {
    let mut missing: Vec<usize> = (0..packing.num_experts()).filter(|&e| packing.holders[e].is_empty()).collect();
    missing.sort_by(|&a, &b| packing.expert_load(b).total_cmp(&packing.expert_load(a)).then(a.cmp(&b)));
    for expert in missing {
        let emptier = |a: &usize, b: &usize| packing.loads[*a].total_cmp(&packing.loads[*b]);
        let free = (0..packing.num_places()).filter(|&place| packing.free_slots(place) > 0).min_by(emptier);
        if let Some(place) = free {
            packing.add(expert, place);
            continue;
        }
        let spares = (0..packing.num_places())
            .flat_map(|place| packing.held[place].iter().map(move |&spare| (place, spare)))
            .filter(|&(_, spare)| packing.holders[spare].len() > 1);
        let left = |&(place, spare): &(usize, usize)| packing.loads[place] - packing.replica_load(spare, 0);
        let (place, spare) = spares.min_by(|a, b| left(a).total_cmp(&left(b))).expect("slots for every expert");
        packing.remove(spare, place);
        packing.add(expert, place);
    }
}

/// The node of each group of experts: heaviest group first, onto the node with the least load a slot that has room for
/// all its experts.
///
/// # Errors
/// [`PlaceError::GroupsDoNotFit`].
pub(super) fn groups_to_nodes(loads: &[f64], ranks: &[ExpertRank], groups: usize) -> Result<Vec<usize>, PlaceError> {
    let group_size = loads.len() / groups;
    let mut nodes: Vec<usize> = ranks.iter().map(|r| r.node).collect();
    nodes.sort_unstable();
    nodes.dedup();
    let slots_of = |node| ranks.iter().filter(|r| r.node == node).map(|r| r.slots.min(loads.len())).sum::<usize>();
    let slots: Vec<usize> = nodes.iter().map(|&node| slots_of(node)).collect();
    let mut room: Vec<usize> = slots.iter().map(|slots| slots / group_size).collect();
    let whole = room.iter().sum();
    if whole < groups {
        return Err(PlaceError::GroupsDoNotFit { room: whole, group_size, groups });
    }
    let group_loads: Vec<f64> = loads.chunks(group_size).map(|group| group.iter().sum()).collect();
    let mut order: Vec<usize> = (0..groups).collect();
    order.sort_by(|&a, &b| group_loads[b].total_cmp(&group_loads[a]).then(a.cmp(&b)));
    let mut sums = vec![0.0_f64; nodes.len()];
    let mut node_of = vec![0; groups];
    for group in order {
        let filled = |idx: usize| sums[idx] / slots[idx] as f64;
        let open = (0..nodes.len()).filter(|&idx| room[idx] > 0);
        let idx = open.min_by(|&a, &b| filled(a).total_cmp(&filled(b))).expect("there is room for every group");
        node_of[group] = nodes[idx];
        sums[idx] += group_loads[group];
        room[idx] -= 1;
    }
    Ok(node_of)
}
