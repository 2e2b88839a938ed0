//! Time and quality of placing the experts of a large model: 58 layers of 256 experts in 288 slots on 72 ranks.
//!
//! `cargo run --release -p moesaic-plan --example placement_bench`

use std::time::Instant;

use moesaic_plan::Rank;
use moesaic_plan::eplb::{CoActivation, ExpertRank, PlaceRequest, Policy, place};

const LAYERS: usize = 58;
const EXPERTS: usize = 256;

fn main() {
    let ranks: Vec<ExpertRank> =
        (0..72).map(|r| ExpertRank { rank: Rank(r), node: r as usize / 8, slots: 4 }).collect();
    // Zipf 0.6 in a different order in each layer; experts with close numbers are chosen together.
    let loads: Vec<Vec<f64>> = (0..LAYERS)
        .map(|layer| (0..EXPERTS).map(|e| (((e * 167 + layer * 37) % EXPERTS + 1) as f64).powf(-0.6)).collect())
        .collect();
    let pairs: Vec<u64> =
        (0..EXPERTS).flat_map(|a| (a + 1..EXPERTS).map(move |b| if b - a < 16 { 100 } else { 3 })).collect();
    let co_activation = CoActivation::new(EXPERTS, &pairs);
    let current: Vec<_> = loads.iter().map(|loads| run(loads, &ranks, None, None, Policy::Global)).collect();
    let drifted: Vec<Vec<f64>> = (loads.iter())
        .map(|loads| loads.iter().enumerate().map(|(e, l)| if e % 9 == 0 { l * 1.5 } else { *l }).collect())
        .collect();
    println!("{LAYERS} layers, {EXPERTS} experts, 288 slots, 72 ranks in 9 nodes");
    for (name, co_activation, with_current) in [
        ("loads", None, false),
        ("and co-activation", Some(co_activation), false),
        ("and a current placement", None, true),
    ] {
        let start = Instant::now();
        let placed: Vec<_> = (0..LAYERS)
            .map(|l| {
                let loads = if with_current { &drifted[l] } else { &loads[l] };
                let current = with_current.then_some(&current[l].placement);
                run(loads, &ranks, co_activation, current, Policy::Global)
            })
            .collect();
        let time = start.elapsed();
        let worst = placed.iter().map(|p| p.max_over_mean).fold(0.0, f64::max);
        let split = placed[0].split_pairs.map_or(String::new(), |s| format!(", {:.1} % of pairs split", s * 100.0));
        let moves: Option<usize> = placed.iter().map(|p| p.moves).sum();
        let moves = moves.map_or(String::new(), |m| format!(", {m} of {} replicas move", 288 * LAYERS));
        println!("{name}: {:.0} ms, worst max/mean {worst:.4}{split}{moves}", time.as_secs_f64() * 1e3);
    }
    let blind = moesaic_plan::eplb::split_pairs(&current[0].placement, co_activation, &ranks);
    println!("(split without looking: {:.1} %)", blind * 100.0);
}

fn run(
    loads: &[f64],
    ranks: &[ExpertRank],
    co_activation: Option<CoActivation>,
    current: Option<&moesaic_plan::LayerPlacement>,
    policy: Policy,
) -> moesaic_plan::eplb::Placed {
    place(&PlaceRequest { loads, ranks, policy, co_activation, current }).expect("slots for all experts")
}
