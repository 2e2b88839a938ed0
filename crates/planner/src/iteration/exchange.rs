//! What one layer's messages cost: sums and gathers of ranks that share heads, and rows to experts and back.

use moesaic_plan::AllReduce;
use moesaic_plan::plan::ExchangePrecision;
use moesaic_spec::{LinkClass, Moe};

use super::cost::Spent;
use super::dag::Slot;
use super::interned::ExchangeCosts;
use super::layer::Layer;
use super::{Cost, ExpertLayout, Iterations, LOW_LATENCY_TOKENS, Layout, Resolved};
use crate::network::{Algorithm, Copies, Exchange, Group, M2n, Mode};
use crate::price::Price;

/// Bytes of a number of the residual stream between ranks.
const ROW_BYTES: f64 = 2.0;
/// Bytes of a number that is sent in 8 bits, its share of a block's factor included.
const COMPRESSED_BYTES: f64 = 1.0 + 4.0 / 128.0;
/// Multiprocessors that the kernels for many tokens use; DeepEP's default.
const EXCHANGE_SMS: usize = 20;

impl Iterations<'_> {
    /// Sums and gathers of a tensor-parallel group, and what goes to the next stage.
    pub(super) fn add_sums<S: Spent>(&mut self, resolved: &Resolved, rows: f64, samples: f64, layer: &mut Layer<S>) {
        let layout = resolved.layout;
        let (hidden, vocab) = (self.model.hidden_size as f64, self.model.vocab_size as f64);
        let network = &self.network;
        if layout.pp > 1 {
            let stage = layout.ranks() / layout.pp;
            let class = if stage >= self.cluster.gpus_per_node || layout.ranks() > self.cluster.gpus_per_node {
                LinkClass::InterNode
            } else {
                LinkClass::IntraNode
            };
            let cost = self.hidden[class as usize].at(rows, |rows| {
                let bytes = rows * hidden * ROW_BYTES;
                sent(network.point_to_point(bytes, class), bytes)
            });
            layer.add(Slot::Hidden, cost);
        }
        let Some(group) = resolved.group else { return };
        let curves = &mut self.groups.values[group];
        let (group, algorithm) = (Group::packed(layout.tp, layout.gpus_per_node), algorithm(layout));
        let sum = curves.sum.at(rows, |rows| {
            let bytes = rows * hidden * ROW_BYTES;
            sent(network.all_reduce(bytes, group, algorithm), 2.0 * bytes)
        });
        layer.add(Slot::SumAttention, sum);
        layer.add(Slot::SumMlp, sum);
        if layout.structure(1, 0, 1).sums_norm(self.model) {
            let norm = curves.norm.at(rows, |rows| {
                let bytes = rows * 8.0;
                sent(network.all_reduce(bytes, group, algorithm), 2.0 * bytes)
            });
            layer.add(Slot::SumNorm, norm);
        }
        if layout.experts.exchanges() {
            let gather = curves.gather.at(rows, |rows| {
                let bytes = rows * hidden * ROW_BYTES;
                sent(network.all_gather(bytes, group), bytes)
            });
            layer.add(Slot::AllGather, gather);
        }
        let tp = layout.tp as f64;
        let logits = curves.logits.at(samples, |samples| {
            let bytes = samples * vocab * 4.0;
            sent(network.all_gather(bytes, group), bytes / tp)
        });
        layer.add(Slot::GatherLogits, logits);
    }

    /// Rows to the experts and back, for one micro-batch of one layer.
    pub(super) fn exchange<S: Spent>(&mut self, resolved: &Resolved, moe: &Moe, rows: f64) -> (S, S) {
        let layout = resolved.layout;
        let (network, hidden) = (&self.network, self.model.hidden_size);
        let per_value = match layout.precision {
            ExchangePrecision::Full => ROW_BYTES,
            _ => COMPRESSED_BYTES,
        };
        let copies = if layout.two_level { Copies::PerNode } else { Copies::PerRank };
        let experts = moe.num_experts + layout.redundant_experts;
        let ranks = layout.expert_ranks();
        let exchange = |rows: f64| Exchange {
            tokens_per_rank: rows,
            hidden,
            top_k: moe.top_k,
            experts,
            group: Group::packed(ranks, layout.gpus_per_node),
            bytes_per_value_out: per_value,
            bytes_per_value_back: per_value,
            copies,
            max_over_mean: 1.0,
            mode: if rows <= LOW_LATENCY_TOKENS { Mode::LowLatency } else { Mode::Normal },
            sms: EXCHANGE_SMS,
        };
        let attention = layout.tp * layout.dp;
        let between_pools = |rows: f64, back: bool| {
            let attention = Group::packed(attention, layout.gpus_per_node);
            let pool = Group::packed(ranks, layout.gpus_per_node);
            let (senders, receivers) = if back { (pool, attention) } else { (attention, pool) };
            let across = match self.cluster.nodes > 1 && layout.ranks() > layout.gpus_per_node {
                true => LinkClass::InterNode,
                false => LinkClass::IntraNode,
            };
            M2n {
                senders,
                receivers,
                tokens: rows * attention.ranks as f64,
                hidden,
                top_k: moe.top_k,
                experts,
                bytes_per_value: per_value,
                copies,
                max_over_mean: 1.0,
                across,
            }
        };
        let place = resolved.exchange.expect("rows travel");
        let ExchangeCosts { out, back } = &mut self.exchanges.values[place];
        // With heads split, each rank of a group sends an equal share of the group's rows.
        let rows = rows / layout.tp as f64;
        match layout.experts {
            ExpertLayout::Pool { .. } => (
                out.at(rows, |rows| sent(network.m_to_n(&between_pools(rows, false)), 0.0)),
                back.at(rows, |rows| sent(network.m_to_n(&between_pools(rows, true)), 0.0)),
            ),
            _ => {
                let bytes = |rows: f64| {
                    let all = exchange(rows).rows();
                    (all.intra_rows + all.inter_rows) * hidden as f64 * per_value
                };
                (
                    out.at(rows, |rows| sent(network.dispatch(&exchange(rows)), bytes(rows))),
                    back.at(rows, |rows| sent(network.combine(&exchange(rows)), bytes(rows))),
                )
            }
        }
    }
}

fn algorithm(layout: &Layout) -> Algorithm {
    match layout.all_reduce {
        None => Algorithm::Best,
        Some(AllReduce::Flat) => Algorithm::TwoShot,
        Some(AllReduce::Hierarchical) => Algorithm::Hierarchical,
    }
}

fn sent(price: Price, bytes: f64) -> Cost {
    Cost { sent: bytes, ..Cost::of_price(price) }
}
