//! How much memory a node takes when nobody says: a quarter of what there is.

use std::fs::read_to_string;
use std::path::{Path, PathBuf};

use crate::limits::MEMORY_SIZE_DEFAULT;
use crate::node::memory::memory_size_min;
use crate::size;

/// The ceiling: what was asked for, or a quarter of what the machine or the control group has, but never too little.
pub(super) fn size_max(wanted: Option<u64>, reactor_count: usize) -> Result<u64, String> {
    let least = memory_size_min(reactor_count);
    match wanted {
        Some(size) if size < least => Err(format!(
            "--memory {} is too little: with {reactor_count} reactor{} a node needs {} or more",
            size::show(size),
            if reactor_count == 1 { "" } else { "s" },
            size::show(least)
        )),
        Some(size) => Ok(size),
        None => {
            let machine = machine_size(&read_to_string("/proc/meminfo").unwrap_or_default());
            let group = group_size(
                &read_to_string("/proc/self/cgroup").unwrap_or_default(),
                Path::new("/sys/fs/cgroup"),
            );
            let there_is = machine.into_iter().chain(group).min();
            Ok(there_is.map_or(MEMORY_SIZE_DEFAULT, |size| size / 4).max(least))
        }
    }
}

/// The machine's memory, by /proc/meminfo.
fn machine_size(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// The lowest limit of this process's control group and of those that it lies in, by /proc/self/cgroup.
fn group_size(groups: &str, root: &Path) -> Option<u64> {
    let mut lowest: Option<u64> = None;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let (top, file) = if controllers.is_empty() {
            (root.to_path_buf(), "memory.max")
        } else if controllers.split(',').any(|name| name == "memory") {
            (root.join("memory"), "memory.limit_in_bytes")
        } else {
            continue;
        };
        // In a container the path may be the host's, of which only the end is here: what is not there limits nothing.
        let mut directory: PathBuf = top.join(path.trim_start_matches('/'));
        loop {
            let limit = read_to_string(directory.join(file)).ok().and_then(|text| text.trim().parse().ok());
            lowest = lowest.into_iter().chain(limit).min();
            if directory == top || !directory.pop() {
                break;
            }
        }
    }
    lowest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_says_what_it_has() {
        assert_eq!(machine_size("MemTotal:       24602340 kB\nMemFree: 1 kB\n"), Some(24_602_340 << 10));
        assert_eq!(machine_size("nonsense"), None);
    }

    #[test]
    fn the_lowest_limit_on_the_way_up_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("a/b/memory.max", "max\n");
        write("a/memory.max", "1000\n");
        write("memory/c/memory.limit_in_bytes", "500\n");
        assert_eq!(group_size("0::/a/b\n", root.path()), Some(1_000));
        assert_eq!(group_size("0::/\n", root.path()), None);
        assert_eq!(group_size("4:cpu:/x\n3:memory:/c\n0::/a\n", root.path()), Some(500));
        assert_eq!(group_size("garbage\n", root.path()), None);
    }

    #[test]
    fn too_little_is_refused_in_words() {
        let text = size_max(Some(1 << 20), 2).unwrap_err();
        assert!(text.contains("1.0 MiB") && text.contains("256.0 MiB"), "{text}");
        assert_eq!(size_max(Some(1 << 30), 2), Ok(1 << 30));
        assert!(size_max(None, 2).unwrap() >= 256 << 20);
    }
}
