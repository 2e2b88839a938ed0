//! What attention's core does in layers that attend in different ways.

use moesaic_spec::{LayerAttention, LinearAttention, ModelSpec};

use super::parts::PartOp;
use crate::cost::{Op, Precision};

/// Different ways in which layers attend, each with its share of the layers.
pub(crate) fn ways(model: &ModelSpec) -> Vec<(LayerAttention, f64)> {
    let mut ways: Vec<(LayerAttention, f64)> = Vec::new();
    for layer in 0..model.layers.len() {
        let attention = model.layer_attention(layer);
        match ways.iter_mut().find(|(way, _)| *way == attention) {
            Some((_, share)) => *share += 1.0,
            None => ways.push((attention, 1.0)),
        }
    }
    ways.iter_mut().for_each(|(_, share)| *share /= model.layers.len() as f64);
    ways
}

/// For sequences that get one more token each and see `context` tokens.
pub(crate) fn decode(core: &PartOp, attention: LayerAttention, seqs: f64, context: f64, kv: Precision) -> Vec<Op> {
    match attention {
        LayerAttention::Full => vec![core.decode(seqs, context, kv)],
        LayerAttention::Window(window) => vec![core.decode(seqs, context.min(window as f64), kv)],
        LayerAttention::Sparse(indexer) => {
            let width = indexer.head_dim as f64;
            let scores = Op::Stream {
                flops: 2.0 * seqs * context * indexer.num_heads as f64 * width,
                bytes: seqs * context * width,
                precision: Precision::Fp8,
            };
            vec![scores, core.decode(seqs, context.min(indexer.top_k as f64), kv)]
        }
        LayerAttention::Linear(linear) => vec![state(&linear, seqs, seqs)],
    }
}

/// For one prompt of `tokens`, the last of which sees `context`.
pub(crate) fn prefill(core: &PartOp, attention: LayerAttention, tokens: f64, context: f64, kv: Precision) -> Vec<Op> {
    match attention {
        LayerAttention::Full => vec![core.prefill(1.0, tokens, context, kv)],
        LayerAttention::Window(window) if (window as f64) < context => {
            // As many pairs as tokens times window, in pieces as long as the window.
            let window = window as f64;
            vec![core.prefill((tokens / window).max(1.0), tokens.min(window), 0.5 * tokens.min(window) + window, kv)]
        }
        LayerAttention::Window(_) => vec![core.prefill(1.0, tokens, context, kv)],
        LayerAttention::Sparse(indexer) => {
            let (width, top_k) = (indexer.head_dim as f64, indexer.top_k as f64);
            let scores = Op::Stream {
                flops: 2.0 * tokens * (context - tokens / 2.0) * indexer.num_heads as f64 * width,
                bytes: context * width,
                precision: Precision::Fp8,
            };
            let seen = (context - tokens / 2.0).min(top_k);
            // As many pairs as each token's best.
            vec![scores, core.prefill(1.0, tokens, seen + tokens / 2.0, kv)]
        }
        LayerAttention::Linear(linear) => vec![state(&linear, tokens, 1.0)],
    }
}

/// The state of each sequence is read and written; each token reads it, decays it and adds to it.
fn state(linear: &LinearAttention, tokens: f64, seqs: f64) -> Op {
    Op::Stream {
        flops: tokens * linear.state_flops(),
        bytes: 2.0 * seqs * linear.state_bytes() as f64,
        precision: Precision::Bf16,
    }
}
