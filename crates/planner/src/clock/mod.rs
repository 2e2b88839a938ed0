//! A clock that knows what every op and message of a run would have cost on a cluster.
//!
//! A step is replayed from what each rank did ([`RankStep`]) by these rules:
//!
//! - A rank has two lanes, compute and comm. Each executes its actions in the order of the schedule. An action starts when
//!   its lane is free, the actions that it comes `after` are done, and its micro-batch is ready.
//! - Inside an action things happen in the order in which they were recorded. An op takes what the roofline says. A send hands
//!   the message to the network and takes no time. A receive waits until the message is there.
//! - Ops of the two lanes do not slow each other down.
//! - The network serves messages in the order of the times at which they were sent. Each occupies the links of both GPUs, and
//!   of both nodes where those are narrower than their GPUs' together, for bytes / bandwidth, and arrives a latency later.
//!   An earlier message is never moved for a later one, but a later one may go where the earlier could not.
//! - Weights travel in the background: in pieces of [`BACKGROUND_BYTES`], each sent when the one before is through, so that
//!   whoever contends with them waits for a piece at most; nobody waits for their arrival.
//!
//! Lanes go on where the step before left them, rank by rank: there is no barrier between steps. Equal inputs give equal
//! times, bit by bit.
//!
//! More bandwidth does not always make a run faster: an order of messages that suits the slow links may not suit the fast
//! ones (Graham, "Bounds on multiprocessing timing anomalies", 1969). It does for two ranks with one lane each.

pub mod activity;
pub(crate) mod network;
mod replay;
mod times;

use std::collections::VecDeque;

use moesaic_plan::{MessageKind, Rank, Schedule};
use moesaic_spec::{Bytes, Cluster, DType};

pub use times::{ActionSpan, Busy, MessageSpan, OpSpan, StepTimes};

use crate::clock::activity::{Activity, RankSeconds};
use crate::clock::network::Network;
use crate::{PlannerError, RankStep, Roofline};

/// Size of the pieces in which weights travel: 10 µs of a link of 25 GB/s.
pub const BACKGROUND_BYTES: u64 = 256 * 1024;

/// What a clock is made for.
#[derive(Clone, Copy, Debug)]
pub struct ClockSettings {
    /// Ranks.
    pub world_size: usize,
    /// Type of the weights, which decides the GPU's peak.
    pub dtype: DType,
    /// What a message is about, from its tag.
    pub kind_of: fn(u64) -> MessageKind,
    /// Keep the times of single ops, for traces.
    pub keep_ops: bool,
}

/// What happened in a step.
#[derive(Clone, Copy, Debug)]
pub struct StepInput<'a> {
    /// By rank.
    pub schedules: &'a [Schedule],
    /// By rank.
    pub ranks: &'a [RankStep],
    /// By rank and micro-batch: no action of it starts before, because its tokens are not known. 0 where there is no entry.
    pub ready: &'a [Vec<f64>],
}

/// The virtual clock of all ranks of a run.
#[derive(Debug)]
pub struct VirtualClock<'a> {
    cluster: &'a Cluster,
    settings: ClockSettings,
    network: Network,
    steps: u64,
    end: f64,
    /// By rank and lane: free from then on.
    free: Vec<[f64; 2]>,
    /// By rank: weights that are not sent yet.
    background: Vec<VecDeque<Flow>>,
    activity: Vec<Activity>,
    totals: Totals,
}

/// Sums over all steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Totals {
    /// End of the last action or message, seconds.
    pub seconds: f64,
    /// Steps.
    pub steps: u64,
    /// By rank.
    pub ranks: Vec<RankTotals>,
}

/// Sums of one rank.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RankTotals {
    /// What it spent its time on.
    pub seconds: RankSeconds,
    /// Operations, in both lanes.
    pub flops: f64,
    /// Over its memory bus, in both lanes.
    pub memory_bytes: f64,
    /// Sent, by link class (intra-node, inter-node) and by class of messages.
    pub sent: [[Traffic; 5]; 2],
    /// Received, likewise. Equals `sent` over all ranks.
    pub received: [[Traffic; 5]; 2],
}

/// Messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// How many.
    pub messages: u64,
    /// Their sizes together.
    pub bytes: u64,
}

impl Traffic {
    fn add(&mut self, bytes: Bytes) {
        self.messages += 1;
        self.bytes += bytes.0;
    }
}

/// A message of weights under way.
#[derive(Clone, Copy, Debug)]
struct Flow {
    span: MessageSpan,
    left: Bytes,
    /// The next piece can be sent.
    next_at: f64,
}

