//! What one iteration of a plan takes: the second level of detail, between bounds and the simulation of events.
//!
//! [`parts`] says what a rank's parts do, from the model's forward pass on `Meta`; [`dag`] how they wait for each other,
//! from the plan's schedule. Here both are priced for a cluster and a batch. Each kind of rank is priced once, and each cost
//! is worked out once for each size (`curve`), so that a search can ask a hundred thousand times a second.

pub(crate) mod attend;
mod curve;
pub mod dag;
pub mod layout;
pub mod parts;

use std::collections::HashMap;
use std::hash::Hash;
use std::rc::Rc;
use std::sync::Arc;

use moesaic_plan::plan::{ExchangePrecision, Overlap};
use moesaic_plan::{AllReduce, Collective};
use moesaic_spec::{Cluster, DType, LayerAttention, ModelSpec, Moe, WeightFormat, WeightFormats};

pub use layout::{ExpertLayout, Layout};

use crate::PlannerError;
use crate::cost::{CostModel, Op, Phase, Precision, Price};
use crate::load::{ExpertLoad, Straggler};
use crate::memory::Footprint;
use crate::network::{Algorithm, Copies, Exchange, Group, M2n, Mode, Network};
use curve::{Curve, Surface};
use dag::{Dag, Durations, SLOTS, Slot, Structure};
use parts::{Cut, Part, PartOp, Parts};

/// What one rank spends.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Seconds.
    pub seconds: f64,
    /// Standard deviation of the seconds, all ops of a part being wrong in the same direction.
    pub deviation: f64,
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes of memory traffic.
    pub bytes: f64,
    /// Bytes sent to other ranks.
    pub sent: f64,
    /// Seconds that come from measured tables, from the roofline and from the learned predictor.
    pub by_source: [f64; 3],
}

impl Cost {
    fn of_op(op: &Op, price: Price) -> Cost {
        Cost { flops: op.flops(), bytes: op.bytes(), ..Cost::of(price) }
    }

    fn of(price: Price) -> Cost {
        let mut by_source = [0.0; 3];
        by_source[price.source as usize] = price.seconds;
        Cost { seconds: price.seconds, deviation: price.seconds * price.sd, by_source, ..Cost::default() }
    }

    fn map(self, other: Cost, f: impl Fn(f64, f64) -> f64) -> Cost {
        let source = |idx: usize| f(self.by_source[idx], other.by_source[idx]);
        Cost {
            seconds: f(self.seconds, other.seconds),
            deviation: f(self.deviation, other.deviation),
            flops: f(self.flops, other.flops),
            bytes: f(self.bytes, other.bytes),
            sent: f(self.sent, other.sent),
            by_source: [source(0), source(1), source(2)],
        }
    }

    pub(crate) fn plus(self, other: Cost) -> Cost {
        self.map(other, |a, b| a + b)
    }

    fn times(self, factor: f64) -> Cost {
        self.map(self, |a, _| a * factor)
    }

    fn towards(self, other: Cost, share: f64) -> Cost {
        self.map(other, |a, b| a + (b - a) * share)
    }
}

/// Types that weights and cache are held in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Formats {
    /// Weights of attention, dense MLPs and shared experts.
    pub dense: Precision,
    /// Weights of routed experts.
    pub experts: Precision,
    /// Keys and values.
    pub kv: Precision,
}

impl Formats {
    /// As the checkpoint stores them; keys and values in 16 bits.
    pub fn of(model: &ModelSpec) -> Formats {
        let WeightFormats { dense, experts } = model.formats();
        Formats { dense: precision(dense), experts: precision(experts), kv: Precision::Bf16 }
    }

    /// The same in our own engine: keys and values are in the type that it computes in.
    pub fn of_engine(model: &ModelSpec) -> Formats {
        let kv = if model.dtype.compute() == DType::F32 { Precision::F32 } else { Precision::Bf16 };
        Formats { kv, ..Formats::of(model) }
    }

    /// Type of a part's weights. Routers and heads are never quantised.
    pub(crate) fn of_part(self, part: Part) -> Precision {
        match part {
            Part::Route | Part::Head if self.dense != Precision::F32 => Precision::Bf16,
            Part::Experts => self.experts,
            _ => self.dense,
        }
    }
}

