//! One step as bars of ranks over time.

use moesaic_plan::{Collective, Lane, Rank, Schedule, Work};
use serde::{Deserialize, Serialize};

use crate::clock::StepTimes;

/// Most ranks that are drawn; of more, some are chosen evenly.
const MAX_ROWS: usize = 32;
/// Parts of the step's length that are too short to be seen.
const RESOLUTION: f64 = 1500.0;

/// One step of some ranks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Timeline {
    /// Which step.
    pub step: u64,
    /// Its length, seconds.
    pub seconds: f64,
    /// Ranks of the plan.
    pub ranks: usize,
    /// Those that are drawn, ascending.
    pub rows: Vec<TimelineRow>,
}

/// One rank.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TimelineRow {
    /// Which.
    pub rank: u32,
    /// Its compute lane; waits come after the actions that they are a part of.
    pub compute: Vec<TimelineSpan>,
    /// Messages that it sends, from their first byte to their arrival.
    pub network: Vec<TimelineSpan>,
}

/// Something that takes time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct TimelineSpan {
    /// What.
    pub activity: Activity,
    /// Micro-batch.
    pub micro_batch: u32,
    /// Seconds from the step's begin.
    pub start: f64,
    /// Seconds from the step's begin.
    pub end: f64,
}

/// What takes time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activity {
    /// Attention with its projections.
    Attention,
    /// Routed experts.
    Experts,
    /// Everything else that is computed.
    Other,
    /// Waiting for a message.
    Waiting,
    /// A message.
    Message(Collective),
}

impl Timeline {
    /// Of a step.
    pub fn of(times: &StepTimes, schedules: &[Schedule]) -> Timeline {
        let (start, ranks) = (times.start(), times.actions.len());
        let in_time = times.messages.iter().map(|message| message.arrival).fold(times.end(), f64::max);
        let mut timeline = Timeline { step: times.step, seconds: in_time - start, ranks, rows: Vec::new() };
        let count = ranks.min(MAX_ROWS);
        for rank in (0..count).map(|row| row * ranks / count) {
            let row = row(times, &schedules[rank], (start, timeline.seconds / RESOLUTION));
            timeline.rows.push(row);
        }
        timeline
    }
}

fn row(times: &StepTimes, schedule: &Schedule, (begin, shortest): (f64, f64)) -> TimelineRow {
    let span = |activity, micro_batch, (start, end): (f64, f64)| TimelineSpan {
        activity,
        micro_batch,
        start: round(start - begin),
        end: round(end - begin),
    };
    let rank: Rank = schedule.rank;
    let in_compute = |action: usize| schedule.actions[action].lane == Lane::Compute;
    let actions = times.actions[rank.idx()].iter().filter(|action| in_compute(action.action));
    let actions = actions.map(|done| {
        let action = &schedule.actions[done.action];
        span(activity(&action.work), action.micro_batch, (done.start, done.end))
    });
    let micro_batch = |action: Option<usize>| action.map_or(0, |action| schedule.actions[action].micro_batch);
    let awaited = times.messages.iter().filter(|message| message.to == rank);
    let waits = awaited.filter_map(|message| {
        let (wanted, action) = (message.wanted?, message.receiver_action?);
        (wanted < message.arrival && in_compute(action))
            .then(|| span(Activity::Waiting, micro_batch(Some(action)), (wanted, message.arrival)))
    });
    let sent = times.messages.iter().filter(|message| message.from == rank && message.to != rank);
    let sent = sent.map(|message| {
        let of = Activity::Message(message.kind.collective());
        span(of, micro_batch(message.sender_action), (message.start, message.arrival))
    });
    let mut compute = joined(actions.collect(), shortest);
    compute.extend(joined(waits.collect(), shortest));
    TimelineRow { rank: rank.0, compute, network: joined(sent.collect(), shortest) }
}

/// To nanoseconds: more digits only make files longer.
fn round(seconds: f64) -> f64 {
    (1e9 * seconds).round() / 1e9
}

/// Neighbours of one kind become one where no eye can tell them apart.
fn joined(mut spans: Vec<TimelineSpan>, shortest: f64) -> Vec<TimelineSpan> {
    spans.sort_by(|a, b| a.start.total_cmp(&b.start));
    let mut joined: Vec<TimelineSpan> = Vec::new();
    for span in spans.into_iter().filter(|span| span.end > span.start) {
        match joined.last_mut() {
            Some(last)
                if (last.activity, last.micro_batch) == (span.activity, span.micro_batch)
                    && span.start - last.end < shortest =>
            {
                last.end = last.end.max(span.end);
            }
            _ => joined.push(span),
        }
    }
    joined
}

fn activity(work: &Work) -> Activity {
    match work {
        Work::Attention | Work::Project | Work::Attend => Activity::Attention,
        Work::Experts { .. } => Activity::Experts,
        _ => Activity::Other,
    }
}
