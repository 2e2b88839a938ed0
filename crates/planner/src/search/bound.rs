//! What no plan of a shape can beat: bytes and operations at the full bandwidth and the peak, in closed form.
//!
//! A price is never below physics, so a shape whose bound is worse than a price that is known need not be priced. The number
//! of requests that are being answered is not known before a price is; so bounds are of brackets of that number, and a
//! concurrency is left out only when all brackets up to it are.

use moesaic_spec::{LayerAttention, LinkClass, ModelSpec, Moe};

use super::candidates::Shape;
use crate::PlannerError;
use crate::cost::{Op, Precision};
use crate::iteration::parts::{Affine, Part, PartOp};
use crate::iteration::{ExpertLayout, Formats, Iterations, Layout, attend};
use crate::network::{Collective, CollectiveKind, CommOp, Copies, Exchange, Group, Library, M2n, Mode, Network};
use crate::serving::Requests;

/// Prices are read off between points of a grid, where what grows ever slower is a little above the straight line; and the
/// steady state is found to 1 %.
const SLACK: f64 = 0.95;

/// Seconds at the peak and at the full bandwidth, by rows.
#[derive(Clone, Copy, Debug, Default)]
struct Least {
    computing: Affine,
    streaming: Affine,
}

impl Least {
    fn add(&mut self, computing: Affine, streaming: Affine) {
        let sum = |a: Affine, b: Affine| Affine { fixed: a.fixed + b.fixed, per_row: a.per_row + b.per_row };
        (self.computing, self.streaming) = (sum(self.computing, computing), sum(self.streaming, streaming));
    }
}

/// Bounds of one shape. Everything is for one rank.
pub struct Bound<'a> {
    shape: Shape,
    requests: Requests,
    dense: f64,
    moe: f64,
    attention: Least,
    mlp: Least,
    around: Least,
    ends: Least,
    core: Option<PartOp>,
    /// How layers attend, each way with its share of the layers.
    ways: Vec<(LayerAttention, f64)>,
    experts: Option<&'a Moe>,
    formats: Formats,
    gpu: &'a moesaic_spec::Gpu,
    network: Network,
    hidden: usize,
    group: Group,
    gpus_per_node: usize,
    compress: bool,
    nodes_shared: bool,
}

/// What a shape can reach at best while so many requests of a group are being answered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Best {
    /// Time per output token at least, seconds.
    pub tpot: f64,
    /// Output tokens per second of all copies at most.
    pub throughput: f64,
}

impl<'a> Bound<'a> {
    /// For one shape; `layout` is any of its variants.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be spread like this.
    pub fn new(
        iterations: &mut Iterations<'a>,
        shape: &Shape,
        layout: &Layout,
        requests: &Requests,
        compress: bool,
    ) -> Result<Bound<'a>, PlannerError> {
        let parts = iterations.parts_of(layout)?;
        let (model, cluster): (&'a ModelSpec, _) = (iterations.model(), iterations.cluster());
        let (gpu, formats) = (&cluster.gpu, iterations.formats());
        let (dense, moe) = layout.fullest_stage(model);
        let least = |of: &[Part]| {
            let mut sum = Least::default();
            for &part in of {
                parts.ops(part).iter().for_each(|op| add_op(&mut sum, op, formats.of_part(part), gpu));
            }
            sum
        };
        let core = |op: &&PartOp| matches!(op, PartOp::AttentionCore { .. } | PartOp::MlaCore { .. });
        let exchanging = layout.ranks() / layout.pp;
        Ok(Bound {
            shape: *shape,
            requests: *requests,
            dense: dense as f64,
            moe: moe as f64,
            attention: least(&[Part::Attention]),
            mlp: least(&[Part::Mlp]),
            around: least(&[Part::Route, Part::SharedExpert, Part::Combine]),
            ends: least(&[Part::Embed, Part::Head, Part::Sample]),
            core: parts.ops(Part::Attention).iter().find(core).cloned(),
            ways: attend::ways(model),
            experts: model.layers.iter().find_map(|ffn| ffn.as_moe()).filter(|_| moe > 0),
            formats,
            gpu,
            network: iterations.network().clone(),
            hidden: model.hidden_size,
            group: Group::packed(layout.tp, layout.gpus_per_node),
            gpus_per_node: layout.gpus_per_node,
            compress,
            nodes_shared: exchanging > layout.gpus_per_node && cluster.nodes > 1,
        })
    }

