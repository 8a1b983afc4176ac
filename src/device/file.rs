//! Opening and claiming a file or a block device for the engines that go through the kernel.
//!
//! A device is claimed with an exclusive `flock`, and a block device with O_EXCL as well, so that neither another node nor
//! a mount can have it at the same time. The lock lives as long as the [`ClaimedFile`].
//!
//! Why flush is `fdatasync` and not O_DSYNC on every write: with group commit one flush makes the writes of many records
//! durable, and several writes may be in flight under it; O_DSYNC would have every one of them wait for the drive's cache.
//! A single write that must be durable on its own is FUA, which is RWF_DSYNC on that write: the kernel turns it into a
//! FUA command where the drive has one, and into a write and a cache flush elsewhere.
//!
//! Invariants:
//! - A file that this module created and could not give its full size is removed again.
//! - Every queue has a file description of its own: the kernel reports a failed write-back once to each description, so a
//!   queue can't miss it because another one collected it.
//! - After one failed flush every later one fails, on every queue: the kernel may have dropped the pages that it could not
//!   write, and a second `fdatasync` that "succeeds" says nothing about them (PostgreSQL, 2018).

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, OFlags, StatxFlags};
use rustix::io::Errno;

use super::block_queue::BlockQueue;
use super::buffer::DmaBuf;
use super::{Blocks, Deallocate, DeviceError, Geometry, IoError, IoOp, check};
use crate::limits;

/// The block size of files, and of block devices with logical blocks of up to this size.
const BLOCK_SIZE: u32 = 4096;

/// The most bytes of one read or write through the kernel.
const TRANSFER_SIZE_MAX: u32 = 1 << 20;

/// Both margins and one extent of the smallest kind: less is certainly a mistake.
pub const DEVICE_SIZE_MIN: u64 = 2 * limits::DEVICE_MARGIN_SIZE + limits::EXTENT_SIZE_MIN;

/// What a file has that is created with so many bytes.
pub fn whole_blocks(size: u64) -> u64 {
    size - size % u64::from(BLOCK_SIZE)
}

/// Whether to go around the kernel's page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DirectIo {
    /// Fail where the file system refuses O_DIRECT.
    #[default]
    Required,
    /// Fall back to the page cache and note it.
    Preferred,
    /// Go through the page cache.
    Never,
}

/// How to open.
#[derive(Debug, Clone, Default)]
pub struct FileOptions {
    /// Create a file of this size (rounded down to whole blocks), which must not exist yet.
    pub create_size: Option<u64>,
    /// Whether to go around the page cache.
    pub direct: DirectIo,
    /// What messages call it where its user knows it by another name than its path.
    pub name: Option<String>,
}

/// A file or block device that is open and locked for this process.
#[derive(Debug)]
pub struct ClaimedFile {
    file: File,
    name: String,
    geometry: Geometry,
    is_direct: bool,
    notes: Vec<String>,
    poison: Arc<FlushPoison>,
}

impl ClaimedFile {
    /// Opens, checks and locks what `path` names.
    pub fn open(path: &Path, options: &FileOptions) -> Result<ClaimedFile, DeviceError> {
        let name = options.name.clone().unwrap_or_else(|| path.display().to_string());
        let (file, is_block_device) = match options.create_size {
            Some(size) => (create(path, &name, size)?, false),
            None => open_existing(path, &name)?,
        };
        let claimed = describe(file, name, is_block_device, options.direct);
        if claimed.is_err() && options.create_size.is_some() {
            // Best effort: the error that is being returned matters more than one of the clean-up.
            let _ = std::fs::remove_file(path);
        }
        claimed
    }

    /// What the device is, except for what the engine decides.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// What its user calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether I/O goes around the page cache.
    pub fn is_direct(&self) -> bool {
        self.is_direct
    }

    /// What the user should know about how it was opened, with the remedy.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The poison that all queues share.
    pub fn poison(&self) -> Arc<FlushPoison> {
        Arc::clone(&self.poison)
    }

    /// What sysfs says of the block device that it is on, or is.
    pub fn block_queue(&self) -> Option<BlockQueue> {
        BlockQueue::of(&self.file)
    }

    /// A file description for one queue.
    pub fn open_description(&self) -> Result<File, DeviceError> {
        use std::os::fd::AsRawFd;
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let reopened = OpenOptions::new().read(true).write(true).open(path);
        let set = |file: File| -> std::io::Result<File> {
            if self.is_direct {
                set_direct(&file)?;
            }
            Ok(file)
        };
        // Without /proc, or with privileges dropped since, queues share the description that holds the lock.
        reopened
            .and_then(set)
            .or_else(|_| self.file.try_clone())
            .map_err(|source| os(&self.name, "open a queue on", source))
    }
}

