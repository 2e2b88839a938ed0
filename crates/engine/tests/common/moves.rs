//! Placements to move through: experts go round, and replicas appear and disappear.

use moesaic_engine::Engine;
use moesaic_engine::balance::{Decision, LoadStats, moves};
use moesaic_plan::eplb::ExpertRank;
use moesaic_plan::plan::Balance;
use moesaic_plan::{LayerPlacement, Placement, Plan, PlanFile};

/// A plan with memory for experts that move, and a balancer that never finds the time to look.
pub(crate) fn movable(file: PlanFile) -> PlanFile {
    let balance = Balance { interval: 1_000_000, threshold: 0.05, significance: 0.01, bytes_per_step: Some(1 << 20) };
    PlanFile { balance: Some(balance), ..file }
}

/// The placement of this epoch: every expert `epoch` places further, and replicas in odd epochs only.
pub(crate) fn placement(plan: &Plan, epoch: u64) -> Placement {
    let layers = plan.placement.layers.iter().zip(plan.expert_slots());
    let layers =
        layers.map(|(placed, slots)| Some(layer(placed.as_ref()?.replicas.len(), &slots?, epoch as usize))).collect();
    let placement = Placement { epoch, layers };
    plan.check_placement(&placement).unwrap();
    placement
}

fn layer(num_experts: usize, slots: &[ExpertRank], epoch: usize) -> LayerPlacement {
    let mut held: Vec<Vec<usize>> = vec![Vec::new(); slots.len()];
    let mut home = epoch;
    for expert in 0..num_experts {
        while held[home % slots.len()].len() == slots[home % slots.len()].slots {
            home += 1;
        }
        held[home % slots.len()].push(expert);
        home += 1;
    }
    if epoch % 2 == 1 {
        let mut next = (epoch..).map(|expert| expert % num_experts);
        for (held, slot) in held.iter_mut().zip(slots) {
            while held.len() < slot.slots.min(num_experts) {
                let expert = next.next().expect("there is no end");
                if !held.contains(&expert) {
                    held.push(expert);
                }
            }
        }
    }
    let holders = |expert| {
        let held = held.iter().zip(slots).filter(|(held, _)| held.contains(&expert));
        held.map(|(_, slot)| slot.rank).collect()
    };
    LayerPlacement { replicas: (0..num_experts).map(holders).collect() }
}

/// Begins to move to the placement of the next epoch, if nothing moves now; the number of experts that are sent.
pub(crate) fn move_on(engine: &mut Engine, plan: &Plan) -> usize {
    let adaptation = engine.adaptation();
    if adaptation.is_migrating() {
        return 0;
    }
    let now = adaptation.placement();
    let next = placement(plan, now.epoch + 1);
    let moves = moves(now, &next, &plan.expert_slots());
    let num_moves = moves.len();
    let (before, after) = (LoadStats::default(), LoadStats::default());
    adaptation.migrate(&Decision { placement: next, moves, before, after, gains: Vec::new(), p_value: 0.0 });
    num_moves
}
