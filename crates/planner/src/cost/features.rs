//! What the factor between roofline and kernel may depend on.

use std::collections::BTreeSet;

use moesaic_spec::Gpu;

use super::learned::Family;
use super::op::{Op, Precision};
use super::roofline;
use super::table::Stack;

/// Cost of a launch in the ideal roofline, seconds: inside a CUDA graph, as tables are measured.
const LAUNCH_S: f64 = 1e-6;

/// Heads that share a block of latent attention.
const HEADS_OF_BLOCK: f64 = 16.0;
/// Fewer rows, or experts with rows, are as few.
const LEAST_ROWS: f64 = 1e-3;

/// An op where it was measured, or as if it had been.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place<'a> {
    pub(super) op: &'a Op,
    pub(super) device: &'a str,
    pub(super) gpu: &'a Gpu,
    pub(super) stack: Stack,
    pub(super) kernel: &'a str,
}

/// Bytes of a number of a row: 16 bits.
const ROW: f64 = 2.0;

/// Seconds that factors are told by: a roofline of the work as kernels do it where that is known, so that less is left to
/// learn.
pub(super) fn unit_seconds(gpu: &Gpu, op: &Op) -> f64 {
    let (flops, peak, bytes) = match *op {
        Op::Experts { hidden, .. } | Op::ExpertsDeepEp { hidden, .. } => {
            let part = op.expert_part().expect("experts");
            let dealt = part.dealt();
            let bytes = dealt.touched * part.weights_of_one * op.precision().bytes() + dealt.rows * hidden * 2.0 * ROW;
            (2.0 * dealt.padded * part.weights_of_one, op.precision().peak(gpu), bytes)
        }
        // Latents are widened before they are multiplied, whatever the cache holds.
        Op::MlaDecode { .. } => (op.flops(), gpu.peak_flops.bf16, op.bytes()),
        _ => return roofline::ideal_seconds(gpu, op, LAUNCH_S),
    };
    LAUNCH_S * roofline::launches(op) + (flops / peak).max(bytes / gpu.memory_bandwidth)
}

impl Place<'_> {
    /// Names of the categories that the place is in.
    pub(super) fn categories(&self) -> [String; 3] {
        [format!("device {}", self.device), self.kernels(), format!("precision {:?}", self.op.precision())]
    }

    /// The kernel, or whose it is where it has no name: a kernel's name says whose it is.
    pub(super) fn kernels(&self) -> String {
        if self.kernel.is_empty() { format!("stack {:?}", self.stack) } else { format!("kernel {}", self.kernel) }
    }

    /// Coordinates: logarithms of sizes, then 1 or 0 for each category.
    pub(super) fn coordinates(&self, categories: &BTreeSet<String>) -> Vec<f64> {
        let mut x = self.sizes();
        let mine = self.categories();
        x.extend(categories.iter().map(|category| if mine.contains(category) { 1.0 } else { 0.0 }));
        x
    }

    fn sizes(&self) -> Vec<f64> {
        let (op, gpu) = (self.op, self.gpu);
        let unit = (unit_seconds(gpu, op) * 1e6).ln();
        let intensity = (op.flops() / op.bytes().max(1.0)).max(1e-3).ln();
        match *op {
            Op::Gemm { m, n, k, .. } => {
                let waves = roofline::waves(gpu, op);
                vec![m.ln(), n.ln(), k.ln(), unit, intensity, roofline::unevenness(waves, 1.0).ln(), waves.ln()]
            }
            Op::Experts { tokens, hidden, top_k, experts, ep, skew, .. }
            | Op::ExpertsDeepEp { tokens, hidden, top_k, experts, ep, skew, .. } => {
                let part = op.expert_part().expect("experts");
                let dealt = part.dealt();
                vec![
                    tokens.ln(),
                    hidden.ln(),
                    part.width.ln(),
                    (experts / ep).ln(),
                    ep.ln(),
                    top_k.ln(),
                    dealt.rows.max(LEAST_ROWS).ln(),
                    (dealt.rows / dealt.touched.max(LEAST_ROWS)).max(LEAST_ROWS).ln(),
                    dealt.fullest.max(LEAST_ROWS).ln(),
                    unit,
                    skew,
                    // Even loads are dealt, others drawn.
                    if skew > 0.0 { 1.0 } else { 0.0 },
                    roofline::waves(gpu, op).ln(),
                ]
            }
            Op::AttentionPrefill { seqs, new_tokens, context, heads, kv_heads, head_dim, .. } => vec![
                seqs.ln(),
                new_tokens.ln(),
                (context / new_tokens).ln(),
                (heads as f64).ln(),
                (heads as f64 / kv_heads as f64).ln(),
                (head_dim as f64).ln(),
                unit,
            ],
            Op::AttentionDecode { seqs, context, heads, kv_heads, head_dim, .. } => vec![
                seqs.ln(),
                context.ln(),
                (heads as f64).ln(),
                (heads as f64 / kv_heads as f64).ln(),
                (head_dim as f64).ln(),
                // How many multiprocessors have a key head of their own.
                (seqs * kv_heads as f64 / gpu.sms as f64).min(1.0).ln(),
                unit,
            ],
            Op::MlaDecode { seqs, context, heads, .. } => {
                // A kernel that does not cut the context has a block for so many heads of a sequence, and leaves
                // multiprocessors idle where these are few.
                let blocks = seqs * (heads as f64 / HEADS_OF_BLOCK).ceil();
                let busy = (blocks / gpu.sms as f64).min(1.0);
                vec![seqs.ln(), context.ln(), (heads as f64).ln(), unit, busy.ln(), intensity]
            }
            Op::MlaPrefill { .. } | Op::Stream { .. } => unreachable!("no table has this op"),
        }
    }
}

/// The measured op whose factor an op takes: itself where tables have it, else the nearest of its kind. `None` where tables
/// have nothing like it.
pub(super) fn measured_as(op: &Op) -> Option<(Family, Op)> {
    let measured = |precision| match precision {
        Precision::F32 | Precision::Int4 => Precision::Bf16,
        Precision::F4 => Precision::Fp8,
        other => other,
    };
    let mut op = *op;
    let family = match &mut op {
        Op::Gemm { weights, .. } => {
            *weights = measured(*weights);
            Family::Gemm
        }
        Op::Experts { weights, matrices, .. } => {
            *weights = measured(*weights);
            *matrices = 3;
            Family::Experts
        }
        Op::ExpertsDeepEp { weights, phase, .. } => {
            *weights = measured(*weights);
            match phase {
                super::Phase::Context => Family::Context,
                super::Phase::Generation => Family::Generation,
            }
        }
        Op::AttentionPrefill { kv, .. } => {
            *kv = measured(*kv);
            Family::AttentionPrefill
        }
        Op::AttentionDecode { kv, .. } => {
            *kv = measured(*kv);
            Family::AttentionDecode
        }
        Op::MlaDecode { kv, .. } => {
            *kv = measured(*kv);
            Family::MlaDecode
        }
        Op::MlaPrefill { seqs, new_tokens, context, heads, latent, .. } => {
            op = Op::AttentionPrefill {
                seqs: *seqs,
                new_tokens: *new_tokens,
                context: *context,
                heads: *heads,
                kv_heads: *heads,
                head_dim: *latent / 4,
                kv: Precision::Bf16,
            };
            Family::AttentionPrefill
        }
        Op::Stream { .. } => return None,
    };
    Some((family, op))
}
