//! By which factor kernels miss the roofline, learned from rows of tables.

use std::collections::{BTreeMap, BTreeSet};

use moesaic_fit::{Estimate, Kriging, Mlp, Point, Sample, Training, random};
use serde::{Deserialize, Serialize};

use super::features::{Place, measured_as, unit_seconds};
use super::op::Precision;
use super::published;
use super::table::{Row, Stack};

/// Ops that share what is learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// Dense products.
    Gemm,
    /// Routed experts.
    Experts,
    /// Routed experts behind DeepEP, prompts.
    Context,
    /// Routed experts behind DeepEP, decode.
    Generation,
    /// Attention of prompts.
    AttentionPrefill,
    /// Attention of decode steps.
    AttentionDecode,
    /// Latent attention of decode steps.
    MlaDecode,
}

/// Rows that train networks; fewer are met better by kriging alone.
const LEAST_ROWS_OF_NETWORKS: usize = 1_000;
/// Networks whose mean predicts: what one sees in too few rows, others do not. Each leaves out another part of the rows, by
/// which it knows when to stop.
const NETWORKS: usize = 6;
/// Length scales to the nearest row within which it speaks for an op.
pub(super) const NEAR: f64 = 1.0;
const TRAINING: Training = Training { minibatch: 16, max_epochs: 60, patience: 15, learning_rate: 4e-3 };

/// What was learned, for each family that has rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Learned {
    families: BTreeMap<Family, Fit>,
}

/// By how much standard deviations must grow for 90 % of rows that were held out to lie inside their 90 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Widening {
    /// Within `NEAR` length scales of a row.
    pub near: f64,
    /// Beyond: networks know less of shapes that they never saw than of those that they were trained on.
    pub far: f64,
}

impl Widening {
    /// At a distance in length scales.
    pub fn at(&self, distance: f64) -> f64 {
        if distance <= NEAR { self.near } else { self.far }
    }
}

/// What was learned of one family.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Fit {
    categories: BTreeSet<String>,
    network: Network,
    groups: BTreeMap<String, Group>,
    widening: Widening,
}

/// How factors of rows change that kriging takes together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Group {
    /// What they are above the mean of all.
    whole: Variogram,
    /// What networks leave over, where there are any.
    rest: Option<Variogram>,
}

/// What [`Kriging`] learns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Variogram {
    /// Of the coordinates.
    scales: Vec<f64>,
    sill: f64,
    nugget: f64,
}

impl Variogram {
    fn learn(points: Vec<Point>, start: &[f64]) -> Variogram {
        let kriging = Kriging::fit(points, start, None);
        Variogram { scales: kriging.scales().to_vec(), sill: kriging.sill(), nugget: kriging.nugget() }
    }

    fn among(&self, points: Vec<Point>) -> Kriging {
        Kriging::new(points, self.scales.clone(), self.sill, self.nugget)
    }
}

/// Networks with what their inputs and output are standardised by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Network {
    mean: Vec<f64>,
    /// 1 / standard deviation; 0 of a coordinate that never changed.
    scale: Vec<f64>,
    output_mean: f64,
    output_scale: f64,
    networks: Vec<Mlp>,
}

impl Network {
    fn train(samples: &[(Vec<f64>, f64)]) -> Network {
        let inputs = samples[0].0.len();
        let column = |i: usize| samples.iter().map(move |(x, _)| x[i]);
        let moments: Vec<(f64, f64)> = (0..inputs).map(|i| mean_and_deviation(column(i))).collect();
        let (output_mean, deviation) = mean_and_deviation(samples.iter().map(|(_, y)| *y));
        let mut network = Network {
            mean: moments.iter().map(|(mean, _)| *mean).collect(),
            scale: moments.iter().map(|(_, sd)| if *sd > 1e-9 { 1.0 / sd } else { 0.0 }).collect(),
            output_mean,
            output_scale: deviation.max(1e-9),
            networks: Vec::new(),
        };
        let samples: Vec<Sample> =
            samples.iter().map(|(x, y)| (network.standardised(x), (y - output_mean) / network.output_scale)).collect();
        let part = |idx: usize| (random::uniform(77, idx as u64) * NETWORKS as f64) as usize;
        let networks = if samples.len() < LEAST_ROWS_OF_NETWORKS { 0 } else { NETWORKS };
        for left_out in 0..networks {
            let choose = |kept: bool| -> Vec<Sample> {
                let wanted = |idx: usize| (part(idx) == left_out) != kept;
                samples.iter().enumerate().filter(|(idx, _)| wanted(*idx)).map(|(_, sample)| sample.clone()).collect()
            };
            let seed = left_out as u64;
            let mut mlp = Mlp::new(inputs, |place| random::uniform(seed, place));
            mlp.train(&choose(true), &choose(false), &TRAINING, |place| random::uniform(!seed, place));
            network.networks.push(mlp);
        }
        network
    }

