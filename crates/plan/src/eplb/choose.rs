//! Candidates, and which of them is taken.

use super::packing::Packing;
use super::{CoActivation, ExpertRank, NEARLY, PlaceError, PlaceRequest, Placed, Policy, greedy, locality, refine};
use super::{relabel, split_pairs};
use crate::{LayerPlacement, Rank};

/// Experts and ranks among which any placement is allowed: a layer, or of a hierarchical one a node.
struct Part<'a> {
    loads: &'a [f64],
    ranks: &'a [ExpertRank],
    co_activation: Option<CoActivation<'a>>,
    current: Option<&'a LayerPlacement>,
}

/// The best placement that the policy allows, described.
///
/// # Errors
/// [`PlaceError::GroupsDoNotFit`].
pub(super) fn best(request: &PlaceRequest) -> Result<Placed, PlaceError> {
    let PlaceRequest { loads, ranks, policy, co_activation, current } = *request;
    let whole = Part { loads, ranks, co_activation, current };
    let packing = match policy {
        Policy::Global => solve(&whole),
        Policy::Hierarchical { groups } => hierarchical(&whole, groups)?,
    };
    assert!(packing.is_complete(), "an expert is nowhere");
    let placement = packing.placement(ranks);
    Ok(Placed {
        max_over_mean: packing.max_over_mean(),
        split_pairs: co_activation.map(|c| split_pairs(&placement, c, ranks)),
        moves: current.map(|current| num_moves(&placement, current)),
        rank_loads: packing.loads,
        placement,
    })
}

/// Replicas that are where none was.
fn num_moves(placement: &LayerPlacement, current: &LayerPlacement) -> usize {
    let pairs = placement.replicas.iter().zip(&current.replicas);
    pairs.map(|(new, old)| new.iter().filter(|rank| !old.contains(rank)).count()).sum()
}

/// From nothing, and from the current placement.
fn solve<'a>(part: &Part<'a>) -> Packing<'a> {
    let Part { loads, ranks, co_activation, current } = *part;
    let nodes_differ = ranks.iter().any(|r| r.node != ranks[0].node);
    let co_activation = co_activation.filter(|_| nodes_differ);

    let mut fresh = Packing::empty(loads, ranks);
    greedy::pack(&mut fresh);
    refine::level(&mut fresh, 0.0);
    refine::escape(&mut fresh);
    let level = fresh.peak();

    let kept = current.map(|current| Packing::of(current, loads, ranks));
    let is_current_allowed =
        kept.as_ref().is_some_and(|kept| kept.is_complete() && Some(&kept.placement(ranks)) == current);
    // What gathering may give up of the balance: not so much that it would be worse than the current placement.
    let mut limit = level * (1.0 + NEARLY);
    if let Some(kept) = kept.as_ref().filter(|_| is_current_allowed) {
        limit = limit.min(kept.peak()).max(level);
    }
    if let Some(co_activation) = co_activation {
        locality::gather(&mut fresh, co_activation, ranks, limit);
    }
    let Some(mut kept) = kept else { return fresh };

    let mut candidates = vec![relabel::like(&fresh, &kept, ranks)];
    let current_peak = is_current_allowed.then(|| kept.peak());
    if is_current_allowed {
        candidates.push(kept.clone());
    }
    greedy::complete(&mut kept);
    refine::level(&mut kept, level * (1.0 + NEARLY));
    candidates.push(kept.clone());
    if let Some(co_activation) = co_activation {
        let limit = limit.max(kept.peak());
        locality::gather(&mut kept, co_activation, ranks, limit);
        candidates.push(kept);
    }
    prefer(candidates, part, current_peak)
}

