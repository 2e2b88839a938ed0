//! Keeps the two pools of attention/MoE separation in step: predicts their times, chooses micro-batches, splits requests.
//!
//! Plain data in, plain data out: whoever owns the loop says what each pool took, and asks after each step. The formulas
//! and their limits are in `docs/balance.md`.

mod features;
mod pipeline;
mod predictor;
mod split;
#[cfg(test)]
mod tests;

use moesaic_plan::plan::Synchronize;
use serde::{Deserialize, Serialize};

pub use features::Features;
pub use pipeline::{LayerTimes, step_time};
pub use predictor::{Errors, Model, ModelErrors, Prediction, TimePredictor};
pub use split::{split, split_onto};

/// Most micro-batches of a step.
pub const MAX_MICRO_BATCHES: usize = 4;
/// Least gain, as a share of the step, for which micro-batches change while the pools differ. Predictions are no better.
const MIN_GAIN: f64 = 0.01;
/// Choices that the report keeps.
const MAX_RECORDS: usize = 1_000;

/// Whose time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pool {
    /// Ranks with attention.
    Attention,
    /// Ranks with experts.
    Experts,
    /// The way from one to the other, one direction.
    Exchange,
}

impl Pool {
    const ALL: [Pool; 3] = [Pool::Attention, Pool::Experts, Pool::Exchange];
}

/// Why micro-batches changed, or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Some pool was not measured often enough.
    NotMeasured,
    /// The pools' times differ by less than the threshold, and no other number gains as much as that.
    PoolsAgree,
    /// The pools differ, but no other number gains anything.
    NoGain,
    /// Another number is faster.
    Faster,
    /// There are fewer sequences than micro-batches.
    FewSequences,
}

/// What was chosen at the end of an interval.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// Steps until then.
    pub step: u64,
    /// Micro-batches before.
    pub from: usize,
    /// Micro-batches from now on.
    pub to: usize,
    /// Why.
    pub reason: Reason,
    /// Predicted seconds of a step in 1, 2, … micro-batches; empty when not measured.
    pub step_s: Vec<f64>,
    /// Predicted seconds of one micro-batch in one layer before the choice: attention, experts, exchange.
    pub pools_s: Option<[f64; 3]>,
}

/// How the pools were kept in step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SynchronizerReport {
    /// Intervals that ended.
    pub intervals: u64,
    /// Of them those that changed the number of micro-batches.
    pub changes: u64,
    /// The latest 1,000 choices, in order.
    pub choices: Vec<Choice>,
    /// Errors of both models of each pool at the last fit.
    pub errors: Vec<PoolErrors>,
}

/// Errors of the models of one pool.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PoolErrors {
    /// Which.
    pub pool: Pool,
    /// Its errors.
    pub errors: ModelErrors,
}

/// Chooses micro-batches from what the pools took.
#[derive(Clone, Debug)]
pub struct Synchronizer {
    settings: Synchronize,
    layers: usize,
    num_experts: usize,
    micro_batches: usize,
    /// As in [`Pool::ALL`].
    predictors: [TimePredictor; 3],
    /// Steps in all, and of this interval.
    step: u64,
    steps: u64,
    /// Sum of the interval's whole steps.
    sum: Features,
    report: SynchronizerReport,
}

impl Synchronizer {
    /// For a model of so many layers with experts, so many in each. `micro_batches` is what the plan begins with.
    pub fn new(settings: Synchronize, layers: usize, num_experts: usize, micro_batches: usize) -> Self {
        assert!(settings.interval >= 1, "an interval of {} steps", settings.interval);
        assert!(layers >= 1 && num_experts >= 1, "{layers} layers of {num_experts} experts");
        assert!((1..=MAX_MICRO_BATCHES).contains(&micro_batches), "{micro_batches} micro-batches");
        Synchronizer {
            settings,
            layers,
            num_experts,
            micro_batches,
            predictors: [0, 1, 2].map(TimePredictor::new),
            step: 0,
            steps: 0,
            sum: Features::default(),
            report: SynchronizerReport::default(),
        }
    }

    /// A pool worked so many seconds on one micro-batch in one layer (or an average over layers).
    pub fn observe(&mut self, pool: Pool, micro_batch: Features, seconds: f64) {
        self.predictors[pool as usize].observe(micro_batch, seconds);
    }

