//! The `aio` engine: Linux AIO, the kernel's asynchronous I/O before io_uring, with O_DIRECT.
//!
//! What it can't do is done by one helper thread: deallocation, for which there is no command, and flushes where the kernel
//! does not take IOCB_CMD_FDSYNC (before 4.18). Submission itself waits where the file system has to allocate blocks or to
//! mark them as written: the geometry says so.
//!
//! Invariants:
//! - A buffer that the kernel or the helper may still read or write is held by its flight until its end was collected;
//!   dropping a queue waits for that, and stops the process rather than free such memory.
//! - Each operation is in exactly one place: waiting to be submitted, with the kernel, or with the helper.
//! - Whoever sleeps on the event is woken: it is readable while completions wait, and nothing waits to be submitted while the
//!   kernel and the helper have nothing, since then the helper is given the first.

#![expect(unsafe_code, reason = "the kernel reads and writes buffers that control blocks name")]

mod calls;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use slab::Slab;

use self::calls::{Context, IoEvent, Iocb};
use super::file::{self, ClaimedFile, FileOptions, FlushPoison};
use super::heap_pool::HeapPool;
use super::transfer::RETRY_COUNT_MAX;
use super::workers::{self, Job, Workers};
use super::{
    Blocks, Deallocate, Device, DeviceError, DmaBuf, Geometry, Io, IoDone, IoError, IoOp, Namespace,
    Rejected, Token, check,
};
use crate::limits;

/// Completions that are taken at a time.
const EVENT_COUNT: usize = 64;

/// A claimed file or block device, used through Linux AIO.
#[derive(Debug)]
pub struct AioNamespace {
    claimed: ClaimedFile,
    geometry: Geometry,
}

impl AioNamespace {
    /// Opens and claims what `path` names, after making sure that Linux AIO is there.
    pub fn open(path: &Path, options: &FileOptions) -> Result<AioNamespace, DeviceError> {
        drop(Context::new(limits::DEVICE_DEPTH as u32)?);
        let claimed = ClaimedFile::open(path, options)?;
        let blocks = Blocks { append: true, ..Blocks::NEVER };
        let geometry = Geometry { engine: "aio", blocks, ..claimed.geometry().clone() };
        Ok(AioNamespace { claimed, geometry })
    }

    /// What the user should know about how it was opened.
    pub fn notes(&self) -> Vec<String> {
        self.claimed.notes().to_vec()
    }
}

impl Namespace for AioNamespace {
    type Queue = AioDevice;

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn open_queue(&self) -> Result<AioDevice, DeviceError> {
        let os = |action, source| DeviceError::Os { name: self.claimed.name().to_owned(), action, source };
        let file = self.claimed.open_description()?;
        let event = workers::event().map_err(|errno| os("make an event for", errno.into()))?;
        let event = Arc::new(event);
        let for_helper = file.try_clone().map_err(|source| os("open a queue on", source))?;
        Ok(AioDevice {
            context: Context::new(self.geometry.depth)?,
            helper: Workers::new(for_helper, Arc::clone(&event), 1),
            flights: Slab::with_capacity(limits::DEVICE_DEPTH),
            waiting: VecDeque::with_capacity(limits::DEVICE_DEPTH),
            in_kernel: 0,
            with_helper: 0,
            finished: Vec::new(),
            file,
            event,
            signals_due: 0,
            takes_flush: true,
            pool: HeapPool::new(limits::DMA_SIZE_MAX),
            poison: self.claimed.poison(),
            geometry: self.geometry.clone(),
            #[cfg(test)]
            script: VecDeque::new(),
        })
    }

    fn name(&self) -> &str {
        self.claimed.name()
    }
}

/// An operation that was taken.
#[derive(Debug)]
struct Flight {
    token: Token,
    op: IoOp,
    /// Bytes that short transfers have already moved.
    moved: usize,
    retries: u32,
}

