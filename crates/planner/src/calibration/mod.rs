//! From physics to what users of a serving program see, learned from published measurements.
//!
//! Physics says what GPUs and links take. A serving program adds its own time in each step, lets requests wait, overlaps more
//! or less, and its kernels are better for some models than for others. Three layers, each for what the one before leaves:
//!
//! 1. [`efficiency`]: a few numbers for each program and way of serving (aggregated, disaggregated);
//! 2. means of what is left, by program and system, by model, and by the name that a model was measured under, drawn towards 0
//!    where rows are few;
//! 3. kriging of what is left then: what deployments nearby took, over sizes, types and versions ([`features`]).
//!
//! A model or program that was never measured falls back to the layers before, with a wider interval.

pub mod case;
pub mod efficiency;
pub mod features;
pub mod served;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use moesaic_fit::{Kriging, Point};
use moesaic_spec::ModelSpec;
use serde::{Deserialize, Serialize};

use crate::cost::Stack;
use crate::estimate::{Estimate, NINETY};
use case::{Asked, Case, cases};
use efficiency::{Efficiency, Terms};
use served::{Deployment, Served, ServedFile};

/// Published measurements of served models.
const PUBLISHED: &str = include_str!("../../../../bench/results/published/served.csv");
/// What physics says of them, in their order.
const ASKED: &str = include_str!("../../../../bench/results/published/served-physics.json");
/// What was learned from them.
const LEARNED: &str = include_str!("../../../../bench/results/published/fit-served.json");

/// The time that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Time to first token.
    Ttft,
    /// Time per output token.
    Tpot,
}

impl Target {
    /// Both.
    pub const ALL: [Target; 2] = [Target::Ttft, Target::Tpot];

    /// What no program beats, seconds.
    pub fn least(self, case: &Case) -> f64 {
        match self {
            Target::Ttft => case.physics.least_ttft,
            Target::Tpot => case.physics.least_tpot,
        }
    }

    /// What was measured, seconds.
    pub fn measured(self, case: &Case) -> Option<f64> {
        match self {
            Target::Ttft => case.row.ttft_s,
            Target::Tpot => case.row.tpot_s,
        }
    }

    fn terms(self, case: &Case) -> Terms {
        match self {
            Target::Ttft => Terms {
                work: case.physics.ttft - case.physics.crowd,
                burst: case.physics.burst,
                crowd: case.physics.crowd,
            },
            Target::Tpot => Terms { work: case.physics.tpot, ..Terms::default() },
        }
    }

    /// Where the search for a program's numbers begins: its work as it is, 30 ms for a request or 3 ms for a step, a
    /// tenth of the requests at once, and half of the wait.
    fn start(self) -> Efficiency {
        let host: f64 = match self {
            Target::Ttft => 0.03,
            Target::Tpot => 0.003,
        };
        Efficiency { ln_scale: 0.0, ln_host: host.ln(), ln_burst: 0.1_f64.ln(), ln_crowd: 0.5_f64.ln() }
    }
}

/// What is learned once, and kept: how far what is left over reaches.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Learned {
    /// For the time to first token.
    pub ttft: Reach,
    /// For the time per output token.
    pub tpot: Reach,
}

impl Learned {
    fn of(&self, target: Target) -> &Reach {
        match target {
            Target::Ttft => &self.ttft,
            Target::Tpot => &self.tpot,
        }
    }

