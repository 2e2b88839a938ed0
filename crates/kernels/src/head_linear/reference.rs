//! `head_linear`, one output at a time.

use moesaic_spec::DType;

use crate::cols::Cols;
use crate::linear::reference::linear;
use crate::matrix::PackedMatrix;

/// Each head is a linear on its columns; row-major `[T, H * N]`.
pub fn head_linear<'a>(x: impl Into<Cols<'a>>, head_stride: usize, w: &[PackedMatrix], out_dtype: DType) -> Vec<f32> {
    let x = x.into();
    let heads = w.iter().enumerate().map(|(h, w)| {
        let cols = Cols { tensor: x.tensor, start: x.start + h * head_stride, len: w.k() };
        linear(cols, w, None, out_dtype)
    });
    let heads: Vec<Vec<f32>> = heads.collect();
    let n = w[0].n();
    (0..x.rows()).flat_map(|t| heads.iter().flat_map(move |y| y[t * n..(t + 1) * n].iter().copied())).collect()
}
