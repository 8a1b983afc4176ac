//! `basalt format`: makes a device Basalt's, unless something is on it.

use std::fs::File;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use super::device_path::{self, AnyNamespace, OpenOptions, with_namespace};
use super::engine_name::EngineName;
use super::progress::Progress;
use super::serve::default_reactor_count;
use super::{Exit, FormatArgs, fail, note, say};
use crate::device::file::DEVICE_SIZE_MIN;
use crate::device::{Device, DeviceError, Namespace};
use crate::engine::device_format::{self, DEVICE_SIZE_MAX, FormatOptions};
use crate::engine::op::Clock;
use crate::format::layout;
use crate::format::superblock::{IndexKind, Superblock};
use crate::limits::default_shard_count;
use crate::size;

/// Size of a file that is created without another wish.
pub(super) const SIZE_DEFAULT: u64 = 4 << 30;

pub(super) fn format(args: &FormatArgs) -> Exit {
    if let Some(why) = args.engine.and_then(EngineName::why_not_served) {
        return fail(Exit::Refused, why);
    }
    if args.label.len() > 32 {
        return fail(Exit::Usage, format!("the label '{}' is longer than 32 bytes", args.label));
    }
    match format_device(args) {
        Ok((superblock, engine)) => {
            let layout = superblock.layout;
            say(format!(
                "{}: formatted with {} in {} extents of {}, {}, index {}, UUID {} ({engine})",
                args.device.display(),
                size::show(layout.device_size),
                layout.extent_count,
                size::show(layout.extent_size),
                size::count(superblock.shard_count.into(), "shard"),
                superblock.index,
                uuid::Uuid::from_bytes(superblock.uuid)
            ));
            Exit::Done
        }
        Err((exit, text)) => fail(exit, text),
    }
}

type Failure = (Exit, String);

/// What a device is to become.
pub(super) struct NewDevice<'a> {
    engine: Option<EngineName>,
    shard_count: Option<u16>,
    /// Reactors that a node has: what the shards go by where nobody said how many.
    reactor_count: usize,
    index: IndexKind,
    label: &'a str,
    /// Write zeros to every block first. A block of a file that was only allocated costs its file system a journal commit when
    /// it is first written, in the flush that a client waits for.
    is_written: bool,
}

impl FormatArgs {
    fn new_device(&self) -> NewDevice<'_> {
        NewDevice {
            engine: self.engine,
            shard_count: self.shards,
            reactor_count: default_reactor_count(),
            index: self.index,
            label: &self.label,
            is_written: !self.quick,
        }
    }
}

fn device_failure(error: &DeviceError) -> Failure {
    let exit = if matches!(error, DeviceError::InUse { .. }) { Exit::Refused } else { Exit::Failed };
    (exit, error.to_string())
}

fn format_device(args: &FormatArgs) -> Result<(Superblock, &'static str), Failure> {
    let path = &args.device;
    let is_controller = device_path::transport_id(path).is_some();
    if !path.exists() && !is_controller {
        let size = args.size.unwrap_or(SIZE_DEFAULT);
        return create(path, size, &args.new_device());
    }
    let options =
        OpenOptions { engine: args.engine, spdk: Some(&args.spdk), queue_count: 1, ..OpenOptions::default() };
    let namespace = device_path::open(path, options).map_err(|error| device_failure(&error))?;
    let identity = namespace.model_and_serial().map(|(model, serial)| (model.to_owned(), serial.to_owned()));
    with_namespace!(&namespace, namespace => {
        let found = device_path::findings(namespace).map_err(|text| {
            (Exit::Failed, format!("cannot look at what is on {}: {text}", path.display()))
        })?;
        // A controller's address says little about which drive it is; its serial number is on the drive.
        let (what, way) = match &identity {
            Some((model, serial)) => (format!("{} ({model})", path.display()), format!("--force --serial {serial}")),
            None => (path.display().to_string(), "--force".to_owned()),
        };
        let is_meant = identity.as_ref().is_none_or(|(_, serial)| args.serial.as_ref() == Some(serial));
        let is_allowed = found.is_empty() || (args.force && is_meant);
        if !is_allowed {
            let list = found.join(", ");
            let text = format!(
                "{what} carries data: {list}. Nothing was changed. `{way}` formats it all the same, and everything on it is lost"
            );
            return Err((Exit::Refused, text));
        }
        if args.size.is_some() && is_controller {
            return Err((Exit::Usage, format!("the size of {} is what it is: leave --size out", path.display())));
        }
        if let Some(size) = args.size {
            let text = format!(
                "{} exists, so its size is what it is: leave out --size {}, or remove the file first",
                path.display(),
                size::show(size)
            );
            return Err((Exit::Usage, text));
        }
        for one in &found {
            note(format!("overwriting {one}"));
        }
        // Blocks of a drive are the drive's own matter.
        let new = NewDevice { is_written: !args.quick && path.is_file(), ..args.new_device() };
        write(namespace, &new).map_err(|text| (Exit::Failed, format!("{}: {text}", path.display())))
    })
}

