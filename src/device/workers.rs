//! A bounded set of threads that do blocking calls on one file, for the engine `pool` and for what other engines' interfaces
//! lack.
//!
//! Invariants:
//! - The caller keeps the memory that a job names in place, and touches it no more, until the job's end was collected or
//!   the workers were dropped; dropping them finishes every job first.
//! - The event is readable whenever ends are waiting to be collected.

#![expect(unsafe_code, reason = "threads fill and read memory that the submitting thread owns")]

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::EventfdFlags;
use rustix::io::Errno;

use super::{IoOp, transfer};

/// An event descriptor, not readable yet, whose reads do not wait.
pub(super) fn event() -> Result<OwnedFd, Errno> {
    rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
}

/// What a thread is to do: the operation without the ownership of its buffer.
#[derive(Debug)]
pub(super) struct Job {
    key: usize,
    call: Call,
}

#[derive(Debug)]
enum Call {
    Read { offset: u64, ptr: *mut u8, len: usize },
    Write { offset: u64, ptr: *const u8, len: usize, fua: bool },
    Flush,
    Deallocate { offset: u64, size: u64 },
}

// SAFETY: the memory behind the pointers belongs to the job until its end was collected, whichever thread does it.
unsafe impl Send for Job {}

impl Job {
    /// The job that does the rest of `op`, of which `moved` bytes are done; `key` comes back with its end.
    ///
    /// # Safety
    /// The buffer of `op` is neither moved out of its memory, touched nor freed before the end of the job was collected or
    /// the workers that it was given to were dropped.
    pub(super) unsafe fn new(key: usize, op: &mut IoOp, moved: usize) -> Job {
        let call = match op {
            IoOp::Read { offset, buf } => {
                let rest = &mut buf[moved..];
                Call::Read { offset: *offset + moved as u64, ptr: rest.as_mut_ptr(), len: rest.len() }
            }
            IoOp::Write { offset, buf, fua } => {
                let rest = &buf[moved..];
                Call::Write { offset: *offset + moved as u64, ptr: rest.as_ptr(), len: rest.len(), fua: *fua }
            }
            IoOp::Flush => Call::Flush,
            IoOp::Deallocate { offset, size } => Call::Deallocate { offset: *offset, size: *size },
        };
        Job { key, call }
    }

    fn run(&self, file: &File) -> Result<(), Errno> {
        match self.call {
            Call::Read { offset, ptr, len } => {
                // SAFETY: `new` was promised that these initialised bytes are the job's alone until its end.
                let rest = unsafe { std::slice::from_raw_parts_mut(ptr, len) };
                transfer::read(file, offset, rest)
            }
            Call::Write { offset, ptr, len, fua } => {
                // SAFETY: as above, and nothing writes to them.
                let rest = unsafe { std::slice::from_raw_parts(ptr, len) };
                transfer::write(file, offset, rest, fua)
            }
            Call::Flush => transfer::flush(file),
            Call::Deallocate { offset, size } => transfer::deallocate(file, offset, size),
        }
    }
}

/// A job's key and how it went.
pub(super) type Ended = (usize, Result<(), Errno>);

#[derive(Debug)]
struct Shared {
    file: File,
    work: Mutex<Work>,
    /// Work has come, or the end.
    ready: Condvar,
    ended: Mutex<Vec<Ended>>,
    event: Arc<OwnedFd>,
}

#[derive(Debug, Default)]
struct Work {
    jobs: VecDeque<Job>,
    is_closing: bool,
}

/// The threads, started when there is work for them.
#[derive(Debug)]
pub(super) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    thread_count_max: usize,
}

impl Workers {
    /// At most so many threads on `file`. Each end makes `event` readable.
    pub(super) fn new(file: File, event: Arc<OwnedFd>, thread_count_max: usize) -> Workers {
        let shared =
            Shared { file, work: Mutex::default(), ready: Condvar::new(), ended: Mutex::default(), event };
        Workers { shared: Arc::new(shared), threads: Vec::new(), thread_count_max }
    }

    /// Hands jobs over and leaves `jobs` empty. Fails, with the jobs kept, only when there is not even one thread.
    pub(super) fn give(&mut self, jobs: &mut Vec<Job>) -> std::io::Result<()> {
        let count = jobs.len();
        let waiting = {
            let mut work = lock(&self.shared.work);
            work.jobs.extend(jobs.drain(..));
            work.jobs.len()
        };
        while self.threads.len() < self.thread_count_max.min(waiting) {
            let shared = Arc::clone(&self.shared);
            let spawned = std::thread::Builder::new().name("device-io".into()).spawn(move || shared.run());
            match spawned {
                Ok(thread) => self.threads.push(thread),
                // Fewer threads do the same work, later.
                Err(_) if !self.threads.is_empty() => break,
                Err(error) => {
                    jobs.extend(lock(&self.shared.work).jobs.drain(..));
                    return Err(error);
                }
            }
        }
        for _ in 0..count.min(self.threads.len()) {
            self.shared.ready.notify_one();
        }
        Ok(())
    }

    /// Hands one job over. Where not even one thread can be had, this one does it, and returns its end.
    pub(super) fn give_one(&mut self, job: Job) -> Option<Ended> {
        let mut jobs = vec![job];
        let given = self.give(&mut jobs);
        if given.is_ok() { None } else { jobs.pop().map(|job| self.run_here(&job)) }
    }

    /// Does a job on the calling thread.
    pub(super) fn run_here(&self, job: &Job) -> Ended {
        (job.key, job.run(&self.shared.file))
    }

    /// Takes the ends that are there, for which the event was signalled once, and says how many signals were read from it.
    pub(super) fn collect(&self) -> (Vec<Ended>, u64) {
        let mut ended = lock(&self.shared.ended);
        if ended.is_empty() {
            return (Vec::new(), 0);
        }
        // Under the lock, so that the event is readable again when the next end comes.
        let signals = clear(&self.shared.event);
        (std::mem::take(&mut ended), signals)
    }

    #[cfg(test)]
    pub(super) fn thread_count(&self) -> usize {
        self.threads.len()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        lock(&self.shared.work).is_closing = true;
        self.shared.ready.notify_all();
        for thread in self.threads.drain(..) {
            // A job that panics would be a defect here; its thread is gone either way.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn run(&self) {
        while let Some(job) = self.next() {
            let result = job.run(&self.file);
            let mut ended = lock(&self.ended);
            ended.push((job.key, result));
            if ended.len() == 1 {
                signal(&self.event);
            }
        }
    }

    /// The next job; `None` when the workers are being dropped and nothing is left to do.
    fn next(&self) -> Option<Job> {
        let mut work = lock(&self.work);
        loop {
            if let Some(job) = work.jobs.pop_front() {
                return Some(job);
            }
            if work.is_closing {
                return None;
            }
            work = self.ready.wait(work).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[expect(clippy::host_endian_bytes, reason = "the kernel counts in the machine's own order")]
fn signal(event: &OwnedFd) {
    // Can't fail: the counter is far from its limit.
    let _ = rustix::io::write(event, &1_u64.to_ne_bytes());
}

/// Makes an event unreadable and says how often it had been signalled.
#[expect(clippy::host_endian_bytes, reason = "as above")]
pub(super) fn clear(event: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    // An event that is not readable gives EAGAIN.
    rustix::io::read(event, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
}

/// Nothing is left half done where a holder of these locks could panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
