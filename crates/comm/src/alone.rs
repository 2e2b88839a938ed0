//! Ranks without peers: the only one of a world of one, and one whose step is only traced.

use moesaic_device::Arena;
use moesaic_plan::{Rank, Tag};

use crate::{CommError, Communicator, Message};

/// The only rank of its world. Its schedule has no message, so one that is sent or waited for is our own mistake.
pub struct Solo {
    exchange: Arena,
}

impl Solo {
    /// With an arena for those who ask without looking, as collectives of one rank do not.
    pub fn new(exchange: Arena) -> Solo {
        Solo { exchange }
    }
}

impl Communicator for Solo {
    fn rank(&self) -> Rank {
        Rank(0)
    }

    fn world_size(&self) -> usize {
        1
    }

    fn exchange(&self) -> &Arena {
        &self.exchange
    }

    fn send(&self, to: Rank, tag: Tag, _message: Message) -> Result<(), CommError> {
        panic!("a world of one sends {tag} to rank {to}");
    }

    fn receive_all(&self, from: &[Rank], tag: Tag) -> Result<Vec<Message>, CommError> {
        assert!(from.is_empty(), "a world of one waits for {tag} from {from:?}");
        Ok(Vec::new())
    }

    fn try_receive(&self, from: Rank, tag: Tag) -> Result<Option<Message>, CommError> {
        panic!("a world of one looks for {tag} from rank {from}");
    }

    fn abort(&self, _why: &str) {}
}

/// Any rank of a plan, for a step on [`Device::Meta`](moesaic_device::Device::Meta). What it sends is dropped: a message
/// there has a size and no data. Nothing ever comes, so whoever waits instead of stating the size is our own mistake.
pub struct Meta {
    rank: Rank,
    world_size: usize,
    exchange: Arena,
}

impl Meta {
    /// Rank `rank` of `world_size`.
    pub fn new(rank: Rank, world_size: usize) -> Meta {
        assert!(rank.idx() < world_size, "rank {rank} of {world_size}");
        Meta { rank, world_size, exchange: Arena::meta("exchange") }
    }
}

impl Communicator for Meta {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn exchange(&self) -> &Arena {
        &self.exchange
    }

    fn send(&self, to: Rank, tag: Tag, message: Message) -> Result<(), CommError> {
        assert!(to.idx() < self.world_size, "{tag} to rank {to} of {}", self.world_size);
        drop(message);
        Ok(())
    }

    fn receive_all(&self, from: &[Rank], tag: Tag) -> Result<Vec<Message>, CommError> {
        assert!(from.is_empty(), "{tag} from {from:?} is waited for on Meta, where nothing comes");
        Ok(Vec::new())
    }

    fn try_receive(&self, from: Rank, tag: Tag) -> Result<Option<Message>, CommError> {
        panic!("{tag} from rank {from} is looked for on Meta, where nothing comes");
    }

    fn abort(&self, _why: &str) {}
}
