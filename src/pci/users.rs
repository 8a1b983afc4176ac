//! Who uses a namespace: mounts in any mount namespace, swap, device-mapper, md and bcache on top of it, loop devices,
//! multi-device file systems, NVMe targets, and processes that have it open.
//!
//! Most of these claim the device exclusively, which is asked separately and catches what has no name here (ZFS, an external
//! journal, a mount that this process can't see). What does not claim it (loop devices, NVMe targets, virtual machines) is
//! found only here. What can't be read is reported as not known, never as unused.

mod mounts;
mod processes;

use serde::Serialize;

use super::controller::{Controller, Namespace, device_path};
use super::system::System;
use mounts::{Mount, Mounts};
pub use processes::user_space_owners;

/// Block devices stacked higher than this are a loop in sysfs that can't be.
const STACK_DEPTH_MAX: usize = 16;

/// Where a machine keeps what it runs from.
const SYSTEM_MOUNTS: [&str; 7] = ["/", "/boot", "/boot/efi", "/efi", "/usr", "/var", "/etc"];

/// Something that uses a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct User {
    /// What kind of use.
    pub kind: UserKind,
    /// The kernel's block device that is used, such as `nvme0n1p2` or `dm-0`.
    pub device: String,
    /// In words.
    pub what: String,
    /// Commands that end this use, in their order.
    pub free: Vec<String>,
    /// The running system is on it.
    pub is_system: bool,
}

/// Kinds of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum UserKind {
    /// A mounted file system.
    Mount,
    /// Swap space.
    Swap,
    /// A block device on top: LVM, LUKS, multipath, md, bcache.
    Holder,
    /// A loop device whose backing file it is.
    Loop,
    /// Exported by the kernel's NVMe target.
    NvmeTarget,
    /// Open in a process.
    Process,
    /// Virtual functions that depend on the controller.
    VirtualFunction,
    /// Claimed exclusively by something that could not be named.
    Claimed,
    /// It can't be known whether it is used.
    Unknown,
}

/// A block device with the names that the rest of the system may know it by.
struct Block {
    name: String,
    dev: String,
    /// For messages and commands, without `/dev/`: the device-mapper name where there is one.
    shown: String,
}

impl Block {
    fn new(system: &System, name: &str) -> Block {
        let mapped = system.read(&format!("/sys/class/block/{name}/dm/name"));
        Block {
            dev: system.read(&format!("/sys/class/block/{name}/dev")).unwrap_or_default(),
            shown: mapped.map_or_else(|| name.to_owned(), |mapped| format!("mapper/{mapped}")),
            name: name.to_owned(),
        }
    }

    /// Whether a path such as `/dev/mapper/luks-root` is this one.
    fn is_at(&self, system: &System, path: &str) -> bool {
        // A chroot or a container shows its /dev at another place.
        let Some((_, inner)) = path.rsplit_once("/dev/") else { return false };
        if inner == self.name || inner == self.shown {
            return true;
        }
        // Names that udev gives, such as /dev/vg/root and /dev/disk/by-id/...
        system.link(path).is_some_and(|target| target.rsplit('/').next() == Some(self.name.as_str()))
    }
}

/// Everything that uses any of a controller's namespaces. Without root, other processes' open files are not seen.
pub fn of_controller(system: &System, controller: &Controller) -> Vec<User> {
    let mut users = Vec::new();
    for namespace in &controller.namespaces {
        users.extend(of_namespace(system, namespace));
    }
    let nodes: Vec<String> = controller
        .name
        .iter()
        .cloned()
        // Generic character devices of namespaces, which may have no block device at all.
        .chain(system.list(&format!("{}/nvme", device_path(controller.bdf))).iter().flat_map(|name| {
            let below = system.list(&format!("{}/nvme/{name}", device_path(controller.bdf)));
            below.into_iter().filter(|name| name.starts_with("ng"))
        }))
        .collect();
    users.extend(processes::with_open(system, &nodes, &[]));
    users.extend(nvme_target_passthrough(system, controller));
    let functions = format!("{}/sriov_numvfs", device_path(controller.bdf));
    if let Some(count) = system.number(&functions).filter(|&count| count > 0) {
        users.push(User {
            kind: UserKind::VirtualFunction,
            device: controller.name.clone().unwrap_or_default(),
            what: format!("{count} virtual functions of this controller are enabled"),
            free: vec![format!("echo 0 > {functions}")],
            is_system: false,
        });
    }
    users
}

/// Everything that uses a namespace or one of its partitions.
pub fn of_namespace(system: &System, namespace: &Namespace) -> Vec<User> {
    if namespace.dev.is_none() {
        let what = "the kernel shows no block device for it, so who uses it can't be known".to_owned();
        return vec![unknown(&namespace.name, what)];
    }
    let mounts = match Mounts::read(system) {
        Ok(mounts) => mounts,
        Err(what) => return vec![unknown(&namespace.name, what)],
    };
    let mut names = vec![namespace.name.clone()];
    names.extend(namespace.path_name.clone());
    names.extend(namespace.partitions.iter().map(|one| one.name.clone()));
    let mut users = Vec::new();
    for name in &names {
        of_block(system, &mounts, name, 0, &mut users);
    }
    let devs: Vec<String> = std::iter::once(namespace.dev.clone().unwrap_or_default())
        .chain(namespace.partitions.iter().map(|one| one.dev.clone()))
        .collect();
    users.extend(processes::with_open(system, &names, &devs));
    users
}

