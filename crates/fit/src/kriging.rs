//! Local simple kriging: what is known near a place says what to expect there, and how surely.
//!
//! Values are those of a Gaussian process of mean 0. Two points at the scaled distance `d = √Σ ((aᵢ - bᵢ) / scaleᵢ)²` have the
//! Matérn-5/2 covariance `sill (1 + √5 d + 5 d² / 3) exp(-√5 d)`; each measured value has noise of variance `nugget`. Far from
//! all points the mean goes to 0 and the variance to `sill + nugget`. Source: Rasmussen and Williams, "Gaussian Processes
//! for Machine Learning", 2006, sections 2.2, 4.2 and 5.4.
//!
//! Only the nearest points take part, so that a prediction costs about the same among a hundred points as among ten
//! thousand.

use std::f64::consts::LOG2_E;

use serde::{Deserialize, Serialize};

/// Points that a prediction is made from.
const NEIGHBOURS: usize = 48;
/// Points that one is made from while scales are looked for, where the order of candidates counts and not the last digit.
const NEIGHBOURS_OF_FIT: usize = 24;
/// Most points whose own prediction is looked at for one candidate.
const TARGETS_OF_FIT: usize = 250;
/// Least variance of noise, as a share of the sill: it keeps the equations solvable where two points are one.
const LEAST_NOISE: f64 = 1e-6;

/// What was measured somewhere.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Coordinates `[dimensions]`.
    pub at: Vec<f64>,
    /// The value there.
    pub value: f64,
}

/// What to expect somewhere.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// Expected value.
    pub mean: f64,
    /// Standard deviation of a new measurement, its noise included.
    pub sd: f64,
    /// To the nearest point, in length scales; infinite without points.
    pub distance: f64,
}

/// Points, and how values change between them.
#[derive(Clone, Debug, PartialEq)]
pub struct Kriging {
    /// Coordinates over scales, point by point `[points, dimensions]`.
    scaled: Vec<f64>,
    values: Vec<f64>,
    scales: Vec<f64>,
    sill: f64,
    nugget: f64,
}

impl Kriging {
    /// Length scales `[dimensions]` and variances that are known already.
    ///
    /// # Panics
    ///
    /// If a number is not finite, a scale or the sill is not above zero, the nugget is negative, or a point has another
    /// number of coordinates than there are scales.
    pub fn new(points: Vec<Point>, scales: Vec<f64>, sill: f64, nugget: f64) -> Self {
        assert!(scales.iter().all(|s| *s > 0.0 && s.is_finite()), "length scales {scales:?}");
        assert!(sill > 0.0 && sill.is_finite() && nugget >= 0.0 && nugget.is_finite(), "sill {sill}, nugget {nugget}");
        let mut scaled = Vec::with_capacity(points.len() * scales.len());
        for Point { at, value } in &points {
            assert_eq!(at.len(), scales.len(), "coordinates of a point");
            assert!(value.is_finite() && at.iter().all(|x| x.is_finite()), "{value} at {at:?}");
            scaled.extend(at.iter().zip(&scales).map(|(x, scale)| x / scale));
        }
        Kriging { scaled, values: points.iter().map(|p| p.value).collect(), scales, sill, nugget }
    }

