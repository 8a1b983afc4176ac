//! The `uring` engine: io_uring on a file or block device, with O_DIRECT, a registered file and registered buffers.
//!
//! Invariants:
//! - A buffer that the kernel may still read or write is held by its slot until the completion was reaped; dropping a
//!   queue waits for that, and stops the process rather than free such memory.
//! - Each operation has at most one entry in the rings, so neither ring overflows while at most `depth` are in flight.
//! - One `poll` enters the kernel once for everything that was submitted since the last one, and not at all when there is
//!   nothing to submit and no work of the kernel's to run.
//!
//! On a ring that is polled (IORING_SETUP_IOPOLL) the kernel takes reads and writes only: flushes and deallocations go to a
//! helper thread. Nothing wakes who sleeps on such a ring, so it has no wake descriptor.
//!
//! The wake descriptor is the ring itself: the kernel makes it readable when completions are waiting. A sleep on it may
//! also end with EINTR, because the kernel interrupts it to post them: that is a wake like any other.

#![expect(unsafe_code, reason = "the kernel reads and writes buffers that the submission queue names")]

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use rustix::io::Errno;
use slab::Slab;

use super::arena::{ARENA_SIZE, Arena};
use super::block_queue::BlockQueue;
use super::file::{self, ClaimedFile, FileOptions, FlushPoison};
use super::heap_pool::HeapPool;
use super::transfer::RETRY_COUNT_MAX;
use super::uring_options::{RegisteredBuffers, UringOptions};
use super::workers::{self, Job, Workers};
use super::{
    Blocks, Deallocate, Device, DeviceError, DmaBuf, Geometry, Io, IoDone, IoError, IoOp, Namespace,
    Rejected, Token, check,
};
use crate::limits;

/// How completions reach the ring, best first. IORING_SETUP_DEFER_TASKRUN is left out on purpose: measured on 6.18, a
/// `poll` on the ring's descriptor can then sleep although completions are waiting, since deferred work does not wake it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RingMode {
    /// The kernel does its work when this thread next enters it, without interrupting it (5.19).
    Cooperative,
    /// As it always was.
    Plain,
}

const RING_MODES: [RingMode; 2] = [RingMode::Cooperative, RingMode::Plain];

/// Milliseconds without submissions after which the kernel's submission thread sleeps: long enough to be awake under load,
/// short enough that an idle node costs nothing.
const SQPOLL_IDLE_MS: u32 = 20;

/// A claimed file or block device, used through io_uring.
#[derive(Debug)]
pub struct UringNamespace {
    claimed: ClaimedFile,
    options: UringOptions,
    geometry: Geometry,
    notes: Mutex<Vec<String>>,
}

impl UringNamespace {
    /// Opens and claims what `path` names, after making sure that io_uring is there.
    pub fn open(path: &Path, options: &FileOptions) -> Result<UringNamespace, DeviceError> {
        UringNamespace::open_with_options(path, options, UringOptions::default())
    }

    /// Opens and claims what `path` names, after making sure that such a ring can be had.
    pub fn open_with_options(
        path: &Path,
        file_options: &FileOptions,
        options: UringOptions,
    ) -> Result<UringNamespace, DeviceError> {
        let (ring, _) = build_ring(8, modes(options), options)?;
        let registered = register_arena(&ring, options);
        if let Ok(Some(_)) = &registered {
            let _ = ring.submitter().unregister_buffers();
        }
        drop(ring);
        let mut notes = Vec::new();
        let has_registered = note_registration(&registered, options, &mut notes)?;
        let claimed = ClaimedFile::open(path, file_options)?;
        notes.splice(0..0, claimed.notes().to_vec());
        if options.iopoll {
            is_polled(claimed.block_queue()).map_err(|cause| refused(options, cause))?;
        }
        let geometry = Geometry {
            engine: options.engine(),
            blocks: Blocks::NEVER,
            registered_buffers: has_registered,
            ..claimed.geometry().clone()
        };
        Ok(UringNamespace { claimed, options, geometry, notes: Mutex::new(notes) })
    }

    /// Whether a plain ring can be had here, without opening anything.
    pub fn is_available() -> bool {
        let options = UringOptions::default();
        build_ring(8, modes(options), options).is_ok()
    }

    /// Whether I/O goes around the page cache.
    pub fn is_direct(&self) -> bool {
        self.claimed.is_direct()
    }

