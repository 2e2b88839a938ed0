//! Compute ops as GPUs' libraries know them: what is measured, and what is priced.

use moesaic_spec::Gpu;
use serde::{Deserialize, Serialize};

use super::skew::{Dealt, Loads};

/// What weights, or keys and values, are held in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// 32-bit floats.
    F32,
    /// 16-bit floats of either kind.
    Bf16,
    /// 8-bit floats, one factor for a whole tensor.
    Fp8,
    /// 8-bit floats, one factor for a block of 128 by 128.
    Fp8Block,
    /// 4-bit floats, one factor for 32.
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
            Precision::Fp8 | Precision::Fp8Block => gpu.peak_flops.f8,
            Precision::F4 => gpu.peak_flops.f4,
        }
    }

    /// Least bytes of a number of a row that meets weights of this type: rows are in 16 bits, or narrowed already.
    fn row_bytes(self) -> f64 {
        match self {
            Precision::F32 => 4.0,
            Precision::Bf16 | Precision::Int4 => 2.0,
            Precision::Fp8 | Precision::Fp8Block => 1.0,
            Precision::F4 => 0.5,
        }
    }
}

/// Which layout of rows DeepEP's kernels gave the experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Rows of an expert one after another, as the normal kernels leave them: prompts.
    Context,
    /// A block of fixed size for each expert, as the low-latency kernels leave it: decode.
    Generation,
}

/// One op on one GPU. Rows are means, so they may be fractions.
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
    /// Causal multi-head latent attention of prompts, keys and values unfolded to a quarter of the latent each, as DeepSeek's
    /// models have it.
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
        /// Exponent of the power law that loads follow; 0 is even. The rank is then the one with most to do.
        skew: f64,
    },
    /// The same where DeepEP brings the rows: whole experts, three matrices, rows that are sorted already.
    ExpertsDeepEp {
        /// Tokens of all ranks together.
        tokens: f64,
        /// Width of a row.
        hidden: f64,
        /// Hidden width of an expert.
        intermediate: f64,
        /// Experts of a token.
        top_k: f64,
        /// Experts of the layer.
        experts: f64,
        /// Ranks that experts are spread over.
        ep: f64,
        /// Type of the weights.
        weights: Precision,
        /// Exponent of the power law that loads follow; 0 is even. The rank is then the one with most to do.
        skew: f64,
        /// Layout of the rows.
        phase: Phase,
    },
    /// Anything else: norms, router, rotary embedding, sampling.
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
    /// Floating-point operations; a multiply-add is two. Of experts with uneven loads, those of a rank with its even share.
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
                let (key, value) = (latent as f64 / 4.0 + rope as f64, latent as f64 / 4.0);
                2.0 * seqs * pairs(new_tokens, context) * heads as f64 * (key + value)
            }
            Op::MlaDecode { seqs, context, heads, latent, rope, .. } => {
                2.0 * seqs * context * heads as f64 * (2 * latent + rope) as f64
            }
            Op::Experts { .. } | Op::ExpertsDeepEp { .. } => {
                let part = self.expert_part().expect("experts");
                2.0 * part.even_rows() * part.weights_of_one
            }
            Op::Stream { flops, .. } => flops,
        }
    }

    /// Least bytes that memory must give and take: weights and cache once, rows in and out. Of experts, those that are
    /// expected to get a row.
    pub fn bytes(&self) -> f64 {
        match *self {
            Op::Gemm { m, n, k, weights } => n * k * weights.bytes() + m * k * weights.row_bytes() + m * n * ROW,
            Op::AttentionPrefill { seqs, new_tokens, context, heads, kv_heads, head_dim, kv } => {
                let keys = 2.0 * context * (kv_heads * head_dim) as f64 * kv.bytes();
                seqs * (keys + new_tokens * (heads * head_dim) as f64 * (kv.row_bytes() + ROW))
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
            Op::Experts { hidden, weights, .. } | Op::ExpertsDeepEp { hidden, weights, .. } => {
                let part = self.expert_part().expect("experts");
                let rows = part.even_rows() * hidden * (weights.row_bytes() + ROW);
                // Where several experts of a rank share a token, its row may be read and written once.
                let rows = rows.min(part.tokens * hidden * (weights.row_bytes() + ROW));
                part.loads().touched * part.weights_of_one * weights.bytes() + rows
            }
            Op::Stream { bytes, .. } => bytes,
        }
    }

    /// Type that decides the peak.
    pub fn precision(&self) -> Precision {
        match *self {
            Op::Gemm { weights, .. } | Op::Experts { weights, .. } | Op::ExpertsDeepEp { weights, .. } => weights,
            Op::Stream { precision, .. } => precision,
            Op::AttentionPrefill { kv, .. }
            | Op::AttentionDecode { kv, .. }
            | Op::MlaPrefill { kv, .. }
            | Op::MlaDecode { kv, .. } => kv,
        }
    }

    /// What routed experts have in common; `None` of other ops.
    pub(super) fn expert_part(&self) -> Option<ExpertPart> {
        match *self {
            Op::Experts { tokens, hidden, intermediate, top_k, experts, tp, ep, matrices, skew, .. } => {
                let weights_of_one = matrices as f64 * hidden * intermediate / tp;
                Some(ExpertPart { tokens, top_k, experts, ep, skew, weights_of_one, width: intermediate / tp })
            }
            Op::ExpertsDeepEp { tokens, hidden, intermediate, top_k, experts, ep, skew, .. } => {
                let weights_of_one = 3.0 * hidden * intermediate;
                Some(ExpertPart { tokens, top_k, experts, ep, skew, weights_of_one, width: intermediate })
            }
            _ => None,
        }
    }
}