fn precision(format: WeightFormat) -> Precision {
    match format {
        WeightFormat::F32 => Precision::F32,
        WeightFormat::Bf16 => Precision::Bf16,
        WeightFormat::Fp8 => Precision::Fp8,
        WeightFormat::Fp8Block => Precision::Fp8Block,
        WeightFormat::Mxfp4 | WeightFormat::Nvfp4 => Precision::F4,
        WeightFormat::Int4 => Precision::Int4,
    }
}

/// What one data-parallel group has in one iteration; the one that all wait for, where groups have not the same.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Batch {
    /// Sequences that get one more token.
    pub decodes: f64,
    /// Tokens in the cache of each, in the mean.
    pub context: f64,
    /// Tokens of prompts.
    pub prefill_tokens: f64,
    /// Prompts that they are of.
    pub prefills: f64,
    /// Tokens in the cache before them, for each prompt, in the mean.
    pub prefill_context: f64,
    /// Prompts that are read to their end.
    pub finished_prefills: f64,
    /// Rows that the mean group has fewer than this one: 0 where every group has the same. Placed experts work for all
    /// groups, so they have the mean of rows and not the most.
    pub shortfall: f64,
}

impl Batch {
    /// Decoding only.
    pub fn decode(seqs: f64, context: f64) -> Batch {
        Batch { decodes: seqs, context, ..Batch::default() }
    }

    /// Whole prompts only.
    pub fn prefill(prompts: f64, tokens: f64) -> Batch {
        Batch { prefill_tokens: prompts * tokens, prefills: prompts, finished_prefills: prompts, ..Batch::default() }
    }

    /// Rows of the residual stream.
    pub fn rows(&self) -> f64 {
        self.decodes + self.prefill_tokens
    }

    /// Rows of the mean group.
    fn mean_rows(&self) -> f64 {
        (self.rows() - self.shortfall).max(0.0)
    }

    /// One of so many equal parts.
    fn part(self, parts: f64) -> Batch {
        Batch {
            decodes: self.decodes / parts,
            prefill_tokens: self.prefill_tokens / parts,
            prefills: self.prefills / parts,
            finished_prefills: self.finished_prefills / parts,
            shortfall: self.shortfall / parts,
            ..self
        }
    }
}

/// What an iteration takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Iteration {
    /// Seconds until each sequence of the batch has its next token, in steady state.
    pub seconds: f64,
    /// Standard deviation of that.
    pub deviation: f64,
    /// Seconds of one rank by slot of the graph, all layers and micro-batches together.
    pub slots: Durations,
    /// Spent by a rank with attention (and, where they share ranks, its experts).
    pub attention_rank: Cost,
    /// Spent by a rank of an expert pool.
    pub expert_rank: Cost,
    /// Seconds for which the compute lane of a rank with attention works.
    pub computing: f64,
    /// Greatest load of a rank with experts over the mean.
    pub imbalance: f64,
    /// Parts that the step was cut into.
    pub micro_batches: usize,
}

impl Iteration {
    /// Seconds of communication of a class, on a rank with attention.
    pub fn communication(&self, class: Collective) -> f64 {
        let slots: &[Slot] = match class {
            Collective::AllReduce => &[Slot::SumNorm, Slot::SumAttention, Slot::SumMlp],
            Collective::AllToAll => &[Slot::Dispatch, Slot::Relay, Slot::Answer, Slot::AnswerNear],
            Collective::SendReceive => &[Slot::Hidden],
            Collective::AllGather => &[Slot::AllGather, Slot::GatherLogits],
            Collective::Broadcast => &[],
        };
        slots.iter().map(|&slot| self.slots[slot]).sum()
    }

    /// Seconds in which a rank with attention does not compute: communication that nothing hides, and waiting.
    pub fn exposed(&self) -> f64 {
        (self.seconds - self.computing).max(0.0)
    }
}

/// Prices iterations of one model on one cluster.
pub struct Iterations<'a> {
    model: &'a ModelSpec,
    cluster: &'a Cluster,
    formats: Formats,
    costs: CostModel,
    network: Network,
    load: Option<Arc<ExpertLoad>>,
    /// How layers attend, each way with the share of layers that do.
    attention: Vec<(LayerAttention, f64)>,
    cuts: Interned<Cut, CutCosts>,
    experts: Interned<ExpertKey, ExpertCosts>,
    groups: Interned<GroupKey, GroupCosts>,
    exchanges: Interned<ExchangeKey, ExchangeCosts>,
    hidden: [Curve; 2],
    dags: Interned<Structure, Dag>,
    times: Vec<(f64, f64)>,
}