    /// What the user should know about how it was opened, with the remedy. Opening queues may add to it.
    pub fn notes(&self) -> Vec<String> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn open_with(&self, modes: &[RingMode]) -> Result<UringDevice, DeviceError> {
        let file = self.claimed.open_description()?;
        let (ring, mode) = build_ring(self.geometry.depth, modes, self.options)?;
        let is_file_registered = ring.submitter().register_files(&[file.as_raw_fd()]).is_ok();
        let registered = register_arena(&ring, self.options);
        let has_registered = {
            let mut notes = self.notes.lock().unwrap_or_else(PoisonError::into_inner);
            note_registration(&registered, self.options, &mut notes)?
        };
        let helper = match self.options.iopoll {
            true => Some(self.helper(&file)?),
            false => None,
        };
        let geometry = Geometry { registered_buffers: has_registered, ..self.geometry.clone() };
        Ok(UringDevice {
            ring,
            helper,
            with_helper: 0,
            options: self.options,
            flights: Slab::with_capacity(geometry.depth as usize),
            fua_count: 0,
            finished: Vec::new(),
            file,
            is_file_registered,
            arena: registered.ok().flatten(),
            heap: HeapPool::new(limits::DMA_SIZE_MAX - ARENA_SIZE),
            poison: self.claimed.poison(),
            is_dead: false,
            geometry,
            mode,
        })
    }
}

impl UringNamespace {
    fn helper(&self, file: &File) -> Result<Workers, DeviceError> {
        let os = |source| DeviceError::Os {
            name: self.claimed.name().to_owned(),
            action: "open a queue on",
            source,
        };
        let event = workers::event().map_err(|errno| os(errno.into()))?;
        Ok(Workers::new(file.try_clone().map_err(os)?, Arc::new(event), 1))
    }
}

impl Namespace for UringNamespace {
    type Queue = UringDevice;

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn open_queue(&self) -> Result<UringDevice, DeviceError> {
        self.open_with(modes(self.options))
    }

    fn name(&self) -> &str {
        self.claimed.name()
    }
}

/// What is tried: the kernel's own thread knows no task work, and refuses to be asked for it.
fn modes(options: UringOptions) -> &'static [RingMode] {
    if options.sqpoll { &[RingMode::Plain] } else { &RING_MODES }
}

/// Builds a ring in the first of the modes that this kernel has.
fn build_ring(
    entries: u32,
    modes: &[RingMode],
    options: UringOptions,
) -> Result<(IoUring, RingMode), DeviceError> {
    let mut refused = std::io::Error::from(Errno::INVAL);
    for &mode in modes {
        let mut builder = IoUring::builder();
        builder.dontfork();
        match mode {
            RingMode::Cooperative => builder.setup_coop_taskrun().setup_taskrun_flag(),
            RingMode::Plain => &mut builder,
        };
        if options.sqpoll {
            builder.setup_sqpoll(SQPOLL_IDLE_MS);
        }
        if options.iopoll {
            builder.setup_iopoll();
        }
        match builder.build(entries) {
            Ok(ring) => return Ok((ring, mode)),
            Err(error) => {
                let is_unknown_flag = error.raw_os_error() == Some(Errno::INVAL.raw_os_error());
                refused = error;
                if !is_unknown_flag {
                    break;
                }
            }
        }
    }
    Err(unavailable(&refused, options))
}

/// Why there is no ring, and what to do.
fn unavailable(error: &std::io::Error, options: UringOptions) -> DeviceError {
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
    let is = |errno: Errno| error.raw_os_error() == Some(errno.raw_os_error());
    let is_plain = !options.sqpoll && !options.iopoll;
    let why = if !is_plain && build_ring(8, &RING_MODES, UringOptions::default()).is_ok() {
        // It is the option that is refused, not io_uring.
        let needs = match (options.sqpoll, options.iopoll) {
            (true, false) => "sqpoll needs Linux 5.11, or 5.4 and the capability CAP_SYS_ADMIN",
            (false, _) => "iopoll needs Linux 5.1",
            (true, true) => {
                "sqpoll needs Linux 5.11, or 5.4 and the capability CAP_SYS_ADMIN, and iopoll 5.1"
            }
        };
        return refused(
            options,
            format!("the kernel refuses such a ring ({error}): {needs}; uring alone works"),
        );
    } else if is(Errno::NOSYS) {
        "this kernel has no io_uring"
    } else if (is(Errno::PERM) || is(Errno::ACCESS)) && !matches!(disabled.trim(), "" | "0") {
        "the system setting kernel.io_uring_disabled forbids io_uring"
    } else if is(Errno::PERM) || is(Errno::ACCESS) {
        "io_uring is forbidden here, as the default seccomp profile of containers does"
    } else if is(Errno::NOMEM) {
        "the limit of locked memory is too low (ulimit -l)"
    } else {
        "the kernel refused a ring"
    };
    refused(options, format!("{why} ({error}); the sync engine does without"))
}

