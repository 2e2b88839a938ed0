//! The two products of attention over [`Lanes`]: queries with keys, weights with values. Several query rows share each
//! load.

// Indices run over rows and vectors of several register arrays at once; iterators would hide which.
#![allow(clippy::needless_range_loop)]

use moesaic_spec::DType;

use super::online::{CHUNK, Chunk, Shape};
use crate::lanes::{LANES, Lanes};
use crate::paged::TILE_TOKENS;

/// `scores[i] = q[i] . k` for all rows and `num_keys` keys (rounded up to whole vectors).
///
/// # Safety
/// Valid pointers; `L`'s instructions.
#[inline(always)]
pub(super) unsafe fn score<L: Lanes>(
    queries: *const f32,
    n: usize,
    key_pad: usize,
    chunk: &Chunk,
    bf16: bool,
    num_keys: usize,
    scores: *mut f32,
) {
    let vectors = num_keys.div_ceil(LANES);
    let mut i = 0;
    // SAFETY: rows i .. i + M are below n; vectors j .. j + V are inside a chunk, whose tiles all have valid pointers.
    unsafe {
        while i < n {
            let (q, s) = (queries.add(i * key_pad), scores.add(i * CHUNK));
            let rows = n - i;
            if rows >= 4 {
                for j in (0..vectors).step_by(2) {
                    score_tile::<L, 4, 2>(q, key_pad, chunk, bf16, j, s);
                }
                i += 4;
            } else if rows >= 2 {
                for j in (0..vectors).step_by(2) {
                    score_tile::<L, 2, 2>(q, key_pad, chunk, bf16, j, s);
                }
                i += 2;
            } else {
                score_tile::<L, 1, 4>(q, key_pad, chunk, bf16, 0, s);
                i += 1;
            }
        }
    }
}

/// M rows against V vectors of keys.
///
/// # Safety
/// Valid pointers; `L`'s instructions.
#[inline(always)]
unsafe fn score_tile<L: Lanes, const M: usize, const V: usize>(
    queries: *const f32,
    key_pad: usize,
    chunk: &Chunk,
    bf16: bool,
    vector: usize,
    scores: *mut f32,
) {
    // SAFETY: the caller's promise; a key tile has key_pad * 8 elements.
    unsafe {
        let mut sums = [[L::splat(0.0); V]; M];
        if bf16 {
            for step in (0..key_pad / 2).step_by(16) {
                let mut even = [[L::splat(0.0); V]; M];
                let mut odd = [[L::splat(0.0); V]; M];
                for pair in step..(step + 16).min(key_pad / 2) {
                    for v in 0..V {
                        let tile = 2 * (vector + v);
                        let low = chunk.keys[tile].cast::<u32>().add(pair * TILE_TOKENS);
                        let high = chunk.keys[tile + 1].cast::<u32>().add(pair * TILE_TOKENS);
                        let (k_even, k_odd) = L::load_pairs_halves(low, high);
                        for m in 0..M {
                            let q = queries.add(m * key_pad + 2 * pair);
                            even[m][v] = L::splat(q.read()).fma(k_even, even[m][v]);
                            odd[m][v] = L::splat(q.add(1).read()).fma(k_odd, odd[m][v]);
                        }
                    }
                }
                for m in 0..M {
                    for v in 0..V {
                        sums[m][v] = sums[m][v].add(even[m][v].add(odd[m][v]));
                    }
                }
            }
        } else {
            for c in 0..key_pad {
                for v in 0..V {
                    let tile = 2 * (vector + v);
                    let low = chunk.keys[tile].cast::<f32>().add(c * TILE_TOKENS);
                    let high = chunk.keys[tile + 1].cast::<f32>().add(c * TILE_TOKENS);
                    let k = L::load_halves(low, high);
                    for m in 0..M {
                        sums[m][v] = L::splat(queries.add(m * key_pad + c).read()).fma(k, sums[m][v]);
                    }
                }
            }
        }
        for m in 0..M {
            for v in 0..V {
                sums[m][v].store(scores.add(m * CHUNK + (vector + v) * LANES));
            }
        }
    }
}

