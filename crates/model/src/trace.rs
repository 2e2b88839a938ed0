//! What a step will do, without doing it: a rank's schedule on `Meta`.

use std::collections::BTreeMap;
use std::sync::Arc;

use moesaic_comm::{Communicator, Meta};
use moesaic_device::{Arena, Ctx, OpCall};
use moesaic_kernels::gather_rows::gather_rows;
use moesaic_kernels::paged::{PagedBatch, PagedSeq};
use moesaic_kernels::sampler::{SampleRequest, SamplingParams, sample};
use moesaic_plan::{Action, Plan, Rank, Tag, Work};
use moesaic_spec::{Bytes, ModelSpec};

use crate::load::LoadDType;
use crate::transformer::PartCache;
use crate::{KvCache, MicroBatch, ModelError, Step, Surroundings, Transformer, WeightSource};

/// The shape of one sequence's part in a step.
#[derive(Clone, Copy, Debug)]
pub struct SeqShape {
    /// Tokens in this step.
    pub num_tokens: usize,
    /// Tokens in the cache after it.
    pub context_len: usize,
    /// Whether its last row's logits are wanted.
    pub samples: bool,
}

/// The shape of a step: the same for every micro-batch of every data-parallel group.
#[derive(Clone, Copy, Debug)]
pub struct StepShape<'a> {
    /// Sequences of a micro-batch.
    pub seqs: &'a [SeqShape],
    /// Tokens of a KV block.
    pub block_size: usize,
    /// The logits of every row are wanted.
    pub all_logits: bool,
    /// Micro-batches.
    pub num_micro_batches: usize,
}

/// What the `Meta` run of a step reports.
#[derive(Clone, Debug)]
pub struct Trace {
    /// Every op and message in order.
    pub calls: Vec<OpCall>,
    /// Size of the activation arena that the step needs.
    pub activation_peak: Bytes,
}

/// What one action of a schedule does.
#[derive(Clone, Debug)]
pub struct ActionTrace {
    /// The action.
    pub action: Action,
    /// Its ops and messages in order.
    pub calls: Vec<OpCall>,
}

/// Memory that is enough for a step and for every smaller one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepBounds {
    /// Activation arena.
    pub activations: Bytes,
    /// Arena of messages that are sent or have arrived.
    pub exchange: Bytes,
}

/// One rank's model without data: its weights are counted, and any step can be traced.
pub struct MetaModel {
    plan: Arc<Plan>,
    transformer: Transformer,
    /// Memory of the weights as kernels want them.
    pub weight_bytes: Bytes,
}

impl MetaModel {
    /// Builds the model as one rank would load it.
    pub fn new(spec: &ModelSpec, dtype: LoadDType, max_model_len: usize) -> Result<MetaModel, ModelError> {
        MetaModel::of_rank(spec, dtype, max_model_len, &Arc::new(Plan::single(spec)), Rank(0))
    }

    /// Builds a rank's part of the model as it would be loaded.
    pub fn of_rank(
        spec: &ModelSpec,
        dtype: LoadDType,
        max_model_len: usize,
        plan: &Arc<Plan>,
        rank: Rank,
    ) -> Result<MetaModel, ModelError> {
        let weights = Arena::meta("weight");
        let source = WeightSource::meta(spec, dtype, &weights);
        let (shard, experts) = (&plan.shards[rank.idx()], plan.most_experts_of(rank));
        let transformer = Transformer::load(&source, shard, &experts, max_model_len, &mut PartCache::default())?;
        Ok(MetaModel { plan: plan.clone(), transformer, weight_bytes: weights.peak() })
    }

    /// The transformer.
    pub fn transformer(&self) -> &Transformer {
        &self.transformer
    }

    /// Runs one step of one micro-batch on `Meta`, sampling included; `all_logits` asks for the logits of every row.
    pub fn trace(&self, seqs: &[SeqShape], block_size: usize, all_logits: bool) -> Result<Trace, ModelError> {
        let ctx = Ctx::meta();
        self.run(&ctx, StepShape { seqs, block_size, all_logits, num_micro_batches: 1 })?;
        Ok(Trace { calls: ctx.take_log(), activation_peak: ctx.arena().peak() })
    }

    /// The same, action by action of the rank's schedule.
    pub fn trace_actions(&self, shape: StepShape) -> Result<Vec<ActionTrace>, ModelError> {
        let ctx = Ctx::meta();
        let mut actions = Vec::new();
        self.run_each(&ctx, shape, |action| {
            actions.push(ActionTrace { action: action.clone(), calls: ctx.take_log() });
        })?;
        Ok(actions)
    }

