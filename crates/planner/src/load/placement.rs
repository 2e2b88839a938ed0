//! Experts on ranks.

use moesaic_plan::Rank;
use moesaic_plan::eplb::{ExpertRank, PlaceRequest, Policy, place};

/// What one rank gets of an expert: a share of the tokens that choose it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Part {
    /// Probability that a token chooses the expert.
    pub(super) chosen: f64,
    /// Replicas that share its tokens evenly.
    pub(super) replicas: f64,
}

/// What one rank has.
pub type Parts = Vec<Part>;

/// Expected rows for each token.
pub(super) fn rows(parts: &[Part]) -> f64 {
    parts.iter().map(|part| part.chosen / part.replicas).sum()
}

/// Of the ranks' expected rows.
pub(super) fn max_over_mean(ranks: &[Parts]) -> f64 {
    let (sum, max) =
        ranks.iter().map(|parts| rows(parts)).fold((0.0, 0.0_f64), |(sum, max), rows| (sum + rows, max.max(rows)));
    max * ranks.len() as f64 / sum
}

/// Experts and then replicas of the first ones, dealt out in their order as evenly as numbers allow.
pub(super) fn linear(layer: &[f64], ranks: usize, replicas: usize) -> Vec<Parts> {
    let slots = layer.len() + replicas;
    let copies = |expert: usize| (expert..slots).step_by(layer.len()).count() as f64;
    let slot = |slot: usize| {
        let expert = slot % layer.len();
        Part { chosen: layer[expert], replicas: copies(expert) }
    };
    (0..ranks).map(|rank| (rank * slots / ranks..(rank + 1) * slots / ranks).map(slot).collect()).collect()
}

/// By load, as [`place`] finds it.
pub(super) fn balanced(layer: &[f64], ranks: usize, replicas: usize) -> Vec<Parts> {
    let slots = layer.len() + replicas;
    let have = |rank: usize| (rank + 1) * slots / ranks - rank * slots / ranks;
    let holders: Vec<ExpertRank> =
        (0..ranks).map(|rank| ExpertRank { rank: Rank(rank as u32), node: 0, slots: have(rank) }).collect();
    let holders: Vec<ExpertRank> = holders.into_iter().filter(|holder| holder.slots > 0).collect();
    let request =
        PlaceRequest { loads: layer, ranks: &holders, policy: Policy::Global, co_activation: None, current: None };
    let placed = place(&request).expect("as many slots as experts, and finite loads");
    let mut parts = vec![Parts::new(); ranks];
    for (holders, &chosen) in placed.placement.replicas.iter().zip(layer) {
        for holder in holders {
            parts[holder.0 as usize].push(Part { chosen, replicas: holders.len() as f64 });
        }
    }
    parts
}

/// The same experts in one of many orders.
pub(super) fn shuffled(layer: &[f64], order: u64) -> Vec<f64> {
    let mut keyed: Vec<(u64, f64)> =
        layer.iter().enumerate().map(|(idx, &share)| (mixed(order << 32 | idx as u64), share)).collect();
    keyed.sort_by_key(|&(key, _)| key);
    keyed.into_iter().map(|(_, share)| share).collect()
}

/// A number that shares no pattern with its input. Source: SplitMix64, Steele, Lea and Flood, "Fast splittable pseudorandom
/// number generators", 2014.
fn mixed(seed: u64) -> u64 {
    let mut bits = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}
