//! The engine's side of a queue pair: commands wait here for their turn, a buffer and a place in flight. Whose turn it is, the
//! scheduler says.
//!
//! Invariants:
//! - A command leaves the queue only into the device; one that is refused stays at its place.
//! - Nothing is dropped: every command ends as one `Finished`.

pub mod cost;
mod scheduler;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use slab::Slab;

use crate::device::{Device, DmaBuf, Io, IoDone, IoError, IoOp, Refusal, Token};
use cost::{Bounds, DeviceProfile};
pub use scheduler::{Activity, Class};
use scheduler::{Scheduler, Ticket};

/// In which order commands go to the device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum IoPolicy {
    /// Each class has its share, commits a deadline, and the background a bound.
    #[default]
    Shares,
    /// In the order in which they came: to compare with.
    Fifo,
}

impl FromStr for IoPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<IoPolicy, String> {
        match text {
            "shares" => Ok(IoPolicy::Shares),
            "fifo" => Ok(IoPolicy::Fifo),
            _ => Err(format!("'{text}' is not one of shares, fifo")),
        }
    }
}

impl fmt::Display for IoPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            IoPolicy::Shares => "shares",
            IoPolicy::Fifo => "fifo",
        })
    }
}

/// How an engine uses its device.
#[derive(Debug, Clone)]
pub struct IoSettings {
    /// The order of commands.
    pub policy: IoPolicy,
    /// What the device can do.
    pub profile: DeviceProfile,
    /// Engines that use it, each through a queue of its own.
    pub queue_count: u32,
    /// When clients of any of them last used it.
    pub activity: Arc<Activity>,
}

impl Default for IoSettings {
    /// One engine on a device of which nothing is known.
    fn default() -> IoSettings {
        IoSettings {
            policy: IoPolicy::default(),
            profile: cost::ASSUMED,
            queue_count: 1,
            activity: Arc::default(),
        }
    }
}

/// What became of the commands of one class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct ClassStats {
    /// Commands that the device took.
    pub commands: u64,
    /// Bytes that they moved.
    pub bytes: u64,
    /// Commands that wait for their turn now.
    pub waiting: u64,
    /// The longest that one has waited for its turn, in microseconds.
    pub wait_us_max: u64,
}

/// What the scheduler of one queue goes by: derived from a device's profile, for the part of the device that is this queue's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct IoBounds {
    /// Nanoseconds of device time that a read of 4 KiB is taken to cost.
    pub read_ns: u64,
    /// The same of a write.
    pub write_ns: u64,
    /// Microseconds of device time that the background may have in flight beside clients.
    pub background_us: u64,
    /// Microseconds that a write of a group waits before it goes first.
    pub commit_deadline_us: u64,
    /// Bytes of the longest read of the background.
    pub read_piece_size: u64,
    /// Bytes of its longest write.
    pub write_piece_size: u64,
    /// Commands in flight, at most; the device may take fewer.
    pub depth: u64,
}

/// What a command was for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A piece of a read job.
    Read {
        /// The job.
        job: usize,
        /// Bytes from the job's start to the piece.
        at: usize,
    },
    /// A piece of the group's writes.
    Write {
        /// The frame that it belongs to, among those of the group.
        frame: usize,
    },
    /// The group's flush.
    Flush,
    /// A piece of a checkpoint.
    Checkpoint,
    /// A piece of an extent that is being collected.
    Collect,
    /// A piece of a unit of survivors.
    Survivors {
        /// The shard, among those of the engine.
        shard: usize,
    },
    /// A piece of an extent that is read again.
    Scrub,
    /// The deallocation of an extent that is free again.
    Trim {
        /// The shard that it was of, among those of the engine.
        shard: usize,
        /// The extent.
        extent: u32,
    },
}

impl Purpose {
    /// Whose command it is. Reads of records are clients', unless it is said otherwise.
    fn class(self) -> Class {
        match self {
            Purpose::Read { .. } => Class::Read,
            Purpose::Write { .. } | Purpose::Flush => Class::Commit,
            Purpose::Checkpoint => Class::Checkpoint,
            Purpose::Collect | Purpose::Survivors { .. } | Purpose::Trim { .. } => Class::Collect,
            Purpose::Scrub => Class::Scrub,
        }
    }
}