    /// From rows: the scales under which each is the most likely, given those of other measurements; and what standard
    /// deviations are to be for nine of ten to lie in their interval. Scales are looked for from those of `like`.
    pub fn learn(cases: &[Case], like: &Learned) -> Learned {
        let reach = |target: Target| {
            let cases: Vec<&Case> = cases.iter().filter(|case| target.measured(case).is_some()).collect();
            let layers = Layers::fit(&cases, target);
            let groups = same_measurements(&cases);
            let start = like.of(target).scales();
            let points = layers.points(&cases, target);
            let kriging = Kriging::fit(points.clone(), &start, Some(&groups));
            let left = kriging.leave_group_out(&groups);
            let of_way = |aggregated: bool| {
                let of = cases.iter().zip(left.iter().zip(&points));
                let of = of.filter(|(case, _)| (program(case).1 == Way::Aggregated) == aggregated);
                of.map(|(_, (estimate, point))| ((estimate.mean - point.value), estimate.sd)).collect::<Vec<_>>()
            };
            Reach {
                scales: features::NAMES.iter().map(|&name| name.to_owned()).zip(kriging.scales().to_vec()).collect(),
                sill: kriging.sill(),
                nugget: kriging.nugget(),
                spread: Spreads {
                    aggregated: Spread::of(&of_way(true)),
                    disaggregated: Spread::of(&of_way(false)),
                    new_model: Spread { factor: 1.0, added: 0.0 },
                },
                shared: 0.0,
            }
        };
        let mut learned = Learned { ttft: reach(Target::Ttft), tpot: reach(Target::Tpot) };
        for target in Target::ALL {
            let errors = of_new_models(cases, &learned, target);
            let reach = match target {
                Target::Ttft => &mut learned.ttft,
                Target::Tpot => &mut learned.tpot,
            };
            reach.shared = shared(&errors);
            let all: Vec<(f64, f64)> = errors.into_values().flatten().collect();
            reach.spread.new_model = Spread::of(&all);
        }
        learned
    }
}

/// Errors of the natural logarithm with the standard deviations that were expected, of each model by the other ones.
fn of_new_models(cases: &[Case], learned: &Learned, target: Target) -> BTreeMap<String, Vec<(f64, f64)>> {
    let models: BTreeSet<String> = cases.iter().map(model).collect();
    let of_model = |left_out: String| {
        let known: Vec<Case> = cases.iter().filter(|case| model(case) != left_out).cloned().collect();
        let corrector = Corrector::new(&known, target, learned.of(target));
        let error = |case: &Case| {
            let (ln_seconds, sd) = corrector.predict(case, target);
            Some((ln_seconds - target.measured(case)?.ln(), sd))
        };
        let errors = cases.iter().filter(|case| model(case) == left_out).filter_map(error).collect();
        (left_out, errors)
    };
    models.into_iter().map(of_model).collect()
}

impl Spread {
    /// From errors and the standard deviations that were expected.
    fn of(errors: &[(f64, f64)]) -> Spread {
        let covering = |mut values: Vec<f64>| {
            values.sort_by(f64::total_cmp);
            values[(values.len() as f64 * COVERED) as usize]
        };
        let factor = covering(errors.iter().map(|(error, sd)| error.abs() / NINETY / sd).collect()).min(1.0);
        let missing = |(error, sd): &(f64, f64)| ((error / NINETY).powi(2) - (factor * sd).powi(2)).max(0.0).sqrt();
        Spread { factor, added: covering(errors.iter().map(missing).collect()) }
    }

    /// The standard deviation that is to be expected.
    fn sd(self, sd: f64) -> f64 {
        (self.factor * sd).hypot(self.added)
    }
}

/// Share of the variance of errors that is between groups.
fn shared(groups: &BTreeMap<String, Vec<(f64, f64)>>) -> f64 {
    let groups: Vec<Vec<f64>> = groups.values().map(|group| group.iter().map(|(error, _)| *error).collect()).collect();
    // What differs within a group, each with a degree of freedom less than it has members.
    let mean = |group: &[f64]| group.iter().sum::<f64>() / group.len() as f64;
    let within = |group: &Vec<f64>| group.iter().map(|error| (error - mean(group)).powi(2)).sum::<f64>();
    let freedom: usize = groups.iter().map(|group| group.len().saturating_sub(1)).sum();
    let apart = groups.iter().map(within).sum::<f64>() / freedom as f64;
    let rows: usize = groups.iter().map(Vec::len).sum();
    let all = groups.iter().flatten().map(|error| error * error).sum::<f64>() / rows as f64;
    (1.0 - apart / all).clamp(0.0, 1.0)
}

