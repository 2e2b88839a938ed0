//! `experts`, one row at a time.

use moesaic_device::Tensor;
use moesaic_spec::DType;

use super::activation::{gelu_tanh, silu};
use super::{Activation, ExpertWeight, ExpertWeights};
use crate::linear::reference::{rounded, row};
use crate::matrix::{TILE_N, reference::dot};

/// Row `r` belongs to the expert `e` with `offsets[e] <= r < offsets[e + 1]`; row-major `[R, D]`, rounded to `out_dtype`.
pub fn experts(x: &Tensor, offsets: &[usize], w: &ExpertWeights, out_dtype: DType) -> Vec<f32> {
    let mut y = Vec::new();
    for (expert, rows) in w.experts.iter().zip(offsets.windows(2)) {
        for r in rows[0]..rows[1] {
            y.extend(one(&row(&x.into(), r), expert, w.activation).iter().map(|&y| rounded(y, out_dtype)));
        }
    }
    y
}

fn one(x: &[f32], w: &ExpertWeight, activation: Activation) -> Vec<f32> {
    let compute = w.dtype().compute();
    let hidden = (0..w.f()).map(|f| {
        let value = match activation {
            Activation::SwiGlu => {
                // Panels of gate and up alternate.
                let gate_row = f / TILE_N * 2 * TILE_N + f % TILE_N;
                silu(dot(x, w.gate_up(), gate_row)) * dot(x, w.gate_up(), gate_row + TILE_N)
            }
            Activation::Gelu => gelu_tanh(dot(x, w.gate_up(), f)),
        };
        rounded(value, compute)
    });
    let hidden: Vec<f32> = hidden.collect();
    (0..w.d()).map(|d| dot(&hidden, w.down(), d)).collect()
}