fn refused(options: UringOptions, cause: String) -> DeviceError {
    DeviceError::EngineUnavailable { engine: options.engine(), cause }
}

/// Whether a drive can be asked for completions. Where it can't, kernels either fail each read and write or quietly wait for
/// interrupts.
fn is_polled(queue: Option<BlockQueue>) -> Result<(), String> {
    let Some(queue) = queue else {
        return Err("iopoll needs a block device, and there is none beneath; leave iopoll out".to_owned());
    };
    match queue.attribute("io_poll").as_deref() {
        Some("1") => Ok(()),
        _ => Err(format!(
            "iopoll needs a drive with queues for polling, and queue/io_poll of {} in sysfs does not say 1; of an NVMe drive, the              kernel parameter nvme.poll_queues=N makes them; leave iopoll out",
            queue.name()
        )),
    }
}

/// Whether buffers are registered, and what is to be said where they could not be.
fn note_registration(
    registered: &std::io::Result<Option<Rc<Arena>>>,
    options: UringOptions,
    notes: &mut Vec<String>,
) -> Result<bool, DeviceError> {
    match registered {
        Ok(arena) => Ok(arena.is_some()),
        Err(cause) => {
            let note = unregistered_note(cause);
            if options.buffers == RegisteredBuffers::Required {
                return Err(refused(options, note));
            }
            if !notes.contains(&note) {
                notes.push(note);
            }
            Ok(false)
        }
    }
}

fn unregistered_note(cause: &std::io::Error) -> String {
    format!(
        "I/O buffers could not be registered with io_uring ({cause}), which costs some speed; raise the limit of \
         locked memory (ulimit -l, or LimitMEMLOCK= of the service) by {} KiB for each reactor",
        ARENA_SIZE >> 10
    )
}

/// Registers an arena as the ring's one fixed buffer, unless that is not wanted.
fn register_arena(ring: &IoUring, options: UringOptions) -> std::io::Result<Option<Rc<Arena>>> {
    if options.buffers == RegisteredBuffers::Never {
        return Ok(None);
    }
    let arena = Arena::new().ok_or(Errno::NOMEM)?;
    let region = libc::iovec { iov_base: arena.base().cast(), iov_len: ARENA_SIZE };
    // SAFETY: the kernel pins the pages itself; the arena outlives the registration because the queue keeps it until
    // after its ring.
    unsafe { ring.submitter().register_buffers(&[region]) }?;
    Ok(Some(arena))
}

fn is_fua(op: &IoOp) -> bool {
    matches!(op, IoOp::Write { fua: true, .. })
}

/// An operation that the kernel has, or will have at the next poll.
#[derive(Debug)]
struct Flight {
    token: Token,
    op: IoOp,
    /// Bytes that short transfers have already moved.
    moved: usize,
    retries: u32,
}

/// A queue of the `uring` engine: one ring, used by the thread that opened it.
pub struct UringDevice {
    /// Declared first and so dropped first: nothing of the kernel's refers to the rest when it goes.
    ring: IoUring,
    /// Does what a polled ring does not take. Its threads end before the flights go.
    helper: Option<Workers>,
    /// Flights that the helper has.
    with_helper: usize,
    options: UringOptions,
    flights: Slab<Flight>,
    /// FUA writes among the flights.
    fua_count: usize,
    /// Done without the kernel and not yet collected.
    finished: Vec<IoDone>,
    file: File,
    is_file_registered: bool,
    arena: Option<Rc<Arena>>,
    heap: Rc<HeapPool>,
    poison: Arc<FlushPoison>,
    /// The ring itself has failed; what is in flight will not be heard of again.
    is_dead: bool,
    geometry: Geometry,
    mode: RingMode,
}

