//! What would help: physics, and that what is said of parts adds up.

use moesaic_planner::cost::Stack;
use moesaic_planner::iteration::{ExpertLayout, Layout};
use moesaic_planner::load::{ExpertLoad, LoadModel};
use moesaic_planner::serving::Requests;
use moesaic_planner::system::System;
use moesaic_planner::whatif::{Bound, Change, Explained, Given, explain};
use moesaic_spec::ModelSpec;

fn model() -> ModelSpec {
    moesaic_spec::preset("qwen3-30b-a3b").unwrap().spec().unwrap()
}

fn explained(model: &ModelSpec, layout: Layout, concurrency: f64) -> Explained {
    let requests = Requests {
        input: 1000.0,
        output: 200.0,
        concurrency,
        prefix_hit: 0.0,
        step_tokens: 4096.0,
        common_rhythm: true,
    };
    let cluster = moesaic_spec::cluster_preset("dgx-h100-x2").unwrap();
    let load = Some(ExpertLoad::new(LoadModel::Zipf(0.8), 128, 8).unwrap().into());
    let (pricing, system) = (Stack::Sglang.into(), System::UNMEASURED);
    explain(&Given { model, cluster, layout, requests, load, utilization: 0.9, pricing, system }).unwrap()
}

fn placed(dp: usize) -> Layout {
    Layout { dp, experts: ExpertLayout::Placed { ep: dp }, ..Layout::single(8) }
}

#[test]
fn faster_hardware_is_never_slower() {
    let model = model();
    let pool = Layout { dp: 8, experts: ExpertLayout::Pool { ep: 8 }, micro_batches: 2, ..Layout::single(8) };
    for layout in [Layout::single(8), placed(8), placed(16), pool, Layout { tp: 8, ..Layout::single(8) }] {
        for users in [1.0, 64.0, 1024.0] {
            let explained = explained(&model, layout.clone(), users);
            for what_if in &explained.what_ifs {
                let faster = matches!(
                    what_if.change,
                    Change::TwiceCompute
                        | Change::TwiceMemory
                        | Change::TwiceIntraNode
                        | Change::TwiceInterNode
                        | Change::HalfLatency
                );
                if faster {
                    assert!(what_if.tpot_gain < 1e-3 && what_if.throughput_gain > -1e-3, "{layout:?}: {what_if:?}");
                }
            }
            assert!(explained.what_ifs.is_sorted_by(|a, b| a.throughput_gain >= b.throughput_gain));
            assert!((0.0..1.0).contains(&explained.straggler) && (0.0..1.0).contains(&explained.exposed));
            // What computes and what is exposed is all of the time; parts hold all that computes.
            let shares: f64 = explained.parts.iter().map(|part| part.share).sum();
            assert!(shares > 0.95 * (1.0 - explained.exposed), "{layout:?}, {users}: {shares} {explained:?}");
        }
    }
}

#[test]
fn changes_are_those_that_the_plan_has() {
    let model = model();
    let changes = |layout: Layout| {
        let explained = explained(&model, layout, 64.0);
        explained.what_ifs.iter().map(|what_if| what_if.change).collect::<Vec<_>>()
    };
    let one = changes(Layout::single(8));
    for absent in [Change::TwiceIntraNode, Change::EightBitExchange, Change::Balancing, Change::TwoMicroBatches] {
        assert!(!one.contains(&absent), "{absent:?} on one GPU");
    }
    let wide = changes(placed(16));
    for present in [Change::TwiceInterNode, Change::EightBitExchange, Change::Balancing, Change::OneMoreNode] {
        assert!(wide.contains(&present), "{present:?} on 16 GPUs");
    }
    assert!(!changes(placed(8)).contains(&Change::TwiceInterNode));
}

/// One GPU that answers one user streams its weights; one that reads prompts of many computes.
#[test]
fn parts_are_bound_by_what_physics_says() {
    let model = model();
    let bound_of = |explained: &Explained, name: &str| {
        explained.parts.iter().find(|part| part.name == name).and_then(|part| part.bound)
    };
    let alone = explained(&model, Layout::single(8), 1.0);
    assert_eq!(bound_of(&alone, "routed experts"), Some(Bound::Memory));
    let wide = explained(&model, placed(16), 2048.0);
    assert_eq!(bound_of(&wide, "exchange of rows (all-to-all)"), Some(Bound::InterNode), "{:?}", wide.parts);
}

#[test]
fn balancing_helps_where_load_is_uneven() {
    let model = model();
    let explained = explained(&model, placed(16), 2048.0);
    let gain = |change| explained.what_ifs.iter().find(|what_if| what_if.change == change).unwrap().throughput_gain;
    assert!(explained.straggler > 0.02, "{}", explained.straggler);
    assert!(gain(Change::Balancing) > 0.0 && gain(Change::Replicas) > 0.0, "{:?}", explained.what_ifs);
    // No placement is better than even experts.
    assert!(gain(Change::Balancing) < 1.0 / (1.0 - explained.straggler) - 1.0 + 0.02);
}
