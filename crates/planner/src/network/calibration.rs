//! Curves for the links that were measured.

use std::sync::LazyLock;

use moesaic_spec::{Cluster, Gpu, Link, LinkClass, cluster_preset};

use super::Curve;
use super::curve::Tier;
use super::fit;
use super::kriging::{DIMS, Kriging, Scales};
use super::published::{Measured, TABLES, Table};
use crate::estimate::NINETY;

/// Coordinates of an operation among the measured ones, logarithms of sizes.
pub(super) const COORDINATES: usize = 5;

/// Counts of ranks, nodes and multiprocessors weigh more than sizes: libraries change their ways with them.
pub(super) const COUNTS: f64 = 2.0;

/// Software that exchanges rows: a release matters by as much as a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Version {
    /// DeepEP as SGLang 0.5.0 had it.
    Older,
    /// As later ones have it; every version of the rest.
    #[default]
    Newest,
}

impl Version {
    /// From the columns `op` and `version` of a table.
    pub fn of(op: &str, version: &str) -> Self {
        if op.starts_with("deepep") && version == "0.5.0" { Version::Older } else { Version::Newest }
    }
}

/// GPUs whose links were measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MeasuredGpu {
    /// H200 SXM.
    H200,
    /// H100 SXM.
    H100,
    /// A100 SXM.
    A100,
}

impl MeasuredGpu {
    /// By the name of its folder of tables, `h200_sxm`; `None` for a GPU without one.
    pub fn of(folder: &str) -> Option<Self> {
        match folder {
            "h200_sxm" => Some(MeasuredGpu::H200),
            "h100_sxm" => Some(MeasuredGpu::H100),
            "a100_sxm" => Some(MeasuredGpu::A100),
            _ => None,
        }
    }

    /// GPUs with the same links share their curves.
    pub fn family(self) -> Family {
        match self {
            MeasuredGpu::H200 | MeasuredGpu::H100 => Family::NvLink4,
            MeasuredGpu::A100 => Family::NvLink3,
        }
    }

    /// The links that were measured.
    pub(super) fn links(self) -> &'static ReferenceLinks {
        &LINKS[self as usize]
    }

    /// The same, relative to themselves.
    fn tiers(self) -> (Tier, Tier) {
        let links = self.links();
        (Tier::new(&links.intra, &links.intra), Tier::new(&links.inter, &links.inter))
    }
}

/// GPUs with the same links.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// H200 and H100.
    NvLink4,
    /// A100.
    NvLink3,
}

impl Family {
    /// All.
    pub const ALL: [Family; 2] = [Family::NvLink4, Family::NvLink3];

    /// Its name in the file of curves.
    pub fn name(self) -> &'static str {
        match self {
            Family::NvLink4 => "NVLink 4",
            Family::NvLink3 => "NVLink 3",
        }
    }

    /// Measurements of an operation on all its GPUs.
    pub fn measured(self, op: &str) -> Vec<Measured> {
        let own = |table: &&Table| table.op == op && table.gpu.family() == self;
        TABLES.iter().filter(own).flat_map(Table::rows).collect()
    }
}

/// Whose measurements a cluster is priced by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Profile {
    pub(super) gpu: MeasuredGpu,
    /// Whether they are of this GPU.
    pub(super) own: bool,
}

impl Profile {
    /// By the GPU's name; any other GPU by its links' generation, the newest for those that have another.
    pub(super) fn of(cluster: &Cluster) -> Self {
        let named = |gpu: &Gpu, name: &str| gpu.name.contains(name);
        let (gpu, own) = match &cluster.gpu {
            gpu if named(gpu, "H200") => (MeasuredGpu::H200, true),
            gpu if named(gpu, "H100") => (MeasuredGpu::H100, true),
            gpu if named(gpu, "A100") => (MeasuredGpu::A100, true),
            _ if cluster.intra_node.name.contains("NVLink 3") => (MeasuredGpu::A100, false),
            _ => (MeasuredGpu::H200, false),
        };
        Profile { gpu, own }
    }
}

/// Links that measurements were made on.
#[derive(Clone, Debug)]
pub(super) struct ReferenceLinks {
    pub(super) intra: Link,
    pub(super) inter: Link,
}

static LINKS: LazyLock<[ReferenceLinks; 3]> = LazyLock::new(|| {
    let link = |preset: &str, class| cluster_preset(preset).expect("a preset").link(class).clone();
    [("hgx-h200", "dgx-h100-x2"), ("dgx-h100", "dgx-h100-x2"), ("a100-4x4", "a100-4x4")].map(|(intra, inter)| {
        let intra = link(intra, LinkClass::IntraNode);
        // All tables are of nodes of eight behind switches, whatever size the preset's nodes have.
        let intra = Link { bandwidth_per_node: 8.0 * intra.bandwidth_per_gpu, ..intra };
        ReferenceLinks { intra, inter: link(inter, LinkClass::InterNode) }
    })
});

