//! How uneven a load is.

use moesaic_plan::eplb::{self, ExpertRank};
use moesaic_plan::{LayerPlacement, Placement};
use serde::{Deserialize, Serialize};

use super::LoadCounters;

/// How unevenly tokens are spread, over all layers that are placed. Deviations are in units of the layer's mean, so layers
/// of different load can be compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadStats {
    /// Standard deviation of the load of ranks: root of the mean square over layers.
    pub std_dev: f64,
    /// Standard deviation of the load of physical experts, likewise.
    pub expert_std_dev: f64,
    /// Load of the fullest rank by the mean, averaged over layers: the factor by which experts take longer than they must.
    pub max_over_mean: f64,
    /// The same of the worst layer.
    pub worst_max_over_mean: f64,
}

impl LoadStats {
    /// Of the counted load under a placement. A layer without tokens counts as level.
    pub fn of(loads: &LoadCounters, placement: &Placement, ranks: &[Option<Vec<ExpertRank>>]) -> LoadStats {
        let (mut sum, mut layers) = (LoadStats::default(), 0.0);
        for (layer, (placed, ranks)) in placement.layers.iter().zip(ranks).enumerate() {
            let (Some(placed), Some(ranks)) = (placed, ranks) else { continue };
            let loads = loads.loads(layer);
            let rank_loads = eplb::rank_loads(placed, &loads, ranks);
            let max_over_mean = eplb::max_over_mean(&rank_loads);
            layers += 1.0;
            sum.std_dev += variance(&rank_loads);
            sum.expert_std_dev += variance(&replica_loads(placed, &loads));
            sum.max_over_mean += max_over_mean;
            sum.worst_max_over_mean = sum.worst_max_over_mean.max(max_over_mean);
        }
        if layers == 0.0 {
            return LoadStats { max_over_mean: 1.0, worst_max_over_mean: 1.0, ..LoadStats::default() };
        }
        LoadStats {
            std_dev: (sum.std_dev / layers).sqrt(),
            expert_std_dev: (sum.expert_std_dev / layers).sqrt(),
            max_over_mean: sum.max_over_mean / layers,
            ..sum
        }
    }
}

/// The load of each physical expert.
fn replica_loads(placement: &LayerPlacement, loads: &[f64]) -> Vec<f64> {
    let experts = placement.replicas.iter().zip(loads);
    experts.flat_map(|(holders, load)| holders.iter().map(move |_| load / holders.len() as f64)).collect()
}

/// In units of the squared mean; 0 of nothing.
fn variance(loads: &[f64]) -> f64 {
    let n = loads.len() as f64;
    let mean = loads.iter().sum::<f64>() / n;
    if mean > 0.0 { loads.iter().map(|load| (load / mean - 1.0).powi(2)).sum::<f64>() / n } else { 0.0 }
}
