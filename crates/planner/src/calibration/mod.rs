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

pub mod efficiency;
pub mod features;

use std::collections::BTreeMap;
use std::sync::LazyLock;

use moesaic_fit::{Kriging, Point};
use serde::{Deserialize, Serialize};

use crate::cost::Stack;
use crate::predict::Estimate;
use crate::validate::physics::{Case, cases};
use crate::validate::served::{Deployment, ServedFile};
use efficiency::{Efficiency, Terms};

/// Published measurements of served models.
const PUBLISHED: &str = include_str!("../../../../bench/results/published/served.csv");
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

    /// From rows: the scales under which each is the most likely, given those of other measurements; and by how much
    /// standard deviations must grow for nine of ten to lie in their interval.
    pub fn learn(cases: &[Case]) -> Learned {
        let reach = |target: Target| {
            let cases: Vec<&Case> = cases.iter().filter(|case| target.measured(case).is_some()).collect();
            let layers = Layers::fit(&cases, target);
            let groups = same_measurements(&cases);
            let start: Vec<f64> = features::NAMES.iter().map(|_| START_SCALE).collect();
            let kriging = Kriging::fit(layers.points(&cases, target), &start, Some(&groups));
            let mut z: Vec<f64> = kriging
                .leave_group_out(&groups)
                .iter()
                .zip(layers.points(&cases, target))
                .map(|(estimate, point)| (estimate.mean - point.value).abs() / estimate.sd)
                .collect();
            z.sort_by(f64::total_cmp);
            Reach {
                scales: features::NAMES.iter().map(|&name| name.to_owned()).zip(kriging.scales().to_vec()).collect(),
                sill: kriging.sill(),
                nugget: kriging.nugget(),
                widening: z[(z.len() as f64 * 0.9) as usize] / NINETY,
            }
        };
        Learned { ttft: reach(Target::Ttft), tpot: reach(Target::Tpot) }
    }
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
    /// By how much standard deviations grow.
    pub widening: f64,
}

/// Length scales where their search begins.
const START_SCALE: f64 = 5.0;
/// Standard deviations of a normal distribution to the 95th percentile.
const NINETY: f64 = 1.645;

/// Knows what was measured, and predicts.
pub struct Calibration {
    ttft: Corrector,
    tpot: Corrector,
}

static CALIBRATION: LazyLock<Calibration> = LazyLock::new(|| Calibration::new(&published(), &learned()));

/// The published measurements that can be predicted; all can.
pub fn published() -> Vec<Case> {
    let file = ServedFile::parse(PUBLISHED, "bench/results/published/served.csv").expect("our own file");
    cases(&file.rows).into_iter().map(|case| case.expect("our own file")).collect()
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
        corrector.predict(case, target)
    }
}

struct Corrector {
    layers: Layers,
    kriging: Kriging,
    /// Least and greatest value of each coordinate.
    measured: Vec<(f64, f64)>,
    /// Standard deviation of what the layers leave.
    left_over: f64,
    widening: f64,
}

impl Corrector {
    fn new(cases: &[Case], target: Target, reach: &Reach) -> Corrector {
        let cases: Vec<&Case> = cases.iter().filter(|case| target.measured(case).is_some()).collect();
        let layers = Layers::fit(&cases, target);
        let scale = |name: &&str| *reach.scales.get(*name).unwrap_or(&START_SCALE);
        let scales = features::NAMES.iter().map(scale).collect();
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
        Corrector { layers, kriging, measured, left_over, widening: reach.widening }
    }

    fn predict(&self, case: &Case, target: Target) -> Estimate {
        // Beyond what was measured its edge speaks, the less the further: what holds up to 16 ranks need not hold for 320.
        let (mut at, mut beyond) = (features::of(case), 0.0);
        for (x, (low, high)) in at.iter_mut().zip(&self.measured) {
            let inside = x.max(*low).min(*high);
            beyond += (*x - inside).abs();
            *x = inside;
        }
        let (left, trust) = (self.kriging.predict(&at), f64::exp(-beyond));
        let sd = trust * left.sd + (1.0 - trust) * self.left_over;
        Estimate::new((self.layers.ln_seconds(case, target) + trust * left.mean).exp(), sd * self.widening)
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
