//! The engine: shards, each an index and a log on the device, driven by the reactor that owns them.
//!
//! Operations come in through [`Engine::submit`] and go out as answers from [`Engine::poll`]. An operation that has to
//! wait (for a key, for a read, for room in the log) is kept in a slab and resumed by what it waits for; most never are.
//!
//! Invariants:
//! - Nothing here names sockets, threads, clocks, randomness or SPDK: time and seeds come in as arguments.
//! - An operation is answered once, and a write only when its durability mode allows it.
//! - In mode `always` an answer leaves only when every frame that it rests on is durable, reads included: nobody sees
//!   what a crash could take back.
//! - After a failed write or flush nothing more is accepted or acknowledged until a restart, and the keys concerned
//!   answer that their outcome is unknown.

pub mod action;
pub mod allocator;
mod arrivals;
mod at_once;
pub mod batch;
mod cache;
pub mod check;
pub mod checkpoint;
pub mod clear;
mod commit;
pub mod device_format;
pub mod dump;
pub mod durability;
mod extents;
pub mod gc;
pub mod index;
pub mod inspect;
pub mod io_queue;
mod log;
pub mod long;
pub mod memory;
pub mod op;
mod operations;
pub mod range;
mod reads;
pub mod recovery;
pub mod salvage;
pub mod scrub;
mod shard;
mod survivors;

use std::collections::VecDeque;
use std::sync::Arc;

use slab::Slab;

use crate::device::Device;
use crate::format::superblock::Superblock;
use crate::limits::{CHUNK_SIZE_MAX, ENGINE_OPERATIONS_MAX, VALUE_DEVICE_DIVISOR, VALUE_SIZE_MAX};

use allocator::Allocator;
use arrivals::Arrival;
use at_once::{Tried, Worth};
use cache::RecordCache;
use checkpoint::{CheckpointStats, Checkpointer};
use commit::Committer;
use durability::Durability;
use gc::{Collector, GcStats};
use io_queue::{ClassStats, Finished, IoBounds, IoQueue, IoSettings};
use memory::MemoryBudget;
use op::{Answer, Clock, HoldId, OpError, ShardId, ShardOp};
use operations::{BatchHold, LongRead, Operation};
use reads::ReadJob;
use scrub::{ScrubStats, Scrubber};
use shard::Shard;
pub use shard::ShardState;

/// The longest value that a device so formatted keeps, in bytes.
pub fn value_size_max(superblock: &Superblock) -> u64 {
    let area = u64::from(superblock.layout.extent_count) * superblock.layout.extent_size;
    (area / VALUE_DEVICE_DIVISOR).min(VALUE_SIZE_MAX as u64)
}

/// Figures of one engine, each counted where it happens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct EngineStats {
    /// Keys in its shards.
    pub keys: u64,
    /// Bytes of the newest record of each key.
    pub live_bytes: u64,
    /// Bytes written to the device, padding and headers included.
    pub bytes_written: u64,
    /// Bytes read from the device.
    pub bytes_read: u64,
    /// What became of the commands of each class, in the order of [`io_queue::Class::ALL`].
    pub io: [ClassStats; 5],
    /// Bytes of keys and values that writes brought.
    pub user_bytes: u64,
    /// Flushes sent to the device.
    pub flushes: u64,
    /// Groups committed.
    pub groups: u64,
    /// Records appended.
    pub records: u64,
    /// Reads that found a damaged record.
    pub damaged_reads: u64,
    /// Extents that were left because a write failed in them.
    pub extents_left: u64,
    /// What garbage collection did.
    pub gc: GcStats,
    /// What became of checkpoints.
    pub checkpoints: CheckpointStats,
    /// What the scrubber found.
    pub scrub: ScrubStats,
    /// Reads that the cache answered.
    pub cache_hits: u64,
    /// Reads that it could not answer.
    pub cache_misses: u64,
}

/// How often operations that wait for room are tried again.
const STALLED_RETRY_US: u64 = 200;

