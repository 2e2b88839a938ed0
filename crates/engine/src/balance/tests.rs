//! The balancer on simulated traffic: quiet without a reason, quick with one, never to and fro.

use moesaic_plan::{ExpertId, Rank};

use super::simulated::{Shape, Traffic};
use super::*;

const SETTINGS: Balance = Balance { interval: 100, threshold: 0.05, significance: 0.01, bytes_per_step: None };

/// Experts in order over ranks of so many slots, two ranks a node; `redundant` slots in all are left over.
fn setup(shape: Shape, num_ranks: usize, redundant: usize) -> (BalanceSetup, Placement) {
    let slots = (shape.experts + redundant) / num_ranks;
    let rank = |r: usize| ExpertRank { rank: Rank(r as u32), node: r / 2, slots };
    let ranks: Vec<ExpertRank> = (0..num_ranks).map(rank).collect();
    let replicas = (0..shape.experts).map(|e| vec![Rank((e * num_ranks / shape.experts) as u32)]).collect();
    let layers = vec![Some(LayerPlacement { replicas }); shape.layers];
    let ranks = vec![Some(ranks); shape.layers];
    (BalanceSetup { num_experts: shape.experts, ranks, ..BalanceSetup::default() }, Placement { epoch: 0, layers })
}

/// Zipf's law, in an order that fills the first ranks of a placement in order.
fn zipf(n: usize, exponent: f64) -> Vec<f64> {
    (0..n).map(|expert| ((expert + 1) as f64).powf(-exponent)).collect()
}

fn level(n: usize) -> Vec<f64> {
    vec![1.0; n]
}

struct Run {
    balancer: Balancer,
    placement: Placement,
    traffic: Traffic,
    decisions: Vec<(u64, Decision)>,
    shape: Shape,
}

impl Run {
    fn new(shape: Shape, (num_ranks, redundant): (usize, usize), popularity: &[f64], seed: u64) -> Self {
        let (setup, placement) = setup(shape, num_ranks, redundant);
        let traffic = Traffic::new(shape, popularity, seed);
        Run { balancer: Balancer::new(SETTINGS, setup), placement, traffic, decisions: Vec::new(), shape }
    }

    fn steps(&mut self, steps: u64) {
        let mut counters = LoadCounters::new(self.shape.layers, self.shape.experts);
        for _ in 0..steps {
            counters.clear();
            self.traffic.step(&mut counters);
            self.balancer.observe(&counters, 1);
            if let Some(decision) = self.balancer.decide(&self.placement) {
                assert_eq!(decision.placement.epoch, self.placement.epoch + 1);
                self.placement = decision.placement.clone();
                self.decisions.push((self.balancer.step, decision));
            }
        }
    }

    /// Max/mean over fresh steps, that nobody decided from; the mean over layers.
    fn measure(&mut self, steps: u64) -> f64 {
        let mut counters = LoadCounters::new(self.shape.layers, self.shape.experts);
        (0..steps).for_each(|_| self.traffic.step(&mut counters));
        LoadStats::of(&counters, &self.placement, &self.balancer.setup.ranks).max_over_mean
    }
}

const SHAPES: [(Shape, usize); 6] = [
    (Shape { layers: 2, experts: 16, top_k: 2, batch: 1 }, 4),
    (Shape { layers: 2, experts: 16, top_k: 2, batch: 5 }, 4),
    (Shape { layers: 2, experts: 16, top_k: 2, batch: 16 }, 16),
    (Shape { layers: 1, experts: 64, top_k: 8, batch: 16 }, 8),
    (Shape { layers: 1, experts: 16, top_k: 4, batch: 64 }, 4),
    (Shape { layers: 1, experts: 256, top_k: 8, batch: 32 }, 16),
];

#[test]
fn quiet_over_ten_thousand_steps_of_a_uniform_router() {
    for (seed, (shape, num_ranks)) in SHAPES.into_iter().enumerate() {
        let mut run = Run::new(shape, (num_ranks, num_ranks), &level(shape.experts), seed as u64);
        run.steps(10_000);
        let report = run.balancer.report();
        assert!(run.decisions.is_empty(), "batch {}: moved at step {}", shape.batch, run.decisions[0].0);
        assert_eq!((report.intervals, report.quiet_intervals, report.quiet.len()), (100, 100, 100));
        // Not because nothing was to be seen: the loads of short windows are uneven.
        let uneven = report.quiet.iter().map(|quiet| quiet.max_over_mean).fold(0.0, f64::max);
        assert!(uneven > 1.05, "batch {}: {uneven}", shape.batch);
    }
}

