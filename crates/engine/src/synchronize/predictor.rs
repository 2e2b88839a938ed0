//! Predicts a pool's time: a learned model and a linear one, and whichever was better on samples it had not seen.

use std::collections::VecDeque;

use moesaic_fit::{Mlp, Sample, Training};
use moesaic_kernels::philox;
use serde::{Deserialize, Serialize};

use super::features::{Features, NUM_FEATURES};

/// Latest observations that are kept; older ones describe a load that has passed.
const WINDOW: usize = 1_250;
/// Fewer observations train no network.
const MIN_SAMPLES: usize = 100;
/// How far beyond what it saw the network is believed, as a factor: `e^0.5`, 1.6.
const MARGIN: f64 = 0.5;

/// Which model a prediction comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Model {
    /// `T = k₁ b + k₂`, with `b` the tokens.
    Linear,
    /// The 3-layer perceptron.
    Mlp,
}

/// A predicted time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// Seconds.
    pub seconds: f64,
    /// Who says so.
    pub by: Model,
}

/// Errors on samples that a model was not fitted to: |predicted - measured| / measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Errors {
    /// Half of the errors are below.
    pub median: f64,
    /// Their mean.
    pub mean: f64,
}

/// How well the models of one pool do.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelErrors {
    /// Samples that the models were fitted to.
    pub samples: usize,
    /// Samples that the errors were measured on.
    pub held_out: usize,
    /// Of the linear model.
    pub linear: Errors,
    /// Of the perceptron; absent while there are too few samples to train it.
    pub mlp: Option<Errors>,
    /// Which one predicts.
    pub used: Model,
}

/// Learns a pool's time from what was measured.
#[derive(Clone, Debug)]
pub struct TimePredictor {
    seed: u64,
    window: VecDeque<(Features, f64)>,
    fitted: Option<Fitted>,
}

#[derive(Clone, Debug)]
struct Fitted {
    linear: Linear,
    mlp: Option<Learned>,
    errors: ModelErrors,
}

impl TimePredictor {
    /// Nothing learned yet. The seed decides the network's first weights.
    pub fn new(seed: u64) -> Self {
        TimePredictor { seed, window: VecDeque::new(), fitted: None }
    }

    /// Remembers that a micro-batch took so long. A time that is not above zero says nothing (a clock may be coarse) and is
    /// left out.
    pub fn observe(&mut self, features: Features, seconds: f64) {
        if !(seconds > 0.0 && seconds.is_finite()) {
            return;
        }
        if self.window.len() == WINDOW {
            self.window.pop_front();
        }
        self.window.push_back((features, seconds));
    }

    /// Observations that are remembered.
    pub fn num_samples(&self) -> usize {
        self.window.len()
    }

    /// Fits both models to four fifths of what is remembered, and measures them on the rest. Nothing changes with fewer than
    /// five observations.
    pub fn fit(&mut self) {
        if self.window.len() < 5 {
            return;
        }
        let part = |wanted: fn(usize) -> bool| -> Vec<(Features, f64)> {
            self.window.iter().enumerate().filter(|(idx, _)| wanted(idx % 10)).map(|(_, sample)| *sample).collect()
        };
        // Three disjoint parts: the validation samples say when to stop, so they cannot say how good it is.
        let held_out = part(|place| place % 5 == 0);
        let validation = part(|place| place == 3);
        let train = part(|place| place % 5 != 0 && place != 3);

        let both: Vec<(Features, f64)> = train.iter().chain(&validation).copied().collect();
        let linear = Linear::fit(&both);
        let mlp = (self.window.len() >= MIN_SAMPLES).then(|| Learned::fit(&train, &validation, self.seed));
        let linear_errors = errors(&held_out, |features| linear.predict(features));
        let mlp_errors = mlp.as_ref().map(|mlp| errors(&held_out, |features| mlp.predict(features)));
        let used = match mlp_errors {
            Some(mlp) if mlp.median < linear_errors.median => Model::Mlp,
            _ => Model::Linear,
        };
        let errors =
            ModelErrors { samples: both.len(), held_out: held_out.len(), linear: linear_errors, mlp: mlp_errors, used };
        self.fitted = Some(Fitted { linear, mlp, errors });
    }

    /// The time of a micro-batch, by the better model; by the linear one also where features are far from all that the
    /// network has seen. `None` before the first fit.
    pub fn predict(&self, features: &Features) -> Option<Prediction> {
        let fitted = self.fitted.as_ref()?;
        let learned = fitted.mlp.as_ref().filter(|mlp| fitted.errors.used == Model::Mlp && mlp.has_seen(features));
        Some(match learned {
            Some(mlp) => Prediction { seconds: mlp.predict(features), by: Model::Mlp },
            None => Prediction { seconds: fitted.linear.predict(features), by: Model::Linear },
        })
    }

