//! What is left of measurements after a curve, interpolated: kriging with a Matérn 5/2 covariance. Source: Rasmussen and
//! Williams, "Gaussian Processes for Machine Learning", 2006, algorithm 2.1 and section 5.4.2.
//!
//! A search asks for a price so often that it must take a microsecond: so all points weigh in by weights that are worked out
//! once, and scales have a prior, because some operations have few points.

use super::fit::compass;

/// Coordinates of a point.
pub(super) const DIMS: usize = 7;

/// How residuals vary.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Scales {
    /// Standard deviation of what varies smoothly.
    pub(super) smooth: f64,
    /// Standard deviation of what does not.
    pub(super) noise: f64,
    /// Distance along each coordinate over which residuals are alike.
    pub(super) lengths: [f64; DIMS],
}

/// Before any measurement: an eighth or so that varies over two e-folds of size, and some percent of noise; each within a
/// factor of e.
const PRIOR: Scales = Scales { smooth: 0.15, noise: 0.03, lengths: [2.0; DIMS] };

/// Residuals of a set of points.
#[derive(Clone, Debug)]
pub(super) struct Kriging {
    scales: Scales,
    points: Vec<[f64; DIMS]>,
    /// Inverse covariance times residuals.
    weights: Vec<f64>,
}

impl Scales {
    pub(super) fn values(&self) -> [f64; 2 + DIMS] {
        std::array::from_fn(|idx| match idx {
            0 => self.smooth,
            1 => self.noise,
            dim => self.lengths[dim - 2],
        })
    }

    pub(super) fn from_values(values: &[f64; 2 + DIMS]) -> Self {
        Scales { smooth: values[0], noise: values[1], lengths: std::array::from_fn(|dim| values[2 + dim]) }
    }

    /// The likeliest for some residuals.
    pub(super) fn fit(points: &[[f64; DIMS]], residuals: &[f64]) -> Self {
        let prior = PRIOR.values();
        let unlikely = |values: &[f64; 2 + DIMS]| {
            let off: f64 = values.iter().zip(prior).map(|(value, prior)| (value / prior).ln().powi(2) / 2.0).sum();
            off + Scales::from_values(values).unlikely(points, residuals)
        };
        let differs = |dim: usize| points.iter().any(|point| point[dim] != points[0][dim]);
        let told: Vec<usize> =
            [0, 1].into_iter().chain((0..DIMS).filter(|&dim| differs(dim)).map(|dim| dim + 2)).collect();
        Scales::from_values(&compass(prior, &told, 0.05, unlikely))
    }

    /// Minus the logarithm of the likelihood, without what is constant.
    fn unlikely(&self, points: &[[f64; DIMS]], residuals: &[f64]) -> f64 {
        let factor = self.factor(points);
        let half = solve_lower(&factor, residuals);
        let fit: f64 = half.iter().map(|value| value * value).sum();
        fit / 2.0 + factor.iter().map(|row| row[row.len() - 1].ln()).sum::<f64>()
    }

    fn alike(&self, a: &[f64; DIMS], b: &[f64; DIMS]) -> f64 {
        let squares: f64 = (0..DIMS).map(|dim| ((a[dim] - b[dim]) / self.lengths[dim]).powi(2)).sum();
        let far = (5.0 * squares).sqrt();
        self.smooth * self.smooth * (1.0 + far + far * far / 3.0) * (-far).exp()
    }

    /// Lower Cholesky factor of the points' covariance; the noise keeps it regular.
    fn factor(&self, points: &[[f64; DIMS]]) -> Vec<Vec<f64>> {
        let mut factor: Vec<Vec<f64>> = Vec::with_capacity(points.len());
        for (row, point) in points.iter().enumerate() {
            let mut values = Vec::with_capacity(row + 1);
            for (col, other) in points[..row].iter().enumerate() {
                let known: f64 = (0..col).map(|k| values[k] * factor[col][k]).sum();
                values.push((self.alike(point, other) - known) / factor[col][col]);
            }
            let known: f64 = values.iter().map(|value: &f64| value * value).sum();
            let own = self.smooth * self.smooth + self.noise * self.noise;
            values.push((own - known).max(1e-12).sqrt());
            factor.push(values);
        }
        factor
    }
}

impl Kriging {
    pub(super) fn new(scales: Scales, points: Vec<[f64; DIMS]>, residuals: &[f64]) -> Self {
        let factor = scales.factor(&points);
        let weights = solve_upper(&factor, solve_lower(&factor, residuals));
        Kriging { scales, points, weights }
    }

    /// Expected residual at a point, and its standard deviation as the nearest point alone would make it: all points together
    /// would take time by the square of their number, and are not much surer, because residuals vary over short distances.
    pub(super) fn at(&self, point: &[f64; DIMS]) -> (f64, f64) {
        let (mut mean, mut nearest) = (0.0, 0.0_f64);
        for (other, weight) in self.points.iter().zip(&self.weights) {
            let alike = self.scales.alike(point, other);
            mean += alike * weight;
            nearest = nearest.max(alike);
        }
        let [smooth, noise] = [self.scales.smooth, self.scales.noise].map(|sd| sd * sd);
        (mean, (smooth + noise - nearest * nearest / (smooth + noise)).sqrt())
    }
}

fn solve_lower(factor: &[Vec<f64>], right: &[f64]) -> Vec<f64> {
    let mut solved = Vec::with_capacity(right.len());
    for (row, &value) in factor.iter().zip(right) {
        let known: f64 = row.iter().zip(&solved).map(|(a, b)| a * b).sum();
        solved.push((value - known) / row[row.len() - 1]);
    }
    solved
}

fn solve_upper(factor: &[Vec<f64>], mut right: Vec<f64>) -> Vec<f64> {
    for row in (0..right.len()).rev() {
        right[row] /= factor[row][row];
        for col in 0..row {
            right[col] -= factor[row][col] * right[row];
        }
    }
    right
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Near a point its residual, far from all nothing, and the interval grows in between.
    #[test]
    fn residuals_hold_near_their_points() {
        let point = |x: f64| [x, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        let points: Vec<_> = (0..20).map(|idx| point(f64::from(idx) * 0.5)).collect();
        let residuals: Vec<f64> = points.iter().map(|point| 0.2 * point[0].sin()).collect();
        let kriging = Kriging::new(Scales::fit(&points, &residuals), points, &residuals);
        let (between, near) = kriging.at(&point(3.25));
        assert!((between - 0.2 * 3.25_f64.sin()).abs() < 0.01, "{between}");
        let (nothing, far) = kriging.at(&point(100.0));
        assert!(nothing.abs() < 1e-6 && far > 3.0 * near, "{nothing} {far} {near}");
    }
}
