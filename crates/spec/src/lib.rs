//! What is given: the model, the cluster, the workload.
//!
//! This crate reads descriptions and checks them; it decides nothing, and knows no tensor, no device and no file but
//! the text that it is handed.
//!
//! ```
//! let preset = moesaic_spec::preset("mixtral-8x7b")?;
//! let spec = preset.spec()?;
//! let counts = spec.counts();
//! assert_eq!(spec.layers.len(), 32);
//! assert_eq!(counts.params_total / 1_000_000_000, 46);
//! # Ok::<(), moesaic_spec::SpecError>(())
//! ```

pub mod cluster;
pub mod dtype;
pub mod error;
pub mod fields;
pub mod generation;
pub mod gpu;
pub mod model;
pub mod nearest;
pub mod presets;
pub mod units;
pub mod workload;
pub mod yaml;

pub use cluster::{Cluster, Energy, Link, LinkClass};
pub use dtype::DType;
pub use error::SpecError;
pub use generation::GenerationConfig;
pub use gpu::{Gpu, PeakFlops, Power};
pub use model::counts::{Counts, FlopsPerToken, KvCounts, Part, PartName};
pub use model::hub::{HubModel, preset_by_hub_name};
pub use model::planning::{Indexer, LayerAttention, LinearAttention, PlanningOnly, WeightFormat, WeightFormats};
pub use model::presets::{Preset, preset, presets};
pub use model::scale::Scale;
pub use model::tensors::{DTypeClass, FusedProj, Proj, Role, ScaleInv, TensorSpec};
pub use model::{
    Activation, Attention, Capacity, DropPolicy, Family, Ffn, Gqa, Mla, Mlp, ModelSpec, Moe, QkNorm, Rope, RopeScaling,
    Router, Scoring,
};
pub use presets::{PresetFile, cluster_preset, clusters, gpu_preset, gpus, workload_preset, workloads};
pub use units::Bytes;
pub use workload::{Arrival, SplitMix64, TokenRange, Workload};