/// The shards of one reactor on one queue pair.
pub struct Engine<D> {
    superblock: Arc<Superblock>,
    allocator: Arc<Allocator>,
    queue: IoQueue<D>,
    shards: Vec<Shard>,
    /// From a shard's number on the device to its place in `shards`.
    shard_at: Vec<Option<usize>>,
    arrivals: Vec<Arrival>,
    /// Direct requests that are being tried; kept for its memory.
    tried: Vec<Tried>,
    worth: Worth,
    operations: Slab<Operation>,
    batch_holds: Slab<BatchHold>,
    reads: Slab<ReadJob>,
    /// Reads that wait for others to end, in order.
    reads_waiting: VecDeque<usize>,
    /// Bytes of the reads that were started.
    reads_size: usize,
    /// Long values that are being read.
    long_reads: Slab<LongRead>,
    /// Those that wait for others to end, in order.
    long_reads_waiting: VecDeque<usize>,
    /// Bytes that those that were started come to.
    long_reads_size: u64,
    /// Bytes of values that wait for room in the log.
    stalled_size: usize,
    cache: RecordCache,
    memory: MemoryBudget,
    /// Bytes of values that batches under way hold, or will when they are read.
    batch_values_size: u64,
    committer: Committer,
    collector: Collector,
    checkpointer: Checkpointer,
    scrubber: Scrubber,
    /// When operations that wait for room were last tried again.
    stalled_tried_us: u64,
    value_size_max: u64,
    /// The longest chunk, and the longest value that is one record.
    chunk_size: u64,
    answers: Vec<(u64, Answer)>,
    /// Holds whose `Locked` answer never left.
    abandoned: Vec<HoldId>,
    finished: Vec<Finished>,
    stopping: bool,
    /// When expired keys were last looked for, and whether some were left.
    reaped_ms: u64,
    reaps_more: bool,
    stats: EngineStats,
}

impl<D: Device> Engine<D> {
    /// An engine over shards that recovery found.
    pub fn new(
        superblock: Arc<Superblock>,
        allocator: Arc<Allocator>,
        device: D,
        states: Vec<ShardState>,
        durability: Durability,
    ) -> Engine<D> {
        let apart = Self::has_room_for_survivors(&superblock);
        let mut shard_at = vec![None; usize::from(superblock.shard_count)];
        let mut shards = Vec::with_capacity(states.len());
        for state in states {
            shard_at[usize::from(state.id.0)] = Some(shards.len());
            shards.push(Shard::new(state, Arc::clone(&superblock)));
        }
        Engine {
            value_size_max: value_size_max(&superblock),
            chunk_size: CHUNK_SIZE_MAX as u64,
            long_reads: Slab::new(),
            long_reads_waiting: VecDeque::new(),
            long_reads_size: 0,
            superblock,
            allocator,
            queue: IoQueue::new(device),
            shards,
            shard_at,
            arrivals: Vec::new(),
            tried: Vec::new(),
            worth: Worth::default(),
            operations: Slab::new(),
            batch_holds: Slab::new(),
            reads: Slab::new(),
            reads_waiting: VecDeque::new(),
            reads_size: 0,
            stalled_size: 0,
            cache: RecordCache::default(),
            memory: MemoryBudget::default(),
            batch_values_size: 0,
            committer: Committer::new(durability),
            collector: Collector::new(apart),
            checkpointer: Checkpointer::default(),
            scrubber: Scrubber::default(),
            stalled_tried_us: 0,
            answers: Vec::new(),
            abandoned: Vec::new(),
            finished: Vec::new(),
            stopping: false,
            reaped_ms: 0,
            reaps_more: true,
            stats: EngineStats::default(),
        }
    }

    /// Changes how it uses its device. Before anything else is done with it.
    pub fn set_io(&mut self, settings: &IoSettings) {
        self.queue.set_settings(settings);
    }

    /// What the order of its commands to the device goes by.
    pub fn io_bounds(&self) -> IoBounds {
        self.queue.bounds()
    }

    /// Makes what recovery found durable and voids what follows it, before anything is served. Waits for the device.
    ///
    /// What recovery read may sit in a volatile cache (after a kill there was no power cut), so it is flushed before any
    /// answer can rest on it; and a frame of this start is put behind the last one of each shard that did not stop
    /// cleanly, so that no leftover of a torn write can ever be taken for its successor.
    pub fn settle(&mut self, clock: Clock) -> Result<(), OpError> {
        for at in 0..self.shards.len() {
            if !self.shards[at].clean {
                self.shards[at].log.mark_start();
                self.void_units(at, clock);
            }
            // Parts that were decided elsewhere are decided here too from now on; the others' records may then go.
            for (batch, coordinator) in std::mem::take(&mut self.shards[at].copies_due) {
                self.settle_copy(at, batch, coordinator, clock);
            }
        }
        self.committer.force_flush();
        self.drain(clock)?;
        if self.shards.iter().all(|shard| shard.copies_due.is_empty()) {
            self.allocator.on_settled(self.shards.len() as u32);
        } else {
            tracing::warn!("no room for the commit records of earlier batches: no garbage is collected");
        }
        Ok(())
    }