#[test]
fn quiet_with_a_full_batch() {
    let shape = Shape { layers: 1, experts: 16, top_k: 2, batch: 256 };
    let mut run = Run::new(shape, (4, 4), &level(16), 1);
    run.steps(10_000);
    assert!(run.decisions.is_empty(), "moved at step {}", run.decisions[0].0);
}

/// The measure of false alarms: `cargo test --release -p moesaic-engine --lib balance -- --ignored --nocapture`.
#[test]
#[ignore = "minutes; prints how often noise moves experts"]
fn rate_of_false_alarms() {
    for (shape, num_ranks) in SHAPES {
        let seeds = 100;
        let alarms = (0..seeds)
            .filter(|&seed| {
                let mut run = Run::new(shape, (num_ranks, num_ranks), &level(shape.experts), 1_000 + seed);
                run.steps(10_000);
                !run.decisions.is_empty()
            })
            .count();
        let Shape { experts, top_k, batch, .. } = shape;
        println!(
            "batch {batch}, top {top_k} of {experts}, {num_ranks} ranks: {alarms} of {seeds} runs of 10,000 steps"
        );
        assert!(alarms <= 4, "{alarms} where 1 is expected");
    }
}

#[test]
fn a_skewed_router_is_balanced_at_the_first_interval_and_then_left_alone() {
    for (seed, batch, top_k) in [(1, 16, 1), (2, 16, 2), (3, 64, 2), (4, 256, 2)] {
        let shape = Shape { layers: 2, experts: 16, top_k, batch };
        let mut run = Run::new(shape, (4, 4), &zipf(16, 0.6), seed);
        let before = run.measure(400);
        run.steps(100);
        assert_eq!(run.decisions.len(), 1, "batch {batch}: not at the first interval");
        let decision = &run.decisions[0].1;
        assert_eq!(decision.gains.len(), 2, "layers that move");
        assert!(decision.p_value < SETTINGS.significance);
        assert!(decision.after.max_over_mean < decision.before.max_over_mean);
        assert!(decision.after.std_dev < 0.2 * decision.before.std_dev, "{decision:?}");
        // Long enough that topics average out.
        let after = run.measure(40_000 / batch as u64);
        assert!(before > 1.4, "batch {batch}: {before}");
        assert!(after < 1.15, "batch {batch}: {after} on fresh tokens");
        // The load is stationary: a better estimate may move a little more, but nothing goes to and fro.
        run.steps(5_000);
        for layer in 0..2 {
            let times = run.decisions.iter().filter(|(_, d)| d.gains.iter().any(|gain| gain.0 == layer)).count();
            assert!(times <= 2, "batch {batch}: layer {layer} moved {times} times");
        }
        let report = run.balancer.report();
        assert!(report.decisions[0].measured.is_some());
    }
}

#[test]
fn few_sequences_are_balanced_once_enough_of_them_have_passed() {
    // Intervals that a skewed router may stay unnoticed.
    for (batch, most) in [(4, 20), (8, 10), (16, 1)] {
        for seed in 0..5 {
            let shape = Shape { layers: 4, experts: 16, top_k: 2, batch };
            let mut run = Run::new(shape, (4, 4), &zipf(16, 0.6), 70 + seed);
            run.steps(most * 100);
            assert!(!run.decisions.is_empty(), "batch {batch}, seed {seed}: nothing in {most} intervals");
        }
    }
    let shape = Shape { layers: 2, experts: 16, top_k: 2, batch: 4 };
    let mut run = Run::new(shape, (4, 4), &zipf(16, 1.0), 3);
    run.steps(6_000);
    assert!(run.decisions.len() <= 4, "{} decisions", run.decisions.len());
    assert!(run.measure(20_000) < 1.15);
}

