//! The synchroniser on pools whose times are known.

use moesaic_kernels::philox;

use super::*;

const SETTINGS: Synchronize = Synchronize { interval: 100, threshold: 0.05 };
const EXPERTS: usize = 16;

/// Uniform numbers in a row.
struct Draws(u64, u64);

impl Draws {
    fn between(&mut self, low: f64, high: f64) -> f64 {
        self.1 += 1;
        low + (high - low) * philox::uniform(self.0, self.1)
    }

    /// Around 1, with a spread of a few percent; now and then an interruption.
    fn noise(&mut self) -> f64 {
        let spread = 1.0 + 0.03 * (self.between(-1.0, 1.0) + self.between(-1.0, 1.0));
        if self.between(0.0, 1.0) < 0.02 { spread * 4.0 } else { spread }
    }

    /// A decode step of any size up to 128 sequences.
    fn step(&mut self) -> Features {
        let sequences = self.between(4.0, 128.0).round();
        let context = self.between(50.0, 2_000.0);
        Features {
            tokens: sequences,
            sequences,
            context_sum: sequences * context,
            context_max: context * self.between(1.1, 3.0),
            active_experts: EXPERTS as f64 * (1.0 - (1.0 - 2.0 / EXPERTS as f64).powf(sequences)),
            micro_batches: 1.0,
        }
    }
}

/// Weights are read once, keys and values of all contexts.
fn attention_s(f: &Features) -> f64 {
    30e-6 + 0.4e-6 * f.tokens + 2.5e-9 * f.context_sum
}

/// Weights of active experts are read; beyond 64 tokens computing takes longer.
fn experts_s(f: &Features) -> f64 {
    20e-6 + (6e-6 * f.active_experts).max(1.5e-6 * f.tokens)
}

fn exchange_s(f: &Features) -> f64 {
    8e-6 + 0.2e-6 * f.tokens
}

fn linear_s(f: &Features) -> f64 {
    20e-6 + 1e-6 * f.tokens
}

fn learned(
    seconds: impl Fn(&Features) -> f64,
    samples: usize,
    mut noise: impl FnMut(&mut Draws) -> f64,
) -> TimePredictor {
    let mut predictor = TimePredictor::new(1);
    let mut draws = Draws(7, 0);
    for _ in 0..samples {
        let features = draws.step();
        predictor.observe(features, seconds(&features) * noise(&mut draws));
    }
    predictor.fit();
    predictor
}

#[test]
fn the_network_predicts_what_contexts_cost_and_no_line_can() {
    let predictor = learned(attention_s, 1_000, Draws::noise);
    let errors = predictor.errors().unwrap();
    let mlp = errors.mlp.unwrap();
    assert_eq!((errors.samples, errors.held_out, errors.used), (800, 200, Model::Mlp));
    assert!(mlp.median < 0.05, "{mlp:?}");
    assert!(errors.linear.median > 2.0 * mlp.median, "{errors:?}");
    // Against the truth, not only against noisy samples.
    let mut draws = Draws(8, 0);
    for _ in 0..50 {
        let features = draws.step();
        let predicted = predictor.predict(&features).unwrap();
        assert_eq!(predicted.by, Model::Mlp);
        assert!((predicted.seconds / attention_s(&features) - 1.0).abs() < 0.2, "{features:?}: {predicted:?}");
    }
}

#[test]
fn the_linear_model_predicts_while_it_is_the_better_one() {
    let straight = learned(linear_s, 1_000, |_| 1.0);
    let errors = straight.errors().unwrap();
    assert_eq!(errors.used, Model::Linear);
    assert!(errors.linear.mean < 1e-9, "{errors:?}");
    let f = Features { tokens: 500.0, ..Features::default() };
    let predicted = straight.predict(&f).unwrap();
    assert_eq!(predicted.by, Model::Linear);
    assert!((predicted.seconds / linear_s(&f) - 1.0).abs() < 1e-9);

    // Too few samples for a network.
    let few = learned(attention_s, 50, |_| 1.0);
    assert_eq!((few.errors().unwrap().mlp, few.errors().unwrap().used), (None, Model::Linear));
    assert!(TimePredictor::new(1).predict(&f).is_none());
}

#[test]
fn far_from_all_that_was_seen_the_linear_model_answers() {
    let predictor = learned(attention_s, 1_000, |_| 1.0);
    let inside = Draws(9, 0).step();
    assert_eq!(predictor.predict(&inside).unwrap().by, Model::Mlp);
    let far = Features { tokens: 4_096.0, ..inside };
    assert_eq!(predictor.predict(&far).unwrap().by, Model::Linear);
}

