//! What one layer costs a rank, for one micro-batch.

use std::sync::Arc;

use moesaic_plan::plan::Overlap;
use moesaic_spec::Moe;

use super::cost::Spent;
use super::dag::{Durations, SLOTS, Slot};
use super::interned::{CoreCosts, CutCosts};
use super::parts::{Part, PartOp};
use super::{Batch, Cost, ExpertLayout, Iteration, Iterations, LOW_LATENCY_TOKENS, Resolved, attend};
use crate::cost::{Op, Phase, Precision};
use crate::load::{ExpertLoad, Straggler};

/// One layer of one micro-batch, by slot.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Layer<S> {
    pub(super) durations: Durations,
    costs: [S; SLOTS],
    /// Standard deviations by which the fullest rank is fuller than in the mean.
    deviations: f64,
    /// Experts have ranks of their own.
    pool: bool,
    imbalance: f64,
}

impl<S: Spent> Layer<S> {
    pub(super) fn add(&mut self, slot: Slot, cost: S) {
        self.durations[slot] += cost.seconds();
        self.costs[slot as usize] = self.costs[slot as usize].plus(cost);
    }
}

impl Layer<Cost> {
    /// Puts together what all layers and micro-batches spend.
    pub(super) fn iteration(
        &self,
        resolved: &Resolved,
        seconds: f64,
        computing: f64,
        micro_batches: usize,
    ) -> Iteration {
        let mut iteration =
            Iteration { seconds, computing, micro_batches, imbalance: self.imbalance, ..Iteration::default() };
        let mut variance = 0.0;
        for slot in Slot::ALL {
            let times = slot.times(resolved.dense, resolved.moe) * micro_batches as f64;
            let cost = self.costs[slot as usize].times(times);
            iteration.slots[slot] = cost.seconds;
            variance += cost.deviation.powi(2);
            match slot {
                Slot::Experts if self.pool => {
                    iteration.expert_rank = iteration.expert_rank.plus(cost);
                }
                _ => iteration.attention_rank = iteration.attention_rank.plus(cost),
            }
        }
        // What overlaps counts less; errors shrink with it.
        let spent = iteration.attention_rank.seconds + iteration.expert_rank.seconds;
        iteration.deviation = variance.sqrt() * (seconds / spent).min(1.0);
        iteration
    }
}

