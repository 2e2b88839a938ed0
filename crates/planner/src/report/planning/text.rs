//! For a terminal.

use std::fmt::Write;

use moesaic_spec::Bytes;

use super::super::format::{integer, number, percent, seconds};
use super::{Planning, Pools, Proposal};
use crate::estimate::Estimate;
use crate::memory::Memory;

pub(super) fn render(planning: &Planning) -> String {
    let mut text = String::new();
    // A String takes all that is written to it.
    let _ = write_all(&mut text, planning);
    text
}

fn write_all(w: &mut String, planning: &Planning) -> std::fmt::Result {
    let Planning { best, counts, .. } = planning;
    writeln!(w, "best       {}, {} GPUs", best.name(), integer(best.prediction.gpus as u64))?;
    let prediction = &best.prediction;
    writeln!(
        w,
        "           {} tokens/s and GPU, {} in all, with {} requests at a time",
        of(&prediction.tokens_per_s_gpu, number),
        number(prediction.tokens_per_s.value),
        integer(prediction.concurrency as u64)
    )?;
    writeln!(
        w,
        "           TPOT {}, TTFT {}, {} tokens/s for each user",
        of(&prediction.tpot_s, seconds),
        of(&prediction.ttft_s, seconds),
        number(prediction.tokens_per_s_user.value)
    )?;
    if let Some(usd) = prediction.usd_per_million {
        writeln!(w, "           ${} for a million output tokens", number(usd))?;
    }
    writeln!(w, "memory     {}", memory(&prediction.memory, prediction.gpu_memory))?;
    if let Some(pool) = &prediction.expert_memory {
        writeln!(w, "           ranks with experts: {}", memory(pool, prediction.gpu_memory))?;
    }
    writeln!(w, "limited by {}", best.binds)?;
    if let (Some(second), Some(regret)) = (&planning.runner_up, &planning.regret) {
        let rate = |proposal: &Proposal| proposal.prediction.tokens_per_s_gpu.value;
        writeln!(
            w,
            "runner-up  {}: {} tokens/s and GPU, {} % fewer",
            second.name(),
            number(rate(second)),
            number(100.0 * (1.0 - rate(second) / rate(best)))
        )?;
        writeln!(
            w,
            "regret     the runner-up is the faster one with probability {} %; trusting the prediction loses {} % on\n           \
             average, and {} % when both err by their intervals",
            number(100.0 * regret.probability),
            number(100.0 * regret.expected),
            number(100.0 * regret.worst)
        )?;
    }
    writeln!(w, "\nWHAT NOTHING BEATS, BY TIME PER OUTPUT TOKEN")?;
    write_frontier(w, &planning.frontier)?;
    writeln!(w, "\nWHAT NOTHING BEATS, BY TIME TO FIRST TOKEN")?;
    write_frontier(w, &planning.ttft_frontier)?;
    writeln!(w, "\nTHE STRATEGIES")?;
    for verdict in &planning.strategies {
        let name = verdict.proposal.as_ref().map_or("-".to_owned(), Proposal::name);
        writeln!(w, "  {:<6} {name}", verdict.strategy)?;
        if let Some(proposal) = &verdict.proposal {
            let prediction = &proposal.prediction;
            writeln!(
                w,
                "         {} tokens/s and GPU, TPOT {}, TTFT {}",
                number(prediction.tokens_per_s_gpu.value),
                seconds(prediction.tpot_s.value),
                seconds(prediction.ttft_s.value)
            )?;
        }
        writeln!(w, "         {}", verdict.why)?;
    }
    if let Some(pools) = &planning.pools {
        write_pools(w, pools)?;
    }
    writeln!(
        w,
        "\n{} layouts at one concurrency, {} of them priced.",
        integer(counts.configurations as u64),
        integer(counts.priced as u64)
    )?;
    planning.assumptions.iter().try_for_each(|sentence| writeln!(w, "- {sentence}"))
}

fn write_pools(w: &mut String, pools: &Pools) -> std::fmt::Result {
    writeln!(w, "\nPROMPTS AND ANSWERS ON GPUS OF THEIR OWN, {} GPUS", integer(pools.gpus as u64))?;
    writeln!(
        w,
        "  {} × {} read, {} × {} answer",
        pools.prefill_workers, pools.prefill.name, pools.decode_workers, pools.decode.name
    )?;
    writeln!(
        w,
        "  {} tokens/s and GPU, with {} requests at a time",
        of(&pools.tokens_per_s_gpu, number),
        integer(pools.concurrency as u64)
    )?;
    writeln!(w, "  TPOT {}, TTFT {}", of(&pools.tpot_s, seconds), of(&pools.ttft_s, seconds))?;
    match pools.gain {
        Some(gain) => writeln!(w, "  {}", gained(gain)),
        None => Ok(()),
    }
}

/// Pools against ranks that do both.
pub(super) fn gained(gain: f64) -> String {
    let than = if gain < 0.0 { "fewer" } else { "more" };
    format!(
        "{} % {than} than the best ranks that do both, all told by iterations, without what a program adds",
        number(100.0 * gain.abs())
    )
}

fn write_frontier(w: &mut String, frontier: &[Proposal]) -> std::fmt::Result {
    writeln!(w, "  {:>9} {:>9} {:>9} {:>9} {:>7}  plan", "tok/s/GPU", "TPOT", "TTFT", "requests", "GPUs")?;
    for proposal in frontier {
        let prediction = &proposal.prediction;
        writeln!(
            w,
            "  {:>9} {:>9} {:>9} {:>9} {:>7}  {}",
            number(prediction.tokens_per_s_gpu.value),
            seconds(prediction.tpot_s.value),
            seconds(prediction.ttft_s.value),
            integer(prediction.concurrency as u64),
            integer(prediction.gpus as u64),
            proposal.name()
        )?;
    }
    Ok(())
}

/// A figure with its interval.
fn of(estimate: &Estimate, show: fn(f64) -> String) -> String {
    format!("{} ({} to {})", show(estimate.value), show(estimate.low), show(estimate.high))
}

fn memory(memory: &Memory, gpu: f64) -> String {
    let parts: Vec<String> = parts(memory)
        .into_iter()
        .filter(|(_, bytes)| *bytes > 0.0)
        .map(|(name, bytes)| format!("{name} {}", Bytes(bytes as u64)))
        .collect();
    let share = percent((1000.0 * memory.total() / gpu).round() / 1000.0);
    let (first, rest) = parts.split_at(parts.len().min(2));
    let rest = if rest.is_empty() { String::new() } else { format!("\n           + {}", rest.join(" + ")) };
    format!("{}{rest} = {share} % of {}", first.join(" + "), Bytes(gpu as u64))
}

/// The parts of a rank's memory with their names.
pub(super) fn parts(memory: &Memory) -> [(&'static str, f64); 5] {
    [
        ("attention and dense weights", memory.attention_weights),
        ("experts", memory.expert_weights),
        ("KV cache", memory.kv_cache),
        ("activations", memory.activations),
        ("exchange", memory.exchange),
    ]
}
