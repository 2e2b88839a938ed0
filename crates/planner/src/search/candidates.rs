//! All layouts of a model on up to so many GPUs.
//!
//! A [`Shape`] says which ranks there are, its [`families`](Space::families) how rows travel between them, and the
//! [`members`](Space::members) of a family how a step goes. What the rules of plans
//! refuse is left out, and so is what can never be faster than something that is there: steps without overlap (they wait
//! more), and rows in 8-bit integers (they take the bytes of 8-bit floats).

use std::collections::BTreeSet;
use std::ops::RangeInclusive;

use moesaic_plan::plan::{ExchangePrecision, MAX_MICRO_BATCHES, Overlap};
use moesaic_plan::{Strategy, can_cut, uneven_heads};
use moesaic_spec::{Cluster, ModelSpec};

use crate::iteration::{ExpertLayout, Layout};

/// Sizes up to which every whole number of nodes is tried; larger ones must divide what there is.
const ALL_NODES_UP_TO: usize = 128;
/// Sizes up to which every number of GPUs is tried.
const ALL_GPUS_UP_TO: usize = 16;
/// Sizes up to which attention and experts share ranks in every ratio; beyond, whole nodes, and the fewest ranks for each
/// number of experts that a rank can have.
const ALL_RATIOS_UP_TO: usize = 32;
/// Nodes that share heads at most: beyond, sums over slow links outweigh all that they save.
const MAX_TP_NODES: usize = 2;

/// Which ranks there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Ranks that share heads.
    pub tp: usize,
    /// Pipeline stages.
    pub pp: usize,
    /// Data-parallel groups of a stage.
    pub dp: usize,
    /// Routed experts.
    pub experts: ExpertLayout,
    /// Times that the whole of it is there; users are shared out.
    pub copies: usize,
    /// GPUs that are paid for: those of all copies, and those that are left over.
    pub gpus: usize,
}

impl Shape {
    /// GPUs of one copy.
    pub fn ranks(&self) -> usize {
        let pool = if let ExpertLayout::Pool { ep } = self.experts { ep } else { 0 };
        self.pp * (self.tp * self.dp + pool)
    }

    /// The strategy that it is a case of.
    pub fn strategy(&self) -> Strategy {
        match (self.experts, self.tp > 1, self.pp > 1) {
            (ExpertLayout::Pool { .. }, ..) => Strategy::Ma,
            (ExpertLayout::Placed { .. }, ..) => Strategy::Ep,
            (_, true, true) => Strategy::TpPp,
            (_, false, true) => Strategy::Pp,
            _ => Strategy::Tp,
        }
    }
}

/// What is searched.
#[derive(Clone, Debug)]
pub struct Space<'a> {
    /// The model.
    pub model: &'a ModelSpec,
    /// The cluster, with as many GPUs as there may be at most.
    pub cluster: &'a Cluster,
    /// GPUs that may be used in all: a plan, or several copies of it, takes no more than the end, and leaves some idle where
    /// it takes fewer than the start.
    pub gpus: RangeInclusive<usize>,
    /// Rows may travel in 8 bits.
    pub compress: bool,
    /// Experts are loaded unevenly, so that placing them by load may pay.
    pub uneven: bool,
    /// GPUs that may fail while everything goes on.
    pub tolerate_failures: usize,
}