/// How far what one deployment took speaks for others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reach {
    /// Length scale of each feature, by name.
    pub scales: BTreeMap<String, f64>,
    /// Variance far from all.
    pub sill: f64,
    /// Variance of a measurement, repeated.
    pub nugget: f64,
    /// What standard deviations are, by how far they were off.
    pub spread: Spreads,
    /// Share of the variance of errors that deployments of a model have in common, where the model was never measured.
    pub shared: f64,
}

impl Reach {
    /// In the order of [`features::NAMES`].
    fn scales(&self) -> Vec<f64> {
        features::NAMES.iter().map(|&name| self.scales.get(name).copied().unwrap_or(START_SCALE)).collect()
    }
}

/// What standard deviations are to be for nine of ten measurements to lie in their interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spreads {
    /// Of models that were measured, where the same ranks read and answer.
    pub aggregated: Spread,
    /// The same where some ranks read and some answer.
    pub disaggregated: Spread,
    /// Of models that were never measured.
    pub new_model: Spread,
}

/// By how much a standard deviation shrinks, and what is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// A factor, at most 1.
    pub factor: f64,
    /// Another, independent standard deviation.
    pub added: f64,
}

/// Length scales where their search begins.
const START_SCALE: f64 = 5.0;
/// Share of errors that intervals are to hold where scales are learned with the rows in question, so that they hold nine of ten
/// where they are not.
const COVERED: f64 = 0.92;
/// Variance of what may be left over, by that of what the layers leave of measurements: a judgement that held-out rows agree to.
const SPREAD: f64 = 4.0;

/// Knows what was measured, and predicts.
pub struct Calibration {
    ttft: Corrector,
    tpot: Corrector,
}

static CALIBRATION: LazyLock<Calibration> = LazyLock::new(|| Calibration::new(&known(), &learned()));

/// The published measurements, with what physics said of them when prices changed last.
pub fn known() -> Vec<Case> {
    let asked: Vec<Asked> = serde_json::from_str(ASKED).expect("our own file");
    let rows = published_rows();
    assert_eq!(
        rows.len(),
        asked.len(),
        "served-physics.json is of other rows than served.csv; fit_served --fit writes it"
    );
    rows.into_iter().zip(&asked).map(|(row, asked)| Case::again(row, asked).expect("our own file")).collect()
}

/// The published measurements, with what physics says of them now.
pub fn published() -> Vec<Case> {
    cases(&published_rows()).into_iter().map(|case| case.expect("our own file")).collect()
}

fn published_rows() -> Vec<Served> {
    ServedFile::parse(PUBLISHED, "bench/results/published/served.csv").expect("our own file").rows
}

/// What was learned from the published measurements.
pub fn learned() -> Learned {
    serde_json::from_str(LEARNED).expect("our own file")
}

impl Calibration {
    /// By the published measurements.
    pub fn published() -> &'static Calibration {
        &CALIBRATION
    }

    /// By any measurements.
    pub fn new(cases: &[Case], learned: &Learned) -> Calibration {
        let of = |target| Corrector::new(cases, target, learned.of(target));
        Calibration { ttft: of(Target::Ttft), tpot: of(Target::Tpot) }
    }

    /// What to expect.
    pub fn predict(&self, case: &Case, target: Target) -> Estimate {
        let corrector = match target {
            Target::Ttft => &self.ttft,
            Target::Tpot => &self.tpot,
        };
        let (ln_seconds, sd) = corrector.predict(case, target);
        Estimate::new(ln_seconds.exp(), corrector.spread(case).sd(sd))
    }

    /// Share of the variance of errors of throughput that deployments of a model have in common, so that it cancels in
    /// comparisons: measured models differ by what is special of each deployment, others by what nobody knows of the model.
    pub fn shared(&self, model: &ModelSpec) -> f64 {
        if self.tpot.layers.of_model.contains_key(&model.counts().params_total.to_string()) {
            0.0
        } else {
            self.tpot.shared
        }
    }
}

