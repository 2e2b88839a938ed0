//! What the world can do wrong to the scheduler. Its own mistakes are assertions.

use crate::SeqId;

/// A refusal of the scheduler. The state is then as it was before the call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SchedError {
    /// A limit that cannot be obeyed.
    #[error("{field} is {value}: {right}")]
    InvalidConfig {
        /// Field of [`SchedulerConfig`](crate::SchedulerConfig).
        field: &'static str,
        /// What it was set to.
        value: usize,
        /// What it must be.
        right: String,
    },
    /// As many requests wait as may wait; come back later.
    #[error("the queue is full: {num_waiting} requests wait, and max_num_waiting is {max_num_waiting}")]
    QueueFull {
        /// Sequences that wait, preempted ones included.
        num_waiting: usize,
        /// The limit.
        max_num_waiting: usize,
    },
    /// A request with no prompt token: there is nothing to compute the first token from.
    #[error("sequence {id}: the prompt is empty; it needs at least one token")]
    EmptyPrompt {
        /// The request.
        id: SeqId,
    },
    /// A request for no token at all.
    #[error("sequence {id}: max_tokens is 0; it must be at least 1")]
    NoTokensAsked {
        /// The request.
        id: SeqId,
    },
    /// A prompt that leaves no room for one generated token.
    #[error("sequence {id}: the prompt has {prompt_tokens} tokens, and max_model_len ({max_model_len}) allows {}", max_model_len - 1)]
    PromptTooLong {
        /// The request.
        id: SeqId,
        /// Tokens of its prompt.
        prompt_tokens: usize,
        /// The limit on prompt and generated tokens together.
        max_model_len: usize,
    },
    /// A sequence with this id is already here.
    #[error("sequence {id} is already waiting or running")]
    DuplicateId {
        /// The id that was given twice.
        id: SeqId,
    },
    /// A request that would not fit the KV cache even if it ran alone.
    #[error("sequence {id}: up to {num_tokens} tokens need {blocks_needed} KV blocks, and the cache has {num_blocks}")]
    NeverFits {
        /// The request.
        id: SeqId,
        /// Tokens of its prompt and the most it may generate.
        num_tokens: usize,
        /// Blocks that its last step would need.
        blocks_needed: usize,
        /// Blocks that there are.
        num_blocks: usize,
    },
    /// A batch was committed or rolled back that is not the one in flight.
    #[error("step {step} cannot be committed or rolled back: {}", match in_flight {
        Some(in_flight) => format!("step {in_flight} is in flight"),
        None => "no step is in flight".into(),
    })]
    NotInFlight {
        /// The step of the batch that was given.
        step: u64,
        /// The step that was scheduled last and is neither committed nor rolled back.
        in_flight: Option<u64>,
    },
    /// The executor did not sample exactly one token for each sequence that samples.
    #[error("step {step}: tokens were due for sequences {expected:?}, and came for {got:?}")]
    WrongSamples {
        /// The step.
        step: u64,
        /// Ids of the sequences whose `samples` is set, sorted.
        expected: Vec<SeqId>,
        /// Ids that the output names, sorted.
        got: Vec<SeqId>,
    },
}
