//! A ceiling for the memory of a process, page cache included: without one, a store that reads through the page cache has all
//! of the machine's memory as its cache.

use std::path::{Path, PathBuf};

/// A control group with a limit. Removed when it is dropped and nobody is in it any more.
#[derive(Debug)]
pub struct MemoryGroup {
    path: PathBuf,
}

impl MemoryGroup {
    /// One with so many bytes. The error says why there is none.
    pub fn new(limit: u64) -> Result<MemoryGroup, String> {
        let name = format!("basalt-bench-{}-{limit}", std::process::id());
        let root = Path::new("/sys/fs/cgroup");
        // Version 1 has a tree for memory alone; version 2 has one tree, whose root must pass the controller on.
        let (path, limit_file) = if root.join("memory/cgroup.procs").exists() {
            (root.join("memory").join(name), "memory.limit_in_bytes")
        } else if root.join("cgroup.controllers").exists() {
            let passed_on = std::fs::write(root.join("cgroup.subtree_control"), "+memory");
            passed_on.map_err(|error| format!("the memory controller of cgroups cannot be used: {error}"))?;
            (root.join(name), "memory.max")
        } else {
            return Err("no cgroups are mounted at /sys/fs/cgroup".into());
        };
        std::fs::create_dir(&path).map_err(|error| format!("{} cannot be made: {error}", path.display()))?;
        let group = MemoryGroup { path };
        let file = group.path.join(limit_file);
        std::fs::write(&file, limit.to_string())
            .map_err(|error| format!("{} cannot be written: {error}", file.display()))?;
        // Where swap is counted too, the limit is on both together; its absence is no loss.
        let _ = std::fs::write(group.path.join("memory.swap.max"), "0");
        Ok(group)
    }

    /// The file that a process writes its number to, to be in it.
    pub fn procs(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // Its last process may be on its way out.
        for _ in 0..50 {
            if std::fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}
