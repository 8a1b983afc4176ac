//! One NVMe queue pair behind the device seam, used by the thread that opened it.
//!
//! Invariants:
//! - A buffer that the controller may still read or write is held here until its command has completed, at a timeout too.
//!   What was in flight when a queue pair was given up is held until the controller has been reset.
//! - At most `depth` commands are in flight, so that SPDK queues none in software; when it is out of requests all the same,
//!   that is a full queue.
//! - Commands reach the controller in `poll`, with one doorbell for all of them.
//! - A reset takes nothing from the caller but time: reads are sent again, and so are flushes, as a drive's cache outlives a
//!   reset by its host; writes are told as aborted, since their outcome is unknown. What was written and not flushed may be
//!   lost with a target that died, or a drive that failed by itself: then flushes are poisoned.
//! - Nothing is sent again for ever: a command that each time ends in a reset is given up.

#![expect(unsafe_code, reason = "commands to SPDK, which reads and writes buffers that they name")]

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use spdk_sys::*;

use super::completions::{Completions, on_completion};
use super::controller::{Controller, Phase, REQUESTS_PER_COMMAND, State};
use super::dma::{SpdkPool, is_dma};
use super::status::{Command, Status};
use crate::device::file::FlushPoison;
use crate::device::{
    Deallocate, Device, DeviceError, DmaBuf, Geometry, Io, IoDone, IoError, IoOp, Rejected, Token, check,
};

/// How often a read that failed at the medium is sent again, and a read or flush that a reset took back.
const RETRY_COUNT_MAX: u32 = 3;

/// How often the clock is read while commands are in flight, in polls, and how often their age is looked at.
const POLLS_PER_CLOCK: u32 = 64;
const AGE_INTERVAL: Duration = Duration::from_millis(50);

/// Completions that one poll takes, so that what was read is still in the processor's cache when its turn comes, and the
/// commands that follow reach the controller before it has run out of others.
const COMPLETIONS_PER_POLL_MAX: u32 = 32;

/// Polls in a row that found nothing before a queue over TCP gives its core to whoever waits for it: on loopback that may be
/// the target, and a poll is a system call there anyway.
const IDLE_POLLS_MAX: u32 = 64;

/// How often a connection is tried when a queue is opened over a fabric. SPDK waits two seconds for the target's first answer,
/// which a busy one may miss.
const OPEN_TRIES_FABRICS: u32 = 5;

/// Between attempts to make a queue pair again.
const REJOIN_INTERVAL: Duration = Duration::from_millis(50);

/// How long dropping a queue waits for what is in flight before it has it aborted.
const DROP_WAIT: Duration = Duration::from_secs(5);

/// The queue pair, of one generation of the controller.
#[derive(Debug, Clone, Copy)]
struct Pair {
    raw: NonNull<spdk_nvme_qpair>,
    namespace: NonNull<spdk_nvme_ns>,
    generation: u64,
}

/// A command that the controller has, or will have.
#[derive(Debug)]
struct Flight {
    token: Token,
    op: IoOp,
    since: Instant,
    retries: u32,
    /// Of a flush: how many of this queue's writes had completed when it was sent.
    covers: u64,
}

/// A queue of the `spdk` engine.
pub struct SpdkQueue {
    pair: Option<Pair>,
    completions: Completions,
    flights: Vec<Option<Flight>>,
    free: Vec<u32>,
    /// Reads and flushes that wait to be sent again.
    again: VecDeque<Flight>,
    /// The queue pair has completed nothing yet.
    is_unproven: bool,
    /// Over, but their buffers wait for the reset.
    held: Vec<IoDone>,
    /// Over without the controller.
    finished: Vec<IoDone>,
    writes_completed: u64,
    writes_flushed: u64,
    pool: Rc<SpdkPool>,
    geometry: Geometry,
    now: Instant,
    polls: u32,
    idle_polls: u32,
    age_checked: Instant,
    rejoin_at: Instant,
    /// Last, and so dropped last: the queue pair is one of its controller's.
    controller: Arc<Controller>,
}