enum Command {
    Read { offset: u64, size: usize },
    Write { offset: u64, data: Bytes },
    Flush,
    Deallocate { offset: u64, size: u64 },
}

/// A command that has ended.
pub(super) struct Finished {
    pub(super) purpose: Purpose,
    pub(super) buf: Option<DmaBuf>,
    pub(super) status: Result<(), IoError>,
}

/// Commands on their way to the device and back.
pub(super) struct IoQueue<D> {
    device: D,
    in_flight: Slab<(Purpose, Ticket)>,
    scheduler: Scheduler<(Purpose, Command)>,
    done: Vec<IoDone>,
    failed: Vec<Finished>,
    transfer_size_max: usize,
    /// Bytes handed to the device as writes.
    pub(super) bytes_written: u64,
    /// Bytes read from the device.
    pub(super) bytes_read: u64,
    /// Flushes sent.
    pub(super) flush_count: u64,
}

impl<D: Device> IoQueue<D> {
    pub(super) fn new(device: D) -> IoQueue<D> {
        let geometry = device.geometry();
        // Whole log blocks, whatever the device's own block is; a power of two keeps pieces aligned to it.
        let transfer_size_max = (geometry.transfer_size_max as usize).clamp(4096, 1 << 20);
        let transfer_size_max = 1 << transfer_size_max.ilog2();
        IoQueue {
            device,
            in_flight: Slab::new(),
            scheduler: scheduler_of(&IoSettings::default()),
            done: Vec::new(),
            failed: Vec::new(),
            transfer_size_max,
            bytes_written: 0,
            bytes_read: 0,
            flush_count: 0,
        }
    }

    /// Changes the order of commands. Before the first of them.
    pub(super) fn set_settings(&mut self, settings: &IoSettings) {
        assert!(self.is_idle(), "the order of commands that are under way does not change");
        self.scheduler = scheduler_of(settings);
    }

    pub(super) fn device(&self) -> &D {
        &self.device
    }

    /// Bytes of the longest read of a class: the background's are short, so that nobody stands behind one for long.
    pub(super) fn read_size_max(&self, class: Class) -> usize {
        self.command_size_max(class, self.scheduler.bounds().read_piece_size)
    }

    /// The same of writes.
    pub(super) fn write_size_max(&self, class: Class) -> usize {
        self.command_size_max(class, self.scheduler.bounds().write_piece_size)
    }

    fn command_size_max(&self, class: Class, piece_size: usize) -> usize {
        if self.scheduler.is_bounded(class) {
            // No piece is less than a block, however long those are.
            self.transfer_size_max.min(piece_size.max(self.device.geometry().block_size as usize))
        } else {
            self.transfer_size_max
        }
    }

    /// Figures of each class, in the order of [`Class::ALL`].
    pub(super) fn stats(&self) -> [ClassStats; 5] {
        self.scheduler.stats()
    }

    /// What the order of commands goes by.
    pub(super) fn bounds(&self) -> IoBounds {
        let bounds = self.scheduler.bounds();
        IoBounds {
            read_ns: bounds.read_ns(cost::SMALL_SIZE),
            write_ns: bounds.write_ns(cost::SMALL_SIZE),
            background_us: bounds.background_ns / 1_000,
            commit_deadline_us: bounds.commit_deadline_us,
            read_piece_size: bounds.read_piece_size as u64,
            write_piece_size: bounds.write_piece_size as u64,
            depth: bounds.depth as u64,
        }
    }

    /// Says what time it is, in microseconds on the monotonic clock: for commands that are queued from here on, too.
    pub(super) fn set_now(&mut self, now_us: u64) {
        self.scheduler.set_now(now_us);
    }

    /// Says whether writers wait for what garbage collection frees.
    pub(super) fn set_pressing(&mut self, is_pressing: bool) {
        self.scheduler.set_pressing(is_pressing);
    }

