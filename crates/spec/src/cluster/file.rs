//! Clusters as YAML files. Keys are the fields' names; quantities are in bytes, seconds and FLOP/s.

use std::fmt::Write;
use std::ops::RangeInclusive;

use super::{Cluster, Energy, Link};
use crate::SpecError;
use crate::fields::Fields;
use crate::gpu::file::{RATE, SECONDS, SHARE, read_gpu_of};
use crate::yaml::{parse_mapping, scalar};

pub(super) const NODES: RangeInclusive<usize> = 1..=1 << 16;
const GPUS_PER_NODE: RangeInclusive<usize> = 1..=1 << 12;
/// GPUs of a cluster: some times the largest there is.
pub(super) const GPUS: usize = 1 << 20;

impl Cluster {
    /// Reads a cluster file. `origin` is its path, for messages. Total: any text gives a checked cluster or an error.
    ///
    /// # Errors
    /// [`SpecError`]: not YAML, a key unknown or missing, or a value out of range or at odds with another.
    pub fn from_yaml(text: &str, origin: &str) -> Result<Cluster, SpecError> {
        let map = parse_mapping(text, origin)?;
        let f = Fields::new(origin, "", &map);
        f.only_keys(&["name", "nodes", "gpus_per_node", "gpu", "intra_node", "inter_node", "rank_map", "energy"])?;
        let nodes = f.size("nodes", None, NODES)?;
        let gpus_per_node = f.size("gpus_per_node", None, GPUS_PER_NODE)?;
        if nodes * gpus_per_node > GPUS {
            return Err(f.invalid("nodes", nodes, format!("such that there are at most {GPUS} GPUs in all")));
        }
        let inter_node = f.section("inter_node")?.map(|link| read_link(&link)).transpose()?;
        if nodes > 1 && inter_node.is_none() {
            return Err(f.missing("inter_node", "the link between the nodes"));
        }
        let intra_node =
            f.section("intra_node")?.ok_or_else(|| f.missing("intra_node", "keys of its own, indented below it"))?;
        Ok(Cluster {
            name: f.required_text("name")?.to_owned(),
            nodes,
            gpus_per_node,
            gpu: read_gpu_of(&f, "gpu")?,
            intra_node: read_link(&intra_node)?,
            inter_node,
            rank_map: read_rank_map(&f, nodes * gpus_per_node)?,
            energy: f.section("energy")?.map_or(Ok(Energy::default()), |energy| read_energy(&energy))?,
        })
    }

    /// The file that is read back as this cluster.
    pub fn to_yaml(&self) -> String {
        let Cluster { name, nodes, gpus_per_node, gpu, intra_node, inter_node, rank_map, energy } = self;
        let mut text = format!("name: {}\nnodes: {nodes}\ngpus_per_node: {gpus_per_node}\ngpu:\n", scalar(name));
        for line in gpu.to_yaml().lines() {
            let _ = writeln!(text, "  {line}");
        }
        write_link(&mut text, "intra_node", intra_node);
        if let Some(link) = inter_node {
            write_link(&mut text, "inter_node", link);
        }
        if !rank_map.is_empty() {
            let _ = writeln!(text, "rank_map: {rank_map:?}");
        }
        let Energy { pue, host_w_per_gpu, link_j_per_byte, co2_g_per_kwh } = energy;
        let _ = write!(
            text,
            "energy:\n  pue: {pue}\n  host_w_per_gpu: {host_w_per_gpu}\n  link_j_per_byte: {link_j_per_byte:e}\n  \
             co2_g_per_kwh: {co2_g_per_kwh}\n"
        );
        text
    }
}

fn read_link(f: &Fields) -> Result<Link, SpecError> {
    f.only_keys(&["name", "bandwidth_per_gpu", "bandwidth_per_node", "utilization", "latency_s"])?;
    let link = Link {
        name: f.required_text("name")?.to_owned(),
        bandwidth_per_gpu: f.required_number("bandwidth_per_gpu", RATE)?,
        bandwidth_per_node: f.required_number("bandwidth_per_node", RATE)?,
        utilization: f.required_number("utilization", SHARE)?,
        latency_s: f.required_number("latency_s", SECONDS)?,
    };
    if link.bandwidth_per_node < link.bandwidth_per_gpu {
        let least = format!("at least bandwidth_per_gpu ({:e})", link.bandwidth_per_gpu);
        return Err(f.invalid("bandwidth_per_node", format!("{:e}", link.bandwidth_per_node), least));
    }
    Ok(link)
}

fn read_energy(f: &Fields) -> Result<Energy, SpecError> {
    f.only_keys(&["pue", "host_w_per_gpu", "link_j_per_byte", "co2_g_per_kwh"])?;
    let default = Energy::default();
    Ok(Energy {
        pue: f.number("pue", default.pue, 1.0..=10.0)?,
        host_w_per_gpu: f.number("host_w_per_gpu", default.host_w_per_gpu, 0.0..=1e5)?,
        link_j_per_byte: f.number("link_j_per_byte", default.link_j_per_byte, 0.0..=1e-3)?,
        co2_g_per_kwh: f.number("co2_g_per_kwh", default.co2_g_per_kwh, 0.0..=1e4)?,
    })
}

/// Each GPU once, or nothing.
fn read_rank_map(f: &Fields, num_gpus: usize) -> Result<Vec<usize>, SpecError> {
    let Some(map) = f.sizes("rank_map", 0..=num_gpus - 1)? else { return Ok(Vec::new()) };
    if map.len() != num_gpus {
        let expected = format!("a list of all {num_gpus} GPUs, one for each rank, or absent");
        return Err(f.invalid("rank_map", format!("a list of {}", map.len()), expected));
    }
    let mut taken_by = vec![None; num_gpus];
    for (rank, &gpu) in map.iter().enumerate() {
        if let Some(other) = taken_by[gpu].replace(rank) {
            let expected = format!("another GPU, because rank {other} has that one");
            return Err(f.invalid(&format!("rank_map[{rank}]"), gpu, expected));
        }
    }
    Ok(map)
}

fn write_link(text: &mut String, key: &str, link: &Link) {
    let _ = write!(
        text,
        "{key}:\n  name: {}\n  bandwidth_per_gpu: {:e} # bytes/s\n  bandwidth_per_node: {:e}\n  utilization: {}\n  \
         latency_s: {:e}\n",
        scalar(&link.name),
        link.bandwidth_per_gpu,
        link.bandwidth_per_node,
        link.utilization,
        link.latency_s
    );
}
