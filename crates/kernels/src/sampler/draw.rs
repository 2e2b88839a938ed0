//! A draw from what min-p, top-k and top-p leave of the distribution.

use moesaic_device::Isa;

use super::SamplingParams;
use super::scan::{self, Weight};

/// Tokens in a block of the whole-vocabulary draw: their sum is made first, so only one block is walked token by token.
const BLOCK: usize = 1024;
/// How many of the likeliest tokens top-p looks at first.
const FIRST_LOOK: usize = 64;

/// The token at `u` (uniform in `[0, 1)`) of the cumulated distribution. Tokens are in order of id if all may be drawn, and
/// otherwise in order of probability.
pub(super) fn draw(isa: Isa, logits: &[f32], params: &SamplingParams, u: f64) -> usize {
    let weight = Weight { max: scan::max(isa, logits), temperature: params.temperature, min: params.min_p };
    let limited = (1..logits.len()).contains(&params.top_k);
    if !limited && params.top_p >= 1.0 {
        return draw_from_all(isa, logits, weight, u);
    }
    let mut look = if limited { params.top_k } else { FIRST_LOOK };
    let mut best = weighted(isa, logits, weight, look);
    let total = if limited { sum(&best) } else { scan::total(isa, logits, weight) };
    let kept = loop {
        match nucleus(&best, total, params.top_p) {
            Some(kept) => break kept,
            // Rounding may keep the sum of all a hair below the total: then all it is.
            None if limited || look >= logits.len() => break best.len(),
            None => look *= 8,
        }
        best = weighted(isa, logits, weight, look);
    };
    best.truncate(kept);
    let target = u * sum(&best);
    pick(best.into_iter(), target) as usize
}

fn sum(weighted: &[(u32, f64)]) -> f64 {
    weighted.iter().map(|&(_, weight)| weight).sum()
}

/// The `n` likeliest tokens and their weights.
fn weighted(isa: Isa, logits: &[f32], weight: Weight, n: usize) -> Vec<(u32, f64)> {
    let best = scan::best(isa, logits, n);
    best.into_iter().map(|token| (token, f64::from(weight.of(logits[token as usize])))).collect()
}

/// How many of the likeliest tokens it takes to weigh at least `p * total`; `None` if these do not.
fn nucleus(best: &[(u32, f64)], total: f64, p: f32) -> Option<usize> {
    if p >= 1.0 {
        return Some(best.len());
    }
    let (target, mut sum) = (f64::from(p) * total, 0.0);
    let reaches = |&(_, weight): &(u32, f64)| {
        sum += weight;
        sum >= target
    };
    best.iter().position(reaches).map(|last| last + 1)
}

fn draw_from_all(isa: Isa, logits: &[f32], weight: Weight, u: f64) -> usize {
    let blocks: Vec<f64> = logits.chunks(BLOCK).map(|block| scan::total(isa, block, weight)).collect();
    let target = u * blocks.iter().sum::<f64>();
    let block = pick(blocks.iter().copied().enumerate().map(|(block, sum)| (block as u32, sum)), target) as usize;
    let before: f64 = blocks[..block].iter().sum();
    let tokens = logits[block * BLOCK..].iter().take(BLOCK).enumerate();
    let start = (block * BLOCK) as u32;
    pick(tokens.map(|(i, &x)| (start + i as u32, f64::from(weight.of(x)))), target - before) as usize
}

/// The first whose cumulated weight passes `target`; if rounding leaves none, the last that has any.
fn pick(weights: impl Iterator<Item = (u32, f64)>, target: f64) -> u32 {
    let (mut sum, mut last) = (0.0, None);
    for (token, weight) in weights {
        if weight > 0.0 {
            last = Some(token);
            sum += weight;
            if sum > target {
                break;
            }
        }
    }
    last.expect("the likeliest token weighs 1")
}
