//! All-reduce and its relatives.

use super::LinkKind;
use super::calibration::{COORDINATES, COUNTS, Calibration};
use super::{Demand, Group, Library, Network, Price, Source, UNMEASURED_SD};

/// How an all-reduce goes. n ranks, S bytes on each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Every rank reads the whole buffer of every other: one round, `(n - 1) S` bytes a rank.
    OneShot,
    /// Every rank sums its share, then reads the shares of the others: two rounds, `2 (n - 1) / n S` bytes.
    TwoShot,
    /// `2 (n - 1)` steps round a ring, `2 (n - 1) / n S` bytes.
    Ring,
    /// Up and down two complementary trees over the nodes: `2 S` bytes, steps by the logarithm of the nodes.
    Tree,
    /// Reduce-scatter inside nodes, ring all-reduce of the shares between nodes, all-gather inside nodes.
    Hierarchical,
    /// Inside a node what the library takes, which was measured; between nodes the fastest of ring, tree and hierarchical.
    Best,
}

/// Which collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CollectiveKind {
    /// The sum of all buffers, to all.
    AllReduce,
    /// The shares of all, to all.
    AllGather,
    /// To each its share of the sum.
    ReduceScatter,
    /// From each to each its own part.
    AllToAll,
}

/// One collective. `bytes` is as in nccl-tests: all-reduce: the buffer of one rank; all-gather: what each rank has in the end;
/// reduce-scatter and all-to-all: what each rank brings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Collective {
    /// Which.
    pub kind: CollectiveKind,
    /// Whose.
    pub library: Library,
    /// How much.
    pub bytes: f64,
    /// Between whom.
    pub group: Group,
}

impl Collective {
    /// The name in tables of measurements.
    pub(super) fn op(&self) -> &'static str {
        match (self.kind, self.library) {
            (CollectiveKind::AllReduce, Library::Nccl) => "nccl_all_reduce",
            (CollectiveKind::AllReduce, Library::Custom) => "custom_all_reduce",
            (CollectiveKind::AllGather, _) => "nccl_all_gather",
            (CollectiveKind::ReduceScatter, _) => "nccl_reduce_scatter",
            (CollectiveKind::AllToAll, _) => "nccl_alltoall",
        }
    }

    /// Where the collective lies among the measured ones.
    pub(super) fn coordinates(&self) -> [f64; COORDINATES] {
        [self.bytes.ln(), COUNTS * (self.group.ranks as f64).ln(), 0.0, 0.0, 0.0]
    }

    pub(super) fn demand(&self) -> Demand {
        let (ranks, nodes) = (self.group.ranks as f64, self.group.nodes() as f64);
        let per_node = self.group.ranks_per_node as f64;
        let to_others = self.bytes * (ranks - 1.0) / ranks;
        // By ring a node's adapters carry everything once for the whole node; what goes straight carries each rank's own.
        let to_other_nodes = match self.kind {
            CollectiveKind::AllToAll => self.bytes * (nodes - 1.0) / nodes,
            _ => self.bytes * (nodes - 1.0) / nodes / per_node,
        };
        let rounds = if self.kind == CollectiveKind::AllReduce { 2.0 } else { 1.0 };
        let inside = if self.kind == CollectiveKind::AllToAll { to_others - to_other_nodes } else { to_others };
        Demand {
            ring: per_node,
            nodes,
            ranks_per_node: per_node,
            intra_bytes: rounds * inside,
            inter_bytes: rounds * to_other_nodes,
            // A switch that sums spares the second round, and ranks on other nodes need no link inside.
            least_intra_bytes: if nodes > 1.0 { 0.0 } else { inside },
            least_inter_bytes: to_other_nodes,
            extra_waves: 0.0,
            casts: 0.0,
        }
    }
}

impl Network {
    /// All-reduce of `bytes` on each rank.
    pub fn all_reduce(&self, bytes: f64, group: Group, algorithm: Algorithm) -> Price {
        if group.ranks <= 1 || bytes == 0.0 {
            return Price::NOTHING;
        }
        let whole = Collective { kind: CollectiveKind::AllReduce, library: self.library, bytes, group };
        if group.nodes() == 1
            && let Some(price) = self.own(LinkKind::AllReduce, group.ranks, bytes)
        {
            return Price { seconds: price.seconds.max(self.bound_of(&whole.demand())), ..price };
        }
        let seconds = match algorithm {
            Algorithm::Best if group.nodes() == 1 => {
                return self.fitted(whole.op(), &whole.demand(), &whole.coordinates(), self.version);
            }
            Algorithm::Best => [Algorithm::Ring, Algorithm::Tree, Algorithm::Hierarchical]
                .map(|algorithm| self.all_reduce(bytes, group, algorithm).seconds)
                .into_iter()
                .fold(f64::INFINITY, f64::min),
            Algorithm::OneShot => self.shots(&whole, 1.0),
            Algorithm::TwoShot => self.shots(&whole, 2.0),
            Algorithm::Ring => {
                let steps = 2.0 * (group.nodes() as f64 - 1.0);
                self.on_links("nccl_all_reduce", &one_node(whole.demand())) + steps * self.hop_s()
            }
            Algorithm::Tree => self.tree(&whole),
            Algorithm::Hierarchical => self.hierarchical(&whole),
        };
        Price { seconds: seconds.max(self.bound_of(&whole.demand())), sd: UNMEASURED_SD, source: Source::Roofline }
    }

