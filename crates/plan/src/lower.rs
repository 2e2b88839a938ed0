//! From a plan to the schedule of each rank: the only place where ways of spreading a model differ.
//!
//! Every layer is the same few actions. Which of them a rank has follows from its shard: heads that are split need a sum,
//! stages need hidden states, placed experts need rows to travel. Micro-batches are interleaved layer by layer where they
//! are to overlap (one is exchanged while another is computed), and follow each other through the whole stage where they
//! fill a pipeline or nothing may overlap.

use moesaic_spec::{Attention, Ffn, ModelSpec, QkNorm};

use crate::plan::{ExchangeRoute, Overlap};
use crate::{
    Action, AttentionShard, ExpertShard, Lane, MessageKind, Peers, Plan, Rank, RankShard, Schedule, Stage, Work,
};

impl Plan {
    /// What a rank does in a step of so many micro-batches.
    pub fn schedule(&self, model: &ModelSpec, rank: Rank, num_micro_batches: usize) -> Schedule {
        let shard = &self.shards[rank.idx()];
        let stage = &self.stages[shard.stage];
        let mut lowering = Lowering {
            plan: self,
            model,
            shard,
            stage,
            sources: stage.groups.concat(),
            actions: Vec::new(),
            tails: vec![Tail::default(); num_micro_batches],
        };
        lowering.lower(num_micro_batches);
        Schedule { rank, actions: lowering.actions }
    }

    /// The rank that takes what `source` sends to a node and passes it on there; `None` where the node has no experts of
    /// the stage. Sources of one node use the ranks of the other in turn.
    pub fn relay_of(&self, stage: &Stage, source: Rank, node: usize) -> Option<Rank> {
        let there: Vec<Rank> = self.on_node(&stage.expert_ranks, node).collect();
        let own_node = self.node_of[source.idx()];
        let place = stage.groups.iter().flatten().filter(|rank| self.node_of[rank.idx()] == own_node);
        let place = place.take_while(|&&rank| rank != source).count();
        (!there.is_empty()).then(|| there[place % there.len()])
    }

    fn on_node<'a>(&'a self, ranks: &'a [Rank], node: usize) -> impl Iterator<Item = Rank> + 'a {
        ranks.iter().copied().filter(move |rank| self.node_of[rank.idx()] == node)
    }
}

/// What the next actions of a micro-batch wait for.
#[derive(Clone, Default)]
struct Tail {
    /// The last action of the chain.
    last: Vec<u32>,
    /// What the weighted sum will need.
    for_combine: Vec<u32>,
}

struct Lowering<'a> {
    plan: &'a Plan,
    model: &'a ModelSpec,
    shard: &'a RankShard,
    stage: &'a Stage,
    /// Ranks of the stage that have rows.
    sources: Vec<Rank>,
    actions: Vec<Action>,
    tails: Vec<Tail>,
}

