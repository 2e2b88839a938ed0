//! What one op and one message cost.

use moesaic_device::op_log::OpCall;
use moesaic_spec::{Bytes, Cluster, DType, Gpu, LinkClass};

/// Prices ops by whichever of computing and streaming takes longer. Source: Williams, Waterman and Patterson, "Roofline:
/// an insightful visual performance model", 2009.
#[derive(Clone, Copy, Debug)]
pub struct Roofline<'a> {
    /// On what.
    pub gpu: &'a Gpu,
    /// Type of the weights, which decides the peak.
    pub dtype: DType,
}

impl Roofline<'_> {
    /// Seconds of one op: `launch + max(flops / (peak * compute_utilization), bytes / (bandwidth * memory_utilization))`.
    pub fn seconds(&self, call: &OpCall) -> f64 {
        let computing = call.flops.expected / (self.gpu.peak(self.dtype) * self.gpu.compute_utilization);
        let streaming = call.bytes.expected / (self.gpu.memory_bandwidth * self.gpu.memory_utilization);
        self.gpu.launch_s + computing.max(streaming)
    }
}

/// Prices messages of one class of links: `α + bytes / β`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkPrice {
    /// α, seconds.
    pub latency_s: f64,
    /// β of one message, bytes/s.
    pub bytes_per_s: f64,
    /// Messages that all GPUs of a node can send at a time at this β.
    pub per_node: usize,
}

impl LinkPrice {
    /// A message gets the GPU's share of the link. Where the node's bandwidth is no whole multiple of that, the multiple is
    /// rounded, and β lowered if the node would carry more than it can.
    pub fn of(cluster: &Cluster, class: LinkClass) -> LinkPrice {
        let link = cluster.link(class);
        let per_node = (link.bandwidth_per_node / link.bandwidth_per_gpu).round().max(1.0);
        let bandwidth = link.bandwidth_per_gpu.min(link.bandwidth_per_node / per_node);
        LinkPrice { latency_s: link.latency_s, bytes_per_s: bandwidth * link.utilization, per_node: per_node as usize }
    }

    /// Seconds for which a message occupies its links.
    pub fn transfer_s(&self, bytes: Bytes) -> f64 {
        bytes.0 as f64 / self.bytes_per_s
    }

    /// Seconds from the start of an undisturbed message to its arrival.
    pub fn seconds(&self, bytes: Bytes) -> f64 {
        self.latency_s + self.transfer_s(bytes)
    }
}

#[cfg(test)]
mod tests {
    use moesaic_spec::{Energy, Link, PeakFlops};

    use super::*;

    fn gpu() -> Gpu {
        Gpu {
            name: "test".into(),
            memory: Bytes(1 << 30),
            peak_flops: PeakFlops { bf16: 100.0, f8: 200.0, f4: 200.0, f32: 50.0 },
            compute_utilization: 0.5,
            memory_bandwidth: 10.0,
            memory_utilization: 0.8,
            launch_s: 1.0,
            sms: 132,
            power: None,
            usd_per_hour: None,
        }
    }

    #[test]
    fn the_slower_of_computing_and_streaming_counts() {
        let gpu = gpu();
        let bf16 = Roofline { gpu: &gpu, dtype: DType::BF16 };
        assert_eq!(bf16.seconds(&OpCall::compute("linear", &[], 500, 8)), 1.0 + 10.0);
        assert_eq!(bf16.seconds(&OpCall::compute("linear", &[], 50, 80)), 1.0 + 10.0);
        assert_eq!(bf16.seconds(&OpCall::compute("nothing", &[], 0, 0)), 1.0);
        let f8 = Roofline { dtype: DType::F8E4M3, ..bf16 };
        assert_eq!(f8.seconds(&OpCall::compute("linear", &[], 500, 8)), 1.0 + 5.0);
        let f32 = Roofline { dtype: DType::F32, ..bf16 };
        assert_eq!(f32.seconds(&OpCall::compute("linear", &[], 500, 8)), 1.0 + 20.0);
    }

    fn price(per_gpu: f64, per_node: f64) -> LinkPrice {
        let link = Link {
            name: "test".into(),
            bandwidth_per_gpu: per_gpu,
            bandwidth_per_node: per_node,
            utilization: 0.5,
            latency_s: 3.0,
        };
        let cluster = Cluster {
            name: "test".into(),
            nodes: 1,
            gpus_per_node: 8,
            gpu: gpu(),
            intra_node: link,
            inter_node: None,
            rank_map: Vec::new(),
            energy: Energy::default(),
        };
        LinkPrice::of(&cluster, LinkClass::IntraNode)
    }

    #[test]
    fn a_message_gets_its_share_of_the_link() {
        assert_eq!(price(20.0, 160.0), LinkPrice { latency_s: 3.0, bytes_per_s: 10.0, per_node: 8 });
        assert_eq!(price(20.0, 20.0), LinkPrice { latency_s: 3.0, bytes_per_s: 10.0, per_node: 1 });
        // Less for the node than for one GPU: the node decides.
        assert_eq!(price(20.0, 10.0), LinkPrice { latency_s: 3.0, bytes_per_s: 5.0, per_node: 1 });
        // 32 are 1.6 times 20: two at a time with 16 each.
        assert_eq!(price(20.0, 32.0), LinkPrice { latency_s: 3.0, bytes_per_s: 8.0, per_node: 2 });
        assert_eq!(price(20.0, 20.0).seconds(Bytes(50)), 3.0 + 5.0);
    }
}
