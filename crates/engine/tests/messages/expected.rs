//! The messages of a step as they follow from the plan, the placement and what routers chose: a second description, by the
//! words of `docs` and of the papers, that shares no code with what sends them.

use std::collections::{BTreeMap, BTreeSet};

use moesaic_engine::StepRecord;
use moesaic_model::Choices;
use moesaic_plan::plan::{ExchangePrecision, ExchangeRoute};
use moesaic_plan::{
    AllReduce, ExpertShard, LayerPlacement, MessageKind, Placement, Plan, Rank, Slice, Stage, Tag, Work,
};
use moesaic_spec::{Attention, Ffn, ModelSpec, QkNorm};

/// Bytes by sender, receiver and name.
pub(crate) type Messages = BTreeMap<(Rank, Rank, Tag), u64>;

/// What the messages of a step follow from.
pub(crate) struct Facts<'a> {
    pub plan: &'a Plan,
    pub spec: &'a ModelSpec,
    /// With which the step ran.
    pub placement: &'a Placement,
    pub record: &'a StepRecord,
    /// Bytes of a value between ops.
    pub value_bytes: u64,
}

/// Bytes of a sum below which it takes one round.
const ONE_ROUND: u64 = 64 << 10;

/// All messages of a step that keeps the logits of every position.
pub(crate) fn messages(facts: &Facts) -> Messages {
    let num_micro_batches = facts.record.sequences[0].len();
    let mut all = Messages::new();
    for mb in 0..num_micro_batches {
        for stage in &facts.plan.stages {
            Part { facts, stage, mb, rows: facts.rows(mb), all: &mut all }.stage();
        }
    }
    all
}

impl Facts<'_> {
    /// Rows of each data-parallel group in a micro-batch: those that the first stage embedded.
    fn rows(&self, mb: usize) -> Vec<usize> {
        let rows = |group: &Vec<Rank>| {
            let schedule = self.plan.schedule(self.spec, group[0], self.record.sequences[0].len());
            let is_embed =
                |action: &moesaic_plan::Action| action.work == Work::Embed && action.micro_batch as usize == mb;
            let action = schedule.actions.iter().position(is_embed).expect("the first stage embeds");
            let calls = &self.record.ranks[group[0].idx()].calls[action];
            let embedded = calls.iter().find(|call| call.op == "embedding");
            embedded.map_or(0, |call| call.dims.iter().find(|(name, _)| *name == "T").expect("T").1 as usize)
        };
        self.plan.stages[0].groups.iter().map(rows).collect()
    }
}

/// One micro-batch in one stage.
struct Part<'a> {
    facts: &'a Facts<'a>,
    stage: &'a Stage,
    mb: usize,
    /// By group.
    rows: Vec<usize>,
    all: &'a mut Messages,
}

/// Pairs of one source that one rank answers, and the rows that they are of.
#[derive(Default)]
struct Share {
    rows: BTreeSet<usize>,
    pairs: u64,
}

