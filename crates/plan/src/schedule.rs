//! What each rank does in a step, in order: a list of typed actions. It depends on the plan, never on the batch.
//!
//! Actions of one rank are executed in the order of the list. `after` says what an action truly needs, and `lane` in which
//! of the rank's two queues it runs: that is what a device with streams may overlap, what the virtual clock prices, and
//! what `explain` prints. Messages are asynchronous: a send is done when the message is on its way, and whoever needs a
//! message waits for it inside the action that uses it.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::Rank;

/// What a message is about. With layer, micro-batch and step it names one message between two ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum MessageKind {
    /// The residual stream, from one pipeline stage to the next.
    Hidden,
    /// Sums of squares of queries and keys, where the norm goes over heads of several ranks.
    QkNorm,
    /// Partial results of attention, to be summed.
    Attention,
    /// Partial results of dense MLPs or of cut experts, to be summed.
    Mlp,
    /// Rows that one rank of a tensor-parallel group computed, for the others.
    Rows,
    /// Tokens to the ranks of their experts.
    Dispatch,
    /// Tokens that came to their node once, fanned out inside it.
    Relay,
    /// The experts' answers, to the ranks of their tokens.
    Answer,
    /// Parts of the logits, to the rank that samples.
    Logits,
    /// An expert's weights, to another rank.
    Weights,
}

/// The classes that papers count communication by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Collective {
    /// Partial results are summed.
    AllReduce,
    /// Tokens go to experts and back.
    AllToAll,
    /// From one pipeline stage to the next.
    SendReceive,
    /// Rows and logits that several ranks computed are put together.
    AllGather,
    /// Weights are given to another rank.
    Broadcast,
}

impl MessageKind {
    /// All, in the order of their declaration.
    const ALL: [MessageKind; 10] = [
        MessageKind::Hidden,
        MessageKind::QkNorm,
        MessageKind::Attention,
        MessageKind::Mlp,
        MessageKind::Rows,
        MessageKind::Dispatch,
        MessageKind::Relay,
        MessageKind::Answer,
        MessageKind::Logits,
        MessageKind::Weights,
    ];

    /// The class that it is counted in.
    pub fn collective(self) -> Collective {
        match self {
            MessageKind::QkNorm | MessageKind::Attention | MessageKind::Mlp => Collective::AllReduce,
            MessageKind::Dispatch | MessageKind::Relay | MessageKind::Answer => Collective::AllToAll,
            MessageKind::Hidden => Collective::SendReceive,
            MessageKind::Rows | MessageKind::Logits => Collective::AllGather,
            MessageKind::Weights => Collective::Broadcast,
        }
    }
}

impl fmt::Display for MessageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MessageKind::Hidden => "hidden states",
            MessageKind::QkNorm => "sums of the query/key norm",
            MessageKind::Attention => "partial attention",
            MessageKind::Mlp => "partial MLP",
            MessageKind::Rows => "rows",
            MessageKind::Dispatch => "dispatch",
            MessageKind::Relay => "relay",
            MessageKind::Answer => "answers",
            MessageKind::Logits => "logits",
            MessageKind::Weights => "weights",
        })
    }
}

/// Names one message from one rank to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Tag {
    /// Step of the engine.
    pub step: u64,
    /// Decoder layer; for weights the layer of the expert.
    pub layer: u32,
    /// Micro-batch; for weights which of the layer's moves.
    pub micro_batch: u32,
    /// What it is about.
    pub kind: MessageKind,
    /// Round of a collective, from 0.
    pub round: u8,
}

impl Tag {
    /// Layers and micro-batches that a [`code`](Self::code) has room for: 24 bits of each.
    pub const MAX_IDX: u32 = (1 << 24) - 1;

    /// Everything but the step in one number: which message of a step this is. Panics above [`MAX_IDX`](Self::MAX_IDX).
    pub fn code(&self) -> u64 {
        let Tag { layer, micro_batch, kind, round, .. } = *self;
        assert!(layer <= Tag::MAX_IDX && micro_batch <= Tag::MAX_IDX, "no code has room for {self}");
        u64::from(layer) | u64::from(micro_batch) << 24 | u64::from(round) << 48 | (kind as u64) << 56
    }

