//! What a step did, as plain data.

use std::collections::BTreeMap;

use moesaic_device::OpCall;
use moesaic_model::Choices;
use moesaic_sched::SeqId;

use crate::synchronize::Features;
use crate::wire::MemoryPeaks;

/// What one step did on all ranks, for whoever prices or reports it.
#[derive(Clone, Debug, Default)]
pub struct StepRecord {
    /// Number of the step.
    pub step: u64,
    /// The sequences of each micro-batch of each data-parallel group: `[group][micro_batch]`.
    pub sequences: Vec<Vec<Vec<SeqId>>>,
    /// The size of the step, but for active experts, and of each of its micro-batches.
    pub whole: Features,
    /// See `whole`.
    pub micro_batches: Vec<Features>,
    /// By rank.
    pub ranks: Vec<RankRecord>,
    /// Tokens by layer and logical expert.
    pub expert_counts: BTreeMap<u32, Vec<u32>>,
    /// Pairs of token and expert that lost their place.
    pub dropped: u64,
    /// Squared errors and squares of what was exchanged in 8 bits.
    pub quantization: (f64, f64),
    /// Bytes of moving experts.
    pub weights_sent: u64,
    /// The placement with which the step ran.
    pub placement_epoch: u64,
}

/// One rank's part of a [`StepRecord`].
#[derive(Clone, Debug, Default)]
pub struct RankRecord {
    /// Every op and message, by action of the schedule; empty unless they are recorded.
    pub calls: Vec<Vec<OpCall>>,
    /// Messages of moving experts, likewise.
    pub background: Vec<OpCall>,
    /// What routers chose for this rank's rows, likewise: with the plan it says how large the messages must be.
    pub choices: Vec<Choices>,
    /// Seconds of processor time, by action; empty unless they are measured.
    pub action_s: Vec<f64>,
    /// Memory reached so far.
    pub peaks: MemoryPeaks,
}