struct Corrector {
    layers: Layers,
    kriging: Kriging,
    /// Least and greatest value of each coordinate.
    measured: Vec<(f64, f64)>,
    /// Standard deviation of what the layers leave.
    left_over: f64,
    spread: Spreads,
    shared: f64,
}

impl Corrector {
    fn new(cases: &[Case], target: Target, reach: &Reach) -> Corrector {
        let cases: Vec<&Case> = cases.iter().filter(|case| target.measured(case).is_some()).collect();
        let layers = Layers::fit(&cases, target);
        let scales = reach.scales();
        let points = layers.points(&cases, target);
        let mut measured = vec![(f64::INFINITY, f64::NEG_INFINITY); features::NAMES.len()];
        for point in &points {
            for ((low, high), x) in measured.iter_mut().zip(&point.at) {
                (*low, *high) = (low.min(*x), high.max(*x));
            }
        }
        let squares: f64 = points.iter().map(|point| point.value * point.value).sum();
        let left_over = (squares / points.len().max(1) as f64).sqrt();
        let kriging = Kriging::new(points, scales, reach.sill, reach.nugget);
        Corrector { layers, kriging, measured, left_over, spread: reach.spread, shared: reach.shared }
    }

    fn spread(&self, case: &Case) -> Spread {
        match (self.layers.of_model.contains_key(&model(case)), program(case).1) {
            (false, _) => self.spread.new_model,
            (true, Way::Aggregated) => self.spread.aggregated,
            (true, Way::Disaggregated | Way::Uncounted) => self.spread.disaggregated,
        }
    }

    /// The natural logarithm of the seconds, with its standard deviation as kriging has it.
    fn predict(&self, case: &Case, target: Target) -> (f64, f64) {
        // Beyond what was measured its edge speaks, the less the further: what holds up to 16 ranks need not hold for 320.
        let (mut at, mut beyond) = (features::of(case), 0.0);
        for (x, (low, high)) in at.iter_mut().zip(&self.measured) {
            let inside = x.max(*low).min(*high);
            beyond += (*x - inside).abs();
            *x = inside;
        }
        let (left, trust) = (self.kriging.predict(&at), f64::exp(-beyond));
        let sd = trust * left.sd + (1.0 - trust) * self.left_over;
        // What is known only vaguely counts less: the layers leave little that is not small.
        let vague = left.sd * left.sd / (SPREAD * self.left_over * self.left_over);
        let known = trust / (1.0 + vague);
        let ln_seconds = self.layers.ln_seconds(case, target) + known * left.mean;
        // Where nothing like it was measured, no program is taken for faster than its kernels; with pools, physics knows less of
        // who waits for whom.
        let faster = match (target, program(case).1) {
            (Target::Tpot, Way::Aggregated) => (ln_seconds - case.physics.tpot.ln()).min(0.0),
            _ => 0.0,
        };
        (ln_seconds - (1.0 - known) * faster, sd)
    }
}

/// The first two layers.
struct Layers {
    common: Efficiency,
    of_program: BTreeMap<(Stack, Way), Efficiency>,
    of_system: BTreeMap<String, f64>,
    of_model: BTreeMap<String, f64>,
    of_name: BTreeMap<String, f64>,
}

/// Rows whose mean counts half.
const FEW: f64 = 6.0;

impl Layers {
    fn fit(cases: &[&Case], target: Target) -> Layers {
        let row = |case: &&Case| (target.terms(case), target.measured(case).expect("only rows that have it"));
        let common = Efficiency::fit(&cases.iter().map(row).collect::<Vec<_>>(), target.start());
        let mut by_program: BTreeMap<_, Vec<(Terms, f64)>> = BTreeMap::new();
        cases.iter().for_each(|case| by_program.entry(program(case)).or_default().push(row(case)));
        let of_program =
            by_program.into_iter().map(|(program, rows)| (program, Efficiency::fit(&rows, common))).collect();
        let mut layers = Layers {
            common,
            of_program,
            of_system: BTreeMap::new(),
            of_model: BTreeMap::new(),
            of_name: BTreeMap::new(),
        };
        layers.of_system = layers.means(cases, target, system);
        layers.of_model = layers.means(cases, target, model);
        layers.of_name = layers.means(cases, target, |case| case.row.model.clone());
        layers
    }

