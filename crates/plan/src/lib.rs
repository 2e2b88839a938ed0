//! What was decided before anything runs: who does what, in which order, with how much memory.
//!
//! A [`PlanFile`] is what people write, print and compare. [`Plan::new`] checks it against a model and a cluster, and says
//! what each rank has. This crate must never search for a decision, and never touch a device.
//!
//! ```
//! use moesaic_plan::{Plan, PlanFile, Rank};
//!
//! let model = moesaic_spec::preset("paper-003-gelu")?.spec()?;
//! let cluster = moesaic_spec::cluster_preset("a100-4x4")?;
//! let yaml = include_str!("../../../specs/plans/paper-003-ma.yaml");
//! let plan = Plan::new(PlanFile::from_yaml(yaml, "paper-003-ma.yaml")?, &model, &cluster)?;
//! let first = plan.shards[0].attention.as_ref().expect("the first ranks have attention");
//! assert_eq!(first.heads, 0..3);
//! assert_eq!(plan.experts_of(Rank(12))[0].len(), 4);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod build;
mod diff;
pub mod eplb;
pub mod error;
mod explain;
pub mod footprint;
pub mod ids;
mod lower;
pub mod memory;
mod place;
pub mod placement;
pub mod plan;
mod read;
pub mod rules;
pub mod schedule;
pub mod shard;
pub mod strategy;
pub mod traffic;
mod write;

pub use diff::diff;
pub use error::PlanError;
pub use explain::explain;
pub use footprint::{RankMemory, kv_heads};
pub use ids::{ExpertId, Rank};
pub use memory::{CannotFit, MemoryLedger, MemoryRequest};
pub use placement::{LayerPlacement, Placement};
pub use plan::{Plan, PlanFile, Stage};
pub use rules::cut_unit;
pub use schedule::{Action, AllReduce, Collective, Lane, MessageKind, Peers, Schedule, Tag, Work};
pub use shard::{AttentionShard, ExpertShard, RankShard, Slice};
pub use strategy::{Setting, Strategy, can_cut, uneven_heads};
pub use traffic::Traffic;
