//! From a plan file to a plan: who has what.

use moesaic_spec::{Cluster, ModelSpec};

use crate::eplb::{self, ExpertRank, PlaceError, Policy, RoutingTrace};
use crate::place::Homes;
use crate::plan::{InitialPlacement, Mesh, Pool, Stage};
use crate::{
    AttentionShard, ExpertShard, LayerPlacement, Placement, Plan, PlanError, PlanFile, Rank, RankShard, Slice, rules,
};

impl Plan {
    /// Checks a plan file against a model and a cluster, and says who has what.
    ///
    /// Ranks are numbered stage by stage; in a stage the ranks with attention come first, group by group, then those of an
    /// expert pool of its own. A placement by a trace begins in order; whoever read the trace gives the real one to
    /// [`Plan::with_placement`].
    ///
    /// # Errors
    /// [`PlanError`]: the first rule that is broken.
    pub fn new(file: PlanFile, model: &ModelSpec, cluster: &Cluster) -> Result<Plan, PlanError> {
        rules::check(&file, model, cluster)?;
        let node_of = (0..file.ranks).map(|rank| cluster.node_of(rank)).collect();
        let mut plan = Plan::without_placement(file, model, node_of);
        plan.placement = plan.initial_placement(model)?;
        plan.check_memory(model, cluster)?;
        Ok(plan)
    }

    /// The plan of one rank that has all of the model; it comes from no file.
    pub fn single(model: &ModelSpec) -> Plan {
        let file = PlanFile::new("single", Mesh { tp: 1, pp: 1, dp: 1, ep: 1 }, 1);
        Plan::without_placement(file, model, vec![0])
    }

    /// The same plan with experts elsewhere; the ranks of an expert may come in any order.
    ///
    /// # Errors
    /// [`PlanError`]: the placement breaks one of the rules that a placement in a file must obey.
    pub fn with_placement(self, mut placement: Placement) -> Result<Plan, PlanError> {
        self.check_placement(&placement)?;
        let replicas = placement.layers.iter_mut().flatten().flat_map(|layer| &mut layer.replicas);
        replicas.for_each(|ranks| ranks.sort_unstable());
        Ok(Plan { placement, ..self })
    }

    /// Whether a placement obeys the rules of this plan: the same layers are placed, with as many experts; every expert is
    /// somewhere, on ranks of its stage that hold experts, on none twice; no rank has more than it may, and there are no
    /// more replicas than provided for.
    ///
    /// # Errors
    /// [`PlanError`]: the first rule that is broken.
    pub fn check_placement(&self, placement: &Placement) -> Result<(), PlanError> {
        let (got, layers) = (placement.layers.len(), self.placement.layers.len());
        if got != layers {
            let why = format!("the plan has layers 0 to {}", layers - 1);
            return Err(PlanError::PlacedLayer { layer: got.max(layers) - 1, why });
        }
        for (layer, (new, old)) in placement.layers.iter().zip(&self.placement.layers).enumerate() {
            let wrong = |why: &str| Err(PlanError::PlacedLayer { layer, why: why.to_owned() });
            match (new, old) {
                (None, None) => {}
                (Some(_), None) => return wrong("it has no experts to place"),
                (None, Some(_)) => return wrong("says nothing about its experts"),
                (Some(new), Some(old)) if new.replicas.len() != old.replicas.len() => {
                    let (got, experts) = (new.replicas.len(), old.replicas.len());
                    return Err(PlanError::PlacedExperts { layer, got, experts });
                }
                (Some(new), Some(_)) => self.homes(self.stage_of(layer)).check(layer, new)?,
            }
        }
        Ok(())
    }

    /// By decoder layer: the ranks that may hold its experts, each with its place for replicas; `None` where experts are cut
    /// or there are none.
    pub fn expert_slots(&self) -> Vec<Option<Vec<ExpertRank>>> {
        let slots = |(layer, placed): (usize, &Option<LayerPlacement>)| {
            let num_physical = placed.as_ref()?.replicas.len() + self.file.moe.redundant_experts;
            let ranks = &self.stage_of(layer).expert_ranks;
            let rank = |(idx, &rank): (usize, &Rank)| ExpertRank {
                rank,
                node: self.node_of[rank.idx()],
                slots: Slice { idx, count: ranks.len() }.range(num_physical, 1).len(),
            };
            Some(ranks.iter().enumerate().map(rank).collect())
        };
        self.placement.layers.iter().enumerate().map(slots).collect()
    }

    /// Where experts should live, given what routers chose: evenly loaded, and together on a node where the same tokens
    /// choose them.
    ///
    /// # Errors
    /// [`PlaceError`] for a trace of another model.
    pub fn placement_for(&self, trace: &RoutingTrace) -> Result<Placement, PlaceError> {
        eplb::place_layers(trace, &self.expert_slots(), Policy::Global)
    }

