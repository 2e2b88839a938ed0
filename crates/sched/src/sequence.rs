//! One request and how far it is.

use std::fmt;

use crate::{BlockId, FinishReason};

/// Names a sequence. The caller chooses it; it may be used again once the sequence is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SeqId(pub u64);

impl fmt::Display for SeqId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What is asked of the scheduler. How tokens are sampled is not its business.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeqRequest {
    /// The sequence's name, unique among those that wait or run.
    pub id: SeqId,
    /// Token ids; at least one, fewer than `max_model_len`.
    pub prompt: Vec<u32>,
    /// The most tokens to generate; at least 1. More than `max_model_len` leaves room for is cut to that.
    pub max_tokens: usize,
    /// Tokens that end the sequence once sampled. A caller puts the model's end-of-sequence tokens here, unless it
    /// ignores them: the scheduler knows of no other stop.
    pub stop_token_ids: Vec<u32>,
    /// KV blocks are shared only among sequences of equal salt, one for each tenant: otherwise the time to the first
    /// token would tell one tenant what another has asked.
    pub cache_salt: u64,
}

/// A sequence that waits or runs.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SeqId,
    /// Order of `add`; the smallest is the oldest.
    pub(crate) arrival: u64,
    /// Prompt, then generated tokens.
    pub(crate) tokens: Vec<u32>,
    pub(crate) num_prompt_tokens: usize,
    /// `tokens` never grows beyond this.
    pub(crate) max_len: usize,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) cache_salt: u64,
    /// Leading tokens whose KV is in the blocks of `block_table`.
    pub(crate) num_computed: usize,
    /// Tokens after those that run in the step in flight; 0 when there is none.
    pub(crate) num_scheduled: usize,
    /// Blocks held. At least what `num_computed + num_scheduled` tokens need.
    pub(crate) block_table: Vec<BlockId>,
    /// Leading blocks of `block_table` that the prefix tree knows: full, computed, never written again.
    pub(crate) num_cached_blocks: usize,
    pub(crate) was_preempted: bool,
}

impl Sequence {
    pub(crate) fn new(request: SeqRequest, arrival: u64, max_model_len: usize) -> Self {
        let num_prompt_tokens = request.prompt.len();
        Self {
            id: request.id,
            arrival,
            tokens: request.prompt,
            num_prompt_tokens,
            max_len: num_prompt_tokens.saturating_add(request.max_tokens).min(max_model_len),
            stop_token_ids: request.stop_token_ids,
            cache_salt: request.cache_salt,
            num_computed: 0,
            num_scheduled: 0,
            block_table: Vec::new(),
            num_cached_blocks: 0,
            was_preempted: false,
        }
    }

    /// Tokens that have no KV yet: the rest of the prompt, or the one sampled last.
    pub(crate) fn num_uncomputed(&self) -> usize {
        self.tokens.len() - self.num_computed
    }

    pub(crate) fn num_generated(&self) -> usize {
        self.tokens.len() - self.num_prompt_tokens
    }

    /// Tokens in the KV cache at the last step: the very last token is sampled and never run.
    pub(crate) fn max_kv_tokens(&self) -> usize {
        self.max_len - 1
    }

    /// Whether the step in flight reaches the last known token, so that the next one is sampled.
    pub(crate) fn samples(&self) -> bool {
        self.num_scheduled == self.num_uncomputed()
    }

    /// Why the sequence is over, judged by its last token, which was just sampled.
    pub(crate) fn finish_reason(&self) -> Option<FinishReason> {
        let token = *self.tokens.last().expect("a prompt is never empty");
        if self.stop_token_ids.contains(&token) {
            Some(FinishReason::Stop { token })
        } else if self.tokens.len() == self.max_len {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}
