//! Whether the fullest rank has more than its share, or chance only made it look so.
//!
//! Tokens are no independent draws: those of one sequence stay with its topic, possibly for the whole window and for the next
//! as well. No look at the time series of a window can see how long; but sequences are independent of one another. So the
//! variance of a rank's share is estimated between groups of sequences (streams), with the jackknife for ratios: leave out
//! one stream, and see how much the share changes.

/// Fewer independent streams than this say nothing.
const MIN_STREAMS: f64 = 4.0;

/// The probability that some rank has so great a share of the load by chance, if in truth all have the same: the least
/// over the ranks, not corrected for their number. `None` if there are too few streams to say.
///
/// `streams[c][r]` is the load that stream `c` brought to rank `r`. The share of rank `r` is `s = Σ x_c / Σ t_c`, with
/// `x_c` its load and `t_c` that of all ranks. Without stream `c` it changes by `(x_c - s t_c) / (Σ t - t_c)`; the sum of
/// the squares, times `(n - 1) / n`, estimates the variance of `s` (Efron, *The Jackknife, the Bootstrap and Other
/// Resampling Plans*, 1982). It is never taken to be less than that of independent tokens, `s (1 - s) / Σ t`. Then
/// `(s - 1 / R) / σ` is compared with Student's t of `n_eff - 1` degrees of freedom, `n_eff = (Σ t)² / Σ t²`.
pub(super) fn excess(streams: &[Vec<f64>]) -> Option<f64> {
    let totals: Vec<f64> = streams.iter().map(|ranks| ranks.iter().sum()).collect();
    let total: f64 = totals.iter().sum();
    let squares: f64 = totals.iter().map(|t| t * t).sum();
    let effective = total * total / squares;
    // Also where nothing was counted (0 / 0).
    if effective.is_nan() || effective < MIN_STREAMS {
        return None;
    }
    let num_ranks = streams[0].len();
    let n = totals.iter().filter(|&&t| t > 0.0).count() as f64;
    let p_value = |rank: usize| {
        let share = streams.iter().map(|ranks| ranks[rank]).sum::<f64>() / total;
        let change = |(ranks, t): (&Vec<f64>, &f64)| (ranks[rank] - share * t) / (total - t);
        let jackknife: f64 = streams.iter().zip(&totals).map(change).map(|change| change * change).sum();
        let variance = (jackknife * (n - 1.0) / n).max(share * (1.0 - share) / total);
        let excess = share - 1.0 / num_ranks as f64;
        // A share of 1 has no variance, and of one rank no excess.
        if excess <= 0.0 { 1.0 } else { t_tail(excess / variance.sqrt(), effective - 1.0) }
    };
    (0..num_ranks).map(p_value).reduce(f64::min)
}

/// The part of the allowed probability of a false alarm that is spent on the `look`-th look, from 1. All parts together
/// make 1, so however long nothing changes, the probability of *ever* moving stays below what was allowed: sums of
/// `1 / (n ln² n)` converge, and more slowly than most, so late looks are not blind.
pub(super) fn spent(look: u64) -> f64 {
    /// Σ 1 / (n ln² n), n from 2.
    const SUM: f64 = 2.109_742_8;
    let n = (look + 1) as f64;
    1.0 / (n * n.ln().powi(2) * SUM)
}

/// P(T > t) for Student's t with `df` degrees of freedom, t ≥ 0.
fn t_tail(t: f64, df: f64) -> f64 {
    if t.is_infinite() {
        return 0.0;
    }
    0.5 * incomplete_beta(df / 2.0, 0.5, df / (df + t * t))
}