    /// Learns scales, sill and nugget: those under which each point is the most likely, given the others. A search along one
    /// coordinate after another in smaller and smaller steps, from `start` `[dimensions]`.
    ///
    /// With `groups` `[points]`, points of the same group are no help for each other: what is learned then suits
    /// predictions for groups that are not there.
    ///
    /// # Panics
    ///
    /// As [`Kriging::new`] does, or if there are not as many groups as points.
    pub fn fit(points: Vec<Point>, start: &[f64], groups: Option<&[usize]>) -> Self {
        assert!(groups.is_none_or(|groups| groups.len() == points.len()), "a group for each point");
        let variance = points.iter().map(|p| p.value * p.value).sum::<f64>() / points.len().max(1) as f64;
        if points.len() < 3 || variance == 0.0 {
            return Kriging::new(points, start.to_vec(), variance.max(1e-12), 0.0);
        }
        // Logarithms of the scales, and of the nugget over the sill.
        let mut at: Vec<f64> = start.iter().map(|s| s.ln()).chain([0.01_f64.ln()]).collect();
        let candidate = |at: &[f64]| {
            let (noise, scales) = at.split_last().expect("the nugget");
            Kriging::new(points.clone(), scales.iter().map(|s| s.exp()).collect(), 1.0, noise.exp())
        };
        let mut best = candidate(&at).surprise(groups);
        let mut step = 1.4;
        while step > 0.2 {
            let before = best.0;
            for coordinate in 0..at.len() {
                for change in [step, -step] {
                    let mut moved = at.clone();
                    // Beyond these a coordinate either does not count or is all that counts.
                    moved[coordinate] = (moved[coordinate] + change).clamp(-12.0, 7.0);
                    let surprise = candidate(&moved).surprise(groups);
                    if surprise.0 < best.0 {
                        (at, best) = (moved, surprise);
                        break;
                    }
                }
            }
            if before - best.0 < 0.01 {
                step /= 2.0;
            }
        }
        let (mut kriging, sill) = (candidate(&at), best.1);
        (kriging.sill, kriging.nugget) = (sill, sill * kriging.nugget);
        kriging
    }

    /// Length scale of each coordinate.
    pub fn scales(&self) -> &[f64] {
        &self.scales
    }

    /// Variance of values far from each other.
    pub fn sill(&self) -> f64 {
        self.sill
    }

    /// Variance of a measurement's noise.
    pub fn nugget(&self) -> f64 {
        self.nugget
    }

    /// What to expect at `at` `[dimensions]`.
    pub fn predict(&self, at: &[f64]) -> Estimate {
        assert_eq!(at.len(), self.scales.len(), "coordinates of a place");
        let scaled: Vec<f64> = at.iter().zip(&self.scales).map(|(x, scale)| x / scale).collect();
        self.estimate(&scaled, NEIGHBOURS, |_| true)
    }

    /// What to expect at each point from all other points.
    pub fn leave_one_out(&self) -> Vec<Estimate> {
        (0..self.values.len()).map(|out| self.estimate(self.scaled(out), NEIGHBOURS, |idx| idx != out)).collect()
    }

    /// What to expect at each point from the points of all other groups; `groups` `[points]`.
    pub fn leave_group_out(&self, groups: &[usize]) -> Vec<Estimate> {
        assert_eq!(groups.len(), self.values.len(), "a group for each point");
        let others = |out: usize| move |idx: usize| groups[idx] != groups[out];
        (0..self.values.len()).map(|out| self.estimate(self.scaled(out), NEIGHBOURS, others(out))).collect()
    }

    /// How unlikely the points are, given their neighbours: twice the mean of -ln(density), less a constant, under the sill
    /// that makes it least; and that sill, in units of the present one.
    fn surprise(&self, groups: Option<&[usize]>) -> (f64, f64) {
        let stride = self.values.len().div_ceil(TARGETS_OF_FIT);
        let targets: Vec<usize> = (0..self.values.len()).step_by(stride).collect();
        let (mut logs, mut squares) = (0.0, 0.0);
        for &out in &targets {
            let used = |idx: usize| groups.map_or(idx != out, |groups| groups[idx] != groups[out]);
            let estimate = self.estimate(self.scaled(out), NEIGHBOURS_OF_FIT, used);
            let variance = estimate.sd * estimate.sd;
            logs += variance.ln();
            squares += (self.values[out] - estimate.mean).powi(2) / variance;
        }
        let n = targets.len() as f64;
        let sill = (squares / n).max(1e-12);
        (logs / n + sill.ln(), sill)
    }

    fn scaled(&self, idx: usize) -> &[f64] {
        &self.scaled[idx * self.scales.len()..(idx + 1) * self.scales.len()]
    }