impl Space<'_> {
    /// All shapes.
    pub fn shapes(&self) -> Vec<Shape> {
        let mut shapes = Vec::new();
        for ranks in self.sizes() {
            let copies = self.gpus.end() / ranks;
            let gpus = (copies * ranks).max(*self.gpus.start());
            for pp in divisors(ranks).filter(|&pp| pp <= self.model.layers.len()) {
                self.add_stage(
                    ranks / pp,
                    Shape { tp: 1, pp, dp: 1, experts: ExpertLayout::Cut, copies, gpus },
                    &mut shapes,
                );
            }
        }
        shapes
    }

    /// Numbers of GPUs that one copy may have.
    fn sizes(&self) -> BTreeSet<usize> {
        let (least, most, node) = (*self.gpus.start(), *self.gpus.end(), self.cluster.gpus_per_node);
        let whole_nodes = (1..=ALL_NODES_UP_TO.min(most) / node).map(|nodes| nodes * node);
        let few = 1..=if most <= ALL_GPUS_UP_TO { most } else { 0 };
        let all =
            whole_nodes.chain(few).chain(divisors(node)).chain(divisors(most)).chain(divisors(least)).chain([least]);
        // Several copies must be able to come within the range.
        all.filter(|&ranks| ranks <= most && (most / ranks * ranks >= least || least == most)).collect()
    }

    /// All shapes of stages of so many ranks.
    fn add_stage(&self, stage: usize, base: Shape, shapes: &mut Vec<Shape>) {
        for tp in self.tensor_parallel(stage) {
            let shape = Shape { tp, dp: stage / tp, ..base };
            // Where experts are cut, groups are copies of each other already.
            if can_cut(self.model, tp, true) && base.copies == 1 {
                shapes.push(shape);
            }
            if self.model.num_moe_layers() > 0 && stage > 1 && stage <= 2 * self.experts() {
                shapes.push(Shape { experts: ExpertLayout::Placed { ep: stage }, ..shape });
            }
        }
        if base.pp > self.model.num_moe_layers() {
            return;
        }
        for ep in self.pool_sizes(stage) {
            for tp in self.tensor_parallel(stage - ep) {
                shapes.push(Shape { tp, dp: (stage - ep) / tp, experts: ExpertLayout::Pool { ep }, ..base });
            }
        }
    }

    /// Ways of sharing heads among ranks of a stage.
    fn tensor_parallel(&self, ranks: usize) -> impl Iterator<Item = usize> {
        let heads = self.model.attention.num_heads();
        let most = MAX_TP_NODES * self.cluster.gpus_per_node.max(8);
        // Uneven heads only where that is the one way to share them among all.
        let fits = move |&tp: &usize| tp <= most && (heads.is_multiple_of(tp) || tp == ranks);
        divisors(ranks).filter(fits).filter(|&tp| can_cut(self.model, tp, false))
    }

    /// Ranks of an expert pool in a stage of so many.
    fn pool_sizes(&self, stage: usize) -> Vec<usize> {
        let experts = self.experts();
        match stage {
            0..ALL_RATIOS_UP_TO => (1..stage.min(2 * experts + 1)).collect(),
            _ => {
                let fewest: BTreeSet<usize> = (1..=experts).map(|held| experts.div_ceil(held)).collect();
                let most = stage.min(ALL_NODES_UP_TO);
                let nodes = (1..=most / self.cluster.gpus_per_node).map(|nodes| nodes * self.cluster.gpus_per_node);
                let all: BTreeSet<usize> = fewest.into_iter().chain(nodes).collect();
                all.into_iter().filter(|&ep| ep < stage).collect()
            }
        }
    }

    /// Routed experts of a layer.
    fn experts(&self) -> usize {
        self.model.layers.iter().find_map(|ffn| ffn.as_moe()).map_or(0, |moe| moe.num_experts)
    }

    /// Families of layouts of a shape: what travels where, and where experts live. Each stands for its
    /// [`members`](Space::members) by the one without micro-batches.
    pub fn families(&self, shape: &Shape) -> Vec<Layout> {
        let Some(base) = self.base(shape) else { return Vec::new() };
        let exchanges = shape.experts.exchanges();
        let routes: &[bool] = if self.crosses_nodes(shape) { &[false, true] } else { &[false] };
        let balances: &[bool] = if exchanges && self.uneven { &[false, true] } else { &[false] };
        let mut families = Vec::new();
        for redundant_experts in self.redundancies(shape) {
            for &two_level in routes {
                for &balanced in balances {
                    families.push(Layout { redundant_experts, two_level, balanced, ..base.clone() });
                }
            }
        }
        families
    }

    /// A family's layouts: in how many parts a step goes, and what overlaps.
    pub fn members(&self, shape: &Shape, family: &Layout) -> Vec<Layout> {
        let overlaps: &[Overlap] = match self.crosses_nodes(shape) {
            true => &[Overlap::MicroBatches, Overlap::Arrivals],
            false => &[Overlap::MicroBatches],
        };
        let one = |micro_batches| move |&overlap: &Overlap| Layout { micro_batches, overlap, ..family.clone() };
        (1..=MAX_MICRO_BATCHES).flat_map(|micro_batches| overlaps.iter().map(one(micro_batches))).collect()
    }

    /// Whether rows travel between nodes.
    fn crosses_nodes(&self, shape: &Shape) -> bool {
        shape.experts.exchanges() && shape.ranks() / shape.pp > self.cluster.gpus_per_node
    }

    /// What all variants have in common; nothing where failures are to be tolerated and cannot be.
    pub(super) fn base(&self, shape: &Shape) -> Option<Layout> {
        let heads = self.model.attention.num_heads();
        let failures = self.tolerate_failures;
        let held_elsewhere = match (shape.experts.exchanges(), shape.tp) {
            // The other groups go on.
            (false, _) | (true, 1) => shape.dp > failures,
            // A rank's neighbours have its heads.
            (true, tp) => tp > failures,
        };
        let pool_goes_on = !matches!(shape.experts, ExpertLayout::Pool { ep } if ep <= failures);
        if failures > 0 && !(held_elsewhere && pool_goes_on) {
            return None;
        }
        let copied = failures > 0 && shape.tp > 1 && shape.experts.exchanges();
        Some(Layout {
            tp: shape.tp,
            pp: shape.pp,
            dp: shape.dp,
            heads: (!heads.is_multiple_of(shape.tp)).then(|| uneven_heads(heads, shape.tp)),
            experts: shape.experts,
            precision: if shape.experts.exchanges() && self.compress {
                ExchangePrecision::Fp8
            } else {
                ExchangePrecision::Full
            },
            attention_replicas: if copied { failures + 1 } else { 1 },
            stage_layers: self.stage_layers(shape),
            ..Layout::single(self.cluster.gpus_per_node)
        })
    }

    /// Physical experts beyond the logical ones: as many as fill the last places of all ranks, and where experts are loaded
    /// unevenly one more a rank; each expert once more for each failure that must not take it away.
    fn redundancies(&self, shape: &Shape) -> BTreeSet<usize> {
        let (ExpertLayout::Placed { ep } | ExpertLayout::Pool { ep }) = shape.experts else { return [0].into() };
        let experts = self.experts();
        let held = ((1 + self.tolerate_failures) * experts).div_ceil(ep);
        let full = held * ep - experts;
        let all = if self.uneven && ep <= experts { vec![full, full + ep] } else { vec![full] };
        all.into_iter().filter(|&redundant| redundant <= experts * (ep - 1)).collect()
    }

    /// The fewest physical experts beyond the logical ones that a variant has.
    pub(super) fn fewest_replicas(&self, shape: &Shape) -> usize {
        self.redundancies(shape).first().copied().unwrap_or(0)
    }

    /// Layers of each stage, where the even ones are not the best: MoE layers are spread evenly, and a dense layer goes to the
    /// stage of the MoE layer after it.
    fn stage_layers(&self, shape: &Shape) -> Option<Vec<usize>> {
        let is_moe: Vec<bool> = self.model.layers.iter().map(|ffn| ffn.as_moe().is_some()).collect();
        let num_moe = self.model.num_moe_layers();
        if shape.pp == 1 || num_moe < shape.pp || num_moe == is_moe.len() {
            return None;
        }
        let mut counts = vec![0; shape.pp];
        let mut moe_before = 0;
        for &moe in &is_moe {
            // Dense layers after the last MoE layer stay with it.
            counts[(moe_before * shape.pp / num_moe).min(shape.pp - 1)] += 1;
            moe_before += usize::from(moe);
        }
        let even = Layout { pp: shape.pp, ..Layout::single(1) };
        let by_moe = Layout { stage_layers: Some(counts.clone()), ..even.clone() };
        let fullest = |layout: &Layout| {
            let (dense, moe) = layout.fullest_stage(self.model);
            (moe, dense)
        };
        let separate = matches!(shape.experts, ExpertLayout::Pool { .. });
        (separate || fullest(&by_moe) < fullest(&even)).then_some(counts)
    }
}

/// From 1 to `n`, ascending.
fn divisors(n: usize) -> impl Iterator<Item = usize> {
    (1..=n).filter(move |&divisor| n.is_multiple_of(divisor))
}
