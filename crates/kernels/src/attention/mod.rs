//! Causal grouped-query attention over paged keys and values.

#[cfg(target_arch = "x86_64")]
mod amx;
pub(crate) mod online;
mod products;
#[cfg(test)]
pub(crate) mod tests;

use moesaic_device::{Ctx, OpCall, Tensor};

use self::online::{Chunk, Plan, Problem, Shape, TILES};
use crate::contract::{KernelError, check, require};
use crate::paged::{KvShape, PagedBatch, PagedKv, PagedSeq, Shared, TILE_TOKENS};
use crate::rope::QkvLayout;

const OP: &str = "attention";

/// Every row of the batch looks at itself and the tokens before it, at most `sliding_window` in all:
/// `out[t, h] = softmax(scale * q[t, h] · k[.., h * G / H]) · v[.., h * G / H]`, `[T, H * C]` in the type of `qkv`.
///
/// Queries are the first `H * C` columns of `qkv` `[T, (H + 2G) * C]`; keys and values, those of this step included,
/// are read from `kv`. The order of operations is described in `online`: a row's bits depend on its position and the
/// stored entries alone.
///
/// Dims T, H, G, C and P, the pairs of row and visible token. FLOPs `4 * P * H * C` (softmax not counted). Bytes: queries
/// read, visible keys and values of each sequence read once, result written.
pub fn attention(
    ctx: &Ctx,
    qkv: &Tensor,
    layout: QkvLayout,
    kv: &PagedKv,
    batch: &PagedBatch,
    scale: f32,
    sliding_window: Option<usize>,
) -> Result<Tensor, KernelError> {
    let QkvLayout { num_heads: h, num_kv_heads: g, head_dim: c } = layout;
    layout.check(OP)?;
    let (t, stored) = (batch.num_rows(), kv.shape());
    check(OP, "qkv", qkv, &[t, layout.width()], stored.dtype)?;
    let same = (stored.num_kv_heads, stored.head_dim) == (g, c);
    require(same, OP, "kv", || format!("{g} heads of {c}"), || format!("{stored:?}"))?;
    require(sliding_window != Some(0), OP, "sliding_window", || "at least 1".into(), || "0".into())?;
    kv.check(OP, batch)?;

    let shape = Shape {
        dtype: stored.dtype,
        key_width: stored.key_width(),
        value_width: c,
        value_stride: c,
        num_kv_heads: g,
        ratio: h / g,
        pack_bytes: 0,
        scale,
        window: sliding_window,
    };
    let mut out = ctx.empty(&[t, h * c], stored.dtype)?;
    let plan = Plan::new(ctx, batch, &shape);
    let mut partials = plan.partials(ctx)?;
    ctx.record(|| {
        let work = batch.work(sliding_window);
        let element = stored.dtype.size_bytes() as u64;
        let flops = 4 * work.pairs * (h * c) as u64;
        let bytes = 2 * (t * h * c) as u64 * element + 2 * work.tokens * (g * c) as u64 * element;
        let dims = [("T", t), ("H", h), ("G", g), ("C", c), ("P", work.pairs as usize)];
        OpCall::compute(OP, &dims, flops, bytes)
    });
    if ctx.is_meta() {
        return Ok(out);
    }
    let (keys, values) = kv.bases();
    let problem = Gqa {
        shape,
        stored,
        head_dim: c,
        row_bytes: layout.width() * stored.dtype.size_bytes(),
        queries: Shared(qkv.bytes().as_ptr().cast_mut()),
        keys,
        values,
        out: Shared(out.bytes_mut().as_mut_ptr()),
        out_row_bytes: h * c * stored.dtype.size_bytes(),
    };
    plan.run(ctx, batch, &problem, &mut partials);
    Ok(out)
}

struct Gqa {
    shape: Shape,
    stored: KvShape,
    head_dim: usize,
    row_bytes: usize,
    queries: Shared<u8>,
    keys: Shared<u8>,
    values: Shared<u8>,
    out: Shared<u8>,
    out_row_bytes: usize,
}

impl Problem for Gqa {
    fn shape(&self) -> Shape {
        self.shape
    }

    #[inline(always)]
    unsafe fn query(&self, row: usize, head: usize, to: *mut u8) {
        let dtype = self.shape.dtype;
        // SAFETY: the caller says that row and head are inside, and `to` holds the padded row.
        unsafe {
            let from = self.queries.ptr().add(row * self.row_bytes + head * self.head_dim * dtype.size_bytes());
            online::copy_row(from, self.head_dim, to, self.shape.key_width, dtype);
        }
    }

    #[inline(always)]
    unsafe fn chunk(&self, seq: &PagedSeq, kv_head: usize, key0: usize, num_keys: usize, _pack: *mut u8) -> Chunk {
        let tile_elements = TILE_TOKENS * self.shape.dtype.size_bytes();
        let (key_bytes, value_bytes) = (tile_elements * self.shape.key_width, tile_elements * self.head_dim);
        let mut chunk = Chunk { keys: [std::ptr::null(); TILES], values: [std::ptr::null(); TILES] };
        for i in 0..TILES {
            // Tiles beyond the context repeat the last one.
            let key = key0 + (i * TILE_TOKENS).min((num_keys - 1) / TILE_TOKENS * TILE_TOKENS);
            let (block, offset) = (key / self.stored.block_size, key % self.stored.block_size);
            let tile = self.stored.tile_of(seq.block_table[block] as usize, offset, kv_head);
            // SAFETY: the batch was checked against the memory, so the tile is inside.
            unsafe {
                chunk.keys[i] = self.keys.ptr().add(tile * key_bytes);
                chunk.values[i] = self.values.ptr().add(tile * value_bytes);
            }
        }
        chunk
    }

    #[inline(always)]
    fn prefetch(&self, seq: &PagedSeq, kv_head: usize, key0: usize, num_keys: usize) {
        let tile_elements = TILE_TOKENS * self.shape.dtype.size_bytes();
        for key in (key0..key0 + num_keys).step_by(TILE_TOKENS) {
            let (block, offset) = (key / self.stored.block_size, key % self.stored.block_size);
            let tile = self.stored.tile_of(seq.block_table[block] as usize, offset, kv_head);
            for (base, width) in [(self.keys, self.shape.key_width), (self.values, self.head_dim)] {
                prefetch(base.ptr().wrapping_add(tile * tile_elements * width), tile_elements * width);
            }
        }
    }

    #[inline(always)]
    fn out(&self, row: usize, head: usize) -> *mut u8 {
        let column = head * self.head_dim * self.shape.dtype.size_bytes();
        self.out.ptr().wrapping_add(row * self.out_row_bytes + column)
    }
}

/// Asks the memory for these bytes; changes nothing, whatever the address.
#[inline(always)]
fn prefetch(from: *const u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..len).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every x86-64 has the instruction, and it never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(line).cast()) }
    }
    let _ = (from, len);
}