    /// All-gather; every rank has `bytes` in the end.
    pub fn all_gather(&self, bytes: f64, group: Group) -> Price {
        self.collective(&Collective { kind: CollectiveKind::AllGather, library: Library::Nccl, bytes, group })
    }

    /// Reduce-scatter of `bytes` on each rank.
    pub fn reduce_scatter(&self, bytes: f64, group: Group) -> Price {
        self.collective(&Collective { kind: CollectiveKind::ReduceScatter, library: Library::Nccl, bytes, group })
    }

    /// All-to-all; every rank has `bytes`, of which one part is for itself.
    pub fn all_to_all(&self, bytes: f64, group: Group) -> Price {
        self.collective(&Collective { kind: CollectiveKind::AllToAll, library: Library::Nccl, bytes, group })
    }

    pub(super) fn collective(&self, collective: &Collective) -> Price {
        let Collective { kind, library, bytes, group } = *collective;
        if kind == CollectiveKind::AllReduce {
            return Network { library, ..self.clone() }.all_reduce(bytes, group, Algorithm::Best);
        }
        if group.ranks <= 1 || bytes == 0.0 {
            return Price::NOTHING;
        }
        let demand = collective.demand();
        if group.nodes() == 1 {
            return self.fitted(collective.op(), &demand, &collective.coordinates(), self.version);
        }
        let steps = match kind {
            // All messages are under way at once.
            CollectiveKind::AllToAll => 1.0,
            _ => group.nodes() as f64 - 1.0,
        };
        let seconds = self.on_links(collective.op(), &one_node(demand)) + steps * self.hop_s();
        Price { seconds: seconds.max(self.bound_of(&demand)), sd: UNMEASURED_SD, source: Source::Roofline }
    }

    fn shots(&self, whole: &Collective, rounds: f64) -> f64 {
        let ranks = whole.group.ranks as f64;
        let share = if rounds == 1.0 { 1.0 } else { rounds / ranks };
        let nodes = whole.group.nodes() as f64;
        let all = (ranks - 1.0) * share * whole.bytes;
        let inter_bytes = all * (ranks - ranks / nodes) / (ranks - 1.0);
        let demand = Demand { intra_bytes: all - inter_bytes, inter_bytes, ..whole.demand() };
        let hops = if nodes > 1.0 { rounds * self.hop_s() } else { 0.0 };
        let curve = &Calibration::published().curve(self.profile, "custom_all_reduce").0.curve;
        let more_rounds = (rounds - 1.0) * curve.latency_s * self.intra.latency_ratio();
        curve.seconds(&one_node(demand), &self.intra, &self.inter) + more_rounds + hops
    }

    fn tree(&self, whole: &Collective) -> f64 {
        let Group { ranks_per_node, .. } = whole.group;
        let nodes = whole.group.nodes() as f64;
        // Up and down, as deep as the nodes' tree; inside a node the ranks are a chain.
        let steps = 2.0 * nodes.log2().ceil();
        let inter_bytes = if nodes > 1.0 { 2.0 * whole.bytes / ranks_per_node as f64 } else { 0.0 };
        let intra_bytes = if ranks_per_node > 1 { 2.0 * whole.bytes } else { 0.0 };
        let demand = Demand { intra_bytes, inter_bytes, ..whole.demand() };
        self.on_links("nccl_all_reduce", &one_node(demand)) + steps * self.hop_s()
    }

    fn hierarchical(&self, whole: &Collective) -> f64 {
        let here = whole.group.ranks_per_node;
        let inside = Group::one_node(here);
        let (scatter, gather) = (self.reduce_scatter(whole.bytes, inside), self.all_gather(whole.bytes, inside));
        let (nodes, mut between) = (whole.group.nodes() as f64, 0.0);
        if nodes > 1.0 {
            let inter_bytes = 2.0 * (nodes - 1.0) / nodes * whole.bytes / here as f64;
            // Each rank of a node has a ring of its own, of one rank a node.
            let demand = Demand { ring: 1.0, intra_bytes: 0.0, inter_bytes, ..whole.demand() };
            between = self.on_links("nccl_all_reduce", &one_node(demand)) + 2.0 * (nodes - 1.0) * self.hop_s();
        }
        scatter.seconds + between + gather.seconds
    }

    /// By a curve that was fitted inside a node. The share of the adapters' bandwidth is that of a low-latency exchange.
    fn on_links(&self, op: &str, demand: &Demand) -> f64 {
        let published = Calibration::published();
        let curve = &published.curve(self.profile, op).0.curve;
        let inter_share = published.curve(self.profile, "deepep_ll_dispatch").0.curve.inter_share;
        super::Curve { inter_share, ..*curve }.seconds(demand, &self.intra, &self.inter)
    }

    /// One more step between nodes: what a second node adds to a low-latency exchange.
    fn hop_s(&self) -> f64 {
        Calibration::published().curve(self.profile, "deepep_ll_dispatch").0.curve.hop_s(&self.inter)
    }
}

/// The demand without steps between nodes, which are counted one by one.
fn one_node(demand: Demand) -> Demand {
    Demand { nodes: 1.0, ..demand }
}
