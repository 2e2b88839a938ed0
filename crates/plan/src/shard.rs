//! Which part of the model a rank has.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::Rank;

/// One of `count` nearly equal parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Slice {
    /// Which part, `0 .. count`.
    pub idx: usize,
    /// How many there are.
    pub count: usize,
}

impl Slice {
    /// All of it.
    pub const WHOLE: Slice = Slice { idx: 0, count: 1 };

    /// Whether this is all of it.
    pub fn is_whole(self) -> bool {
        self.count == 1
    }

    /// This part of `0 .. n`, cut at multiples of `unit` (the last part may end at `n` inside a unit). Empty when there
    /// are fewer units than parts.
    pub fn range(self, n: usize, unit: usize) -> Range<usize> {
        let units = n.div_ceil(unit);
        let at = |idx: usize| (units * idx / self.count * unit).min(n);
        at(self.idx)..at(self.idx + 1)
    }
}

/// What one rank has of the model. Experts that are placed one by one are in [`Placement`](crate::Placement) instead,
/// because they move while the rank runs.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RankShard {
    /// Whose shard this is.
    pub rank: Rank,
    /// Pipeline stage, from 0.
    pub stage: usize,
    /// Decoder layers of the stage.
    pub layers: Range<usize>,
    /// Its part of embedding, attention, router, dense MLPs, shared experts and head; `None` on a rank that has experts
    /// only.
    pub attention: Option<AttentionShard>,
    /// Its part of routed experts.
    pub experts: ExpertShard,
}

/// A rank's part of everything but routed experts.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AttentionShard {
    /// Data-parallel group: whose requests.
    pub group: usize,
    /// Place in the group's tensor parallelism: cuts dense MLPs by hidden width, the head by vocabulary, and rows where each
    /// rank works on rows of its own.
    pub tp: Slice,
    /// Query heads that this rank computes.
    pub heads: Range<usize>,
    /// Query heads that it holds the weights of for another rank (attention held twice).
    pub backup_heads: Vec<Range<usize>>,
    /// The stage begins with the embedding.
    pub embeds: bool,
    /// The stage ends with the head.
    pub has_head: bool,
}

/// A rank's part of routed experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ExpertShard {
    /// None at all (attention pool).
    None,
    /// A part of every expert's hidden width (tensor parallelism).
    Cut(Slice),
    /// Whole experts, those that the placement says.
    Placed,
}