/// Operations that are measured.
pub const OPS: [&str; 9] = [
    "nccl_all_reduce",
    "nccl_all_gather",
    "nccl_reduce_scatter",
    "nccl_alltoall",
    "custom_all_reduce",
    "deepep_ll_dispatch",
    "deepep_ll_combine",
    "deepep_normal_dispatch",
    "deepep_normal_combine",
];

/// A curve and the measurements that it was fitted to.
#[derive(Clone, Debug)]
pub struct FittedCurve {
    /// The curve.
    pub curve: Curve,
    scales: Scales,
    kriging: Kriging,
    /// By how much standard deviations must be wider than the kriging's.
    widened: f64,
    /// Smallest and greatest coordinates of the measurements.
    range: [[f64; 2]; COORDINATES],
}

/// What measurements near a point say about a curve.
#[derive(Clone, Copy, Debug)]
pub(super) struct Correction {
    pub(super) ln_ratio: f64,
    pub(super) sd: f64,
    /// Whether the point lies between measurements.
    pub(super) inside: bool,
}

/// How much less sure a price is for each unit of distance beyond the measurements: a judgement.
const BEYOND_SD: f64 = 0.05;

/// Distance between versions and between GPUs of a family, in the unit of the other coordinates (e-folds of size). The
/// lengths that are fitted decide how alike they are.
const APART: f64 = 2.0;

impl FittedCurve {
    /// Fits a curve to measurements of one operation, each on its GPU's own links.
    pub fn fit(op: &str, measured: &[Measured]) -> Self {
        let fitted = Self::fit_normal(op, measured);
        let errors = held_out(measured, 1, |known| Self::fit_normal(op, known));
        FittedCurve { widened: widened(&errors), ..fitted }
    }

    /// As if what the curve leaves were normal.
    fn fit_normal(op: &str, measured: &[Measured]) -> Self {
        let curve = fit::fit(op, measured);
        let (points, residuals) = left(&curve, measured);
        FittedCurve::new(curve, Scales::fit(&points, &residuals), 1.0, measured)
    }

    fn new(curve: Curve, scales: Scales, widened: f64, measured: &[Measured]) -> Self {
        let mut range = [[f64::INFINITY, f64::NEG_INFINITY]; COORDINATES];
        for row in measured {
            for (range, at) in range.iter_mut().zip(row.op.coordinates()) {
                *range = [range[0].min(at), range[1].max(at)];
            }
        }
        let (points, residuals) = left(&curve, measured);
        FittedCurve { curve, scales, kriging: Kriging::new(scales, points, &residuals), widened, range }
    }

    /// What a measurement should have been: expected seconds, and the standard deviation of their logarithm.
    pub fn expected(&self, measured: &Measured) -> (f64, f64) {
        let correction = self.correction(&measured.op.coordinates(), measured.gpu, measured.version);
        (on_measured_links(&self.curve, measured) * correction.ln_ratio.exp(), correction.sd)
    }

    /// All that was fitted, in the order of [`FittedCurve::names`].
    pub fn values(&self) -> Vec<f64> {
        [self.curve.values().as_slice(), self.scales.values().as_slice(), &[self.widened]].concat()
    }

    /// Names of the columns of the file of curves.
    pub fn names() -> Vec<&'static str> {
        let scales = [
            "smooth",
            "noise",
            "length_0",
            "length_1",
            "length_2",
            "length_3",
            "length_4",
            "length_version",
            "length_gpu",
            "widened",
        ];
        [Curve::NAMES.as_slice(), scales.as_slice()].concat()
    }

    /// Beyond the measurements the correction of their edge holds.
    pub(super) fn correction(
        &self,
        coordinates: &[f64; COORDINATES],
        gpu: MeasuredGpu,
        version: Version,
    ) -> Correction {
        let mut nearest = *coordinates;
        let mut beyond = 0.0_f64;
        for (at, range) in nearest.iter_mut().zip(self.range) {
            let inside = at.clamp(range[0], range[1]);
            beyond = beyond.hypot(*at - inside);
            *at = inside;
        }
        let (ln_ratio, sd) = self.kriging.at(&point(&nearest, gpu, version));
        Correction { ln_ratio, sd: (sd * self.widened).hypot(BEYOND_SD * beyond), inside: beyond == 0.0 }
    }
}

/// Parts that are held out in turn.
const PARTS: u64 = 5;
/// Share of measurements that should be inside their interval.
const INSIDE: f64 = 0.9;

