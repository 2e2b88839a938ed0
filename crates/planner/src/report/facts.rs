//! What was compared on what, in a few facts.

use moesaic_spec::{Bytes, Cluster, Ffn, ModelSpec, TokenRange, Workload};
use serde::{Deserialize, Serialize};

use super::format;

/// The model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelFacts {
    /// Its name.
    pub name: String,
    /// Parameters.
    pub params_total: u64,
    /// Parameters that one token meets.
    pub params_active: u64,
    /// Decoder layers.
    pub layers: usize,
    /// Of them with routed experts.
    pub moe_layers: usize,
    /// Experts of a layer; 0 in a dense model.
    pub experts: usize,
    /// Experts that a token goes to.
    pub top_k: usize,
    /// Type of the weights.
    pub dtype: String,
}

impl ModelFacts {
    /// Of a model.
    pub fn of(name: &str, spec: &ModelSpec) -> ModelFacts {
        let counts = spec.counts();
        let moe = spec.layers.iter().filter_map(|ffn| match ffn {
            Ffn::Moe(moe) => Some(moe),
            Ffn::Dense(_) => None,
        });
        let first = moe.clone().next();
        ModelFacts {
            name: name.to_owned(),
            params_total: counts.params_total,
            params_active: counts.params_active,
            layers: spec.layers.len(),
            moe_layers: moe.count(),
            experts: first.map_or(0, |moe| moe.num_experts),
            top_k: first.map_or(0, |moe| moe.top_k),
            dtype: spec.dtype.to_string(),
        }
    }

    pub(crate) fn line(&self) -> String {
        let [total, active] = [self.params_total, self.params_active].map(|params| format::count(params as f64));
        let experts = match self.experts {
            0 => "dense".to_owned(),
            count => format!("{count} experts in {} of them, {} a token", self.moe_layers, self.top_k),
        };
        format!("{total} parameters ({active} active), {} layers, {experts}, {}", self.layers, self.dtype)
    }
}

/// The cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ClusterFacts {
    /// Its name.
    pub name: String,
    /// Nodes.
    pub nodes: usize,
    /// GPUs of a node.
    pub gpus_per_node: usize,
    /// Name of the GPU.
    pub gpu: String,
    /// Memory of a GPU, bytes.
    pub gpu_memory: u64,
    /// Memory bandwidth and the share of it that is reached, bytes/s.
    pub memory_bandwidth: (f64, f64),
    /// Links: name, bytes/s of a GPU, share of it that is reached, latency in seconds.
    pub links: Vec<(String, f64, f64, f64)>,
    /// Share of the peak that products reach.
    pub compute_utilization: f64,
}

impl ClusterFacts {
    /// Of a cluster.
    pub fn of(cluster: &Cluster) -> ClusterFacts {
        let inter_node = cluster.inter_node.as_ref().filter(|_| cluster.nodes > 1);
        let links = std::iter::once(&cluster.intra_node).chain(inter_node);
        ClusterFacts {
            name: cluster.name.clone(),
            nodes: cluster.nodes,
            gpus_per_node: cluster.gpus_per_node,
            gpu: cluster.gpu.name.clone(),
            gpu_memory: cluster.gpu.memory.0,
            memory_bandwidth: (cluster.gpu.memory_bandwidth, cluster.gpu.memory_utilization),
            links: links
                .map(|link| {
                    let bandwidth = link.bandwidth_per_gpu.min(link.bandwidth_per_node);
                    (link.name.clone(), bandwidth, link.utilization, link.latency_s)
                })
                .collect(),
            compute_utilization: cluster.gpu.compute_utilization,
        }
    }

    pub(crate) fn line(&self) -> String {
        let (bandwidth, reached) = self.memory_bandwidth;
        let links = self.links.iter().map(|(name, bandwidth, reached, latency)| {
            let (rate, share) = (format::rate(*bandwidth), format::percent(*reached));
            format!("{name} {rate} at {share} %, {} µs", format::number(1e6 * latency))
        });
        format!(
            "{} nodes of {} × {}, {} each at {} % of peak, {} at {} %; {}",
            self.nodes,
            self.gpus_per_node,
            self.gpu,
            Bytes(self.gpu_memory),
            format::percent(self.compute_utilization),
            format::rate(bandwidth),
            format::percent(reached),
            links.collect::<Vec<_>>().join("; ")
        )
    }
}

/// The workload.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkloadFacts {
    /// Its name.
    pub name: String,
    /// Requests.
    pub num_requests: usize,
    /// Least and most tokens of a prompt.
    pub input_tokens: (usize, usize),
    /// Least and most tokens of an answer.
    pub output_tokens: (usize, usize),
    /// Same seed, same requests.
    pub seed: u64,
}

impl WorkloadFacts {
    /// Of a workload.
    pub fn of(workload: &Workload) -> WorkloadFacts {
        let range = |range: TokenRange| (range.min, range.max);
        WorkloadFacts {
            name: workload.name.clone(),
            num_requests: workload.num_requests,
            input_tokens: range(workload.input_tokens),
            output_tokens: range(workload.output_tokens),
            seed: workload.seed,
        }
    }

    pub(crate) fn line(&self) -> String {
        let tokens = |(min, max): (usize, usize)| if min == max { min.to_string() } else { format!("{min} to {max}") };
        format!(
            "{} requests of {} tokens, answers of {}, all there at the start (seed {})",
            self.num_requests,
            tokens(self.input_tokens),
            tokens(self.output_tokens),
            self.seed
        )
    }
}
