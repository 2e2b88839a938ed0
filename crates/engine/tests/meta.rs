//! The `Meta` run against the real one: the same ops in the same order, the same memory.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::{GoldenModel, config, golden_names, greedy, prompt};
use moesaic_device::{Arena, OpCall, Pool};
use moesaic_engine::{Engine, EngineConfig, SeqId};
use moesaic_model::{LoadDType, MetaModel, PartCache, SeqShape, Transformer, WeightSource};
use moesaic_plan::{Plan, Rank};
use moesaic_sched::{Execute, Scheduler, SchedulerConfig, SeqRequest, StepBatch, StepOutput, drive_step};
use moesaic_spec::Bytes;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

const MAX_MODEL_LEN: usize = 96;

/// A second scheduler with the engine's own settings. It makes the same batches, so it knows the shape of each step that the
/// engine runs.
struct Shadow<'a> {
    what: String,
    config: &'a EngineConfig,
    engine: Engine,
    meta: MetaModel,
    /// Largest of the traces so far.
    activation_peak: Bytes,
    /// What kinds of steps there were.
    kinds: BTreeMap<&'static str, usize>,
}

impl Execute for Shadow<'_> {
    type Error = moesaic_engine::EngineError;

    fn execute(&mut self, batches: &[StepBatch]) -> Result<Vec<StepOutput>, Self::Error> {
        let batch = &batches[0];
        let shape: Vec<SeqShape> = batch
            .seqs
            .iter()
            .map(|seq| SeqShape {
                num_tokens: seq.token_ids.len(),
                context_len: seq.start + seq.token_ids.len(),
                samples: seq.samples,
            })
            .collect();
        let trace = self.meta.trace(&shape, self.config.block_size, self.config.keep_logits)?;
        self.engine.single_rank().unwrap().ctx().start_log();
        let step = self.engine.step()?;
        let calls = self.engine.single_rank().unwrap().ctx().take_log();
        let what = format!("{}, step {} {shape:?}", self.what, batch.step);
        assert_eq!(step.num_prefill_tokens + step.num_decode_tokens, batch.num_tokens(), "{what}");
        compare_logs(&what, &calls, &trace.calls);
        self.activation_peak = self.activation_peak.max(trace.activation_peak);
        assert_eq!(self.engine.single_rank().unwrap().ctx().arena().peak(), self.activation_peak, "{what}");
        assert_eq!(
            self.engine.single_rank().unwrap().ctx().arena().in_use(),
            Bytes(0),
            "{what}: a step gives back all it took"
        );

        let prefills = shape.iter().filter(|seq| seq.num_tokens > 1).count();
        let kind = match (prefills, shape.len() - prefills) {
            (0, _) => "decode",
            (_, 0) if shape.iter().all(|seq| seq.samples) => "prefill",
            (_, 0) => "chunk",
            _ => "mixed",
        };
        *self.kinds.entry(kind).or_default() += 1;
        Ok(vec![StepOutput { sampled: step.events.iter().map(|event| (event.id, event.token)).collect() }])
    }
}

/// Equal but for what routing decides: how many experts are active, and with them the bytes of weights.
fn compare_logs(what: &str, real: &[OpCall], meta: &[OpCall]) {
    let ops = |calls: &[OpCall]| calls.iter().map(|call| call.op).collect::<Vec<_>>();
    assert_eq!(ops(real), ops(meta), "{what}");
    for (idx, (real, meta)) in real.iter().zip(meta).enumerate() {
        let what = format!("{what}, call {idx}");
        let num_experts = meta.dims.iter().find(|(name, _)| *name == "E").map_or(1, |&(_, e)| e);
        if meta.op != "experts" || num_experts == 1 {
            assert_eq!(real, meta, "{what}");
            continue;
        }
        assert_eq!((real.flops, real.stream), (meta.flops, meta.stream), "{what}");
        assert_eq!(real.bytes.expected, real.bytes.bound as f64, "{what}: what happened is known");
        assert!(real.bytes.bound <= meta.bytes.bound, "{what}: {real:?} {meta:?}");
        assert!(meta.bytes.expected <= meta.bytes.bound as f64, "{what}: {meta:?}");
        for (&(real_name, real_size), &(name, size)) in real.dims.iter().zip(&meta.dims) {
            let ok = if name == "active" { (1..=size).contains(&real_size) } else { real_size == size };
            assert!(real_name == name && ok, "{what}: {real:?} {meta:?}");
        }
    }
}

