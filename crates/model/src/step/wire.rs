//! Rows on their way between ranks: dispatch, relay and answer, what they are packed in, and what a receiver checks.

use moesaic_comm::{CommError, Message, collective};
use moesaic_device::{Amount, Tensor};
use moesaic_kernels::gather_rows::gather_rows_into;
use moesaic_kernels::quantize::{Format, GROUP, Quantized, dequantize, quantize, relative_error};
use moesaic_plan::plan::ExchangePrecision;
use moesaic_plan::{MessageKind, Peers, Rank, Tag};
use moesaic_spec::DType;

use super::moe::Wave;
use super::{Step, Surroundings};
use crate::ModelError;
use crate::exchange::{Expected, Outbound, Section, encode};

/// Rows that arrived, as they were sent.
pub(super) struct Inbound {
    pub payload: Vec<Tensor>,
    pub sections: Vec<Section>,
}

impl Step<'_> {
    pub(super) fn dispatch(&mut self, layer: u32, mb: usize, to: &Peers) -> Result<(), ModelError> {
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

    pub(super) fn relay(&mut self, layer: u32, mb: usize, from: &Peers, to: &Peers) -> Result<(), ModelError> {
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

    pub(super) fn answer(&mut self, layer: u32, mb: usize) -> Result<(), ModelError> {
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

    /// Rows that these ranks sent, checked.
    pub(super) fn receive_rows(
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

    pub(super) fn expected(&self, layer: u32, peer: Rank, tag: Tag) -> Expected {
        Expected {
            this: self.around.comm.rank(),
            peer,
            tag,
            num_experts: self.moe_spec(layer).num_experts,
            width: self.transformer.spec().hidden_size,
        }
    }

    /// Relays that have something to pass on.
    pub(super) fn relays_with_rows(&self, mb: usize, relays: &[Rank]) -> Vec<Rank> {
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
    pub(super) fn row_bytes(&self) -> usize {
        self.transformer.spec().hidden_size * self.transformer.compute_dtype().size_bytes()
    }

    /// On `Meta`: a message of at most so many bytes.
    pub(super) fn record_bound(&self, to: Rank, tag: Tag, bytes: usize) {
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
    pub(super) fn pack(&mut self, sources: &[&Tensor], rows: &[(u32, u32)]) -> Result<Vec<Tensor>, ModelError> {
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
    pub(super) fn check_payload(&self, expected: &Expected, payload: &[Tensor]) -> Result<(), CommError> {
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
    pub(super) fn unpack(&self, mut payload: Vec<Tensor>) -> Result<Tensor, ModelError> {
        if self.format().is_none() {
            return Ok(payload.remove(0));
        }
        let (scales, values) = (payload.pop().expect("checked"), payload.pop().expect("checked"));
        let packed = Quantized { values, scales };
        Ok(dequantize(self.around.ctx, &packed, self.transformer.compute_dtype())?)
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
