//! Ranks that are processes of one machine: heads of messages over Unix sockets, tensors through shared memory.
//!
//! Every rank has an exchange arena in memory that all others can read. Tensors that are taken from it go out without a
//! copy: their frame says where they lie, the receiver copies them to its own arena and counts, in its own shared memory,
//! how many messages of the sender it has read; the sender keeps the tensors until then. Small ones, and those that find
//! no room, travel inside the frame. So nothing is ever sent back, and only a rank's own thread writes to its sockets.
//!
//! Nothing is left behind by a rank that is killed: the shared memory has no name, and sockets lose theirs as soon as all
//! ranks have met.

pub mod decoder;
pub mod frame;
mod reader;
mod rendezvous;
mod socket;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use moesaic_device::{Arena, Counters, DeviceError, SharedMap, Tensor};
use moesaic_plan::{Rank, Tag};
use moesaic_spec::Bytes;

use self::decoder::Decoder;
use self::frame::{Described, Link, Place};
use self::reader::{Connection, Reader};
use self::rendezvous::{Greeted, Own};
use crate::mailbox::Mailbox;
use crate::{CommError, Communicator, Message};

/// Ranks of one machine.
pub const MAX_WORLD_SIZE: usize = 1024;

/// Payload up to this many bytes travels inside the frame, and its memory is free again at once. At 2 KiB either way costs
/// the same; at 4 KiB the two more copies take a third off the rate of messages one way.
const IN_FRAME_BYTES: usize = 2 << 10;

/// Where the counters of messages that were read are in every rank's shared memory.
const COUNTERS_OFFSET: usize = 0;

/// How long an abort may take to be told to all.
const ABORT_TIME: Duration = Duration::from_secs(1);

/// What a rank must know to join the others.
#[derive(Clone, Debug)]
pub struct Join<'a> {
    /// Where the ranks meet: a folder that the launcher made for this launch, of mode 0700.
    pub dir: &'a Path,
    /// Which one this is.
    pub rank: Rank,
    /// How many there are, at most [`MAX_WORLD_SIZE`].
    pub world_size: usize,
    /// The same number at all ranks of one launch, and hard to guess.
    pub session: u64,
    /// Longest wait, for the others now and for a message later.
    pub deadline: Duration,
    /// Size of the exchange arena; both what is sent and what is received lies there.
    pub exchange_bytes: Bytes,
}

/// One rank's end.
pub struct Process {
    rank: Rank,
    deadline: Duration,
    exchange: Arena,
    mailbox: Arc<Mailbox>,
    /// By rank; `None` is this one.
    peers: Vec<Option<RefCell<Outgoing>>>,
    reader: Option<JoinHandle<()>>,
}

/// What this rank sends to one peer.
struct Outgoing {
    peer: Rank,
    stream: Arc<UnixStream>,
    /// The peer's memory.
    shared: Arc<SharedMap>,
    /// Tensors in this rank's shared memory that the peer has not read yet: those of one message each, oldest first.
    unread: VecDeque<Vec<Tensor>>,
    /// Messages with such tensors that the peer has read.
    num_read: u64,
}

/// Meets the others, and returns when all are connected with all.
pub fn join(join: Join<'_>) -> Result<Process, CommError> {
    let Join { rank, world_size, deadline, exchange_bytes, .. } = join;
    let (exchange, file) = Arena::shared("exchange", exchange_bytes)?;
    let num_read = Counters::new(&exchange, world_size)?;
    assert_eq!(num_read.offset_in(&exchange), Some(COUNTERS_OFFSET), "the first region of an arena starts at 0");
    let greeted = rendezvous::meet(&join, Own { file: &file, shared_bytes: exchange.capacity() })?;

    let mailbox = Arc::new(Mailbox::new(rank, world_size));
    let mut peers: Vec<Option<RefCell<Outgoing>>> = (0..world_size).map(|_| None).collect();
    let mut connections = Vec::with_capacity(greeted.len());
    for Greeted { rank: peer, stream, shared } in greeted {
        let (stream, shared) = (Arc::new(stream), Arc::new(shared));
        let link = Link { from: peer, to: rank, shared_bytes: shared.len() };
        let decoder = Decoder::new(link, exchange.clone(), shared.clone());
        connections.push(Connection { peer, stream: stream.clone(), decoder });
        let outgoing = Outgoing { peer, stream, shared, unread: VecDeque::new(), num_read: 0 };
        peers[peer.idx()] = Some(RefCell::new(outgoing));
    }
    let reader = Reader { mailbox: mailbox.clone(), connections, num_read };
    let thread = std::thread::Builder::new().name(format!("reader-{rank}")).spawn(move || reader.run());
    let thread = thread.map_err(|why| CommError::System { rank, what: "starting the reader thread".into(), why })?;
    Ok(Process { rank, deadline, exchange, mailbox, peers, reader: Some(thread) })
}

impl Process {
    /// Waits last at most this long from now on; meeting the others may take longer than a message does.
    pub fn set_deadline(&mut self, deadline: Duration) {
        self.deadline = deadline;
    }

    /// Gives memory back that peers have read.
    fn reclaim(&self) {
        for outgoing in self.peers.iter().flatten() {
            outgoing.borrow_mut().reclaim(self.rank);
        }
    }

