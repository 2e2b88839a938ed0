//! One plan after another: run it on local ranks, price what it did, hold its answers against those of one rank.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::BufWriter;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use moesaic_device::process_time;
use moesaic_engine::synchronize::{self, Pool};
use moesaic_engine::{
    Engine, EngineConfig, PoolSeconds, Ranks, Request, SamplingParams, SeqId, StepRecord, balance, pool_of,
};
use moesaic_plan::eplb::RoutingTrace;
use moesaic_plan::{MessageKind, Plan, PlanFile, Rank, Schedule, Tag, Work};
use moesaic_planner::metrics::{
    Communication, ExpertLoad, Imbalance, LayerLoad, Performance, RankMemory, RequestTimes,
};
use moesaic_planner::report::{BalanceReport, ExchangeError, Sameness, StrategyReport, SynchronizerReport, Timeline};
use moesaic_planner::trace::ChromeTrace;
use moesaic_planner::{ActionRecord, ClockSettings, RankStep, StepInput, StepTimes, VirtualClock};
use moesaic_spec::{Cluster, DType, Workload};

use super::prompts::Prompt;
use crate::args::CompareArgs;
use crate::folder::OpenModel;
use crate::plans;

/// Steps that a trace shows at most.
const MAX_TRACED_STEPS: u64 = 64;
/// Which step without prefill the report draws: late enough that lanes are in their rhythm.
const DRAWN_DECODE_STEP: usize = 4;

/// What all plans have in common.
pub(super) struct Run<'a> {
    pub args: &'a CompareArgs,
    pub model: &'a OpenModel,
    pub cluster: &'a Cluster,
    pub workload: &'a Workload,
    pub requests: &'a [Prompt],
}

/// The answers of one rank.
pub(super) struct Reference {
    answers: Vec<Vec<(u32, f32)>>,
    cpu_s: f64,
    /// What routers chose.
    pub trace: Option<RoutingTrace>,
}

impl Run<'_> {
    pub(super) fn reference(&self) -> Result<Reference> {
        let config = EngineConfig { record_routing: true, ..self.config(self.requests.len(), None) };
        let mut engine = self.model.launch(&config, true)?;
        let ids = self.add_all(&mut engine)?;
        let mut answers: HashMap<SeqId, Vec<(u32, f32)>> = HashMap::new();
        let mut cpu_s = 0.0;
        while !engine.is_idle() {
            let before = process_time();
            let step = engine.step()?;
            cpu_s += process_time() - before;
            for event in step.events {
                answers.entry(event.id).or_default().push((event.token, event.logprob));
            }
        }
        let answers = ids.iter().map(|id| answers.remove(id).unwrap_or_default()).collect();
        Ok(Reference { answers, cpu_s, trace: engine.routing_trace().cloned() })
    }

    fn config(&self, max_num_seqs: usize, file: Option<&PlanFile>) -> EngineConfig {
        let memory = file.map(|file| file.memory).unwrap_or_default();
        EngineConfig {
            max_num_seqs: memory.max_num_seqs.unwrap_or(max_num_seqs),
            max_num_batched_tokens: memory.max_num_batched_tokens.unwrap_or(2048).max(max_num_seqs),
            max_model_len: Some(memory.max_model_len.unwrap_or(self.workload.longest())),
            max_num_waiting: self.requests.len().max(1),
            block_size: 16,
            dtype: self.args.model.dtype.into(),
            record_calls: file.is_some(),
            external_times: true,
            // A laptop may work for minutes on what one GPU does in a blink.
            deadline: Duration::from_secs(600),
            num_threads: Some(1),
            ..EngineConfig::default()
        }
    }

    /// Requests go to the group with the least to do, so some groups get more short ones than others.
    fn seqs_of_group(&self, plan: &Plan) -> usize {
        (2 * self.requests.len().div_ceil(plan.num_groups())).min(self.requests.len())
    }

    fn add_all(&self, engine: &mut Engine) -> Result<Vec<SeqId>> {
        let add = |prompt: &Prompt| {
            engine.add(Request {
                prompt: prompt.token_ids.clone(),
                sampling: SamplingParams::greedy(),
                max_tokens: prompt.output_tokens,
                stop_token_ids: Vec::new(),
            })
        };
        Ok(self.requests.iter().map(add).collect::<Result<Vec<SeqId>, _>>()?)
    }

    pub(super) fn plan(&self, file: &PlanFile, reference: &Reference) -> Result<StrategyReport> {
        let spec = &self.model.spec;
        let plan = Arc::new(plans::resolve(file.clone(), spec, self.cluster)?);
        let config = self.config(self.seqs_of_group(&plan), Some(file));
        let mut engine = self.model.launch_plan(&plan, &config, Ranks::Threads, true)?;
        let dtype = config.dtype.weights(spec.dtype);
        let mut priced = Priced::new(self, &plan, dtype)?;
        let ids = self.add_all(&mut engine)?;
        let mut answers: HashMap<SeqId, Vec<(u32, f32)>> = HashMap::new();
        let mut cpu_s = 0.0;
        while !engine.is_idle() {
            let before = process_time();
            let step = engine.step()?;
            cpu_s += process_time() - before;
            let times = priced.step(engine.last_step(), step.num_prefill_tokens == 0)?;
            engine.adaptation().observe_times(&times);
            for event in step.events {
                priced.sampled(event.id);
                answers.entry(event.id).or_default().push((event.token, event.logprob));
            }
        }
        let answers: Vec<_> = ids.iter().map(|id| answers.remove(id).unwrap_or_default()).collect();
        let weights_s = priced.weights_s;
        let mut report = priced.report(&ids, file)?;
        report.balance = engine.adaptation().balance_report().and_then(|report| balance_of(report, weights_s));
        report.synchronizer = engine.adaptation().synchronizer_report().map(synchronizer_of);
        report.sameness = Some(sameness(&reference.answers, &answers));
        report.notes.push(format!(
            "All ranks together took {:.2} s of processor time here, {:.2} times one rank's.",
            cpu_s,
            cpu_s / reference.cpu_s
        ));
        Ok(report)
    }
}