    pub(super) fn read(&mut self, purpose: Purpose, offset: u64, size: usize) {
        self.read_as(purpose.class(), purpose, offset, size);
    }

    /// The same for another class than the purpose says.
    pub(super) fn read_as(&mut self, class: Class, purpose: Purpose, offset: u64, size: usize) {
        let cost_ns = self.scheduler.bounds().read_ns(size as u64);
        let ticket = Ticket { class, cost_ns, size: size as u32, is_urgent: false, is_own: false };
        self.scheduler.push(ticket, (purpose, Command::Read { offset, size }));
    }

    /// Says that a client waits for a write that no command is there for yet.
    pub(super) fn note_client(&self) {
        self.scheduler.note_client();
    }

    /// Writes a frame's `data` in pieces that the device takes, and returns how many there are. The group `is_own` when no client
    /// wrote anything in it.
    pub(super) fn write(&mut self, frame: usize, offset: u64, data: &Bytes, is_own: bool) -> usize {
        self.write_pieces(Purpose::Write { frame }, offset, data, is_own)
    }

    /// Writes `data` in pieces that the device takes, and returns how many there are.
    pub(super) fn write_for(&mut self, purpose: Purpose, offset: u64, data: &Bytes) -> usize {
        self.write_pieces(purpose, offset, data, false)
    }

    fn write_pieces(&mut self, purpose: Purpose, offset: u64, data: &Bytes, is_own: bool) -> usize {
        let class = purpose.class();
        let piece_size = self.write_size_max(class);
        let mut at = 0;
        let mut pieces = 0;
        while at < data.len() {
            let end = (at + piece_size).min(data.len());
            let size = end - at;
            let cost_ns = self.scheduler.bounds().write_ns(size as u64);
            let ticket = Ticket { class, cost_ns, size: size as u32, is_urgent: false, is_own };
            let piece = Command::Write { offset: offset + at as u64, data: data.slice(at..end) };
            self.scheduler.push(ticket, (purpose, piece));
            pieces += 1;
            at = end;
        }
        pieces
    }

    /// Flushes, for a group that `is_own` or not.
    pub(super) fn flush(&mut self, is_own: bool) {
        self.flush_count += 1;
        let cost_ns = self.scheduler.bounds().flush_ns();
        // Everybody in the group waits for it, and it moves nothing.
        let ticket = Ticket { class: Class::Commit, cost_ns, size: 0, is_urgent: true, is_own };
        self.scheduler.push(ticket, (Purpose::Flush, Command::Flush));
    }

    pub(super) fn deallocate(&mut self, purpose: Purpose, offset: u64, size: u64) {
        let cost_ns = self.scheduler.bounds().deallocate_ns();
        let ticket = Ticket { class: purpose.class(), cost_ns, size: 0, is_urgent: false, is_own: false };
        self.scheduler.push(ticket, (purpose, Command::Deallocate { offset, size }));
    }

    /// Whether anything is waiting or in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.scheduler.is_empty() && self.in_flight.is_empty() && self.failed.is_empty()
    }

    /// Hands waiting commands to the device until it is full or out of buffers, or they have to wait.
    pub(super) fn submit(&mut self) {
        while let Some(pick) = self.scheduler.next() {
            let Some((ticket, (purpose, command))) = self.scheduler.front(pick) else { return };
            let purpose = *purpose;
            let op = match command {
                Command::Read { offset, size } => {
                    let Some(buf) = self.device.allocate(*size) else { return };
                    IoOp::Read { offset: *offset, buf }
                }
                Command::Write { offset, data } => {
                    let Some(mut buf) = self.device.allocate(data.len()) else { return };
                    buf.copy_from_slice(data);
                    IoOp::Write { offset: *offset, buf, fua: false }
                }
                Command::Flush => IoOp::Flush,
                Command::Deallocate { offset, size } => IoOp::Deallocate { offset: *offset, size: *size },
            };
            let token = Token(self.in_flight.insert((purpose, ticket)) as u64);
            match self.device.submit(Io { token, op }) {
                Ok(()) => match self.scheduler.take(pick) {
                    Some((_, Command::Read { size, .. })) => self.bytes_read += size as u64,
                    Some((_, Command::Write { data, .. })) => self.bytes_written += data.len() as u64,
                    _ => {}
                },
                Err(rejected) => {
                    self.in_flight.remove(rejected.io.token.0 as usize);
                    let Refusal::Failed(error) = rejected.why else { return };
                    self.scheduler.refuse(pick);
                    self.failed.push(Finished { purpose, buf: None, status: Err(error) });
                }
            }
        }
    }

    /// Rings the doorbell and collects what has ended.
    pub(super) fn poll(&mut self, out: &mut Vec<Finished>) {
        self.submit();
        out.append(&mut self.failed);
        let mut done = std::mem::take(&mut self.done);
        self.device.poll(&mut done);
        for IoDone { token, buf, status } in done.drain(..) {
            let (purpose, ticket) = self.in_flight.remove(token.0 as usize);
            self.scheduler.done(ticket);
            out.push(Finished { purpose, buf, status });
        }
        self.done = done;
        // Completions gave buffers and places back: what waited for them need not wait for the next loop.
        if !self.scheduler.is_empty() {
            self.submit();
        }
    }
}

