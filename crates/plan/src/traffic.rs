//! How many bytes cross which links for one token, expected: from the plan and the shapes, before anything runs.
//!
//! Routing is taken as uniform: a token's K experts are any K of the E, each set as likely as another. Where an expert has
//! replicas, all of them are used alike. Rows and partial results are in the compute type, the residual stream and logits
//! in F32; an 8-bit exchange has one F32 factor for 128 values. Headers of messages are not counted, and sums are those of
//! large batches (small ones take one round, with more bytes).

use moesaic_spec::{Attention, LinkClass, ModelSpec, QkNorm};

use crate::plan::{ExchangePrecision, ExchangeRoute};
use crate::{AllReduce, ExpertShard, LayerPlacement, MessageKind, Plan, Rank, Stage};

/// Values that share a factor in an 8-bit exchange.
const GROUP: usize = 128;

/// One kind of message.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Traffic {
    /// What it is about.
    pub kind: MessageKind,
    /// Layers (for hidden states: boundaries of stages; for logits: 1) that a token causes it in.
    pub times: usize,
    /// Bytes that one token sends over links inside nodes, in one of these layers on average.
    pub intra_bytes: f64,
    /// The same over links between nodes.
    pub inter_bytes: f64,
}

/// Bytes by class of links.
#[derive(Clone, Copy, Default)]
struct ByLink {
    intra: f64,
    inter: f64,
}

impl ByLink {
    fn add(&mut self, class: LinkClass, bytes: f64) {
        match class {
            LinkClass::IntraNode => self.intra += bytes,
            LinkClass::InterNode => self.inter += bytes,
        }
    }

    fn plus(self, other: ByLink) -> ByLink {
        ByLink { intra: self.intra + other.intra, inter: self.inter + other.inter }
    }

    fn over(self, count: usize) -> ByLink {
        let count = count.max(1) as f64;
        ByLink { intra: self.intra / count, inter: self.inter / count }
    }
}

impl Plan {
    /// The class of links between two ranks.
    pub fn link_class(&self, a: Rank, b: Rank) -> LinkClass {
        if self.node_of[a.idx()] == self.node_of[b.idx()] { LinkClass::IntraNode } else { LinkClass::InterNode }
    }

    /// How partial results of a group are summed: as the file says, and where it does not, by topology: hierarchically when
    /// the group is in several nodes with several ranks in each. Groups with unlike numbers of ranks in their nodes are
    /// summed flat in any case.
    pub fn all_reduce_of(&self, group: &[Rank]) -> AllReduce {
        let in_nodes = self.ranks_in_nodes(group);
        let alike = in_nodes.iter().all(|count| *count == in_nodes[0]);
        match self.file.all_reduce {
            Some(AllReduce::Flat) => AllReduce::Flat,
            _ if alike && in_nodes.len() > 1 && in_nodes[0] > 1 => AllReduce::Hierarchical,
            _ => AllReduce::Flat,
        }
    }

    /// Ranks of a group in each node that has some.
    fn ranks_in_nodes(&self, group: &[Rank]) -> Vec<usize> {
        let mut counts: Vec<(usize, usize)> = Vec::new();
        for rank in group {
            let node = self.node_of[rank.idx()];
            match counts.iter_mut().find(|(other, _)| *other == node) {
                Some((_, count)) => *count += 1,
                None => counts.push((node, 1)),
            }
        }
        counts.into_iter().map(|(_, count)| count).collect()
    }

