//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) in its absorbed form: queries are brought into
//! the latent space, so that scores and values are taken from the cached latents themselves.
//!
//! Letters besides the crate's: `L` kv_lora_rank, `P` qk_rope_head_dim, `Q` qk_nope_head_dim.

mod store;
#[cfg(test)]
mod tests;

pub use store::{LatentPost, rope_queries, store_latent};

use moesaic_device::{Ctx, OpCall, Tensor};
use moesaic_spec::DType;

use crate::attention::online::{self, Chunk, Plan, Problem, Shape, TILES};
use crate::contract::{KernelError, check, require};
use crate::paged::{LatentShape, PagedBatch, PagedLatent, PagedSeq, Shared, TILE_TOKENS};

const OP: &str = "mla_attention";

/// `out[t, h] = softmax(scale * (q_latent[t, h] · latent + q_pe[t, h] · k_pe)) · latent`, causal, `[T, H * L]` in the type
/// of the inputs.
///
/// `q_latent` is `[T, H * L]`, `q` `[T, H * (Q + P)]` with its last P columns of each head rotated; the entries of this
/// step are in `latent`. A row's bits depend on its position and the stored entries alone (`attention::online`).
///
/// Dims T, H, L, P and pairs, of row and visible token. FLOPs `pairs * H * (4 L + 2 P)` (softmax not counted). Bytes:
/// latent and rotary queries read, visible entries of each sequence read once, result written.
pub fn mla_attention(
    ctx: &Ctx,
    q_latent: &Tensor,
    q: &Tensor,
    num_heads: usize,
    latent: &PagedLatent,
    batch: &PagedBatch,
    scale: f32,
) -> Result<Tensor, KernelError> {
    let stored = latent.shape();
    let (t, h, dtype) = (batch.num_rows(), num_heads, stored.dtype);
    let LatentShape { kv_lora_rank: l, qk_rope_head_dim: p, .. } = stored;
    check(OP, "q_latent", q_latent, &[t, h * l], dtype)?;
    let q_width = query_width(OP, q, h, p)?;
    check(OP, "q", q, &[t, h * q_width], dtype)?;
    latent.check(OP, batch)?;

    let bf16 = dtype == DType::BF16;
    let key_width = stored.width().next_multiple_of(if bf16 { 2 } else { 1 });
    let pack_elements = TILES * TILE_TOKENS * (key_width + if bf16 { l } else { 0 });
    let shape = Shape {
        dtype,
        key_width,
        value_width: l,
        value_stride: if bf16 { l } else { stored.width() },
        num_kv_heads: 1,
        ratio: h,
        pack_bytes: pack_elements * dtype.size_bytes(),
        scale,
        window: None,
    };
    let mut out = ctx.empty(&[t, h * l], dtype)?;
    let plan = Plan::new(ctx, batch, &shape);
    let mut partials = plan.partials(ctx)?;
    ctx.record(|| {
        let work = batch.work(None);
        let element = dtype.size_bytes() as u64;
        let flops = work.pairs * (h * (4 * l + 2 * p)) as u64;
        let bytes = (t * h * (2 * l + p)) as u64 * element + work.tokens * stored.width() as u64 * element;
        let dims = [("T", t), ("H", h), ("L", l), ("P", p), ("pairs", work.pairs as usize)];
        OpCall::compute(OP, &dims, flops, bytes)
    });
    if ctx.is_meta() {
        return Ok(out);
    }
    let problem = Mla {
        shape,
        stored,
        q_width,
        q_latent: Shared(q_latent.bytes().as_ptr().cast_mut()),
        q: Shared(q.bytes().as_ptr().cast_mut()),
        entries: latent.base(),
        out: Shared(out.bytes_mut().as_mut_ptr()),
    };
    plan.run(ctx, batch, &problem, &mut partials);
    Ok(out)
}

/// Columns of a head of `q`, which must be a matrix of `num_heads` heads with at least `rope` columns each.
fn query_width(op: &'static str, q: &Tensor, num_heads: usize, rope: usize) -> Result<usize, KernelError> {
    let columns = q.dims().get(1).copied().unwrap_or(0);
    let valid = num_heads > 0 && columns.is_multiple_of(num_heads) && columns / num_heads >= rope;
    let expected = || format!("[T, {num_heads} * (at least {rope})]");
    require(valid, op, "q", expected, || format!("{:?}", q.dims()))?;
    Ok(columns / num_heads)
}

struct Mla {
    shape: Shape,
    stored: LatentShape,
    q_width: usize,
    q_latent: Shared<u8>,
    q: Shared<u8>,
    entries: Shared<u8>,
    out: Shared<u8>,
}

impl Problem for Mla {
    fn shape(&self) -> Shape {
        self.shape
    }

