//! What one iteration of a plan takes.

pub mod dag;
pub mod parts;