    /// Logs a copy of a commit record, while nothing else goes on. It is due again when there is no room for it.
    fn settle_copy(&mut self, at: usize, batch: op::BatchId, coordinator: ShardId, clock: Clock) {
        let record = operations::commit_record(batch, coordinator, &[0, 0]);
        // Until all of them are logged nothing can be retired: where there is no other room, they have what is kept for that.
        let purposes = [allocator::Purpose::Reserve, allocator::Purpose::Retirement];
        for purpose in purposes.into_iter().flat_map(|purpose| [purpose; 2]) {
            match self.append(at, log::Draft { record, purpose, lazy: false }, clock) {
                Ok(_) => return,
                Err(operations::AppendError::Stall) => {
                    self.committer.force_flush();
                    if self.drain(clock).is_err() {
                        break;
                    }
                }
                Err(operations::AppendError::Failed(_)) => {}
            }
        }
        self.shards[at].copies_due.push((batch, coordinator));
    }

    /// Stops admitting operations, finishes what is there and marks every shard as cleanly stopped. Waits for the device.
    /// Answers that come up meanwhile go to `out`.
    pub fn stop(&mut self, clock: Clock, out: &mut Vec<(u64, Answer)>) -> Result<(), OpError> {
        self.stopping = true;
        self.committer.force_flush();
        let drained = self.drain(clock);
        out.append(&mut self.answers);
        drained?;
        // Only now is everything before it known to be durable, which is what the mark says.
        for shard in self
            .shards
            .iter_mut()
            .filter(|shard| !shard.clean || shard.log.last_frame() > shard.durable_frame)
        {
            shard.log.mark_clean_stop();
        }
        self.committer.force_flush();
        self.drain(clock)?;
        self.checkpoint_and_wait(clock);
        Ok(())
    }

    fn drain(&mut self, clock: Clock) -> Result<(), OpError> {
        loop {
            let progress = self.step(clock);
            if let Some(error) = self.committer.poisoned() {
                return Err(error);
            }
            let idle =
                self.queue.is_idle() && !self.committer.has_work(&self.shards) && self.reads.is_empty();
            let is_under_way = |shard: &Shard| shard.survivors.is_under_way();
            let idle = idle && self.long_reads.is_empty() && !self.shards.iter().any(is_under_way);
            if idle && self.shards.iter().all(|shard| shard.stalled.is_empty()) {
                return Ok(());
            }
            if self.shards.iter().any(|shard| shard.log.is_dirty()) {
                self.committer.force_flush();
            }
            if !progress {
                std::hint::spin_loop();
            }
        }
    }

    /// What the device is.
    pub fn device(&self) -> &D {
        self.queue.device()
    }

    /// The longest value that is accepted, in bytes.
    pub fn value_size_max(&self) -> u64 {
        self.value_size_max
    }

    /// Changes how long a chunk may be: for simulations, which have smaller disks.
    pub fn set_chunk_size(&mut self, size: u64) {
        self.chunk_size = size.clamp(1, CHUNK_SIZE_MAX as u64);
    }

    /// Changes the durability mode. What was appended before is committed under the new one.
    pub fn set_durability(&mut self, durability: Durability) {
        self.committer.set_durability(durability);
    }

    /// Extents that the shards have, or a checkpoint that is being written; those that were left after a failed write count.
    pub fn extents_held(&self) -> u32 {
        let of_shards: u32 = self.shards.iter().map(Shard::extents_held).sum();
        of_shards + self.checkpointer.extents_held() + self.stats.extents_left as u32
    }

    /// Figures as of now.
    pub fn stats(&self) -> EngineStats {
        EngineStats {
            keys: self.shards.iter().map(Shard::live).sum(),
            live_bytes: self.shards.iter().map(Shard::live_bytes).sum(),
            bytes_written: self.queue.bytes_written,
            bytes_read: self.queue.bytes_read,
            io: self.queue.stats(),
            flushes: self.queue.flush_count,
            groups: self.committer.group_count(),
            gc: self.collector.stats,
            checkpoints: self.checkpointer.stats,
            scrub: self.scrubber.stats,
            cache_hits: self.cache.counts().0,
            cache_misses: self.cache.counts().1,
            ..self.stats
        }
    }

    /// Whether operations are under way.
    pub fn is_busy(&self) -> bool {
        !self.arrivals.is_empty()
            || !self.operations.is_empty()
            || !self.queue.is_idle()
            || self.committer.is_in_group()
    }

    /// Microseconds on the monotonic clock when `poll` has something to do although nothing comes in.
    pub fn deadline_us(&self, clock: Clock) -> Option<u64> {
        let commit = self.committer.deadline_us(&self.shards);
        let expiry = self.shards.iter().filter_map(Shard::next_expiry_ms).min();
        // A key goes in the millisecond after its last one; an expiry may be as far away as the type allows.
        let expiry = expiry.map(|at| {
            let left_ms = at.saturating_add(1).saturating_sub(clock.unix_ms).max(1);
            clock.monotonic_us.saturating_add(left_ms.saturating_mul(1_000))
        });
        commit
            .into_iter()
            .chain(expiry)
            .chain(self.collect_deadline_us())
            .chain(self.scrub_deadline_us())
            .chain(self.shards.iter().any(Shard::is_sweeping).then_some(clock.monotonic_us + 1_000))
            // Memory may be free again without anybody's saying so.
            .chain((!self.long_reads_waiting.is_empty()).then_some(clock.monotonic_us + 1_000))
            .min()
    }

