//! From a description and weights to an engine: settle the memory, then take it, then load.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use moesaic_comm::{Communicator, Solo, in_process, process};
use moesaic_device::{Arena, Ctx, Isa, Pool, env, machine};
use moesaic_model::checkpoint::RandomWeights;
use moesaic_model::{
    Checkpoint, KvCache, LoadDType, MetaModel, ModelError, PartCache, SeqShape, StepShape, Transformer, WeightSource,
};
use moesaic_plan::{MemoryLedger, MemoryRequest, Plan, Rank as RankId};
use moesaic_sched::{Scheduler, SchedulerConfig};
use moesaic_spec::{Bytes, ModelSpec};
use serde::{Deserialize, Serialize};

use crate::executor::Executor;
use crate::migrate::Migration;
use crate::rank::{RankOptions, RankParts};
use crate::world::{Places, Processes, RankProcess, Threads, World};
use crate::{Engine, EngineConfig, EngineError, Rank};

/// Kernel scratch and stacks of one thread.
const THREAD_WORKSPACE_BYTES: u64 = 8 << 20;

/// How long processes wait for each other at the start, when some may load more than others.
const JOIN_DEADLINE: Duration = Duration::from_secs(600);

/// Where the weights of an engine come from.
pub enum Launch<'a> {
    /// A model folder.
    Checkpoint(&'a Checkpoint),
    /// Random weights (`--load-format dummy`).
    Random(RandomWeights),
}

/// Where the ranks of a plan run.
pub enum Ranks<'a> {
    /// In threads of this process; a single rank in the caller's own.
    Threads,
    /// In processes of this machine, which this starts.
    Processes(&'a RankProcess<'a>),
}

/// An engine of one rank. Nothing large is allocated before the ledger is settled; `progress` is told the bytes loaded so
/// far.
pub fn launch(
    spec: &ModelSpec,
    weights: &Launch,
    config: &EngineConfig,
    progress: impl FnMut(u64),
) -> Result<Engine, EngineError> {
    launch_plan(spec, weights, &Arc::new(Plan::single(spec)), config, Ranks::Threads, progress)
}

/// An engine of all ranks of a plan, on this machine.
pub fn launch_plan(
    spec: &ModelSpec,
    weights: &Launch,
    plan: &Arc<Plan>,
    config: &EngineConfig,
    ranks: Ranks,
    progress: impl FnMut(u64),
) -> Result<Engine, EngineError> {
    spec.require_runnable().map_err(ModelError::from)?;
    let num_threads = num_threads(plan, config)?;
    let isa = match config.isa {
        Some(isa) => usable(isa)?,
        None => Isa::from_env()?,
    };
    let max_model_len = max_model_len(spec, config)?;
    if let Launch::Checkpoint(checkpoint) = weights {
        checkpoint.check(spec)?;
    }
    let sizes = rank_sizes(spec, plan, config, max_model_len, num_threads)?;
    let together = matches!(ranks, Ranks::Threads);
    let ledger = settle(spec, plan, config, &sizes, together)?;
    let sched = SchedulerConfig {
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens,
        max_model_len,
        block_size: config.block_size,
        num_blocks: ledger.num_blocks,
        max_num_waiting: config.max_num_waiting,
        // Kept logits are of every position, so every position must be computed.
        enable_prefix_caching: config.enable_prefix_caching && !config.keep_logits,
        enable_chunked_prefill: config.enable_chunked_prefill,
    };
    let schedulers = (0..plan.num_groups()).map(|_| Scheduler::new(sched.clone())).collect::<Result<Vec<_>, _>>()?;
    // Random: the keys of a fresh hasher are.
    let session = std::hash::RandomState::new().build_hasher().finish();
    let setup = |rank: RankId| RankSetup {
        rank,
        session,
        plan: plan.as_ref().clone(),
        dtype: config.dtype,
        isa: isa.to_string(),
        num_threads,
        max_model_len,
        block_size: config.block_size,
        num_blocks: ledger.num_blocks,
        sizes: sizes[rank.idx()],
        options: RankOptions {
            record_routing: config.record_routing,
            keep_logits: config.keep_logits,
            record_calls: config.record_calls,
            measure: config.measure || (plan.file.synchronize.is_some() && !config.external_times),
        },
        deadline_ms: config.deadline.as_millis() as u64,
    };
    let places = match ranks {
        Ranks::Threads => thread_ranks(spec, weights, plan, &setup, &ledger, progress)?,
        Ranks::Processes(spawn) => {
            let setups: Vec<RankSetup> = (0..plan.world_size() as u32).map(|rank| setup(RankId(rank))).collect();
            Places::Processes(Processes::start(&setups, spawn, step_deadline(config.deadline))?)
        }
    };
    Ok(Engine::new(schedulers, Executor::new(World::new(places), plan.clone(), spec, config), ledger, spec.clone()))
}

