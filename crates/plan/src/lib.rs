//! What was decided before anything runs. So far: how much memory each part gets.
//!
//! This crate must never search for a decision, and never touch a device.

pub mod memory;

pub use memory::{CannotFit, MemoryLedger, MemoryRequest};
