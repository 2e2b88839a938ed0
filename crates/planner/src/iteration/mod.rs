//! What one iteration of a plan takes: the second level of detail, between bounds and the simulation of events.
//!
//! [`parts`] says what a rank's parts do, from the model's forward pass on `Meta`; [`dag`] how they wait for each other,
//! from the plan's schedule. Both are priced for a cluster and a [`Batch`]: a layer's ops in `layer`, its messages in
//! `exchange`, and here what all layers and micro-batches take together. Each kind of rank is priced once, and each cost
//! is worked out once for each size (`curve`) and kept (`interned`), so that a search can ask a hundred thousand times a
//! second.

pub(crate) mod attend;
mod batch;
mod cost;
mod curve;
pub mod dag;
mod exchange;
mod formats;
mod interned;
mod layer;
pub mod layout;
mod outcome;
pub mod parts;
mod prices;
mod resolved;

use std::rc::Rc;
use std::sync::Arc;

use moesaic_plan::plan::MAX_MICRO_BATCHES;
use moesaic_spec::{Cluster, LayerAttention, ModelSpec};

pub use batch::Batch;
pub use cost::Cost;
pub use formats::Formats;
pub use layout::{ExpertLayout, Layout};
pub use outcome::Iteration;
pub use resolved::Resolved;

use crate::PlannerError;
use crate::cost::{CostModel, Stack};
use crate::load::ExpertLoad;
use crate::memory::Footprint;
use crate::network::Network;
use cost::Spent;
use curve::Curve;
use dag::{Dag, Durations, Slot, Structure};
use interned::{CutCosts, ExchangeCosts, ExchangeKey, ExpertKey, FullestKey, GroupCosts, GroupKey, Interned};
use layer::Layer;
use parts::{Cut, Part, Parts};
use prices::Prices;

