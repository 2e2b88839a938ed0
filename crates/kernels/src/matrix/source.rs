//! Weights as a checkpoint holds them.

use moesaic_spec::DType;

use super::{OP, fp8};
use crate::KernelError;
use crate::contract::require;

/// A matrix `[rows, cols]` in a checkpoint's bytes: little endian, dense, at any alignment.
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
}

impl<'a> SourceMatrix<'a> {
    /// A plain matrix.
    pub fn new(bytes: &'a [u8], dtype: DType, rows: usize, cols: usize) -> SourceMatrix<'a> {
        SourceMatrix { bytes, dtype, rows, cols, transposed: false, scales: None }
    }

    /// The same elements with the factors of their blocks.
    pub fn with_scales(self, factors: &'a [f32], block: [usize; 2]) -> SourceMatrix<'a> {
        SourceMatrix { scales: Some(BlockScales { factors, block }), ..self }
    }

    /// The transpose of what these bytes hold.
    pub fn transposed(self) -> SourceMatrix<'a> {
        SourceMatrix { rows: self.cols, cols: self.rows, transposed: !self.transposed, ..self }
    }

    /// Some rows of a matrix that is neither transposed nor scaled.
    pub fn row_range(&self, rows: std::ops::Range<usize>) -> SourceMatrix<'a> {
        assert!(!self.transposed && self.scales.is_none() && rows.end <= self.rows, "rows {rows:?} of a plain matrix");
        let row_bytes = self.cols * self.dtype.size_bytes();
        let bytes = &self.bytes[rows.start * row_bytes..rows.end * row_bytes];
        SourceMatrix { bytes, rows: rows.len(), ..*self }
    }

    /// All elements in order, widened, scales applied. `out` has `rows * cols` elements.
    pub fn to_f32(&self, out: &mut [f32]) {
        assert_eq!(out.len(), self.rows * self.cols, "elements");
        out.chunks_mut(self.cols.max(1)).enumerate().for_each(|(row, out)| self.read_f32(row, 0, out));
    }

    /// Checks that sizes fit together.
    pub(super) fn check(&self) -> Result<(), KernelError> {
        let known = matches!(self.dtype, DType::F32 | DType::BF16 | DType::F16 | DType::F8E4M3);
        require(known, OP, "source type", || "F32, BF16, F16 or F8_E4M3".into(), || self.dtype.to_string())?;
        let bytes = self.rows.checked_mul(self.cols).and_then(|n| n.checked_mul(self.dtype.size_bytes()));
        let expected = || format!("{} [{}, {}]", self.dtype, self.rows, self.cols);
        require(bytes == Some(self.bytes.len()), OP, "source", expected, || format!("{} bytes", self.bytes.len()))?;
        let Some(scales) = self.scales else { return Ok(()) };
        let [rows, cols] = scales.block;
        require(self.dtype == DType::F8E4M3, OP, "scaled source", || "F8_E4M3".into(), || self.dtype.to_string())?;
        require(rows > 0 && cols > 0, OP, "scale block", || "at least 1 × 1".into(), || format!("{rows} × {cols}"))?;
        let count = self.rows.div_ceil(rows) * self.cols.div_ceil(cols);
        let got = || scales.factors.len().to_string();
        require(scales.factors.len() == count, OP, "scales", || count.to_string(), got)
    }

    /// The factor of an element; 1 where there are none.
    pub(super) fn scale(&self, row: usize, col: usize) -> f32 {
        self.scales.map_or(1.0, |s| s.factors[row / s.block[0] * self.cols.div_ceil(s.block[1]) + col / s.block[1]])
    }

    #[inline(always)]
    fn run<const SIZE: usize>(&self, row: usize, col: usize, len: usize) -> impl Iterator<Item = [u8; SIZE]> {
        let (start, step) =
            if self.transposed { (col * self.rows + row, self.rows) } else { (row * self.cols + col, 1) };
        let bytes = &self.bytes[start * SIZE..(start + (len - 1) * step + 1) * SIZE];
        let chunks = bytes.chunks_exact(SIZE).step_by(step);
        chunks.map(|chunk| chunk.try_into().expect("chunks have this size"))
    }

    /// `out.len()` elements of `row` from `col` on, as F32, scales applied.
    #[inline(always)]
    pub(super) fn read_f32(&self, row: usize, col: usize, out: &mut [f32]) {
        let len = out.len();
        match self.dtype {
            DType::F32 => out.iter_mut().zip(self.run(row, col, len)).for_each(|(o, b)| *o = f32::from_le_bytes(b)),
            DType::BF16 => (out.iter_mut().zip(self.run(row, col, len)))
                .for_each(|(o, b)| *o = f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16)),
            DType::F16 => (out.iter_mut().zip(self.run(row, col, len)))
                .for_each(|(o, b)| *o = half::f16::from_le_bytes(b).to_f32_const()),
            _ => (out.iter_mut().zip(self.run::<1>(row, col, len)).enumerate())
                .for_each(|(i, (o, [code]))| *o = fp8::to_f32(code) * self.scale(row, col + i)),
        }
    }

    /// The same as BF16 bits, rounded to nearest even, subnormals flushed.
    #[inline(always)]
    pub(super) fn read_bf16(&self, row: usize, col: usize, out: &mut [u16]) {
        if self.dtype == DType::BF16 {
            let elements = self.run(row, col, out.len());
            out.iter_mut().zip(elements).for_each(|(o, b)| *o = flush_bf16(u16::from_le_bytes(b)));
            return;
        }
        let mut wide = [0.0; super::TILE_K];
        let wide = &mut wide[..out.len()];
        self.read_f32(row, col, wide);
        out.iter_mut().zip(wide).for_each(|(o, v)| *o = flush_bf16(round_bf16(*v)));
    }

    /// The codes of an F8 E4M3 source.
    #[inline(always)]
    pub(super) fn read_codes(&self, row: usize, col: usize, out: &mut [u8]) {
        let codes = self.run::<1>(row, col, out.len());
        out.iter_mut().zip(codes).for_each(|(o, [code])| *o = code);
    }
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
    if bits & 0x7f80 == 0 { bits & 0x8000 } else { bits }
}
