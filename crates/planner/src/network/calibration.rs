//! Curves for the links that were measured.

use std::sync::LazyLock;

use moesaic_spec::{Cluster, Gpu, Link, LinkClass, cluster_preset};

use super::Curve;
use super::curve::Tier;
use super::fit;
use super::published::{Measured, TABLES};

/// Coordinates of an operation among the measured ones, logarithms of sizes.
pub(super) const COORDINATES: usize = 5;

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tables {
    H200,
    H100,
    A100,
}

/// Whose measurements a cluster is priced by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Profile {
    pub(super) tables: Tables,
    /// Whether they are of this GPU.
    pub(super) own: bool,
}

impl Profile {
    /// By the GPU's name; any other GPU by its links' generation, the newest for those that have another.
    pub(super) fn of(cluster: &Cluster) -> Self {
        let named = |gpu: &Gpu, name: &str| gpu.name.contains(name);
        let (tables, own) = match &cluster.gpu {
            gpu if named(gpu, "H200") => (Tables::H200, true),
            gpu if named(gpu, "H100") => (Tables::H100, true),
            gpu if named(gpu, "A100") => (Tables::A100, true),
            _ if cluster.intra_node.name.contains("NVLink 3") => (Tables::A100, false),
            _ => (Tables::H200, false),
        };
        Profile { tables, own }
    }

    pub(super) fn of_tables(gpu: &str) -> Option<Self> {
        let tables = match gpu {
            "h200_sxm" => Tables::H200,
            "h100_sxm" => Tables::H100,
            "a100_sxm" => Tables::A100,
            _ => return None,
        };
        Some(Profile { tables, own: true })
    }

    /// The links that were measured.
    pub(super) fn links(self) -> &'static ReferenceLinks {
        &LINKS[self.tables as usize]
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
pub(super) const OPS: [&str; 9] = [
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
    /// Standard deviation of ln(measured / curve).
    pub sd: f64,
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

impl FittedCurve {
    /// Fits a curve to measurements of one operation on a profile's own links.
    pub fn fit(gpu: &str, op: &str, measured: &[Measured]) -> Self {
        let links = Profile::of_tables(gpu).expect("a GPU with tables").links();
        let (intra, inter) = (Tier::new(&links.intra, &links.intra), Tier::new(&links.inter, &links.inter));
        let curve = fit::fit(op, measured, &intra, &inter);
        FittedCurve::new(curve, measured, &intra, &inter)
    }

    fn new(curve: Curve, measured: &[Measured], intra: &Tier, inter: &Tier) -> Self {
        let squares: f64 =
            measured.iter().map(|row| (row.seconds / curve.seconds(&row.op.demand(), intra, inter)).ln().powi(2)).sum();
        let mut range = [[f64::INFINITY, f64::NEG_INFINITY]; COORDINATES];
        for row in measured {
            for (range, at) in range.iter_mut().zip(row.op.coordinates()) {
                *range = [range[0].min(at), range[1].max(at)];
            }
        }
        FittedCurve { curve, sd: (squares / measured.len() as f64).sqrt(), range }
    }

    pub(super) fn correction(&self, coordinates: &[f64; COORDINATES], _version: Version) -> Correction {
        let inside = self.range.iter().zip(coordinates).all(|(range, &at)| range[0] <= at && at <= range[1]);
        Correction { ln_ratio: 0.0, sd: self.sd, inside }
    }
}

/// All curves.
#[derive(Debug)]
pub struct Calibration {
    curves: [[Option<FittedCurve>; OPS.len()]; 3],
}

/// Written by `cargo run --release -p moesaic-planner --example check_network -- --fit`.
const FITTED: &str = include_str!("fitted.csv");

static PUBLISHED: LazyLock<Calibration> = LazyLock::new(Calibration::read);

impl Calibration {
    /// Fitted to all published measurements.
    pub fn published() -> &'static Calibration {
        &PUBLISHED
    }

    /// A profile's curve, and whether it is the GPU's own; the H200's where the profile's GPU has none.
    pub(super) fn curve(&self, profile: Profile, op: &str) -> (&FittedCurve, bool) {
        let op = OPS.iter().position(|&name| name == op).expect("an operation with tables");
        match &self.curves[profile.tables as usize][op] {
            Some(own) => (own, profile.own),
            None => (self.curves[Tables::H200 as usize][op].as_ref().expect("the H200 has all"), false),
        }
    }

    fn read() -> Self {
        let mut curves = [const { [const { None }; OPS.len()] }; 3];
        for line in FITTED.lines().filter(|line| !line.starts_with('#')).skip(1) {
            let mut cells = line.split(',');
            let (gpu, op) = (cells.next().expect("a GPU"), cells.next().expect("an operation"));
            let values: Vec<f64> = cells.map(|cell| cell.parse().expect("a number")).collect();
            let curve = Curve::from_values(values.try_into().expect("a number for each column"));
            let profile = Profile::of_tables(gpu).expect("a GPU with tables");
            let links = profile.links();
            let (intra, inter) = (Tier::new(&links.intra, &links.intra), Tier::new(&links.inter, &links.inter));
            let table = TABLES.iter().find(|table| (table.gpu, table.op) == (gpu, op)).expect("a table");
            let idx = OPS.iter().position(|&name| name == op).expect("an operation with tables");
            curves[profile.tables as usize][idx] = Some(FittedCurve::new(curve, &table.rows(), &intra, &inter));
        }
        Calibration { curves }
    }
}
