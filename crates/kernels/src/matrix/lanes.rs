//! The product in plain Rust over [`TILE_N`] lanes: the portable path. Where the target has fused multiply-adds by default
//! (64-bit ARM), the compiler makes vectors of it.

use moesaic_spec::DType;

use super::{PackedMatrix, SCALE_K, TILE_K, TILE_N, fp8};

type Lanes = [f32; TILE_N];

/// Rows that a kernel takes at once: accumulators of more would not fit the registers.
pub(crate) const MAX_ROWS: usize = 2;

#[inline(always)]
fn fma(x: f32, w: &Lanes, acc: &mut Lanes) {
    for lane in 0..TILE_N {
        acc[lane] = x.mul_add(w[lane], acc[lane]);
    }
}

/// A line of BF16 pairs as F32: the even and the odd `k`.
#[inline(always)]
fn widen(line: &[u32; TILE_N]) -> (Lanes, Lanes) {
    (line.map(|pair| f32::from_bits(pair << 16)), line.map(|pair| f32::from_bits(pair & 0xffff_0000)))
}

#[inline(always)]
fn line_bf16(tile: &[u8], pair: usize) -> [u32; TILE_N] {
    let bytes: &[u8; 64] = tile[pair * 64..pair * 64 + 64].try_into().expect("a line");
    std::array::from_fn(|lane| {
        u32::from_le_bytes([bytes[lane * 4], bytes[lane * 4 + 1], bytes[lane * 4 + 2], bytes[lane * 4 + 3]])
    })
}

#[inline(always)]
fn line_f8(tile: &[u8], pair: usize) -> [u32; TILE_N] {
    std::array::from_fn(|lane| {
        let at = fp8::offset_in_tile(lane, pair * 2);
        u32::from(fp8::to_bf16(tile[at])) | u32::from(fp8::to_bf16(tile[at + 1])) << 16
    })
}

/// `M` rows of `wide` ([`widen_tiles`](super::source::widen_tiles)) times panel `panel` of `w`, into `c` with row
/// stride `ldc`. BF16 and F8 E4M3.
fn panel_tiles<const M: usize>(w: &PackedMatrix, panel: usize, wide: &[f32], c: &mut [f32], ldc: usize) {
    let f8 = w.dtype() == DType::F8E4M3;
    let tile_bytes = if f8 { 512 } else { 1024 };
    let tiles_a_block = if f8 { SCALE_K / TILE_K } else { usize::MAX };
    let mut total = [[0f32; TILE_N]; M];
    let mut acc = [[0f32; TILE_N]; M];
    let num_tiles = w.k().div_ceil(TILE_K);
    let (tiles, scales) = (w.panel(panel, 1), w.scales(panel));
    for (tile_idx, tile) in tiles.chunks_exact(tile_bytes).enumerate() {
        let (x, _) = wide[tile_idx * TILE_K * M..][..TILE_K * M].as_chunks::<TILE_K>();
        let (mut even, mut odd) = ([[0f32; TILE_N]; M], [[0f32; TILE_N]; M]);
        for pair in 0..TILE_K / 2 {
            let line = if f8 { line_f8(tile, pair) } else { line_bf16(tile, pair) };
            let (we, wo) = widen(&line);
            for m in 0..M {
                fma(x[m][2 * pair], &we, &mut even[m]);
                fma(x[m][2 * pair + 1], &wo, &mut odd[m]);
            }
        }
        for m in 0..M {
            for lane in 0..TILE_N {
                acc[m][lane] += even[m][lane] + odd[m][lane];
            }
        }
        if f8 && (tile_idx % tiles_a_block == tiles_a_block - 1 || tile_idx == num_tiles - 1) {
            let scale = &scales[tile_idx / tiles_a_block * TILE_N..][..TILE_N];
            for m in 0..M {
                for lane in 0..TILE_N {
                    total[m][lane] = scale[lane].mul_add(acc[m][lane], total[m][lane]);
                }
            }
            acc = [[0f32; TILE_N]; M];
        }
    }
    for m in 0..M {
        c[m * ldc..m * ldc + TILE_N].copy_from_slice(if f8 { &total[m] } else { &acc[m] });
    }
}

/// `M` rows of `x` (row stride `ldx`) times panel `panel` of an F32 matrix.
fn panel_f32<const M: usize>(w: &PackedMatrix, panel: usize, x: &[f32], ldx: usize, c: &mut [f32], ldc: usize) {
    let mut acc = [[0f32; TILE_N]; M];
    for (k, line) in w.panel(panel, 1).chunks_exact(TILE_N * 4).enumerate() {
        let line: &[u8; 64] = line.try_into().expect("a line");
        let line: Lanes = std::array::from_fn(|lane| {
            f32::from_le_bytes([line[lane * 4], line[lane * 4 + 1], line[lane * 4 + 2], line[lane * 4 + 3]])
        });
        for m in 0..M {
            fma(x[m * ldx + k], &line, &mut acc[m]);
        }
    }
    for m in 0..M {
        c[m * ldc..m * ldc + TILE_N].copy_from_slice(&acc[m]);
    }
}

/// [`panel_tiles`] for `rows` rows.
pub(crate) fn tiles(w: &PackedMatrix, panel: usize, rows: usize, wide: &[f32], c: &mut [f32], ldc: usize) {
    match rows {
        1 => panel_tiles::<1>(w, panel, wide, c, ldc),
        2 => panel_tiles::<2>(w, panel, wide, c, ldc),
        _ => unreachable!("at most {MAX_ROWS} rows"),
    }
}

/// [`panel_f32`] for `rows` rows.
pub(crate) fn f32(w: &PackedMatrix, panel: usize, rows: usize, x: &[f32], ldx: usize, c: &mut [f32], ldc: usize) {
    match rows {
        1 => panel_f32::<1>(w, panel, x, ldx, c, ldc),
        2 => panel_f32::<2>(w, panel, x, ldx, c, ldc),
        _ => unreachable!("at most {MAX_ROWS} rows"),
    }
}
