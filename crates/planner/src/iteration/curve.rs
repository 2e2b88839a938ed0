//! Costs that are asked for again and again at other sizes: each is worked out on a grid, once, and read off between its
//! points. Between two points everything grows evenly, which is exact for what is affine in the size.

use std::f64::consts::SQRT_2;

use super::Cost;
use super::cost::Spent;

/// Where a size lies: the points below and above, and how far between them. Points are the powers of √2.
fn place(size: f64) -> (usize, usize, f64) {
    let size = size.max(1.0);
    // The power of two at or below, and its number, are the bits of the exponent.
    let exponent = size.to_bits() >> 52;
    let power = f64::from_bits(exponent << 52);
    let doublings = (exponent - 1023) as usize;
    let (low, from, to) = match power * SQRT_2 <= size {
        false => (2 * doublings, power, power * SQRT_2),
        true => (2 * doublings + 1, power * SQRT_2, power * 2.0),
    };
    let share = (size - from) / (to - from);
    if share < 1e-6 { (low, low, 0.0) } else { (low, low + 1, share) }
}

/// The size of a point.
fn point(idx: usize) -> f64 {
    let power = f64::from_bits(((idx / 2) as u64 + 1023) << 52);
    if idx.is_multiple_of(2) { power } else { power * SQRT_2 }
}

/// A cost by one size.
#[derive(Clone, Debug, Default)]
pub(crate) struct Curve {
    points: Vec<Option<Cost>>,
}

impl Curve {
    /// At a size of at least 1 (less counts as 1); `cost` works out a point.
    pub(super) fn at<S: Spent>(&mut self, size: f64, mut cost: impl FnMut(f64) -> Cost) -> S {
        let (low, high, share) = place(size);
        if self.points.len() <= high {
            self.points.resize(high + 1, None);
        }
        let mut get = |idx: usize| S::of(self.points[idx].get_or_insert_with(|| cost(point(idx))));
        get(low).towards(get(high), share)
    }
}

/// A cost by two sizes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Surface {
    rows: Vec<Curve>,
}

impl Surface {
    /// At two sizes of at least 1.
    pub(super) fn at<S: Spent>(&mut self, a: f64, b: f64, mut cost: impl FnMut(f64, f64) -> Cost) -> S {
        let (low, high, share) = place(a);
        if self.rows.len() <= high {
            self.rows.resize(high + 1, Curve::default());
        }
        let below: S = self.rows[low].at(b, |b| cost(point(low), b));
        if low == high {
            return below;
        }
        below.towards(self.rows[high].at(b, |b| cost(point(high), b)), share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: f64) -> Cost {
        Cost { seconds, ..Cost::default() }
    }

    #[test]
    fn what_is_affine_is_exact() {
        let mut curve = Curve::default();
        for size in [1.0, 1.3, 2.0, 7.0, 100.0, 4096.0] {
            let cost: Cost = curve.at(size, |size| seconds(3.0 + 2.0 * size));
            assert!((cost.seconds - (3.0 + 2.0 * size)).abs() < 1e-9 * size, "{size}: {cost:?}");
        }
        let mut surface = Surface::default();
        let cost: Cost = surface.at(5.0, 300.0, |a, b| seconds(a * b));
        assert!((cost.seconds - 1500.0).abs() < 1e-6, "{cost:?}");
    }

    #[test]
    fn a_point_is_worked_out_once() {
        let mut curve = Curve::default();
        let mut calls = 0;
        for _ in 0..3 {
            let _: f64 = curve.at(3.0, |size| {
                calls += 1;
                seconds(size)
            });
        }
        assert_eq!(calls, 2);
    }
}