/// Remembers that a flush has failed.
#[derive(Debug, Default)]
pub struct FlushPoison {
    failed: AtomicBool,
}

impl FlushPoison {
    /// Whether a flush has failed.
    pub fn is_set(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// A flush has failed.
    pub fn set(&self) {
        self.failed.store(true, Ordering::Release);
    }

    /// What later flushes say.
    pub fn error() -> IoError {
        let cause = "an earlier flush failed, and what it lost can't be known; restart the node".to_owned();
        IoError::FlushFailed { cause }
    }
}

/// The typed result of an operation that the kernel has finished. Sets the poison where what was written may be lost.
pub(super) fn status(op: &IoOp, outcome: Result<(), Errno>, poison: &FlushPoison) -> Result<(), IoError> {
    let (offset, size) = check::range(op).unwrap_or_default();
    let Err(errno) = outcome else {
        // Another flush may have failed meanwhile, and taken with it what this one was to make durable.
        let is_void = matches!(op, IoOp::Flush) && poison.is_set();
        return if is_void { Err(FlushPoison::error()) } else { Ok(()) };
    };
    match op {
        IoOp::Flush => {
            poison.set();
            Err(IoError::FlushFailed { cause: std::io::Error::from(errno).to_string() })
        }
        _ if errno == Errno::CANCELED => Err(IoError::Aborted),
        IoOp::Read { .. } => Err(read_error(offset, size, errno)),
        IoOp::Write { fua, .. } => {
            if *fua {
                // It may have been the flush inside the write that failed.
                poison.set();
            }
            Err(write_error(offset, size, errno))
        }
        IoOp::Deallocate { .. } => Err(write_error(offset, size, errno)),
    }
}

/// The typed error of a failed read.
fn read_error(offset: u64, size: u64, errno: Errno) -> IoError {
    if is_gone(errno) { IoError::Gone } else { IoError::UnrecoveredRead { offset, size } }
}

/// The typed error of a failed write.
fn write_error(offset: u64, size: u64, errno: Errno) -> IoError {
    if is_gone(errno) {
        return IoError::Gone;
    }
    IoError::WriteFault { offset, size, cause: std::io::Error::from(errno).to_string() }
}

fn is_gone(errno: Errno) -> bool {
    matches!(errno, Errno::NODEV | Errno::NXIO)
}

fn os(name: &str, action: &'static str, source: impl Into<std::io::Error>) -> DeviceError {
    DeviceError::Os { name: name.to_owned(), action, source: source.into() }
}

fn unusable(name: &str, cause: impl Into<String>) -> DeviceError {
    DeviceError::Unusable { name: name.to_owned(), cause: cause.into() }
}

fn create(path: &Path, name: &str, size: u64) -> Result<File, DeviceError> {
    let size = whole_blocks(size);
    if size < DEVICE_SIZE_MIN {
        return Err(unusable(name, format!("{size} bytes are too few; the least is {DEVICE_SIZE_MIN}")));
    }
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(path).map_err(|source| {
        if source.kind() == std::io::ErrorKind::AlreadyExists {
            unusable(name, "it exists already and would be overwritten; name another, or open it as it is")
        } else {
            os(name, "create", source)
        }
    })?;
    let filled = lock(&file, name).and_then(|()| fill(&file, path, name, size));
    if let Err(error) = filled {
        let _ = std::fs::remove_file(path);
        return Err(error);
    }
    Ok(file)
}

/// Gives the file its size with space that is really there, so that a full file system is found now and not by a write.
fn fill(file: &File, path: &Path, name: &str, size: u64) -> Result<(), DeviceError> {
    let preallocated = loop {
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, size) {
            Err(Errno::INTR) => {}
            result => break result,
        }
    };
    match preallocated {
        Err(Errno::OPNOTSUPP) => write_zeros(file, size).map_err(|errno| no_room(name, size, errno))?,
        other => other.map_err(|errno| no_room(name, size, errno))?,
    }
    file.sync_all().map_err(|source| os(name, "flush", source))?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // The name must survive a power cut as well as the bytes do.
    File::open(parent)
        .and_then(|directory| directory.sync_all())
        .map_err(|source| os(name, "flush the directory of", source))
}

fn no_room(name: &str, size: u64, errno: Errno) -> DeviceError {
    match errno {
        Errno::NOSPC | Errno::DQUOT => unusable(
            name,
            format!("its file system has no room for {size} bytes; free some or give a smaller size"),
        ),
        Errno::FBIG => unusable(
            name,
            format!("{size} bytes are more than its file system or the file size limit allows"),
        ),
        errno => os(name, "preallocate", errno),
    }
}

