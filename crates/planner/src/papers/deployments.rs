//! The papers' deployments: their plan files, and the same strategies on other numbers of GPUs.

use moesaic_plan::PlanFile;
use moesaic_plan::plan::{ExchangePrecision, Overlap};
use moesaic_spec::{Cluster, Ffn, ModelSpec};

use crate::iteration::{ExpertLayout, Layout};

/// A plan file of `specs/plans`.
macro_rules! plan {
    ($name:literal, $cluster:expr) => {
        $crate::papers::deployments::of_file(
            include_str!(concat!("../../../../specs/plans/", $name, ".yaml")),
            $cluster,
        )
    };
}
pub(super) use plan;

pub(super) fn of_file(yaml: &str, cluster: &Cluster) -> Layout {
    let file = PlanFile::from_yaml(yaml, "specs/plans").expect("our own plan files are right; a test reads them");
    Layout::of(&file, cluster)
}

/// A preset model.
pub(super) fn model(name: &str) -> ModelSpec {
    moesaic_spec::preset(name).and_then(|preset| preset.spec()).expect("a preset")
}

/// A preset cluster.
pub(super) fn cluster(name: &str) -> Cluster {
    moesaic_spec::cluster_preset(name).expect("a preset")
}

/// The same model with another number of experts in each MoE layer.
pub(super) fn with_experts(model: &ModelSpec, num_experts: usize) -> ModelSpec {
    let mut model = model.clone();
    for layer in &mut model.layers {
        if let Ffn::Moe(moe) = layer {
            moe.num_experts = num_experts;
        }
    }
    model
}

/// Nodes of papers 003 and 004.
const A100_NODE: usize = 4;
/// Nodes of the others.
const H100_NODE: usize = 8;
/// Attention heads of papers 003 and 004.
const HEADS: usize = 32;

/// Papers 003 and 004: TP = 8, the rest data parallel.
pub(super) fn tensor(gpus: usize) -> Option<Layout> {
    let tp = gpus.min(8);
    (gpus.is_multiple_of(tp) && tp.is_power_of_two()).then(|| Layout { tp, dp: gpus / tp, ..Layout::single(A100_NODE) })
}

/// Papers 003 and 004: PP = 2, the rest data parallel.
pub(super) fn pipeline(gpus: usize) -> Option<Layout> {
    gpus.is_multiple_of(2).then(|| Layout { pp: 2, dp: gpus / 2, micro_batches: 2, ..Layout::single(A100_NODE) })
}

/// Papers 003 and 004: TP = 8 with PP = 2; fewer ranks of a stage on fewer GPUs, the rest data parallel.
pub(super) fn hybrid(gpus: usize) -> Option<Layout> {
    let tp = (gpus / 2).min(8);
    let fits = gpus >= 4 && gpus.is_power_of_two();
    fits.then(|| Layout { pp: 2, tp, dp: gpus / 2 / tp, micro_batches: 2, ..Layout::single(A100_NODE) })
}

/// Papers 003 and 004: three quarters of the GPUs have attention, one quarter experts.
pub(super) fn ma(gpus: usize) -> Option<Layout> {
    let (ep, tp) = (gpus / 4, gpus - gpus / 4);
    let heads = (0..tp).map(|rank| HEADS / tp + usize::from(rank < HEADS % tp)).collect();
    (gpus >= 4 && gpus.is_multiple_of(4) && tp <= HEADS).then(|| Layout {
        tp,
        heads: Some(heads),
        experts: ExpertLayout::Pool { ep },
        attention_replicas: 2,
        micro_batches: 2,
        overlap: Overlap::MicroBatches,
        precision: ExchangePrecision::Int8,
        ..Layout::single(A100_NODE)
    })
}

/// Paper 001: experts over all GPUs, attention data parallel.
pub(super) fn large_ep(gpus: usize) -> Option<Layout> {
    (2..=16).contains(&gpus).then(|| Layout {
        dp: gpus,
        experts: ExpertLayout::Placed { ep: gpus },
        micro_batches: 2,
        overlap: Overlap::Arrivals,
        two_level: true,
        ..Layout::single(H100_NODE)
    })
}

/// Paper 001: TP = 8 with PP = 2.
pub(super) fn hybrid_h100(gpus: usize) -> Option<Layout> {
    (gpus >= 4 && gpus.is_multiple_of(2)).then(|| {
        let tp = (gpus / 2).min(8);
        Layout { pp: 2, tp, dp: gpus / 2 / tp, micro_batches: 2, ..Layout::single(H100_NODE) }
    })
}

/// Papers 000 and 002: 58 stages of one MoE layer, each on GPUs of its own, all stages at work: as many micro-batches as
/// stages.
pub(super) fn dedicated(gpus: usize) -> Option<Layout> {
    const STAGES: usize = 58;
    let mut stage_layers = vec![1; STAGES];
    stage_layers[0] = 4;
    (gpus >= 2 * STAGES && gpus.is_multiple_of(STAGES)).then(|| Layout {
        pp: STAGES,
        dp: gpus / STAGES,
        experts: ExpertLayout::Placed { ep: gpus / STAGES },
        stage_layers: Some(stage_layers),
        micro_batches: STAGES,
        overlap: Overlap::Arrivals,
        two_level: true,
        ..Layout::single(H100_NODE)
    })
}

/// All layers on each of so many GPUs, experts spread over them.
pub(super) fn together(gpus: usize) -> Option<Layout> {
    (gpus >= 2).then(|| Layout {
        dp: gpus,
        experts: ExpertLayout::Placed { ep: gpus },
        micro_batches: 2,
        overlap: Overlap::Arrivals,
        two_level: true,
        ..Layout::single(H100_NODE)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is worked out for any number of GPUs is, at the papers' number, what the plan files say.
    #[test]
    fn strategies_are_the_plan_files() {
        let a100 = cluster("a100-4x4");
        assert_eq!(ma(16).unwrap(), plan!("paper-003-ma", &a100));
        let h100 = cluster("dgx-h100-x2");
        assert_eq!(large_ep(16).unwrap(), plan!("paper-001-ep", &h100));
        assert_eq!(hybrid_h100(16).unwrap(), plan!("paper-001-tp-pp", &h100));
        let papers = cluster("h100-paper");
        // The plan files have as many micro-batches as plans may have, which leaves most stages idle.
        let filled = |layout| Layout { micro_batches: 58, ..layout };
        assert_eq!(dedicated(14_848).unwrap(), filled(plan!("paper-000", &papers)));
        assert_eq!(dedicated(3712).unwrap(), filled(plan!("paper-002", &papers)));
    }

    #[test]
    fn every_strategy_uses_all_its_gpus() {
        for spreading in [tensor, pipeline, hybrid, ma] {
            for gpus in [4, 8, 16, 32] {
                assert_eq!(spreading(gpus).unwrap().ranks(), gpus);
            }
        }
        assert!(ma(18).is_none() && hybrid(12).is_none() && large_ep(32).is_none() && dedicated(100).is_none());
        assert_eq!(ma(12).unwrap().heads.unwrap().iter().sum::<usize>(), HEADS);
    }
}
