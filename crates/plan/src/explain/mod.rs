//! A plan in words: who owns what, what crosses which links, and which limits hold.

mod owners;

use std::fmt::Write;

use moesaic_spec::{Bytes, ModelSpec};

use crate::footprint::{DEFAULT_BATCHED_TOKENS, DEFAULT_UTILIZATION};
use crate::ids::runs;
use crate::plan::{Balance, InitialPlacement, Interval, Mesh, Pool};
use crate::read::{OVERLAPS, PRECISIONS, ROUTES, name_of};
use crate::{AllReduce, Collective, MessageKind, Plan, Traffic};

/// Lines of one list, after which the rest is counted instead.
const MAX_LINES: usize = 24;

/// The text that `explain` prints. `model` is the one that the plan was made for.
pub fn explain(plan: &Plan, model: &ModelSpec) -> String {
    let mut text = String::new();
    // A String takes all that is written to it.
    let _ = write_all(&mut text, plan, model);
    text
}

fn write_all(w: &mut String, plan: &Plan, model: &ModelSpec) -> std::fmt::Result {
    let file = &plan.file;
    let Mesh { tp, pp, dp, ep } = file.mesh;
    writeln!(
        w,
        "plan       {}: model {}, cluster {}, workload {}",
        file.name, file.model, file.cluster, file.workload
    )?;
    let product = match file.moe.pool {
        Pool::Shared => format!("pp {pp} × tp {tp} × dp {dp}"),
        Pool::Separate => format!("pp {pp} × (tp {tp} × dp {dp} + ep {ep})"),
    };
    let nodes: std::collections::BTreeSet<usize> = plan.node_of.iter().copied().collect();
    writeln!(w, "ranks      {} = {product}, on {}", plan.world_size(), count(nodes.len(), "node"))?;
    let experts = match (file.places_experts(), file.moe.pool) {
        (false, _) if tp == 1 => "whole on every rank of their stage".to_owned(),
        (false, _) => format!("cut by tp {tp}"),
        (true, Pool::Shared) => format!("spread over the {} of attention", count(ep, "rank")),
        (true, Pool::Separate) => format!("spread over {} of their own", count(ep, "rank")),
    };
    writeln!(w, "experts    {experts}")?;
    let overlap = name_of(file.overlap, &OVERLAPS);
    writeln!(w, "step       {}, overlap {overlap}", count(file.micro_batches, "micro-batch"))?;
    if plan.exchanges_tokens() {
        let (precision, route) = (name_of(file.exchange.precision, &PRECISIONS), name_of(file.exchange.route, &ROUTES));
        writeln!(w, "exchange   {precision}, {route}")?;
    }
    if tp > 1 {
        let how = |group| if plan.all_reduce_of(group) == AllReduce::Flat { "flat" } else { "hierarchical" };
        writeln!(w, "all-reduce {}", how(plan.stages[0].groups[0].as_slice()))?;
    }

    if let Some(prediction) = &file.prediction {
        let of = |interval: &Interval| format!("{} ({} to {})", interval.value, interval.low, interval.high);
        writeln!(
            w,
            "predicted  TTFT {} ms, TPOT {} ms, {} tokens/s with {} requests at a time",
            of(&prediction.ttft_ms),
            of(&prediction.tpot_ms),
            of(&prediction.tokens_per_s),
            prediction.concurrency
        )?;
    }

    writeln!(w, "\nwho owns what")?;
    owners::write_stages(w, plan, model)?;
    writeln!(w, "\nmemory by part")?;
    write_memory(w, plan, model)?;
    writeln!(w, "\nwhat crosses which links: bytes of one token in one layer, expected under uniform routing")?;
    write_traffic(w, &plan.expected_traffic(model))?;
    writeln!(w, "\nlimits")?;
    write_limits(w, plan, model)
}

/// One line for all ranks that hold the same.
fn write_memory(w: &mut String, plan: &Plan, model: &ModelSpec) -> std::fmt::Result {
    let mut alike: Vec<(crate::RankMemory, Vec<usize>)> = Vec::new();
    for (rank, memory) in plan.rank_memory(model).into_iter().enumerate() {
        match alike.iter_mut().find(|(other, _)| *other == memory) {
            Some((_, ranks)) => ranks.push(rank),
            None => alike.push((memory, vec![rank])),
        }
    }
    for (memory, ranks) in alike.iter().take(MAX_LINES) {
        let parts: Vec<String> = memory
            .parts()
            .iter()
            .filter(|(_, bytes)| *bytes > 0)
            .map(|(name, bytes)| format!("{name} {}", Bytes(*bytes)))
            .collect();
        writeln!(w, "  {:<14} weights {} = {}", ranks_of(ranks), Bytes(memory.weights()), parts.join(" + "))?;
        write!(w, "  {:<14} ", "")?;
        if memory.kv_bytes_per_token > 0 {
            write!(w, "KV cache {} a token, ", Bytes(memory.kv_bytes_per_token))?;
        }
        writeln!(w, "exchange {}", Bytes(memory.exchange_bytes))?;
    }
    write_rest(w, alike.len(), "more kinds of ranks")
}

