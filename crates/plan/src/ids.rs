//! Who and which, as types that cannot be mixed up.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A participant of the plan, `0 .. world_size`: one GPU, or on a laptop one thread or process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rank(pub u32);

impl Rank {
    /// As an index.
    pub fn idx(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A logical expert of a layer, `0 .. num_experts`: what the router chooses. Each lives on one rank or more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ExpertId(pub u32);

impl ExpertId {
    /// As an index.
    pub fn idx(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for ExpertId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Ascending numbers with runs drawn together, for people: `0–3, 7`.
pub(crate) fn runs(numbers: impl IntoIterator<Item = usize>) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == number => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let shown = |(first, last): (usize, usize)| match last - first {
        0 => first.to_string(),
        _ => format!("{first}–{last}"),
    };
    runs.into_iter().map(shown).collect::<Vec<_>>().join(", ")
}

/// [`runs`] of ranks.
pub(crate) fn rank_runs(ranks: &[Rank]) -> String {
    runs(ranks.iter().map(|rank| rank.idx()))
}
