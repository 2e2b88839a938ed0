//! The third level of detail: events. The scheduler that serves is driven, iteration by iteration, on a virtual clock.
//!
//! [`moesaic_sched`] says which tokens run next, as it does in the engine; here a step takes what [`Iterations`] says it
//! costs, and its tokens are counted and not computed. So chunks of prompts, full caches, preemptions, hits of the prefix
//! cache and groups that wait for each other come from the scheduler itself, and not from a model of it.

mod asks;
mod distribution;
mod executor;
mod pace;
mod record;
mod result;
mod trials;

use moesaic_plan::PlanFile;
use moesaic_plan::footprint::DEFAULT_BATCHED_TOKENS;
use moesaic_sched::{DrivenStep, Scheduler, SchedulerConfig, drive_groups};
use moesaic_spec::{SplitMix64, Workload};

pub use distribution::Distribution;
pub use result::{Goals, Goodput, Moment, Simulated, Steady};
pub use trials::{Trials, trials};

use crate::PlannerError;
use crate::iteration::{Iterations, Layout, Resolved};
use crate::predict::Predictor;
use executor::{Clock, Priced};
use pace::Pace;
use record::Record;

/// Limits of the scheduler of each data-parallel group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that run at a time.
    pub max_num_seqs: usize,
    /// Tokens of one step.
    pub max_num_batched_tokens: usize,
    /// Tokens of a KV block.
    pub block_size: usize,
    /// Whether prompts are cut.
    pub enable_chunked_prefill: bool,
}

/// Tokens of a KV block when nobody says otherwise; the engine's default.
const BLOCK_SIZE: usize = 32;

impl Limits {
    /// What a plan file says; where it says nothing, as many sequences as the workload has, or a step has tokens.
    pub fn of(file: &PlanFile, workload: &Workload) -> Limits {
        let tokens = file.memory.max_num_batched_tokens.unwrap_or(DEFAULT_BATCHED_TOKENS);
        Limits {
            max_num_seqs: file.memory.max_num_seqs.unwrap_or(workload.num_requests).min(tokens),
            max_num_batched_tokens: tokens,
            block_size: BLOCK_SIZE,
            enable_chunked_prefill: true,
        }
    }
}

/// What is simulated.
#[derive(Clone, Copy, Debug)]
pub struct Simulation<'a> {
    /// How the model is spread.
    pub layout: &'a Layout,
    /// Which requests come, and when.
    pub workload: &'a Workload,
    /// Limits of the schedulers.
    pub limits: Limits,
    /// What users want.
    pub goals: Goals,
    /// Seed of the fullest rank's load in each step; without, it is the mean.
    pub stragglers: Option<u64>,
}

/// Runs all requests to their end.
///
/// # Errors
/// [`PlannerError::DoesNotFit`]: weights, activations and the longest request are more than a GPU holds;
/// [`PlannerError::Sched`]: limits that the scheduler cannot obey; and the model cannot be spread like this.
pub fn simulate(predictor: &mut Predictor, simulation: &Simulation) -> Result<Simulated, PlannerError> {
    simulate_watched(predictor, simulation, |_| ())
}

/// The same; `watch` sees what each group has run, step by step.
///
/// # Errors
/// As of [`simulate`].
pub fn simulate_watched(
    predictor: &mut Predictor,
    simulation: &Simulation,
    mut watch: impl FnMut(&[DrivenStep]),
) -> Result<Simulated, PlannerError> {
    let kv_tokens = room(predictor, simulation)?;
    let pace = pace(predictor, simulation, kv_tokens)?;
    run(predictor, simulation, kv_tokens, pace, &mut watch)
}

/// Tokens that the KV cache of a group holds.
fn room(predictor: &mut Predictor, simulation: &Simulation) -> Result<f64, PlannerError> {
    let Simulation { layout, workload, limits, .. } = *simulation;
    let footprint = predictor.iterations.footprint(layout, limits.max_num_batched_tokens as f64)?;
    predictor.room(layout, &footprint, workload.longest() as f64)
}

fn pace(predictor: &mut Predictor, simulation: &Simulation, kv_tokens: f64) -> Result<Pace, PlannerError> {
    Pace::of(predictor, simulation, kv_tokens, |predictor, pace| {
        run(predictor, simulation, kv_tokens, pace, &mut |_| ())
    })
}

fn run(
    predictor: &mut Predictor,
    simulation: &Simulation,
    kv_tokens: f64,
    pace: Pace,
    watch: &mut dyn FnMut(&[DrivenStep]),
) -> Result<Simulated, PlannerError> {
    let schedulers = schedulers(simulation, kv_tokens)?;
    let resolved = predictor.iterations.resolve(simulation.layout)?;
    let mut run = Run::new(simulation, &mut predictor.iterations, resolved, schedulers, kv_tokens, pace);
    run.finish(watch)?;
    let Run { record, executor, schedulers, .. } = run;
    let simulated = result::sum_up(simulation, executor.iterations, &record, &executor.clock, &schedulers, kv_tokens);
    Ok(Simulated { ttft_sd: pace.ttft_sd, tpot_sd: pace.tpot_sd, ..simulated })
}

