//! The `mmap` engine: a shared mapping of the whole device, memcpy and msync. For measurement only.
//!
//! A node must not be served through it ([`WHY_NOT_SERVED`]): the kernel decides when and in which order pages reach the
//! device; a file that is cut short, or a block that can't be read, is a SIGBUS that ends the process instead of an error of
//! one read; faults and write-back of all threads contend for one page table; and an error of write-back is reported
//! once, to whoever calls msync next, if at all.

#![expect(unsafe_code, reason = "raw memory that the kernel maps a file into")]

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags};

use super::file::{self, ClaimedFile, DirectIo, FileOptions, FlushPoison};
use super::heap_pool::HeapPool;
use super::{
    Blocks, Deallocate, Device, DeviceError, DmaBuf, Geometry, Io, IoDone, IoError, IoOp, Namespace,
    Rejected, check, transfer,
};
use crate::limits;

/// What `serve` says when it is asked to use this engine.
pub const WHY_NOT_SERVED: &str = "mmap is there to be measured, not to serve: the kernel alone decides when pages are \
    written, a truncated file or an unreadable block kills the process (SIGBUS) instead of failing one read, threads contend \
    for one page table, and errors of write-back can get lost; leave --engine out, or take uring, aio, pool, sync or buffered";

/// A claimed file or block device, mapped by each queue.
#[derive(Debug)]
pub struct MmapNamespace {
    claimed: ClaimedFile,
    geometry: Geometry,
}

impl MmapNamespace {
    /// Opens and claims what `path` names.
    pub fn open(path: &Path, options: &FileOptions) -> Result<MmapNamespace, DeviceError> {
        let options = FileOptions { direct: DirectIo::Never, ..options.clone() };
        let claimed = ClaimedFile::open(path, &options)?;
        let geometry = Geometry { engine: "mmap", blocks: Blocks::ALWAYS, ..claimed.geometry().clone() };
        Ok(MmapNamespace { claimed, geometry })
    }

    /// What the user should know about how it was opened.
    pub fn notes(&self) -> Vec<String> {
        self.claimed.notes().to_vec()
    }
}

impl Namespace for MmapNamespace {
    type Queue = MmapDevice;

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn open_queue(&self) -> Result<MmapDevice, DeviceError> {
        let file = self.claimed.open_description()?;
        let mapping = Mapping::new(&file, self.geometry.size()).map_err(|errno| DeviceError::Os {
            name: self.claimed.name().to_owned(),
            action: "map",
            source: errno.into(),
        })?;
        Ok(MmapDevice {
            mapping,
            file,
            geometry: self.geometry.clone(),
            poison: self.claimed.poison(),
            pool: HeapPool::new(limits::DMA_SIZE_MAX),
            finished: Vec::with_capacity(limits::DEVICE_DEPTH),
        })
    }

    fn name(&self) -> &str {
        self.claimed.name()
    }
}

/// The device as memory. Only ever reached through raw pointers: another queue or process may change it at any time.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    size: usize,
}

impl Mapping {
    fn new(file: &File, size: u64) -> Result<Mapping, Errno> {
        let size = usize::try_from(size).map_err(|_| Errno::NOMEM)?;
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping where the kernel wants it replaces nothing.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), size, protection, flags, file, 0) }?;
        let base = NonNull::new(base.cast()).ok_or(Errno::NOMEM)?;
        Ok(Mapping { base, size })
    }

    /// Where a range begins that lies within the mapping.
    fn at(&self, offset: u64, len: usize) -> NonNull<u8> {
        let offset = offset as usize;
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.size), "a range beyond the mapping");
        // SAFETY: the range was just found to lie within the mapping.
        unsafe { self.base.add(offset) }
    }

    fn read(&self, offset: u64, buf: &mut [u8]) {
        let from = self.at(offset, buf.len());
        // SAFETY: both are valid for the length, and a buffer of this process's heap is not part of the mapping.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), buf.as_mut_ptr(), buf.len()) };
    }

    fn write(&self, offset: u64, buf: &[u8]) {
        let to = self.at(offset, buf.len());
        // SAFETY: as for `read`; in-flight operations never overlap, so nobody reads these bytes meanwhile.
        unsafe { std::ptr::copy_nonoverlapping(buf.as_ptr(), to.as_ptr(), buf.len()) };
    }

    /// Writes what was changed in the range, and waits. Ranges begin with a block, which is a page or several.
    fn sync(&self, offset: u64, len: usize) -> Result<(), Errno> {
        let from = self.at(offset, len);
        // SAFETY: the range is mapped; msync changes no memory.
        unsafe { rustix::mm::msync(from.as_ptr().cast(), len, MsyncFlags::SYNC) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this size, and no reference into it was ever made.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.size) };
    }
}

/// A queue of the `mmap` engine.
#[derive(Debug)]
pub struct MmapDevice {
    mapping: Mapping,
    file: File,
    geometry: Geometry,
    poison: Arc<FlushPoison>,
    pool: Rc<HeapPool>,
    /// Done and not yet collected.
    finished: Vec<IoDone>,
}

impl MmapDevice {
    fn run(&self, op: &mut IoOp) -> Result<(), IoError> {
        let outcome = match op {
            IoOp::Read { offset, buf } => {
                self.mapping.read(*offset, buf);
                Ok(())
            }
            IoOp::Write { offset, buf, fua } => {
                self.mapping.write(*offset, buf);
                if *fua { self.mapping.sync(*offset, buf.len()) } else { Ok(()) }
            }
            IoOp::Flush if self.poison.is_set() => return Err(FlushPoison::error()),
            IoOp::Flush => self.mapping.sync(0, self.mapping.size),
            IoOp::Deallocate { .. } if self.geometry.deallocate == Deallocate::None => Ok(()),
            IoOp::Deallocate { offset, size } => transfer::deallocate(&self.file, *offset, *size),
        };
        file::status(op, outcome, &self.poison)
    }
}

impl Device for MmapDevice {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn allocate(&mut self, size: usize) -> Option<DmaBuf> {
        self.pool.allocate(size)
    }

    fn submit(&mut self, io: Io) -> Result<(), Rejected> {
        if let Err(error) = check::check(&self.geometry, &io.op) {
            return Err(check::refuse(io, error));
        }
        if self.finished.len() >= self.geometry.depth as usize {
            return Err(check::full(io));
        }
        let Io { token, mut op } = io;
        let status = self.run(&mut op);
        self.finished.push(IoDone { token, buf: op.into_buf(), status });
        Ok(())
    }

    fn poll(&mut self, done: &mut Vec<IoDone>) -> usize {
        let count = self.finished.len();
        done.append(&mut self.finished);
        count
    }

    fn in_flight(&self) -> usize {
        self.finished.len()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
