//! Packed weights, and the product `x Wᵀ` that every matrix op is made of.
//!
//! A weight matrix is stored once, in tiles that every path streams in memory order:
//!
//! | element | layout | tile |
//! | --- | --- | --- |
//! | BF16 | `[N/16][K/32]` tiles of 1 KiB | 16 pairs of `k` × 16 `n` × 2, which is AMX's second operand |
//! | F8 E4M3 | `[N/16][K/32]` tiles of 512 B, then scales `[N/16][K/128][16]` F32 | pairs of `k` as in BF16, see [`fp8`] |
//! | F32 | `[N/16][K][16]` | none |
//!
//! `N` is padded to 16 and (not for F32) `K` to 32, with zeros.
//!
//! **The arithmetic contract.** What a path computes is fixed to the bit, so a row's result depends neither on the rows
//! beside it nor on the machine:
//! - BF16: for each tile of 32 `k`, two chains of fused multiply-adds from zero, one over the even and one over the odd `k`,
//!   each in order; the tile's sum is even + odd; the result is the sum of the tiles in order, from zero. This is what
//!   `TDPBF16PS` does in hardware, and what the other paths reproduce.
//! - F8 E4M3: as BF16 within each block of 128 `k`; the result is the chain `fma(scale, block, result)` over blocks.
//! - F32: one chain of fused multiply-adds over `k`.
//!
//! AMX reads subnormals as zero, so the BF16 values of both operands are flushed when they are packed or widened. It also
//! flushes subnormal intermediate sums, the other paths do not: results agree to the bit unless a partial sum falls below
//! 2⁻¹²⁶.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub mod fp8;
pub(crate) mod lanes;
mod pack;
pub(crate) mod product;
pub mod reference;
pub(crate) mod scratch;
mod source;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use moesaic_device::{Arena, Region};
use moesaic_spec::{Bytes, DType};

use crate::KernelError;
use crate::contract::require;

pub(crate) use pack::Placement;
pub(crate) use source::round_bf16;
pub use source::{BlockScales, SourceMatrix};

/// Rows of a tile: the `n` that one vector of F32 holds, and AMX's tile height.
pub const TILE_N: usize = 16;
/// Columns of a tile: what one `TDPBF16PS` sums.
pub const TILE_K: usize = 32;
/// Columns that share a scale in F8 E4M3 matrices.
pub const SCALE_K: usize = 128;

const OP: &str = "matrix";

/// A weight matrix `W [N, K]`, packed. Its rows are written by the `pack_…` functions, each before it is read; on `Meta`
/// there is a shape and no data.
pub struct PackedMatrix {
    n: usize,
    k: usize,
    dtype: DType,
    region: Region,
}

/// Bytes that a packed matrix of `n` rows and `k` columns takes.
pub fn packed_bytes(n: usize, k: usize, dtype: DType) -> Bytes {
    let layout = Layout::new(k, dtype);
    Bytes(n.div_ceil(TILE_N) as u64 * (layout.panel_bytes + layout.scales * TILE_N * size_of::<f32>()) as u64)
}

/// Sizes of one panel: [`TILE_N`] rows over all columns.
#[derive(Clone, Copy)]
struct Layout {
    panel_bytes: usize,
    /// Scales of a row.
    scales: usize,
}

impl Layout {
    fn new(k: usize, dtype: DType) -> Layout {
        let tiles = k.div_ceil(TILE_K);
        match dtype {
            DType::F32 => Layout { panel_bytes: k * TILE_N * size_of::<f32>(), scales: 0 },
            DType::BF16 => Layout { panel_bytes: tiles * TILE_N * TILE_K * 2, scales: 0 },
            DType::F8E4M3 => Layout { panel_bytes: tiles * TILE_N * TILE_K, scales: k.div_ceil(SCALE_K) },
            other => panic!("no packed layout for {other}"),
        }
    }
}

impl PackedMatrix {
    /// Takes memory for `n` rows and `k` columns of `dtype` (F32, BF16 or F8 E4M3) from `arena`.
    pub fn empty(arena: &Arena, n: usize, k: usize, dtype: DType) -> Result<PackedMatrix, KernelError> {
        let known = matches!(dtype, DType::F32 | DType::BF16 | DType::F8E4M3);
        require(known, OP, "element type", || "F32, BF16 or F8_E4M3".into(), || dtype.to_string())?;
        require(n > 0 && k > 0, OP, "shape", || "at least one row and column".into(), || format!("[{n}, {k}]"))?;
        let region = arena.alloc(packed_bytes(n, k, dtype).0 as usize)?;
        let mut matrix = PackedMatrix { n, k, dtype, region };
        if !n.is_multiple_of(TILE_N) {
            matrix.clear_panel(n / TILE_N);
        }
        Ok(matrix)
    }

