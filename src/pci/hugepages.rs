//! Huge pages: how many each NUMA node has, where their file systems are mounted, and what killed processes left there.

use std::collections::HashSet;

use serde::Serialize;

use super::system::System;

/// Bytes of the pages that are set up.
pub const PAGE_SIZE: u64 = 2 << 20;

const PAGE_SIZE_BIG: u64 = 1 << 30;

/// Huge pages of one size on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pool {
    /// The NUMA node; none on a kernel without NUMA.
    pub node: Option<u64>,
    /// Bytes of one page.
    pub page_size: u64,
    /// Pages there.
    pub total: u64,
    /// Pages that nobody uses.
    pub free: u64,
    /// The directory that says so.
    #[serde(skip)]
    pub path: String,
}

/// Pools of 2 MiB and 1 GiB pages on every node, and none for sizes that the kernel does not have.
pub fn pools(system: &System) -> Vec<Pool> {
    const NODES: &str = "/sys/devices/system/node";
    let number = |name: &String| name.strip_prefix("node")?.parse::<u64>().ok();
    let mut places: Vec<(Option<u64>, String)> = system
        .list(NODES)
        .iter()
        .filter_map(number)
        .filter(|node| system.exists(&format!("{NODES}/node{node}/hugepages")))
        .map(|node| (Some(node), format!("{NODES}/node{node}/hugepages")))
        .collect();
    places.sort();
    if places.is_empty() {
        places.push((None, "/sys/kernel/mm/hugepages".to_owned()));
    }
    let mut pools = Vec::new();
    for (node, place) in places {
        for page_size in [PAGE_SIZE, PAGE_SIZE_BIG] {
            let path = format!("{place}/hugepages-{}kB", page_size >> 10);
            if let Some(total) = system.number(&format!("{path}/nr_hugepages")) {
                let free = system.number(&format!("{path}/free_hugepages")).unwrap_or(0);
                pools.push(Pool { node, page_size, total, free, path });
            }
        }
    }
    pools
}

/// The pool of 2 MiB pages that a device should use: its node's, or the first one's where the node is not known.
pub fn pool_for(system: &System, node: Option<u64>) -> Option<Pool> {
    let small: Vec<Pool> = pools(system).into_iter().filter(|pool| pool.page_size == PAGE_SIZE).collect();
    small.iter().find(|pool| pool.node == node).or(small.first()).cloned()
}

/// Where file systems of huge pages are mounted.
pub fn mounts(system: &System) -> Vec<String> {
    let text = system.read_whole("/proc/self/mountinfo").unwrap_or_default();
    let is_huge =
        |line: &&str| line.split_once(" - ").is_some_and(|(_, right)| right.starts_with("hugetlbfs "));
    text.lines().filter(is_huge).filter_map(|line| line.split(' ').nth(4)).map(str::to_owned).collect()
}

/// Files of huge pages that SPDK or DPDK made and no process maps or has open any more: their memory is lost until they
/// are removed. An error when other processes can't be looked at.
pub fn leftovers(system: &System) -> Result<Vec<String>, String> {
    let mut files = Vec::new();
    for mount in mounts(system) {
        let ours =
            |name: &String| (name.starts_with("spdk") && name.contains("map_")) || name.contains("rtemap_");
        files.extend(system.list(&mount).into_iter().filter(ours).map(|name| format!("{mount}/{name}")));
    }
    if files.is_empty() {
        return Ok(files);
    }
    if !system.kernel().process().is_root {
        return Err(format!("{} is there, and only root can see whether a process still uses it", files[0]));
    }
    let mut used = HashSet::new();
    for process in system.list("/proc").iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) {
        let maps = system.read_whole(&format!("/proc/{process}/maps")).unwrap_or_default();
        used.extend(maps.lines().filter_map(|line| Some(line[line.find('/')?..].to_owned())));
        let fds = system.list(&format!("/proc/{process}/fd"));
        used.extend(fds.iter().filter_map(|fd| system.link(&format!("/proc/{process}/fd/{fd}"))));
    }
    files.retain(|file| !used.contains(file));
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::fake::Machine;

    #[test]
    fn pools_are_found_by_node_and_without_numa() {
        let machine = Machine::new();
        machine.set_hugepages(Some(0), 10, 4);
        machine.set_hugepages(Some(1), 20, 20);
        let system = machine.system();
        let found: Vec<_> = pools(&system).iter().map(|pool| (pool.node, pool.total, pool.free)).collect();
        assert_eq!(found, [(Some(0), 10, 4), (Some(1), 20, 20)]);
        assert_eq!(pool_for(&system, Some(1)).unwrap().total, 20);
        assert_eq!(pool_for(&system, None).unwrap().node, Some(0));
        let machine = Machine::new();
        machine.set_hugepages(None, 7, 7);
        assert_eq!(pool_for(&machine.system(), Some(3)).unwrap().total, 7);
    }

    #[test]
    fn only_files_that_nobody_uses_are_left_over() {
        let machine = Machine::new();
        machine.mount("0:40", "/dev/hugepages", "hugetlbfs", "none");
        for name in ["spdk_pid12map_0", "rtemap_3", "spdk0map_9", "libvirt"] {
            machine.write(&format!("/dev/hugepages/{name}"), "");
        }
        machine.write("/proc/77/maps", "7f00-7f20 rw-s 00000000 00:28 5 /dev/hugepages/rtemap_3\n");
        machine.open_in_process(78, "server", "/dev/hugepages/spdk0map_9");
        assert_eq!(leftovers(&machine.system()), Ok(vec!["/dev/hugepages/spdk_pid12map_0".to_owned()]));
        machine.kernel.borrow_mut().is_root = false;
        assert!(leftovers(&machine.system()).unwrap_err().contains("only root"));
    }
}
