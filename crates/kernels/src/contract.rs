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
    /// A number that no computation may go on from.
    #[error("{op}: row {row} of the {what} has {value} at column {column}, expected finite numbers only")]
    NonFinite {
        /// The op's folder.
        op: &'static str,
        /// The argument.
        what: &'static str,
        /// First row that has one.
        row: usize,
        /// Its first column that has one.
        column: usize,
        /// NaN or an infinity.
        value: f32,
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
