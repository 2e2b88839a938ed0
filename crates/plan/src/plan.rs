//! A plan: settings as they stand in the file, and what follows from them for one model on one cluster.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::{AllReduce, ExpertId, Placement, Rank, RankShard};

/// What the plan file says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanFile {
    /// Version of the format; 1.
    pub version: u32,
    /// For people and reports.
    pub name: String,
    /// A preset, a folder, or `tiny-moe` for the model inside the binary.
    pub model: String,
    /// A preset or a file.
    pub cluster: String,
    /// A preset or a file.
    pub workload: String,
    /// World size; must equal what mesh and pools give.
    pub ranks: usize,
    /// Ways of spreading.
    pub mesh: Mesh,
    /// Decoder layers of each pipeline stage; even when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage_layers: Option<Vec<usize>>,
    /// Everything but routed experts.
    #[serde(default)]
    pub attention: AttentionPlan,
    /// Routed experts.
    #[serde(default)]
    pub moe: MoePlan,
    /// Parts that a step's requests are split into, 1 to 4.
    #[serde(default = "one")]
    pub micro_batches: usize,
    /// What may run at the same time.
    #[serde(default)]
    pub overlap: Overlap,
    /// Tokens to experts and back.
    #[serde(default)]
    pub exchange: Exchange,
    /// How partial results are summed; by topology when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub all_reduce: Option<AllReduce>,
    /// When experts move; never when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance: Option<Balance>,
    /// When micro-batches are chosen anew; never when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub synchronize: Option<Synchronize>,
    /// Limits of one rank's memory.
    #[serde(default)]
    pub memory: MemoryPlan,
    /// What whoever made the plan expects of it; nothing that runs looks at it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Prediction>,
}

fn one() -> usize {
    1
}

impl PlanFile {
    /// A mesh of so many ranks, everything else as in a file that says nothing of it.
    pub fn new(name: &str, mesh: Mesh, ranks: usize) -> PlanFile {
        PlanFile {
            version: 1,
            name: name.to_owned(),
            model: String::new(),
            cluster: String::new(),
            workload: String::new(),
            ranks,
            mesh,
            stage_layers: None,
            attention: AttentionPlan::default(),
            moe: MoePlan::default(),
            micro_batches: 1,
            overlap: Overlap::default(),
            exchange: Exchange::default(),
            all_reduce: None,
            balance: None,
            synchronize: None,
            memory: MemoryPlan::default(),
            prediction: None,
        }
    }
}

/// World size is `pp * tp * dp`, and with an expert pool of its own `pp * (tp * dp + ep)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mesh {
    /// Tensor parallelism: ranks that share the heads of attention (and, with `ep: 1`, the width of every expert).
    #[serde(default = "one")]
    pub tp: usize,
    /// Pipeline stages.
    #[serde(default = "one")]
    pub pp: usize,
    /// Data parallelism: groups of `tp` ranks, in each stage, that have requests of their own.
    #[serde(default = "one")]
    pub dp: usize,
    /// Expert parallelism: ranks, in each stage, that whole experts are spread over; with 1 experts are cut by `tp`.
    #[serde(default = "one")]
    pub ep: usize,
}

/// Everything but routed experts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AttentionPlan {
    /// Query heads of each of the `tp` ranks; even when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heads: Option<Vec<usize>>,
    /// Times that attention's weights are held, on neighbouring ranks; 1 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replication: Option<usize>,
}

/// Routed experts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MoePlan {
    /// Where the `ep` ranks of a stage are.
    pub pool: Pool,
    /// Experts of one layer that a rank may hold; 1 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_experts_per_rank: Option<usize>,
    /// Physical experts of a layer beyond the logical ones, for replicas.
    pub redundant_experts: usize,
    /// Where experts live at the start.
    pub placement: InitialPlacement,
}

/// Where the ranks with experts are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pool {
    /// The ranks of attention have the experts, too.
    #[default]
    Shared,
    /// Ranks of their own, after those of attention.
    Separate,
}

/// Where experts live at the start.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InitialPlacement {
    /// In order.
    #[default]
    Linear,
    /// By the loads and co-activations of a routing trace (a file that `compare` or `generate` wrote).
    Trace(String),
    /// As given: for each layer the ranks of each expert. A layer that is not there is placed in order.
    Explicit(Vec<ExplicitLayer>),
}

/// Where the experts of one layer live.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExplicitLayer {
    /// Decoder layer.
    pub layer: usize,
    /// By expert: its ranks.
    pub experts: Vec<Vec<Rank>>,
}

/// What may run at the same time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlap {
    /// Nothing: each action waits for the one before it.
    None,
    /// Micro-batches: one is exchanged while another is computed.
    #[default]
    MicroBatches,
    /// That, and experts begin with the tokens of their own node before those of other nodes are there.
    Arrivals,
}

