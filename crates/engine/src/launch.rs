//! From a description and weights to an engine: settle the memory, then take it, then load.

use std::sync::Arc;

use moesaic_device::{Arena, Ctx, Isa, Pool, env, machine};
use moesaic_model::checkpoint::RandomWeights;
use moesaic_model::{Checkpoint, KvCache, MetaModel, SeqShape, Transformer, WeightSource};
use moesaic_plan::{MemoryLedger, MemoryRequest};
use moesaic_sched::{Scheduler, SchedulerConfig};
use moesaic_spec::{Bytes, ModelSpec};

use crate::{Engine, EngineConfig, EngineError, Rank};

/// Kernel scratch and stacks of one thread.
const THREAD_WORKSPACE_BYTES: u64 = 8 << 20;

/// Where the weights of an engine come from.
pub enum Launch<'a> {
    /// A model folder.
    Checkpoint(&'a Checkpoint),
    /// Random weights (`--load-format dummy`).
    Random(RandomWeights),
}

/// Builds an engine. Nothing large is allocated before the ledger is settled; `progress` is told the bytes loaded so far.
pub fn launch(
    spec: &ModelSpec,
    weights: &Launch,
    config: &EngineConfig,
    progress: impl FnMut(u64),
) -> Result<Engine, EngineError> {
    let num_threads = match config.num_threads.or(env::num_threads()?) {
        Some(num_threads) => num_threads,
        None => machine::num_usable_cores(),
    };
    // Workers wait hot, so more of them than cores only stand in each other's way; a few times as many are for tests.
    let most_threads = (4 * machine::num_usable_cores()).max(64);
    if num_threads > most_threads {
        return Err(EngineError::Invalid {
            field: "num_threads",
            value: num_threads.to_string(),
            right: format!("1 to {most_threads} is right on this machine"),
        });
    }
    let isa = match config.isa {
        Some(isa) => usable(isa)?,
        None => Isa::from_env()?,
    };
    let max_model_len = max_model_len(spec, config)?;
    if let Launch::Checkpoint(checkpoint) = weights {
        checkpoint.check(spec)?;
    }
    let meta = MetaModel::new(spec, config.dtype, max_model_len)?;
    let compute_dtype = meta.transformer().compute_dtype();
    let ledger = MemoryLedger::settle(&MemoryRequest {
        // Where the system does not tell what is left, it is asked for what is needed and may refuse.
        budget: config.memory_limit.unwrap_or_else(|| {
            let available = machine::available_memory().unwrap_or(Bytes(u64::MAX >> 1));
            Bytes((available.0 as f64 * config.memory_utilization) as u64)
        }),
        weights: meta.weight_bytes,
        activations: activation_bound(&meta, config, max_model_len)?,
        position_bytes: meta.transformer().position_bytes(),
        workspace: Bytes(num_threads as u64 * (THREAD_WORKSPACE_BYTES + 16 * spec.vocab_size as u64)),
        block_bytes: KvCache::block_bytes(&spec.attention, spec.layers.len(), compute_dtype, config.block_size)?,
        block_size: config.block_size,
        max_model_len,
        max_num_seqs: config.max_num_seqs,
        kv_cache: config.kv_cache,
    })?;

    let pool = Arc::new(Pool::new(num_threads)?);
    let weight_arena = Arena::host("weight", Bytes(ledger.weights_bytes))?;
    let kv_arena = Arena::host("kv", Bytes(ledger.kv_cache_bytes))?;
    let activation_arena = Arena::host("activation", Bytes(ledger.activations_bytes))?;
    let (attention, num_layers) = (&spec.attention, spec.layers.len());
    let kv = KvCache::new(&kv_arena, attention, num_layers, compute_dtype, ledger.num_blocks, ledger.block_size)?;
    let source = match weights {
        Launch::Checkpoint(checkpoint) => {
            WeightSource::checkpoint(spec, config.dtype, &weight_arena, &pool, checkpoint)
        }
        Launch::Random(random) => WeightSource::random(spec, config.dtype, &weight_arena, &pool, random),
    };
    let transformer = Transformer::load(&source.on_progress(progress), max_model_len)?;

    let scheduler = Scheduler::new(SchedulerConfig {
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens,
        max_model_len,
        block_size: config.block_size,
        num_blocks: ledger.num_blocks,
        max_num_waiting: config.max_num_waiting,
        // Kept logits are of every position, so every position must be computed.
        enable_prefix_caching: config.enable_prefix_caching && !config.keep_logits,
        enable_chunked_prefill: config.enable_chunked_prefill,
    })?;
    let ctx = Ctx::cpu_with(activation_arena, pool, isa);
    Ok(Engine::new(scheduler, Rank::new(ctx, transformer, kv, config.keep_logits), ledger))
}

fn usable(isa: Isa) -> Result<Isa, EngineError> {
    let best = Isa::detect();
    let right = || format!("this machine runs {best} and what is below it");
    if isa > best {
        return Err(EngineError::Invalid { field: "isa", value: isa.to_string(), right: right() });
    }
    Ok(isa)
}

fn max_model_len(spec: &ModelSpec, config: &EngineConfig) -> Result<usize, EngineError> {
    let limit = spec.max_position_embeddings;
    match config.max_model_len {
        None => Ok(limit),
        Some(len) if (1..=limit).contains(&len) => Ok(len),
        Some(len) => Err(EngineError::Invalid {
            field: "max_model_len",
            value: len.to_string(),
            right: format!("1 to the model's max_position_embeddings {limit} is right"),
        }),
    }
}

/// An activation arena that is large enough for every step that the scheduler can ask for: what suffices for a step with as
/// many tokens as there can be, beside as many sequences as can decode at their longest, all of them sampled. No tensor of
/// another step is larger.
fn activation_bound(meta: &MetaModel, config: &EngineConfig, max_model_len: usize) -> Result<Bytes, EngineError> {
    let num_tokens = config.max_num_batched_tokens.min(config.max_num_seqs.saturating_mul(max_model_len));
    let num_decodes = config.max_num_seqs.min(num_tokens);
    let decode = SeqShape { num_tokens: 1, context_len: max_model_len, samples: true };
    let mut shape = vec![decode; num_decodes];
    let mut left = num_tokens - num_decodes;
    while left > 0 {
        let num_tokens = left.min(max_model_len);
        shape.push(SeqShape { num_tokens, context_len: max_model_len, samples: false });
        left -= num_tokens;
    }
    // One block a sequence: no activation depends on how the cache is cut, and a table of a long context is long.
    let block_size = max_model_len.next_multiple_of(8);
    Ok(meta.activation_bound(&shape, block_size, config.keep_logits)?)
}
