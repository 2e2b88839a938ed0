//! Everything that is said of a plan before it runs, each figure with its interval.

use std::sync::Arc;

use moesaic_plan::Collective;
use moesaic_spec::{Bytes, Cluster, ModelSpec};
use serde::{Deserialize, Serialize};

use crate::PlannerError;
use crate::cost::{CostModel, Source, Stack};
use crate::energy::{self, Energy};
use crate::estimate::Estimate;
use crate::iteration::{Formats, Iteration, Iterations, Layout};
use crate::load::ExpertLoad;
use crate::memory::{DEFAULT_UTILIZATION, Footprint, Memory};
use crate::network::{Library, Network};
use crate::serving::{self, Requests, Serving};
use crate::system::{Seen, System};
use crate::tables::OwnTables;

/// By whose measurements ops and links are priced.
#[derive(Clone, Debug)]
pub enum Pricing {
    /// Published ones of a stack's kernels.
    Published(Stack),
    /// A machine's own of our engine.
    Own(OwnTables),
}

impl From<Stack> for Pricing {
    fn from(stack: Stack) -> Pricing {
        Pricing::Published(stack)
    }
}

/// Predicts plans of one model on one cluster.
pub struct Predictor<'a> {
    /// Prices of iterations.
    pub iterations: Iterations<'a>,
    /// Share of a GPU's memory that may be used.
    pub utilization: f64,
    /// Who serves.
    pub system: System,
}

impl<'a> Predictor<'a> {
    /// With the types of the model's own weights. Without `load`, all experts are loaded alike.
    pub fn new(
        model: &'a ModelSpec,
        cluster: &'a Cluster,
        pricing: impl Into<Pricing>,
        load: Option<Arc<ExpertLoad>>,
    ) -> Predictor<'a> {
        let (formats, costs, network, system) = match pricing.into() {
            Pricing::Published(stack) => {
                let network = Network::new(cluster, Library::Custom);
                (Formats::of(model), CostModel::new(&cluster.gpu, stack), network, System::of(stack))
            }
            Pricing::Own(tables) => {
                let (costs, network) = (tables.costs(&cluster.gpu), tables.network(cluster));
                (Formats::of_engine(model), costs, network, System::UNMEASURED)
            }
        };
        let iterations = Iterations::new(model, cluster, formats, costs, network, load);
        Predictor { iterations, utilization: DEFAULT_UTILIZATION, system }
    }
}

impl Predictor<'_> {
    /// What to expect of a layout that serves these requests.
    ///
    /// # Errors
    /// [`PlannerError::DoesNotFit`]: weights, activations and one request are more than a GPU holds; and the model cannot be
    /// spread like this.
    pub fn predict(&mut self, layout: &Layout, requests: &Requests) -> Result<Prediction, PlannerError> {
        Ok(self.predict_serving(layout, requests)?.1)
    }

    /// The same, with the steady state that it follows from.
    ///
    /// # Errors
    /// As of [`Predictor::predict`].
    pub fn predict_serving(
        &mut self,
        layout: &Layout,
        requests: &Requests,
    ) -> Result<(Serving, Prediction), PlannerError> {
        let cluster = self.iterations.cluster();
        let footprint = self.iterations.footprint(layout, requests.step_tokens)?;
        let kv_tokens = self.room(layout, &footprint, requests.input + requests.output)?;
        let serving = serving::aggregated(&mut self.iterations, layout, requests, kv_tokens)?;
        let seen = self.system.seen(&mut self.iterations, layout, requests, kv_tokens, &serving)?;
        let prediction = Prediction::new(&Basis {
            layout,
            cluster,
            formats: self.iterations.formats(),
            requests,
            footprint: &footprint,
            serving: &serving,
            seen: &seen,
        });
        Ok((serving, prediction))
    }

    /// Tokens that the KV cache of a group holds, if at least one request, of so many tokens, fits.
    pub(crate) fn room(&self, layout: &Layout, footprint: &Footprint, longest: f64) -> Result<f64, PlannerError> {
        let gpu = &self.iterations.cluster().gpu;
        let budget = gpu.memory.0 as f64 * self.utilization;
        match footprint.kv_tokens(budget) {
            Some(tokens) if tokens >= longest => Ok(tokens),
            tokens => Err(PlannerError::DoesNotFit {
                gpus: layout.ranks(),
                gpu: gpu.name.clone(),
                budget: Bytes(budget as u64),
                weights: Bytes(footprint.fullest_weights() as u64),
                needed: Bytes(footprint.fullest(longest) as u64),
                kv_tokens: tokens.unwrap_or(0.0) as u64,
                longest: longest as u64,
            }),
        }
    }
}

