//! The loop under every attention: scores, online softmax, weighted values, over paged keys.
//!
//! **One order of operations.** What a query row computes depends on its position and the stored entries alone:
//! - keys go in chunks of [`CHUNK`], aligned at position 0, and chunks in spans of [`SPAN`];
//! - a BF16 score is summed in steps of 32 columns, each step an even and an odd chain of fused multiply-adds from zero,
//!   `sum + (even + odd)`; this is what one AMX `TDPBF16PS` does. An F32 score is one chain;
//! - within a span the softmax is online: after each chunk `m' = max(m, chunk)`, `alpha = e^(m - m')`, and sums and values
//!   are scaled by alpha. Spans are merged in order, so they may be computed by different threads;
//! - BF16 weights are rounded to BF16 before they weigh values and before they are summed; values are summed in steps of
//!   32 keys like scores. F32 values are one chain.
//!
//! A masked key has weight exactly 0 and changes no bit, so rows that share a chunk do not see each other. Two exceptions,
//! both in sequences whose numbers are lost anyway: should a sequence's own later values be infinite or NaN, earlier rows
//! of the same prefill may become NaN; and AMX takes subnormal numbers as zero, so its bits may differ where a whole result
//! is smaller than about 1e-30.

use std::cell::RefCell;
use std::ops::Range;

use half::bf16;
use moesaic_device::{Ctx, Isa, Tensor};
use moesaic_spec::DType;

use super::products;
use crate::contract::KernelError;
use crate::lanes::{LANES, Lanes, Plain, tree};
use crate::math::exp_f32;
use crate::paged::{PagedBatch, PagedSeq, Shared, TILE_TOKENS};

/// Keys between two updates of the softmax.
pub(crate) const CHUNK: usize = 64;
/// Keys that one thread takes of a long context.
pub(crate) const SPAN: usize = 512;
/// Query rows (token and head) of a task; they share every load of keys and values.
const MAX_ITEMS: usize = 64;
/// From so many query rows on, tiles pay.
const MIN_ITEMS_AMX: usize = 6;
/// Up to so many query rows, work on a chunk is so short that the next one should be on its way by then.
const MAX_ITEMS_PREFETCH: usize = 16;
/// Tiles of tokens in a chunk.
pub(crate) const TILES: usize = CHUNK / TILE_TOKENS;
/// Vectors of scores in a chunk.
const VECTORS: usize = CHUNK / LANES;
/// "No key yet": finite, so that differences are never NaN.
const NONE_YET: f32 = f32::MIN;

/// Where a chunk's keys and values lie: one pointer for each tile of eight tokens. Tiles beyond the context repeat a
/// valid pointer; what is read there is masked.
#[derive(Clone, Copy)]
pub(crate) struct Chunk {
    /// BF16: `[key_width / 2, 8 tokens, 2]`. F32: `[key_width, 8 tokens]`.
    pub(crate) keys: [*const u8; TILES],
    /// BF16: `[4 pairs of tokens, value_stride, 2]`. F32: `[8 tokens, value_stride]`.
    pub(crate) values: [*const u8; TILES],
}

/// Sizes that all rows share.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) dtype: DType,
    /// Columns of queries and keys; even for BF16.
    pub(crate) key_width: usize,
    /// Columns of values.
    pub(crate) value_width: usize,
    /// See [`Chunk::values`].
    pub(crate) value_stride: usize,
    pub(crate) num_kv_heads: usize,
    /// Query heads that share a key head.
    pub(crate) ratio: usize,
    /// Bytes that `chunk` may write to.
    pub(crate) pack_bytes: usize,
    pub(crate) scale: f32,
    pub(crate) window: Option<usize>,
}

/// What differs between grouped-query and latent attention.
pub(crate) trait Problem: Sync {
    fn shape(&self) -> Shape;

