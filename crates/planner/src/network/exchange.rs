//! Rows to experts and back.

use moesaic_spec::LinkClass;

use super::calibration::{COORDINATES, COUNTS, Calibration};
use super::curve::CAST_HIDDEN;
use super::{Demand, Group, Network, Price, Source, UNMEASURED_SD, Version};

/// Multiprocessors that low-latency kernels spread experts over: those of an H100 or H200.
const SMS: usize = 132;

/// How many copies of a token's row travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Copies {
    /// One for each expert.
    PerExpert,
    /// One for each rank that has one of its experts.
    PerRank,
    /// Between nodes one for each node that has one of its experts; that node hands it on to the ranks.
    PerNode,
}

/// Which kernels exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Few tokens: each row goes straight to its rank, without a first exchange of counts.
    LowLatency,
    /// Many tokens: sizes are exchanged first, rows are forwarded inside nodes.
    Normal,
}

/// One exchange of rows between all ranks of a group and back, one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exchange {
    /// Tokens that each rank has.
    pub tokens_per_rank: f64,
    /// Numbers of a row.
    pub hidden: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// Routed experts of the layer, replicas included.
    pub experts: usize,
    /// Who takes part; each rank has as many experts.
    pub group: Group,
    /// Bytes of a number on the way to the experts, scales included.
    pub bytes_per_value_out: f64,
    /// Bytes of a number on the way back.
    pub bytes_per_value_back: f64,
    /// Copies of a row.
    pub copies: Copies,
    /// Rows of the fullest rank by the mean; at least 1.
    pub max_over_mean: f64,
    /// Which kernels.
    pub mode: Mode,
    /// Multiprocessors that normal mode uses.
    pub sms: usize,
}

/// Rows that one rank sends to others and receives from them; on average one is the other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exchanged {
    /// Over the links of its node.
    pub intra_rows: f64,
    /// Over the links between nodes.
    pub inter_rows: f64,
}

/// Expected number of different owners of a token's `top_k` different experts, when each of `owners` has as many of the
/// `experts` and all sets are equally likely: `owners (1 - C(E - E/owners, k) / C(E, k))`. At most `experts` own any.
pub fn expected_distinct(experts: usize, top_k: usize, owners: usize) -> f64 {
    let (all, owners) = (experts as f64, owners.min(experts) as f64);
    let others = all - all / owners;
    // A product of k shares: binomials overflow.
    let none: f64 = (0..top_k).map(|taken| ((others - taken as f64) / (all - taken as f64)).max(0.0)).product();
    owners * (1.0 - none)
}

impl Exchange {
    /// Rows on the links of a rank with the mean load.
    pub fn rows(&self) -> Exchanged {
        let (ranks, nodes) = (self.group.ranks as f64, self.group.nodes() as f64);
        let to_others = (ranks - 1.0) / ranks;
        let to_other_nodes = (nodes - 1.0) / nodes;
        let copies = |owners: usize| self.tokens_per_rank * expected_distinct(self.experts, self.top_k, owners);
        let (all, between) = match self.copies {
            Copies::PerExpert => {
                let rows = self.tokens_per_rank * self.top_k as f64;
                (rows, rows)
            }
            Copies::PerRank => (copies(self.group.ranks), copies(self.group.ranks)),
            Copies::PerNode => (copies(self.group.ranks), copies(self.group.nodes())),
        };
        let intra_rows = match self.copies {
            // Rows from other nodes come over one of the node's adapters, and on over NVLink unless they are at home.
            Copies::PerNode => {
                let here = self.group.ranks_per_node as f64;
                if nodes > 1.0 { all * (here - 1.0) / here } else { all * to_others }
            }
            // The adapter delivers to any GPU.
            Copies::PerExpert | Copies::PerRank => all * (to_others - to_other_nodes),
        };
        Exchanged { intra_rows, inter_rows: between * to_other_nodes }
    }

    pub(super) fn dispatch_demand(&self) -> Demand {
        self.demand(self.bytes_per_value_out, true)
    }

    pub(super) fn combine_demand(&self) -> Demand {
        self.demand(self.bytes_per_value_back, false)
    }

    /// What one way asks of the fullest rank's links; low-latency dispatch quantises rows on its way.
    fn demand(&self, bytes_per_value: f64, casts: bool) -> Demand {
        let row = self.hidden as f64 * bytes_per_value;
        let rows = self.rows();
        // The fullest rank gets more, though never more than all others have.
        let all = (self.group.ranks as f64 - 1.0) * self.tokens_per_rank * self.top_k as f64;
        let fullest = |rows: f64| (rows * self.max_over_mean).min(all.max(rows)) * row;
        let (intra_bytes, inter_bytes) = (fullest(rows.intra_rows), fullest(rows.inter_rows));
        let waves = self.experts.div_ceil(SMS) as f64;
        let busy_sms = (self.experts as f64 / waves).ceil();
        let low_latency = self.mode == Mode::LowLatency;
        Demand {
            ring: self.group.ranks_per_node as f64,
            nodes: self.group.nodes() as f64,
            ranks_per_node: self.group.ranks_per_node as f64,
            intra_bytes,
            inter_bytes,
            least_intra_bytes: intra_bytes,
            least_inter_bytes: inter_bytes,
            extra_waves: if low_latency { waves - 1.0 } else { 0.0 },
            casts: if low_latency && casts {
                (self.tokens_per_rank / busy_sms).ceil() * self.hidden as f64 / CAST_HIDDEN
            } else {
                0.0
            },
        }
    }