    fn link(&self, to: Rank) -> Link {
        Link { from: self.rank, to, shared_bytes: self.exchange.capacity().0 as usize }
    }
}

impl Outgoing {
    fn reclaim(&mut self, own: Rank) {
        if self.unread.is_empty() {
            return;
        }
        let num_read = self.shared.count(COUNTERS_OFFSET, own.idx());
        while self.num_read < num_read && self.unread.pop_front().is_some() {
            self.num_read += 1;
        }
    }
}

/// Where each tensor of a message travels; those that travel in shared memory are moved or copied there.
fn place(tensors: Vec<Tensor>, exchange: &Arena) -> Vec<(Tensor, Place)> {
    let is_small = tensors.iter().map(Tensor::size_bytes).sum::<usize>() <= IN_FRAME_BYTES;
    let place = |tensor: Tensor| {
        if is_small || tensor.size_bytes() == 0 {
            return (tensor, Place::Frame);
        }
        if let Some(offset) = tensor.offset_in(exchange) {
            return (tensor, Place::Shared(offset));
        }
        match copy(&tensor, exchange) {
            Ok((copy, offset)) => (copy, Place::Shared(offset)),
            // Full: slower, but nobody waits for room that may never come.
            Err(_) => (tensor, Place::Frame),
        }
    };
    tensors.into_iter().map(place).collect()
}

fn copy(tensor: &Tensor, exchange: &Arena) -> Result<(Tensor, usize), DeviceError> {
    let mut copy = Tensor::empty(exchange, tensor.dims(), tensor.dtype())?;
    copy.bytes_mut().copy_from_slice(tensor.bytes());
    let offset = copy.offset_in(exchange).expect("just taken from there");
    Ok((copy, offset))
}

impl Communicator for Process {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.peers.len()
    }

    fn exchange(&self) -> &Arena {
        self.reclaim();
        &self.exchange
    }

    fn send(&self, to: Rank, tag: Tag, message: Message) -> Result<(), CommError> {
        let unsent = |has_ended, why| CommError::Unsent { rank: self.rank, peer: to, tag, has_ended, why };
        let Some(outgoing) = &self.peers[to.idx()] else {
            return self.mailbox.deliver(self.rank, tag, Ok(message)).map_err(|why| unsent(true, why));
        };
        if let Some(why) = self.mailbox.ended(to) {
            return Err(unsent(true, format!("it has ended ({why})")));
        }
        self.reclaim();
        let placed = place(message.tensors, &self.exchange);
        let describe = |(tensor, place): &(Tensor, Place)| Described {
            dims: tensor.dims().to_vec(),
            dtype: tensor.dtype(),
            place: *place,
        };
        let described: Vec<Described> = placed.iter().map(describe).collect();
        let frame = frame::message(self.link(to), tag, &message.header, &described);
        let in_frame = placed.iter().filter(|(_, place)| *place == Place::Frame);
        let mut parts: Vec<IoSlice<'_>> =
            std::iter::once(&frame[..]).chain(in_frame.map(|(tensor, _)| tensor.bytes())).map(IoSlice::new).collect();

        let mut outgoing = outgoing.borrow_mut();
        let sent = socket::send_all(&outgoing.stream, &mut parts, Instant::now() + self.deadline);
        // Kept after a failure as well: the peer may be reading.
        let unread: Vec<Tensor> =
            placed.into_iter().filter(|(_, place)| *place != Place::Frame).map(|(tensor, _)| tensor).collect();
        if !unread.is_empty() {
            outgoing.unread.push_back(unread);
        }
        sent.map_err(|why| {
            // A part of the frame may be on its way; nothing that follows could be understood.
            let _ = outgoing.stream.shutdown(Shutdown::Both);
            match why.kind() {
                ErrorKind::TimedOut => {
                    unsent(false, format!("it took nothing for {:.1} s", self.deadline.as_secs_f64()))
                }
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
                    unsent(true, "it has ended (connection closed)".to_owned())
                }
                _ => unsent(true, why.to_string()),
            }
        })
    }

    fn receive_all(&self, from: &[Rank], tag: Tag) -> Result<Vec<Message>, CommError> {
        self.mailbox.receive_all(from, tag, self.deadline)
    }

    fn try_receive(&self, from: Rank, tag: Tag) -> Result<Option<Message>, CommError> {
        self.mailbox.try_receive(from, tag)
    }

    fn abort(&self, why: &str) {
        self.mailbox.close(why);
        let until = Instant::now() + ABORT_TIME.min(self.deadline);
        for outgoing in self.peers.iter().flatten() {
            let outgoing = outgoing.borrow();
            let frame = frame::abort(self.link(outgoing.peer), why);
            // Who does not hear the reason still sees the end.
            let _ = socket::send_all(&outgoing.stream, &mut [IoSlice::new(&frame)], until);
            let _ = outgoing.stream.shutdown(Shutdown::Write);
        }
    }
}

/// The exchange arena must not be written to after this: a peer may still be reading.
impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.abort("its thread panicked");
        }
        for outgoing in self.peers.iter().flatten() {
            let _ = outgoing.borrow().stream.shutdown(Shutdown::Both);
        }
        if let Some(reader) = self.reader.take() {
            // It ends because all its connections are closed. A panic of it was printed, and waits end by their deadlines.
            let _ = reader.join();
        }
        self.mailbox.close("connection closed");
    }
}
