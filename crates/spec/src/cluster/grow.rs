//! The same cluster with another number of nodes.

use super::Cluster;
use super::file::{GPUS, NODES};
use crate::SpecError;

impl Cluster {
    /// The same cluster with as many whole nodes as `num_gpus` GPUs need, so it may have some GPUs more. It is this cluster,
    /// unchanged, where that is the number of nodes it has.
    ///
    /// # Errors
    /// Those of [`Cluster::with_nodes`]; and `num_gpus` is 0.
    pub fn with_gpus(&self, num_gpus: usize) -> Result<Cluster, SpecError> {
        if !(1..=GPUS).contains(&num_gpus) {
            return Err(self.cannot_grow(format!("{num_gpus} GPUs"), format!("from 1 to {GPUS}")));
        }
        self.with_nodes(num_gpus.div_ceil(self.gpus_per_node))
    }

    /// The same cluster with `nodes` nodes, named after their number: `dgx-h100-x12`. With another number than it has, its
    /// `rank_map` is the identity, because the given one says nothing about other GPUs.
    ///
    /// # Errors
    /// [`SpecError::Grow`]: more than one node where no link between nodes is known, or more GPUs than a cluster may have.
    pub fn with_nodes(&self, nodes: usize) -> Result<Cluster, SpecError> {
        if nodes == self.nodes {
            return Ok(self.clone());
        }
        let got = || format!("{nodes} nodes of {} GPUs", self.gpus_per_node);
        if !NODES.contains(&nodes) || nodes * self.gpus_per_node > GPUS {
            let expected = format!("from 1 to {} nodes and at most {GPUS} GPUs in all", NODES.end());
            return Err(self.cannot_grow(got(), expected));
        }
        if nodes > 1 && self.inter_node.is_none() {
            let expected = "an `inter_node`, the link between nodes, to have more than one".to_owned();
            return Err(self.cannot_grow(got(), expected));
        }
        let (base, _) = split_nodes(&self.name);
        Ok(Cluster { name: format!("{base}-x{nodes}"), nodes, rank_map: Vec::new(), ..self.clone() })
    }

    fn cannot_grow(&self, got: String, expected: String) -> SpecError {
        SpecError::Grow { cluster: self.name.clone(), got, expected }
    }
}

/// A cluster's name without the number of nodes behind it, and that number: `dgx-h100-x12` is `dgx-h100` and 12.
pub(crate) fn split_nodes(name: &str) -> (&str, Option<usize>) {
    let split = name.rsplit_once("-x").and_then(|(base, nodes)| Some((base, nodes.parse().ok()?)));
    split.map_or((name, None), |(base, nodes)| (base, Some(nodes)))
}
