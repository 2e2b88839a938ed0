//! Finding a NaN or an infinity in stored weights. One would silently turn every later token into garbage.

use std::sync::atomic::{AtomicUsize, Ordering};

use moesaic_device::Pool;
use moesaic_spec::DType;

const CHUNK_BYTES: usize = 1 << 20;

/// The first element (some element, when there are many) that is not finite. Integers always are.
pub(crate) fn first_non_finite(pool: &Pool, bytes: &[u8], dtype: DType) -> Option<usize> {
    let found = AtomicUsize::new(usize::MAX);
    pool.run(bytes.len().div_ceil(CHUNK_BYTES), &|task| {
        let start = task.idx * CHUNK_BYTES;
        let chunk = &bytes[start..bytes.len().min(start + CHUNK_BYTES)];
        if let Some(element) = in_chunk(chunk, dtype) {
            found.fetch_min(start / dtype.size_bytes() + element, Ordering::Relaxed);
        }
    });
    Some(found.into_inner()).filter(|&element| element != usize::MAX)
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
            assert_eq!(first_non_finite(&pool, &bytes, dtype), None, "{dtype}");
            let size = dtype.size_bytes();
            let last = bytes.len() / size - 1;
            for element in [0, 5000, last] {
                let range = element * size..(element + 1) * size;
                bytes[range.clone()].fill(0xff);
                assert_eq!(first_non_finite(&pool, &bytes, dtype), Some(element), "{dtype}");
                bytes[range].fill(0x3f);
            }
        }
    }
}