    fn estimate(&self, at: &[f64], neighbours: usize, used: impl Fn(usize) -> bool) -> Estimate {
        let mut near: Vec<(f64, usize)> = (0..self.values.len())
            .filter(|&idx| used(idx))
            .map(|idx| (distance_squared(at, self.scaled(idx)), idx))
            .collect();
        // Ties go by index, so that the order of equals is no accident.
        let nearer = |a: &(f64, usize), b: &(f64, usize)| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1));
        if near.len() > neighbours {
            near.select_nth_unstable_by(neighbours, nearer);
            near.truncate(neighbours);
        }
        near.sort_unstable_by(nearer);
        let Some(nearest) = near.first() else {
            return Estimate { mean: 0.0, sd: (self.sill + self.nugget).sqrt(), distance: f64::INFINITY };
        };

        let noise = self.nugget.max(LEAST_NOISE * self.sill);
        let covariance = |d2: f64| self.sill * matern(d2);
        let mut upper = self.squares_between(&near);
        for (i, row) in upper.chunks_exact_mut(near.len()).enumerate() {
            row[i..].iter_mut().for_each(|d2| *d2 = covariance(*d2));
        }
        let covariances: Vec<f64> = near.iter().map(|(d2, _)| covariance(*d2)).collect();
        let values: Vec<f64> = near.iter().map(|(_, idx)| self.values[*idx]).collect();
        // With K = L Lᵀ: the mean is (L⁻¹ k)ᵀ (L⁻¹ y), and |L⁻¹ k|² is how much the neighbours explain.
        let [covariances, values] = solve_half(&mut upper, self.sill + noise, [covariances, values]);
        let explained: f64 = covariances.iter().map(|c| c * c).sum();
        Estimate {
            mean: covariances.iter().zip(&values).map(|(c, v)| c * v).sum(),
            sd: ((self.sill - explained).max(0.0) + noise).sqrt(),
            distance: nearest.0.sqrt(),
        }
    }

    /// Squared distances of all pairs of points, row by row `[points, points]`, of which only the upper triangle is worked out.
    fn squares_between(&self, points: &[(f64, usize)]) -> Vec<f64> {
        let n = points.len();
        let mut squares = vec![0.0; n * n];
        let mut along = vec![0.0; n];
        for dim in 0..self.scales.len() {
            for (x, (_, idx)) in along.iter_mut().zip(points) {
                *x = self.scaled(*idx)[dim];
            }
            // Neighbours often agree in most coordinates.
            if along.iter().all(|x| *x == along[0]) {
                continue;
            }
            for (i, row) in squares.chunks_exact_mut(n).enumerate() {
                let x = along[i];
                row[i..].iter_mut().zip(&along[i..]).for_each(|(sum, y)| *sum += (x - y) * (x - y));
            }
        }
        squares
    }
}

/// In four sums, so that an addition need not wait for the last one.
fn distance_squared(a: &[f64], b: &[f64]) -> f64 {
    let (a, a_rest) = a.as_chunks::<4>();
    let (b, b_rest) = b.as_chunks::<4>();
    let mut sums = [0.0; 4];
    for (a, b) in a.iter().zip(b) {
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += (a[lane] - b[lane]) * (a[lane] - b[lane]);
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| (a - b) * (a - b)).sum();
    (sums[0] + sums[1]) + (sums[2] + sums[3]) + rest
}

/// Correlation at the squared distance.
fn matern(d2: f64) -> f64 {
    let root = (5.0 * d2).sqrt();
    (1.0 + root + 5.0 * d2 / 3.0) * exp_of_minus(root)
}

/// `e^-x` of x from 0, to 1e-14 of it. Unlike the library's it has no branch, so that a loop takes several at a time.
fn exp_of_minus(x: f64) -> f64 {
    // Added to a number, leaves its nearest integer in the last bits.
    const ROUND: f64 = 1.5 * (1u64 << 52) as f64;
    // ln 2 in two parts, the first of which times a small integer is exact.
    const LN_2_HIGH: f64 = 0.693_147_180_369_123_8;
    const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    // Less is nothing beside anything.
    let x = x.min(700.0);
    let rounded = x * LOG2_E + ROUND;
    let halvings = rounded - ROUND;
    let rest = (halvings * LN_2_HIGH - x) + halvings * LN_2_LOW;
    // At most ln 2 / 2, so that the series ends soon.
    let series = TAYLOR.iter().fold(0.0, |sum, factor| sum * rest + factor);
    let exponent = 1023u64.wrapping_sub(rounded.to_bits().wrapping_sub(ROUND.to_bits()));
    series * f64::from_bits(exponent << 52)
}

