//! What is worked out once and kept: curves of costs, each under all that it depends on besides sizes of the batch.

use std::collections::HashMap;
use std::hash::Hash;
use std::rc::Rc;

use moesaic_plan::AllReduce;
use moesaic_plan::plan::ExchangePrecision;

use super::curve::{Curve, Surface};
use super::parts::{Part, Parts};
use super::{ExpertLayout, Layout};

/// Values that are found by a key once, and by their place from then on: a search asks for the same ones again and again.
pub(super) struct Interned<K, V> {
    places: HashMap<K, usize>,
    pub(super) values: Vec<V>,
}

impl<K, V> Default for Interned<K, V> {
    fn default() -> Self {
        Interned { places: HashMap::new(), values: Vec::new() }
    }
}

impl<K: Eq + Hash, V> Interned<K, V> {
    pub(super) fn place<E>(&mut self, key: K, make: impl FnOnce(&K) -> Result<V, E>) -> Result<usize, E> {
        if let Some(&place) = self.places.get(&key) {
            return Ok(place);
        }
        self.values.push(make(&key)?);
        self.places.insert(key, self.values.len() - 1);
        Ok(self.values.len() - 1)
    }

    pub(super) fn or_default(&mut self, key: K) -> usize
    where
        V: Default,
    {
        let Ok(place) = self.place(key, |_| Ok::<V, std::convert::Infallible>(V::default()));
        place
    }
}

/// What the parts of a rank cost, by rows.
pub(super) struct CutCosts {
    pub(super) parts: Rc<Parts>,
    /// By [`Part`].
    pub(super) curves: [Curve; Part::ALL.len()],
    /// Attention's core, by way of attending.
    pub(super) cores: Vec<CoreCosts>,
}

/// Attention's core of sequences that get a token, by sequences and context; and of one prompt, by its tokens and those before
/// them.
#[derive(Default)]
pub(super) struct CoreCosts {
    pub(super) decodes: Surface,
    pub(super) prefills: Surface,
}

/// What a group that shares heads sums and gathers, by rows.
#[derive(Default)]
pub(super) struct GroupCosts {
    pub(super) sum: Curve,
    pub(super) norm: Curve,
    pub(super) gather: Curve,
    /// By tokens that are sampled.
    pub(super) logits: Curve,
}

/// Rows to experts and back, by the rows of a rank.
#[derive(Default)]
pub(super) struct ExchangeCosts {
    pub(super) out: Curve,
    pub(super) back: Curve,
}

/// What the routed experts of one rank depend on, besides the tokens of all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ExpertKey {
    pub(super) layout: ExpertLayout,
    pub(super) tp: usize,
    pub(super) senders: usize,
    pub(super) redundant: usize,
}

impl ExpertKey {
    pub(super) fn of(layout: &Layout) -> ExpertKey {
        let senders = layout.tp * layout.dp;
        ExpertKey { layout: layout.experts, tp: layout.expert_cut(), senders, redundant: layout.redundant_experts }
    }
}

/// What it depends on how full the fullest rank is, besides the tokens of all ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FullestKey {
    pub(super) ranks: usize,
    pub(super) redundant: usize,
    pub(super) balanced: bool,
}

impl FullestKey {
    pub(super) fn of(layout: &Layout) -> FullestKey {
        let Layout { redundant_experts: redundant, balanced, .. } = *layout;
        FullestKey { ranks: layout.expert_ranks(), redundant, balanced }
    }
}

/// What sums and gathers depend on, besides the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct GroupKey {
    pub(super) tp: usize,
    pub(super) all_reduce: Option<AllReduce>,
}

/// What an exchange depends on, besides the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ExchangeKey {
    pub(super) expert: ExpertKey,
    pub(super) tp: usize,
    pub(super) dp: usize,
    pub(super) precision: ExchangePrecision,
    pub(super) two_level: bool,
}
