//! What tests of the matrix ops share: random operands, a context for every path, poisoned memory.

use std::sync::{Arc, OnceLock};

use half::bf16;
use moesaic_device::{Arena, Ctx, Isa, Pool, Tensor, isa};
use moesaic_spec::{Bytes, DType};

use crate::matrix::{BlockScales, PackedMatrix, SourceMatrix, fp8};

/// A small generator (xorshift), seeded.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }

    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// Within ±1, with some zeros.
    pub(crate) fn value(&mut self) -> f32 {
        if self.below(20) == 0 { 0.0 } else { (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0 }
    }

    /// Little-endian elements; F8 E4M3 codes are any but NaN.
    pub(crate) fn bytes(&mut self, num: usize, dtype: DType) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(num * dtype.size_bytes());
        for _ in 0..num {
            let value = self.value();
            match dtype {
                DType::F32 => bytes.extend(value.to_le_bytes()),
                DType::BF16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
                DType::F16 => bytes.extend(half::f16::from_f32(value).to_le_bytes()),
                _ => bytes.push(std::iter::repeat_with(|| self.next() as u8).find(|c| c & 0x7f != 0x7f).unwrap()),
            }
        }
        bytes
    }

    pub(crate) fn tensor(&mut self, dims: &[usize], dtype: DType) -> Tensor {
        let bytes = self.bytes(dims.iter().product(), dtype);
        tensor(dims, dtype, &bytes)
    }

    /// A packed matrix; F8 E4M3 with scales of 128 × 128.
    pub(crate) fn matrix(&mut self, n: usize, k: usize, dtype: DType) -> PackedMatrix {
        let mut w = PackedMatrix::empty(&arena(), n, k, dtype).unwrap();
        let bytes = self.bytes(n * k, dtype);
        let factors: Vec<f32> = (0..n.div_ceil(128) * k.div_ceil(128)).map(|_| self.value() / 64.0).collect();
        let mut src = SourceMatrix::new(&bytes, dtype, n, k);
        if dtype == DType::F8E4M3 {
            src.scales = Some(BlockScales::new(&factors, [128, 128]));
        }
        w.pack_rows(&Pool::new(1).unwrap(), 0, &src).unwrap();
        w
    }
}

/// An arena whose memory begins as NaN of every element type.
pub(crate) fn arena() -> Arena {
    let arena = Arena::host("test", Bytes(1 << 21)).unwrap();
    arena.alloc(1 << 21).unwrap().bytes_mut().fill(0xff);
    arena
}

pub(crate) fn tensor(dims: &[usize], dtype: DType, bytes: &[u8]) -> Tensor {
    let mut tensor = Tensor::empty(&arena(), dims, dtype).unwrap();
    tensor.bytes_mut().copy_from_slice(bytes);
    tensor
}

/// A context of two threads for every instruction set that this machine has, best last.
pub(crate) fn contexts() -> Vec<Ctx> {
    static POOL: OnceLock<Arc<Pool>> = OnceLock::new();
    let pool = POOL.get_or_init(|| Arc::new(Pool::new(2).unwrap()));
    let usable = isa::ALL.into_iter().filter(|&isa| isa <= Isa::detect());
    usable.map(|isa| Ctx::cpu_with(arena(), pool.clone(), isa)).collect()
}

/// Fills the free activation memory with NaN, so that what an op does not write shows.
pub(crate) fn poison(ctx: &Ctx) {
    let free = (ctx.arena().capacity().0 - ctx.arena().in_use().0) as usize;
    ctx.arena().alloc(free).unwrap().bytes_mut().fill(0xff);
}

/// The elements' bits as F32, NaNs alike.
pub(crate) fn bits(tensor: &Tensor) -> Vec<u32> {
    match tensor.dtype() {
        DType::F32 => f32_bits(tensor.f32()),
        DType::BF16 => f32_bits(&tensor.bf16().iter().map(|v| v.to_f32()).collect::<Vec<_>>()),
        _ => f32_bits(&tensor.u8().iter().map(|&code| fp8::to_f32(code)).collect::<Vec<_>>()),
    }
}

pub(crate) fn f32_bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }).collect()
}