impl Lowering<'_> {
    fn lower(&mut self, num_micro_batches: usize) {
        let layers = self.stage.layers.clone();
        let interleaved = self.plan.stages.len() == 1 && self.plan.file.overlap != Overlap::None;
        if interleaved {
            (0..num_micro_batches).for_each(|mb| self.begin(mb));
            for layer in layers.clone() {
                for mb in 0..num_micro_batches {
                    self.before_experts(layer, mb);
                }
                for mb in 0..num_micro_batches {
                    self.experts(layer, mb);
                }
            }
            (0..num_micro_batches).for_each(|mb| self.end(mb));
        } else {
            for mb in 0..num_micro_batches {
                self.begin(mb);
                for layer in layers.clone() {
                    self.before_experts(layer, mb);
                    self.experts(layer, mb);
                }
                self.end(mb);
            }
        }
    }

    fn begin(&mut self, mb: usize) {
        let Some(attention) = &self.shard.attention else { return };
        let first = self.stage.layers.start;
        match attention.embeds {
            true => self.chain(Work::Embed, first, mb, Lane::Compute),
            false => {
                let from = self.neighbour(self.shard.stage - 1, attention);
                self.chain(Work::ReceiveHidden { from }, first, mb, Lane::Comm);
            }
        }
    }

    /// The rank of another stage that has the same rows and place.
    fn neighbour(&self, stage: usize, attention: &AttentionShard) -> Rank {
        self.plan.stages[stage].groups[attention.group][attention.tp.idx]
    }

    /// The answers of the layer before are summed as late as they can be, so that they have time to arrive.
    fn before_experts(&mut self, layer: usize, mb: usize) {
        let Some(attention) = &self.shard.attention else { return };
        if layer > self.stage.layers.start {
            self.combine(layer - 1, mb);
        }
        self.attention(attention, layer, mb);
        match &self.model.layers[layer] {
            Ffn::Dense(_) => {
                self.chain(Work::Mlp, layer, mb, Lane::Compute);
                self.sum(attention, MessageKind::Mlp, layer, mb);
            }
            Ffn::Moe(moe) => {
                let shared = moe.shared_intermediate_size > 0;
                self.route(layer, mb, shared);
            }
        }
    }

    fn attention(&mut self, attention: &AttentionShard, layer: usize, mb: usize) {
        let full_width = matches!(&self.model.attention, Attention::Gqa(gqa) if gqa.qk_norm == QkNorm::FullWidth);
        if full_width && !attention.tp.is_whole() {
            self.chain(Work::Project, layer, mb, Lane::Compute);
            self.sum(attention, MessageKind::QkNorm, layer, mb);
            self.chain(Work::Attend, layer, mb, Lane::Compute);
        } else {
            self.chain(Work::Attention, layer, mb, Lane::Compute);
        }
        self.sum(attention, MessageKind::Attention, layer, mb);
    }

    /// The sum of a partial result over the tensor-parallel group, where there is one.
    fn sum(&mut self, attention: &AttentionShard, of: MessageKind, layer: usize, mb: usize) {
        if attention.tp.is_whole() {
            return;
        }
        let group: Peers = self.stage.groups[attention.group].clone().into();
        let algorithm = self.plan.all_reduce_of(&group);
        self.chain(Work::AllReduce { of, group, algorithm }, layer, mb, Lane::Comm);
    }

    fn route(&mut self, layer: usize, mb: usize, shared: bool) {
        self.chain(Work::Route, layer, mb, Lane::Compute);
        let routed = self.tails[mb].last.clone();
        let to = self.dispatch_targets();
        if !to.is_empty() {
            self.push(Work::Dispatch { to }, layer, mb, Lane::Comm, routed.clone());
        }
        let mut for_combine = routed.clone();
        if shared {
            for_combine.push(self.push(Work::SharedExpert, layer, mb, Lane::Compute, routed));
        }
        self.tails[mb].for_combine = for_combine;
    }

    /// Everybody with experts, or those of the own node and one of each other node.
    fn dispatch_targets(&self) -> Peers {
        let rank = self.shard.rank;
        let others = self.stage.expert_ranks.iter().copied().filter(|&to| to != rank);
        match self.plan.file.exchange.route {
            ExchangeRoute::Direct => others.collect(),
            ExchangeRoute::TwoLevel => {
                let own_node = self.plan.node_of[rank.idx()];
                let mut to: Vec<Rank> = others.filter(|to| self.plan.node_of[to.idx()] == own_node).collect();
                to.extend(self.nodes().filter(|&node| node != own_node).filter_map(|node| self.relay(rank, node)));
                to.sort_unstable();
                to.into()
            }
        }
    }

    fn nodes(&self) -> impl Iterator<Item = usize> {
        0..self.plan.node_of.iter().max().map_or(0, |last| last + 1)
    }

    fn relay(&self, source: Rank, node: usize) -> Option<Rank> {
        self.plan.relay_of(self.stage, source, node)
    }

    fn experts(&mut self, layer: usize, mb: usize) {
        if !matches!(self.model.layers[layer], Ffn::Moe(_)) {
            return;
        }
        match self.shard.experts {
            ExpertShard::None => {}
            ExpertShard::Cut(_) => {
                let own = [self.shard.rank].into();
                self.work_of_experts(own, [].into(), [].into(), layer, mb);
            }
            ExpertShard::Placed => self.placed_experts(layer, mb),
        }
    }

    fn placed_experts(&mut self, layer: usize, mb: usize) {
        let rank = self.shard.rank;
        let node = self.plan.node_of[rank.idx()];
        let (near, far): (Vec<Rank>, Vec<Rank>) =
            self.sources.iter().partition(|source| self.plan.node_of[source.idx()] == node);
        let without_self = |ranks: &[Rank]| ranks.iter().copied().filter(|&r| r != rank).collect::<Peers>();
        let mut relays: Vec<Rank> = Vec::new();
        if self.plan.file.exchange.route == ExchangeRoute::TwoLevel {
            relays = far.iter().filter_map(|&source| self.relay(source, node)).collect();
            relays.sort_unstable();
            relays.dedup();
            if relays.contains(&rank) {
                let from: Peers =
                    far.iter().copied().filter(|&source| self.relay(source, node) == Some(rank)).collect();
                let to = self.plan.on_node(&self.stage.expert_ranks, node).filter(|&to| to != rank).collect();
                let relayed = self.push(Work::Relay { from, to }, layer, mb, Lane::Comm, Vec::new());
                self.tails[mb].for_combine.push(relayed);
            }
        }
        // Directly, rows of other nodes come from their own ranks.
        let far_direct: &[Rank] = if relays.is_empty() { &far } else { &[] };
        let early = self.plan.file.overlap == Overlap::Arrivals && !near.is_empty() && !far.is_empty();
        if early {
            self.work_of_experts(near.clone().into(), [].into(), without_self(&near), layer, mb);
            self.work_of_experts(far_direct.into(), relays.into(), without_self(&far), layer, mb);
        } else {
            let from = self.sources.iter().copied().filter(|r| near.contains(r) || far_direct.contains(r)).collect();
            self.work_of_experts(from, relays.into(), without_self(&self.sources), layer, mb);
        }
    }

    fn work_of_experts(&mut self, from: Peers, relays: Peers, answer_to: Peers, layer: usize, mb: usize) {
        // On a rank with rows of its own, they are routed first; on a relay, what it passes on is there.
        let mut after = self.tails[mb].for_combine.clone();
        after.retain(|&idx| matches!(self.actions[idx as usize].work, Work::Route | Work::Relay { .. }));
        let done = self.push(Work::Experts { from, relays }, layer, mb, Lane::Compute, after);
        if !answer_to.is_empty() {
            self.push(Work::Answer { to: answer_to }, layer, mb, Lane::Comm, vec![done]);
        }
        self.tails[mb].for_combine.push(done);
        if self.shard.attention.is_none() {
            self.tails[mb].for_combine.clear();
        }
    }

    fn combine(&mut self, layer: usize, mb: usize) {
        let Some(attention) = &self.shard.attention else { return };
        if !matches!(self.model.layers[layer], Ffn::Moe(_)) {
            return;
        }
        let from: Peers = self.stage.expert_ranks.iter().copied().filter(|&from| from != self.shard.rank).collect();
        let after = std::mem::take(&mut self.tails[mb].for_combine);
        let combined = self.push(Work::Combine { from }, layer, mb, Lane::Compute, after);
        self.tails[mb].last = vec![combined];
        if attention.tp.is_whole() {
            return;
        }
        match self.shard.experts {
            ExpertShard::Cut(_) => self.sum(attention, MessageKind::Mlp, layer, mb),
            // Each rank of the group had rows of its own.
            _ => {
                let group: Peers = self.stage.groups[attention.group].clone().into();
                self.chain(Work::AllGather { group }, layer, mb, Lane::Comm);
            }
        }
    }

    fn end(&mut self, mb: usize) {
        let Some(attention) = &self.shard.attention else { return };
        let last = self.stage.layers.end - 1;
        self.combine(last, mb);
        if !attention.has_head {
            let to = self.neighbour(self.shard.stage + 1, attention);
            self.chain(Work::SendHidden { to }, last, mb, Lane::Comm);
            return;
        }
        self.chain(Work::Head, last, mb, Lane::Compute);
        if !attention.tp.is_whole() {
            let group: Peers = self.stage.groups[attention.group].clone().into();
            self.chain(Work::GatherLogits { group }, last, mb, Lane::Comm);
        }
        if attention.tp.idx == 0 {
            self.chain(Work::Sample, last, mb, Lane::Compute);
        }
    }

    /// An action that waits for the one before it in its micro-batch, and that the next one waits for.
    fn chain(&mut self, work: Work, layer: usize, mb: usize, lane: Lane) {
        let after = std::mem::take(&mut self.tails[mb].last);
        let idx = self.push(work, layer, mb, lane, after);
        self.tails[mb].last = vec![idx];
    }

    fn push(&mut self, work: Work, layer: usize, mb: usize, lane: Lane, mut after: Vec<u32>) -> u32 {
        let idx = self.actions.len() as u32;
        if self.plan.file.overlap == Overlap::None && idx > 0 {
            after.push(idx - 1);
        }
        after.sort_unstable();
        after.dedup();
        self.actions.push(Action { work, layer: layer as u32, micro_batch: mb as u32, lane, after });
        idx
    }
}
