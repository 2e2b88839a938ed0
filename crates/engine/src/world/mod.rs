//! All ranks, as the leader sees them: a step's commands go out, the replies come back, and what goes wrong anywhere comes
//! back as one error that names the rank.

mod processes;
mod threads;

pub(crate) use processes::Processes;
pub use processes::{RankLink, RankProcess, serve_rank};
pub(crate) use threads::Threads;

use moesaic_plan::Rank as RankId;

use crate::wire::{StepCommand, StepReply};
use crate::{EngineError, Rank};

/// Where ranks run.
pub(crate) enum World {
    /// A single one, in the leader's own thread.
    Inline(Box<Rank>),
    /// Each in a thread of this process.
    Threads(Threads),
    /// Each in a process of this machine.
    Processes(Processes),
}

impl World {
    /// Runs one step on all ranks; replies by rank.
    pub(crate) fn step(&mut self, mut commands: Vec<StepCommand>) -> Result<Vec<StepReply>, EngineError> {
        match self {
            World::Inline(rank) => Ok(vec![rank.step(commands.remove(0))?]),
            World::Threads(threads) => threads.step(commands),
            World::Processes(processes) => processes.step(commands),
        }
    }
}

/// Of all that ranks report after one of them failed, what explains the rest: a rank's own failure before a wait that ran
/// out, and that before the news that somebody has ended.
fn root_cause(errors: Vec<(RankId, EngineError)>) -> EngineError {
    let first = errors.into_iter().min_by_key(|(_, error)| error.severity());
    first.expect("somebody failed").1
}
