//! What a simulation has shown.

use moesaic_sched::{SchedStats, Scheduler};
use serde::{Deserialize, Serialize};

use super::Simulation;
use super::distribution::Distribution;
use super::executor::{CLASSES, Clock};
use super::record::{Record, Request};
use crate::iteration::{Cost, Iterations};
use crate::metrics::share;
use crate::predict::CommunicationShare;

/// What a user wants of a request; what is absent does not matter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Goals {
    /// Time to first token at most, seconds.
    pub ttft_s: Option<f64>,
    /// Time per output token after the first at most, seconds.
    pub tpot_s: Option<f64>,
    /// Time to the last token at most, seconds.
    pub e2e_s: Option<f64>,
}

impl Goals {
    /// Whether there is one.
    pub fn any(&self) -> bool {
        *self != Goals::default()
    }

    fn met(&self, request: &Request) -> bool {
        let within = |value: f64, goal: Option<f64>| goal.is_none_or(|goal| value <= goal);
        within(ttft(request), self.ttft_s)
            && within(e2e(request), self.e2e_s)
            && tpot(request).is_none_or(|tpot| within(tpot, self.tpot_s))
    }
}

/// Requests that met all goals.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Goodput {
    /// The goals.
    pub goals: Goals,
    /// Their share of all requests.
    pub share: f64,
    /// How many of them in a second.
    pub requests_per_s: f64,
}

/// The server at the end of a step, or in the mean over several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Moment {
    /// Seconds since the start.
    pub at_s: f64,
    /// Requests that run, all groups.
    pub running: f64,
    /// Requests that wait, all groups.
    pub waiting: f64,
    /// Share of the KV cache that is used.
    pub kv_use: f64,
    /// Sequences that got one more token, in the group that all waited for.
    pub decodes: f64,
    /// Tokens of prompts that it read.
    pub prefill_tokens: f64,
}

/// Between the time when the start is over and the time when the last request came.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Steady {
    /// From.
    pub from_s: f64,
    /// To.
    pub to_s: f64,
    /// Output tokens per second.
    pub tokens_per_s: f64,
    /// Time to first token, of requests that came in that time, mean, seconds.
    pub ttft_s: f64,
    /// Time per output token after the first, of the same, mean, seconds.
    pub tpot_s: f64,
}

/// What a simulation has shown.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Simulated {
    /// GPUs.
    pub gpus: usize,
    /// Requests.
    pub requests: usize,
    /// Tokens of prompts, those that the prefix cache had included.
    pub prompt_tokens: u64,
    /// Output tokens.
    pub tokens: u64,
    /// From the start to the last token, seconds.
    pub seconds: f64,
    /// Iterations.
    pub steps: u64,
    /// Time to first token, seconds, by request.
    pub ttft_s: Distribution,
    /// Time per output token after the first, seconds, by request.
    pub tpot_s: Distribution,
    /// Time between two tokens, seconds, by token.
    pub itl_s: Distribution,
    /// Time from question to last token, seconds, by request.
    pub e2e_s: Distribution,
    /// Output tokens per second of all users together, from the start to the last token.
    pub tokens_per_s: f64,
    /// The same for each GPU.
    pub tokens_per_s_gpu: f64,
    /// Output tokens per second that one user gets: the reciprocal of the mean time per output token.
    pub tokens_per_s_user: f64,
    /// Requests per second.
    pub requests_per_s: f64,
    /// Start and end left out; absent where there is nothing else.
    pub steady: Option<Steady>,
    /// Requests that met the goals, if there are goals.
    pub goodput: Option<Goodput>,
    /// Standard deviation of the natural logarithm of the time to first token, by what prices and the system are off.
    pub ttft_sd: f64,
    /// The same of the time per output token.
    pub tpot_sd: f64,
    /// Tokens that the KV cache of one group holds.
    pub kv_tokens: f64,
    /// Share of the KV cache that is used, mean over time.
    pub kv_use_mean: f64,
    /// The greatest.
    pub kv_use_max: f64,
    /// Times that a request lost its KV cache, to be computed again.
    pub preemptions: u64,
    /// Share of the prompts' tokens that the prefix cache had.
    pub prefix_hit: f64,
    /// Share of the iterations in which some prompt was read by the group that all waited for.
    pub prefill_share: f64,
    /// Requests that run, mean over time.
    pub running: f64,
    /// Share of the time in which a rank with attention computes.
    pub gpu_utilization: f64,
    /// Model FLOPs utilization.
    pub mfu: f64,
    /// Memory bandwidth utilization.
    pub mbu: f64,
    /// Rows of the fullest rank with experts over the mean, mean over time.
    pub imbalance: f64,
    /// Communication of a rank with attention.
    pub communication: Vec<CommunicationShare>,
    /// The run, cut into equal times.
    pub timeline: Vec<Moment>,
}

fn ttft(request: &Request) -> f64 {
    request.first - request.arrival
}

fn e2e(request: &Request) -> f64 {
    request.last - request.arrival
}

/// `None` of an answer of one token.
fn tpot(request: &Request) -> Option<f64> {
    (request.tokens > 1).then(|| (request.last - request.first) / (request.tokens - 1) as f64)
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    share(sum, count)
}

