//! One step of one rank: its actions, one at a time.
//!
//! The engine goes through a rank's schedule and calls [`Step::run`] for each action; so does a trace on `Meta`, where ops
//! and messages are recorded and nothing moves. Letters as in `kernels`.
//!
//! A rank without rows in a micro-batch has nothing to do there but what its experts do for others; everybody knows from
//! the step's [`MicroBatch::group_rows`] who that is, so nobody sends an empty message or waits for one.

mod dense;
mod moe;
mod wire;

use std::ops::Range;

use moesaic_comm::Communicator;
use moesaic_device::{Ctx, Tensor};
use moesaic_kernels::paged::PagedBatch;
use moesaic_plan::{Action, AttentionShard, ExpertShard, MessageKind, Placement, Plan, Rank, Tag, Work};
use moesaic_spec::Moe;

use self::moe::{MoeFlow, Wave};
use self::wire::Inbound;
use crate::layers::Projected;
use crate::transformer::{AttentionHalf, DecoderLayer};
use crate::{KvCache, ModelError, Transformer};

/// What a step computes in one micro-batch: `T` tokens of several sequences, rows of a sequence together and in order.
pub struct MicroBatch {
    /// Token ids of the rank's data-parallel group, `T` of them; none on a rank that has experts only.
    pub token_ids: Vec<u32>,
    /// Which sequence each row belongs to, and where its keys and values are.
    pub batch: PagedBatch,
    /// The rows whose logits are wanted.
    pub logit_rows: Vec<usize>,
    /// Rows of every data-parallel group.
    pub group_rows: Vec<usize>,
}

/// What a rank knows while it runs a step.
#[derive(Clone, Copy)]
pub struct Surroundings<'a> {
    /// Device and log.
    pub ctx: &'a Ctx,
    /// The other ranks.
    pub comm: &'a dyn Communicator,
    /// Who is who.
    pub plan: &'a Plan,
    /// Where experts live now.
    pub placement: &'a Placement,
    /// Number of the step, the same for everybody.
    pub step: u64,
}

/// What happened in a step beside its result.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepStats {
    /// What routers chose for this rank's rows.
    pub choices: Vec<Choices>,
    /// Sum of squared errors of the 8-bit exchange, and the sum of squares of what was exchanged.
    pub quantization: (f64, f64),
}

/// What one router chose.
#[derive(Clone, Debug, PartialEq)]
pub struct Choices {
    /// Decoder layer.
    pub layer: u32,
    /// Micro-batch.
    pub micro_batch: u32,
    /// First of the rows, in the micro-batch.
    pub first_row: usize,
    /// Logical experts, `[rows, A]`; -1 where a pair lost its place.
    pub expert_of: Vec<i32>,
}

/// A step in the making.
pub struct Step<'a> {
    around: Surroundings<'a>,
    transformer: &'a Transformer,
    kv: &'a mut KvCache,
    flows: Vec<Flow>,
    stats: StepStats,
}

/// One micro-batch on its way through the layers.
struct Flow {
    input: MicroBatch,
    residual: Option<Tensor>, // [T, D]
    /// What the residual stream has not taken yet, possibly a partial sum; `[T, D]`.
    delta: Option<Tensor>,
    /// Between Project and Attend.
    projected: Option<Projected>,
    moe: Option<MoeFlow>,
    /// Answers of the last `Experts`, for others.
    wave: Option<Wave>,
    /// Rows that this rank's relay kept for itself.
    kept: Vec<Inbound>,
    logits: Option<Tensor>, // [S, V]
}