    /// Means of what the layers so far leave, drawn towards 0.
    fn means(&self, cases: &[&Case], target: Target, key: impl Fn(&Case) -> String) -> BTreeMap<String, f64> {
        let mut sums: BTreeMap<String, (f64, f64)> = BTreeMap::new();
        for case in cases {
            let sum = sums.entry(key(case)).or_default();
            *sum = (sum.0 + self.left(case, target), sum.1 + 1.0);
        }
        sums.into_iter().map(|(key, (sum, rows))| (key, sum / (rows + FEW))).collect()
    }

    fn ln_seconds(&self, case: &Case, target: Target) -> f64 {
        let efficiency = self.of_program.get(&program(case)).unwrap_or(&self.common);
        let mean = |means: &BTreeMap<String, f64>, key: &str| means.get(key).copied().unwrap_or(0.0);
        efficiency.seconds(&target.terms(case)).ln()
            + mean(&self.of_system, &system(case))
            + mean(&self.of_model, &model(case))
            + mean(&self.of_name, &case.row.model)
    }

    /// ln(measured / predicted).
    fn left(&self, case: &Case, target: Target) -> f64 {
        target.measured(case).expect("only rows that have it").ln() - self.ln_seconds(case, target)
    }

    fn points(&self, cases: &[&Case], target: Target) -> Vec<Point> {
        cases.iter().map(|case| Point { at: features::of(case), value: self.left(case, target) }).collect()
    }
}

/// How a program served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Aggregated,
    Disaggregated,
    /// Workers are not counted, so physics takes one of each and is too slow.
    Uncounted,
}

fn program(case: &Case) -> (Stack, Way) {
    let way = match case.row.deployment {
        Deployment::Aggregated(_) => Way::Aggregated,
        Deployment::Disaggregated { workers: Some(_), .. } => Way::Disaggregated,
        Deployment::Disaggregated { workers: None, .. } => Way::Uncounted,
    };
    (case.stack, way)
}

/// Models of one shape are one, whatever their weights.
fn model(case: &Case) -> String {
    case.params.1.to_string()
}

fn system(case: &Case) -> String {
    format!("{} {:?}", case.row.system, program(case))
}

/// Rows of one measurement have the same number: tables have some measurements twice, under different names.
pub fn same_measurements(cases: &[&Case]) -> Vec<usize> {
    let key = |case: &&Case| (case.row.ttft_s.map(f64::to_bits), case.row.tpot_s.map(f64::to_bits));
    let mut seen = Vec::new();
    let group = |case| {
        let key = key(case);
        seen.iter().position(|other| *other == key).unwrap_or_else(|| {
            seen.push(key);
            seen.len() - 1
        })
    };
    cases.iter().map(group).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Otherwise what was learned is of other prices: run `fit_served -- --fit` after a change.
    #[test]
    fn physics_says_what_it_said_when_this_was_learned() {
        for (now, then) in published().iter().zip(&known()) {
            assert_eq!((now.stack, now.params, now.formats), (then.stack, then.params, then.formats));
            let times = |case: &Case| {
                let physics = &case.physics;
                [physics.ttft, physics.tpot, physics.decode, physics.prefill, physics.burst, physics.fitting]
            };
            for (now_s, then_s) in times(now).into_iter().zip(times(then)) {
                assert!((now_s / then_s - 1.0).abs() < 1e-3, "line {}: {now_s} now, {then_s} then", now.row.line);
            }
        }
    }
}
