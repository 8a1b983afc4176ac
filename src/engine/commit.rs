//! Group commit: what was appended while the last group was in flight shares the next one.
//!
//! A group takes the open frame of every shard, writes them, flushes when the mode asks for it, and then the frames are
//! durable. One group is in flight at a time: while it is, frames fill.
//!
//! Invariants:
//! - The flush is submitted after every write of the group has completed: it covers just those.
//! - A write that failed is not tried again at its place: its frame goes to another extent, a few times, and until then nobody
//!   is told of it. A failed flush is final: everything since the last good one is unknown from then on.

mod gather;

use super::Engine;
use super::durability::{Durability, WRITE_DELAY_MS};
use super::log::{Moved, NewEntry, PlacedFrame, Relocated, SealedFrame};
use super::op::{Clock, OpError};
use super::shard::Shard;
use crate::device::{Device, IoError};
use crate::limits::{FRAME_SIZE_TARGET, RELOCATIONS_MAX};
use crate::planted::{Bug, is_planted};
use gather::Gather;

/// How long a record that nobody waits for may wait for a group that others cause.
const LAZY_DELAY_US: u64 = 10_000;

struct GroupFrame {
    shard: usize,
    frame: u64,
    entries: Vec<NewEntry>,
    chunks: Vec<u64>,
    moved: Vec<Moved>,
    placed: PlacedFrame,
    /// How a write of it failed.
    failed: Option<IoError>,
}

struct Group {
    frames: Vec<GroupFrame>,
    writes_left: usize,
    /// How often frames of it were put elsewhere.
    relocation_count: u32,
    /// No client wrote anything in it.
    is_own: bool,
    flush: bool,
    flushing: bool,
}

/// When groups start and what state the one in flight is in.
pub(super) struct Committer {
    durability: Durability,
    group: Option<Group>,
    group_count: u64,
    /// The last group that ended durable, counted as they started.
    durable_group: u64,
    /// Flush with the next group, whatever the mode.
    flush_wanted: bool,
    gather: Gather,
    /// When the oldest byte that waits for its group or flush was appended.
    dirty_since_us: Option<u64>,
    /// When the oldest record was appended that nobody waits for and that no group has taken.
    lazy_since_us: Option<u64>,
    /// Written to the device since the last flush.
    unflushed_size: u64,
    poisoned: Option<String>,
}

impl Committer {
    pub(super) fn new(durability: Durability) -> Committer {
        Committer {
            durability,
            group: None,
            group_count: 0,
            durable_group: 0,
            flush_wanted: false,
            gather: Gather::default(),
            dirty_since_us: None,
            lazy_since_us: None,
            unflushed_size: 0,
            poisoned: None,
        }
    }

    pub(super) fn set_durability(&mut self, durability: Durability) {
        // Whatever the old mode still owed is paid at the change.
        self.durability = durability;
        self.flush_wanted = true;
    }

    /// Whether answers wait for their frame to be durable.
    pub(super) fn waits(&self) -> bool {
        self.durability == Durability::Always
    }

    pub(super) fn force_flush(&mut self) {
        self.flush_wanted = true;
    }

    /// What was appended so far is wanted durable without waiting for the mode's time.
    pub(super) fn hurry(&mut self) {
        self.flush_wanted = true;
    }

    pub(super) fn is_in_group(&self) -> bool {
        self.group.is_some()
    }

    pub(super) fn group_count(&self) -> u64 {
        self.group_count
    }

    pub(super) fn durable_group(&self) -> u64 {
        self.durable_group
    }

    pub(super) fn poisoned(&self) -> Option<OpError> {
        self.poisoned.clone().map(|detail| OpError::ReadOnly { detail })
    }

    pub(super) fn has_work(&self, shards: &[Shard]) -> bool {
        self.group.is_some() || self.flush_wanted || shards.iter().any(|shard| shard.log.is_dirty())
    }

    /// Notes that something was appended.
    pub(super) fn on_append(&mut self, lazy: bool, clock: Clock) {
        let since = if lazy { &mut self.lazy_since_us } else { &mut self.dirty_since_us };
        since.get_or_insert(clock.monotonic_us);
    }

    /// Notes that it was a client's, who waits for it.
    pub(super) fn on_client_append(&mut self) {
        self.gather.on_append();
    }

    fn lazy_due_us(&self) -> Option<u64> {
        self.lazy_since_us.map(|since| since + LAZY_DELAY_US)
    }

