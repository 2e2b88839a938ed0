//! From one placement to the next: whose weights go where.

use std::collections::BTreeMap;

use moesaic_plan::eplb::ExpertRank;
use moesaic_plan::{ExpertId, Placement, Rank};
use serde::{Deserialize, Serialize};

/// An expert's weights go to a rank that has not got them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// Decoder layer.
    pub layer: usize,
    /// Which expert.
    pub expert: ExpertId,
    /// Who has it and sends it.
    pub from: Rank,
    /// Who gets it.
    pub to: Rank,
}

/// What must be sent so that everybody has what `new` gives them, by layer, expert and receiver. A sender holds the expert
/// in `old`; one on the receiver's node is preferred, then the one that sends least.
pub fn moves(old: &Placement, new: &Placement, ranks: &[Option<Vec<ExpertRank>>]) -> Vec<Move> {
    let mut moves = Vec::new();
    let mut sends: BTreeMap<Rank, usize> = BTreeMap::new();
    for (layer, (old, new)) in old.layers.iter().zip(&new.layers).enumerate() {
        let (Some(old), Some(new), Some(ranks)) = (old, new, &ranks[layer]) else { continue };
        let node = |rank: Rank| ranks.iter().find(|r| r.rank == rank).map(|r| r.node);
        for (expert, (holders, wanted)) in old.replicas.iter().zip(&new.replicas).enumerate() {
            for &to in wanted.iter().filter(|to| !holders.contains(to)) {
                // A rank that is no longer among the ranks has nothing to send; if it was the only holder, there is no
                // move, and the caller has to take the expert from the checkpoint.
                let senders = holders.iter().copied().filter(|&from| node(from).is_some());
                let key = |from: Rank| (node(from) != node(to), sends.get(&from).copied().unwrap_or(0), from);
                if let Some(from) = senders.min_by_key(|&from| key(from)) {
                    *sends.entry(from).or_default() += 1;
                    moves.push(Move { layer, expert: ExpertId(expert as u32), from, to });
                }
            }
        }
    }
    moves
}