#[test]
fn a_sudden_change_is_followed_once() {
    let shape = Shape { layers: 1, experts: 16, top_k: 2, batch: 64 };
    let mut run = Run::new(shape, (4, 4), &zipf(16, 1.0), 5);
    run.steps(2_000);
    let settled = run.decisions.len();
    assert!((1..=2).contains(&settled));
    let mut turned = zipf(16, 1.0);
    turned.rotate_right(6);
    run.traffic.set_popularity(&turned);
    let before = run.measure(1_000);
    run.steps(2_000);
    let after = run.measure(1_000);
    assert!(before > 1.15 && after < 1.1, "{before} became {after}");
    assert!(run.decisions.len() - settled <= 3, "{} decisions", run.decisions.len() - settled);
}

#[test]
fn a_slow_change_is_followed_all_along() {
    let shape = Shape { layers: 1, experts: 16, top_k: 2, batch: 64 };
    let mut run = Run::new(shape, (4, 4), &zipf(16, 0.8), 6);
    let mut worst_late = 0.0f64;
    let (mut sum, mut parts) = (0.0, 0.0);
    for part in 0..40 {
        // The popular experts of the start fade while those at the other end rise.
        let share = f64::from(part) / 39.0;
        let (from, mut to) = (zipf(16, 0.8), zipf(16, 0.8));
        to.reverse();
        let mixed: Vec<f64> = from.iter().zip(&to).map(|(a, b)| a * (1.0 - share) + b * share).collect();
        run.traffic.set_popularity(&mixed);
        run.steps(200);
        if part > 2 {
            let now = run.measure(300);
            worst_late = worst_late.max(now);
            sum += now;
            parts += 1.0;
        }
    }
    assert!(sum / parts < 1.1, "{}", sum / parts);
    assert!(worst_late < 1.25, "{worst_late}");
    assert!((2..20).contains(&run.decisions.len()), "{} decisions in 80 intervals", run.decisions.len());
}

#[test]
fn a_stationary_load_is_never_moved_to_and_fro() {
    for seed in 0..6 {
        let shape = Shape { layers: 1, experts: 16, top_k: 2, batch: 32 };
        let mut run = Run::new(shape, (4, 4), &zipf(16, 0.4 + 0.1 * seed as f64), 40 + seed);
        run.steps(8_000);
        assert!(run.decisions.len() <= 3, "seed {seed}: {} decisions", run.decisions.len());
        // No placement comes back.
        for (idx, (_, decision)) in run.decisions.iter().enumerate() {
            assert!(run.decisions[..idx].iter().all(|(_, d)| d.placement.layers != decision.placement.layers));
        }
    }
}

#[test]
fn only_interval_ends_decide_and_each_once() {
    let shape = Shape { layers: 1, experts: 16, top_k: 2, batch: 64 };
    let (setup, placement) = setup(shape, 4, 4);
    let mut balancer = Balancer::new(SETTINGS, setup);
    let mut traffic = Traffic::new(shape, &zipf(16, 0.6), 1);
    let mut counters = LoadCounters::new(1, 16);
    for _ in 0..99 {
        counters.clear();
        traffic.step(&mut counters);
        balancer.observe(&counters, 1);
        assert!(!balancer.is_due());
        assert_eq!(balancer.decide(&placement), None);
    }
    balancer.observe(&counters, 1);
    assert!(balancer.is_due());
    assert!(balancer.decide(&placement).is_some());
    assert_eq!(balancer.decide(&placement), None);
}

#[test]
fn moves_come_from_holders_of_the_same_node_and_are_spread() {
    let rank = |r: u32| ExpertRank { rank: Rank(r), node: r as usize / 2, slots: 4 };
    let ranks = vec![Some((0..4).map(rank).collect::<Vec<_>>())];
    let placement = |replicas: &[&[u32]]| {
        let replicas = replicas.iter().map(|holders| holders.iter().copied().map(Rank).collect()).collect();
        Placement { epoch: 0, layers: vec![Some(LayerPlacement { replicas })] }
    };
    let old = placement(&[&[0, 2], &[1], &[0, 1], &[0, 1]]);
    let new = placement(&[&[1, 3], &[1], &[2], &[0, 3]]);
    let found: Vec<(u32, u32, u32)> =
        moves(&old, &new, &ranks).into_iter().map(|m| (m.expert.0, m.from.0, m.to.0)).collect();
    // Expert 0: from the node of each receiver. Expert 2: both holders are far, and rank 1 has sent nothing. Expert 3: again
    // far, and both have sent once.
    assert_eq!(found, [(0, 0, 1), (0, 2, 3), (2, 1, 2), (3, 0, 3)]);
}

