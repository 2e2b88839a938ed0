//! A rank that executes steps, and the loop that feeds it.
//!
//! One thread, one loop: schedule, execute, commit. This crate must never know HTTP, text or an async runtime.

pub mod balance;
pub mod ceilings;
pub mod config;
pub mod engine;
pub mod launch;
pub mod rank;
pub mod synchronize;

pub use ceilings::Ceilings;
pub use config::EngineConfig;
pub use engine::{Engine, Request, Step, TokenEvent};
pub use launch::{Launch, launch};
pub use rank::Rank;

pub use moesaic_kernels::sampler::SamplingParams;
pub use moesaic_plan::MemoryLedger;
pub use moesaic_sched::{FinishReason, SeqId};

use moesaic_device::DeviceError;
use moesaic_kernels::KernelError;
use moesaic_model::ModelError;
use moesaic_plan::CannotFit;
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
    /// Memory could not be had.
    #[error(transparent)]
    Device(#[from] DeviceError),
}
