//! All ranks, as the leader sees them: a step's commands go out, the replies come back, and what goes wrong anywhere comes
//! back as one error that names the rank.

mod failures;
mod processes;
mod threads;

pub(crate) use processes::Processes;
pub use processes::{RankLink, RankProcess, serve_rank};
pub(crate) use threads::Threads;

use crate::wire::{StepCommand, StepReply};
use crate::{EngineError, Rank};

/// All ranks.
pub(crate) struct World {
    places: Places,
    /// Why ranks of other threads or processes have ended: after a failure they are of no further use.
    ended: Option<String>,
}

/// Where ranks run.
pub(crate) enum Places {
    /// A single one, in the leader's own thread.
    Inline(Box<Rank>),
    /// Each in a thread of this process.
    Threads(Threads),
    /// Each in a process of this machine.
    Processes(Processes),
}

impl World {
    pub(crate) fn new(places: Places) -> World {
        World { places, ended: None }
    }

    /// Runs one step on all ranks; replies by rank.
    pub(crate) fn step(&mut self, mut commands: Vec<StepCommand>) -> Result<Vec<StepReply>, EngineError> {
        if let Some(why) = &self.ended {
            return Err(EngineError::Ended { why: why.clone() });
        }
        let result = match &mut self.places {
            // It can try again.
            Places::Inline(rank) => return Ok(vec![rank.step(commands.remove(0))?]),
            Places::Threads(threads) => threads.step(commands),
            Places::Processes(processes) => processes.step(commands),
        };
        self.ended = result.as_ref().err().map(ToString::to_string);
        result
    }

    /// The only rank, where it is in this thread.
    pub(crate) fn single_rank(&mut self) -> Option<&mut Rank> {
        match &mut self.places {
            Places::Inline(rank) => Some(rank),
            _ => None,
        }
    }
}