fn schedulers(simulation: &Simulation, kv_tokens: f64) -> Result<Vec<Scheduler>, PlannerError> {
    let Simulation { layout, workload, limits, .. } = simulation;
    let longest = workload.longest();
    let enable_prefix_caching = workload.prefix_hit > 0.0;
    let mut num_blocks = (kv_tokens / limits.block_size as f64).min(f64::from(u32::MAX)) as usize;
    if !enable_prefix_caching {
        // More than all that may run can never be used.
        num_blocks = num_blocks.min(limits.max_num_seqs.saturating_mul(longest.div_ceil(limits.block_size)));
    }
    let config = SchedulerConfig {
        max_num_seqs: limits.max_num_seqs,
        max_num_batched_tokens: limits.max_num_batched_tokens,
        max_model_len: longest,
        block_size: limits.block_size,
        num_blocks,
        max_num_waiting: workload.num_requests,
        enable_prefix_caching,
        enable_chunked_prefill: limits.enable_chunked_prefill,
    };
    Ok((0..layout.dp).map(|_| Scheduler::new(config.clone())).collect::<Result<_, _>>()?)
}

/// A simulation on its way.
struct Run<'p, 'm> {
    shared_prefix: f64,
    asks: Vec<asks::Ask>,
    /// Requests that have come.
    asked: usize,
    /// Requests of which it is known when they come.
    timed: usize,
    schedulers: Vec<Scheduler>,
    /// By group: tokens of its open requests at their longest.
    open: Vec<usize>,
    executor: Priced<'p, 'm>,
    /// Seconds from a question until the scheduler knows of it.
    delay: f64,
    record: Record,
    kv_blocks: f64,
}

impl<'p, 'm> Run<'p, 'm> {
    fn new(
        simulation: &Simulation<'p>,
        iterations: &'p mut Iterations<'m>,
        resolved: Resolved<'p>,
        schedulers: Vec<Scheduler>,
        kv_tokens: f64,
        pace: Pace,
    ) -> Run<'p, 'm> {
        let asks = asks::asks(simulation.workload);
        let record = Record::new(asks.len(), simulation.workload.arrival);
        let stragglers = simulation.stragglers.map(SplitMix64);
        Run {
            shared_prefix: simulation.workload.prefix_hit,
            timed: asks.iter().filter(|ask| ask.at.is_some()).count(),
            asks,
            asked: 0,
            open: vec![0; schedulers.len()],
            kv_blocks: (kv_tokens / simulation.limits.block_size as f64).floor() * schedulers.len() as f64,
            schedulers,
            executor: Priced { iterations, resolved, stragglers, pace: pace.factor, clock: Clock::default() },
            delay: pace.delay,
            record,
        }
    }

    fn finish(&mut self, watch: &mut dyn FnMut(&[DrivenStep])) -> Result<(), PlannerError> {
        loop {
            while self.next_arrival().is_some_and(|at| at <= self.executor.clock.now) {
                self.ask()?;
            }
            if self.schedulers.iter().all(Scheduler::is_idle) {
                match self.next_arrival() {
                    Some(at) => self.executor.clock.now = at,
                    None => return Ok(()),
                }
            } else {
                watch(&self.step()?);
            }
        }
    }

    /// When the scheduler learns of the next request.
    fn next_arrival(&self) -> Option<f64> {
        self.asks.get(self.asked)?.at.map(|at| at + self.delay)
    }

    /// The next request goes to the group that has the least to do.
    fn ask(&mut self) -> Result<(), PlannerError> {
        let idx = self.asked;
        let ask = self.asks[idx];
        let group = (0..self.open.len()).min_by_key(|&group| self.open[group]).expect("at least one group");
        self.schedulers[group].add(ask.request(idx, self.shared_prefix))?;
        self.open[group] += ask.input + ask.output;
        self.record.ask(idx, ask.at.expect("it has come"));
        self.asked += 1;
        Ok(())
    }

    fn step(&mut self) -> Result<Vec<DrivenStep>, PlannerError> {
        let driven = drive_groups(&mut self.schedulers, &mut self.executor)?;
        let now = self.executor.clock.now;
        let stats = self.schedulers.iter().map(Scheduler::stats).sum();
        self.record.step(&self.executor.clock, &stats, self.kv_blocks);
        for (group, driven) in driven.iter().enumerate() {
            for update in &driven.updates {
                let idx = update.id.0 as usize;
                self.record.token(idx, now, update.finish.is_some());
                if update.finish.is_some() {
                    self.open[group] -= self.asks[idx].input + self.asks[idx].output;
                    // In a closed loop, whoever has an answer asks again.
                    if let Some(next) = self.asks.get_mut(self.timed) {
                        next.at = Some(now);
                        self.timed += 1;
                    }
                }
            }
        }
        Ok(driven)
    }
}
