//! Placement of experts from their loads: which experts get replicas, and which rank holds what.
//!
//! After EPLB, the expert-parallelism load balancer that DeepSeek published beside DeepSeek-V3
//! (<https://github.com/deepseek-ai/EPLB>): the next replica goes to the expert whose replicas are the heaviest, and
//! replicas are packed, heaviest first, onto the rank with the least load that has a slot left. Ours differs where a cluster
//! is not ideal, and where more is known than loads:
//!
//! - Ranks may have unequal numbers of slots, and two replicas of an expert never share a rank.
//! - The greedy result is a start: swaps, moves and exchanged replicas lower the fullest rank until none of them does.
//! - Among placements of nearly equal balance ([`NEARLY`]), those are preferred that keep experts which are chosen by the
//!   same tokens on one node (a token crosses to each node once, so fewer nodes are fewer bytes), then those that move
//!   the fewest experts of a current placement.
//!
//! A replica carries `load / replicas`: the engine spreads an expert's tokens evenly over its replicas. Nothing here is
//! random, and sums have a fixed order: the same request gives the same placement on every machine.

mod choose;
mod co_activation;
mod error;
mod greedy;
mod locality;
mod packing;
mod refine;
mod relabel;
#[cfg(test)]
mod tests;
mod trace;

pub use co_activation::{CoActivation, split_pairs};
pub use error::PlaceError;
pub use trace::{LayerTrace, RoutingTrace};

use crate::{LayerPlacement, Placement, Rank};

/// Placements whose fullest ranks differ by less than this share are of nearly equal balance, and so are those whose
/// shares of split pairs differ by less.
pub const NEARLY: f64 = 0.02;

/// A rank that may hold experts of the layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertRank {
    /// Who.
    pub rank: Rank,
    /// Its node.
    pub node: usize,
    /// Experts of the layer that it may hold.
    pub slots: usize,
}

/// What replicas and ranks are chosen from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Any expert on any rank.
    #[default]
    Global,
    /// Experts `0 .. E / groups`, the next as many, and so on are groups; a group lives on one node, replicas and all. For
    /// routers that limit a token to few groups.
    Hierarchical {
        /// Number of groups.
        groups: usize,
    },
}

/// One layer to place.
#[derive(Clone, Copy, Debug)]
pub struct PlaceRequest<'a> {
    /// Load of each logical expert, in any unit. `[E]`
    pub loads: &'a [f64],
    /// Who may hold experts.
    pub ranks: &'a [ExpertRank],
    /// What is chosen from.
    pub policy: Policy,
    /// How often two experts are chosen by the same token.
    pub co_activation: Option<CoActivation<'a>>,
    /// Where experts live now.
    pub current: Option<&'a LayerPlacement>,
}

/// A layer that was placed.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    /// Where experts live.
    pub placement: LayerPlacement,
    /// Predicted load of each of the request's ranks, in their order and in the unit of the loads.
    pub rank_loads: Vec<f64>,
    /// Load of the fullest rank by the mean; 1 when nothing is loaded.
    pub max_over_mean: f64,
    /// Of all pairs of experts that a token chooses, the share on two different nodes; `None` without co-activation.
    pub split_pairs: Option<f64>,
    /// Experts that a rank holds and did not hold before; `None` without a current placement.
    pub moves: Option<usize>,
}

/// Places the experts of one layer. Every expert gets a rank, no rank more experts than it has slots or one of them twice. A
/// current placement that obeys slots and policy is never made worse: neither in max/mean, nor by moves that gain nothing.
///
/// # Errors
/// [`PlaceError`] for loads that are no loads, ranks that cannot hold all experts, groups that do not fit the nodes, and
/// matrices or placements for another number of experts.
pub fn place(request: &PlaceRequest) -> Result<Placed, PlaceError> {
    check(request)?;
    choose::best(request)
}

