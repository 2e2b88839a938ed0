//! When everything of a step happened. Times are seconds of the virtual clock.

use moesaic_plan::{Lane, MessageKind, Rank};
use moesaic_spec::{Bytes, LinkClass};

/// When everything of one step happened.
#[derive(Clone, Debug, Default)]
pub struct StepTimes {
    /// Which, from 0.
    pub step: u64,
    /// By rank, in the order in which each lane executed them.
    pub actions: Vec<Vec<ActionSpan>>,
    /// In the order in which they were served. A message of weights is in the step in which it was all sent.
    pub messages: Vec<MessageSpan>,
    /// By rank: single ops; empty unless the clock was asked for them.
    pub ops: Vec<Vec<OpSpan>>,
    /// By rank and micro-batch: end of `Sample`; `None` where the rank does not sample.
    pub sampled: Vec<Vec<Option<f64>>>,
    /// By rank.
    pub busy: Vec<Busy>,
}

impl StepTimes {
    /// Start of the first action; 0 if there was none.
    pub fn start(&self) -> f64 {
        let start = self.actions.iter().flatten().map(|span| span.start).fold(f64::INFINITY, f64::min);
        if start.is_finite() { start } else { 0.0 }
    }

    /// End of the last action; 0 if there was none.
    pub fn end(&self) -> f64 {
        self.actions.iter().flatten().map(|span| span.end).fold(0.0, f64::max)
    }
}

/// One action.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ActionSpan {
    /// Its index in the rank's schedule.
    pub action: usize,
    /// Where it ran.
    pub lane: Lane,
    /// First op, send or wait.
    pub start: f64,
    /// Last.
    pub end: f64,
    /// Seconds of it that were spent waiting for messages.
    pub waiting: f64,
}

/// One op.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OpSpan {
    /// The op's folder in `kernels`.
    pub op: &'static str,
    /// Where its action ran.
    pub lane: Lane,
    /// Begin.
    pub start: f64,
    /// End.
    pub end: f64,
    /// Operations.
    pub flops: f64,
    /// Over the memory bus.
    pub bytes: f64,
}

/// One message.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MessageSpan {
    /// Sender.
    pub from: Rank,
    /// Receiver.
    pub to: Rank,
    /// Its name between the two.
    pub tag: u64,
    /// About what.
    pub kind: MessageKind,
    /// Size.
    pub bytes: Bytes,
    /// Over which links.
    pub class: LinkClass,
    /// The sender handed it to the network.
    pub sent: f64,
    /// Its links were free and began to carry it.
    pub start: f64,
    /// Its links were free again.
    pub end: f64,
    /// It was there.
    pub arrival: f64,
    /// The receiver asked for it; `None` for weights, which nobody waits for.
    pub wanted: Option<f64>,
    /// The sender's action; `None` for weights that belong to none.
    pub sender_action: Option<usize>,
    /// The receiver's action.
    pub receiver_action: Option<usize>,
}

/// Seconds that a rank was busy in one step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Busy {
    /// Ops in the compute lane.
    pub compute_ops: f64,
    /// Ops in the comm lane.
    pub comm_ops: f64,
    /// Waits for messages in the compute lane.
    pub compute_waiting: f64,
    /// Waits for messages in the comm lane.
    pub comm_waiting: f64,
}