/// The routed experts of one rank, whatever brings their rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExpertPart {
    pub(super) tokens: f64,
    pub(super) top_k: f64,
    pub(super) experts: f64,
    pub(super) ep: f64,
    pub(super) skew: f64,
    /// Numbers of one expert's weights on this rank.
    pub(super) weights_of_one: f64,
    /// Hidden width of an expert on this rank.
    pub(super) width: f64,
}

impl ExpertPart {
    /// Rows of a rank when all ranks have equally many.
    pub(super) fn even_rows(&self) -> f64 {
        self.tokens * self.top_k / self.ep
    }

    /// Rows and experts with rows of the rank that is looked at.
    pub(super) fn loads(&self) -> Loads {
        Loads::of(self.tokens, self.top_k, self.experts, self.ep, self.skew)
    }

    /// Loads as tables have them.
    pub(super) fn dealt(&self) -> Dealt {
        Dealt::of(self.tokens, self.top_k, self.experts, self.ep, self.skew)
    }
}

/// Bytes of a number of a row.
const ROW: f64 = 2.0;

/// Pairs of queries and keys of a causal mask.
fn pairs(new_tokens: f64, context: f64) -> f64 {
    new_tokens * (context - new_tokens) + new_tokens * (new_tokens + 1.0) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_what_the_shapes_say() {
        let gemm = Op::Gemm { m: 3.0, n: 5.0, k: 7.0, weights: Precision::Bf16 };
        assert_eq!((gemm.flops(), gemm.bytes()), (210.0, 2.0 * (35.0 + 21.0 + 15.0)));
        let decode =
            Op::AttentionDecode { seqs: 2.0, context: 10.0, heads: 8, kv_heads: 2, head_dim: 4, kv: Precision::Fp8 };
        assert_eq!((decode.flops(), decode.bytes()), (4.0 * 20.0 * 32.0, 2.0 * 20.0 * 8.0));
        let mla = Op::MlaDecode { seqs: 2.0, context: 10.0, heads: 3, latent: 8, rope: 2, kv: Precision::Bf16 };
        assert_eq!((mla.flops(), mla.bytes()), (2.0 * 20.0 * 3.0 * 18.0, 20.0 * 10.0 * 2.0));
        // A prompt of four tokens after two: 3 + 4 + 5 + 6 pairs.
        assert_eq!(pairs(4.0, 6.0), 18.0);
    }

    #[test]
    fn experts_of_all_ranks_do_all_the_work() {
        let op = |ep, tp| Op::Experts {
            tokens: 64.0,
            hidden: 8.0,
            intermediate: 16.0,
            top_k: 2.0,
            experts: 8.0,
            tp,
            ep,
            weights: Precision::Bf16,
            matrices: 3,
            skew: 0.0,
        };
        let all = op(1.0, 1.0).flops();
        assert_eq!(all, 2.0 * 128.0 * 3.0 * 8.0 * 16.0);
        assert_eq!(op(4.0, 2.0).flops(), all / 8.0);
        assert!(op(4.0, 1.0).bytes() < op(1.0, 1.0).bytes());
    }
}