impl Iterations<'_> {
    /// What each slot takes for one micro-batch in one layer, with the fullest rank by so many standard deviations of a layer.
    pub(super) fn layer<S: Spent>(&mut self, resolved: &Resolved, batch: &Batch, deviations: f64) -> Layer<S> {
        let rows = batch.rows();
        let samples = batch.decodes + batch.finished_prefills;
        let pool = matches!(resolved.layout.experts, ExpertLayout::Pool { .. });
        let mut layer: Layer<S> = Layer { deviations, pool, ..Layer::default() };
        for part in Part::ALL {
            let size = if matches!(part, Part::Head | Part::Sample) { samples } else { rows };
            if part != Part::Experts && size > 0.0 {
                layer.add(slot_of(part), self.part(resolved.cut, part, size));
            }
        }
        layer.add(Slot::Attention, self.core(resolved.cut, batch));
        self.add_sums(resolved, rows, samples, &mut layer);
        if resolved.moe > 0
            && let Some(moe) = self.model.layers.iter().find_map(|ffn| ffn.as_moe())
        {
            self.add_experts(resolved, moe, batch, &mut layer);
        }
        layer
    }

    /// A part's ops but for attention's core and the routed experts.
    pub(super) fn part<S: Spent>(&mut self, cut: usize, part: Part, rows: f64) -> S {
        let (prices, formats) = (&mut self.prices, self.formats);
        let CutCosts { parts, curves, .. } = &mut self.cuts.values[cut];
        if parts.ops(part).is_empty() {
            return S::default();
        }
        curves[part as usize].at(rows, |rows| {
            let op = |op: &PartOp| match *op {
                PartOp::Gemm { rows: m, n, k } => {
                    Some(Op::Gemm { m: m.at(rows), n: n as f64, k: k as f64, weights: formats.of_part(part) })
                }
                PartOp::Stream { flops, bytes } => {
                    Some(Op::Stream { flops: flops.at(rows), bytes: bytes.at(rows), precision: Precision::Bf16 })
                }
                _ => None,
            };
            prices.of_all(parts.ops(part).iter().filter_map(op))
        })
    }

    /// Attention over the cache, decodes and prompts apart: the mean over layers, which may attend in different ways.
    pub(super) fn core<S: Spent>(&mut self, cut: usize, batch: &Batch) -> S {
        let CutCosts { parts, cores, .. } = &mut self.cuts.values[cut];
        let is_core = |op: &&PartOp| matches!(op, PartOp::AttentionCore { .. } | PartOp::MlaCore { .. });
        let core = parts.ops(Part::Attention).iter().find(is_core).expect("every layer has attention");
        let (prices, kv) = (&mut self.prices, self.formats.kv);
        let mut cost = S::default();
        for (&(attention, share), CoreCosts { decodes, prefills }) in self.attention.iter().zip(cores) {
            if batch.decodes > 0.0 {
                let of_way: S = decodes.at(batch.decodes, batch.context, |seqs, context| {
                    prices.of_all(attend::decode(core, attention, seqs, context, kv))
                });
                cost = cost.plus(of_way.times(share));
            }
            if batch.prefill_tokens > 0.0 {
                // One prompt at a time: each has a causal mask of its own.
                let prompts = batch.prefills.max(1.0);
                let tokens = batch.prefill_tokens / prompts;
                let of_one: S = prefills.at(tokens, 1.0 + batch.prefill_context, |tokens, before| {
                    prices.of_all(attend::prefill(core, attention, tokens, tokens + before - 1.0, kv))
                });
                cost = cost.plus(of_one.times(share * prompts));
            }
        }
        cost
    }

    /// Routed experts, and the way to them and back.
    fn add_experts<S: Spent>(&mut self, resolved: &Resolved, moe: &Moe, batch: &Batch, layer: &mut Layer<S>) {
        let layout = resolved.layout;
        // Rows of all groups meet at placed experts; a group alone has its own otherwise.
        let (rows, groups) = match layout.experts.exchanges() {
            true => (batch.mean_rows(), layout.dp as f64),
            false => (batch.rows(), 1.0),
        };
        let tokens = rows * groups;
        let (load, ranks) = (&self.load, layout.expert_ranks());
        let imbalance: Cost = self.fullest.values[resolved.fullest].at(tokens, |tokens| {
            let straggler =
                |load: &Arc<ExpertLoad>| load.straggler(tokens, ranks, layout.redundant_experts, layout.balanced);
            let Straggler { mean, sd, .. } = load.as_ref().map_or(Straggler::EVEN, straggler);
            Cost { seconds: mean, deviation: sd, ..Cost::default() }
        });
        layer.imbalance = (imbalance.seconds + layer.deviations * imbalance.deviation).max(1.0);
        let fullest = tokens * layer.imbalance;
        let experts: S = self.routed(resolved, moe, fullest);
        // Rows are put in order around them: what the rank's own trace says, for as many rows as reach it.
        let around: S = self.part(resolved.cut, Part::Experts, fullest / groups);
        layer.add(Slot::Experts, experts.plus(around));
        if !layout.experts.exchanges() {
            return;
        }
        // The rank that sends most decides when all is there.
        let (out, back): (S, S) = self.exchange(resolved, moe, batch.rows());
        layer.add(Slot::Dispatch, out);
        layer.add(Slot::Answer, back);
        // A part of the rows stays on the node: it arrives over NVLink, and is worked on first.
        let nodes = (ranks as f64 / layout.gpus_per_node as f64).max(1.0);
        let near = 1.0 / nodes;
        layer.durations[Slot::DispatchNear] = out.seconds() * near;
        layer.durations[Slot::AnswerNear] = back.seconds() * near;
        if layout.overlap == Overlap::Arrivals {
            let [of_near, of_far] = [near, 1.0 - near].map(|share| {
                let routed: f64 = self.routed(resolved, moe, fullest * share);
                routed + around.seconds() * share
            });
            layer.durations[Slot::ExpertsNear] = of_near;
            layer.durations[Slot::ExpertsFar] = of_far;
        }
    }

    /// The routed experts of one rank, when all ranks together have so many tokens.
    fn routed<S: Spent>(&mut self, resolved: &Resolved, moe: &Moe, tokens: f64) -> S {
        let (layout, prices) = (resolved.layout, &mut self.prices);
        let (weights, hidden) = (self.formats.experts, self.model.hidden_size as f64);
        let (intermediate, top_k) = (moe.intermediate_size as f64, moe.top_k as f64);
        let experts = (moe.num_experts + layout.redundant_experts) as f64;
        let (ep, matrices) = (layout.expert_ranks() as f64, moe.activation.matrices());
        let senders = (layout.tp * layout.dp) as f64;
        self.experts.values[resolved.expert].at(tokens, |tokens| {
            let op = match layout.experts.exchanges() {
                false => {
                    let tp = layout.expert_cut() as f64;
                    Op::Experts { tokens, hidden, intermediate, top_k, experts, tp, ep, weights, matrices, skew: 0.0 }
                }
                // As many weights and operations as with three matrices.
                true => Op::ExpertsDeepEp {
                    tokens,
                    hidden,
                    intermediate: intermediate * matrices as f64 / 3.0,
                    top_k,
                    experts,
                    ep,
                    weights,
                    skew: 0.0,
                    phase: if tokens / senders <= LOW_LATENCY_TOKENS { Phase::Generation } else { Phase::Context },
                },
            };
            prices.of(&op)
        })
    }
}

/// Where the time of a part goes.
fn slot_of(part: Part) -> Slot {
    match part {
        Part::Embed => Slot::Embed,
        Part::Attention => Slot::Attention,
        Part::Mlp => Slot::Mlp,
        Part::Route => Slot::Route,
        Part::SharedExpert => Slot::SharedExpert,
        Part::Experts => Slot::Experts,
        Part::Combine => Slot::Combine,
        Part::Head => Slot::Head,
        Part::Sample => Slot::Sample,
    }
}