    /// Sizes at which arenas have room for this step and for every other that asks for the same tensors or smaller ones
    /// ([`Arena::sufficient`]).
    pub fn bounds(&self, shape: StepShape) -> Result<StepBounds, ModelError> {
        let ctx = Ctx::meta();
        // Without messages nothing needs the log, and the step may be larger than any machine's.
        if self.plan.world_size() == 1 {
            ctx.stop_log();
        }
        let arrived = self.run(&ctx, shape)?;
        let activations = ctx.arena().sufficient();
        // Nobody is more than a layer ahead of another, because each layer's answers are waited for; so at most two layers'
        // messages exist at a time. Twice that, because ranges that come and go in any order leave holes.
        let mut sent: BTreeMap<u32, u64> = BTreeMap::new();
        for call in ctx.take_log() {
            if let Some(peer) = call.peer.filter(|peer| peer.outbound) {
                let tag = Tag::from_code(peer.tag, 0).expect("our own tag");
                *sent.entry(tag.layer).or_default() += call.bytes.bound;
            }
        }
        let most_sent = sent.values().max().copied().unwrap_or(0);
        let exchange = match self.plan.world_size() {
            1 => Bytes(0),
            _ => Bytes(4 * (most_sent + arrived.0) + (1 << 20)),
        };
        Ok(StepBounds { activations, exchange })
    }

    /// Returns what has arrived from other ranks at most, in one layer.
    fn run(&self, ctx: &Ctx, shape: StepShape) -> Result<Bytes, ModelError> {
        self.run_each(ctx, shape, |_| {})
    }

    /// Calls `done` after each action.
    fn run_each(&self, ctx: &Ctx, shape: StepShape, mut done: impl FnMut(&Action)) -> Result<Bytes, ModelError> {
        let StepShape { seqs, block_size, all_logits, num_micro_batches } = shape;
        let mut num_blocks = 0;
        let mut row0 = 0;
        let mut sampled_rows = Vec::new();
        let seqs: Vec<PagedSeq> = seqs
            .iter()
            .map(|seq| {
                let blocks = seq.context_len.div_ceil(block_size);
                let block_table = (num_blocks..num_blocks + blocks).map(|block| block as u32).collect();
                num_blocks += blocks;
                row0 += seq.num_tokens;
                if seq.samples {
                    sampled_rows.push(row0 - 1);
                }
                PagedSeq {
                    row0: row0 - seq.num_tokens,
                    num_rows: seq.num_tokens,
                    context_len: seq.context_len,
                    block_table,
                }
            })
            .collect();
        let mut kv = KvCache::of_rank(&Arena::meta("kv"), &self.transformer, num_blocks, block_size)?;
        let has_rows = self.transformer.shard().attention.is_some();
        let micro_batch = || {
            Ok::<_, ModelError>(MicroBatch {
                token_ids: if has_rows { vec![0; row0] } else { Vec::new() },
                batch: PagedBatch::new(block_size, if has_rows { seqs.clone() } else { Vec::new() })?,
                logit_rows: if all_logits { (0..row0).collect() } else { sampled_rows.clone() },
                group_rows: vec![row0; self.plan.num_groups()],
            })
        };
        let rank = self.transformer.shard().rank;
        let comm = Meta::new(rank, self.plan.world_size());
        let exchange = comm.exchange().clone();
        let around = Surroundings { ctx, comm: &comm, plan: &self.plan, placement: &self.plan.placement, step: 0 };
        let micro_batches = (0..num_micro_batches).map(|_| micro_batch()).collect::<Result<_, _>>()?;
        let mut step = Step::new(around, &self.transformer, &mut kv, micro_batches);
        for action in &self.plan.schedule(self.transformer.spec(), rank, num_micro_batches).actions {
            match action.work {
                Work::Sample => {
                    let logits = step.take_logits(action.micro_batch as usize);
                    if let Some(mut logits) = logits {
                        if all_logits {
                            logits = gather_rows(ctx, &logits, &sampled_rows)?;
                        }
                        let params = SamplingParams::default();
                        let request = SampleRequest { params: &params, prompt: &[], generated: &[] };
                        sample(ctx, &logits, &vec![request; sampled_rows.len()])?;
                    }
                }
                _ => step.run(action)?,
            }
            done(action);
        }
        Ok(exchange.peak())
    }
}
