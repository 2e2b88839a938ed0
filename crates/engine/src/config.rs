//! Settings of one engine; names as in vLLM.

use std::time::Duration;

use moesaic_device::Isa;
use moesaic_model::LoadDType;
use moesaic_spec::Bytes;

/// How many, how long, with how much.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Sequences that run at a time.
    pub max_num_seqs: usize,
    /// Tokens of one step; longer prompts are cut into chunks.
    pub max_num_batched_tokens: usize,
    /// Longest sequence (prompt and answer); the model's own limit when `None`.
    pub max_model_len: Option<usize>,
    /// Requests that may wait.
    pub max_num_waiting: usize,
    /// Tokens a KV block.
    pub block_size: usize,
    /// Share KV blocks of equal prefixes.
    pub enable_prefix_caching: bool,
    /// Cut prompts into chunks beside decoding.
    pub enable_chunked_prefill: bool,
    /// Threads of one rank; the usable cores shared out when `None`.
    pub num_threads: Option<usize>,
    /// Instruction set of the kernels, at most what the machine has; `MOESAIC_ISA` or the best when `None`.
    pub isa: Option<Isa>,
    /// Share of the available memory that may be used.
    pub memory_utilization: f64,
    /// Memory that may be used, instead of a share of what is available.
    pub memory_limit: Option<Bytes>,
    /// Size of the KV cache; what the sequences need when `None`.
    pub kv_cache: Option<Bytes>,
    /// Type of the weights in memory.
    pub dtype: LoadDType,
    /// Compute and keep the logits of every position (for parity checks).
    pub keep_logits: bool,
    /// Keep every op and message of the last step (ranks in this process only).
    pub record_calls: bool,
    /// Measure the processor time of every action.
    pub measure: bool,
    /// Record which experts the same tokens chose.
    pub record_routing: bool,
    /// Somebody else says what pools of ranks took ([`Adaptation::observe_times`](crate::Adaptation::observe_times));
    /// otherwise ranks measure it where a plan keeps pools in step.
    pub external_times: bool,
    /// Longest that a rank waits for another.
    pub deadline: Duration,
}

impl Default for EngineConfig {
    fn default() -> EngineConfig {
        EngineConfig {
            max_num_seqs: 16,
            max_num_batched_tokens: 2048,
            max_model_len: None,
            max_num_waiting: 1024,
            block_size: 32,
            enable_prefix_caching: true,
            enable_chunked_prefill: true,
            num_threads: None,
            isa: None,
            memory_utilization: 0.9,
            memory_limit: None,
            kv_cache: None,
            dtype: LoadDType::Auto,
            keep_logits: false,
            record_calls: false,
            measure: false,
            record_routing: false,
            external_times: false,
            deadline: Duration::from_secs(60),
        }
    }
}
