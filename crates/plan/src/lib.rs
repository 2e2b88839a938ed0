//! What was decided before anything runs: who does what, in which order, with how much memory.
//!
//! This crate must never search for a decision, and never touch a device.

pub mod eplb;
pub mod ids;
pub mod memory;
pub mod placement;
pub mod plan;
pub mod schedule;
pub mod shard;

pub use ids::{ExpertId, Rank};
pub use memory::{CannotFit, MemoryLedger, MemoryRequest};
pub use placement::{LayerPlacement, Placement};
pub use plan::{Plan, PlanFile, Stage};
pub use schedule::{Action, AllReduce, Collective, Lane, MessageKind, Peers, Schedule, Tag, Work};
pub use shard::{AttentionShard, ExpertShard, RankShard, Slice};