    /// With `from` to `to` requests of a group being answered, of `slots` that it has.
    pub fn best(&self, from: f64, to: f64, slots: f64) -> Best {
        let Requests { output, .. } = self.requests;
        let output = output.max(1.0);
        let groups = (self.shape.dp * self.shape.copies) as f64;
        let tpot = SLACK * self.iteration(from, slots);
        // Little's law: answered = throughput × time of an answer; longer batches are the more efficient ones.
        let answers =
            if output > 1.0 { output / (output - 1.0) * to / self.iteration(to, slots) } else { f64::INFINITY };
        let cycle = self.ttft() + (output - 1.0) * tpot;
        let throughput = groups * (answers / SLACK).min(slots * output / cycle);
        Best { tpot, throughput }
    }

    /// Time to first token at least, seconds: the operations of one prompt.
    pub fn ttft(&self) -> f64 {
        SLACK * self.computing(self.prompt())
    }

    fn prompt(&self) -> f64 {
        (self.requests.input * (1.0 - self.requests.prefix_hit)).max(1.0)
    }

    /// Operations of so many rows on the ranks of one stage that have attention, without attention's core, seconds.
    fn computing(&self, rows: f64) -> f64 {
        let of = |least: &Least| least.computing.at(rows);
        let own =
            (self.dense + self.moe) * of(&self.attention) + self.dense * of(&self.mlp) + self.moe * of(&self.around);
        own + if self.pooled() { 0.0 } else { self.moe * self.routed(rows).0 }
    }

    /// An iteration in which so many of a group's requests are answered, and as many prompt tokens read as keep it so, seconds.
    /// Nobody waits for its own prompt, nor for those that were read with it.
    fn iteration(&self, answered: f64, slots: f64) -> f64 {
        let pp = self.shape.pp as f64;
        // Four micro-batches at most, none of less than a row.
        let least_part = (answered / 4.0).max(1.0).min(answered);
        let own = if self.requests.common_rhythm { self.requests.step_tokens / self.prompt() } else { 1.0 };
        let others = (1.0 - own.max(1.0) / slots.max(1.0)).max(0.0);
        let whole = self.stage(answered, others);
        if pp > 1.0 { whole.max(pp * self.stage(least_part, others)) } else { whole }
    }

    /// One stage's share.
    fn stage(&self, answered: f64, others: f64) -> f64 {
        let room = (self.requests.step_tokens - answered).max(1.0);
        let prompts = (others * answered * self.prompt() / self.requests.output.max(1.0)).min(room);
        let rows = answered + prompts;
        let layers = self.dense + self.moe;
        let context = self.requests.input + self.requests.output / 2.0;
        let (core_s, cache_s) = self.core(answered, context);
        let of = |least: &Least| least.streaming.at(answered);
        let streaming = (self.dense + self.moe) * (of(&self.attention) + cache_s)
            + self.dense * of(&self.mlp)
            + self.moe * of(&self.around)
            + self.ends.streaming.at(answered);
        let (experts_s, weights_s) = self.routed(answered);
        let own = (self.computing(rows) + layers * core_s)
            .max(streaming + if self.pooled() { 0.0 } else { self.moe * weights_s });
        let pool = self.moe * experts_s.max(weights_s);
        own.max(pool).max(self.links(answered))
    }

    /// Attention's core in the mean layer: operations and bytes, seconds.
    fn core(&self, seqs: f64, context: f64) -> (f64, f64) {
        let Some(core) = &self.core else { return (0.0, 0.0) };
        let mut sum = (0.0, 0.0);
        for &(attention, share) in &self.ways {
            for op in attend::decode(core, attention, seqs, context, self.formats.kv) {
                let (computing, streaming) = least_of(&op, self.gpu);
                sum = (sum.0 + share * computing, sum.1 + share * streaming);
            }
        }
        sum
    }

    fn pooled(&self) -> bool {
        matches!(self.shape.experts, ExpertLayout::Pool { .. })
    }