/// Places every layer of a plan from a routing trace.
///
/// `ranks` has an entry for each decoder layer: who may hold its experts, or `None` where the layer is dense or its
/// experts are cut.
///
/// # Errors
/// As [`place`], with the layer's number; also when the trace has another number of layers, or none of what it needs.
pub fn place_layers(
    trace: &RoutingTrace,
    ranks: &[Option<Vec<ExpertRank>>],
    policy: Policy,
) -> Result<Placement, PlaceError> {
    if trace.layers.len() != ranks.len() {
        return Err(PlaceError::TraceLayers { layers: trace.layers.len(), wanted: ranks.len() });
    }
    let layer = |(layer, (counted, ranks)): (usize, (&Option<LayerTrace>, &Option<Vec<ExpertRank>>))| {
        let Some(ranks) = ranks else { return Ok(None) };
        let counted = counted.as_ref().ok_or(PlaceError::NotTraced { layer })?;
        let loads: Vec<f64> = counted.counts.iter().map(|&n| n as f64).collect();
        let co_activation = Some(counted.co_activation());
        let request = PlaceRequest { loads: &loads, ranks, policy, co_activation, current: None };
        let placed = place(&request).map_err(|fault| PlaceError::Layer { layer, fault: Box::new(fault) })?;
        Ok(Some(placed.placement))
    };
    let layers = trace.layers.iter().zip(ranks).enumerate().map(layer).collect::<Result<_, _>>()?;
    Ok(Placement { epoch: 0, layers })
}

/// The load of each of `ranks` under a placement, in their order. Replicas on other ranks count as replicas.
pub fn rank_loads(placement: &LayerPlacement, loads: &[f64], ranks: &[ExpertRank]) -> Vec<f64> {
    let mut sums = vec![0.0; ranks.len()];
    for (holders, load) in placement.replicas.iter().zip(loads) {
        for holder in holders {
            if let Some(place) = ranks.iter().position(|r| r.rank == *holder) {
                sums[place] += load / holders.len() as f64;
            }
        }
    }
    sums
}

/// The greatest by the mean; 1 when all are 0.
pub fn max_over_mean(loads: &[f64]) -> f64 {
    let sum: f64 = loads.iter().sum();
    let max = loads.iter().copied().fold(0.0, f64::max);
    if sum > 0.0 { max * loads.len() as f64 / sum } else { 1.0 }
}

/// Refuses what cannot be placed.
fn check(request: &PlaceRequest) -> Result<(), PlaceError> {
    let PlaceRequest { loads, ranks, policy, co_activation, current } = *request;
    let experts = loads.len();
    if experts == 0 {
        return Err(PlaceError::NoExperts);
    }
    if let Some((expert, &value)) = loads.iter().enumerate().find(|(_, load)| !(load.is_finite() && **load >= 0.0)) {
        return Err(PlaceError::Load { expert, value });
    }
    for (idx, ExpertRank { rank, slots, .. }) in ranks.iter().enumerate() {
        if *slots == 0 {
            return Err(PlaceError::NoSlots { rank: *rank });
        }
        if ranks[..idx].iter().any(|other| other.rank == *rank) {
            return Err(PlaceError::RankTwice { rank: *rank });
        }
    }
    // A slot beyond the number of experts cannot be used, because a rank holds none twice.
    let slots = ranks.iter().map(|r| r.slots.min(experts)).sum();
    if slots < experts {
        return Err(PlaceError::TooFewSlots { slots, experts });
    }
    if let Policy::Hierarchical { groups } = policy
        && (groups == 0 || !experts.is_multiple_of(groups))
    {
        return Err(PlaceError::Groups { groups, experts });
    }
    if let Some(found) = co_activation.map(|c| c.num_experts()).filter(|&found| found != experts) {
        return Err(PlaceError::OtherExperts { what: "the co-activation matrix", found, experts });
    }
    if let Some(found) = current.map(|c| c.replicas.len()).filter(|&found| found != experts) {
        return Err(PlaceError::OtherExperts { what: "the current placement", found, experts });
    }
    Ok(())
}
