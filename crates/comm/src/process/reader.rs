//! The one thread of a rank that reads: whatever any peer sends is taken from its socket at once and put into the mailbox.
//! It never writes to a socket and never waits for the rank's own thread, so a peer's sends always make progress.

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use moesaic_device::Counters;
use moesaic_plan::Rank;

use super::decoder::{Decoder, Event};
use super::socket::{self, READABLE};
use crate::in_process::NO_REASON;
use crate::mailbox::Mailbox;

/// Read from a socket at a time.
const CHUNK_BYTES: usize = 64 << 10;

/// What the thread works with.
pub(super) struct Reader {
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) connections: Vec<Connection>,
    /// By peer: messages whose shared memory was read. Peers look here to see what they may use again.
    pub(super) num_read: Counters,
}

/// One peer.
pub(super) struct Connection {
    pub(super) peer: Rank,
    pub(super) stream: Arc<UnixStream>,
    pub(super) decoder: Decoder,
}

impl Reader {
    /// Reads until all connections are closed; the rank closes its own when it is dropped.
    pub(super) fn run(mut self) {
        let mut chunk = vec![0; CHUNK_BYTES];
        while !self.connections.is_empty() {
            let mut entries: Vec<_> =
                self.connections.iter().map(|connection| socket::entry(&*connection.stream, READABLE)).collect();
            // Without a deadline, because nobody waits for this thread but a rank that has closed all connections.
            if let Err(why) = socket::poll(&mut entries, None) {
                let why = format!("its connection cannot be watched: {why}");
                self.connections.iter().for_each(|connection| self.mailbox.end(connection.peer, &why));
                return;
            }
            let Reader { mailbox, connections, num_read } = &mut self;
            let mut entries = entries.iter();
            connections.retain_mut(|connection| {
                let is_ready = entries.next().expect("an entry for each").revents != 0;
                if !is_ready {
                    return true;
                }
                let Err(why) = connection.read(&mut chunk, mailbox, num_read) else { return true };
                // The peer may not have ended; it must not wait for room in a socket that nobody reads.
                let _ = connection.stream.shutdown(std::net::Shutdown::Both);
                mailbox.end(connection.peer, &why);
                false
            });
        }
    }
}

impl Connection {
    /// Takes a chunk; an error says why there will be no more.
    fn read(&mut self, chunk: &mut [u8], mailbox: &Mailbox, num_read: &Counters) -> Result<(), String> {
        let received = match (&*self.stream).read(chunk) {
            Ok(received) => received,
            Err(why) if matches!(why.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(()),
            // It closed its end with messages unread; what it had sent was read before.
            Err(why) if why.kind() == ErrorKind::ConnectionReset => 0,
            Err(why) => return Err(format!("{NO_REASON}: {why}")),
        };
        if received == 0 {
            let inside = if self.decoder.is_inside_frame() { " in the middle of a message" } else { "" };
            return Err(format!("{NO_REASON}{inside}"));
        }
        let peer = self.peer;
        let mut deliver = |event| match event {
            Event::Message { tag, content, was_shared } => {
                if was_shared {
                    num_read.increment(peer.idx());
                }
                // A rank that has aborted takes nothing; what comes is dropped.
                let _ = mailbox.deliver(peer, tag, content);
            }
            Event::Abort { why } => mailbox.end(peer, &why),
        };
        self.decoder.push(&chunk[..received], &mut deliver).map_err(|why| why.to_string())
    }
}
