//! The two products of attention on AMX tiles, with the bits of the loops in `online`: one `TDPBF16PS` sums an even and an
//! odd chain of fused multiply-adds from zero and adds their sum to the accumulator.

use std::arch::asm;

use super::online::{CHUNK, Chunk, Shape};
use crate::paged::TILE_TOKENS;

/// Bytes of a tile: 16 rows of 64.
const TILE_BYTES: usize = 1024;

/// A task's operands. `rows` is a multiple of 16, `key_pad` of 32, `value_pad` of 16.
pub(super) struct Tiles {
    /// `[rows, key_pad]` BF16
    pub(super) queries: *const u8,
    /// `[rows, CHUNK]` F32
    pub(super) scores: *mut f32,
    /// `[rows, CHUNK]` BF16
    pub(super) weights: *mut u16,
    /// `[rows, value_pad]` F32
    pub(super) values: *mut f32,
    /// `[CHUNK / 16, key_pad / 32]` tiles of 16 pairs of columns × 16 keys
    pub(super) keys: *mut u16,
    /// `[value_pad / 16, CHUNK / 32]` tiles of 16 pairs of keys × 16 columns
    pub(super) packed_values: *mut u16,
    pub(super) rows: usize,
    pub(super) key_pad: usize,
    pub(super) value_pad: usize,
}

impl Tiles {
    /// Copies a chunk's keys and values into tiles; values beyond the context become zeros, because a weight of zero
    /// does not silence a NaN.
    ///
    /// # Safety
    /// Valid pointers (the struct's lengths, the chunk's contract).
    #[inline(always)]
    pub(super) unsafe fn pack(&self, chunk: &Chunk, shape: &Shape, num_keys: usize) {
        let steps = self.key_pad / 32;
        let pairs = shape.key_width / 2;
        // SAFETY: the caller's promise.
        unsafe {
            for (v, tiles) in chunk.keys.chunks_exact(2).enumerate().take(num_keys.div_ceil(16)) {
                for pair in 0..self.key_pad / 2 {
                    let tile = v * steps + pair / 16;
                    let to = self.keys.cast::<u8>().add(tile * TILE_BYTES + pair % 16 * 64);
                    if pair < pairs {
                        let half = TILE_TOKENS * 4;
                        std::ptr::copy_nonoverlapping(tiles[0].add(pair * half), to, 32);
                        std::ptr::copy_nonoverlapping(tiles[1].add(pair * half), to.add(32), 32);
                    } else {
                        to.write_bytes(0, 64);
                    }
                }
            }
            for pair in 0..num_keys.next_multiple_of(32) / 2 {
                let (step, row) = (pair / 16, pair % 16);
                let from = chunk.values[2 * pair / TILE_TOKENS].cast::<u32>();
                let from = from.wrapping_add(pair % (TILE_TOKENS / 2) * shape.value_stride);
                for d in (0..self.value_pad).step_by(16) {
                    let tile = d / 16 * (CHUNK / 32) + step;
                    let to = self.packed_values.cast::<u8>().add(tile * TILE_BYTES + row * 64).cast::<u32>();
                    let columns = shape.value_width - d;
                    if 2 * pair >= num_keys {
                        to.write_bytes(0, 16);
                    } else if columns >= 16 && 2 * pair + 1 < num_keys {
                        std::ptr::copy_nonoverlapping(from.add(d), to, 16);
                    } else {
                        let mask = if 2 * pair + 1 < num_keys { u32::MAX } else { 0xffff };
                        for i in 0..16 {
                            to.add(i).write(if i < columns { from.add(d + i).read() & mask } else { 0 });
                        }
                    }
                }
            }
        }
    }

