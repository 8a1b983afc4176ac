//! The device seam: what every storage engine beneath the log offers, and nothing more.
//!
//! A [`Namespace`] is a device that has been opened and claimed; each reactor opens one [`Device`] on it, which
//! stands for a queue pair: it belongs to the thread that opened it and is never shared.
//!
//! Invariants:
//! - Buffers move in with a submission and out with its completion (or its refusal). Nothing that a device may still
//!   read or write can be freed from outside.
//! - `submit` never waits for the device on engines whose geometry says that it does not ([`Blocks`]).
//! - There are no barriers: ordering is completion, then submission. Two in-flight writes never overlap; the caller
//!   guarantees it and `sim` asserts it.
//! - A completed write is durable only after a later flush completed, unless the geometry says that there is no
//!   volatile cache or the write was FUA on a device that honours it.
//! - A failed flush is final: every later flush on any queue of the namespace fails, because what the failed one lost can't
//!   be known, and may have been written through another queue.

pub mod aio;
mod arena;
pub mod block_queue;
pub mod blocking;
pub mod buffer;
mod check;
#[cfg(test)]
mod conformance;
pub mod file;
mod health;
mod heap_pool;
pub mod kernel;
pub mod mmap;
pub mod pool;
pub mod read_ahead;
pub mod rescue;
pub mod signature;
pub mod sim;
#[cfg(feature = "spdk")]
pub mod spdk;
pub mod sync;
mod transfer;
pub mod transport_id;
pub mod uring;
pub mod uring_options;
mod workers;

use std::os::fd::BorrowedFd;

pub use buffer::DmaBuf;
pub use health::Health;

/// What happens to deallocated blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deallocate {
    /// The device ignores it.
    None,
    /// The device may free the space; what is read back is undefined.
    Advisory,
    /// Deallocated blocks read back as zeros.
    Zeroes,
}

/// Which operations an engine does inside `submit`, so that the caller waits for the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// Reads, and writes to blocks that were written before.
    pub transfer: bool,
    /// Writes to blocks of a file that its file system has yet to allocate or to mark as written.
    pub append: bool,
    /// Flushes.
    pub flush: bool,
    /// Deallocation, which changes how much space a file takes.
    pub size_change: bool,
}

impl Blocks {
    /// Nothing is done inside `submit`.
    pub const NEVER: Blocks = Blocks { transfer: false, append: false, flush: false, size_change: false };
    /// Everything is.
    pub const ALWAYS: Blocks = Blocks { transfer: true, append: true, flush: true, size_change: true };
}

/// What a device is and can do, read once when it is opened.
#[derive(Debug, Clone)]
pub struct Geometry {
    /// Name of the I/O engine: `sim`, `uring`, `sync`..., with its options.
    pub engine: &'static str,
    /// Bytes of one block, a power of two from 512 to 65536. Offsets and lengths of I/O are multiples of it, but for reads.
    pub block_size: u32,
    /// What offsets and lengths of reads are multiples of: a power of two up to `block_size`. A device that can be asked for a
    /// sector reads a short record without the rest of its blocks.
    pub read_alignment: u32,
    /// Blocks on the device.
    pub block_count: u64,
    /// The most bytes that one read or write may carry.
    pub transfer_size_max: u32,
    /// Writes should not cross multiples of this many bytes; 0 when the device names none.
    pub optimal_boundary_size: u32,
    /// Completed writes may sit in a cache that a power cut empties: flush is needed.
    pub volatile_cache: bool,
    /// FUA writes are durable at completion.
    pub fua: bool,
    /// Bytes that are written all or not at all across a power cut. The format never relies on it.
    pub atomic_size: u32,
    /// What deallocation does.
    pub deallocate: Deallocate,
    /// What `submit` does itself and returns from when it is done.
    pub blocks: Blocks,
    /// What the address of a buffer must be a multiple of; every [`DmaBuf`] is aligned to 4096.
    pub memory_alignment: u32,
    /// Buffers from `allocate` are registered with the kernel or pinned for DMA.
    pub registered_buffers: bool,
    /// Commands that may be in flight on one queue.
    pub depth: u32,
    /// The block size that partitioning tools see (512 for files), for the protective partition table.
    pub partition_block_size: u32,
}

impl Geometry {
    /// Size of the device in bytes.
    pub fn size(&self) -> u64 {
        self.block_count * u64::from(self.block_size)
    }
}

/// Names an in-flight operation for its submitter: an index into the submitter's own slab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// What to do. Offsets are bytes from the start of the device and multiples of the block size, as are buffer lengths.
#[derive(Debug)]
pub enum IoOp {
    /// Fills the buffer from the device.
    Read {
        /// First byte.
        offset: u64,
        /// Filled up to its length.
        buf: DmaBuf,
    },
    /// Writes the buffer to the device.
    Write {
        /// First byte.
        offset: u64,
        /// Written up to its length.
        buf: DmaBuf,
        /// Durable at completion, where the geometry says that the device honours it.
        fua: bool,
    },
    /// Makes every write that completed before this was submitted durable.
    Flush,
    /// Says that the range is no longer needed. Advisory.
    Deallocate {
        /// First byte.
        offset: u64,
        /// Bytes.
        size: u64,
    },
}

