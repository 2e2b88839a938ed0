//! What every op checks before it works.

use moesaic_device::{DeviceError, Tensor};
use moesaic_spec::DType;

/// An op was asked for something outside its contract, or memory ran out.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Sizes or types do not fit together.
    #[error("{op}: {what} is {got}, expected {expected}")]
    Contract {
        /// The op's folder.
        op: &'static str,
        /// The argument.
        what: &'static str,
        /// What the contract says.
        expected: String,
        /// What came.
        got: String,
    },
    /// No memory for the result.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// Checks a tensor's dims and element type.
pub fn check(
    op: &'static str,
    what: &'static str,
    tensor: &Tensor,
    dims: &[usize],
    dtype: DType,
) -> Result<(), KernelError> {
    if tensor.dims() == dims && tensor.dtype() == dtype {
        return Ok(());
    }
    Err(KernelError::Contract {
        op,
        what,
        expected: format!("{dtype} {dims:?}"),
        got: format!("{} {:?}", tensor.dtype(), tensor.dims()),
    })
}

/// Checks any other condition.
pub fn require(
    condition: bool,
    op: &'static str,
    what: &'static str,
    expected: impl FnOnce() -> String,
    got: impl FnOnce() -> String,
) -> Result<(), KernelError> {
    if condition { Ok(()) } else { Err(KernelError::Contract { op, what, expected: expected(), got: got() }) }
}

/// A range of columns of a tensor whose last dim is the columns and whose other dims are rows: a slice of a fused result,
/// without a copy.
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
    /// Columns `start..start + len`.
    pub fn new(tensor: &'a Tensor, start: usize, len: usize) -> Cols<'a> {
        assert!(start + len <= width(tensor), "columns {start}..{start}+{len} of {:?}", tensor.dims());
        Cols { tensor, start, len }
    }

    /// Columns of the wider tensor: elements from one row to the next.
    pub fn width(&self) -> usize {
        width(self.tensor)
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        let dims = self.tensor.dims();
        dims[..dims.len().saturating_sub(1)].iter().product()
    }
}

impl<'a> From<&'a Tensor> for Cols<'a> {
    fn from(tensor: &'a Tensor) -> Cols<'a> {
        Cols { tensor, start: 0, len: width(tensor) }
    }
}

fn width(tensor: &Tensor) -> usize {
    *tensor.dims().last().expect("a tensor has at least one dim")
}
