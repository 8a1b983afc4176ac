//! What a device is called on the command line, and opening it with the engine that was asked for.

use std::path::{Path, PathBuf};

use super::{EngineName, note};
use crate::device::file::{DirectIo, FileOptions};
use crate::device::signature::{self, Finding};
use crate::device::sync::SyncNamespace;
use crate::device::uring::UringNamespace;
use crate::device::{Device, DeviceError, Namespace, blocking};
use crate::engine::device_format::{OpenError, read_superblock};

/// A device opened with one of the engines.
pub(super) enum AnyNamespace {
    Uring(UringNamespace),
    Sync(SyncNamespace),
}

/// Runs generic code on whichever engine a device was opened with.
macro_rules! with_namespace {
    ($any:expr, $name:ident => $body:expr) => {
        match $any {
            $crate::cli::device_path::AnyNamespace::Uring($name) => $body,
            $crate::cli::device_path::AnyNamespace::Sync($name) => $body,
        }
    };
}
pub(super) use with_namespace;

/// Names that are not paths get a sentence of their own instead of "no such file".
fn check_name(path: &Path) -> Result<(), DeviceError> {
    let text = path.to_string_lossy();
    let is_pci_address = text.split([':', '.']).count() == 4
        && text.split([':', '.']).all(|part| !part.is_empty() && part.chars().all(|c| c.is_ascii_hexdigit()));
    if text.starts_with("trtype:") || (is_pci_address && !path.exists()) {
        return Err(DeviceError::EngineUnavailable {
            engine: "spdk",
            cause: format!(
                "'{text}' names an NVMe controller, which this build can't drive; name a file or a block device"
            ),
        });
    }
    Ok(())
}

/// Opens a file or block device. Without a wish for an engine it is io_uring, or `sync` where that is forbidden.
pub(super) fn open(
    path: &Path,
    engine: Option<EngineName>,
    create_size: Option<u64>,
) -> Result<AnyNamespace, DeviceError> {
    check_name(path)?;
    let options = |direct| FileOptions { create_size, direct };
    let open_sync = || SyncNamespace::open(path, &options(DirectIo::Preferred)).map(AnyNamespace::Sync);
    let namespace = match engine {
        Some(EngineName::Sync) => open_sync()?,
        Some(EngineName::Uring) => {
            UringNamespace::open(path, &options(DirectIo::Required)).map(AnyNamespace::Uring)?
        }
        None => match UringNamespace::open(path, &options(DirectIo::Required)) {
            Ok(namespace) => AnyNamespace::Uring(namespace),
            Err(DeviceError::EngineUnavailable { cause, .. }) => {
                note(format!("io_uring is not available ({cause}); using the slower sync engine"));
                open_sync()?
            }
            Err(error) => return Err(error),
        },
    };
    let notes = match &namespace {
        AnyNamespace::Uring(namespace) => namespace.notes(),
        AnyNamespace::Sync(namespace) => namespace.notes(),
    };
    for text in notes {
        note(text);
    }
    Ok(namespace)
}

/// The name that a new file is formatted under before it gets its own.
pub(super) fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".unfinished");
    name.into()
}

/// What is on a device that would be lost by formatting it.
pub(super) fn findings<N: Namespace>(namespace: &N) -> Result<Vec<String>, String> {
    let mut queue = namespace.open_queue().map_err(|error| error.to_string())?;
    match read_superblock(&mut queue) {
        Ok(quorum) => {
            let superblock = quorum.superblock;
            let label =
                if superblock.label.is_empty() { String::new() } else { format!(" '{}'", superblock.label) };
            let uuid = uuid::Uuid::from_bytes(superblock.uuid);
            return Ok(vec![format!(
                "a Basalt device{label} (UUID {uuid}, started {} times)",
                superblock.boot
            )]);
        }
        Err(OpenError::Superblock(crate::format::superblock::NoQuorum::NotFormatted)) => {}
        Err(OpenError::Io(error)) => return Err(error.to_string()),
        Err(error) => return Ok(vec![format!("what was a Basalt device: {error}")]),
    }
    let geometry = queue.geometry().clone();
    let block = u64::from(geometry.block_size);
    let found = signature::probe(
        |offset, length| {
            // The probe asks for any bytes; the device gives whole blocks.
            let first = offset / block * block;
            let size = (offset + length).next_multiple_of(block) - first;
            let bytes = blocking::read(&mut queue, first, size as usize).map_err(std::io::Error::other)?;
            let skip = (offset - first) as usize;
            Ok(bytes[skip..skip + length as usize].to_vec())
        },
        geometry.size(),
    );
    match found {
        Ok(found) => {
            Ok(found.iter().map(|Finding { what, offset }| format!("{what} (at byte {offset})")).collect())
        }
        Err(error) => Err(error.to_string()),
    }
}
