//! What a node that owns NVMe controllers through SPDK needs.

use super::{Check, Scope, Status};
use crate::pci::controller::{self, Controller};
use crate::pci::hugepages::{self, Pool};
use crate::pci::system::System;
use crate::pci::users;
use crate::size;

const SCOPE: Scope = Scope::Spdk;

/// Huge pages that a node should find free: what `device bind` sets up.
const HUGEPAGES_SIZE_ADVISED: u64 = 512 << 20;

pub(super) fn checks(system: &System) -> Vec<Check> {
    let controllers = controller::list(system);
    let mut checks = vec![container(system)];
    checks.extend(hugepages(system));
    checks.push(leftovers(system));
    checks.push(hugetlbfs(system));
    checks.push(memlock(system));
    checks.push(iommu(system));
    checks.push(drivers(system));
    checks.extend(devices(system, &controllers));
    checks.extend(numa(system, &controllers));
    checks.push(permissions(system, &controllers));
    checks.push(isolated_cores(system));
    checks
}

fn container(system: &System) -> Check {
    let name = "container";
    let is_marked = ["/.dockerenv", "/run/.containerenv", "/run/systemd/container"]
        .iter()
        .any(|path| system.exists(path));
    let environment = system.read("/proc/1/environ").unwrap_or_default();
    let groups = system.read("/proc/1/cgroup").unwrap_or_default();
    let is_grouped = ["docker", "kubepods", "lxc", "containerd"].iter().any(|word| groups.contains(word));
    if is_marked || is_grouped || environment.split('\0').any(|variable| variable.starts_with("container=")) {
        Check::fail(
            name,
            SCOPE,
            "this runs inside a container, which neither sees who uses a drive nor may change drivers",
            "bind on the host; then give the container /dev/vfio, the huge pages and no limit on locked memory",
        )
    } else {
        Check::ok(name, SCOPE, "this does not run inside a container")
    }
}

fn place(pool: &Pool) -> String {
    pool.node.map_or(String::new(), |node| format!(" on NUMA node {node}"))
}

fn hugepages(system: &System) -> Vec<Check> {
    let name = "huge pages";
    let pools = hugepages::pools(system);
    if pools.is_empty() {
        let remedy = "use a kernel with CONFIG_HUGETLBFS and 2 MiB pages";
        return vec![Check::fail(name, SCOPE, "this kernel has no 2 MiB or 1 GiB huge pages", remedy)];
    }
    let filled: Vec<&Pool> = pools.iter().filter(|pool| pool.total > 0).collect();
    if filled.is_empty() {
        return vec![Check::fail(
            name,
            SCOPE,
            "none are set up; they are gone after every restart of the machine",
            "`basalt device bind BDF` sets them up; to have them from the start, add hugepages=256 to the kernel's command line",
        )];
    }
    let shown = |pool: &&Pool| {
        let free = pool.free * pool.page_size;
        let what = format!(
            "{} of {}{} are free, in pages of {}",
            size::show(free),
            size::show(pool.total * pool.page_size),
            place(pool),
            size::show(pool.page_size)
        );
        match free {
            0 => Check::fail(
                name,
                SCOPE,
                what,
                "stop what uses them, or remove what killed processes left (below)",
            ),
            1..HUGEPAGES_SIZE_ADVISED => {
                Check::warn(name, SCOPE, what, "`basalt device bind BDF --hugepages 512MiB` raises them")
            }
            _ => Check::ok(name, SCOPE, what),
        }
    };
    filled.iter().map(shown).collect()
}

fn leftovers(system: &System) -> Check {
    let name = "leftover pages";
    match hugepages::leftovers(system) {
        Err(why) => Check::warn(name, SCOPE, why, "run this as root"),
        Ok(files) if files.is_empty() => Check::ok(name, SCOPE, "no killed process left huge pages behind"),
        Ok(files) => Check::warn(
            name,
            SCOPE,
            format!("killed processes left {} files of huge pages behind, such as {}", files.len(), files[0]),
            format!("rm {}", files.join(" ")),
        ),
    }
}

fn hugetlbfs(system: &System) -> Check {
    let name = "hugetlbfs";
    match hugepages::mounts(system).as_slice() {
        [] => Check::fail(
            name,
            SCOPE,
            "no file system of huge pages is mounted",
            "mkdir -p /dev/hugepages && mount -t hugetlbfs none /dev/hugepages (`basalt device bind` does it, too)",
        ),
        places => Check::ok(name, SCOPE, format!("mounted at {}", places.join(", "))),
    }
}