    /// `scores = queries · keysᵀ` for `num_keys` keys (rounded up to two tiles)
    ///
    /// # Safety
    /// Tiles are configured; `pack` has run.
    #[inline(always)]
    pub(super) unsafe fn score(&self, num_keys: usize) {
        let steps = self.key_pad / 32;
        for row in (0..self.rows).step_by(32) {
            for v in (0..num_keys.div_ceil(16)).step_by(2) {
                // SAFETY: the caller's promise; all rows and tiles are inside.
                unsafe {
                    let product = Product {
                        a: self.queries.add(row * self.key_pad * 2),
                        a_stride: self.key_pad * 2,
                        b: self.keys.cast::<u8>().add(v * steps * TILE_BYTES),
                        b_step: steps * TILE_BYTES,
                        c: self.scores.add(row * CHUNK + v * 16).cast(),
                        c_stride: CHUNK * 4,
                        steps,
                    };
                    product.run(self.rows - row > 16, true, false);
                }
            }
        }
    }

    /// `values += weights · packed_values`
    ///
    /// # Safety
    /// Tiles are configured; `pack` has run; the weights are those of this chunk.
    #[inline(always)]
    pub(super) unsafe fn weigh(&self, num_keys: usize) {
        for row in (0..self.rows).step_by(32) {
            for d in (0..self.value_pad).step_by(32) {
                // SAFETY: the caller's promise; all rows and tiles are inside.
                unsafe {
                    let product = Product {
                        a: self.weights.add(row * CHUNK).cast(),
                        a_stride: CHUNK * 2,
                        b: self.packed_values.cast::<u8>().add(d / 16 * (CHUNK / 32) * TILE_BYTES),
                        b_step: CHUNK / 32 * TILE_BYTES,
                        c: self.values.add(row * self.value_pad + d).cast(),
                        c_stride: self.value_pad * 4,
                        steps: num_keys.div_ceil(32),
                    };
                    product.run(self.rows - row > 16, self.value_pad - d > 16, true);
                }
            }
        }
    }
}

/// `c (+)= a · b` for up to 32 × 32 results: `a` row-major, `b` in tiles that follow one another along the sum.
#[derive(Clone, Copy)]
struct Product {
    a: *const u8,
    a_stride: usize,
    b: *const u8,
    /// From one 16 columns to the next.
    b_step: usize,
    c: *mut u8,
    c_stride: usize,
    /// Steps of 32 along the sum.
    steps: usize,
}

impl Product {
    /// # Safety
    /// Tiles are configured; pointers are valid for 16 or (`two_rows`, `two_columns`) 32.
    #[inline(always)]
    unsafe fn run(self, two_rows: bool, two_columns: bool, accumulate: bool) {
        // SAFETY: the caller's promise.
        unsafe {
            match (two_rows, two_columns) {
                (true, true) => self.two_by_two(accumulate),
                (false, true) => self.one_by_two(accumulate),
                (_, false) => {
                    self.one_by_one(accumulate);
                    if two_rows {
                        let (a, c) = (self.a.add(16 * self.a_stride), self.c.add(16 * self.c_stride));
                        Product { a, c, ..self }.one_by_one(accumulate);
                    }
                }
            }
        }
    }

