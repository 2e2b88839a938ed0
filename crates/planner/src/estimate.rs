//! Figures with intervals.

use serde::{Deserialize, Serialize};

/// A figure, and between which two it lies nine times out of ten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The median.
    pub value: f64,
    /// Less in one of twenty.
    pub low: f64,
    /// More in one of twenty.
    pub high: f64,
}

/// Standard deviations of a normal distribution to the 5th and the 95th percentile.
pub(crate) const NINETY: f64 = 1.645;

impl Estimate {
    /// With a standard deviation of its natural logarithm.
    pub fn new(value: f64, sd: f64) -> Estimate {
        Estimate { value, low: value * (-NINETY * sd).exp(), high: value * (NINETY * sd).exp() }
    }

    /// So many times as much.
    pub fn times(&self, factor: f64) -> Estimate {
        Estimate { value: self.value * factor, low: self.low * factor, high: self.high * factor }
    }

    /// Not less than a bound.
    pub fn at_least(&self, bound: f64) -> Estimate {
        Estimate { value: self.value.max(bound), low: self.low.max(bound), high: self.high.max(bound) }
    }

    /// Standard deviation of its natural logarithm.
    pub fn sd(&self) -> f64 {
        (self.high / self.low).ln() / (2.0 * NINETY)
    }

    /// With another, independent cause of error, of such a standard deviation of the natural logarithm.
    pub fn widened(&self, sd: f64) -> Estimate {
        let factor = |end: f64| (end / self.value).ln().abs().hypot(NINETY * sd).exp();
        Estimate { value: self.value, low: self.value / factor(self.low), high: self.value * factor(self.high) }
    }

    /// 1 by it.
    pub fn reciprocal(&self) -> Estimate {
        Estimate { value: 1.0 / self.value, low: 1.0 / self.high, high: 1.0 / self.low }
    }
}