fn scheduler_of<T>(settings: &IoSettings) -> Scheduler<T> {
    let bounds = Bounds::new(&settings.profile, settings.queue_count);
    Scheduler::new(settings.policy, bounds, Arc::clone(&settings.activity))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::sim::{Fault, FaultKind, FaultOp, SimConfig, SimDevice, SimDisk};

    fn ended(queue: &mut IoQueue<SimDevice>) -> Finished {
        let mut done = Vec::new();
        for _ in 0..1_000 {
            queue.poll(&mut done);
            if let Some(one) = done.pop() {
                return one;
            }
        }
        panic!("it never ends");
    }

    #[test]
    fn commands_count_once_the_device_has_taken_them() {
        let disk = SimDisk::new(SimConfig::default(), 1);
        let fault = |nth, kind| Fault { nth, op: FaultOp::Read, kind, sticky: false };
        let mut queue = IoQueue::new(disk.open_queue());
        // Refused twice as there is no room, then taken.
        disk.inject(fault(0, FaultKind::Full));
        disk.inject(fault(1, FaultKind::Full));
        queue.read(Purpose::Scrub, 0, 8192);
        queue.submit();
        assert_eq!(queue.stats()[Class::Scrub as usize], ClassStats { waiting: 1, ..ClassStats::default() });
        assert!(ended(&mut queue).status.is_ok());
        let taken = ClassStats { commands: 1, bytes: 8192, ..ClassStats::default() };
        assert_eq!((queue.stats()[Class::Scrub as usize], queue.bytes_read), (taken, 8192));
        assert_eq!(disk.faults_struck(), 2);
        // Refused for good: it ends, and is no command that the device had.
        disk.inject(fault(0, FaultKind::Gone));
        queue.read(Purpose::Scrub, 0, 4096);
        assert_eq!(ended(&mut queue).status.err(), Some(IoError::Gone));
        assert_eq!((queue.stats()[Class::Scrub as usize], queue.bytes_read), (taken, 8192));
        assert!(queue.is_idle());
    }

    #[test]
    fn pieces_of_the_background_are_whole_blocks() {
        let config = SimConfig { block_size: 16 << 10, ..SimConfig::default() };
        let mut queue = IoQueue::new(SimDisk::new(config, 1).open_queue());
        let profile = DeviceProfile { read_iops: 8_000.0, read_bytes_per_second: 4e7, ..cost::ASSUMED };
        queue.set_settings(&IoSettings { profile, ..IoSettings::default() });
        assert!(queue.bounds().read_piece_size < 16 << 10, "{:?}", queue.bounds());
        assert_eq!(queue.read_size_max(Class::Scrub), 16 << 10);
        assert_eq!(queue.write_size_max(Class::Collect), 128 << 10);
        assert!(queue.read_size_max(Class::Read) > 128 << 10);
        queue.set_pressing(true);
        assert!(queue.read_size_max(Class::Collect) > 128 << 10);
    }
}