    /// When the next group must start although nothing else happens.
    pub(super) fn deadline_us(&self, shards: &[Shard]) -> Option<u64> {
        if self.poisoned.is_some() || self.group.is_some() {
            return None;
        }
        let urgent = self.dirty_since_us.and_then(|since| match self.durability {
            Durability::Always => {
                let is_urgent = shards.iter().any(|shard| shard.log.is_urgent());
                is_urgent.then_some(since.max(self.gather.until_us()))
            }
            Durability::Interval(ms) => Some(since + ms * 1_000),
            Durability::Bytes(_) | Durability::Never => {
                shards.iter().any(|shard| shard.log.is_urgent()).then_some(since + WRITE_DELAY_MS * 1_000)
            }
        });
        urgent.into_iter().chain(self.lazy_due_us()).min()
    }

    /// Whether a group starts now, and whether it flushes: a function of the mode, the bytes and the time.
    fn decide(&self, shards: &[Shard], clock: Clock) -> Option<bool> {
        // Whatever makes a log dirty notes the time or wants a flush: most passes need not look at every shard.
        let nothing =
            self.dirty_since_us.is_none() && self.lazy_since_us.is_none() && self.unflushed_size == 0;
        if !self.flush_wanted && nothing {
            return None;
        }
        let (mut staged, mut dirty, mut stalled) = (0, false, false);
        for shard in shards {
            staged += shard.log.staged_size() as u64;
            dirty |= shard.log.is_urgent();
            stalled |= !shard.stalled.is_empty() || !shard.gate.is_empty();
        }
        if self.flush_wanted || self.lazy_due_us().is_some_and(|due| clock.monotonic_us >= due) {
            return Some(true);
        }
        let age_us = self.dirty_since_us.map_or(0, |since| clock.monotonic_us.saturating_sub(since));
        let must_write = dirty && (stalled || staged >= FRAME_SIZE_TARGET as u64);
        match self.durability {
            Durability::Always => {
                let is_due = must_write || (dirty && self.gather.is_due(clock.monotonic_us));
                is_due.then_some(true)
            }
            Durability::Interval(ms) => {
                let due = self.dirty_since_us.is_some() && age_us >= ms * 1_000;
                if due { Some(true) } else { must_write.then_some(false) }
            }
            Durability::Bytes(size) => {
                let due = staged + self.unflushed_size >= size;
                let idle = dirty && age_us >= WRITE_DELAY_MS * 1_000;
                if due { Some(true) } else { (must_write || idle).then_some(false) }
            }
            Durability::Never => (must_write || (dirty && age_us >= WRITE_DELAY_MS * 1_000)).then_some(false),
        }
    }
}

impl<D: Device> Engine<D> {
    /// Starts the next group when it is time.
    pub(super) fn start_group(&mut self, clock: Clock) -> bool {
        if self.committer.group.is_some() || self.committer.poisoned.is_some() {
            return false;
        }
        let Some(flush) = self.committer.decide(&self.shards, clock) else { return false };
        let is_own = !self.committer.gather.has_arrived();
        let (frames, writes_left, relocation_count) = (Vec::new(), 0, 0);
        let mut group = Group { frames, writes_left, relocation_count, is_own, flush, flushing: false };
        for (at, shard) in self.shards.iter_mut().enumerate() {
            let Some(sealed) = shard.log.seal(shard.durable_frame) else { continue };
            let SealedFrame { frame, writes, entries, chunks, moved, placed } = sealed;
            shard.note_filled();
            shard.being_written = Some((placed.extent, placed.start()));
            for (offset, data) in writes {
                self.committer.unflushed_size += data.len() as u64;
                group.writes_left += self.queue.write(group.frames.len(), offset, &data, is_own);
            }
            group.frames.push(GroupFrame { shard: at, frame, entries, chunks, moved, placed, failed: None });
        }
        self.committer.group_count += 1;
        self.committer.gather.on_begin(clock.monotonic_us);
        self.begin_checkpoint();
        self.committer.lazy_since_us = None;
        // Appends from here on belong to the next group. In `interval` mode the age counts to the flush, which a group
        // without one does not bring nearer.
        let settles = flush || !matches!(self.committer.durability, Durability::Interval(_));
        if settles {
            self.committer.dirty_since_us = None;
        }
        if flush {
            self.committer.flush_wanted = false;
            self.committer.unflushed_size = 0;
        }
        let writes_left = group.writes_left;
        self.committer.group = Some(group);
        if writes_left == 0 {
            self.on_writes_done(clock);
        }
        true
    }

    pub(super) fn on_group_write(&mut self, frame: usize, status: Result<(), IoError>, clock: Clock) {
        let Some(group) = &mut self.committer.group else { return };
        group.writes_left -= 1;
        let left = group.writes_left;
        match status {
            Ok(()) => {}
            Err(_) if is_planted(Bug::IgnoresFailedWrite) => {}
            // The medium refused it, or a reset took it: it may be there in part, so nothing is written there again.
            Err(error @ (IoError::WriteFault { .. } | IoError::Aborted)) => {
                group.frames[frame].failed = Some(error);
            }
            Err(error) => self.poison(&error, clock),
        }
        if left == 0 {
            self.on_writes_done(clock);
        }
    }

