//! Prices from tables that a machine measured of itself.
//!
//! Each op in each type stands alone: F32 says nothing of BF16. The logarithm of time over roofline is interpolated between
//! rows by kriging in the logarithms of sizes, whose length scales are learned from the rows themselves. Beyond the rows their
//! edge holds, less and less surely.

use std::collections::BTreeMap;

use moesaic_fit::{Estimate, Kriging, Point};
use moesaic_spec::Gpu;
use serde::Serialize;

use super::op::{Op, Precision};
use super::roofline;
use super::table::Row;
use crate::estimate::NINETY;
use crate::price::{Price, Source};

/// Length scales to the nearest row within which it speaks for an op.
const NEAR: f64 = 1.0;
/// Fewer rows tell nothing of length scales.
const ENOUGH_ROWS: usize = 6;
/// Where scales are looked for first, and what they are where they are not: sizes that differ by a factor of seven.
const SCALE: f64 = 2.0;
/// Standard deviation of ln(time) among rows that are too few to tell it.
const FEW_ROWS_SD: f64 = 0.2;
/// How much less sure a price is for each e-fold beyond the rows: a judgement.
const BEYOND_SD: f64 = 0.1;
/// Medians are settled when they are this sure; no price is surer.
const LEAST_SD: f64 = 0.01;

/// What a machine's kernels take, op by op and type by type.
#[derive(Debug)]
pub struct OwnOps {
    /// The machine.
    gpu: Gpu,
    fits: BTreeMap<(&'static str, Precision), Fit>,
}

/// How well the rows of a table are met by each other.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LeftOut {
    /// Rows.
    pub rows: usize,
    /// Half of the errors are below: |predicted - measured| / measured, each row predicted from all others.
    pub median: f64,
    /// Nine tenths of the errors are below.
    pub p90: f64,
}

impl LeftOut {
    /// Of errors `|ln(predicted / measured)|`; `None` without any.
    pub(crate) fn of(mut ln_errors: Vec<f64>) -> Option<LeftOut> {
        ln_errors.sort_by(f64::total_cmp);
        let at = |share: f64| Some(ln_errors.get(((ln_errors.len() as f64 - 1.0) * share).round() as usize)?.exp_m1());
        Some(LeftOut { rows: ln_errors.len(), median: at(0.5)?, p90: at(0.9)? })
    }
}

impl OwnOps {
    /// From rows that this GPU measured. Where a table has several kernels, those with the most rows count.
    pub fn new(gpu: &Gpu, rows: &[Row]) -> OwnOps {
        let mut kinds: BTreeMap<_, BTreeMap<&str, Vec<&Row>>> = BTreeMap::new();
        for row in rows {
            if let Some(table) = table_of(&row.op) {
                let kernels = kinds.entry((table, row.op.precision())).or_default();
                kernels.entry(row.kernel.as_str()).or_default().push(row);
            }
        }
        let mut fits = BTreeMap::new();
        for (kind, kernels) in kinds {
            let usual = kernels.into_values().max_by_key(Vec::len).expect("a kind has rows");
            fits.insert(kind, Fit::new(gpu, &usual));
        }
        OwnOps { gpu: gpu.clone(), fits }
    }

    /// What an op costs on a GPU that may have other figures than the machine: by the factor between roofline and kernel that the
    /// machine has. `None` where there is no table of the op in this type.
    pub fn price(&self, gpu: &Gpu, op: &Op) -> Option<Price> {
        let op = &as_measured(op);
        let fit = self.fits.get(&(table_of(op)?, op.precision()))?;
        let (factor, source) = fit.predict(&sizes(op));
        let seconds = unit_seconds(gpu, op) * factor.mean.exp();
        Some(Price { seconds: seconds.max(roofline::bound(gpu, op)), sd: factor.sd, source })
    }

    /// How well each row is met by the others of its table, by table.
    pub fn leave_one_out(&self) -> BTreeMap<&'static str, LeftOut> {
        let mut errors: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
        for ((table, _), fit) in &self.fits {
            let all = fit.left_out();
            errors.entry(table).or_default().extend(all.into_iter().map(|(estimate, y)| (estimate.mean - y).abs()));
        }
        errors.into_iter().filter_map(|(table, errors)| Some((table, LeftOut::of(errors)?))).collect()
    }

    /// The machine that measured.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }
}

/// One op in one type.
#[derive(Debug)]
struct Fit {
    mean: f64,
    /// Of what is left of ln(time / roofline).
    kriging: Kriging,
    /// The same by row.
    rest: Vec<f64>,
    /// Smallest and greatest size of each coordinate.
    range: Vec<(f64, f64)>,
    /// By how much standard deviations must be wider for 90 % of rows to be inside their interval when they are left out.
    widened: f64,
}

