//! How well predictions meet measurements.

use serde::Serialize;

use crate::estimate::Estimate;

/// A measurement and its prediction, seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Pair {
    /// Measured.
    pub measured: f64,
    /// Predicted.
    pub predicted: Estimate,
}

impl Pair {
    /// `|predicted / measured - 1|`.
    pub fn error(&self) -> f64 {
        (self.predicted.value / self.measured - 1.0).abs()
    }

    /// Whether the measurement lies in the 90 % interval.
    pub fn inside(&self) -> bool {
        (self.predicted.low..=self.predicted.high).contains(&self.measured)
    }
}

/// Errors of some pairs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Score {
    /// Pairs.
    pub rows: usize,
    /// Half of the errors are below.
    pub median: f64,
    /// Mean of the errors.
    pub mean: f64,
    /// Nine tenths of the errors are below.
    pub p90: f64,
    /// Share of the measurements in their 90 % interval.
    pub inside: f64,
}

impl Score {
    /// `None` without pairs.
    pub fn of<'p>(pairs: impl IntoIterator<Item = &'p Pair>) -> Option<Score> {
        let pairs: Vec<&Pair> = pairs.into_iter().collect();
        let mut errors: Vec<f64> = pairs.iter().map(|pair| pair.error()).collect();
        errors.sort_by(f64::total_cmp);
        let at = |share: f64| errors.get((errors.len().saturating_sub(1) as f64 * share).round() as usize).copied();
        let rows = pairs.len();
        Some(Score {
            rows,
            median: at(0.5)?,
            mean: errors.iter().sum::<f64>() / rows as f64,
            p90: at(0.9)?,
            inside: pairs.iter().filter(|pair| pair.inside()).count() as f64 / rows as f64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_is_of_relative_errors() {
        let pair =
            |value: f64| Pair { measured: 2.0, predicted: Estimate { value, low: value / 1.2, high: value * 1.2 } };
        let pairs = [pair(2.0), pair(2.2), pair(1.0), pair(2.1), pair(6.0)];
        let score = Score::of(&pairs).unwrap();
        assert_eq!((score.rows, score.p90, score.inside), (5, 2.0, 0.6));
        assert!((score.median - 0.1).abs() < 1e-12 && (score.mean - 0.53).abs() < 1e-12);
        assert_eq!(Score::of(&[]), None);
    }
}