/// Values that are found by a key once, and by their place from then on: a search asks for the same ones again and again.
struct Interned<K, V> {
    places: HashMap<K, usize>,
    values: Vec<V>,
}

impl<K, V> Default for Interned<K, V> {
    fn default() -> Self {
        Interned { places: HashMap::new(), values: Vec::new() }
    }
}

impl<K: Eq + Hash, V> Interned<K, V> {
    fn place<E>(&mut self, key: K, make: impl FnOnce(&K) -> Result<V, E>) -> Result<usize, E> {
        if let Some(&place) = self.places.get(&key) {
            return Ok(place);
        }
        self.values.push(make(&key)?);
        self.places.insert(key, self.values.len() - 1);
        Ok(self.values.len() - 1)
    }

    fn or_default(&mut self, key: K) -> usize
    where
        V: Default,
    {
        let Ok(place) = self.place(key, |_| Ok::<V, std::convert::Infallible>(V::default()));
        place
    }
}

/// What the parts of a rank cost, by rows.
struct CutCosts {
    parts: Rc<Parts>,
    /// By [`Part`].
    curves: [Curve; Part::ALL.len()],
    /// Attention's core, by way of attending.
    cores: Vec<CoreCosts>,
}

/// Attention's core of sequences that get a token, by sequences and context; and of one prompt, by its tokens and those before
/// them.
#[derive(Default)]
struct CoreCosts {
    decodes: Surface,
    prefills: Surface,
}

/// Routed experts of one rank, and how full the fullest is, by tokens of all ranks.
#[derive(Default)]
struct ExpertCosts {
    routed: Curve,
    imbalance: Curve,
}

/// What a group that shares heads sums and gathers, by rows.
#[derive(Default)]
struct GroupCosts {
    sum: Curve,
    norm: Curve,
    gather: Curve,
    /// By tokens that are sampled.
    logits: Curve,
}

/// Rows to experts and back, by the rows of a rank.
#[derive(Default)]
struct ExchangeCosts {
    out: Curve,
    back: Curve,
}

/// What the experts' share of a layer depends on, besides the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct ExpertKey {
    layout: ExpertLayout,
    tp: usize,
    senders: usize,
    redundant: usize,
    balanced: bool,
}

/// What sums and gathers depend on, besides the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct GroupKey {
    tp: usize,
    all_reduce: Option<AllReduce>,
}

/// What an exchange depends on, besides the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct ExchangeKey {
    expert: ExpertKey,
    tp: usize,
    dp: usize,
    precision: ExchangePrecision,
    two_level: bool,
}

/// A layout of which everything is found that a price needs: pricing it at many batches looks nothing up.
#[derive(Clone, Debug)]
pub struct Resolved<'l> {
    layout: &'l Layout,
    dense: usize,
    moe: usize,
    cut: usize,
    expert: usize,
    /// Where there are several ranks that share heads.
    group: Option<usize>,
    /// Where rows travel.
    exchange: Option<usize>,
    /// By micro-batches less one: graphs of few layers, with a MoE layer less, with a dense layer more.
    dags: Vec<[usize; 3]>,
}

impl<'l> Resolved<'l> {
    /// The layout.
    pub fn layout(&self) -> &'l Layout {
        self.layout
    }
}

/// Bytes of a number of the residual stream between ranks.
const ROW_BYTES: f64 = 2.0;
/// Bytes of a number that is sent in 8 bits, its share of a block's factor included.
const COMPRESSED_BYTES: f64 = 1.0 + 4.0 / 128.0;
/// Multiprocessors that the kernels for many tokens use; DeepEP's default.
const EXCHANGE_SMS: usize = 20;
/// Tokens of a rank up to which the kernels for few tokens are used.
const LOW_LATENCY_TOKENS: f64 = 512.0;

