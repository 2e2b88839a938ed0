//! `linear`, one output at a time.

use half::bf16;
use moesaic_device::Tensor;
use moesaic_spec::DType;

use crate::cols::Cols;
use crate::matrix::{PackedMatrix, reference};

/// Row `row` of a column range, as F32.
pub fn row(x: &Cols, row: usize) -> Vec<f32> {
    let at = row * x.width() + x.start;
    match x.tensor.dtype() {
        DType::F32 => x.tensor.f32()[at..at + x.len].to_vec(),
        _ => x.tensor.bf16()[at..at + x.len].iter().map(|v| v.to_f32()).collect(),
    }
}

/// Rounds to the element type of a result.
pub fn rounded(value: f32, dtype: DType) -> f32 {
    if dtype == DType::BF16 { bf16::from_f32(value).to_f32() } else { value }
}

/// `x Wᵀ + bias`, row-major, rounded to `out_dtype`.
pub fn linear<'a>(x: impl Into<Cols<'a>>, w: &PackedMatrix, bias: Option<&Tensor>, out_dtype: DType) -> Vec<f32> {
    let x = x.into();
    let mut y = Vec::new();
    for t in 0..x.rows() {
        let x = row(&x, t);
        for n in 0..w.n() {
            let sum = reference::dot(&x, w, n);
            y.push(rounded(bias.map_or(sum, |bias| sum + bias.f32()[n]), out_dtype));
        }
    }
    y
}
