//! Cores and caches.

use std::path::Path;

use moesaic_spec::Bytes;

use super::read;

/// A data or unified cache.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Cache {
    /// 1 is nearest to the core.
    pub level: usize,
    /// Size. A virtual machine may report the host's, of which it has only a part.
    pub size: Bytes,
    /// The CPUs that share it, as ranges (`0-3,8`).
    pub shared_by: Option<String>,
}

/// Cores that this process may use: its affinity, and the CPU quota of its cgroup rounded down, never less than one.
pub fn num_usable_cores() -> usize {
    // On Linux this asks sched_getaffinity and both versions of cgroups.
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// The extensions worth showing: those that a kernel path asks for, or that a reader expects beside them.
const FLAGS: [&str; 16] = [
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
    "amx_fp16",
    "hypervisor",
];

pub(super) fn model(root: &Path) -> Option<String> {
    field(root, "model name")
}

pub(super) fn flags(root: &Path) -> Vec<String> {
    let all = field(root, "flags").unwrap_or_default();
    all.split_whitespace().filter(|flag| FLAGS.contains(flag)).map(str::to_owned).collect()
}

/// The first `name : value` of /proc/cpuinfo.
fn field(root: &Path, name: &str) -> Option<String> {
    let text = read(root, "proc/cpuinfo")?;
    let mut fields = text.lines().filter_map(|line| line.split_once(':'));
    fields.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned())
}

pub(super) fn num_numa_nodes(root: &Path) -> Option<usize> {
    let entries = std::fs::read_dir(root.join("sys/devices/system/node")).ok()?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let is_node = |name: &String| name.strip_prefix("node").is_some_and(|n| n.parse::<usize>().is_ok());
    Some(names.filter(is_node).count()).filter(|&n| n > 0)
}

pub(super) fn caches(root: &Path) -> Vec<Cache> {
    let cache = |idx| {
        let folder = format!("sys/devices/system/cpu/cpu0/cache/index{idx}");
        let text = |file: &str| read(root, &format!("{folder}/{file}")).map(|text| text.trim().to_owned());
        if text("type")? == "Instruction" {
            return None;
        }
        Some(Cache {
            level: text("level")?.parse().ok()?,
            size: size(&text("size")?)?,
            shared_by: text("shared_cpu_list"),
        })
    };
    // Linux numbers them from 0, the levels ascending; no processor has ten.
    (0..10).filter_map(cache).collect()
}

/// `48K`, `2M` or plain bytes.
fn size(text: &str) -> Option<Bytes> {
    let (number, unit) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 1 << 10),
        b'M' => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    number.parse::<u64>().ok()?.checked_mul(unit).map(Bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_is_read() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("proc/cpuinfo", "processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nflags\t\t: fpu avx2 amx_tile\nflags: x\n");
        for (idx, kind, level, size) in [(0, "Data", 1, "48K"), (1, "Instruction", 1, "32K"), (2, "Unified", 2, "2M")] {
            let folder = format!("sys/devices/system/cpu/cpu0/cache/index{idx}");
            write(&format!("{folder}/type"), kind);
            write(&format!("{folder}/level"), &level.to_string());
            write(&format!("{folder}/size"), &format!("{size}\n"));
            write(&format!("{folder}/shared_cpu_list"), "0-1\n");
        }
        for name in ["node0/x", "node1/x", "possible"] {
            write(&format!("sys/devices/system/node/{name}"), "");
        }
        assert_eq!(model(root.path()).unwrap(), "A CPU @ 2 GHz");
        assert_eq!(flags(root.path()), ["avx2", "amx_tile"]);
        assert_eq!(num_numa_nodes(root.path()), Some(2));
        let shared_by = Some("0-1".to_owned());
        let expected = [(1, 48 << 10), (2, 2 << 20)];
        let expected = expected.map(|(level, size)| Cache { level, size: Bytes(size), shared_by: shared_by.clone() });
        assert_eq!(caches(root.path()), expected);
    }
}
