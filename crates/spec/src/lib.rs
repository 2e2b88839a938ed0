//! What is given: the model. (Clusters and workloads will join it here.)
//!
//! This crate reads descriptions and checks them; it decides nothing, and knows no tensor, no device and no file but
//! the text that it is handed.

pub mod dtype;
pub mod error;
pub mod model;
mod nearest;
pub mod units;

pub use dtype::DType;
pub use error::SpecError;
pub use model::tensors::{DTypeClass, FusedProj, Proj, Role, ScaleInv, TensorSpec};
pub use model::{
    Activation, Attention, Capacity, DropPolicy, Family, Ffn, Gqa, Mla, Mlp, ModelSpec, Moe, QkNorm, Rope, RopeScaling,
    Router, Scoring,
};
pub use units::Bytes;
