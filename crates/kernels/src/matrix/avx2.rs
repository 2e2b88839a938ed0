//! The product with AVX2 and FMA: 8 `n` in the lanes of a register, so a panel is two halves.

use std::arch::x86_64::*;

use moesaic_spec::DType;

use super::source::widen_tiles;
use super::{PackedMatrix, SCALE_K, TILE_K, TILE_N, fp8};

/// Rows that a kernel takes at once: 4 × (even + odd) of 16 registers, the sums in memory.
pub(crate) const MAX_ROWS: usize = 4;
const HALF: usize = TILE_N / 2;
/// How far ahead of the loads the prefetches are, in bytes.
const PREFETCH_BYTES: usize = 4096;

/// See [`widen_tiles`].
#[target_feature(enable = "avx2,fma")]
pub(crate) fn widen(x: &[half::bf16], stride: usize, rows: usize, wide: &mut [f32]) {
    widen_tiles(x, stride, rows, wide);
}

/// `rows` rows of `wide` ([`widen_tiles`]) times panel `panel` of a BF16 or F8 E4M3
/// matrix, into `c` with row stride `ldc`.
#[target_feature(enable = "avx2,fma")]
pub(crate) fn tiles(w: &PackedMatrix, panel: usize, rows: usize, wide: &[f32], c: &mut [f32], ldc: usize) {
    let num_tiles = w.k().div_ceil(TILE_K);
    assert!((1..=MAX_ROWS).contains(&rows));
    assert!(wide.len() >= num_tiles * TILE_K * rows && c.len() >= (rows - 1) * ldc + TILE_N);
    let (bytes, scales) = (w.panel(panel, 1), w.scales(panel));
    // SAFETY (all): the assertions above are the callee's promises; a panel has `num_tiles` tiles, and a line of 16 scales
    // for each block of 128 columns if it is F8 E4M3.
    macro_rules! call {
        ($($m:literal)*) => {
            match (rows, w.dtype() == DType::F8E4M3) {
                $(
                    // SAFETY: above.
                    ($m, false) => unsafe { bf16::<$m>(bytes.as_ptr(), num_tiles, wide.as_ptr(), c.as_mut_ptr(), ldc) },
                    // SAFETY: above.
                    ($m, true) => unsafe { f8::<$m>(bytes, scales, num_tiles, wide.as_ptr(), c.as_mut_ptr(), ldc) },
                )*
                _ => unreachable!("asserted"),
            }
        };
    }
    call!(1 2 3 4);
}

/// Adds to `acc` the sums of one tile of BF16 for the two halves of a panel.
///
/// Promises: `tile` is 1 KiB, `x` has `M` rows of 32 elements.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn tile<const M: usize>(tile: *const u8, x: *const f32, acc: &mut [[__m256; M]; 2]) {
    let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    for (half, acc) in acc.iter_mut().enumerate() {
        let (mut even, mut odd) = ([_mm256_setzero_ps(); M], [_mm256_setzero_ps(); M]);
        for pair in 0..TILE_K / 2 {
            // SAFETY: inside the tile; prefetching any address is harmless.
            let line = unsafe {
                let at = tile.add(pair * 64 + half * 32);
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(PREFETCH_BYTES).cast());
                _mm256_loadu_si256(at.cast())
            };
            let we = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(line));
            let wo = _mm256_castsi256_ps(_mm256_and_si256(line, high));
            for m in 0..M {
                // SAFETY: inside the tile's rows of x.
                let (xe, xo) = unsafe { (*x.add(m * TILE_K + 2 * pair), *x.add(m * TILE_K + 2 * pair + 1)) };
                even[m] = _mm256_fmadd_ps(_mm256_set1_ps(xe), we, even[m]);
                odd[m] = _mm256_fmadd_ps(_mm256_set1_ps(xo), wo, odd[m]);
            }
        }
        for m in 0..M {
            acc[m] = _mm256_add_ps(acc[m], _mm256_add_ps(even[m], odd[m]));
        }
    }
}

/// Promises: `w` has `num_tiles` tiles of 1 KiB, `x` `M` rows of each tile, `c` `M` rows of stride `ldc`.
#[target_feature(enable = "avx2,fma")]
unsafe fn bf16<const M: usize>(w: *const u8, num_tiles: usize, x: *const f32, c: *mut f32, ldc: usize) {
    let mut acc = [[_mm256_setzero_ps(); M]; 2];
    for i in 0..num_tiles {
        // SAFETY: promised by the caller.
        unsafe { tile(w.add(i * 1024), x.add(i * TILE_K * M), &mut acc) };
    }
    // SAFETY: promised by the caller.
    unsafe { put(&acc, c, ldc) };
}

