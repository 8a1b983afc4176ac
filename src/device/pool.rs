//! The `pool` engine: pread, pwrite and fdatasync by a bounded pool of threads for each queue.
//!
//! What programs do that want asynchronous I/O on any kernel and any file system. Nothing in it waits inside `submit`.
//!
//! Invariant: a buffer that a thread may still read or write is held by its flight until the end of its job was collected,
//! or, when the queue is dropped, until the threads have ended.

#![expect(unsafe_code, reason = "threads fill and read the buffers of the flights")]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use slab::Slab;

use super::file::{self, ClaimedFile, FileOptions, FlushPoison};
use super::heap_pool::HeapPool;
use super::workers::{self, Job, Workers};
use super::{
    Blocks, Deallocate, Device, DeviceError, DmaBuf, Geometry, Io, IoDone, IoError, IoOp, Namespace,
    Rejected, Token, check,
};
use crate::limits;

/// A claimed file or block device, used through threads.
#[derive(Debug)]
pub struct PoolNamespace {
    claimed: ClaimedFile,
    geometry: Geometry,
}

impl PoolNamespace {
    /// Opens and claims what `path` names.
    pub fn open(path: &Path, options: &FileOptions) -> Result<PoolNamespace, DeviceError> {
        let claimed = ClaimedFile::open(path, options)?;
        let geometry = Geometry { engine: "pool", blocks: Blocks::NEVER, ..claimed.geometry().clone() };
        Ok(PoolNamespace { claimed, geometry })
    }

    /// What the user should know about how it was opened.
    pub fn notes(&self) -> Vec<String> {
        self.claimed.notes().to_vec()
    }
}

impl Namespace for PoolNamespace {
    type Queue = PoolDevice;

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn open_queue(&self) -> Result<PoolDevice, DeviceError> {
        let file = self.claimed.open_description()?;
        let event = workers::event().map_err(|errno| DeviceError::Os {
            name: self.claimed.name().to_owned(),
            action: "make an event for",
            source: errno.into(),
        })?;
        let event = Arc::new(event);
        Ok(PoolDevice {
            workers: Workers::new(file, Arc::clone(&event), limits::POOL_THREAD_COUNT),
            given: Vec::with_capacity(limits::DEVICE_DEPTH),
            flights: Slab::with_capacity(limits::DEVICE_DEPTH),
            finished: Vec::new(),
            event,
            pool: HeapPool::new(limits::DMA_SIZE_MAX),
            poison: self.claimed.poison(),
            geometry: self.geometry.clone(),
        })
    }

    fn name(&self) -> &str {
        self.claimed.name()
    }
}

/// A queue of the `pool` engine.
#[derive(Debug)]
pub struct PoolDevice {
    /// Declared first and so dropped first: no thread is left when the buffers go.
    workers: Workers,
    /// Submitted and not yet handed over.
    given: Vec<Job>,
    flights: Slab<(Token, IoOp)>,
    /// Done without a thread and not yet collected.
    finished: Vec<IoDone>,
    event: Arc<OwnedFd>,
    pool: Rc<HeapPool>,
    poison: Arc<FlushPoison>,
    geometry: Geometry,
}

impl PoolDevice {
    /// Hands over what was submitted. Where not one thread can be had, this one does the work.
    fn give(&mut self) {
        if !self.given.is_empty() && self.workers.give(&mut self.given).is_err() {
            for job in std::mem::take(&mut self.given) {
                let (key, outcome) = self.workers.run_here(&job);
                self.finish(key, outcome);
            }
        }
    }

    fn finish(&mut self, key: usize, outcome: Result<(), rustix::io::Errno>) {
        let (token, op) = self.flights.remove(key);
        let status = file::status(&op, outcome, &self.poison);
        self.finished.push(IoDone { token, buf: op.into_buf(), status });
    }
}

impl Device for PoolDevice {
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
        if self.in_flight() >= self.geometry.depth as usize {
            return Err(check::full(io));
        }
        let Io { token, op } = io;
        let at_once: Option<Result<(), IoError>> = match op {
            IoOp::Deallocate { .. } if self.geometry.deallocate == Deallocate::None => Some(Ok(())),
            IoOp::Flush if self.poison.is_set() => Some(Err(FlushPoison::error())),
            _ => None,
        };
        if let Some(status) = at_once {
            self.finished.push(IoDone { token, buf: None, status });
            return Ok(());
        }
        let key = self.flights.insert((token, op));
        // SAFETY: the flight holds the buffer, whose memory does not move with it, until `finish` removes it for the end of
        // this very job; when the queue is dropped, the threads end first.
        let job = unsafe { Job::new(key, &mut self.flights[key].1, 0) };
        self.given.push(job);
        Ok(())
    }

    fn poll(&mut self, done: &mut Vec<IoDone>) -> usize {
        let before = done.len();
        self.give();
        if !self.flights.is_empty() {
            for (key, outcome) in self.workers.collect().0 {
                self.finish(key, outcome);
            }
        }
        done.append(&mut self.finished);
        done.len() - before
    }

    fn in_flight(&self) -> usize {
        self.flights.len() + self.finished.len()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.event.as_fd())
    }
}

impl Drop for PoolDevice {
    fn drop(&mut self) {
        // What was taken is seen through, as if it had been polled.
        self.give();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::conformance;

    fn namespace(folder: &tempfile::TempDir) -> PoolNamespace {
        let options = FileOptions { create_size: Some(8 << 20), ..FileOptions::default() };
        PoolNamespace::open(&folder.path().join("a.img"), &options).unwrap()
    }

    #[test]
    fn threads_are_started_when_there_is_work_and_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let namespace = namespace(&folder);
        let mut device = namespace.open_queue().unwrap();
        assert_eq!(device.workers.thread_count(), 0);
        for token in 0..limits::DEVICE_DEPTH as u64 {
            let buf = device.allocate(4096).unwrap();
            device.submit(Io { token: Token(token), op: IoOp::Read { offset: 0, buf } }).unwrap();
        }
        assert_eq!(conformance::drain(&mut device).len(), limits::DEVICE_DEPTH);
        assert_eq!(device.workers.thread_count(), limits::POOL_THREAD_COUNT);
    }

    #[test]
    fn dropping_a_queue_sees_through_what_was_never_polled() {
        let folder = tempfile::tempdir().unwrap();
        let namespace = namespace(&folder);
        conformance::sees_through_what_it_took(|| namespace.open_queue().unwrap());
    }

    #[test]
    fn a_file_that_was_cut_short_gives_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let namespace = namespace(&folder);
        std::fs::File::options()
            .write(true)
            .open(folder.path().join("a.img"))
            .unwrap()
            .set_len(8192)
            .unwrap();
        conformance::reports_a_short_file(&mut namespace.open_queue().unwrap());
    }
}