fn scheduler(config: &EngineConfig, engine: &Engine) -> Scheduler {
    let ledger = engine.ledger();
    let config = SchedulerConfig {
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens,
        max_model_len: MAX_MODEL_LEN,
        block_size: ledger.block_size,
        num_blocks: ledger.num_blocks,
        max_num_waiting: config.max_num_waiting,
        enable_prefix_caching: config.enable_prefix_caching && !config.keep_logits,
        enable_chunked_prefill: config.enable_chunked_prefill,
    };
    Scheduler::new(config).unwrap()
}

/// Settings that only `seed` decides.
fn random_config(rng: &mut ChaCha8Rng) -> EngineConfig {
    let mut below = |n: u32| (rng.next_u32() % n) as usize;
    let max_num_seqs = 1 + below(9);
    let enable_chunked_prefill = below(4) > 0;
    let least = if enable_chunked_prefill { max_num_seqs } else { MAX_MODEL_LEN };
    EngineConfig {
        max_num_seqs,
        max_num_batched_tokens: least + below(60),
        max_model_len: Some(MAX_MODEL_LEN),
        block_size: [8, 16, 24, 32][below(4)],
        enable_prefix_caching: below(2) > 0,
        enable_chunked_prefill,
        num_threads: Some(1 + below(3)),
        dtype: [LoadDType::Auto, LoadDType::Float32, LoadDType::BFloat16][below(3)],
        keep_logits: below(4) == 0,
        ..config()
    }
}

#[test]
fn every_step_is_what_meta_said() {
    let mut kinds = BTreeMap::new();
    for (idx, name) in golden_names().iter().enumerate() {
        let model = GoldenModel::open(name);
        let spec = model.without_capacity();
        let mut rng = ChaCha8Rng::seed_from_u64(idx as u64);
        for _ in 0..2 {
            let config = random_config(&mut rng);
            let engine = model.launch(&spec, &config);
            let mut scheduler = scheduler(&config, &engine);
            let mut shadow = Shadow {
                what: format!("{name}, {config:?}"),
                config: &config,
                meta: MetaModel::new(&spec, config.dtype, MAX_MODEL_LEN).unwrap(),
                engine,
                activation_peak: Bytes(0),
                kinds: BTreeMap::new(),
            };
            let mut left = 6 + rng.next_u32() % 8;
            while left > 0 || !scheduler.is_idle() {
                // Some arrive while others run.
                if left > 0 && (scheduler.is_idle() || rng.next_u32().is_multiple_of(3)) {
                    left -= 1;
                    let len = 1 + rng.next_u32() as usize % 60;
                    let mut prompt = prompt(u64::from(rng.next_u32() % 4), len, spec.vocab_size);
                    prompt[len / 2] = rng.next_u32() % spec.vocab_size as u32;
                    let max_tokens = 1 + rng.next_u32() as usize % 8;
                    let id = shadow.engine.add(greedy(&prompt, max_tokens)).unwrap();
                    let request = SeqRequest { id, prompt, max_tokens, stop_token_ids: Vec::new(), cache_salt: 0 };
                    scheduler.add(request).unwrap();
                }
                drive_step(&mut scheduler, &mut shadow).unwrap();
            }
            assert!(shadow.engine.is_idle());
            assert!(
                shadow.activation_peak.0 <= shadow.engine.ledger().activations_bytes,
                "{}: {:?}",
                shadow.what,
                shadow.engine.ledger()
            );
            shadow.kinds.into_iter().for_each(|(kind, count)| *kinds.entry(kind).or_insert(0) += count);
        }
    }
    assert!(kinds.values().all(|&count| count >= 10) && kinds.len() == 4, "every kind of step was met: {kinds:?}");
}

/// `Meta` knows the memory of any step (the test above), so it can look at more shapes than could be run.
#[test]
fn no_shape_within_the_limits_needs_more_than_the_ledger_gives() {
    for (idx, name) in golden_names().iter().enumerate() {
        let model = GoldenModel::open(name);
        let mut rng = ChaCha8Rng::seed_from_u64(1000 + idx as u64);
        for _ in 0..3 {
            let config = random_config(&mut rng);
            let ledger = *model.launch(&model.spec, &config).ledger();
            let meta = MetaModel::new(&model.spec, config.dtype, MAX_MODEL_LEN).unwrap();
            for _ in 0..60 {
                let shape = random_shape(&mut rng, &config);
                let peak = meta.trace(&shape, config.block_size, config.keep_logits).unwrap().activation_peak;
                assert!(
                    peak.0 <= ledger.activations_bytes,
                    "{name}: {shape:?} needs {peak}, the ledger has {} for {config:?}",
                    Bytes(ledger.activations_bytes)
                );
            }
        }
    }
}

