//! Finding a NaN or an infinity in stored weights. One would silently turn every later token into garbage.

use std::sync::atomic::{AtomicUsize, Ordering};

use moesaic_device::Pool;
use moesaic_kernels::matrix::SourceMatrix;
use moesaic_spec::DType;

const CHUNK_BYTES: usize = 1 << 20;

/// Row and column of the first element (of some element, when there are many) that is not finite. Integers always are.
pub(crate) fn first_non_finite(pool: &Pool, matrix: &SourceMatrix) -> Option<(usize, usize)> {
    let &SourceMatrix { bytes, dtype, cols, gap, .. } = matrix;
    if bytes.is_empty() {
        return None;
    }
    let found = AtomicUsize::new(usize::MAX);
    let look = |first_element: usize, bytes: &[u8]| {
        if let Some(element) = in_chunk(bytes, dtype) {
            found.fetch_min(first_element + element, Ordering::Relaxed);
        }
    };
    let size = dtype.size_bytes();
    if gap == 0 {
        pool.run(bytes.len().div_ceil(CHUNK_BYTES), &|task| {
            let start = task.idx * CHUNK_BYTES;
            look(start / size, &bytes[start..bytes.len().min(start + CHUNK_BYTES)]);
        });
    } else {
        let rows = (CHUNK_BYTES / (cols * size)).max(1);
        pool.run(matrix.rows.div_ceil(rows), &|task| {
            for row in task.idx * rows..matrix.rows.min((task.idx + 1) * rows) {
                look(row * cols, &bytes[row * (cols + gap) * size..][..cols * size]);
            }
        });
    }
    let element = Some(found.into_inner()).filter(|&element| element != usize::MAX)?;
    Some((element / cols, element % cols))
}

fn in_chunk(chunk: &[u8], dtype: DType) -> Option<usize> {
    // A float is not finite when all bits of its exponent are set; E4M3 has no infinity, and NaN is all ones.
    match dtype {
        DType::F32 => position::<4>(chunk, |b| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
        DType::BF16 => position::<2>(chunk, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        DType::F16 => position::<2>(chunk, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        DType::F8E4M3 => position::<1>(chunk, |[b]| b & 0x7f == 0x7f),
        DType::F8E8M0 => position::<1>(chunk, |[b]| b == 0xff),
        DType::I64 | DType::I32 | DType::U8 => None,
    }
}

/// Looks at whole blocks first: without an early exit the compiler vectorises the loop.
fn position<const N: usize>(chunk: &[u8], bad: impl Fn([u8; N]) -> bool) -> Option<usize> {
    let (elements, _) = chunk.as_chunks::<N>();
    let block = elements.chunks(4096).position(|block| block.iter().fold(false, |any, &e| any | bad(e)))?;
    elements[block * 4096..].iter().position(|&e| bad(e)).map(|i| block * 4096 + i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bad_element_is_found_wherever_it_is() {
        let pool = Pool::new(2).unwrap();
        let mut bytes = vec![0x3f; (CHUNK_BYTES * 2 + 6) & !3];
        for dtype in [DType::F32, DType::BF16, DType::F16, DType::F8E4M3] {
            let size = dtype.size_bytes();
            let len = bytes.len() / size;
            let found = |bytes: &[u8]| first_non_finite(&pool, &SourceMatrix::new(bytes, dtype, 1, len));
            assert_eq!(found(&bytes), None, "{dtype}");
            for element in [0, 5000, len - 1] {
                let range = element * size..(element + 1) * size;
                bytes[range.clone()].fill(0xff);
                assert_eq!(found(&bytes), Some((0, element)), "{dtype}");
                bytes[range].fill(0x3f);
            }
        }
    }

    #[test]
    fn a_part_is_looked_through_and_nothing_else() {
        let pool = Pool::new(2).unwrap();
        let (rows, cols) = (3000, 300);
        let mut bytes = vec![0x3f; rows * cols * 2];
        for (row, col) in [(0, 0), (10, 7), (2999, 299), (1500, 100), (1500, 99), (1500, 200)] {
            let at = (row * cols + col) * 2;
            bytes[at..at + 2].fill(0xff);
            let whole = SourceMatrix::new(&bytes, DType::BF16, rows, cols);
            assert_eq!(first_non_finite(&pool, &whole), Some((row, col)));
            for (r, c) in [(0..rows, 100..200), (5..2000, 0..cols), (10..11, 7..8), (0..rows, 0..0)] {
                let part = whole.row_range(r.clone()).col_range(c.clone());
                let expected = (r.contains(&row) && c.contains(&col)).then(|| (row - r.start, col - c.start));
                assert_eq!(first_non_finite(&pool, &part), expected, "({row}, {col}) in {r:?}, {c:?}");
            }
            bytes[at..at + 2].fill(0x3f);
        }
    }
}
