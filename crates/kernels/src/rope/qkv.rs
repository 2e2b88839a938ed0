//! What happens to fused queries, keys and values between their projection and attention.

use half::bf16;
use moesaic_device::{Ctx, Isa, OpCall, Tensor};
use moesaic_spec::DType;

use super::RopeTable;
use crate::contract::{KernelError, check, require};
use crate::elementwise::sum_by;
use crate::paged::{PagedBatch, PagedKv, Shared};

const OP: &str = "rope_and_store";

/// Columns of a fused `qkv` matrix: H query heads, G key heads, G value heads, each C wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QkvLayout {
    /// H
    pub num_heads: usize,
    /// G, divides H.
    pub num_kv_heads: usize,
    /// C
    pub head_dim: usize,
}

impl QkvLayout {
    /// All columns.
    pub fn width(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }

    /// Refuses head counts that do not divide.
    pub(crate) fn check(&self, op: &'static str) -> Result<(), KernelError> {
        let &QkvLayout { num_heads, num_kv_heads, head_dim } = self;
        let valid = num_kv_heads > 0 && head_dim > 0 && num_heads > 0 && num_heads.is_multiple_of(num_kv_heads);
        let expected = || "positive sizes, num_heads a multiple of num_kv_heads".into();
        require(valid, op, "layout", expected, || format!("{self:?}"))
    }
}

/// RMSNorm weights for queries and keys, F32 or BF16.
#[derive(Clone, Copy)]
pub enum QkNormWeights<'a> {
    /// No norm.
    None,
    /// Each head apart; both `[C]`.
    PerHead {
        /// For queries.
        query: &'a Tensor,
        /// For keys.
        key: &'a Tensor,
    },
    /// Over all heads at once.
    FullWidth {
        /// `[H * C]`
        query: &'a Tensor,
        /// `[G * C]`
        key: &'a Tensor,
    },
    /// Over all heads of a model whose heads are on several ranks. With the sums and widths of these heads alone it is
    /// `FullWidth` but for rounding.
    FullWidthOf {
        /// `[H * C]`: the weights of these query heads.
        query: &'a Tensor,
        /// `[G * C]`: the weights of these key heads.
        key: &'a Tensor,
        /// F32 `[T, 2]`: for each row the sums of squares over all query columns of the model and over all its key columns
        /// (the total of [`qk_sums`](super::qk_sums)).
        sums: &'a Tensor,
        /// Query columns of the model.
        query_width: usize,
        /// Key columns of the model.
        key_width: usize,
    },
}

/// What [`rope_and_store`] does on the way.
pub struct QkvPost<'a> {
    /// Columns.
    pub layout: QkvLayout,
    /// Norm on queries and keys.
    pub norm: QkNormWeights<'a>,
    /// Added to the mean square.
    pub eps: f32,
    /// Queries, keys and values are clamped to ±this, after the norm (as OLMoE does).
    pub clip: Option<f32>,
    /// Rotation of queries and keys; its width is at most C.
    pub rope: &'a RopeTable,
}

