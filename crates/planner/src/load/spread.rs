//! A layer's experts over ranks, for any number of tokens.

use super::Straggler;
use super::maximum::{Class, fullest};
use super::placement::{Parts, rows};

/// Numbers of tokens that are worked out: whole numbers first, then a fixed ratio apart.
const EXACT: usize = 16;
const PER_DOUBLING: usize = 2;
const DOUBLINGS: usize = 20;

/// Experts over ranks, with what is known of the fullest rank. Look-ups take well below a microsecond.
#[derive(Clone, Debug)]
pub struct Spread {
    /// By number of tokens.
    table: Vec<Entry>,
    /// Of the expected rows: where the straggler goes as tokens grow.
    skew: f64,
    ranks: f64,
    top_k: f64,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    straggler: Straggler,
    touched: f64,
}

impl Spread {
    /// From layouts that are equally likely, each with all ranks.
    pub(super) fn new(layouts: &[Vec<Parts>], top_k: usize) -> Self {
        let classes: Vec<Vec<Class>> = layouts.iter().map(|ranks| classes(ranks)).collect();
        let skew =
            layouts.iter().map(|ranks| super::placement::max_over_mean(ranks)).sum::<f64>() / layouts.len() as f64;
        let ranks = layouts[0].len() as f64;
        let entry = |idx: usize| {
            let tokens = tokens_at(idx);
            Entry { straggler: straggler(&classes, tokens, top_k as f64 / ranks), touched: touched(layouts, tokens) }
        };
        let table = (0..EXACT + PER_DOUBLING * DOUBLINGS).map(entry).collect();
        Spread { table, skew, ranks, top_k: top_k as f64 }
    }

    /// The fullest rank when `tokens`, at least 1, of all ranks together pass a layer.
    pub fn straggler(&self, tokens: f64) -> Straggler {
        let (below, above, share) = self.around(tokens);
        let (a, b) = (below.straggler, above.straggler);
        let between = |a: f64, b: f64| a + (b - a) * share;
        Straggler {
            mean: between(a.mean, b.mean),
            sd: between(a.sd, b.sd),
            p50: between(a.p50, b.p50),
            p90: between(a.p90, b.p90),
            p99: between(a.p99, b.p99),
        }
    }

    /// Expected number of a rank's experts that at least one of `tokens` chooses, mean over ranks: whose weights are read.
    pub fn touched(&self, tokens: f64) -> f64 {
        let (below, above, share) = self.around(tokens);
        below.touched + (above.touched - below.touched) * share
    }

    /// Expected rows of a rank, mean over ranks.
    pub fn mean_rows(&self, tokens: f64) -> f64 {
        tokens * self.top_k / self.ranks
    }

    /// Expected rows of the fullest rank by the mean: what is left of the straggler when tokens are many.
    pub fn skew(&self) -> f64 {
        self.skew
    }

    fn around(&self, tokens: f64) -> (&Entry, &Entry, f64) {
        let exact = EXACT as f64;
        let at =
            if tokens <= exact { tokens - 1.0 } else { exact - 1.0 + (tokens / exact).log2() * PER_DOUBLING as f64 };
        let at = at.clamp(0.0, (self.table.len() - 1) as f64);
        let below = at as usize;
        (&self.table[below], &self.table[(below + 1).min(self.table.len() - 1)], at - below as f64)
    }
}

fn tokens_at(idx: usize) -> f64 {
    if idx < EXACT { (idx + 1) as f64 } else { EXACT as f64 * ((idx + 1 - EXACT) as f64 / PER_DOUBLING as f64).exp2() }
}

/// Ranks that are alike, together.
fn classes(ranks: &[Parts]) -> Vec<Class> {
    let free = |chosen: f64| chosen * (1.0 - chosen);
    let variance = |parts: &Parts| -> f64 { parts.iter().map(|part| free(part.chosen) / part.replicas.powi(2)).sum() };
    let mut all: Vec<(f64, f64)> = ranks.iter().map(|parts| (rows(parts), variance(parts))).collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let mut classes: Vec<Class> = Vec::new();
    for (mean, variance) in all {
        match classes.last_mut() {
            // Sums of the same parts in another order may differ in their last bits.
            Some(last) if (mean - last.mean).abs() <= 1e-12 && (variance - last.variance).abs() <= 1e-12 => {
                last.ranks += 1.0;
            }
            _ => classes.push(Class { ranks: 1.0, mean, variance }),
        }
    }
    classes
}

fn straggler(layouts: &[Vec<Class>], tokens: f64, mean_rows: f64) -> Straggler {
    let mut values: Vec<(f64, f64)> = layouts.iter().flat_map(|classes| fullest(classes, tokens)).collect();
    for (value, mass) in &mut values {
        *value /= mean_rows * tokens;
        *mass /= layouts.len() as f64;
    }
    values.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mean: f64 = values.iter().map(|&(value, mass)| value * mass).sum();
    let variance: f64 = values.iter().map(|&(value, mass)| (value - mean).powi(2) * mass).sum();
    let quantile = |share: f64| {
        let mut sum = 0.0;
        let reached = values.iter().find(|&&(_, mass)| {
            sum += mass;
            sum >= share
        });
        reached.or(values.last()).expect("a distribution").0
    };
    Straggler { mean, sd: variance.sqrt(), p50: quantile(0.5), p90: quantile(0.9), p99: quantile(0.99) }
}

fn touched(layouts: &[Vec<Parts>], tokens: f64) -> f64 {
    // A replica has its share of the expert's tokens.
    let of = |part: &super::placement::Part| 1.0 - (1.0 - part.chosen / part.replicas).powf(tokens);
    let all: f64 = layouts.iter().flatten().flatten().map(of).sum();
    all / layouts.iter().map(Vec::len).sum::<usize>() as f64
}