    /// The messages that one token of the forward pass causes, by kind; kinds that the plan does not have are absent.
    /// `model` is the one that the plan was made for.
    pub fn expected_traffic(&self, model: &ModelSpec) -> Vec<Traffic> {
        let element = model.dtype.compute().size_bytes();
        let row = (model.hidden_size * element) as f64;
        let mut traffic = Vec::new();
        let mut push = |kind, times: usize, sum: ByLink| {
            let mean = sum.over(times);
            if mean.intra + mean.inter > 0.0 {
                traffic.push(Traffic { kind, times, intra_bytes: mean.intra, inter_bytes: mean.inter });
            }
        };
        let num_layers = model.layers.len();
        if let Attention::Gqa(gqa) = &model.attention
            && gqa.qk_norm == QkNorm::FullWidth
        {
            // One sum of squares for queries and one for keys.
            push(MessageKind::QkNorm, num_layers, self.sum_of_layers(|stage, _| self.group_sum(stage, 8.0)));
        }
        push(MessageKind::Attention, num_layers, self.sum_of_layers(|stage, _| self.group_sum(stage, row)));

        let is_cut = |layer: usize| self.placement.layers[layer].is_none();
        let cut_layers = (0..num_layers).filter(|&layer| is_cut(layer)).count();
        let mlp = |stage: &Stage, layer| if is_cut(layer) { self.group_sum(stage, row) } else { ByLink::default() };
        push(MessageKind::Mlp, cut_layers, self.sum_of_layers(mlp));

        let placed_layers = num_layers - cut_layers;
        let exchange = self.exchange(model, element);
        push(MessageKind::Dispatch, placed_layers, exchange.dispatch);
        push(MessageKind::Relay, placed_layers, exchange.relay);
        push(MessageKind::Answer, placed_layers, exchange.answer);
        let rows = |stage: &Stage, layer| match is_cut(layer) {
            true => ByLink::default(),
            false => self.gathered_rows(stage, row),
        };
        push(MessageKind::Rows, placed_layers, self.sum_of_layers(rows));

        let boundaries = self.stages.len() - 1;
        push(MessageKind::Hidden, boundaries, self.hidden((model.hidden_size * 4) as f64));
        push(MessageKind::Logits, 1, self.logits((model.vocab_size * 4) as f64));
        traffic
    }

    fn sum_of_layers(&self, of: impl Fn(&Stage, usize) -> ByLink) -> ByLink {
        let in_stage =
            |stage: &Stage| stage.layers.clone().map(|layer| of(stage, layer)).fold(ByLink::default(), ByLink::plus);
        self.stages.iter().map(in_stage).fold(ByLink::default(), ByLink::plus)
    }

    /// Partial results of `bytes` in all, summed over a group; the mean of the stage's groups.
    fn group_sum(&self, stage: &Stage, bytes: f64) -> ByLink {
        let mut sum = ByLink::default();
        for group in &stage.groups {
            let in_nodes = self.ranks_in_nodes(group);
            let n = group.len() as f64;
            match self.all_reduce_of(group) {
                // Two rounds in which each rank sends a part to each other.
                AllReduce::Flat => {
                    let same: f64 = in_nodes.iter().map(|&count| (count * (count - 1)) as f64).sum();
                    sum.intra += 2.0 * same * bytes / n;
                    sum.inter += 2.0 * (n * (n - 1.0) - same) * bytes / n;
                }
                // Inside the nodes each rank sends and gets parts of 1/m; between them it does so with parts of its part.
                AllReduce::Hierarchical => {
                    let (m, k) = (in_nodes[0] as f64, in_nodes.len() as f64);
                    sum.intra += 2.0 * n * (m - 1.0) * bytes / m;
                    sum.inter += 2.0 * n * (k - 1.0) * bytes / (m * k);
                }
            }
        }
        sum.over(stage.groups.len())
    }

    /// A row that one rank of the group computed, to the others; the mean over whose row it is.
    fn gathered_rows(&self, stage: &Stage, row: f64) -> ByLink {
        let mut sum = ByLink::default();
        for group in &stage.groups {
            let pairs = group.iter().flat_map(|from| group.iter().map(move |to| (from, to)));
            for (from, to) in pairs.filter(|(from, to)| from != to) {
                sum.add(self.link_class(*from, *to), row / group.len() as f64);
            }
        }
        sum.over(stage.groups.len())
    }

    /// The residual stream over all boundaries, from each place of a group to the same in the next stage.
    fn hidden(&self, row: f64) -> ByLink {
        let mut sum = ByLink::default();
        for pair in self.stages.windows(2) {
            let ranks = |stage: &Stage| stage.groups.concat();
            for (from, to) in ranks(&pair[0]).into_iter().zip(ranks(&pair[1])) {
                sum.add(self.link_class(from, to), row / pair[0].groups.len() as f64);
            }
        }
        sum
    }