/// Tokens to experts and back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Exchange {
    /// Type of the values on the way, in both directions.
    pub precision: ExchangePrecision,
    /// How tokens reach experts of other nodes.
    pub route: ExchangeRoute,
}

/// Type of the values on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExchangePrecision {
    /// As computed (BF16 or F32): exact.
    #[default]
    Full,
    /// 8-bit integers, one factor for 128 values.
    Int8,
    /// 8-bit floats (E4M3), one factor for 128 values.
    Fp8,
}

/// How tokens reach experts of other nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExchangeRoute {
    /// To each rank directly.
    #[default]
    Direct,
    /// Once to each node, and on from there.
    TwoLevel,
}

/// When experts move.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balance {
    /// Steps between looks at the load.
    pub interval: u64,
    /// Least gain in max/mean load (0.05 is 5 %) that is worth a move.
    pub threshold: f64,
    /// Greatest probability of moving because of noise.
    pub significance: f64,
    /// Bytes of weights that a rank sends in one step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_step: Option<u64>,
}

/// When micro-batches are chosen anew.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Synchronize {
    /// Steps between choices.
    pub interval: u64,
    /// Difference between the pools' times (0.05 is 5 %) that is left alone.
    pub threshold: f64,
}

/// Limits of one rank's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryPlan {
    /// Longest sequence, tokens; the workload's longest when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_model_len: Option<usize>,
    /// Sequences of one data-parallel group that run at a time; as many as the workload has when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_num_seqs: Option<usize>,
    /// Tokens of one data-parallel group in one step.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_num_batched_tokens: Option<usize>,
    /// Share of the GPU's memory that may be used; 0.9 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub utilization: Option<f64>,
}

/// What is expected of a plan, and under which assumptions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prediction {
    /// Requests at a time, over all data-parallel groups.
    pub concurrency: f64,
    /// Time to first token, milliseconds.
    pub ttft_ms: Interval,
    /// Time per output token after the first, milliseconds.
    pub tpot_ms: Interval,
    /// Output tokens per second of all users together.
    pub tokens_per_s: Interval,
    /// Memory of the fullest rank, GiB.
    pub memory_gib: f64,
    /// What else was assumed, a sentence each.
    #[serde(default)]
    pub assumptions: Vec<String>,
}

/// A figure, and between which two it lies nine times out of ten.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interval {
    /// The median.
    pub value: f64,
    /// Less in one of twenty.
    pub low: f64,
    /// More in one of twenty.
    pub high: f64,
}

/// Parts that a step is cut into at most: beyond four, each is too small to keep a GPU busy.
pub const MAX_MICRO_BATCHES: usize = 4;

/// A plan that was found right for one model and one cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// As the file says.
    pub file: PlanFile,
    /// Pipeline stages in order.
    pub stages: Vec<Stage>,
    /// By rank.
    pub shards: Vec<RankShard>,
    /// Where experts live at the start.
    pub placement: Placement,
    /// The node of each rank.
    pub node_of: Vec<usize>,
}

/// One pipeline stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// Its decoder layers.
    pub layers: Range<usize>,
    /// Ranks with attention: `groups[dp][tp]`.
    pub groups: Vec<Vec<Rank>>,
    /// Ranks that whole experts are spread over; empty where experts are cut.
    pub expert_ranks: Vec<Rank>,
}

impl Plan {
    /// World size.
    pub fn world_size(&self) -> usize {
        self.shards.len()
    }

    /// Data-parallel groups.
    pub fn num_groups(&self) -> usize {
        self.file.mesh.dp
    }

    /// The experts that a rank holds at the start, by layer of the whole model.
    pub fn experts_of(&self, rank: Rank) -> Vec<Vec<ExpertId>> {
        let layers = self.placement.layers.iter();
        layers.map(|layer| layer.as_ref().map_or(Vec::new(), |layer| layer.experts_of(rank))).collect()
    }

    /// The same, filled up with others to as many as the rank may come to hold where experts move: what memory is settled for.
    pub fn most_experts_of(&self, rank: Rank) -> Vec<Vec<ExpertId>> {
        let mut experts = self.experts_of(rank);
        if self.file.balance.is_none() {
            return experts;
        }
        for ((held, slots), placed) in experts.iter_mut().zip(self.expert_slots()).zip(&self.placement.layers) {
            let (Some(slots), Some(placed)) = (slots, placed) else { continue };
            let slots = slots.iter().find(|slot| slot.rank == rank).map_or(0, |slot| slot.slots);
            let others: Vec<ExpertId> =
                (0..placed.replicas.len() as u32).map(ExpertId).filter(|expert| !held.contains(expert)).collect();
            held.extend(others.into_iter().take(slots.saturating_sub(held.len())));
            held.sort_unstable();
        }
        experts
    }
}
