//! Compute ops as GPUs' libraries know them: what is measured, and what is priced.

use moesaic_spec::Gpu;
use serde::{Deserialize, Serialize};

/// What weights, or keys and values, are held in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// 16-bit floats of either kind.
    Bf16,
    /// 8-bit floats, one factor for a whole tensor.
    Fp8,
    /// 8-bit floats, one factor for a block of 128.
    Fp8Block,
    /// 4-bit floats, one factor for 16 or 32.
    F4,
    /// 4-bit integers that are multiplied in 16 bits.
    Int4,
}

impl Precision {
    /// Bytes of a number, its share of the factors included.
    pub fn bytes(self) -> f64 {
        match self {
            Precision::F32 => 4.0,
            Precision::Bf16 => 2.0,
            Precision::Fp8 => 1.0,
            Precision::Fp8Block => 1.0 + 4.0 / 16384.0,
            Precision::F4 => 0.5 + 1.0 / 32.0,
            Precision::Int4 => 0.5 + 2.0 / 64.0,
        }
    }

    /// Operations per second of a GPU at most.
    pub fn peak(self, gpu: &Gpu) -> f64 {
        match self {
            Precision::F32 => gpu.peak_flops.f32,
            Precision::Bf16 | Precision::Int4 => gpu.peak_flops.bf16,
            // Without units for 4 bits, 4-bit floats are widened to 16.
            Precision::F4 => gpu.peak_flops.bf16,
            Precision::Fp8 | Precision::Fp8Block => gpu.peak_flops.f8,
        }
    }
}

/// One op. Rows are means, so they may be fractions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    /// `[m, k] · [k, n]`.
    Gemm {
        /// Rows.
        m: f64,
        /// Columns.
        n: f64,
        /// Inner width.
        k: f64,
        /// Type of the weights.
        weights: Precision,
    },
    /// Causal attention of prompts.
    AttentionPrefill {
        /// Prompts.
        seqs: f64,
        /// Tokens of each that are computed.
        new_tokens: f64,
        /// Tokens that the last of them sees.
        context: f64,
        /// Query heads.
        heads: u64,
        /// Key and value heads.
        kv_heads: u64,
        /// Width of a head.
        head_dim: u64,
        /// Type of keys and values.
        kv: Precision,
    },
    /// Attention of one new token of each sequence.
    AttentionDecode {
        /// Sequences.
        seqs: f64,
        /// Tokens that each sees.
        context: f64,
        /// Query heads.
        heads: u64,
        /// Key and value heads.
        kv_heads: u64,
        /// Width of a head.
        head_dim: u64,
        /// Type of keys and values.
        kv: Precision,
    },
    /// Causal multi-head latent attention of prompts, keys and values unfolded.
    MlaPrefill {
        /// Prompts.
        seqs: f64,
        /// Tokens of each that are computed.
        new_tokens: f64,
        /// Tokens that the last of them sees.
        context: f64,
        /// Heads.
        heads: u64,
        /// Width of the latent.
        latent: u64,
        /// Width of the rotary key.
        rope: u64,
        /// Type of the cache.
        kv: Precision,
    },
    /// Multi-head latent attention of one new token of each sequence, over the latent itself.
    MlaDecode {
        /// Sequences.
        seqs: f64,
        /// Tokens that each sees.
        context: f64,
        /// Heads.
        heads: u64,
        /// Width of the latent.
        latent: u64,
        /// Width of the rotary key.
        rope: u64,
        /// Type of the cache.
        kv: Precision,
    },
    /// The routed experts of one layer on one of `ep` ranks: dispatch inside the rank, all products, the weighted sum.
    Experts {
        /// Tokens of all ranks together.
        tokens: f64,
        /// Width of a row.
        hidden: f64,
        /// Hidden width of a whole expert.
        intermediate: f64,
        /// Experts of a token.
        top_k: f64,
        /// Experts of the layer.
        experts: f64,
        /// Parts that the hidden width is cut into.
        tp: f64,
        /// Ranks that whole experts are spread over.
        ep: f64,
        /// Type of the weights.
        weights: Precision,
        /// Matrices of an expert: 3 with a gate, 2 without.
        matrices: u64,
        /// Exponent of the power law that loads follow; 0 is even.
        skew: f64,
    },
    /// Anything that only moves bytes.
    Stream {
        /// Operations.
        flops: f64,
        /// Bytes.
        bytes: f64,
        /// Type that it is computed in.
        precision: Precision,
    },
}

