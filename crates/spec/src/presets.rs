//! GPUs, clusters and workloads by name; where each figure comes from is in the files themselves.

use crate::cluster::split_nodes;
use crate::fields::shorten;
use crate::nearest::nearest;
use crate::{Cluster, Gpu, SpecError, Workload};

/// A file inside the binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PresetFile {
    /// As in a plan file or on the command line.
    pub name: &'static str,
    /// Its text.
    pub yaml: &'static str,
}

macro_rules! files {
    ($folder:literal: $($name:literal),* $(,)?) => {
        &[$(PresetFile {
            name: $name,
            yaml: include_str!(concat!("../../../specs/", $folder, "/", $name, ".yaml")),
        }),*]
    };
}

const GPUS: &[PresetFile] =
    files!["gpus": "a100-sxm-80gb", "h100-sxm", "h100-paper", "h200-sxm", "h20", "h800", "b200", "gb200"];

const CLUSTERS: &[PresetFile] = files![
    "clusters": "a100-4x4", "h100-paper", "dgx-h100", "hgx-h200", "hgx-h800", "hgx-h20", "hgx-b200", "h200-x2-nv18",
    "gb200-nvl72", "laptop"
];

const WORKLOADS: &[PresetFile] = files![
    "workloads": "chat-small", "prefill", "decode", "paper-001", "paper-003", "chat", "reasoning", "rag", "sharegpt"
];

/// All GPUs.
pub fn gpus() -> &'static [PresetFile] {
    GPUS
}

/// All clusters.
pub fn clusters() -> &'static [PresetFile] {
    CLUSTERS
}

/// All workloads.
pub fn workloads() -> &'static [PresetFile] {
    WORKLOADS
}

/// The GPU of this name; case does not matter.
///
/// # Errors
/// [`SpecError::UnknownName`] with the name that is spelled most alike.
pub fn gpu_preset(name: &str) -> Result<Gpu, SpecError> {
    let file = find("GPU", GPUS, name)?;
    Gpu::from_yaml(file.yaml, &format!("specs/gpus/{}.yaml", file.name))
}

/// The cluster of this name; case does not matter. With `-x` and a number behind it, the same with so many nodes:
/// `dgx-h100-x12`.
///
/// # Errors
/// [`SpecError::UnknownName`] with the name that is spelled most alike; with a number also those of
/// [`Cluster::with_nodes`].
pub fn cluster_preset(name: &str) -> Result<Cluster, SpecError> {
    let read = |file: PresetFile| Cluster::from_yaml(file.yaml, &format!("specs/clusters/{}.yaml", file.name));
    let lower = name.to_ascii_lowercase();
    if let (base, Some(nodes)) = split_nodes(&lower)
        && let Some(file) = CLUSTERS.iter().find(|file| file.name == base)
    {
        return read(*file)?.with_nodes(nodes);
    }
    read(find("cluster", CLUSTERS, name)?)
}

/// The workload of this name; case does not matter.
///
/// # Errors
/// [`SpecError::UnknownName`] with the name that is spelled most alike.
pub fn workload_preset(name: &str) -> Result<Workload, SpecError> {
    let file = find("workload", WORKLOADS, name)?;
    Workload::from_yaml(file.yaml, &format!("specs/workloads/{}.yaml", file.name))
}

fn find(what: &'static str, files: &'static [PresetFile], name: &str) -> Result<PresetFile, SpecError> {
    let lower = name.to_ascii_lowercase();
    files.iter().find(|file| file.name == lower).copied().ok_or_else(|| SpecError::UnknownName {
        what,
        name: format!("{:?}", shorten(name)),
        nearest: nearest(&lower, files.iter().map(|file| file.name)).to_owned(),
        known: files.iter().map(|file| file.name).collect::<Vec<_>>().join(", "),
    })
}
