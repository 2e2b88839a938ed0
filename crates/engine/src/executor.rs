//! The leader: turns the batches of a step into commands for all ranks, and their replies into outputs.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use moesaic_kernels::sampler::{Sampled, SamplingParams};
use moesaic_plan::eplb::RoutingTrace;
use moesaic_plan::{Placement, Plan};
use moesaic_sched::{Execute, ScheduledSeq, SeqId, StepBatch, StepOutput};
use moesaic_spec::ModelSpec;

use crate::adapt::Adaptation;
use crate::record::{RankRecord, StepRecord};
use crate::synchronize::{Features, split};
use crate::wire::{MicroBatchCommand, Opened, SeqPart, StepCommand, StepReply};
use crate::world::World;
use crate::{EngineConfig, EngineError, Rank};

/// Executes steps on a world of ranks.
pub(crate) struct Executor {
    pub(crate) world: World,
    plan: Arc<Plan>,
    /// Group of each sequence that is open.
    groups: HashMap<SeqId, usize>,
    /// News for the ranks that sample, by group.
    opened: Vec<Vec<Opened>>,
    committed: Vec<Vec<(u64, u32)>>,
    closed: Vec<Vec<u64>>,
    next_step: u64,
    pub(crate) adaptation: Adaptation,
    keep_records: bool,
    /// What the last step sampled.
    sampled: HashMap<SeqId, Sampled>,
    record: StepRecord,
    /// Which experts the same tokens chose so far, if that is recorded.
    pub(crate) trace: Option<RoutingTrace>,
    /// Logits by sequence and position, when they are kept.
    logits: BTreeMap<(SeqId, usize), Vec<f32>>,
}

impl Executor {
    pub(crate) fn new(world: World, plan: Arc<Plan>, spec: &ModelSpec, config: &EngineConfig) -> Executor {
        let num_groups = plan.num_groups();
        Executor {
            world,
            groups: HashMap::new(),
            opened: vec![Vec::new(); num_groups],
            committed: vec![Vec::new(); num_groups],
            closed: vec![Vec::new(); num_groups],
            next_step: 0,
            adaptation: Adaptation::new(&plan, spec, config.external_times),
            keep_records: config.record_calls || config.measure,
            sampled: HashMap::new(),
            record: StepRecord::default(),
            trace: None,
            logits: BTreeMap::new(),
            plan,
        }
    }

    /// The only rank, where there is one.
    pub(crate) fn single_rank(&mut self) -> Option<&mut Rank> {
        self.world.single_rank()
    }

    pub(crate) fn open(&mut self, id: SeqId, group: usize, sampling: SamplingParams, prompt: Vec<u32>) {
        self.groups.insert(id, group);
        self.opened[group].push(Opened { id: id.0, sampling, prompt });
    }

    pub(crate) fn close(&mut self, id: SeqId) {
        if let Some(group) = self.groups.remove(&id) {
            self.closed[group].push(id.0);
        }
    }

    pub(crate) fn push(&mut self, id: SeqId, token: u32) {
        let group = self.groups[&id];
        self.committed[group].push((id.0, token));
    }

    pub(crate) fn sampled(&mut self, id: SeqId) -> Sampled {
        self.sampled.remove(&id).expect("every update was sampled")
    }

    /// What the last step did; calls and times are there if they are kept.
    pub(crate) fn record(&self) -> &StepRecord {
        &self.record
    }

    /// Kept logits of a sequence by position; they are given away.
    pub(crate) fn take_logits(&mut self, id: SeqId) -> BTreeMap<usize, Vec<f32>> {
        let (of_id, others): (BTreeMap<_, _>, _) =
            std::mem::take(&mut self.logits).into_iter().partition(|&((seq, _), _)| seq == id);
        self.logits = others;
        of_id.into_iter().map(|((_, position), row)| (position, row)).collect()
    }

    /// What each sequence of a batch costs in a step: by its tokens, and where times are predicted, by its context.
    fn costs(&self, batch: &StepBatch) -> Vec<f64> {
        let only_decode = batch.seqs.iter().all(|seq| seq.token_ids.len() == 1);
        if only_decode && self.plan.file.synchronize.is_some() {
            return self.adaptation.costs(&batch.seqs.iter().map(|seq| seq.start + 1).collect::<Vec<_>>());
        }
        batch.seqs.iter().map(|seq| seq.token_ids.len() as f64).collect()
    }

    fn commands(&mut self, split: &[Vec<Vec<&ScheduledSeq>>], placement: Option<Placement>) -> Vec<StepCommand> {
        let num_micro_batches = split[0].len();
        let group_rows: Vec<Vec<usize>> = (0..num_micro_batches)
            .map(|mb| split.iter().map(|group| group[mb].iter().map(|seq| seq.token_ids.len()).sum()).collect())
            .collect();
        let parts: Vec<Vec<Vec<SeqPart>>> = split
            .iter()
            .map(|group| group.iter().map(|mb| mb.iter().map(|seq| part(seq)).collect()).collect())
            .collect();
        let moves = self.adaptation.new_moves();
        let commands = self.plan.shards.iter().map(|shard| {
            let micro_batches = (0..num_micro_batches).map(|mb| MicroBatchCommand {
                seqs: shard.attention.as_ref().map_or(Vec::new(), |attention| parts[attention.group][mb].clone()),
                group_rows: group_rows[mb].clone(),
            });
            let mut command = StepCommand {
                step: self.next_step,
                placement: placement.clone(),
                moves: moves.iter().copied().filter(|one| one.from == shard.rank || one.to == shard.rank).collect(),
                micro_batches: micro_batches.collect(),
                ..StepCommand::default()
            };
            if let Some(attention) =
                shard.attention.as_ref().filter(|attention| attention.has_head && attention.tp.idx == 0)
            {
                command.opened = std::mem::take(&mut self.opened[attention.group]);
                command.committed = std::mem::take(&mut self.committed[attention.group]);
                command.closed = std::mem::take(&mut self.closed[attention.group]);
            }
            command
        });
        commands.collect()
    }

