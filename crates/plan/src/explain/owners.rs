//! Who owns what, stage by stage. What repeats is said once.

use std::fmt::Write;
use std::ops::Range;

use moesaic_spec::ModelSpec;

use super::{MAX_LINES, count};
use crate::ids::{rank_runs, runs};
use crate::{LayerPlacement, Plan, Rank, Stage};

/// Stages; a run of stages that differ in their numbers only is one entry.
pub(super) fn write_stages(w: &mut String, plan: &Plan, model: &ModelSpec) -> std::fmt::Result {
    let mut first = 0;
    while first < plan.stages.len() {
        let like = |stage: &usize| form(plan, *stage) == form(plan, first);
        let last = (first + 1..plan.stages.len()).take_while(like).last().unwrap_or(first);
        write_stage(w, plan, model, first)?;
        if last > first {
            let more = plan.stages[first + 1].layers.start..plan.stages[last].layers.end;
            let (from, to) = (ranks(&plan.stages[first + 1])[0], *ranks(&plan.stages[last]).last().expect("ranks"));
            let stages = runs(first + 1..last + 1);
            writeln!(w, "  stage {stages:<8} the same with {}, ranks {from}–{to}", layers(more))?;
        }
        first = last + 1;
    }
    Ok(())
}

/// What makes two stages alike.
#[derive(PartialEq)]
struct Form {
    num_layers: usize,
    /// Whether it has the embedding, and the head.
    ends: (bool, bool),
    /// By layer, where its experts are relative to the stage's first rank.
    experts: Vec<Option<Vec<Vec<u32>>>>,
}

fn form(plan: &Plan, idx: usize) -> Form {
    let stage = &plan.stages[idx];
    let base = ranks(stage)[0].0;
    let relative = |placed: &Option<LayerPlacement>| {
        let one = |ranks: &Vec<Rank>| ranks.iter().map(|rank| rank.0 - base).collect();
        placed.as_ref().map(|placed| placed.replicas.iter().map(one).collect())
    };
    Form {
        num_layers: stage.layers.len(),
        ends: (idx == 0, idx + 1 == plan.stages.len()),
        experts: plan.placement.layers[stage.layers.clone()].iter().map(relative).collect(),
    }
}

/// All ranks of a stage, ascending.
fn ranks(stage: &Stage) -> Vec<Rank> {
    let mut ranks = stage.groups.concat();
    ranks.extend(&stage.expert_ranks);
    ranks.sort_unstable();
    ranks.dedup();
    ranks
}

fn write_stage(w: &mut String, plan: &Plan, model: &ModelSpec, idx: usize) -> std::fmt::Result {
    let stage = &plan.stages[idx];
    let ends = match (idx == 0, idx + 1 == plan.stages.len()) {
        (true, true) => ", embedding, head",
        (true, false) => ", embedding",
        (false, true) => ", head",
        (false, false) => "",
    };
    let all = ranks(stage);
    writeln!(
        w,
        "  stage {idx:<8} {}{ends}; ranks {}, {}",
        layers(stage.layers.clone()),
        rank_runs(&all),
        nodes_of(plan, &all)
    )?;
    write_groups(w, plan, stage)?;
    write_experts(w, plan, model, stage)
}

fn write_groups(w: &mut String, plan: &Plan, stage: &Stage) -> std::fmt::Result {
    let num_groups = stage.groups.len();
    if plan.file.mesh.tp == 1 {
        let all = stage.groups.concat();
        let heads = plan.shards[all[0].idx()].attention.as_ref().map_or(0..0, |attention| attention.heads.clone());
        return writeln!(
            w,
            "    attention    ranks {}: heads {}, {} with requests of {} own",
            rank_runs(&all),
            span(&heads),
            count(num_groups, "group"),
            if num_groups == 1 { "its" } else { "their" }
        );
    }
    let group = &stage.groups[0];
    writeln!(w, "    group 0      ranks {}, {}", rank_runs(group), nodes_of(plan, group))?;
    for &rank in group.iter().take(MAX_LINES) {
        let Some(attention) = &plan.shards[rank.idx()].attention else { continue };
        let parts = format!("1/{} of widths and vocabulary", attention.tp.count);
        write!(w, "      {:<10} heads {:<7} {parts}", format!("rank {rank}"), span(&attention.heads))?;
        match attention.backup_heads.as_slice() {
            [] => writeln!(w)?,
            backups => writeln!(w, ", backup of heads {}", backups.iter().map(span).collect::<Vec<_>>().join(" and "))?,
        }
    }
    if group.len() > MAX_LINES {
        writeln!(w, "      … and {} more ranks", group.len() - MAX_LINES)?;
    }
    if num_groups > 1 {
        let others = stage.groups[1..].concat();
        writeln!(w, "    group {:<6} the same with ranks {}", runs(1..num_groups), rank_runs(&others))?;
    }
    Ok(())
}