/// A run on the virtual clock.
struct Priced<'a> {
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
    /// Time for which moving experts occupied links.
    weights_s: f64,
    peaks: Vec<moesaic_engine::MemoryPeaks>,
    num_decode_steps: usize,
    timeline: Option<Timeline>,
    trace: Option<ChromeTrace<BufWriter<File>>>,
}

impl<'a> Priced<'a> {
    fn new(run: &'a Run<'a>, plan: &Arc<Plan>, dtype: DType) -> Result<Priced<'a>> {
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
        let trace = match &run.args.trace {
            None => None,
            Some(path) => {
                // One file for each plan beside the one that was named.
                let path = match run.args.plan.len() == 1 || run.args.strategy.len() == 1 {
                    true => path.clone(),
                    false => path.with_extension(format!("{}.json", plans::slug(&plan.file.name))),
                };
                let file = File::create(&path).with_context(|| path.display().to_string())?;
                let names: Vec<String> = plan.shards.iter().map(describe).collect();
                Some(ChromeTrace::new(BufWriter::new(file), &names, MAX_TRACED_STEPS)?)
            }
        };
        Ok(Priced {
            clock: VirtualClock::new(run.cluster, settings),
            schedules: (1..=moesaic_plan::plan::MAX_MICRO_BATCHES).map(schedules).collect(),
            run,
            plan: plan.clone(),
            dtype,
            sampled_at: HashMap::new(),
            due: HashMap::new(),
            tokens: HashMap::new(),
            expert_tokens: BTreeMap::new(),
            quantization: (0.0, 0.0),
            weights_s: 0.0,
            peaks: Vec::new(),
            num_decode_steps: 0,
            timeline: None,
            trace,
        })
    }

    /// Prices a step; what each pool took for each micro-batch.
    fn step(&mut self, record: &StepRecord, only_decode: bool) -> Result<Vec<PoolSeconds>> {
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
        let weights = times.messages.iter().filter(|message| message.kind == MessageKind::Weights);
        self.weights_s += weights.map(|message| message.end - message.start).sum::<f64>();
        self.quantization.0 += record.quantization.0;
        self.quantization.1 += record.quantization.1;
        self.peaks = record.ranks.iter().map(|rank| rank.peaks).collect();
        if let Some(trace) = &mut self.trace {
            trace.step(&times, schedules)?;
        }
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
    fn ready(&self, shard: &moesaic_plan::RankShard, record: &StepRecord) -> Vec<f64> {
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
    fn sampled(&mut self, id: SeqId) {
        let at = self.due[&id];
        self.sampled_at.insert(id, at);
        self.tokens.entry(id).or_default().push(at);
    }

    fn report(mut self, ids: &[SeqId], file: &PlanFile) -> Result<StrategyReport> {
        if let Some(trace) = self.trace.take() {
            trace.finish()?;
        }
        let requests: Vec<RequestTimes> = ids
            .iter()
            .map(|id| RequestTimes { arrival: 0.0, tokens: self.tokens.remove(id).unwrap_or_default() })
            .collect();
        let memory = self.memory();
        let totals = self.clock.finish();
        let cluster = self.run.cluster;
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

    /// Weights and KV cache as the plan has them, activations and messages as they were reached.
    fn memory(&self) -> Vec<RankMemory> {
        let file_seqs = self.plan.file.memory.max_num_seqs;
        let longest = self.run.workload.longest();
        let seqs = file_seqs.unwrap_or_else(|| self.run.requests.len().div_ceil(self.plan.num_groups()));
        let ranks = self.plan.rank_memory(&self.run.model.spec).into_iter().zip(&self.peaks);
        let memory = ranks.map(|(rank, peaks)| {
            let mut parts: Vec<(String, u64)> =
                rank.parts().into_iter().map(|(name, bytes)| (name.to_string(), bytes)).collect();
            parts.push(("KV cache".into(), rank.kv_cache(longest * seqs)));
            parts.push(("activations".into(), peaks.activations));
            parts.push(("messages".into(), peaks.exchange));
            RankMemory { parts, available: self.run.cluster.gpu.memory.0 }
        });
        memory.collect()
    }
}

fn describe(shard: &moesaic_plan::RankShard) -> String {
    let attention =
        shard.attention.as_ref().map(|a| format!("attention, heads {} to {}", a.heads.start, a.heads.end - 1));
    let experts = match shard.experts {
        moesaic_plan::ExpertShard::None => None,
        moesaic_plan::ExpertShard::Cut(slice) if slice.is_whole() => Some("all experts".to_string()),
        moesaic_plan::ExpertShard::Cut(slice) => Some(format!("1/{} of all experts", slice.count)),
        moesaic_plan::ExpertShard::Placed => Some("experts".to_string()),
    };
    attention.into_iter().chain(experts).collect::<Vec<_>>().join("; ")
}

/// What moving experts did, from the first decision to the last; `None` while nothing moved.
fn balance_of(report: &balance::BalanceReport, seconds: f64) -> Option<BalanceReport> {
    let (first, last) = (report.decisions.first()?, report.decisions.last()?);
    let imbalance =
        |stats: balance::LoadStats| Imbalance { max_over_mean: stats.max_over_mean, std_dev: stats.std_dev };
    Some(BalanceReport {
        before: imbalance(first.before),
        after: imbalance(last.measured.unwrap_or(last.predicted)),
        moves: report.decisions.iter().map(|decision| decision.moves as u64).sum(),
        bytes_moved: report.moved_bytes,
        seconds,
    })
}

/// How well the pools' times were predicted: the pool that is predicted worst by what is used.
fn synchronizer_of(report: &synchronize::SynchronizerReport) -> SynchronizerReport {
    let used = |pool: &synchronize::PoolErrors| match (pool.errors.used, pool.errors.mlp) {
        (synchronize::Model::Mlp, Some(mlp)) => mlp.mean,
        _ => pool.errors.linear.mean,
    };
    let worst = report.errors.iter().max_by(|a, b| used(a).total_cmp(&used(b)));
    SynchronizerReport {
        mlp_error: worst.and_then(|pool| pool.errors.mlp).map(|errors| errors.mean),
        linear_error: worst.map_or(0.0, |pool| pool.errors.linear.mean),
        choices: report.intervals,
        mlp_used: worst.is_some_and(|pool| pool.errors.used == synchronize::Model::Mlp),
    }
}

/// How much answers differ from the reference.
fn sameness(reference: &[Vec<(u32, f32)>], answers: &[Vec<(u32, f32)>]) -> Sameness {
    let mut sameness = Sameness::default();
    for (right, got) in reference.iter().zip(answers) {
        let mut same = true;
        for (&(token, logprob), &(got_token, got_logprob)) in right.iter().zip(got) {
            sameness.tokens += 1;
            sameness.differing_tokens += u64::from(token != got_token);
            same &= token == got_token;
            if same {
                let difference = f64::from((logprob - got_logprob).abs());
                sameness.max_logprob_difference = sameness.max_logprob_difference.max(difference);
            }
        }
    }
    sameness
}