fn unknown(device: &str, what: String) -> User {
    User { kind: UserKind::Unknown, device: device.to_owned(), what, free: Vec::new(), is_system: false }
}

/// Appends what uses one block device and, before it, what uses the devices on top: so commands come out in their order.
fn of_block(system: &System, mounts: &Mounts, name: &str, depth: usize, users: &mut Vec<User>) {
    let block = Block::new(system, name);
    for mount in mounts.of(&block.dev, |path| block.is_at(system, path)) {
        users.push(mount_user(&block, mount));
    }
    users.extend(btrfs(system, mounts, &block));
    users.extend(swap(system, &block));
    users.extend(loops(system, mounts, &block, depth));
    users.extend(nvme_target(system, &block));
    for holder in holders(system, name) {
        if depth < STACK_DEPTH_MAX {
            of_block(system, mounts, &holder, depth + 1, users);
        }
        users.push(holder_user(system, &block, &holder));
    }
}

fn mount_user(block: &Block, mount: &Mount) -> User {
    let (at, fs) = (&mount.at, &mount.fs);
    let (place, free) = match mount.process {
        // `umount` would look in the wrong mount namespace.
        Some(process) => (
            format!("in the mount namespace of process {process}"),
            format!("nsenter --target {process} --mount umount {}", quoted(at)),
        ),
        None => (String::new(), format!("umount {}", quoted(at))),
    };
    let is_system = mount.process.is_none() && SYSTEM_MOUNTS.contains(&at.as_str());
    User {
        kind: UserKind::Mount,
        device: block.name.clone(),
        what: format!("/dev/{} is mounted at {at} ({fs}) {place}", block.shown).trim_end().to_owned(),
        // A system is not freed from under itself.
        free: if is_system { Vec::new() } else { vec![free] },
        is_system,
    }
}

