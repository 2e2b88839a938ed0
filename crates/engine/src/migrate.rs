//! Experts move between ranks while steps run.
//!
//! Before a step, a rank sends some of the weights that it owes; after it, it takes what has come. When everything has
//! arrived everywhere the leader announces the new placement, and all ranks switch before the same step: what they no
//! longer hold is dropped, what has arrived is used. Weights travel as the kernels want them, so a moved expert gives the
//! same bits.

use std::collections::HashMap;

use moesaic_comm::{Communicator, Message, collective};
use moesaic_device::{Amount, Arena, Ctx};
use moesaic_kernels::experts::ExpertWeight;
use moesaic_model::Transformer;
use moesaic_plan::{ExpertId, MessageKind, Placement, Rank, Tag};

use crate::EngineError;
use crate::wire::{ExpertMove, StepReply};

/// One rank's part of the moves.
pub(crate) struct Migration {
    /// Memory for experts that arrive.
    arena: Arena,
    /// Bytes that are sent before one step at most; one expert always is. Never more than a quarter of what may arrive: the
    /// last step's may still be unread, and their memory is that of the arena of messages.
    bytes_per_step: u64,
    to_send: Vec<ExpertMove>,
    to_receive: Vec<ExpertMove>,
    arrived: HashMap<(u32, ExpertId), ExpertWeight>,
}

impl Migration {
    pub(crate) fn new(arena: Arena, bytes_per_step: u64) -> Migration {
        Migration { arena, bytes_per_step, to_send: Vec::new(), to_receive: Vec::new(), arrived: HashMap::new() }
    }

    /// Takes in moves that concern this rank.
    pub(crate) fn begin(&mut self, rank: Rank, moves: Vec<ExpertMove>) {
        for one in moves {
            if one.from == rank {
                self.to_send.push(one);
            }
            if one.to == rank {
                self.to_receive.push(one);
            }
        }
    }

    pub(crate) fn send_some(
        &mut self,
        ctx: &Ctx,
        comm: &dyn Communicator,
        transformer: &Transformer,
        reply: &mut StepReply,
    ) -> Result<(), EngineError> {
        let limit = self.bytes_per_step.min(self.arena.capacity().0 / 4);
        let mut sent = 0;
        let mut num_sent = 0;
        for one in &self.to_send {
            let weight = transformer.expert(one.layer, one.expert).expect("a move starts where the expert lives");
            let bytes = weight.size_bytes().0;
            if num_sent > 0 && sent + bytes > limit {
                break;
            }
            let message = Message { header: Vec::new(), tensors: weight.to_tensors(comm.exchange())? };
            collective::send(ctx, comm, one.to, tag(one), message)?;
            sent += bytes;
            num_sent += 1;
        }
        self.to_send.drain(..num_sent);
        reply.weights_sent += sent;
        Ok(())
    }

    pub(crate) fn receive_some(
        &mut self,
        ctx: &Ctx,
        comm: &dyn Communicator,
        transformer: &Transformer,
        reply: &mut StepReply,
    ) -> Result<(), EngineError> {
        let mut waiting = Vec::new();
        for expected in std::mem::take(&mut self.to_receive) {
            match comm.try_receive(expected.from, tag(&expected))? {
                None => waiting.push(expected),
                Some(message) => {
                    let bytes = Amount::exact(message.size_bytes() as u64);
                    collective::received(ctx, expected.from, tag(&expected), bytes);
                    let mut weight = transformer.empty_expert(&self.arena, expected.layer)?;
                    weight.fill(&message.tensors)?;
                    self.arrived.insert((expected.layer, expected.expert), weight);
                    reply.arrived.push(expected.number);
                }
            }
        }
        self.to_receive = waiting;
        Ok(())
    }

    /// From here on the new placement counts.
    pub(crate) fn switch(
        &mut self,
        transformer: &mut Transformer,
        rank: Rank,
        placement: &Placement,
    ) -> Result<(), EngineError> {
        let layers = transformer.shard().layers.clone();
        for (layer, placed) in placement.layers.iter().enumerate().filter(|(layer, _)| layers.contains(layer)) {
            let Some(placed) = placed else { continue };
            let held = placed.experts_of(rank);
            let mut arrived = |expert| self.arrived.remove(&(layer as u32, expert));
            transformer.place_experts(layer as u32, &held, &mut arrived);
        }
        assert!(self.arrived.is_empty(), "what has arrived is placed");
        Ok(())
    }
}

/// All messages of a move have the same name at both ends, whenever they are sent.
fn tag(of: &ExpertMove) -> Tag {
    Tag { step: 0, layer: of.layer, micro_batch: of.number, kind: MessageKind::Weights, round: 0 }
}