    /// Takes an operation. Its answer comes from `poll`, with `token`, once. Refused operations come back.
    pub fn submit(&mut self, shard: ShardId, token: u64, op: ShardOp, clock: Clock) -> Result<(), ShardOp> {
        if self.operations.len() + self.arrivals.len() >= ENGINE_OPERATIONS_MAX {
            return Err(op);
        }
        let Some(at) = self.shard_at.get(usize::from(shard.0)).copied().flatten() else {
            // Only a caller's bug routes here; answering keeps the connection alive and says so.
            self.answers.push((token, Answer::Failed(OpError::Busy)));
            return Ok(());
        };
        if self.stopping {
            let answer = match op {
                ShardOp::Key { .. } => Answer::Reply(op::Reply::Error(OpError::Stopping)),
                _ => Answer::Failed(OpError::Stopping),
            };
            self.answers.push((token, answer));
            return Ok(());
        }
        self.queue.set_now(clock.monotonic_us);
        if !matches!(op, ShardOp::Key { .. }) {
            self.begin_arrivals(clock);
        }
        self.admit(at, token, op, clock);
        Ok(())
    }

    /// Advances everything and moves answers to `out`. True when anything happened.
    pub fn poll(&mut self, clock: Clock, out: &mut Vec<(u64, Answer)>) -> bool {
        let progress = self.step(clock) || !self.answers.is_empty();
        out.append(&mut self.answers);
        progress
    }

    /// Tries those again who wait for room that garbage collection makes, here or in another engine.
    fn retry_stalled(&mut self, clock: Clock) {
        if self.committer.is_in_group() || clock.monotonic_us < self.stalled_tried_us + STALLED_RETRY_US {
            return;
        }
        self.stalled_tried_us = clock.monotonic_us;
        for at in 0..self.shards.len() {
            if !self.shards[at].stalled.is_empty() {
                self.resume_stalled(at, clock);
            }
        }
    }

    /// One pass: completions, waiting operations, the next group, the doorbell.
    fn step(&mut self, clock: Clock) -> bool {
        self.queue.set_now(clock.monotonic_us);
        let begun = self.begin_arrivals(clock);
        let mut finished = std::mem::take(&mut self.finished);
        self.queue.poll(&mut finished);
        let progress = begun || !finished.is_empty();
        for one in finished.drain(..) {
            match one.purpose {
                io_queue::Purpose::Read { job, at } => {
                    self.on_read_piece(job, at, one.buf, one.status, clock)
                }
                io_queue::Purpose::Write { frame } => self.on_group_write(frame, one.status, clock),
                io_queue::Purpose::Flush => self.on_group_flush(one.status, clock),
                io_queue::Purpose::Checkpoint => self.on_checkpoint_write(one.status),
                io_queue::Purpose::Scrub => self.on_scrub_piece(one.buf, one.status),
                io_queue::Purpose::Trim { shard, extent } => self.on_trimmed(shard, extent, one.status),
                io_queue::Purpose::Survivors { shard } => self.on_unit_write(shard, one.status, clock),
                io_queue::Purpose::Collect => self.on_collect_read(one.buf, one.status, clock),
            }
        }
        self.finished = finished;
        self.abandon_holds(clock);
        self.check_pins();
        for at in 0..self.shards.len() {
            self.shards[at].bury_chunks();
            if !self.shards[at].gate.is_empty() {
                self.open_gate(at, clock);
            }
        }
        // Keys expire by the millisecond, and there are many passes in one.
        if self.reaped_ms != clock.unix_ms || self.reaps_more {
            self.reaped_ms = clock.unix_ms;
            self.reaps_more = false;
            for shard in &mut self.shards {
                // A bound keeps a mass expiry from holding the loop; the rest is due at once and comes next time.
                self.reaps_more |= shard.reap_expired(clock.unix_ms, 64);
                shard.sweep_directory();
            }
        }
        self.cache.adjust();
        self.start_long_reads(clock);
        self.start_reads();
        let collected = self.scrub(clock) | self.collect(clock) | self.go_on_with_checkpoint();
        self.retry_stalled(clock);
        let started = self.start_group(clock);
        self.queue.submit();
        progress || started || collected
    }
}
