//! Strategies side by side: as data, JSON, Markdown, text for a terminal, and one HTML page that needs nothing else.

mod facts;
pub(crate) mod format;
mod html;
mod markdown;
mod plots;
mod tables;
mod text;
mod timeline;

use serde::{Deserialize, Serialize};

pub use facts::{ClusterFacts, ModelFacts, WorkloadFacts};
pub use timeline::{Activity, Timeline, TimelineRow, TimelineSpan};

use crate::PlannerError;
use crate::metrics::{Communication, ExpertLoad, Imbalance, Performance, RankMemory};

/// Version of the format.
pub const VERSION: u32 = 1;

/// What all forms of the report say about their times.
pub const ABOUT_TIMES: &str = "All times are of a virtual clock: every op and every message that was executed is priced for the \
     named cluster (ops by a roofline, messages by latency and bandwidth of shared links), from the routing that really \
     happened. Nothing was measured on that cluster.";

/// Strategies for one model, one cluster, one workload.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// [`VERSION`].
    pub version: u32,
    /// What was run.
    pub model: ModelFacts,
    /// What it was priced for.
    pub cluster: ClusterFacts,
    /// What was asked.
    pub workload: WorkloadFacts,
    /// In the order in which they are shown.
    pub strategies: Vec<StrategyReport>,
    /// Whatever concerns all of them.
    pub notes: Vec<String>,
}

/// One strategy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StrategyReport {
    /// Short, for the heads of columns.
    pub name: String,
    /// In words.
    pub description: String,
    /// One of the ordinary ways, against which others are held.
    pub baseline: bool,
    /// Ranks.
    pub ranks: usize,
    /// How fast, and how well used.
    pub performance: Performance,
    /// Who talked about what.
    pub communication: Communication,
    /// By rank.
    pub memory: Vec<RankMemory>,
    /// Tokens by layer and expert; `None` where experts were not counted.
    pub expert_load: Option<ExpertLoad>,
    /// One step.
    pub timeline: Option<Timeline>,
    /// Held against one rank; `None` where it was not.
    pub sameness: Option<Sameness>,
    /// Of an exchange in 8 bits.
    pub exchange_error: Option<ExchangeError>,
    /// Of experts that moved.
    pub balance: Option<BalanceReport>,
    /// Of micro-batches that were chosen by predictions.
    pub synchronizer: Option<SynchronizerReport>,
    /// Whatever else must be known.
    pub notes: Vec<String>,
}

/// Results held against those of one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sameness {
    /// Answers that were compared.
    pub answers: u64,
    /// Those that have another token somewhere.
    pub differing_answers: u64,
    /// Tokens that were compared.
    pub tokens: u64,
    /// Those that differ.
    pub differing_tokens: u64,
    /// Greatest absolute difference of a token's log-probability, over the tokens before each answer's first difference.
    pub max_logprob_difference: f64,
    /// Where an answer's first difference is: the greatest distance there, on one rank, of the log-probabilities of its two
    /// likeliest tokens. Near 0 one rank was undecided. Absent where no answer differs.
    pub widest_gap: Option<f64>,
}

impl Sameness {
    /// Every token and every bit.
    pub fn bit_identical(&self) -> bool {
        self.differing_tokens == 0 && self.max_logprob_difference == 0.0
    }
}

/// What an exchange in 8 bits loses.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ExchangeError {
    /// `int8` or `fp8`.
    pub precision: String,
    /// ‖received − exact‖ / ‖exact‖, over everything exchanged.
    pub relative: f64,
}

/// What moving experts did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BalanceReport {
    /// Load of ranks before the first move.
    pub before: Imbalance,
    /// After the last.
    pub after: Imbalance,
    /// Experts moved or replicated.
    pub moves: u64,
    /// Weights sent.
    pub bytes_moved: u64,
    /// Time for which their links were occupied, seconds.
    pub seconds: f64,
}

/// How well the time of a pool of ranks is predicted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SynchronizerReport {
    /// Median of |predicted − real| / real of the 3-layer MLP, on samples that it was not trained on; absent while there were too
    /// few to train it.
    pub mlp_error: Option<f64>,
    /// Of the linear model `T = k₁ b + k₂`.
    pub linear_error: f64,
    /// Times that micro-batches were chosen anew.
    pub choices: u64,
    /// The MLP was the better one at last, and used.
    pub mlp_used: bool,
}

impl StrategyReport {
    /// What of the answers is as on one rank, in a word or two.
    pub(crate) fn verdict(&self) -> String {
        match &self.sameness {
            None => "not compared".to_owned(),
            Some(same) if same.bit_identical() => "every bit".to_owned(),
            Some(same) if same.differing_tokens == 0 => "every token".to_owned(),
            Some(same) => format!("{} of {}", same.answers - same.differing_answers, same.answers),
        }
    }

    /// What was verified and how fast it is, for a line of progress.
    pub fn summary(&self) -> String {
        let verdict = match &self.sameness {
            None => self.verdict(),
            Some(same) if same.differing_tokens == 0 => format!("{} as one rank", self.verdict()),
            Some(_) => format!("{} answers as one rank", self.verdict()),
        };
        let Performance { tpot_ms, ttft_ms, .. } = &self.performance;
        let (name, time) = if tpot_ms.mean > 0.0 { ("TPOT", tpot_ms) } else { ("TTFT", ttft_ms) };
        format!("{verdict:<28}  {name} {} ms", format::number(time.mean))
    }
}

impl Comparison {
    /// Nothing compared yet.
    pub fn new(model: ModelFacts, cluster: ClusterFacts, workload: WorkloadFacts) -> Comparison {
        Comparison { version: VERSION, model, cluster, workload, strategies: Vec::new(), notes: Vec::new() }
    }

    /// Everything, on one line.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("reports have string keys only") + "\n"
    }

    /// What [`Comparison::to_json`] wrote.
    pub fn from_json(text: &str) -> Result<Comparison, PlannerError> {
        let wrong = |why: String| PlannerError::NotAComparison { expected: VERSION, why };
        let comparison: Comparison = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
        if comparison.version != VERSION {
            return Err(wrong(format!("version is {}", comparison.version)));
        }
        Ok(comparison)
    }

    /// Tables for a terminal of 100 columns.
    pub fn to_text(&self) -> String {
        text::render(self)
    }

    /// Tables in Markdown.
    pub fn to_markdown(&self) -> String {
        markdown::render(self)
    }

    /// A page with tables and plots that needs no other file, no network and no script.
    pub fn to_html(&self) -> String {
        html::render(self)
    }

    /// One sentence of what this is about.
    pub(crate) fn title(&self) -> String {
        let ways = match self.strategies.len() {
            1 => "one way to spread it".to_owned(),
            count => format!("{count} ways to spread it"),
        };
        format!("{} on {}: {ways}", self.model.name, self.cluster.name)
    }
}
