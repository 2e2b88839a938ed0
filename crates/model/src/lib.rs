//! The transformer: its layers as actions on tensors, written once for every device, and its weights in and out of
//! checkpoints.
//!
//! A forward pass reads as its paper: embed; per layer norm, attention, norm, router, dispatch, experts, combine; norm,
//! head. It is the same code on the CPU and on `Meta`, so what [`MetaModel`] reports is what a rank will do.
//!
//! This crate must never schedule, and owns no loop over steps.

pub mod checkpoint;
mod finite;
pub mod kv_cache;
pub mod layers;
pub mod load;
pub mod trace;
pub mod transformer;

pub use checkpoint::Checkpoint;
pub use kv_cache::KvCache;
pub use load::{LoadDType, WeightSource};
pub use trace::{MetaModel, SeqShape, Trace};
pub use transformer::{StepInput, Transformer};

use std::path::{Path, PathBuf};

use moesaic_device::DeviceError;
use moesaic_kernels::KernelError;

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
    /// An op refused its arguments.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Memory or a file's mapping failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl ModelError {
    pub(crate) fn file(path: &Path, what: impl Into<String>) -> ModelError {
        ModelError::File { path: path.to_path_buf(), what: what.into() }
    }
}