    /// Where the exchange lies among the measured ones.
    pub(super) fn coordinates(&self) -> [f64; COORDINATES] {
        let sms = if self.mode == Mode::Normal { self.sms } else { 1 };
        let row = (self.hidden * self.top_k) as f64;
        let [tokens, row, experts, nodes, sms] =
            [self.tokens_per_rank, row, self.experts as f64, self.group.nodes() as f64, sms as f64].map(f64::ln);
        [tokens, row, experts, COUNTS * nodes, COUNTS * sms]
    }
}

/// Rows of one layer from the ranks of one pool to those of another, one way: attention on some GPUs, experts on others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct M2n {
    /// Who sends.
    pub senders: Group,
    /// Who receives; each has as many experts.
    pub receivers: Group,
    /// Tokens of all senders.
    pub tokens: f64,
    /// Numbers of a row.
    pub hidden: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// Routed experts of the layer.
    pub experts: usize,
    /// Bytes of a number.
    pub bytes_per_value: f64,
    /// Copies of a row.
    pub copies: Copies,
    /// Rows of the fullest receiver by the mean; at least 1.
    pub max_over_mean: f64,
    /// The links between the pools.
    pub across: LinkClass,
}

impl M2n {
    /// Rows that cross from pool to pool, of all tokens.
    pub fn rows_across(&self) -> f64 {
        let distinct = |owners: usize| self.tokens * expected_distinct(self.experts, self.top_k, owners);
        match self.copies {
            Copies::PerExpert => self.tokens * self.top_k as f64,
            Copies::PerRank => distinct(self.receivers.ranks),
            Copies::PerNode => distinct(self.receivers.nodes()),
        }
    }

    fn demands(&self) -> [Demand; 2] {
        let row = self.hidden as f64 * self.bytes_per_value;
        let across = self.rows_across() * row;
        // A node's adapters hand a row on to those ranks of the node that want it.
        let handed_on = match (self.copies, self.across) {
            (Copies::PerNode, LinkClass::InterNode) => {
                let here = self.receivers.ranks_per_node as f64;
                let rows = self.tokens * expected_distinct(self.experts, self.top_k, self.receivers.ranks);
                rows * row * (here - 1.0) / here
            }
            _ => 0.0,
        };
        let side = |group: Group, fullness: f64, handed_on: f64| {
            let [across, handed_on] = [across, handed_on].map(|bytes| bytes * fullness / group.ranks as f64);
            let (intra_bytes, inter_bytes, nodes) = match self.across {
                LinkClass::IntraNode => (across, 0.0, 1),
                LinkClass::InterNode => (handed_on, across, self.senders.nodes() + self.receivers.nodes()),
            };
            Demand {
                ring: group.ranks_per_node as f64,
                nodes: nodes as f64,
                ranks_per_node: group.ranks_per_node as f64,
                intra_bytes,
                inter_bytes,
                least_intra_bytes: intra_bytes,
                least_inter_bytes: inter_bytes,
                extra_waves: 0.0,
                casts: 0.0,
            }
        };
        [side(self.senders, 1.0, 0.0), side(self.receivers, self.max_over_mean, handed_on)]
    }
}

impl Network {
    /// Rows on their way to experts.
    pub fn dispatch(&self, exchange: &Exchange) -> Price {
        let op = match exchange.mode {
            Mode::LowLatency => "deepep_ll_dispatch",
            Mode::Normal => "deepep_normal_dispatch",
        };
        self.exchange(op, exchange, &exchange.dispatch_demand())
    }

    /// Answers on their way back.
    pub fn combine(&self, exchange: &Exchange) -> Price {
        let op = match exchange.mode {
            Mode::LowLatency => "deepep_ll_combine",
            Mode::Normal => "deepep_normal_combine",
        };
        self.exchange(op, exchange, &exchange.combine_demand())
    }

    /// Rows from pool to pool; the way back costs the same with its own bytes of a number. Bounded by adapters and NVLink of
    /// the fuller side, with the latency of a low-latency exchange.
    pub fn m_to_n(&self, exchange: &M2n) -> Price {
        if exchange.tokens == 0.0 {
            return Price::NOTHING;
        }
        let curve = &Calibration::published().curve(self.profile, "deepep_ll_dispatch").0.curve;
        let seconds = |demand: &Demand| curve.seconds(demand, &self.intra, &self.inter).max(self.bound_of(demand));
        let seconds = exchange.demands().iter().map(seconds).fold(0.0, f64::max);
        Price { seconds, sd: UNMEASURED_SD, source: Source::Roofline }
    }

    /// The least seconds of [`Network::m_to_n`] that the full bandwidth allows.
    pub fn m_to_n_bound(&self, exchange: &M2n) -> f64 {
        exchange.demands().iter().map(|demand| self.bound_of(demand)).fold(0.0, f64::max)
    }

    fn exchange(&self, op: &str, exchange: &Exchange, demand: &Demand) -> Price {
        if exchange.group.ranks <= 1 || exchange.tokens_per_rank == 0.0 {
            return Price::NOTHING;
        }
        // Between nodes only one version was measured, and stands for all.
        let version = if exchange.group.nodes() > 1 { Version::Older } else { self.version };
        self.fitted(op, demand, &exchange.coordinates(), version)
    }
}
