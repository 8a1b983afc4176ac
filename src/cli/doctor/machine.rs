//! What a node on a file or a kernel block device needs.

use std::path::Path;

use super::{Check, Scope};
use crate::cli::format::SIZE_DEFAULT;
use crate::device::file::{DEVICE_SIZE_MIN, DirectIo, FileOptions};
use crate::device::sync::SyncNamespace;
use crate::device::uring::UringNamespace;
use crate::device::{DeviceError, Namespace};
use crate::limits::CONNECTION_COUNT_MAX;
use crate::pci::system::System;
use crate::size;

/// Less than this and a node has no room for its buffers.
const MEMORY_SIZE_MIN: u64 = 128 << 20;

/// Less than this and indexes of any size have none.
const MEMORY_SIZE_ADVISED: u64 = 1 << 30;

/// Files that a node opens besides its connections.
const OPEN_FILES_OWN: u64 = 128;

/// What trying to make an image file told.
#[derive(Debug, Clone)]
pub(super) struct FileProbe {
    /// Where.
    pub(super) directory: String,
    /// Through io_uring and around the page cache, as `serve` does.
    pub(super) uring: Result<(), Refusal>,
    /// Through `sync`, which `serve` takes where io_uring is forbidden, with what it had to say.
    pub(super) sync: Result<Vec<String>, String>,
    /// Bytes that are free there.
    pub(super) free_size: Option<u64>,
}

/// Why io_uring did not do.
#[derive(Debug, Clone)]
pub(super) enum Refusal {
    /// The kernel gives no ring: `serve` falls back to `sync`.
    NoRing(String),
    /// The file could not be made or opened.
    File(String),
}

/// Makes a small image in a directory with each engine, the way `serve` would, and removes it.
pub(super) fn probe(directory: &Path) -> FileProbe {
    let path = directory.join(format!(".basalt-doctor-{}", std::process::id()));
    let options = |direct| FileOptions { create_size: Some(DEVICE_SIZE_MIN), direct, name: None };
    let uring = UringNamespace::open(&path, &options(DirectIo::Required));
    // A ring may be refused only when the first queue asks for it.
    let uring = uring.and_then(|namespace| namespace.open_queue().map(drop)).map_err(|error| match error {
        DeviceError::EngineUnavailable { cause, .. } => Refusal::NoRing(cause),
        error => Refusal::File(error.to_string()),
    });
    // It may be there or not, depending on how far that went.
    let _ = std::fs::remove_file(&path);
    let sync = SyncNamespace::open(&path, &options(DirectIo::Preferred));
    let sync = sync.map(|namespace| namespace.notes().to_vec()).map_err(|error| error.to_string());
    let _ = std::fs::remove_file(&path);
    let free_size = rustix::fs::statvfs(directory).ok().map(|fs| fs.f_bavail * fs.f_frsize);
    FileProbe { directory: directory.display().to_string(), uring, sync, free_size }
}

pub(super) fn checks(system: &System, file: &FileProbe) -> Vec<Check> {
    let mut checks = vec![image(file), space(file), io_uring(system, file)];
    checks.extend([memory(system), open_files(system), cpu(system)]);
    checks
}

/// Whether plain `basalt serve` can make and open its image here.
fn image(file: &FileProbe) -> Check {
    let (name, scope, at) = ("image file", Scope::File, &file.directory);
    match (&file.uring, &file.sync) {
        (Ok(()), _) => {
            Check::ok(name, scope, format!("files in {at} can be written around the page cache (O_DIRECT)"))
        }
        (Err(Refusal::NoRing(_)), Ok(notes)) if notes.is_empty() => {
            Check::ok(name, scope, format!("files in {at} can be written around the page cache (O_DIRECT)"))
        }
        (Err(Refusal::NoRing(_)), Ok(_)) => Check::warn(
            name,
            scope,
            format!("the file system of {at} refuses O_DIRECT, so I/O goes through the page cache"),
            "put the image on ext4, xfs or a block device",
        ),
        (Err(Refusal::File(why)), Ok(_)) => Check::fail(
            name,
            scope,
            format!("plain `basalt serve` would fail in {at}: {why}"),
            "put the image on ext4, xfs or a block device, or start `basalt serve --engine sync`, which is slower",
        ),
        (_, Err(why)) => Check::fail(
            name,
            scope,
            format!("no image can be made in {at}: {why}"),
            "start where you may write, or name another place with `basalt doctor --directory PATH`",
        ),
    }
}