impl Part<'_> {
    fn stage(&mut self) {
        let Facts { plan, spec, .. } = *self.facts;
        let width = spec.hidden_size;
        let last_layer = self.stage.layers.end - 1;
        for (group, ranks) in self.stage.groups.iter().enumerate() {
            let rows = self.rows[group];
            for layer in self.stage.layers.clone() {
                let shared_norm = matches!(&spec.attention, Attention::Gqa(gqa) if gqa.qk_norm == QkNorm::FullWidth);
                if shared_norm {
                    self.sum(MessageKind::QkNorm, layer, ranks, rows * 2);
                }
                self.sum(MessageKind::Attention, layer, ranks, rows * width);
                match (&spec.layers[layer], plan.shards[ranks[0].idx()].experts) {
                    (Ffn::Dense(_), _) | (Ffn::Moe(_), ExpertShard::Cut(_)) => {
                        self.sum(MessageKind::Mlp, layer, ranks, rows * width);
                    }
                    // Each rank of the group has rows of its own, and the others get its sums.
                    (Ffn::Moe(_), _) => {
                        for (idx, &from) in ranks.iter().enumerate() {
                            let own = Slice { idx, count: ranks.len() }.range(rows, 1).len() as u64;
                            let bytes = own * width as u64 * self.facts.value_bytes;
                            self.give_others(from, ranks, (MessageKind::Rows, layer, 0), bytes);
                        }
                    }
                }
            }
            let stage = plan.shards[ranks[0].idx()].stage;
            for (idx, &from) in ranks.iter().enumerate() {
                match plan.stages.get(stage + 1) {
                    Some(next) => {
                        let bytes = (rows * width * 4) as u64;
                        self.add(from, next.groups[group][idx], (MessageKind::Hidden, last_layer, 0), bytes);
                    }
                    None if idx > 0 => {
                        let columns = Slice { idx, count: ranks.len() }.range(spec.vocab_size, 1).len();
                        let bytes = (rows * columns * 4) as u64;
                        self.add(from, ranks[0], (MessageKind::Logits, last_layer, 0), bytes);
                    }
                    None => {}
                }
            }
        }
        for layer in self.stage.layers.clone() {
            if let Some(placed) = &self.facts.placement.layers[layer] {
                self.exchange(layer, placed);
            }
        }
    }

    fn add(&mut self, from: Rank, to: Rank, (kind, layer, round): (MessageKind, usize, u8), bytes: u64) {
        if bytes > 0 {
            let (step, micro_batch) = (self.facts.record.step, self.mb as u32);
            let tag = Tag { step, layer: layer as u32, micro_batch, kind, round };
            assert_eq!(self.all.insert((from, to, tag), bytes), None, "one message has one name: {tag}");
        }
    }

    fn give_others(&mut self, from: Rank, ranks: &[Rank], name: (MessageKind, usize, u8), bytes: u64) {
        ranks.iter().filter(|&&to| to != from).for_each(|&to| self.add(from, to, name, bytes));
    }

    /// All-reduce of so many values: those of the norm in F32, others as between ops.
    fn sum(&mut self, kind: MessageKind, layer: usize, ranks: &[Rank], elements: usize) {
        if ranks.len() == 1 {
            return;
        }
        let node = |rank: Rank| self.facts.plan.node_of[rank.idx()];
        let mut nodes: Vec<Vec<Rank>> = Vec::new();
        for &rank in ranks {
            match nodes.iter_mut().find(|ranks| node(ranks[0]) == node(rank)) {
                Some(ranks) => ranks.push(rank),
                None => nodes.push(vec![rank]),
            }
        }
        let bytes_of = self.bytes_of(kind);
        match self.facts.plan.all_reduce_of(ranks) {
            AllReduce::Flat => self.flat((kind, layer, 0), ranks, elements),
            AllReduce::Hierarchical => {
                // As many parts as the smallest node has ranks: scattered inside each node, summed between the nodes,
                // gathered inside each node.
                let parts = nodes.iter().map(Vec::len).min().expect("a node");
                for place in 0..parts {
                    let part = aligned(place, parts, elements);
                    let peers: Vec<Rank> = nodes.iter().map(|ranks| ranks[place]).collect();
                    for ranks in &nodes {
                        let others = ranks.iter().filter(|&&from| from != ranks[place]);
                        others.for_each(|&from| self.add(from, ranks[place], (kind, layer, 0), bytes_of * part as u64));
                        self.give_others(ranks[place], ranks, (kind, layer, 3), bytes_of * part as u64);
                    }
                    self.flat((kind, layer, 1), &peers, part);
                }
            }
        }
    }

    fn bytes_of(&self, kind: MessageKind) -> u64 {
        if kind == MessageKind::QkNorm { 4 } else { self.facts.value_bytes }
    }

    fn flat(&mut self, (kind, layer, round): (MessageKind, usize, u8), ranks: &[Rank], elements: usize) {
        let bytes_of = self.bytes_of(kind);
        let all = bytes_of * elements as u64;
        if all < ONE_ROUND {
            ranks.iter().for_each(|&from| self.give_others(from, ranks, (kind, layer, round), all));
            return;
        }
        for (place, &sums) in ranks.iter().enumerate() {
            let bytes = bytes_of * aligned(place, ranks.len(), elements) as u64;
            let others = ranks.iter().filter(|&&from| from != sums);
            others.for_each(|&from| self.add(from, sums, (kind, layer, round), bytes));
            self.give_others(sums, ranks, (kind, layer, round + 1), bytes);
        }
    }

    /// Rows to experts and back.
    fn exchange(&mut self, layer: usize, placed: &LayerPlacement) {
        let Facts { plan, record, .. } = *self.facts;
        let sources: Vec<Rank> = self.stage.groups.concat();
        let mut shares: BTreeMap<(Rank, Rank), Share> = BTreeMap::new();
        let chosen = |choices: &&Choices| choices.layer as usize == layer && choices.micro_batch as usize == self.mb;
        let mut with_rows = Vec::new();
        for (turn, &source) in sources.iter().enumerate() {
            let Some(choices) = record.ranks[source.idx()].choices.iter().find(chosen) else { continue };
            if choices.expert_of.is_empty() {
                continue;
            }
            with_rows.push(source);
            self.shares_of((turn, source), choices, placed, &mut shares);
        }
        let none = Share::default();
        let share = |source: Rank, at: Rank| shares.get(&(source, at)).unwrap_or(&none);
        let node = |rank: Rank| plan.node_of[rank.idx()];
        let nodes: BTreeSet<usize> = self.stage.expert_ranks.iter().map(|&rank| node(rank)).collect();
        let two_level = plan.file.exchange.route == ExchangeRoute::TwoLevel;
        // Who passes on what a source sends to another node.
        let relay = |source: Rank, at: usize| {
            let there: Vec<Rank> = self.stage.expert_ranks.iter().copied().filter(|&rank| node(rank) == at).collect();
            let here = sources.iter().filter(|&&other| node(other) == node(source));
            let place = here.take_while(|&&other| other != source).count();
            there[place % there.len()]
        };
        let mut relayed: BTreeMap<Rank, Vec<Rank>> = BTreeMap::new();
        let mut sent: Vec<(Rank, Rank, MessageKind, u64)> = Vec::new();
        for &source in &with_rows {
            for &to in self.stage.expert_ranks.iter().filter(|&&to| to != source) {
                if !two_level || node(to) == node(source) {
                    sent.push((source, to, MessageKind::Dispatch, self.rows_bytes(&[share(source, to)])));
                }
                sent.push((to, source, MessageKind::Answer, share(source, to).pairs * self.row_bytes()));
            }
            for &at in nodes.iter().filter(|&&at| two_level && at != node(source)) {
                let there = self.stage.expert_ranks.iter().filter(|&&rank| node(rank) == at);
                let parts: Vec<&Share> = there.map(|&to| share(source, to)).collect();
                relayed.entry(relay(source, at)).or_default().push(source);
                sent.push((source, relay(source, at), MessageKind::Dispatch, self.rows_bytes(&parts)));
            }
        }
        for (&relay, from) in &relayed {
            for &to in self.stage.expert_ranks.iter().filter(|&&to| to != relay && node(to) == node(relay)) {
                // Rows of different sources are different rows.
                let parts: Vec<&Share> = from.iter().map(|&source| share(source, to)).collect();
                let rows: usize = parts.iter().map(|part| part.rows.len()).sum();
                let bytes = header_bytes(&parts) + rows as u64 * self.row_bytes();
                sent.push((relay, to, MessageKind::Relay, bytes));
            }
        }
        sent.into_iter().for_each(|(from, to, kind, bytes)| self.add(from, to, (kind, layer, 0), bytes));
    }

    /// Every pair goes to a rank with its expert; replicas are used in turn, each source beginning at another one.
    fn shares_of(
        &self,
        (turn, source): (usize, Rank),
        choices: &Choices,
        placed: &LayerPlacement,
        shares: &mut BTreeMap<(Rank, Rank), Share>,
    ) {
        let top_k = self.facts.spec.layers[choices.layer as usize].as_moe().expect("a layer with experts").top_k;
        let mut used: BTreeMap<i32, usize> = BTreeMap::new();
        for (row, experts) in choices.expert_of.chunks(top_k).enumerate() {
            for &expert in experts.iter().filter(|&&expert| expert >= 0) {
                let replicas = &placed.replicas[expert as usize];
                let used = used.entry(expert).or_default();
                let share = shares.entry((source, replicas[(turn + *used) % replicas.len()])).or_default();
                *used += 1;
                share.rows.insert(row);
                share.pairs += 1;
            }
        }
    }

    /// A row on its way: values as computed, or one byte each and a factor (F32) for 128 of them.
    fn row_bytes(&self) -> u64 {
        let width = self.facts.spec.hidden_size as u64;
        match self.facts.plan.file.exchange.precision {
            ExchangePrecision::Full => width * self.facts.value_bytes,
            ExchangePrecision::Int8 | ExchangePrecision::Fp8 => width + 4 * width.div_ceil(128),
        }
    }

    /// Rows of one source for several ranks: each row once.
    fn rows_bytes(&self, parts: &[&Share]) -> u64 {
        let rows: BTreeSet<usize> = parts.iter().flat_map(|part| part.rows.iter().copied()).collect();
        header_bytes(parts) + rows.len() as u64 * self.row_bytes()
    }
}

/// A word for the number of sections, three for each section and one for each pair.
fn header_bytes(parts: &[&Share]) -> u64 {
    let sections = parts.iter().filter(|part| part.pairs > 0);
    4 * (1 + sections.map(|part| 3 + part.pairs).sum::<u64>())
}

/// Elements of a part that begins and ends on cache lines, as those of 32 values of two bytes do.
fn aligned(place: usize, parts: usize, elements: usize) -> usize {
    let lines = elements.div_ceil(32);
    let at = |place: usize| (lines * place / parts * 32).min(elements);
    at(place + 1) - at(place)
}
