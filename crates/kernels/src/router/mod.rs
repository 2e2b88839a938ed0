//! Which experts a token goes to, and with what weight.
//!
//! Scores are `softmax(logits)` over all experts or `sigmoid(logits)` of each. Choosing looks at `score + bias` (the bias is
//! DeepSeek-V3's `e_score_correction_bias`, arXiv 2412.19437 section 2.1.2): experts lie in `n_group` equal groups, a group's
//! worth is the sum of its two best (of its one, if it has one), and only experts of the `topk_group` best groups can be
//! chosen. The A best are chosen, best first. Weights are the *scores* of the chosen, divided by their sum plus 1e-20 when
//! `norm_topk_prob`, times `routed_scaling_factor`.
//!
//! | | shape | type |
//! | --- | --- | --- |
//! | `logits` | `[T, E]` | F32 |
//! | `bias` | `[E]` | F32 |
//! | `topk_idx` | `[T, A]`, distinct in a row | I32 |
//! | `topk_weights` | `[T, A]` | F32 |
//!
//! Ties go to the lower index. A NaN ranks below every number, so a broken row still gets A distinct experts; its weights
//! are NaN under softmax, and the sampler reports the row.
//!
//! Flops 4 T E (an exponential counts as one). Bytes: logits in, choice out. Sums are in a fixed order: all paths give the
//! same bits.

use moesaic_device::{Ctx, OpCall, Tensor};
use moesaic_spec::{DType, Router, Scoring};

use crate::KernelError;
use crate::contract::{check, require};
use crate::elementwise::{exp, max, multi_isa, sum_by};
use crate::rows::for_rows2;

pub mod reference;

const OP: &str = "router";

/// The experts of every token, best first.
pub struct Routing {
    /// I32 `[T, A]`.
    pub topk_idx: Tensor,
    /// F32 `[T, A]`.
    pub topk_weights: Tensor,
}

/// Chooses `top_k` experts for each row of `logits`. `bias` must be there exactly when the router has one.
pub fn router(
    ctx: &Ctx,
    logits: &Tensor,
    router: &Router,
    top_k: usize,
    bias: Option<&Tensor>,
) -> Result<Routing, KernelError> {
    let rank2 = logits.dims().len() == 2;
    require(rank2, OP, "logits", || "[T, E]".into(), || format!("{:?}", logits.dims()))?;
    let (t, e) = logits.dims2();
    check(OP, "logits", logits, &[t, e], DType::F32)?;
    check_choice(router, top_k, e)?;
    let has_bias =
        || format!("{} by the router's description", if router.correction_bias { "given" } else { "absent" });
    let got = || if bias.is_some() { "given" } else { "absent" }.into();
    require(bias.is_some() == router.correction_bias, OP, "correction bias", has_bias, got)?;
    if let Some(bias) = bias {
        check(OP, "correction bias", bias, &[e], DType::F32)?;
    }
    let dims = [("T", t), ("E", e), ("A", top_k)];
    ctx.record(|| OpCall::compute(OP, &dims, (4 * t * e) as u64, (4 * t * e + 8 * t * top_k) as u64));
    let mut topk_idx = ctx.empty(&[t, top_k], DType::I32)?;
    let mut topk_weights = ctx.empty(&[t, top_k], DType::F32)?;
    if !ctx.is_meta() {
        let (isa, logits, bias) = (ctx.isa(), logits.f32(), bias.map(Tensor::f32));
        // Choosing reads the keys once for every chosen expert.
        let row_bytes = 4 * e * (top_k + 2);
        let (idx, weights) = ((topk_idx.i32_mut(), top_k), (topk_weights.f32_mut(), top_k));
        for_rows2(ctx, idx, weights, row_bytes, |first, idx, weights| {
            choose(isa, &logits[first * e..], (router, top_k, bias), idx, weights, &mut Scratch::new(e));
        });
    }
    Ok(Routing { topk_idx, topk_weights })
}

fn check_choice(router: &Router, top_k: usize, e: usize) -> Result<(), KernelError> {
    require(
        (1..=e).contains(&top_k),
        OP,
        "top_k",
        || format!("1 to {e}, the number of experts"),
        || top_k.to_string(),
    )?;
    let groups = router.n_group;
    let splits = groups > 0 && e.is_multiple_of(groups);
    require(splits, OP, "n_group", || format!("a divisor of {e}, the number of experts"), || groups.to_string())?;
    let kept = router.topk_group;
    require(
        (1..=groups).contains(&kept),
        OP,
        "topk_group",
        || format!("1 to n_group = {groups}"),
        || kept.to_string(),
    )?;
    let open = kept * (e / groups);
    require(
        top_k <= open,
        OP,
        "top_k",
        || format!("at most {open}, the experts of topk_group groups"),
        || top_k.to_string(),
    )
}

