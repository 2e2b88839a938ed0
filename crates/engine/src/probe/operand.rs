//! What probes read: random rows, and weights and caches in many copies.

use moesaic_device::{Amount, Arena, Ctx, Pool, Tensor};
use moesaic_fit::random;
use moesaic_kernels::attention::attention;
use moesaic_kernels::combine::combine;
use moesaic_kernels::dispatch::{DispatchSource, Pairs, dispatch};
use moesaic_kernels::experts::{ExpertWeight, ExpertWeights, RowsPerExpert, experts};
use moesaic_kernels::linear::linear;
use moesaic_kernels::matrix::{PackedMatrix, SourceMatrix};
use moesaic_kernels::mla::mla_attention;
use moesaic_kernels::paged::{KvShape, LatentShape, PagedBatch, PagedKv, PagedLatent, PagedSeq};
use moesaic_kernels::rope::QkvLayout;
use moesaic_spec::DType;

use super::{Batch, Probe};
use crate::EngineError;

/// Tokens of a block of the cache, as engines have it unless told otherwise.
const BLOCK: usize = 32;
/// Rows that matrices are packed from at a time.
const SLAB_BYTES: usize = 16 << 20;
const SEED: u64 = 7;

/// Weights or a cache.
pub(super) enum Operand {
    Matrix(PackedMatrix),
    Experts(ExpertWeights),
    Kv(PagedKv),
    Latent(PagedLatent),
}

impl Operand {
    /// Memory for one copy.
    pub(super) fn empty(probe: &Probe, arena: &Arena) -> Result<Operand, EngineError> {
        Ok(match *probe {
            Probe::Linear { n, k, dtype, .. } => Operand::Matrix(PackedMatrix::empty(arena, n, k, dtype)?),
            Probe::Experts { hidden, intermediate, local, dtype, activation, .. } => {
                let expert = |_| ExpertWeight::empty(arena, hidden, intermediate, dtype, activation);
                let experts = (0..local).map(expert).collect::<Result<_, _>>()?;
                Operand::Experts(ExpertWeights { experts, activation })
            }
            Probe::Attention { batch, kv_heads, head_dim, dtype, .. } => {
                let num_blocks = batch.seqs * batch.blocks();
                let shape = KvShape { num_blocks, block_size: BLOCK, num_kv_heads: kv_heads, head_dim, dtype };
                Operand::Kv(PagedKv::new(arena, shape)?)
            }
            Probe::Mla { batch, latent, rope, dtype, .. } => {
                let num_blocks = batch.seqs * batch.blocks();
                let shape =
                    LatentShape { num_blocks, block_size: BLOCK, kv_lora_rank: latent, qk_rope_head_dim: rope, dtype };
                Operand::Latent(PagedLatent::new(arena, shape)?)
            }
        })
    }

    /// Copies with random content, each in memory of its own. The arena is new, with room for them.
    pub(super) fn random(
        probe: &Probe,
        arena: &Arena,
        pool: &Pool,
        copies: usize,
    ) -> Result<Vec<Operand>, EngineError> {
        match *probe {
            Probe::Attention { dtype, .. } | Probe::Mla { dtype, .. } => {
                // A cache has what was in its memory before.
                let num = arena.capacity().0 as usize / dtype.size_bytes();
                let mut all = Tensor::empty(arena, &[num], dtype)?;
                let pattern = random_bytes(SLAB_BYTES / dtype.size_bytes(), dtype);
                all.bytes_mut()
                    .chunks_mut(pattern.len())
                    .for_each(|chunk| chunk.copy_from_slice(&pattern[..chunk.len()]));
                drop(all);
                (0..copies).map(|_| Operand::empty(probe, arena)).collect()
            }
            Probe::Linear { n, k, dtype, .. } => {
                let rows = slab_rows(n, k, dtype);
                let source = random_bytes(rows * k, dtype);
                let copy = |_| {
                    let mut matrix = PackedMatrix::empty(arena, n, k, dtype)?;
                    for first in (0..n).step_by(rows) {
                        let rows = rows.min(n - first);
                        let bytes = &source[..rows * k * dtype.size_bytes()];
                        matrix.pack_rows(pool, first, &SourceMatrix::new(bytes, dtype, rows, k))?;
                    }
                    Ok(Operand::Matrix(matrix))
                };
                (0..copies).map(copy).collect()
            }
            Probe::Experts { hidden, intermediate, local, dtype, activation, .. } => {
                let source = random_bytes(hidden * intermediate, dtype);
                let (up, down) = (
                    SourceMatrix::new(&source, dtype, intermediate, hidden),
                    SourceMatrix::new(&source, dtype, hidden, intermediate),
                );
                let expert = |_| {
                    let mut expert = ExpertWeight::empty(arena, hidden, intermediate, dtype, activation)?;
                    if activation.matrices() == 3 {
                        expert.pack_gate(pool, &up)?;
                    }
                    expert.pack_up(pool, &up)?;
                    expert.pack_down(pool, &down)?;
                    Ok(expert)
                };
                let copy = |_| {
                    let experts = (0..local).map(expert).collect::<Result<_, EngineError>>()?;
                    Ok(Operand::Experts(ExpertWeights { experts, activation }))
                };
                (0..copies).map(copy).collect()
            }
        }
    }
}

