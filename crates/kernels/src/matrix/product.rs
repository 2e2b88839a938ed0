//! The driver of all matrix ops: products `x Wᵀ` cut into tasks, each computed by the best path and handed to a sink.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use half::bf16;
use moesaic_device::{Ctx, Isa, Tensor};
use moesaic_spec::DType;

use super::scratch::{self, Scratch};
use super::source::{round_bf16, widen_tiles};
use super::{PackedMatrix, SCALE_K, TILE_K, TILE_N, lanes};
#[cfg(target_arch = "x86_64")]
use super::{amx, avx2, avx512};
use crate::KernelError;
use crate::cols::Cols;

/// Rows up to which AVX-512's multiply-adds stream weights faster than AMX.
const FMA_ROWS: usize = 2;
/// Rows up to which a product is bound by reading its weights.
const STREAM_ROWS: usize = 16;
/// Bytes of x that a task of a large product works on: they stay in the second-level cache.
const ROWS_BYTES: usize = 1 << 20;

/// Rows of x.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    pub(crate) elements: Elements<'a>,
    /// Elements from one row to the next.
    pub(crate) stride: usize,
    pub(crate) rows: usize,
}

#[derive(Clone, Copy)]
pub(crate) enum Elements<'a> {
    F32(&'a [f32]),
    /// Each row is followed by zeros (or belongs to a `k`) up to a multiple of [`TILE_K`].
    BF16(&'a [bf16]),
}

impl<'a> Operand<'a> {
    /// Rows of a tensor from element `start` on.
    pub(crate) fn new(x: &'a Tensor, start: usize, stride: usize, rows: usize) -> Operand<'a> {
        let elements = match x.dtype() {
            DType::F32 => Elements::F32(&x.f32()[start..]),
            _ => Elements::BF16(&x.bf16()[start..]),
        };
        Operand { elements, stride, rows }
    }

    /// Some of the rows.
    pub(crate) fn slice(&self, rows: Range<usize>) -> Operand<'a> {
        assert!(rows.end <= self.rows);
        let at = if rows.is_empty() { 0 } else { rows.start * self.stride };
        let elements = match self.elements {
            Elements::F32(x) => Elements::F32(&x[at..]),
            Elements::BF16(x) => Elements::BF16(&x[at..]),
        };
        Operand { elements, stride: self.stride, rows: rows.len() }
    }
}

/// Columns that a path reads of each row for a matrix of `k` columns.
pub(crate) fn padded(k: usize, dtype: DType) -> usize {
    if dtype == DType::F32 { k } else { k.next_multiple_of(TILE_K) }
}

/// Takes memory for a copy of `heads` column ranges of `x` with whole tiles, where `k` needs one, and fills it. The head
/// `h` begins at `x.start + h * head_stride`.
pub(crate) fn padded_copy(
    ctx: &Ctx,
    x: Cols,
    heads: usize,
    head_stride: usize,
    k: usize,
) -> Result<Option<Tensor>, KernelError> {
    let dtype = x.tensor.dtype();
    let wide = padded(k, dtype);
    if wide == k {
        return Ok(None);
    }
    let (rows, width) = (x.rows(), x.width());
    let mut copy = ctx.empty(&[rows, heads * wide], dtype)?;
    if !ctx.is_meta() {
        let src = x.tensor.bf16();
        for (row, out) in copy.bf16_mut().chunks_exact_mut(heads * wide).enumerate() {
            for (h, out) in out.chunks_exact_mut(wide).enumerate() {
                let at = row * width + x.start + h * head_stride;
                out[..k].copy_from_slice(&src[at..at + k]);
                out[k..].fill(bf16::ZERO);
            }
        }
    }
    Ok(Some(copy))
}

/// One product.
pub(crate) struct Job<'a> {
    pub(crate) x: Operand<'a>,
    pub(crate) w: &'a PackedMatrix,
}

/// A finished block of a job's result.
pub(crate) struct Done<'a> {
    pub(crate) isa: Isa,
    pub(crate) job: usize,
    pub(crate) rows: Range<usize>,
    /// Columns are `panels * 16`.
    pub(crate) panels: Range<usize>,
    /// `[rows][ldc]`.
    pub(crate) c: &'a [f32],
    pub(crate) ldc: usize,
}

struct Part {
    job: usize,
    rows: Range<usize>,
    panels: Range<usize>,
}

