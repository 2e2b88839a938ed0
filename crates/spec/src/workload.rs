//! The workload: which requests are asked.

mod file;
mod requests;

/// Requests of one shape or of random shapes, all there at the start.
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
}

/// A number of tokens, drawn uniformly from `min ..= max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenRange {
    /// Least.
    pub min: usize,
    /// Most.
    pub max: usize,
}