    fn take_in(&mut self, replies: Vec<StepReply>, sequences: Vec<Vec<Vec<SeqId>>>) -> Result<(), EngineError> {
        self.sampled.clear();
        let placement_epoch = self.adaptation.placement().epoch;
        let mut record = StepRecord { step: self.next_step, sequences, placement_epoch, ..StepRecord::default() };
        for reply in replies {
            self.sampled.extend(reply.sampled.into_iter().map(|(id, sampled)| (SeqId(id), sampled)));
            self.logits.extend(reply.logits.into_iter().map(|(id, position, row)| ((SeqId(id), position), row)));
            for (layer, counts) in reply.expert_counts {
                let sums = record.expert_counts.entry(layer).or_insert_with(|| vec![0; counts.len()]);
                sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
            }
            record.dropped += reply.dropped;
            record.quantization.0 += reply.quantization.0;
            record.quantization.1 += reply.quantization.1;
            record.weights_sent += reply.weights_sent;
            self.adaptation.take_in(reply.loads.as_ref(), &reply.arrived);
            match (&mut self.trace, reply.trace) {
                (Some(trace), Some(of_rank)) => trace.add(&of_rank)?,
                (None, of_rank) => self.trace = of_rank,
                (Some(_), None) => {}
            }
            record.ranks.push(RankRecord {
                calls: reply.calls,
                background: reply.background,
                choices: reply.choices,
                action_s: reply.action_s,
                peaks: reply.peaks,
            });
        }
        self.record = record;
        Ok(())
    }
}

fn part(seq: &ScheduledSeq) -> SeqPart {
    SeqPart {
        id: seq.id.0,
        token_ids: seq.token_ids.clone(),
        start: seq.start,
        block_table: seq.block_table.iter().map(|block| block.0).collect(),
        samples: seq.samples,
        num_generated: seq.num_generated,
    }
}

/// A group's sequences in so many parts of nearly equal cost; within a part in the order of the batch.
fn cut<'a>(batch: &'a StepBatch, costs: &[f64], num_parts: usize) -> Vec<Vec<&'a ScheduledSeq>> {
    let mut parts = vec![Vec::new(); num_parts];
    for (seq, part) in batch.seqs.iter().zip(split(costs, num_parts)) {
        parts[part].push(seq);
    }
    parts
}

/// The size of some sequences' part in a step, but for what routing decides.
fn features<'a>(seqs: impl Iterator<Item = &'a ScheduledSeq>) -> Features {
    seqs.fold(Features::default(), |sum, seq| {
        let context = (seq.start + seq.token_ids.len()) as f64;
        Features {
            tokens: sum.tokens + seq.token_ids.len() as f64,
            sequences: sum.sequences + 1.0,
            context_sum: sum.context_sum + context,
            context_max: sum.context_max.max(context),
            ..sum
        }
    })
}

impl Execute for Executor {
    type Error = EngineError;

    fn execute(&mut self, batches: &[StepBatch]) -> Result<Vec<StepOutput>, EngineError> {
        let num_micro_batches = self.adaptation.num_micro_batches();
        let split: Vec<Vec<Vec<&ScheduledSeq>>> =
            batches.iter().map(|batch| cut(batch, &self.costs(batch), num_micro_batches)).collect();
        let ids =
            |group: &Vec<Vec<&ScheduledSeq>>| group.iter().map(|mb| mb.iter().map(|seq| seq.id).collect()).collect();
        let sequences: Vec<Vec<Vec<SeqId>>> = split.iter().map(ids).collect();
        let placement = self.adaptation.due_placement();
        let commands = self.commands(&split, placement);
        let replies = self.world.step(commands)?;
        self.take_in(replies, sequences)?;
        let of_micro_batch = |mb: usize| features(split.iter().flat_map(|group| group[mb].iter().copied()));
        self.record.micro_batches = (0..num_micro_batches).map(of_micro_batch).collect();
        self.record.whole = features(batches.iter().flat_map(|batch| &batch.seqs));
        self.adaptation.after_step(&self.record);
        self.next_step += 1;
        let due = |batch: &StepBatch| {
            let due = batch.seqs.iter().filter(|seq| seq.samples);
            let sampled = due.filter_map(|seq| Some((seq.id, self.sampled.get(&seq.id)?.token)));
            StepOutput { sampled: sampled.collect() }
        };
        let outputs = batches.iter().map(due).collect();
        if !self.keep_records {
            self.record.sequences.clear();
        }
        Ok(outputs)
    }
}
