//! What goes to the executor for one step, and what comes back. Plain data.

use crate::{BlockId, SeqId};

/// The work of one step. Decodes come first, then prefill chunks; both in order of arrival.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepBatch {
    /// Number of the step, counted from 0 over all steps that had work.
    pub step: u64,
    /// The sequences that run; empty only when the scheduler is idle.
    pub seqs: Vec<ScheduledSeq>,
    /// Sequences that lost their blocks before this step, to be computed again later. For metrics: an executor keeps no
    /// state that it would have to drop.
    pub preempted: Vec<SeqId>,
}

impl StepBatch {
    /// Tokens that run in this step.
    pub fn num_tokens(&self) -> usize {
        self.seqs.iter().map(|seq| seq.token_ids.len()).sum()
    }
}

/// One sequence's share of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScheduledSeq {
    /// Whose tokens these are.
    pub id: SeqId,
    /// The tokens to run; at least one. They take the positions `start..start + token_ids.len()`.
    pub token_ids: Vec<u32>,
    /// Position of the first of them, which is the number of tokens whose KV is already there. In a sequence's first
    /// batch it is the number of prompt tokens that the prefix cache had.
    pub start: usize,
    /// The blocks of positions `0..start + token_ids.len()`, in order: position `p` is slot `p % block_size` of block
    /// `block_table[p / block_size]`. An earlier step may have named another block for the same prefix: the table counts
    /// anew in each step.
    pub block_table: Vec<BlockId>,
    /// Whether the last of the tokens is the last one known, so that a token is sampled after it.
    pub samples: bool,
    /// Tokens that the sequence has generated: the output index of the token that would be sampled. It goes on where it
    /// was after a preemption, so a sampler that is a function of (seed, index) does not notice one.
    pub num_generated: usize,
}

/// What a step yields.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepOutput {
    /// One token for each sequence of the batch whose `samples` is set, in any order.
    pub sampled: Vec<(SeqId, u32)>,
}

/// A token that a sequence has gained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeqUpdate {
    /// Whose token it is.
    pub id: SeqId,
    /// The token.
    pub token: u32,
    /// Set when it was the last: the sequence is gone from the scheduler.
    pub finish: Option<FinishReason>,
}

/// Why a sequence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// This one of its stop tokens was sampled.
    Stop {
        /// The stop token, which is also the update's token.
        token: u32,
    },
    /// It has `max_tokens` generated tokens, or `max_model_len` tokens in all.
    Length,
}
