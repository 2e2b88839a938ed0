//! Small scripts of actions, with times that are whole numbers.

#![allow(dead_code)] // Each test uses its part.

use moesaic_device::op_log::{Amount, OpCall, Peer};
use moesaic_plan::{Action, Lane, MessageKind, Peers, Rank, Schedule, Work};
use moesaic_planner::{ActionRecord, ClockSettings, PlannerError, RankStep, StepInput, StepTimes, VirtualClock};
use moesaic_spec::{Bytes, Cluster, DType, Energy, Gpu, Link, PeakFlops};

/// Nodes of two GPUs that do 1 FLOP/s. Inside a node 10 bytes/s and 1 s, between nodes 5 bytes/s for a node and 2 s.
pub(crate) fn cluster(nodes: usize) -> Cluster {
    Cluster {
        name: "script".into(),
        nodes,
        gpus_per_node: 2,
        gpu: Gpu {
            name: "script".into(),
            memory: Bytes(1000),
            peak_flops: PeakFlops { bf16: 1.0, f8: 1.0, f4: 1.0, f32: 1.0 },
            compute_utilization: 1.0,
            memory_bandwidth: 1.0,
            memory_utilization: 1.0,
            launch_s: 0.0,
            sms: 132,
            power: None,
            usd_per_hour: None,
        },
        intra_node: Link {
            name: "inner".into(),
            bandwidth_per_gpu: 20.0,
            bandwidth_per_node: 40.0,
            utilization: 0.5,
            latency_s: 1.0,
        },
        inter_node: Some(Link {
            name: "outer".into(),
            bandwidth_per_gpu: 10.0,
            bandwidth_per_node: 10.0,
            utilization: 0.5,
            latency_s: 2.0,
        }),
        rank_map: Vec::new(),
        energy: Energy::default(),
    }
}

/// Tags are `10 * name + kind`.
pub(crate) fn kind_of(tag: u64) -> MessageKind {
    match tag % 10 {
        0 => MessageKind::Hidden,
        1 => MessageKind::Mlp,
        2 => MessageKind::Dispatch,
        3 => MessageKind::Answer,
        4 => MessageKind::Rows,
        _ => MessageKind::Weights,
    }
}

pub(crate) fn settings(world_size: usize) -> ClockSettings {
    ClockSettings { world_size, dtype: DType::BF16, kind_of, keep_ops: true }
}

pub(crate) fn op(seconds: u64) -> OpCall {
    OpCall::compute("linear", &[], seconds, 0)
}

pub(crate) fn send(to: u32, tag: u64, bytes: u64) -> OpCall {
    OpCall::message(Peer { rank: to, tag, outbound: true }, Amount::exact(bytes))
}

pub(crate) fn receive(from: u32, tag: u64, bytes: u64) -> OpCall {
    OpCall::message(Peer { rank: from, tag, outbound: false }, Amount::exact(bytes))
}

/// One step of some ranks.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    pub(crate) schedules: Vec<Schedule>,
    pub(crate) ranks: Vec<RankStep>,
    pub(crate) ready: Vec<Vec<f64>>,
}

impl Script {
    pub(crate) fn new(ranks: u32) -> Script {
        Script {
            schedules: (0..ranks).map(|rank| Schedule { rank: Rank(rank), actions: Vec::new() }).collect(),
            ranks: vec![RankStep::default(); ranks as usize],
            ready: Vec::new(),
        }
    }

    /// Adds an action; gives its index.
    pub(crate) fn action(
        &mut self,
        rank: u32,
        micro_batch: u32,
        action: (Work, Lane, &[u32]),
        calls: Vec<OpCall>,
    ) -> u32 {
        let (work, lane, after) = action;
        let actions = &mut self.schedules[rank as usize].actions;
        let idx = actions.len();
        actions.push(Action { work, layer: 0, micro_batch, lane, after: after.to_vec() });
        self.ranks[rank as usize].actions.push(ActionRecord { action: idx, calls });
        idx as u32
    }

    pub(crate) fn compute(&mut self, rank: u32, after: &[u32], calls: Vec<OpCall>) -> u32 {
        self.action(rank, 0, (Work::Attention, Lane::Compute, after), calls)
    }

    pub(crate) fn comm(&mut self, rank: u32, after: &[u32], calls: Vec<OpCall>) -> u32 {
        self.action(rank, 0, (Work::Dispatch { to: Peers::from([]) }, Lane::Comm, after), calls)
    }

    pub(crate) fn input(&self) -> StepInput<'_> {
        StepInput { schedules: &self.schedules, ranks: &self.ranks, ready: &self.ready }
    }

    /// Alone, from 0.
    pub(crate) fn run(&self, cluster: &Cluster) -> Result<StepTimes, PlannerError> {
        VirtualClock::new(cluster, settings(self.ranks.len())).step(self.input())
    }
}
