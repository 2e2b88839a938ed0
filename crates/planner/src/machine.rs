//! A machine as a cluster of its own, from what it measured of itself.

use moesaic_spec::{Bytes, Cluster, Energy, Gpu, Link, PeakFlops};

use crate::PlannerError;
use crate::cost::{Precision, Row};
use crate::network::LinkKind;
use crate::network::{LinkRow, usual_transport};
use crate::tables::{TableFile, rows};

/// What is known of a machine beside its tables.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    /// A name for it.
    pub name: String,
    /// The processor.
    pub processor: String,
    /// Memory of all ranks together.
    pub memory: Bytes,
    /// Ranks that it has room for; each is a GPU of the cluster.
    pub ranks: usize,
    /// Threads of each.
    pub threads: usize,
    /// Peak of the dense product of a rank by type, FLOP/s.
    pub peaks: Vec<(Precision, f64)>,
    /// Streaming reads of a rank, bytes/s.
    pub read_bytes_per_s: f64,
    /// The smallest op, seconds.
    pub launch_s: f64,
}

/// Utilisations below this are not told in cluster files.
const LEAST_SHARE: f64 = 0.001;

/// The fastest row must not look faster than itself.
const ROUNDING: f64 = 1.0 + 1e-9;

impl Machine {
    /// The cluster of this machine alone, from its tables and messages beside them. Peaks, memory and link are as fast as anything
    /// that was measured, so that no row is faster than physics; their utilisations are what products, reads and messages reach.
    ///
    /// # Errors
    /// [`PlannerError::Table`]: a table that cannot be read.
    ///
    /// # Panics
    /// Without peaks, and without messages between processes of two sizes at least.
    pub fn cluster(&self, files: &[TableFile], messages: &[LinkRow]) -> Result<Cluster, PlannerError> {
        let (ops, mut links) = rows(&unbounded(), files)?;
        links.extend_from_slice(messages);
        Ok(self.fastest(&ops, &links))
    }

    fn fastest(&self, ops: &[Row], links: &[LinkRow]) -> Cluster {
        let reached = |of: &dyn Fn(&Row) -> f64| ROUNDING * ops.iter().map(of).fold(0.0, f64::max);
        let peak = |precision: Precision| {
            let of_type = |(other, peak): &(Precision, f64)| (*other == precision).then_some(*peak);
            let product = self.peaks.iter().find_map(of_type)?;
            let of_op = |row: &Row| if row.op.precision() == precision { row.op.flops() / row.seconds } else { 0.0 };
            Some((product, product.max(reached(&of_op))))
        };
        let first = self.peaks.first().expect("a peak").0;
        // Types that were not measured are taken for the first.
        let peak_of = |precision| peak(precision).or_else(|| peak(first)).expect("the first has a peak");
        let (product, bf16) = peak_of(Precision::Bf16);
        let f8 = peak_of(Precision::Fp8Block).1;
        let memory_bandwidth = self.read_bytes_per_s.max(reached(&|row| row.op.bytes() / row.seconds));
        let gpu = Gpu {
            name: format!("{} ({} threads)", self.processor, self.threads),
            memory: Bytes(self.memory.0 / self.ranks as u64),
            sms: self.threads,
            peak_flops: PeakFlops { bf16, f8, f4: f8, f32: peak_of(Precision::F32).1 },
            compute_utilization: share(product, bf16),
            memory_bandwidth,
            memory_utilization: share(self.read_bytes_per_s, memory_bandwidth),
            launch_s: self.launch_s,
            power: None,
            usd_per_hour: None,
        };
        Cluster {
            name: self.name.clone(),
            nodes: 1,
            gpus_per_node: self.ranks,
            gpu,
            intra_node: self.link(links),
            inter_node: None,
            rank_map: Vec::new(),
            energy: Energy::default(),
        }
    }

    /// The link between ranks: α and β of messages between processes.
    fn link(&self, rows: &[LinkRow]) -> Link {
        let kind = LinkKind::SendReceive;
        let messages = rows.iter().filter(|row| row.kind == kind && row.transport == usual_transport(kind));
        let (latency_s, bytes_per_s) = hockney(messages);
        let bandwidth = ROUNDING * rows.iter().map(|row| row.least_bytes() / row.seconds).fold(bytes_per_s, f64::max);
        Link {
            name: "shared memory".into(),
            bandwidth_per_gpu: bandwidth,
            bandwidth_per_node: bandwidth * self.ranks as f64,
            utilization: share(bytes_per_s, bandwidth),
            latency_s,
        }
    }
}

