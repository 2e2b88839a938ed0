//! One rank: the device, its part of the weights, its cache; goes through its schedule.

use std::collections::HashMap;
use std::sync::Arc;

use moesaic_comm::Communicator;
use moesaic_device::{Ctx, OpCall, Tensor, thread_time};
use moesaic_kernels::gather_rows::gather_rows;
use moesaic_kernels::paged::{PagedBatch, PagedSeq};
use moesaic_kernels::sampler::{SampleRequest, Sampled, SamplingParams, sample};
use moesaic_model::{KvCache, MicroBatch, Step, Surroundings, Transformer};
use moesaic_plan::{Placement, Plan, Schedule, Work};
use moesaic_spec::ModelSpec;
use serde::{Deserialize, Serialize};

use crate::balance::LoadCounters;
use crate::migrate::Migration;
use crate::wire::{MemoryPeaks, MicroBatchCommand, SeqPart, StepCommand, StepReply};
use crate::{EngineError, routing};

/// Executes steps.
pub struct Rank {
    pub(crate) ctx: Ctx,
    pub(crate) comm: Box<dyn Communicator>,
    pub(crate) plan: Arc<Plan>,
    pub(crate) placement: Placement,
    pub(crate) transformer: Transformer,
    kv: KvCache,
    /// By number of micro-batches, from 1.
    schedules: Vec<Arc<Schedule>>,
    migration: Migration,
    sequences: HashMap<u64, Sequence>,
    options: RankOptions,
}

/// What a rank reports beside its results.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct RankOptions {
    /// The logits of every position.
    pub keep_logits: bool,
    /// Every op and message.
    pub record_calls: bool,
    /// Processor time of every action.
    pub measure: bool,
    /// Which experts the same tokens chose.
    pub record_routing: bool,
}

/// What sampling needs to know of a sequence.
struct Sequence {
    params: SamplingParams,
    prompt: Vec<u32>,
    generated: Vec<u32>,
}

/// What a rank is made of.
pub(crate) struct RankParts {
    pub ctx: Ctx,
    pub comm: Box<dyn Communicator>,
    pub plan: Arc<Plan>,
    pub transformer: Transformer,
    pub kv: KvCache,
    pub migration: Migration,
    pub options: RankOptions,
}

impl Rank {
    pub(crate) fn new(parts: RankParts) -> Rank {
        let RankParts { ctx, comm, plan, transformer, kv, migration, options } = parts;
        let schedules = (1..=moesaic_plan::plan::MAX_MICRO_BATCHES)
            .map(|num| Arc::new(plan.schedule(transformer.spec(), comm.rank(), num)))
            .collect();
        Rank {
            placement: plan.placement.clone(),
            ctx,
            comm,
            plan,
            transformer,
            kv,
            schedules,
            migration,
            sequences: HashMap::new(),
            options,
        }
    }

    /// The model.
    pub fn transformer(&self) -> &Transformer {
        &self.transformer
    }

    /// The whole model's description.
    pub fn spec(&self) -> &ModelSpec {
        self.transformer.spec()
    }

    /// The device, for its log and its arena.
    pub fn ctx(&self) -> &Ctx {
        &self.ctx
    }

    /// Runs one step to its end.
    pub(crate) fn step(&mut self, command: StepCommand) -> Result<StepReply, EngineError> {
        let mut reply = StepReply::default();
        self.keep_books(&command);
        self.migration.begin(self.comm.rank(), command.moves);
        if let Some(placement) = command.placement {
            self.migration.switch(&mut self.transformer, self.comm.rank(), &placement)?;
            self.placement = placement;
        }
        let micro_batches = command
            .micro_batches
            .iter()
            .map(|command| self.micro_batch(command))
            .collect::<Result<Vec<_>, EngineError>>()?;
        let schedule = self.schedules[micro_batches.len() - 1].clone();
        let around = Surroundings {
            ctx: &self.ctx,
            comm: self.comm.as_ref(),
            plan: &self.plan,
            placement: &self.placement,
            step: command.step,
        };
        if self.options.record_calls {
            self.ctx.start_log();
        }
        self.migration.send_some(&self.ctx, self.comm.as_ref(), &self.transformer, &mut reply)?;
        reply.background = taken_calls(&self.ctx, self.options);
        let mut step = Step::new(around, &self.transformer, &mut self.kv, micro_batches);
        for action in &schedule.actions {
            let start = self.options.measure.then(thread_time);
            match action.work {
                Work::Sample => {
                    let mb = action.micro_batch as usize;
                    if let Some(logits) = step.take_logits(mb) {
                        let sampler = Sampler { ctx: &self.ctx, sequences: &self.sequences, options: self.options };
                        sampler.sample(&command.micro_batches[mb].seqs, logits, &mut reply)?;
                    }
                }
                _ => step.run(action)?,
            }
            reply.action_s.extend(start.map(|start| thread_time() - start));
            if self.options.record_calls {
                reply.calls.push(taken_calls(&self.ctx, self.options));
            }
        }
        let stats = step.finish();
        reply.quantization = stats.quantization;
        let spec = self.transformer.spec();
        if self.plan.file.balance.is_some() {
            reply.loads = Some(LoadCounters::new(spec.layers.len(), routing::num_experts(spec)));
        }
        if self.options.record_routing {
            reply.trace = routing::empty_trace(&self.plan.file.model, spec);
        }
        routing::count(&stats.choices, &command.micro_batches, spec, &mut reply);
        self.migration.receive_some(&self.ctx, self.comm.as_ref(), &self.transformer, &mut reply)?;
        if self.options.record_calls {
            self.ctx.stop_log();
            reply.choices = stats.choices;
        }
        reply.peaks = MemoryPeaks { activations: self.ctx.arena().peak().0, exchange: self.comm.exchange().peak().0 };
        Ok(reply)
    }

