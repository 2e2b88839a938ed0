//! Memory of each thread for what a task keeps in its caches: accumulators, widened rows, decoded tiles.
//!
//! It is not taken from the activation arena, whose requests must not depend on the number of threads or on the path.
//! Its size is bounded by one block of rows and a few panels (well below a MiB a thread).

use std::cell::RefCell;

/// Grows to what is asked for, 64-byte aligned, content unspecified.
#[derive(Default)]
pub(crate) struct Buffer {
    lines: Vec<Line>,
}

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Line(#[allow(dead_code, reason = "read through the buffer's pointer")] [u8; 64]);

impl Buffer {
    fn grow(&mut self, bytes: usize) -> *mut u8 {
        let lines = bytes.div_ceil(size_of::<Line>());
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0; 64]));
        }
        self.lines.as_mut_ptr().cast()
    }

    /// The first `len` as F32.
    pub(crate) fn f32(&mut self, len: usize) -> &mut [f32] {
        let ptr = self.grow(len * size_of::<f32>());
        // SAFETY: `grow` made room for `len` elements, aligned and initialised; any bits are an F32.
        unsafe { std::slice::from_raw_parts_mut(ptr.cast(), len) }
    }

    /// The first `len` as 16-bit words.
    pub(crate) fn u16(&mut self, len: usize) -> &mut [u16] {
        let ptr = self.grow(len * size_of::<u16>());
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(ptr.cast(), len) }
    }
}

/// What one thread has.
#[derive(Default)]
pub(crate) struct Scratch {
    /// Results of a block, `[rows][panels × 16]`.
    pub(crate) c: Buffer,
    /// Rows of x as F32, `[tiles][rows][32]`.
    pub(crate) wide: Buffer,
    /// Which rows `wide` holds.
    pub(crate) wide_key: (u64, usize, usize),
    /// Tiles decoded to BF16.
    pub(crate) tiles: Buffer,
    /// Results of one block of 128 columns.
    pub(crate) block: Buffer,
}

/// Runs `f` with this thread's scratch. Must not be nested.
pub(crate) fn with<R>(f: impl FnOnce(&mut Scratch) -> R) -> R {
    thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());
    SCRATCH.with_borrow_mut(f)
}