impl SpdkQueue {
    pub(super) fn open(
        controller: Arc<Controller>,
        geometry: Geometry,
        pool_size: usize,
    ) -> Result<SpdkQueue, DeviceError> {
        let now = Instant::now();
        let mut queue = SpdkQueue {
            pair: None,
            completions: Completions::new(geometry.depth),
            flights: std::iter::repeat_with(|| None).take(geometry.depth as usize).collect(),
            free: (0..geometry.depth).rev().collect(),
            again: VecDeque::new(),
            is_unproven: true,
            held: Vec::new(),
            finished: Vec::new(),
            writes_completed: 0,
            writes_flushed: 0,
            pool: SpdkPool::new(pool_size),
            geometry,
            now,
            polls: 0,
            idle_polls: 0,
            age_checked: now,
            rejoin_at: now,
            controller,
        };
        let tries = if queue.controller.shared.is_fabrics { OPEN_TRIES_FABRICS } else { 1 };
        for _ in 0..tries {
            if queue.join(queue.controller.shared.state()) {
                return Ok(queue);
            }
        }
        let shared = &queue.controller.shared;
        let cause = match shared.state().phase {
            Phase::Ready => {
                "the controller gives no I/O queue: it has none left (use fewer cores), or it does not answer"
            }
            Phase::Disabling | Phase::Quiescing => "the controller is being reset; try again",
            Phase::Gone => "the controller has gone",
        };
        Err(DeviceError::Unusable { name: shared.name.clone(), cause: cause.to_owned() })
    }

    /// Makes a queue pair. `false` when that can't be now.
    fn join(&mut self, state: State) -> bool {
        let shared = &self.controller.shared;
        if state.phase != Phase::Ready || !shared.attach(state.generation) {
            return false;
        }
        let size = self.geometry.depth + 1;
        // SAFETY: the controller lives and is not being reset, which `attach` has made sure of until `detach`.
        let raw = unsafe { basalt_queue_pair_alloc(shared.raw(), size, size * REQUESTS_PER_COMMAND) };
        match (NonNull::new(raw), shared.namespace()) {
            (Some(raw), Some(namespace)) => {
                self.pair = Some(Pair { raw, namespace, generation: state.generation });
                self.is_unproven = true;
                true
            }
            (raw, _) => {
                if let Some(raw) = raw {
                    // SAFETY: it was made just now and has no command.
                    unsafe { spdk_nvme_ctrlr_free_io_qpair(raw.as_ptr()) };
                }
                shared.detach();
                false
            }
        }
    }

    /// After a reset: makes a queue pair again, now and then. What waited for it is sent by the next poll.
    fn rejoin(&mut self, state: State) {
        self.now = Instant::now();
        if self.now < self.rejoin_at {
            return;
        }
        self.rejoin_at = self.now + REJOIN_INTERVAL;
        if !self.join(state) {
            // A target that died again meanwhile is found by the admin queue too, but only at the next keep-alive.
            self.controller.shared.request_reset(state.generation, "no queue pair can be made");
        }
    }

    /// Sends what waits, as far as there is room.
    fn send_again(&mut self) {
        while let Some(mut flight) = self.again.pop_front() {
            // Its time begins anew, or the reset that it waited for would be followed by another.
            flight.since = self.now;
            if let Err((flight, _)) = self.send(flight) {
                self.again.push_front(flight);
                return;
            }
        }
    }

    /// Gives a command to SPDK. Hands it back when SPDK does not take it.
    fn send(&mut self, flight: Flight) -> Result<(), (Flight, Errno)> {
        let Some(pair) = self.pair else { return Err((flight, Errno::NXIO)) };
        let Some(slot) = self.free.pop() else { return Err((flight, Errno::NOMEM)) };
        let context = self.completions.context(slot);
        let (block_size, flight) =
            (u64::from(self.geometry.partition_block_size), self.flights[slot as usize].insert(flight));
        let (namespace, raw, done) = (pair.namespace.as_ptr(), pair.raw.as_ptr(), Some(on_completion as _));
        let code = match &mut flight.op {
            IoOp::Read { offset, buf } => {
                let (block, count) = (*offset / block_size, (buf.len() as u64 / block_size) as u32);
                // SAFETY: the buffer is DMA memory of that many blocks, and the flight keeps it until the completion; the
                // range was checked to be on the device. The queue pair is this thread's, the slot this command's.
                unsafe {
                    spdk_nvme_ns_cmd_read(
                        namespace,
                        raw,
                        buf.as_mut_ptr().cast(),
                        block,
                        count,
                        done,
                        context,
                        0,
                    )
                }
            }
            IoOp::Write { offset, buf, fua } => {
                let (block, count) = (*offset / block_size, (buf.len() as u64 / block_size) as u32);
                let flags = if *fua { SPDK_NVME_IO_FLAGS_FORCE_UNIT_ACCESS } else { 0 };
                // SAFETY: as for a read.
                unsafe {
                    spdk_nvme_ns_cmd_write(
                        namespace,
                        raw,
                        buf.as_mut_ptr().cast(),
                        block,
                        count,
                        done,
                        context,
                        flags,
                    )
                }
            }
            // SAFETY: the queue pair is this thread's, the slot this command's.
            IoOp::Flush => unsafe { spdk_nvme_ns_cmd_flush(namespace, raw, done, context) },
            IoOp::Deallocate { offset, size } => {
                let (block, count) = (*offset / block_size, (*size / block_size) as u32);
                // SAFETY: as above; SPDK copies the range.
                unsafe { basalt_deallocate(namespace, raw, block, count, done, context) }
            }
        };
        if code == 0 {
            return Ok(());
        }
        self.free.push(slot);
        match self.flights[slot as usize].take() {
            Some(flight) => Err((flight, Errno::from_raw_os_error(code.wrapping_neg()))),
            None => Ok(()),
        }
    }

