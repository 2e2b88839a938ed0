//! The state that every step of placement works on: who holds what, and how full that makes each place.
//!
//! A *place* is the index of a rank in the request.

use super::{ExpertRank, max_over_mean};
use crate::LayerPlacement;

/// Experts on places. Loads of places are summed anew, in ascending order of experts, whenever they change: equal contents
/// give equal loads, bit by bit, whatever happened in between.
#[derive(Clone, Debug)]
pub(super) struct Packing<'a> {
    /// By expert.
    expert_loads: &'a [f64],
    /// By place.
    slots: Vec<usize>,
    /// By place: its experts, ascending.
    pub(super) held: Vec<Vec<usize>>,
    /// By expert: its places, ascending.
    pub(super) holders: Vec<Vec<usize>>,
    /// By place: the sum of its replicas' loads.
    pub(super) loads: Vec<f64>,
}

impl<'a> Packing<'a> {
    /// Nothing placed yet.
    pub(super) fn empty(expert_loads: &'a [f64], ranks: &[ExpertRank]) -> Self {
        Packing {
            expert_loads,
            slots: ranks.iter().map(|r| r.slots.min(expert_loads.len())).collect(),
            held: vec![Vec::new(); ranks.len()],
            holders: vec![Vec::new(); expert_loads.len()],
            loads: vec![0.0; ranks.len()],
        }
    }

    /// Nothing placed yet, for the same experts and places as another.
    pub(super) fn empty_like(other: &Packing<'a>) -> Self {
        Packing {
            expert_loads: other.expert_loads,
            slots: other.slots.clone(),
            held: vec![Vec::new(); other.held.len()],
            holders: vec![Vec::new(); other.holders.len()],
            loads: vec![0.0; other.loads.len()],
        }
    }

    /// What of a placement the ranks can hold: replicas on other ranks, and those beyond a rank's slots, are left out.
    pub(super) fn of(placement: &LayerPlacement, expert_loads: &'a [f64], ranks: &[ExpertRank]) -> Self {
        let mut packing = Packing::empty(expert_loads, ranks);
        for (expert, holders) in placement.replicas.iter().enumerate() {
            for rank in holders {
                let place = ranks.iter().position(|r| r.rank == *rank);
                if let Some(place) = place.filter(|&place| packing.accepts(place, expert)) {
                    packing.add(expert, place);
                }
            }
        }
        packing
    }

    /// As a placement on these ranks.
    pub(super) fn placement(&self, ranks: &[ExpertRank]) -> LayerPlacement {
        let replicas = self.holders.iter().map(|places| {
            let mut holders: Vec<_> = places.iter().map(|&place| ranks[place].rank).collect();
            holders.sort_unstable();
            holders
        });
        LayerPlacement { replicas: replicas.collect() }
    }

    pub(super) fn num_places(&self) -> usize {
        self.held.len()
    }

    pub(super) fn num_experts(&self) -> usize {
        self.holders.len()
    }

    /// Load of the whole expert.
    pub(super) fn expert_load(&self, expert: usize) -> f64 {
        self.expert_loads[expert]
    }

    /// Load of each replica of an expert if it had one more or less; of an expert that is nowhere, its whole load.
    pub(super) fn replica_load(&self, expert: usize, change: isize) -> f64 {
        let replicas = self.holders[expert].len().saturating_add_signed(change).max(1);
        self.expert_loads[expert] / replicas as f64
    }

    pub(super) fn free_slots(&self, place: usize) -> usize {
        self.slots[place] - self.held[place].len()
    }

    pub(super) fn holds(&self, place: usize, expert: usize) -> bool {
        self.held[place].binary_search(&expert).is_ok()
    }

    /// Whether a replica could be added.
    pub(super) fn accepts(&self, place: usize, expert: usize) -> bool {
        self.free_slots(place) > 0 && !self.holds(place, expert)
    }

    /// Whether every expert is somewhere.
    pub(super) fn is_complete(&self) -> bool {
        self.holders.iter().all(|places| !places.is_empty())
    }

    /// The place with the greatest load; the first of several.
    pub(super) fn fullest(&self) -> usize {
        (0..self.num_places()).reduce(|a, b| if self.loads[b] > self.loads[a] { b } else { a }).expect("a place")
    }

    /// The greatest load.
    pub(super) fn peak(&self) -> f64 {
        self.loads[self.fullest()]
    }

    pub(super) fn max_over_mean(&self) -> f64 {
        max_over_mean(&self.loads)
    }

    /// One replica more.
    pub(super) fn add(&mut self, expert: usize, place: usize) {
        assert!(self.accepts(place, expert), "place {place} cannot take expert {expert}");
        insert(&mut self.held[place], expert);
        insert(&mut self.holders[expert], place);
        self.sum_holders(expert);
    }

    /// One replica less.
    pub(super) fn remove(&mut self, expert: usize, place: usize) {
        take(&mut self.held[place], expert);
        take(&mut self.holders[expert], place);
        self.sum(place);
        self.sum_holders(expert);
    }

    /// A replica goes elsewhere.
    pub(super) fn transfer(&mut self, expert: usize, from: usize, to: usize) {
        assert!(self.accepts(to, expert), "place {to} cannot take expert {expert}");
        take(&mut self.held[from], expert);
        take(&mut self.holders[expert], from);
        insert(&mut self.held[to], expert);
        insert(&mut self.holders[expert], to);
        self.sum(from);
        self.sum(to);
    }

    /// Replicas `a` on place `p` and `b` on place `q` change places.
    pub(super) fn swap(&mut self, (p, a): (usize, usize), (q, b): (usize, usize)) {
        assert!(!self.holds(p, b) && !self.holds(q, a), "a place would hold an expert twice");
        for (expert, from, to) in [(a, p, q), (b, q, p)] {
            take(&mut self.held[from], expert);
            take(&mut self.holders[expert], from);
            insert(&mut self.held[to], expert);
            insert(&mut self.holders[expert], to);
        }
        self.sum(p);
        self.sum(q);
    }

    fn sum_holders(&mut self, expert: usize) {
        for idx in 0..self.holders[expert].len() {
            self.sum(self.holders[expert][idx]);
        }
    }

    fn sum(&mut self, place: usize) {
        self.loads[place] = self.held[place].iter().map(|&expert| self.replica_load(expert, 0)).sum();
    }
}

fn insert(sorted: &mut Vec<usize>, value: usize) {
    let at = sorted.binary_search(&value).expect_err("none twice");
    sorted.insert(at, value);
}

fn take(sorted: &mut Vec<usize>, value: usize) {
    let at = sorted.binary_search(&value).expect("it is there");
    sorted.remove(at);
}