/// A word of a shell command.
fn quoted(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,=".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// A mounted Btrfs names only one of its devices among the mounts; the others are listed here.
fn btrfs(system: &System, mounts: &Mounts, block: &Block) -> Vec<User> {
    let pools = system.list("/sys/fs/btrfs").into_iter();
    let of = |pool: &String| system.list(&format!("/sys/fs/btrfs/{pool}/devices"));
    let mut users = Vec::new();
    for pool in pools.filter(|pool| of(pool).contains(&block.name)) {
        let members: Vec<Block> = of(&pool).iter().map(|name| Block::new(system, name)).collect();
        let is_member = |path: &str| members.iter().any(|member| member.is_at(system, path));
        let places: Vec<&Mount> = mounts.of("", is_member).collect();
        if places.iter().any(|mount| block.is_at(system, &mount.source)) {
            continue;
        }
        let at: Vec<&str> = places.iter().map(|mount| mount.at.as_str()).collect();
        let is_system = at.is_empty() || at.iter().any(|at| SYSTEM_MOUNTS.contains(at));
        let shown = if at.is_empty() { "a place not known".to_owned() } else { at.join(", ") };
        users.push(User {
            kind: UserKind::Mount,
            device: block.name.clone(),
            what: format!("/dev/{} belongs to the Btrfs {pool}, mounted at {shown}", block.shown),
            free: match is_system {
                true => Vec::new(),
                false => at.iter().map(|at| format!("umount {}", quoted(at))).collect(),
            },
            is_system,
        });
    }
    users
}

fn swap(system: &System, block: &Block) -> Vec<User> {
    let swaps = match system.read_whole("/proc/swaps") {
        Ok(swaps) => swaps,
        // A kernel without swap has no such file.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => return vec![unknown(&block.name, format!("/proc/swaps can't be read: {error}"))],
    };
    let paths = swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    paths
        .map(mounts::unescape)
        .filter(|path| block.is_at(system, path))
        .map(|path| User {
            kind: UserKind::Swap,
            device: block.name.clone(),
            what: format!("/dev/{} is swap space in use", block.shown),
            free: vec![format!("swapoff {}", quoted(&path))],
            is_system: false,
        })
        .collect()
}

/// Loop devices do not claim what they are on.
fn loops(system: &System, mounts: &Mounts, block: &Block, depth: usize) -> Vec<User> {
    let mut users = Vec::new();
    for name in system.list("/sys/class/block") {
        let backing = system.read(&format!("/sys/class/block/{name}/loop/backing_file"));
        if !backing.is_some_and(|path| block.is_at(system, &path)) {
            continue;
        }
        if depth < STACK_DEPTH_MAX {
            let children = system.list(&format!("/sys/class/block/{name}"));
            let partition = |child: &&String| child.starts_with(&name);
            for part in std::iter::once(&name).chain(children.iter().filter(partition)) {
                of_block(system, mounts, part, depth + 1, &mut users);
            }
        }
        users.push(User {
            kind: UserKind::Loop,
            device: block.name.clone(),
            what: format!("/dev/{} is behind the loop device /dev/{name}", block.shown),
            free: vec![format!("losetup --detach /dev/{name}")],
            is_system: false,
        });
    }
    users
}

const NVME_TARGET: &str = "/sys/kernel/config/nvmet/subsystems";

/// The kernel's NVMe target does not claim the block devices that it exports.
fn nvme_target(system: &System, block: &Block) -> Vec<User> {
    let mut users = Vec::new();
    for subsystem in system.list(NVME_TARGET) {
        let namespaces = format!("{NVME_TARGET}/{subsystem}/namespaces");
        for id in system.list(&namespaces) {
            let read = |attribute: &str| system.read(&format!("{namespaces}/{id}/{attribute}"));
            let is_ours = read("device_path").is_some_and(|path| block.is_at(system, &path));
            if is_ours && read("enable").as_deref() == Some("1") {
                users.push(User {
                    kind: UserKind::NvmeTarget,
                    device: block.name.clone(),
                    what: format!("/dev/{} is exported as namespace {id} of {subsystem}", block.shown),
                    free: vec![format!("echo 0 > {namespaces}/{id}/enable")],
                    is_system: false,
                });
            }
        }
    }
    users
}

fn nvme_target_passthrough(system: &System, controller: &Controller) -> Vec<User> {
    let Some(name) = &controller.name else { return Vec::new() };
    let exported = |subsystem: &String| {
        let read = |attribute: &str| system.read(&format!("{NVME_TARGET}/{subsystem}/passthru/{attribute}"));
        read("device_path").as_deref() == Some(&format!("/dev/{name}"))
            && read("enable").as_deref() == Some("1")
    };
    let subsystems = system.list(NVME_TARGET).into_iter().filter(exported);
    subsystems
        .map(|subsystem| User {
            kind: UserKind::NvmeTarget,
            device: name.clone(),
            what: format!("the controller is exported as {subsystem}"),
            free: vec![format!("echo 0 > {NVME_TARGET}/{subsystem}/passthru/enable")],
            is_system: false,
        })
        .collect()
}

/// Block devices on top, as the kernel links them, and bcache, which keeps a directory instead.
fn holders(system: &System, name: &str) -> Vec<String> {
    let mut names = system.list(&format!("/sys/class/block/{name}/holders"));
    if let Some(cached) = system.link_name(&format!("/sys/class/block/{name}/bcache/dev")) {
        names.push(cached);
    } else if system.exists(&format!("/sys/class/block/{name}/bcache")) {
        names.push("bcache".to_owned());
    }
    names.sort();
    names.dedup();
    names
}

fn holder_user(system: &System, block: &Block, holder: &str) -> User {
    let path = format!("/sys/class/block/{holder}");
    let mapped = system.read(&format!("{path}/dm/name"));
    let uuid = system.read(&format!("{path}/dm/uuid")).unwrap_or_default();
    let (what, free) = match mapped {
        Some(name) if uuid.starts_with("LVM-") => {
            let group = volume_group(&name);
            (
                format!("the LVM volume {name} (/dev/{holder})"),
                format!("vgchange --activate n {}", quoted(&group)),
            )
        }
        Some(name) if uuid.starts_with("CRYPT-") => (
            format!("the encrypted volume {name} (/dev/{holder})"),
            format!("cryptsetup close {}", quoted(&name)),
        ),
        Some(name) if uuid.starts_with("mpath-") => (
            format!("the multipath device {name} (/dev/{holder})"),
            format!("multipath -f {}", quoted(&name)),
        ),
        Some(name) => (
            format!("the device-mapper device {name} (/dev/{holder})"),
            format!("dmsetup remove {}", quoted(&name)),
        ),
        None if system.exists(&format!("{path}/md")) => {
            (format!("the RAID array /dev/{holder}"), format!("mdadm --stop /dev/{holder}"))
        }
        None if holder.starts_with("bcache") => {
            let stop = match holder {
                // A cache device, or a backing device that has no cache attached.
                "bcache" => format!("/sys/class/block/{}/bcache/set/stop", block.name),
                _ => format!("{path}/bcache/stop"),
            };
            (format!("{holder}, a cached device"), format!("echo 1 > {stop}"))
        }
        None => (format!("/dev/{holder}"), format!("lsblk /dev/{holder}")),
    };
    User {
        kind: UserKind::Holder,
        device: block.name.clone(),
        what: format!("/dev/{} is used by {what}", block.shown),
        free: vec![free],
        is_system: false,
    }
}

/// The volume group in a device-mapper name: `my--group-root` is `root` of `my-group`.
fn volume_group(mapped: &str) -> String {
    let mut group = String::new();
    let mut rest = mapped.chars().peekable();
    while let Some(c) = rest.next() {
        if c == '-' && rest.next_if_eq(&'-').is_none() {
            break;
        }
        group.push(c);
    }
    group
}

#[cfg(test)]
mod tests;
