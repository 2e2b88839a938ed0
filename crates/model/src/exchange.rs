//! The exchange: rows go to the ranks of their experts, and the answers come back.
//!
//! For each rank that has some of a row's experts, the row travels once, in one message a layer and micro-batch. With the
//! two-level route it travels once to each *node*, and a relay there passes it on. An answer comes back for each pair of
//! row and expert, unsummed: the sum is taken where the row lives, in the order of the router's choice, so that its bits do
//! not depend on where experts are.
//!
//! **Message** of `Dispatch` and `Relay`. Tensors: rows `[n, D]` in the compute type, or their 8-bit values and factors.
//! Header: the number of sections, then for each section the source of its rows, the rank that is to answer, the number of
//! pairs, and for each pair `row * E + expert`, `row` counting in the message's rows. **Message** of `Answer`: one row for
//! each pair, in the order of the section; no header.

use std::ops::Range;

use moesaic_comm::{CommError, Message};
use moesaic_plan::{ExpertId, LayerPlacement, Rank, Tag};

/// A row and one of its experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    /// Place among the rows that travel together.
    pub row: u32,
    /// Which expert.
    pub expert: ExpertId,
}

/// What one rank will answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outbound {
    /// Who.
    pub to: Rank,
    /// Rows of the step that go there, ascending.
    pub rows: Vec<u32>,
    /// Pairs, by row and then in the order of the router's choice; `row` counts in `rows`.
    pub pairs: Vec<Pair>,
}

/// Where the pairs of one rank's rows go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Assignment {
    /// By rank, ascending; only those that have something to answer.
    pub outbound: Vec<Outbound>,
    /// For each pair of an own row: its place in `outbound` and there in `pairs`; `None` where it was dropped.
    pub place_of: Vec<Option<(u32, u32)>>,
}

impl Assignment {
    /// Sends every pair to a rank that holds its expert. `expert_of` is `[T, A]` (-1: dropped), of which the rows `own` are
    /// this rank's. Where an expert has several replicas they are used in turn, each source beginning at another one
    /// (`turn`), so the load is shared evenly whatever the rows are.
    pub(crate) fn new(expert_of: &[i32], top_k: usize, own: Range<usize>, place: Placer) -> Assignment {
        let mut outbound: Vec<Outbound> = Vec::new();
        let mut place_of = Vec::with_capacity(own.len() * top_k);
        let mut uses = vec![place.turn; place.num_experts];
        // The destination of a rank, as a place in `outbound`; ranks are few, so a table is small.
        let mut slot_of: Vec<Option<u32>> = vec![None; place.world_size];
        for row in own {
            for &expert in &expert_of[row * top_k..(row + 1) * top_k] {
                if expert < 0 {
                    place_of.push(None);
                    continue;
                }
                let expert = ExpertId(expert as u32);
                let to = match place.layer {
                    None => place.this,
                    Some(layer) => {
                        let replicas = &layer.replicas[expert.idx()];
                        let used = &mut uses[expert.idx()];
                        *used += 1;
                        replicas[(*used - 1) % replicas.len()]
                    }
                };
                let slot = *slot_of[to.idx()].get_or_insert_with(|| {
                    outbound.push(Outbound { to, rows: Vec::new(), pairs: Vec::new() });
                    outbound.len() as u32 - 1
                });
                let out = &mut outbound[slot as usize];
                if out.rows.last() != Some(&(row as u32)) {
                    out.rows.push(row as u32);
                }
                place_of.push(Some((slot, out.pairs.len() as u32)));
                out.pairs.push(Pair { row: out.rows.len() as u32 - 1, expert });
            }
        }
        let mut order: Vec<usize> = (0..outbound.len()).collect();
        order.sort_unstable_by_key(|&slot| outbound[slot].to);
        let mut new_slot = vec![0u32; outbound.len()];
        order.iter().enumerate().for_each(|(new, &old)| new_slot[old] = new as u32);
        place_of.iter_mut().flatten().for_each(|(slot, _)| *slot = new_slot[*slot as usize]);
        outbound.sort_unstable_by_key(|out| out.to);
        Assignment { outbound, place_of }
    }

    /// What goes to one rank.
    pub(crate) fn to(&self, rank: Rank) -> Option<&Outbound> {
        self.outbound.binary_search_by_key(&rank, |out| out.to).ok().map(|idx| &self.outbound[idx])
    }
}

/// How experts are found.
#[derive(Clone, Copy)]
pub(crate) struct Placer<'a> {
    /// Who asks.
    pub this: Rank,
    /// Ranks in all.
    pub world_size: usize,
    /// Experts of the layer.
    pub num_experts: usize,
    /// Where they live; `None`: here, all of them (cut experts).
    pub layer: Option<&'a LayerPlacement>,
    /// Which replica is used first.
    pub turn: usize,
}

/// Pairs of one source that one rank answers, as a message's header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Section {
    pub source: Rank,
    pub answers: Rank,
    pub pairs: Vec<Pair>,
}