pub(super) fn sum_up(
    simulation: &Simulation,
    iterations: &Iterations,
    record: &Record,
    clock: &Clock,
    schedulers: &[Scheduler],
    kv_tokens: f64,
) -> Simulated {
    let gpus = simulation.layout.ranks();
    let stats: SchedStats = schedulers.iter().map(Scheduler::stats).sum();
    let requests = &record.requests;
    let tpot_s = Distribution::of(requests.iter().filter_map(tpot));
    let met = requests.iter().filter(|request| simulation.goals.met(request)).count() as f64;
    let over_time = |of: fn(&Moment) -> f64| {
        let mut before = 0.0;
        let weighted = record
            .moments
            .iter()
            .map(|moment| of(moment) * (moment.at_s - std::mem::replace(&mut before, moment.at_s)));
        share(weighted.sum(), clock.now)
    };
    let per_s = |count: f64| share(count, clock.now);
    let used = |of: fn(&Cost) -> f64| per_gpu(simulation, clock, of);
    let gpu = &iterations.cluster().gpu;
    Simulated {
        gpus,
        requests: requests.len(),
        prompt_tokens: simulation.workload.lengths().map(|(input, _)| input as u64).sum(),
        tokens: record.tokens,
        seconds: clock.now,
        steps: clock.steps,
        ttft_s: Distribution::of(requests.iter().map(ttft)),
        itl_s: Distribution::weighted(record.gaps.clone()),
        e2e_s: Distribution::of(requests.iter().map(e2e)),
        tokens_per_s: per_s(record.tokens as f64),
        tokens_per_s_gpu: per_s(record.tokens as f64) / gpus as f64,
        tokens_per_s_user: share(1.0, tpot_s.mean),
        tpot_s,
        requests_per_s: per_s(requests.len() as f64),
        steady: steady(record),
        goodput: simulation.goals.any().then(|| Goodput {
            goals: simulation.goals,
            share: met / requests.len() as f64,
            requests_per_s: per_s(met),
        }),
        ttft_sd: 0.0,
        tpot_sd: 0.0,
        kv_tokens,
        kv_use_mean: over_time(|moment| moment.kv_use),
        kv_use_max: record.moments.iter().map(|moment| moment.kv_use).fold(0.0, f64::max),
        preemptions: stats.preemptions,
        prefix_hit: share(stats.prefix_cache_hits as f64, stats.prefix_cache_queries as f64),
        prefill_share: share(clock.steps_with_prefill as f64, clock.steps as f64),
        running: over_time(|moment| moment.running),
        gpu_utilization: per_s(clock.computing),
        mfu: used(|cost| cost.flops) / iterations.formats().experts.peak(gpu),
        mbu: used(|cost| cost.bytes) / gpu.memory_bandwidth,
        imbalance: share(clock.imbalance, clock.busy),
        communication: communication(clock),
        timeline: timeline(&record.moments),
    }
}

/// What a GPU does in a second, mean over all of them.
fn per_gpu(simulation: &Simulation, clock: &Clock, of: fn(&Cost) -> f64) -> f64 {
    let layout = simulation.layout;
    let (gpus, attention) = (layout.ranks() as f64, (layout.pp * layout.tp * layout.dp) as f64);
    let all = of(&clock.spent[0]) * attention + of(&clock.spent[1]) * (gpus - attention);
    share(all / gpus, clock.now)
}

fn communication(clock: &Clock) -> Vec<CommunicationShare> {
    let all: f64 = clock.classes.iter().sum();
    let exposed = (clock.busy - clock.computing).max(0.0);
    let of = |(&total, class): (&f64, _)| CommunicationShare {
        class,
        total: total / clock.now,
        // What is exposed is shared out by the time that each class takes.
        exposed: (exposed * total / all).min(total) / clock.now,
    };
    clock.classes.iter().zip(CLASSES).filter(|(total, _)| **total > 0.0).map(of).collect()
}

fn steady(record: &Record) -> Option<Steady> {
    let [Some(from), Some(to)] = record.steady else { return None };
    let came = || record.requests.iter().filter(|request| (from.at..to.at).contains(&request.arrival));
    came().next()?;
    Some(Steady {
        from_s: from.at,
        to_s: to.at,
        tokens_per_s: (to.tokens - from.tokens) as f64 / (to.at - from.at),
        ttft_s: mean(came().map(ttft)),
        tpot_s: mean(came().filter_map(tpot)),
    })
}

/// Points of a timeline.
const POINTS: usize = 240;

/// Steps of equal times together, as their mean over time.
fn timeline(moments: &[Moment]) -> Vec<Moment> {
    let Some(end) = moments.last().map(|moment| moment.at_s).filter(|&end| end > 0.0) else { return Vec::new() };
    let mut points: Vec<Moment> = Vec::new();
    let mut before = 0.0;
    for part in moments.chunk_by(|a, b| part_of(a.at_s, end) == part_of(b.at_s, end)) {
        let from = before;
        let mut weighted = |of: fn(&Moment) -> f64| {
            let mut last = from;
            let sum: f64 = part.iter().map(|m| of(m) * (m.at_s - std::mem::replace(&mut last, m.at_s))).sum();
            before = last;
            share(sum, last - from)
        };
        points.push(Moment {
            running: weighted(|m| m.running),
            waiting: weighted(|m| m.waiting),
            kv_use: weighted(|m| m.kv_use),
            decodes: weighted(|m| m.decodes),
            prefill_tokens: weighted(|m| m.prefill_tokens),
            at_s: before,
        });
    }
    points
}

fn part_of(at: f64, end: f64) -> usize {
    (at / end * POINTS as f64) as usize
}