/// A step that the scheduler could ask for: decodes, then prefill chunks.
fn random_shape(rng: &mut ChaCha8Rng, config: &EngineConfig) -> Vec<SeqShape> {
    let mut below = |n: usize| rng.next_u32() as usize % n;
    // Full steps are the largest, so half of them are full.
    let full = below(2) == 0;
    let num_seqs = if full { config.max_num_seqs } else { 1 + below(config.max_num_seqs) };
    let num_decodes = below(num_seqs + 1);
    let mut budget = config.max_num_batched_tokens - num_decodes;
    let mut shape: Vec<SeqShape> = (0..num_decodes)
        .map(|_| SeqShape { num_tokens: 1, context_len: 1 + below(MAX_MODEL_LEN - 1), samples: true })
        .collect();
    let num_prefills = num_seqs - num_decodes;
    for prefill in 0..num_prefills {
        let behind = num_prefills - prefill - 1;
        let most = budget.saturating_sub(behind).min(MAX_MODEL_LEN - 1);
        if most == 0 {
            break;
        }
        let num_tokens = if full && below(2) == 0 { most } else { 1 + below(most) };
        let before = below(MAX_MODEL_LEN - num_tokens);
        shape.push(SeqShape { num_tokens, context_len: before + num_tokens, samples: below(2) == 0 });
        budget -= num_tokens;
    }
    shape
}

#[test]
fn weights_take_the_memory_that_meta_counts() {
    let pool = Arc::new(Pool::new(2).unwrap());
    for name in golden_names() {
        let model = GoldenModel::open(&name);
        model.checkpoint.check(&model.spec).unwrap();
        for dtype in [LoadDType::Auto, LoadDType::Float32, LoadDType::BFloat16] {
            let meta = MetaModel::new(&model.spec, dtype, MAX_MODEL_LEN).unwrap();
            let arena = Arena::host("weight", Bytes(meta.weight_bytes.0 + (1 << 20))).unwrap();
            let source = WeightSource::checkpoint(&model.spec, dtype, &arena, &pool, &model.checkpoint);
            let plan = Plan::single(&model.spec);
            let (shard, experts) = (&plan.shards[0], plan.experts_of(Rank(0)));
            let mut parts = PartCache::default();
            let transformer = Transformer::load(&source, shard, &experts, MAX_MODEL_LEN, &mut parts).unwrap();
            assert_eq!(arena.peak(), meta.weight_bytes, "{name} {dtype:?}");
            assert_eq!(arena.in_use(), meta.weight_bytes, "{name} {dtype:?}: nothing is kept that is not a weight");
            assert_eq!(transformer.compute_dtype(), meta.transformer().compute_dtype());
            let engine = model.launch(&model.spec, &EngineConfig { dtype, ..config() });
            assert_eq!(engine.ledger().weights_bytes, meta.weight_bytes.0, "{name} {dtype:?}");
        }
    }
}

/// With full experts the real step does less, and never more.
#[test]
fn dropped_tokens_only_make_a_step_smaller() {
    for name in ["paper-capacity-probs", "paper-capacity-position"] {
        let model = GoldenModel::open(name);
        let config = EngineConfig { max_model_len: Some(MAX_MODEL_LEN), ..config() };
        let mut engine = model.launch(&model.spec, &config);
        let meta = MetaModel::new(&model.spec, config.dtype, MAX_MODEL_LEN).unwrap();
        let shape = [SeqShape { num_tokens: 40, context_len: 40, samples: true }];
        let trace = meta.trace(&shape, config.block_size, false).unwrap();
        let id = engine.add(greedy(&prompt(7, 40, model.spec.vocab_size), 1)).unwrap();
        assert_eq!(id, SeqId(0));
        engine.single_rank().unwrap().ctx().start_log();
        engine.step().unwrap();
        let calls = engine.single_rank().unwrap().ctx().take_log();
        let ops = |calls: &[OpCall]| calls.iter().map(|call| call.op).collect::<Vec<_>>();
        assert_eq!(ops(&calls), ops(&trace.calls), "{name}");
        let mut num_smaller = 0;
        for (real, meta) in calls.iter().zip(&trace.calls) {
            assert!(real.flops.bound <= meta.flops.bound && real.bytes.bound <= meta.bytes.bound, "{real:?} {meta:?}");
            num_smaller += usize::from(real.flops.bound < meta.flops.bound);
        }
        assert!(num_smaller > 0, "{name}: nothing was dropped");
        assert!(engine.single_rank().unwrap().ctx().arena().peak() <= trace.activation_peak, "{name}");
    }
}
