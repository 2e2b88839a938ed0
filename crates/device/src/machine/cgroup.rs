//! The memory limits of the control groups that this process is in, both versions.

use std::path::{Path, PathBuf};

use super::read;

/// What can still be taken before the tightest of the nested groups is full, in bytes. `None`: no group has a limit.
///
/// Cached file pages count as usage but are given up under pressure, so they count as free here.
pub(super) fn memory_left(root: &Path) -> Option<u64> {
    let memberships = read(root, "proc/self/cgroup")?;
    let mounts = read(root, "proc/self/mountinfo")?;
    let v2 = group_folders(&memberships, &mounts, None);
    let v1 = group_folders(&memberships, &mounts, Some("memory"));
    let left_v2 = v2.iter().filter_map(|folder| {
        let cache = stat(root, folder, "inactive_file") + stat(root, folder, "active_file");
        left(number(root, folder, "memory.max")?, number(root, folder, "memory.current")?, cache)
    });
    let left_v1 = v1.iter().filter_map(|folder| {
        let cache = stat(root, folder, "total_inactive_file") + stat(root, folder, "total_active_file");
        left(number(root, folder, "memory.limit_in_bytes")?, number(root, folder, "memory.usage_in_bytes")?, cache)
    });
    left_v2.chain(left_v1).min()
}

fn left(limit: u64, usage: u64, cache: u64) -> Option<u64> {
    // Version 1 writes "no limit" as the largest multiple of a page.
    const UNLIMITED: u64 = 1 << 60;
    (limit < UNLIMITED).then(|| limit.saturating_sub(usage.saturating_sub(cache)))
}

/// The number that a file holds; `max` is none.
fn number(root: &Path, folder: &Path, file: &str) -> Option<u64> {
    read(root, folder.join(file).to_str()?)?.trim().parse().ok()
}

fn stat(root: &Path, folder: &Path, name: &str) -> u64 {
    let text = folder.join("memory.stat").to_str().and_then(|path| read(root, path)).unwrap_or_default();
    let mut fields = text.lines().filter_map(|line| line.split_once(' '));
    fields.find(|(key, _)| *key == name).and_then(|(_, value)| value.trim().parse().ok()).unwrap_or(0)
}

/// The folders, without the leading `/`, of this process's group and of its parents up to the mount, innermost first.
/// `controller`: of version 1; `None`: version 2.
fn group_folders(memberships: &str, mounts: &str, controller: Option<&str>) -> Vec<PathBuf> {
    // `4:memory:/group` in version 1, `0::/group` in version 2.
    let mut groups = memberships.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, names, path) = (fields.next()?, fields.next()?, fields.next()?);
        controller.map_or(names.is_empty(), |name| names.split(',').any(|n| n == name)).then_some(path)
    });
    // `35 31 0:32 ROOT MOUNT_POINT options … - TYPE SOURCE SUPER_OPTIONS`
    let mut mounts = mounts.lines().filter_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (mount_root, mount_point) = (mount.next()?, mount.next()?);
        let filesystem: Vec<&str> = filesystem.split(' ').collect();
        let wanted = match controller {
            None => filesystem[0] == "cgroup2",
            Some(name) => filesystem[0] == "cgroup" && filesystem.last()?.split(',').any(|option| option == name),
        };
        wanted.then_some((mount_root, mount_point.trim_start_matches('/')))
    });
    let (Some(group), Some((mount_root, mount_point))) = (groups.next(), mounts.next()) else { return Vec::new() };
    let mount_point = Path::new(mount_point);
    // Inside a container the group's name may be the host's, while only the container's own group is mounted.
    let below = Path::new(group).strip_prefix(mount_root).unwrap_or(Path::new(""));
    below.ancestors().map(|path| mount_point.join(path)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn the_tightest_of_nested_groups_counts_in_version_2() {
        let root = tree(&[
            ("proc/self/cgroup", "0::/pod/box\n"),
            ("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"),
            ("sys/fs/cgroup/pod/box/memory.max", "max\n"),
            ("sys/fs/cgroup/pod/box/memory.current", "100\n"),
            ("sys/fs/cgroup/pod/memory.max", "1000\n"),
            ("sys/fs/cgroup/pod/memory.current", "700\n"),
            ("sys/fs/cgroup/pod/memory.stat", "anon 5\ninactive_file 200\nactive_file 100\n"),
        ]);
        assert_eq!(memory_left(root.path()), Some(600));
    }

    #[test]
    fn a_container_sees_its_own_group_in_version_1() {
        let root = tree(&[
            ("proc/self/cgroup", "9:name=systemd:/\n4:memory:/docker/abc\n1:cpu,cpuacct:/docker/abc\n0::/\n"),
            (
                "proc/self/mountinfo",
                "35 31 0:32 /docker/abc /sys/fs/cgroup/memory ro master:4 - cgroup cgroup rw,memory\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "4096\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "5000\n"),
            ("sys/fs/cgroup/memory/memory.stat", "total_inactive_file 1000\n"),
        ]);
        assert_eq!(memory_left(root.path()), Some(96));
    }

    #[test]
    fn no_limit_is_no_number() {
        let root = tree(&[
            ("proc/self/cgroup", "4:memory:/\n"),
            ("proc/self/mountinfo", "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "5000\n"),
        ]);
        assert_eq!(memory_left(root.path()), None);
    }
}