/// Whether an image of the default size, which is allocated in whole, fits.
fn space(file: &FileProbe) -> Check {
    let (name, scope, at) = ("free space", Scope::File, &file.directory);
    let wanted = size::show(SIZE_DEFAULT);
    match file.free_size {
        Some(free) if free < SIZE_DEFAULT => Check::warn(
            name,
            scope,
            format!(
                "{at} has {} free, and `basalt serve` makes an image of {wanted} where there is none",
                size::show(free)
            ),
            "name a smaller one, such as `--size 512MiB`, or make room",
        ),
        Some(free) => Check::ok(name, scope, format!("{at} has {} free for an image", size::show(free))),
        None => Check::warn(
            name,
            scope,
            format!("it is not known how much {at} has free"),
            format!("see that there is room for an image, {wanted} unless `--size` says otherwise"),
        ),
    }
}

fn io_uring(system: &System, file: &FileProbe) -> Check {
    let (name, scope) = ("io_uring", Scope::File);
    let Err(Refusal::NoRing(why)) = &file.uring else {
        return Check::ok(name, scope, "the kernel gives io_uring rings");
    };
    let setting = system.number("/proc/sys/kernel/io_uring_disabled").unwrap_or(0);
    let status = system.read("/proc/self/status").unwrap_or_default();
    let is_filtered = status.lines().any(|line| line.split_whitespace().eq(["Seccomp:", "2"]));
    let remedy = match (setting, is_filtered) {
        (1, _) => "run `sysctl kernel.io_uring_disabled=0`, or join the group of kernel.io_uring_group",
        (2.., _) => "run `sysctl kernel.io_uring_disabled=0`",
        (0, true) => {
            "this process runs under a seccomp filter: start the container with a profile that allows io_uring_setup, \
                      io_uring_enter and io_uring_register"
        }
        (0, false) => "use Linux 5.11 or newer",
    };
    Check::warn(
        name,
        scope,
        format!("there is no io_uring here ({why}), so `serve` takes the slower sync engine"),
        remedy,
    )
}

fn memory(system: &System) -> Check {
    let (name, scope) = ("memory", Scope::File);
    let text = system.read("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    let Some(available) = available.map(|kib| kib << 10) else {
        return Check::warn(
            name,
            scope,
            "/proc/meminfo does not say how much memory there is",
            "mount /proc",
        );
    };
    // Of the whole container; "max" without a limit.
    let limit = system.number("/sys/fs/cgroup/memory.max");
    let what = match limit.filter(|&limit| limit < available) {
        Some(limit) => format!("{} may be used (limit of the control group)", size::show(limit)),
        None => format!("{} are available", size::show(available)),
    };
    let available = available.min(limit.unwrap_or(u64::MAX));
    let remedy = "stop something else, or raise the limit of the container; keys live in memory";
    match available {
        0..MEMORY_SIZE_MIN => Check::fail(name, scope, format!("only {what}"), remedy),
        MEMORY_SIZE_MIN..MEMORY_SIZE_ADVISED => Check::warn(name, scope, format!("only {what}"), remedy),
        _ => Check::ok(name, scope, what),
    }
}

fn open_files(system: &System) -> Check {
    let (name, scope) = ("open files", Scope::File);
    let wanted = CONNECTION_COUNT_MAX as u64 + OPEN_FILES_OWN;
    match system.kernel().process().open_files {
        Some(limit) if limit < wanted => Check::warn(
            name,
            scope,
            format!(
                "at most {limit} files may be open, which is fewer than {CONNECTION_COUNT_MAX} connections"
            ),
            format!(
                "run `ulimit -Hn {wanted}` as root before it, or set LimitNOFILE={wanted} in its systemd unit"
            ),
        ),
        _ => Check::ok(name, scope, format!("enough for {CONNECTION_COUNT_MAX} connections")),
    }
}

fn cpu(system: &System) -> Check {
    let (name, scope) = ("CPU", Scope::File);
    let info = system.read("/proc/cpuinfo").unwrap_or_default();
    let cores = info.lines().filter(|line| line.starts_with("processor")).count();
    let field = |names: &[&str]| {
        info.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            names.contains(&key.trim()).then(|| value.split_whitespace().collect::<Vec<_>>())
        })
    };
    let features = field(&["flags", "Features"]).unwrap_or_default();
    // crc32fast uses these; without them a table does.
    let has_fast_checksums =
        features.contains(&"crc32") || ["pclmulqdq", "sse4_1"].iter().all(|f| features.contains(f));
    if has_fast_checksums {
        Check::ok(name, scope, format!("{cores} cores with instructions for checksums"))
    } else {
        Check::warn(
            name,
            scope,
            format!("{cores} cores without instructions for checksums (PCLMULQDQ, or CRC32 on Arm)"),
            "in a virtual machine, give it the host's CPU model",
        )
    }
}