    /// # Safety
    /// As for `run`.
    #[inline(always)]
    unsafe fn two_by_two(self, accumulate: bool) {
        let Product { a, a_stride, b, b_step, c, c_stride, steps } = self;
        // SAFETY: the caller's promise; the tiles named here are declared as written.
        unsafe {
            let (a1, c1) = (a.add(16 * a_stride), c.add(16 * c_stride));
            if accumulate {
                asm!(
                    "tileloadd tmm0, [{c}+{cs}*1]", "tileloadd tmm1, [{c}+{cs}*1+64]",
                    "tileloadd tmm2, [{c1}+{cs}*1]", "tileloadd tmm3, [{c1}+{cs}*1+64]",
                    c = in(reg) c, c1 = in(reg) c1, cs = in(reg) c_stride,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, options(nostack),
                );
            } else {
                asm!(
                    "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _, options(nostack),
                );
            }
            asm!(
                "2:",
                "tileloadd tmm4, [{a}+{stride}*1]", "tileloadd tmm6, [{b}+{row}*1]",
                "tileloadd tmm7, [{b1}+{row}*1]", "tileloadd tmm5, [{a1}+{stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, 64", "add {a1}, 64", "add {b}, 1024", "add {b1}, 1024", "dec {n}", "jnz 2b",
                "tilestored [{c}+{cs}*1], tmm0", "tilestored [{c}+{cs}*1+64], tmm1",
                "tilestored [{c1}+{cs}*1], tmm2", "tilestored [{c1}+{cs}*1+64], tmm3",
                a = inout(reg) a => _, a1 = inout(reg) a1 => _, stride = in(reg) a_stride,
                b = inout(reg) b => _, b1 = inout(reg) b.add(b_step) => _, row = in(reg) 64usize,
                n = inout(reg) steps => _, c = in(reg) c, c1 = in(reg) c1, cs = in(reg) c_stride,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _, options(nostack),
            );
        }
    }

    /// # Safety
    /// As for `run`.
    #[inline(always)]
    unsafe fn one_by_two(self, accumulate: bool) {
        let Product { a, a_stride, b, b_step, c, c_stride, steps } = self;
        // SAFETY: the caller's promise; the tiles named here are declared as written.
        unsafe {
            if accumulate {
                asm!(
                    "tileloadd tmm0, [{c}+{cs}*1]", "tileloadd tmm1, [{c}+{cs}*1+64]",
                    c = in(reg) c, cs = in(reg) c_stride, out("tmm0") _, out("tmm1") _, options(nostack),
                );
            } else {
                asm!("tilezero tmm0", "tilezero tmm1", out("tmm0") _, out("tmm1") _, options(nostack));
            }
            asm!(
                "2:",
                "tileloadd tmm4, [{a}+{stride}*1]", "tileloadd tmm6, [{b}+{row}*1]", "tileloadd tmm7, [{b1}+{row}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
                "add {a}, 64", "add {b}, 1024", "add {b1}, 1024", "dec {n}", "jnz 2b",
                "tilestored [{c}+{cs}*1], tmm0", "tilestored [{c}+{cs}*1+64], tmm1",
                a = inout(reg) a => _, stride = in(reg) a_stride,
                b = inout(reg) b => _, b1 = inout(reg) b.add(b_step) => _, row = in(reg) 64usize,
                n = inout(reg) steps => _, c = in(reg) c, cs = in(reg) c_stride,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _, options(nostack),
            );
        }
    }

    /// # Safety
    /// As for `run`.
    #[inline(always)]
    unsafe fn one_by_one(self, accumulate: bool) {
        let Product { a, a_stride, b, c, c_stride, steps, .. } = self;
        // SAFETY: the caller's promise; the tiles named here are declared as written.
        unsafe {
            if accumulate {
                asm!("tileloadd tmm0, [{c}+{cs}*1]", c = in(reg) c, cs = in(reg) c_stride, out("tmm0") _,
                    options(nostack));
            } else {
                asm!("tilezero tmm0", out("tmm0") _, options(nostack));
            }
            asm!(
                "2:",
                "tileloadd tmm4, [{a}+{stride}*1]", "tileloadd tmm6, [{b}+{row}*1]", "tdpbf16ps tmm0, tmm4, tmm6",
                "add {a}, 64", "add {b}, 1024", "dec {n}", "jnz 2b",
                "tilestored [{c}+{cs}*1], tmm0",
                a = inout(reg) a => _, stride = in(reg) a_stride, b = inout(reg) b => _, row = in(reg) 64usize,
                n = inout(reg) steps => _, c = in(reg) c, cs = in(reg) c_stride,
                out("tmm0") _, out("tmm4") _, out("tmm6") _, options(nostack),
            );
        }
    }
}
