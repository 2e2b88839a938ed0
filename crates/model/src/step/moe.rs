//! The layers with experts: route, compute, combine. How rows come and go is in [`wire`](super::wire).

use std::ops::Range;
use std::rc::Rc;

use moesaic_comm::collective::{self, GatherArgs};
use moesaic_device::{Amount, Tensor};
use moesaic_kernels::combine::combine;
use moesaic_kernels::dispatch::{DispatchSource, Pairs, dispatch};
use moesaic_kernels::experts::{RowsPerExpert, experts};
use moesaic_kernels::gather_rows::gather_rows;
use moesaic_kernels::router::Routing;
use moesaic_plan::{ExpertShard, MessageKind, Peers, Rank};
use moesaic_spec::DType;

use super::wire::Inbound;
use super::{Choices, Step, Surroundings};
use crate::ModelError;
use crate::exchange::{Assignment, Outbound, Placer};
use crate::layers::FeedForward;

/// A layer's routed rows between Route and Combine.
pub(super) struct MoeFlow {
    pub x: Tensor, // [T, D]
    pub routing: Routing,
    /// Rows that this rank sends and sums.
    pub own: Range<usize>,
    pub assignment: Assignment,
    pub shared: Option<Tensor>, // [own, D]
    /// This rank's experts' answers to its own rows: the tensor, and the row of each pair.
    pub answered: Option<(Rc<Tensor>, Vec<u32>)>,
}

pub(super) struct Wave {
    pub y: Rc<Tensor>, // [R, D]
    pub answers: Vec<(Rank, Vec<u32>)>,
}

/// What a source wants answered.
struct Wanted {
    source: Rank,
    /// Which of the tensors that arrived has its rows.
    tensor: usize,
    /// Rows there, and places of experts among those that live here.
    pairs: Vec<(u32, u32)>,
}

impl Step<'_> {
    pub(super) fn route(&mut self, layer: u32, mb: usize) -> Result<(), ModelError> {
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

    pub(super) fn shared_expert(&mut self, layer: u32, mb: usize) -> Result<(), ModelError> {
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

    pub(super) fn experts(&mut self, layer: u32, mb: usize, from: &Peers, relays: &Peers) -> Result<(), ModelError> {
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

        let mut tensors = Vec::with_capacity(inbound.len());
        let mut wanted: Vec<Wanted> = Vec::new();
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
                wanted.push(Wanted { source: section.source, tensor: tensors.len(), pairs });
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
            wanted.iter().map(|one| DispatchSource { x: &tensors[one.tensor], pairs: Pairs::Known(&one.pairs) }),
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
        flow.wave = Some(Wave { y, answers: wanted.into_iter().map(|one| one.source).zip(rows).collect() });
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

    pub(super) fn combine(&mut self, layer: u32, mb: usize, from: &Peers) -> Result<(), ModelError> {
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

    pub(super) fn all_gather(&mut self, layer: u32, mb: usize, group: &Peers) -> Result<(), ModelError> {
        let tag = self.tag(layer, mb, MessageKind::Rows);
        let Surroundings { ctx, comm, .. } = self.around;
        let sizes: Vec<usize> = group.iter().map(|&rank| self.rows_of(mb, rank)).collect();
        let flow = &mut self.flows[mb];
        let local = flow.delta.take().expect("combined");
        let args = GatherArgs { tag, group, sizes: &sizes };
        flow.delta = Some(collective::all_gather_rows(ctx, comm, args, &local)?);
        Ok(())
    }
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
