//! How unevenly experts, and so ranks, are loaded.
//!
//! A step waits for the fullest rank, layer by layer. [`ExpertLoad`] says how likely each expert is; [`Spread`] lays the
//! experts over ranks and knows, for any number of tokens, the distribution of the fullest rank's rows by the mean
//! ([`Straggler`]).
//!
//! ```
//! use moesaic_planner::load::{ExpertLoad, LoadModel};
//!
//! let load = ExpertLoad::new(LoadModel::Zipf(0.5), 256, 8).unwrap();
//! let [linear, balanced] = [false, true].map(|balanced| load.straggler(4096.0, 32, 32, balanced));
//! assert!(balanced.mean < linear.mean && balanced.mean >= 1.0);
//! ```

mod maximum;
mod placement;
mod shares;
mod spread;

use std::collections::HashMap;
use std::sync::{Arc, RwLock};

use moesaic_plan::eplb::RoutingTrace;

use crate::PlannerError;

pub use placement::Parts;
pub use spread::Spread;

/// Which experts tokens choose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LoadModel {
    /// All alike.
    Uniform,
    /// The i-th most popular by `i^-s`; which experts are popular is chance, in each layer another.
    Zipf(f64),
    /// The density of an expert's popularity x is `x^-α`, for x from 1 to the number of experts; which experts are popular is
    /// chance.
    PowerLaw(f64),
}

/// Probabilities that a token chooses each expert.
#[derive(Debug)]
pub struct ExpertLoad {
    experts: usize,
    top_k: usize,
    /// Of each layer that differs from the others, the probability of each expert; they sum to `top_k`. `[layers][E]`
    layers: Vec<Vec<f64>>,
    /// Whether the layers' order of experts is that of a real model, or any order is as likely.
    ordered: bool,
    spreads: RwLock<HashMap<(usize, usize, bool), Arc<Spread>>>,
}

/// Rows of the fullest rank by the mean over ranks, in one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Straggler {
    /// Its expectation, and so what a step pays on average in each of its layers.
    pub mean: f64,
    /// Standard deviation from layer to layer.
    pub sd: f64,
    /// Half of all layers have less.
    pub p50: f64,
    /// Nine tenths.
    pub p90: f64,
    /// Ninety-nine hundredths.
    pub p99: f64,
}

impl Straggler {
    /// Nothing waits.
    pub const EVEN: Straggler = Straggler { mean: 1.0, sd: 0.0, p50: 1.0, p90: 1.0, p99: 1.0 };

    /// The mean of so many layers, which a step waits for one after the other. Layers are independent, and many are normal:
    /// quantiles draw together by the root of their number.
    #[must_use]
    pub fn over_layers(&self, layers: usize) -> Self {
        let narrow = (layers.max(1) as f64).sqrt();
        let quantile = |one: f64| (self.mean + (one - self.mean) / narrow).max(1.0);
        Straggler {
            mean: self.mean,
            sd: self.sd / narrow,
            p50: quantile(self.p50),
            p90: quantile(self.p90),
            p99: quantile(self.p99),
        }
    }
}

impl ExpertLoad {
    /// By a law.
    ///
    /// # Errors
    /// [`PlannerError::Load`]: no experts, more chosen than there are, or a parameter that is negative or not finite.
    pub fn new(model: LoadModel, experts: usize, top_k: usize) -> Result<Self, PlannerError> {
        check_sizes(experts, top_k)?;
        if let LoadModel::Zipf(value) | LoadModel::PowerLaw(value) = model
            && !(0.0..=100.0).contains(&value)
        {
            return Err(wrong("the exponent", value, "from 0 to 100"));
        }
        let layer = shares::chosen(&shares::popularity(model, experts), top_k);
        Ok(ExpertLoad { experts, top_k, layers: vec![layer], ordered: false, spreads: RwLock::default() })
    }

    /// As routers chose.
    ///
    /// # Errors
    /// [`PlannerError::Load`]: a trace without a token.
    pub fn traced(trace: &RoutingTrace) -> Result<Self, PlannerError> {
        check_sizes(trace.num_experts, trace.top_k)?;
        let counted = trace.layers.iter().flatten().filter(|layer| layer.tokens > 0);
        let chosen = |counts: &[u64]| {
            let counts: Vec<f64> = counts.iter().map(|&count| count as f64).collect();
            shares::chosen(&counts, trace.top_k)
        };
        let layers: Vec<_> = counted.map(|layer| chosen(&layer.counts)).collect();
        if layers.is_empty() {
            return Err(wrong("the number of traced tokens", 0.0, "at least 1 in a layer"));
        }
        let (experts, top_k) = (trace.num_experts, trace.top_k);
        Ok(ExpertLoad { experts, top_k, layers, ordered: true, spreads: RwLock::default() })
    }

    /// The fullest rank when `tokens` (of all ranks together) pass a layer whose experts, and `replicas` more, live on
    /// `ranks`: in their order, or balanced by load. Spreads are kept, so a second call is a look-up.
    pub fn straggler(&self, tokens: f64, ranks: usize, replicas: usize, balanced: bool) -> Straggler {
        self.spread(ranks, replicas, balanced).straggler(tokens)
    }

    /// Experts over ranks. At least 1 rank; ranks beyond one for each expert and replica have nothing to do.
    pub fn spread(&self, ranks: usize, replicas: usize, balanced: bool) -> Arc<Spread> {
        let key = (ranks, replicas, balanced);
        if let Some(known) = self.spreads.read().expect("no panic while held").get(&key) {
            return known.clone();
        }
        let spread = Arc::new(self.lay(ranks.max(1), replicas, balanced));
        self.spreads.write().expect("no panic while held").entry(key).or_insert(spread).clone()
    }

    /// Orders of experts that stand for all.
    const ORDERS: u64 = 16;

    fn lay(&self, ranks: usize, replicas: usize, balanced: bool) -> Spread {
        let even = |layer: &[f64]| layer.iter().all(|share| *share == layer[0]);
        let mut layouts = Vec::new();
        for layer in &self.layers {
            let orders = if self.ordered || even(layer) || ranks >= self.experts + replicas { 1 } else { Self::ORDERS };
            let linear: Vec<_> = (0..orders)
                .map(|order| {
                    let layer = if orders == 1 { layer.clone() } else { placement::shuffled(layer, order) };
                    placement::linear(&layer, ranks, replicas)
                })
                .collect();
            let fullest = |parts: &[Vec<Parts>]| {
                parts.iter().map(|parts| placement::max_over_mean(parts)).sum::<f64>() / parts.len() as f64
            };
            let placed = balanced.then(|| vec![placement::balanced(layer, ranks, replicas)]);
            // A balancer that finds nothing better changes nothing.
            match placed.filter(|placed| fullest(placed) < fullest(&linear)) {
                Some(placed) => layouts.extend(placed),
                None => layouts.extend(linear),
            }
        }
        Spread::new(&layouts, self.top_k)
    }
}

fn check_sizes(experts: usize, top_k: usize) -> Result<(), PlannerError> {
    if experts == 0 {
        return Err(wrong("the number of experts", 0.0, "at least 1"));
    }
    if top_k == 0 || top_k > experts {
        return Err(wrong("top_k", top_k as f64, "from 1 to the number of experts"));
    }
    Ok(())
}

fn wrong(field: &'static str, value: f64, right: &'static str) -> PlannerError {
    PlannerError::Load { field, value, right }
}
