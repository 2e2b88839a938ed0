//! What this machine has, as data. Every fact that the system may not tell is optional; nothing here fails.

mod cgroup;
mod cpu;
mod gpu;
mod library;
mod memory;
mod mpi;
mod report;

pub use cpu::{Cache, num_usable_cores};
pub use gpu::Gpu;
pub use library::Library;
pub use memory::{available_memory, peak_memory};
pub use mpi::Mpi;

use std::collections::BTreeMap;
use std::path::Path;

use moesaic_spec::Bytes;

use crate::{Isa, env};

/// What a run could use here.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Machine {
    /// The processor's name.
    pub cpu_model: Option<String>,
    /// Cores that this process may use: affinity and the quota of its cgroup count, not what is built in.
    pub num_cores: usize,
    /// The strongest instruction set that kernels have a path for.
    pub isa: Isa,
    /// The extensions of the processor that matter to kernels, as Linux spells them.
    pub cpu_flags: Vec<String>,
    /// NUMA nodes.
    pub num_numa_nodes: Option<usize>,
    /// Data caches as the first core sees them, smallest level first.
    pub caches: Vec<Cache>,
    /// Memory built in.
    pub memory_total: Option<Bytes>,
    /// Memory that this process can still take without swapping or being ended.
    pub memory_available: Option<Bytes>,
    /// The setting of transparent huge pages: `always`, `madvise` or `never`.
    pub huge_pages: Option<String>,
    /// NVIDIA GPUs, in the order of the PCI bus.
    pub gpus: Vec<Gpu>,
    /// The NVIDIA driver's version.
    pub gpu_driver: Option<String>,
    /// Libraries that are loaded at run time where they exist.
    pub libraries: Vec<Library>,
    /// The MPI launcher in `PATH`.
    pub mpi: Option<Mpi>,
    /// The variables of [`env::VARIABLES`] that are set, with their values.
    pub environment: BTreeMap<&'static str, String>,
}

impl Machine {
    /// Looks. Loads the GPU libraries that it finds into this process, and starts the MPI launcher to ask its version
    /// (2 seconds at most).
    pub fn detect() -> Machine {
        let root = Path::new("/");
        let (gpus, gpu_driver) = gpu::find(root);
        Machine {
            cpu_model: cpu::model(root),
            num_cores: num_usable_cores(),
            isa: Isa::detect(),
            cpu_flags: cpu::flags(root),
            num_numa_nodes: cpu::num_numa_nodes(root),
            caches: cpu::caches(root),
            memory_total: memory::total(root),
            memory_available: available_memory(),
            huge_pages: memory::huge_pages(root),
            gpus,
            gpu_driver,
            libraries: library::find_all(),
            mpi: mpi::find(),
            environment: env::VARIABLES
                .iter()
                .filter_map(|variable| env::value(variable.name).map(|value| (variable.name, value)))
                .collect(),
        }
    }
}

/// The text of a small file of the system, where there is one.
fn read(root: &Path, path: &str) -> Option<String> {
    std::fs::read_to_string(root.join(path)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_described() {
        let machine = Machine::detect();
        assert!(machine.num_cores >= 1);
        assert!(!machine.libraries.is_empty());
        if let (Some(available), Some(total)) = (machine.memory_available, machine.memory_total) {
            assert!(available <= total, "{available} of {total}");
        }
        println!("{machine}");
    }

    #[test]
    fn a_system_that_tells_nothing_is_no_error() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        assert_eq!(cpu::model(root), None);
        assert_eq!(cpu::flags(root), Vec::<String>::new());
        assert_eq!(cpu::num_numa_nodes(root), None);
        assert_eq!(cpu::caches(root), Vec::new());
        assert_eq!(memory::total(root), None);
        assert_eq!(memory::available(root), None);
        assert_eq!(memory::huge_pages(root), None);
        assert_eq!(gpu::from_driver_files(root), Vec::new());
    }
}
