//! The actions of a step as a small graph, for one rank of each kind.
//!
//! Ranks of one kind do the same at the same time, so one stands for all of them: 14,848 GPUs cost what 16 cost. The graph
//! comes from the plan's own schedule, on a model of a few layers; what each action takes is put in later, so one graph
//! serves every batch size and every cluster.

use std::collections::HashMap;

use moesaic_plan::plan::{ExchangeRoute, Mesh, Overlap, Pool};
use moesaic_plan::{Action, AllReduce, Lane, MessageKind, Plan, PlanFile, Rank, Work};
use moesaic_spec::{Attention, Ffn, ModelSpec, Moe, QkNorm, Router};

use super::parts::{boundless, few_layers};
use crate::PlannerError;

/// What an action of the graph takes its time from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum Slot {
    /// Embedding.
    Embed,
    /// Attention.
    Attention,
    /// Its second half, where a sum is between the halves; its time is in the first.
    Attend,
    /// Dense MLP.
    Mlp,
    /// Router.
    Route,
    /// Shared expert.
    SharedExpert,
    /// Routed experts, all rows.
    Experts,
    /// Routed experts, rows of the own node.
    ExpertsNear,
    /// Routed experts, rows of other nodes.
    ExpertsFar,
    /// Weighted sum.
    Combine,
    /// Logits.
    Head,
    /// Next token.
    Sample,
    /// Sum of the query/key norm.
    SumNorm,
    /// Sum of attention.
    SumAttention,
    /// Sum of MLPs or cut experts.
    SumMlp,
    /// Rows to experts, until the last is there.
    Dispatch,
    /// Rows to experts, until those of the own node are there.
    DispatchNear,
    /// Rows that came once to a node, fanned out inside it.
    Relay,
    /// Answers back.
    Answer,
    /// Answers to the own node only.
    AnswerNear,
    /// Rows of a tensor-parallel group.
    AllGather,
    /// Parts of the logits.
    GatherLogits,
    /// The residual stream to the next stage.
    Hidden,
}

/// How many slots there are.
pub const SLOTS: usize = Slot::Hidden as usize + 1;

impl Slot {
    /// All, in order.
    pub const ALL: [Slot; SLOTS] = [
        Slot::Embed,
        Slot::Attention,
        Slot::Attend,
        Slot::Mlp,
        Slot::Route,
        Slot::SharedExpert,
        Slot::Experts,
        Slot::ExpertsNear,
        Slot::ExpertsFar,
        Slot::Combine,
        Slot::Head,
        Slot::Sample,
        Slot::SumNorm,
        Slot::SumAttention,
        Slot::SumMlp,
        Slot::Dispatch,
        Slot::DispatchNear,
        Slot::Relay,
        Slot::Answer,
        Slot::AnswerNear,
        Slot::AllGather,
        Slot::GatherLogits,
        Slot::Hidden,
    ];

    /// Whether links work, and not the GPU.
    pub fn is_exchange(self) -> bool {
        self as usize >= Slot::SumNorm as usize
    }

    /// How often a micro-batch pays for it in so many dense and MoE layers. Slots that are parts of another count once, in
    /// that one.
    pub fn times(self, dense: usize, moe: usize) -> f64 {
        let times = match self {
            Slot::Attention | Slot::SumNorm | Slot::SumAttention | Slot::SumMlp => dense + moe,
            Slot::Mlp => dense,
            Slot::Route
            | Slot::SharedExpert
            | Slot::Experts
            | Slot::Combine
            | Slot::Dispatch
            | Slot::Relay
            | Slot::Answer
            | Slot::AllGather => moe,
            Slot::Embed | Slot::Head | Slot::Sample | Slot::GatherLogits | Slot::Hidden => 1,
            Slot::Attend | Slot::ExpertsNear | Slot::ExpertsFar | Slot::DispatchNear | Slot::AnswerNear => 0,
        };
        times as f64
    }
}

/// Seconds by slot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Durations(pub [f64; SLOTS]);

impl Default for Durations {
    fn default() -> Self {
        Durations([0.0; SLOTS])
    }
}

impl std::ops::Index<Slot> for Durations {
    type Output = f64;

    fn index(&self, slot: Slot) -> &f64 {
        &self.0[slot as usize]
    }
}