    /// Parts of the logits to the first of the group.
    fn logits(&self, row: f64) -> ByLink {
        let mut sum = ByLink::default();
        let stage = self.stages.last().expect("a plan has stages");
        for group in &stage.groups {
            for &from in &group[1..] {
                sum.add(self.link_class(from, group[0]), row / group.len() as f64);
            }
        }
        sum.over(stage.groups.len())
    }

    /// Tokens to experts and back, over all layers.
    fn exchange(&self, model: &ModelSpec, element: usize) -> ExchangeSum {
        let width = model.hidden_size;
        let row = match self.file.exchange.precision {
            ExchangePrecision::Full => width * element,
            ExchangePrecision::Int8 | ExchangePrecision::Fp8 => width + 4 * width.div_ceil(GROUP),
        };
        let mut total = ExchangeSum::default();
        let mut last: Option<(Form, ExchangeSum)> = None;
        for (layer, placed) in self.placement.layers.iter().enumerate() {
            let (Some(placed), Some(moe)) = (placed, model.layers[layer].as_moe()) else { continue };
            let stage = self.stage_of(layer);
            let senders = stage.groups.concat();
            // Most layers are like the one before, but for the numbers of their ranks and nodes.
            let form = self.form(stage, placed, moe.top_k);
            let sum = match &last {
                Some((like, sum)) if *like == form => *sum,
                _ => {
                    let one = |sum: ExchangeSum, &from: &Rank| {
                        sum.plus(self.exchange_of(
                            from,
                            stage,
                            placed,
                            Choice { of: moe.num_experts, top_k: moe.top_k },
                        ))
                    };
                    senders.iter().fold(ExchangeSum::default(), one).times(row as f64 / senders.len() as f64)
                }
            };
            last = Some((form, sum));
            total = total.plus(sum);
        }
        total
    }

    /// What the exchange of a layer depends on.
    fn form(&self, stage: &Stage, placed: &LayerPlacement, top_k: usize) -> Form {
        let first = stage.groups[0][0];
        let mut ranks = stage.groups.concat();
        ranks.extend(&stage.expert_ranks);
        let nodes = ranks.iter().map(|rank| self.node_of[rank.idx()]);
        // Nodes are numbered as they come.
        let mut seen: Vec<usize> = Vec::new();
        let nodes = nodes.map(|node| {
            seen.iter().position(|other| *other == node).unwrap_or_else(|| {
                seen.push(node);
                seen.len() - 1
            })
        });
        let relative = |ranks: &Vec<Rank>| ranks.iter().map(|rank| rank.0 - first.0).collect();
        Form { nodes: nodes.collect(), replicas: placed.replicas.iter().map(relative).collect(), top_k }
    }

    /// Rows that one token of `from` sends, by link.
    fn exchange_of(&self, from: Rank, stage: &Stage, placed: &LayerPlacement, choice: Choice) -> ExchangeSum {
        let mut sum = ExchangeSum::default();
        let homes = &stage.expert_ranks;
        let first = homes[0].idx();
        // By home, the share of each expert's tokens that go there.
        let mut shares: Vec<Vec<f64>> = vec![Vec::new(); homes.len()];
        for replicas in &placed.replicas {
            replicas.iter().for_each(|rank| shares[rank.idx() - first].push(1.0 / replicas.len() as f64));
        }
        let two_level = self.file.exchange.route == ExchangeRoute::TwoLevel;
        for (home, &to) in homes.iter().enumerate().filter(|(_, to)| **to != from) {
            let class = self.link_class(from, to);
            let slots: f64 = shares[home].iter().sum();
            sum.answer.add(class, slots * choice.top_k as f64 / choice.of as f64);
            if class == LinkClass::IntraNode || !two_level {
                sum.dispatch.add(class, choice.hits(&shares[home]));
            }
        }
        if two_level {
            self.add_relays(from, stage, placed, choice, &shares, &mut sum);
        }
        sum
    }

