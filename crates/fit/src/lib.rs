//! Regression for times that were measured: a small network ([`mlp`]) for what many samples have in common, and kriging
//! ([`kriging`]) for what a sample's neighbours say.
//!
//! The runtime learns from it how long its own steps take, the planner how long kernels and collectives of tables take.
//! Random numbers are the caller's, or those of [`random`].
//!
//! This crate must never know what its numbers stand for. It is pure: no file, no clock, no thread; same samples and random
//! numbers, same result, bit by bit.
//!
//! ```
//! use moesaic_fit::{Kriging, Point};
//!
//! let points: Vec<Point> = (0..20).map(|i| Point { at: vec![f64::from(i)], value: f64::from(i).sin() }).collect();
//! let kriging = Kriging::fit(points, &[3.0], None);
//! let between = kriging.predict(&[7.5]);
//! assert!((between.mean - 7.5_f64.sin()).abs() < 0.05 && between.distance > 0.0);
//! ```

pub mod kriging;
pub mod mlp;
pub mod random;

pub use kriging::{Estimate, Kriging, Point};
pub use mlp::{Mlp, Sample, Training};
