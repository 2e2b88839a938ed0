//! The scheduler from outside: its policy as small scripts, its promises as properties.

mod failures;
mod fake_model;
mod policy;
mod properties;
