//! One folder an op: its contract (shapes, element types, work), a plain reference that a reader believes, and fast
//! paths chosen at run time.
//!
//! Every op does three things: it checks its contract, records one [`OpCall`](moesaic_device::OpCall), and does the work;
//! on [`Device::Meta`](moesaic_device::Device::Meta) there is no third step.
//!
//! This crate must never know a model or a rank.
//!
//! Letters of all contracts: `T` tokens (rows of this step), `D` model width, `N`, `K` of a matrix `[N, K]`, `H` heads,
//! `G` key/value heads, `C` head width, `E` experts, `A` experts per token, `R` routed rows (`T * A` less the dropped), `F`
//! hidden width of an expert, `V` vocabulary, `S` sequences.
//!
//! **Numbers.** Between ops, activations are in the compute type of the model (F32 or BF16); the residual stream, logits
//! and everything inside an op are F32. A row's result never depends on the other rows of a step: every sum has an order
//! that is fixed by the row's own sizes, whichever path computes it.

pub mod add;
pub mod add_rms_norm;
#[cfg(target_arch = "x86_64")]
mod amx;
pub mod attention;
pub mod cols;
pub mod combine;
pub mod contract;
pub mod dispatch;
mod elementwise;
pub mod embedding;
pub mod experts;
pub mod gather_rows;
pub mod head_linear;
mod lanes;
pub mod linear;
pub mod math;
pub mod matrix;
pub mod mla;
pub mod paged;
pub mod philox;
pub mod quantize;
pub mod rms_norm;
pub mod rope;
pub mod router;
mod rows;
pub mod sampler;

#[cfg(test)]
mod testing;

pub use cols::Cols;
pub use contract::KernelError;