/// Of those of nearly the best balance, those of nearly the fewest split pairs; of them that with the fewest moves. None
/// is fuller than the current placement, which is among the candidates if `current_peak` is given.
fn prefer<'a>(mut candidates: Vec<Packing<'a>>, part: &Part, current_peak: Option<f64>) -> Packing<'a> {
    let least = candidates.iter().map(Packing::peak).fold(f64::INFINITY, f64::min);
    let limit = current_peak.map_or(f64::INFINITY, |peak| peak).min(least * (1.0 + NEARLY));
    candidates.retain(|candidate| candidate.peak() <= limit);

    let split = |candidate: &Packing| {
        part.co_activation.map_or(0.0, |c| split_pairs(&candidate.placement(part.ranks), c, part.ranks))
    };
    let splits: Vec<f64> = candidates.iter().map(split).collect();
    let fewest = splits.iter().copied().fold(f64::INFINITY, f64::min);
    let near = candidates.into_iter().zip(splits).filter(|(_, split)| *split <= fewest + NEARLY);

    let moves =
        |candidate: &Packing| part.current.map_or(0, |current| num_moves(&candidate.placement(part.ranks), current));
    let ranked = near.map(|(candidate, _)| (moves(&candidate), candidate.peak(), candidate));
    let best = ranked.min_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    best.expect("the least full candidate passes").2
}

/// Groups to nodes, then each node for itself.
fn hierarchical<'a>(whole: &Part<'a>, groups: usize) -> Result<Packing<'a>, PlaceError> {
    let Part { loads, ranks, current, .. } = *whole;
    let fresh = greedy::groups_to_nodes(loads, ranks, groups)?;
    let mut candidates = vec![inside_nodes(whole, &fresh)];
    let mut current_peak = None;
    if let Some(current) = current {
        // The same groups together, on the nodes where most of them are already.
        let named = relabel::like(&candidates[0], &Packing::of(current, loads, ranks), ranks);
        let node_of = groups_of(&named.placement(ranks), ranks, groups).expect("nodes stay together");
        candidates.push(inside_nodes(whole, &node_of));
    }
    if let Some((current, node_of)) = current.and_then(|c| Some((c, groups_of(c, ranks, groups)?))) {
        let kept = Packing::of(current, loads, ranks);
        if kept.placement(ranks) == *current {
            current_peak = Some(kept.peak());
            candidates.push(kept);
            candidates.push(inside_nodes(whole, &node_of));
        }
    }
    Ok(prefer(candidates, whole, current_peak))
}

/// The node of each group in a placement; `None` where a group has several, or a rank is unknown.
fn groups_of(placement: &LayerPlacement, ranks: &[ExpertRank], groups: usize) -> Option<Vec<usize>> {
    let node_of = |rank: &Rank| ranks.iter().find(|r| r.rank == *rank).map(|r| r.node);
    let chunks = placement.replicas.chunks(placement.replicas.len() / groups);
    chunks
        .map(|group| {
            let mut nodes = group.iter().flatten().map(node_of);
            let first = nodes.next()??;
            nodes.all(|node| node == Some(first)).then_some(first)
        })
        .collect()
}

/// Each node's groups on its ranks.
fn inside_nodes<'a>(whole: &Part<'a>, node_of_group: &[usize]) -> Packing<'a> {
    let Part { loads, ranks, current, .. } = *whole;
    let group_size = loads.len() / node_of_group.len();
    let mut joined = Packing::empty(loads, ranks);
    let mut nodes = node_of_group.to_vec();
    nodes.sort_unstable();
    nodes.dedup();
    for node in nodes {
        let experts: Vec<usize> = (0..loads.len()).filter(|e| node_of_group[e / group_size] == node).collect();
        let places: Vec<usize> = (0..ranks.len()).filter(|&place| ranks[place].node == node).collect();
        let node_loads: Vec<f64> = experts.iter().map(|&e| loads[e]).collect();
        let node_ranks: Vec<ExpertRank> = places.iter().map(|&place| ranks[place]).collect();
        let node_current =
            current.map(|c| LayerPlacement { replicas: experts.iter().map(|&e| c.replicas[e].clone()).collect() });
        let part = Part { loads: &node_loads, ranks: &node_ranks, co_activation: None, current: node_current.as_ref() };
        let packing = solve(&part);
        for (idx, holders) in packing.holders.iter().enumerate() {
            holders.iter().for_each(|&place| joined.add(experts[idx], places[place]));
        }
    }
    joined
}
