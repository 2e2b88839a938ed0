//! What makes a plan legal, but for where single experts live (see `place.rs`) and memory (see `footprint.rs`).

use std::ops::{Range, RangeInclusive};

use moesaic_spec::{Cluster, Ffn, ModelSpec};

use crate::plan::{InitialPlacement, MAX_MICRO_BATCHES, Mesh, Pool};
use crate::{PlanError, PlanFile, Slice};

/// Ranks of a plan: some times the largest deployment that the papers think of (14,848).
pub const MAX_RANKS: usize = 1 << 16;

/// Micro-batches that a step may be split into.
const MICRO_BATCHES: RangeInclusive<usize> = 1..=MAX_MICRO_BATCHES;

impl PlanFile {
    /// Whether experts are placed one by one; otherwise every rank of a group has a part of each.
    pub fn places_experts(&self) -> bool {
        self.mesh.ep > 1 || self.moe.pool == Pool::Separate
    }

    /// Ranks of a stage that have attention.
    pub fn attention_ranks(&self) -> usize {
        self.mesh.tp.saturating_mul(self.mesh.dp)
    }

    /// Ranks of a stage.
    pub fn stage_ranks(&self) -> usize {
        match self.moe.pool {
            Pool::Shared => self.attention_ranks(),
            Pool::Separate => self.attention_ranks().saturating_add(self.mesh.ep),
        }
    }

    /// The world size that mesh and pools make.
    pub fn world_size(&self) -> usize {
        self.mesh.pp.saturating_mul(self.stage_ranks())
    }

    /// Experts of one layer that a rank may hold.
    pub fn max_experts_per_rank(&self) -> usize {
        self.moe.max_experts_per_rank.unwrap_or(1)
    }

    /// Decoder layers of each stage: as the file says, or even with the rest to the first stages.
    pub(crate) fn stage_layers(&self, num_layers: usize) -> Vec<Range<usize>> {
        let pp = self.mesh.pp;
        let even = || (0..pp).map(|stage| num_layers / pp + usize::from(stage < num_layers % pp)).collect();
        let counts: Vec<usize> = self.stage_layers.clone().unwrap_or_else(even);
        let mut first = 0;
        let range = |count: &usize| {
            first += count;
            first - count..first
        };
        counts.iter().map(range).collect()
    }

    /// Query heads of each of the `tp` ranks: as the file says, or even.
    pub(crate) fn head_ranges(&self, num_heads: usize) -> Vec<Range<usize>> {
        let tp = self.mesh.tp;
        let Some(heads) = &self.attention.heads else {
            return (0..tp).map(|idx| Slice { idx, count: tp }.range(num_heads, 1)).collect();
        };
        let mut first = 0;
        let range = |count: &usize| {
            first += count;
            first - count..first
        };
        heads.iter().map(range).collect()
    }

    /// Compares what the file says about single layers and experts with a model: a plan for another model is found out.
    ///
    /// # Errors
    /// [`PlanError::PlacedLayer`], [`PlanError::PlacedExperts`].
    pub fn fits_model(&self, model: &ModelSpec) -> Result<(), PlanError> {
        let InitialPlacement::Explicit(layers) = &self.moe.placement else { return Ok(()) };
        let mut seen = vec![false; model.layers.len()];
        for layer in layers {
            let wrong = |why: String| PlanError::PlacedLayer { layer: layer.layer, why };
            let ffn = model.layers.get(layer.layer);
            let ffn = ffn.ok_or_else(|| wrong(format!("the model has layers 0 to {}", model.layers.len() - 1)))?;
            let moe = ffn.as_moe().ok_or_else(|| wrong("that layer is dense".to_owned()))?;
            if std::mem::replace(&mut seen[layer.layer], true) {
                return Err(wrong("it did so before".to_owned()));
            }
            if layer.experts.len() != moe.num_experts {
                return Err(PlanError::PlacedExperts {
                    layer: layer.layer,
                    got: layer.experts.len(),
                    experts: moe.num_experts,
                });
            }
        }
        Ok(())
    }
}

/// Rows that hidden widths are cut at: blocks of FP8 weights stay whole.
pub fn cut_unit(model: &ModelSpec) -> usize {
    model.fp8_block.map_or(1, |[rows, _]| rows)
}

/// All rules but those of placement and memory.
pub(crate) fn check(file: &PlanFile, model: &ModelSpec, cluster: &Cluster) -> Result<(), PlanError> {
    check_world(file)?;
    if cluster.num_gpus() < file.ranks {
        return Err(PlanError::TooFewGpus {
            ranks: file.ranks,
            cluster: cluster.name.clone(),
            gpus: cluster.num_gpus(),
            nodes: cluster.nodes,
            gpus_per_node: cluster.gpus_per_node,
        });
    }
    check_expert_pool(file, model)?;
    check_stages(file, model)?;
    check_attention(file, model)?;
    check_widths(file, model)?;
    check_numbers(file, model)?;
    file.fits_model(model)
}

