//! A tensor: dims, element type and a region of an arena.

use half::bf16;
use moesaic_spec::DType;

use crate::{Arena, DeviceError, Region};

/// Dims of a tensor at most: they are kept in the tensor, because a step makes thousands of small ones.
pub const MAX_DIMS: usize = 6;

/// A dense row-major tensor that owns its memory. On `Meta` it has a shape and no data.
pub struct Tensor {
    dims: [usize; MAX_DIMS],
    num_dims: usize,
    dtype: DType,
    region: Region,
}

impl Tensor {
    /// Takes memory for `dims` (at most [`MAX_DIMS`]) from `arena`; the content is whatever was there.
    pub fn empty(arena: &Arena, dims: &[usize], dtype: DType) -> Result<Tensor, DeviceError> {
        assert!(dims.len() <= MAX_DIMS, "a tensor of {} dims, at most {MAX_DIMS}", dims.len());
        let bytes = dims.iter().try_fold(dtype.size_bytes(), |n, &d| n.checked_mul(d)).unwrap_or(usize::MAX);
        let mut padded = [0; MAX_DIMS];
        padded[..dims.len()].copy_from_slice(dims);
        Ok(Tensor { dims: padded, num_dims: dims.len(), dtype, region: arena.alloc(bytes)? })
    }

    /// Sizes, outermost first.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.num_dims]
    }

    /// Rows and columns of a matrix. Panics on another rank.
    pub fn dims2(&self) -> (usize, usize) {
        let &[rows, cols] = self.dims() else { panic!("a matrix was expected, this tensor is {:?}", self.dims()) };
        (rows, cols)
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements.
    pub fn num_elements(&self) -> usize {
        self.dims().iter().product()
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> usize {
        self.num_elements() * self.dtype.size_bytes()
    }

    /// Whether there is no data.
    pub fn is_meta(&self) -> bool {
        self.region.is_meta()
    }

    /// Its first byte's place in `arena`; `None` if its memory is of another.
    pub fn offset_in(&self, arena: &Arena) -> Option<usize> {
        self.region.offset_in(arena)
    }

    /// The raw bytes. Panics on `Meta`.
    pub fn bytes(&self) -> &[u8] {
        self.region.bytes()
    }

    /// The raw bytes, to write. Panics on `Meta`.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.region.bytes_mut()
    }
}

/// Element access; each panics on `Meta` and on another element type: both are our own mistakes.
macro_rules! elements {
    ($($dtype:pat => $read:ident, $write:ident, $element:ty;)*) => {
        impl Tensor {
            $(
                #[doc = concat!("The elements as `", stringify!($element), "`. Panics on `Meta` or another type.")]
                pub fn $read(&self) -> &[$element] {
                    assert!(matches!(self.dtype, $dtype), "a tensor of {} was read as another type", self.dtype);
                    let bytes = self.region.bytes();
                    // SAFETY: regions are 64-byte aligned and hold whole elements; every bit pattern is a valid value.
                    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size_of::<$element>()) }
                }
                #[doc = concat!("The elements as `", stringify!($element), "`, to write. Panics as above.")]
                pub fn $write(&mut self) -> &mut [$element] {
                    assert!(matches!(self.dtype, $dtype), "a tensor of {} was written as another type", self.dtype);
                    let bytes = self.region.bytes_mut();
                    let (ptr, len) = (bytes.as_mut_ptr(), bytes.len());
                    // SAFETY: as for reading; the region is borrowed mutably for as long as the slice lives.
                    unsafe { std::slice::from_raw_parts_mut(ptr.cast(), len / size_of::<$element>()) }
                }
            )*
        }
    };
}

elements! {
    DType::F32 => f32, f32_mut, f32;
    DType::BF16 => bf16, bf16_mut, bf16;
    DType::I32 => i32, i32_mut, i32;
    DType::F8E4M3 | DType::U8 => u8, u8_mut, u8;
}
