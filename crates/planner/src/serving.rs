//! Requests in steady state, in closed form: what users and operators see when iterations take as long as they do.
//!
//! Users ask the next question when the last one is answered (a closed loop). In each iteration those who are being answered
//! get a token, and prompts of those who are next are read beside them, as the scheduler does it (continuous batching,
//! chunked prefill). [`simulate`](crate::simulate) drives that scheduler itself; this is its mean.

use moesaic_spec::{Arrival, LinkClass, TokenRange, Workload};
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
    /// Whether groups read prompts in the same iterations, as they come to do where all requests have the same lengths.
    /// Otherwise each reads when a prompt comes, and all others wait for it.
    pub common_rhythm: bool,
}

impl Requests {
    /// The mean request of a workload, with as many at a time as it has users, or as it has in all; `None` where that follows
    /// from the plan, because requests come at a rate.
    pub fn of(workload: &Workload, step_tokens: f64) -> Option<Requests> {
        let concurrency = match workload.arrival {
            Arrival::AtStart => workload.num_requests,
            Arrival::Closed { concurrency } => concurrency,
            Arrival::Poisson { .. } => return None,
        };
        Some(Requests::at(workload, step_tokens, concurrency as f64))
    }

    /// The mean request of a workload, with so many at a time.
    pub fn at(workload: &Workload, step_tokens: f64, concurrency: f64) -> Requests {
        let mean = |range: TokenRange| (range.min + range.max) as f64 / 2.0;
        let equal = |range: TokenRange| range.min == range.max;
        Requests {
            input: mean(workload.input_tokens),
            output: mean(workload.output_tokens),
            concurrency,
            prefix_hit: workload.prefix_hit,
            step_tokens,
            common_rhythm: equal(workload.input_tokens) && equal(workload.output_tokens),
        }
    }

    /// Tokens of each prompt that are computed.
    fn computed(&self) -> f64 {
        (self.input * (1.0 - self.prefix_hit)).max(1.0)
    }

    /// Tokens in the cache of a sequence while it is answered, in the mean.
    pub(crate) fn context(&self) -> f64 {
        self.input + self.output / 2.0
    }

