//! Where experts live: logical expert → physical replicas → ranks.

use serde::{Deserialize, Serialize};

use crate::{ExpertId, Rank};

/// Where the experts of every layer live.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placement {
    /// Counts changes. Everybody who takes part in a step has the same.
    pub epoch: u64,
    /// By decoder layer; `None` where the layer is dense or its experts are cut instead of placed.
    pub layers: Vec<Option<LayerPlacement>>,
}

/// Where the experts of one layer live.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerPlacement {
    /// By logical expert: the ranks that hold it, ascending, at least one, none twice.
    pub replicas: Vec<Vec<Rank>>,
}

impl LayerPlacement {
    /// The experts that a rank holds, ascending.
    pub fn experts_of(&self, rank: Rank) -> Vec<ExpertId> {
        let held = self.replicas.iter().enumerate().filter(|(_, ranks)| ranks.contains(&rank));
        held.map(|(expert, _)| ExpertId(expert as u32)).collect()
    }
}