    fn keep_books(&mut self, command: &StepCommand) {
        for opened in &command.opened {
            let (params, prompt) = (opened.sampling.clone(), opened.prompt.clone());
            self.sequences.insert(opened.id, Sequence { params, prompt, generated: Vec::new() });
        }
        for (id, token) in &command.committed {
            if let Some(sequence) = self.sequences.get_mut(id) {
                sequence.generated.push(*token);
            }
        }
        for id in &command.closed {
            self.sequences.remove(id);
        }
    }

    fn micro_batch(&self, command: &MicroBatchCommand) -> Result<MicroBatch, EngineError> {
        let mut token_ids = Vec::new();
        let mut logit_rows = Vec::new();
        let mut seqs = Vec::with_capacity(command.seqs.len());
        for seq in &command.seqs {
            let (row0, num_rows) = (token_ids.len(), seq.token_ids.len());
            token_ids.extend_from_slice(&seq.token_ids);
            if self.options.keep_logits {
                logit_rows.extend(row0..row0 + num_rows);
            } else if seq.samples {
                logit_rows.push(row0 + num_rows - 1);
            }
            seqs.push(PagedSeq {
                row0,
                num_rows,
                context_len: seq.start + num_rows,
                block_table: seq.block_table.clone(),
            });
        }
        let batch = PagedBatch::new(self.kv.block_size, seqs)?;
        Ok(MicroBatch { token_ids, batch, logit_rows, group_rows: command.group_rows.clone() })
    }
}

/// The calls since the last time, if they are recorded.
fn taken_calls(ctx: &Ctx, options: RankOptions) -> Vec<OpCall> {
    if !options.record_calls {
        return Vec::new();
    }
    let calls = ctx.take_log();
    ctx.start_log();
    calls
}

struct Sampler<'a> {
    ctx: &'a Ctx,
    sequences: &'a HashMap<u64, Sequence>,
    options: RankOptions,
}

impl Sampler<'_> {
    /// One token for each sequence that is due one; with all positions' logits kept, those are among the rows.
    fn sample(&self, seqs: &[SeqPart], mut logits: Tensor, reply: &mut StepReply) -> Result<(), EngineError> {
        if self.options.keep_logits {
            let mut rows = logits.f32().chunks(logits.dims()[1]);
            let mut last_rows = Vec::new();
            let mut num_rows = 0;
            for seq in seqs {
                for position in seq.start..seq.start + seq.token_ids.len() {
                    let row = rows.next().expect("a row for every token");
                    reply.logits.push((seq.id, position, row.to_vec()));
                }
                num_rows += seq.token_ids.len();
                last_rows.extend(seq.samples.then(|| num_rows - 1));
            }
            logits = gather_rows(self.ctx, &logits, &last_rows)?;
        }
        let sampling: Vec<&SeqPart> = seqs.iter().filter(|seq| seq.samples).collect();
        let requests: Vec<SampleRequest> = sampling.iter().map(|seq| self.request(seq)).collect();
        let sampled: Vec<Sampled> = sample(self.ctx, &logits, &requests)?;
        reply.sampled.extend(sampling.iter().map(|seq| seq.id).zip(sampled));
        Ok(())
    }

    fn request(&self, seq: &SeqPart) -> SampleRequest<'_> {
        let sequence = &self.sequences[&seq.id];
        assert_eq!(seq.num_generated, sequence.generated.len(), "the scheduler and the rank count the same tokens");
        SampleRequest { params: &sequence.params, prompt: &sequence.prompt, generated: &sequence.generated }
    }
}