/// Prices iterations of one model on one cluster.
pub struct Iterations<'a> {
    model: &'a ModelSpec,
    cluster: &'a Cluster,
    formats: Formats,
    prices: Prices,
    network: Network,
    load: Option<Arc<ExpertLoad>>,
    /// How layers attend, each way with the share of layers that do.
    attention: Vec<(LayerAttention, f64)>,
    cuts: Interned<Cut, CutCosts>,
    experts: Interned<ExpertKey, Curve>,
    fullest: Interned<FullestKey, Curve>,
    groups: Interned<GroupKey, GroupCosts>,
    exchanges: Interned<ExchangeKey, ExchangeCosts>,
    hidden: [Curve; 2],
    dags: Interned<Structure, Dag>,
    times: Vec<(f64, f64)>,
    params: Option<(f64, f64)>,
}

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
            prices: Prices::new(costs),
            network,
            load,
            attention: attend::ways(model),
            cuts: Interned::default(),
            experts: Interned::default(),
            fullest: Interned::default(),
            groups: Interned::default(),
            exchanges: Interned::default(),
            hidden: Default::default(),
            dags: Interned::default(),
            times: Vec::new(),
            params: None,
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

    /// Prices an iteration of a layout that is found already.
    pub fn price_resolved(&mut self, resolved: &Resolved, batch: &Batch) -> Iteration {
        self.price_straggling(resolved, batch, 0.0)
    }

    /// Seconds of attention in one layer of one rank: what groups with other batches differ in.
    pub fn attention_s(&mut self, resolved: &Resolved, batch: &Batch) -> f64 {
        let (around, core): (f64, f64) =
            (self.part(resolved.cut, Part::Attention, batch.rows()), self.core(resolved.cut, batch));
        around + core
    }

    /// The price when the fullest rank is fuller than in the mean by so many standard deviations of the mean over the layers.
    pub fn price_straggling(&mut self, resolved: &Resolved, batch: &Batch, deviations: f64) -> Iteration {
        let (layer, micro_batches) = self.micro_batch::<Cost>(resolved, batch, deviations);
        let (seconds, computing) = self.all_layers(resolved, &layer, micro_batches);
        layer.iteration(resolved, seconds, computing, micro_batches)
    }

    /// The seconds of [`price_resolved`](Self::price_resolved), and nothing else: what a search compares plans by.
    pub fn seconds(&mut self, resolved: &Resolved, batch: &Batch) -> f64 {
        let (layer, micro_batches) = self.micro_batch::<f64>(resolved, batch, 0.0);
        self.all_layers(resolved, &layer, micro_batches).0
    }

    /// A layer of one of the micro-batches that a step is cut into, and how many they are.
    fn micro_batch<S: Spent>(&mut self, resolved: &Resolved, batch: &Batch, deviations: f64) -> (Layer<S>, usize) {
        let micro_batches = (resolved.layout.micro_batches as f64).min(batch.rows().floor()).max(1.0);
        let part = batch.part(micro_batches);
        let layer = self.layer(resolved, &part, deviations / (resolved.moe.max(1) as f64).sqrt());
        (layer, micro_batches as usize)
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

    /// Parameters of the model: those that one token meets, and all.
    pub fn params(&mut self) -> (f64, f64) {
        *self.params.get_or_insert_with(|| {
            let counts = self.model.counts();
            (counts.params_active as f64, counts.params_total as f64)
        })
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

    /// Whose kernels are priced.
    pub fn stack(&self) -> Stack {
        self.prices.stack()
    }

    /// Prices of communication.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Types of weights and cache.
    pub fn formats(&self) -> Formats {
        self.formats
    }

    /// Seconds of all layers and micro-batches, and of the compute lane of a rank with attention. Stages of a pipeline take
    /// turns with the micro-batches: a batch comes round when all stages have had it, and the slowest stage all micro-batches.
    fn all_layers<S>(&mut self, resolved: &Resolved, layer: &Layer<S>, micro_batches: usize) -> (f64, f64) {
        match resolved.layout.pp {
            1 => self.whole(resolved, &layer.durations, micro_batches),
            pp => {
                let (seconds, computing) = self.whole(resolved, &layer.durations, 1);
                let stage = seconds + layer.durations[Slot::Hidden];
                (micro_batches.max(pp) as f64 * stage, computing * micro_batches as f64)
            }
        }
    }

    /// The same on one stage, where micro-batches may overlap.
    fn whole(&mut self, resolved: &Resolved, durations: &Durations, micro_batches: usize) -> (f64, f64) {
        let (dense, moe) = (resolved.dense, resolved.moe);
        let [few_dag, fewer_dag, two_dag] = resolved.dags[micro_batches - 1];
        let mut walk = |dag: usize| self.dags.values[dag].walk(durations, &mut self.times);
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

    /// An iteration of the layout's family if computing and exchange hid each other completely: no member is faster, in however
    /// many micro-batches it goes.
    pub fn ideal(&mut self, resolved: &Resolved, batch: &Batch) -> Iteration {
        let most = (MAX_MICRO_BATCHES as f64).min(batch.rows().floor()).max(1.0) as usize;
        let turns = |micro_batches: usize| micro_batches.max(resolved.layout.pp) as f64;
        // Small parts may go by faster kernels, so that any number may be the best.
        let times = (1..=most).map(|parts| turns(parts) * self.ideal_part(resolved, &batch.part(parts as f64)));
        Iteration { seconds: times.fold(f64::INFINITY, f64::min), ..Iteration::default() }
    }

    /// Seconds of one micro-batch on the lane that has most to do.
    fn ideal_part(&mut self, resolved: &Resolved, batch: &Batch) -> f64 {
        let layer: Layer<f64> = self.layer(resolved, batch, 0.0);
        let pool = matches!(resolved.layout.experts, ExpertLayout::Pool { .. });
        let mut lanes = [0.0; 3];
        for slot in Slot::ALL {
            let lane = match slot {
                Slot::Experts if pool => 1,
                _ if slot.is_exchange() => 2,
                _ => 0,
            };
            lanes[lane] += slot.times(resolved.dense, resolved.moe) * layer.durations[slot];
        }
        lanes.into_iter().fold(0.0, f64::max)
    }
}
