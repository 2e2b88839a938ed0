//! The cluster: GPUs, nodes and links.

mod file;
mod grow;

use crate::Gpu;
pub(crate) use grow::split_nodes;

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
    /// Between two nodes. A cluster of one node may have none; then it cannot grow.
    pub inter_node: Option<Link>,
    /// Which GPU of the cluster (`node * gpus_per_node + place`) each rank of a plan runs on; the identity when empty.
    pub rank_map: Vec<usize>,
    /// What is needed beside the GPUs' own power to tell energy and CO2.
    pub energy: Energy,
}

/// Energy beside the GPUs, and what it emits. The defaults are stated in [`Energy::default`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Energy {
    /// Power usage effectiveness: energy of the whole data centre for each joule that its computers take.
    pub pue: f64,
    /// Processors, memory, adapters, switches and fans of a node, in watts for each of its GPUs.
    pub host_w_per_gpu: f64,
    /// Joules that a byte takes to cross a link.
    pub link_j_per_byte: f64,
    /// Grams of CO2 for each kilowatt-hour.
    pub co2_g_per_kwh: f64,
}

impl Default for Energy {
    /// `pue` 1.2: assumption, between the 1.1 of the largest operators and the 1.56 that the Uptime Institute's survey of
    /// 2024 has as the average. `host_w_per_gpu` 400: assumption, 70 % of what a DGX H100 may take beside its GPUs
    /// (10.2 kW less 8 × 700 W). `link_j_per_byte` 1e-10: assumption, 12.5 pJ a bit, between NVLink's 5 and a pair of
    /// optical transceivers' 20 to 30. `co2_g_per_kwh` 445: the world's electricity in 2024 (IEA, Electricity 2025).
    fn default() -> Energy {
        Energy { pue: 1.2, host_w_per_gpu: 400.0, link_j_per_byte: 1e-10, co2_g_per_kwh: 445.0 }
    }
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
