//! Requests in steady state, in closed form: what users and operators see when iterations take as long as they do.
//!
//! Users ask the next question when the last one is answered (a closed loop), in no common rhythm. In each iteration those
//! who are being answered get a token, and prompts of those who are next are read beside them, as the scheduler does it
//! (continuous batching, chunked prefill). The simulation of events drives that scheduler itself; this is its mean.

use serde::{Deserialize, Serialize};

use crate::PlannerError;
use crate::iteration::{Batch, Iteration, Iterations, Layout, Resolved};

/// Requests of one shape.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Requests {
    /// Tokens of a prompt.
    pub input: f64,
    /// Tokens of an answer.
    pub output: f64,
    /// Requests that are answered or wait, over all data-parallel groups.
    pub concurrency: f64,
    /// Share of a prompt's tokens that the prefix cache has.
    pub prefix_hit: f64,
    /// Tokens of one iteration of a group at most.
    pub step_tokens: f64,
}

impl Requests {
    /// Tokens of each prompt that are computed.
    fn computed(&self) -> f64 {
        (self.input * (1.0 - self.prefix_hit)).max(1.0)
    }

    /// Tokens in the cache of a sequence while it is answered, in the mean.
    fn context(&self) -> f64 {
        self.input + self.output / 2.0
    }
}

/// What users and operators see.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Serving {
    /// Time to first token, seconds, in the mean.
    pub ttft: f64,
    /// Time per output token after the first, seconds, in the mean.
    pub tpot: f64,
    /// The longest gap between two tokens that a user sees often: an iteration that reads a whole chunk of a prompt, seconds.
    pub longest_itl: f64,
    /// Output tokens per second, all groups.
    pub throughput: f64,
    /// Requests that are answered at a time, all groups; fewer than the concurrency where the KV cache is full.
    pub running: f64,
    /// The iteration without prompts.
    pub decode: Iteration,
    /// The iteration that reads a prompt, or a whole chunk of one, beside the answers.
    pub mixed: Iteration,
    /// Share of the iterations that are mixed.
    pub mixed_share: f64,
}

impl Serving {
    /// Seconds of an iteration, in the mean.
    pub fn iteration_s(&self) -> f64 {
        self.mean(|iteration| iteration.seconds)
    }

    /// Mean of a figure of both kinds of iteration.
    pub fn mean(&self, of: impl Fn(&Iteration) -> f64) -> f64 {
        (1.0 - self.mixed_share) * of(&self.decode) + self.mixed_share * of(&self.mixed)
    }
}

/// Rounds of the fixed point; it settles in a few.
const ROUNDS: usize = 8;
/// Relative change of the number of answers at which it has.
const SETTLED: f64 = 0.01;

/// Prefill and decoding on the same ranks. `kv_tokens` is what the KV cache of one group holds.
///
/// # Errors
/// [`PlannerError`]: the model cannot be spread like this.
pub fn aggregated(
    iterations: &mut Iterations,
    layout: &Layout,
    requests: &Requests,
    kv_tokens: f64,
) -> Result<Serving, PlannerError> {
    let resolved = iterations.resolve(layout)?;
    Ok(steady(iterations, &resolved, requests, kv_tokens))
}

/// [`aggregated`] of a layout that is found already.
pub fn steady(iterations: &mut Iterations, resolved: &Resolved, requests: &Requests, kv_tokens: f64) -> Serving {
    settle(resolved.layout(), requests, kv_tokens, |batch| iterations.price_resolved(resolved, batch))
}

/// The steady state of the layout's family if computing and exchange hid each other completely.
pub fn ideal(iterations: &mut Iterations, resolved: &Resolved, requests: &Requests, kv_tokens: f64) -> Serving {
    settle(resolved.layout(), requests, kv_tokens, |batch| iterations.ideal(resolved, batch))
}

