//! The papers that the project comes from: their figures held against what is predicted on their hardware and against what
//! bytes and operations allow.
//!
//! One file a paper has its claims: where in the text, what, the figure as written, and which question predicts it
//! ([`lab`]), under each reading of what the text leaves open. Bounds are closed forms on peak figures ([`physics`]), and
//! share nothing with the prices. One rule makes a verdict of claimed, predicted and possible ([`verdict`]); where a claim is
//! not met, a small search says where it would be ([`regime`]). Figures of one text are held against each other, too
//! ([`check`]). Nothing is tuned towards a claim, and nothing depends on today's prices: whoever changes these runs
//! `moesaic reproduce` again.

pub mod check;
pub mod claim;
mod deployments;
pub mod lab;
mod ma_separation;
mod markdown;
mod paper_000;
mod paper_001;
mod paper_002;
mod paper_003;
mod paper_004;
pub mod physics;
pub mod plot;
pub mod regime;
mod text;
pub mod verdict;

use serde::Serialize;

use crate::PlannerError;
use check::Check;
use claim::Finding;
use plot::{Bars, Plot};

pub use markdown::markdown;
pub use text::text;

/// All that there are.
pub const NAMES: [&str; 5] = ["000", "001", "002", "003", "004"];

/// One paper.
#[derive(Clone, Debug, Serialize)]
pub struct Paper {
    /// `000`.
    pub name: &'static str,
    /// What it proposes.
    pub title: &'static str,
    /// The hardware that its figures are predicted on.
    pub hardware: String,
    /// What the text leaves open and is assumed throughout.
    pub assumptions: Vec<&'static str>,
    /// Its claims.
    pub findings: Vec<Finding>,
    /// Its figures against each other.
    pub checks: Vec<Check>,
    /// Lines over a size.
    pub plots: Vec<Plot>,
    /// Shares of a whole.
    pub bars: Vec<Bars>,
}

/// A paper by name.
///
/// # Errors
/// [`PlannerError::UnknownPaper`].
pub fn reproduce(name: &str) -> Result<Paper, PlannerError> {
    match name {
        "000" => paper_000::paper(),
        "001" => paper_001::paper(),
        "002" => paper_002::paper(),
        "003" => paper_003::paper(),
        "004" => paper_004::paper(),
        _ => Err(PlannerError::UnknownPaper { name: name.to_owned(), known: NAMES.join(", ") }),
    }
}
