use half::{bf16, f16};
use moesaic_device::Pool;

use super::*;
use crate::matrix::testing::{Random, arena};

/// Reads an element of a source the slow way, as F32.
fn element(src: &SourceMatrix, row: usize, col: usize) -> f32 {
    let at = if src.transposed { col * src.rows + row } else { row * src.cols + col };
    let b = &src.bytes[at * src.dtype.size_bytes()..];
    match src.dtype {
        DType::F32 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        DType::BF16 => bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        DType::F16 => f16::from_le_bytes([b[0], b[1]]).to_f32(),
        _ => {
            let scale = src
                .scales
                .map_or(1.0, |s| s.factors[row / s.block[0] * src.cols.div_ceil(s.block[1]) + col / s.block[1]]);
            fp8::to_f32(b[0]) * scale
        }
    }
}

#[test]
fn what_is_packed_is_read_back() {
    let mut random = Random::new(1);
    let pool = Pool::new(2).unwrap();
    let from = [DType::F32, DType::BF16, DType::F16, DType::F8E4M3];
    for i in 0..120 {
        let dtype = from[i % 4];
        let to = match dtype {
            DType::F8E4M3 => *random.pick(&[DType::F32, DType::BF16, DType::F8E4M3]),
            _ => *random.pick(&[DType::F32, DType::BF16]),
        };
        let k = *random.pick(&[1, 31, 33, 64, 130, 257]);
        let parts: Vec<usize> = (0..random.below(3) + 1).map(|_| random.below(40) + 1).collect();
        let n = parts.iter().sum();
        let mut w = PackedMatrix::empty(&arena(), n, k, to).unwrap();
        let transposed = random.below(2) == 0;
        let mut first = 0;
        let mut expected = Vec::new();
        for rows in parts {
            // A source at an odd address, as safetensors may have.
            let mut bytes = vec![0];
            bytes.extend(random.bytes(rows * k, dtype));
            let block = [random.below(20) + 1, if to == DType::F8E4M3 { 128 } else { random.below(140) + 1 }];
            let factors: Vec<f32> =
                (0..rows.div_ceil(block[0]) * k.div_ceil(block[1])).map(|_| random.value()).collect();
            let scales = (dtype == DType::F8E4M3).then_some(BlockScales::new(&factors, block));
            let src = SourceMatrix { transposed, scales, ..SourceMatrix::new(&bytes[1..], dtype, rows, k) };
            w.pack_rows(&pool, first, &src).unwrap();
            first += rows;
            for row in 0..rows {
                let value = |col| match to {
                    DType::BF16 => bf16::from_f32(element(&src, row, col)).to_f32(),
                    _ => element(&src, row, col),
                };
                expected.push((0..k).map(value).collect::<Vec<f32>>());
            }
        }
        let mut got = vec![0.0; k];
        for (row, expected) in expected.iter().enumerate() {
            w.row_to_f32(row, &mut got);
            assert_eq!(&got, expected, "{dtype} → {to} [{n}, {k}] row {row}, transposed: {transposed}");
        }
    }
}

