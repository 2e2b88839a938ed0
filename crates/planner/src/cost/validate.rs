//! How well prices meet measurements that they were not learned from.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use moesaic_fit::random;

use super::learned::{Factors, Family, Fit, NEAR, Widening, by_family};
use super::{CostModel, Learned, Op, Row, published, roofline};
use crate::estimate::NINETY;

/// Which rows are held out together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Each row for itself: other points of shapes that are known.
    Rows,
    /// All rows of a shape (a model's experts, a matrix, heads), whatever tokens, device and stack: shapes never seen.
    Shapes,
}

/// A row and its price without it.
#[derive(Clone, Debug)]
pub struct HeldOut<'a> {
    /// What was measured.
    pub row: &'a Row,
    /// Of its op.
    pub family: Family,
    /// Predicted time, seconds.
    pub seconds: f64,
    /// Standard deviation of its logarithm, as learned; [`widenings`] says by how much it must grow.
    pub sd: f64,
    /// To the nearest row that was learned from, in length scales.
    pub distance: f64,
}

impl HeldOut<'_> {
    /// |predicted - measured| / measured.
    pub fn error(&self) -> f64 {
        (self.seconds / self.row.seconds - 1.0).abs()
    }

    /// Standard deviations between both.
    pub fn z(&self) -> f64 {
        (self.seconds / self.row.seconds).ln().abs() / self.sd
    }
}

/// Prices every row by a model that was learned from the other parts; what is held out together is in one part of `parts`.
///
/// The search for length scales starts where it ended for all rows, which only saves time.
pub fn cross_validate<'a>(rows: &'a [Row], learned: &Learned, split: Split, parts: u64) -> Vec<HeldOut<'a>> {
    let families = by_family(rows);
    let held_out = |family: Family, rows: &[&'a Row], held: u64| -> Vec<HeldOut<'a>> {
        let shapes: BTreeSet<Vec<u64>> = rows.iter().map(|row| shape(&row.op)).collect();
        let part = |idx: usize, row: &Row| match split {
            Split::Rows => (random::uniform(5, idx as u64) * parts as f64) as u64,
            // In turn, so that each part has about as many shapes.
            Split::Shapes => shapes.range(..shape(&row.op)).count() as u64 % parts,
        };
        let (test, train): (Vec<_>, Vec<_>) = rows.iter().enumerate().partition(|(idx, row)| part(*idx, row) == held);
        let train: Vec<&Row> = train.into_iter().map(|(_, row)| *row).collect();
        if test.is_empty() || train.is_empty() {
            return Vec::new();
        }
        let factors = Factors::new(Fit::train(&train, learned.fit(family)), &train);
        let factors = Arc::new(BTreeMap::from([(family, factors)]));
        let price = |(_, &row): (usize, &&'a Row)| {
            let gpu = &published::device(&row.device).expect("a device with tables").gpu;
            let model = CostModel::of(gpu, row.stack, factors.clone());
            let (price, distance) = model.price_and_distance(&row.op, Some(&row.kernel));
            HeldOut { row, family, seconds: price.seconds, sd: price.sd, distance }
        };
        test.into_iter().map(price).collect()
    };
    std::thread::scope(|scope| {
        let held_out = &held_out;
        let parts = (0..parts).flat_map(|held| families.iter().map(move |(family, rows)| (*family, rows, held)));
        let running: Vec<_> =
            parts.map(|(family, rows, held)| scope.spawn(move || held_out(family, rows, held))).collect();
        running.into_iter().flat_map(|part| part.join().expect("no panic in a part")).collect()
    })
}

/// What all rows of a shape share.
fn shape(op: &Op) -> Vec<u64> {
    match *op {
        Op::Gemm { n, k, .. } => vec![n as u64, k as u64],
        Op::Experts { hidden, intermediate, experts, .. } => vec![hidden as u64, intermediate as u64, experts as u64],
        Op::ExpertsDeepEp { ep, .. } => vec![ep as u64],
        Op::AttentionPrefill { heads, kv_heads, .. } | Op::AttentionDecode { heads, kv_heads, .. } => {
            vec![heads, kv_heads]
        }
        Op::MlaPrefill { heads, .. } | Op::MlaDecode { heads, .. } => vec![heads],
        Op::Stream { .. } => Vec::new(),
    }
}

/// By how much standard deviations of each family must grow for 90 % of the rows to lie in their 90 % interval: near rows by
/// [`Split::Rows`], far from all by [`Split::Shapes`].
pub fn widenings(rows: &[HeldOut], shapes: &[HeldOut]) -> BTreeMap<Family, Widening> {
    let needed = |held_out: &[HeldOut], of: &dyn Fn(&HeldOut) -> bool| {
        let z: Vec<f64> = held_out.iter().filter(|held| of(held)).map(|held| held.z()).collect();
        (!z.is_empty()).then(|| quantile(z, 0.9) / NINETY)
    };
    let families: BTreeSet<Family> = rows.iter().map(|held| held.family).collect();
    let widening = |family| {
        let near = needed(rows, &|held| held.family == family && held.distance <= NEAR).unwrap_or(1.0);
        let far = needed(shapes, &|held| held.family == family && held.distance > NEAR).unwrap_or(near);
        Widening { near, far: far.max(near) }
    };
    families.into_iter().map(|family| (family, widening(family))).collect()
}

/// How well a set of rows is met.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Rows.
    pub rows: usize,
    /// Half of the errors are below.
    pub median: f64,
    /// Nine tenths of the errors are below.
    pub p90: f64,
    /// Share of rows inside their 90 % interval.
    pub coverage: f64,
    /// Share of rows that are far from all that was learned from.
    pub far: f64,
    /// Predictions that are faster than physics.
    pub below_physics: usize,
}

/// Scores of some rows, whose standard deviations grow by `widenings`. `None` without rows.
pub fn score<'a>(
    held_out: impl Iterator<Item = &'a HeldOut<'a>>,
    widenings: &BTreeMap<Family, Widening>,
) -> Option<Score> {
    let held_out: Vec<_> = held_out.collect();
    if held_out.is_empty() {
        return None;
    }
    let rows = held_out.len();
    let errors: Vec<f64> = held_out.iter().map(|held| held.error()).collect();
    let inside = held_out.iter().filter(|held| held.z() <= NINETY * widenings[&held.family].at(held.distance)).count();
    let below = |held: &&&HeldOut| {
        let gpu = &published::device(&held.row.device).expect("a device with tables").gpu;
        held.seconds < roofline::bound(gpu, &held.row.op)
    };
    Some(Score {
        rows,
        median: quantile(errors.clone(), 0.5),
        p90: quantile(errors, 0.9),
        far: held_out.iter().filter(|held| held.distance > NEAR).count() as f64 / rows as f64,
        coverage: inside as f64 / rows as f64,
        below_physics: held_out.iter().filter(below).count(),
    })
}

fn quantile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() as f64 * share) as usize).min(values.len() - 1)]
}
