//! The GPU: what one chip with its memory can do, takes and costs.

pub(crate) mod file;

use crate::{Bytes, DType, WeightFormat};

/// One GPU (or, on a laptop, one share of the CPU).
#[derive(Clone, Debug, PartialEq)]
pub struct Gpu {
    /// Its name.
    pub name: String,
    /// Memory that a rank may use.
    pub memory: Bytes,
    /// Streaming multiprocessors: the tiles of a product run on so many at a time.
    pub sms: usize,
    /// Dense peak; the type of the weights decides which.
    pub peak_flops: PeakFlops,
    /// Share of the peak that large products reach (MFU).
    pub compute_utilization: f64,
    /// Memory bandwidth, bytes/s.
    pub memory_bandwidth: f64,
    /// Share of it that streaming reaches.
    pub memory_utilization: f64,
    /// Time that starting one op costs, seconds.
    pub launch_s: f64,
    /// Power, where it is known.
    pub power: Option<Power>,
    /// Rent of one GPU, where it is known.
    pub usd_per_hour: Option<f64>,
}

/// FLOP/s by the type of the weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PeakFlops {
    /// BF16 and F16.
    pub bf16: f64,
    /// F8 E4M3; that of BF16 where the GPU has no faster one.
    pub f8: f64,
    /// F4 E2M1; that of F8 where the GPU has no faster one.
    pub f4: f64,
    /// F32 (TF32 is not used).
    pub f32: f64,
}

/// Power of the whole board: chip, memory and its own supply.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Power {
    /// With nothing to do, watts.
    pub idle_w: f64,
    /// At most, watts.
    pub max_w: f64,
}

impl Gpu {
    /// Streaming multiprocessors of a GPU that does not say: those of the H100 and H200 SXM.
    pub const DEFAULT_SMS: usize = 132;

    /// Peak for weights of a type.
    pub fn peak(&self, dtype: DType) -> f64 {
        match dtype {
            DType::F8E4M3 => self.peak_flops.f8,
            DType::F32 => self.peak_flops.f32,
            _ => self.peak_flops.bf16,
        }
    }

    /// Peak for weights in a format. Four-bit floats are expanded to BF16 where the GPU has no arithmetic of their own, four-bit
    /// integers always.
    pub fn peak_of(&self, format: WeightFormat) -> f64 {
        let PeakFlops { bf16, f8, f4, f32 } = self.peak_flops;
        match format {
            WeightFormat::F32 => f32,
            WeightFormat::Bf16 | WeightFormat::Int4 => bf16,
            WeightFormat::Fp8 | WeightFormat::Fp8Block => f8,
            WeightFormat::Mxfp4 | WeightFormat::Nvfp4 if f4 > f8 => f4,
            WeightFormat::Mxfp4 | WeightFormat::Nvfp4 => bf16,
        }
    }
}