    /// Copies the `key_width` columns of a query row (padding is zero) to `to`, in the problem's element type.
    ///
    /// # Safety
    /// `row` and `head` are inside; `to` holds `key_width` elements.
    unsafe fn query(&self, row: usize, head: usize, to: *mut u8);

    /// Finds `num_keys` (at most [`CHUNK`]) keys from `key0` on; may use `pack` (64-byte aligned).
    ///
    /// # Safety
    /// The keys are within the sequence's context, `pack` has `pack_bytes`.
    unsafe fn chunk(&self, seq: &PagedSeq, kv_head: usize, key0: usize, num_keys: usize, pack: *mut u8) -> Chunk;

    /// Asks the memory for keys that [`Problem::chunk`] will find soon.
    fn prefetch(&self, _seq: &PagedSeq, _kv_head: usize, _key0: usize, _num_keys: usize) {}

    /// Where a result row of `value_width` elements goes.
    fn out(&self, row: usize, head: usize) -> *mut u8;
}

/// A part of the work that one thread does alone.
struct Task {
    seq: usize,
    kv_head: usize,
    /// Query rows of this sequence and key head, numbered `token * ratio + head`.
    items: Range<usize>,
    spans: Range<usize>,
    /// Where, in F32 elements, its unfinished rows go; finished rows go out at once.
    partial: Option<usize>,
}

/// All tasks of a call.
pub(crate) struct Plan {
    tasks: Vec<Task>,
    /// Tasks whose rows are finished from the partial results of `spans`.
    merges: Vec<Task>,
    partial_len: usize,
}

/// F32 elements of an unfinished row: maximum, sum, padding to a line, values.
fn partial_stride(shape: &Shape) -> usize {
    LANES + shape.value_width.next_multiple_of(LANES)
}

/// Spans that memory is kept for when a decode row sees `num_keys` tokens, at most the last `window`: at least those that it
/// touches, and never fewer for a longer context, so that the longest one decides how much memory a step may need.
fn reserved_spans(num_keys: usize, window: Option<usize>) -> usize {
    let most = window.map_or(usize::MAX, |window| window.div_ceil(SPAN).saturating_add(1));
    match num_keys.div_ceil(SPAN).min(most) {
        1 => 0, // not split
        spans => spans,
    }
}

impl Plan {
    /// Depends on the batch alone, so that `Meta` takes the same memory; there the tasks, of which a long context has
    /// many, are not listed.
    pub(crate) fn new(ctx: &Ctx, batch: &PagedBatch, shape: &Shape) -> Plan {
        let mut plan = Plan { tasks: vec![], merges: vec![], partial_len: 0 };
        for (seq_idx, seq) in batch.seqs().iter().enumerate() {
            let num_items = seq.num_rows * shape.ratio;
            for item0 in (0..num_items).step_by(MAX_ITEMS) {
                let items = item0..num_items.min(item0 + MAX_ITEMS);
                let keys = visible(seq, &items, shape);
                let spans = keys.start / SPAN..keys.end.div_ceil(SPAN);
                // A decode row's spans are spread over threads; a prefill has tasks enough.
                let split = seq.num_rows == 1 && spans.len() > 1;
                let span_len = items.len() * partial_stride(shape);
                let reserved = if seq.num_rows == 1 { reserved_spans(keys.end, shape.window) * span_len } else { 0 };
                if ctx.is_meta() {
                    plan.partial_len += reserved * shape.num_kv_heads;
                    continue;
                }
                for kv_head in 0..shape.num_kv_heads {
                    let partial0 = plan.partial_len;
                    plan.partial_len += reserved;
                    let task = |spans, partial| Task { seq: seq_idx, kv_head, items: items.clone(), spans, partial };
                    if !split {
                        plan.tasks.push(task(spans.clone(), None));
                        continue;
                    }
                    plan.merges.push(task(spans.clone(), Some(partial0)));
                    for (i, span) in spans.clone().enumerate() {
                        plan.tasks.push(task(span..span + 1, Some(partial0 + i * span_len)));
                    }
                }
            }
        }
        // The longest first, so that no thread is left with one at the end.
        let cost = |task: &Task| task.items.len() * visible(&batch.seqs()[task.seq], &task.items, shape).len();
        plan.tasks.sort_by_key(|task| std::cmp::Reverse(if task.partial.is_some() { SPAN } else { cost(task) }));
        plan
    }

