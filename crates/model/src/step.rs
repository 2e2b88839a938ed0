//! One step of one rank: its actions, one at a time.
//!
//! The engine goes through a rank's schedule and calls [`Step::run`] for each action; so does a trace on `Meta`, where ops
//! and messages are recorded and nothing moves. Letters as in `kernels`.
//!
//! A rank without rows in a micro-batch has nothing to do there but what its experts do for others; everybody knows from
//! the step's [`MicroBatch::group_rows`] who that is, so nobody sends an empty message or waits for one.

use std::ops::Range;
use std::rc::Rc;

use moesaic_comm::collective::{self, AllReduceArgs, GatherArgs};
use moesaic_comm::{CommError, Communicator, Message};
use moesaic_device::{Amount, Ctx, Tensor};
use moesaic_kernels::add::add;
use moesaic_kernels::add_rms_norm::add_rms_norm;
use moesaic_kernels::combine::combine;
use moesaic_kernels::dispatch::{DispatchSource, Pairs, dispatch};
use moesaic_kernels::experts::{RowsPerExpert, experts};
use moesaic_kernels::gather_rows::{gather_rows, gather_rows_into};
use moesaic_kernels::paged::PagedBatch;
use moesaic_kernels::quantize::{Format, GROUP, Quantized, dequantize, quantize, relative_error};
use moesaic_kernels::rms_norm::rms_norm;
use moesaic_kernels::router::Routing;
use moesaic_plan::plan::ExchangePrecision;
use moesaic_plan::{
    Action, AllReduce, AttentionShard, ExpertShard, MessageKind, Peers, Placement, Plan, Rank, Tag, Work,
};
use moesaic_spec::{DType, Moe};

use crate::exchange::{Assignment, Expected, Outbound, Placer, Section, encode};
use crate::kv_cache::LayerCache;
use crate::layers::{AttentionStep, FeedForward, Projected};
use crate::transformer::{AttentionHalf, AttentionLayer, DecoderLayer};
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

/// A layer's routed rows between Route and Combine.
struct MoeFlow {
    x: Tensor, // [T, D]
    routing: Routing,
    /// Rows that this rank sends and sums.
    own: Range<usize>,
    assignment: Assignment,
    shared: Option<Tensor>, // [own, D]
    /// This rank's experts' answers to its own rows: the tensor, and the row of each pair.
    answered: Option<(Rc<Tensor>, Vec<u32>)>,
}

struct Wave {
    y: Rc<Tensor>, // [R, D]
    answers: Vec<(Rank, Vec<u32>)>,
}

/// Rows that arrived, as they were sent.
struct Inbound {
    payload: Vec<Tensor>,
    sections: Vec<Section>,
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

    fn embed(&mut self, mb: usize) -> Result<(), ModelError> {
        let embedding = self.transformer.embedding.as_ref().expect("the first stage embeds");
        let flow = &mut self.flows[mb];
        flow.residual = Some(embedding.embed(self.around.ctx, &flow.input.token_ids)?);
        Ok(())
    }

    /// What was pending goes into the residual stream; its norm.
    fn normed(&mut self, mb: usize, weight: &Tensor) -> Result<Tensor, ModelError> {
        let (eps, dtype) = (self.transformer.spec().rms_norm_eps, self.transformer.compute_dtype());
        let ctx = self.around.ctx;
        let flow = &mut self.flows[mb];
        let residual = flow.residual.as_mut().expect("a residual stream");
        Ok(match flow.delta.take() {
            None => rms_norm(ctx, residual, weight, eps, dtype)?,
            Some(delta) => add_rms_norm(ctx, residual, &delta, weight, eps, dtype)?,
        })
    }

    fn receive_hidden(&mut self, layer: u32, mb: usize, from: Rank) -> Result<(), ModelError> {
        // The stage before has sent it under its own last layer.
        let tag = self.tag(layer - 1, mb, MessageKind::Hidden);
        let dims = [self.flows[mb].input.token_ids.len(), self.transformer.spec().hidden_size];
        let residual = self.receive_tensor(from, tag, &dims, DType::F32)?;
        self.flows[mb].residual = Some(residual);
        Ok(())
    }

