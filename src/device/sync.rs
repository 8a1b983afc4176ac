//! The engines `sync` and `buffered`: pread, pwrite and fdatasync, done inside `submit`; the one around the page cache where
//! the file system allows it, the other through it.
//!
//! The simplest engines that are right, for machines without io_uring and for comparison. Completions wait for the next
//! `poll`, so that callers see the same life of an operation as with any other engine.

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use super::file::{self, ClaimedFile, DirectIo, FileOptions, FlushPoison};
use super::heap_pool::HeapPool;
use super::{
    Blocks, Deallocate, Device, DeviceError, DmaBuf, Geometry, Io, IoDone, IoError, IoOp, Namespace,
    Rejected, check, transfer,
};
use crate::limits;

/// A claimed file or block device, used through plain system calls.
#[derive(Debug)]
pub struct SyncNamespace {
    claimed: ClaimedFile,
    geometry: Geometry,
}

impl SyncNamespace {
    /// Opens and claims what `path` names: `buffered` when it is never to go around the page cache, else `sync`.
    pub fn open(path: &Path, options: &FileOptions) -> Result<SyncNamespace, DeviceError> {
        let claimed = ClaimedFile::open(path, options)?;
        let engine = if options.direct == DirectIo::Never { "buffered" } else { "sync" };
        let geometry = Geometry { engine, blocks: Blocks::ALWAYS, ..claimed.geometry().clone() };
        Ok(SyncNamespace { claimed, geometry })
    }

    /// Whether I/O goes around the page cache.
    pub fn is_direct(&self) -> bool {
        self.claimed.is_direct()
    }

    /// What the user should know about how it was opened.
    pub fn notes(&self) -> Vec<String> {
        self.claimed.notes().to_vec()
    }
}

impl Namespace for SyncNamespace {
    type Queue = SyncDevice;

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn open_queue(&self) -> Result<SyncDevice, DeviceError> {
        Ok(SyncDevice {
            file: self.claimed.open_description()?,
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

/// A queue of the `sync` engine.
#[derive(Debug)]
pub struct SyncDevice {
    file: File,
    geometry: Geometry,
    poison: Arc<FlushPoison>,
    pool: Rc<HeapPool>,
    /// Done and not yet collected.
    finished: Vec<IoDone>,
}

impl SyncDevice {
    fn run(&self, op: &mut IoOp) -> Result<(), IoError> {
        let outcome = match op {
            IoOp::Read { offset, buf } => transfer::read(&self.file, *offset, buf),
            IoOp::Write { offset, buf, fua } => transfer::write(&self.file, *offset, buf, *fua),
            IoOp::Flush if self.poison.is_set() => return Err(FlushPoison::error()),
            IoOp::Flush => transfer::flush(&self.file),
            IoOp::Deallocate { .. } if self.geometry.deallocate == Deallocate::None => Ok(()),
            IoOp::Deallocate { offset, size } => transfer::deallocate(&self.file, *offset, *size),
        };
        file::status(op, outcome, &self.poison)
    }
}

impl Device for SyncDevice {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Token;

    fn run(device: &mut SyncDevice, op: IoOp) -> IoDone {
        device.submit(Io { token: Token(1), op }).unwrap();
        let mut done = Vec::new();
        device.poll(&mut done);
        done.pop().unwrap()
    }

    #[test]
    fn one_failed_flush_fails_every_later_one_on_every_queue() {
        let folder = tempfile::tempdir().unwrap();
        let options = FileOptions { create_size: Some(4 << 20), ..FileOptions::default() };
        let namespace = SyncNamespace::open(&folder.path().join("a.img"), &options).unwrap();
        let (mut one, mut other) = (namespace.open_queue().unwrap(), namespace.open_queue().unwrap());
        assert_eq!(run(&mut one, IoOp::Flush).status, Ok(()));
        // A pipe can't be synchronised: the system call itself fails.
        let (_reader, writer) = rustix::pipe::pipe().unwrap();
        let good = std::mem::replace(&mut one.file, File::from(writer));
        assert!(matches!(run(&mut one, IoOp::Flush).status, Err(IoError::FlushFailed { .. })));
        one.file = good;
        assert_eq!(run(&mut one, IoOp::Flush).status, Err(FlushPoison::error()));
        assert_eq!(run(&mut other, IoOp::Flush).status, Err(FlushPoison::error()));
        // Reads go on.
        let buf = other.allocate(4096).unwrap();
        assert_eq!(run(&mut other, IoOp::Read { offset: 0, buf }).status, Ok(()));
    }

    #[test]
    fn a_file_that_was_cut_short_gives_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.img");
        let options = FileOptions { create_size: Some(4 << 20), ..FileOptions::default() };
        let namespace = SyncNamespace::open(&path, &options).unwrap();
        let mut device = namespace.open_queue().unwrap();
        File::options().write(true).open(&path).unwrap().set_len(8192).unwrap();
        let buf = device.allocate(16_384).unwrap();
        let done = run(&mut device, IoOp::Read { offset: 0, buf });
        assert_eq!(done.status, Err(IoError::UnrecoveredRead { offset: 0, size: 16_384 }));
        assert_eq!(done.buf.unwrap().len(), 16_384);
    }
}