/// A queue of the `aio` engine.
#[derive(Debug)]
pub struct AioDevice {
    /// Declared first and so dropped first: the kernel and the helper are done with the buffers when those go.
    context: Context,
    helper: Workers,
    flights: Slab<Flight>,
    /// Keys of flights that are yet to be submitted, in order.
    waiting: VecDeque<usize>,
    in_kernel: usize,
    with_helper: usize,
    /// Done without the kernel and not yet collected.
    finished: Vec<IoDone>,
    file: File,
    event: Arc<OwnedFd>,
    /// Ends that were taken less the signals for them that were read: what is left makes, or will make, the event readable. (The
    /// kernel signals an end a little after it can be taken.)
    signals_due: i64,
    /// The kernel has not refused IOCB_CMD_FDSYNC.
    takes_flush: bool,
    pool: Rc<HeapPool>,
    poison: Arc<FlushPoison>,
    geometry: Geometry,
    /// What the next submissions are to be answered with instead: so many taken of what is offered, or an error.
    #[cfg(test)]
    script: VecDeque<Result<usize, Errno>>,
}

impl AioDevice {
    /// Submits what waits, as far as the kernel takes it.
    fn enter(&mut self) {
        while !self.waiting.is_empty() {
            if !self.is_for_kernel(self.waiting[0]) {
                self.give_first_to_helper();
                continue;
            }
            let keys: Vec<usize> =
                self.waiting.iter().copied().take_while(|key| self.is_for_kernel(*key)).collect();
            match self.submit_to_kernel(&keys) {
                Ok(0) => return,
                // What is left of a partial submission is offered again: the error that ended it, if any, comes then.
                Ok(count) => {
                    self.in_kernel += count;
                    self.waiting.drain(..count);
                }
                Err(Errno::INTR) => {}
                // It is short of something. What is under way brings it back; without that, nothing would.
                Err(Errno::AGAIN | Errno::NOMEM) if self.in_kernel + self.with_helper > 0 => return,
                Err(Errno::AGAIN | Errno::NOMEM) => self.give_first_to_helper(),
                Err(Errno::INVAL | Errno::OPNOTSUPP) if self.is_first_a_flush() => self.takes_flush = false,
                Err(errno) => {
                    if let Some(key) = self.waiting.pop_front() {
                        self.settle(key, Err(errno));
                    }
                }
            }
        }
    }

    fn is_for_kernel(&self, key: usize) -> bool {
        match self.flights[key].op {
            IoOp::Read { .. } | IoOp::Write { .. } => true,
            IoOp::Flush => self.takes_flush,
            IoOp::Deallocate { .. } => false,
        }
    }

    fn is_first_a_flush(&self) -> bool {
        self.waiting.front().is_some_and(|key| matches!(self.flights[*key].op, IoOp::Flush))
    }

    fn submit_to_kernel(&mut self, keys: &[usize]) -> Result<usize, Errno> {
        let (fd, event_fd) = (self.file.as_raw_fd(), self.event.as_raw_fd());
        let mut iocbs: Vec<Iocb> = Vec::with_capacity(keys.len());
        for &key in keys {
            let flight = &mut self.flights[key];
            iocbs.extend(Iocb::new(key, &mut flight.op, flight.moved, fd, event_fd));
        }
        #[cfg(test)]
        match self.script.pop_front() {
            Some(Ok(count)) => iocbs.truncate(count),
            Some(Err(errno)) => return Err(errno),
            None => {}
        }
        let mut pointers: Vec<*mut Iocb> = iocbs.iter_mut().map(std::ptr::from_mut).collect();
        // SAFETY: the flights hold the buffers, whose memory neither moves nor is freed before the completions with these
        // keys were taken (`finish`), for which `drop` waits; the file stays open as long as the queue.
        unsafe { self.context.submit(&mut pointers) }
    }

    fn give_first_to_helper(&mut self) {
        let Some(key) = self.waiting.pop_front() else { return };
        let flight = &mut self.flights[key];
        // SAFETY: as above: the flight stays until the end of this job was collected.
        let job = unsafe { Job::new(key, &mut flight.op, flight.moved) };
        match self.helper.give_one(job) {
            None => self.with_helper += 1,
            Some((key, outcome)) => self.settle(key, outcome),
        }
    }

