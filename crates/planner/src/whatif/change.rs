//! The changes that are tried, one at a time.

use moesaic_plan::plan::ExchangePrecision;
use moesaic_spec::{Cluster, Link};
use serde::{Deserialize, Serialize};

use super::{Bound, Given};
use crate::iteration::{ExpertLayout, Layout};

/// One thing that is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// Arithmetic twice as fast.
    TwiceCompute,
    /// Memory twice as fast.
    TwiceMemory,
    /// Links inside nodes twice as fast.
    TwiceIntraNode,
    /// Links between nodes twice as fast.
    TwiceInterNode,
    /// Kernels start, and empty messages arrive, in half the time.
    HalfLatency,
    /// One more data-parallel group on more GPUs, for the same users.
    OneMoreGroup,
    /// One more node of groups, for the same users.
    OneMoreNode,
    /// One more node of groups, and as many users for each GPU as before.
    OneMoreNodeAndItsUsers,
    /// One more rank with experts.
    OneMoreExpertRank,
    /// Half the users.
    HalfTheUsers,
    /// Twice the users.
    TwiceTheUsers,
    /// Rows travel in 8 bits.
    EightBitExchange,
    /// One more expert on each rank, a replica, placed by load.
    Replicas,
    /// Experts placed by load.
    Balancing,
    /// A step in two micro-batches.
    TwoMicroBatches,
    /// A step in one.
    OneMicroBatch,
}

impl Change {
    /// All.
    pub const ALL: [Change; 16] = [
        Change::TwiceCompute,
        Change::TwiceMemory,
        Change::TwiceIntraNode,
        Change::TwiceInterNode,
        Change::HalfLatency,
        Change::OneMoreGroup,
        Change::OneMoreNode,
        Change::OneMoreNodeAndItsUsers,
        Change::OneMoreExpertRank,
        Change::HalfTheUsers,
        Change::TwiceTheUsers,
        Change::EightBitExchange,
        Change::Replicas,
        Change::Balancing,
        Change::TwoMicroBatches,
        Change::OneMicroBatch,
    ];

    /// What no longer binds as much.
    pub(super) fn lifts(self) -> Option<Bound> {
        Some(match self {
            Change::TwiceCompute => Bound::Compute,
            Change::TwiceMemory => Bound::Memory,
            Change::HalfLatency => Bound::Latency,
            Change::TwiceIntraNode => Bound::IntraNode,
            Change::TwiceInterNode => Bound::InterNode,
            _ => return None,
        })
    }

    /// The plan with the change; `None` where it has no such thing to change.
    pub(super) fn applied<'m>(self, given: &Given<'m>) -> Option<Given<'m>> {
        let Given { cluster, layout, requests, .. } = given;
        let on = |cluster: Cluster| Some(Given { cluster, ..given.clone() });
        let spread = |layout: Layout| Some(Given { layout, ..given.clone() });
        let exchanges = layout.experts.exchanges();
        match self {
            Change::TwiceCompute => {
                let mut cluster = cluster.clone();
                let peak = &mut cluster.gpu.peak_flops;
                [&mut peak.bf16, &mut peak.f8, &mut peak.f4, &mut peak.f32].into_iter().for_each(|peak| *peak *= 2.0);
                on(cluster)
            }
            Change::TwiceMemory => {
                let mut cluster = cluster.clone();
                cluster.gpu.memory_bandwidth *= 2.0;
                on(cluster)
            }
            Change::TwiceIntraNode if layout.ranks() > 1 => {
                on(Cluster { intra_node: twice(&cluster.intra_node), ..cluster.clone() })
            }
            Change::TwiceInterNode if layout.ranks() > cluster.gpus_per_node => {
                on(Cluster { inter_node: cluster.inter_node.as_ref().map(twice), ..cluster.clone() })
            }
            Change::HalfLatency => {
                let mut cluster = cluster.clone();
                cluster.gpu.launch_s /= 2.0;
                cluster.intra_node.latency_s /= 2.0;
                cluster.inter_node.iter_mut().for_each(|link| link.latency_s /= 2.0);
                on(cluster)
            }
            Change::OneMoreGroup => grown(given, 1),
            Change::OneMoreNode => {
                let ranks = layout.tp * layout.pp;
                (cluster.gpus_per_node > ranks).then(|| grown(given, cluster.gpus_per_node / ranks))?
            }
            Change::OneMoreNodeAndItsUsers => {
                let more = Change::OneMoreNode.applied(given)?;
                let concurrency = requests.concurrency * more.layout.ranks() as f64 / layout.ranks() as f64;
                Some(Given { requests: super::Requests { concurrency, ..*requests }, ..more })
            }
            Change::OneMoreExpertRank => match layout.experts {
                ExpertLayout::Pool { ep } if layout.pp == 1 => {
                    let layout = Layout { experts: ExpertLayout::Pool { ep: ep + 1 }, ..layout.clone() };
                    let cluster = cluster.with_gpus(layout.ranks().max(cluster.num_gpus())).ok()?;
                    Some(Given { cluster, layout, ..given.clone() })
                }
                _ => None,
            },
            Change::HalfTheUsers | Change::TwiceTheUsers => {
                let factor = if self == Change::HalfTheUsers { 0.5 } else { 2.0 };
                let concurrency = requests.concurrency * factor;
                (concurrency >= 1.0)
                    .then(|| Given { requests: super::Requests { concurrency, ..*requests }, ..given.clone() })
            }
            Change::EightBitExchange if exchanges && layout.precision == ExchangePrecision::Full => {
                spread(Layout { precision: ExchangePrecision::Fp8, ..layout.clone() })
            }
            Change::Replicas if exchanges && given.load.is_some() => {
                let redundant_experts = layout.redundant_experts + layout.expert_ranks();
                spread(Layout { redundant_experts, balanced: true, ..layout.clone() })
            }
            Change::Balancing if exchanges && given.load.is_some() && !layout.balanced => {
                spread(Layout { balanced: true, ..layout.clone() })
            }
            Change::TwoMicroBatches if layout.micro_batches == 1 && layout.pp == 1 && layout.ranks() > 1 => {
                spread(Layout { micro_batches: 2, ..layout.clone() })
            }
            Change::OneMicroBatch if layout.micro_batches > 1 && layout.pp == 1 => {
                spread(Layout { micro_batches: 1, ..layout.clone() })
            }
            _ => None,
        }
    }
}

fn twice(link: &Link) -> Link {
    Link {
        bandwidth_per_gpu: 2.0 * link.bandwidth_per_gpu,
        bandwidth_per_node: 2.0 * link.bandwidth_per_node,
        ..link.clone()
    }
}

/// With so many groups more, on nodes for them.
fn grown<'m>(given: &Given<'m>, groups: usize) -> Option<Given<'m>> {
    let layout = &given.layout;
    let experts = match layout.experts {
        ExpertLayout::Placed { ep } => ExpertLayout::Placed { ep: ep + groups * layout.tp },
        other => other,
    };
    let layout = Layout { dp: layout.dp + groups, experts, ..layout.clone() };
    let cluster = given.cluster.with_gpus(layout.ranks().max(given.cluster.num_gpus())).ok()?;
    Some(Given { cluster, layout, ..given.clone() })
}
