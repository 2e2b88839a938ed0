//! A grouped MLP: `y [R, D] = act(x [R, D] · gate_upᵀ) · downᵀ`, each row by its own expert.
//!
//! Rows are sorted by expert; expert `e` has rows `offsets[e]..offsets[e + 1]`, possibly none. A dense MLP and shared
//! experts are this op with one expert. x and the hidden values (rounded once, after the activation, which is computed in
//! F32) are in the compute type of the weights. y is F32 or BF16: where experts are cut by their hidden width, y is one
//! rank's part of a sum, and parts are asked for in F32, so that only the sum is rounded. The order of the sums is that of
//! [`matrix`](crate::matrix).
//!
//! The activation is the sink of the first product: gate and up are never stored.

pub mod activation;
pub mod reference;
#[cfg(test)]
mod tests;
mod weights;

use half::bf16;
use moesaic_device::{Amount, Ctx, Isa, OpCall, Stream, Tensor};
use moesaic_spec::DType;

use crate::KernelError;
use crate::contract::{check, require};
use crate::linear::check_out;
use crate::matrix::product::{self, Columns, Done, Job, Operand, Out, OutRow, padded};
use crate::matrix::{PackedMatrix, TILE_N, round_bf16};

pub use moesaic_spec::Activation;
pub use weights::{ExpertWeight, ExpertWeights};

use activation::{gelu_tanh, silu};

const OP: &str = "experts";

/// How many rows each expert has.
#[derive(Clone, Copy, Debug)]
pub enum RowsPerExpert<'a> {
    /// Expert `e` has rows `offsets[e]..offsets[e + 1]`: `E + 1` ascending numbers from 0 to `R`.
    Known(&'a [usize]),
    /// Not decided yet (on `Meta`): each of `num_tokens` tokens is sent to `top_k` different ones of a layer's experts,
    /// uniformly. Of these the op has E; `R` is its bound, `num_tokens * min(top_k, E)`.
    Uniform {
        /// Tokens that may come.
        num_tokens: usize,
        /// Experts of a token.
        top_k: usize,
        /// Experts of the layer, wherever they are.
        num_experts: usize,
    },
}

/// The grouped MLP, `y` as `out_dtype`.
pub fn experts(
    ctx: &Ctx,
    x: &Tensor,
    rows: RowsPerExpert,
    w: &ExpertWeights,
    out_dtype: DType,
) -> Result<Tensor, KernelError> {
    let (d, f, dtype) = w.shape()?;
    let (num_experts, r) = (w.experts.len(), x.dims().first().copied().unwrap_or(0));
    let compute = dtype.compute();
    check(OP, "x", x, &[r, d], compute)?;
    check_out(OP, out_dtype)?;
    check_rows(ctx, rows, num_experts, r)?;
    ctx.record(|| call(rows, w, r, out_dtype));
    let mut y = ctx.empty(&[r, d], out_dtype)?;
    let h_width = padded(f, compute);
    let mut h = ctx.empty(&[r, h_width], compute)?;
    let copy = product::padded_copy(ctx, x.into(), 1, 0, d)?;
    let RowsPerExpert::Known(offsets) = rows else { return Ok(y) };
    if ctx.is_meta() || r == 0 {
        return Ok(y);
    }

    let active: Vec<usize> = (0..num_experts).filter(|&e| offsets[e] < offsets[e + 1]).collect();
    let x = match &copy {
        Some(copy) => Operand::new(copy, 0, copy.dims2().1, r),
        None => Operand::new(x, 0, d, r),
    };
    let hidden = Hidden { out: Out::new(&mut h), f, width: h_width, activation: w.activation };
    product::run(ctx, &jobs(w, &active, offsets, x, ExpertWeight::gate_up), &|done| {
        hidden.put(&done, offsets[active[done.job]])
    });
    let h = Operand::new(&h, 0, h_width, r);
    let out = Out::new(&mut y);
    product::run(ctx, &jobs(w, &active, offsets, h, ExpertWeight::down), &|done| {
        let first = offsets[active[done.job]] * d;
        // SAFETY: each expert has rows of its own.
        unsafe { product::store(&done, &out, Columns { stride: d, first, num: d }, None) };
    });
    Ok(y)
}

/// One product for each active expert.
fn jobs<'a>(
    w: &'a ExpertWeights,
    active: &[usize],
    offsets: &[usize],
    x: Operand<'a>,
    matrix: fn(&ExpertWeight) -> &PackedMatrix,
) -> Vec<Job<'a>> {
    active.iter().map(|&e| Job { x: x.slice(offsets[e]..offsets[e + 1]), w: matrix(&w.experts[e]) }).collect()
}

fn check_rows(ctx: &Ctx, rows: RowsPerExpert, num_experts: usize, r: usize) -> Result<(), KernelError> {
    match rows {
        RowsPerExpert::Known(offsets) => {
            let ok =
                offsets.len() == num_experts + 1 && offsets[0] == 0 && offsets[num_experts] == r && offsets.is_sorted();
            let expected = || format!("{} ascending from 0 to {r}", num_experts + 1);
            require(ok, OP, "offsets", expected, || format!("{offsets:?}"))
        }
        RowsPerExpert::Uniform { num_tokens, top_k, num_experts: all } => {
            require(ctx.is_meta(), OP, "rows of each expert", || "known".into(), || "uniform".into())?;
            let ok = num_experts <= all && top_k <= all && num_tokens.checked_mul(top_k.min(num_experts)) == Some(r);
            let expected = || format!("{r} rows, at least {num_experts} experts, at most all of them a token");
            let got = || format!("{num_tokens} and {top_k} of {all}");
            require(ok, OP, "tokens and experts a token", expected, got)
        }
    }
}

