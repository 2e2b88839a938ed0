//! Curves from measurements: robust least squares on ln(measured / curve).

use super::Curve;
use super::curve::Tier;
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

/// Compass search: a step along each parameter while it helps, then smaller steps. Parameters are logarithms, so that
/// none becomes negative; shares end at 1.
pub(super) fn fit(op: &str, measured: &[Measured], intra: &Tier, inter: &Tier) -> Curve {
    let told = told(op);
    let demands: Vec<_> = measured.iter().map(|row| (row.op.demand(), row.seconds)).collect();
    let loss = |values: &[f64; 9]| -> f64 {
        let curve = Curve::from_values(*values);
        let one = |(demand, seconds): &(_, f64)| {
            let off = (seconds / curve.seconds(demand, intra, inter)).ln() / OUTLIER;
            (1.0 + off * off).sqrt() - 1.0
        };
        demands.iter().map(one).sum()
    };
    let mut best = START.values();
    for (idx, value) in best.iter_mut().enumerate() {
        if !told.contains(&idx) && !(5..7).contains(&idx) {
            *value = 0.0;
        }
    }
    let (mut least, mut step) = (loss(&best), 0.5);
    while step > 1e-4 {
        let before = least;
        for &idx in told {
            for factor in [f64::exp(step), f64::exp(-step)] {
                let mut next = best;
                next[idx] *= factor;
                if (5..7).contains(&idx) {
                    next[idx] = next[idx].min(1.0);
                }
                let loss = loss(&next);
                if loss < least {
                    (best, least) = (next, loss);
                    break;
                }
            }
        }
        if before - least <= 1e-9 * before {
            step *= 0.5;
        }
    }
    Curve::from_values(best)
}