impl IoOp {
    /// The buffer of a read or write.
    pub fn into_buf(self) -> Option<DmaBuf> {
        match self {
            IoOp::Read { buf, .. } | IoOp::Write { buf, .. } => Some(buf),
            IoOp::Flush | IoOp::Deallocate { .. } => None,
        }
    }

    /// Bytes that the operation moves.
    pub fn transfer_size(&self) -> usize {
        match self {
            IoOp::Read { buf, .. } | IoOp::Write { buf, .. } => buf.len(),
            IoOp::Flush | IoOp::Deallocate { .. } => 0,
        }
    }
}

/// One operation on its way to a device.
#[derive(Debug)]
pub struct Io {
    /// Comes back with the completion.
    pub token: Token,
    /// What to do.
    pub op: IoOp,
}

/// Why a submission was refused. Both give the operation back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// The queue is at its depth: poll, then try again. A normal result.
    Full,
    /// The device can't take it: out of range, misaligned, or gone.
    Failed(IoError),
}

/// A refused submission: nothing happened and nothing was lost.
#[derive(Debug)]
pub struct Rejected {
    /// The operation as it was.
    pub io: Io,
    /// Why.
    pub why: Refusal,
}

/// How an operation went wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// The medium could not give the data back.
    #[error("unrecovered read error at byte {offset} ({size} bytes)")]
    UnrecoveredRead {
        /// First byte of the read.
        offset: u64,
        /// Its length.
        size: u64,
    },
    /// The write did not happen, or its outcome is unknown.
    #[error("write fault at byte {offset} ({size} bytes): {cause}")]
    WriteFault {
        /// First byte of the write.
        offset: u64,
        /// Its length.
        size: u64,
        /// The operating system's or the controller's words.
        cause: String,
    },
    /// Nothing since the last good flush is known to be durable.
    #[error("flush failed: {cause}")]
    FlushFailed {
        /// The operating system's or the controller's words.
        cause: String,
    },
    /// The command was aborted by a reset or a timeout; its outcome is unknown.
    #[error("aborted by the controller, outcome unknown")]
    Aborted,
    /// The device has gone away.
    #[error("the device is gone")]
    Gone,
    /// Offset or length is out of range or misaligned: a bug of the caller.
    #[error("invalid I/O at byte {offset} ({size} bytes): {cause}")]
    Invalid {
        /// First byte.
        offset: u64,
        /// Length.
        size: u64,
        /// What is wrong with it.
        cause: &'static str,
    },
}

impl IoError {
    /// Whether the device may have done what it was told, or may still do it.
    pub fn is_outcome_unknown(&self) -> bool {
        matches!(self, IoError::Aborted | IoError::Gone)
    }
}

/// A finished operation.
#[derive(Debug)]
pub struct IoDone {
    /// As submitted.
    pub token: Token,
    /// The buffer of a read or write, back to its owner.
    pub buf: Option<DmaBuf>,
    /// How it went. A short read or write is an error, never a success.
    pub status: Result<(), IoError>,
}

/// One queue pair: owned-buffer submit and poll.
pub trait Device {
    /// What the device is and can do.
    fn geometry(&self) -> &Geometry;

    /// Takes a DMA buffer of `size` bytes (a multiple of the block size). Its contents are unspecified. `None` when the
    /// pool is exhausted: return some and try again.
    fn allocate(&mut self, size: usize) -> Option<DmaBuf>;

    /// Queues an operation. It reaches the device at the next `poll` at the latest.
    fn submit(&mut self, io: Io) -> Result<(), Rejected>;

    /// Rings the doorbell for what was queued, collects what has finished into `done` and returns how many that were.
    fn poll(&mut self, done: &mut Vec<IoDone>) -> usize;

    /// Operations submitted and not yet returned by `poll`.
    fn in_flight(&self) -> usize;

    /// A descriptor that becomes readable when `poll` would find something, so that an idle reactor can sleep. `None` when
    /// completions are always found by the next `poll`.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>>;
}

/// A device that has been opened and claimed for this process.
pub trait Namespace: Send + Sync + 'static {
    /// The queue pair that each reactor opens for itself.
    type Queue: Device;

    /// What the device is and can do.
    fn geometry(&self) -> &Geometry;

    /// Opens a queue pair, owned by the calling thread from then on.
    fn open_queue(&self) -> Result<Self::Queue, DeviceError>;

    /// The device as its user named it, for messages.
    fn name(&self) -> &str;

    /// What the device last said of its wear and health; `None` where it does not tell. Never waits.
    fn health(&self) -> Option<Health> {
        None
    }
}

/// Why a device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Another process has it.
    #[error("{name} is in use by another process; stop that one first")]
    InUse {
        /// The device.
        name: String,
    },
    /// The operating system said no.
    #[error("cannot {action} {name}: {source}")]
    Os {
        /// The device.
        name: String,
        /// What was tried.
        action: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// It can't be used as it is.
    #[error("{name} cannot be used: {cause}")]
    Unusable {
        /// The device.
        name: String,
        /// Why, and what to do.
        cause: String,
    },
    /// The I/O engine is not allowed or not there on this machine.
    #[error("the {engine} engine is not available: {cause}")]
    EngineUnavailable {
        /// The engine.
        engine: &'static str,
        /// Why.
        cause: String,
    },
}
