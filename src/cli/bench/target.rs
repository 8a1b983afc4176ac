//! What is measured: a device or file that was named, or a temporary file; and that nothing is lost by it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::Args;
use rustix::fs::{Advice, FallocateFlags, OFlags};

use super::super::device_path::{self, AnyNamespace, OpenOptions, with_namespace};
use super::super::engine_name::EngineName;
use super::super::progress::Progress;
use super::super::{Exit, SpdkArgs};
use crate::device::block_queue::BlockQueue;
use crate::device::file::DEVICE_SIZE_MIN;
use crate::device::sim::random::Random;
use crate::device::uring_options::UringOptions;
use crate::device::{Device, IoOp, Namespace, blocking};
use crate::measure;
use crate::size;

pub(in crate::cli) type Failure = (Exit, String);

/// Options that say what is measured.
#[derive(Debug, Args)]
pub(in crate::cli) struct TargetArgs {
    /// File, block device or NVMe controller (as for serve); what is on it may be read, but is written over with --destroy
    /// only [default: a temporary file in --dir]
    #[arg(long, value_name = "PATH")]
    device: Option<PathBuf>,
    /// Directory of the temporary file, which is gone afterwards whatever happens
    #[arg(long, value_name = "DIRECTORY", default_value = ".", conflicts_with = "device")]
    dir: PathBuf,
    /// Bytes that are read and written: the size of the temporary file, or the first part of the device
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "1GiB")]
    size: u64,
    /// Write over what is on the device. All of it is lost.
    #[arg(long, requires = "device")]
    destroy: bool,
    /// Serial number of the controller that --destroy is meant for
    #[arg(long, value_name = "NUMBER", requires = "destroy")]
    serial: Option<String>,
    #[command(flatten)]
    spdk: SpdkArgs,
}

impl TargetArgs {
    /// What people call it.
    pub(in crate::cli) fn name(&self) -> String {
        match &self.device {
            Some(path) => path.display().to_string(),
            None => format!("a temporary file in {}", self.dir.display()),
        }
    }

    /// The engine without a wish for one.
    pub(in crate::cli) fn engine_default(&self) -> EngineName {
        let id = self.device.as_deref().and_then(device_path::transport_id);
        if id.is_some() { EngineName::Spdk } else { EngineName::Uring(UringOptions::default()) }
    }
}

/// What is measured, checked: writing to it loses nothing, or was asked for.
pub(in crate::cli) struct Target {
    path: PathBuf,
    /// What people call it.
    pub(in crate::cli) name: String,
    /// Bytes from the start that are read and written, and hold something.
    pub(in crate::cli) size: u64,
    /// The temporary file, which has no name any more, and its part for writes to space that was never written.
    pub(in crate::cli) temporary: Option<File>,
    pub(in crate::cli) queue: Option<BlockQueue>,
    spdk: SpdkArgs,
}

/// Blocks that are looked at all over a device, beside the known places of its two ends.
const SAMPLE_COUNT: u64 = 256;

/// Bytes beyond [`Target::size`] of a temporary file that are only preallocated, and so many more that are a hole.
pub(super) const TAIL_SIZE: u64 = 64 << 20;

/// Queues for loads that have one for each thread.
pub(in crate::cli) const QUEUE_COUNT: usize = 64;

/// Bytes of one write that fills the region.
const FILL_SIZE: u64 = 256 << 10;

impl Target {
    /// Finds or makes it. Where anything `is_written`, what is on it must be nothing, or may be destroyed.
    pub(in crate::cli) fn new(
        args: &TargetArgs,
        engine: EngineName,
        is_written: bool,
    ) -> Result<Target, Failure> {
        match &args.device {
            Some(path) => named(args, path, engine, is_written),
            None => temporary(args).map_err(|text| (Exit::Failed, text)),
        }
    }

    /// Where it is.
    pub(in crate::cli) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens it with an engine.
    pub(in crate::cli) fn open(&self, engine: EngineName) -> Result<AnyNamespace, String> {
        let options = OpenOptions {
            engine: Some(engine),
            spdk: Some(&self.spdk),
            queue_count: QUEUE_COUNT,
            ..OpenOptions::default()
        };
        device_path::open(&self.path, options)
            .map_err(|error| error.to_string().replace(&self.path.display().to_string(), &self.name))
    }

    /// Makes what was written durable and forgets what the page cache holds, so that no engine is measured with what another
    /// left behind.
    pub(in crate::cli) fn settle(&self) {
        let file = match &self.temporary {
            Some(file) => file.try_clone(),
            None => File::open(&self.path),
        };
        if let Ok(file) = file {
            let _ = file.sync_data();
            let _ = rustix::fs::fadvise(&file, 0, None, Advice::DontNeed);
        }
    }

