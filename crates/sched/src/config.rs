//! The scheduler's limits.

use crate::SchedError;

/// The limits of a [`Scheduler`](crate::Scheduler), named as vLLM names them. Nothing grows beyond them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Sequences that may run in one step.
    pub max_num_seqs: usize,
    /// Tokens that may run in one step, decodes and prefill chunks together.
    pub max_num_batched_tokens: usize,
    /// Tokens of the longest sequence, prompt and generated together; one that reaches it ends with `Length`.
    pub max_model_len: usize,
    /// Tokens of one KV block.
    pub block_size: usize,
    /// Blocks of the KV cache. They may be fewer than `max_model_len` needs: then a request that could not run even
    /// alone is refused when it is added.
    pub num_blocks: usize,
    /// Requests that may wait. Beyond it `add` refuses; preempted sequences, at most `max_num_seqs`, wait on top of it.
    pub max_num_waiting: usize,
    /// Whether full blocks are kept, after and between their users, for prompts that begin in the same way.
    pub enable_prefix_caching: bool,
    /// Whether a prefill that exceeds the rest of the token budget is cut. Otherwise it waits for a step with room.
    pub enable_chunked_prefill: bool,
}

impl SchedulerConfig {
    /// Checks the limits against one another.
    ///
    /// # Errors
    /// [`SchedError::InvalidConfig`] for the first field that cannot be obeyed.
    pub fn validate(&self) -> Result<(), SchedError> {
        let at_least_one = [
            ("max_num_seqs", self.max_num_seqs),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("block_size", self.block_size),
            ("num_blocks", self.num_blocks),
            ("max_num_waiting", self.max_num_waiting),
        ];
        for (field, value) in at_least_one {
            if value == 0 {
                return Err(SchedError::InvalidConfig { field, value, right: "it must be at least 1".into() });
            }
        }
        if self.max_model_len < 2 {
            return Err(SchedError::InvalidConfig {
                field: "max_model_len",
                value: self.max_model_len,
                right: "it must be at least 2, one prompt token and one generated".into(),
            });
        }
        if self.num_blocks > u32::MAX as usize {
            return Err(SchedError::InvalidConfig {
                field: "num_blocks",
                value: self.num_blocks,
                right: format!("it must be at most {}, the largest block id", u32::MAX),
            });
        }
        // Then every running sequence has its decode token in each step, and the oldest is never without one.
        if self.max_num_batched_tokens < self.max_num_seqs {
            return Err(SchedError::InvalidConfig {
                field: "max_num_batched_tokens",
                value: self.max_num_batched_tokens,
                right: format!(
                    "it must be at least max_num_seqs ({}), one token for each running sequence",
                    self.max_num_seqs
                ),
            });
        }
        if !self.enable_chunked_prefill && self.max_num_batched_tokens < self.max_model_len {
            return Err(SchedError::InvalidConfig {
                field: "max_num_batched_tokens",
                value: self.max_num_batched_tokens,
                right: format!(
                    "without chunked prefill it must be at least max_model_len ({}), so that the longest prompt fits \
                     one step",
                    self.max_model_len
                ),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid() -> SchedulerConfig {
        SchedulerConfig {
            max_num_seqs: 4,
            max_num_batched_tokens: 8,
            max_model_len: 16,
            block_size: 4,
            num_blocks: 8,
            max_num_waiting: 2,
            enable_prefix_caching: true,
            enable_chunked_prefill: true,
        }
    }

    #[test]
    fn limits_that_cannot_be_obeyed_are_refused_with_a_sentence() {
        let sentence = |config: SchedulerConfig| config.validate().unwrap_err().to_string();
        assert_eq!(valid().validate(), Ok(()));
        assert_eq!(sentence(SchedulerConfig { block_size: 0, ..valid() }), "block_size is 0: it must be at least 1");
        assert_eq!(
            sentence(SchedulerConfig { max_model_len: 1, ..valid() }),
            "max_model_len is 1: it must be at least 2, one prompt token and one generated"
        );
        assert_eq!(
            sentence(SchedulerConfig { max_num_seqs: 9, ..valid() }),
            "max_num_batched_tokens is 8: it must be at least max_num_seqs (9), one token for each running sequence"
        );
        assert_eq!(
            sentence(SchedulerConfig { enable_chunked_prefill: false, ..valid() }),
            "max_num_batched_tokens is 8: without chunked prefill it must be at least max_model_len (16), so that the \
             longest prompt fits one step"
        );
    }
}
