//! Experts to ranks: in order, and what every placement must obey.

use crate::ids::{rank_runs, runs};
use crate::{ExpertId, LayerPlacement, PlanError, Rank, Slice};

/// The ranks of one stage that hold whole experts.
pub(crate) struct Homes<'a> {
    /// Ascending.
    pub(crate) ranks: &'a [Rank],
    /// The node of each rank of the world.
    pub(crate) node_of: &'a [usize],
    /// Experts of a layer that one of them may hold.
    pub(crate) max_per_rank: usize,
    /// Physical experts of a layer beyond the logical ones.
    pub(crate) redundant: usize,
}

impl Homes<'_> {
    fn node(&self, home: usize) -> usize {
        self.node_of[self.ranks[home].idx()]
    }

    /// Whether a layer's experts and their replicas have places.
    pub(crate) fn check_room(&self, layer: usize, num_experts: usize) -> Result<(), PlanError> {
        let (ranks, redundant) = (self.ranks.len(), self.redundant);
        let physical = num_experts.saturating_add(redundant);
        if redundant > num_experts * (ranks - 1) {
            let most = num_experts * (ranks - 1);
            return Err(PlanError::TooManyReplicas { layer, redundant, experts: num_experts, ranks, most });
        }
        if physical > self.max_per_rank.saturating_mul(ranks) {
            return Err(PlanError::TooManyExperts {
                layer,
                physical,
                redundant,
                ranks,
                max: self.max_per_rank,
                needed: physical.div_ceil(ranks),
            });
        }
        Ok(())
    }

    /// The rules of a placement, whoever made it.
    pub(crate) fn check(&self, layer: usize, placement: &LayerPlacement) -> Result<(), PlanError> {
        let mut held: Vec<Vec<usize>> = vec![Vec::new(); self.ranks.len()];
        for (idx, ranks) in placement.replicas.iter().enumerate() {
            let expert = ExpertId(idx as u32);
            if ranks.is_empty() {
                return Err(PlanError::ExpertNowhere { layer, expert, ranks: rank_runs(self.ranks) });
            }
            for &rank in ranks {
                let Ok(home) = self.ranks.binary_search(&rank) else {
                    let ranks = rank_runs(self.ranks);
                    return Err(PlanError::NotAnExpertRank { layer, expert, rank, ranks });
                };
                if held[home].last() == Some(&idx) {
                    return Err(PlanError::TwiceOnRank { layer, expert, rank });
                }
                held[home].push(idx);
            }
        }
        if let Some(home) = held.iter().position(|experts| experts.len() > self.max_per_rank) {
            return Err(PlanError::CrowdedRank {
                layer,
                rank: self.ranks[home],
                held: held[home].len(),
                experts: runs(held[home].iter().copied()),
                max: self.max_per_rank,
            });
        }
        let (got, experts) = (placement.replicas.iter().map(Vec::len).sum::<usize>(), placement.replicas.len());
        if got > experts + self.redundant {
            return Err(PlanError::PhysicalExperts { layer, got, experts, redundant: self.redundant });
        }
        Ok(())
    }

    /// Experts in order over the ranks in order, as equal in number as can be; replicas of every so-many-th expert, because
    /// neighbours would relieve one rank only, each on a rank without that expert: in a node without it where there is one,
    /// then where fewest experts are, then the next one in order. There must be room ([`Homes::check_room`]).
    pub(crate) fn linear(&self, num_experts: usize) -> LayerPlacement {
        let num_homes = self.ranks.len();
        let slice = |idx: usize| Slice { idx, count: num_homes }.range(num_experts, 1).collect();
        let mut held: Vec<Vec<usize>> = (0..num_homes).map(slice).collect();
        let most = (num_experts + self.redundant).div_ceil(num_homes);
        let mut left = self.redundant;
        while left > 0 {
            let num_replicas = left.min(num_experts);
            (0..num_replicas).for_each(|idx| self.add_replica(idx * num_experts / num_replicas, most, &mut held));
            left -= num_replicas;
        }
        let mut replicas = vec![Vec::new(); num_experts];
        for (home, experts) in held.iter().enumerate() {
            experts.iter().for_each(|&expert| replicas[expert].push(self.ranks[home]));
        }
        LayerPlacement { replicas }
    }

    fn add_replica(&self, expert: usize, most: usize, held: &mut [Vec<usize>]) {
        let has = |home: usize| held[home].contains(&expert);
        let homes = 0..held.len();
        let taken_nodes: Vec<usize> = homes.clone().filter(|&home| has(home)).map(|home| self.node(home)).collect();
        let first = homes.clone().find(|&home| has(home)).expect("every expert has a first home");
        let rank_of = |&home: &usize| {
            let next = (home + held.len() - first) % held.len();
            (taken_nodes.contains(&self.node(home)), held[home].len(), next)
        };
        let free = homes.clone().filter(|&home| held[home].len() < most && !has(home)).min_by_key(rank_of);
        if let Some(home) = free {
            return held[home].push(expert);
        }
        // Only ranks that have the expert are free. A full rank without it gives one of its own to a free one, which lacks
        // some of them because it has fewer and this one besides.
        let free = homes.clone().find(|&home| held[home].len() < most).expect("there is room");
        let full = homes.clone().find(|&home| !has(home)).expect("an expert has fewer replicas than there are ranks");
        let given = held[full].iter().position(|other| !held[free].contains(other)).expect("the free one has fewer");
        let given = std::mem::replace(&mut held[full][given], expert);
        held[free].push(given);
    }
}