fn memlock(system: &System) -> Check {
    let name = "locked memory";
    let process = system.kernel().process();
    match process.memlock {
        // VFIO counts what it pins against this limit, unless root asks.
        Some(limit) if !process.is_root && limit < HUGEPAGES_SIZE_ADVISED => Check::fail(
            name,
            SCOPE,
            format!("{} may be locked in memory, which is too little for DMA", size::show(limit)),
            "set LimitMEMLOCK=infinity in its systemd unit, or `memlock unlimited` in /etc/security/limits.conf",
        ),
        Some(limit) if process.is_root => {
            Check::ok(name, SCOPE, format!("the limit of {} does not bind root", size::show(limit)))
        }
        Some(limit) => Check::ok(name, SCOPE, format!("{} may be locked", size::show(limit))),
        None => Check::ok(name, SCOPE, "there is no limit"),
    }
}

fn iommu(system: &System) -> Check {
    let name = "IOMMU";
    let units = system.list("/sys/class/iommu");
    let groups = system.list("/sys/kernel/iommu_groups");
    // VFIO makes groups of its own when there is no IOMMU.
    let is_real = |group: &&String| {
        system.read(&format!("/sys/kernel/iommu_groups/{group}/name")).as_deref() != Some("vfio-noiommu")
    };
    let count = groups.iter().filter(is_real).count();
    if count > 0 {
        let by = if units.is_empty() { "on".to_owned() } else { format!("on ({})", units.join(", ")) };
        return Check::ok(name, SCOPE, format!("{by}, {count} groups"));
    }
    let line = system.read("/proc/cmdline").unwrap_or_default();
    let off = line
        .split_whitespace()
        .find(|word| matches!(*word, "intel_iommu=off" | "amd_iommu=off" | "iommu=off"));
    let is_amd = system.read("/proc/cpuinfo").is_some_and(|info| info.contains("AuthenticAMD"));
    let (firmware, option) = if is_amd { ("AMD-Vi", "amd_iommu=on") } else { ("VT-d", "intel_iommu=on") };
    let (what, remedy) = match off {
        Some(word) => (
            format!("off: the kernel's command line says {word}"),
            format!("take {word} away and restart the machine"),
        ),
        None => (
            "off, or there is none: drives can be bound without protection only, and only root can use them"
                .to_owned(),
            format!(
                "turn {firmware} on in the firmware and add {option} to the kernel's command line; in a virtual machine, \
                     give it an emulated IOMMU"
            ),
        ),
    };
    Check::warn(name, SCOPE, what, remedy)
}

fn drivers(system: &System) -> Check {
    let name = "drivers";
    let release = system.read("/proc/sys/kernel/osrelease").unwrap_or_default();
    let modules = |file: &str| system.read(&format!("/lib/modules/{release}/{file}")).unwrap_or_default();
    let (loadable, built_in) = (modules("modules.dep"), modules("modules.builtin"));
    let state = |driver: &str, file: &str| {
        if system.exists(&format!("/sys/bus/pci/drivers/{driver}")) {
            Some(format!("{driver} is there"))
        } else if loadable.contains(file) || built_in.contains(file) {
            Some(format!("{driver} can be loaded"))
        } else {
            None
        }
    };
    let found = [state("vfio-pci", "/vfio-pci.ko"), state("uio_pci_generic", "/uio_pci_generic.ko")];
    match found.iter().flatten().cloned().collect::<Vec<_>>().as_slice() {
        [] => Check::fail(
            name,
            SCOPE,
            format!("neither vfio-pci nor uio_pci_generic is there for kernel {release}"),
            "install the kernel's modules (Debian: linux-image-amd64, Ubuntu: linux-modules-extra), or load them with insmod",
        ),
        found => Check::ok(name, SCOPE, found.join(", ")),
    }
}

