//! Expert load: against counts of tokens that are drawn one by one.

use moesaic_plan::ExpertId;
use moesaic_plan::eplb::RoutingTrace;
use moesaic_planner::load::{ExpertLoad, LoadModel, Straggler};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// `top_k` different experts, all sets equally likely.
fn draw(rng: &mut ChaCha8Rng, experts: usize, top_k: usize) -> Vec<usize> {
    let mut chosen = Vec::with_capacity(top_k);
    while chosen.len() < top_k {
        let expert = rng.random_range(0..experts);
        if !chosen.contains(&expert) {
            chosen.push(expert);
        }
    }
    chosen
}

/// Max over mean of the ranks' rows, sorted, and the mean number of touched experts, counted.
fn counted(tokens: usize, experts: usize, top_k: usize, ranks: usize, layers: usize) -> (Vec<f64>, f64) {
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let (mut all, mut touched) = (Vec::new(), 0.0);
    for _ in 0..layers {
        let mut rows = vec![0_usize; experts];
        for _ in 0..tokens {
            draw(&mut rng, experts, top_k).into_iter().for_each(|expert| rows[expert] += 1);
        }
        assert_eq!(rows.iter().sum::<usize>(), tokens * top_k);
        let max = rows.chunks(experts / ranks).map(|rows| rows.iter().sum::<usize>()).max().unwrap();
        all.push(max as f64 * ranks as f64 / (tokens * top_k) as f64);
        touched += rows.iter().filter(|&&rows| rows > 0).count() as f64 / ranks as f64 / layers as f64;
    }
    all.sort_by(f64::total_cmp);
    (all, touched)
}

#[test]
fn a_uniform_router_is_as_counted() {
    for (tokens, experts, top_k, ranks) in [
        (1, 256, 8, 32),
        (4, 64, 6, 8),
        (32, 256, 8, 64),
        (128, 128, 8, 128),
        (300, 8, 2, 2),
        (700, 256, 8, 8),
        (4096, 64, 4, 16),
    ] {
        let layers = 2_000;
        let (all, touched) = counted(tokens, experts, top_k, ranks, layers);
        let load = ExpertLoad::new(LoadModel::Uniform, experts, top_k).unwrap();
        let spread = load.spread(ranks, 0, false);
        let ours = spread.straggler(tokens as f64);
        let at = |share: f64| all[(share * layers as f64) as usize];
        let mean = all.iter().sum::<f64>() / layers as f64;
        let case = format!(
            "{tokens} tokens, {top_k} of {experts} on {ranks}: {ours:?}; {mean} {} {} {}",
            at(0.5),
            at(0.9),
            at(0.99)
        );
        // 1 %: the error of a mean of 2,000 draws is some tenths; the rest is what binomials that need no whole number miss.
        assert!((ours.mean / mean - 1.0).abs() < 0.015, "{case}");
        // One row more or less is the grain of small counts.
        let grain = ranks as f64 / (tokens * top_k) as f64;
        for (ours, counted) in [(ours.p50, at(0.5)), (ours.p90, at(0.9)), (ours.p99, at(0.99))] {
            assert!((ours - counted).abs() < 0.02 * counted + grain, "{case}");
        }
        assert!((spread.touched(tokens as f64) / touched - 1.0).abs() < 0.01, "{case}: touched {touched}");
    }
}

/// Experts of unequal popularity, chosen independently: the trace of what was drawn gives back what was drawn.
#[test]
fn a_traced_router_is_as_counted() {
    let (experts, top_k, ranks, tokens) = (32, 2, 8, 512);
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut token = || {
        let mut chosen = Vec::new();
        while chosen.len() < top_k {
            // The smaller of two: low numbers are popular.
            let expert = rng.random_range(0..experts).min(rng.random_range(0..experts));
            if !chosen.contains(&expert) {
                chosen.push(expert);
            }
        }
        chosen
    };
    let mut trace = RoutingTrace::new("test", experts, top_k, &[true]);
    for _ in 0..100_000 {
        let chosen: Vec<ExpertId> = token().into_iter().map(|expert| ExpertId(expert as u32)).collect();
        trace.record(0, &chosen);
    }
    let mut sum = 0.0;
    for _ in 0..500 {
        let mut rows = vec![0; ranks];
        (0..tokens).flat_map(|_| token()).for_each(|expert| rows[expert * ranks / experts] += 1);
        sum += *rows.iter().max().unwrap() as f64 * ranks as f64 / (tokens * top_k) as f64 / 500.0;
    }
    let ours = ExpertLoad::traced(&trace).unwrap().straggler(tokens as f64, ranks, 0, false);
    assert!((ours.mean / sum - 1.0).abs() < 0.01, "{ours:?} {sum}");
}

