//! Any text as a plan, cluster or workload file: one of them or an error. What is understood must be writable and readable
//! again as the same, and a plan must be followed or refused, on the cluster of the same text where it is one.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use moesaic_plan::{Plan, PlanFile, diff, explain};
use moesaic_spec::{Cluster, ModelSpec, Workload};

/// The model and cluster that plans are checked against: 4 layers, 32 heads, 16 experts; 16 GPUs.
static GIVEN: LazyLock<(ModelSpec, Cluster)> = LazyLock::new(|| {
    let model = moesaic_spec::preset("paper-003-gelu").and_then(|preset| preset.spec()).expect("a preset is read");
    (model, moesaic_spec::cluster_preset("a100-4x4").expect("a preset is read"))
});

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (model, cluster) = &*GIVEN;
    if let Ok(cluster) = Cluster::from_yaml(text, "cluster.yaml") {
        let again = Cluster::from_yaml(&cluster.to_yaml(), "written").expect("what we write we read");
        assert_eq!(cluster, again);
    }
    if let Ok(workload) = Workload::from_yaml(text, "workload.yaml") {
        let again = Workload::from_yaml(&workload.to_yaml(), "written").expect("what we write we read");
        assert_eq!(workload, again);
    }
    if let Ok(file) = PlanFile::from_yaml(text, "plan.yaml") {
        let again = PlanFile::from_yaml(&file.to_yaml(), "written").expect("what we write we read");
        assert_eq!(diff(&file, &again), Vec::<String>::new());
        if let Ok(plan) = Plan::new(file, model, cluster) {
            let _ = explain(&plan, model);
        }
    }
});
