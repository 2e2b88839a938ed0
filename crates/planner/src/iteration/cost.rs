//! What a rank spends on a part of an iteration, in every currency at once.

use crate::cost::{Op, Price};

/// What one rank spends.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Seconds.
    pub seconds: f64,
    /// Standard deviation of the seconds, all ops of a part being wrong in the same direction.
    pub deviation: f64,
    /// Floating-point operations.
    pub flops: f64,
    /// Bytes of memory traffic.
    pub bytes: f64,
    /// Bytes sent to other ranks.
    pub sent: f64,
    /// Seconds that come from measured tables, from the roofline and from the learned predictor.
    pub by_source: [f64; 3],
}

impl Cost {
    pub(super) fn of_op(op: &Op, price: Price) -> Cost {
        Cost { flops: op.flops(), bytes: op.bytes(), ..Cost::of_price(price) }
    }

    pub(super) fn of_price(price: Price) -> Cost {
        let mut by_source = [0.0; 3];
        by_source[price.source as usize] = price.seconds;
        Cost { seconds: price.seconds, deviation: price.seconds * price.sd, by_source, ..Cost::default() }
    }

    fn map(self, other: Cost, f: impl Fn(f64, f64) -> f64) -> Cost {
        let source = |idx: usize| f(self.by_source[idx], other.by_source[idx]);
        Cost {
            seconds: f(self.seconds, other.seconds),
            deviation: f(self.deviation, other.deviation),
            flops: f(self.flops, other.flops),
            bytes: f(self.bytes, other.bytes),
            sent: f(self.sent, other.sent),
            by_source: [source(0), source(1), source(2)],
        }
    }

    pub(crate) fn plus(self, other: Cost) -> Cost {
        self.map(other, |a, b| a + b)
    }
}

/// What is asked of a price: all that is spent ([`Cost`]), or its seconds alone, which take half the time to find.
pub(super) trait Spent: Copy + Default {
    fn of(cost: &Cost) -> Self;
    fn seconds(&self) -> f64;
    fn plus(self, other: Self) -> Self;
    fn times(self, factor: f64) -> Self;
    fn towards(self, other: Self, share: f64) -> Self;
}

impl Spent for Cost {
    fn of(cost: &Cost) -> Cost {
        *cost
    }

    fn seconds(&self) -> f64 {
        self.seconds
    }

    fn plus(self, other: Cost) -> Cost {
        Cost::plus(self, other)
    }

    fn times(self, factor: f64) -> Cost {
        self.map(self, |a, _| a * factor)
    }

    fn towards(self, other: Cost, share: f64) -> Cost {
        self.map(other, |a, b| a + (b - a) * share)
    }
}

impl Spent for f64 {
    fn of(cost: &Cost) -> f64 {
        cost.seconds
    }

    fn seconds(&self) -> f64 {
        *self
    }

    fn plus(self, other: f64) -> f64 {
        self + other
    }

    fn times(self, factor: f64) -> f64 {
        self * factor
    }

    fn towards(self, other: f64, share: f64) -> f64 {
        self + (other - self) * share
    }
}
