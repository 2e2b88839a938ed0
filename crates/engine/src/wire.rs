//! What goes between the leader, who schedules, and the ranks, who compute. Plain data; to ranks that are processes it goes
//! in postcard's binary form.

use std::collections::BTreeMap;

use moesaic_device::OpCall;
use moesaic_kernels::sampler::{Sampled, SamplingParams};
use moesaic_model::Choices;
use moesaic_plan::eplb::RoutingTrace;
use moesaic_plan::{ExpertId, Placement, Rank};
use serde::{Deserialize, Serialize};

use crate::balance::LoadCounters;

/// One step, as one rank needs it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct StepCommand {
    /// Number of the step, the same for everybody.
    pub step: u64,
    /// New sequences that this rank samples.
    pub opened: Vec<Opened>,
    /// Tokens that the step before gained, of sequences that go on.
    pub committed: Vec<(u64, u32)>,
    /// Sequences that are over.
    pub closed: Vec<u64>,
    /// From this step on experts live here.
    pub placement: Option<Placement>,
    /// Experts that are on their way, from the step on that first names them.
    pub moves: Vec<ExpertMove>,
    /// By micro-batch.
    pub micro_batches: Vec<MicroBatchCommand>,
}

/// A sequence that begins.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Opened {
    pub id: u64,
    pub sampling: SamplingParams,
    pub prompt: Vec<u32>,
}

/// A part of a step.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct MicroBatchCommand {
    /// Sequences of the rank's data-parallel group; none on a rank that has experts only.
    pub seqs: Vec<SeqPart>,
    /// Rows of every data-parallel group.
    pub group_rows: Vec<usize>,
}

/// A sequence's share of a step, as the scheduler made it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SeqPart {
    pub id: u64,
    pub token_ids: Vec<u32>,
    pub start: usize,
    pub block_table: Vec<u32>,
    pub samples: bool,
    pub num_generated: usize,
}

/// An expert's weights go from one rank to another, while steps run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ExpertMove {
    /// Number of the move, counted over the whole run.
    pub number: u32,
    pub layer: u32,
    pub expert: ExpertId,
    pub from: Rank,
    pub to: Rank,
}

/// What one rank has done.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct StepReply {
    /// The next tokens of sequences that this rank samples.
    pub sampled: Vec<(u64, Sampled)>,
    /// Logits by sequence and position, when they are kept.
    pub logits: Vec<(u64, usize, Vec<f32>)>,
    /// Tokens by layer and logical expert.
    pub expert_counts: BTreeMap<u32, Vec<u32>>,
    /// The same by streams of sequences, where experts are balanced.
    pub loads: Option<LoadCounters>,
    /// Which experts the same tokens chose, where that is recorded.
    pub trace: Option<RoutingTrace>,
    /// Pairs of token and expert that lost their place.
    pub dropped: u64,
    /// Squared errors and squares of what was exchanged in 8 bits.
    pub quantization: (f64, f64),
    /// Numbers of moves whose weights have arrived here.
    pub arrived: Vec<u32>,
    /// Bytes of weights sent.
    pub weights_sent: u64,
    /// Seconds of this thread's processor time by action of the schedule, when they are measured.
    pub action_s: Vec<f64>,
    /// Memory that was reached at most.
    pub peaks: MemoryPeaks,
    /// Every op and message by action of the schedule, when they are recorded; stays in the process.
    #[serde(skip)]
    pub calls: Vec<Vec<OpCall>>,
    /// Messages of moving experts; likewise.
    #[serde(skip)]
    pub background: Vec<OpCall>,
    /// What routers chose for this rank's rows; likewise.
    #[serde(skip)]
    pub choices: Vec<Choices>,
}

/// Memory that a rank has reached at most, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPeaks {
    /// Activations.
    pub activations: u64,
    /// Messages.
    pub exchange: u64,
}
