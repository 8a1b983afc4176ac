//! What a device claims, held against what the kernel knows and what was measured.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::Outcome;
use crate::device::Geometry;
use crate::device::block_queue::BlockQueue;
use crate::measure::durable::Durable;

/// Microseconds below which emptying a volatile cache is hard to believe: a command to a drive and back takes about as long,
/// without anything being written.
const FLUSH_US_MIN: f64 = 10.0;

/// File systems that are memory.
const IN_MEMORY: &[&str] = &["tmpfs", "ramfs", "devtmpfs"];

/// File systems whose flush is somebody else's.
const REMOTE: &[&str] =
    &["nfs", "nfs4", "cifs", "smb3", "9p", "fuse", "fuseblk", "virtiofs", "ceph", "glusterfs"];

/// What lies beneath a file or block device.
#[derive(Debug, Clone, Default)]
pub(super) struct Surroundings {
    /// Type and options of the file system.
    mount: Option<(String, Vec<String>)>,
    block_device: Option<String>,
    write_cache: Option<String>,
}

impl Surroundings {
    pub(super) fn of(temporary: Option<&File>, queue: Option<BlockQueue>, path: &Path) -> Surroundings {
        let file = temporary.and_then(|file| file.try_clone().ok()).or_else(|| File::open(path).ok());
        let is_file = |file: &File| file.metadata().is_ok_and(|metadata| metadata.is_file());
        let device =
            file.filter(is_file).and_then(|file| file.metadata().ok()).map(|metadata| metadata.dev());
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Surroundings {
            mount: device.and_then(|device| mount_of(&mounts, device)),
            write_cache: queue.as_ref().and_then(|queue| queue.attribute("write_cache")),
            block_device: queue.map(|queue| queue.name()),
        }
    }
}

/// Type and options of the mount of a device, from the lines of mountinfo: `36 35 98:0 /root /mnt rw - ext4 /dev/x rw,barrier`.
fn mount_of(mounts: &str, device: u64) -> Option<(String, Vec<String>)> {
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    mounts.lines().find_map(|line| {
        let (own, shared) = line.split_once(" - ")?;
        if own.split(' ').nth(2)? != number {
            return None;
        }
        let mut shared = shared.split(' ');
        let (kind, options) = (shared.next()?, shared.nth(1)?);
        Some((kind.to_owned(), options.split(',').map(str::to_owned).collect()))
    })
}

/// Whether a flush can be believed.
pub(super) fn flush(
    geometry: &Geometry,
    surroundings: &Surroundings,
    flushed: &Durable,
    forced: Option<&Durable>,
) -> (Outcome, String) {
    let median = |one: &Durable, flush: bool| {
        let latencies = if flush { &one.flush } else { &one.total };
        latencies.value_at_quantile(0.5) as f64 / 1000.0
    };
    let flush_us = median(flushed, true);
    let mut seen = format!("a flush takes {flush_us:.0} us after a write");
    if let Some(forced) = forced {
        seen.push_str(&format!(", a FUA write {:.0} us", median(forced, false)));
    }
    match verdict(geometry.volatile_cache, surroundings, flush_us) {
        (Outcome::Pass, why) => (Outcome::Pass, format!("{seen}; {why}")),
        (outcome, why) => (outcome, format!("{why} ({seen})")),
    }
}

fn verdict(volatile_cache: bool, surroundings: &Surroundings, flush_us: f64) -> (Outcome, String) {
    let disk = surroundings.block_device.as_deref().unwrap_or("the device");
    if let Some((kind, options)) = &surroundings.mount {
        if IN_MEMORY.contains(&kind.as_str()) {
            return (
                Outcome::Fail,
                format!("its file system is {kind}, which is memory: nothing outlives a power cut"),
            );
        }
        let off =
            options.iter().find(|option| matches!(option.as_str(), "nobarrier" | "barrier=0" | "volatile"));
        if let Some(option) = off {
            return (
                Outcome::Fail,
                format!(
                    "its file system is mounted with {option}, so that a flush does not reach the drive; mount it without"
                ),
            );
        }
        if REMOTE.contains(&kind.as_str()) || kind.starts_with("fuse.") {
            return (
                Outcome::Doubt,
                format!("its file system is {kind}: whether a flush reaches a drive is decided elsewhere"),
            );
        }
    }
    if disk.starts_with("zram") || (disk.starts_with("ram") && disk[3..].parse::<u32>().is_ok()) {
        return (Outcome::Fail, format!("{disk} is memory: nothing outlives a power cut"));
    }
    match (volatile_cache, surroundings.write_cache.as_deref()) {
        (false, Some("write through")) => (
            Outcome::Pass,
            format!(
                "the kernel says that {disk} has no volatile cache, so that a write is durable when it ends"
            ),
        ),
        (false, _) => (Outcome::Pass, "the drive says that it has no volatile cache".to_owned()),
        (true, _) if flush_us < FLUSH_US_MIN => (
            Outcome::Doubt,
            format!(
                "{disk} is said to have a volatile cache, and a flush of it in {flush_us:.1} us is hard to believe: either its cache is \
                 protected against power cuts, which its data sheet says, or flushes are ignored"
            ),
        ),
        (true, _) if disk.starts_with("vd") || disk.starts_with("xvd") => (
            Outcome::Pass,
            format!("{disk} is a virtual disk, whose host may still ignore flushes (cache=unsafe)"),
        ),
        (true, Some("write through")) => {
            (Outcome::Pass, format!("the file system writes its journal, and {disk} has no volatile cache"))
        }
        (true, _) => (Outcome::Pass, "it costs what emptying a cache may cost".to_owned()),
    }
}

