//! What is lost if the prediction is wrong in favour of the second.

use serde::{Deserialize, Serialize};

use crate::estimate::{Estimate, NINETY};

/// The cost of trusting the prediction.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Regret {
    /// Probability that the runner-up is the faster one.
    pub probability: f64,
    /// Throughput that is lost in expectation, as a share of the best plan's.
    pub expected: f64,
    /// Throughput that is lost if the best is at the low end of its interval and the runner-up at its high end, as a share of
    /// the runner-up's.
    pub worst: f64,
}

/// Of two throughputs whose logarithms err, `shared` of the variance in common: that cancels.
pub fn regret(best: &Estimate, runner_up: &Estimate, shared: f64) -> Regret {
    let own = |estimate: &Estimate| estimate.sd() * (1.0 - shared).sqrt();
    let (behind, sd) = ((runner_up.value / best.value).ln(), own(best).hypot(own(runner_up)));
    let worst = (1.0 - (-behind - NINETY * (own(best) + own(runner_up))).exp()).max(0.0);
    if sd == 0.0 {
        return Regret { probability: f64::from(behind > 0.0), expected: behind.exp_m1().max(0.0), worst };
    }
    let z = behind / sd;
    let density = (-z * z / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let probability = normal(z);
    // E[max(0, x)] of a normal x with this mean and deviation.
    Regret { probability, expected: sd * density + behind * probability, worst }
}

/// The standard normal distribution function. Source: Abramowitz and Stegun, "Handbook of Mathematical Functions", 26.2.17; to
/// 7.5e-8.
fn normal(z: f64) -> f64 {
    const B: [f64; 5] = [0.319381530, -0.356563782, 1.781477937, -1.821255978, 1.330274429];
    let t = 1.0 / (1.0 + 0.2316419 * z.abs());
    let tail =
        B.iter().rev().fold(0.0, |sum, b| (sum + b) * t) * (-z * z / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    if z > 0.0 { 1.0 - tail } else { tail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_are_a_coin_toss() {
        let of = |value: f64| Estimate::new(value, 0.1);
        let even = regret(&of(100.0), &of(100.0), 0.0);
        assert!((even.probability - 0.5).abs() < 1e-6, "{even:?}");
        // sd √2 · 0.1, times the density at 0.
        assert!((even.expected - 0.1414 * 0.3989).abs() < 1e-4, "{even:?}");
        let ahead = regret(&of(100.0), &of(50.0), 0.0);
        assert!(ahead.probability < 1e-6 && ahead.expected < 1e-6 && ahead.worst == 0.0, "{ahead:?}");
        // What both have in common cancels.
        let alike = regret(&of(100.0), &of(100.0), 0.75);
        assert!((alike.expected / even.expected - 0.5).abs() < 1e-6 && alike.worst < even.worst, "{alike:?}");
        assert!((normal(1.645) - 0.95).abs() < 1e-4);
    }
}