/// Factors of the exponential's series, 1 / 12! to 1 / 0!.
const TAYLOR: [f64; 13] = [
    1.0 / 479001600.0,
    1.0 / 39916800.0,
    1.0 / 3628800.0,
    1.0 / 362880.0,
    1.0 / 40320.0,
    1.0 / 5040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    1.0 / 2.0,
    1.0,
    1.0,
];

/// Replaces the upper triangle of a symmetric positive definite matrix `[n, n]`, whose diagonal is `diagonal`, by Lᵀ of its
/// Cholesky factor L, and gives L⁻¹ b for each b `[n]`. Row by row, and in each row all that a pivot changes at once.
fn solve_half<const SIDES: usize>(upper: &mut [f64], diagonal: f64, mut sides: [Vec<f64>; SIDES]) -> [Vec<f64>; SIDES] {
    let n = sides[0].len();
    for i in 0..n {
        upper[i * n + i] = diagonal;
    }
    for pivot in 0..n {
        let (done, below) = upper.split_at_mut((pivot + 1) * n);
        let row = &mut done[pivot * n + pivot..];
        // Noise on the diagonal keeps this far above rounding.
        let root = row[0].max(f64::MIN_POSITIVE).sqrt();
        row.iter_mut().for_each(|value| *value /= root);
        for (idx, other) in below.chunks_exact_mut(n).enumerate() {
            subtract(&mut other[pivot + 1 + idx..], &row[1 + idx..], row[1 + idx]);
        }
        for side in &mut sides {
            side[pivot] /= root;
            let solved = side[pivot];
            subtract(&mut side[pivot + 1..], &row[1..], solved);
        }
    }
    sides
}