/// In place on `qkv` `[T, (H + 2G) * C]` (F32 or BF16): norm on queries and keys, clamp, rotation by each row's position;
/// then keys and values go to `kv` at the batch's slots. F32 inside, rounded once.
///
/// Dims T, H, G, C. FLOPs `T * C * (4H + 4G)` for the norm if any and `T * 3 * rotary_dim * (H + G)` for the rotation. Bytes:
/// `qkv` read and written, the entries written.
pub fn rope_and_store(
    ctx: &Ctx,
    qkv: &mut Tensor,
    post: &QkvPost,
    kv: &mut PagedKv,
    batch: &PagedBatch,
) -> Result<(), KernelError> {
    let QkvLayout { num_heads: h, num_kv_heads: g, head_dim: c } = post.layout;
    post.layout.check(OP)?;
    let (t, width, dtype) = (batch.num_rows(), post.layout.width(), kv.shape().dtype);
    check(OP, "qkv", qkv, &[t, width], dtype)?;
    let (heads, dim) = (kv.shape().num_kv_heads, kv.shape().head_dim);
    require((heads, dim) == (g, c), OP, "kv", || format!("{g} heads of {c}"), || format!("{heads} heads of {dim}"))?;
    let rotary = post.rope.rotary_dim();
    require(rotary <= c, OP, "rotary_dim", || format!("at most {c}"), || rotary.to_string())?;
    post.rope.check(OP, batch.positions())?;
    kv.check(OP, batch)?;
    let norm = Norm::new(post, t)?;
    ctx.record(|| {
        let norm_flops = if norm.width == Width::None { 0 } else { t * c * 4 * (h + g) };
        let flops = norm_flops + t * 3 * rotary * (h + g);
        let bytes = 2 * qkv.size_bytes() + t * 2 * g * c * dtype.size_bytes();
        OpCall::compute(OP, &[("T", t), ("H", h), ("G", g), ("C", c)], flops as u64, bytes as u64)
    });
    if ctx.is_meta() {
        return Ok(());
    }
    let norm = norm.read();

    // Tasks of at most so many rows: neighbours share cache lines of the cache's tiles.
    const ROWS: usize = 16;
    let base = Shared(qkv.bytes_mut().as_mut_ptr());
    let writer = kv.writer();
    let isa = ctx.isa();
    ctx.pool().run(t.div_ceil(ROWS), &|task| {
        let mut row_f32 = vec![0.0f32; width];
        let rows = task.idx * ROWS..t.min((task.idx + 1) * ROWS);
        for row in rows.clone() {
            let (position, slot) = (batch.positions()[row], batch.slots()[row]);
            let head = |i: usize| (h + i) * c..(h + i + 1) * c;
            // SAFETY: row < T, so its elements are inside the matrix, and they belong to this task alone. The batch was
            // checked against the memory, its slots differ, so no other task touches these entries. The row before is one
            // of this task where it is read.
            unsafe {
                if dtype == DType::F32 {
                    let x = std::slice::from_raw_parts_mut(base.ptr().cast::<f32>().add(row * width), width);
                    transform(isa, x, post, &norm, (row, position));
                    for i in 0..g {
                        writer.store_f32(slot, i, &x[head(i)], &x[head(g + i)]);
                    }
                } else {
                    let x = std::slice::from_raw_parts_mut(base.ptr().cast::<bf16>().add(row * width), width);
                    widen(isa, x, &mut row_f32);
                    transform(isa, &mut row_f32, post, &norm, (row, position));
                    narrow(isa, &row_f32, x);
                    // Values of two neighbouring tokens lie side by side: they are stored with the second one.
                    let paired = |row: usize, next: usize| {
                        let slots = batch.slots();
                        rows.contains(&row)
                            && rows.contains(&next)
                            && slots[row].is_multiple_of(2)
                            && slots[next] == slots[row] + 1
                    };
                    for i in 0..g {
                        if row > 0 && paired(row - 1, row) {
                            let before = base.ptr().cast::<bf16>().add((row - 1) * width + head(g + i).start);
                            let before = std::slice::from_raw_parts(before, c);
                            writer.store_key_bf16(slot, i, &x[head(i)]);
                            writer.store_value_pair_bf16(slot - 1, i, [before, &x[head(g + i)]]);
                        } else if paired(row, row + 1) {
                            writer.store_key_bf16(slot, i, &x[head(i)]);
                        } else {
                            writer.store_bf16(slot, i, &x[head(i)], &x[head(g + i)]);
                        }
                    }
                }
            }
        }
    });
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Width {
    None,
    PerHead,
    Full,
    /// Of the whole model; the sums are given.
    FullOf,
}

/// Checked references to the norm's weights.
struct Norm<'a> {
    width: Width,
    tensors: Option<(&'a Tensor, &'a Tensor)>,
    /// Sums of squares, and the model's query and key columns.
    totals: Option<(&'a Tensor, [usize; 2])>,
}

/// The weights as F32.
struct NormValues<'a> {
    width: Width,
    query: Vec<f32>,
    key: Vec<f32>,
    totals: Option<(&'a [f32], [usize; 2])>,
}

impl<'a> Norm<'a> {
    fn new(post: &QkvPost<'a>, t: usize) -> Result<Norm<'a>, KernelError> {
        let QkvLayout { num_heads: h, num_kv_heads: g, head_dim: c } = post.layout;
        let full = (h * c, g * c);
        let mut totals = None;
        let (width, tensors, dims) = match post.norm {
            QkNormWeights::None => (Width::None, None, (0, 0)),
            QkNormWeights::PerHead { query, key } => (Width::PerHead, Some((query, key)), (c, c)),
            QkNormWeights::FullWidth { query, key } => (Width::Full, Some((query, key)), full),
            QkNormWeights::FullWidthOf { query, key, sums, query_width, key_width } => {
                check(OP, "sums of squares", sums, &[t, 2], DType::F32)?;
                let positive = query_width > 0 && key_width > 0;
                let got = || format!("{query_width} and {key_width}");
                require(positive, OP, "query and key width", || "at least 1 each".into(), got)?;
                totals = Some((sums, [query_width, key_width]));
                (Width::FullOf, Some((query, key)), full)
            }
        };
        if let Some((query, key)) = tensors {
            check_weight(OP, "query norm weight", query, dims.0)?;
            check_weight(OP, "key norm weight", key, dims.1)?;
        }
        Ok(Norm { width, tensors, totals })
    }

    fn read(&self) -> NormValues<'a> {
        let (query, key) = self.tensors.map_or((vec![], vec![]), |(q, k)| (weight_f32(q), weight_f32(k)));
        let totals = self.totals.map(|(sums, widths)| (sums.f32(), widths));
        NormValues { width: self.width, query, key, totals }
    }
}

impl NormValues<'_> {
    /// Mean squares of the queries and keys of a row, where they are given.
    #[inline(always)]
    fn means(&self, row: usize) -> [f32; 2] {
        let mean = |(sums, widths): (&[f32], [usize; 2])| [0, 1].map(|i| sums[2 * row + i] / widths[i] as f32);
        self.totals.map_or([0.0; 2], mean)
    }
}

