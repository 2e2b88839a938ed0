//! Weights as a checkpoint holds them, whole or in part.

use std::ops::Range;

use moesaic_spec::DType;

use super::{OP, TILE_K, fp8};
use crate::KernelError;
use crate::contract::require;

/// A matrix `[rows, cols]` in a checkpoint's bytes, or some rows and columns of one: little endian, at any alignment.
#[derive(Clone, Copy)]
pub struct SourceMatrix<'a> {
    /// The elements.
    pub bytes: &'a [u8],
    /// F32, BF16, F16 or F8 E4M3.
    pub dtype: DType,
    /// Rows (`n`) of the matrix that is meant.
    pub rows: usize,
    /// Columns (`k`) of the matrix that is meant.
    pub cols: usize,
    /// The bytes are those of the transpose, `[cols, rows]`.
    pub transposed: bool,
    /// Elements between the end of one stored row and the start of the next: those of columns that are left out.
    pub gap: usize,
    /// F8 E4M3 only: the factors of its blocks.
    pub scales: Option<BlockScales<'a>>,
}

/// Factors by which the blocks of a quantised matrix are multiplied.
#[derive(Clone, Copy)]
pub struct BlockScales<'a> {
    /// `[rows / block rows, cols / block cols]`, rounded up, of the matrix that is meant (not of its transpose).
    pub factors: &'a [f32],
    /// Rows and columns of a block, 128 × 128 in DeepSeek's checkpoints.
    pub block: [usize; 2],
    /// The row and column of the first block that the matrix begins with: not 0 where it was cut inside a block.
    pub first: [usize; 2],
    /// Factors between the end of one row of blocks and the start of the next.
    pub gap: usize,
}

impl<'a> BlockScales<'a> {
    /// The factors of a whole matrix.
    pub fn new(factors: &'a [f32], block: [usize; 2]) -> BlockScales<'a> {
        BlockScales { factors, block, first: [0, 0], gap: 0 }
    }

    /// Rows and columns of blocks that a matrix of this size touches.
    fn blocks(&self, rows: usize, cols: usize) -> [usize; 2] {
        [(self.first[0] + rows).div_ceil(self.block[0]), (self.first[1] + cols).div_ceil(self.block[1])]
    }

    /// The factors of some rows and columns of a matrix with `num_cols` columns.
    fn range(&self, rows: &Range<usize>, cols: &Range<usize>, num_cols: usize) -> BlockScales<'a> {
        let stride = self.blocks(0, num_cols)[1] + self.gap;
        let start = [self.first[0] + rows.start, self.first[1] + cols.start];
        let skipped = [start[0] / self.block[0], start[1] / self.block[1]];
        let mut part = BlockScales { first: [start[0] % self.block[0], start[1] % self.block[1]], ..*self };
        let [block_rows, block_cols] = part.blocks(rows.len(), cols.len());
        part.gap = stride - block_cols;
        part.factors = &self.factors[skipped[0] * stride + skipped[1]..][..strided(block_rows, block_cols, stride)];
        part
    }
}

/// Elements from the first to the last of a matrix.
fn strided(rows: usize, cols: usize, stride: usize) -> usize {
    if rows == 0 || cols == 0 { 0 } else { (rows - 1) * stride + cols }
}

impl<'a> SourceMatrix<'a> {
    /// A plain matrix.
    pub fn new(bytes: &'a [u8], dtype: DType, rows: usize, cols: usize) -> SourceMatrix<'a> {
        SourceMatrix { bytes, dtype, rows, cols, transposed: false, gap: 0, scales: None }
    }

    /// The same elements with the factors of their blocks.
    pub fn with_scales(self, factors: &'a [f32], block: [usize; 2]) -> SourceMatrix<'a> {
        SourceMatrix { scales: Some(BlockScales::new(factors, block)), ..self }
    }

    /// The transpose of what these bytes hold.
    pub fn transposed(self) -> SourceMatrix<'a> {
        SourceMatrix { rows: self.cols, cols: self.rows, transposed: !self.transposed, ..self }
    }

    /// Some rows of a matrix that is not transposed.
    pub fn row_range(&self, rows: Range<usize>) -> SourceMatrix<'a> {
        self.range(rows, 0..self.cols)
    }

