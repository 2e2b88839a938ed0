//! A run on the virtual clock: what each step took on the cluster, and what the report says of it.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::BufWriter;
use std::sync::Arc;

use anyhow::Result;
use moesaic_engine::synchronize::Pool;
use moesaic_engine::{MemoryPeaks, PoolSeconds, SeqId, StepRecord, pool_of};
use moesaic_plan::plan::MAX_MICRO_BATCHES;
use moesaic_plan::{ExpertShard, MessageKind, Plan, Rank, RankShard, Schedule, Tag, Work};
use moesaic_planner::metrics::{Communication, ExpertLoad, LayerLoad, Performance, RankMemory, RequestTimes};
use moesaic_planner::report::{ExchangeError, StrategyReport, Timeline};
use moesaic_planner::trace::ChromeTrace;
use moesaic_planner::{ActionRecord, ClockSettings, RankStep, StepInput, StepTimes, VirtualClock};
use moesaic_spec::DType;

use super::run::Run;
use crate::plans;

/// Steps that a trace shows at most.
const MAX_TRACED_STEPS: u64 = 64;
/// Which step without prefill the report draws: late enough that lanes are in their rhythm.
const DRAWN_DECODE_STEP: usize = 4;

/// A run on the virtual clock.
pub(super) struct Priced<'a> {
    run: &'a Run<'a>,
    plan: Arc<Plan>,
    clock: VirtualClock<'a>,
    dtype: DType,
    /// By number of micro-batches, from 1.
    schedules: Vec<Vec<Schedule>>,
    /// When each sequence's last token was sampled.
    sampled_at: HashMap<SeqId, f64>,
    /// When the step's tokens were: of this step's sequences.
    due: HashMap<SeqId, f64>,
    tokens: HashMap<SeqId, Vec<f64>>,
    expert_tokens: BTreeMap<u32, Vec<u64>>,
    quantization: (f64, f64),
    peaks: Vec<MemoryPeaks>,
    /// Sequences that one group had in a step, at most.
    most_seqs: usize,
    /// Time for which weights of moving experts occupied links.
    weights_s: f64,
    num_decode_steps: usize,
    timeline: Option<Timeline>,
    trace: Option<ChromeTrace<BufWriter<File>>>,
}

