//! Energy of a token: what a GPU draws when idle, what operations and bytes add, links, hosts and cooling.

use moesaic_spec::Cluster;
use serde::{Deserialize, Serialize};

/// What one GPU does in a second, in the mean.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Operations per second.
    pub flops: f64,
    /// Bytes of memory traffic per second.
    pub bytes: f64,
    /// Bytes sent per second.
    pub sent: f64,
    /// Operations per second at most, in the type of the weights.
    pub peak: f64,
}

/// Energy of one output token by part, joules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Energy {
    /// GPUs that do nothing.
    pub idle: f64,
    /// Operations.
    pub flops: f64,
    /// Memory traffic.
    pub bytes: f64,
    /// Links.
    pub links: f64,
    /// Hosts.
    pub host: f64,
    /// Everything, with cooling and losses (PUE).
    pub total: f64,
    /// Grams of CO2 of it.
    pub co2_g: f64,
}

/// Share of the range between idle and most that streaming at full bandwidth draws; arithmetic at the peak draws all of it.
/// Assumption: memory-bound kernels run at about 60 % of the power limit's range, compute-bound ones at the limit.
const STREAMING: f64 = 0.6;

/// Energy of a token that takes so many GPU-seconds; `None` where the cluster does not say what a GPU draws.
pub fn per_token(cluster: &Cluster, rates: Rates, gpu_seconds: f64) -> Option<Energy> {
    let power = cluster.gpu.power?;
    let range = power.max_w - power.idle_w;
    let flops = range * rates.flops / rates.peak;
    let bytes = range * STREAMING * rates.bytes / cluster.gpu.memory_bandwidth;
    // No board draws more than it may.
    let fit = (range / (flops + bytes)).min(1.0);
    let parts = Energy {
        idle: power.idle_w * gpu_seconds,
        flops: flops * fit * gpu_seconds,
        bytes: bytes * fit * gpu_seconds,
        links: rates.sent * cluster.energy.link_j_per_byte * gpu_seconds,
        host: cluster.energy.host_w_per_gpu * gpu_seconds,
        ..Energy::default()
    };
    let total = (parts.idle + parts.flops + parts.bytes + parts.links + parts.host) * cluster.energy.pue;
    Some(Energy { total, co2_g: total / 3.6e6 * cluster.energy.co2_g_per_kwh, ..parts })
}
