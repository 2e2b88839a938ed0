//! Ranks that exchange tensors.
//!
//! A rank sends a message, named by a [`Tag`], to another and goes on; who needs it waits for it, at most until the
//! deadline, and the error of a wait says who waited for whom and for what.
//!
//! This crate must never know a layer: a tag is compared and printed, nothing more.

use moesaic_device::{DeviceError, Tensor};
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