    /// The routed experts of a rank with the mean load, for so many rows of each group: operations and bytes, seconds.
    fn routed(&self, rows: f64) -> (f64, f64) {
        let Some(moe) = self.experts else { return (0.0, 0.0) };
        let exchanges = self.shape.experts.exchanges();
        let (ep, tp) = match self.shape.experts {
            ExpertLayout::Placed { ep } | ExpertLayout::Pool { ep } | ExpertLayout::Summed { ep } => (ep, 1),
            ExpertLayout::Cut => (1, self.shape.tp),
        };
        let op = Op::Experts {
            tokens: if exchanges { rows * self.shape.dp as f64 } else { rows },
            hidden: self.hidden as f64,
            intermediate: moe.intermediate_size as f64,
            top_k: moe.top_k as f64,
            experts: moe.num_experts as f64,
            tp: tp as f64,
            ep: ep as f64,
            weights: self.formats.experts,
            matrices: moe.activation.matrices(),
            skew: 0.0,
        };
        least_of(&op, self.gpu)
    }

    /// All that a rank with attention sends in an iteration, seconds.
    fn links(&self, rows: f64) -> f64 {
        let mut seconds = 0.0;
        if self.shape.tp > 1 {
            let bytes = rows * self.hidden as f64 * 2.0;
            let sum =
                Collective { kind: CollectiveKind::AllReduce, library: Library::Custom, bytes, group: self.group };
            seconds += 2.0 * (self.dense + self.moe) * self.network.bound(&CommOp::Collective(sum));
        }
        let Some(moe) = self.experts.filter(|_| self.shape.experts.exchanges()) else { return seconds };
        let bytes_per_value = if self.compress { 1.0 } else { 2.0 };
        let way = |copies: Copies| match self.shape.experts {
            ExpertLayout::Pool { ep } => {
                let exchange = M2n {
                    senders: self.group_of(self.shape.tp * self.shape.dp),
                    receivers: self.group_of(ep),
                    tokens: rows * self.shape.dp as f64,
                    hidden: self.hidden,
                    top_k: moe.top_k,
                    experts: moe.num_experts,
                    bytes_per_value,
                    copies,
                    max_over_mean: 1.0,
                    across: if self.nodes_shared { LinkClass::InterNode } else { LinkClass::IntraNode },
                };
                2.0 * self.network.m_to_n_bound(&exchange)
            }
            _ => {
                let exchange = Exchange {
                    tokens_per_rank: rows / self.shape.tp as f64,
                    hidden: self.hidden,
                    top_k: moe.top_k,
                    experts: moe.num_experts,
                    group: self.group_of(self.shape.tp * self.shape.dp),
                    bytes_per_value_out: bytes_per_value,
                    bytes_per_value_back: bytes_per_value,
                    copies,
                    max_over_mean: 1.0,
                    mode: Mode::Normal,
                    sms: 20,
                };
                self.network.bound(&CommOp::Dispatch(exchange)) + self.network.bound(&CommOp::Combine(exchange))
            }
        };
        seconds + self.moe * way(Copies::PerRank).min(way(Copies::PerNode))
    }

    fn group_of(&self, ranks: usize) -> Group {
        Group::packed(ranks, self.gpus_per_node)
    }
}

fn add_op(sum: &mut Least, op: &PartOp, weights: Precision, gpu: &moesaic_spec::Gpu) {
    let at = |rows: f64| match *op {
        PartOp::Gemm { rows: m, n, k } => least_of(&Op::Gemm { m: m.at(rows), n: n as f64, k: k as f64, weights }, gpu),
        PartOp::Stream { flops, bytes } => {
            least_of(&Op::Stream { flops: flops.at(rows), bytes: bytes.at(rows), precision: Precision::Bf16 }, gpu)
        }
        _ => (0.0, 0.0),
    };
    let ((flops_0, bytes_0), (flops_1, bytes_1)) = (at(0.0), at(1.0));
    sum.add(
        Affine { fixed: flops_0, per_row: flops_1 - flops_0 },
        Affine { fixed: bytes_0, per_row: bytes_1 - bytes_0 },
    );
}

/// An op's operations at the peak and its bytes at the full bandwidth, seconds.
fn least_of(op: &Op, gpu: &moesaic_spec::Gpu) -> (f64, f64) {
    (op.flops() / op.precision().peak(gpu), op.bytes() / gpu.memory_bandwidth)
}