fn write<N: Namespace>(namespace: &N, new: &NewDevice<'_>) -> Result<(Superblock, &'static str), String> {
    let mut queue = namespace.open_queue().map_err(|error| error.to_string())?;
    if new.is_written {
        let size = queue.geometry().size();
        let mut progress = Progress::new("writing every block once");
        let zeroed = device_format::zero_all(&mut queue, &mut |done| progress.show(done, size));
        progress.end();
        zeroed.map_err(|error| error.to_string())?;
    }
    let options = FormatOptions {
        shard_count: new
            .shard_count
            .unwrap_or_else(|| default_shard_count(new.reactor_count, queue.geometry().size())),
        uuid: *uuid::Uuid::new_v4().as_bytes(),
        // Version and variant bits are fixed in one UUID, so the secret is mixed from two.
        secret: std::array::from_fn({
            let (a, b) = (*uuid::Uuid::new_v4().as_bytes(), *uuid::Uuid::new_v4().as_bytes());
            move |at| a[at] ^ b[at].rotate_left(3)
        }),
        label: new.label.to_owned(),
        index: new.index,
    };
    let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    let clock = Clock { unix_ms, monotonic_us: 0 };
    let superblock = device_format::format(&mut queue, &options, clock).map_err(|error| error.to_string())?;
    Ok((superblock, queue.geometry().engine))
}

/// Whether a file of this size can be formatted, which is said before any of it is taken from the disk.
fn check_size(path: &Path, size: u64, new: &NewDevice<'_>) -> Result<(), String> {
    let shard_count = new.shard_count.unwrap_or_else(|| default_shard_count(new.reactor_count, size));
    let least = layout::size_min(shard_count).max(DEVICE_SIZE_MIN);
    if (least..=DEVICE_SIZE_MAX).contains(&size) {
        return Ok(());
    }
    let relation = if size < least { "small" } else { "large" };
    Err(format!(
        "{}: a size of {} is too {relation}: with {} it may be {} to {}",
        path.display(),
        shown(size),
        size::count(shard_count.into(), "shard"),
        shown(least),
        shown(DEVICE_SIZE_MAX)
    ))
}

/// A size that is compared with another one: rounded, both may look the same.
fn shown(bytes: u64) -> String {
    if bytes < 1 << 10 { size::show(bytes) } else { format!("{bytes} bytes ({})", size::show(bytes)) }
}

/// Creates a file and formats it, under another name until it is whole: an interrupted start leaves nothing that looks
/// like a device.
pub(super) fn create(
    path: &Path,
    size: u64,
    new: &NewDevice<'_>,
) -> Result<(Superblock, &'static str), Failure> {
    check_size(path, size, new).map_err(|text| (Exit::Usage, text))?;
    let unfinished = device_path::unfinished(path);
    if unfinished.is_file() {
        std::fs::remove_file(&unfinished).map_err(|error| {
            let text = format!("cannot remove {}, left by an earlier start: {error}", unfinished.display());
            (Exit::Failed, text)
        })?;
    }
    let result = create_as(&unfinished, path, size, new);
    if result.is_err() {
        // Whatever was made is of no use to anyone; the error that is reported is the first one.
        let _ = std::fs::remove_file(&unfinished);
    }
    result.map_err(|text| (Exit::Failed, text))
}

fn create_as(
    unfinished: &Path,
    path: &Path,
    size: u64,
    new: &NewDevice<'_>,
) -> Result<(Superblock, &'static str), String> {
    let namespace: AnyNamespace = device_path::open(
        unfinished,
        OpenOptions {
            engine: new.engine,
            create_size: Some(size),
            name: Some(path),
            ..OpenOptions::default()
        },
    )
    .map_err(|error| error.to_string())?;
    let made = with_namespace!(&namespace, namespace => write(namespace, new))
        .map_err(|text| format!("{}: {text}", path.display()))?;
    drop(namespace);
    let failed = |error: std::io::Error| format!("cannot put {} in its place: {error}", path.display());
    // Linking fails where something appeared meanwhile; renaming would replace it.
    std::fs::hard_link(unfinished, path)
        .or_else(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => Err(error),
            _ => std::fs::rename(unfinished, path),
        })
        .map_err(failed)?;
    let _ = std::fs::remove_file(unfinished);
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)?;
    Ok(made)
}

/// Creates the device that `serve` was asked for.
pub(super) fn create_for_serve(
    path: &Path,
    size: u64,
    engine: Option<EngineName>,
    index: IndexKind,
    reactor_count: usize,
) -> Result<(), Failure> {
    let new = NewDevice { engine, shard_count: None, reactor_count, index, label: "", is_written: true };
    create(path, size, &new).map(|_| ())
}