/// Any rows and columns are those elements of the whole, cut twice as well; F8 E4M3 stays what it is where blocks begin.
#[test]
fn a_part_packs_as_the_same_part_of_the_whole() {
    let mut random = Random::new(12);
    let pool = Pool::new(2).unwrap();
    for i in 0..150 {
        let dtype = [DType::F32, DType::BF16, DType::F16, DType::F8E4M3][i % 4];
        let (rows, cols) = (random.below(60) + 1, random.below(400) + 1);
        let bytes = random.bytes(rows * cols, dtype);
        let keeps_f8 = dtype == DType::F8E4M3 && random.below(2) == 0;
        let block = [random.below(20) + 1, if keeps_f8 { 128 } else { random.below(140) + 1 }];
        let factors: Vec<f32> =
            (0..rows.div_ceil(block[0]) * cols.div_ceil(block[1])).map(|_| random.value()).collect();
        let mut whole = SourceMatrix::new(&bytes, dtype, rows, cols);
        if dtype == DType::F8E4M3 {
            whole = whole.with_scales(&factors, block);
        }
        let mut cut = |n: usize, unit: usize| {
            let start = random.below(n) / unit * unit;
            start..start + random.below(n - start) + 1
        };
        let (r, c) = (cut(rows, 1), cut(cols, if keeps_f8 { 128 } else { 1 }));
        let (r2, c2) = (cut(r.len(), 1), cut(c.len(), if keeps_f8 { 128 } else { 1 }));
        let part = whole.col_range(c.clone()).row_range(r.clone()).row_range(r2.clone()).col_range(c2.clone());
        let to = if keeps_f8 { DType::F8E4M3 } else { DType::F32 };
        let mut w = PackedMatrix::empty(&arena(), part.rows, part.cols, to).unwrap();
        w.pack_rows(&pool, 0, &part).unwrap();
        let mut got = vec![0.0; part.cols];
        for row in 0..part.rows {
            w.row_to_f32(row, &mut got);
            for (col, &got) in got.iter().enumerate() {
                let at = (r.start + r2.start + row, c.start + c2.start + col);
                assert_eq!(got, element(&whole, at.0, at.1), "{dtype} {at:?} of [{rows}, {cols}], block {block:?}");
            }
        }
        let size = dtype.size_bytes();
        let stored: Vec<&[u8]> = part.stored_rows().collect();
        assert_eq!(stored.len(), part.rows);
        for (row, stored) in stored.iter().enumerate() {
            let at = ((r.start + r2.start + row) * cols + c.start + c2.start) * size;
            assert_eq!(*stored, &bytes[at..at + part.cols * size]);
        }
    }
}

#[test]
fn rounding_is_to_nearest_even_and_keeps_nan() {
    for bits in (0..=u32::MAX).step_by(65_521).chain([0x7f80_0001, 0x7f7f_ffff, 0x3f80_8000, 0x3f81_8000]) {
        let value = f32::from_bits(bits);
        let (ours, theirs) = (bf16::from_bits(round_bf16(value)), bf16::from_f32(value));
        assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "{bits:#x}");
    }
}

#[test]
fn what_cannot_be_packed_is_refused() {
    let pool = Pool::new(1).unwrap();
    let mut w = PackedMatrix::empty(&arena(), 20, 10, DType::F8E4M3).unwrap();
    let bytes = vec![0u8; 20 * 10];
    let plain = SourceMatrix::new(&bytes, DType::F8E4M3, 20, 10);
    let mut message = |row, src: &SourceMatrix| w.pack_rows(&pool, row, src).unwrap_err().to_string();
    assert_eq!(message(1, &plain), "matrix: packed rows is 1..1+20, expected within 0..20");
    let short = SourceMatrix { rows: 19, ..plain };
    assert_eq!(message(0, &short), "matrix: source is 200 bytes, expected F8_E4M3 [19, 10]");
    let turned = SourceMatrix { rows: 10, cols: 20, ..plain };
    assert_eq!(message(0, &turned), "matrix: source columns is 20, expected 10");
    let other = SourceMatrix::new(&bytes, DType::BF16, 10, 10);
    assert_eq!(message(0, &other), "matrix: source of an F8_E4M3 matrix is BF16, expected F8_E4M3");
    let scaled = SourceMatrix { scales: Some(BlockScales::new(&[1.0; 3], [128, 128])), ..plain };
    assert_eq!(message(0, &scaled), "matrix: scales is 3, expected 1");
    let narrow = SourceMatrix { scales: Some(BlockScales::new(&[1.0; 2], [128, 5])), ..plain };
    assert_eq!(message(0, &narrow), "matrix: scale block's columns is 5, expected 128");
    let wide = vec![0u8; 20 * 300];
    let wide = SourceMatrix::new(&wide, DType::F8E4M3, 20, 300).with_scales(&[1.0; 3], [128, 128]);
    let inside = message(0, &wide.col_range(130..140));
    assert_eq!(inside, "matrix: first column in its scale block is 2, expected 0");
}
