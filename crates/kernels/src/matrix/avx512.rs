//! The product with AVX-512: 16 `n` in the lanes of a register, rows of x broadcast from memory.
//!
//! Weights are read in memory order, one panel after the other; the chains of consecutive tiles are independent, so the
//! processor overlaps them by itself. With a few rows this is bound by memory; it is faster than AMX up to about two rows.

use std::arch::x86_64::*;

use moesaic_spec::DType;

use super::source::widen_tiles;
use super::{PackedMatrix, SCALE_K, TILE_K, TILE_N, fp8};

/// Rows that a kernel takes at once: 8 × (even + odd + sum) of 32 registers.
pub(crate) const MAX_ROWS: usize = 8;
/// How far ahead of the loads the prefetches are, in bytes. Without them a core streams at four fifths of its bandwidth; from
/// 4 to 12 KiB there is little difference.
const PREFETCH_BYTES: usize = 6144;

/// See [`widen_tiles`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn widen(x: &[half::bf16], stride: usize, rows: usize, wide: &mut [f32]) {
    widen_tiles(x, stride, rows, wide);
}

/// `rows` rows of `wide` ([`widen_tiles`]) times panel `panel` of a BF16 or F8 E4M3
/// matrix, into `c` with row stride `ldc`.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn tiles(w: &PackedMatrix, panel: usize, rows: usize, wide: &[f32], c: &mut [f32], ldc: usize) {
    let num_tiles = w.k().div_ceil(TILE_K);
    assert!((1..=MAX_ROWS).contains(&rows));
    assert!(wide.len() >= num_tiles * TILE_K * rows && c.len() >= (rows - 1) * ldc + TILE_N);
    let (bytes, scales) = (w.panel(panel, 1), w.scales(panel));
    let vbmi = has_vbmi();
    macro_rules! call {
        ($($m:literal)*) => {
            match (rows, w.dtype() == DType::F8E4M3) {
                $(
                    // SAFETY: the assertions above are the callee's promises; a panel has `num_tiles` tiles.
                    ($m, false) => unsafe { bf16::<$m>(bytes.as_ptr(), num_tiles, wide.as_ptr(), c.as_mut_ptr(), ldc) },
                    // SAFETY: as above, and a panel has a line of 16 scales for each block of 128 columns.
                    ($m, true) if vbmi => unsafe {
                        f8_vbmi::<$m>(bytes.as_ptr(), scales.as_ptr(), num_tiles, wide.as_ptr(), c.as_mut_ptr(), ldc)
                    },
                    // SAFETY: as above.
                    ($m, true) => unsafe {
                        f8::<$m>(bytes.as_ptr(), scales.as_ptr(), num_tiles, wide.as_ptr(), c.as_mut_ptr(), ldc)
                    },
                )*
                _ => unreachable!("asserted"),
            }
        };
    }
    call!(1 2 3 4 5 6 7 8);
}

/// Promises: `w` has `num_tiles` tiles of 1 KiB, `x` `M` rows of each tile, `c` `M` rows of stride `ldc`.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn bf16<const M: usize>(w: *const u8, num_tiles: usize, x: *const f32, c: *mut f32, ldc: usize) {
    let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let mut acc = [_mm512_setzero_ps(); M];
    for tile in 0..num_tiles {
        let (mut even, mut odd) = ([_mm512_setzero_ps(); M], [_mm512_setzero_ps(); M]);
        for pair in 0..TILE_K / 2 {
            // SAFETY: inside the tile; prefetching any address is harmless.
            let line = unsafe {
                let at = w.add(tile * 1024 + pair * 64);
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(PREFETCH_BYTES).cast());
                _mm512_loadu_si512(at.cast())
            };
            let we = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(line));
            let wo = _mm512_castsi512_ps(_mm512_and_si512(line, high));
            // SAFETY: inside the tile's rows of x.
            let x = unsafe { x.add(tile * TILE_K * M + 2 * pair) };
            for m in 0..M {
                // SAFETY: as above.
                let (xe, xo) = unsafe { (*x.add(m * TILE_K), *x.add(m * TILE_K + 1)) };
                even[m] = _mm512_fmadd_ps(_mm512_set1_ps(xe), we, even[m]);
                odd[m] = _mm512_fmadd_ps(_mm512_set1_ps(xo), wo, odd[m]);
            }
        }
        for m in 0..M {
            acc[m] = _mm512_add_ps(acc[m], _mm512_add_ps(even[m], odd[m]));
        }
    }
    for (m, acc) in acc.into_iter().enumerate() {
        // SAFETY: promised by the caller.
        unsafe { _mm512_storeu_ps(c.add(m * ldc), acc) };
    }
}