    /// Rows.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Element type of the stored weights.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Size in memory.
    pub fn size_bytes(&self) -> Bytes {
        packed_bytes(self.n, self.k, self.dtype)
    }

    /// All of it as it lies in memory, for another rank that wants the same matrix.
    pub(crate) fn packed(&self) -> &[u8] {
        self.region.bytes()
    }

    /// The same, to be filled with what [`PackedMatrix::packed`] gave elsewhere.
    pub(crate) fn packed_mut(&mut self) -> &mut [u8] {
        self.region.bytes_mut()
    }

    /// Whether there is no data.
    pub fn is_meta(&self) -> bool {
        self.region.is_meta()
    }

    /// Panels of [`TILE_N`] rows.
    pub(crate) fn panels(&self) -> usize {
        self.n.div_ceil(TILE_N)
    }

    /// Bytes of one panel, scales left out.
    pub(crate) fn panel_bytes(&self) -> usize {
        Layout::new(self.k, self.dtype).panel_bytes
    }

    /// The tiles of `count` panels from `panel` on.
    pub(crate) fn panel(&self, panel: usize, count: usize) -> &[u8] {
        let bytes = self.panel_bytes();
        &self.region.bytes()[panel * bytes..(panel + count) * bytes]
    }

    /// The scales of a panel, `[K/128][16]`. Empty unless the matrix is F8 E4M3.
    pub(crate) fn scales(&self, panel: usize) -> &[f32] {
        let layout = Layout::new(self.k, self.dtype);
        let all = &self.region.bytes()[self.panels() * layout.panel_bytes..];
        let row = layout.scales * TILE_N;
        // SAFETY: regions are 64-byte aligned, panels are multiples of 64 bytes, and any bits are an F32.
        let all = unsafe { std::slice::from_raw_parts(all.as_ptr().cast::<f32>(), all.len() / size_of::<f32>()) };
        &all[panel * row..(panel + 1) * row]
    }

    /// Zeroes a panel and its scales: rows that no source covers.
    pub(crate) fn clear_panel(&mut self, panel: usize) {
        if self.is_meta() {
            return;
        }
        let layout = Layout::new(self.k, self.dtype);
        let scales_at = self.panels() * layout.panel_bytes;
        let scale_bytes = layout.scales * TILE_N * size_of::<f32>();
        let bytes = self.region.bytes_mut();
        bytes[panel * layout.panel_bytes..(panel + 1) * layout.panel_bytes].fill(0);
        bytes[scales_at + panel * scale_bytes..scales_at + (panel + 1) * scale_bytes].fill(0);
    }

    /// The stored value at row `n`, column `k`, its scale left out. Slow.
    pub(crate) fn stored(&self, n: usize, k: usize) -> f32 {
        let panel = self.panel(n / TILE_N, 1);
        let lane = n % TILE_N;
        let (tile, k_in) = (k / TILE_K, k % TILE_K);
        match self.dtype {
            DType::F32 => {
                let at = (k * TILE_N + lane) * 4;
                f32::from_le_bytes(panel[at..at + 4].try_into().expect("four bytes"))
            }
            DType::BF16 => {
                let at = tile * 1024 + (k_in / 2) * 64 + lane * 4 + (k_in % 2) * 2;
                f32::from_bits(u32::from(u16::from_le_bytes([panel[at], panel[at + 1]])) << 16)
            }
            _ => f32::from_bits(u32::from(fp8::to_bf16(panel[tile * 512 + fp8::offset_in_tile(lane, k_in)])) << 16),
        }
    }

    /// The scale of row `n` at column `k`; 1 unless the matrix is F8 E4M3.
    pub(crate) fn scale(&self, n: usize, k: usize) -> f32 {
        match self.dtype {
            DType::F8E4M3 => self.scales(n / TILE_N)[(k / SCALE_K) * TILE_N + n % TILE_N],
            _ => 1.0,
        }
    }

    /// Row `row` as F32, dequantised: for embeddings that are tied to the output matrix. `out` has [`PackedMatrix::k`]
    /// elements.
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.n && out.len() == self.k, "row {row} of {} × {} into {}", self.n, self.k, out.len());
        for (k, out) in out.iter_mut().enumerate() {
            *out = self.stored(row, k) * self.scale(row, k);
        }
    }
}