fn write_traffic(w: &mut String, traffic: &[Traffic]) -> std::fmt::Result {
    if traffic.is_empty() {
        return writeln!(w, "  nothing");
    }
    writeln!(
        w,
        "  {:<29} {:<13} {:>6} {:>13} {:>13}",
        "message", "counted as", "layers", "inside nodes", "between nodes"
    )?;
    for message in traffic {
        let bytes = |bytes: f64| if bytes > 0.0 { Bytes(bytes.round() as u64).to_string() } else { "-".to_owned() };
        writeln!(
            w,
            "  {:<29} {:<13} {:>6} {:>13} {:>13}",
            message.kind.to_string(),
            collective_name(message.kind.collective()),
            message.times,
            bytes(message.intra_bytes),
            bytes(message.inter_bytes)
        )?;
    }
    let all = |of: fn(&Traffic) -> f64| -> u64 {
        traffic.iter().filter(|t| t.kind != MessageKind::Logits).map(|t| of(t) * t.times as f64).sum::<f64>().round()
            as u64
    };
    let (intra, inter) = (Bytes(all(|t| t.intra_bytes)), Bytes(all(|t| t.inter_bytes)));
    writeln!(w, "  a token through all layers, logits not counted: {intra} inside nodes, {inter} between nodes")
}

fn collective_name(collective: Collective) -> &'static str {
    match collective {
        Collective::AllReduce => "all-reduce",
        Collective::AllToAll => "all-to-all",
        Collective::SendReceive => "send/receive",
        Collective::AllGather => "all-gather",
        Collective::Broadcast => "broadcast",
    }
}

fn write_limits(w: &mut String, plan: &Plan, model: &ModelSpec) -> std::fmt::Result {
    let (file, memory) = (&plan.file, &plan.file.memory);
    let context = model.max_position_embeddings;
    match memory.max_model_len {
        Some(len) => writeln!(w, "  sequences      up to {len} tokens; the model's limit is {context}")?,
        None => writeln!(w, "  sequences      as long as the workload's; the model's limit is {context}")?,
    }
    let tokens = memory.max_num_batched_tokens.unwrap_or(DEFAULT_BATCHED_TOKENS);
    let groups = plan.num_groups();
    writeln!(w, "  a step         up to {tokens} tokens of each of {}", count(groups, "group"))?;
    if let Some(seqs) = memory.max_num_seqs {
        writeln!(w, "  at a time      up to {seqs} sequences of each group")?;
    }
    let share = memory.utilization.unwrap_or(DEFAULT_UTILIZATION);
    writeln!(w, "  memory         {share} of the GPU's")?;
    if file.places_experts() {
        let max = file.max_experts_per_rank();
        let redundant = file.moe.redundant_experts;
        writeln!(
            w,
            "  experts        up to {max} of a layer on a rank, {redundant} replicas of a layer beyond one each"
        )?;
    }
    if let InitialPlacement::Trace(trace) = &file.moe.placement {
        writeln!(w, "  placement      by the loads of {trace}")?;
    }
    match &file.balance {
        None if file.places_experts() => writeln!(w, "  balance        experts stay where they are")?,
        None => {}
        Some(Balance { interval, threshold, significance, .. }) => writeln!(
            w,
            "  balance        every {interval} steps experts move if max/mean load gains {threshold} and chance is below \
             {significance}"
        )?,
    }
    if let Some(synchronize) = &file.synchronize {
        let (interval, threshold) = (synchronize.interval, synchronize.threshold);
        writeln!(w, "  synchronize    every {interval} steps, if the pools' times differ by more than {threshold}")?;
    }
    match (file.attention.replication.unwrap_or(1), file.mesh.tp) {
        (1, _) => Ok(()),
        (times, 1) => writeln!(
            w,
            "  faults         attention is held {groups} times as it is, once in each group; {times} are asked for"
        ),
        (times, _) => writeln!(
            w,
            "  faults         attention is held {times} times: a rank's heads are on the next ranks of its group, too"
        ),
    }
}

/// The numbers of ranks, or how many.
fn ranks_of(ranks: &[usize]) -> String {
    let text = runs(ranks.iter().copied());
    match (ranks.len(), text.chars().count() > 40) {
        (1, _) => format!("rank {text}"),
        (_, false) => format!("ranks {text}"),
        (n, true) => format!("{n} ranks from {}", ranks[0]),
    }
}

fn write_rest(w: &mut String, len: usize, what: &str) -> std::fmt::Result {
    if len > MAX_LINES { writeln!(w, "  … and {} {what}", len - MAX_LINES) } else { Ok(()) }
}

/// `1 rank`, `2 ranks`, `2 micro-batches`.
fn count(n: usize, what: &str) -> String {
    match n {
        1 => format!("1 {what}"),
        _ if what.ends_with("ch") => format!("{n} {what}es"),
        _ => format!("{n} {what}s"),
    }
}
