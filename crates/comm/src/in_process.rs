//! Ranks that are threads of one process. A message is moved: its tensors stay where the sender took them, in the
//! sender's exchange arena, and their memory goes back there when the receiver drops them.

use std::sync::Arc;
use std::time::Duration;

use moesaic_device::Arena;
use moesaic_plan::{Rank, Tag};

use crate::mailbox::Mailbox;
use crate::{CommError, Communicator, Message};

/// Why a rank ended that gave no reason.
pub(crate) const NO_REASON: &str = "connection closed";

/// One rank's end.
pub struct InProcess {
    rank: Rank,
    /// By rank.
    mailboxes: Arc<[Mailbox]>,
    exchange: Arena,
    deadline: Duration,
}

/// As many ranks as there are exchange arenas, each to be given to its thread. No wait lasts longer than `deadline`.
pub fn world(exchanges: Vec<Arena>, deadline: Duration) -> Vec<InProcess> {
    let n = exchanges.len();
    let mailboxes: Arc<[Mailbox]> = (0..n).map(|rank| Mailbox::new(Rank(rank as u32), n)).collect();
    let ends = exchanges.into_iter().enumerate();
    ends.map(|(rank, exchange)| InProcess { rank: Rank(rank as u32), mailboxes: mailboxes.clone(), exchange, deadline })
        .collect()
}

impl InProcess {
    fn mailbox(&self) -> &Mailbox {
        &self.mailboxes[self.rank.idx()]
    }
}

impl Communicator for InProcess {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.mailboxes.len()
    }

    fn exchange(&self) -> &Arena {
        &self.exchange
    }

    fn send(&self, to: Rank, tag: Tag, message: Message) -> Result<(), CommError> {
        self.mailboxes[to.idx()].deliver(self.rank, tag, Ok(message)).map_err(|why| {
            let why = format!("it has ended ({why})");
            CommError::Unsent { rank: self.rank, peer: to, tag, has_ended: true, why }
        })
    }

    fn receive_all(&self, from: &[Rank], tag: Tag) -> Result<Vec<Message>, CommError> {
        self.mailbox().receive_all(from, tag, self.deadline)
    }

    fn try_receive(&self, from: Rank, tag: Tag) -> Result<Option<Message>, CommError> {
        self.mailbox().try_receive(from, tag)
    }

    fn abort(&self, why: &str) {
        self.mailbox().close(why);
        for mailbox in self.mailboxes.iter() {
            mailbox.end(self.rank, why);
        }
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.abort(if std::thread::panicking() { "its thread panicked" } else { NO_REASON });
    }
}

// A tensor may be dropped by another thread than the one that took it.
const _: () = {
    const fn crosses_threads<T: Send>() {}
    crosses_threads::<Message>();
};
