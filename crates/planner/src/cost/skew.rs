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

/// Rows of the tiles that an expert's rows are padded to.
const TILE_ROWS: f64 = 64.0;
/// Orders of experts over ranks whose mean counts.
const ORDERS: u64 = 8;

/// What the measured rank of a published table had to do, counted expert by expert.
///
/// Even loads are dealt there and not drawn: token `t` goes to the experts `(t + i s) mod E` for `i < k` with `s = E / k`, or
/// `(⌊t s / n⌋ + i s) mod E` of fewer tokens `n` than that; the rank has the first `E / ep` experts. Uneven loads are whole
/// numbers in proportion to draws of a power law between 1 and 0.8 n (between 0.01 and 2 where there are fewer rows than
/// experts); the rank is the one with most rows. Source: the collectors of AIConfigurator, which measured the tables.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Dealt {
    /// Rows of the rank.
    pub(super) rows: f64,
    /// Rows of its fullest expert.
    pub(super) fullest: f64,
    /// Experts of the rank with rows.
    pub(super) touched: f64,
    /// Rows when each expert's are padded to whole tiles.
    pub(super) padded: f64,
}

impl Dealt {
    pub(super) fn of(tokens: f64, top_k: f64, experts: f64, ep: f64, skew: f64) -> Dealt {
        // An op's unit and features ask for the same loads one after another.
        thread_local!(static LATEST: Cell<Option<([f64; 5], Dealt)>> = const { Cell::new(None) });
        let key = [tokens, top_k, experts, ep, skew];
        if let Some((_, dealt)) = LATEST.get().filter(|(latest, _)| *latest == key) {
            return dealt;
        }
        let local = (experts / ep).ceil().max(1.0) as usize;
        let dealt = match skew {
            0.0 => Dealt::even(tokens, top_k, experts, local),
            _ => Dealt::skewed(tokens, top_k, experts, local, skew),
        };
        LATEST.set(Some((key, dealt)));
        dealt
    }

    fn even(tokens: f64, top_k: f64, experts: f64, local: usize) -> Dealt {
        let stride = (experts / top_k).ceil().max(1.0);
        let rounds = (tokens / stride).floor();
        let rows = |expert: usize| {
            let place = expert as f64 % stride;
            if rounds >= 1.0 {
                rounds + (tokens - rounds * stride - place).clamp(0.0, 1.0)
            } else {
                // Tokens `t` with `⌊t stride / tokens⌋ = place`.
                ((place + 1.0) * tokens / stride).ceil() - (place * tokens / stride).ceil()
            }
        };
        (0..local).map(rows).fold(Dealt::default(), Dealt::and)
    }

    /// The mean over some orders of the experts, with loads at evenly spaced quantiles of the law.
    fn skewed(tokens: f64, top_k: f64, experts: f64, local: usize, skew: f64) -> Dealt {
        let rows = tokens * top_k;
        let (least, most) = if rows > experts { (1.0, (0.8 * tokens).max(2.0)) } else { (0.01, 2.0) };
        let mut loads = quantiles(least, most, skew, experts.round().max(1.0) as usize);
        // Largest first: they get what rounding left over.
        loads.reverse();
        let sum: f64 = loads.iter().sum();
        loads.iter_mut().for_each(|load| *load = (*load * rows / sum).round());
        let missing = (rows - loads.iter().sum::<f64>()).max(0.0) as usize;
        loads.iter_mut().take(missing).for_each(|load| *load += 1.0);
        loads.iter_mut().for_each(|load| *load = load.min(tokens));
        let local = local.min(loads.len());
        let orders = if local == loads.len() { 1 } else { ORDERS };
        let mut all = Dealt::default();
        for order in 0..orders {
            shuffle(&mut loads, order);
            let sum = |rank: &[f64]| rank.iter().sum::<f64>();
            let fullest_rank =
                loads.chunks(local).max_by(|a, b| sum(a).total_cmp(&sum(b))).expect("at least one expert");
            all = fullest_rank.iter().copied().fold(all, Dealt::and);
        }
        let n = orders as f64;
        Dealt { rows: all.rows / n, touched: all.touched / n, padded: all.padded / n, fullest: all.fullest }
    }

    /// With one more expert.
    fn and(self, rows: f64) -> Dealt {
        Dealt {
            rows: self.rows + rows,
            fullest: self.fullest.max(rows),
            touched: self.touched + rows.min(1.0),
            padded: self.padded + (rows / TILE_ROWS).ceil() * TILE_ROWS,
        }
    }
}

/// Loads of a power law at evenly spaced quantiles, least first.
fn quantiles(least: f64, most: f64, skew: f64, experts: usize) -> Vec<f64> {
    // At an exponent of 1 the law is log-uniform; the general form is ill-conditioned there.
    let flat = 1.0 - skew;
    let (a, b) = (least.powf(flat), most.powf(flat));
    let load =
        |u: f64| if flat.abs() < 1e-3 { least * (most / least).powf(u) } else { (a + u * (b - a)).powf(1.0 / flat) };
    (0..experts).map(|e| load((e as f64 + 0.5) / experts as f64)).collect()
}

/// Fisher and Yates, with the draws of a seed.
fn shuffle(loads: &mut [f64], seed: u64) {
    for e in (1..loads.len()).rev() {
        loads.swap(e, (moesaic_fit::random::uniform(seed, e as u64) * (e + 1) as f64) as usize);
    }
}

/// Share of all rows of each expert, in an order that mixes large and small.
fn shares(tokens: f64, experts: usize, skew: f64) -> Vec<f64> {
    let mut loads = quantiles(1.0, (0.8 * tokens).max(2.0), skew, experts);
    let sum: f64 = loads.iter().sum();
    loads.iter_mut().for_each(|load| *load /= sum);
    shuffle(&mut loads, 0);
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

    #[test]
    fn even_loads_are_dealt_in_turn() {
        // 128 experts, 8 of a token: strides of 16. Each of 8 ranks has one stride, so all tokens, one expert each.
        let dealt = Dealt::of(5.0, 8.0, 128.0, 8.0, 0.0);
        assert_eq!((dealt.rows, dealt.touched, dealt.fullest, dealt.padded), (5.0, 5.0, 1.0, 5.0 * TILE_ROWS));
        // Of 64 ranks the first has two experts: each gets every sixteenth token, the first one the odd one, too.
        let dealt = Dealt::of(16.0 * 65.0 + 1.0, 8.0, 128.0, 64.0, 0.0);
        assert_eq!((dealt.rows, dealt.touched, dealt.fullest, dealt.padded), (131.0, 2.0, 66.0, 4.0 * TILE_ROWS));
        // One rank has all rows, however many tokens.
        for tokens in 1..50 {
            assert_eq!(Dealt::of(f64::from(tokens), 8.0, 128.0, 1.0, 0.0).rows, 8.0 * f64::from(tokens));
        }
    }

    #[test]
    fn uneven_loads_are_whole_rows() {
        // Fewer rows than experts: no load rounds to one, so the eight largest get a row each.
        let one = Dealt::of(1.0, 8.0, 128.0, 1.0, 1.01);
        assert_eq!((one.rows, one.touched, one.fullest), (8.0, 8.0, 1.0));
        let part = Dealt::of(1.0, 8.0, 128.0, 8.0, 1.01);
        assert!(part.rows >= 2.0 && part.rows == part.touched, "{part:?}");
        let many = Dealt::of(4096.0, 8.0, 128.0, 16.0, 1.2);
        assert!(many.rows > 1.5 * 2048.0 && many.fullest <= 4096.0 && many.padded > many.rows, "{many:?}");
    }
}