    /// Memory for unfinished rows.
    pub(crate) fn partials(&self, ctx: &Ctx) -> Result<Tensor, KernelError> {
        Ok(ctx.empty(&[self.partial_len], DType::F32)?)
    }

    /// Does the work.
    pub(crate) fn run<P: Problem>(&self, ctx: &Ctx, batch: &PagedBatch, problem: &P, partials: &mut Tensor) {
        let partials = Shared(partials.f32_mut().as_mut_ptr());
        let isa = ctx.isa();
        ctx.pool().run(self.tasks.len(), &|task| {
            let task = &self.tasks[task.idx];
            // SAFETY: the context was made for a machine with `isa`. Tasks have rows, and partial results, of their own.
            SCRATCH.with_borrow_mut(|scratch| unsafe {
                attend_on(isa, problem, &batch.seqs()[task.seq], task, Memory { partials, scratch })
            });
        });
        ctx.pool().run(self.merges.len(), &|merge| {
            let merge = &self.merges[merge.idx];
            // SAFETY: as above; the tasks that wrote the partial results have ended.
            SCRATCH.with_borrow_mut(|scratch| unsafe {
                merge_on(isa, problem, &batch.seqs()[merge.seq], merge, Memory { partials, scratch })
            });
        });
    }
}

/// Keys that any of these rows sees.
fn visible(seq: &PagedSeq, items: &Range<usize>, shape: &Shape) -> Range<usize> {
    let (first, last) = (items.start / shape.ratio, (items.end - 1) / shape.ratio);
    let start = (seq.first_position() + first + 1).saturating_sub(shape.window.unwrap_or(usize::MAX));
    start..seq.first_position() + last + 1
}

/// Makes one instance of a generic kernel for every instruction set, and chooses at run time.
macro_rules! dispatch {
    ($name:ident, $avx2:ident, $avx512:ident, $body:ident) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        unsafe fn $avx2<P: Problem>(p: &P, seq: &PagedSeq, task: &Task, memory: Memory) {
            // SAFETY: this function's features; the rest is the caller's promise.
            unsafe { $body::<crate::lanes::Avx2, P>(p, seq, task, memory, false) }
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        unsafe fn $avx512<P: Problem>(p: &P, seq: &PagedSeq, task: &Task, memory: Memory, amx: bool) {
            // SAFETY: this function's features; the rest is the caller's promise.
            unsafe { $body::<crate::lanes::Avx512, P>(p, seq, task, memory, amx) }
        }

        /// # Safety
        /// The CPU has `isa`; the task's rows are inside the problem and nobody else's.
        unsafe fn $name<P: Problem>(isa: Isa, p: &P, seq: &PagedSeq, task: &Task, memory: Memory) {
            #[cfg(target_arch = "x86_64")]
            if isa >= Isa::Avx512 {
                // SAFETY: the caller's promise.
                return unsafe { $avx512(p, seq, task, memory, isa == Isa::Amx) };
            } else if isa >= Isa::Avx2 {
                // SAFETY: the caller's promise.
                return unsafe { $avx2(p, seq, task, memory) };
            }
            let _ = isa;
            // SAFETY: plain Rust; the rest is the caller's promise.
            unsafe { $body::<Plain, P>(p, seq, task, memory, false) }
        }
    };
}

dispatch!(attend_on, attend_avx2, attend_avx512, attend);
dispatch!(merge_on, merge_avx2, merge_avx512, merge_spans);

/// One cache line, so that scratch memory is aligned.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

