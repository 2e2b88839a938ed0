//! Element types.

use std::fmt;

/// The element type of a tensor, in memory and on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// bfloat16: F32 with the low 16 bits cut off.
    BF16,
    /// IEEE 754 binary16.
    F16,
    /// OCP FP8 E4M3 (finite only, NaN is 0x7f/0xff).
    F8E4M3,
    /// OCP E8M0: a power of two, 2^(code - 127); block scales.
    F8E8M0,
    /// 64-bit signed integer.
    I64,
    /// 32-bit signed integer.
    I32,
    /// Byte.
    U8,
}

impl DType {
    /// Size of one element.
    pub const fn size_bytes(self) -> usize {
        match self {
            DType::I64 => 8,
            DType::F32 | DType::I32 => 4,
            DType::BF16 | DType::F16 => 2,
            DType::F8E4M3 | DType::F8E8M0 | DType::U8 => 1,
        }
    }

    /// The type that arithmetic on weights of this type uses for activations between ops: F32 stays F32, everything
    /// narrower is BF16.
    pub const fn compute(self) -> DType {
        match self {
            DType::F32 => DType::F32,
            _ => DType::BF16,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "F32",
            DType::BF16 => "BF16",
            DType::F16 => "F16",
            DType::F8E4M3 => "F8_E4M3",
            DType::F8E8M0 => "F8_E8M0",
            DType::I64 => "I64",
            DType::I32 => "I32",
            DType::U8 => "U8",
        })
    }
}
