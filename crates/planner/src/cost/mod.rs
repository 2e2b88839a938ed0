//! What ops cost.

mod link;
mod op;

use moesaic_spec::Gpu;

pub use crate::network::{Price, Source};
pub use link::{LinkPrice, Roofline};
pub use op::{Op, Precision, touched};

/// Prices ops on one GPU.
#[derive(Clone, Debug)]
pub struct CostModel {
    gpu: Gpu,
}

impl CostModel {
    /// For a GPU.
    pub fn new(gpu: &Gpu) -> CostModel {
        CostModel { gpu: gpu.clone() }
    }

    /// What an op costs.
    pub fn price(&self, op: &Op) -> Price {
        let gpu = &self.gpu;
        let computing = op.flops() / (op.precision().peak(gpu) * gpu.compute_utilization);
        let streaming = op.bytes() / (gpu.memory_bandwidth * gpu.memory_utilization);
        Price { seconds: gpu.launch_s + computing.max(streaming), sd: 0.3, source: Source::Roofline }
    }
}
