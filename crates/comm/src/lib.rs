//! Ranks that exchange tensors.
//!
//! A rank sends a message, named by a [`Tag`], to another and goes on; who needs it waits for it, at most until the
//! deadline, and the error of a wait says who waited for whom and for what.
//!
//! Ranks are threads ([`in_process`]) or processes of one machine ([`process`]); a world of one is [`Solo`], and a rank that
//! is only traced is [`Meta`]. What groups of ranks do together is in [`collective`].
//!
//! This crate must never know a layer: a tag is compared and printed, nothing more.
//!
//! ```
//! use std::time::Duration;
//!
//! use moesaic_comm::{Communicator, Message, in_process};
//! use moesaic_device::{Arena, Tensor};
//! use moesaic_plan::{MessageKind, Rank, Tag};
//! use moesaic_spec::{Bytes, DType};
//!
//! let exchange = || Arena::host("exchange", Bytes(1 << 20)).unwrap();
//! let [a, b] = in_process::world(vec![exchange(), exchange()], Duration::from_secs(1)).try_into().ok().unwrap();
//! let tag = Tag { step: 0, layer: 0, micro_batch: 0, kind: MessageKind::Hidden, round: 0 };
//!
//! let mut x = Tensor::empty(a.exchange(), &[3], DType::F32).unwrap();
//! x.f32_mut().copy_from_slice(&[1.0, 2.0, 3.0]);
//! a.send(Rank(1), tag, Message { header: vec![7], tensors: vec![x] }).unwrap();
//!
//! let message = b.receive(Rank(0), tag).unwrap();
//! assert_eq!((message.header, message.tensors[0].f32()), (vec![7], &[1.0, 2.0, 3.0][..]));
//! ```

pub mod alone;
pub mod collective;
pub mod in_process;
mod mailbox;
pub mod process;

pub use alone::{Meta, Solo};
pub use in_process::InProcess;
pub use process::Process;

use std::path::PathBuf;

use moesaic_device::{Arena, DeviceError, Tensor};
use moesaic_plan::{Rank, Tag};

/// What goes from one rank to another.
pub struct Message {
    /// Sizes and indices, as sender and receiver agreed for this kind of message.
    pub header: Vec<u32>,
    /// Data.
    pub tensors: Vec<Tensor>,
}

impl Message {
    /// Bytes that cross the boundary: data and header.
    pub fn size_bytes(&self) -> usize {
        4 * self.header.len() + self.tensors.iter().map(Tensor::size_bytes).sum::<usize>()
    }
}

/// One rank's end of all connections. Used by one thread.
pub trait Communicator: Send {
    /// Who this is.
    fn rank(&self) -> Rank;

    /// How many there are.
    fn world_size(&self) -> usize;

    /// Where outgoing tensors are taken from, so that no transport has to copy them first. Ask for it anew for each: memory
    /// of messages that have arrived comes back at this call.
    fn exchange(&self) -> &Arena;

    /// Puts a message on its way; never waits for the receiver.
    fn send(&self, to: Rank, tag: Tag, message: Message) -> Result<(), CommError>;

    /// One message from each of these ranks, in their order; waits until all are there.
    fn receive_all(&self, from: &[Rank], tag: Tag) -> Result<Vec<Message>, CommError>;

    /// A message if it is there.
    fn try_receive(&self, from: Rank, tag: Tag) -> Result<Option<Message>, CommError>;

    /// Ends this rank's part: all waits for it end with an error that says `why`.
    fn abort(&self, why: &str);

    /// One message.
    fn receive(&self, from: Rank, tag: Tag) -> Result<Message, CommError> {
        Ok(self.receive_all(&[from], tag)?.remove(0))
    }
}

/// What can go wrong between ranks.
#[derive(Debug, thiserror::Error)]
pub enum CommError {
    /// Nothing came in time.
    #[error("rank {rank} waited {seconds:.1} s for rank {peer}: {tag}")]
    Timeout {
        /// Who waited.
        rank: Rank,
        /// For whom.
        peer: Rank,
        /// For what.
        tag: Tag,
        /// How long.
        seconds: f64,
    },
    /// The other end is gone.
    #[error("rank {peer} has ended ({why}); rank {rank} waited for {tag}")]
    PeerEnded {
        /// Who waited.
        rank: Rank,
        /// For whom.
        peer: Rank,
        /// For what.
        tag: Tag,
        /// Why the other ended.
        why: String,
    },
    /// A message could not be sent.
    #[error("rank {rank} cannot send {tag} to rank {peer}: {why}")]
    Unsent {
        /// Who sent it.
        rank: Rank,
        /// To whom.
        peer: Rank,
        /// Which.
        tag: Tag,
        /// The other end is gone; otherwise it takes nothing.
        has_ended: bool,
        /// Why not.
        why: String,
    },
    /// The ranks did not come together.
    #[error("rank {rank} cannot join the others in {dir}: {why}")]
    Join {
        /// Who.
        rank: Rank,
        /// Where they were to meet.
        dir: PathBuf,
        /// Why not.
        why: String,
    },
    /// A message is not what its receiver may expect.
    #[error("rank {rank}: {tag} from rank {peer} has {got}, expected {expected}")]
    Malformed {
        /// Who received it.
        rank: Rank,
        /// From whom.
        peer: Rank,
        /// Which.
        tag: Tag,
        /// What it has.
        got: String,
        /// What would be right.
        expected: String,
    },
    /// The system refused something.
    #[error("rank {rank}: {what}: {why}")]
    System {
        /// Whose end.
        rank: Rank,
        /// What was tried.
        what: String,
        /// Why not.
        why: std::io::Error,
    },
    /// Memory for messages ran out.
    #[error(transparent)]
    Device(#[from] DeviceError),
}