impl Fit {
    fn new(gpu: &Gpu, rows: &[&Row]) -> Fit {
        let factor = |row: &&Row| (row.seconds / unit_seconds(gpu, &row.op)).ln();
        let mean = rows.iter().map(factor).sum::<f64>() / rows.len() as f64;
        let point = |row: &&Row| Point { at: sizes(&row.op), value: factor(row) - mean };
        let points: Vec<Point> = rows.iter().map(point).collect();
        let start = vec![SCALE; points[0].at.len()];
        let range = (0..start.len()).map(|i| range(points.iter().map(|point| point.at[i]))).collect();
        let rest = points.iter().map(|point| point.value).collect();
        let kriging = match rows.len() {
            0..ENOUGH_ROWS => Kriging::new(points, start, FEW_ROWS_SD * FEW_ROWS_SD, 0.0),
            _ => Kriging::fit(points, &start, None),
        };
        let mut fit = Fit { mean, kriging, rest, range, widened: 1.0 };
        let mut z: Vec<f64> =
            fit.left_out().iter().map(|(estimate, y)| (estimate.mean - y).abs() / estimate.sd.max(LEAST_SD)).collect();
        z.sort_by(f64::total_cmp);
        if let Some(z90) = z.get((z.len().saturating_sub(1) as f64 * 0.9).round() as usize) {
            fit.widened = (z90 / NINETY).max(1.0);
        }
        fit
    }

    /// ln(time / roofline) at sizes.
    fn predict(&self, sizes: &[f64]) -> (Estimate, Source) {
        let inside: Vec<f64> = sizes.iter().zip(&self.range).map(|(x, (low, high))| x.clamp(*low, *high)).collect();
        let beyond = sizes.iter().zip(&inside).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
        let rest = self.kriging.predict(&inside);
        let sd = (rest.sd * self.widened).max(LEAST_SD).hypot(BEYOND_SD * beyond);
        let source = if beyond == 0.0 && rest.distance <= NEAR { Source::Table } else { Source::Predictor };
        (Estimate { mean: self.mean + rest.mean, sd, ..rest }, source)
    }

    /// What is expected of each row without it, and what it is. A single row has no others.
    fn left_out(&self) -> Vec<(Estimate, f64)> {
        if self.rest.len() < 2 {
            return Vec::new();
        }
        self.kriging.leave_one_out().into_iter().zip(self.rest.iter().copied()).collect()
    }
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)))
}

/// Seconds that factors are told by: the roofline without tiles, which are those of GPUs.
fn unit_seconds(gpu: &Gpu, op: &Op) -> f64 {
    gpu.launch_s + roofline::bound(gpu, op).max(f64::MIN_POSITIVE)
}

/// Rows that travel are worked on by the same kernels as rows that do not.
fn as_measured(op: &Op) -> Op {
    match *op {
        Op::ExpertsDeepEp { tokens, hidden, intermediate, top_k, experts, ep, weights, skew, .. } => {
            Op::Experts { tokens, hidden, intermediate, top_k, experts, tp: 1.0, ep, weights, matrices: 3, skew }
        }
        other => other,
    }
}

/// The table of an op; `None` of what has none.
fn table_of(op: &Op) -> Option<&'static str> {
    Some(match op {
        Op::Gemm { .. } => "gemm",
        Op::Experts { matrices: 3, .. } => "moe",
        Op::Experts { .. } => "moe_ungated",
        Op::AttentionPrefill { .. } => "attn_prefill",
        Op::AttentionDecode { .. } => "attn_decode",
        Op::MlaPrefill { .. } => "mla_prefill",
        Op::MlaDecode { .. } => "mla_decode",
        Op::ExpertsDeepEp { .. } | Op::Stream { .. } => return None,
    })
}

/// Logarithms of sizes.
fn sizes(op: &Op) -> Vec<f64> {
    let sizes: &[f64] = match *op {
        Op::Gemm { m, n, k, .. } => &[m, n, k],
        Op::Experts { tokens, hidden, top_k, experts, ep, skew, .. } => {
            let part = op.expert_part().expect("experts");
            let loads = part.loads();
            &[tokens, hidden, part.width, top_k, experts / ep, ep, loads.rows / loads.touched.max(1e-3), skew.exp()]
        }
        Op::AttentionPrefill { seqs, new_tokens, context, heads, kv_heads, head_dim, .. } => {
            &[seqs, new_tokens, context / new_tokens, heads as f64, kv_heads as f64, head_dim as f64]
        }
        Op::AttentionDecode { seqs, context, heads, kv_heads, head_dim, .. } => {
            &[seqs, context, heads as f64, kv_heads as f64, head_dim as f64]
        }
        Op::MlaPrefill { seqs, new_tokens, context, heads, latent, rope, .. } => {
            &[seqs, new_tokens, context / new_tokens, heads as f64, latent as f64, rope as f64]
        }
        Op::MlaDecode { seqs, context, heads, latent, rope, .. } => {
            &[seqs, context, heads as f64, latent as f64, rope as f64]
        }
        Op::ExpertsDeepEp { .. } | Op::Stream { .. } => unreachable!("no table has this op"),
    };
    sizes.iter().map(|size| size.max(1e-3).ln()).collect()
}