    /// Polls the queue pair.
    fn process(&mut self, pair: Pair, done: &mut Vec<IoDone>) {
        // SAFETY: the queue pair is this thread's and lives.
        let code =
            unsafe { spdk_nvme_qpair_process_completions(pair.raw.as_ptr(), COMPLETIONS_PER_POLL_MAX) };
        if code < 0 {
            self.collect(done, true);
            let shared = &self.controller.shared;
            shared.request_reset(pair.generation, "a queue pair has failed");
            // A drive's queue pair is kept until the drive is disabled, and then freed without asking the drive.
            if shared.is_fabrics {
                self.leave(pair, done);
            }
            return;
        }
        self.collect(done, false);
        if self.is_unproven && code > 0 {
            self.is_unproven = false;
            self.controller.shared.has_worked.store(true, Ordering::Release);
        }
        self.send_again();
        self.check_age(pair);
    }

    /// Settles what has completed. With `leaving`, what was aborted waits for the reset.
    fn collect(&mut self, done: &mut Vec<IoDone>, leaving: bool) {
        let mut at = 0;
        while let Some((slot, status)) = self.completions.ready(at) {
            at += 1;
            if let Some(flight) = self.flights[slot as usize].take() {
                self.free.push(slot);
                self.finish(flight, status, done, leaving);
            }
        }
        self.completions.clear();
    }

    fn finish(&mut self, mut flight: Flight, status: Status, done: &mut Vec<IoDone>, leaving: bool) {
        let is_held = leaving && status.is_aborted();
        let is_worth_more = match flight.op {
            IoOp::Flush => is_held && !self.controller.shared.is_fabrics,
            IoOp::Read { .. } => is_held || status.is_worth_another_read(),
            IoOp::Write { .. } | IoOp::Deallocate { .. } => false,
        };
        if is_worth_more && flight.retries < RETRY_COUNT_MAX {
            flight.retries += 1;
            self.again.push_back(flight);
            return;
        }
        let outcome = self.outcome(&flight, status);
        let Flight { token, op, .. } = flight;
        let buf = match op {
            IoOp::Read { buf, .. } | IoOp::Write { buf, .. } => Some(buf),
            IoOp::Flush | IoOp::Deallocate { .. } => None,
        };
        let list = if is_held { &mut self.held } else { done };
        list.push(IoDone { token, buf, status: outcome });
    }

    fn outcome(&mut self, flight: &Flight, status: Status) -> Result<(), IoError> {
        let (offset, size) = check::range(&flight.op).unwrap_or_default();
        let poison = &self.controller.shared.poison;
        let command = match flight.op {
            IoOp::Read { .. } => Command::Read,
            IoOp::Write { .. } => {
                self.writes_completed += u64::from(status.is_success());
                Command::Write
            }
            IoOp::Flush if status.is_success() => {
                self.writes_flushed = self.writes_flushed.max(flight.covers);
                // Another one may have failed meanwhile, and taken with it what this one was to make durable.
                return if poison.is_set() { Err(FlushPoison::error()) } else { Ok(()) };
            }
            IoOp::Flush => {
                poison.set();
                Command::Flush
            }
            IoOp::Deallocate { .. } => Command::Deallocate,
        };
        if status.is_success() { Ok(()) } else { Err(status.error(command, offset, size)) }
    }