    /// Some columns of a matrix that is not transposed. A scaled part that is to stay in F8 E4M3 must begin with a block
    /// ([`PackedMatrix::pack_rows`](super::PackedMatrix::pack_rows)); rows may be cut anywhere.
    pub fn col_range(&self, cols: Range<usize>) -> SourceMatrix<'a> {
        self.range(0..self.rows, cols)
    }

    fn range(&self, rows: Range<usize>, cols: Range<usize>) -> SourceMatrix<'a> {
        let inside = rows.start <= rows.end && rows.end <= self.rows && cols.start <= cols.end && cols.end <= self.cols;
        assert!(!self.transposed && inside, "rows {rows:?}, columns {cols:?} of a matrix that is not transposed");
        let (stride, size) = (self.cols + self.gap, self.dtype.size_bytes());
        let len = strided(rows.len(), cols.len(), stride);
        let start = if len == 0 { 0 } else { rows.start * stride + cols.start };
        SourceMatrix {
            bytes: &self.bytes[start * size..(start + len) * size],
            rows: rows.len(),
            cols: cols.len(),
            gap: stride - cols.len(),
            scales: self.scales.map(|scales| scales.range(&rows, &cols, self.cols)),
            ..*self
        }
    }

    /// Elements from one stored row to the next.
    #[inline(always)]
    fn stride(&self) -> usize {
        self.gap + if self.transposed { self.rows } else { self.cols }
    }

    /// The bytes of each stored row.
    pub fn stored_rows(&self) -> impl Iterator<Item = &'a [u8]> {
        let size = self.dtype.size_bytes();
        let (rows, cols) = if self.transposed { (self.cols, self.rows) } else { (self.rows, self.cols) };
        let (bytes, stride) = (self.bytes, self.stride());
        (0..rows).map(move |row| &bytes[row * stride * size..][..cols * size])
    }

    /// All elements in order, widened, scales applied. `out` has `rows * cols` elements.
    pub fn to_f32(&self, out: &mut [f32]) {
        assert_eq!(out.len(), self.rows * self.cols, "elements");
        let mut tile = [0.0; TILE_K];
        for (row, out) in out.chunks_mut(self.cols.max(1)).enumerate() {
            for (i, out) in out.chunks_mut(TILE_K).enumerate() {
                self.read_f32((row, i * TILE_K, out.len()), &mut tile);
                out.copy_from_slice(&tile[..out.len()]);
            }
        }
    }

    /// Checks that sizes fit together.
    pub(super) fn check(&self) -> Result<(), KernelError> {
        let known = matches!(self.dtype, DType::F32 | DType::BF16 | DType::F16 | DType::F8E4M3);
        require(known, OP, "source type", || "F32, BF16, F16 or F8_E4M3".into(), || self.dtype.to_string())?;
        let (rows, cols) = if self.transposed { (self.cols, self.rows) } else { (self.rows, self.cols) };
        let stride = cols.checked_add(self.gap);
        let elements = stride.and_then(|stride| rows.checked_mul(stride)).map(|_| strided(rows, cols, self.stride()));
        let bytes = elements.and_then(|n| n.checked_mul(self.dtype.size_bytes()));
        let expected = || format!("{} [{}, {}]", self.dtype, self.rows, self.cols);
        require(bytes == Some(self.bytes.len()), OP, "source", expected, || format!("{} bytes", self.bytes.len()))?;
        let Some(scales) = self.scales else { return Ok(()) };
        let [rows, cols] = scales.block;
        require(self.dtype == DType::F8E4M3, OP, "scaled source", || "F8_E4M3".into(), || self.dtype.to_string())?;
        require(rows > 0 && cols > 0, OP, "scale block", || "at least 1 × 1".into(), || format!("{rows} × {cols}"))?;
        let [block_rows, block_cols] = scales.blocks(self.rows, self.cols);
        let count = strided(block_rows, block_cols, block_cols + scales.gap);
        let got = || scales.factors.len().to_string();
        require(scales.factors.len() == count, OP, "scales", || count.to_string(), got)
    }

    /// The factor of an element; 1 where there are none.
    pub(super) fn scale(&self, row: usize, col: usize) -> f32 {
        let Some(s) = self.scales else { return 1.0 };
        let stride = s.blocks(0, self.cols)[1] + s.gap;
        s.factors[(s.first[0] + row) / s.block[0] * stride + (s.first[1] + col) / s.block[1]]
    }

    /// Converts `len` elements of `row` from `col` on; zeros follow. The fixed width makes this a few vector instructions.
    #[inline(always)]
    fn each<const SIZE: usize, T>(
        &self,
        (row, col, len): (usize, usize, usize),
        out: &mut [T; TILE_K],
        convert: impl Fn([u8; SIZE]) -> T,
    ) {
        let mut raw = [[0; SIZE]; TILE_K];
        if self.transposed {
            for (i, raw) in raw[..len].iter_mut().enumerate() {
                let at = ((col + i) * self.stride() + row) * SIZE;
                raw.copy_from_slice(&self.bytes[at..at + SIZE]);
            }
        } else {
            let at = (row * self.stride() + col) * SIZE;
            let raw = raw.as_flattened_mut();
            if len == TILE_K {
                raw.copy_from_slice(&self.bytes[at..at + TILE_K * SIZE]);
            } else {
                raw[..len * SIZE].copy_from_slice(&self.bytes[at..at + len * SIZE]);
            }
        }
        for i in 0..TILE_K {
            out[i] = convert(raw[i]);
        }
    }

    /// `len` elements of `row` from `col` on, as F32, scales applied; zeros follow.
    #[inline(always)]
    pub(super) fn read_f32(&self, at @ (row, col, len): (usize, usize, usize), out: &mut [f32; TILE_K]) {
        match self.dtype {
            DType::F32 => self.each(at, out, f32::from_le_bytes),
            DType::BF16 => self.each(at, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
            DType::F16 => self.each(at, out, |b| f16_to_f32(u16::from_le_bytes(b))),
            _ => {
                self.each(at, out, |[code]| fp8::to_f32(code));
                let Some(scales) = self.scales else { return };
                let (mut from, width) = (0, scales.block[1]);
                while from < len {
                    let to = len.min(from + width - (scales.first[1] + col + from) % width);
                    let factor = self.scale(row, col + from);
                    out[from..to].iter_mut().for_each(|out| *out *= factor);
                    from = to;
                }
            }
        }
    }

    /// The same as BF16 bits, rounded to nearest even, subnormals flushed.
    #[inline(always)]
    pub(super) fn read_bf16(&self, at: (usize, usize, usize), out: &mut [u16; TILE_K]) {
        if self.dtype == DType::BF16 {
            if self.transposed || at.2 < TILE_K {
                return self.each(at, out, |b| flush_bf16(u16::from_le_bytes(b)));
            }
            // What loading is mostly made of: a copy and two vector instructions.
            let start = (at.0 * self.stride() + at.1) * 2;
            let bytes: &[u8; 2 * TILE_K] = self.bytes[start..start + 2 * TILE_K].try_into().expect("a row of a tile");
            // SAFETY: any 64 bytes are 32 words; both arrays have this size.
            let words: [u16; TILE_K] = unsafe { std::mem::transmute_copy(bytes) };
            for i in 0..TILE_K {
                out[i] = flush_bf16(u16::from_le(words[i]));
            }
            return;
        }
        let mut wide = [0.0; TILE_K];
        self.read_f32(at, &mut wide);
        for i in 0..TILE_K {
            out[i] = flush_bf16(round_bf16(wide[i]));
        }
    }

    /// The codes of an F8 E4M3 source.
    #[inline(always)]
    pub(super) fn read_codes(&self, at: (usize, usize, usize), out: &mut [u8; TILE_K]) {
        self.each(at, out, |[code]| code);
    }
}