    /// How well both did at the last fit.
    pub fn errors(&self) -> Option<ModelErrors> {
        Some(self.fitted.as_ref()?.errors)
    }
}

fn errors(samples: &[(Features, f64)], predict: impl Fn(&Features) -> f64) -> Errors {
    let mut errors: Vec<f64> = samples.iter().map(|(features, t)| (predict(features) - t).abs() / t).collect();
    errors.sort_by(f64::total_cmp);
    Errors { median: errors[errors.len() / 2], mean: errors.iter().sum::<f64>() / errors.len() as f64 }
}

/// `T = k₁ b + k₂` by least squares.
#[derive(Clone, Copy, Debug)]
struct Linear {
    k1: f64,
    k2: f64,
    /// The least time that was seen: no prediction is less than half of it, which a negative `k₂` could make it.
    least: f64,
}

impl Linear {
    fn fit(samples: &[(Features, f64)]) -> Self {
        let n = samples.len() as f64;
        let b_mean = samples.iter().map(|(f, _)| f.tokens).sum::<f64>() / n;
        let t_mean = samples.iter().map(|(_, t)| t).sum::<f64>() / n;
        let b_squares: f64 = samples.iter().map(|(f, _)| (f.tokens - b_mean).powi(2)).sum();
        let products: f64 = samples.iter().map(|(f, t)| (f.tokens - b_mean) * (t - t_mean)).sum();
        // One batch size alone says nothing about others.
        let k1 = if b_squares > 1e-12 * b_mean * b_mean { products / b_squares } else { 0.0 };
        let least = samples.iter().map(|(_, t)| *t).fold(f64::INFINITY, f64::min);
        Linear { k1, k2: t_mean - k1 * b_mean, least }
    }

    fn predict(&self, features: &Features) -> f64 {
        (self.k1 * features.tokens + self.k2).max(self.least / 2.0)
    }
}

/// The network with what its inputs and output are standardised by.
#[derive(Clone, Debug)]
struct Learned {
    net: Mlp,
    mean: [f64; NUM_FEATURES],
    /// 1 / standard deviation; 0 of a feature that never changed, about which nothing was learned.
    scale: [f64; NUM_FEATURES],
    range: [(f64, f64); NUM_FEATURES],
    log_mean: f64,
    log_scale: f64,
}

impl Learned {
    fn fit(train: &[(Features, f64)], validation: &[(Features, f64)], seed: u64) -> Self {
        let inputs: Vec<[f64; NUM_FEATURES]> = train.iter().map(|(features, _)| features.logarithms()).collect();
        let logs: Vec<f64> = train.iter().map(|(_, t)| t.ln()).collect();
        let column = |i: usize| inputs.iter().map(move |x| x[i]);
        let moments: [(f64, f64); NUM_FEATURES] = std::array::from_fn(|i| mean_and_deviation(column(i)));
        let range = std::array::from_fn(|i| {
            column(i).fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)))
        });
        let (log_mean, log_deviation) = mean_and_deviation(logs.iter().copied());
        let mut learned = Learned {
            net: Mlp::new(NUM_FEATURES, |place| philox::uniform(seed, place)),
            mean: moments.map(|(mean, _)| mean),
            scale: moments.map(|(_, deviation)| if deviation > 1e-9 { 1.0 / deviation } else { 0.0 }),
            range,
            log_mean,
            log_scale: log_deviation.max(1e-9),
        };
        let sample = |(features, t): &(Features, f64)| -> Sample {
            (learned.standardised(features).to_vec(), (t.ln() - log_mean) / learned.log_scale)
        };
        let (train, validation): (Vec<Sample>, Vec<Sample>) =
            (train.iter().map(sample).collect(), validation.iter().map(sample).collect());
        learned.net.train(&train, &validation, &Training::default(), |draw| philox::uniform(!seed, draw));
        learned
    }

    fn standardised(&self, features: &Features) -> [f64; NUM_FEATURES] {
        let x = features.logarithms();
        std::array::from_fn(|i| (x[i] - self.mean[i]) * self.scale[i])
    }

    fn predict(&self, features: &Features) -> f64 {
        (self.log_mean + self.log_scale * self.net.predict(&self.standardised(features))).exp()
    }

    fn has_seen(&self, features: &Features) -> bool {
        let x = features.logarithms();
        x.iter().zip(&self.range).all(|(x, (low, high))| (low - MARGIN..=high + MARGIN).contains(x))
    }
}

fn mean_and_deviation(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = values.clone().count() as f64;
    let mean = values.clone().sum::<f64>() / n;
    let variance = values.map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    (mean, variance.sqrt())
}