    /// Gives the queue pair back, and keeps what was in flight until the reset.
    fn leave(&mut self, pair: Pair, done: &mut Vec<IoDone>) {
        self.pair = None;
        // SAFETY: the queue pair is this thread's, no poll of it is under way, and it is freed once. SPDK completes what
        // was in flight as aborted.
        unsafe { spdk_nvme_ctrlr_free_io_qpair(pair.raw.as_ptr()) };
        self.collect(done, true);
        for slot in 0..self.geometry.depth {
            // Nothing is left; if it were, nobody would ever call back for it.
            if let Some(flight) = self.flights[slot as usize].take() {
                self.free.push(slot);
                self.finish(flight, Status::ABORTED, done, true);
            }
        }
        let shared = &self.controller.shared;
        // A drive's cache outlives a reset by its host; that of a target may have died with it, or a drive by itself.
        let is_lost = shared.cache_lost.load(Ordering::Acquire)
            || (shared.is_fabrics && shared.state().phase != Phase::Ready);
        if is_lost && self.geometry.volatile_cache && self.writes_completed > self.writes_flushed {
            shared.poison.set();
        }
        self.rejoin_at = self.now;
        shared.detach();
    }

    /// Hands out what was held, now that the controller can't touch it any more.
    fn release_held(&mut self, phase: Phase, done: &mut Vec<IoDone>) {
        let shared = &self.controller.shared;
        if phase == Phase::Gone {
            let lost = self.again.drain(..).map(|Flight { token, op, .. }| {
                let (IoOp::Read { buf, .. } | IoOp::Write { buf, .. }) = op else {
                    return IoDone { token, buf: None, status: Err(IoError::Gone) };
                };
                IoDone { token, buf: Some(buf), status: Err(IoError::Gone) }
            });
            self.held.extend(lost);
            // A drive that is there but could not be reset may still do what it was told: its buffers are never reused.
            let is_loose = !shared.is_fabrics && !shared.removed.load(Ordering::Acquire);
            for held in self.held.iter_mut().filter(|_| is_loose) {
                if let Some(buf) = &mut held.buf {
                    let empty = DmaBuf::from_heap(buf.len());
                    Box::leak(Box::new(std::mem::replace(buf, empty)));
                }
            }
        }
        done.append(&mut self.held);
    }

    /// Asks for a reset when a command is still there although it should have been aborted.
    fn check_age(&mut self, pair: Pair) {
        self.polls = self.polls.wrapping_add(1);
        if !self.polls.is_multiple_of(POLLS_PER_CLOCK) {
            return;
        }
        self.now = Instant::now();
        if self.now.duration_since(self.age_checked) < AGE_INTERVAL {
            return;
        }
        self.age_checked = self.now;
        let shared = &self.controller.shared;
        let limit = shared.timeouts.command + shared.timeouts.abort;
        if self.flights.iter().flatten().any(|flight| self.now.duration_since(flight.since) > limit) {
            shared.request_reset(pair.generation, "a command neither completes nor can be aborted");
        }
    }

    /// Has SPDK end the next `count` commands of a kind with a status, for tests.
    #[cfg(test)]
    pub(super) fn inject_error(&mut self, opcode: u8, count: u32, kind: u8, code: u8) {
        self.inject(opcode, false, 0, count, kind, code);
    }

    /// Has SPDK keep the next command of a kind for a minute, for tests.
    #[cfg(test)]
    pub(super) fn inject_stall(&mut self, opcode: u8) {
        self.inject(opcode, true, 60_000_000, 1, 0, 8);
    }

    #[cfg(test)]
    fn inject(&mut self, opcode: u8, withheld: bool, delay_us: u64, count: u32, kind: u8, code: u8) {
        let pair = self.pair.expect("a queue pair to inject into");
        let controller = self.controller.shared.raw();
        // SAFETY: controller and queue pair live, and the queue pair is this thread's.
        let result = unsafe {
            spdk_nvme_qpair_add_cmd_error_injection(
                controller,
                pair.raw.as_ptr(),
                opcode,
                withheld,
                delay_us,
                count,
                kind,
                code,
            )
        };
        assert_eq!(result, 0);
    }

    fn on_controller(&self) -> usize {
        self.flights.len() - self.free.len()
    }
}