/// Computes all jobs on the context's threads; `sink` sees every block once. Blocks begin at even panels and, but for the
/// last, have an even number of them.
pub(crate) fn run(ctx: &Ctx, jobs: &[Job], sink: &(dyn Fn(Done) + Sync)) {
    static REGIONS: AtomicU64 = AtomicU64::new(1);
    let region = REGIONS.fetch_add(1, Ordering::Relaxed);
    let isa = ctx.isa();
    let parts = split(jobs, ctx.pool().num_threads());
    ctx.pool().run(parts.len(), &|task| {
        let part = &parts[task.idx];
        let Job { x, w } = &jobs[part.job];
        let step = rows_at_once(isa, w.dtype(), part.rows.len());
        let group = if step <= STREAM_ROWS { 8 } else { 2 };
        scratch::with(|scratch| {
            for first in part.rows.clone().step_by(step) {
                let rows = first..part.rows.end.min(first + step);
                for first in part.panels.clone().step_by(group) {
                    let panels = first..part.panels.end.min(first + group);
                    let ldc = panels.len() * TILE_N;
                    multiply(isa, x, w, rows.clone(), panels.clone(), (region, part.job, rows.start), scratch);
                    let c = &*scratch.c.f32(rows.len() * ldc);
                    sink(Done { isa, job: part.job, rows: rows.clone(), panels, c, ldc });
                }
            }
        });
    });
}

/// Whether `rows` rows × a matrix of `dtype` are computed by AMX.
fn by_amx(isa: Isa, dtype: DType, rows: usize) -> bool {
    isa == Isa::Amx && dtype != DType::F32 && rows > FMA_ROWS
}

/// Rows of a part that go through all its panels together: as many as a kernel takes where rows must be widened first,
/// otherwise all.
fn rows_at_once(isa: Isa, dtype: DType, rows: usize) -> usize {
    if dtype == DType::F32 || by_amx(isa, dtype, rows) { rows } else { max_rows(isa).min(rows) }
}

/// Rows that a kernel takes.
fn max_rows(isa: Isa) -> usize {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => avx512::MAX_ROWS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::MAX_ROWS,
        _ => lanes::MAX_ROWS,
    }
}

/// Tasks small enough that threads end together, large enough that they are worth their start.
fn split(jobs: &[Job], num_threads: usize) -> Vec<Part> {
    let slots = num_threads * 8;
    let bytes: usize = jobs.iter().map(|job| job.w.panels() * job.w.panel_bytes()).sum();
    let work: usize = jobs.iter().map(|job| job.w.panels() * job.x.rows.max(STREAM_ROWS)).sum();
    let stream_bytes = (bytes / slots).clamp(32 << 10, 1 << 20);
    let task_work = (work / slots).max(1);
    let mut parts = Vec::new();
    for (job_idx, job) in jobs.iter().enumerate() {
        let row_bytes = job.w.k() * if job.w.dtype() == DType::F32 { 4 } else { 2 };
        let most = (ROWS_BYTES / row_bytes / 32 * 32).max(64);
        let blocks = job.x.rows.div_ceil(most);
        for block in 0..blocks {
            let rows = (job.x.rows.div_ceil(blocks)).next_multiple_of(32);
            let rows = (block * rows).min(job.x.rows)..((block + 1) * rows).min(job.x.rows);
            if rows.is_empty() {
                continue;
            }
            let wanted = match rows.len() {
                ..=STREAM_ROWS => stream_bytes / job.w.panel_bytes(),
                len => task_work / len,
            };
            let step = (wanted / 2 * 2).max(2);
            for first in (0..job.w.panels()).step_by(step) {
                let panels = first..job.w.panels().min(first + step);
                parts.push(Part { job: job_idx, rows: rows.clone(), panels });
            }
        }
    }
    parts
}

/// `rows` of x times `panels` of W, into the scratch's `c` (`[rows][panels * 16]`).
fn multiply(
    isa: Isa,
    x: &Operand,
    w: &PackedMatrix,
    rows: Range<usize>,
    panels: Range<usize>,
    key: (u64, usize, usize),
    scratch: &mut Scratch,
) {
    let x = x.slice(rows.clone());
    match x.elements {
        Elements::F32(elements) => multiply_f32(isa, elements, &x, w, panels, scratch),
        Elements::BF16(elements) => {
            #[cfg(target_arch = "x86_64")]
            if by_amx(isa, w.dtype(), rows.len()) {
                return match w.dtype() {
                    DType::BF16 => multiply_amx(elements, &x, w, panels, scratch),
                    _ => multiply_amx_f8(elements, &x, w, panels, scratch),
                };
            }
            multiply_widened(isa, elements, &x, w, panels, key, scratch);
        }
    }
}