    /// What kriging takes together. Where networks know what kernels share, each kernel is looked at for itself: tuned tiles
    /// make one's steps where another has none.
    fn group(&self, place: &Place) -> String {
        if self.networks.is_empty() {
            String::new()
        } else {
            format!("{}, {:?}", place.kernels(), place.op.precision())
        }
    }

    /// Samples above their mean.
    fn whole(&self, samples: &[(Vec<f64>, f64)]) -> Vec<Point> {
        samples.iter().map(|(at, y)| Point { value: y - self.output_mean, at: at.clone() }).collect()
    }

    /// What networks leave over of samples; `None` without networks.
    fn rest(&self, samples: &[(Vec<f64>, f64)]) -> Option<Vec<Point>> {
        let rest = |(at, y): &(Vec<f64>, f64)| Point { value: y - self.predict(at), at: at.clone() };
        (!self.networks.is_empty()).then(|| samples.iter().map(rest).collect())
    }

    fn standardised(&self, x: &[f64]) -> Vec<f64> {
        x.iter().zip(self.mean.iter().zip(&self.scale)).map(|(x, (mean, scale))| (x - mean) * scale).collect()
    }

    fn predict(&self, x: &[f64]) -> f64 {
        let x = self.standardised(x);
        let sum: f64 = self.networks.iter().map(|mlp| mlp.predict(&x)).sum();
        self.output_mean + self.output_scale * sum / self.networks.len() as f64
    }
}

fn mean_and_deviation(values: impl Iterator<Item = f64> + Clone) -> (f64, f64) {
    let n = values.clone().count() as f64;
    let mean = values.clone().sum::<f64>() / n;
    (mean, (values.map(|v| (v - mean).powi(2)).sum::<f64>() / n).sqrt())
}

/// A row as a place and the logarithm of its factor.
fn factor(row: &Row) -> (Place<'_>, f64) {
    let gpu = &published::device(&row.device).expect("rows are of devices with tables").gpu;
    let place = Place { op: &row.op, device: &row.device, gpu, stack: row.stack, kernel: &row.kernel };
    (place, (row.seconds / unit_seconds(gpu, &row.op)).ln())
}

/// Rows by family.
pub(super) fn by_family(rows: &[Row]) -> BTreeMap<Family, Vec<&Row>> {
    let mut families: BTreeMap<Family, Vec<&Row>> = BTreeMap::new();
    for row in rows {
        if let Some((family, _)) = measured_as(&row.op) {
            families.entry(family).or_default().push(row);
        }
    }
    families
}

impl Fit {
    /// Learns from rows of one family. Scales are looked for from those of `like`, where one is given.
    pub(super) fn train(rows: &[&Row], like: Option<&Fit>) -> Fit {
        let factors: Vec<(Place, f64)> = rows.iter().map(|row| factor(row)).collect();
        let categories: BTreeSet<String> = factors.iter().flat_map(|(place, _)| place.categories()).collect();
        let samples: Vec<(Vec<f64>, f64)> =
            factors.iter().map(|(place, y)| (place.coordinates(&categories), *y)).collect();
        let network = Network::train(&samples);
        let sizes = samples[0].0.len() - categories.len();
        let first: Vec<f64> = (0..samples[0].0.len()).map(|i| if i < sizes { 2.0 } else { 1.0 }).collect();
        let like = like.filter(|like| like.categories == categories);
        let mut by_group: BTreeMap<String, Vec<(Vec<f64>, f64)>> = BTreeMap::new();
        for ((place, _), sample) in factors.iter().zip(samples) {
            by_group.entry(network.group(place)).or_default().push(sample);
        }
        let group = |(name, samples): (String, Vec<(Vec<f64>, f64)>)| {
            let like = like.and_then(|like| like.groups.get(&name));
            let start = |like: Option<&Variogram>| like.map_or(first.clone(), |like| like.scales.clone());
            let whole = Variogram::learn(network.whole(&samples), &start(like.map(|like| &like.whole)));
            let rest = network.rest(&samples);
            let rest = rest.map(|rest| Variogram::learn(rest, &start(like.and_then(|like| like.rest.as_ref()))));
            (name, Group { whole, rest })
        };
        let groups = by_group.into_iter().map(group).collect();
        Fit { categories, network, groups, widening: Widening { near: 1.0, far: 1.0 } }
    }
}

/// A fit with the rows that it stands among.
#[derive(Debug)]
pub(super) struct Factors {
    pub(super) fit: Fit,
    /// By name of the group: how factors change, and what networks leave over.
    krigings: BTreeMap<String, (Kriging, Option<Kriging>)>,
    /// Of each precision, the stack and kernel with most rows, which stand for those without any.
    usual: BTreeMap<Precision, (Stack, String)>,
    /// Rows by stack, precision and kernel.
    kernels: BTreeMap<(Stack, Precision), BTreeMap<String, usize>>,
}

