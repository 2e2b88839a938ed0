//! The planner against what others measured: served models ([`served`](crate::calibration::served)) and ops ([`ops`]), from files that it may never have
//! seen, or against the published rows that it knows, each held out once.
//!
//! A file is refused where a value cannot be; a row whose model, system or program is not known is passed over, and the report
//! says so. Errors are `|predicted / measured - 1|`.

pub mod ops;
pub mod outcome;
pub mod page;
pub mod report;
pub mod score;

pub use report::Validation;