    #[inline(always)]
    unsafe fn query(&self, row: usize, head: usize, to: *mut u8) {
        let LatentShape { kv_lora_rank: l, qk_rope_head_dim: p, dtype, .. } = self.stored;
        let size = dtype.size_bytes();
        let item = row * self.shape.ratio + head;
        // SAFETY: the caller says that row and head are inside, and `to` holds the padded row: L latent columns, then P
        // rotary ones, the last P of the head.
        unsafe {
            std::ptr::copy_nonoverlapping(self.q_latent.ptr().add(item * l * size), to, l * size);
            let rope = self.q.ptr().add((item * self.q_width + self.q_width - p) * size);
            online::copy_row(rope, p, to.add(l * size), self.shape.key_width - l, dtype);
        }
    }

    #[inline(always)]
    unsafe fn chunk(&self, seq: &PagedSeq, _kv_head: usize, key0: usize, num_keys: usize, pack: *mut u8) -> Chunk {
        let (width, l) = (self.stored.width(), self.stored.kv_lora_rank);
        let mut chunk = Chunk { keys: [std::ptr::null(); TILES], values: [std::ptr::null(); TILES] };
        for i in 0..TILES {
            let first = i * TILE_TOKENS;
            if first >= num_keys {
                (chunk.keys[i], chunk.values[i]) = (chunk.keys[i - 1], chunk.values[i - 1]);
                continue;
            }
            let (block, offset) = ((key0 + first) / self.stored.block_size, (key0 + first) % self.stored.block_size);
            let slot = seq.block_table[block] as usize * self.stored.block_size + offset;
            // SAFETY: the batch was checked against the memory, so eight entries from the slot on are inside; `pack`
            // holds eight tiles of keys, and for BF16 eight of values.
            unsafe {
                if self.shape.dtype == DType::BF16 {
                    let from = self.entries.ptr().cast::<u16>().add(slot * width);
                    let keys = pack.cast::<u16>().add(i * TILE_TOKENS * self.shape.key_width);
                    let values = pack.cast::<u16>().add(TILES * TILE_TOKENS * self.shape.key_width);
                    let values = values.add(i * TILE_TOKENS * l);
                    pack_keys_bf16(from, width, keys.cast());
                    pack_values_bf16(from, width, l, values.cast());
                    (chunk.keys[i], chunk.values[i]) = (keys.cast(), values.cast());
                } else {
                    let from = self.entries.ptr().cast::<f32>().add(slot * width);
                    let keys = pack.cast::<f32>().add(i * TILE_TOKENS * width);
                    for c in 0..width {
                        for token in 0..TILE_TOKENS {
                            keys.add(c * TILE_TOKENS + token).write(from.add(token * width + c).read());
                        }
                    }
                    (chunk.keys[i], chunk.values[i]) = (keys.cast_const().cast(), from.cast_const().cast());
                }
            }
        }
        chunk
    }

    #[inline(always)]
    fn out(&self, row: usize, head: usize) -> *mut u8 {
        let item = row * self.shape.ratio + head;
        self.out.ptr().wrapping_add(item * self.stored.kv_lora_rank * self.stored.dtype.size_bytes())
    }
}

/// Eight entries to pairs of columns: `[width / 2, 8 tokens, 2]`, an odd width padded with zeros.
///
/// # Safety
/// Eight entries of `width` are readable, the tile is writable.
#[inline(always)]
unsafe fn pack_keys_bf16(from: *const u16, width: usize, to: *mut [u16; 2]) {
    // SAFETY: the caller's promise.
    unsafe {
        for pair in 0..width / 2 {
            for token in 0..TILE_TOKENS {
                let x = from.add(token * width + 2 * pair).cast::<[u16; 2]>().read_unaligned();
                to.add(pair * TILE_TOKENS + token).write(x);
            }
        }
        if !width.is_multiple_of(2) {
            for token in 0..TILE_TOKENS {
                let last = from.add(token * width + width - 1).read();
                to.add(width / 2 * TILE_TOKENS + token).write([last, 0]);
            }
        }
    }
}

/// The first `l` columns of eight entries to pairs of tokens: `[4, l, 2]`.
///
/// # Safety
/// Eight entries of `width >= l` are readable, the tile is writable.
#[inline(always)]
unsafe fn pack_values_bf16(from: *const u16, width: usize, l: usize, to: *mut [u16; 2]) {
    // SAFETY: the caller's promise.
    unsafe {
        for pair in 0..TILE_TOKENS / 2 {
            let (first, second) = (from.add(2 * pair * width), from.add((2 * pair + 1) * width));
            for d in 0..l {
                to.add(pair * l + d).write([first.add(d).read(), second.add(d).read()]);
            }
        }
    }
}