/// For file systems that can't preallocate.
fn write_zeros(file: &File, size: u64) -> Result<(), Errno> {
    let zeros = vec![0; 1 << 20];
    let mut offset = 0;
    while offset < size {
        let len = (size - offset).min(zeros.len() as u64) as usize;
        match rustix::io::pwrite(file, &zeros[..len], offset) {
            Ok(written) => offset += written as u64,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn open_existing(path: &Path, name: &str) -> Result<(File, bool), DeviceError> {
    // Looked at before it is opened, since opening a pipe waits and opening some character devices acts.
    let kind = std::fs::metadata(path).map_err(|source| os(name, "open", source))?.file_type();
    let wrong = |what: &str| Err(unusable(name, format!("it is {what}; name a file or a block device")));
    if kind.is_dir() {
        return wrong("a directory");
    } else if kind.is_fifo() {
        return wrong("a pipe");
    } else if kind.is_socket() {
        return wrong("a socket");
    } else if kind.is_char_device() {
        return wrong(
            "a character device (of an NVMe drive, /dev/nvme0n1 is the namespace and /dev/nvme0 is not)",
        );
    }
    let is_block_device = kind.is_block_device();
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if is_block_device {
        options.custom_flags(OFlags::EXCL.bits() as i32);
    }
    let file = options.open(path).map_err(|source| match source.raw_os_error() {
        Some(code) if code == Errno::BUSY.raw_os_error() => DeviceError::InUse { name: name.to_owned() },
        _ => os(name, "open for reading and writing", source),
    })?;
    lock(&file, name)?;
    Ok((file, is_block_device))
}

fn lock(file: &File, name: &str) -> Result<(), DeviceError> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(DeviceError::InUse { name: name.to_owned() }),
        Err(errno) => Err(os(name, "lock", errno)),
    }
}

fn set_direct(file: &File) -> std::io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(file)?;
    Ok(rustix::fs::fcntl_setfl(file, flags | OFlags::DIRECT)?)
}

/// Turns O_DIRECT on and reads a block through it, since some file systems only refuse at the first read.
fn try_direct(file: &File, block_size: u32) -> std::io::Result<()> {
    set_direct(file)?;
    let mut block = DmaBuf::from_heap(block_size as usize);
    let read = rustix::io::pread(file, &mut block[..], 0);
    if let Err(errno) = read {
        let flags = rustix::fs::fcntl_getfl(file)?;
        rustix::fs::fcntl_setfl(file, flags - OFlags::DIRECT)?;
        return Err(errno.into());
    }
    Ok(())
}

/// What reads are aligned to: what the kernel says that O_DIRECT asks of offsets, or it would go through the page cache on some
/// file systems; where it says nothing, a sector if one can be read. A block where it can't.
fn read_alignment(file: &File, is_direct: bool, sector_size: u32) -> u32 {
    let asked = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    let asked = asked.ok().filter(|_| is_direct).map_or(0, |found| found.stx_dio_offset_align);
    let alignment = sector_size.max(asked.next_power_of_two());
    let mut part = DmaBuf::from_heap(alignment as usize);
    let read = rustix::io::pread(file, &mut part[..], u64::from(alignment));
    if read == Ok(alignment as usize) { alignment } else { BLOCK_SIZE.max(sector_size) }
}

fn describe(
    mut file: File,
    name: String,
    is_block_device: bool,
    direct: DirectIo,
) -> Result<ClaimedFile, DeviceError> {
    let logical_size = match is_block_device {
        true => {
            rustix::fs::ioctl_blksszget(&file).map_err(|errno| os(&name, "ask the block size of", errno))?
        }
        false => 512,
    };
    let block_size = logical_size.max(BLOCK_SIZE);
    // The end of a block device is its size, as BLKGETSIZE64 would say.
    let size = file.seek(SeekFrom::End(0)).map_err(|source| os(&name, "ask the size of", source))?;
    if size == 0 {
        return Err(unusable(
            &name,
            "it is empty, and a file that is there keeps its size: remove it, and one is made in its place, with --size or 4 GiB",
        ));
    }
    if size < DEVICE_SIZE_MIN {
        return Err(unusable(&name, format!("its {size} bytes are too few; the least is {DEVICE_SIZE_MIN}")));
    }
    let mut notes = Vec::new();
    let is_direct = match (direct, try_direct_unless(direct, &file, block_size)) {
        (DirectIo::Never, _) => false,
        (_, Ok(())) => true,
        (DirectIo::Preferred, Err(cause)) => {
            notes.push(format!(
                "{name}: its file system refuses O_DIRECT ({cause}), so I/O goes through the page cache and is \
                 slower; put it on ext4, xfs or a block device"
            ));
            false
        }
        (DirectIo::Required, Err(cause)) => {
            return Err(unusable(
                &name,
                format!(
                    "its file system refuses O_DIRECT ({cause}), as tmpfs and some network file systems do; put it \
                     on ext4, xfs or a block device, or use the sync engine, which can do without"
                ),
            ));
        }
    };
    let deallocate = match is_block_device || !can_punch_holes(&file, size) {
        true => Deallocate::None,
        false => Deallocate::Zeroes,
    };
    let geometry = Geometry {
        engine: "file",
        block_size,
        read_alignment: read_alignment(&file, is_direct, logical_size).min(block_size),
        block_count: size / u64::from(block_size),
        transfer_size_max: TRANSFER_SIZE_MAX,
        optimal_boundary_size: 0,
        volatile_cache: !(is_block_device && is_direct && is_write_through(&file)),
        fua: true,
        atomic_size: logical_size,
        deallocate,
        blocks: Blocks::ALWAYS,
        memory_alignment: if is_direct { memory_alignment(&file, logical_size) } else { 1 },
        registered_buffers: false,
        depth: limits::DEVICE_DEPTH as u32,
        partition_block_size: logical_size,
    };
    Ok(ClaimedFile { file, name, geometry, is_direct, notes, poison: Arc::default() })
}