/// Whether the unit that is said to be written all or not at all is one that the kernel knows of too.
pub(super) fn atomicity(geometry: &Geometry, queue: Option<&BlockQueue>) -> Result<String, String> {
    let claim = u64::from(geometry.atomic_size);
    let Some(queue) = queue else {
        let whose = if geometry.engine == "spdk" {
            "as the drive's Identify has it"
        } else {
            "with no block device beneath"
        };
        return Ok(format!("{claim} bytes, {whose}; Basalt relies on none"));
    };
    let logical = queue.number("logical_block_size").unwrap_or(512);
    let physical = queue.number("physical_block_size").unwrap_or(logical);
    let unit = queue.number("atomic_write_unit_max_bytes").unwrap_or(0);
    let name = queue.name();
    // A logical block is what a drive always wrote in whole.
    if claim > logical.max(unit) {
        return Err(format!(
            "{claim} bytes are claimed, and {name} has logical blocks of {logical} bytes and atomic writes of {unit}"
        ));
    }
    Ok(format!(
        "{claim} bytes ({name}: logical blocks of {logical}, physical of {physical}, atomic writes of {}); Basalt relies on none",
        if unit == 0 { "unknown size".to_owned() } else { format!("up to {unit}") }
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on(mount: Option<(&str, &str)>, block_device: &str, write_cache: &str) -> Surroundings {
        Surroundings {
            mount: mount
                .map(|(kind, options)| (kind.to_owned(), options.split(',').map(str::to_owned).collect())),
            block_device: Some(block_device.to_owned()),
            write_cache: Some(write_cache.to_owned()),
        }
    }

    #[test]
    fn a_flush_is_believed_only_where_it_can_be() {
        for (surroundings, volatile, flush_us, outcome, words) in [
            (on(Some(("ext4", "rw,relatime")), "nvme0n1", "write back"), true, 40.0, Outcome::Pass, "cost"),
            (
                on(Some(("ext4", "rw,nobarrier")), "nvme0n1", "write back"),
                true,
                40.0,
                Outcome::Fail,
                "nobarrier",
            ),
            (
                on(Some(("ext4", "rw,barrier=0")), "nvme0n1", "write back"),
                true,
                40.0,
                Outcome::Fail,
                "barrier=0",
            ),
            (on(Some(("tmpfs", "rw")), "nvme0n1", "write back"), true, 40.0, Outcome::Fail, "memory"),
            (on(Some(("nfs4", "rw")), "nvme0n1", "write back"), true, 4000.0, Outcome::Doubt, "elsewhere"),
            (on(None, "nvme0n1", "write back"), true, 3.0, Outcome::Doubt, "hard to believe"),
            (on(None, "nvme0n1", "write through"), false, 1.0, Outcome::Pass, "no volatile cache"),
            (on(None, "zram0", "write back"), true, 40.0, Outcome::Fail, "memory"),
            (on(None, "ram1", "write back"), true, 40.0, Outcome::Fail, "memory"),
            (on(None, "vda", "write back"), true, 40.0, Outcome::Pass, "virtual"),
        ] {
            let (found, why) = verdict(volatile, &surroundings, flush_us);
            assert!(found == outcome && why.contains(words), "{surroundings:?}: {found:?} {why}");
        }
    }

    #[test]
    fn the_mount_of_a_file_is_found_by_its_device() {
        let mounts = "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard\n\
                      30 22 0:27 / /tmp rw,nosuid - tmpfs tmpfs rw,size=1g\n";
        let found = mount_of(mounts, rustix::fs::makedev(254, 0)).unwrap();
        assert_eq!(found, ("ext4".to_owned(), vec!["rw".to_owned(), "discard".to_owned()]));
        assert_eq!(mount_of(mounts, rustix::fs::makedev(0, 27)).unwrap().0, "tmpfs");
        assert!(mount_of(mounts, rustix::fs::makedev(8, 0)).is_none());
    }
}