thread_local! {
    /// Scratch of each thread, kept between calls: 200 KiB for heads of 128, 0.8 MiB for latents of 576.
    static SCRATCH: RefCell<Vec<Line>> = const { RefCell::new(Vec::new()) };
}

/// What a task may write to besides its result.
struct Memory<'a> {
    partials: Shared<f32>,
    scratch: &'a mut Vec<Line>,
}

/// Hands out aligned pieces of scratch.
struct Pieces {
    next: *mut u8,
    left: usize,
}

impl Pieces {
    fn take<T>(&mut self, len: usize) -> *mut T {
        let bytes = (len * size_of::<T>()).next_multiple_of(64);
        assert!(bytes <= self.left, "scratch was measured too small: {bytes} of {}", self.left);
        let piece = self.next;
        self.next = piece.wrapping_add(bytes);
        self.left -= bytes;
        piece.cast()
    }
}

/// The running softmax of a task's rows.
#[derive(Clone, Copy)]
struct State {
    /// `[items]`, padded to whole vectors.
    max: *mut f32,
    /// `[items, 16]`, one partial sum a lane.
    sums: *mut f32,
    /// `[items, value_pad]`
    values: *mut f32,
}

/// # Safety
/// As for [`attend_on`], with `L`'s instructions.
#[inline(always)]
unsafe fn attend<L: Lanes, P: Problem>(p: &P, seq: &PagedSeq, task: &Task, memory: Memory, amx: bool) {
    let shape = p.shape();
    let n = task.items.len();
    let bf16 = shape.dtype == DType::BF16;
    let amx = amx && bf16 && n >= MIN_ITEMS_AMX;
    let rows = n.next_multiple_of(16);
    let value_pad = shape.value_width.next_multiple_of(LANES);
    let key_pad = if amx { shape.key_width.next_multiple_of(32) } else { shape.key_width };
    let keys = visible(seq, &task.items, &shape);
    let f32_len = rows * (key_pad + CHUNK + 1 + LANES + value_pad * 2 + 4);
    let tile_bytes = if amx { CHUNK * 2 * (key_pad + value_pad) + rows * CHUNK * 2 } else { 0 };
    let total = f32_len * 4 + tile_bytes + shape.pack_bytes + 16 * 64;

    let Memory { partials, scratch } = memory;
    if scratch.len() * 64 < total {
        scratch.resize(total.div_ceil(64), Line([0; 64]));
    }
    let mut pieces = Pieces { next: scratch.as_mut_ptr().cast(), left: scratch.len() * 64 };
    let queries: *mut u8 = pieces.take(rows * key_pad * 4);
    let scores: *mut f32 = pieces.take(rows * CHUNK);
    let state = State { max: pieces.take(rows), sums: pieces.take(n * LANES), values: pieces.take(rows * value_pad) };
    let ends: *mut usize = pieces.take(n); // position of each row's last visible key, and one
    let pack: *mut u8 = pieces.take(shape.pack_bytes);
    let several = task.spans.len() > 1;
    let (total_max, total_sum, total_values): (*mut f32, *mut f32, *mut f32) = if several {
        (pieces.take(n), pieces.take(n), pieces.take(n * value_pad))
    } else {
        (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut())
    };
    // SAFETY: every piece has the length that is used below (rows >= n); the caller promises rows, instructions and
    // output. Scratch belongs to this thread.
    unsafe {
        let item = |i: usize| {
            let item = task.items.start + i;
            (seq.row0 + item / shape.ratio, task.kv_head * shape.ratio + item % shape.ratio)
        };
        #[cfg(target_arch = "x86_64")]
        let tiles = amx.then(|| {
            let tiles = super::amx::Tiles {
                queries: queries.cast(),
                scores,
                weights: pieces.take(rows * CHUNK),
                values: state.values,
                keys: pieces.take(CHUNK * key_pad),
                packed_values: pieces.take(CHUNK * value_pad),
                rows,
                key_pad,
                value_pad,
            };
            crate::amx::configure([16; 8]);
            queries.write_bytes(0, rows * key_pad * 2);
            tiles
        });
        for i in 0..n {
            let (row, head) = item(i);
            ends.add(i).write(seq.first_position() + (row - seq.row0) + 1);
            if amx {
                p.query(row, head, queries.add(i * key_pad * 2));
            } else if bf16 {
                // Widened in place from the end of its own row.
                let to = queries.cast::<f32>().add(i * key_pad);
                let from = to.cast::<u16>().add(key_pad);
                p.query(row, head, from.cast());
                for j in 0..key_pad {
                    to.add(j).write(f32::from_bits((from.add(j).read() as u32) << 16));
                }
            } else {
                p.query(row, head, queries.add(i * key_pad * 4));
            }
            if several {
                total_max.add(i).write(NONE_YET);
                total_sum.add(i).write(0.0);
                total_values.add(i * value_pad).write_bytes(0, value_pad);
            }
        }
        for span in task.spans.clone() {
            for i in 0..rows {
                state.max.add(i).write(NONE_YET);
            }
            state.sums.write_bytes(0, n * LANES);
            state.values.write_bytes(0, rows * value_pad);
            let start = (span * SPAN).max(keys.start / CHUNK * CHUNK);
            let end = keys.end.min((span + 1) * SPAN);
            if n <= MAX_ITEMS_PREFETCH {
                p.prefetch(seq, task.kv_head, start, CHUNK.min(end - start));
            }
            for key0 in (start..end).step_by(CHUNK) {
                let num_keys = CHUNK.min(end - key0);
                let next = key0 + CHUNK;
                if n <= MAX_ITEMS_PREFETCH && next < end {
                    p.prefetch(seq, task.kv_head, next, CHUNK.min(end - next));
                }
                let chunk = p.chunk(seq, task.kv_head, key0, num_keys, pack);
                let seen = Seen { ends, key0, window: shape.window.unwrap_or(usize::MAX) };
                #[cfg(target_arch = "x86_64")]
                if let Some(tiles) = &tiles {
                    tiles.pack(&chunk, &shape, num_keys);
                    tiles.score(num_keys);
                    for i0 in (0..n).step_by(LANES) {
                        softmax::<L>(scores, i0..n.min(i0 + LANES), seen, &shape, state, value_pad, |i, p| {
                            for (j, p) in p.into_iter().enumerate() {
                                p.store_upper_part(tiles.weights.add(i * CHUNK + j * LANES), LANES);
                            }
                        });
                    }
                    tiles.weigh(num_keys);
                    continue;
                }
                let queries: *const f32 = queries.cast();
                products::score::<L>(queries, n, key_pad, &chunk, bf16, num_keys, scores);
                for i0 in (0..n).step_by(LANES) {
                    softmax::<L>(scores, i0..n.min(i0 + LANES), seen, &shape, state, value_pad, |i, p| {
                        for (j, p) in p.into_iter().enumerate() {
                            p.store(scores.add(i * CHUNK + j * LANES));
                        }
                    });
                }
                products::weigh::<L>(scores, n, &chunk, &shape, num_keys, state.values, value_pad);
            }
            for i in 0..n {
                let max = state.max.add(i).read();
                let sum = tree(L::load(state.sums.add(i * LANES)).to_array(), |a, b| a + b);
                let values = state.values.add(i * value_pad);
                if let Some(partial) = task.partial {
                    let to = partials.ptr().add(partial + i * partial_stride(&shape));
                    to.write(max);
                    to.add(1).write(sum);
                    std::ptr::copy_nonoverlapping(values, to.add(LANES), value_pad);
                } else if several {
                    let into = (total_max.add(i), total_sum.add(i), total_values.add(i * value_pad));
                    merge::<L>(into, (max, sum, values), value_pad);
                } else {
                    let (row, head) = item(i);
                    finish::<L>(values, sum, &shape, p.out(row, head));
                }
            }
        }
        if several {
            for i in 0..n {
                let (row, head) = item(i);
                finish::<L>(total_values.add(i * value_pad), total_sum.add(i).read(), &shape, p.out(row, head));
            }
        }
        #[cfg(target_arch = "x86_64")]
        if amx {
            crate::amx::release();
        }
    }
}

