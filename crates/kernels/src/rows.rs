//! Work on the rows of a step, spread over threads when there is enough of it.

use std::marker::PhantomData;
use std::ops::Range;

use moesaic_device::{Ctx, Tensor};

/// Below this many bytes in and out, starting a region costs more than it saves (a few microseconds against one core's
/// copying speed).
const PARALLEL_BYTES: usize = 128 << 10;
/// Pieces for each thread, so that a slow thread holds up little.
const CHUNKS_PER_THREAD: usize = 4;

/// A slice whose disjoint ranges several tasks write.
struct Disjoint<'a, T> {
    ptr: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: the slice is exclusively borrowed for `'a`, and `range`'s contract keeps any element with one task.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    fn new(slice: &'a mut [T]) -> Self {
        Disjoint { ptr: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// # Safety
    /// No two calls may be given overlapping ranges.
    #[allow(clippy::mut_from_ref, reason = "that is the point; the contract is above")]
    unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "a range inside the slice");
        // SAFETY: the range lies inside the borrowed slice, and the caller asks for no element twice.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.len()) }
    }
}

fn num_chunks(ctx: &Ctx, num_rows: usize, row_bytes: usize) -> usize {
    let threads = ctx.pool().num_threads();
    if threads == 1 || num_rows.saturating_mul(row_bytes) < PARALLEL_BYTES {
        return 1;
    }
    num_rows.min(threads * CHUNKS_PER_THREAD)
}

fn chunk(num_rows: usize, num_chunks: usize, idx: usize) -> Range<usize> {
    num_rows * idx / num_chunks..num_rows * (idx + 1) / num_chunks
}

/// Calls `body` with runs of whole rows of `out` (the first row's index, the rows), each row once. `row_bytes` is what one
/// row moves, in and out.
pub(crate) fn for_rows<T: Send>(
    ctx: &Ctx,
    out: &mut [T],
    row_len: usize,
    row_bytes: usize,
    body: impl Fn(usize, &mut [T]) + Sync,
) {
    for_rows2(ctx, (out, row_len), (&mut [(); 0], 0), row_bytes, |first, rows, _: &mut [()]| body(first, rows));
}

/// [`for_rows`] over two outputs, each with its row length, that have the same number of rows.
pub(crate) fn for_rows2<T: Send, U: Send>(
    ctx: &Ctx,
    (a, a_len): (&mut [T], usize),
    (b, b_len): (&mut [U], usize),
    row_bytes: usize,
    body: impl Fn(usize, &mut [T], &mut [U]) + Sync,
) {
    assert!(a_len > 0 && a.len().is_multiple_of(a_len), "whole rows");
    let num_rows = a.len() / a_len;
    assert_eq!(b.len(), num_rows * b_len, "as many rows in both outputs");
    let num_chunks = num_chunks(ctx, num_rows, row_bytes);
    if num_chunks <= 1 {
        return body(0, a, b);
    }
    let (a, b) = (Disjoint::new(a), Disjoint::new(b));
    ctx.pool().run(num_chunks, &|task| {
        let rows = chunk(num_rows, num_chunks, task.idx);
        // SAFETY: the chunks of different tasks do not overlap, and every task runs once.
        let a = unsafe { a.range(rows.start * a_len..rows.end * a_len) };
        // SAFETY: as above.
        let b = unsafe { b.range(rows.start * b_len..rows.end * b_len) };
        body(rows.start, a, b);
    });
}

/// Copies `source(i)`, of `row_bytes` bytes, to row `i` of `to`.
pub(crate) fn copy_rows<'a>(ctx: &Ctx, to: &mut [u8], row_bytes: usize, source: impl Fn(usize) -> &'a [u8] + Sync) {
    for_rows(ctx, to, row_bytes, 2 * row_bytes, |first, to| {
        for (i, to) in to.chunks_exact_mut(row_bytes).enumerate() {
            to.copy_from_slice(source(first + i));
        }
    });
}

/// Rows of `row_bytes` bytes that lie in several places.
pub(crate) struct Sources<'a> {
    bytes: Vec<&'a [u8]>,
    row_bytes: usize,
}

impl<'a> Sources<'a> {
    /// All matrices of one width and type.
    pub(crate) fn new(matrices: impl Iterator<Item = &'a Tensor>, row_bytes: usize) -> Sources<'a> {
        Sources { bytes: matrices.map(Tensor::bytes).collect(), row_bytes }
    }

    /// Row `row` of matrix `source`.
    pub(crate) fn row(&self, (source, row): (u32, u32)) -> &'a [u8] {
        let start = row as usize * self.row_bytes;
        &self.bytes[source as usize][start..start + self.row_bytes]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_visited_once_with_its_index() {
        let ctx = Ctx::cpu(3, 1 << 12).unwrap();
        for num_rows in [0, 1, 2, 11, 12, 13, 100] {
            let (mut a, mut b) = (vec![0u32; num_rows * 3], vec![0u32; num_rows]);
            for_rows2(&ctx, (&mut a, 3), (&mut b, 1), 1 << 20, |first, a, b| {
                for (i, (a, b)) in a.chunks_exact_mut(3).zip(b).enumerate() {
                    a.iter_mut().for_each(|a| *a += (first + i) as u32 + 1);
                    *b += 1;
                }
            });
            assert!(a.iter().enumerate().all(|(i, &a)| a as usize == i / 3 + 1));
            assert!(b.iter().all(|&b| b == 1));
        }
    }
}