fn devices(system: &System, controllers: &[Controller]) -> Vec<Check> {
    let name = "NVMe drives";
    if controllers.is_empty() {
        let remedy = "use a file, a block device or NVMe/TCP";
        return vec![Check::fail(name, SCOPE, "this machine has no NVMe controller on PCI", remedy)];
    }
    let mut checks = Vec::new();
    let mut system_drives = 0;
    for one in controllers {
        let driver = one.driver.as_deref().unwrap_or("none");
        let users = users::of_controller(system, one);
        if users.iter().any(|user| user.is_system) {
            system_drives += 1;
            checks.push(Check::ok(
                name,
                SCOPE,
                format!("{}: this machine runs from it, so it stays with {driver}", one.describe()),
            ));
        } else if one.is_user_space() {
            checks.push(Check::ok(name, SCOPE, format!("{} is bound to {driver}", one.bdf)));
        } else if let Some(user) = users.first() {
            checks.push(Check::warn(
                name,
                SCOPE,
                format!("{} is with the driver {driver} and in use: {}", one.describe(), user.what),
                format!("`basalt device bind {} --dry-run` shows what would free it", one.bdf),
            ));
        } else {
            checks.push(Check::warn(
                name,
                SCOPE,
                format!("{} is with the driver {driver}", one.describe()),
                format!("`basalt device bind {}` gives it to user space", one.bdf),
            ));
        }
    }
    if system_drives == controllers.len() {
        checks.push(Check::fail(
            name,
            SCOPE,
            "the only NVMe drives are those this machine runs from, and they can't be given away",
            "add another drive, or serve a file",
        ));
    } else if !controllers.iter().any(Controller::is_user_space) {
        for check in checks.iter_mut().filter(|check| check.status == Status::Warn) {
            check.status = Status::Fail;
        }
    }
    checks
}

/// Drives whose node has no huge pages while another has: every transfer would cross the machine.
fn numa(system: &System, controllers: &[Controller]) -> Vec<Check> {
    let name = "NUMA";
    let pools = hugepages::pools(system);
    let has = |node: u64| pools.iter().any(|pool| pool.node == Some(node) && pool.total > 0);
    let nodes = pools.iter().filter_map(|pool| pool.node).max().map_or(1, |node| node + 1);
    if nodes < 2 {
        return vec![Check::ok(name, SCOPE, "one node")];
    }
    let is_far = |one: &&Controller| {
        one.numa_node.is_some_and(|node| !has(node)) && pools.iter().any(|pool| pool.total > 0)
    };
    let far: Vec<Check> = controllers
        .iter()
        .filter(is_far)
        .map(|one| {
            let node = one.numa_node.unwrap_or_default();
            Check::warn(
                name,
                SCOPE,
                format!("{} is on node {node}, which has no huge pages, while another node has", one.bdf),
                format!(
                    "`basalt device bind {}` sets them up there; pin the node's cores with --cores",
                    one.bdf
                ),
            )
        })
        .collect();
    if far.is_empty() {
        vec![Check::ok(name, SCOPE, format!("{nodes} nodes; no drive is far from its huge pages"))]
    } else {
        far
    }
}

fn permissions(system: &System, controllers: &[Controller]) -> Check {
    let name = "permissions";
    if system.kernel().process().is_root {
        return Check::ok(name, SCOPE, "this runs as root");
    }
    let bound: Vec<&Controller> = controllers.iter().filter(|one| one.is_user_space()).collect();
    if bound.is_empty() {
        return Check::warn(
            name,
            SCOPE,
            "this does not run as root, which binding a drive needs",
            "sudo basalt device bind BDF",
        );
    }
    for one in bound {
        let Some(group) = one.iommu_group.as_ref().filter(|_| one.driver.as_deref() == Some("vfio-pci"))
        else {
            let what = format!("{} is bound without an IOMMU, so only root can use it", one.bdf);
            return Check::fail(name, SCOPE, what, "turn the IOMMU on, or run as root");
        };
        let path = format!("/dev/vfio/{group}");
        let access = rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK;
        if let Err(error) = rustix::fs::access(system.path(&path), access) {
            let what = format!("{path}, through which {} is driven, can't be opened ({error})", one.bdf);
            return Check::fail(name, SCOPE, what, format!("sudo chown $USER {path}"));
        }
    }
    Check::ok(name, SCOPE, "the bound drives may be opened without root")
}

fn isolated_cores(system: &System) -> Check {
    let name = "isolated cores";
    let isolated = system.read("/sys/devices/system/cpu/isolated");
    let quiet = system.read("/sys/devices/system/cpu/nohz_full").filter(|cores| cores != "(null)");
    match (isolated, quiet) {
        (None, None) => Check::warn(
            name,
            SCOPE,
            "no core is kept free of other work, so pollers lose time to it now and then",
            "for steady latency add isolcpus=LIST nohz_full=LIST to the kernel's command line and give LIST to --cores",
        ),
        (Some(cores), None) => {
            Check::ok(name, SCOPE, format!("isolcpus={cores}; nohz_full would quieten them further"))
        }
        (None, Some(cores)) => {
            Check::ok(name, SCOPE, format!("nohz_full={cores}; isolcpus would keep other work away, too"))
        }
        (Some(cores), Some(quiet)) => Check::ok(name, SCOPE, format!("isolcpus={cores} nohz_full={quiet}")),
    }
}
