//! What the tests share.
#![allow(dead_code, unreachable_pub, reason = "each test uses some of it")]

use moesaic_plan::{Plan, PlanError, PlanFile, Setting, Strategy};
use moesaic_spec::{Cluster, ModelSpec, cluster_preset, preset, workload_preset};

/// 4 layers, 32 heads, 16 experts, top-2.
pub fn model() -> ModelSpec {
    preset("paper-003-gelu").unwrap().spec().unwrap()
}

/// 16 GPUs in 4 nodes.
pub fn cluster() -> Cluster {
    cluster_preset("a100-4x4").unwrap()
}

/// As many GPUs as a plan may have ranks, 8 in a node.
pub fn huge_cluster() -> Cluster {
    let mut cluster = cluster_preset("h100-paper").unwrap();
    cluster.nodes = 1 << 14;
    cluster
}

/// A strategy on the papers' cluster.
pub fn strategy(strategy: Strategy, model: &ModelSpec, ranks: usize) -> Result<PlanFile, PlanError> {
    let workload = workload_preset("chat-small").unwrap();
    let (model_name, cluster_name, workload_name) = ("m", "a100-4x4", "chat-small");
    PlanFile::preset(strategy, &Setting { model_name, model, cluster_name, workload_name, workload: &workload, ranks })
}

/// Why a file is refused for [`model`] on [`cluster`].
pub fn sentence(file: PlanFile) -> String {
    match Plan::new(file, &model(), &cluster()) {
        Ok(plan) => panic!("taken: {:?}", plan.file),
        Err(e) => e.to_string(),
    }
}