impl std::ops::IndexMut<Slot> for Durations {
    fn index_mut(&mut self, slot: Slot) -> &mut f64 {
        &mut self.0[slot as usize]
    }
}

/// Ranks with experts that a surrogate has at most.
const MOST_RANKS: usize = 4;

/// What the graph depends on, and nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Structure {
    /// Heads are split.
    pub tp: bool,
    /// Whole experts are placed on ranks.
    pub placed: bool,
    /// Experts have ranks of their own.
    pub separate: bool,
    /// The ranks that exchange rows are on several nodes.
    pub nodes: bool,
    /// Tokens go once to each node.
    pub two_level: bool,
    /// What may run at the same time.
    pub overlap: Overlap,
    /// Parts of the step.
    pub micro_batches: usize,
    /// Dense layers.
    pub dense: usize,
    /// MoE layers.
    pub moe: usize,
}

/// When something that another action needs is there.
#[derive(Clone, Copy, Debug)]
enum Ready {
    /// When that action is done.
    Done(u32),
    /// So long after that action has begun.
    After(u32, Slot),
}

#[derive(Clone, Debug)]
struct Node {
    slot: Slot,
    /// `2 * kind of rank + lane`.
    lane: usize,
    needs: Vec<Ready>,
}

/// A node whose needs are among those of the whole graph, up to `needs_end`.
#[derive(Clone, Copy, Debug)]
struct Step {
    slot: Slot,
    lane: u8,
    needs_end: u32,
}

/// Actions in an order in which each comes after all that it needs.
#[derive(Clone, Debug)]
pub struct Dag {
    nodes: Vec<Step>,
    /// What each node needs, one after the other.
    needs: Vec<Ready>,
    /// Kinds of ranks: 2 where experts have ranks of their own.
    pub kinds: usize,
}

/// What a walk through the graph finds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Walk {
    /// Seconds from the first action to the last.
    pub seconds: f64,
    /// Seconds for which the compute lane is busy, by kind of rank: attention's, the experts' own.
    pub computing: [f64; 2],
    /// The same for the exchange lane.
    pub exchanging: [f64; 2],
}

impl Dag {
    /// The graph of a model's layers under a plan of this structure.
    ///
    /// # Errors
    /// [`PlannerError`]: no plan has this structure for this model.
    pub fn new(model: &ModelSpec, structure: &Structure) -> Result<Dag, PlannerError> {
        Dag::of(&few_experts(few_layers(model, structure.dense, structure.moe)), structure)
    }

    fn of(model: &ModelSpec, structure: &Structure) -> Result<Dag, PlannerError> {
        let plan = surrogate(model, structure)?;
        let mut ranks = vec![Rank(0)];
        if structure.separate {
            ranks.push(plan.stages[0].expert_ranks[0]);
        }
        let schedules: Vec<Vec<Action>> =
            ranks.iter().map(|&rank| plan.schedule(model, rank, structure.micro_batches).actions).collect();
        let mut needs = Vec::new();
        let step = |node: Node| {
            needs.extend(node.needs);
            Step { slot: node.slot, lane: node.lane as u8, needs_end: needs.len() as u32 }
        };
        let nodes = in_order(&schedules).into_iter().map(step).collect();
        Ok(Dag { kinds: ranks.len(), nodes, needs })
    }

    /// How long it takes when each action takes as long as its slot says.
    pub fn walk(&self, durations: &Durations, times: &mut Vec<(f64, f64)>) -> Walk {
        times.clear();
        let mut free = [0.0f64; 4];
        let mut walk = Walk::default();
        let mut first = 0;
        for node in &self.nodes {
            let lane = node.lane as usize;
            let mut start = free[lane];
            for &need in &self.needs[first..node.needs_end as usize] {
                start = start.max(match need {
                    Ready::Done(idx) => times[idx as usize].1,
                    Ready::After(idx, slot) => times[idx as usize].0 + durations[slot],
                });
            }
            first = node.needs_end as usize;
            let seconds = durations[node.slot];
            let end = start + seconds;
            times.push((start, end));
            free[lane] = end;
            walk.seconds = walk.seconds.max(end);
            match lane % 2 {
                0 => walk.computing[lane / 2] += seconds,
                _ => walk.exchanging[lane / 2] += seconds,
            }
        }
        walk
    }
}

