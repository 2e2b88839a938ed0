//! Some rows and columns of a stored tensor.

use std::ops::Range;

use moesaic_kernels::matrix::SourceMatrix;
use moesaic_spec::model::tensors::Role;

use super::WeightSource;

/// Rows and columns; a vector is one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    pub(crate) rows: Range<usize>,
    pub(crate) cols: Range<usize>,
}

impl Cut {
    /// These elements of the whole.
    pub(super) fn of<'a>(&self, whole: &SourceMatrix<'a>) -> SourceMatrix<'a> {
        whole.row_range(self.rows.clone()).col_range(self.cols.clone())
    }

    pub(super) fn num_elements(&self) -> usize {
        self.rows.len() * self.cols.len()
    }
}

/// A cut of the tensor with this role.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) role: Role,
    pub(crate) cut: Cut,
}

impl WeightSource<'_> {
    /// All of a tensor.
    pub(crate) fn whole(&self, role: Role) -> Part {
        let (rows, cols) = self.dims(role);
        Part { role, cut: Cut { rows: 0..rows, cols: 0..cols } }
    }

    /// Some rows of a matrix.
    pub(crate) fn rows(&self, role: Role, rows: Range<usize>) -> Part {
        Part { role, cut: Cut { rows, cols: 0..self.dims(role).1 } }
    }

    /// Some columns of a matrix, or elements of a vector.
    pub(crate) fn cols(&self, role: Role, cols: Range<usize>) -> Part {
        Part { role, cut: Cut { rows: 0..self.dims(role).0, cols } }
    }
}