impl<'a> Iterations<'a> {
    /// For one model on one cluster. Without `load`, all experts are loaded alike.
    pub fn new(
        model: &'a ModelSpec,
        cluster: &'a Cluster,
        formats: Formats,
        costs: CostModel,
        network: Network,
        load: Option<Arc<ExpertLoad>>,
    ) -> Iterations<'a> {
        Iterations {
            model,
            cluster,
            formats,
            costs,
            network,
            load,
            attention: ways_of_attending(model),
            cuts: Interned::default(),
            experts: Interned::default(),
            groups: Interned::default(),
            exchanges: Interned::default(),
            hidden: Default::default(),
            dags: Interned::default(),
            times: Vec::new(),
        }
    }

    /// Prices an iteration whose groups wait for the one with this batch, and whose ranks wait, layer by layer, for the one
    /// with the fullest experts, as full as it is in the mean.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be spread like this.
    pub fn price(&mut self, layout: &Layout, batch: &Batch) -> Result<Iteration, PlannerError> {
        let resolved = self.resolve(layout)?;
        Ok(self.price_resolved(&resolved, batch))
    }

    /// Finds what prices of a layout need. What it returns is of these iterations and no others.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be spread like this.
    pub fn resolve<'l>(&mut self, layout: &'l Layout) -> Result<Resolved<'l>, PlannerError> {
        let (dense, moe) = layout.fullest_stage(self.model);
        let cut = self.cut(layout)?;
        let expert = expert_key(layout);
        let exchange = layout.experts.exchanges().then(|| {
            let Layout { tp, dp, precision, two_level, .. } = *layout;
            self.exchanges.or_default(ExchangeKey { expert, tp, dp, precision, two_level })
        });
        let Layout { tp, all_reduce, .. } = *layout;
        let group = (tp > 1).then(|| self.groups.or_default(GroupKey { tp, all_reduce }));
        // Stages of a pipeline have one micro-batch at a time.
        let most = if layout.pp > 1 { 1 } else { layout.micro_batches };
        // From the third MoE layer on, each adds the same; so does each dense layer.
        let (few_dense, few_moe) = (dense.min(1), moe.min(3));
        let mut dags = Vec::with_capacity(most);
        for micro_batches in 1..=most {
            let mut dag = |dense, moe| {
                let structure = layout.structure(micro_batches, dense, moe);
                self.dags.place(structure, |structure| Dag::new(self.model, structure))
            };
            let few = dag(few_dense, few_moe)?;
            let fewer = if moe > 3 { dag(few_dense, 2)? } else { few };
            let two = if dense > 1 { dag(2, few_moe)? } else { few };
            dags.push([few, fewer, two]);
        }
        Ok(Resolved { layout, dense, moe, cut, expert: self.experts.or_default(expert), group, exchange, dags })
    }

    /// Prices an iteration of a layout that is found already.
    pub fn price_resolved(&mut self, resolved: &Resolved, batch: &Batch) -> Iteration {
        self.price_straggling(resolved, batch, 0.0)
    }

    /// Seconds of attention in one layer of one rank: what groups with other batches differ in.
    pub fn attention_s(&mut self, resolved: &Resolved, batch: &Batch) -> f64 {
        self.part(resolved.cut, Part::Attention, batch.rows()).seconds + self.core(resolved.cut, batch).seconds
    }

    /// The price when the fullest rank is fuller than in the mean by so many standard deviations of the mean over the layers.
    pub fn price_straggling(&mut self, resolved: &Resolved, batch: &Batch, deviations: f64) -> Iteration {
        let layout = resolved.layout;
        let micro_batches = (layout.micro_batches as f64).min(batch.rows().floor()).max(1.0);
        let part = batch.part(micro_batches);
        let micro_batches = micro_batches as usize;
        let layer = self.layer(resolved, &part, deviations / (resolved.moe.max(1) as f64).sqrt());
        match layout.pp {
            1 => {
                let (seconds, computing) = self.whole(resolved, &layer, micro_batches);
                layer.iteration(resolved, seconds, computing, micro_batches)
            }
            _ => self.pipelined(resolved, &layer, micro_batches),
        }
    }

    /// What the ranks of a layout hold, for steps of at most so many tokens of one data-parallel group.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be spread like this.
    pub fn footprint(&mut self, layout: &Layout, step_tokens: f64) -> Result<Footprint, PlannerError> {
        let cut = self.cut(layout)?;
        let parts = &self.cuts.values[cut].parts;
        Ok(Footprint::new(self.model, layout, self.formats, parts, step_tokens))
    }

    /// The model.
    pub fn model(&self) -> &'a ModelSpec {
        self.model
    }

    /// The cluster.
    pub fn cluster(&self) -> &'a Cluster {
        self.cluster
    }

    /// What the parts of a rank do.
    ///
    /// # Errors
    /// [`PlannerError`]: the model cannot be spread like this.
    pub fn parts_of(&mut self, layout: &Layout) -> Result<Rc<Parts>, PlannerError> {
        let cut = self.cut(layout)?;
        Ok(self.cuts.values[cut].parts.clone())
    }

    /// Prices of communication.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Types of weights and cache.
    pub fn formats(&self) -> Formats {
        self.formats
    }

    /// Seconds of all layers on the same ranks, where micro-batches may overlap; and of the compute lane of a rank with
    /// attention.
    fn whole(&mut self, resolved: &Resolved, layer: &Layer, micro_batches: usize) -> (f64, f64) {
        let (dense, moe) = (resolved.dense, resolved.moe);
        let [few_dag, fewer_dag, two_dag] = resolved.dags[micro_batches - 1];
        let mut walk = |dag: usize| self.dags.values[dag].walk(&layer.durations, &mut self.times);
        let few = walk(few_dag);
        let mut seconds = few.seconds;
        let mut computing = few.computing[0];
        if moe > 3 {
            let fewer = walk(fewer_dag);
            seconds += (moe - 3) as f64 * (few.seconds - fewer.seconds);
            computing += (moe - 3) as f64 * (few.computing[0] - fewer.computing[0]);
        }
        if dense > 1 {
            let two = walk(two_dag);
            seconds += (dense - 1) as f64 * (two.seconds - few.seconds);
            computing += (dense - 1) as f64 * (two.computing[0] - few.computing[0]);
        }
        (seconds, computing)
    }

    /// An iteration of the layout's family if computing and exchange hid each other completely, and micro-batches cost
    /// nothing: no member is faster.
    pub fn ideal(&mut self, resolved: &Resolved, batch: &Batch) -> Iteration {
        let pp = resolved.layout.pp as f64;
        let whole = self.ideal_stage(resolved, batch);
        let seconds = match resolved.layout.pp {
            1 => whole,
            _ => whole.max(pp * self.ideal_stage(resolved, &batch.part(batch.rows().floor().clamp(1.0, 4.0)))),
        };
        Iteration { seconds, ..Iteration::default() }
    }

    fn ideal_stage(&mut self, resolved: &Resolved, batch: &Batch) -> f64 {
        // Small parts may go by faster kernels.
        let parts = [1.0, 2.0, 4.0].map(|parts| (parts, self.layer(resolved, &batch.part(parts), 0.0)));
        let mut lanes = [0.0; 3];
        for slot in Slot::ALL {
            let lane = match slot {
                Slot::Experts if parts[0].1.pool => 1,
                _ if slot.is_exchange() => 2,
                _ => 0,
            };
            let ways = parts.iter().map(|(parts, layer)| parts * layer.durations[slot]);
            lanes[lane] += slot.times(resolved.dense, resolved.moe) * ways.fold(f64::INFINITY, f64::min);
        }
        lanes.into_iter().fold(0.0, f64::max)
    }

    /// Stages take turns with the micro-batches: a batch comes round when all stages have had it, and the slowest stage all
    /// micro-batches.
    fn pipelined(&mut self, resolved: &Resolved, layer: &Layer, micro_batches: usize) -> Iteration {
        let (seconds, computing) = self.whole(resolved, layer, 1);
        let stage = seconds + layer.durations[Slot::Hidden];
        let turns = micro_batches.max(resolved.layout.pp) as f64;
        layer.iteration(resolved, turns * stage, computing * micro_batches as f64, micro_batches)
    }

    /// What each slot takes for one micro-batch in one layer, with the fullest rank by so many standard deviations of a layer.
    fn layer(&mut self, resolved: &Resolved, batch: &Batch, deviations: f64) -> Layer {
        let rows = batch.rows();
        let samples = batch.decodes + batch.finished_prefills;
        let pool = matches!(resolved.layout.experts, ExpertLayout::Pool { .. });
        let mut layer = Layer { deviations, pool, ..Layer::default() };
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

    /// The costs of a way of cutting the model, traced the first time.
    fn cut(&mut self, layout: &Layout) -> Result<usize, PlannerError> {
        let (model, ways) = (self.model, &self.attention);
        self.cuts.place(layout.cut(), |cut| {
            let parts = Rc::new(Parts::trace(model, cut)?);
            let cores = ways.iter().map(|_| CoreCosts::default()).collect();
            Ok(CutCosts { parts, curves: Default::default(), cores })
        })
    }

    /// A part's ops but for attention's core and the routed experts.
    fn part(&mut self, cut: usize, part: Part, rows: f64) -> Cost {
        let (costs, formats) = (&self.costs, self.formats);
        let CutCosts { parts, curves, .. } = &mut self.cuts.values[cut];
        if parts.ops(part).is_empty() {
            return Cost::default();
        }
        curves[part as usize].at(rows, |rows| {
            let price = |op: &PartOp| {
                let op = match *op {
                    PartOp::Gemm { rows: m, n, k } => {
                        Op::Gemm { m: m.at(rows), n: n as f64, k: k as f64, weights: formats.of_part(part) }
                    }
                    PartOp::Stream { flops, bytes } => {
                        Op::Stream { flops: flops.at(rows), bytes: bytes.at(rows), precision: Precision::Bf16 }
                    }
                    _ => return Cost::default(),
                };
                Cost::of_op(&op, costs.price(&op))
            };
            parts.ops(part).iter().map(price).fold(Cost::default(), Cost::plus)
        })
    }

    /// Attention over the cache, decodes and prompts apart: the mean over layers, which may attend in different ways.
    fn core(&mut self, cut: usize, batch: &Batch) -> Cost {
        let CutCosts { parts, cores, .. } = &mut self.cuts.values[cut];
        let is_core = |op: &&PartOp| matches!(op, PartOp::AttentionCore { .. } | PartOp::MlaCore { .. });
        let core = parts.ops(Part::Attention).iter().find(is_core).expect("every layer has attention");
        let (costs, kv) = (&self.costs, self.formats.kv);
        let price =
            |ops: &[Op]| ops.iter().map(|op| Cost::of_op(op, costs.price(op))).fold(Cost::default(), Cost::plus);
        let mut cost = Cost::default();
        for (&(attention, share), CoreCosts { decodes, prefills }) in self.attention.iter().zip(cores) {
            if batch.decodes > 0.0 {
                let of_way = decodes.at(batch.decodes, batch.context, |seqs, context| {
                    price(&attend::decode(core, attention, seqs, context, kv))
                });
                cost = cost.plus(of_way.times(share));
            }
            if batch.prefill_tokens > 0.0 {
                // One prompt at a time: each has a causal mask of its own.
                let prompts = batch.prefills.max(1.0);
                let tokens = batch.prefill_tokens / prompts;
                let of_one = prefills.at(tokens, 1.0 + batch.prefill_context, |tokens, before| {
                    price(&attend::prefill(core, attention, tokens, tokens + before - 1.0, kv))
                });
                cost = cost.plus(of_one.times(share * prompts));
            }
        }
        cost
    }

    /// Sums and gathers of a tensor-parallel group, and what goes to the next stage.
    fn add_sums(&mut self, resolved: &Resolved, rows: f64, samples: f64, layer: &mut Layer) {
        let layout = resolved.layout;
        let (hidden, vocab) = (self.model.hidden_size as f64, self.model.vocab_size as f64);
        let network = &self.network;
        if layout.pp > 1 {
            let stage = layout.ranks() / layout.pp;
            let class = if stage >= self.cluster.gpus_per_node || layout.ranks() > self.cluster.gpus_per_node {
                moesaic_spec::LinkClass::InterNode
            } else {
                moesaic_spec::LinkClass::IntraNode
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

    /// Routed experts, and the way to them and back.
    fn add_experts(&mut self, resolved: &Resolved, moe: &Moe, batch: &Batch, layer: &mut Layer) {
        let layout = resolved.layout;
        // Rows of all groups meet at placed experts; a group alone has its own otherwise.
        let (rows, groups) = match layout.experts.exchanges() {
            true => (batch.mean_rows(), layout.dp as f64),
            false => (batch.rows(), 1.0),
        };
        let tokens = rows * groups;
        let (load, ranks) = (&self.load, layout.expert_ranks());
        let imbalance = self.experts.values[resolved.expert].imbalance.at(tokens, |tokens| {
            let straggler =
                |load: &Arc<ExpertLoad>| load.straggler(tokens, ranks, layout.redundant_experts, layout.balanced);
            let Straggler { mean, sd, .. } = load.as_ref().map_or(Straggler::EVEN, straggler);
            Cost { seconds: mean, deviation: sd, ..Cost::default() }
        });
        layer.imbalance = (imbalance.seconds + layer.deviations * imbalance.deviation).max(1.0);
        let fullest = tokens * layer.imbalance;
        let experts = self.routed(resolved, moe, fullest);
        // Rows are put in order around them: what the rank's own trace says, for as many rows as reach it.
        let around = self.part(resolved.cut, Part::Experts, fullest / groups);
        layer.add(Slot::Experts, experts.plus(around));
        if !layout.experts.exchanges() {
            return;
        }
        // The rank that sends most decides when all is there.
        let (out, back) = self.exchange(resolved, moe, batch.rows());
        layer.add(Slot::Dispatch, out);
        layer.add(Slot::Answer, back);
        // A part of the rows stays on the node: it arrives over NVLink, and is worked on first.
        let nodes = (ranks as f64 / layout.gpus_per_node as f64).max(1.0);
        let near = 1.0 / nodes;
        layer.durations[Slot::DispatchNear] = out.seconds * near;
        layer.durations[Slot::AnswerNear] = back.seconds * near;
        if layout.overlap == Overlap::Arrivals {
            let [of_near, of_far] = [near, 1.0 - near].map(|share| {
                let routed = self.routed(resolved, moe, fullest * share);
                routed.seconds + around.seconds * share
            });
            layer.durations[Slot::ExpertsNear] = of_near;
            layer.durations[Slot::ExpertsFar] = of_far;
        }
    }

    /// The routed experts of one rank, when all ranks together have so many tokens.
    fn routed(&mut self, resolved: &Resolved, moe: &Moe, tokens: f64) -> Cost {
        let (layout, costs) = (resolved.layout, &self.costs);
        let (weights, hidden) = (self.formats.experts, self.model.hidden_size as f64);
        let (intermediate, top_k) = (moe.intermediate_size as f64, moe.top_k as f64);
        let experts = (moe.num_experts + layout.redundant_experts) as f64;
        let (ep, matrices) = (layout.expert_ranks() as f64, moe.activation.matrices());
        let senders = (layout.tp * layout.dp) as f64;
        self.experts.values[resolved.expert].routed.at(tokens, |tokens| {
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
            Cost::of_op(&op, costs.price(&op))
        })
    }

    /// Rows to the experts and back, for one micro-batch of one layer.
    fn exchange(&mut self, resolved: &Resolved, moe: &Moe, rows: f64) -> (Cost, Cost) {
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
                true => moesaic_spec::LinkClass::InterNode,
                false => moesaic_spec::LinkClass::IntraNode,
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

/// One layer of one micro-batch, by slot.
#[derive(Clone, Copy, Debug, Default)]
struct Layer {
    durations: Durations,
    costs: [Cost; SLOTS],
    /// Standard deviations by which the fullest rank is fuller than in the mean.
    deviations: f64,
    /// Experts have ranks of their own.
    pool: bool,
    imbalance: f64,
}

impl Layer {
    fn add(&mut self, slot: Slot, cost: Cost) {
        self.durations[slot] += cost.seconds;
        self.costs[slot as usize] = self.costs[slot as usize].plus(cost);
    }

    /// Puts together what all layers and micro-batches spend.
    fn iteration(&self, resolved: &Resolved, seconds: f64, computing: f64, micro_batches: usize) -> Iteration {
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

fn expert_key(layout: &Layout) -> ExpertKey {
    let (redundant, balanced) = (layout.redundant_experts, layout.balanced);
    let senders = layout.tp * layout.dp;
    ExpertKey { layout: layout.experts, tp: layout.expert_cut(), senders, redundant, balanced }
}

/// Different ways in which layers attend, each with its share of the layers.
pub(crate) fn ways_of_attending(model: &ModelSpec) -> Vec<(LayerAttention, f64)> {
    let mut ways: Vec<(LayerAttention, f64)> = Vec::new();
    for layer in 0..model.layers.len() {
        let attention = model.layer_attention(layer);
        match ways.iter_mut().find(|(way, _)| *way == attention) {
            Some((_, share)) => *share += 1.0,
            None => ways.push((attention, 1.0)),
        }
    }
    ways.iter_mut().for_each(|(_, share)| *share /= model.layers.len() as f64);
    ways
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

fn algorithm(layout: &Layout) -> Algorithm {
    match layout.all_reduce {
        None => Algorithm::Best,
        Some(AllReduce::Flat) => Algorithm::TwoShot,
        Some(AllReduce::Hierarchical) => Algorithm::Hierarchical,
    }
}

fn sent(price: Price, bytes: f64) -> Cost {
    Cost { sent: bytes, ..Cost::of(price) }
}