/// Puts the actions of all kinds of ranks into one order, and finds what each needs of others.
fn in_order(schedules: &[Vec<Action>]) -> Vec<Node> {
    let context = Context::new(schedules);
    // Where each action of each schedule is in the order, once it is.
    let mut places: Vec<Vec<Option<u32>>> = schedules.iter().map(|actions| vec![None; actions.len()]).collect();
    // Each lane goes through its own list in order.
    let of_lane = |kind: usize, lane: Lane| {
        let actions = schedules[kind].iter().enumerate();
        let list: Vec<usize> = actions.filter(|(_, action)| action.lane == lane).map(|(idx, _)| idx).collect();
        (kind, list.into_iter().peekable())
    };
    let mut lanes: Vec<_> =
        (0..schedules.len()).flat_map(|kind| [of_lane(kind, Lane::Compute), of_lane(kind, Lane::Comm)]).collect();
    let mut nodes = Vec::new();
    let total: usize = schedules.iter().map(Vec::len).sum();
    while nodes.len() < total {
        let before = nodes.len();
        for (kind, list) in &mut lanes {
            while let Some(&idx) = list.peek()
                && let Some(node) = context.node(&places, *kind, idx)
            {
                places[*kind][idx] = Some(nodes.len() as u32);
                nodes.push(node);
                list.next();
            }
        }
        assert!(nodes.len() > before, "a schedule waits for something that nobody sends");
    }
    nodes
}

/// What must be known of all schedules to place one action.
struct Context<'a> {
    schedules: &'a [Vec<Action>],
    /// By kind of rank and action: how many actions of the same name the layer has for this micro-batch, and which of them
    /// this is. Of two, one works on rows of the own node only, and the other on those of other nodes.
    parts: Vec<Vec<(usize, usize)>>,
    /// By layer and micro-batch: who sends rows or answers, and in which of its actions.
    messages: HashMap<(u32, u32), Vec<(usize, usize)>>,
}

impl<'a> Context<'a> {
    fn new(schedules: &'a [Vec<Action>]) -> Self {
        let mut messages: HashMap<_, Vec<_>> = HashMap::new();
        let mut parts = Vec::new();
        for (kind, actions) in schedules.iter().enumerate() {
            let name = |action: &Action| (action.layer, action.micro_batch, std::mem::discriminant(&action.work));
            let mut counts: HashMap<_, usize> = HashMap::new();
            let places: Vec<usize> = actions
                .iter()
                .map(|action| {
                    let count = counts.entry(name(action)).or_default();
                    *count += 1;
                    *count - 1
                })
                .collect();
            parts.push(actions.iter().zip(places).map(|(action, place)| (counts[&name(action)], place)).collect());
            for (idx, action) in actions.iter().enumerate() {
                if matches!(action.work, Work::Dispatch { .. } | Work::Relay { .. } | Work::Answer { .. }) {
                    messages.entry((action.layer, action.micro_batch)).or_default().push((kind, idx));
                }
            }
        }
        Context { schedules, parts, messages }
    }

    /// The action as a node, once all that it needs is in the order.
    fn node(&self, places: &[Vec<Option<u32>>], kind: usize, idx: usize) -> Option<Node> {
        let action = &self.schedules[kind][idx];
        let mut needs = Vec::new();
        for &after in &action.after {
            needs.push(Ready::Done(places[kind][after as usize]?));
        }
        let near = self.parts[kind][idx] == (2, 0);
        // Messages of the same layer and micro-batch, sent by whichever kind of rank sends them.
        let mut messages = |wanted: fn(&Work) -> bool, near: bool| {
            for &(sender, other) in self.messages.get(&(action.layer, action.micro_batch)).into_iter().flatten() {
                if wanted(&self.schedules[sender][other].work) {
                    let place = places[sender][other]?;
                    needs.push(if near { Ready::After(place, Slot::DispatchNear) } else { Ready::Done(place) });
                }
            }
            Some(())
        };
        match &action.work {
            Work::Relay { .. } => messages(|work| matches!(work, Work::Dispatch { .. }), false)?,
            Work::Experts { .. } => {
                messages(|work| matches!(work, Work::Dispatch { .. }), near)?;
                if !near {
                    messages(|work| matches!(work, Work::Relay { .. }), false)?;
                }
            }
            Work::Combine { .. } => messages(|work| matches!(work, Work::Answer { .. }), false)?,
            _ => {}
        }
        let lane = 2 * kind + usize::from(action.lane == Lane::Comm);
        Some(Node { slot: slot_of_action(action, self.parts[kind][idx]), lane, needs })
    }
}