/// Each tile is decoded to BF16, then multiplied. Promises as [`bf16`].
#[target_feature(enable = "avx2,fma")]
unsafe fn f8<const M: usize>(w: &[u8], scales: &[f32], num_tiles: usize, x: *const f32, c: *mut f32, ldc: usize) {
    let mut total = [[_mm256_setzero_ps(); M]; 2];
    let mut acc = total;
    let tiles_a_block = SCALE_K / TILE_K;
    let mut decoded = [0u16; TILE_N * TILE_K];
    for (i, codes) in w.chunks_exact(TILE_N * TILE_K).enumerate() {
        fp8::decode_tile(codes, &mut decoded);
        // SAFETY: a decoded tile is 1 KiB; x by the caller's promise.
        unsafe { tile(decoded.as_ptr().cast(), x.add(i * TILE_K * M), &mut acc) };
        if i % tiles_a_block == tiles_a_block - 1 || i == num_tiles - 1 {
            let scales = &scales[i / tiles_a_block * TILE_N..][..TILE_N];
            for half in 0..2 {
                // SAFETY: 8 of 16 scales.
                let scale = unsafe { _mm256_loadu_ps(scales.as_ptr().add(half * HALF)) };
                for m in 0..M {
                    total[half][m] = _mm256_fmadd_ps(scale, acc[half][m], total[half][m]);
                    acc[half][m] = _mm256_setzero_ps();
                }
            }
        }
    }
    // SAFETY: promised by the caller.
    unsafe { put(&total, c, ldc) };
}

/// Promises: `c` has `M` rows of stride `ldc`.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn put<const M: usize>(sums: &[[__m256; M]; 2], c: *mut f32, ldc: usize) {
    for (half, sums) in sums.iter().enumerate() {
        for (m, sum) in sums.iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe { _mm256_storeu_ps(c.add(m * ldc + half * HALF), *sum) };
        }
    }
}

/// `rows` rows of `x` (row stride `ldx`) times panel `panel` of an F32 matrix.
#[target_feature(enable = "avx2,fma")]
pub(crate) fn f32(w: &PackedMatrix, panel: usize, rows: usize, x: &[f32], ldx: usize, c: &mut [f32], ldc: usize) {
    let k = w.k();
    assert!((1..=MAX_ROWS).contains(&rows));
    assert!(x.len() >= (rows - 1) * ldx + k && c.len() >= (rows - 1) * ldc + TILE_N);
    let w = w.panel(panel, 1).as_ptr().cast::<f32>();
    // SAFETY: the assertions above are the callee's promises; a panel has `k` lines.
    unsafe {
        match rows {
            1 => f32_panel::<1>(w, k, x.as_ptr(), ldx, c.as_mut_ptr(), ldc),
            2 => f32_panel::<2>(w, k, x.as_ptr(), ldx, c.as_mut_ptr(), ldc),
            3 => f32_panel::<3>(w, k, x.as_ptr(), ldx, c.as_mut_ptr(), ldc),
            _ => f32_panel::<4>(w, k, x.as_ptr(), ldx, c.as_mut_ptr(), ldc),
        }
    }
}

/// Promises: `w` has `k` lines, `x` `M` rows of `k` elements with stride `ldx`, `c` `M` rows of stride `ldc`.
#[target_feature(enable = "avx2,fma")]
unsafe fn f32_panel<const M: usize>(w: *const f32, k: usize, x: *const f32, ldx: usize, c: *mut f32, ldc: usize) {
    let mut acc = [[_mm256_setzero_ps(); M]; 2];
    for k_idx in 0..k {
        // SAFETY: line `k_idx`; prefetching any address is harmless.
        let (a, b) = unsafe {
            let at = w.add(k_idx * TILE_N);
            _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(PREFETCH_BYTES));
            (_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(HALF)))
        };
        let [low, high] = &mut acc;
        for (m, (low, high)) in low.iter_mut().zip(high).enumerate() {
            // SAFETY: promised by the caller.
            let x = _mm256_set1_ps(unsafe { *x.add(m * ldx + k_idx) });
            *low = _mm256_fmadd_ps(x, a, *low);
            *high = _mm256_fmadd_ps(x, b, *high);
        }
    }
    // SAFETY: promised by the caller.
    unsafe { put(&acc, c, ldc) };
}