/// Finishes rows whose spans were computed apart.
///
/// # Safety
/// As for [`attend_on`], with `L`'s instructions.
#[inline(always)]
unsafe fn merge_spans<L: Lanes, P: Problem>(p: &P, seq: &PagedSeq, task: &Task, memory: Memory, _amx: bool) {
    let shape = p.shape();
    let value_pad = shape.value_width.next_multiple_of(LANES);
    let stride = partial_stride(&shape);
    let first = task.partial.expect("only tasks with partial results are merged");
    let Memory { partials, scratch } = memory;
    if scratch.len() * 64 < value_pad * 4 {
        scratch.resize((value_pad * 4).div_ceil(64), Line([0; 64]));
    }
    let values: *mut f32 = scratch.as_mut_ptr().cast();
    for (i, item) in task.items.clone().enumerate() {
        let (mut max, mut sum) = (NONE_YET, 0.0);
        // SAFETY: the plan gave each of the spans `items.len()` partial rows in order; the caller promises the rest.
        unsafe {
            values.write_bytes(0, value_pad);
            for span in 0..task.spans.len() {
                let from = partials.ptr().add(first + (span * task.items.len() + i) * stride);
                let part = (from.read(), from.add(1).read(), from.add(LANES).cast_const());
                merge::<L>((&mut max, &mut sum, values), part, value_pad);
            }
            let (row, head) = (seq.row0 + item / shape.ratio, task.kv_head * shape.ratio + item % shape.ratio);
            finish::<L>(values, sum, &shape, p.out(row, head));
        }
    }
}

