//! Whether a controller may be taken from the kernel: its namespaces claimed, their users named, their contents looked at.

use std::fs::File;

use serde::Serialize;

use super::contents::{self, Contents};
use crate::pci::controller::{Controller, Namespace};
use crate::pci::system::System;
use crate::pci::users::{self, User, UserKind};

/// What was found on a controller.
pub(in crate::cli) struct Inspection {
    /// Everything that uses it, or keeps it from being known whether something does. None of it can be forced.
    pub(in crate::cli) users: Vec<User>,
    /// What each namespace holds, by name.
    pub(super) contents: Vec<NamespaceContents>,
    /// Claims on the namespaces. Nothing can mount them until these are dropped, so they are kept while the driver changes.
    #[expect(dead_code, reason = "held, not read")]
    claims: Vec<File>,
}

/// What one namespace holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct NamespaceContents {
    pub(super) namespace: String,
    #[serde(flatten)]
    pub(super) contents: Contents,
    /// Why it could not be looked at.
    pub(super) not_read: Option<String>,
}

impl Inspection {
    /// Claims what can be claimed, then looks: who comes later finds the device busy.
    pub(in crate::cli) fn new(system: &System, controller: &Controller) -> Inspection {
        let (mut claims, mut claimed, mut contents) = (Vec::new(), Vec::new(), Vec::new());
        for namespace in &controller.namespaces {
            let (file, user) = claim(system, namespace);
            contents.push(read(namespace, file.as_ref()));
            claims.extend(file);
            claimed.extend(user);
        }
        let mut users = users::of_controller(system, controller);
        // "Claimed by something" is worth saying where nothing else explains it.
        claimed.retain(|one| {
            let of_this = |user: &User| user.device.starts_with(&one.device) || user.kind == UserKind::Holder;
            one.kind != UserKind::Claimed || !users.iter().any(of_this)
        });
        users.extend(claimed);
        users.extend(obscure(controller));
        if !controller.namespaces.is_empty() {
            users.extend(foreign_processes(system));
        }
        Inspection { users, contents, claims }
    }

    /// What would be lost, in words, with the namespace that it is on.
    pub(super) fn data(&self) -> Vec<String> {
        let of = |one: &NamespaceContents| -> Vec<String> {
            let not_read = one.not_read.iter().map(|why| format!("something that can't be read ({why})"));
            let found = one.contents.data.iter().cloned().chain(not_read);
            found.map(|what| format!("/dev/{}: {what}", one.namespace)).collect()
        };
        self.contents.iter().flat_map(of).collect()
    }
}

/// A claimed file, or one only opened together with the reason.
fn claim(system: &System, namespace: &Namespace) -> (Option<File>, Option<User>) {
    // Without a number nothing can be opened safely; `users` reports it.
    let Some(dev) = &namespace.dev else { return (None, None) };
    let name = format!("/dev/{}", namespace.name);
    let path = system.path(&name);
    let error = match system.kernel().claim(&path, dev) {
        Ok(file) => return (Some(file), None),
        Err(error) => error,
    };
    let user = |kind, what, free: Vec<String>| User {
        kind,
        device: namespace.name.clone(),
        what,
        free,
        is_system: false,
    };
    if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) {
        let what = format!(
            "{name} is claimed by something that has no name here: a file system that was unmounted lazily or is \
             mounted where this process can't see it, a ZFS pool, an external journal"
        );
        let free = vec![format!("fuser --verbose {name}"), "zpool list -v -P".to_owned()];
        return (system.kernel().open(&path, dev).ok(), Some(user(UserKind::Claimed, what, free)));
    }
    let remedy = match error.kind() {
        std::io::ErrorKind::PermissionDenied => "; run this as root",
        std::io::ErrorKind::NotFound => "; inside a container, run this on the host",
        _ => "",
    };
    let what = format!("who uses {name} can't be known, because it can't be opened: {error}{remedy}");
    (None, Some(user(UserKind::Unknown, what, Vec::new())))
}

fn read(namespace: &Namespace, file: Option<&File>) -> NamespaceContents {
    let (contents, not_read) = match file.map(|file| contents::look(file, namespace)) {
        Some(Ok(contents)) => (contents, None),
        Some(Err(error)) => (Contents::default(), Some(error.to_string())),
        None => (Contents::default(), Some("it could not be opened".to_owned())),
    };
    NamespaceContents { namespace: namespace.name.clone(), contents, not_read }
}

/// The number of the first PID namespace (Linux, include/linux/proc_ns.h: PROC_PID_INIT_INO), which sees every process.
const PID_NAMESPACE_OF_HOST: &str = "pid:[4026531836]";

/// A virtual machine of the host may have the drive open without claiming it, unseen from another PID namespace.
fn foreign_processes(system: &System) -> Option<User> {
    let namespace =
        system.link("/proc/self/ns/pid").filter(|namespace| namespace != PID_NAMESPACE_OF_HOST)?;
    let what = format!(
        "which processes of the host have it open can't be known from inside a container (its PID namespace is \
         {namespace}): run this on the host, or in a container that shares the host's processes"
    );
    Some(User { kind: UserKind::Unknown, device: String::new(), what, free: Vec::new(), is_system: false })
}

/// Reasons to believe that sysfs does not show all there is.
fn obscure(controller: &Controller) -> Option<User> {
    let driver = controller.driver.as_deref()?;
    let what = match (driver, controller.state.as_deref()) {
        // A dead controller serves nobody any more.
        ("nvme", Some("live" | "dead")) => return None,
        ("nvme", state) => format!(
            "the controller is not ready (state {}), so its namespaces may not be listed; wait, then try again",
            state.unwrap_or("unknown")
        ),
        _ if controller.is_user_space() => return None,
        (other, _) => format!("the driver {other} has it, and who uses it through that can't be known"),
    };
    let device = controller.name.clone().unwrap_or_default();
    Some(User { kind: UserKind::Unknown, device, what, free: Vec::new(), is_system: false })
}