impl Device for SpdkQueue {
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
        if let IoOp::Read { offset, buf } | IoOp::Write { offset, buf, .. } = &io.op
            && !is_dma(buf)
        {
            let cause = "its buffer is not memory that this engine allocated";
            let error = IoError::Invalid { offset: *offset, size: buf.len() as u64, cause };
            return Err(check::refuse(io, error));
        }
        if let IoOp::Deallocate { offset, size } = io.op
            && size / u64::from(self.geometry.partition_block_size) > u64::from(u32::MAX)
        {
            let cause = "one command deallocates no more than 2^32 - 1 blocks";
            return Err(check::refuse(io, IoError::Invalid { offset, size, cause }));
        }
        let state = self.controller.shared.state();
        if state.phase == Phase::Gone {
            return Err(check::refuse(io, IoError::Gone));
        }
        if self.in_flight() >= self.geometry.depth as usize
            || self.pair.is_none()
            || state.phase != Phase::Ready
        {
            return Err(check::full(io));
        }
        let Io { token, op } = io;
        let immediate = match &op {
            IoOp::Flush if self.controller.shared.poison.is_set() => Some(Err(FlushPoison::error())),
            IoOp::Flush if !self.geometry.volatile_cache => Some(Ok(())),
            IoOp::Deallocate { .. } if self.geometry.deallocate == Deallocate::None => Some(Ok(())),
            _ => None,
        };
        if let Some(status) = immediate {
            self.finished.push(IoDone { token, buf: None, status });
            return Ok(());
        }
        if self.on_controller() == 0 {
            // The clock stood still while nothing was in flight.
            self.now = Instant::now();
        }
        let flight = Flight { token, op, since: self.now, retries: 0, covers: self.writes_completed };
        self.send(flight).map_err(|(Flight { token, op, .. }, errno)| {
            let io = Io { token, op };
            match errno {
                Errno::NOMEM => check::full(io),
                Errno::NXIO => {
                    // The next poll finds the queue pair failed, and what comes of it.
                    self.controller.shared.request_reset(state.generation, "a queue pair takes no commands");
                    check::full(io)
                }
                _ => {
                    let (offset, size) = check::range(&io.op).unwrap_or_default();
                    let error = IoError::Invalid { offset, size, cause: "SPDK refuses the command" };
                    check::refuse(io, error)
                }
            }
        })
    }

    fn poll(&mut self, done: &mut Vec<IoDone>) -> usize {
        let before = done.len();
        done.append(&mut self.finished);
        let state = self.controller.shared.state();
        match (self.pair, state.phase) {
            (Some(pair), Phase::Ready) if pair.generation == state.generation => self.process(pair, done),
            (_, Phase::Disabling) | (None, Phase::Quiescing) => {}
            (Some(pair), _) => self.leave(pair, done),
            (None, Phase::Ready) => {
                self.release_held(state.phase, done);
                self.rejoin(state);
            }
            (None, Phase::Gone) => self.release_held(state.phase, done),
        }
        self.idle_polls = if done.len() > before { 0 } else { self.idle_polls.saturating_add(1) };
        if self.idle_polls > IDLE_POLLS_MAX && self.on_controller() > 0 && self.controller.shared.is_fabrics {
            std::thread::yield_now();
        }
        done.len() - before
    }

    fn in_flight(&self) -> usize {
        self.on_controller() + self.again.len() + self.held.len() + self.finished.len()
    }

    /// There is none: SPDK is polled. Who sleeps must look at the device again after a while.
    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl Drop for SpdkQueue {
    fn drop(&mut self) {
        let mut done = Vec::new();
        let deadline = Instant::now() + DROP_WAIT;
        while self.pair.is_some() && self.on_controller() > 0 && Instant::now() < deadline {
            self.poll(&mut done);
        }
        if let Some(pair) = self.pair {
            self.leave(pair, &mut done);
        }
        // A reset may be due that nobody waits for here: until it, a drive may still write to what it was given.
        if self.controller.shared.state().phase != Phase::Ready && !self.controller.shared.is_fabrics {
            Box::leak(Box::new((std::mem::take(&mut self.held), std::mem::take(&mut self.again))));
        }
    }
}

impl std::fmt::Debug for SpdkQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SpdkQueue").field("in_flight", &self.in_flight()).finish_non_exhaustive()
    }
}