impl<'a> VirtualClock<'a> {
    /// A clock at 0.
    pub fn new(cluster: &'a Cluster, settings: ClockSettings) -> VirtualClock<'a> {
        let ranks = settings.world_size;
        VirtualClock {
            cluster,
            settings,
            network: Network::new(cluster, ranks),
            steps: 0,
            end: 0.0,
            free: vec![[0.0; 2]; ranks],
            background: vec![VecDeque::new(); ranks],
            activity: vec![Activity::default(); ranks],
            totals: Totals { ranks: vec![RankTotals::default(); ranks], ..Totals::default() },
        }
    }

    /// End of the last action so far, seconds.
    pub fn now(&self) -> f64 {
        self.end
    }

    /// Replays a step. After an error the clock is of no further use.
    pub fn step(&mut self, input: StepInput<'_>) -> Result<StepTimes, PlannerError> {
        let times = replay::Replay::new(self, input)?.run()?;
        self.steps += 1;
        for (free, spans) in self.free.iter_mut().zip(&times.actions) {
            // The list is one: no lane begins the next step before the rank began this one.
            let begin = spans.iter().map(|span| span.start).fold(f64::INFINITY, f64::min);
            if begin.is_finite() {
                free.iter_mut().for_each(|free| *free = free.max(begin));
            }
        }
        self.end = self.end.max(times.end());
        self.settle(self.watermark());
        Ok(times)
    }

    /// Sends what weights are left, and sums up.
    pub fn finish(mut self) -> Totals {
        for rank in 0..self.background.len() {
            while let Some(span) = self.send_piece(Rank(rank as u32)) {
                self.end = self.end.max(span.map_or(0.0, |span| span.arrival));
            }
        }
        self.settle(f64::INFINITY);
        Totals { seconds: self.end, steps: self.steps, ..self.totals }
    }

    fn roofline(&self) -> Roofline<'a> {
        Roofline { gpu: &self.cluster.gpu, dtype: self.settings.dtype }
    }

    /// Nothing new will happen before.
    fn watermark(&self) -> f64 {
        let lanes = self.free.iter().flatten().copied();
        let flows = self.background.iter().filter_map(|flows| flows.front()).map(|flow| flow.next_at);
        lanes.chain(flows).fold(f64::INFINITY, f64::min)
    }

    fn settle(&mut self, until: f64) {
        for (activity, totals) in self.activity.iter_mut().zip(&mut self.totals.ranks) {
            activity.settle(until, &mut totals.seconds);
        }
        self.network.forget_before(until);
    }

    /// Books what a message means for both ends.
    fn count(&mut self, span: &MessageSpan) {
        let class = activity::collective_idx(span.kind.collective());
        let link = network::class_idx(span.class);
        let [from, to] = [span.from.idx(), span.to.idx()];
        let ranks = &mut self.totals.ranks;
        ranks[from].sent[link][class].add(span.bytes);
        ranks[to].received[link][class].add(span.bytes);
    }

    /// Marks a transfer in the time of both ends.
    fn mark(&mut self, span: &MessageSpan, transfer: network::Transfer) {
        let class = activity::collective_idx(span.kind.collective());
        self.activity[span.from.idx()].transfers[class].push(transfer.start, transfer.end);
        self.activity[span.to.idx()].transfers[class].push(transfer.start, transfer.arrival);
    }

    /// Sends the next piece of a rank's weights. `None` when there is none; `Some(Some)` when it was a message's last.
    fn send_piece(&mut self, rank: Rank) -> Option<Option<MessageSpan>> {
        let mut flow = *self.background[rank.idx()].front()?;
        let piece = flow.left.0.min(BACKGROUND_BYTES);
        let transfer = self.network.carry(flow.span.from, flow.span.to, Bytes(piece), flow.next_at);
        self.mark(&flow.span, transfer);
        if flow.left == flow.span.bytes {
            flow.span.start = transfer.start;
        }
        flow.left = Bytes(flow.left.0 - piece);
        flow.next_at = transfer.end;
        if flow.left.0 > 0 {
            self.background[rank.idx()][0] = flow;
            return Some(None);
        }
        self.background[rank.idx()].pop_front();
        if let Some(next) = self.background[rank.idx()].front_mut() {
            next.next_at = next.next_at.max(transfer.end);
        }
        let span = MessageSpan { end: transfer.end, arrival: transfer.arrival, ..flow.span };
        self.count(&span);
        Some(Some(span))
    }
}
