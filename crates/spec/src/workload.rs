//! The workload: which requests are asked.

mod file;
mod requests;

pub use requests::SplitMix64;

/// Requests of one shape or of random shapes.
#[derive(Clone, Debug, PartialEq)]
pub struct Workload {
    /// Its name.
    pub name: String,
    /// Requests.
    pub num_requests: usize,
    /// Tokens of each prompt.
    pub input_tokens: TokenRange,
    /// Tokens of each answer.
    pub output_tokens: TokenRange,
    /// Same seed, same requests.
    pub seed: u64,
    /// When requests arrive. A run has all of them at the start; only a prediction follows this.
    pub arrival: Arrival,
    /// Share of the prompts' tokens whose keys and values are cached already, from 0 to 1. As with `arrival`, only a
    /// prediction follows it; a run finds what it finds.
    pub prefix_hit: f64,
}

/// When requests arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Arrival {
    /// All at the start.
    #[default]
    AtStart,
    /// One by one at random moments, so many a second in the mean (an open loop).
    Poisson {
        /// Rate.
        requests_per_s: f64,
    },
    /// So many users, each of whom asks again when answered (a closed loop).
    Closed {
        /// Requests that are there at a time.
        concurrency: usize,
    },
}

/// A number of tokens, drawn uniformly from `min ..= max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenRange {
    /// Least.
    pub min: usize,
    /// Most.
    pub max: usize,
}
