//! Clusters as YAML files. Keys are the fields' names; quantities are in bytes, seconds and FLOP/s.

use std::fmt::Write;
use std::ops::RangeInclusive;

use serde_json::Value;

use super::{Cluster, Gpu, Link, PeakFlops};
use crate::fields::{Fields, show};
use crate::yaml::{parse_mapping, scalar};
use crate::{Bytes, SpecError};

const NODES: RangeInclusive<usize> = 1..=1 << 16;
const GPUS_PER_NODE: RangeInclusive<usize> = 1..=1 << 12;
/// GPUs of a cluster: some times the largest there is.
const GPUS: usize = 1 << 20;
/// FLOP/s and bytes/s, from a microcontroller's to far beyond any GPU's.
const RATE: RangeInclusive<f64> = 1.0..=1e18;
const SHARE: RangeInclusive<f64> = 0.001..=1.0;
const SECONDS: RangeInclusive<f64> = 0.0..=1.0;

impl Cluster {
    /// Reads a cluster file. `origin` is its path, for messages. Total: any text gives a checked cluster or an error.
    ///
    /// # Errors
    /// [`SpecError`]: not YAML, a key unknown or missing, or a value out of range or at odds with another.
    pub fn from_yaml(text: &str, origin: &str) -> Result<Cluster, SpecError> {
        let map = parse_mapping(text, origin)?;
        let f = Fields::new(origin, "", &map);
        f.only_keys(&["name", "nodes", "gpus_per_node", "gpu", "intra_node", "inter_node", "rank_map"])?;
        let nodes = f.size("nodes", None, NODES)?;
        let gpus_per_node = f.size("gpus_per_node", None, GPUS_PER_NODE)?;
        if nodes * gpus_per_node > GPUS {
            return Err(f.invalid("nodes", nodes, format!("such that there are at most {GPUS} GPUs in all")));
        }
        let inter_node = f.section("inter_node")?.map(|link| read_link(&link)).transpose()?;
        match (nodes, &inter_node) {
            (2.., None) => return Err(f.missing("inter_node", "the link between the nodes")),
            (1, Some(_)) => return Err(f.invalid("inter_node", "there", "absent where there is one node")),
            _ => {}
        }
        let section = |key: &str| f.section(key)?.ok_or_else(|| f.missing(key, "keys of its own, indented below it"));
        Ok(Cluster {
            name: f.required_text("name")?.to_owned(),
            nodes,
            gpus_per_node,
            gpu: read_gpu(&section("gpu")?)?,
            intra_node: read_link(&section("intra_node")?)?,
            inter_node,
            rank_map: read_rank_map(&f, nodes * gpus_per_node)?,
        })
    }

    /// The file that is read back as this cluster.
    pub fn to_yaml(&self) -> String {
        let Cluster { name, nodes, gpus_per_node, gpu, intra_node, inter_node, rank_map } = self;
        let mut text = format!("name: {}\nnodes: {nodes}\ngpus_per_node: {gpus_per_node}\n", scalar(name));
        let PeakFlops { bf16, f8, f32 } = gpu.peak_flops;
        let _ = write!(
            text,
            "gpu:\n  name: {}\n  memory: {}\n  peak_flops: {{bf16: {bf16:e}, f8: {f8:e}, f32: {f32:e}}} # FLOP/s\n  \
             compute_utilization: {}\n  memory_bandwidth: {:e} # bytes/s\n  memory_utilization: {}\n  launch_s: {:e}\n",
            scalar(&gpu.name),
            gpu.memory.0,
            gpu.compute_utilization,
            gpu.memory_bandwidth,
            gpu.memory_utilization,
            gpu.launch_s
        );
        write_link(&mut text, "intra_node", intra_node);
        if let Some(link) = inter_node {
            write_link(&mut text, "inter_node", link);
        }
        if !rank_map.is_empty() {
            let _ = writeln!(text, "rank_map: {rank_map:?}");
        }
        text
    }
}

fn read_gpu(f: &Fields) -> Result<Gpu, SpecError> {
    f.only_keys(&[
        "name",
        "memory",
        "peak_flops",
        "compute_utilization",
        "memory_bandwidth",
        "memory_utilization",
        "launch_s",
    ])?;
    let peak = f.section("peak_flops")?.ok_or_else(|| f.missing("peak_flops", "FLOP/s for bf16, f8 and f32"))?;
    peak.only_keys(&["bf16", "f8", "f32"])?;
    Ok(Gpu {
        name: f.required_text("name")?.to_owned(),
        memory: read_bytes(f, "memory")?,
        peak_flops: PeakFlops {
            bf16: peak.required_number("bf16", RATE)?,
            f8: peak.required_number("f8", RATE)?,
            f32: peak.required_number("f32", RATE)?,
        },
        compute_utilization: f.required_number("compute_utilization", SHARE)?,
        memory_bandwidth: f.required_number("memory_bandwidth", RATE)?,
        memory_utilization: f.required_number("memory_utilization", SHARE)?,
        launch_s: f.required_number("launch_s", SECONDS)?,
    })
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

/// A size with a unit, or bytes.
fn read_bytes(f: &Fields, key: &str) -> Result<Bytes, SpecError> {
    let expected = "a size like 80 GiB";
    let bytes = match f.get(key) {
        None => return Err(f.missing(key, expected)),
        Some(Value::Number(number)) => number.as_u64().map(Bytes).ok_or_else(|| expected.to_owned()),
        Some(Value::String(text)) => text.parse(),
        Some(_) => Err(expected.to_owned()),
    };
    match bytes {
        Ok(Bytes(0)) => Err(f.invalid(key, "0", "more than none")),
        Ok(bytes) => Ok(bytes),
        Err(expected) => Err(f.invalid(key, f.get(key).map_or_else(String::new, show), expected)),
    }
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