    fn send_hidden(&mut self, layer: u32, mb: usize, to: Rank) -> Result<(), ModelError> {
        let tag = self.tag(layer, mb, MessageKind::Hidden);
        let Surroundings { ctx, comm, .. } = self.around;
        let flow = &mut self.flows[mb];
        let mut residual = flow.residual.take().expect("a residual stream");
        if let Some(delta) = flow.delta.take() {
            add(ctx, &mut residual, &delta)?;
        }
        let rows: Vec<(u32, u32)> = (0..residual.dims()[0] as u32).map(|row| (0, row)).collect();
        let copy = gather_rows_into(ctx, comm.exchange(), &[&residual], &rows)?;
        collective::send(ctx, comm, to, tag, Message { header: Vec::new(), tensors: vec![copy] })?;
        Ok(())
    }

    fn half(&self, layer: u32) -> &'a AttentionHalf {
        self.layer(layer).attention.as_deref().expect("a rank with attention")
    }

    fn layer(&self, layer: u32) -> &'a DecoderLayer {
        self.transformer.layer(layer)
    }

    fn attention(&mut self, layer: u32, mb: usize) -> Result<(), ModelError> {
        let half = self.half(layer);
        let x = self.normed(mb, &half.input_norm)?;
        let ctx = self.around.ctx;
        let (cache, step) = self.cache(layer, mb);
        let attended = match (&half.attention, cache) {
            (AttentionLayer::Gqa(gqa), LayerCache::Gqa(kv)) => gqa.forward(ctx, &x, kv, step)?,
            (AttentionLayer::Mla(mla), LayerCache::Mla(latent)) => mla.forward(ctx, &x, latent, step)?,
            _ => unreachable!("the cache was made for this model"),
        };
        self.flows[mb].delta = Some(attended);
        Ok(())
    }

    /// A layer's pages, and what attention over them needs to know.
    fn cache(&mut self, layer: u32, mb: usize) -> (&mut LayerCache, AttentionStep<'_>) {
        let out_dtype = self.transformer.compute_dtype();
        let rope = self.transformer.rope.as_deref().expect("a rank with attention");
        let cache = &mut self.kv.layers[layer as usize - self.transformer.shard.layers.start];
        (cache, AttentionStep { batch: &self.flows[mb].input.batch, rope, out_dtype })
    }

    fn project(&mut self, layer: u32, mb: usize) -> Result<(), ModelError> {
        let half = self.half(layer);
        let AttentionLayer::Gqa(gqa) = &half.attention else { unreachable!("MLA has no norm over all heads") };
        let x = self.normed(mb, &half.input_norm)?;
        self.flows[mb].projected = Some(gqa.project(self.around.ctx, &x)?);
        Ok(())
    }

    fn attend(&mut self, layer: u32, mb: usize) -> Result<(), ModelError> {
        let AttentionLayer::Gqa(gqa) = &self.half(layer).attention else { unreachable!("as in project") };
        let projected = self.flows[mb].projected.take().expect("projected");
        let ctx = self.around.ctx;
        let (LayerCache::Gqa(kv), step) = self.cache(layer, mb) else { unreachable!("the cache is the model's") };
        self.flows[mb].delta = Some(gqa.attend(ctx, projected, kv, step)?);
        Ok(())
    }

    fn all_reduce(
        &mut self,
        (layer, mb): (u32, usize),
        of: MessageKind,
        group: &Peers,
        algorithm: AllReduce,
    ) -> Result<(), ModelError> {
        let tag = self.tag(layer, mb, of);
        let Surroundings { ctx, comm, plan, .. } = self.around;
        let flow = &mut self.flows[mb];
        let partial = match of {
            MessageKind::QkNorm => flow.projected.as_mut().and_then(|projected| projected.norm_sums.as_mut()),
            _ => flow.delta.as_mut(),
        };
        let partial = partial.expect("a partial result");
        collective::all_reduce(ctx, comm, AllReduceArgs { tag, group, node_of: &plan.node_of, algorithm }, partial)?;
        Ok(())
    }

    fn mlp(&mut self, layer: u32, mb: usize) -> Result<(), ModelError> {
        let Some(FeedForward::Dense(weights)) = self.layer(layer).feed_forward.as_deref() else {
            unreachable!("the schedule follows the model")
        };
        let x = self.normed(mb, &self.half(layer).post_attention_norm)?;
        let out_dtype = self.transformer.compute_dtype();
        self.flows[mb].delta = Some(crate::layers::ffn::dense(self.around.ctx, &x, weights, out_dtype)?);
        Ok(())
    }

    fn moe_spec(&self, layer: u32) -> &'a Moe {
        self.transformer.spec().layers[layer as usize].as_moe().expect("the schedule follows the model")
    }

    fn route(&mut self, layer: u32, mb: usize) -> Result<(), ModelError> {
        let Some(FeedForward::Moe(moe)) = self.layer(layer).feed_forward.as_deref() else {
            unreachable!("the schedule follows the model")
        };
        let x = self.normed(mb, &self.half(layer).post_attention_norm)?;
        let Surroundings { ctx, comm, plan, placement, .. } = self.around;
        let spec = self.moe_spec(layer);
        let flow = &mut self.flows[mb];
        let num_rows = flow.input.token_ids.len();
        let (routing, expert_of) = moe.route(ctx, &x, &flow.input.batch)?;
        let own = self.transformer.own_rows(num_rows);
        let stage = &plan.stages[self.transformer.shard.stage];
        let sources = stage.groups.iter().flatten();
        let place = Placer {
            this: comm.rank(),
            world_size: plan.world_size(),
            num_experts: spec.num_experts,
            layer: match self.transformer.shard.experts {
                ExpertShard::Cut(_) => None,
                _ => placement.layers[layer as usize].as_ref(),
            },
            turn: sources.take_while(|&&rank| rank != comm.rank()).count(),
        };
        let mut assignment = Assignment::default();
        if !ctx.is_meta() {
            assignment = Assignment::new(&expert_of, spec.top_k, own.clone(), place);
            self.stats.choices.push(Choices {
                layer,
                micro_batch: mb as u32,
                first_row: own.start,
                expert_of: expert_of[own.start * spec.top_k..own.end * spec.top_k].to_vec(),
            });
        }
        flow.moe = Some(MoeFlow { x, routing, own, assignment, shared: None, answered: None });
        Ok(())
    }

    fn shared_expert(&mut self, layer: u32, mb: usize) -> Result<(), ModelError> {
        let Some(FeedForward::Moe(moe)) = self.layer(layer).feed_forward.as_deref() else {
            unreachable!("the schedule follows the model")
        };
        let out_dtype = self.transformer.compute_dtype();
        let ctx = self.around.ctx;
        let flow = self.flows[mb].moe.as_mut().expect("routed");
        let own = match flow.own.len() == flow.x.dims()[0] {
            true => None,
            false => Some(gather_rows(ctx, &flow.x, &flow.own.clone().collect::<Vec<_>>())?),
        };
        flow.shared = Some(moe.shared(ctx, own.as_ref().unwrap_or(&flow.x), out_dtype)?);
        Ok(())
    }

    fn dispatch(&mut self, layer: u32, mb: usize, to: &Peers) -> Result<(), ModelError> {
        let tag = self.tag(layer, mb, MessageKind::Dispatch);
        let spec = self.moe_spec(layer);
        let Surroundings { ctx, comm, plan, .. } = self.around;
        let this = comm.rank();
        let flow = self.flows[mb].moe.take().expect("routed");
        if flow.own.is_empty() {
            self.flows[mb].moe = Some(flow);
            return Ok(());
        }
        let stage = &plan.stages[self.transformer.shard.stage];
        for &to in to.iter() {
            if ctx.is_meta() {
                // At most every row.
                let width = flow.x.dims()[1] * flow.x.dtype().size_bytes() + 4 * spec.top_k;
                self.record_bound(to, tag, flow.own.len() * width);
                continue;
            }
            // Whoever takes rows of a node takes them for all of it; within the own node each takes its own.
            let node = plan.node_of[to.idx()];
            let relays = node != plan.node_of[this.idx()] && plan.relay_of(stage, this, node) == Some(to);
            let relays = relays && plan.file.exchange.route == moesaic_plan::plan::ExchangeRoute::TwoLevel;
            let for_node = |out: &&Outbound| match relays {
                true => plan.node_of[out.to.idx()] == node,
                false => out.to == to,
            };
            let parts: Vec<&Outbound> = flow.assignment.outbound.iter().filter(for_node).collect();
            let (rows, sections) = merge(&parts, this);
            let rows: Vec<(u32, u32)> = rows.into_iter().map(|row| (0, row)).collect();
            let tensors = self.pack(&[&flow.x], &rows)?;
            let message = Message { header: encode(&sections, spec.num_experts), tensors };
            collective::send(ctx, comm, to, tag, message)?;
        }
        self.flows[mb].moe = Some(flow);
        Ok(())
    }

    fn relay(&mut self, layer: u32, mb: usize, from: &Peers, to: &Peers) -> Result<(), ModelError> {
        let from = self.with_rows(mb, from);
        if from.is_empty() {
            return Ok(());
        }
        let num_experts = self.moe_spec(layer).num_experts;
        let Surroundings { ctx, comm, .. } = self.around;
        let relay_tag = self.tag(layer, mb, MessageKind::Relay);
        if ctx.is_meta() {
            let rows: usize = from.iter().map(|&source| self.rows_of(mb, source)).sum();
            to.iter().for_each(|&to| self.record_bound(to, relay_tag, rows * self.row_bytes()));
            return Ok(());
        }
        let inbound = self.receive_rows(layer, mb, &from, MessageKind::Dispatch)?;
        for &to in to.iter() {
            let mut rows = Vec::new();
            let mut sections = Vec::new();
            for (message, inbound) in inbound.iter().enumerate() {
                for section in inbound.sections.iter().filter(|section| section.answers == to) {
                    let mut pairs = section.pairs.clone();
                    for pair in &mut pairs {
                        let row = (message as u32, pair.row);
                        if rows.last() != Some(&row) {
                            rows.push(row);
                        }
                        pair.row = rows.len() as u32 - 1;
                    }
                    sections.push(Section { source: section.source, answers: to, pairs });
                }
            }
            let num_tensors = inbound[0].payload.len();
            let gather = |i: usize| {
                let sources: Vec<&Tensor> = inbound.iter().map(|inbound| &inbound.payload[i]).collect();
                gather_rows_into(ctx, comm.exchange(), &sources, &rows)
            };
            let tensors = (0..num_tensors).map(gather).collect::<Result<_, _>>()?;
            let message = Message { header: encode(&sections, num_experts), tensors };
            collective::send(ctx, comm, to, relay_tag, message)?;
        }
        self.flows[mb].kept = inbound;
        Ok(())
    }

    /// Rows that these ranks sent, checked.
    fn receive_rows(
        &self,
        layer: u32,
        mb: usize,
        from: &[Rank],
        kind: MessageKind,
    ) -> Result<Vec<Inbound>, ModelError> {
        let Surroundings { ctx, comm, .. } = self.around;
        let tag = self.tag(layer, mb, kind);
        let messages = collective::receive_all(ctx, comm, from, tag)?;
        let check = |(&peer, message): (&Rank, Message)| {
            let expected = self.expected(layer, peer, tag);
            let sections = expected.decode(&message)?;
            self.check_payload(&expected, &message.tensors)?;
            Ok(Inbound { payload: message.tensors, sections })
        };
        from.iter().zip(messages).map(check).collect()
    }

    fn expected(&self, layer: u32, peer: Rank, tag: Tag) -> Expected {
        Expected {
            this: self.around.comm.rank(),
            peer,
            tag,
            num_experts: self.moe_spec(layer).num_experts,
            width: self.transformer.spec().hidden_size,
        }
    }

    fn experts(&mut self, layer: u32, mb: usize, from: &Peers, relays: &Peers) -> Result<(), ModelError> {
        let Surroundings { ctx, comm, .. } = self.around;
        let this = comm.rank();
        let local = &self.layer(layer).experts;
        let out_dtype = self.transformer.compute_dtype();
        if ctx.is_meta() {
            return self.meta_experts(layer, mb, from, relays);
        }
        let others: Vec<Rank> = self.with_rows(mb, from).into_iter().filter(|&source| source != this).collect();
        let mut inbound = self.receive_rows(layer, mb, &others, MessageKind::Dispatch)?;
        let relays_with_rows = self.relays_with_rows(mb, relays);
        let others: Vec<Rank> = relays_with_rows.iter().copied().filter(|&relay| relay != this).collect();
        inbound.extend(self.receive_rows(layer, mb, &others, MessageKind::Relay)?);
        if relays_with_rows.contains(&this) {
            inbound.append(&mut self.flows[mb].kept);
        }

        // What each source wants answered: which tensor, its pairs as (row, place of the expert).
        let mut tensors = Vec::with_capacity(inbound.len());
        let mut wanted: Vec<(Rank, usize, Vec<(u32, u32)>)> = Vec::new();
        for Inbound { payload, sections } in inbound {
            for section in sections.into_iter().filter(|section| section.answers == this) {
                let mut pairs = Vec::with_capacity(section.pairs.len());
                for pair in section.pairs {
                    let place = local.place_of(pair.expert).ok_or_else(|| {
                        let expected = self.expected(layer, section.source, self.tag(layer, mb, MessageKind::Dispatch));
                        expected.malformed(format!("a row for expert {}", pair.expert), "experts that live here")
                    })?;
                    pairs.push((pair.row, place as u32));
                }
                wanted.push((section.source, tensors.len(), pairs));
            }
            tensors.push(self.unpack(payload)?);
        }
        let flow = &mut self.flows[mb];
        let own = match (&flow.moe, from.contains(&this)) {
            (Some(moe), true) => moe.assignment.to(this).map(|out| {
                let place = |expert| local.place_of(expert).expect("its own placement says that it lives here") as u32;
                let pairs = out.pairs.iter().map(|pair| (out.rows[pair.row as usize], place(pair.expert)));
                (&moe.x, pairs.collect::<Vec<_>>())
            }),
            _ => None,
        };
        let mut sources: Vec<DispatchSource> = Vec::with_capacity(1 + wanted.len());
        if let Some((x, pairs)) = &own {
            sources.push(DispatchSource { x, pairs: Pairs::Known(pairs) });
        }
        let has_own = !sources.is_empty();
        sources.extend(
            wanted.iter().map(|(_, tensor, pairs)| DispatchSource { x: &tensors[*tensor], pairs: Pairs::Known(pairs) }),
        );
        let Some(weights) = local.weights.as_ref().filter(|_| !sources.is_empty()) else { return Ok(()) };
        let sorted = dispatch(ctx, &sources, local.which.len())?; // [R, D]
        drop(sources);
        drop(tensors);
        let y = Rc::new(experts(ctx, &sorted.x, RowsPerExpert::Known(&sorted.offsets), weights, out_dtype)?); // [R, D]
        let mut rows = sorted.row_of.into_iter();
        if has_own {
            let own_rows = rows.next().expect("rows of every source");
            flow.moe.as_mut().expect("own rows were routed").answered = Some((y.clone(), own_rows));
        }
        flow.wave = Some(Wave { y, answers: wanted.into_iter().map(|(source, ..)| source).zip(rows).collect() });
        Ok(())
    }

    /// As many rows as there can be.
    fn meta_experts(&mut self, layer: u32, mb: usize, from: &Peers, relays: &Peers) -> Result<(), ModelError> {
        let Surroundings { ctx, comm, plan, .. } = self.around;
        let local = &self.layer(layer).experts;
        let Some(weights) = &local.weights else { return Ok(()) };
        let stage = &plan.stages[self.transformer.shard.stage];
        let relayed = stage
            .groups
            .iter()
            .flatten()
            .copied()
            .filter(|source| !relays.is_empty() && plan.node_of[source.idx()] != plan.node_of[comm.rank().idx()]);
        let num_rows: usize = from.iter().copied().chain(relayed).map(|source| self.rows_of(mb, source)).sum();
        let spec = self.moe_spec(layer);
        let top_k = spec.top_k.min(local.which.len());
        let (hidden, dtype) = (self.transformer.spec().hidden_size, self.transformer.compute_dtype());
        let flow = &mut self.flows[mb];
        let own = flow.moe.as_ref().filter(|_| from.contains(&comm.rank()));
        let num_own = own.map_or(0, |moe| moe.own.len());
        let others = Tensor::empty(comm.exchange(), &[num_rows - num_own, hidden], dtype)?;
        let count = |rows: usize| Pairs::Counted(Amount::exact((rows * top_k) as u64));
        let mut sources: Vec<DispatchSource> = Vec::with_capacity(2);
        sources.extend(own.map(|moe| DispatchSource { x: &moe.x, pairs: count(num_own) }));
        if num_rows > num_own {
            sources.push(DispatchSource { x: &others, pairs: count(num_rows - num_own) });
        }
        if sources.is_empty() {
            return Ok(());
        }
        let sorted = dispatch(ctx, &sources, local.which.len())?;
        drop(sources);
        let rows = RowsPerExpert::Uniform { num_tokens: num_rows, top_k: spec.top_k, num_experts: spec.num_experts };
        let out_dtype = self.transformer.compute_dtype();
        let y = Rc::new(experts(ctx, &sorted.x, rows, weights, out_dtype)?);
        let flow = &mut self.flows[mb];
        if let Some(moe) = flow.moe.as_mut().filter(|_| num_own > 0) {
            moe.answered = Some((y.clone(), Vec::new()));
        }
        let answers = from.iter().copied().filter(|&source| source != comm.rank()).map(|source| (source, Vec::new()));
        flow.wave = Some(Wave { y, answers: answers.collect() });
        Ok(())
    }

    fn answer(&mut self, layer: u32, mb: usize) -> Result<(), ModelError> {
        let Some(Wave { y, answers }) = self.flows[mb].wave.take() else { return Ok(()) };
        let tag = self.tag(layer, mb, MessageKind::Answer);
        let Surroundings { ctx, comm, .. } = self.around;
        for (source, rows) in answers {
            if ctx.is_meta() {
                let held = self.layer(layer).experts.which.len();
                let most = self.rows_of(mb, source) * self.moe_spec(layer).top_k.min(held);
                self.record_bound(source, tag, most * self.row_bytes());
                continue;
            }
            if rows.is_empty() {
                continue;
            }
            let rows: Vec<(u32, u32)> = rows.into_iter().map(|row| (0, row)).collect();
            let tensors = self.pack(&[&y], &rows)?;
            collective::send(ctx, comm, source, tag, Message { header: Vec::new(), tensors })?;
        }
        Ok(())
    }

    fn combine(&mut self, layer: u32, mb: usize, from: &Peers) -> Result<(), ModelError> {
        let tag = self.tag(layer, mb, MessageKind::Answer);
        let top_k = self.moe_spec(layer).top_k;
        let Surroundings { ctx, comm, .. } = self.around;
        let this = comm.rank();
        let MoeFlow { x, routing, own, assignment, shared, answered } = self.flows[mb].moe.take().expect("routed");
        let (num_rows, hidden) = x.dims2();
        drop(x);
        let whole = own.len() == num_rows;
        let own_rows: Vec<usize> = own.clone().collect();
        if own.is_empty() {
            // Nothing to sum here; the others' rows come with the all-gather.
            self.flows[mb].delta = Some(ctx.empty(&[0, hidden], self.transformer.compute_dtype())?);
            return Ok(());
        }
        let answering: Vec<&Outbound> = assignment.outbound.iter().filter(|out| out.to != this).collect();
        let peers: Vec<Rank> = answering.iter().map(|out| out.to).collect();
        debug_assert!(ctx.is_meta() || peers.iter().all(|peer| from.contains(peer)), "the schedule knows who answers");
        let mut received = Vec::with_capacity(peers.len());
        for (message, out) in collective::receive_all(ctx, comm, &peers, tag)?.into_iter().zip(&answering) {
            let expected = self.expected(layer, out.to, tag);
            let got = expected.num_rows(&message)?;
            if got != out.pairs.len() {
                return Err(expected.malformed(format!("{got} rows"), format!("{} rows", out.pairs.len())).into());
            }
            self.check_payload(&expected, &message.tensors)?;
            received.push(self.unpack(message.tensors)?);
        }
        if ctx.is_meta() && !from.is_empty() {
            received.push(Tensor::empty(
                comm.exchange(),
                &[own.len() * top_k, hidden],
                self.transformer.compute_dtype(),
            )?);
        }
        let mut row_of = ctx.empty(&[own.len(), top_k], DType::I32)?;
        if !ctx.is_meta() {
            fill_rows(
                row_of.i32_mut(),
                &assignment,
                this,
                answered.as_ref().map(|(y, rows)| (y.dims()[0], rows.as_slice())),
            );
        }
        let weights = match whole {
            true => None,
            false => Some(gather_rows(ctx, &routing.topk_weights, &own_rows)?),
        };
        let answered = answered.iter().map(|(y, _)| y.as_ref());
        let ys: Vec<&Tensor> = answered.chain(received.iter()).collect();
        let weights = weights.as_ref().unwrap_or(&routing.topk_weights);
        self.flows[mb].delta = Some(combine(ctx, &ys, &row_of, weights, shared.as_ref())?); // [own, D]
        Ok(())
    }

    fn all_gather(&mut self, layer: u32, mb: usize, group: &Peers) -> Result<(), ModelError> {
        let tag = self.tag(layer, mb, MessageKind::Rows);
        let Surroundings { ctx, comm, .. } = self.around;
        let sizes: Vec<usize> = group.iter().map(|&rank| self.rows_of(mb, rank)).collect();
        let flow = &mut self.flows[mb];
        let local = flow.delta.take().expect("combined");
        let args = GatherArgs { tag, group, sizes: &sizes };
        flow.delta = Some(collective::all_gather_rows(ctx, comm, args, &local)?);
        Ok(())
    }

    fn head(&mut self, mb: usize) -> Result<(), ModelError> {
        let norm = self.transformer.final_norm.as_ref().expect("the last stage has the head");
        if self.flows[mb].input.logit_rows.is_empty() {
            return Ok(());
        }
        let x = self.normed(mb, norm)?;
        let ctx = self.around.ctx;
        let x = gather_rows(ctx, &x, &self.flows[mb].input.logit_rows)?;
        let embedding = self.transformer.embedding.as_ref().expect("the last stage has the head");
        self.flows[mb].logits = Some(embedding.logits(ctx, &x)?);
        Ok(())
    }

    fn gather_logits(&mut self, layer: u32, mb: usize, group: &Peers) -> Result<(), ModelError> {
        let tag = self.tag(layer, mb, MessageKind::Logits);
        let Surroundings { ctx, comm, .. } = self.around;
        let Some(part) = self.flows[mb].logits.take() else { return Ok(()) };
        let vocab = self.transformer.spec().vocab_size;
        let sizes: Vec<usize> =
            (0..group.len()).map(|idx| moesaic_plan::Slice { idx, count: group.len() }.range(vocab, 1).len()).collect();
        let args = GatherArgs { tag, group, sizes: &sizes };
        self.flows[mb].logits = collective::gather_to_first(ctx, comm, args, &part)?;
        Ok(())
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

    /// Relays that have something to pass on.
    fn relays_with_rows(&self, mb: usize, relays: &[Rank]) -> Vec<Rank> {
        let Surroundings { comm, plan, .. } = self.around;
        let node = plan.node_of[comm.rank().idx()];
        let stage = &plan.stages[self.transformer.shard.stage];
        let far = stage.groups.iter().flatten().copied().filter(|source| plan.node_of[source.idx()] != node);
        let used: Vec<Rank> = far
            .filter(|&source| self.rows_of(mb, source) > 0)
            .filter_map(|source| plan.relay_of(stage, source, node))
            .collect();
        relays.iter().copied().filter(|relay| used.contains(relay)).collect()
    }

    /// Bytes of a row on its way, at most.
    fn row_bytes(&self) -> usize {
        self.transformer.spec().hidden_size * self.transformer.compute_dtype().size_bytes()
    }

    /// On `Meta`: a message of at most so many bytes.
    fn record_bound(&self, to: Rank, tag: Tag, bytes: usize) {
        collective::sent(self.around.ctx, to, tag, Amount::exact(bytes as u64));
    }

    fn format(&self) -> Option<Format> {
        match self.around.plan.file.exchange.precision {
            ExchangePrecision::Full => None,
            ExchangePrecision::Int8 => Some(Format::Int8),
            ExchangePrecision::Fp8 => Some(Format::E4m3),
        }
    }

    /// Rows as they travel.
    fn pack(&mut self, sources: &[&Tensor], rows: &[(u32, u32)]) -> Result<Vec<Tensor>, ModelError> {
        let Surroundings { ctx, comm, .. } = self.around;
        let Some(format) = self.format() else {
            return Ok(vec![gather_rows_into(ctx, comm.exchange(), sources, rows)?]);
        };
        let x = gather_rows_into(ctx, ctx.arena(), sources, rows)?;
        let packed = quantize(ctx, &x, format, comm.exchange())?;
        let (error, total) = relative_error(&x, &dequantize(ctx, &packed, x.dtype())?);
        self.stats.quantization.0 += error;
        self.stats.quantization.1 += total;
        Ok(vec![packed.values, packed.scales])
    }

    /// Refuses what [`Step::pack`] did not make.
    fn check_payload(&self, expected: &Expected, payload: &[Tensor]) -> Result<(), CommError> {
        let rows = payload.first().map_or(0, |tensor| tensor.dims()[0]);
        let hidden = self.transformer.spec().hidden_size;
        let right: Vec<(Vec<usize>, DType)> = match self.format() {
            None => vec![(vec![rows, hidden], self.transformer.compute_dtype())],
            Some(format) => {
                vec![(vec![rows, hidden], format.dtype()), (vec![rows, hidden.div_ceil(GROUP)], DType::F32)]
            }
        };
        let got: Vec<(Vec<usize>, DType)> = payload.iter().map(|t| (t.dims().to_vec(), t.dtype())).collect();
        if got == right { Ok(()) } else { Err(expected.malformed(format!("{got:?}"), format!("{right:?}"))) }
    }

    /// Rows as they are computed with. The payload was checked.
    fn unpack(&self, mut payload: Vec<Tensor>) -> Result<Tensor, ModelError> {
        if self.format().is_none() {
            return Ok(payload.remove(0));
        }
        let (scales, values) = (payload.pop().expect("checked"), payload.pop().expect("checked"));
        let packed = Quantized { values, scales };
        Ok(dequantize(self.around.ctx, &packed, self.transformer.compute_dtype())?)
    }

    fn receive_tensor(&self, from: Rank, tag: Tag, dims: &[usize], dtype: DType) -> Result<Tensor, ModelError> {
        let Surroundings { ctx, comm, .. } = self.around;
        if ctx.is_meta() {
            let tensor = Tensor::empty(comm.exchange(), dims, dtype)?;
            collective::received(ctx, from, tag, Amount::exact(tensor.size_bytes() as u64));
            return Ok(tensor);
        }
        let mut message = collective::receive_all(ctx, comm, &[from], tag)?.remove(0);
        match message.tensors.pop() {
            Some(tensor) if tensor.dims() == dims && tensor.dtype() == dtype && message.tensors.is_empty() => {
                Ok(tensor)
            }
            got => Err(CommError::Malformed {
                rank: comm.rank(),
                peer: from,
                tag,
                got: format!("{:?}", got.map(|tensor| (tensor.dims().to_vec(), tensor.dtype()))),
                expected: format!("{:?}", (dims, dtype)),
            }
            .into()),
        }
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

/// Rows of several destinations that travel together: each once, and sections that count in them.
fn merge(parts: &[&Outbound], source: Rank) -> (Vec<u32>, Vec<Section>) {
    let mut rows: Vec<u32> = parts.iter().flat_map(|part| part.rows.iter().copied()).collect();
    rows.sort_unstable();
    rows.dedup();
    let section = |part: &&Outbound| {
        let place: Vec<u32> =
            part.rows.iter().map(|row| rows.binary_search(row).expect("among all rows") as u32).collect();
        let mut pairs = part.pairs.clone();
        pairs.iter_mut().for_each(|pair| pair.row = place[pair.row as usize]);
        Section { source, answers: part.to, pairs }
    };
    let sections = parts.iter().map(section).collect();
    (rows, sections)
}

/// Where each pair's answer lies: first the rows that this rank's own experts computed (for whomever), then the answers of
/// others in the order of their ranks.
fn fill_rows(row_of: &mut [i32], assignment: &Assignment, this: Rank, answered: Option<(usize, &[u32])>) {
    let mut next = answered.map_or(0, |(num_rows, _)| num_rows);
    let mut first = Vec::with_capacity(assignment.outbound.len());
    for out in &assignment.outbound {
        first.push((out.to != this).then_some(next));
        next += if out.to == this { 0 } else { out.pairs.len() };
    }
    for (row, place) in row_of.iter_mut().zip(&assignment.place_of) {
        *row = match *place {
            None => -1,
            Some((slot, pair)) => match (first[slot as usize], answered) {
                (Some(first), _) => (first + pair as usize) as i32,
                (None, Some((_, rows))) => rows[pair as usize] as i32,
                (None, None) => unreachable!("own experts have answered"),
            },
        };
    }
}