/// Experts of the stage's layers; a run of layers with the same placement is one entry.
fn write_experts(w: &mut String, plan: &Plan, model: &ModelSpec, stage: &Stage) -> std::fmt::Result {
    let moe_layers: Vec<usize> = stage.layers.clone().filter(|&layer| model.layers[layer].as_moe().is_some()).collect();
    let Some(&first) = moe_layers.first() else { return writeln!(w, "    experts      none, the layers are dense") };
    if stage.expert_ranks.is_empty() {
        let num_experts = model.layers[first].as_moe().map_or(0, |moe| moe.num_experts);
        let how = match plan.file.mesh.tp {
            1 => "whole on every rank".to_owned(),
            tp => format!("1/{tp} of the width of each on every rank of a group"),
        };
        return writeln!(w, "    experts      {num_experts} of {}, {how}", layers(moe_layers));
    }
    let mut rest = moe_layers.as_slice();
    let mut entries = 0;
    while let Some(&layer) = rest.first() {
        let placed = plan.placement.layers[layer].as_ref().expect("a MoE layer of such a stage is placed");
        let same = rest.iter().take_while(|&&other| plan.placement.layers[other].as_ref() == Some(placed)).count();
        entries += 1;
        if entries <= MAX_LINES {
            write_placement(w, plan, stage, &rest[..same], placed)?;
        }
        rest = &rest[same..];
    }
    if entries > MAX_LINES {
        writeln!(w, "    … and {} more placements", entries - MAX_LINES)?;
    }
    Ok(())
}

fn write_placement(
    w: &mut String,
    plan: &Plan,
    stage: &Stage,
    of: &[usize],
    placed: &LayerPlacement,
) -> std::fmt::Result {
    let homes = &stage.expert_ranks;
    writeln!(
        w,
        "    experts      {} of {} on ranks {}, {}",
        placed.replicas.len(),
        layers(of.iter().copied()),
        rank_runs(homes),
        nodes_of(plan, homes)
    )?;
    let mut held: Vec<Vec<usize>> = vec![Vec::new(); homes.len()];
    for (expert, ranks) in placed.replicas.iter().enumerate() {
        ranks.iter().for_each(|rank| held[rank.idx() - homes[0].idx()].push(expert));
    }
    for (rank, experts) in homes.iter().zip(&held).take(MAX_LINES) {
        let experts = match experts.as_slice() {
            [] => "none".to_owned(),
            experts => runs(experts.iter().copied()),
        };
        writeln!(w, "      {:<10} {experts}", format!("rank {rank}"))?;
    }
    if homes.len() > MAX_LINES {
        writeln!(w, "      … and {} more ranks", homes.len() - MAX_LINES)?;
    }
    let replicated: Vec<(usize, &Vec<Rank>)> =
        placed.replicas.iter().enumerate().filter(|(_, ranks)| ranks.len() > 1).collect();
    for (expert, ranks) in replicated.iter().take(MAX_LINES) {
        writeln!(w, "      expert {expert:<3} on ranks {}, {}", rank_runs(ranks), nodes_of(plan, ranks))?;
    }
    if replicated.len() > MAX_LINES {
        writeln!(w, "      … and {} more experts with replicas", replicated.len() - MAX_LINES)?;
    }
    Ok(())
}

/// `node 3`, `nodes 0–2`.
fn nodes_of(plan: &Plan, ranks: &[Rank]) -> String {
    let nodes: std::collections::BTreeSet<usize> = ranks.iter().map(|rank| plan.node_of[rank.idx()]).collect();
    let text = runs(nodes.iter().copied());
    if nodes.len() == 1 { format!("node {text}") } else { format!("nodes {text}") }
}

/// `layer 3`, `layers 0–3`.
fn layers(layers: impl IntoIterator<Item = usize>) -> String {
    let text = runs(layers);
    if text.bytes().all(|b| b.is_ascii_digit()) { format!("layer {text}") } else { format!("layers {text}") }
}

/// A range in words: `0–3`, or `5` where it is one number.
fn span(range: &Range<usize>) -> String {
    runs(range.clone())
}
