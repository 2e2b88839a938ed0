//! The cluster: GPUs, nodes and links.

mod file;

use crate::{Bytes, DType};

/// GPUs of one kind in nodes of one size.
#[derive(Clone, Debug, PartialEq)]
pub struct Cluster {
    /// Its name.
    pub name: String,
    /// Nodes.
    pub nodes: usize,
    /// GPUs of a node.
    pub gpus_per_node: usize,
    /// Every GPU.
    pub gpu: Gpu,
    /// Between two GPUs of a node.
    pub intra_node: Link,
    /// Between two nodes; a cluster of one node has none.
    pub inter_node: Option<Link>,
    /// Which GPU of the cluster (`node * gpus_per_node + place`) each rank of a plan runs on; the identity when empty.
    pub rank_map: Vec<usize>,
}

/// One GPU (or, on a laptop, one share of the CPU).
#[derive(Clone, Debug, PartialEq)]
pub struct Gpu {
    /// Its name.
    pub name: String,
    /// Memory that a rank may use.
    pub memory: Bytes,
    /// Dense peak, FLOP/s, in the order BF16, F8, F32. Weights' type decides which.
    pub peak_flops: PeakFlops,
    /// Share of the peak that large products reach (MFU).
    pub compute_utilization: f64,
    /// Memory bandwidth, bytes/s.
    pub memory_bandwidth: f64,
    /// Share of it that streaming reaches.
    pub memory_utilization: f64,
    /// Time that starting one op costs, seconds.
    pub launch_s: f64,
}

/// FLOP/s by the type of the weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PeakFlops {
    /// BF16 and F16.
    pub bf16: f64,
    /// F8 E4M3; that of BF16 where the GPU has no faster one.
    pub f8: f64,
    /// F32 (TF32 is not used).
    pub f32: f64,
}

/// A class of links.
#[derive(Clone, Debug, PartialEq)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// Bytes/s that one GPU can send (and at the same time receive) over it.
    pub bandwidth_per_gpu: f64,
    /// Bytes/s that all GPUs of a node can send together over it.
    pub bandwidth_per_node: f64,
    /// Share of the bandwidth that large messages reach.
    pub utilization: f64,
    /// Time from sending to arrival of an empty message, seconds.
    pub latency_s: f64,
}

/// Where a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkClass {
    /// Inside a node.
    IntraNode,
    /// Between nodes.
    InterNode,
}

impl Cluster {
    /// GPUs in all.
    pub fn num_gpus(&self) -> usize {
        self.nodes * self.gpus_per_node
    }

    /// The node of a plan's rank.
    pub fn node_of(&self, rank: usize) -> usize {
        self.rank_map.get(rank).copied().unwrap_or(rank) / self.gpus_per_node
    }

    /// The class of links between two ranks.
    pub fn link_class(&self, a: usize, b: usize) -> LinkClass {
        if self.node_of(a) == self.node_of(b) { LinkClass::IntraNode } else { LinkClass::InterNode }
    }

    /// The links of a class; inside one node's cluster that is always the inner one.
    pub fn link(&self, class: LinkClass) -> &Link {
        match (class, &self.inter_node) {
            (LinkClass::InterNode, Some(link)) => link,
            _ => &self.intra_node,
        }
    }
}

impl Gpu {
    /// Peak for weights of a type.
    pub fn peak(&self, dtype: DType) -> f64 {
        match dtype {
            DType::F8E4M3 => self.peak_flops.f8,
            DType::F32 => self.peak_flops.f32,
            _ => self.peak_flops.bf16,
        }
    }
}
