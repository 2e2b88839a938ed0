//! A range of columns of a matrix: fused projections are read where they were written.

use moesaic_device::Tensor;

/// Columns `start .. start + len` of every row of `tensor`.
#[derive(Clone, Copy)]
pub struct Cols<'a> {
    /// The matrix.
    pub tensor: &'a Tensor,
    /// First column.
    pub start: usize,
    /// Number of columns.
    pub len: usize,
}