    /// The tag of this code in this step; `None` if no tag has the code.
    pub fn from_code(code: u64, step: u64) -> Option<Tag> {
        let kind = *MessageKind::ALL.get((code >> 56) as usize)?;
        let idx = |shift: u32| (code >> shift) as u32 & Tag::MAX_IDX;
        Some(Tag { step, layer: idx(0), micro_batch: idx(24), kind, round: (code >> 48) as u8 })
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tag { step, layer, micro_batch, kind, .. } = self;
        write!(f, "{kind} of layer {layer}, micro-batch {micro_batch}, step {step}")
    }
}

/// Which queue of a rank an action runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lane {
    /// Computation.
    Compute,
    /// Exchange with other ranks.
    Comm,
}

/// How partial results are summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AllReduce {
    /// Every rank sums a part of the elements and gives it to all others: two rounds.
    Flat,
    /// Inside each node, between nodes among ranks of the same place in theirs, inside again: four rounds.
    Hierarchical,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq)]
pub struct Action {
    /// What.
    pub work: Work,
    /// Decoder layer; of the stage's first or last one where it belongs to none.
    pub layer: u32,
    /// Micro-batch.
    pub micro_batch: u32,
    /// In which queue.
    pub lane: Lane,
    /// Actions of this rank, by index and all earlier, that must be done before.
    pub after: Vec<u32>,
}

/// A list of ranks that many actions share.
pub type Peers = Arc<[Rank]>;

/// What an action does.
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    /// Token ids to rows of the residual stream.
    Embed,
    /// The residual stream of the stage before arrives.
    ReceiveHidden {
        /// The same place in the stage before.
        from: Rank,
    },
    /// The residual stream goes to the next stage.
    SendHidden {
        /// The same place in the next stage.
        to: Rank,
    },
    /// Norm, projections, attention over the cache, output projection. With split heads the result is partial.
    Attention,
    /// The first half of `Attention` where the query/key norm goes over heads of several ranks: norm, projection, sums of
    /// squares.
    Project,
    /// The second half.
    Attend,
    /// Partial results of all ranks of a group are summed, for all of them.
    AllReduce {
        /// Which results: `QkNorm`, `Attention` or `Mlp`.
        of: MessageKind,
        /// Who, this rank included.
        group: Peers,
        /// How.
        algorithm: AllReduce,
    },
    /// Norm and dense MLP. With a cut hidden width the result is partial.
    Mlp,
    /// Norm, router, and which row goes to which rank.
    Route,
    /// The expert that every token passes.
    SharedExpert,
    /// Rows go to the ranks of their experts, or to the relay of their node.
    Dispatch {
        /// Everybody who may get some, this rank not included.
        to: Peers,
    },
    /// Rows that came to this node once go on to the ranks of their experts.
    Relay {
        /// Ranks of other nodes whose relay this is.
        from: Peers,
        /// Ranks of this node that have experts, this rank not included.
        to: Peers,
    },
    /// Routed experts on the rows of these ranks, this one included if it has rows of its own.
    Experts {
        /// Ranks whose rows come from themselves.
        from: Peers,
        /// Relays that bring rows of ranks of other nodes; this rank included if it is a relay.
        relays: Peers,
    },
    /// Answers of the `Experts` just before go back.
    Answer {
        /// Ranks whose rows were answered, this one not included.
        to: Peers,
    },
    /// Answers arrive; their weighted sum.
    Combine {
        /// Ranks that may answer, this one not included.
        from: Peers,
    },
    /// Rows that each rank of the group computed for itself, for all of them.
    AllGather {
        /// Who, this rank included.
        group: Peers,
    },
    /// Norm and logits of the rows that are wanted. With a cut vocabulary the result is a part.
    Head,
    /// Parts of the logits go to the first of the group.
    GatherLogits {
        /// Who, this rank included.
        group: Peers,
    },
    /// The next token of each sequence that is due one.
    Sample,
}

/// The actions of one rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// Whose.
    pub rank: Rank,
    /// In order of execution.
    pub actions: Vec<Action>,
}

impl Work {
    /// The kind of message that it sends, if it sends any, and to whom it may go.
    pub fn sends(&self) -> Option<(MessageKind, &[Rank])> {
        match self {
            Work::SendHidden { to } => Some((MessageKind::Hidden, std::slice::from_ref(to))),
            Work::AllReduce { of, group, .. } => Some((*of, group)),
            Work::Dispatch { to } => Some((MessageKind::Dispatch, to)),
            Work::Relay { to, .. } => Some((MessageKind::Relay, to)),
            Work::Answer { to } => Some((MessageKind::Answer, to)),
            Work::AllGather { group } => Some((MessageKind::Rows, group)),
            Work::GatherLogits { group } => Some((MessageKind::Logits, &group[..1])),
            _ => None,
        }
    }
}