    /// Answers, and so many tokens of prompts beside them.
    fn mixed(&self, decodes: f64, prefill_tokens: f64) -> Batch {
        let tokens = self.computed();
        let prefills = (prefill_tokens / tokens).max(1.0);
        Batch {
            decodes,
            context: self.context(),
            prefill_tokens,
            prefills,
            // In the mean, half of a prompt's earlier chunks are there.
            prefill_context: self.input - tokens + (tokens - prefill_tokens / prefills).max(0.0) / 2.0,
            finished_prefills: prefill_tokens / tokens,
            shortfall: 0.0,
        }
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

/// What users see in the steady state, and nothing of the iterations but their seconds.
pub fn steady_seconds(
    iterations: &mut Iterations,
    resolved: &Resolved,
    requests: &Requests,
    kv_tokens: f64,
) -> Serving {
    let seconds = |batch: &Batch| Iteration { seconds: iterations.seconds(resolved, batch), ..Iteration::default() };
    settle(resolved.layout(), requests, kv_tokens, seconds)
}

/// The steady state of the layout's family if computing and exchange hid each other completely.
pub fn ideal(iterations: &mut Iterations, resolved: &Resolved, requests: &Requests, kv_tokens: f64) -> Serving {
    settle(resolved.layout(), requests, kv_tokens, |batch| iterations.ideal(resolved, batch))
}

fn settle(layout: &Layout, requests: &Requests, kv_tokens: f64, mut price: impl FnMut(&Batch) -> Iteration) -> Serving {
    if requests.output <= 1.0 {
        return prompts_only(layout, requests, price);
    }
    let users = requests.concurrency.max(1.0);
    // Groups that have something to do, and the share of those that have not.
    let groups = users.min(layout.dp as f64);
    let idle = 1.0 - groups / layout.dp as f64;
    // The scheduler lets in whoever fits now, so a sequence counts as long as it is in the mean.
    let fitting = (kv_tokens / requests.context()).floor().max(1.0);
    let asked = users / groups;
    let slots = asked.min(fitting);
    let (tokens, output) = (requests.computed(), requests.output);
    // With more answers, the prompts of those who follow do not fit into what answers leave of a step.
    let most = (requests.step_tokens * output / (tokens + output)).max(1.0);
    let mut answered = slots.min(most);
    let mut last = None;
    let mut serving = None;
    for _ in 0..ROUNDS {
        let room = (requests.step_tokens - answered).max(1.0);
        // Prompt tokens for each iteration that keep the answers coming.
        let needed = answered * tokens / output;
        let together = requests.common_rhythm || groups == 1.0;
        let reading = |needed: f64| match together {
            true => Reading::together(needed, tokens, room),
            false => Reading::apart(needed, tokens, room, groups),
        };
        let Reading { share, chunk, shortfall } = reading(needed);
        let batch = Batch::decode(answered.max(1.0), requests.context());
        let plain = price(&Batch { shortfall: batch.rows() * idle, ..batch });
        let batch = requests.mixed(answered, chunk);
        let shortfall = shortfall + (batch.rows() - shortfall) * idle;
        let both = price(&Batch { shortfall, ..batch });
        // Whoever is answered waits for the prompts of others, and not for its own, nor for those that were read with it.
        let own = if requests.common_rhythm { (room / tokens).clamp(1.0, slots) } else { 1.0 };
        let others = 1.0 - own / if together { slots } else { slots * groups };
        let met = reading(needed * others).share;
        let mean = (1.0 - met) * plain.seconds + met * both.seconds;
        let answer = (output - 1.0) * mean;
        // Whoever comes waits for the running iteration, for prompts before it, and for its own.
        let busy = (needed / room).min(0.95);
        let queued = busy / (2.0 * (1.0 - busy)) * tokens / room * both.seconds;
        let steps = (tokens / room).ceil();
        let mut ttft = mean / 2.0 + queued + steps * both.seconds;
        let mut now = (slots * answer / (ttft + answer)).max(1.0f64.min(slots));
        if now >= most {
            // All who are not answered wait for their prompts.
            ttft = slots * answer / most - answer;
            now = most;
        }
        let cycle = ttft + answer;
        serving = Some(Serving {
            // Where the cache is full, others wait for a place.
            ttft: ttft + (asked / slots - 1.0) * cycle,
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
        answered = (answered + step).clamp(1.0f64.min(slots), slots.min(most).max(1.0f64.min(slots)));
    }
    serving.expect("there is a round")
}

/// What is read of prompts in the iterations in which some group reads.
struct Reading {
    /// Share of these iterations.
    share: f64,
    /// Tokens that the group reads which reads most, in the mean.
    chunk: f64,
    /// What the mean group reads less.
    shortfall: f64,
}

impl Reading {
    /// All groups read at the same time, at least a prompt or what there is room for.
    fn together(needed: f64, tokens: f64, room: f64) -> Reading {
        let chunk = needed.max(tokens).min(room);
        Reading { share: (needed / chunk).min(1.0), chunk, shortfall: 0.0 }
    }

    /// Each group reads when prompts come, whose number in an iteration is Poisson's, and all wait for the one that reads most.
    fn apart(needed: f64, tokens: f64, room: f64, groups: f64) -> Reading {
        let (prompts, most) = (needed / tokens, room / tokens);
        // Probability that a group has `count` prompts to read, and that it has fewer.
        let (mut at, mut below) =
            if most > 1.0 { ((-prompts).exp(), 0.0) } else { (1.0 - (prompts / most).min(1.0), 0.0) };
        let (mut of_one, mut of_most, mut share) = (0.0, 0.0, 0.0);
        let mut count = 0.0;
        while count < most {
            below += at;
            let more = 1.0 - below;
            let any = 1.0 - below.powf(groups);
            if count == 0.0 {
                share = any;
            }
            // What does not fit any more comes in the next iteration.
            let part = (most - count).min(1.0);
            of_one += more * part;
            of_most += any * part;
            if any < NEVER {
                break;
            }
            count += 1.0;
            at *= prompts / count;
        }
        if share <= 0.0 {
            return Reading { share, chunk: tokens.min(room), shortfall: 0.0 };
        }
        // What was put off is read, too.
        let chunk = (of_most / share * tokens * (prompts / of_one)).min(room);
        Reading { share, chunk, shortfall: (chunk - needed / share).max(0.0) }
    }
}

/// Probability that does not matter.
const NEVER: f64 = 1e-3;

/// Answers of one token: prompts are read, as many at a time as a step has room for.
fn prompts_only(layout: &Layout, requests: &Requests, mut price: impl FnMut(&Batch) -> Iteration) -> Serving {
    let users = requests.concurrency.max(1.0);
    let groups = users.min(layout.dp as f64);
    let asked = users / groups;
    let tokens = requests.computed();
    let chunk = (asked * tokens).min(requests.step_tokens);
    let batch = requests.mixed(0.0, chunk);
    let shortfall = batch.rows() * (1.0 - groups / layout.dp as f64);
    let reading = price(&Batch { shortfall, ..batch });
    let ttft = (asked * tokens / chunk).max(1.0) * reading.seconds;
    Serving {
        ttft,
        tpot: reading.seconds,
        longest_itl: reading.seconds,
        throughput: groups * asked / ttft,
        running: groups * asked,
        decode: reading,
        mixed: reading,
        mixed_share: 1.0,
    }
}

/// Ranks that only read prompts, or only answer.
#[derive(Clone, Copy, Debug)]
pub struct Pool<'l> {
    /// How the model is spread on one worker.
    pub layout: &'l Layout,
    /// Workers.
    pub workers: f64,
}

/// Seconds that the keys and values of one prompt take from a rank that read it to one that answers, over the link of one GPU.
///
/// # Errors
/// [`PlannerError`]: the model cannot be spread like this.
pub fn transfer_s(iterations: &mut Iterations, answers: &Layout, requests: &Requests) -> Result<f64, PlannerError> {
    let bytes = iterations.footprint(answers, requests.step_tokens)?.kv_bytes_per_token * requests.input;
    let link = iterations.cluster().link(LinkClass::InterNode);
    Ok(link.latency_s + bytes / link.bandwidth_per_gpu)
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