fn check_world(file: &PlanFile) -> Result<(), PlanError> {
    let Mesh { tp, pp, dp, ep } = file.mesh;
    for (axis, size) in [("tp", tp), ("pp", pp), ("dp", dp), ("ep", ep)] {
        if size == 0 {
            return Err(PlanError::invalid(format!("mesh.{axis}"), 0, "at least 1"));
        }
    }
    if file.ranks == 0 || file.ranks > MAX_RANKS {
        return Err(PlanError::invalid("ranks", file.ranks, format!("1 to {MAX_RANKS}")));
    }
    let world = file.world_size();
    if file.ranks != world {
        let product = match file.moe.pool {
            Pool::Shared => format!("pp {pp} × tp {tp} × dp {dp}"),
            Pool::Separate => format!("pp {pp} × (tp {tp} × dp {dp} + ep {ep})"),
        };
        return Err(PlanError::WorldSize { ranks: file.ranks, world, product });
    }
    if file.moe.pool == Pool::Shared && ep > 1 && ep != tp * dp {
        return Err(PlanError::SharedPool { ep, tp, dp, attention: tp * dp });
    }
    Ok(())
}

fn check_expert_pool(file: &PlanFile, model: &ModelSpec) -> Result<(), PlanError> {
    if model.num_moe_layers() == 0 {
        if file.moe.pool == Pool::Separate {
            let setting = "moe.pool is separate".to_owned();
            return Err(PlanError::NoMoeLayers { setting, instead: "write `pool: shared`" });
        }
        if file.mesh.ep > 1 {
            let setting = format!("mesh.ep is {}", file.mesh.ep);
            return Err(PlanError::NoMoeLayers { setting, instead: "write `ep: 1`" });
        }
    }
    if file.moe.max_experts_per_rank == Some(0) {
        return Err(PlanError::invalid("moe.max_experts_per_rank", 0, "at least 1"));
    }
    if file.places_experts() {
        return Ok(());
    }
    let cut = |setting: String, instead| Err(PlanError::ExpertsAreCut { setting, instead });
    if file.moe.redundant_experts > 0 {
        let setting = format!("moe.redundant_experts is {}", file.moe.redundant_experts);
        return cut(setting, "write `redundant_experts: 0`");
    }
    match &file.moe.placement {
        InitialPlacement::Linear => {}
        InitialPlacement::Trace(_) => return cut("moe.placement is a trace".to_owned(), "write `placement: linear`"),
        InitialPlacement::Explicit(_) => {
            return cut("moe.placement is explicit".to_owned(), "write `placement: linear`");
        }
    }
    match file.balance {
        Some(_) => cut("balance is there".to_owned(), "leave it out, because there is nothing to move"),
        None => Ok(()),
    }
}

fn check_stages(file: &PlanFile, model: &ModelSpec) -> Result<(), PlanError> {
    let (pp, num_layers) = (file.mesh.pp, model.layers.len());
    if pp > num_layers {
        return Err(PlanError::invalid(
            "mesh.pp",
            pp,
            format!("at most the number of the model's layers, {num_layers}"),
        ));
    }
    if let Some(counts) = &file.stage_layers {
        if counts.len() != pp {
            let right = format!("a list of one number for each of the pp {pp} stages");
            return Err(PlanError::invalid("stage_layers", format!("a list of {}", counts.len()), right));
        }
        if let Some(stage) = counts.iter().position(|&count| count == 0) {
            return Err(PlanError::invalid(format!("stage_layers[{stage}]"), 0, "at least 1"));
        }
        let sum = counts.iter().fold(0usize, |sum, &count| sum.saturating_add(count));
        if sum != num_layers {
            let right = format!("a list whose sum is the number of the model's layers, {num_layers}");
            return Err(PlanError::invalid("stage_layers", format!("a list whose sum is {sum}"), right));
        }
    }
    if file.moe.pool == Pool::Separate {
        let idle = |layers: &Range<usize>| model.layers[layers.clone()].iter().all(|ffn| ffn.as_moe().is_none());
        let stages = file.stage_layers(num_layers);
        if let Some(stage) = stages.iter().position(idle) {
            return Err(PlanError::IdlePool { stage, layers: stages[stage].clone(), ep: file.mesh.ep });
        }
    }
    Ok(())
}

