//! The next token of each sequence.
//!
//! In vLLM's order and with its meaning: logit bias, then penalties (repetition over prompt and output, frequency and
//! presence over the output alone), then greedy choice, or temperature, min-p, top-k, top-p and a draw. Reported
//! logprobs are those of the raw logits, before all of that.
//!
//! | | shape | type |
//! | --- | --- | --- |
//! | `logits` | `[S, V]`, finite | F32 |
//! | `requests` | `[S]` | |
//! | out | `[S]` ([`Sampled`]), none on `Meta` | |
//!
//! A draw is one number of [`philox`] under the request's seed, counted by the tokens that the request has
//! generated, so a token depends on its own row and request only: never on the batch, the threads or the instruction set.
//! Ties go to the lower token id everywhere: top-k keeps exactly k tokens.
//!
//! Flops 4 S V (an exponential counts as one). Bytes: the logits once and one working copy written (for rows with a bias
//! or penalties; the memory is taken for all rows).

use moesaic_device::{Ctx, OpCall, Tensor};
use moesaic_spec::DType;

use crate::KernelError;
use crate::contract::{check, require};
use crate::philox;
use crate::rows::for_rows2;

mod draw;
mod params;
mod penalties;
pub mod reference;
mod scan;

pub use params::SamplingParams;

const OP: &str = "sampler";

/// What one row of logits is sampled for.
#[derive(Clone, Copy, Debug)]
pub struct SampleRequest<'a> {
    /// How.
    pub params: &'a SamplingParams,
    /// Tokens that were given.
    pub prompt: &'a [u32],
    /// Tokens that were sampled before; their number is the draw's counter.
    pub generated: &'a [u32],
}

/// A token and what the model thought of it.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Sampled {
    /// The token.
    pub token: u32,
    /// Its logprob, by the raw logits.
    pub logprob: f32,
    /// Its place by the raw logits, 1 for the likeliest, if logprobs were asked for.
    pub rank: Option<usize>,
    /// The likeliest tokens and their logprobs, best first, as many as were asked for.
    pub top: Vec<(u32, f32)>,
}

/// Samples one token for each row of `logits`; on `Meta`, none.
pub fn sample(ctx: &Ctx, logits: &Tensor, requests: &[SampleRequest<'_>]) -> Result<Vec<Sampled>, KernelError> {
    let rank2 = logits.dims().len() == 2 && logits.dims()[1] > 0;
    require(rank2, OP, "logits", || "[S, V]".into(), || format!("{:?}", logits.dims()))?;
    let (s, v) = logits.dims2();
    check(OP, "logits", logits, &[requests.len(), v], DType::F32)?;
    for request in requests {
        request.params.validate()?;
        check_tokens(request, v)?;
    }
    ctx.record(|| OpCall::compute(OP, &[("S", s), ("V", v)], (4 * s * v) as u64, (8 * s * v) as u64));
    let mut work = ctx.empty(&[s, v], DType::F32)?;
    if ctx.is_meta() {
        return Ok(Vec::new());
    }
    let (isa, logits) = (ctx.isa(), logits.f32());
    let mut sampled: Vec<Result<Option<Sampled>, KernelError>> = (0..s).map(|_| Ok(None)).collect();
    for_rows2(ctx, (&mut sampled, 1), (work.f32_mut(), v), 8 * v, |first, sampled, work| {
        for (i, (sampled, work)) in sampled.iter_mut().zip(work.chunks_exact_mut(v)).enumerate() {
            let row = first + i;
            *sampled = sample_row(isa, row, &logits[row * v..][..v], &requests[row], work).map(Some);
        }
    });
    sampled.into_iter().map(|sampled| Ok(sampled?.expect("every row is visited"))).collect()
}

fn sample_row(
    isa: moesaic_device::Isa,
    row: usize,
    logits: &[f32],
    request: &SampleRequest<'_>,
    work: &mut [f32],
) -> Result<Sampled, KernelError> {
    if let Some(column) = scan::first_non_finite(isa, logits) {
        return Err(KernelError::NonFinite { op: OP, what: "logits", row, column, value: logits[column] });
    }
    let params = request.params;
    let changed = penalties::apply(logits, request, work);
    let choice: &[f32] = if changed { work } else { logits };
    let token = if params.is_greedy() {
        scan::argmax(isa, choice)
    } else {
        draw::draw(isa, choice, params, philox::uniform(params.seed, request.generated.len() as u64))
    };

    let max = scan::max(isa, logits);
    let log_total = scan::total(isa, logits, scan::Weight { max, temperature: 1.0, min: 0.0 }).ln();
    let logprob = |token: usize| (f64::from(logits[token]) - f64::from(max) - log_total) as f32;
    let (mut rank, mut top) = (None, Vec::new());
    if let Some(n) = params.logprobs {
        rank = Some(1 + scan::count_above(isa, logits, logits[token]));
        top = scan::best(isa, logits, n).into_iter().map(|token| (token, logprob(token as usize))).collect();
    }
    Ok(Sampled { token: token as u32, logprob: logprob(token), rank, top })
}

fn check_tokens(request: &SampleRequest<'_>, v: usize) -> Result<(), KernelError> {
    check_below(v, "logit_bias", request.params.logit_bias.iter().map(|&(token, _)| token))?;
    check_below(v, "prompt", request.prompt.iter().copied())?;
    check_below(v, "generated", request.generated.iter().copied())
}

fn check_below(v: usize, what: &'static str, mut tokens: impl Iterator<Item = u32>) -> Result<(), KernelError> {
    let Some(token) = tokens.find(|&token| token as usize >= v) else { return Ok(()) };
    let expected = format!("token ids below {v}, the size of the vocabulary");
    Err(KernelError::Contract { op: OP, what, expected, got: token.to_string() })
}

#[cfg(test)]
mod tests;