/// The regularised incomplete beta function, by its continued fraction (Abramowitz and Stegun, 26.5.8) after Lentz.
fn incomplete_beta(a: f64, b: f64, x: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return x.clamp(0.0, 1.0);
    }
    // The fraction converges fast on this side of the mean.
    if x > (a + 1.0) / (a + b + 2.0) {
        return 1.0 - incomplete_beta(b, a, 1.0 - x);
    }
    let front = (ln_gamma(a + b) - ln_gamma(a) - ln_gamma(b) + a * x.ln() + b * (1.0 - x).ln()).exp() / a;
    let away_from_zero = |v: f64| if v.abs() < 1e-300 { 1e-300 } else { v };
    let (mut c, mut d) = (1.0, 1.0 / away_from_zero(1.0 - (a + b) * x / (a + 1.0)));
    let mut fraction = d;
    for m in 1..300 {
        let m = f64::from(m);
        let even = m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m));
        let odd = -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0));
        let mut last = 1.0;
        for term in [even, odd] {
            d = 1.0 / away_from_zero(1.0 + term * d);
            c = away_from_zero(1.0 + term / c);
            last = c * d;
            fraction *= last;
        }
        if (last - 1.0).abs() < 1e-14 {
            break;
        }
    }
    front * fraction
}

/// Logarithm of the gamma function for x > 0, by Stirling's series after shifting x beyond 10, where its first four terms
/// are exact to 1e-12.
fn ln_gamma(mut x: f64) -> f64 {
    let mut shift = 0.0;
    while x < 10.0 {
        shift -= x.ln();
        x += 1.0;
    }
    let inverse = 1.0 / (x * x);
    let series = (1.0 / 12.0 - inverse * (1.0 / 360.0 - inverse * (1.0 / 1260.0 - inverse / 1680.0))) / x;
    shift + (x - 0.5) * x.ln() - x + 0.5 * (2.0 * std::f64::consts::PI).ln() + series
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tails_of_students_t_are_those_of_the_tables() {
        // Closed forms: 1 degree of freedom is Cauchy's distribution, 2 has an algebraic one.
        for t in [0.0, 0.3, 1.0, 4.0, 30.0, 1e4] {
            let cauchy = 0.5 - f64::atan(t) / std::f64::consts::PI;
            assert!((t_tail(t, 1.0) / cauchy - 1.0).abs() < 1e-7, "{t}: {} {cauchy}", t_tail(t, 1.0));
            let two = 1.0 / ((2.0 + t * t) * (1.0 + t / (2.0 + t * t).sqrt()));
            assert!((t_tail(t, 2.0) / two - 1.0).abs() < 1e-9, "{t}: {} {two}", t_tail(t, 2.0));
        }
        // Tables: the 0.5 % point of 15, the 2.5 % point of 31 degrees of freedom.
        assert!((t_tail(2.946_713, 15.0) - 0.005).abs() < 1e-7);
        assert!((t_tail(2.039_513, 31.0) - 0.025).abs() < 1e-7);
    }

    #[test]
    fn all_looks_together_spend_what_is_allowed() {
        let looks = 1_000_000u64;
        let sum: f64 = (1..=looks).map(spent).sum();
        // The rest of the series is about the integral, 1 / ln n.
        let rest = 1.0 / (2.109_742_8 * (looks as f64 + 1.5).ln());
        assert!((sum + rest - 1.0).abs() < 1e-6, "{sum} + {rest}");
    }

    #[test]
    fn few_streams_say_nothing_and_many_say_what_they_agree_on() {
        let skewed = |n: usize| (0..n).map(|c| vec![60.0 + (c % 3) as f64, 40.0]).collect::<Vec<_>>();
        assert_eq!(excess(&skewed(3)), None);
        assert_eq!(excess(&[vec![0.0, 0.0], vec![0.0, 0.0]]), None);
        assert!(excess(&skewed(16)).unwrap() < 1e-6);
        // As great an excess in the mean, but from two of the streams only.
        let two: Vec<Vec<f64>> = (0..16).map(|c| if c < 2 { vec![100.0, 0.0] } else { vec![55.0, 45.0] }).collect();
        assert!(excess(&two).unwrap() > 1e-3);
        // One stream that outweighs the others is not many.
        let mut heavy = skewed(16);
        heavy[0] = vec![6e5, 4e5];
        assert_eq!(excess(&heavy), None);
    }
}