    /// Puts frames whose writes failed into other extents. True when there were any, and they are on their way.
    fn relocate_failed(&mut self, clock: Clock) -> bool {
        let Some(group) = &mut self.committer.group else { return false };
        let Some(first) = group.frames.iter().find_map(|frame| frame.failed.clone()) else { return false };
        group.relocation_count += 1;
        if group.relocation_count > RELOCATIONS_MAX {
            self.poison(&first, clock);
            return false;
        }
        for (index, frame) in group.frames.iter_mut().enumerate() {
            let Some(error) = frame.failed.take() else { continue };
            let shard = &mut self.shards[frame.shard];
            let Ok(relocated) = shard.log.relocate(&frame.placed, &self.allocator) else {
                self.poison(&error, clock);
                return false;
            };
            let left = frame.placed.extent;
            shard.on_moved(left, &relocated);
            self.checkpointer.spoil();
            let Relocated { placed, writes, moves } = relocated;
            tracing::warn!(
                "{error}; extent {left} is left, and what was being written goes to extent {}",
                placed.extent
            );
            self.stats.extents_left += 1;
            for one in &mut frame.moved {
                one.at = moves.iter().find_map(|one_move| one_move.target(&one.at)).unwrap_or(one.at);
            }
            for (_, hold) in &mut self.batch_holds {
                hold.on_moved(frame.shard, &moves);
            }
            frame.placed = placed;
            for (offset, data) in writes {
                group.writes_left += self.queue.write(index, offset, &data, group.is_own);
            }
        }
        true
    }

    fn on_writes_done(&mut self, clock: Clock) {
        if self.committer.poisoned.is_none() && self.relocate_failed(clock) {
            return;
        }
        if self.committer.poisoned.is_some() {
            self.committer.group = None;
            return;
        }
        let Some(group) = &mut self.committer.group else { return };
        // Without a volatile cache a completed write is a durable one.
        let is_skipped = is_planted(Bug::SkipsFlush)
            || (is_planted(Bug::SkipsFlushAfterRelocation) && group.relocation_count > 0);
        if group.flush && self.queue.device().geometry().volatile_cache && !is_skipped {
            group.flushing = true;
            self.queue.flush(group.is_own);
            return;
        }
        self.finish_group(clock);
    }

    pub(super) fn on_group_flush(&mut self, status: Result<(), IoError>, clock: Clock) {
        if let Err(error) = status
            && !is_planted(Bug::IgnoresFailedFlush)
        {
            self.poison(&error, clock);
            self.committer.group = None;
            return;
        }
        if self.committer.poisoned.is_none() {
            self.finish_group(clock);
        }
    }

    fn finish_group(&mut self, clock: Clock) {
        let Some(group) = self.committer.group.take() else { return };
        self.committer.gather.on_end(clock.monotonic_us);
        let durable = group.flush || !self.queue.device().geometry().volatile_cache;
        for GroupFrame { shard, frame, entries, chunks, moved, .. } in group.frames {
            self.shards[shard].on_written(frame, &entries, &chunks, &moved, &mut self.cache);
        }
        if durable {
            self.committer.durable_group = self.committer.group_count;
            // A flush covers what earlier groups wrote without one.
            for at in 0..self.shards.len() {
                let shard = &mut self.shards[at];
                shard.durable_frame = shard.durable_frame.max(shard.written_frame);
                let rest = shard.waiters.split_off(&(shard.durable_frame + 1));
                let ready = std::mem::replace(&mut shard.waiters, rest);
                self.answers.extend(ready.into_values().flatten());
            }
        }
        for at in 0..self.shards.len() {
            self.resume_stalled(at, clock);
        }
    }

    /// Nothing more is acknowledged: every answer that waits for a frame becomes "unknown".
    pub(super) fn poison(&mut self, error: &IoError, clock: Clock) {
        let detail = error.to_string();
        if self.committer.poisoned.is_none() {
            tracing::error!("{detail}; nothing more is accepted until restart");
            self.committer.poisoned = Some(detail.clone());
        }
        for at in 0..self.shards.len() {
            let shard = &mut self.shards[at];
            shard.poison();
            for (token, answer) in std::mem::take(&mut shard.waiters).into_values().flatten() {
                self.answer_unknown(token, answer, detail.clone());
            }
        }
        for at in 0..self.shards.len() {
            let stalled = std::mem::take(&mut self.shards[at].stalled);
            for id in stalled {
                self.fail_stalled(at, id, OpError::ReadOnly { detail: detail.clone() }, clock);
            }
        }
        self.abandon_holds(clock);
    }
}