impl UringDevice {
    /// Puts the (rest of the) operation into the submission queue.
    fn push(&mut self, key: usize) {
        let entry = self.entry(key).user_data(key as u64);
        let entry = match self.is_file_registered {
            true => entry.flags(squeue::Flags::FIXED_FILE),
            false => entry,
        };
        let mut queue = self.ring.submission();
        // SAFETY: the buffer that the entry names is owned by the flight, whose memory neither moves nor is freed before
        // the completion with this key was reaped (`finish`, `drop`); the file stays open as long as the ring.
        let pushed = unsafe { queue.push(&entry) };
        assert!(pushed.is_ok(), "the submission queue has an entry for each operation that may be in flight");
    }

    fn entry(&mut self, key: usize) -> squeue::Entry {
        let fd = Fd(if self.is_file_registered { 0 } else { self.file.as_raw_fd() });
        let flight = &mut self.flights[key];
        let moved = flight.moved;
        match &mut flight.op {
            IoOp::Read { offset, buf } => {
                let at = *offset + moved as u64;
                let rest = &mut buf[moved..];
                let (ptr, len) = (rest.as_mut_ptr(), rest.len() as u32);
                match self.arena.as_ref().is_some_and(|arena| arena.contains(rest)) {
                    true => opcode::ReadFixed::new(fd, ptr, len, 0).offset(at).build(),
                    false => opcode::Read::new(fd, ptr, len).offset(at).build(),
                }
            }
            IoOp::Write { offset, buf, fua } => {
                let at = *offset + moved as u64;
                let rest = &buf[moved..];
                let (ptr, len) = (rest.as_ptr(), rest.len() as u32);
                let flags = if *fua { libc::RWF_DSYNC } else { 0 };
                match self.arena.as_ref().is_some_and(|arena| arena.contains(rest)) {
                    true => opcode::WriteFixed::new(fd, ptr, len, 0).offset(at).rw_flags(flags).build(),
                    false => opcode::Write::new(fd, ptr, len).offset(at).rw_flags(flags).build(),
                }
            }
            IoOp::Flush => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            IoOp::Deallocate { offset, size } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                opcode::Fallocate::new(fd, *size).offset(*offset).mode(mode).build()
            }
        }
    }

    /// Enters the kernel once where that is of use.
    fn enter(&mut self) {
        // Where the kernel's thread does not, this one must look for completions at the drive.
        let is_polling = self.options.iopoll && !self.options.sqpoll && self.flights.len() > self.with_helper;
        let queue = self.ring.submission();
        let is_idle = queue.is_empty() && !queue.taskrun() && !queue.cq_overflow() && !is_polling;
        drop(queue);
        if is_idle || self.is_dead {
            return;
        }
        if let Err(error) = self.ring.submit() {
            self.note_enter_error(&error);
        }
    }

    /// What is left in the queue goes with the next enter, unless the ring itself is broken.
    fn note_enter_error(&mut self, error: &std::io::Error) {
        let passing = [Errno::INTR, Errno::AGAIN, Errno::BUSY, Errno::TIME, Errno::NOMEM];
        let code = error.raw_os_error();
        self.is_dead |= !passing.iter().any(|errno| code == Some(errno.raw_os_error()));
    }

    /// Hands an operation to the helper.
    fn give_to_helper(&mut self, key: usize) {
        let Some(helper) = &mut self.helper else { return };
        let flight = &mut self.flights[key];
        // SAFETY: the flight stays until the end of this very job was collected; when the queue is dropped, `drop` waits for it.
        let job = unsafe { Job::new(key, &mut flight.op, flight.moved) };
        match helper.give_one(job) {
            None => self.with_helper += 1,
            Some((key, outcome)) => {
                let one = self.settle(key, outcome);
                self.finished.push(one);
            }
        }
    }

    /// Takes the completions that are there.
    fn reap(&mut self, done: &mut Vec<IoDone>) {
        if self.with_helper > 0 {
            let ends = self.helper.as_ref().map(|helper| helper.collect().0).unwrap_or_default();
            for (key, outcome) in ends {
                self.with_helper -= 1;
                let one = self.settle(key, outcome);
                done.push(one);
            }
        }
        loop {
            let next = self.ring.completion().next();
            let Some(completion) = next else { return };
            self.finish(completion.user_data() as usize, completion.result(), done);
        }
    }

    /// Settles one completion: the operation is over, or its rest goes back to the kernel.
    fn finish(&mut self, key: usize, result: i32, done: &mut Vec<IoDone>) {
        let flight = &mut self.flights[key];
        let size = flight.op.transfer_size();
        let outcome = match result {
            0.. => {
                flight.moved += result as usize;
                Ok(())
            }
            code => Err(Errno::from_raw_os_error(code.wrapping_neg())),
        };
        let is_short = outcome.is_ok() && flight.moved < size && result > 0;
        let is_passing =
            matches!(outcome, Err(Errno::INTR | Errno::AGAIN)) && flight.retries < RETRY_COUNT_MAX;
        if is_short || is_passing {
            flight.retries += u32::from(is_passing);
            self.push(key);
            return;
        }
        // A transfer that moves nothing any more has met the end of a file that was cut short.
        let outcome = if flight.moved < size { outcome.and(Err(Errno::IO)) } else { outcome };
        let one = self.settle(key, outcome);
        done.push(one);
    }

    fn settle(&mut self, key: usize, outcome: Result<(), Errno>) -> IoDone {
        let Flight { token, op, .. } = self.flights.remove(key);
        self.fua_count -= usize::from(is_fua(&op));
        let status = file::status(&op, outcome, &self.poison);
        IoDone { token, buf: op.into_buf(), status }
    }

    /// Waits for a completion, a second at most.
    fn wait(&mut self) {
        let second = Timespec::new().sec(1);
        let waited = self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&second));
        if let Err(error) = waited {
            self.note_enter_error(&error);
        }
    }
}

