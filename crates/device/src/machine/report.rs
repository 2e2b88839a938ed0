//! A machine as a person reads it.

use std::fmt::{self, Display, Formatter};

use super::Machine;

const WIDTH: usize = 20;

fn line(f: &mut Formatter<'_>, name: &str, value: impl Display) -> fmt::Result {
    writeln!(f, "{name:<WIDTH$}{value}")
}

fn known(value: Option<impl Display>) -> String {
    value.map_or("unknown".to_owned(), |value| value.to_string())
}

impl Display for Machine {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        line(f, "CPU", known(self.cpu_model.as_ref()))?;
        line(f, "usable cores", self.num_cores)?;
        line(f, "kernels for", self.isa)?;
        line(f, "CPU flags", self.cpu_flags.join(" "))?;
        for cache in &self.caches {
            let sharers = cache.shared_by.as_ref().map_or(String::new(), |cpus| format!(" for CPUs {cpus}"));
            line(f, &format!("L{} cache", cache.level), format!("{}{sharers}", cache.size))?;
        }
        line(f, "NUMA nodes", known(self.num_numa_nodes))?;
        let (available, total) = (known(self.memory_available), known(self.memory_total));
        line(f, "memory", format!("{available} available of {total}"))?;
        line(f, "huge pages", known(self.huge_pages.as_ref()))?;

        if self.gpus.is_empty() {
            line(f, "GPUs", "none")?;
        }
        for (idx, gpu) in self.gpus.iter().enumerate() {
            let capability = gpu.compute_capability.as_ref().map_or(String::new(), |c| format!(", capability {c}"));
            let (free, total) = (known(gpu.memory_free), known(gpu.memory_total));
            let uuid = gpu.uuid.as_deref().unwrap_or("no UUID");
            line(f, &format!("GPU {idx}"), format!("{}{capability}, {free} free of {total}, {uuid}", gpu.name))?;
        }
        line(f, "GPU driver", self.gpu_driver.as_deref().unwrap_or("none"))?;
        for library in &self.libraries {
            let state = match (&library.error, &library.version, &library.path) {
                (Some(_), ..) => "not found".to_owned(),
                (None, version, path) => format!("{} at {}", known(version.as_ref()), known(path.as_ref())),
            };
            line(f, library.name, state)?;
        }
        match &self.mpi {
            Some(mpi) => line(f, "MPI", format!("{} at {}", known(mpi.version.as_ref()), mpi.launcher.display()))?,
            None => line(f, "MPI", "neither mpirun nor mpiexec in PATH")?,
        }
        if self.environment.is_empty() {
            line(f, "environment", "no variable that matters is set")?;
        }
        for (idx, (name, value)) in self.environment.iter().enumerate() {
            line(f, if idx == 0 { "environment" } else { "" }, format!("{name}={value}"))?;
        }
        Ok(())
    }
}