/// How far a price is from a measurement that it did not know.
#[derive(Clone, Copy, Debug)]
pub struct HeldOut {
    /// Where it was measured.
    pub gpu: MeasuredGpu,
    /// ln(measured / price).
    pub ln_ratio: f64,
    /// The price's own standard deviation of it.
    pub sd: f64,
}

/// Cuts measurements into five parts, and holds each against what `fit` makes of the other four. Measurements of the same
/// sizes are held out together: the same under another version would give them away. `salt` makes another cut.
pub fn held_out(measured: &[Measured], salt: u64, fit: impl Fn(&[Measured]) -> FittedCurve) -> Vec<HeldOut> {
    let mut errors = Vec::with_capacity(measured.len());
    for part in 0..PARTS {
        let (held, known): (Vec<Measured>, Vec<Measured>) =
            measured.iter().partition(|row| row.part(salt, PARTS) == part);
        let fitted = fit(&known);
        errors.extend(held.iter().map(|row| {
            let (seconds, sd) = fitted.expected(row);
            HeldOut { gpu: row.gpu, ln_ratio: (row.seconds / seconds).ln(), sd }
        }));
    }
    errors
}

/// By how much standard deviations must be wider, or may be narrower, than the kriging's: residuals have longer tails than
/// normal ones, and more than one measurement is near.
fn widened(errors: &[HeldOut]) -> f64 {
    let mut off: Vec<f64> = errors.iter().map(|error| error.ln_ratio.abs() / error.sd).collect();
    off.sort_by(f64::total_cmp);
    // One more than there are: the measurement to come counts, too.
    let place = ((off.len() as f64 + 1.0) * INSIDE).ceil() as usize;
    off[place.min(off.len()) - 1] / NINETY
}

fn point(coordinates: &[f64; COORDINATES], gpu: MeasuredGpu, version: Version) -> [f64; DIMS] {
    let mut point = [0.0; DIMS];
    point[..COORDINATES].copy_from_slice(coordinates);
    point[COORDINATES] = if version == Version::Newest { APART } else { 0.0 };
    point[COORDINATES + 1] = if gpu == MeasuredGpu::H100 { APART } else { 0.0 };
    point
}

pub(super) fn on_measured_links(curve: &Curve, measured: &Measured) -> f64 {
    let (intra, inter) = measured.gpu.tiers();
    curve.seconds(&measured.op.demand(), &intra, &inter)
}

/// ln(measured / curve) by point.
fn left(curve: &Curve, measured: &[Measured]) -> (Vec<[f64; DIMS]>, Vec<f64>) {
    let one = |row: &Measured| {
        let residual = (row.seconds / on_measured_links(curve, row)).ln();
        (point(&row.op.coordinates(), row.gpu, row.version), residual)
    };
    measured.iter().map(one).unzip()
}

/// All curves.
#[derive(Debug)]
pub struct Calibration {
    /// By family and operation.
    curves: [[Option<FittedCurve>; OPS.len()]; 2],
}

/// Written by `cargo run --release -p moesaic-planner --example check_network -- --fit`.
const FITTED: &str = include_str!("fitted.csv");

static PUBLISHED: LazyLock<Calibration> = LazyLock::new(Calibration::read);

impl Calibration {
    /// Fitted to all published measurements.
    pub fn published() -> &'static Calibration {
        &PUBLISHED
    }

    /// The curve of a profile's family, and whether it is the GPU's own; that of NVLink 4 where the family has none.
    pub(super) fn curve(&self, profile: Profile, op: &str) -> (&FittedCurve, bool) {
        let op = OPS.iter().position(|&name| name == op).expect("an operation with tables");
        match &self.curves[profile.gpu.family() as usize][op] {
            Some(own) => (own, profile.own),
            None => (self.curves[Family::NvLink4 as usize][op].as_ref().expect("NVLink 4 has all"), false),
        }
    }

    fn read() -> Self {
        let mut curves = [const { [const { None }; OPS.len()] }; 2];
        for line in FITTED.lines().filter(|line| !line.starts_with('#')).skip(1) {
            let mut cells = line.split(',');
            let (family, op) = (cells.next().expect("links"), cells.next().expect("an operation"));
            let values: Vec<f64> = cells.map(|cell| cell.parse().expect("a number")).collect();
            let (curve, scales) = values.split_first_chunk().expect("the curve's columns");
            let (scales, widened) = scales.split_first_chunk().expect("the columns of what is left");
            let family = Family::ALL.into_iter().find(|other| other.name() == family).expect("a family");
            let idx = OPS.iter().position(|&name| name == op).expect("an operation with tables");
            let fitted = FittedCurve::new(
                Curve::from_values(*curve),
                Scales::from_values(scales),
                widened[0],
                &family.measured(op),
            );
            curves[family as usize][idx] = Some(fitted);
        }
        Calibration { curves }
    }
}