/// Adds a span to a row's total.
///
/// # Safety
/// Valid pointers, `value_pad` values each; `L`'s instructions.
#[inline(always)]
unsafe fn merge<L: Lanes>(into: (*mut f32, *mut f32, *mut f32), part: (f32, f32, *const f32), value_pad: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        let (old, new) = (into.0.read(), part.0);
        let max = if new > old { new } else { old };
        let (keep, add) = (exp_f32(old - max), exp_f32(new - max));
        into.0.write(max);
        into.1.write(into.1.read().mul_add(keep, part.1 * add));
        for d in (0..value_pad).step_by(LANES) {
            let scaled = L::load(part.2.add(d)).mul(L::splat(add));
            L::load(into.2.add(d)).fma(L::splat(keep), scaled).store(into.2.add(d));
        }
    }
}

/// Divides by the sum of weights and rounds.
///
/// # Safety
/// Valid pointers for the shape's widths; `L`'s instructions.
#[inline(always)]
unsafe fn finish<L: Lanes>(values: *const f32, sum: f32, shape: &Shape, out: *mut u8) {
    for d in (0..shape.value_width).step_by(LANES) {
        let lanes = LANES.min(shape.value_width - d);
        // SAFETY: the caller's promise; values are padded to whole vectors.
        unsafe {
            let x = L::load(values.add(d)).div(L::splat(sum));
            if shape.dtype == DType::BF16 {
                x.round_bf16().store_upper_part(out.cast::<u16>().add(d), lanes);
            } else if lanes == LANES {
                x.store(out.cast::<f32>().add(d));
            } else {
                std::ptr::copy_nonoverlapping(x.to_array().as_ptr(), out.cast::<f32>().add(d), lanes);
            }
        }
    }
}

/// Which of a chunk's keys the rows see.
#[derive(Clone, Copy)]
struct Seen {
    /// Of each row, the position of the last visible key, and one.
    ends: *const usize,
    key0: usize,
    window: usize,
}