/// `from -= factor · what`.
fn subtract(from: &mut [f64], what: &[f64], factor: f64) {
    from.iter_mut().zip(what).for_each(|(value, what)| *value -= factor * what);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::uniform;

    fn points(n: usize, f: impl Fn(&[f64]) -> f64) -> Vec<Point> {
        let at = |p: usize| (0..3).map(|i| 6.0 * uniform(3, (p * 3 + i) as u64)).collect::<Vec<f64>>();
        (0..n).map(|p| Point { value: f(&at(p)), at: at(p) }).collect()
    }

    /// Smooth in the first coordinate, steep in the second, the same along the third.
    fn surface(at: &[f64]) -> f64 {
        (0.3 * at[0]).sin() + 0.5 * (2.0 * at[1]).sin()
    }

    #[test]
    fn points_without_noise_are_met_and_far_places_know_nothing() {
        let points = points(40, surface);
        let kriging = Kriging::new(points.clone(), vec![3.0, 1.0, 5.0], 0.7, 0.0);
        for Point { at, value } in &points {
            let there = kriging.predict(at);
            assert!(
                (there.mean - value).abs() < 1e-3 && there.sd < 0.01 && there.distance == 0.0,
                "{there:?}, {value}"
            );
        }
        let far = kriging.predict(&[1e3, 1e3, 1e3]);
        assert!(far.mean.abs() < 1e-9 && (far.sd - 0.7_f64.sqrt()).abs() < 1e-6 && far.distance > 100.0, "{far:?}");
        let empty = Kriging::new(Vec::new(), vec![1.0], 4.0, 0.0).predict(&[0.0]);
        assert_eq!(empty, Estimate { mean: 0.0, sd: 2.0, distance: f64::INFINITY });
    }

    /// Against the plain solution of `K w = k` by elimination, with all points.
    #[test]
    fn few_points_give_what_the_textbook_says() {
        let points = points(6, surface);
        let (scales, sill, nugget) = (vec![2.0, 1.0, 4.0], 1.3, 0.1);
        let covariance = |a: &[f64], b: &[f64]| {
            let d = (0..3).map(|i| ((a[i] - b[i]) / scales[i]).powi(2)).sum::<f64>().sqrt();
            let r = 5.0_f64.sqrt() * d;
            sill * (1.0 + r + r * r / 3.0) * (-r).exp()
        };
        let at = [2.0, 3.0, 1.0];
        let n = points.len();
        let mut rows: Vec<Vec<f64>> = (0..n)
            .map(|i| {
                let mut row: Vec<f64> = (0..n).map(|j| covariance(&points[i].at, &points[j].at)).collect();
                row[i] += nugget;
                row.push(covariance(&points[i].at, &at));
                row
            })
            .collect();
        for i in 0..n {
            let pivot = rows[i].clone();
            for j in (0..n).filter(|&j| j != i) {
                let factor = rows[j][i] / pivot[i];
                rows[j].iter_mut().zip(&pivot).for_each(|(x, p)| *x -= factor * p);
            }
        }
        let weights: Vec<f64> = (0..n).map(|i| rows[i][n] / rows[i][i]).collect();
        let mean: f64 = weights.iter().zip(&points).map(|(w, p)| w * p.value).sum();
        let explained: f64 = weights.iter().zip(&points).map(|(w, p)| w * covariance(&p.at, &at)).sum();
        let estimate = Kriging::new(points, scales.clone(), sill, nugget).predict(&at);
        assert!((estimate.mean - mean).abs() < 1e-9, "{estimate:?}, {mean}");
        assert!((estimate.sd - (sill + nugget - explained).sqrt()).abs() < 1e-9, "{estimate:?}");
    }

    #[test]
    fn exponentials_are_the_librarys() {
        for step in 0..70_000 {
            let x = f64::from(step) * 0.01;
            let (ours, librarys) = (exp_of_minus(x), (-x).exp());
            assert!((ours / librarys - 1.0).abs() < 1e-14, "{x}: {ours:e}, {librarys:e}");
        }
        assert!(exp_of_minus(1e9) < 1e-300);
    }

    #[test]
    fn what_is_left_out_has_no_say() {
        let mut points = points(60, surface);
        let before = Kriging::new(points.clone(), vec![3.0, 1.0, 5.0], 0.7, 1e-4);
        points[17].value += 100.0;
        let after = Kriging::new(points, vec![3.0, 1.0, 5.0], 0.7, 1e-4);
        assert_eq!(before.leave_one_out()[17], after.leave_one_out()[17]);
        assert_ne!(before.leave_one_out()[18], after.leave_one_out()[18]);
        let groups: Vec<usize> = (0..60).map(|p| p / 20).collect();
        let (before, after) = (before.leave_group_out(&groups), after.leave_group_out(&groups));
        assert_eq!(before[..20], after[..20]);
        assert_ne!(before[20..], after[20..]);
    }

    #[test]
    fn scales_are_learned_and_intervals_hold() {
        // Noise of a known deviation on top.
        let noise = |p: usize| 0.05 * 12.0_f64.sqrt() * (uniform(11, p as u64) - 0.5);
        let mut all = points(400, surface);
        all.iter_mut().enumerate().for_each(|(p, point)| point.value += noise(p));
        let test = all.split_off(300);
        let kriging = Kriging::fit(all.clone(), &[1.0, 1.0, 1.0], None);
        let scales = kriging.scales();
        assert!(scales[1] < scales[0] && scales[0] < scales[2], "{scales:?}");
        let noise = kriging.nugget().sqrt();
        assert!((0.03..0.08).contains(&noise), "{noise}");
        let errors: Vec<(f64, f64)> =
            test.iter().map(|p| (kriging.predict(&p.at), p.value)).map(|(e, v)| ((e.mean - v).abs(), e.sd)).collect();
        let mean = errors.iter().map(|(e, _)| e).sum::<f64>() / 100.0;
        assert!(mean < 0.08, "{mean}");
        let inside = errors.iter().filter(|(e, sd)| *e < 1.645 * sd).count();
        assert!((80..=98).contains(&inside), "{inside} of 100 in the 90 % interval");
        assert_eq!(kriging, Kriging::fit(all, &[1.0, 1.0, 1.0], None));
    }
}