fn models() -> impl Strategy<Value = LoadModel> {
    prop_oneof![
        Just(LoadModel::Uniform),
        (0.0..2.0).prop_map(LoadModel::Zipf),
        (0.0..3.0).prop_map(LoadModel::PowerLaw)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_fullest_has_at_least_the_mean(
        model in models(), tokens in 1.0..1e6, ranks_log in 0_u32..6, replicas in 0_usize..3, balanced in any::<bool>(),
    ) {
        let ranks = 1 << ranks_log;
        let load = ExpertLoad::new(model, 64, 4).unwrap();
        let Straggler { mean, sd, p50, p90, p99 } = load.straggler(tokens, ranks, replicas * ranks, balanced);
        prop_assert!(1.0 - 1e-9 <= p50 && p50 <= p90 && p90 <= p99 && sd >= 0.0);
        prop_assert!((1.0 - 1e-9..=ranks as f64 + 1e-9).contains(&mean) && mean <= p99 * (1.0 + 1e-9), "{}", mean);
        let spread = load.spread(ranks, replicas * ranks, balanced);
        prop_assert!((spread.mean_rows(tokens) * ranks as f64 - 4.0 * tokens).abs() < 1e-6 * tokens);
        prop_assert!(spread.touched(tokens) <= (64.0 + (replicas * ranks) as f64) / ranks as f64 + 1e-9);
    }

    #[test]
    fn more_tokens_are_more_even(ranks_log in 1_u32..9, tokens in 1.0..1e5, more in 1.0..100.0) {
        let load = ExpertLoad::new(LoadModel::Uniform, 256, 8).unwrap();
        let [few, many] = [tokens, tokens * more].map(|tokens| load.straggler(tokens, 1 << ranks_log, 0, false).mean);
        prop_assert!(many <= few * (1.0 + 1e-9), "{few} {many}");
    }

    #[test]
    fn balanced_is_never_worse(model in models(), ranks_log in 1_u32..6, replicas in 0_usize..2, tokens in 1.0..1e6) {
        let ranks = 1 << ranks_log;
        let load = ExpertLoad::new(model, 64, 4).unwrap();
        let [linear, balanced] = [false, true].map(|balanced| load.spread(ranks, replicas * ranks, balanced));
        prop_assert!(balanced.skew() <= linear.skew());
        let [linear, balanced] = [linear, balanced].map(|spread| spread.straggler(tokens).mean);
        prop_assert!(balanced <= linear * (1.0 + 1e-3), "{balanced} {linear}");
    }
}

#[test]
fn many_layers_draw_together() {
    let load = ExpertLoad::new(LoadModel::Uniform, 256, 8).unwrap();
    let one = load.straggler(512.0, 32, 0, false);
    let all = one.over_layers(58);
    assert_eq!(all.mean, one.mean);
    assert!((all.sd - one.sd / 58_f64.sqrt()).abs() < 1e-12 && all.p99 < one.p99 && all.p99 > all.mean);
}

#[test]
fn what_cannot_be_is_refused() {
    let refused = |model, experts, top_k| ExpertLoad::new(model, experts, top_k).unwrap_err().to_string();
    assert!(refused(LoadModel::Uniform, 0, 1).contains("the number of experts is 0"));
    assert!(refused(LoadModel::Uniform, 8, 9).contains("top_k is 9"));
    assert!(refused(LoadModel::Zipf(f64::NAN), 8, 2).contains("from 0 to 100"));
    let empty = RoutingTrace::new("test", 8, 2, &[true]);
    assert!(ExpertLoad::traced(&empty).unwrap_err().to_string().contains("at least 1 in a layer"));
}