fn try_direct_unless(direct: DirectIo, file: &File, block_size: u32) -> std::io::Result<()> {
    if direct == DirectIo::Never { Ok(()) } else { try_direct(file, block_size) }
}

/// What O_DIRECT asks of the addresses of buffers, as far as the kernel says (Linux 6.1).
fn memory_alignment(file: &File, logical_size: u32) -> u32 {
    let asked = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    asked.ok().map(|found| found.stx_dio_mem_align).filter(|align| *align > 0).unwrap_or(logical_size)
}

/// Punches a hole beyond the end, which changes nothing, to hear whether the file system can.
fn can_punch_holes(file: &File, size: u64) -> bool {
    let beyond = size.next_multiple_of(u64::from(BLOCK_SIZE));
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, flags, beyond, u64::from(BLOCK_SIZE)).is_ok()
}

/// Whether the kernel says that the drive under a block device has no volatile cache. Anything unclear is no.
fn is_write_through(file: &File) -> bool {
    BlockQueue::of(file).and_then(|queue| queue.attribute("write_cache")).as_deref() == Some("write through")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn open(path: &Path, create_size: Option<u64>) -> Result<ClaimedFile, DeviceError> {
        ClaimedFile::open(path, &FileOptions { create_size, direct: DirectIo::Preferred, name: None })
    }

    fn cause(result: Result<ClaimedFile, DeviceError>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn a_created_file_has_its_size_and_all_of_its_space() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new.img");
        let claimed = open(&path, Some((8 << 20) + 100)).unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), claimed.geometry().size()), (8 << 20, 8 << 20));
        assert!(metadata.blocks() * 512 >= 8 << 20);
        assert_eq!(claimed.geometry().partition_block_size, 512);
        assert!(claimed.geometry().volatile_cache);
        assert!(cause(open(&path, Some(8 << 20))).contains("exists already"));
    }

    #[test]
    fn a_second_open_is_told_that_it_is_in_use() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.img");
        let claimed = open(&path, Some(4 << 20)).unwrap();
        assert!(matches!(open(&path, None), Err(DeviceError::InUse { .. })));
        // A queue keeps the bytes reachable but not the lock.
        let queue = claimed.open_description().unwrap();
        drop(claimed);
        open(&path, None).unwrap();
        drop(queue);
    }

    #[test]
    fn a_file_system_without_room_leaves_no_file_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("huge.img");
        let message = cause(open(&path, Some(1 << 50)));
        assert!(message.contains("no room") || message.contains("more than"), "{message}");
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_device_is_refused_in_plain_words() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        assert!(cause(open(folder.path(), None)).contains("a directory"));
        assert!(cause(open(Path::new("/dev/null"), None)).contains("a character device"));
        let pipe = path("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(cause(open(&pipe, None)).contains("a pipe"));
        std::fs::write(path("empty"), b"").unwrap();
        assert!(cause(open(&path("empty"), None)).contains("it is empty"));
        std::fs::write(path("small"), [1; 4096]).unwrap();
        assert!(cause(open(&path("small"), None)).contains("too few"));
        assert!(cause(open(&path("new"), Some(4096))).contains("too few"));
        assert!(!path("new").exists());
        assert!(cause(open(&path("missing"), None)).contains("cannot open"));
    }

    #[test]
    fn poison_stays() {
        let poison = FlushPoison::default();
        assert!(!poison.is_set());
        poison.set();
        assert!(poison.is_set());
        assert!(matches!(FlushPoison::error(), IoError::FlushFailed { .. }));
    }
}