impl Factors {
    pub(super) fn new(fit: Fit, rows: &[&Row]) -> Factors {
        let mut kernels: BTreeMap<_, BTreeMap<String, usize>> = BTreeMap::new();
        let mut by_group: BTreeMap<String, Vec<(Vec<f64>, f64)>> = BTreeMap::new();
        for row in rows {
            let precision = row.op.precision();
            *kernels.entry((row.stack, precision)).or_default().entry(row.kernel.clone()).or_default() += 1;
            let (place, y) = factor(row);
            by_group.entry(fit.network.group(&place)).or_default().push((place.coordinates(&fit.categories), y));
        }
        let mut usual: BTreeMap<Precision, (usize, (Stack, String))> = BTreeMap::new();
        for ((stack, precision), kernels) in &kernels {
            for (kernel, &count) in kernels {
                let most = usual.entry(*precision).or_default();
                if count > most.0 {
                    *most = (count, (*stack, kernel.clone()));
                }
            }
        }
        let usual = usual.into_iter().map(|(precision, (_, name))| (precision, name)).collect();
        let krigings = by_group.into_iter().map(|(name, samples)| {
            // Rows that came after the fit change as others do.
            let group = fit.groups.get(&name).or_else(|| fit.groups.values().next()).expect("a fit has a group");
            let whole = group.whole.among(fit.network.whole(&samples));
            let rest = group.rest.as_ref().zip(fit.network.rest(&samples)).map(|(rest, points)| rest.among(points));
            (name, (whole, rest))
        });
        Factors { krigings: krigings.collect(), usual, kernels, fit }
    }

    /// The logarithm of the factor at a place. With networks it is the mean of what kriging says with them and without them,
    /// each weighted by how sure it is: their errors are hardly the same.
    pub(super) fn predict(&self, place: &Place) -> Estimate {
        let network = &self.fit.network;
        let mut place = *place;
        if !self.krigings.contains_key(&network.group(&place)) {
            let usual = self.usual.get(&place.op.precision()).or_else(|| self.usual.values().next());
            let (stack, kernel) = usual.expect("factors have rows");
            (place.stack, place.kernel) = (*stack, kernel);
        }
        let at = place.coordinates(&self.fit.categories);
        let known = self.krigings.get(&network.group(&place));
        let (whole, rest) = known.or_else(|| self.krigings.values().next()).expect("factors have rows");
        let mut estimate = whole.predict(&at);
        estimate.mean += network.output_mean;
        if let Some(rest) = rest {
            let rest = rest.predict(&at);
            let (with, without) = (rest.sd.powi(-2), estimate.sd.powi(-2));
            let mean = (with * (rest.mean + network.predict(&at)) + without * estimate.mean) / (with + without);
            // Both rest on the same rows, so the mean is as sure as they are, and no surer.
            estimate = Estimate { mean, sd: (2.0 / (with + without)).sqrt(), distance: rest.distance };
        }
        Estimate { sd: estimate.sd * self.fit.widening.at(estimate.distance), ..estimate }
    }

    /// The kernel that a stack uses most for a precision.
    pub(super) fn usual_kernel(&self, stack: Stack, precision: Precision) -> Option<&str> {
        let kernels = self.kernels.get(&(stack, precision))?;
        kernels.iter().max_by_key(|(_, count)| **count).map(|(kernel, _)| kernel.as_str())
    }
}

impl Learned {
    /// Learns from all rows.
    pub fn train<'a>(rows: &'a [Row]) -> Learned {
        let families = std::thread::scope(|scope| {
            let train = |(family, rows): (Family, Vec<&'a Row>)| (family, scope.spawn(move || Fit::train(&rows, None)));
            let running: Vec<_> = by_family(rows).into_iter().map(train).collect();
            running.into_iter().map(|(family, fit)| (family, fit.join().expect("no panic in a fit"))).collect()
        });
        Learned { families }
    }

    pub(super) fn fit(&self, family: Family) -> Option<&Fit> {
        self.families.get(&family)
    }

    /// Sets by how much the standard deviations of a family grow.
    pub fn widen(&mut self, family: Family, widening: Widening) {
        if let Some(fit) = self.families.get_mut(&family) {
            fit.widening = widening;
        }
    }

    /// Puts what was learned back among the rows.
    pub(super) fn factors(&self, rows: &[Row]) -> BTreeMap<Family, Factors> {
        let with_rows = by_family(rows).into_iter();
        with_rows
            .filter_map(|(family, rows)| Some((family, Factors::new(self.families.get(&family)?.clone(), &rows))))
            .collect()
    }
}
