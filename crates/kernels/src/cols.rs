//! A range of a matrix's columns, as an op's input: a slice of a fused result, without a copy.

use moesaic_device::Tensor;

use crate::KernelError;
use crate::contract::require;

/// Columns `start .. start + len` of every row of a tensor, whose last dim is the columns and whose other dims are rows.
#[derive(Clone, Copy)]
pub struct Cols<'a> {
    /// The wider tensor.
    pub tensor: &'a Tensor,
    /// First column.
    pub start: usize,
    /// Number of columns.
    pub len: usize,
}

impl<'a> Cols<'a> {
    /// All columns.
    pub fn all(tensor: &'a Tensor) -> Cols<'a> {
        Cols { tensor, start: 0, len: tensor.dims().last().copied().unwrap_or(0) }
    }

    /// Columns of the wider tensor: elements from one row to the next.
    pub fn width(&self) -> usize {
        self.tensor.dims().last().copied().unwrap_or(0)
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        let dims = self.tensor.dims();
        dims[..dims.len().saturating_sub(1)].iter().product()
    }

    /// Rows and width, once the range is known to lie inside the tensor.
    pub fn check(&self, op: &'static str, what: &'static str) -> Result<(usize, usize), KernelError> {
        let (rows, width) = (self.rows(), self.width());
        let inside = self.len > 0 && self.start.checked_add(self.len).is_some_and(|end| end <= width);
        let got = || format!("columns {} to {}", self.start, self.start.saturating_add(self.len));
        require(inside, op, what, || format!("at least one column, and all inside a width of {width}"), got)?;
        Ok((rows, width))
    }
}

impl<'a> From<&'a Tensor> for Cols<'a> {
    fn from(tensor: &'a Tensor) -> Cols<'a> {
        Cols::all(tensor)
    }
}
