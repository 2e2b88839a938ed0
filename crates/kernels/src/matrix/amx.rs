//! The product with AMX: rows of x are the first operand as they lie in memory, packed tiles the second.
//!
//! Registers: results 0–3, x 4–5, W 6–7. Tiles are configured at a block's start and released at its end, so no tile state
//! outlives a task.

use std::arch::asm;

use crate::amx;

/// Tiles for blocks whose first 16 rows are `rows.0` and whose second are `rows.1`; W's have 16.
///
/// # Safety
/// As [`amx::configure`].
pub(crate) unsafe fn configure(rows: (usize, usize)) {
    assert!((1..=16).contains(&rows.0) && (1..=16).contains(&rows.1));
    let (a, b) = (rows.0 as u8, rows.1 as u8);
    // SAFETY: promised by the caller; the assertion above.
    unsafe { amx::configure([a, a, b, b, a, b, 16, 16]) };
}

/// Operands of a block. Strides are in bytes.
#[derive(Clone, Copy)]
pub(crate) struct Block {
    /// First row of x, at the first `k`.
    pub(crate) x: *const u8,
    pub(crate) x_stride: usize,
    /// Tiles of the first panel; those of the second are `panel_bytes` further on.
    pub(crate) w: *const u8,
    pub(crate) panel_bytes: usize,
    /// Tiles to sum over, at least one.
    pub(crate) num_tiles: usize,
    /// First result.
    pub(crate) c: *mut f32,
    pub(crate) c_stride: usize,
}

/// Sixteen lines from a register on.
macro_rules! prefetch_tile {
    ($hint:literal, $reg:literal) => {
        concat!(
            $hint, " [{", $reg, "}]\n", $hint, " [{", $reg, "}+64]\n", $hint, " [{", $reg, "}+128]\n", $hint, " [{",
            $reg, "}+192]\n", $hint, " [{", $reg, "}+256]\n", $hint, " [{", $reg, "}+320]\n", $hint, " [{", $reg,
            "}+384]\n", $hint, " [{", $reg, "}+448]\n", $hint, " [{", $reg, "}+512]\n", $hint, " [{", $reg, "}+576]\n",
            $hint, " [{", $reg, "}+640]\n", $hint, " [{", $reg, "}+704]\n", $hint, " [{", $reg, "}+768]\n", $hint,
            " [{", $reg, "}+832]\n", $hint, " [{", $reg, "}+896]\n", $hint, " [{", $reg, "}+960]\n"
        )
    };
}

/// How far ahead of the loads the prefetches of streamed weights are, in bytes. From 1 to 3 KiB there is little difference;
/// 8 KiB lose an eighth of the bandwidth.
const PREFETCH_BYTES: usize = 2048;

macro_rules! rows16_panel1 {
    ($(#[$attr:meta])* $name:ident, $($prefetch:expr)?) => {
        $(#[$attr])*
        ///
        /// # Safety
        /// Tiles are configured; `block` describes memory that exists: `x` the configured rows of `num_tiles * 64` bytes,
        /// `w` `num_tiles` KiB, `c` the configured rows of 64 bytes.
        pub(crate) unsafe fn $name(block: Block) {
            let Block { x, x_stride, w, num_tiles, c, c_stride, .. } = block;
            // SAFETY: promised by the caller; prefetches may go beyond the end, they do not fault.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "2:",
                    "tileloadd tmm4, [{x} + {xs}*1]",
                    "tileloadd tmm6, [{w} + {ws}*1]",
                    $($prefetch,)?
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "add {x}, 64",
                    "add {w}, 1024",
                    "add {p}, 1024",
                    "dec {n}",
                    "jnz 2b",
                    "tilestored [{c} + {cs}*1], tmm0",
                    x = inout(reg) x => _, xs = in(reg) x_stride,
                    w = inout(reg) w => _, ws = in(reg) 64usize, p = inout(reg) w.wrapping_add(PREFETCH_BYTES) => _,
                    n = inout(reg) num_tiles => _, c = in(reg) c, cs = in(reg) c_stride,
                    out("tmm0") _, out("tmm4") _, out("tmm6") _, options(nostack)
                );
            }
        }
    };
}

rows16_panel1!(
    /// Up to 16 rows (`configure`'s first) × one panel, W coming from memory: a linear stream with prefetches ahead.
    rows16_panel1_stream,
    prefetch_tile!("prefetcht0", "p")
);
rows16_panel1!(
    /// Up to 16 rows (`configure`'s first) × one panel, W in the caches.
    rows16_panel1,
);