    /// The stage that has a decoder layer.
    ///
    /// # Panics
    /// When no stage has it.
    pub fn stage_of(&self, layer: usize) -> &Stage {
        self.stages.iter().find(|stage| stage.layers.contains(&layer)).expect("every layer is in a stage")
    }

    fn homes<'a>(&'a self, stage: &'a Stage) -> Homes<'a> {
        Homes {
            ranks: &stage.expert_ranks,
            node_of: &self.node_of,
            max_per_rank: self.file.max_experts_per_rank(),
            redundant: self.file.moe.redundant_experts,
        }
    }

    /// Stages and shards of a file that obeys the rules.
    fn without_placement(file: PlanFile, model: &ModelSpec, node_of: Vec<usize>) -> Plan {
        let stages = stages(&file, model);
        let heads = file.head_ranges(model.attention.num_heads());
        let mut shards = Vec::with_capacity(file.ranks);
        for (idx, stage) in stages.iter().enumerate() {
            let shard = |rank, attention, experts| RankShard {
                rank,
                stage: idx,
                layers: stage.layers.clone(),
                attention,
                experts,
            };
            for (group, ranks) in stage.groups.iter().enumerate() {
                for (place, &rank) in ranks.iter().enumerate() {
                    let tp = Slice { idx: place, count: file.mesh.tp };
                    let experts = match (file.moe.pool, file.places_experts()) {
                        (Pool::Separate, _) => ExpertShard::None,
                        (Pool::Shared, true) => ExpertShard::Placed,
                        (Pool::Shared, false) => ExpertShard::Cut(tp),
                    };
                    let attention = AttentionShard {
                        group,
                        tp,
                        heads: heads[place].clone(),
                        backup_heads: backups(place, &file).map(|of| heads[of].clone()).collect(),
                        embeds: idx == 0,
                        has_head: idx + 1 == stages.len(),
                    };
                    shards.push(shard(rank, Some(attention), experts));
                }
            }
            if file.moe.pool == Pool::Separate {
                shards.extend(stage.expert_ranks.iter().map(|&rank| shard(rank, None, ExpertShard::Placed)));
            }
        }
        let placement = Placement { epoch: 0, layers: vec![None; model.layers.len()] };
        Plan { file, stages, shards, placement, node_of }
    }

    /// Where experts live at the start.
    fn initial_placement(&self, model: &ModelSpec) -> Result<Placement, PlanError> {
        let mut layers: Vec<Option<LayerPlacement>> = vec![None; model.layers.len()];
        if !self.file.places_experts() {
            return Ok(Placement { epoch: 0, layers });
        }
        let explicit = match &self.file.moe.placement {
            InitialPlacement::Explicit(layers) => layers.as_slice(),
            InitialPlacement::Linear | InitialPlacement::Trace(_) => &[],
        };
        for stage in &self.stages {
            let homes = self.homes(stage);
            for layer in stage.layers.clone() {
                let Some(moe) = model.layers[layer].as_moe() else { continue };
                homes.check_room(layer, moe.num_experts)?;
                layers[layer] = Some(match explicit.iter().find(|explicit| explicit.layer == layer) {
                    None => homes.linear(moe.num_experts),
                    Some(explicit) => {
                        let sorted = |ranks: &Vec<Rank>| {
                            let mut ranks = ranks.clone();
                            ranks.sort_unstable();
                            ranks
                        };
                        let given = LayerPlacement { replicas: explicit.experts.iter().map(sorted).collect() };
                        homes.check(layer, &given)?;
                        given
                    }
                });
            }
        }
        Ok(Placement { epoch: 0, layers })
    }
}

/// Places of the group whose heads a place holds, too: the ones before it, cyclically. With `tp` 1 the other groups hold
/// all heads as it is.
fn backups(place: usize, file: &PlanFile) -> impl Iterator<Item = usize> {
    let tp = file.mesh.tp;
    let times = if tp > 1 { file.attention.replication.unwrap_or(1) } else { 1 };
    (1..times).map(move |back| (place + tp - back) % tp)
}

fn stages(file: &PlanFile, model: &ModelSpec) -> Vec<Stage> {
    let Mesh { tp, dp, ep, .. } = file.mesh;
    let ranks = |first: usize, count: usize| (first..first + count).map(|rank| Rank(rank as u32)).collect::<Vec<_>>();
    let stage = |(idx, layers)| {
        let first = idx * file.stage_ranks();
        let expert_ranks = match (file.moe.pool, file.places_experts()) {
            (Pool::Separate, _) => ranks(first + tp * dp, ep),
            (Pool::Shared, true) => ranks(first, tp * dp),
            (Pool::Shared, false) => Vec::new(),
        };
        Stage { layers, groups: (0..dp).map(|group| ranks(first + group * tp, tp)).collect(), expert_ranks }
    };
    file.stage_layers(model.layers.len()).into_iter().enumerate().map(stage).collect()
}