/// `values[i] += p[i] * v` over `num_keys` keys.
///
/// # Safety
/// Valid pointers; `L`'s instructions.
#[inline(always)]
pub(super) unsafe fn weigh<L: Lanes>(
    weights: *const f32,
    n: usize,
    chunk: &Chunk,
    shape: &Shape,
    num_keys: usize,
    values: *mut f32,
    value_pad: usize,
) {
    let width = shape.value_width;
    let mut i = 0;
    // SAFETY: rows i .. i + M are below n, columns d .. below the width.
    unsafe {
        while i < n {
            let (p, o) = (weights.add(i * CHUNK), values.add(i * value_pad));
            let rows = if n - i >= 4 { 4 } else { (n - i).min(2) };
            let mut d = 0;
            while d < width {
                let o = o.add(d);
                match (rows, width - d) {
                    (4, 32..) => weigh_tile::<L, 4, 2, false>(p, chunk, shape, num_keys, d, o, value_pad),
                    (4, 16..) => weigh_tile::<L, 4, 1, false>(p, chunk, shape, num_keys, d, o, value_pad),
                    (4, _) => weigh_tile::<L, 4, 1, true>(p, chunk, shape, num_keys, d, o, value_pad),
                    (2, 64..) => weigh_tile::<L, 2, 4, false>(p, chunk, shape, num_keys, d, o, value_pad),
                    (2, 16..) => weigh_tile::<L, 2, 1, false>(p, chunk, shape, num_keys, d, o, value_pad),
                    (2, _) => weigh_tile::<L, 2, 1, true>(p, chunk, shape, num_keys, d, o, value_pad),
                    (_, 64..) => weigh_tile::<L, 1, 4, false>(p, chunk, shape, num_keys, d, o, value_pad),
                    (_, 16..) => weigh_tile::<L, 1, 1, false>(p, chunk, shape, num_keys, d, o, value_pad),
                    _ => weigh_tile::<L, 1, 1, true>(p, chunk, shape, num_keys, d, o, value_pad),
                }
                d += match (rows, width - d) {
                    (4, 32..) => 32,
                    (1 | 2, 64..) => 64,
                    _ => 16,
                };
            }
            i += rows;
        }
    }
}

/// M rows, V vectors of columns from `d` on; `PART`: the last vector is not whole.
///
/// # Safety
/// Valid pointers; `L`'s instructions.
#[inline(always)]
unsafe fn weigh_tile<L: Lanes, const M: usize, const V: usize, const PART: bool>(
    weights: *const f32,
    chunk: &Chunk,
    shape: &Shape,
    num_keys: usize,
    d: usize,
    values: *mut f32,
    value_pad: usize,
) {
    let lanes = if PART { shape.value_width - d } else { LANES };
    // SAFETY: the caller's promise; a value tile has eight rows (four rows of pairs) of value_stride.
    unsafe {
        let mut sums = [[L::splat(0.0); V]; M];
        for m in 0..M {
            for v in 0..V {
                sums[m][v] = L::load(values.add(m * value_pad + v * LANES));
            }
        }
        if shape.dtype == DType::BF16 {
            for step in (0..num_keys).step_by(32) {
                let mut even = [[L::splat(0.0); V]; M];
                let mut odd = [[L::splat(0.0); V]; M];
                for key in (step..(step + 32).min(num_keys)).step_by(2) {
                    let row = chunk.values[key / TILE_TOKENS].cast::<u32>();
                    let row = row.add(key % TILE_TOKENS / 2 * shape.value_stride + d);
                    // Beyond the context lies anything, NaN included: not even a weight of 0 may touch it.
                    let whole = key + 1 < num_keys;
                    for v in 0..V {
                        let at = row.add(v * LANES);
                        let (v_even, v_odd) = if PART { L::load_pairs_part(at, lanes) } else { L::load_pairs(at) };
                        for m in 0..M {
                            let p = weights.add(m * CHUNK + key);
                            even[m][v] = L::splat(p.read()).fma(v_even, even[m][v]);
                            if whole {
                                odd[m][v] = L::splat(p.add(1).read()).fma(v_odd, odd[m][v]);
                            }
                        }
                    }
                }
                for m in 0..M {
                    for v in 0..V {
                        sums[m][v] = sums[m][v].add(even[m][v].add(odd[m][v]));
                    }
                }
            }
        } else {
            for key in 0..num_keys {
                let row = chunk.values[key / TILE_TOKENS].cast::<f32>();
                let row = row.add(key % TILE_TOKENS * shape.value_stride + d);
                for v in 0..V {
                    let at = row.add(v * LANES);
                    let x = if PART { L::load_part(at, lanes) } else { L::load(at) };
                    for m in 0..M {
                        sums[m][v] = L::splat(weights.add(m * CHUNK + key).read()).fma(x, sums[m][v]);
                    }
                }
            }
        }
        for m in 0..M {
            for v in 0..V {
                sums[m][v].store(values.add(m * value_pad + v * LANES));
            }
        }
    }
}
