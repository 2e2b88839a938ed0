//! What a rank did in a step, as plain data.

use moesaic_device::op_log::OpCall;
use moesaic_plan::Work;

/// What one rank did in one step.
#[derive(Clone, Debug, Default)]
pub struct RankStep {
    /// The actions that were executed, ascending by index. An action that is in the schedule and not here (its micro-batch
    /// had no tokens) takes no time.
    pub actions: Vec<ActionRecord>,
    /// Messages of weights that belong to no action. They set out when the rank's step begins.
    pub background: Vec<OpCall>,
}

/// What one action did.
#[derive(Clone, Debug)]
pub struct ActionRecord {
    /// Its index in the rank's schedule.
    pub action: usize,
    /// Its ops and messages, in order.
    pub calls: Vec<OpCall>,
}

/// What an action is called in traces, timelines and errors.
pub fn work_name(work: &Work) -> &'static str {
    match work {
        Work::Embed => "embed",
        Work::ReceiveHidden { .. } => "receive hidden",
        Work::SendHidden { .. } => "send hidden",
        Work::Attention => "attention",
        Work::Project => "project",
        Work::Attend => "attend",
        Work::AllReduce { .. } => "all-reduce",
        Work::Mlp => "mlp",
        Work::Route => "route",
        Work::SharedExpert => "shared expert",
        Work::Dispatch { .. } => "dispatch",
        Work::Relay { .. } => "relay",
        Work::Experts { .. } => "experts",
        Work::Answer { .. } => "answer",
        Work::Combine { .. } => "combine",
        Work::AllGather { .. } => "all-gather",
        Work::Head => "head",
        Work::GatherLogits { .. } => "gather logits",
        Work::Sample => "sample",
    }
}
