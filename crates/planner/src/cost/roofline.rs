//! What the data sheet says about an op. Source: Williams, Waterman and Patterson, "Roofline: an insightful visual
//! performance model", 2009; tiles and waves: NVIDIA, "Matrix multiplication background user's guide".

use moesaic_spec::Gpu;

use super::op::{Op, Phase};

/// Rows and columns of the tiles that large products are cut into.
const TILE: f64 = 128.0;
/// Least rows of a tile: what the tensor units take at a time.
const LEAST_TILE_ROWS: f64 = 16.0;

/// Seconds below which no op can be: all operations at the peak, all bytes at the memory's bandwidth, whichever is longer.
/// Experts get rows as is expected.
pub fn bound(gpu: &Gpu, op: &Op) -> f64 {
    (op.flops() / op.precision().peak(gpu)).max(op.bytes() / gpu.memory_bandwidth)
}

/// The same when all tokens of a rank may have gone to one expert: how experts were chosen is not in a table.
pub fn luckiest(gpu: &Gpu, op: &Op) -> f64 {
    let bytes = op.expert_part().map_or(op.bytes(), |part| part.weights_of_one * op.precision().bytes());
    (op.flops() / op.precision().peak(gpu)).max(bytes / gpu.memory_bandwidth)
}

/// Seconds at the utilisation and launch cost that the GPU's file states.
pub fn seconds(gpu: &Gpu, op: &Op) -> f64 {
    let computing = quantised_flops(gpu, op) / (op.precision().peak(gpu) * gpu.compute_utilization);
    let streaming = op.bytes() / (gpu.memory_bandwidth * gpu.memory_utilization);
    gpu.launch_s * launches(op) + computing.max(streaming)
}

/// Seconds at full utilisation, with the given cost of a launch. What kernels were measured at is told in these units, so
/// that assumptions about utilisation do not move what was measured.
pub(super) fn ideal_seconds(gpu: &Gpu, op: &Op, launch_s: f64) -> f64 {
    let computing = quantised_flops(gpu, op) / op.precision().peak(gpu);
    launch_s * launches(op) + computing.max(op.bytes() / gpu.memory_bandwidth)
}

/// Kernels that an op starts one after another.
pub(super) fn launches(op: &Op) -> f64 {
    match op {
        // Sort, gate and up, activation, down, sum.
        Op::Experts { .. } => 5.0,
        // Gate and up, activation, down.
        Op::ExpertsDeepEp { .. } => 3.0,
        // The parts of long contexts, and their sum.
        Op::AttentionDecode { .. } | Op::MlaDecode { .. } => 2.0,
        _ => 1.0,
    }
}

/// Operations as the multiprocessors do them: rows padded to tiles, tiles in waves.
fn quantised_flops(gpu: &Gpu, op: &Op) -> f64 {
    let sms = gpu.sms as f64;
    match *op {
        Op::Gemm { m, n, k, .. } => 2.0 * padded(m) * n * k * unevenness(tiles(m, n), sms),
        Op::Experts { hidden, .. } | Op::ExpertsDeepEp { hidden, .. } => {
            let part = op.expert_part().expect("experts");
            let loads = part.loads();
            let touched = loads.touched.max(f64::MIN_POSITIVE);
            let rows = loads.rows / touched;
            let tiles = touched * tiles(rows, part.width.max(hidden));
            2.0 * padded(rows) * touched * part.weights_of_one * unevenness(tiles, sms)
        }
        _ => op.flops(),
    }
}

/// Rows as tiles have them.
fn padded(rows: f64) -> f64 {
    let tile = rows.max(1.0).log2().ceil().exp2().clamp(LEAST_TILE_ROWS, TILE);
    // Rows are means: what is not a whole number of rows is padded in proportion.
    if rows < 1.0 { rows * LEAST_TILE_ROWS } else { (rows / tile).ceil() * tile }
}

fn tiles(rows: f64, columns: f64) -> f64 {
    (rows / TILE).ceil().max(1.0) * (columns / TILE).ceil()
}

/// How much longer all waves take than full ones would. Fewer tiles than multiprocessors are no wave: libraries cut the inner
/// width then.
pub(super) fn unevenness(tiles: f64, sms: f64) -> f64 {
    let waves = tiles / sms;
    if waves <= 1.0 { 1.0 } else { waves.ceil() / waves }
}

/// Waves of an op's tiles, for what kernels reach depends on them; 0 where there are no tiles.
pub(super) fn waves(gpu: &Gpu, op: &Op) -> f64 {
    let sms = gpu.sms as f64;
    match *op {
        Op::Gemm { m, n, .. } => tiles(m, n) / sms,
        Op::Experts { .. } | Op::ExpertsDeepEp { phase: Phase::Context | Phase::Generation, .. } => {
            let part = op.expert_part().expect("experts");
            let loads = part.loads();
            let touched = loads.touched.max(1.0);
            touched * tiles(loads.rows / touched, 2.0 * part.width) / sms
        }
        _ => 0.0,
    }
}