/// Ranks notice a wait that ran out before the leader loses patience with them.
fn step_deadline(wait: Duration) -> Duration {
    wait + wait / 2 + Duration::from_secs(2)
}

/// Threads of one rank: as asked, or the cores shared out.
fn num_threads(plan: &Plan, config: &EngineConfig) -> Result<usize, EngineError> {
    let num_threads = match config.num_threads.or(env::num_threads()?) {
        Some(num_threads) => num_threads,
        None => (machine::num_usable_cores() / plan.world_size()).max(1),
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
    Ok(num_threads)
}

/// Everything that the process of a rank must know.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct RankSetup {
    pub rank: RankId,
    /// Tells this run's ranks from another's.
    pub session: u64,
    pub plan: Plan,
    pub dtype: LoadDType,
    pub isa: String,
    pub num_threads: usize,
    pub max_model_len: usize,
    pub block_size: usize,
    pub num_blocks: usize,
    pub sizes: RankSizes,
    pub options: RankOptions,
    pub deadline_ms: u64,
}

/// Memory that one rank needs, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RankSizes {
    pub weights: u64,
    pub position: u64,
    pub activations: u64,
    pub exchange: u64,
    /// For experts that arrive while others are still in use.
    pub staging: u64,
    pub workspace: u64,
    pub block: u64,
}

fn rank_sizes(
    spec: &ModelSpec,
    plan: &Arc<Plan>,
    config: &EngineConfig,
    max_model_len: usize,
    num_threads: usize,
) -> Result<Vec<RankSizes>, EngineError> {
    let shape = largest_step(config, max_model_len);
    let num_micro_batches = match plan.file.synchronize {
        Some(_) => moesaic_plan::plan::MAX_MICRO_BATCHES,
        None => plan.file.micro_batches,
    };
    // Many ranks have parts of the same kind.
    let mut known: HashMap<String, RankSizes> = HashMap::new();
    let mut sizes = Vec::with_capacity(plan.world_size());
    for shard in &plan.shards {
        let schedule = plan.schedule(spec, shard.rank, 1);
        let num_peers: Vec<usize> =
            schedule.actions.iter().filter_map(|action| Some(action.work.sends()?.1.len())).collect();
        let num_experts: Vec<usize> = plan.most_experts_of(shard.rank).iter().map(Vec::len).collect();
        let attention = shard.attention.as_ref().map(|a| (a.tp, &a.heads, &a.backup_heads, a.embeds, a.has_head));
        let kind = format!("{:?} {attention:?} {:?} {num_experts:?} {num_peers:?}", shard.layers, shard.experts);
        if let Some(&of_kind) = known.get(&kind) {
            sizes.push(of_kind);
            continue;
        }
        let meta = MetaModel::of_rank(spec, config.dtype, max_model_len, plan, shard.rank)?;
        // One block a sequence: no activation depends on how the cache is cut, and a table of a long context is long.
        let bounds = meta.bounds(StepShape {
            seqs: &shape,
            block_size: max_model_len.next_multiple_of(8),
            all_logits: config.keep_logits,
            num_micro_batches,
        })?;
        let staging = match plan.file.balance {
            None => 0,
            Some(_) => 2 * meta.transformer().expert_bytes().0 + (1 << 20),
        };
        let of_kind = RankSizes {
            weights: meta.weight_bytes.0,
            position: meta.transformer().position_bytes().0,
            activations: bounds.activations.0,
            exchange: bounds.exchange.0 + staging,
            staging,
            workspace: num_threads as u64 * (THREAD_WORKSPACE_BYTES + 16 * spec.vocab_size as u64),
            block: KvCache::rank_block_bytes(meta.transformer(), config.block_size)?.0,
        };
        known.insert(kind, of_kind);
        sizes.push(of_kind);
    }
    Ok(sizes)
}