/// Rows of a matrix that are packed from one piece of random numbers: whole tiles of it.
fn slab_rows(n: usize, k: usize, dtype: DType) -> usize {
    (SLAB_BYTES / (k * dtype.size_bytes()) / 128 * 128).clamp(128, n.max(128)).min(n)
}

/// Bytes that operands are made from.
pub(super) fn slab_bytes(probe: &Probe) -> u64 {
    let bytes = match *probe {
        Probe::Linear { n, k, dtype, .. } => slab_rows(n, k, dtype) * k * dtype.size_bytes(),
        Probe::Experts { hidden, intermediate, dtype, .. } => hidden * intermediate * dtype.size_bytes(),
        Probe::Attention { .. } | Probe::Mla { .. } => SLAB_BYTES,
    };
    bytes as u64
}

/// Numbers in (-1, 1), as many as asked for.
fn random_bytes(num: usize, dtype: DType) -> Vec<u8> {
    let numbers = (0..num as u64).map(|place| 2.0 * random::uniform(SEED, place) as f32 - 1.0);
    match dtype {
        DType::F32 => numbers.flat_map(f32::to_le_bytes).collect(),
        // The upper half of an F32 is a BF16, cut instead of rounded.
        DType::BF16 => numbers.flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect(),
        // Any sign and mantissa, exponents up to that of 1: no infinities, and sums stay small.
        DType::F8E4M3 => numbers.map(|x| (x * 127.0) as i8 as u8 & 0xbf).collect(),
        other => unreachable!("no operand is {other}"),
    }
}

fn random_tensor(ctx: &Ctx, dims: &[usize], dtype: DType) -> Result<Tensor, EngineError> {
    let mut tensor = ctx.empty(dims, dtype)?;
    if !ctx.is_meta() {
        let bytes = random_bytes(tensor.num_elements(), dtype);
        tensor.bytes_mut().copy_from_slice(&bytes);
    }
    Ok(tensor)
}

/// Rows, and where they go.
pub(super) struct Inputs {
    x: Tensor,
    rows: Rows,
}

enum Rows {
    All,
    Routed {
        /// Row, expert of this rank.
        pairs: Vec<(u32, u32)>,
        /// `[rows, top_k]`: places of the answers; -1 where the expert is elsewhere.
        row_of: Tensor,
        weights: Tensor,
    },
    Paged(PagedBatch),
    Latent(PagedBatch, Tensor),
}

impl Batch {
    /// Blocks of a sequence.
    fn blocks(&self) -> usize {
        self.context.div_ceil(BLOCK)
    }

    fn paged(&self) -> Result<PagedBatch, EngineError> {
        let Batch { seqs, new_tokens, context } = *self;
        // Blocks of a sequence are not neighbours, as in a cache that has been in use.
        let block = |seq: usize, block: usize| (block * seqs + seq) as u32;
        let seq = |seq: usize| PagedSeq {
            row0: seq * new_tokens,
            num_rows: new_tokens,
            context_len: context,
            block_table: (0..self.blocks()).map(|i| block(seq, i)).collect(),
        };
        Ok(PagedBatch::new(BLOCK, (0..seqs).map(seq).collect())?)
    }
}

impl Inputs {
    /// Inputs in the context's arena. Another `routing` of [`Probe::routings`] has the same rows for other experts.
    pub(super) fn new(probe: &Probe, ctx: &Ctx, routing: usize) -> Result<Inputs, EngineError> {
        Ok(match *probe {
            Probe::Linear { rows, k, dtype, .. } => {
                Inputs { x: random_tensor(ctx, &[rows, k], dtype.compute())?, rows: Rows::All }
            }
            Probe::Experts { tokens, hidden, top_k, experts, local, dtype, .. } => {
                let chosen: Vec<Vec<u32>> =
                    (0..tokens).map(|token| choose(token, top_k, experts)).map(|it| on_rank(it, local)).collect();
                // Tokens of which no expert is here do not come here.
                let mut chosen: Vec<Vec<u32>> = chosen.into_iter().filter(|experts| !experts.is_empty()).collect();
                if chosen.is_empty() {
                    // A rank without rows has nothing to measure.
                    chosen.push(vec![0]);
                }
                let shift = routing * local / probe.routings();
                chosen.iter_mut().flatten().for_each(|expert| *expert = (*expert + shift as u32) % local as u32);
                routed(ctx, &chosen, hidden, top_k, local, dtype.compute())?
            }
            Probe::Attention { batch, heads, kv_heads, head_dim, dtype } => {
                let paged = batch.paged()?;
                let x = random_tensor(ctx, &[paged.num_rows(), (heads + 2 * kv_heads) * head_dim], dtype)?;
                Inputs { x, rows: Rows::Paged(paged) }
            }
            Probe::Mla { batch, heads, latent, rope, dtype } => {
                let paged = batch.paged()?;
                let x = random_tensor(ctx, &[paged.num_rows(), heads * latent], dtype)?;
                let rotary = random_tensor(ctx, &[paged.num_rows(), heads * rope], dtype)?;
                Inputs { x, rows: Rows::Latent(paged, rotary) }
            }
        })
    }

