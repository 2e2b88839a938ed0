//! Prices for what ranks do, on any cluster.
//!
//! This crate must never be imported by what runs a model, and needs no device.