fn slot_of_action(action: &Action, split: (usize, usize)) -> Slot {
    match &action.work {
        Work::Embed => Slot::Embed,
        Work::ReceiveHidden { .. } | Work::SendHidden { .. } => Slot::Hidden,
        Work::Attention | Work::Project => Slot::Attention,
        Work::Attend => Slot::Attend,
        Work::AllReduce { of: MessageKind::QkNorm, .. } => Slot::SumNorm,
        Work::AllReduce { of: MessageKind::Attention, .. } => Slot::SumAttention,
        Work::AllReduce { .. } => Slot::SumMlp,
        Work::Mlp => Slot::Mlp,
        Work::Route => Slot::Route,
        Work::SharedExpert => Slot::SharedExpert,
        Work::Dispatch { .. } => Slot::Dispatch,
        Work::Relay { .. } => Slot::Relay,
        Work::Experts { .. } => match split {
            (2, 0) => Slot::ExpertsNear,
            (2, _) => Slot::ExpertsFar,
            _ => Slot::Experts,
        },
        Work::Answer { .. } => match split {
            (2, 0) => Slot::AnswerNear,
            _ => Slot::Answer,
        },
        Work::Combine { .. } => Slot::Combine,
        Work::AllGather { .. } => Slot::AllGather,
        Work::Head => Slot::Head,
        Work::GatherLogits { .. } => Slot::GatherLogits,
        Work::Sample => Slot::Sample,
    }
}

/// The same with one expert a rank: a plan of all experts takes long to make, and its actions wait for each other in the same
/// way.
fn few_experts(mut model: ModelSpec) -> ModelSpec {
    for ffn in &mut model.layers {
        if let Ffn::Moe(moe) = ffn {
            let router = Router { n_group: 1, topk_group: 1, ..moe.router.clone() };
            *moe = Moe { num_experts: moe.num_experts.min(MOST_RANKS), top_k: 1, router, ..moe.clone() };
        }
    }
    model
}

/// The smallest plan of this structure: two ranks of everything that there are several of.
fn surrogate(model: &ModelSpec, structure: &Structure) -> Result<Plan, PlannerError> {
    let &Structure { tp, placed, separate, nodes, two_level, overlap, micro_batches, .. } = structure;
    let placed = placed && structure.moe > 0;
    let tp = if tp { 2 } else { 1 };
    // Each node has two ranks with rows, so that some rows stay on the node and some leave it.
    let dp = match (placed, nodes) {
        (true, true) => 4 / tp,
        (true, false) => 2 / tp,
        (false, _) => 1,
    };
    let attention = tp * dp;
    let ep = match (placed, separate) {
        (true, true) => 2,
        (true, false) => attention,
        (false, _) => 1,
    };
    let ranks = attention + if separate && placed { ep } else { 0 };
    let mut file = PlanFile::new("structure", Mesh { tp, pp: 1, dp, ep }, ranks);
    file.moe.pool = if separate && placed { Pool::Separate } else { Pool::Shared };
    file.moe.max_experts_per_rank = Some(usize::MAX);
    file.micro_batches = micro_batches;
    file.overlap = overlap;
    file.all_reduce = Some(AllReduce::Flat);
    file.exchange.route = if two_level { ExchangeRoute::TwoLevel } else { ExchangeRoute::Direct };
    Ok(Plan::new(file, model, &boundless(ranks, if nodes { 2 } else { ranks }))?)
}