/// The header of these sections.
pub(crate) fn encode(sections: &[Section], num_experts: usize) -> Vec<u32> {
    let len = 1 + sections.iter().map(|section| 3 + section.pairs.len()).sum::<usize>();
    let mut header = Vec::with_capacity(len);
    header.push(sections.len() as u32);
    for section in sections {
        header.extend([section.source.0, section.answers.0, section.pairs.len() as u32]);
        header.extend(section.pairs.iter().map(|pair| pair.row * num_experts as u32 + pair.expert.0));
    }
    header
}

/// What a receiver checks a message against.
pub(crate) struct Expected {
    /// Who received it.
    pub this: Rank,
    /// From whom.
    pub peer: Rank,
    /// Which.
    pub tag: Tag,
    /// Experts of the layer.
    pub num_experts: usize,
    /// Width of a row.
    pub width: usize,
}

impl Expected {
    pub(crate) fn malformed(&self, got: impl Into<String>, expected: impl Into<String>) -> CommError {
        CommError::Malformed {
            rank: self.this,
            peer: self.peer,
            tag: self.tag,
            got: got.into(),
            expected: expected.into(),
        }
    }

    /// Rows of a message whose tensors are `[n, width]` (or 8-bit values with their factors).
    pub(crate) fn num_rows(&self, message: &Message) -> Result<usize, CommError> {
        match message.tensors.first().map(|tensor| tensor.dims()) {
            Some(&[rows, width]) if width == self.width => Ok(rows),
            got => Err(self.malformed(format!("rows of {got:?}"), format!("[n, {}]", self.width))),
        }
    }

    /// The sections of a message, each pair inside its rows.
    pub(crate) fn decode(&self, message: &Message) -> Result<Vec<Section>, CommError> {
        let num_rows = self.num_rows(message)?;
        let short = || self.malformed(format!("a header of {} words", message.header.len()), "whole sections");
        let mut words = message.header.iter().copied();
        let num_sections = words.next().ok_or_else(short)?;
        let mut sections = Vec::new();
        for _ in 0..num_sections {
            let (source, answers) = (words.next().ok_or_else(short)?, words.next().ok_or_else(short)?);
            let num_pairs = words.next().ok_or_else(short)? as usize;
            if num_pairs > words.len() {
                return Err(short());
            }
            let mut pairs = Vec::with_capacity(num_pairs);
            for word in words.by_ref().take(num_pairs) {
                let pair =
                    Pair { row: word / self.num_experts as u32, expert: ExpertId(word % self.num_experts as u32) };
                if pair.row as usize >= num_rows {
                    return Err(self.malformed(format!("a pair of row {}", pair.row), format!("rows below {num_rows}")));
                }
                pairs.push(pair);
            }
            sections.push(Section { source: Rank(source), answers: Rank(answers), pairs });
        }
        match words.next() {
            None => Ok(sections),
            Some(_) => Err(short()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer() -> LayerPlacement {
        LayerPlacement { replicas: vec![vec![Rank(2)], vec![Rank(0), Rank(3)], vec![Rank(2)], vec![Rank(1)]] }
    }

    fn placer(layer: &LayerPlacement, turn: usize) -> Placer<'_> {
        Placer { this: Rank(0), world_size: 4, num_experts: 4, layer: Some(layer), turn }
    }

    #[test]
    fn a_row_travels_once_to_each_rank_and_replicas_take_turns() {
        let layer = layer();
        // Rows 1 to 3 are ours; the second pair of row 2 was dropped.
        let expert_of = [3, 3, 0, 2, 1, -1, 1, 0];
        let assignment = Assignment::new(&expert_of, 2, 1..4, placer(&layer, 0));
        let pair = |row, expert| Pair { row, expert: ExpertId(expert) };
        assert_eq!(
            assignment.outbound,
            [
                Outbound { to: Rank(0), rows: vec![2], pairs: vec![pair(0, 1)] },
                Outbound { to: Rank(2), rows: vec![1, 3], pairs: vec![pair(0, 0), pair(0, 2), pair(1, 0)] },
                Outbound { to: Rank(3), rows: vec![3], pairs: vec![pair(0, 1)] },
            ]
        );
        let places = [Some((1, 0)), Some((1, 1)), Some((0, 0)), None, Some((2, 0)), Some((1, 2))];
        assert_eq!(assignment.place_of, places);
        // Another source begins with the other replica.
        let other = Assignment::new(&expert_of, 2, 2..3, placer(&layer, 1));
        assert_eq!(other.outbound[0].to, Rank(3));
    }

    #[test]
    fn cut_experts_stay_at_home() {
        let place = Placer { this: Rank(1), world_size: 4, num_experts: 4, layer: None, turn: 0 };
        let assignment = Assignment::new(&[0, 3, 2, 1], 2, 0..2, place);
        assert_eq!(assignment.outbound.len(), 1);
        assert_eq!((assignment.outbound[0].to, assignment.outbound[0].pairs.len()), (Rank(1), 4));
    }
}
