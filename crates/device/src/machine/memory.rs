//! How much memory there is, and how much is left.

use std::path::Path;

use moesaic_spec::Bytes;

use super::{cgroup, read};

/// Memory that this process can still take without swapping or being ended: the kernel's estimate for the machine, or
/// what the process's cgroup has left if that is less. `None` where the system does not tell.
pub fn available_memory() -> Option<Bytes> {
    available(Path::new("/"))
}

pub(super) fn available(root: &Path) -> Option<Bytes> {
    let machine = meminfo(root, "MemAvailable");
    let group = cgroup::memory_left(root).map(Bytes);
    [machine, group].into_iter().flatten().min()
}

/// The most memory that this process has held at once (`VmHWM`). `None` where the system does not tell.
pub fn peak_memory() -> Option<Bytes> {
    kib(&read(Path::new("/"), "proc/self/status")?, "VmHWM")
}

pub(super) fn total(root: &Path) -> Option<Bytes> {
    meminfo(root, "MemTotal")
}

fn meminfo(root: &Path, name: &str) -> Option<Bytes> {
    kib(&read(root, "proc/meminfo")?, name)
}

/// A line such as `MemTotal:       24689764 kB` (the kernel's kB is 1024 bytes).
fn kib(text: &str, name: &str) -> Option<Bytes> {
    let (_, value) = text.lines().filter_map(|line| line.split_once(':')).find(|(key, _)| *key == name)?;
    value.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024).map(Bytes)
}

/// The bracketed word of `always [madvise] never`.
pub(super) fn huge_pages(root: &Path) -> Option<String> {
    let text = read(root, "sys/kernel/mm/transparent_hugepage/enabled")?;
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_and_its_group_are_both_limits() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("proc/meminfo", "MemTotal:       100 kB\nMemFree: 10 kB\nMemAvailable:     60 kB\n");
        write("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n");
        assert_eq!(total(root.path()), Some(Bytes(100 << 10)));
        assert_eq!(available(root.path()), Some(Bytes(60 << 10)));
        assert_eq!(huge_pages(root.path()).unwrap(), "madvise");

        write("proc/self/cgroup", "0::/\n");
        write("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
        write("sys/fs/cgroup/memory.max", "50000\n");
        write("sys/fs/cgroup/memory.current", "20000\n");
        assert_eq!(available(root.path()), Some(Bytes(30000)));
    }
}
