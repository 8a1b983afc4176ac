//! A lock on this machine for a device that has no file: two nodes must not open one namespace.
//!
//! SPDK itself keeps two processes off one PCIe controller; over TCP every process may connect. The lock goes with the
//! process, however it ends. Another machine is not kept out by it.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::device::DeviceError;
use crate::device::transport_id::TransportId;

/// Locks the namespace for as long as the file is open.
pub(super) fn claim(device: &TransportId, namespace: u32) -> Result<File, DeviceError> {
    let name = device.to_string();
    let digest = crc32fast::hash(device.controller().to_ascii_lowercase().as_bytes());
    let path = format!("/var/tmp/basalt-{digest:08x}-{namespace}.lock");
    let os =
        |action, source| DeviceError::Os { name: format!("{path} (the lock of {name})"), action, source };
    let file = open_or_create(&path).map_err(|source| os("open", source))?;
    // Whoever runs the next node may be somebody else. Only the owner can; the others find it done.
    let _ = file.set_permissions(std::fs::Permissions::from_mode(0o666));
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(DeviceError::InUse { name }),
        Err(errno) => Err(os("lock", errno.into())),
    }
}

/// Opens what is there before it would create it: in a sticky directory, Linux refuses to "create" what belongs to somebody
/// else (fs.protected_regular).
fn open_or_create(path: &str) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).append(true).custom_flags(libc::O_NOFOLLOW);
    loop {
        match options.open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            result => return result,
        }
        match options.clone().create_new(true).mode(0o666).open(path) {
            // Somebody else was faster.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            result => return result,
        }
    }
}
