//! The cluster file beside the tables: this machine, as `--cluster` takes it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use moesaic_device::Machine as Detected;
use moesaic_engine::probe::{Effort, Probe, Prober, Transport, measure_send_receive};
use moesaic_planner::machine::Machine;
use moesaic_planner::network::LinkKind;
use moesaic_planner::network::LinkRow;
use moesaic_spec::{Bytes, DType};

use super::table::Origin;
use super::{Ceiling, Ranks};
use crate::tables;

/// Messages that are measured where no table has any.
const MESSAGES: [usize; 4] = [1 << 10, 64 << 10, 1 << 20, 16 << 20];
/// Where the system does not tell its memory.
const UNKNOWN_MEMORY: Bytes = Bytes(8 << 30);

/// Writes it for a machine with these ceilings, from all tables of the folder.
pub(super) fn write(
    dir: &Path,
    detected: &Detected,
    ranks: Ranks,
    prober: &Prober,
    ceilings: &[Ceiling],
    origin: &Origin,
) -> Result<()> {
    let files = tables::read(dir)?;
    let kind = LinkKind::SendReceive;
    let messages = if files.iter().any(|file| file.op == kind.table()) { Vec::new() } else { messages()? };
    let least = Probe::Linear { rows: 1, n: 16, k: 16, dtype: DType::F32 };
    let read = ceilings.iter().map(|ceiling| ceiling.ceilings.read_bytes_per_s).fold(0.0, f64::max);
    let machine = Machine {
        name: format!("cpu-{}core-{}", detected.num_cores, detected.isa),
        processor: detected.cpu_model.clone().unwrap_or_else(|| "unknown processor".to_owned()),
        memory: detected.memory_total.unwrap_or(UNKNOWN_MEMORY),
        ranks: ranks.count,
        threads: ranks.threads,
        peaks: ceilings.iter().map(|ceiling| (ceiling.precision, ceiling.ceilings.flops_per_s)).collect(),
        read_bytes_per_s: read,
        launch_s: prober.measure(&least, &Effort::default())?.seconds,
    };
    let cluster = machine.cluster(&files, &messages)?;
    let path = dir.join(tables::CLUSTER);
    let text = format!(
        "{}# what: this machine by its own measurements; peaks, memory and link as fast as the best of ceilings and rows, utilisations \
         what products, reads and messages reach\n{}",
        origin.head(),
        cluster.to_yaml()
    );
    fs::write(&path, text).with_context(|| path.display().to_string())
}

/// Some messages between processes.
fn messages() -> Result<Vec<LinkRow>> {
    let message = |bytes: usize| {
        let timing = measure_send_receive(Transport::Process, bytes, &Effort::default())?;
        let (kind, transport) = (LinkKind::SendReceive, "process".to_owned());
        Ok(LinkRow { kind, ranks: 2, bytes: bytes as f64, transport, seconds: timing.seconds })
    };
    MESSAGES.into_iter().map(message).collect()
}