/// A cluster that nothing is too fast for.
fn unbounded() -> Cluster {
    let peak = f64::INFINITY;
    let link = Link {
        name: String::new(),
        bandwidth_per_gpu: peak,
        bandwidth_per_node: peak,
        utilization: 1.0,
        latency_s: 0.0,
    };
    let gpu = Gpu {
        name: String::new(),
        memory: Bytes(0),
        sms: 1,
        peak_flops: PeakFlops { bf16: peak, f8: peak, f4: peak, f32: peak },
        compute_utilization: 1.0,
        memory_bandwidth: peak,
        memory_utilization: 1.0,
        launch_s: 0.0,
        power: None,
        usd_per_hour: None,
    };
    Cluster {
        name: String::new(),
        nodes: 1,
        gpus_per_node: 1,
        gpu,
        intra_node: link,
        inter_node: None,
        rank_map: Vec::new(),
        energy: Energy::default(),
    }
}

fn share(part: f64, whole: f64) -> f64 {
    (part / whole).clamp(LEAST_SHARE, 1.0)
}

/// α and β of `t = α + bytes / β` by least squares of relative errors. Source of the model: Hockney, "The communication challenge
/// for MPP", 1994.
///
/// # Panics
/// With fewer than two sizes.
fn hockney<'r>(rows: impl Iterator<Item = &'r LinkRow>) -> (f64, f64) {
    // Of x = 1 / t and y = bytes / t: α x + y / β = 1.
    let (mut xx, mut xy, mut yy, mut x_sum, mut y_sum) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for row in rows {
        let (x, y) = (1.0 / row.seconds, row.bytes / row.seconds);
        (xx, xy, yy) = (xx + x * x, xy + x * y, yy + y * y);
        (x_sum, y_sum) = (x_sum + x, y_sum + y);
    }
    let determinant = xx * yy - xy * xy;
    assert!(determinant > 0.0, "messages of two sizes are needed");
    let alpha = (x_sum * yy - y_sum * xy) / determinant;
    let per_byte = (y_sum * xx - x_sum * xy) / determinant;
    match (alpha > 0.0, per_byte > 0.0) {
        (true, true) => (alpha, 1.0 / per_byte),
        // The smaller part is lost in the noise of the greater.
        (false, _) => (0.0, yy / y_sum),
        (true, false) => (x_sum / xx, yy / y_sum),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cost::{Op, Stack};

    fn message(bytes: f64, seconds: f64) -> LinkRow {
        LinkRow { kind: LinkKind::SendReceive, ranks: 2, bytes, transport: "process".into(), seconds }
    }

    fn machine() -> Machine {
        Machine {
            name: "here".into(),
            processor: "a processor".into(),
            memory: Bytes(8 << 30),
            ranks: 2,
            threads: 1,
            peaks: vec![(Precision::Bf16, 1e11), (Precision::F32, 5e10)],
            read_bytes_per_s: 1e10,
            launch_s: 1e-6,
        }
    }

    #[test]
    fn messages_give_latency_and_bandwidth_back() {
        let rows: Vec<LinkRow> = (10..27).map(|i| f64::from(1 << i)).map(|b| message(b, 5e-6 + b / 4e9)).collect();
        let (latency, bandwidth) = hockney(rows.iter());
        assert!((latency / 5e-6 - 1.0).abs() < 1e-6 && (bandwidth / 4e9 - 1.0).abs() < 1e-6, "{latency} {bandwidth}");
    }

    #[test]
    fn nothing_that_was_measured_is_faster_than_the_cluster() {
        let op = Op::Gemm { m: 100.0, n: 100.0, k: 100.0, weights: Precision::Bf16 };
        let seconds = op.flops() / 2e11;
        let row = Row { device: "here".into(), op, stack: Stack::Moesaic, kernel: String::new(), seconds };
        let links = [message(1e3, 5e-6), message(1e7, 2e-3)];
        let cluster = machine().fastest(&[row], &links);
        assert!((cluster.gpu.peak_flops.bf16 / 2e11 - 1.0).abs() < 1e-6);
        assert!((cluster.gpu.compute_utilization - 0.5).abs() < 1e-6);
        assert_eq!((cluster.gpu.peak_flops.f32, cluster.gpu.memory), (5e10, Bytes(4 << 30)));
        let read = Cluster::from_yaml(&cluster.to_yaml(), "cluster.yaml").unwrap();
        assert_eq!(read, cluster);
    }
}
