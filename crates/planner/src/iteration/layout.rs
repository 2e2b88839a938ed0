//! How a model is spread, in the numbers that a price depends on.

use moesaic_plan::plan::{ExchangePrecision, ExchangeRoute, Overlap, Pool};
use moesaic_plan::{AllReduce, PlanFile};
use moesaic_spec::{Cluster, ModelSpec};

use super::dag::Structure;
use super::parts::Cut;

/// Where the routed experts are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExpertLayout {
    /// Each is cut by the ranks that share the heads.
    Cut,
    /// Whole experts on the ranks that share the heads: each sums those that it has, for rows that all of them have. Other
    /// programs serve like this; our plans send rows instead.
    Summed {
        /// Ranks that whole experts are spread over; each expert is cut by `tp / ep`.
        ep: usize,
    },
    /// Whole experts on all ranks; rows travel.
    Placed {
        /// Ranks.
        ep: usize,
    },
    /// Whole experts on ranks of their own; rows travel.
    Pool {
        /// Ranks.
        ep: usize,
    },
}

impl ExpertLayout {
    /// Whether rows travel to experts.
    pub fn exchanges(self) -> bool {
        matches!(self, ExpertLayout::Placed { .. } | ExpertLayout::Pool { .. })
    }
}

/// How a model is spread.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// Ranks that share heads.
    pub tp: usize,
    /// Pipeline stages.
    pub pp: usize,
    /// Data-parallel groups of a stage.
    pub dp: usize,
    /// Query heads of each rank of a group; even when absent.
    pub heads: Option<Vec<usize>>,
    /// Routed experts.
    pub experts: ExpertLayout,
    /// Physical experts beyond the logical ones, in a layer.
    pub redundant_experts: usize,
    /// Experts are placed by their loads.
    pub balanced: bool,
    /// Decoder layers of each stage; even when absent.
    pub stage_layers: Option<Vec<usize>>,
    /// Times that attention's weights are held.
    pub attention_replicas: usize,
    /// Parts of a step.
    pub micro_batches: usize,
    /// What may run at the same time.
    pub overlap: Overlap,
    /// Type of rows on their way.
    pub precision: ExchangePrecision,
    /// Whether tokens go once to each node.
    pub two_level: bool,
    /// How partial results are summed; the fastest when absent.
    pub all_reduce: Option<AllReduce>,
    /// GPUs of a node.
    pub gpus_per_node: usize,
}

impl Layout {
    /// One rank with all of the model.
    pub fn single(gpus_per_node: usize) -> Layout {
        Layout {
            tp: 1,
            pp: 1,
            dp: 1,
            heads: None,
            experts: ExpertLayout::Cut,
            redundant_experts: 0,
            balanced: false,
            stage_layers: None,
            attention_replicas: 1,
            micro_batches: 1,
            overlap: Overlap::MicroBatches,
            precision: ExchangePrecision::Full,
            two_level: false,
            all_reduce: None,
            gpus_per_node,
        }
    }

    /// What a plan file says.
    pub fn of(file: &PlanFile, cluster: &Cluster) -> Layout {
        let ep = file.mesh.ep;
        let experts = match (file.places_experts(), file.moe.pool) {
            (false, _) => ExpertLayout::Cut,
            (true, Pool::Shared) => ExpertLayout::Placed { ep },
            (true, Pool::Separate) => ExpertLayout::Pool { ep },
        };
        Layout {
            tp: file.mesh.tp,
            pp: file.mesh.pp,
            dp: file.mesh.dp,
            heads: file.attention.heads.clone(),
            experts,
            redundant_experts: file.moe.redundant_experts,
            balanced: file.balance.is_some(),
            stage_layers: file.stage_layers.clone(),
            attention_replicas: file.attention.replication.unwrap_or(1),
            micro_batches: file.micro_batches,
            overlap: file.overlap,
            precision: file.exchange.precision,
            two_level: file.exchange.route == ExchangeRoute::TwoLevel,
            all_reduce: file.all_reduce,
            gpus_per_node: cluster.gpus_per_node,
        }
    }

    /// Ranks in all.
    pub fn ranks(&self) -> usize {
        let pool = match self.experts {
            ExpertLayout::Pool { ep } => ep,
            _ => 0,
        };
        self.pp * (self.tp * self.dp + pool)
    }

    /// How the parts of a rank are cut.
    pub fn cut(&self) -> Cut {
        Cut { tp: self.tp, heads: self.heads.clone(), placed: self.experts.exchanges() }
    }

    /// Ranks that the experts of one layer are spread over.
    pub fn expert_ranks(&self) -> usize {
        match self.experts {
            ExpertLayout::Cut => 1,
            ExpertLayout::Summed { ep } | ExpertLayout::Placed { ep } | ExpertLayout::Pool { ep } => ep,
        }
    }

    /// Parts that each expert's hidden width is cut into.
    pub fn expert_cut(&self) -> usize {
        match self.experts {
            ExpertLayout::Cut => self.tp,
            ExpertLayout::Summed { ep } => self.tp / ep,
            _ => 1,
        }
    }

    /// MoE and dense layers of each stage.
    pub fn stages(&self, model: &ModelSpec) -> Vec<(usize, usize)> {
        let num_layers = model.layers.len();
        let even =
            || (0..self.pp).map(|stage| num_layers / self.pp + usize::from(stage < num_layers % self.pp)).collect();
        let counts: Vec<usize> = self.stage_layers.clone().unwrap_or_else(even);
        let mut first = 0;
        let stage = |count: &usize| {
            let layers = &model.layers[first..first + count];
            first += count;
            let moe = layers.iter().filter(|ffn| ffn.as_moe().is_some()).count();
            (moe, count - moe)
        };
        counts.iter().map(stage).collect()
    }

    /// Dense and MoE layers of the stage that has most MoE layers (and most layers among those): the one that others wait for.
    pub fn fullest_stage(&self, model: &ModelSpec) -> (usize, usize) {
        let (moe, dense) = self.stages(model).into_iter().max().unwrap_or_default();
        (dense, moe)
    }

    /// The graph of its steps, with so many micro-batches and layers.
    pub(crate) fn structure(&self, micro_batches: usize, dense: usize, moe: usize) -> Structure {
        let exchanging = match self.experts {
            ExpertLayout::Pool { ep } => self.tp * self.dp + ep,
            _ => self.tp * self.dp,
        };
        Structure {
            tp: self.tp > 1,
            placed: self.experts.exchanges(),
            separate: matches!(self.experts, ExpertLayout::Pool { .. }),
            nodes: exchanging > self.gpus_per_node,
            two_level: self.two_level,
            overlap: self.overlap,
            micro_batches,
            dense,
            moe,
        }
    }
}
