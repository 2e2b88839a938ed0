//! Distributions of times.

use serde::{Deserialize, Serialize};

/// A distribution; all 0 where there is no value.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile: the least value that 90 % do not exceed.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// All percentiles, from the least value to the greatest. `[101]`
    pub percentiles: Vec<f64>,
}

impl Distribution {
    /// Of values.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Distribution {
        Distribution::weighted(values.into_iter().map(|value| (value, 1.0)).collect())
    }

    /// Of values that came up so many times.
    pub fn weighted(mut values: Vec<(f64, f64)>) -> Distribution {
        values.sort_by(|a, b| a.0.total_cmp(&b.0));
        let all: f64 = values.iter().map(|&(_, times)| times).sum();
        let Some(&(greatest, _)) = values.last() else { return Distribution::default() };
        let mut below = 0.0;
        let mut percentiles = Vec::with_capacity(101);
        for &(value, times) in &values {
            below += times;
            while percentiles.len() < 100 && below >= all * percentiles.len() as f64 / 100.0 * (1.0 - 1e-12) {
                percentiles.push(value);
            }
        }
        percentiles.resize(101, greatest);
        let sum: f64 = values.iter().map(|&(value, times)| value * times).sum();
        Distribution { mean: sum / all, p50: percentiles[50], p90: percentiles[90], p99: percentiles[99], percentiles }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_the_least_values_that_so_many_do_not_exceed() {
        let hundred = Distribution::of((1..=100).map(f64::from));
        assert_eq!((hundred.mean, hundred.p50, hundred.p90, hundred.p99), (50.5, 50.0, 90.0, 99.0));
        assert_eq!((hundred.percentiles[0], hundred.percentiles[100]), (1.0, 100.0));
        let weighted = Distribution::weighted(vec![(9.0, 1.0), (1.0, 98.0), (5.0, 1.0)]);
        assert_eq!((weighted.p90, weighted.p99, weighted.percentiles[100]), (1.0, 5.0, 9.0));
        assert_eq!(Distribution::of([]), Distribution::default());
        assert_eq!(Distribution::of([3.0]).percentiles, vec![3.0; 101]);
    }
}
