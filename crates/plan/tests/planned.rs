//! Models that are planned but not run can be laid out, and their memory counted.

mod common;

use common::strategy;
use moesaic_plan::{Plan, Strategy};
use moesaic_spec::{Preset, cluster_preset, presets};

#[test]
fn planned_models_fit_where_they_should() {
    let cluster = cluster_preset("hgx-h200-x4").unwrap();
    let is_planned = |preset: &&Preset| preset.spec().unwrap().planning_only.is_some();
    for preset in presets().iter().filter(is_planned) {
        let model = preset.spec().unwrap();
        let of = if model.num_moe_layers() > 0 { Strategy::Ep } else { Strategy::TpPp };
        let plan = Plan::new(strategy(of, &model, 32).unwrap(), &model, &cluster);
        let plan = plan.unwrap_or_else(|e| panic!("{}: {e}", preset.name));
        assert_eq!(plan.world_size(), 32);
        // One rank with all of it has the bytes of the checkpoint, but for what its known shape lacks.
        let (whole, counts) = (Plan::single(&model).rank_memory(&model)[0], model.counts());
        let share = whole.weights() as f64 / counts.bytes_total as f64;
        assert!((0.98..=1.0).contains(&share), "{}: {share}", preset.name);
        let routed = counts.parts.iter().find(|part| part.name == moesaic_spec::PartName::RoutedExperts);
        assert_eq!(whole.routed_experts, routed.map_or(0, |part| part.bytes), "{}", preset.name);
    }
}
