//! From bytes and steps to seconds.

use moesaic_spec::Link;

/// What an operation asks of the links of one GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Demand {
    /// Ranks of a node that pass bytes on, one after the other.
    pub ring: f64,
    /// Nodes.
    pub nodes: f64,
    /// Ranks of a node that use its links at once.
    pub ranks_per_node: f64,
    /// Bytes that the fullest GPU sends (or receives) inside its node.
    pub intra_bytes: f64,
    /// Bytes that it sends (or receives) between nodes.
    pub inter_bytes: f64,
    /// Bytes that no algorithm can do without, inside nodes.
    pub least_intra_bytes: f64,
    /// Bytes that no algorithm can do without, between nodes.
    pub least_inter_bytes: f64,
    /// Times that a multiprocessor has more than its first expert to serve (low-latency exchange).
    pub extra_waves: f64,
    /// Rows that one multiprocessor quantises one after the other, in rows of `CAST_HIDDEN` numbers.
    pub casts: f64,
}

/// The row that casts are counted in.
pub(super) const CAST_HIDDEN: f64 = 7168.0;

/// A class of links, relative to the one that was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Tier {
    /// Full bandwidth of a GPU, bytes/s.
    per_gpu: f64,
    /// Full bandwidth of a node, bytes/s.
    per_node: f64,
    /// Utilization by that of the measured links.
    utilization: f64,
    /// Latency by that of the measured links.
    latency: f64,
}

impl Tier {
    pub(super) fn new(link: &Link, measured: &Link) -> Self {
        Tier {
            per_gpu: link.bandwidth_per_gpu,
            per_node: link.bandwidth_per_node,
            utilization: link.utilization / measured.utilization,
            latency: link.latency_s / measured.latency_s,
        }
    }

    pub(super) fn latency_ratio(&self) -> f64 {
        self.latency
    }

    pub(super) fn shared(&self, flows: f64) -> Self {
        Tier { per_gpu: self.per_gpu / flows, per_node: self.per_node / flows, ..*self }
    }

    /// Full bandwidth of one of several GPUs of a node that all send, bytes/s.
    pub(super) fn bandwidth(&self, gpus: f64) -> f64 {
        self.per_gpu.min(self.per_node / gpus)
    }

    /// Bandwidth that messages of any size reach where the measured links reach `share`.
    pub(super) fn reached(&self, gpus: f64, share: f64) -> f64 {
        self.bandwidth(gpus) * (share * self.utilization).min(1.0)
    }
}

/// Latency, bandwidth and what lies between: `t = α + w + 2 κ √(α w)`, with α the latency of all steps and w the bytes by
/// the bandwidth that is reached. κ = 0 is the Hockney model; a greater κ says that protocols for middle sizes reach less.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Curve {
    /// Seconds of the smallest operation of two ranks: launch, and the steps inside a node.
    pub latency_s: f64,
    /// Seconds more for each rank of the [`Demand::ring`] beyond two.
    pub per_rank_s: f64,
    /// Seconds more for each of the [`Demand::extra_waves`].
    pub per_wave_s: f64,
    /// Seconds more where there are other nodes.
    pub other_nodes_s: f64,
    /// Seconds more each time the nodes double.
    pub per_doubling_s: f64,
    /// Share of the bandwidth inside nodes that large messages reach.
    pub intra_share: f64,
    /// Share of the bandwidth between nodes.
    pub inter_share: f64,
    /// Seconds of one of the [`Demand::casts`].
    pub cast_s: f64,
    /// κ.
    pub gradual: f64,
}

impl Curve {
    /// Names of the parameters, in the order of [`Curve::values`].
    pub const NAMES: [&str; 9] = [
        "latency_s",
        "per_rank_s",
        "per_wave_s",
        "other_nodes_s",
        "per_doubling_s",
        "intra_share",
        "inter_share",
        "cast_s",
        "gradual",
    ];

    /// All parameters.
    pub fn values(&self) -> [f64; 9] {
        [
            self.latency_s,
            self.per_rank_s,
            self.per_wave_s,
            self.other_nodes_s,
            self.per_doubling_s,
            self.intra_share,
            self.inter_share,
            self.cast_s,
            self.gradual,
        ]
    }

    pub(super) fn from_values(values: [f64; 9]) -> Self {
        let [
            latency_s,
            per_rank_s,
            per_wave_s,
            other_nodes_s,
            per_doubling_s,
            intra_share,
            inter_share,
            cast_s,
            gradual,
        ] = values;
        Curve {
            latency_s,
            per_rank_s,
            per_wave_s,
            other_nodes_s,
            per_doubling_s,
            intra_share,
            inter_share,
            cast_s,
            gradual,
        }
    }

    /// Seconds.
    pub(super) fn seconds(&self, demand: &Demand, intra: &Tier, inter: &Tier) -> f64 {
        let latency = self.latency(demand, intra, inter);
        let on_intra = demand.intra_bytes / intra.reached(demand.ranks_per_node, self.intra_share);
        let on_inter = demand.inter_bytes / inter.reached(demand.ranks_per_node, self.inter_share);
        let wire = on_intra.max(on_inter) + self.cast_s * demand.casts;
        latency + wire + 2.0 * self.gradual * (latency * wire).sqrt()
    }

    fn latency(&self, demand: &Demand, intra: &Tier, inter: &Tier) -> f64 {
        let inside = self.latency_s + self.per_rank_s * (demand.ring - 2.0).max(0.0);
        let between =
            if demand.nodes > 1.0 { self.other_nodes_s + self.per_doubling_s * demand.nodes.log2() } else { 0.0 };
        inside * intra.latency + between * inter.latency + self.per_wave_s * demand.extra_waves
    }

    /// Seconds that one more step between nodes takes.
    pub(super) fn hop_s(&self, inter: &Tier) -> f64 {
        (self.other_nodes_s + self.per_doubling_s) * inter.latency
    }
}
