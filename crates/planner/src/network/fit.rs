//! Curves from measurements: robust least squares on ln(measured / curve).

use super::Curve;
use super::calibration::on_measured_links;
use super::published::Measured;

/// Residuals beyond this count by their size and no longer by their square: tables have outliers.
const OUTLIER: f64 = 0.1;

/// Parameters that measurements of an operation can tell, in the order of [`Curve::values`].
fn told(op: &str) -> &'static [usize] {
    match op {
        "deepep_ll_dispatch" => &[0, 2, 3, 4, 5, 6, 7, 8],
        "deepep_ll_combine" => &[0, 2, 3, 4, 5, 6, 8],
        "deepep_normal_dispatch" | "deepep_normal_combine" => &[0, 3, 4, 5, 6, 8],
        _ => &[0, 1, 5, 8],
    }
}

/// The two shares of bandwidth among them.
const SHARES: std::ops::Range<usize> = 5..7;

/// From here the search starts: microseconds, most of the bandwidth.
const START: Curve = Curve {
    latency_s: 7e-6,
    per_rank_s: 0.5e-6,
    per_wave_s: 1e-6,
    other_nodes_s: 5e-6,
    per_doubling_s: 3e-6,
    intra_share: 0.7,
    inter_share: 0.8,
    cast_s: 2e-6,
    gradual: 0.2,
};

/// Fits a curve; shares end at 1.
pub(super) fn fit(op: &str, measured: &[Measured]) -> Curve {
    let loss = |values: &[f64; 9]| -> f64 {
        if values[SHARES].iter().any(|&share| share > 1.0) {
            return f64::INFINITY;
        }
        let curve = Curve::from_values(*values);
        let one = |row: &Measured| {
            let off = (row.seconds / on_measured_links(&curve, row)).ln() / OUTLIER;
            (1.0 + off * off).sqrt() - 1.0
        };
        measured.iter().map(one).sum()
    };
    let told = told(op);
    let mut start = START.values();
    for (idx, value) in start.iter_mut().enumerate() {
        if !told.contains(&idx) && !SHARES.contains(&idx) {
            *value = 0.0;
        }
    }
    Curve::from_values(compass(start, told, 1e-4, loss))
}

/// Compass search for the least loss: a step along each of the `free` values while it helps, then smaller steps down to
/// `finest`. Steps are in the logarithm, so that values stay positive.
pub(super) fn compass<const N: usize>(
    start: [f64; N],
    free: &[usize],
    finest: f64,
    loss: impl Fn(&[f64; N]) -> f64,
) -> [f64; N] {
    let mut best = start;
    let (mut least, mut step) = (loss(&best), 0.5_f64);
    while step > finest {
        let before = least;
        for &idx in free {
            for factor in [step.exp(), (-step).exp()] {
                let mut next = best;
                next[idx] *= factor;
                let loss = loss(&next);
                if loss < least {
                    (best, least) = (next, loss);
                    break;
                }
            }
        }
        if before - least <= 1e-9 * before.abs() {
            step *= 0.5;
        }
    }
    best
}