#[test]
fn only_the_latest_samples_count_and_times_of_zero_do_not() {
    let mut predictor = TimePredictor::new(1);
    let mut draws = Draws(7, 0);
    for idx in 0..4_000 {
        let features = draws.step();
        let seconds = linear_s(&features) * if idx < 2_000 { 10.0 } else { 1.0 };
        predictor.observe(features, seconds);
        predictor.observe(features, 0.0);
        predictor.observe(features, f64::NAN);
    }
    assert_eq!(predictor.num_samples(), 1_250);
    predictor.fit();
    let f = draws.step();
    assert!((predictor.predict(&f).unwrap().seconds / linear_s(&f) - 1.0).abs() < 0.02);
}

#[test]
fn a_part_has_its_share_of_everything_but_the_longest_context() {
    let whole = Features {
        tokens: 64.0,
        sequences: 32.0,
        context_sum: 6_400.0,
        context_max: 900.0,
        active_experts: 12.0,
        micro_batches: 1.0,
    };
    let half = whole.part(2, EXPERTS);
    assert_eq!((half.tokens, half.sequences, half.context_sum, half.micro_batches), (32.0, 16.0, 3_200.0, 2.0));
    // 12 of 16 active: 4 idle, so half of the tokens leave 16 * sqrt(1 / 4) idle.
    assert_eq!((half.context_max, half.active_experts), (900.0, 8.0));
    assert_eq!(Features { active_experts: 16.0, ..whole }.part(4, EXPERTS).active_experts, 16.0);
}

type Truth = fn(&Features) -> f64;

/// Runs steps of one size after having seen many sizes, and returns what was chosen at the end.
fn chosen(truth: [Truth; 3], size: f64, from: usize) -> Synchronizer {
    let mut synchronizer = Synchronizer::new(SETTINGS, 16, EXPERTS, from);
    let mut draws = Draws(3, 0);
    for _ in 0..500 {
        let mut step = draws.step();
        step.tokens = size * step.sequences / 64.0;
        let m = 1.0 + (draws.between(0.0, 3.999)).floor();
        let part = step.part(m as usize, EXPERTS);
        for (pool, truth) in Pool::ALL.into_iter().zip(truth) {
            synchronizer.observe(pool, part, truth(&part));
        }
    }
    for _ in 0..100 {
        synchronizer.end_step(&whole(size));
    }
    synchronizer
}

fn whole(size: f64) -> Features {
    Features {
        tokens: size,
        sequences: 64.0,
        context_sum: 64_000.0,
        context_max: 1_500.0,
        active_experts: 16.0,
        micro_batches: 1.0,
    }
}

fn truly(truth: [Truth; 3], size: f64, m: usize) -> f64 {
    let part = whole(size).part(m, EXPERTS);
    let [attention, experts, exchange] = truth.map(|truth| truth(&part));
    step_time(LayerTimes { attention, experts, exchange }, m, 16)
}

#[test]
fn as_many_micro_batches_are_chosen_as_are_fastest() {
    // Times that shrink with the batch: parts overlap for free.
    let divisible: [Truth; 3] = [|f| 2e-6 * f.tokens, |f| 2e-6 * f.tokens, |f| 0.5e-6 * f.tokens];
    // Times that do not: every part costs as much as the whole.
    let fixed: [Truth; 3] = [|_| 100e-6, |_| 20e-6, |_| 5e-6];
    // In between.
    let mixed: [Truth; 3] = [attention_s, experts_s, exchange_s];
    for (truth, size) in [(divisible, 64.0), (fixed, 64.0), (mixed, 64.0), (mixed, 512.0)] {
        for from in [1, 4] {
            let synchronizer = chosen(truth, size, from);
            let choice = &synchronizer.report().choices[0];
            let times: Vec<f64> = (1..=4).map(|m| truly(truth, size, m)).collect();
            let best = times.iter().copied().fold(f64::INFINITY, f64::min);
            let got = times[synchronizer.micro_batches() - 1];
            assert!(got <= best * (1.0 + SETTINGS.threshold + 0.02), "{times:?}: {choice:?}");
            assert_eq!((choice.step, choice.from, choice.to), (100, from, synchronizer.micro_batches()));
        }
    }
    assert!(chosen(divisible, 64.0, 1).micro_batches() >= 3);
    assert_eq!(chosen(fixed, 64.0, 4).micro_batches(), 1);
}

