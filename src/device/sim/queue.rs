//! One queue pair of a simulated disk.

use std::os::fd::BorrowedFd;
use std::rc::Rc;

use super::SimDisk;
use super::fault::FaultOp;
use crate::device::{Device, DmaBuf, Geometry, Io, IoDone, IoError, Rejected, check};

/// What a fresh buffer is filled with: contents are unspecified, so they are never convenient.
const STALE_BYTE: u8 = 0xA5;

/// A queue pair of a [`SimDisk`]. Dropping it aborts what it has in flight.
pub struct SimDevice {
    disk: SimDisk,
    geometry: Geometry,
    queue: u64,
    generation: u64,
    polls: u64,
}

impl SimDevice {
    pub(super) fn new(disk: SimDisk) -> SimDevice {
        let mut medium = disk.medium.borrow_mut();
        medium.queue_count += 1;
        let (queue, generation) = (medium.queue_count, medium.generation);
        let geometry = medium.geometry.clone();
        drop(medium);
        SimDevice { disk, geometry, queue, generation, polls: 0 }
    }

    /// The disk that this is a queue of.
    pub fn disk(&self) -> &SimDisk {
        &self.disk
    }

    fn is_stale(&self) -> bool {
        self.disk.medium.borrow().generation != self.generation
    }
}

impl Device for SimDevice {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn allocate(&mut self, size: usize) -> Option<DmaBuf> {
        if self.disk.medium.borrow_mut().faults.strike(FaultOp::Allocate).is_some() {
            return None;
        }
        let mut buf = self.disk.pool.allocate(size)?;
        buf.fill(STALE_BYTE);
        Some(buf)
    }

    fn submit(&mut self, io: Io) -> Result<(), Rejected> {
        if self.is_stale() {
            return Err(check::refuse(io, IoError::Gone));
        }
        self.disk.medium.borrow_mut().submit(self.queue, self.polls, io)
    }

    fn poll(&mut self, done: &mut Vec<IoDone>) -> usize {
        if self.is_stale() {
            return 0;
        }
        self.polls += 1;
        self.disk.medium.borrow_mut().poll(self.queue, self.polls, done)
    }

    fn in_flight(&self) -> usize {
        if self.is_stale() { 0 } else { self.disk.medium.borrow().in_flight_of(self.queue) }
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl Drop for SimDevice {
    fn drop(&mut self) {
        if !self.is_stale() {
            self.disk.medium.borrow_mut().delete_queue(self.queue);
        }
    }
}

impl std::fmt::Debug for SimDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimDevice")
            .field("queue", &self.queue)
            .field("in_flight", &self.in_flight())
            .field("pool", &Rc::strong_count(&self.disk.pool))
            .finish_non_exhaustive()
    }
}