/// Up to 16 rows × two panels, W in the caches.
///
/// # Safety
/// As [`rows16_panel1`], with two panels and 128 bytes of `c` in each row.
pub(crate) unsafe fn rows16_panel2(block: Block) {
    let Block { x, x_stride, w, panel_bytes, num_tiles, c, c_stride } = block;
    // SAFETY: promised by the caller.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "2:",
            "tileloadd tmm4, [{x} + {xs}*1]",
            "tileloadd tmm6, [{w} + {ws}*1]",
            "tileloadd tmm7, [{v} + {ws}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {x}, 64",
            "add {w}, 1024",
            "add {v}, 1024",
            "dec {n}",
            "jnz 2b",
            "tilestored [{c} + {cs}*1], tmm0",
            "tilestored [{c} + {cs}*1 + 64], tmm1",
            x = inout(reg) x => _, xs = in(reg) x_stride,
            w = inout(reg) w => _, v = inout(reg) w.add(panel_bytes) => _, ws = in(reg) 64usize,
            n = inout(reg) num_tiles => _, c = in(reg) c, cs = in(reg) c_stride,
            out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _, options(nostack)
        );
    }
}

/// 16 rows and up to 16 more (`configure`'s second) × one panel.
///
/// # Safety
/// As [`rows16_panel1`], with 16 plus the configured rows.
pub(crate) unsafe fn rows32_panel1(block: Block) {
    let Block { x, x_stride, w, num_tiles, c, c_stride, .. } = block;
    // SAFETY: promised by the caller.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm2",
            "2:",
            "tileloadd tmm6, [{w} + {ws}*1]",
            "tileloadd tmm4, [{x} + {xs}*1]",
            "tileloadd tmm5, [{y} + {xs}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "add {x}, 64",
            "add {y}, 64",
            "add {w}, 1024",
            "dec {n}",
            "jnz 2b",
            "tilestored [{c} + {cs}*1], tmm0",
            "tilestored [{d} + {cs}*1], tmm2",
            x = inout(reg) x => _, y = inout(reg) x.add(16 * x_stride) => _, xs = in(reg) x_stride,
            w = inout(reg) w => _, ws = in(reg) 64usize, n = inout(reg) num_tiles => _,
            c = in(reg) c, d = in(reg) c.cast::<u8>().add(16 * c_stride), cs = in(reg) c_stride,
            out("tmm0") _, out("tmm2") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, options(nostack)
        );
    }
}

macro_rules! rows32_panel2 {
    ($(#[$attr:meta])* $name:ident, $($prefetch:expr)?) => {
        $(#[$attr])*
        ///
        /// # Safety
        /// As [`rows16_panel2`], with 16 plus the configured rows.
        pub(crate) unsafe fn $name(block: Block) {
            let Block { x, x_stride, w, panel_bytes, num_tiles, c, c_stride } = block;
            // SAFETY: promised by the caller; prefetches may go beyond the end, they do not fault.
            unsafe {
                asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    ".p2align 4",
                    "2:",
                    "tileloadd tmm4, [{x} + {xs}*1]",
                    "tileloadd tmm6, [{w} + {ws}*1]",
                    "tileloadd tmm7, [{v} + {ws}*1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{y} + {xs}*1]",
                    $($prefetch,)?
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {x}, 64",
                    "add {y}, 64",
                    "add {w}, 1024",
                    "add {v}, 1024",
                    "add {p}, 1024",
                    "add {q}, 1024",
                    "dec {n}",
                    "jnz 2b",
                    "tilestored [{c} + {cs}*1], tmm0",
                    "tilestored [{c} + {cs}*1 + 64], tmm1",
                    "tilestored [{d} + {cs}*1], tmm2",
                    "tilestored [{d} + {cs}*1 + 64], tmm3",
                    x = inout(reg) x => _, y = inout(reg) x.add(16 * x_stride) => _, xs = in(reg) x_stride,
                    w = inout(reg) w => _, v = inout(reg) w.add(panel_bytes) => _, ws = in(reg) 64usize,
                    p = inout(reg) w.wrapping_add(PREFETCH_BYTES) => _,
                    q = inout(reg) w.wrapping_add(panel_bytes + PREFETCH_BYTES) => _, n = inout(reg) num_tiles => _,
                    c = in(reg) c, d = in(reg) c.cast::<u8>().add(16 * c_stride), cs = in(reg) c_stride,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _, options(nostack)
                );
            }
        }
    };
}

rows32_panel2!(
    /// 16 rows and up to 16 more (`configure`'s second) × two panels: four products for four loads.
    rows32_panel2,
);
rows32_panel2!(
    /// The same with W coming from memory: prefetches [`PREFETCH_BYTES`] ahead in both panels.
    rows32_panel2_stream,
    concat!(prefetch_tile!("prefetcht0", "p"), prefetch_tile!("prefetcht0", "q"))
);
