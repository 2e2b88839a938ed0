//! What groups of ranks do together, and messages that leave a trace in the op log.
//!
//! Every message is recorded at both ends, with the same number for its tag, and every sum as a `reduce`. On `Meta` the same
//! calls record the same list: sizes follow from the arguments, outgoing tensors have shapes only, nothing is waited for.
//!
//! All collectives send before they wait and name each message by its round, so no order of ranks can make them wait for
//! each other in a circle. Nothing is sent where there is nothing to send; both ends know that from the arguments.

mod all_reduce;
mod gather;
#[cfg(test)]
mod tests;

use std::time::Instant;

use moesaic_device::{Amount, Ctx, OpCall, Peer, Tensor};
use moesaic_plan::{Rank, Tag};
use moesaic_spec::DType;

pub use self::all_reduce::{AllReduceArgs, ONE_ROUND_BYTES, all_reduce};
pub use self::gather::{GatherArgs, all_gather_rows, gather_to_first};
use crate::{CommError, Communicator, Message};

/// Puts a message on its way and records it.
pub fn send(ctx: &Ctx, comm: &dyn Communicator, to: Rank, tag: Tag, message: Message) -> Result<(), CommError> {
    sent(ctx, to, tag, Amount::exact(message.size_bytes() as u64));
    comm.send(to, tag, message)
}

/// One message from each of these ranks, in their order, recorded with the size that came. Not on `Meta`, where nothing
/// comes: there [`received`] says what would.
pub fn receive_all(ctx: &Ctx, comm: &dyn Communicator, from: &[Rank], tag: Tag) -> Result<Vec<Message>, CommError> {
    let start = Instant::now();
    let messages = comm.receive_all(from, tag)?;
    for (&peer, message) in from.iter().zip(&messages) {
        let bytes = Amount::exact(message.size_bytes() as u64);
        ctx.record_from(start, || call(peer, tag, false, bytes));
    }
    Ok(messages)
}

/// Records a message to `to` without sending it.
pub fn sent(ctx: &Ctx, to: Rank, tag: Tag, bytes: Amount) {
    ctx.record(|| call(to, tag, true, bytes));
}

/// Records a message from `from` without waiting for it.
pub fn received(ctx: &Ctx, from: Rank, tag: Tag, bytes: Amount) {
    ctx.record(|| call(from, tag, false, bytes));
}

fn call(peer: Rank, tag: Tag, outbound: bool, bytes: Amount) -> OpCall {
    OpCall::message(Peer { rank: peer.0, tag: tag.code(), outbound }, bytes)
}

/// The part of a collective that all of them share: who this is, and messages of one tensor whose shape both ends know.
struct Group<'a> {
    ctx: &'a Ctx,
    comm: &'a dyn Communicator,
    tag: Tag,
}

/// A tensor that a rank is expected to send.
struct Expected {
    from: Rank,
    dims: Vec<usize>,
    dtype: DType,
}

impl Group<'_> {
    fn with_round(&self, round: u8) -> Group<'_> {
        let round = self.tag.round.checked_add(round).expect("a collective has few rounds");
        Group { tag: Tag { round, ..self.tag }, ..*self }
    }

    /// This rank's position in a list of ranks.
    fn position(&self, of: &[Rank]) -> usize {
        let rank = self.comm.rank();
        of.iter().position(|&it| it == rank).unwrap_or_else(|| panic!("rank {rank} is not in its group {of:?}"))
    }

    /// Sends bytes of one tensor, as a tensor of these dims.
    fn send(&self, to: Rank, dims: &[usize], dtype: DType, bytes: Option<&[u8]>) -> Result<(), CommError> {
        let mut tensor = Tensor::empty(self.comm.exchange(), dims, dtype)?;
        if let Some(bytes) = bytes {
            tensor.bytes_mut().copy_from_slice(bytes);
        }
        send(self.ctx, self.comm, to, self.tag, Message { header: Vec::new(), tensors: vec![tensor] })
    }

    /// Waits for all of them; `None` on `Meta`.
    fn receive(&self, expected: &[Expected]) -> Result<Option<Vec<Tensor>>, CommError> {
        for Expected { from, dims, dtype } in expected {
            let bytes = dims.iter().product::<usize>() * dtype.size_bytes();
            received(self.ctx, *from, self.tag, Amount::exact(bytes as u64));
        }
        if self.ctx.is_meta() {
            return Ok(None);
        }
        let from: Vec<Rank> = expected.iter().map(|it| it.from).collect();
        let messages = self.comm.receive_all(&from, self.tag)?;
        expected.iter().zip(messages).map(|(expected, message)| self.check(expected, message)).collect()
    }

    fn check(&self, expected: &Expected, message: Message) -> Result<Option<Tensor>, CommError> {
        let Message { header, mut tensors } = message;
        let fits = header.is_empty()
            && matches!(tensors.as_slice(), [it] if it.dims() == expected.dims && it.dtype() == expected.dtype);
        if fits {
            return Ok(tensors.pop());
        }
        let shapes: Vec<String> = tensors.iter().map(|it| format!("{} {:?}", it.dtype(), it.dims())).collect();
        Err(CommError::Malformed {
            rank: self.comm.rank(),
            peer: expected.from,
            tag: self.tag,
            got: format!("{} header words and tensors [{}]", header.len(), shapes.join(", ")),
            expected: format!("0 header words and tensors [{} {:?}]", expected.dtype, expected.dims),
        })
    }
}