fn settle(layout: &Layout, requests: &Requests, kv_tokens: f64, mut price: impl FnMut(&Batch) -> Iteration) -> Serving {
    let groups = layout.dp as f64;
    let fitting = (kv_tokens / (requests.input + requests.output)).floor().max(1.0);
    let asked = (requests.concurrency / groups).max(1.0);
    let slots = asked.min(fitting);
    let (tokens, output) = (requests.computed(), requests.output.max(1.0));
    let cached = requests.input - tokens;
    // A prompt is read in chunks of what the step has room for beside the answers.
    let mixed = |seqs: f64, tokens_in_step: f64| {
        let prompts = (tokens_in_step / tokens).max(1.0);
        Batch {
            decodes: seqs,
            context: requests.context(),
            prefill_tokens: tokens_in_step,
            prefills: prompts,
            // In the mean, half of a prompt's earlier chunks are there.
            prefill_context: cached + (tokens - tokens_in_step / prompts).max(0.0) / 2.0,
            finished_prefills: tokens_in_step / tokens,
        }
    };
    let mut answered = slots;
    let mut last = None;
    let mut serving = None;
    for _ in 0..ROUNDS {
        let room = (requests.step_tokens - answered).max(1.0);
        // Prompt tokens for each iteration that keep the answers coming.
        let needed = answered * tokens / output;
        let chunk = needed.max(tokens).min(room);
        let share = (needed / chunk).min(1.0);
        let plain = price(&Batch::decode(answered.max(1.0), requests.context()));
        let both = price(&mixed(answered, chunk));
        let mean = (1.0 - share) * plain.seconds + share * both.seconds;
        let steps = (tokens / chunk).ceil().max(1.0);
        // Whoever comes waits for the running iteration, for prompts before it, and for its own.
        let queued = share / (2.0 * (1.0 - share).max(0.05)) * both.seconds * steps;
        let waiting_for_cache = (asked / slots - 1.0) * output * mean;
        let ttft = mean / 2.0 + queued + steps * both.seconds;
        let cycle = ttft + (output - 1.0) * mean;
        let now = (slots * (output - 1.0).max(1.0) * mean / cycle).clamp(1.0f64.min(slots), slots);
        serving = Some(Serving {
            ttft: ttft + waiting_for_cache,
            tpot: mean,
            longest_itl: both.seconds,
            throughput: groups * slots * output / cycle,
            running: groups * slots,
            decode: plain,
            mixed: both,
            mixed_share: share,
        });
        let error = now - answered;
        if error.abs() < SETTLED * answered {
            break;
        }
        // More answers at a time make iterations longer, and so nearly the same number of answers: the secant through the
        // last two rounds hits the fixed point in two or three.
        let slope = last.map_or(0.0, |(before, error_before): (f64, f64)| (error - error_before) / (answered - before));
        let step = if slope < -0.1 { -error / slope } else { error };
        last = Some((answered, error));
        answered = (answered + step).clamp(1.0f64.min(slots), slots);
    }
    serving.expect("there is a round")
}

/// Ranks that only read prompts, or only answer.
#[derive(Clone, Copy, Debug)]
pub struct Pool<'l> {
    /// How the model is spread on one worker.
    pub layout: &'l Layout,
    /// Workers.
    pub workers: f64,
}

/// Prefill and decoding on workers of their own; `transfer_s` is what a prompt's keys and values take between them.
///
/// # Errors
/// [`PlannerError`]: the model cannot be spread like this.
pub fn disaggregated(
    iterations: &mut Iterations,
    prefill: Pool,
    decode: Pool,
    requests: &Requests,
    transfer_s: f64,
) -> Result<Serving, PlannerError> {
    let tokens = requests.computed();
    let chunk = tokens.min(requests.step_tokens);
    let steps = (tokens / chunk).ceil();
    let reading = iterations.price(prefill.layout, &Batch::prefill(1.0, chunk))?;
    let read_s = reading.seconds * steps;
    let groups = decode.workers * decode.layout.dp as f64;
    let output = requests.output.max(1.0);
    let mut answered = requests.concurrency / groups;
    let mut serving = None;
    for _ in 0..ROUNDS {
        let plain = iterations.price(decode.layout, &Batch::decode(answered.max(1.0), requests.context()))?;
        let readers = prefill.workers * prefill.layout.dp as f64;
        let answer_s = (output - 1.0) * plain.seconds;
        // Requests per second: what answers ask for, or what prompts can be read.
        let rate = (requests.concurrency / (read_s + transfer_s + answer_s)).min(readers / read_s);
        let busy = (rate * read_s / readers).min(0.95);
        let queued = busy / (2.0 * (1.0 - busy)) * read_s;
        let ttft = queued + read_s + transfer_s + plain.seconds;
        let now = (rate * answer_s / groups).clamp(1.0, (requests.concurrency / groups).max(1.0));
        serving = Some(Serving {
            ttft,
            tpot: plain.seconds,
            longest_itl: plain.seconds,
            throughput: rate * output,
            running: rate * (ttft + answer_s),
            decode: plain,
            mixed: reading,
            mixed_share: 0.0,
        });
        if (now - answered).abs() < SETTLED * answered {
            break;
        }
        answered = 0.5 * (answered + now);
    }
    Ok(serving.expect("there is a round"))
}