impl<'a> Step<'a> {
    /// A step over these micro-batches.
    pub fn new(
        around: Surroundings<'a>,
        transformer: &'a Transformer,
        kv: &'a mut KvCache,
        micro_batches: Vec<MicroBatch>,
    ) -> Step<'a> {
        let flow = |input| Flow {
            input,
            residual: None,
            delta: None,
            projected: None,
            moe: None,
            wave: None,
            kept: Vec::new(),
            logits: None,
        };
        let flows = micro_batches.into_iter().map(flow).collect();
        Step { around, transformer, kv, flows, stats: StepStats::default() }
    }

    /// Does one action; `Sample` is not one of ours.
    pub fn run(&mut self, action: &Action) -> Result<(), ModelError> {
        let Action { layer, micro_batch: mb, .. } = *action;
        let mb = mb as usize;
        match &action.work {
            Work::Relay { from, to } => return self.relay(layer, mb, from, to),
            Work::Experts { from, relays } => return self.experts(layer, mb, from, relays),
            Work::Answer { .. } => return self.answer(layer, mb),
            _ if self.flows[mb].input.token_ids.is_empty() => return Ok(()),
            _ => {}
        }
        match &action.work {
            Work::Embed => self.embed(mb),
            Work::ReceiveHidden { from } => self.receive_hidden(layer, mb, *from),
            Work::SendHidden { to } => self.send_hidden(layer, mb, *to),
            Work::Attention => self.attention(layer, mb),
            Work::Project => self.project(layer, mb),
            Work::Attend => self.attend(layer, mb),
            Work::AllReduce { of, group, algorithm } => self.all_reduce((layer, mb), *of, group, *algorithm),
            Work::Mlp => self.mlp(layer, mb),
            Work::Route => self.route(layer, mb),
            Work::SharedExpert => self.shared_expert(layer, mb),
            Work::Dispatch { to } => self.dispatch(layer, mb, to),
            Work::Combine { from } => self.combine(layer, mb, from),
            Work::AllGather { group } => self.all_gather(layer, mb, group),
            Work::Head => self.head(mb),
            Work::GatherLogits { group } => self.gather_logits(layer, mb, group),
            Work::Relay { .. } | Work::Experts { .. } | Work::Answer { .. } => unreachable!("done above"),
            Work::Sample => unreachable!("who runs the step samples"),
        }
    }

    /// The logits of a micro-batch's wanted rows, F32 `[logit_rows, V]`; on the rank that samples, after its head.
    pub fn take_logits(&mut self, micro_batch: usize) -> Option<Tensor> {
        self.flows[micro_batch].logits.take()
    }

    /// What happened.
    pub fn finish(self) -> StepStats {
        self.stats
    }

    fn half(&self, layer: u32) -> &'a AttentionHalf {
        self.layer(layer).attention.as_deref().expect("a rank with attention")
    }

    fn layer(&self, layer: u32) -> &'a DecoderLayer {
        self.transformer.layer(layer)
    }

    fn moe_spec(&self, layer: u32) -> &'a Moe {
        self.transformer.spec().layers[layer as usize].as_moe().expect("the schedule follows the model")
    }

    fn tag(&self, layer: u32, mb: usize, kind: MessageKind) -> Tag {
        Tag { step: self.around.step, layer, micro_batch: mb as u32, kind, round: 0 }
    }

    /// Rows of a micro-batch that a rank sends to experts.
    fn rows_of(&self, mb: usize, source: Rank) -> usize {
        let shard = &self.around.plan.shards[source.idx()];
        let attention = shard.attention.as_ref().expect("a source has attention");
        let group_rows = self.flows[mb].input.group_rows[attention.group];
        own_rows(attention, shard.experts, group_rows).len()
    }

    fn with_rows(&self, mb: usize, sources: &[Rank]) -> Vec<Rank> {
        sources.iter().copied().filter(|&source| self.rows_of(mb, source) > 0).collect()
    }
}

impl Transformer {
    /// Rows of its group's `num_rows` that this rank sends to experts and sums.
    fn own_rows(&self, num_rows: usize) -> Range<usize> {
        let attention = self.shard.attention.as_ref().expect("a rank with attention");
        own_rows(attention, self.shard.experts, num_rows)
    }
}

/// With whole experts, the ranks of a tensor-parallel group, who all have the group's rows, share them out.
fn own_rows(attention: &AttentionShard, experts: ExpertShard, num_rows: usize) -> Range<usize> {
    match experts {
        ExpertShard::Cut(_) => 0..num_rows,
        ExpertShard::None | ExpertShard::Placed => attention.tp.range(num_rows, 1),
    }
}
