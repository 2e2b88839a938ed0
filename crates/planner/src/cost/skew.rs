//! How many rows and experts a rank has when loads follow a power law.

use std::cell::Cell;

/// What one rank has to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Loads {
    /// Rows of the rank.
    pub(super) rows: f64,
    /// Rows of its fullest expert.
    pub(super) fullest: f64,
    /// Experts of the rank that are expected to get a row.
    pub(super) touched: f64,
}

/// Experts that some token goes to, when all are equally likely: `E (1 - (1 - k/E)^n)`.
pub fn touched(tokens: f64, top_k: f64, experts: f64) -> f64 {
    experts * (1.0 - (1.0 - top_k / experts).max(0.0).powf(tokens))
}

impl Loads {
    /// With `skew` 0 all experts are equally likely, and `E (1 - (1 - k/E)^n) / ep` of them get rows. With an exponent `α`,
    /// expert loads are the quantiles of a Pareto law between 1 and the tokens, `(1 + u (X^(1-α) - 1))^(1/(1-α))` at evenly
    /// spaced `u`, spread over ranks in a fixed random order; the rank is the one with most rows.
    pub(super) fn of(tokens: f64, top_k: f64, experts: f64, ep: f64, skew: f64) -> Loads {
        let rows = tokens * top_k;
        if skew == 0.0 {
            let touched = touched(tokens, top_k, experts) / ep;
            return Loads { rows: rows / ep, fullest: rows / experts, touched };
        }
        // An op's flops, bytes, tiles and features ask for the same loads one after another.
        thread_local!(static LATEST: Cell<Option<([f64; 5], Loads)>> = const { Cell::new(None) });
        let key = [tokens, top_k, experts, ep, skew];
        if let Some((_, loads)) = LATEST.get().filter(|(latest, _)| *latest == key) {
            return loads;
        }
        let loads = Loads::skewed(tokens, top_k, experts, ep, skew);
        LATEST.set(Some((key, loads)));
        loads
    }

    fn skewed(tokens: f64, top_k: f64, experts: f64, ep: f64, skew: f64) -> Loads {
        let rows = tokens * top_k;
        let shares = shares(tokens, experts.round().max(1.0) as usize, skew);
        let local = ((experts / ep).round().max(1.0) as usize).min(shares.len());
        let chosen = |share: &f64| (share * rows).min(tokens);
        let fullest_rank = shares
            .chunks(local)
            .max_by(|a, b| {
                let sum = |rank: &[f64]| rank.iter().map(chosen).sum::<f64>();
                sum(a).total_cmp(&sum(b))
            })
            .expect("at least one expert");
        // An expert with `n` expected rows has none with the chance `e^-n`.
        Loads {
            rows: fullest_rank.iter().map(chosen).sum::<f64>().max(rows / ep),
            fullest: fullest_rank.iter().map(chosen).fold(0.0, f64::max),
            touched: fullest_rank.iter().map(|share| 1.0 - (-chosen(share)).exp()).sum(),
        }
    }
}

/// Share of all rows of each expert, in an order that mixes large and small.
fn shares(tokens: f64, experts: usize, skew: f64) -> Vec<f64> {
    let most = (0.8 * tokens).max(2.0);
    // At an exponent of 1 the law is log-uniform; the general form is ill-conditioned there.
    let flat = 1.0 - skew;
    let load = |u: f64| {
        if flat.abs() < 1e-3 { most.powf(u) } else { (1.0 + u * (most.powf(flat) - 1.0)).powf(1.0 / flat) }
    };
    let mut loads: Vec<f64> = (0..experts).map(|e| load((e as f64 + 0.5) / experts as f64)).collect();
    let sum: f64 = loads.iter().sum();
    loads.iter_mut().for_each(|load| *load /= sum);
    // Fisher and Yates, with fixed draws.
    for e in (1..experts).rev() {
        loads.swap(e, (moesaic_fit::random::uniform(0, e as u64) * (e + 1) as f64) as usize);
    }
    loads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_loads_are_even() {
        let loads = Loads::of(64.0, 2.0, 8.0, 4.0, 0.0);
        assert_eq!((loads.rows, loads.fullest), (32.0, 16.0));
        assert!((loads.touched - 2.0).abs() < 1e-6);
        // One token of one rank's view: top_k of the experts.
        assert!((Loads::of(1.0, 2.0, 8.0, 1.0, 0.0).touched - 2.0).abs() < 1e-12);
    }

    #[test]
    fn skewed_loads_keep_their_sum_and_fill_one_rank() {
        let whole = Loads::of(1024.0, 8.0, 128.0, 1.0, 1.2);
        assert!((whole.rows - 8192.0).abs() < 0.2 * 8192.0, "{whole:?}");
        let part = Loads::of(1024.0, 8.0, 128.0, 16.0, 1.2);
        assert!(part.rows > 1.5 * 512.0 && part.fullest > 64.0 && part.touched <= 8.0, "{part:?}");
        let flatter = Loads::of(1024.0, 8.0, 128.0, 16.0, 0.6);
        assert!(flatter.rows < part.rows);
    }
}