#[test]
fn pools_that_agree_are_left_alone_unless_much_is_gained() {
    // Two parts take as long as three, within the threshold, and the pools are equal.
    let level: [Truth; 3] = [|f| 1e-6 * f.tokens, |f| 1e-6 * f.tokens, |_| 1e-9];
    let synchronizer = chosen(level, 64.0, 2);
    let choice = &synchronizer.report().choices[0];
    assert_eq!((choice.to, choice.reason), (2, Reason::PoolsAgree), "{choice:?}");
    // From one part, half of the time is gained.
    let choice = chosen(level, 64.0, 1).report().choices[0].clone();
    assert_eq!(choice.reason, Reason::Faster);
    assert!(choice.to >= 2);
}

#[test]
fn nothing_is_chosen_before_every_pool_was_measured() {
    let mut synchronizer = Synchronizer::new(SETTINGS, 4, EXPERTS, 2);
    let mut draws = Draws(3, 0);
    let mut choices = 0;
    for _ in 0..200 {
        let step = draws.step();
        synchronizer.observe(Pool::Attention, step.part(2, EXPERTS), 1e-3);
        synchronizer.observe(Pool::Experts, step.part(2, EXPERTS), 1e-3);
        if let Some(choice) = synchronizer.end_step(&step) {
            choices += 1;
            assert_eq!((choice.reason, choice.to), (Reason::NotMeasured, 2));
        }
    }
    assert_eq!((choices, synchronizer.report().intervals, synchronizer.report().changes), (2, 2, 0));
}

#[test]
fn no_more_parts_than_sequences() {
    let divisible: [Truth; 3] = [|f| 2e-6 * f.tokens, |f| 2e-6 * f.tokens, |f| 0.5e-6 * f.tokens];
    let mut synchronizer = chosen(divisible, 64.0, 1);
    let two = Features { sequences: 2.0, ..whole(64.0) };
    let choice = (0..100).filter_map(|_| synchronizer.end_step(&two)).last().unwrap();
    assert_eq!((choice.to, choice.reason), (2, Reason::FewSequences), "{choice:?}");
}

#[test]
fn the_report_reads_back() {
    let synchronizer = chosen([attention_s, experts_s, exchange_s], 64.0, 1);
    let report = synchronizer.report();
    assert_eq!(report.errors.len(), 3);
    let text = serde_json::to_string(report).unwrap();
    let back: SynchronizerReport = serde_json::from_str(&text).unwrap();
    assert_eq!((back.choices.len(), back.errors.len(), back.intervals), (1, 3, 1));
}

/// The fullest rank's cost by the mean.
fn unevenness(costs: &[f64], rank_of: &[usize], ranks: usize) -> f64 {
    let mut loads = vec![0.0; ranks];
    costs.iter().zip(rank_of).for_each(|(cost, &rank)| loads[rank] += cost);
    loads.iter().copied().fold(0.0, f64::max) * ranks as f64 / costs.iter().sum::<f64>()
}

#[test]
fn requests_of_skewed_lengths_are_split_better_than_in_turn() {
    let mut synchronizer = Synchronizer::new(SETTINGS, 4, EXPERTS, 1);
    let mut draws = Draws(3, 0);
    for _ in 0..1_000 {
        let step = draws.step();
        synchronizer.observe(Pool::Attention, step, attention_s(&step));
        synchronizer.end_step(&step);
    }
    // Most are short, some long.
    let contexts: Vec<usize> = (0..48).map(|_| (60.0 * 40f64.powf(draws.between(0.0, 1.0))) as usize).collect();
    let ranks = 6;
    let right: Vec<f64> = contexts.iter().map(|&c| 0.4e-6 + 2.5e-9 * c as f64).collect();
    let in_turn: Vec<usize> = (0..contexts.len()).map(|request| request % ranks).collect();
    let predicted = split(&synchronizer.attention_costs(&contexts), ranks);
    let (turn, ours) = (unevenness(&right, &in_turn, ranks), unevenness(&right, &predicted, ranks));
    assert!(turn > 1.15, "{turn}");
    assert!(ours < 1.08, "{ours}");

    // Without any measurement, lengths are what is known.
    let blind = Synchronizer::new(SETTINGS, 4, EXPERTS, 1).attention_costs(&contexts);
    assert!(unevenness(&right, &split(&blind, ranks), ranks) < turn);
}

#[test]
fn requests_go_to_the_emptiest_rank_longest_first() {
    assert_eq!(split(&[1.0, 5.0, 2.0, 4.0], 2), [0, 0, 1, 1]);
    assert_eq!(split(&[], 2), [] as [usize; 0]);
    assert_eq!(split(&[1.0, 1.0, 1.0], 5), [0, 1, 2]);
    let mut loads = [3.0, 0.0];
    assert_eq!(split_onto(&[1.0, 1.0], &mut loads), [1, 1]);
    assert_eq!(loads, [3.0, 2.0]);
}