/// The step that needs the most memory: as many tokens as there can be, beside as many sequences as can decode at their
/// longest, all of them sampled. No tensor of another step is larger.
fn largest_step(config: &EngineConfig, max_model_len: usize) -> Vec<SeqShape> {
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
    shape
}

/// What this machine needs for all ranks together.
fn settle(
    spec: &ModelSpec,
    plan: &Arc<Plan>,
    config: &EngineConfig,
    sizes: &[RankSizes],
    together: bool,
) -> Result<MemoryLedger, EngineError> {
    let sum = |of: fn(&RankSizes) -> u64| sizes.iter().map(of).fold(0u64, u64::saturating_add);
    let weights = match together && plan.world_size() > 1 {
        true => shared_weight_bytes(spec, plan, config)?,
        false => Bytes(sum(|rank| rank.weights)),
    };
    let position = match together {
        true => sizes.iter().map(|rank| rank.position).max().unwrap_or(0),
        false => sum(|rank| rank.position),
    };
    Ok(MemoryLedger::settle(&MemoryRequest {
        // Where the system does not tell what is left, it is asked for what is needed and may refuse.
        budget: config.memory_limit.unwrap_or_else(|| {
            let available = machine::available_memory().unwrap_or(Bytes(u64::MAX >> 1));
            Bytes((available.0 as f64 * config.memory_utilization) as u64)
        }),
        weights,
        activations: Bytes(sum(|rank| rank.activations)),
        exchange: Bytes(sum(|rank| rank.exchange + rank.staging)),
        position_bytes: Bytes(position),
        workspace: Bytes(sum(|rank| rank.workspace)),
        block_bytes: Bytes(sum(|rank| rank.block)),
        block_size: config.block_size,
        max_model_len: max_model_len(spec, config)?,
        max_num_seqs: config.max_num_seqs,
        kv_cache: config.kv_cache,
    })?)
}

/// Memory of all ranks' weights in one process, where equal parts are there once.
fn shared_weight_bytes(spec: &ModelSpec, plan: &Plan, config: &EngineConfig) -> Result<Bytes, EngineError> {
    let arena = Arena::meta("weight");
    let source = WeightSource::meta(spec, config.dtype, &arena);
    let mut parts = PartCache::default();
    // All stay until the end: what is dropped would be counted twice.
    let mut ranks = Vec::with_capacity(plan.world_size());
    for shard in &plan.shards {
        ranks.push(Transformer::load(&source, shard, &plan.experts_of(shard.rank), 1, &mut parts)?);
    }
    Ok(arena.peak())
}