impl Structure {
    /// Whether the query/key norm is summed over ranks.
    pub fn sums_norm(&self, model: &ModelSpec) -> bool {
        self.tp && matches!(&model.attention, Attention::Gqa(gqa) if gqa.qk_norm == QkNorm::FullWidth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn structure() -> Structure {
        Structure {
            tp: false,
            placed: true,
            separate: false,
            nodes: false,
            two_level: false,
            overlap: Overlap::MicroBatches,
            micro_batches: 1,
            dense: 0,
            moe: 2,
        }
    }

    fn seconds(structure: &Structure, durations: &Durations) -> f64 {
        let model = moesaic_spec::preset("mixtral-8x7b").unwrap().spec().unwrap();
        Dag::new(&model, structure).unwrap().walk(durations, &mut Vec::new()).seconds
    }

    /// A graph is of the same actions, whether a layer has all of its experts or few.
    #[test]
    fn the_number_of_experts_changes_no_graph() {
        let (one, two) = (structure(), Structure { overlap: Overlap::Arrivals, nodes: true, ..structure() });
        let pool = Structure { separate: true, micro_batches: 3, ..two };
        for name in ["mixtral-8x7b", "deepseek-v3", "paper-003-gelu"] {
            let model = moesaic_spec::preset(name).unwrap().spec().unwrap();
            for structure in [one, two, Structure { two_level: true, ..two }, Structure { tp: true, ..pool }, pool] {
                let all = Dag::of(&few_layers(&model, structure.dense, structure.moe), &structure).unwrap();
                let few = Dag::new(&model, &structure).unwrap();
                assert_eq!(format!("{few:?}"), format!("{all:?}"), "{name}: {structure:?}");
            }
        }
    }

    /// Two layers of attention 1 s, dispatch 10 s, experts 100 s, answer 1000 s.
    fn durations() -> Durations {
        let mut durations = Durations::default();
        for (slot, seconds) in
            [(Slot::Attention, 1.0), (Slot::Dispatch, 10.0), (Slot::Experts, 100.0), (Slot::Answer, 1000.0)]
        {
            durations[slot] = seconds;
        }
        durations
    }

    #[test]
    fn one_micro_batch_does_one_thing_after_the_other() {
        assert_eq!(seconds(&structure(), &durations()), 2222.0);
        assert_eq!(seconds(&Structure { separate: true, ..structure() }, &durations()), 2222.0);
    }

    /// With two micro-batches, the exchange of one hides behind the computing of the other.
    #[test]
    fn two_micro_batches_overlap() {
        let mut durations = Durations::default();
        for slot in [Slot::Attention, Slot::Dispatch, Slot::Experts, Slot::Answer] {
            durations[slot] = 1.0;
        }
        let two = Structure { micro_batches: 2, ..structure() };
        let overlapped = seconds(&two, &durations);
        let serial = seconds(&Structure { overlap: Overlap::None, ..two }, &durations);
        assert_eq!(serial, 16.0);
        assert!(overlapped <= 10.0, "{overlapped}");
        let pools = seconds(&Structure { separate: true, ..two }, &durations);
        assert!(pools <= overlapped, "{pools}");
    }

    #[test]
    fn rows_of_the_own_node_need_not_wait_for_the_network() {
        let mut durations = Durations::default();
        for (slot, seconds) in
            [(Slot::Dispatch, 10.0), (Slot::DispatchNear, 1.0), (Slot::ExpertsNear, 4.0), (Slot::ExpertsFar, 4.0)]
        {
            durations[slot] = seconds;
        }
        let arrivals = Structure { nodes: true, overlap: Overlap::Arrivals, moe: 1, ..structure() };
        assert_eq!(seconds(&arrivals, &durations), 14.0);
    }

    #[test]
    fn every_structure_has_an_order() {
        for bits in 0..64u32 {
            let bit = |n: u32| bits >> n & 1 == 1;
            let structure = Structure {
                tp: bit(0),
                placed: bit(1),
                separate: bit(1) && bit(2),
                nodes: bit(3),
                two_level: bit(4),
                overlap: if bit(5) { Overlap::Arrivals } else { Overlap::None },
                micro_batches: 3,
                dense: 1,
                moe: 2,
            };
            for name in ["deepseek-v3", "olmoe-1b-7b", "mixtral-8x7b"] {
                let model = moesaic_spec::preset(name).unwrap().spec().unwrap();
                let dag = Dag::new(&model, &structure).unwrap();
                assert_eq!(dag.kinds, if structure.separate { 2 } else { 1 });
            }
        }
    }
}
