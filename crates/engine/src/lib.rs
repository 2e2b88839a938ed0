//! Ranks that execute schedules, and the loop that feeds them.
//!
//! The leader is one thread with one loop: schedule, execute, commit. It sends each step's batches to all ranks (itself, when
//! there is one; threads; or processes) and gets their tokens back. This crate must never know HTTP, text or an async
//! runtime.

pub mod adapt;
pub mod balance;
pub mod ceilings;
pub mod config;
pub mod engine;
mod executor;
pub mod launch;
mod migrate;
pub mod probe;
pub mod rank;
mod record;
mod routing;
pub mod synchronize;
mod wire;
pub mod world;

pub use adapt::{Adaptation, PoolSeconds, pool_of};
pub use ceilings::Ceilings;
pub use config::EngineConfig;
pub use engine::{Engine, Request, Step, TokenEvent};
pub use launch::{Launch, Ranks, launch, launch_plan};
pub use rank::Rank;
pub use record::{RankRecord, StepRecord};
pub use wire::MemoryPeaks;
pub use world::{RankLink, RankProcess, serve_rank};

pub use moesaic_kernels::sampler::SamplingParams;
pub use moesaic_plan::MemoryLedger;
pub use moesaic_sched::{FinishReason, SeqId};

use moesaic_comm::CommError;
use moesaic_device::DeviceError;
use moesaic_kernels::KernelError;
use moesaic_model::ModelError;
use moesaic_plan::eplb::PlaceError;
use moesaic_plan::{CannotFit, Rank as RankId};
use moesaic_sched::SchedError;

/// What can go wrong while serving.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A setting or a request's field is not usable.
    #[error("{field} is {value}; {right}")]
    Invalid {
        /// Which setting or field.
        field: &'static str,
        /// What it is.
        value: String,
        /// What would be right.
        right: String,
    },
    /// The scheduler refused.
    #[error(transparent)]
    Sched(#[from] SchedError),
    /// Memory is too small for the settings.
    #[error(transparent)]
    CannotFit(#[from] CannotFit),
    /// The model could not be loaded or run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Sampling failed.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A measurement takes more memory than there is.
    #[error("needs {needed} of memory, and {available} may be used")]
    TooLarge {
        /// By the measurement.
        needed: moesaic_spec::Bytes,
        /// At most.
        available: moesaic_spec::Bytes,
    },
    /// Memory could not be had.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Another rank did not do its part.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// Experts could not be placed.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// A rank has answered nothing for longer than any wait of it may take.
    #[error("rank {rank} has not answered for {seconds:.1} s")]
    Stalled {
        /// Which.
        rank: RankId,
        /// How long.
        seconds: f64,
    },
    /// The process of a rank is gone.
    #[error("the process of rank {rank} has ended ({status})")]
    Died {
        /// Which.
        rank: RankId,
        /// How it ended.
        status: String,
    },
    /// A rank ran into a mistake of ours.
    #[error("rank {rank} panicked: {what}")]
    Panicked {
        /// Which.
        rank: RankId,
        /// What it said.
        what: String,
    },
    /// What went wrong in the process of a rank, in its own words.
    #[error("{what}")]
    Remote {
        /// 0 for a failure of its own, 1 for a wait that ran out, 2 for the news that somebody else has ended.
        severity: u8,
        /// For whom it waited, where a wait ran out.
        awaited: Option<RankId>,
        /// Its sentence.
        what: String,
    },
    /// The ranks have ended before.
    #[error("the ranks have ended: {why}")]
    Ended {
        /// Why.
        why: String,
    },
    /// The system refused something.
    #[error("{what}: {why}")]
    System {
        /// What was tried.
        what: String,
        /// Why not.
        why: std::io::Error,
    },
}

impl EngineError {
    /// How much of a failure that several ranks report this explains: 0 most.
    pub(crate) fn severity(&self) -> u8 {
        match self {
            EngineError::Comm(comm) | EngineError::Model(ModelError::Comm(comm)) => match comm {
                CommError::PeerEnded { .. } | CommError::Unsent { has_ended: true, .. } => 2,
                CommError::Timeout { .. } | CommError::Unsent { .. } => 1,
                _ => 0,
            },
            EngineError::Remote { severity, .. } => *severity,
            _ => 0,
        }
    }

    /// For whom a rank waited until its patience ended.
    pub(crate) fn awaited(&self) -> Option<RankId> {
        match self {
            EngineError::Comm(comm) | EngineError::Model(ModelError::Comm(comm)) => match comm {
                CommError::Timeout { peer, .. } | CommError::Unsent { peer, has_ended: false, .. } => Some(*peer),
                _ => None,
            },
            EngineError::Remote { awaited, .. } => *awaited,
            _ => None,
        }
    }
}