/// Decodes a line of 64 codes to the two lines of BF16 pairs that it stands for, by arithmetic.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn decode(codes: __m512i) -> (__m512i, __m512i) {
    let zero = _mm512_setzero_si512();
    // Codes as the high bytes of words.
    let words = (_mm512_unpacklo_epi8(zero, codes), _mm512_unpackhi_epi8(zero, codes));
    (decode_words(words.0), decode_words(words.1))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn decode_words(words: __m512i) -> __m512i {
    // SAFETY: the table has 128 words, of which the first 32 are read.
    let small = unsafe { _mm512_loadu_si512(fp8::MAGNITUDES.as_ptr().cast()) };
    let sign = _mm512_and_si512(words, _mm512_set1_epi16(i16::MIN));
    let magnitude = _mm512_and_si512(_mm512_srli_epi16::<8>(words), _mm512_set1_epi16(0x7f));
    let normal = _mm512_add_epi16(_mm512_slli_epi16::<4>(magnitude), _mm512_set1_epi16(120 << 7));
    let subnormal = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
    let value = _mm512_mask_permutexvar_epi16(normal, subnormal, magnitude, small);
    let nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
    let value = _mm512_mask_mov_epi16(value, nan, _mm512_set1_epi16(0x7fc0));
    _mm512_or_si512(value, sign)
}

/// As [`decode`], by tables of bytes: a quarter of the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn decode_vbmi(codes: __m512i) -> (__m512i, __m512i) {
    let [high, low] = &fp8::MAGNITUDE_BYTES;
    // SAFETY: each table has 128 bytes.
    let (high, low) = unsafe {
        let load = |table: &[u8; 128], at: usize| _mm512_loadu_si512(table.as_ptr().add(at).cast());
        // Permutations look at seven bits of a code: not at the sign.
        let high = _mm512_permutex2var_epi8(load(high, 0), codes, load(high, 64));
        (high, _mm512_permutex2var_epi8(load(low, 0), codes, load(low, 64)))
    };
    // high | (codes & sign)
    let high = _mm512_ternarylogic_epi32::<0xf8>(high, codes, _mm512_set1_epi8(i8::MIN));
    (_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high))
}

/// Whether the processor permutes bytes (Ice Lake and later).
pub(crate) fn has_vbmi() -> bool {
    is_x86_feature_detected!("avx512vbmi")
}

macro_rules! f8_kernels {
    ($kernel:ident, $tiles:ident, $decode:ident, $features:literal) => {
        /// Promises: `w` has `num_tiles` tiles of 512 bytes, `scales` 16 for each four of them, the rest as [`bf16`].
        #[target_feature(enable = $features)]
        unsafe fn $kernel<const M: usize>(
            w: *const u8,
            scales: *const f32,
            num_tiles: usize,
            x: *const f32,
            c: *mut f32,
            ldc: usize,
        ) {
            let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            let mut total = [_mm512_setzero_ps(); M];
            let tiles_a_block = SCALE_K / TILE_K;
            for block in 0..num_tiles.div_ceil(tiles_a_block) {
                let mut acc = [_mm512_setzero_ps(); M];
                for tile in block * tiles_a_block..num_tiles.min((block + 1) * tiles_a_block) {
                    let (mut even, mut odd) = ([_mm512_setzero_ps(); M], [_mm512_setzero_ps(); M]);
                    for line in 0..TILE_K / 4 {
                        // SAFETY: inside the tile; prefetching any address is harmless.
                        let codes = unsafe {
                            let at = w.add(tile * 512 + line * 64);
                            _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(PREFETCH_BYTES).cast());
                            _mm512_loadu_si512(at.cast())
                        };
                        let decoded = $decode(codes);
                        for (half, line_bf16) in [decoded.0, decoded.1].into_iter().enumerate() {
                            let we = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(line_bf16));
                            let wo = _mm512_castsi512_ps(_mm512_and_si512(line_bf16, high));
                            // SAFETY: inside the tile's rows of x.
                            let x = unsafe { x.add(tile * TILE_K * M + 4 * line + 2 * half) };
                            for m in 0..M {
                                // SAFETY: as above.
                                let (xe, xo) = unsafe { (*x.add(m * TILE_K), *x.add(m * TILE_K + 1)) };
                                even[m] = _mm512_fmadd_ps(_mm512_set1_ps(xe), we, even[m]);
                                odd[m] = _mm512_fmadd_ps(_mm512_set1_ps(xo), wo, odd[m]);
                            }
                        }
                    }
                    for m in 0..M {
                        acc[m] = _mm512_add_ps(acc[m], _mm512_add_ps(even[m], odd[m]));
                    }
                }
                // SAFETY: promised by the caller.
                let scale = unsafe { _mm512_loadu_ps(scales.add(block * TILE_N)) };
                for m in 0..M {
                    total[m] = _mm512_fmadd_ps(scale, acc[m], total[m]);
                }
            }
            for (m, total) in total.into_iter().enumerate() {
                // SAFETY: promised by the caller.
                unsafe { _mm512_storeu_ps(c.add(m * ldc), total) };
            }
        }

        /// Decodes whole tiles of 512 bytes to tiles of 512 words.
        #[target_feature(enable = $features)]
        pub(crate) fn $tiles(codes: &[u8], out: &mut [u16]) {
            assert!(out.len() >= codes.len());
            for (codes, out) in codes.chunks_exact(64).zip(out.chunks_exact_mut(64)) {
                // SAFETY: 64 bytes are read, 128 written, which the chunks have.
                unsafe {
                    _mm_prefetch::<_MM_HINT_T0>(codes.as_ptr().wrapping_add(PREFETCH_BYTES).cast());
                    let (a, b) = $decode(_mm512_loadu_si512(codes.as_ptr().cast()));
                    _mm512_storeu_si512(out.as_mut_ptr().cast(), a);
                    _mm512_storeu_si512(out.as_mut_ptr().add(32).cast(), b);
                }
            }
        }
    };
}

