//! Where tensors live and work happens: memory, arenas, threads, the op log, the machine's abilities.
//!
//! A tensor is on the [`Device::Cpu`], or on [`Device::Meta`] where it has a shape and no data. Both take their memory
//! from an [`Arena`] with the same allocator, so the peak that a `Meta` run reports is the peak of the real run.
//!
//! This crate must never know an op: it offers a [`Ctx`] to record [`OpCall`]s in and threads to work with.
//!
//! ```
//! use moesaic_device::{Ctx, Device};
//! use moesaic_spec::DType;
//!
//! let ctx = Ctx::cpu(1, 1 << 20).unwrap();
//! let mut x = ctx.empty(&[2, 3], DType::F32).unwrap();
//! x.f32_mut().fill(1.0);
//! assert_eq!(x.f32().iter().sum::<f32>(), 6.0);
//!
//! let meta = Ctx::meta();
//! let _x = meta.empty(&[2, 3], DType::F32).unwrap();
//! assert_eq!(meta.arena().peak().0, 64); // allocations are rounded up to a cache line
//! ```

pub mod arena;
mod bandwidth;
pub mod ctx;
pub mod env;
pub mod isa;
pub mod machine;
pub mod memory;
pub mod op_log;
pub mod pool;
pub mod shared;
pub mod tensor;
mod time;

pub use arena::{Arena, Region};
pub use bandwidth::measure_read_bandwidth;
pub use ctx::{Ctx, Device};
pub use isa::Isa;
pub use machine::{Machine, available_memory, num_usable_cores};
pub use memory::{FileMap, HostMemory};
pub use op_log::{Amount, OpCall, Peer, Stream};
pub use pool::{Pool, Task};
pub use shared::{Counters, SharedMap};
pub use tensor::{MAX_DIMS, Tensor};
pub use time::{process_time, thread_time};

use moesaic_spec::Bytes;

/// What can go wrong with memory and machines.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// An arena has no free range that is long enough.
    #[error("the {arena} arena of {capacity} cannot hold {requested} more ({in_use} in use)")]
    ArenaFull {
        /// Which arena.
        arena: &'static str,
        /// Its size.
        capacity: Bytes,
        /// What was asked for.
        requested: Bytes,
        /// What is taken.
        in_use: Bytes,
    },
    /// The operating system refused memory.
    #[error("the system refused {requested} of memory: {why}")]
    OutOfMemory {
        /// What was asked for.
        requested: Bytes,
        /// Why.
        why: std::io::Error,
    },
    /// The operating system refused a thread.
    #[error("the system refused thread {refused} of {asked} (--num-threads): {why}")]
    Threads {
        /// Which one, from 1.
        refused: usize,
        /// How many were to be.
        asked: usize,
        /// Why.
        why: std::io::Error,
    },
    /// A file could not be mapped.
    #[error("{path}: {why}")]
    File {
        /// Which file.
        path: std::path::PathBuf,
        /// Why.
        why: std::io::Error,
    },
    /// Another process's memory cannot be read.
    #[error("shared memory of another process: {why}")]
    SharedFile {
        /// Why.
        why: String,
    },
    /// An environment variable holds something that it cannot mean.
    #[error("{variable}={value}: expected {expected}")]
    Variable {
        /// Its name.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What would be right.
        expected: &'static str,
    },
    /// `MOESAIC_ISA` names something that this machine cannot run.
    #[error("MOESAIC_ISA={asked}: this machine runs {available}")]
    Isa {
        /// The variable's value.
        asked: String,
        /// What would be right.
        available: String,
    },
}
