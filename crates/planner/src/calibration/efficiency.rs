//! How a serving program turns physics into what users see, in a few numbers for each program and way of serving.
//!
//! ```text
//! TPOT = scale · iteration + host
//! TTFT = scale · (reading + queue) + host + burst · (all prompts of a group, one after another, in the mean)
//!        + crowd · (answers that must end before the KV cache has room)
//! ```
//!
//! `host` is what a program does beside the GPU, in a step or for a request. `burst` is the share of requests that come at
//! once: measurements begin with all users asking in the same moment, and users whose answers are equally long ask together
//! again. `crowd` is small where a program has more room than physics gives it.

use serde::{Deserialize, Serialize};

/// What physics says of a time, term by term, seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Terms {
    /// On the GPU.
    pub work: f64,
    /// More if all ask at once; 0 for a step.
    pub burst: f64,
    /// Until the KV cache has room; 0 for a step.
    pub crowd: f64,
}

/// The numbers of one program, as logarithms.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Efficiency {
    /// ln of the factor on the work.
    pub ln_scale: f64,
    /// ln of the seconds beside it.
    pub ln_host: f64,
    /// ln of the share of the burst.
    pub ln_burst: f64,
    /// ln of the share of the wait for room.
    pub ln_crowd: f64,
}

/// Residuals beyond this count by their size, not its square: a measurement that went wrong shall not bend the rest.
const CORNER: f64 = 0.3;
/// Weight of a distance of 1 from where the search began, in residuals.
const PRIOR: f64 = 0.5;

impl Efficiency {
    /// Expected seconds.
    pub fn seconds(&self, terms: &Terms) -> f64 {
        terms.work * self.ln_scale.exp()
            + self.ln_host.exp()
            + terms.burst * self.ln_burst.exp()
            + terms.crowd * self.ln_crowd.exp()
    }

    /// The numbers that meet rows (terms, measured seconds) best, and stay near `start` where they say little. A search along
    /// one number after another, in smaller and smaller steps.
    pub fn fit(rows: &[(Terms, f64)], start: Efficiency) -> Efficiency {
        let loss = |at: &[f64; 4]| {
            let one = |(terms, seconds): &(Terms, f64)| {
                let residual = (of(at).seconds(terms) / seconds).ln() / CORNER;
                (1.0 + residual * residual).sqrt() - 1.0
            };
            let away = at.iter().zip(start.numbers()).map(|(a, b)| (a - b) * (a - b)).sum::<f64>();
            rows.iter().map(one).sum::<f64>() + PRIOR * away
        };
        let mut at = start.numbers();
        let mut best = loss(&at);
        let mut step = 1.0;
        while step > 1e-3 {
            let before = best;
            for idx in 0..at.len() {
                for change in [step, -step] {
                    let mut moved = at;
                    moved[idx] += change;
                    let now = loss(&moved);
                    if now < best {
                        (at, best) = (moved, now);
                        break;
                    }
                }
            }
            if before == best {
                step /= 2.0;
            }
        }
        of(&at)
    }

    fn numbers(&self) -> [f64; 4] {
        [self.ln_scale, self.ln_host, self.ln_burst, self.ln_crowd]
    }
}

fn of(numbers: &[f64; 4]) -> Efficiency {
    let [ln_scale, ln_host, ln_burst, ln_crowd] = *numbers;
    Efficiency { ln_scale, ln_host, ln_burst, ln_crowd }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Efficiency = Efficiency { ln_scale: 0.0, ln_host: -5.0, ln_burst: -2.0, ln_crowd: -1.0 };

    #[test]
    fn the_numbers_of_a_made_up_program_are_found_in_spite_of_outliers() {
        let truth = Efficiency { ln_scale: 0.4, ln_host: -4.0, ln_burst: -1.0, ln_crowd: -2.0 };
        let row = |idx: usize| {
            let terms = Terms {
                work: 0.002 * 1.2_f64.powi(idx as i32 % 23),
                burst: 0.01 * (idx % 7) as f64,
                crowd: 0.1 * (idx % 3) as f64,
            };
            (terms, truth.seconds(&terms) * if idx.is_multiple_of(29) { 20.0 } else { 1.0 })
        };
        let rows: Vec<_> = (0..300).map(row).collect();
        let found = Efficiency::fit(&rows, START);
        for (found, truth) in found.numbers().iter().zip(truth.numbers()) {
            assert!((found - truth).abs() < 0.1, "{found} for {truth}");
        }
    }

    #[test]
    fn without_rows_nothing_moves() {
        assert_eq!(Efficiency::fit(&[], START), START);
    }
}