fn check_attention(file: &PlanFile, model: &ModelSpec) -> Result<(), PlanError> {
    let (tp, dp, num_heads) = (file.mesh.tp, file.mesh.dp, model.attention.num_heads());
    if tp > num_heads {
        return Err(PlanError::CannotCut {
            tp,
            what: "the model".to_owned(),
            parts: format!("has {num_heads} query heads"),
            most: num_heads,
        });
    }
    if let Some(heads) = &file.attention.heads {
        if heads.len() != tp {
            let right = format!("a list of one number for each of the tp {tp} ranks");
            return Err(PlanError::invalid("attention.heads", format!("a list of {}", heads.len()), right));
        }
        if let Some(place) = heads.iter().position(|&count| count == 0) {
            return Err(PlanError::invalid(format!("attention.heads[{place}]"), 0, "at least 1"));
        }
        let sum = heads.iter().fold(0usize, |sum, &count| sum.saturating_add(count));
        if sum != num_heads {
            let right = format!("a list whose sum is the number of the model's query heads, {num_heads}");
            return Err(PlanError::invalid("attention.heads", format!("a list whose sum is {sum}"), right));
        }
    }
    match file.attention.replication {
        Some(0) => Err(PlanError::invalid("attention.replication", 0, "at least 1 (held once)")),
        Some(times) if tp > 1 && times > tp => {
            let right = format!("at most tp {tp}, because each replica is on another rank of the group");
            Err(PlanError::invalid("attention.replication", times, right))
        }
        Some(times) if tp == 1 && times > dp => {
            let right = format!("at most dp {dp}, because with tp 1 each group holds attention once");
            Err(PlanError::invalid("attention.replication", times, right))
        }
        _ => Ok(()),
    }
}

/// Every rank of a group gets a part of what is cut by width.
fn check_widths(file: &PlanFile, model: &ModelSpec) -> Result<(), PlanError> {
    let tp = file.mesh.tp;
    let unit = cut_unit(model);
    let check = |what: String, width: usize, unit: usize| {
        let units = width.div_ceil(unit);
        if units >= tp {
            return Ok(());
        }
        let parts = match unit {
            1 => format!("is {width} wide"),
            _ => format!("is {width} wide, {units} blocks of {unit}"),
        };
        Err(PlanError::CannotCut { tp, what, parts, most: units })
    };
    for (layer, ffn) in model.layers.iter().enumerate() {
        match ffn {
            Ffn::Dense(mlp) => check(format!("the dense MLP of layer {layer}"), mlp.intermediate_size, unit)?,
            Ffn::Moe(moe) if !file.places_experts() => {
                check(format!("an expert of layer {layer}"), moe.intermediate_size, unit)?;
                if moe.shared_intermediate_size > 0 {
                    check(format!("the shared expert of layer {layer}"), moe.shared_intermediate_size, unit)?;
                }
            }
            Ffn::Moe(_) => {}
        }
    }
    check("the vocabulary".to_owned(), model.vocab_size, 1)
}

fn check_numbers(file: &PlanFile, model: &ModelSpec) -> Result<(), PlanError> {
    let within = |field: &str, got: f64, range: RangeInclusive<f64>| match range.contains(&got) {
        true => Ok(()),
        false => Err(PlanError::invalid(field, got, format!("a number from {} to {}", range.start(), range.end()))),
    };
    let at_least_1 = |field: &str, got: Option<u64>| match got {
        Some(0) => Err(PlanError::invalid(field, 0, "at least 1")),
        _ => Ok(()),
    };
    if !MICRO_BATCHES.contains(&file.micro_batches) {
        let right = format!("{} to {}", MICRO_BATCHES.start(), MICRO_BATCHES.end());
        return Err(PlanError::invalid("micro_batches", file.micro_batches, right));
    }
    if let Some(balance) = &file.balance {
        at_least_1("balance.interval", Some(balance.interval))?;
        within("balance.threshold", balance.threshold, 0.0..=10.0)?;
        if !(balance.significance > 0.0 && balance.significance < 1.0) {
            return Err(PlanError::invalid(
                "balance.significance",
                balance.significance,
                "more than 0 and less than 1",
            ));
        }
        at_least_1("balance.bytes_per_step", balance.bytes_per_step)?;
    }
    if let Some(synchronize) = &file.synchronize {
        if file.moe.pool == Pool::Shared {
            let right = "absent with `pool: shared`, because there are no two pools to keep in step";
            return Err(PlanError::invalid("synchronize", "there", right));
        }
        at_least_1("synchronize.interval", Some(synchronize.interval))?;
        within("synchronize.threshold", synchronize.threshold, 0.0..=1.0)?;
    }
    let memory = &file.memory;
    if let Some(len) = memory.max_model_len.filter(|len| !(1..=model.max_position_embeddings).contains(len)) {
        let right = format!("1 to the model's max_position_embeddings {}", model.max_position_embeddings);
        return Err(PlanError::invalid("memory.max_model_len", len, right));
    }
    at_least_1("memory.max_num_seqs", memory.max_num_seqs.map(|n| n as u64))?;
    at_least_1("memory.max_num_batched_tokens", memory.max_num_batched_tokens.map(|n| n as u64))?;
    match memory.utilization {
        Some(share) if !(share > 0.0 && share <= 1.0) => {
            Err(PlanError::invalid("memory.utilization", share, "more than 0 and at most 1"))
        }
        _ => Ok(()),
    }
}