/// Weights of experts that have rows are read once; x, the hidden values (written and read) and y.
fn call(rows: RowsPerExpert, w: &ExpertWeights, r: usize, out_dtype: DType) -> OpCall {
    let num_experts = w.experts.len();
    let (d, f, compute) = (w.experts[0].d(), w.experts[0].f(), w.experts[0].dtype().compute());
    let (active, rows) = match rows {
        RowsPerExpert::Known(offsets) => {
            let active = offsets.windows(2).filter(|pair| pair[0] < pair[1]).count();
            (Amount::exact(active as u64), Amount::exact(r as u64))
        }
        RowsPerExpert::Uniform { num_tokens, top_k, num_experts: all } => {
            let share = top_k as f64 / all as f64;
            let expected = num_experts as f64 * (1.0 - (1.0 - share).powi(num_tokens.min(i32::MAX as usize) as i32));
            let active = Amount { expected, bound: num_experts.min(num_tokens.saturating_mul(top_k)) as u64 };
            let expected = (num_tokens * top_k) as f64 * num_experts as f64 / all as f64;
            (active, Amount { expected, bound: r as u64 })
        }
    };
    let weight = w.experts[0].size_bytes().0;
    let row_bytes = ((d + 2 * f) * compute.size_bytes() + d * out_dtype.size_bytes()) as u64;
    let matrices = if w.activation == Activation::SwiGlu { 3 } else { 2 };
    let row_flops = 2 * matrices * (d * f) as u64;
    OpCall {
        op: OP,
        dims: vec![
            ("R", r as u64),
            ("D", d as u64),
            ("F", f as u64),
            ("E", num_experts as u64),
            ("active", active.bound),
        ],
        flops: Amount { expected: rows.expected * row_flops as f64, bound: rows.bound * row_flops },
        bytes: Amount {
            expected: active.expected * weight as f64 + rows.expected * row_bytes as f64,
            bound: active.bound * weight + rows.bound * row_bytes,
        },
        stream: Stream::Compute,
        peer: None,
    }
}

/// The sink of the first product.
struct Hidden<'a> {
    out: Out<'a>,
    f: usize,
    /// `f` padded to what the second product reads.
    width: usize,
    activation: Activation,
}

impl Hidden<'_> {
    /// Activates a block of the expert whose rows begin at `first_row`.
    fn put(&self, done: &Done, first_row: usize) {
        #[cfg(target_arch = "x86_64")]
        match done.isa {
            // SAFETY: the machine has AVX-512.
            Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => return unsafe { self.put_avx512(done, first_row) },
            // SAFETY: the machine has AVX2 and FMA.
            Isa::Avx2 => return unsafe { self.put_avx2(done, first_row) },
            Isa::Portable => {}
        }
        self.put_any(done, first_row);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
    fn put_avx512(&self, done: &Done, first_row: usize) {
        self.put_any(done, first_row);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn put_avx2(&self, done: &Done, first_row: usize) {
        self.put_any(done, first_row);
    }

    #[inline(always)]
    fn put_any(&self, done: &Done, first_row: usize) {
        let (step, per_value) = match self.activation {
            Activation::SwiGlu => (2 * TILE_N, 2),
            Activation::Gelu => (TILE_N, 1),
        };
        let first = done.panels.start * TILE_N / per_value;
        // Columns beyond f: the block that has the last column zeroes them.
        let len = (done.panels.len() * TILE_N / per_value).min(self.f - first);
        let end = if first + len == self.f { self.width } else { first + len };
        for (row, c) in done.rows.clone().zip(done.c.chunks_exact(done.ldc)) {
            // SAFETY: experts have rows of their own, blocks of one expert are disjoint, and only the last has the padding.
            let mut out = unsafe { self.out.row((first_row + row) * self.width + first, end - first) };
            match &mut out {
                OutRow::F32(out) => out[len..].fill(0.0),
                OutRow::BF16(out) => out[len..].fill(bf16::ZERO),
            }
            for (i, c) in c.chunks_exact(step).enumerate() {
                let at = i * TILE_N..len.min((i + 1) * TILE_N);
                let values = values(self.activation, c);
                match &mut out {
                    OutRow::F32(out) => out[at.clone()].copy_from_slice(&values[..at.len()]),
                    OutRow::BF16(out) => {
                        let mut rounded = [bf16::ZERO; TILE_N];
                        for i in 0..TILE_N {
                            rounded[i] = bf16::from_bits(round_bf16(values[i]));
                        }
                        out[at.clone()].copy_from_slice(&rounded[..at.len()]);
                    }
                }
            }
        }
    }
}

/// Sixteen values from one panel, or from a panel of gates and one of ups.
#[inline(always)]
fn values(activation: Activation, c: &[f32]) -> [f32; TILE_N] {
    let (panels, _) = c.as_chunks::<TILE_N>();
    let mut values = [0.0; TILE_N];
    match activation {
        Activation::SwiGlu => {
            let (gate, up) = (&panels[0], &panels[1]);
            for i in 0..TILE_N {
                values[i] = silu(gate[i]) * up[i];
            }
        }
        Activation::Gelu => {
            for i in 0..TILE_N {
                values[i] = gelu_tanh(panels[0][i]);
            }
        }
    }
    values
}
