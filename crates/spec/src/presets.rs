//! Clusters and workloads by name; where each figure comes from is in the files themselves.

use crate::fields::shorten;
use crate::nearest::nearest;
use crate::{Cluster, SpecError, Workload};

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

const CLUSTERS: &[PresetFile] = files![
    "clusters": "a100-4x4", "h100-paper", "dgx-h100", "dgx-h100-x2", "hgx-h200", "h200-x2-nv18", "gb200-nvl72", "laptop"
];

const WORKLOADS: &[PresetFile] = files!["workloads": "chat-small", "prefill", "decode", "paper-001", "paper-003"];

/// All clusters.
pub fn clusters() -> &'static [PresetFile] {
    CLUSTERS
}

/// All workloads.
pub fn workloads() -> &'static [PresetFile] {
    WORKLOADS
}

/// The cluster of this name; case does not matter.
///
/// # Errors
/// [`SpecError::UnknownName`] with the name that is spelled most alike.
pub fn cluster_preset(name: &str) -> Result<Cluster, SpecError> {
    let file = find("cluster", CLUSTERS, name)?;
    Cluster::from_yaml(file.yaml, &format!("specs/clusters/{}.yaml", file.name))
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