/// What one row needs while it is chosen; a thread's own.
struct Scratch {
    scores: Vec<f32>,
    biased: Vec<f32>,
    keys: Vec<i32>,
    groups: Vec<(i32, usize)>,
}

impl Scratch {
    fn new(e: usize) -> Scratch {
        Scratch { scores: vec![0.0; e], biased: vec![0.0; e], keys: vec![0; e], groups: Vec::new() }
    }
}

/// Below every key of a number or NaN.
const NOT_OPEN: i32 = i32::MIN;

/// Integers in the order of the floats, zeros equal, NaN below all.
#[inline(always)]
fn key(x: f32) -> i32 {
    let bits = (x + 0.0).to_bits() as i32;
    let ordered = bits ^ ((bits >> 31) as u32 >> 1) as i32;
    if x.is_nan() { NOT_OPEN + 1 } else { ordered }
}

type Choice<'a> = (&'a Router, usize, Option<&'a [f32]>);

multi_isa! {
    fn choose(
        logits: &[f32], choice: Choice<'_>, idx: &mut [i32], weights: &mut [f32], scratch: &mut Scratch,
    ) = choose_rows
}

#[inline(always)]
fn choose_rows(
    logits: &[f32],
    (router, top_k, bias): Choice<'_>,
    idx: &mut [i32],
    weights: &mut [f32],
    scratch: &mut Scratch,
) {
    let e = scratch.scores.len();
    let rows = logits.chunks_exact(e).zip(idx.chunks_exact_mut(top_k)).zip(weights.chunks_exact_mut(top_k));
    for ((logits, idx), weights) in rows {
        let Scratch { scores, biased, keys, groups } = scratch;
        match router.scoring {
            Scoring::Softmax => softmax(logits, scores),
            Scoring::Sigmoid => sigmoid(logits, scores),
        }
        match bias {
            Some(bias) => (0..e).for_each(|i| biased[i] = scores[i] + bias[i]),
            None => biased.copy_from_slice(scores),
        }
        keys.iter_mut().zip(biased.iter()).for_each(|(key_, &x)| *key_ = key(x));
        if router.topk_group < router.n_group {
            close_groups(router, biased, keys, groups);
        }
        for (idx, weight) in idx.iter_mut().zip(weights.iter_mut()) {
            let best = argmax(keys);
            keys[best] = NOT_OPEN;
            *idx = best as i32;
            *weight = scores[best];
        }
        if router.norm_topk_prob {
            let sum = weights.iter().sum::<f32>() + 1e-20;
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        weights.iter_mut().for_each(|w| *w *= router.routed_scaling_factor);
    }
}

#[inline(always)]
fn softmax(logits: &[f32], scores: &mut [f32]) {
    let max = max(logits);
    for (score, &x) in scores.iter_mut().zip(logits) {
        *score = exp(x - max);
    }
    let sum = sum_by(scores, |x| x);
    scores.iter_mut().for_each(|score| *score /= sum);
}

/// `1 / (1 + e^-x)`, with an exponential that cannot overflow.
#[inline(always)]
fn sigmoid(logits: &[f32], scores: &mut [f32]) {
    for (score, &x) in scores.iter_mut().zip(logits) {
        let small = exp(-x.abs());
        *score = if x < 0.0 { small } else { 1.0 } / (1.0 + small);
    }
}

/// Takes the experts of the worse groups out of the choice.
#[inline(always)]
fn close_groups(router: &Router, biased: &[f32], keys: &mut [i32], groups: &mut Vec<(i32, usize)>) {
    let size = keys.len() / router.n_group;
    groups.clear();
    for (group, keys) in keys.chunks_exact_mut(size).enumerate() {
        let first = argmax(keys);
        let mut worth = biased[group * size + first];
        if size > 1 {
            let held = std::mem::replace(&mut keys[first], NOT_OPEN);
            worth += biased[group * size + argmax(keys)];
            keys[first] = held;
        }
        groups.push((key(worth), group));
    }
    groups.sort_unstable_by_key(|&(worth, group)| (std::cmp::Reverse(worth), group));
    for &(_, group) in &groups[router.topk_group..] {
        keys[group * size..][..size].fill(NOT_OPEN);
    }
}

/// The first of the largest.
#[inline(always)]
fn argmax(keys: &[i32]) -> usize {
    let best = keys.iter().fold(NOT_OPEN, |best, &key| best.max(key));
    keys.iter().position(|&key| key == best).expect("a maximum is among the numbers")
}

#[cfg(test)]
mod tests;