fn thread_ranks(
    spec: &ModelSpec,
    weights: &Launch,
    plan: &Arc<Plan>,
    setup: &dyn Fn(RankId) -> RankSetup,
    ledger: &MemoryLedger,
    progress: impl FnMut(u64),
) -> Result<Places, EngineError> {
    let first = setup(RankId(0));
    let deadline = Duration::from_millis(first.deadline_ms);
    let pool = Arc::new(Pool::new(first.num_threads)?);
    let arena = Arena::host("weight", Bytes(ledger.weights_bytes))?;
    let source = weight_source(spec, weights, first.dtype, &arena, &pool).on_progress(progress);
    let mut parts = PartCache::default();
    if plan.world_size() == 1 {
        let transformer =
            Transformer::load(&source, &plan.shards[0], &plan.experts_of(RankId(0)), first.max_model_len, &mut parts)?;
        let rank =
            assemble(&first, plan, transformer, Box::new(Solo::new(Arena::host("exchange", Bytes(0))?)), pool.clone())?;
        return Ok(Places::Inline(Box::new(rank)));
    }
    let exchange = (0..plan.world_size() as u32)
        .map(|rank| Arena::host("exchange", Bytes(setup(RankId(rank)).sizes.exchange)))
        .collect::<Result<Vec<_>, _>>()?;
    let mut ranks = Vec::with_capacity(plan.world_size());
    for (shard, comm) in plan.shards.iter().zip(in_process::world(exchange, deadline)) {
        let setup = setup(shard.rank);
        let experts = plan.experts_of(shard.rank);
        let transformer = Transformer::load(&source, shard, &experts, setup.max_model_len, &mut parts)?;
        let pool = Arc::new(Pool::new(setup.num_threads)?);
        ranks.push(assemble(&setup, plan, transformer, Box::new(comm), pool)?);
    }
    Ok(Places::Threads(Threads::start(ranks, step_deadline(deadline))?))
}

/// A rank with weights of its own, in this process.
pub(crate) fn build_process_rank(
    spec: &ModelSpec,
    weights: &Launch,
    setup: &RankSetup,
    folder: &Path,
) -> Result<Rank, EngineError> {
    let plan = Arc::new(setup.plan.clone());
    if let Launch::Checkpoint(checkpoint) = weights {
        checkpoint.check(spec)?;
    }
    let pool = Arc::new(Pool::new(setup.num_threads)?);
    let arena = Arena::host("weight", Bytes(setup.sizes.weights))?;
    let source = weight_source(spec, weights, setup.dtype, &arena, &pool);
    let shard = &plan.shards[setup.rank.idx()];
    let experts = plan.experts_of(setup.rank);
    let transformer = Transformer::load(&source, shard, &experts, setup.max_model_len, &mut PartCache::default())?;
    let mut comm = process::join(process::Join {
        dir: folder,
        rank: setup.rank,
        world_size: plan.world_size(),
        session: setup.session,
        exchange_bytes: Bytes(setup.sizes.exchange),
        // Others may still be loading.
        deadline: JOIN_DEADLINE,
    })?;
    comm.set_deadline(Duration::from_millis(setup.deadline_ms));
    assemble(setup, &plan, transformer, Box::new(comm), pool.clone())
}

fn weight_source<'a>(
    spec: &'a ModelSpec,
    weights: &'a Launch<'a>,
    dtype: LoadDType,
    arena: &'a Arena,
    pool: &'a Pool,
) -> WeightSource<'a> {
    match weights {
        Launch::Checkpoint(checkpoint) => WeightSource::checkpoint(spec, dtype, arena, pool, checkpoint),
        Launch::Random(random) => WeightSource::random(spec, dtype, arena, pool, random),
    }
}

fn assemble(
    setup: &RankSetup,
    plan: &Arc<Plan>,
    transformer: Transformer,
    comm: Box<dyn Communicator>,
    pool: Arc<Pool>,
) -> Result<Rank, EngineError> {
    let isa = usable(setup.isa.parse()?)?;
    let kv_arena = Arena::host("kv", Bytes(setup.num_blocks as u64 * setup.sizes.block))?;
    let kv = KvCache::of_rank(&kv_arena, &transformer, setup.num_blocks, setup.block_size)?;
    let activations = Arena::host("activation", Bytes(setup.sizes.activations))?;
    let staging = Arena::host("expert", Bytes(setup.sizes.staging))?;
    let bytes_per_step = plan.file.balance.and_then(|balance| balance.bytes_per_step).unwrap_or(0);
    Ok(Rank::new(RankParts {
        ctx: Ctx::cpu_with(activations, pool, isa),
        comm,
        plan: plan.clone(),
        transformer,
        kv,
        migration: Migration::new(staging, bytes_per_step),
        options: setup.options,
    }))
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
