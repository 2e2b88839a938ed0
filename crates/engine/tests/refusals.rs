//! What does not fit is refused before anything is taken: by the plan where the cluster is too small, and at the launch
//! where this machine is.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use common::plans::{ep, file};
use moesaic_engine::{EngineConfig, Launch, Ranks, launch_plan};
use moesaic_model::checkpoint::{RandomWeights, write_random};
use moesaic_model::{LoadDType, MetaModel, SeqShape};
use moesaic_plan::plan::{MemoryPlan, Mesh};
use moesaic_plan::{Plan, PlanFile};
use moesaic_spec::{Bytes, ModelSpec, cluster_preset, preset, presets};

fn model(name: &str) -> ModelSpec {
    preset(name).unwrap().spec().unwrap()
}

/// The most memory that this process has ever had, bytes.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().trim().parse::<u64>().unwrap() << 10
}

fn short(file: PlanFile) -> PlanFile {
    PlanFile { memory: MemoryPlan { max_model_len: Some(1024), ..MemoryPlan::default() }, ..file }
}

#[test]
fn a_plan_that_its_cluster_cannot_hold_is_refused() {
    let model = model("deepseek-v3");
    let cluster = cluster_preset("a100-4x4").unwrap();
    let error = Plan::new(short(ep(8, &model)), &model, &cluster).err().unwrap().to_string();
    // 32 experts of each of 58 layers on a rank, 44 MB each.
    assert!(error.starts_with("rank 0 needs "), "{error}");
    let end = "which more ranks with experts (ep), more stages (pp) or, where experts are cut, a larger tp would make smaller";
    assert!(error.contains("only 72.00 GiB of its 80.00 GiB may be used") && error.ends_with(end), "{error}");
}

/// 68 GB of weights, of which none is made: that would take minutes.
#[test]
fn a_plan_that_this_machine_cannot_hold_is_refused_before_anything_is_taken() {
    let model = model("paper-001");
    let cluster = cluster_preset("dgx-h100-x2").unwrap();
    let config = EngineConfig {
        max_model_len: Some(1024),
        max_num_seqs: 2,
        max_num_batched_tokens: 64,
        num_threads: Some(1),
        memory_limit: Some(Bytes(8 << 30)),
        ..EngineConfig::default()
    };
    let weights = Launch::Random(RandomWeights { seed: 0 });
    let tp_pp = short(file(Mesh { tp: 8, pp: 2, dp: 1, ep: 1 }, 16));
    for file in [short(ep(16, &model)), tp_pp] {
        let plan = Arc::new(Plan::new(file, &model, &cluster).unwrap());
        let never = |_, _: &std::path::Path| panic!("no process is started");
        for ranks in [Ranks::Threads, Ranks::Processes(&never)] {
            let (start, before) = (Instant::now(), peak_memory());
            let error = launch_plan(&model, &weights, &plan, &config, ranks, |_| panic!("nothing is loaded"));
            let error = error.err().unwrap().to_string();
            assert!(error.starts_with("cannot fit: weights ") && error.contains(" + messages "), "{error}");
            assert!(error.contains("but only 8.00 GiB may be used; any of these would fix it: "), "{error}");
            assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
            // The system counts in batches, so the peak may even seem to fall.
            let taken = peak_memory().saturating_sub(before);
            assert!(taken < 200 << 20, "{} MiB were taken", taken >> 20);
        }
    }
}

/// Its forward pass can be traced in the closest shape that we have, but nothing makes or loads its weights.
#[test]
fn a_model_that_can_only_be_planned_is_traced_and_not_run() {
    let weights = RandomWeights { seed: 0 };
    let folder = std::env::temp_dir().join(format!("moesaic-planned-{}", std::process::id()));
    for preset in presets() {
        let spec = preset.spec().unwrap();
        let Err(refusal) = spec.require_runnable() else { continue };
        let meta = MetaModel::new(&spec, LoadDType::Auto, 4096).unwrap();
        let seq = SeqShape { num_tokens: 1, context_len: 1000, samples: true };
        assert!(meta.trace(&[seq; 4], 16, false).unwrap().calls.len() > 5 * spec.layers.len(), "{}", preset.name);

        let plan = Arc::new(Plan::single(&spec));
        let started = Instant::now();
        let (random, config) = (Launch::Random(weights), EngineConfig::default());
        let launched = launch_plan(&spec, &random, &plan, &config, Ranks::Threads, |_| panic!("nothing is loaded"));
        assert_eq!(launched.err().unwrap().to_string(), refusal.to_string());
        assert!(started.elapsed() < Duration::from_secs(1));
        let written = write_random(&folder, &spec, weights, 1 << 30, |_| panic!("nothing is written"));
        assert_eq!(written.unwrap_err().to_string(), refusal.to_string());
        assert!(!folder.exists());
    }
}
