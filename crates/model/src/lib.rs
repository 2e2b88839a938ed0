//! The transformer: its layers as actions on tensors, written once for every device, and its weights in and out of
//! checkpoints.
//!
//! A forward pass reads as its paper: embed; per layer norm, attention, norm, router, dispatch, experts, combine; norm,
//! head. Each of these is an action of a rank's schedule, done by [`Step`]. It is the same code on the CPU and on `Meta`, so
//! what [`MetaModel`] reports is what a rank will do.
//!
//! This crate must never schedule, and owns no loop over steps.

pub mod checkpoint;
mod exchange;
mod finite;
pub mod kv_cache;
pub mod layers;
pub mod load;
pub mod step;
pub mod trace;
pub mod transformer;

pub use checkpoint::Checkpoint;
pub use kv_cache::KvCache;
pub use load::{LoadDType, WeightSource};
pub use step::{Choices, MicroBatch, Step, StepStats, Surroundings};
pub use trace::{ActionTrace, MetaModel, SeqShape, StepBounds, StepShape, Trace};
pub use transformer::{PartCache, Transformer};

use std::path::{Path, PathBuf};

use moesaic_comm::CommError;
use moesaic_device::DeviceError;
use moesaic_kernels::KernelError;
use moesaic_spec::SpecError;

/// What can go wrong with a model.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file or folder is not what it should be; the sentence goes on from its name.
    #[error("{}: {what}", path.display())]
    File {
        /// Which file or folder.
        path: PathBuf,
        /// What is wrong with it and what would be right.
        what: String,
    },
    /// The model can only be planned.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// An op refused its arguments.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Memory or a file's mapping failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Another rank did not do its part.
    #[error(transparent)]
    Comm(#[from] CommError),
}

impl ModelError {
    pub(crate) fn file(path: &Path, what: impl Into<String>) -> ModelError {
        ModelError::File { path: path.to_path_buf(), what: what.into() }
    }
}
