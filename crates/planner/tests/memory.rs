//! The closed form of a rank's memory is the plan's own account of it.

use moesaic_plan::{Plan, PlanFile, Setting, Strategy};
use moesaic_planner::iteration::parts::Parts;
use moesaic_planner::iteration::{ExpertLayout, Formats, Layout};
use moesaic_planner::memory::Footprint;
use moesaic_spec::Bytes;

#[test]
fn weights_are_those_of_the_plan() {
    let mut cluster = moesaic_spec::cluster_preset("dgx-h100-x2").unwrap();
    cluster.gpu.memory = Bytes(1 << 50);
    let workload = moesaic_spec::workload_preset("decode").unwrap();
    let mut compared = 0;
    for name in ["mixtral-8x7b", "deepseek-v3", "qwen3-235b-a22b", "gpt-oss-120b", "paper-003-gelu", "kimi-k2.5"] {
        let model = moesaic_spec::preset(name).unwrap().spec().unwrap();
        for strategy in Strategy::ALL {
            let setting = Setting {
                model_name: name,
                model: &model,
                cluster_name: "dgx-h100-x2",
                workload_name: "decode",
                workload: &workload,
                ranks: 16,
            };
            let Ok(file) = PlanFile::preset(strategy, &setting) else { continue };
            let Ok(plan) = Plan::new(file.clone(), &model, &cluster) else { continue };
            let layout = Layout::of(&file, &cluster);
            let parts = Parts::trace(&model, &layout.cut()).unwrap();
            let footprint = Footprint::new(&model, &layout, Formats::of(&model), &parts, 1024.0);
            let memory = plan.rank_memory(&model);
            let fullest = |of: fn(&moesaic_plan::RankMemory) -> u64| memory.iter().map(of).max().unwrap() as f64;
            let weights = |memory: &moesaic_plan::RankMemory| memory.weights();
            let at_most = footprint.fullest_weights();
            let real = fullest(weights);
            // Stages have embedding or head, the closed form has both; attention held twice is counted with its norms.
            assert!(
                (real * 0.999..real * 1.2).contains(&at_most),
                "{name} {}: {at_most:e}, plan {real:e}",
                strategy.name()
            );
            if matches!(layout.experts, ExpertLayout::Pool { .. }) {
                let experts = fullest(|memory| memory.routed_experts);
                let pool = footprint.expert_rank.unwrap().expert_weights;
                assert!((pool / experts - 1.0).abs() < 0.01, "{name}: {pool:e}, plan {experts:e}");
            } else {
                let (experts, real) =
                    (footprint.attention_rank.expert_weights, fullest(|memory| memory.routed_experts));
                assert!((experts / real - 1.0).abs() < 0.01, "{name} {}: {experts:e}, {real:e}", strategy.name());
            }
            if model.planning_only.is_none() {
                let kv = fullest(|memory| memory.kv_bytes_per_token);
                assert!((footprint.kv_bytes_per_token / kv - 1.0).abs() < 0.01, "{name} {}", strategy.name());
            }
            compared += 1;
        }
    }
    assert!(compared >= 20, "{compared}");
}
