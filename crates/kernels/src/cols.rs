//! A range of a matrix's columns, as an op's input.

use moesaic_device::Tensor;

use crate::KernelError;
use crate::contract::require;

/// Columns `start .. start + len` of every row of a matrix.
#[derive(Clone, Copy)]
pub struct Cols<'a> {
    /// The matrix.
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

    /// Rows and width of the matrix, once the range is known to lie inside it.
    pub fn check(&self, op: &'static str, what: &'static str) -> Result<(usize, usize), KernelError> {
        let &[rows, width] = self.tensor.dims() else {
            return Err(KernelError::Contract {
                op,
                what,
                expected: "a matrix".into(),
                got: format!("{:?}", self.tensor.dims()),
            });
        };
        let inside = self.len > 0 && self.start.checked_add(self.len).is_some_and(|end| end <= width);
        let got = || format!("columns {} to {}", self.start, self.start.saturating_add(self.len));
        require(inside, op, what, || format!("at least one column, and all inside a width of {width}"), got)?;
        Ok((rows, width))
    }
}