    /// Makes the tail of a temporary file as new: preallocated first, then a hole.
    pub(super) fn renew_tail(&self) -> Result<(), String> {
        let Some(file) = &self.temporary else { return Ok(()) };
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(file, hole, self.size, 2 * TAIL_SIZE)
            .and_then(|()| rustix::fs::fallocate(file, FallocateFlags::empty(), self.size, TAIL_SIZE))
            .and_then(|()| rustix::fs::fsync(file))
            .map_err(|errno| {
                format!("its file system gives no space back or ahead ({})", std::io::Error::from(errno))
            })
    }

    /// Writes the whole region, so that reads find blocks that are there.
    pub(in crate::cli) fn fill(&self, engine: EngineName) -> Result<(), String> {
        let mut progress = Progress::new("writing what will be read");
        let namespace = self.open(engine)?;
        let filled = with_namespace!(&namespace, namespace => {
            namespace.open_queue().map_err(|error| error.to_string()).and_then(|mut queue| {
                let step = FILL_SIZE.min(u64::from(queue.geometry().transfer_size_max)) as usize * 16;
                let mut bytes = vec![0; step];
                let mut offset = 0;
                while offset < self.size {
                    progress.show(offset, self.size);
                    measure::fill(&mut bytes, offset);
                    let len = (self.size - offset).min(step as u64) as usize;
                    blocking::write(&mut queue, offset, &bytes[..len]).map_err(|error| error.to_string())?;
                    offset += len as u64;
                }
                measure::run_one(&mut queue, IoOp::Flush).map(|_| ()).map_err(|error| error.to_string())
            })
        });
        progress.end();
        filled.map_err(|text| format!("cannot write to {}: {text}", self.name))
    }
}

fn temporary(args: &TargetArgs) -> Result<Target, String> {
    let dir = args.dir.display();
    let size = args.size / (1 << 20) * (1 << 20);
    if size < DEVICE_SIZE_MIN {
        return Err(format!("--size {} is too small to measure", size::show(args.size)));
    }
    // Without a name from the start, so that nothing is left of it however this ends.
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(OFlags::TMPFILE.bits() as i32)
        .open(&args.dir)
        .map_err(|error| {
            format!("cannot make a temporary file in {dir}: {error}; name another with --dir")
        })?;
    rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size)
        .and_then(|()| rustix::fs::ftruncate(&file, size + 2 * TAIL_SIZE))
        .map_err(|errno| {
            let error = std::io::Error::from(errno);
            format!("cannot make a temporary file of {} in {dir}: {error}", size::show(size))
        })?;
    Ok(Target {
        path: PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())),
        name: args.name(),
        size,
        queue: BlockQueue::of(&file),
        temporary: Some(file),
        spdk: args.spdk.clone(),
    })
}

fn named(args: &TargetArgs, path: &Path, engine: EngineName, is_written: bool) -> Result<Target, Failure> {
    let mut target = Target {
        path: path.to_owned(),
        name: args.name(),
        size: 0,
        temporary: None,
        queue: File::open(path).ok().and_then(|file| BlockQueue::of(&file)),
        spdk: args.spdk.clone(),
    };
    let namespace = target.open(engine).map_err(|text| (Exit::Failed, text))?;
    let identity = namespace.model_and_serial().map(|(_, serial)| serial.to_owned());
    let found = with_namespace!(&namespace, namespace => {
        let size = args.size.min(namespace.geometry().size());
        target.size = size / (1 << 20) * (1 << 20);
        device_path::findings(namespace).and_then(|mut found| {
            if found.is_empty() {
                found.extend(sample(namespace)?);
            }
            Ok(found)
        })
    });
    let found =
        found.map_err(|text| (Exit::Failed, format!("cannot look at what is on {}: {text}", target.name)))?;
    let is_meant = identity.as_ref().is_none_or(|serial| args.serial.as_ref() == Some(serial));
    if is_written && !found.is_empty() && !(args.destroy && is_meant) {
        let way = identity.map_or("--destroy".to_owned(), |serial| format!("--destroy --serial {serial}"));
        let text = format!(
            "{} carries data: {}. Nothing was changed. Leave --device out to measure a temporary file; {way} writes over it, and \
             everything on it is lost",
            target.name,
            found.join(", ")
        );
        return Err((Exit::Refused, text));
    }
    Ok(target)
}

/// The first block anywhere that holds something, of some all over the device.
fn sample<N: Namespace>(namespace: &N) -> Result<Option<String>, String> {
    let mut queue = namespace.open_queue().map_err(|error| error.to_string())?;
    let block_size = queue.geometry().block_size as usize;
    let block_count = queue.geometry().block_count;
    let mut random = Random::new(block_count);
    let offsets: Vec<u64> =
        (0..SAMPLE_COUNT).map(|_| random.below(block_count) * block_size as u64).collect();
    let mut found = None;
    blocking::read_many(&mut queue, &offsets, block_size, |index, bytes| {
        if bytes.iter().any(|byte| *byte != 0) {
            found = Some(format!("non-zero data at byte {}", offsets[index]));
        }
    })
    .map_err(|error| error.to_string())?;
    Ok(found)
}