impl Op {
    /// Floating-point operations; a multiply-add is two.
    pub fn flops(&self) -> f64 {
        match *self {
            Op::Gemm { m, n, k, .. } => 2.0 * m * n * k,
            Op::AttentionPrefill { seqs, new_tokens, context, heads, head_dim, .. } => {
                4.0 * seqs * pairs(new_tokens, context) * (heads * head_dim) as f64
            }
            Op::AttentionDecode { seqs, context, heads, head_dim, .. } => {
                4.0 * seqs * context * (heads * head_dim) as f64
            }
            Op::MlaPrefill { seqs, new_tokens, context, heads, latent, rope, .. } => {
                let (nope, value) = (latent as f64 / 4.0, latent as f64 / 4.0);
                2.0 * seqs * pairs(new_tokens, context) * heads as f64 * (nope + rope as f64 + value)
            }
            Op::MlaDecode { seqs, context, heads, latent, rope, .. } => {
                2.0 * seqs * context * heads as f64 * (2 * latent + rope) as f64
            }
            Op::Experts { tokens, hidden, intermediate, top_k, tp, ep, matrices, .. } => {
                2.0 * tokens * top_k / ep * matrices as f64 * hidden * intermediate / tp
            }
            Op::Stream { flops, .. } => flops,
        }
    }

    /// Bytes that must come from memory and go to it: weights and cache once, rows in and out.
    pub fn bytes(&self) -> f64 {
        match *self {
            Op::Gemm { m, n, k, weights } => n * k * weights.bytes() + m * (k + n) * ROW,
            Op::AttentionPrefill { seqs, new_tokens, context, heads, kv_heads, head_dim, kv } => {
                let keys = 2.0 * context * (kv_heads * head_dim) as f64 * kv.bytes();
                seqs * (keys + 2.0 * new_tokens * (heads * head_dim) as f64 * ROW)
            }
            Op::AttentionDecode { seqs, context, kv_heads, head_dim, kv, .. } => {
                2.0 * seqs * context * (kv_heads * head_dim) as f64 * kv.bytes()
            }
            Op::MlaPrefill { seqs, new_tokens, context, heads, latent, rope, .. } => {
                let width = (heads * (latent / 4)) as f64 * ROW;
                seqs * (2.0 * context * width + 2.0 * new_tokens * width + context * rope as f64 * ROW)
            }
            Op::MlaDecode { seqs, context, latent, rope, kv, .. } => {
                seqs * context * (latent + rope) as f64 * kv.bytes()
            }
            Op::Experts { tokens, hidden, intermediate, top_k, experts, tp, ep, weights, matrices, .. } => {
                let rows = tokens * top_k / ep;
                let each = matrices as f64 * hidden * intermediate / tp * weights.bytes();
                touched(tokens, top_k, experts) / ep * each + 2.0 * rows * hidden * ROW
            }
            Op::Stream { bytes, .. } => bytes,
        }
    }

    /// Type that decides the peak.
    pub fn precision(&self) -> Precision {
        match *self {
            Op::Gemm { weights, .. } | Op::Experts { weights, .. } => weights,
            Op::Stream { precision, .. } => precision,
            _ => Precision::Bf16,
        }
    }
}

/// Bytes of a number of a row.
const ROW: f64 = 2.0;

/// Pairs of queries and keys of a causal mask.
fn pairs(new_tokens: f64, context: f64) -> f64 {
    new_tokens * (context - new_tokens) + new_tokens * (new_tokens + 1.0) / 2.0
}

/// Experts that some token goes to, when all are equally likely: `E (1 - (1 - k/E)^n)`.
pub fn touched(tokens: f64, top_k: f64, experts: f64) -> f64 {
    experts * (1.0 - (1.0 - top_k / experts).max(0.0).powf(tokens))
}
