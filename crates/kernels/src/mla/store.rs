//! What happens between the projections of latent attention and attention itself.

use half::bf16;
use moesaic_device::{Ctx, OpCall, Tensor};
use moesaic_spec::DType;

use super::query_width;
use crate::cols::Cols;
use crate::contract::{KernelError, check, require};
use crate::paged::{PagedBatch, PagedLatent, Shared};
use crate::rope::{RopeTable, check_weight, rms_norm, weight_f32};

/// Rows of a task.
const ROWS: usize = 16;

/// What [`store_latent`] does on the way.
pub struct LatentPost<'a> {
    /// RMSNorm weight of the latent `[L]`, F32 or BF16.
    pub norm_weight: &'a Tensor,
    /// Added to the mean square.
    pub eps: f32,
    /// Rotation of the shared key part, P wide.
    pub rope: &'a RopeTable,
}

/// Takes `kv_a` `[T, L + P]` (F32 or BF16, often a column range of a fused projection), norms the first L columns, rotates
/// the last P by each row's position, and stores the entry at the batch's slots. F32 inside, rounded once.
///
/// Dims T, L, P. FLOPs `T * (4 L + 3 P)`. Bytes: entries read and written.
pub fn store_latent(
    ctx: &Ctx,
    kv_a: Cols,
    post: &LatentPost,
    latent: &mut PagedLatent,
    batch: &PagedBatch,
) -> Result<(), KernelError> {
    const OP: &str = "store_latent";
    let shape = latent.shape();
    let (t, l, p, width, dtype) =
        (batch.num_rows(), shape.kv_lora_rank, shape.qk_rope_head_dim, shape.width(), shape.dtype);
    let (_, columns) = kv_a.check(OP, "kv_a")?;
    check(OP, "kv_a", kv_a.tensor, &[t, columns], dtype)?;
    require(kv_a.len == width, OP, "columns of kv_a", || width.to_string(), || kv_a.len.to_string())?;
    check_weight(OP, "norm_weight", post.norm_weight, l)?;
    let rotary = post.rope.rotary_dim();
    require(rotary == p, OP, "rotary_dim", || p.to_string(), || rotary.to_string())?;
    post.rope.check(OP, batch.positions())?;
    latent.check(OP, batch)?;
    ctx.record(|| {
        let (flops, bytes) = (t * (4 * l + 3 * p), 2 * t * width * dtype.size_bytes());
        OpCall::compute(OP, &[("T", t), ("L", l), ("P", p)], flops as u64, bytes as u64)
    });
    if ctx.is_meta() {
        return Ok(());
    }
    let weight = weight_f32(post.norm_weight);
    let to = latent.base_mut();
    ctx.pool().run(t.div_ceil(ROWS), &|task| {
        let mut entry = vec![0.0f32; width];
        for row in task.idx * ROWS..t.min((task.idx + 1) * ROWS) {
            let from = row * columns + kv_a.start;
            match dtype {
                DType::F32 => entry.copy_from_slice(&kv_a.tensor.f32()[from..from + width]),
                _ => widen(&kv_a.tensor.bf16()[from..from + width], &mut entry),
            }
            rms_norm(&mut entry[..l], &weight, post.eps);
            post.rope.rotate(&mut entry[l..], batch.positions()[row]);
            let slot = batch.slots()[row];
            // SAFETY: the batch was checked against the memory, so the slot is inside; slots differ, so no other task
            // writes this entry.
            unsafe {
                match dtype {
                    DType::F32 => {
                        std::slice::from_raw_parts_mut(to.ptr().cast::<f32>().add(slot * width), width)
                            .copy_from_slice(&entry);
                    }
                    _ => {
                        narrow(&entry, std::slice::from_raw_parts_mut(to.ptr().cast::<bf16>().add(slot * width), width))
                    }
                }
            }
        }
    });
    Ok(())
}

/// Rotates the last `rotary_dim` columns of each head of `q` `[T, H * (Q + P)]` in place, by each row's position. F32
/// inside, rounded once.
///
/// Dims T, H, P. FLOPs `3 * T * H * P`. Bytes: the rotated columns read and written.
pub fn rope_queries(
    ctx: &Ctx,
    q: &mut Tensor,
    num_heads: usize,
    rope: &RopeTable,
    batch: &PagedBatch,
) -> Result<(), KernelError> {
    const OP: &str = "rope_queries";
    let (t, p) = (batch.num_rows(), rope.rotary_dim());
    let head_width = query_width(OP, q, num_heads, p)?;
    let dtype = if q.dtype() == DType::F32 { DType::F32 } else { DType::BF16 };
    let width = num_heads * head_width;
    check(OP, "q", q, &[t, width], dtype)?;
    rope.check(OP, batch.positions())?;
    ctx.record(|| {
        let elements = t * num_heads * p;
        let bytes = 2 * elements * dtype.size_bytes();
        OpCall::compute(OP, &[("T", t), ("H", num_heads), ("P", p)], 3 * elements as u64, bytes as u64)
    });
    if ctx.is_meta() {
        return Ok(());
    }
    let base = Shared(q.bytes_mut().as_mut_ptr());
    ctx.pool().run(t.div_ceil(ROWS), &|task| {
        let mut part = vec![0.0f32; p];
        for row in task.idx * ROWS..t.min((task.idx + 1) * ROWS) {
            let position = batch.positions()[row];
            for head in 0..num_heads {
                let at = row * width + (head + 1) * head_width - p;
                // SAFETY: row < T and head < H, so the columns are inside; rows belong to one task each.
                unsafe {
                    if dtype == DType::F32 {
                        rope.rotate(std::slice::from_raw_parts_mut(base.ptr().cast::<f32>().add(at), p), position);
                    } else {
                        let x = std::slice::from_raw_parts_mut(base.ptr().cast::<bf16>().add(at), p);
                        widen(x, &mut part);
                        rope.rotate(&mut part, position);
                        narrow(&part, x);
                    }
                }
            }
        }
    });
    Ok(())
}

fn widen(from: &[bf16], to: &mut [f32]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = from.to_f32());
}

fn narrow(from: &[f32], to: &mut [bf16]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = bf16::from_f32(*from));
}