    /// A step of such a size, all its micro-batches together, is done. At the end of an interval: what was chosen.
    pub fn end_step(&mut self, whole: &Features) -> Option<Choice> {
        self.step += 1;
        self.steps += 1;
        self.sum.tokens += whole.tokens;
        self.sum.sequences += whole.sequences;
        self.sum.context_sum += whole.context_sum;
        self.sum.context_max += whole.context_max;
        self.sum.active_experts += whole.active_experts;
        if self.steps < self.settings.interval {
            return None;
        }
        let n = self.steps as f64;
        let mean = Features {
            tokens: self.sum.tokens / n,
            sequences: self.sum.sequences / n,
            context_sum: self.sum.context_sum / n,
            context_max: self.sum.context_max / n,
            active_experts: self.sum.active_experts / n,
            micro_batches: 1.0,
        };
        (self.steps, self.sum) = (0, Features::default());
        self.predictors.iter_mut().for_each(TimePredictor::fit);
        let choice = self.choose(&mean);
        self.micro_batches = choice.to;
        self.report.intervals += 1;
        self.report.changes += u64::from(choice.to != choice.from);
        if self.report.choices.len() == MAX_RECORDS {
            self.report.choices.remove(0);
        }
        self.report.choices.push(choice.clone());
        let errors = Pool::ALL.into_iter().zip(&self.predictors);
        self.report.errors = errors.filter_map(|(pool, p)| Some(PoolErrors { pool, errors: p.errors()? })).collect();
        Some(choice)
    }

    /// Micro-batches of a step.
    pub fn micro_batches(&self) -> usize {
        self.micro_batches
    }

    /// Predicted seconds of the attention pool for each of some requests, given their context lengths: for splitting them
    /// over its ranks. A request's cost is its share of a batch in which all are like it, so what a batch costs in itself
    /// is shared. Before the first fit, costs are the lengths.
    pub fn attention_costs(&self, contexts: &[usize]) -> Vec<f64> {
        let n = contexts.len() as f64;
        let cost = |&context: &usize| {
            let context = context as f64;
            let alike = Features {
                tokens: n,
                sequences: n,
                context_sum: n * context,
                context_max: context,
                active_experts: self.num_experts as f64,
                micro_batches: 1.0,
            };
            self.predictors[Pool::Attention as usize].predict(&alike).map_or(context, |p| p.seconds / n)
        };
        contexts.iter().map(cost).collect()
    }

    /// What happened so far.
    pub fn report(&self) -> &SynchronizerReport {
        &self.report
    }

    fn choose(&self, whole: &Features) -> Choice {
        let from = self.micro_batches;
        let times = |m: usize| {
            let part = whole.part(m, self.num_experts);
            let [attention, experts, exchange] = &self.predictors;
            let seconds = |predictor: &TimePredictor| predictor.predict(&part).map(|p| p.seconds);
            Some(LayerTimes {
                attention: seconds(attention)?,
                experts: seconds(experts)?,
                exchange: seconds(exchange)?,
            })
        };
        // A sequence is never cut, so there are no more parts than sequences.
        let most = (whole.sequences as usize).clamp(1, MAX_MICRO_BATCHES);
        let step_s: Option<Vec<f64>> = (1..=most).map(|m| Some(step_time(times(m)?, m, self.layers))).collect();
        let possible = from.min(most);
        let (Some(step_s), Some(now)) = (step_s, times(possible)) else {
            let reason = Reason::NotMeasured;
            return Choice { step: self.step, from, to: from, reason, step_s: Vec::new(), pools_s: None };
        };
        let best = (1..=most).min_by(|&a, &b| step_s[a - 1].total_cmp(&step_s[b - 1])).expect("at least one");
        let gain = 1.0 - step_s[best - 1] / step_s[possible - 1];
        let difference = (now.attention - now.experts).abs() / now.attention.max(now.experts);
        let agree = difference < self.settings.threshold;
        let wanted = if agree { self.settings.threshold } else { MIN_GAIN };
        let (to, reason) = if gain > wanted {
            (best, Reason::Faster)
        } else if possible < from {
            (possible, Reason::FewSequences)
        } else if agree {
            (from, Reason::PoolsAgree)
        } else {
            (from, Reason::NoGain)
        };
        let pools_s = Some([now.attention, now.experts, now.exchange]);
        Choice { step: self.step, from, to, reason, step_s, pools_s }
    }
}