impl Seen {
    /// # Safety
    /// `i` is a row.
    #[inline(always)]
    unsafe fn keys(self, i: usize) -> (usize, usize) {
        // SAFETY: the caller's promise.
        let end = unsafe { self.ends.add(i).read() };
        let to = end.saturating_sub(self.key0).min(CHUNK);
        (end.saturating_sub(self.window).saturating_sub(self.key0).min(to), to)
    }
}

/// A row's scaled scores, minus infinity where it sees no key.
///
/// # Safety
/// Valid pointers; `L`'s instructions.
#[inline(always)]
unsafe fn scaled<L: Lanes>(scores: *const f32, (from, to): (usize, usize), scale: f32) -> [L; VECTORS] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut s = [L::splat(0.0); VECTORS];
        for (j, s) in s.iter_mut().enumerate() {
            *s = L::load(scores.add(j * LANES)).mul(L::splat(scale));
        }
        if (from, to) != (0, CHUNK) {
            for (j, s) in s.iter_mut().enumerate() {
                let lane = |key: usize| key.saturating_sub(j * LANES).min(LANES);
                *s = s.keep(lane(from), lane(to));
            }
        }
        s
    }
}

/// A step of the online softmax for at most 16 `rows`: takes raw scores, brings `state` up to date,
/// hands each row's weights to `put`. Rows go through each pass together, so that nothing waits for one row's maximum and
/// the factors of all rows are one vector.
///
/// # Safety
/// Valid pointers; `L`'s instructions.
#[inline(always)]
unsafe fn softmax<L: Lanes>(
    scores: *const f32,
    rows: Range<usize>,
    seen: Seen,
    shape: &Shape,
    state: State,
    value_pad: usize,
    put: impl Fn(usize, [L; VECTORS]),
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut highest = [f32::NEG_INFINITY; LANES];
        for (i, highest) in rows.clone().zip(&mut highest) {
            let s = scaled::<L>(scores.add(i * CHUNK), seen.keys(i), shape.scale);
            *highest = s[0].max(s[1]).max(s[2].max(s[3])).reduce_max();
        }
        let old = L::load(state.max.add(rows.start));
        let max = L::load(highest.as_ptr()).max(old);
        let alphas = old.sub(max).exp().to_array();
        max.store(state.max.add(rows.start));
        for (i, &alpha) in rows.clone().zip(&alphas) {
            // A maximum that stays gives a factor of exactly 1.
            if alpha != 1.0 {
                let (sums, values) = (state.sums.add(i * LANES), state.values.add(i * value_pad));
                L::load(sums).mul(L::splat(alpha)).store(sums);
                for d in (0..value_pad).step_by(LANES) {
                    L::load(values.add(d)).mul(L::splat(alpha)).store(values.add(d));
                }
            }
        }
        for i in rows {
            let (max, sums) = (L::splat(state.max.add(i).read()), state.sums.add(i * LANES));
            let mut s = scaled::<L>(scores.add(i * CHUNK), seen.keys(i), shape.scale);
            let mut sum = L::load(sums);
            for s in &mut s {
                *s = s.sub(max).exp();
                if shape.dtype == DType::BF16 {
                    *s = s.round_bf16();
                }
                sum = sum.add(*s);
            }
            sum.store(sums);
            put(i, s);
        }
    }
}

/// Copies `len` elements of `dtype` and pads with zeros to `padded`.
///
/// # Safety
/// Both pointers are valid for these lengths.
#[inline(always)]
pub(crate) unsafe fn copy_row(from: *const u8, len: usize, to: *mut u8, padded: usize, dtype: DType) {
    let size = dtype.size_bytes();
    // SAFETY: the caller's promise.
    unsafe {
        std::ptr::copy_nonoverlapping(from, to, len * size);
        to.add(len * size).write_bytes(0, (padded - len) * size);
    }
}

const _: () = assert!(size_of::<bf16>() == 2 && CHUNK.is_multiple_of(32) && SPAN.is_multiple_of(CHUNK));