impl<'a> Priced<'a> {
    pub(super) fn new(run: &'a Run<'a>, plan: &Arc<Plan>, trace: Option<File>) -> Result<Priced<'a>> {
        let dtype = run.dtype();
        let world_size = plan.world_size();
        let schedules = |num| {
            (0..world_size as u32)
                .map(|rank| plan.schedule(&run.model.spec, Rank(rank), num))
                .collect::<Vec<Schedule>>()
        };
        let settings = ClockSettings {
            world_size,
            dtype,
            kind_of: |code| Tag::from_code(code, 0).expect("a tag of our own messages").kind,
            keep_ops: run.args.trace.is_some(),
        };
        let names: Vec<String> = plan.shards.iter().map(describe).collect();
        let trace = trace.map(|file| ChromeTrace::new(BufWriter::new(file), &names, MAX_TRACED_STEPS)).transpose()?;
        Ok(Priced {
            clock: VirtualClock::new(run.cluster, settings),
            schedules: (1..=MAX_MICRO_BATCHES).map(schedules).collect(),
            run,
            plan: plan.clone(),
            dtype,
            sampled_at: HashMap::new(),
            due: HashMap::new(),
            tokens: HashMap::new(),
            expert_tokens: BTreeMap::new(),
            quantization: (0.0, 0.0),
            peaks: Vec::new(),
            most_seqs: 0,
            weights_s: 0.0,
            num_decode_steps: 0,
            timeline: None,
            trace,
        })
    }

    /// Prices a step; what each pool took for each micro-batch.
    pub(super) fn step(&mut self, record: &StepRecord) -> Result<Vec<PoolSeconds>> {
        let num_micro_batches = record.sequences[0].len();
        let schedules = &self.schedules[num_micro_batches - 1];
        let ready: Vec<Vec<f64>> = self.plan.shards.iter().map(|shard| self.ready(shard, record)).collect();
        let ranks: Vec<RankStep> = record
            .ranks
            .iter()
            .map(|rank| RankStep {
                actions: rank
                    .calls
                    .iter()
                    .enumerate()
                    .map(|(action, calls)| ActionRecord { action, calls: calls.clone() })
                    .collect(),
                background: rank.background.clone(),
            })
            .collect();
        let times = self.clock.step(StepInput { schedules, ranks: &ranks, ready: &ready })?;
        self.due = self.sample_times(&times, schedules, record);
        for (layer, counts) in &record.expert_counts {
            let sums = self.expert_tokens.entry(*layer).or_insert_with(|| vec![0; counts.len()]);
            sums.iter_mut().zip(counts).for_each(|(sum, &count)| *sum += u64::from(count));
        }
        self.quantization.0 += record.quantization.0;
        self.quantization.1 += record.quantization.1;
        self.peaks = record.ranks.iter().map(|rank| rank.peaks).collect();
        if let Some(trace) = &mut self.trace {
            trace.step(&times, schedules)?;
        }
        let weights = times.messages.iter().filter(|message| message.kind == MessageKind::Weights);
        self.weights_s += weights.map(|message| message.end - message.start).sum::<f64>();
        let seqs = |group: &Vec<Vec<SeqId>>| group.iter().map(Vec::len).sum();
        self.most_seqs = self.most_seqs.max(record.sequences.iter().map(seqs).max().unwrap_or(0));
        let only_decode = record.whole.tokens == record.whole.sequences;
        self.num_decode_steps += usize::from(only_decode);
        if self.timeline.is_none() && self.num_decode_steps == DRAWN_DECODE_STEP {
            self.timeline = Some(Timeline::of(&times, schedules));
        }
        Ok(self.pool_seconds(&times, num_micro_batches))
    }

    /// The slowest rank of each pool, and the slowest message of an exchange, by micro-batch in one layer.
    fn pool_seconds(&self, times: &StepTimes, num_micro_batches: usize) -> Vec<PoolSeconds> {
        let spec = &self.run.model.spec;
        let num_layers = spec.layers.iter().filter(|ffn| ffn.as_moe().is_some()).count().max(1) as f64;
        let schedules = &self.schedules[num_micro_batches - 1];
        let mut slowest = vec![PoolSeconds::default(); num_micro_batches];
        for (spans, schedule) in times.actions.iter().zip(schedules) {
            let mut own = vec![PoolSeconds::default(); num_micro_batches];
            for span in spans {
                let action = &schedule.actions[span.action];
                if let Some(pool) = pool_of(&action.work).filter(|&pool| pool != Pool::Exchange) {
                    *own[action.micro_batch as usize].of(pool) += (span.end - span.start - span.waiting) / num_layers;
                }
            }
            for (slowest, own) in slowest.iter_mut().zip(own) {
                slowest.attention = slowest.attention.max(own.attention);
                slowest.experts = slowest.experts.max(own.experts);
            }
        }
        for message in times.messages.iter().filter(|message| message.kind == MessageKind::Dispatch) {
            let tag = Tag::from_code(message.tag, 0).expect("a tag of our own messages");
            let slowest = &mut slowest[tag.micro_batch as usize].exchange;
            *slowest = slowest.max(message.arrival - message.sent);
        }
        slowest
    }

    /// A micro-batch begins when the last of its sequences' tokens is known.
    fn ready(&self, shard: &RankShard, record: &StepRecord) -> Vec<f64> {
        let Some(attention) = shard.attention.as_ref().filter(|attention| attention.embeds) else { return Vec::new() };
        let known = |id: &SeqId| self.sampled_at.get(id).copied().unwrap_or(0.0);
        let ready = record.sequences[attention.group].iter();
        ready.map(|mb| mb.iter().map(known).fold(0.0, f64::max)).collect()
    }

    /// When each sequence of the step was sampled, if it was due.
    fn sample_times(&self, times: &StepTimes, schedules: &[Schedule], record: &StepRecord) -> HashMap<SeqId, f64> {
        let mut due = HashMap::new();
        for shard in &self.plan.shards {
            let sampler = shard.attention.as_ref().filter(|a| a.has_head && a.tp.idx == 0);
            let Some(attention) = sampler else { continue };
            for span in &times.actions[shard.rank.idx()] {
                let action = &schedules[shard.rank.idx()].actions[span.action];
                if action.work == Work::Sample {
                    let ids = &record.sequences[attention.group][action.micro_batch as usize];
                    due.extend(ids.iter().map(|&id| (id, span.end)));
                }
            }
        }
        due
    }

    /// The last step gained a token for this sequence.
    pub(super) fn sampled(&mut self, id: SeqId) {
        let at = self.due[&id];
        self.sampled_at.insert(id, at);
        self.tokens.entry(id).or_default().push(at);
    }

    /// Time for which weights of moving experts occupied links, seconds.
    pub(super) fn weights_s(&self) -> f64 {
        self.weights_s
    }

    pub(super) fn report(mut self, ids: &[SeqId]) -> Result<StrategyReport> {
        if let Some(trace) = self.trace.take() {
            trace.finish()?;
        }
        let requests: Vec<RequestTimes> = ids
            .iter()
            .map(|id| RequestTimes { arrival: 0.0, tokens: self.tokens.remove(id).unwrap_or_default() })
            .collect();
        let memory = self.memory();
        let totals = self.clock.finish();
        let (cluster, file) = (self.run.cluster, &self.plan.file);
        let layers = self.expert_tokens.into_iter();
        Ok(StrategyReport {
            name: file.name.clone(),
            description: plans::describe(file),
            baseline: !self.plan.stages.iter().any(|stage| !stage.expert_ranks.is_empty()),
            ranks: self.plan.world_size(),
            performance: Performance::of(&totals, &requests, cluster, self.dtype),
            communication: Communication::of(&totals, cluster),
            memory,
            expert_load: Some(ExpertLoad {
                layers: layers.map(|(layer, tokens)| LayerLoad { layer: layer as usize, tokens }).collect(),
            }),
            timeline: self.timeline,
            exchange_error: (self.quantization.1 > 0.0).then(|| ExchangeError {
                precision: format!("{:?}", file.exchange.precision).to_lowercase(),
                relative: (self.quantization.0 / self.quantization.1).sqrt(),
            }),
            ..StrategyReport::default()
        })
    }

    /// Weights as the plan has them, the KV cache of as many of the longest sequences as ran at a time, activations and
    /// messages as they were reached.
    fn memory(&self) -> Vec<RankMemory> {
        let longest = self.run.workload.longest();
        let ranks = self.plan.rank_memory(&self.run.model.spec).into_iter().zip(&self.peaks);
        let memory = ranks.map(|(rank, peaks)| {
            let mut parts: Vec<(String, u64)> =
                rank.parts().into_iter().map(|(name, bytes)| (name.to_string(), bytes)).collect();
            parts.push(("KV cache".into(), rank.kv_cache(longest * self.most_seqs)));
            parts.push(("activations".into(), peaks.activations));
            parts.push(("messages".into(), peaks.exchange));
            RankMemory { parts, available: self.run.cluster.gpu.memory.0 }
        });
        memory.collect()
    }
}

fn describe(shard: &RankShard) -> String {
    let attention =
        shard.attention.as_ref().map(|a| format!("attention, heads {} to {}", a.heads.start, a.heads.end - 1));
    let experts = match shard.experts {
        ExpertShard::None => None,
        ExpertShard::Cut(slice) if slice.is_whole() => Some("all experts".to_string()),
        ExpertShard::Cut(slice) => Some(format!("1/{} of all experts", slice.count)),
        ExpertShard::Placed => Some("experts".to_string()),
    };
    attention.into_iter().chain(experts).collect::<Vec<_>>().join("; ")
}