    /// Once to each other node, to one of its ranks with experts, and on to the others that need it.
    fn add_relays(
        &self,
        from: Rank,
        stage: &Stage,
        placed: &LayerPlacement,
        choice: Choice,
        shares: &[Vec<f64>],
        sum: &mut ExchangeSum,
    ) {
        let node = |rank: Rank| self.node_of[rank.idx()];
        let mut nodes: Vec<usize> = stage.expert_ranks.iter().map(|&rank| node(rank)).collect();
        nodes.dedup();
        for other in nodes.into_iter().filter(|&other| other != node(from)) {
            let in_node = |placed: &Vec<Rank>| {
                let there = placed.iter().filter(|&&rank| node(rank) == other).count();
                (there > 0).then(|| there as f64 / placed.len() as f64)
            };
            let node_shares: Vec<f64> = placed.replicas.iter().filter_map(in_node).collect();
            sum.dispatch.inter += choice.hits(&node_shares);
            let homes = stage.expert_ranks.iter().enumerate().filter(|(_, rank)| node(**rank) == other);
            let hits: Vec<f64> = homes.map(|(home, _)| choice.hits(&shares[home])).collect();
            // Any of them may be the relay, which keeps its own row.
            sum.relay.intra += hits.iter().sum::<f64>() * (1.0 - 1.0 / hits.len() as f64);
        }
    }

    /// Whether any rank works on rows that others computed the attention of.
    pub fn exchanges_tokens(&self) -> bool {
        self.shards.iter().any(|shard| shard.experts == ExpertShard::Placed) && self.world_size() > 1
    }
}

/// A layer's exchange, without the numbers of its ranks and nodes.
#[derive(PartialEq)]
struct Form {
    nodes: Vec<usize>,
    replicas: Vec<Vec<u32>>,
    top_k: usize,
}

/// Rows by link, or bytes.
#[derive(Clone, Copy, Default)]
struct ExchangeSum {
    dispatch: ByLink,
    relay: ByLink,
    answer: ByLink,
}

impl ExchangeSum {
    fn plus(self, other: ExchangeSum) -> ExchangeSum {
        ExchangeSum {
            dispatch: self.dispatch.plus(other.dispatch),
            relay: self.relay.plus(other.relay),
            answer: self.answer.plus(other.answer),
        }
    }

    fn times(self, factor: f64) -> ExchangeSum {
        let times = |link: ByLink| ByLink { intra: link.intra * factor, inter: link.inter * factor };
        ExchangeSum { dispatch: times(self.dispatch), relay: times(self.relay), answer: times(self.answer) }
    }
}

/// Any `top_k` of so many experts, each set as likely as another.
#[derive(Clone, Copy)]
struct Choice {
    of: usize,
    top_k: usize,
}

impl Choice {
    /// The probability that at least one chosen expert is used at a place, given the share of each of the place's experts
    /// that the place gets.
    fn hits(self, shares: &[f64]) -> f64 {
        // missed[j]: the sum over sets of j of the place's experts seen so far of the products of (1 − share); a set of K
        // is j of them and K − j of the others.
        let mut missed = vec![0.0; self.top_k + 1];
        missed[0] = 1.0;
        for share in shares {
            for j in (1..=self.top_k).rev() {
                missed[j] += missed[j - 1] * (1.0 - share);
            }
        }
        let others = self.of - shares.len();
        let all = binomial(self.of, self.top_k);
        let none: f64 = (0..=self.top_k).map(|j| missed[j] * binomial(others, self.top_k - j)).sum();
        1.0 - none / all
    }
}

/// n over k; 0 where k > n.
fn binomial(n: usize, k: usize) -> f64 {
    if k > n {
        return 0.0;
    }
    (0..k).map(|i| (n - i) as f64 / (k - i) as f64).product()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against all sets of K, counted one by one.
    #[test]
    fn hits_are_those_of_all_sets() {
        let shares = [1.0, 0.5, 0.25];
        let (of, top_k) = (7usize, 3usize);
        let (mut sets, mut hit) = (0.0, 0.0);
        for set in (0u32..1 << of).filter(|set| set.count_ones() as usize == top_k) {
            let missed: f64 = (0..shares.len()).filter(|e| set & (1 << e) != 0).map(|e| 1.0 - shares[e]).product();
            sets += 1.0;
            hit += 1.0 - missed;
        }
        assert!((Choice { of, top_k }.hits(&shares) - hit / sets).abs() < 1e-12);
        assert_eq!(Choice { of, top_k }.hits(&[]), 0.0);
        assert!((Choice { of: 3, top_k: 3 }.hits(&[1.0]) - 1.0).abs() < 1e-12);
    }
}
