//! Processes that have a device open: virtual machines, databases on raw disks, and owners of a device in user space.

use std::os::unix::fs::{FileTypeExt, MetadataExt};

use super::{User, UserKind};
use crate::pci::Bdf;
use crate::pci::controller::device_path;
use crate::pci::system::System;

/// A process and a device that it has open.
struct Open {
    process: u32,
    command: String,
    path: String,
}

/// Processes that have one of these nodes of /dev open, by name, or a block device with one of these numbers under any name.
pub(super) fn with_open(system: &System, names: &[String], devs: &[String]) -> Vec<User> {
    let is_ours = |path: &str, number: Option<&str>| {
        // A chroot shows its /dev at another place.
        let inner = path.rsplit_once("/dev/").map(|(_, inner)| inner);
        let name = inner.is_some_and(|inner| names.iter().any(|ours| ours == inner));
        name || number.is_some_and(|number| devs.iter().any(|ours| ours == number))
    };
    let users = find(system, is_ours).into_iter().map(|Open { process, command, path }| User {
        kind: UserKind::Process,
        device: path.trim_start_matches("/dev/").to_owned(),
        what: format!("{path} is open in process {process} ({command})"),
        free: vec![format!("kill {process}")],
        is_system: false,
    });
    users.collect()
}

/// Processes that drive a device from user space: through its VFIO group or device, or its UIO node.
pub fn user_space_owners(system: &System, bdf: Bdf) -> Vec<User> {
    let device = device_path(bdf);
    let mut paths: Vec<String> = Vec::new();
    if let Some(group) = system.link_name(&format!("{device}/iommu_group")) {
        paths.extend([format!("/dev/vfio/{group}"), format!("/dev/vfio/noiommu-{group}")]);
    }
    let below = |directory: &str| system.list(&format!("{device}/{directory}"));
    paths.extend(below("vfio-dev").iter().map(|name| format!("/dev/vfio/devices/{name}")));
    paths.extend(below("uio").iter().map(|name| format!("/dev/{name}")));
    let opened = find(system, |path, _| paths.iter().any(|ours| ours == path));
    let users = opened.into_iter().map(|Open { process, command, path }| User {
        kind: UserKind::Process,
        device: bdf.to_string(),
        what: format!("process {process} ({command}) drives it through {path}"),
        free: vec![format!("kill {process}")],
        is_system: false,
    });
    users.collect()
}

/// Looks through the open files of all processes but this one. Those that may not be looked at are passed over.
fn find(system: &System, is_ours: impl Fn(&str, Option<&str>) -> bool) -> Vec<Open> {
    let own = system.kernel().process().pid;
    let mut found = Vec::new();
    for entry in system.list("/proc") {
        let Ok(process) = entry.parse::<u32>() else { continue };
        if process == own {
            continue;
        }
        let files = format!("/proc/{process}/fd");
        let mut paths = Vec::new();
        for fd in system.list(&files) {
            let link = format!("{files}/{fd}");
            let Some(path) = system.link(&link) else { continue };
            // Only a block device's number is compared: it stays the same under any name and in any container.
            let number =
                std::fs::metadata(system.path(&link)).ok().filter(|meta| meta.file_type().is_block_device());
            let number = number
                .map(|meta| format!("{}:{}", rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev())));
            if is_ours(&path, number.as_deref()) {
                paths.push(path);
            }
        }
        paths.sort();
        paths.dedup();
        found.extend(paths.into_iter().map(|path| {
            let command = system.read(&format!("/proc/{process}/comm")).unwrap_or_else(|| "?".into());
            Open { process, command, path }
        }));
    }
    found
}