fn multiply_f32(isa: Isa, x: &[f32], operand: &Operand, w: &PackedMatrix, panels: Range<usize>, scratch: &mut Scratch) {
    let (rows, stride, ldc) = (operand.rows, operand.stride, panels.len() * TILE_N);
    let c = scratch.c.f32(rows * ldc);
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 {
        for panel in panels.clone().step_by(2) {
            let count = (panels.end - panel).min(2);
            for first in (0..rows).step_by(avx512::MAX_ROWS) {
                let num = (rows - first).min(avx512::MAX_ROWS);
                let c = &mut c[first * ldc + (panel - panels.start) * TILE_N..];
                // SAFETY: the machine has AVX-512 (`Ctx` takes no more than it has).
                unsafe { avx512::f32(w, panel, count, num, &x[first * stride..], stride, c, ldc) };
            }
        }
        return;
    }
    for panel in panels.clone() {
        for first in (0..rows).step_by(max_rows(isa)) {
            let num = (rows - first).min(max_rows(isa));
            let (x, c) = (&x[first * stride..], &mut c[first * ldc + (panel - panels.start) * TILE_N..]);
            #[cfg(target_arch = "x86_64")]
            if isa >= Isa::Avx2 {
                // SAFETY: the machine has AVX2 and FMA.
                unsafe { avx2::f32(w, panel, num, x, stride, c, ldc) };
                continue;
            }
            lanes::f32(w, panel, num, x, stride, c, ldc);
        }
    }
}