f8_kernels!(f8, decode_tiles_any, decode, "avx512f,avx512bw");
f8_kernels!(f8_vbmi, decode_tiles_vbmi, decode_vbmi, "avx512f,avx512bw,avx512vbmi");

/// Decodes whole tiles of 512 bytes to tiles of 512 words.
#[target_feature(enable = "avx512f,avx512bw")]
pub(crate) fn decode_tiles(codes: &[u8], out: &mut [u16]) {
    if has_vbmi() {
        // SAFETY: just asked.
        unsafe { decode_tiles_vbmi(codes, out) }
    } else {
        decode_tiles_any(codes, out)
    }
}

/// `rows` rows of `x` (row stride `ldx`) times `count` (1 or 2) panels from `panel` on of an F32 matrix.
#[target_feature(enable = "avx512f")]
#[allow(clippy::too_many_arguments, reason = "a matrix product has two operands, a result, and their strides")]
pub(crate) fn f32(
    w: &PackedMatrix,
    panel: usize,
    count: usize,
    rows: usize,
    x: &[f32],
    ldx: usize,
    c: &mut [f32],
    ldc: usize,
) {
    let k = w.k();
    assert!((1..=MAX_ROWS).contains(&rows) && (1..=2).contains(&count));
    assert!(x.len() >= (rows - 1) * ldx + k && c.len() >= (rows - 1) * ldc + count * TILE_N);
    let w = w.panel(panel, count).as_ptr().cast::<f32>();
    macro_rules! call {
        ($($m:literal)*) => {
            match (rows, count) {
                $(
                    // SAFETY: the assertions above are the callee's promises; `w` has `count` panels of `k` lines.
                    ($m, 1) => unsafe { f32_block::<$m, 1>(w, k, x.as_ptr(), ldx, c.as_mut_ptr(), ldc) },
                    // SAFETY: as above.
                    ($m, _) => unsafe { f32_block::<$m, 2>(w, k, x.as_ptr(), ldx, c.as_mut_ptr(), ldc) },
                )*
                _ => unreachable!("asserted"),
            }
        };
    }
    call!(1 2 3 4 5 6 7 8);
}

/// Promises: `w` has `P` panels of `k` lines, `x` `M` rows of `k` elements with stride `ldx`, `c` `M` rows of stride `ldc`.
#[target_feature(enable = "avx512f")]
unsafe fn f32_block<const M: usize, const P: usize>(
    w: *const f32,
    k: usize,
    x: *const f32,
    ldx: usize,
    c: *mut f32,
    ldc: usize,
) {
    let mut acc = [[_mm512_setzero_ps(); P]; M];
    for k_idx in 0..k {
        let mut lines = [_mm512_setzero_ps(); P];
        for (p, line) in lines.iter_mut().enumerate() {
            // SAFETY: line `k_idx` of each panel; prefetching any address is harmless.
            *line = unsafe {
                let at = w.add((p * k + k_idx) * TILE_N);
                _mm_prefetch::<_MM_HINT_T0>(at.cast::<i8>().wrapping_add(PREFETCH_BYTES));
                _mm512_loadu_ps(at)
            };
        }
        for (m, acc) in acc.iter_mut().enumerate() {
            // SAFETY: promised by the caller.
            let x = _mm512_set1_ps(unsafe { *x.add(m * ldx + k_idx) });
            for p in 0..P {
                acc[p] = _mm512_fmadd_ps(x, lines[p], acc[p]);
            }
        }
    }
    for (m, acc) in acc.into_iter().enumerate() {
        for (p, acc) in acc.into_iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe { _mm512_storeu_ps(c.add(m * ldc + p * TILE_N), acc) };
        }
    }
}

/// `c = fma(scale, sums, c)` for the 16 columns of a panel in `rows` rows; `c` counts as zero if `first`.
#[target_feature(enable = "avx512f")]
pub(crate) fn scale_add(rows: usize, scale: &[f32], sums: &[f32], lds: usize, c: &mut [f32], ldc: usize, first: bool) {
    assert!(scale.len() == TILE_N && sums.len() >= (rows - 1) * lds + TILE_N && c.len() >= (rows - 1) * ldc + TILE_N);
    // SAFETY: 16 scales; the assertion covers every row.
    unsafe {
        let scale = _mm512_loadu_ps(scale.as_ptr());
        for row in 0..rows {
            let c = c.as_mut_ptr().add(row * ldc);
            let before = if first { _mm512_setzero_ps() } else { _mm512_loadu_ps(c) };
            _mm512_storeu_ps(c, _mm512_fmadd_ps(scale, _mm512_loadu_ps(sums.as_ptr().add(row * lds)), before));
        }
    }
}