    /// One call.
    pub(super) fn run(&self, probe: &Probe, ctx: &Ctx, operand: &Operand) -> Result<(), EngineError> {
        match (*probe, operand, &self.rows) {
            (Probe::Linear { dtype, .. }, Operand::Matrix(w), Rows::All) => {
                linear(ctx, &self.x, w, dtype.compute())?;
            }
            (
                Probe::Experts { top_k, local, cut, dtype, .. },
                Operand::Experts(w),
                Rows::Routed { pairs, row_of, weights },
            ) => {
                let out = if cut { DType::F32 } else { dtype.compute() };
                if ctx.is_meta() {
                    // The bound of the same pairs: every row has all its experts here, as far as there are so many.
                    let tokens = self.x.dims2().0;
                    let rows = tokens * top_k.min(local);
                    let source = DispatchSource { x: &self.x, pairs: Pairs::Counted(Amount::exact(rows as u64)) };
                    let x = dispatch(ctx, &[source], local)?.x;
                    let rows = RowsPerExpert::Uniform { num_tokens: tokens, top_k, num_experts: local.max(top_k) };
                    let y = experts(ctx, &x, rows, w, out)?;
                    combine(ctx, &[&y], row_of, weights, None)?;
                    return Ok(());
                }
                let source = DispatchSource { x: &self.x, pairs: Pairs::Known(pairs) };
                let sorted = dispatch(ctx, &[source], local)?;
                let y = experts(ctx, &sorted.x, RowsPerExpert::Known(&sorted.offsets), w, out)?;
                combine(ctx, &[&y], row_of, weights, None)?;
            }
            (Probe::Attention { heads, kv_heads, head_dim, .. }, Operand::Kv(kv), Rows::Paged(batch)) => {
                let layout = QkvLayout { num_heads: heads, num_kv_heads: kv_heads, head_dim };
                attention(ctx, &self.x, layout, kv, batch, scale(head_dim), None)?;
            }
            (Probe::Mla { heads, latent, rope, .. }, Operand::Latent(cache), Rows::Latent(batch, rotary)) => {
                mla_attention(ctx, &self.x, rotary, heads, cache, batch, scale(latent + rope))?;
            }
            _ => unreachable!("operands and inputs are made for the same probe"),
        }
        Ok(())
    }
}

fn scale(width: usize) -> f32 {
    1.0 / (width as f32).sqrt()
}

/// Different experts of one token, all equally likely.
fn choose(token: usize, top_k: usize, experts: usize) -> Vec<u32> {
    let mut left: Vec<u32> = (0..experts as u32).collect();
    let draw = |place: usize| random::uniform(SEED + 1, (token * top_k + place) as u64);
    (0..top_k).map(|place| left.swap_remove((draw(place) * left.len() as f64) as usize)).collect()
}

/// Those that are on this rank: the first `local`.
fn on_rank(experts: Vec<u32>, local: usize) -> Vec<u32> {
    experts.into_iter().filter(|&expert| (expert as usize) < local).collect()
}

/// Rows for the experts that each has chosen.
fn routed(
    ctx: &Ctx,
    chosen: &[Vec<u32>],
    hidden: usize,
    top_k: usize,
    local: usize,
    dtype: DType,
) -> Result<Inputs, EngineError> {
    let x = random_tensor(ctx, &[chosen.len(), hidden], dtype)?;
    let mut row_of = ctx.empty(&[chosen.len(), top_k], DType::I32)?;
    let mut weights = ctx.empty(&[chosen.len(), top_k], DType::F32)?;
    let of_row = |(row, experts): (usize, &Vec<u32>)| experts.iter().map(move |&expert| (row as u32, expert)).collect();
    let pairs: Vec<Vec<(u32, u32)>> = chosen.iter().enumerate().map(of_row).collect();
    let pairs: Vec<(u32, u32)> = pairs.into_iter().flatten().collect();
    if !ctx.is_meta() {
        // As dispatch sorts: by expert, then in order.
        let mut next = vec![0; local];
        for &(_, expert) in &pairs {
            next[expert as usize] += 1;
        }
        let mut start = 0;
        next.iter_mut().for_each(|count| start += std::mem::replace(count, start));
        row_of.i32_mut().fill(-1);
        weights.f32_mut().fill(1.0 / top_k as f32);
        for (experts, places) in chosen.iter().zip(row_of.i32_mut().chunks_mut(top_k)) {
            for (&expert, place) in experts.iter().zip(places) {
                *place = next[expert as usize];
                next[expert as usize] += 1;
            }
        }
    }
    Ok(Inputs { x, rows: Rows::Routed { pairs, row_of, weights } })
}