/// Exact; without branches, so that loops become vector instructions.
#[inline(always)]
fn f16_to_f32(bits: u16) -> f32 {
    let magnitude = i32::from(bits & 0x7fff);
    // 2^(exponent - 15) × 1.mantissa: F32's bias is 127.
    let normal = ((magnitude << 13) + (112 << 23)) as u32;
    let subnormal = (magnitude as f32 * (1.0 / (1 << 24) as f32)).to_bits();
    let wide = if magnitude < 0x400 { subnormal } else { normal };
    let wide = if magnitude >= 0x7c00 { (magnitude as u32) << 13 | 0x7f80_0000 } else { wide };
    f32::from_bits(wide | u32::from(bits & 0x8000) << 16)
}

/// Rounds to BF16, to nearest even; NaN stays NaN.
#[inline(always)]
pub(crate) fn round_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    if value.is_nan() { (bits >> 16) as u16 | 0x40 } else { rounded }
}

/// Subnormals become zero, as AMX reads them.
#[inline(always)]
pub(crate) fn flush_bf16(bits: u16) -> u16 {
    bits & if bits & 0x7f80 == 0 { 0x8000 } else { 0xffff }
}

/// Rows of `x` as F32, subnormals as zero, for kernels that read a tile after the other: `[tiles][rows][32]`, so that an
/// element of any row lies at a distance that the kernel knows.
#[inline(always)]
pub(crate) fn widen_tiles(x: &[half::bf16], stride: usize, rows: usize, wide: &mut [f32]) {
    let (wide, _) = wide.as_chunks_mut::<TILE_K>();
    let num_tiles = wide.len() / rows;
    for row in 0..rows {
        let (x, _) = x[row * stride..][..num_tiles * TILE_K].as_chunks::<TILE_K>();
        for (tile, x) in x.iter().enumerate() {
            wide[tile * rows + row] = x.map(|x| f32::from_bits(u32::from(flush_bf16(x.to_bits())) << 16));
        }
    }
}