/// Time of one class of communication, as a share of all time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CommunicationShare {
    /// The class.
    pub class: Collective,
    /// On its way.
    pub total: f64,
    /// While the rank does not compute.
    pub exposed: f64,
}

/// Where the time of a prediction comes from, shares that sum to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sources {
    /// Measured tables.
    pub table: f64,
    /// The roofline.
    pub roofline: f64,
    /// The learned predictor.
    pub predictor: f64,
}

/// What is expected of a plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Prediction {
    /// GPUs.
    pub gpus: usize,
    /// Requests at a time that the figures are for.
    pub concurrency: f64,
    /// Time to first token, seconds.
    pub ttft_s: Estimate,
    /// Time per output token after the first, seconds.
    pub tpot_s: Estimate,
    /// The longest gap between tokens that users see often, seconds.
    pub itl_s: Estimate,
    /// Tokens per second that one user gets: the reciprocal of the time per output token.
    pub tokens_per_s_user: Estimate,
    /// Output tokens per second of all users together.
    pub tokens_per_s: Estimate,
    /// The same for each GPU.
    pub tokens_per_s_gpu: Estimate,
    /// Share of the time in which a rank computes.
    pub gpu_utilization: f64,
    /// Model FLOPs utilization.
    pub mfu: f64,
    /// Memory bandwidth utilization.
    pub mbu: f64,
    /// Memory of a rank with attention.
    pub memory: Memory,
    /// Memory of a rank of an expert pool.
    pub expert_memory: Option<Memory>,
    /// Memory of one GPU, bytes.
    pub gpu_memory: f64,
    /// Communication of a rank with attention.
    pub communication: Vec<CommunicationShare>,
    /// Bytes that a GPU sends, by what its link could send in the time of its communication.
    pub network_efficiency: f64,
    /// Rows of the fullest rank with experts over the mean.
    pub imbalance: f64,
    /// Energy of one output token, joules; absent where the cluster does not say what a GPU draws.
    pub energy_j: Option<Energy>,
    /// Dollars for a million output tokens; absent where the cluster does not say what a GPU costs.
    pub usd_per_million: Option<f64>,
    /// Where the time comes from.
    pub sources: Sources,
}

/// What a prediction is made of.
pub struct Basis<'a> {
    /// How the model is spread.
    pub layout: &'a Layout,
    /// On what.
    pub cluster: &'a Cluster,
    /// In which types.
    pub formats: Formats,
    /// For which requests.
    pub requests: &'a Requests,
    /// Memory.
    pub footprint: &'a Footprint,
    /// Steady state.
    pub serving: &'a Serving,
    /// What users see of it.
    pub seen: &'a Seen,
}