/// A vector of F32 or BF16.
pub(crate) fn check_weight(op: &'static str, what: &'static str, w: &Tensor, len: usize) -> Result<(), KernelError> {
    let dtype = if w.dtype() == DType::BF16 { DType::BF16 } else { DType::F32 };
    check(op, what, w, &[len], dtype)
}

/// Its values.
pub(crate) fn weight_f32(w: &Tensor) -> Vec<f32> {
    match w.dtype() {
        DType::BF16 => w.bf16().iter().map(|x| x.to_f32()).collect(),
        _ => w.f32().to_vec(),
    }
}

/// One row's norm, clamp and rotation.
#[inline(always)]
fn transform_row(x: &mut [f32], post: &QkvPost, norm: &NormValues, (row, position): (usize, u32)) {
    let QkvLayout { num_heads: h, num_kv_heads: g, head_dim: c } = post.layout;
    let (queries, rest) = x.split_at_mut(h * c);
    let (keys, _) = rest.split_at_mut(g * c);
    let means = norm.means(row);
    for (part, weight, mean) in [(queries, &norm.query, means[0]), (keys, &norm.key, means[1])] {
        match norm.width {
            Width::None => {}
            Width::PerHead => part.chunks_exact_mut(c).for_each(|head| rms_norm(head, weight, post.eps)),
            Width::Full => rms_norm(part, weight, post.eps),
            Width::FullOf => scale(part, weight, mean, post.eps),
        }
    }
    if let Some(limit) = post.clip {
        x.iter_mut().for_each(|x| *x = x.clamp(-limit, limit));
    }
    for head in x[..(h + g) * c].chunks_exact_mut(c) {
        post.rope.rotate(head, position);
    }
}

/// `x / sqrt(mean(x²) + eps) * weight`, in place.
#[inline(always)]
pub(crate) fn rms_norm(x: &mut [f32], weight: &[f32], eps: f32) {
    let mean = sum_by(x, |x| x * x) / x.len() as f32;
    scale(x, weight, mean, eps);
}

/// `x / sqrt(mean + eps) * weight`, in place.
#[inline(always)]
fn scale(x: &mut [f32], weight: &[f32], mean: f32, eps: f32) {
    let scale = 1.0 / (mean + eps).sqrt();
    for (x, w) in x.iter_mut().zip(weight) {
        *x = *x * scale * w;
    }
}

/// BF16 to F32.
#[inline(always)]
fn widen_row(from: &[bf16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = f32::from_bits((from.to_bits() as u32) << 16);
    }
}

/// F32 to BF16, to nearest even.
#[inline(always)]
fn narrow_row(from: &[f32], to: &mut [bf16]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = bf16::from_bits((crate::math::round_bf16(*from).to_bits() >> 16) as u16);
    }
}

/// The same function compiled for wider vectors; the arithmetic, and so every bit, is the same.
macro_rules! widened {
    ($(#[$doc:meta])* $name:ident, $wide:ident, $body:ident, ($($arg:ident: $ty:ty),*)) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        fn $wide($($arg: $ty),*) {
            $body($($arg),*)
        }

        $(#[$doc])*
        fn $name(isa: Isa, $($arg: $ty),*) {
            #[cfg(target_arch = "x86_64")]
            if isa >= Isa::Avx512 {
                // SAFETY: the caller's context was made for a machine that has these instructions.
                return unsafe { $wide($($arg),*) };
            }
            let _ = isa;
            $body($($arg),*)
        }
    };
}

widened! {
    /// One row's norm, clamp and rotation.
    transform, transform_wide, transform_row, (x: &mut [f32], post: &QkvPost, norm: &NormValues, at: (usize, u32))
}
widened! {
    /// BF16 to F32.
    widen, widen_wide, widen_row, (from: &[bf16], to: &mut [f32])
}
widened! {
    /// F32 to BF16.
    narrow, narrow_wide, narrow_row, (from: &[f32], to: &mut [bf16])
}