#[test]
fn every_move_has_a_holder_and_nothing_else_is_sent() {
    let shape = Shape { layers: 3, experts: 16, top_k: 2, batch: 64 };
    let mut run = Run::new(shape, (4, 4), &zipf(16, 0.6), 11);
    let old = run.placement.clone();
    run.steps(100);
    let (_, decision) = &run.decisions[0];
    for Move { layer, expert, from, to } in &decision.moves {
        let holders = |placement: &Placement| placement.layers[*layer].as_ref().unwrap().replicas[expert.idx()].clone();
        assert!(
            holders(&old).contains(from) && !holders(&old).contains(to) && holders(&decision.placement).contains(to)
        );
    }
    let replicas = |placement: &Placement| -> Vec<(usize, usize, Rank)> {
        let layers = placement.layers.iter().enumerate();
        layers
            .flat_map(|(l, layer)| {
                let replicas = layer.as_ref().unwrap().replicas.iter().enumerate();
                replicas.flat_map(move |(e, ranks)| ranks.iter().map(move |r| (l, e, *r))).collect::<Vec<_>>()
            })
            .collect()
    };
    let had = replicas(&old);
    let gets = replicas(&decision.placement).into_iter().filter(|replica| !had.contains(replica)).count();
    assert_eq!(decision.moves.len(), gets);
}

#[test]
fn the_report_keeps_what_was_paid_and_reads_back() {
    let shape = Shape { layers: 1, experts: 16, top_k: 2, batch: 64 };
    let mut run = Run::new(shape, (4, 4), &zipf(16, 0.6), 12);
    run.steps(100);
    run.balancer.moved(Paid { bytes: 1_000, seconds: 0.25 });
    run.steps(100);
    let report = run.balancer.report();
    assert_eq!((report.moved_bytes, report.paid_s, report.intervals), (1_000, 0.25, 2));
    let record = &report.decisions[0];
    assert_eq!(record.paid, Some(Paid { bytes: 1_000, seconds: 0.25 }));
    assert_eq!((record.step, record.intervals, record.moves), (100, 1, run.decisions[0].1.moves.len()));
    let measured = record.measured.unwrap();
    assert!(measured.max_over_mean < record.before.max_over_mean && measured.std_dev < record.before.std_dev);
    let text = serde_json::to_string(report).unwrap();
    assert_eq!(&serde_json::from_str::<BalanceReport>(&text).unwrap(), report);
}

#[test]
fn stats_of_a_load_that_is_known() {
    let mut loads = LoadCounters::new(1, 4);
    for (expert, n) in [(0, 6), (1, 2), (2, 2), (3, 2)] {
        (0..n).for_each(|sequence| loads.count(0, sequence, ExpertId(expert)));
    }
    let ranks = vec![Some(vec![0, 1].into_iter().map(|r| ExpertRank { rank: Rank(r), node: 0, slots: 3 }).collect())];
    let holders = |all: &[&[u32]]| all.iter().map(|one| one.iter().copied().map(Rank).collect()).collect();
    let placement = |replicas| Placement { epoch: 0, layers: vec![Some(LayerPlacement { replicas })] };
    let apart = LoadStats::of(&loads, &placement(holders(&[&[0], &[0], &[1], &[1]])), &ranks);
    assert_eq!((apart.std_dev, apart.max_over_mean, apart.worst_max_over_mean), (1.0 / 3.0, 4.0 / 3.0, 4.0 / 3.0));
    // Loads of physical experts: 6, 2, 2, 2 with mean 3.
    assert!((apart.expert_std_dev - (1.0f64 / 3.0).sqrt()).abs() < 1e-12);
    let shared = LoadStats::of(&loads, &placement(holders(&[&[0, 1], &[0], &[1], &[1]])), &ranks);
    assert!((shared.max_over_mean - 7.0 / 6.0).abs() < 1e-12);
}