impl Prediction {
    /// Sums up.
    pub fn new(basis: &Basis) -> Prediction {
        let Basis { layout, cluster, serving, requests, footprint, seen, .. } = *basis;
        let gpus = layout.ranks();
        let throughput = seen.throughput(serving, requests);
        let tokens_per_s = Estimate::new(throughput, seen.tpot.sd());
        let (pace, iteration_s) = (seen.pace(serving), serving.iteration_s());
        let seconds = pace * iteration_s;
        // Where a program's steps take longer than its iterations, GPUs wait; where they are shorter, all of it is.
        let shared = pace.max(1.0) * iteration_s;
        let attention_ranks = (layout.pp * layout.tp * layout.dp) as f64;
        let pool_ranks = gpus as f64 - attention_ranks;
        let per_gpu = |of: fn(&crate::iteration::Cost) -> f64| {
            let attention = serving.mean(|iteration| of(&iteration.attention_rank));
            let pool = serving.mean(|iteration| of(&iteration.expert_rank));
            (attention * attention_ranks + pool * pool_ranks) / gpus as f64 / seconds
        };
        let (flops, bytes, sent) = (per_gpu(|cost| cost.flops), per_gpu(|cost| cost.bytes), per_gpu(|cost| cost.sent));
        let peak = basis.formats.experts.peak(&cluster.gpu);
        let per_token_s = gpus as f64 / throughput;
        Prediction {
            gpus,
            concurrency: requests.concurrency,
            ttft_s: seen.ttft,
            tpot_s: seen.tpot,
            itl_s: seen.tpot.times(serving.longest_itl / serving.tpot),
            tokens_per_s_user: seen.tpot.reciprocal(),
            tokens_per_s,
            tokens_per_s_gpu: tokens_per_s.times(1.0 / gpus as f64),
            gpu_utilization: serving.mean(|iteration| iteration.computing) / shared,
            mfu: flops / peak,
            mbu: bytes / cluster.gpu.memory_bandwidth,
            memory: Memory {
                // In the mean: requests that have just begun, and others that are nearly done.
                kv_cache: footprint.kv_bytes_per_token
                    * requests.context()
                    * (serving.running / layout.dp as f64).ceil(),
                ..footprint.attention_rank
            },
            expert_memory: footprint.expert_rank,
            gpu_memory: cluster.gpu.memory.0 as f64,
            communication: communication(serving, shared),
            network_efficiency: network_efficiency(layout, cluster, serving, sent * seconds),
            imbalance: serving.mean(|iteration| iteration.imbalance),
            energy_j: energy::per_token(cluster, energy::Rates { flops, bytes, sent, peak }, per_token_s),
            usd_per_million: cluster.gpu.usd_per_hour.map(|usd| usd / 3600.0 * per_token_s * 1e6),
            sources: sources(serving),
        }
    }
}

/// As shares of so many seconds of a step.
fn communication(serving: &Serving, seconds: f64) -> Vec<CommunicationShare> {
    let exposed = serving.mean(Iteration::exposed);
    let all = serving.mean(|iteration| CLASSES.iter().map(|&class| iteration.communication(class)).sum());
    let share = |class: Collective| {
        let total = serving.mean(|iteration| iteration.communication(class));
        // What is exposed is shared out by the time that each class takes.
        let part = if all > 0.0 { (exposed * total / all).min(total) } else { 0.0 };
        CommunicationShare { class, total: total / seconds, exposed: part / seconds }
    };
    CLASSES.iter().map(|&class| share(class)).filter(|share| share.total > 0.0).collect()
}

const CLASSES: [Collective; 4] =
    [Collective::AllReduce, Collective::AllToAll, Collective::SendReceive, Collective::AllGather];

/// `sent` is bytes of an iteration.
fn network_efficiency(layout: &Layout, cluster: &Cluster, serving: &Serving, sent: f64) -> f64 {
    let busy = serving.mean(|iteration| CLASSES.iter().map(|&class| iteration.communication(class)).sum());
    let class = if layout.ranks() > cluster.gpus_per_node {
        moesaic_spec::LinkClass::InterNode
    } else {
        moesaic_spec::LinkClass::IntraNode
    };
    let possible = cluster.link(class).bandwidth_per_gpu * busy;
    if possible > 0.0 { (sent / possible).min(1.0) } else { 0.0 }
}

fn sources(serving: &Serving) -> Sources {
    let of = |idx: usize| {
        serving.mean(|iteration| iteration.attention_rank.by_source[idx] + iteration.expert_rank.by_source[idx])
    };
    let all = of(0) + of(1) + of(2);
    let share = |idx: usize| of(idx) / all;
    Sources {
        table: share(Source::Table as usize),
        roofline: share(Source::Roofline as usize),
        predictor: share(Source::Predictor as usize),
    }
}