    /// Takes the completions that are there.
    fn reap(&mut self) {
        if self.with_helper > 0 {
            let (ends, signals) = self.helper.collect();
            // One signal announced all of them.
            self.signals_due += i64::from(!ends.is_empty()) - signals as i64;
            for (key, outcome) in ends {
                self.with_helper -= 1;
                self.settle(key, outcome);
            }
        }
        let mut events = [IoEvent::default(); EVENT_COUNT];
        while self.in_kernel > 0 && !self.context.is_empty() {
            // EINTR can't come from a call that does not wait, and no other error from a context that is there.
            let count = self.context.completions(&mut events, 0, 0).unwrap_or(0);
            for event in &events[..count] {
                self.took(event);
            }
            if count < EVENT_COUNT {
                return;
            }
        }
    }

    fn took(&mut self, event: &IoEvent) {
        self.in_kernel -= 1;
        self.signals_due += 1;
        self.finish(event.data as usize, event.result);
    }

    /// Settles one completion of the kernel's: the operation is over, or its rest is submitted again.
    fn finish(&mut self, key: usize, result: i64) {
        let flight = &mut self.flights[key];
        let size = flight.op.transfer_size();
        let outcome = match usize::try_from(result) {
            Ok(count) => {
                flight.moved += count;
                Ok(())
            }
            Err(_) => Err(Errno::from_raw_os_error(result.wrapping_neg() as i32)),
        };
        let is_short = outcome.is_ok() && flight.moved < size && result > 0;
        let is_passing =
            matches!(outcome, Err(Errno::INTR | Errno::AGAIN)) && flight.retries < RETRY_COUNT_MAX;
        // Some file systems find out only when they do it.
        let is_untaken_flush =
            matches!(flight.op, IoOp::Flush) && outcome == Err(Errno::INVAL) && self.takes_flush;
        if is_untaken_flush {
            self.takes_flush = false;
        }
        if is_short || is_passing || is_untaken_flush {
            flight.retries += u32::from(is_passing);
            self.waiting.push_back(key);
            return;
        }
        // A transfer that moves nothing any more has met the end of a file that was cut short.
        let outcome = if flight.moved < size { outcome.and(Err(Errno::IO)) } else { outcome };
        self.settle(key, outcome);
    }

    fn settle(&mut self, key: usize, outcome: Result<(), Errno>) {
        let Flight { token, op, .. } = self.flights.remove(key);
        let status = file::status(&op, outcome, &self.poison);
        self.finished.push(IoDone { token, buf: op.into_buf(), status });
    }
}

impl Device for AioDevice {
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
        } else {
            let key = self.flights.insert(Flight { token, op, moved: 0, retries: 0 });
            self.waiting.push_back(key);
        }
        Ok(())
    }

    fn poll(&mut self, done: &mut Vec<IoDone>) -> usize {
        let before = done.len();
        self.enter();
        self.reap();
        if self.finished.is_empty() && self.signals_due > 0 {
            // The event is cleared only when nothing is found, so that a queue that is kept busy spends no call on it; what came
            // in between is found by looking again.
            self.signals_due -= workers::clear(&self.event) as i64;
            self.reap();
        }
        // Only the rests of short transfers can be waiting here; a sleeper must not wait for them in vain.
        self.enter();
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

impl Drop for AioDevice {
    #[expect(clippy::print_stderr, reason = "the last words before stopping the process")]
    fn drop(&mut self) {
        let limit = Duration::from_secs(limits::DROP_WAIT_SECONDS_MAX);
        let mut heard = Instant::now();
        while !self.flights.is_empty() && heard.elapsed() < limit {
            self.enter();
            let mut event = [IoEvent::default()];
            let waited = match self.in_kernel {
                0 => Ok(0),
                _ => self.context.completions(&mut event, 1, 1),
            };
            if waited == Ok(1) {
                self.took(&event[0]);
            } else if self.in_kernel == 0 {
                std::thread::sleep(Duration::from_millis(1));
            }
            self.reap();
            if !self.finished.is_empty() {
                heard = Instant::now();
                self.finished.clear();
            }
        }
        if self.flights.is_empty() {
            return;
        }
        eprintln!(
            "{} operations on a device are still under way, and the kernel says no more; stopping at once, since their \
             memory can't be freed while the kernel may write to it",
            self.flights.len()
        );
        std::process::abort();
    }
}