/// Ranks in few characters: neighbours as ranges.
struct Ranks<'a>(&'a [Rank]);

impl fmt::Display for Ranks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0;
        if rest.is_empty() {
            return f.write_str("nobody");
        }
        let mut separator = "";
        while let Some(&first) = rest.first() {
            let len = rest.iter().enumerate().take_while(|&(i, rank)| rank.0 == first.0 + i as u32).count();
            match len {
                1 => write!(f, "{separator}{first}")?,
                _ => write!(f, "{separator}{first}-{}", rest[len - 1])?,
            }
            separator = ",";
            rest = &rest[len..];
        }
        Ok(())
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Work::Embed => f.write_str("embed"),
            Work::ReceiveHidden { from } => write!(f, "receive hidden states from {from}"),
            Work::SendHidden { to } => write!(f, "send hidden states to {to}"),
            Work::Attention => f.write_str("attention"),
            Work::Project => f.write_str("project"),
            Work::Attend => f.write_str("attend"),
            Work::AllReduce { of, group, algorithm } => {
                let how = if *algorithm == AllReduce::Hierarchical { ", by nodes" } else { "" };
                write!(f, "all-reduce {of} over {}{how}", Ranks(group))
            }
            Work::Mlp => f.write_str("MLP"),
            Work::Route => f.write_str("route"),
            Work::SharedExpert => f.write_str("shared expert"),
            Work::Dispatch { to } => write!(f, "dispatch to {}", Ranks(to)),
            Work::Relay { from, to } => write!(f, "relay from {} to {}", Ranks(from), Ranks(to)),
            Work::Experts { from, relays } if relays.is_empty() => write!(f, "experts for {}", Ranks(from)),
            Work::Experts { from, relays } if from.is_empty() => {
                write!(f, "experts for rows relayed by {}", Ranks(relays))
            }
            Work::Experts { from, relays } => {
                write!(f, "experts for {} and rows relayed by {}", Ranks(from), Ranks(relays))
            }
            Work::Answer { to } => write!(f, "answer {}", Ranks(to)),
            Work::Combine { from } if from.is_empty() => f.write_str("combine"),
            Work::Combine { from } => write!(f, "combine with answers of {}", Ranks(from)),
            Work::AllGather { group } => write!(f, "all-gather rows of {}", Ranks(group)),
            Work::Head => f.write_str("head"),
            Work::GatherLogits { group } => write!(f, "gather logits of {}", Ranks(group)),
            Work::Sample => f.write_str("sample"),
        }
    }
}

/// A line an action: its number, layer and micro-batch, queue, what it does, and what it waits for.
impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "rank {}", self.rank)?;
        for (idx, action) in self.actions.iter().enumerate() {
            let Action { work, layer, micro_batch, lane, after } = action;
            let lane = if *lane == Lane::Comm { "comm" } else { "compute" };
            write!(f, "{idx:>5}  layer {layer:<3} micro-batch {micro_batch}  {lane:<8} {work}")?;
            if !after.is_empty() {
                let after: Vec<String> = after.iter().map(u32::to_string).collect();
                write!(f, "  (after {})", after.join(", "))?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn kinds_are_listed_in_order() {
        for (idx, kind) in MessageKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, idx);
        }
    }

    proptest! {
        #[test]
        fn a_tag_comes_back_from_its_code(
            step: u64,
            layer in 0..=Tag::MAX_IDX,
            micro_batch in 0..=Tag::MAX_IDX,
            kind in prop::sample::select(MessageKind::ALL.to_vec()),
            round: u8,
        ) {
            let tag = Tag { step, layer, micro_batch, kind, round };
            prop_assert_eq!(Tag::from_code(tag.code(), step), Some(tag));
        }

        #[test]
        fn a_code_is_of_one_tag_or_of_none(code: u64, step: u64) {
            match Tag::from_code(code, step) {
                Some(tag) => prop_assert_eq!(tag.code(), code),
                None => prop_assert!(code >> 56 >= MessageKind::ALL.len() as u64),
            }
        }
    }
}