/// BF16 and F8 E4M3 by multiply-adds on rows that are widened to F32 first (once for all panels of a part); at most as many
/// rows as a kernel takes.
fn multiply_widened(
    isa: Isa,
    x: &[bf16],
    operand: &Operand,
    w: &PackedMatrix,
    panels: Range<usize>,
    key: (u64, usize, usize),
    scratch: &mut Scratch,
) {
    let (rows, stride, ldc) = (operand.rows, operand.stride, panels.len() * TILE_N);
    let k = padded(w.k(), DType::BF16);
    let c = scratch.c.f32(rows * ldc);
    let wide = scratch.wide.f32(k * rows);
    if scratch.wide_key != key {
        scratch.wide_key = key;
        match isa {
            // SAFETY: the machine has AVX-512.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { avx512::widen(x, stride, rows, wide) },
            // SAFETY: the machine has AVX2.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::widen(x, stride, rows, wide) },
            _ => widen_tiles(x, stride, rows, wide),
        }
    }
    for panel in panels.clone() {
        let c = &mut c[(panel - panels.start) * TILE_N..];
        match isa {
            // SAFETY: the machine has AVX-512.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { avx512::tiles(w, panel, rows, wide, c, ldc) },
            // SAFETY: the machine has AVX2 and FMA.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::tiles(w, panel, rows, wide, c, ldc) },
            _ => lanes::tiles(w, panel, rows, wide, c, ldc),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn multiply_amx(x: &[bf16], operand: &Operand, w: &PackedMatrix, panels: Range<usize>, scratch: &mut Scratch) {
    let (rows, ldc) = (operand.rows, panels.len() * TILE_N);
    let num_tiles = w.k().div_ceil(TILE_K);
    assert!(rows > 0 && x.len() >= (rows - 1) * operand.stride + num_tiles * TILE_K);
    let c = scratch.c.f32(rows * ldc);
    let mut block = amx::Block {
        x: x.as_ptr().cast(),
        x_stride: operand.stride * 2,
        w: w.panel(panels.start, panels.len()).as_ptr(),
        panel_bytes: w.panel_bytes(),
        num_tiles,
        c: c.as_mut_ptr(),
        c_stride: ldc * 4,
    };
    // SAFETY: `Isa::Amx` was found usable; the assertion above covers x; W's panels have `num_tiles` tiles each; `c` holds
    // `rows` rows of whole panels.
    unsafe {
        if rows <= 16 {
            amx::configure((rows, 1));
            for _ in panels {
                amx::rows16_panel1_stream(block);
                block.w = block.w.wrapping_add(block.panel_bytes);
                block.c = block.c.wrapping_add(TILE_N);
            }
        } else {
            let mut configured = (0, 0);
            for pair in panels.clone().step_by(2) {
                let count = (panels.end - pair).min(2);
                amx_rows(block, rows, count, &mut configured);
                block.w = block.w.wrapping_add(2 * block.panel_bytes);
                block.c = block.c.wrapping_add(2 * TILE_N);
            }
        }
        crate::amx::release();
    }
}

/// All rows of a block × `count` (1 or 2) panels. `configured` says how tiles are.
///
/// # Safety
/// As the kernels of [`amx`], for `rows` rows.
#[cfg(target_arch = "x86_64")]
unsafe fn amx_rows(block: amx::Block, rows: usize, count: usize, configured: &mut (usize, usize)) {
    for first in (0..rows).step_by(32) {
        let num = (rows - first).min(32);
        let tiles = (num.min(16), num.saturating_sub(16).max(1));
        let block = amx::Block {
            x: block.x.wrapping_add(first * block.x_stride),
            c: block.c.wrapping_add(first * block.c_stride / 4),
            ..block
        };
        // SAFETY: promised by the caller; tiles are configured for the rows that are left.
        unsafe {
            if *configured != tiles {
                amx::configure(tiles);
                *configured = tiles;
            }
            match (num > 16, count) {
                // The first rows bring a pair of panels from memory, the others find it in the caches.
                (true, 2) if first == 0 => amx::rows32_panel2_stream(block),
                (true, 2) => amx::rows32_panel2(block),
                (true, _) => amx::rows32_panel1(block),
                (false, 2) => amx::rows16_panel2(block),
                (false, _) => amx::rows16_panel1(block),
            }
        }
    }
}

/// Blocks of 128 columns: decoded to BF16, multiplied, scaled and added. The steps of three neighbouring blocks alternate, so
/// that tiles are not loaded from lines that were stored just before.
#[cfg(target_arch = "x86_64")]
fn multiply_amx_f8(x: &[bf16], operand: &Operand, w: &PackedMatrix, panels: Range<usize>, scratch: &mut Scratch) {
    const BLOCK_TILES: usize = SCALE_K / TILE_K;
    const PANEL_WORDS: usize = BLOCK_TILES * TILE_N * TILE_K;
    let (rows, ldc) = (operand.rows, panels.len() * TILE_N);
    let num_tiles = w.k().div_ceil(TILE_K);
    let num_blocks = num_tiles.div_ceil(BLOCK_TILES);
    assert!(rows > 0 && x.len() >= (rows - 1) * operand.stride + num_tiles * TILE_K);
    let c = scratch.c.f32(rows * ldc);
    let tiles = scratch.tiles.u16(4 * PANEL_WORDS);
    let sums = scratch.block.f32(4 * rows * TILE_N);
    let (tiles_half, sums_half) = (tiles.len() / 2, sums.len() / 2);
    let mut configured = (0, 0);
    // With few rows, the steps of one panel fit the processor's window and overlap; with many, two panels share loads of x.
    let step = if rows <= STREAM_ROWS { 1 } else { 2 };
    for pair in panels.clone().step_by(step) {
        let count = (panels.end - pair).min(step);
        let c_at = (pair - panels.start) * TILE_N;
        let tiles_of = |block: usize| block * BLOCK_TILES..num_tiles.min((block + 1) * BLOCK_TILES);
        let decode = |block: usize, tiles: &mut [u16]| {
            for p in 0..count {
                let range = tiles_of(block);
                let codes = &w.panel(pair + p, 1)[range.start * 512..range.end * 512];
                let out = &mut tiles[block % 2 * tiles_half + p * PANEL_WORDS..][..PANEL_WORDS];
                // SAFETY: AMX machines have AVX-512.
                unsafe { avx512::decode_tiles(codes, out) };
            }
        };
        let mut scale_add = |block: usize, sums: &[f32]| {
            for p in 0..count {
                let scale = &w.scales(pair + p)[block * TILE_N..][..TILE_N];
                let (c, sums) = (&mut c[c_at + p * TILE_N..], &sums[block % 2 * sums_half + p * TILE_N..]);
                // SAFETY: AMX machines have AVX-512.
                unsafe { avx512::scale_add(rows, scale, sums, 2 * TILE_N, c, ldc, block == 0) };
            }
        };
        decode(0, tiles);
        for block in 0..num_blocks {
            if block + 1 < num_blocks {
                decode(block + 1, tiles);
            }
            let range = tiles_of(block);
            let operands = amx::Block {
                x: x[range.start * TILE_K..].as_ptr().cast(),
                x_stride: operand.stride * 2,
                w: tiles[block % 2 * tiles_half..].as_ptr().cast(),
                panel_bytes: PANEL_WORDS * 2,
                num_tiles: range.len(),
                c: sums[block % 2 * sums_half..].as_mut_ptr(),
                c_stride: 2 * TILE_N * 4,
            };
            // SAFETY: as in `multiply_amx`; `tiles` has decoded tiles for each panel, `sums` 32 columns a row.
            unsafe { amx_rows(operands, rows, count, &mut configured) };
            if block > 0 {
                scale_add(block - 1, sums);
            }
        }
        scale_add(num_blocks - 1, sums);
    }
    // SAFETY: `Isa::Amx` was found usable.
    unsafe { crate::amx::release() };
}

/// Where results go: a matrix that tasks write disjoint parts of.
#[derive(Clone, Copy)]
pub(crate) struct Out<'a> {
    elements: OutElements,
    len: usize,
    tensor: std::marker::PhantomData<&'a mut Tensor>,
}

#[derive(Clone, Copy)]
enum OutElements {
    F32(*mut f32),
    BF16(*mut bf16),
}

// SAFETY: the tensor is borrowed mutably for as long as this lives, and `row` makes its callers promise disjoint parts.
unsafe impl Sync for Out<'_> {}

/// A part of a row of the result.
pub(crate) enum OutRow<'a> {
    F32(&'a mut [f32]),
    BF16(&'a mut [bf16]),
}

impl<'a> Out<'a> {
    /// F32 or BF16.
    pub(crate) fn new(tensor: &'a mut Tensor) -> Out<'a> {
        let len = tensor.num_elements();
        let elements = match tensor.dtype() {
            DType::F32 => OutElements::F32(tensor.f32_mut().as_mut_ptr()),
            _ => OutElements::BF16(tensor.bf16_mut().as_mut_ptr()),
        };
        Out { elements, len, tensor: std::marker::PhantomData }
    }

    /// Elements `at..at + len`.
    ///
    /// # Safety
    /// No other task uses these elements, and this one holds no other part that overlaps.
    pub(crate) unsafe fn row(&self, at: usize, len: usize) -> OutRow<'a> {
        assert!(at + len <= self.len);
        // SAFETY: inside the tensor (assertion), borrowed mutably for 'a; the caller promises that nobody shares the part.
        unsafe {
            match self.elements {
                OutElements::F32(ptr) => OutRow::F32(std::slice::from_raw_parts_mut(ptr.add(at), len)),
                OutElements::BF16(ptr) => OutRow::BF16(std::slice::from_raw_parts_mut(ptr.add(at), len)),
            }
        }
    }
}

/// Where a job's columns are in a row of the result.
#[derive(Clone, Copy)]
pub(crate) struct Columns {
    /// Elements of a row of the result.
    pub(crate) stride: usize,
    /// Element of the job's first row and column.
    pub(crate) first: usize,
    /// Columns of the job.
    pub(crate) num: usize,
}

/// The plain sink: adds a bias, rounds, stores.
///
/// # Safety
/// The jobs' rows and columns in `out` are disjoint.
pub(crate) unsafe fn store(done: &Done, out: &Out, columns: Columns, bias: Option<&[f32]>) {
    #[cfg(target_arch = "x86_64")]
    if done.isa >= Isa::Avx512 {
        // SAFETY: the machine has AVX-512; the rest is promised by the caller.
        return unsafe { store_avx512(done, out, columns, bias) };
    }
    // SAFETY: promised by the caller.
    unsafe { store_any(done, out, columns, bias) };
}

/// Promises: as [`store`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn store_avx512(done: &Done, out: &Out, columns: Columns, bias: Option<&[f32]>) {
    // SAFETY: promised by the caller.
    unsafe { store_any(done, out, columns, bias) };
}

/// Promises: as [`store`].
#[inline(always)]
unsafe fn store_any(done: &Done, out: &Out, columns: Columns, bias: Option<&[f32]>) {
    let first = done.panels.start * TILE_N;
    let len = (done.panels.len() * TILE_N).min(columns.num - first);
    let bias = bias.map(|bias| &bias[first..first + len]);
    for (row, c) in done.rows.clone().zip(done.c.chunks_exact(done.ldc)) {
        // SAFETY: blocks of a job are disjoint, jobs by the caller's promise.
        let out = unsafe { out.row(columns.first + row * columns.stride + first, len) };
        let c = &c[..len];
        match (out, bias) {
            (OutRow::F32(out), None) => out.copy_from_slice(c),
            (OutRow::F32(out), Some(bias)) => {
                out.iter_mut().zip(c).zip(bias).for_each(|((out, c), bias)| *out = c + bias);
            }
            (OutRow::BF16(out), None) => {
                out.iter_mut().zip(c).for_each(|(out, c)| *out = bf16::from_bits(round_bf16(*c)));
            }
            (OutRow::BF16(out), Some(bias)) => {
                let sums = c.iter().zip(bias).map(|(c, bias)| c + bias);
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out = bf16::from_bits(round_bf16(sum)));
            }
        }
    }
}
