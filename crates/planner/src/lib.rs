//! Prices for what ranks do, on any cluster.
//!
//! Ranks run where they can, on a laptop as threads; what they did (every op, every message, in order) is kept. This crate
//! replays those records on a virtual clock that is priced for a cluster ([`clock`]), sums them up ([`metrics`]), draws
//! them ([`trace`]), and sets strategies side by side ([`report`]).
//!
//! [`network`] prices communication on a cluster's links.
//!
//! This crate must never be imported by what runs a model, and needs no device. It gets plain records, and knows neither
//! the engine nor the wall clock.
//!
//! ```
//! use moesaic_device::op_log::OpCall;
//! use moesaic_planner::Roofline;
//! use moesaic_spec::{Bytes, DType, Gpu, PeakFlops};
//!
//! let gpu = Gpu {
//!     name: "H100".into(),
//!     memory: Bytes(80 << 30),
//!     peak_flops: PeakFlops { bf16: 1e15, f8: 2e15, f4: 2e15, f32: 60e12 },
//!     compute_utilization: 0.5,
//!     memory_bandwidth: 3e12,
//!     memory_utilization: 0.8,
//!     launch_s: 1e-6,
//!     sms: 132,
//!     power: None,
//!     usd_per_hour: None,
//! };
//! let roofline = Roofline { gpu: &gpu, dtype: DType::BF16 };
//! let linear = OpCall::compute("linear", &[], 5_000_000_000, 1_000_000);
//! assert!((roofline.seconds(&linear) - 11e-6).abs() < 1e-12);
//! ```

pub mod calibration;
pub mod clock;
pub mod cost;
pub mod csv;
pub mod energy;
pub mod error;
pub mod estimate;
pub mod iteration;
pub mod load;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod network;
pub mod papers;
pub mod predict;
pub mod price;
pub mod profile;
pub mod record;
pub mod report;
pub mod search;
pub mod serving;
pub mod simulate;
pub mod system;
pub mod tables;
pub mod trace;
pub mod training;
pub mod validate;
pub mod whatif;

pub use clock::{ClockSettings, StepInput, StepTimes, VirtualClock};
pub use cost::{LinkPrice, Roofline};
pub use error::PlannerError;
pub use record::{ActionRecord, RankStep};
