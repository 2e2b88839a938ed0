//! Which tokens run next, in which KV blocks.
//!
//! The scheduler of continuous batching: it keeps the sequences that run and those that wait, hands out blocks of the
//! paged KV cache, and says before each step which tokens of which sequences run in it. Decodes go first, chunks of
//! prefill fill the rest of the token budget, a prompt's beginning that is already in the cache is not computed again,
//! and when the blocks run out the sequence that arrived last gives its own back and is computed again later.
//!
//! **It must never know** the time, a thread, a tensor, a device, or another crate of this project. It is a plain state
//! machine: the same calls in the same order give the same batches. That is why the scheduler that serves is the one
//! that the planner simulates: both implement [`Execute`], one with ranks and kernels, one with prices and a virtual
//! clock.
//!
//! Three promises, each held by a property test:
//! - a block belongs to those who refer to it: none is lost, none is shared except a full one whose KV is computed and
//!   whose whole prefix, and tenant, is the same, token by token;
//! - the oldest sequence advances in every step, so nobody starves;
//! - what a sequence yields does not depend on who runs beside it, on how its prefill was cut, on preemption, or on what
//!   the cache held.
//!
//! ```
//! use moesaic_sched::*;
//!
//! /// The "model" says the token after the last one.
//! struct PlusOne;
//! impl Execute for PlusOne {
//!     type Error = SchedError;
//!     fn execute(&mut self, batches: &[StepBatch]) -> Result<Vec<StepOutput>, SchedError> {
//!         let sampling = |batch: &StepBatch| batch.seqs.clone().into_iter().filter(|seq| seq.samples);
//!         let next = |batch| sampling(batch).map(|seq| (seq.id, seq.token_ids.last().unwrap() + 1)).collect();
//!         Ok(batches.iter().map(|batch| StepOutput { sampled: next(batch) }).collect())
//!     }
//! }
//!
//! let mut scheduler = Scheduler::new(SchedulerConfig {
//!     max_num_seqs: 4,
//!     max_num_batched_tokens: 16,
//!     max_model_len: 64,
//!     block_size: 4,
//!     num_blocks: 32,
//!     max_num_waiting: 8,
//!     enable_prefix_caching: true,
//!     enable_chunked_prefill: true,
//! })?;
//! scheduler.add(SeqRequest {
//!     id: SeqId(1),
//!     prompt: vec![10, 11, 12],
//!     max_tokens: 8,
//!     stop_token_ids: vec![15],
//!     cache_salt: 0,
//! })?;
//!
//! let mut said = Vec::new();
//! while !scheduler.is_idle() {
//!     let step = drive_step(&mut scheduler, &mut PlusOne)?;
//!     said.extend(step.updates.iter().map(|update| update.token));
//! }
//! assert_eq!(said, [13, 14, 15]); // the third is a stop token
//! # Ok::<(), SchedError>(())
//! ```

#![forbid(unsafe_code)]

mod block_manager;
mod config;
mod drive;
mod error;
mod prefix_tree;
mod scheduler;
mod sequence;
mod step;

pub use block_manager::BlockId;
pub use config::SchedulerConfig;
pub use drive::{DrivenStep, Execute, drive_groups, drive_step};
pub use error::SchedError;
pub use scheduler::{SchedStats, Scheduler};
pub use sequence::{SeqId, SeqRequest};
pub use step::{FinishReason, ScheduledSeq, SeqUpdate, StepBatch, StepOutput};