impl Device for UringDevice {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn allocate(&mut self, size: usize) -> Option<DmaBuf> {
        self.arena.as_ref().and_then(|arena| arena.allocate(size)).or_else(|| self.heap.allocate(size))
    }

    fn submit(&mut self, io: Io) -> Result<(), Rejected> {
        if let Err(error) = check::check(&self.geometry, &io.op) {
            return Err(check::refuse(io, error));
        }
        if self.is_dead {
            return Err(check::refuse(io, IoError::Gone));
        }
        if self.in_flight() >= self.geometry.depth as usize {
            return Err(check::full(io));
        }
        let Io { token, op } = io;
        let is_void = matches!(op, IoOp::Deallocate { .. }) && self.geometry.deallocate == Deallocate::None;
        if is_void {
            self.finished.push(IoDone { token, buf: None, status: Ok(()) });
        } else if matches!(op, IoOp::Flush) && self.poison.is_set() {
            self.finished.push(IoDone { token, buf: None, status: Err(FlushPoison::error()) });
        } else {
            self.fua_count += usize::from(is_fua(&op));
            let is_transfer = matches!(op, IoOp::Read { .. } | IoOp::Write { .. });
            let key = self.flights.insert(Flight { token, op, moved: 0, retries: 0 });
            match is_transfer || self.helper.is_none() {
                true => self.push(key),
                false => self.give_to_helper(key),
            }
        }
        Ok(())
    }

    fn poll(&mut self, done: &mut Vec<IoDone>) -> usize {
        let before = done.len();
        done.append(&mut self.finished);
        self.enter();
        self.reap(done);
        // Only the rests of short transfers can be waiting here; a sleeper must not wait for them in vain.
        if !self.ring.submission().is_empty() {
            self.enter();
        }
        if done.len() == before && self.fua_count > 0 {
            // The kernel flushes a FUA write of a file in a worker of this very core: a caller that spins would keep it
            // out until the next tick (measured on ext4: 4 ms instead of 0.1 ms).
            std::thread::yield_now();
        }
        done.len() - before
    }

    fn in_flight(&self) -> usize {
        self.flights.len() + self.finished.len()
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        // A polled ring never becomes readable by itself.
        // SAFETY: the ring owns the descriptor and outlives the borrow of `self`.
        (!self.options.iopoll).then(|| unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) })
    }
}

impl Drop for UringDevice {
    #[expect(clippy::print_stderr, reason = "the last words before stopping the process")]
    fn drop(&mut self) {
        let mut done = Vec::new();
        let limit = Duration::from_secs(limits::DROP_WAIT_SECONDS_MAX);
        let mut heard = Instant::now();
        while !self.flights.is_empty() && !self.is_dead && heard.elapsed() < limit {
            match self.options.iopoll {
                // The kernel would look for completions without end, and knows nothing of the helper.
                true => {
                    self.enter();
                    std::thread::yield_now();
                }
                false => self.wait(),
            }
            self.reap(&mut done);
            if !done.is_empty() {
                heard = Instant::now();
            }
            done.clear();
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

impl std::fmt::Debug for UringDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UringDevice")
            .field("in_flight", &self.in_flight())
            .field("mode", &self.mode)
            .field("registered_buffers", &self.geometry.registered_buffers)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "uring_tests.rs"]
mod tests;
