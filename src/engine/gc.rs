//! Garbage collection: extents most of which is dead are emptied and go back to the allocator.
//!
//! ```text
//! pick -> read -> what is live goes into units of survivors -> [durable] -> a record retires the frames -> [durable]
//!      -> the extent is free
//! ```
//!
//! A record is live when the index names its place. On devices with few extents, and while none is left for survivors, what is
//! live goes to the end of the log instead, as a new record in the shard's history. Deletes, and commit records of batches, are
//! moved as long as anything older in the shard could need them.
//!
//! Invariants:
//! - Nothing is moved of a key of which a batch has logged a part and not yet decided: the copy, being newer, would win over it.
//!   The batch may wait for room itself, so the collection is given up, and another extent is tried.
//! - Frames are retired only when everything that was logged up to the end of the collection is durable, and an extent is given
//!   back only when that is durable as well and no read of it is under way.
//! - A shard that lost records of unknown keys is left alone until a FLUSHALL: what looks dead may be all that is left. So is an
//!   extent in which the newest record of a key can't be read, as long as it is the newest (see `damaged.rs`).

mod damaged;
mod policy;
mod records;
mod release;

use super::Engine;
use super::allocator::Purpose;
use super::extents::{ExtentState, Left};
use super::io_queue::{self, Class};
use super::log::OpenExtent;
use super::op::{Answer, Clock, Key, OpError};
use super::shard::Shard;
use crate::device::{Device, DmaBuf, IoError};
use crate::limits::{CHUNK_SIZE_MAX, KEPT_FOR_RETIREMENT_MAX};
use crate::planted::{Bug, is_planted};
use crate::probe::{self, Probe};
use damaged::Tries;
use policy::{Candidate, pick};
use records::Moving;

/// Free extents for new data below which collection begins: a part of all, and where that is less than one for each shard, as
/// shards may fill theirs at the same time, up to a larger part of all.
const FREE_TARGET_DIVISOR: u32 = 128;
const FREE_TARGET_DIVISOR_SMALL: u32 = 20;

/// Deletes and commit records are this part of what a shard has on the device, or more, when it is worthwhile to collect its oldest
/// extent so that they can be dropped.
const BURDEN_DIVISOR: u64 = 32;

/// Beside the longest value, what a record and its frame take, and what is kept at the end.
const END_SLACK: u64 = (16 << 10) + KEPT_FOR_RETIREMENT_MAX;

/// What the headers and the padding of units and frames take when an extent is moved.
const MOVE_SLACK: u64 = 32 << 10;

/// After so many collections it is the oldest extent's turn.
const OLDEST_EVERY: u32 = 8;

/// How often the extents are looked at while there are few free ones: at least, and for each extent, as a look goes over
/// all of them (some 20 ns each) and is to take no more than a twentieth of a reactor.
const LOOK_INTERVAL_US: u64 = 1_000;
const LOOK_INTERVAL_NS_PER_EXTENT: u64 = 400;

/// How often otherwise.
const IDLE_LOOK_INTERVAL_US: u64 = 100_000;

/// How long a shard is left alone after a collection of it could not go on.
const RETRY_DELAY_US: u64 = 5_000;

/// How long an extent is left alone of which a batch is about to change a key.
const AVOID_TIME_US: u64 = 20_000;

/// Times that a read is tried.
const READ_TRIES: u32 = 3;

/// Figures of garbage collection, for one engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct GcStats {
    /// Extents that were emptied.
    pub extents_collected: u64,
    /// Extents that were given back.
    pub extents_freed: u64,
    /// Bytes of records that were moved.
    pub bytes_moved: u64,
    /// Bytes that the device was told to be free.
    pub bytes_trimmed: u64,
    /// Collections that were given up.
    pub abandoned: u64,
}

/// One extent that is being emptied.
struct Collection {
    shard: usize,
    extent: u32,
    /// Nothing in another extent is older than what stands up to here in the order of frames.
    horizon: u64,
    /// Where what is being dealt with stands in that order, and the last of it.
    order: u64,
    order_end: u64,
    /// Bytes that it gives back.
    gain: u64,
    /// It has units instead of frames.
    has_units: bool,
    /// What it moved is lost: it ends when nothing of it is being read any more.
    is_void: bool,
    /// Bytes from the extent's start to `bytes`.
    at: u64,
    end: u64,
    next_frame: u64,
    last_frame: u64,
    /// What was read: frames, of which those in the first `done` bytes have been dealt with, and the next is at `at`.
    bytes: Vec<u8>,
    done: usize,
    /// Bytes of the frame at `at` whose records have been dealt with; 0 when it was not begun.
    position: usize,
    is_reading: bool,
    /// Where what was read did not look right, and where it was not read.
    doubts: Tries,
    failures: Tries,
    /// The next frame is not where it should be, and looked for.
    is_searching: bool,
    /// Bytes up to here are read block by block: the device can't read all of them.
    slow_to: u64,
    /// Bytes of deletes and the like that were read, as extents count them.
    carry_read: u64,
    /// What could not be read of it, first.
    unread: Option<String>,
}

impl Collection {
    /// What was read and has not been dealt with.
    fn rest(&self) -> &[u8] {
        self.bytes.get(self.done..).unwrap_or_default()
    }
}

/// What one engine collects.
pub(super) struct Collector {
    active: Option<Collection>,
    /// Bytes of victims that may be read for what was written; unlimited while somebody waits for room.
    credit: i64,
    since_oldest: u32,
    next_look_us: u64,
    /// When the extents were last looked at, and whether anything was logged since.
    looked_us: u64,
    has_news: bool,
    retry_us: u64,
    /// Bytes of victim for each byte that clients write, in 1/256.
    ratio: i64,
    /// Who asked for everything to be collected, by shard.
    pub(super) compactions: Vec<(usize, u64)>,
    enabled: bool,
    /// Survivors go to extents of their own.
    pub(super) apart: bool,
    /// The device is told which extents are free.
    trims: bool,
    pub(super) stats: GcStats,
}

impl Collector {
    pub(super) fn new(apart: bool) -> Collector {
        Collector {
            apart,
            active: None,
            credit: 0,
            since_oldest: 0,
            next_look_us: 0,
            looked_us: 0,
            has_news: false,
            retry_us: 0,
            ratio: 256,
            compactions: Vec::new(),
            enabled: false,
            trims: false,
            stats: GcStats::default(),
        }
    }

    /// Extents are about to be free: they are looked at without delay.
    pub(super) fn on_room(&mut self) {
        self.next_look_us = 0;
    }

    /// What the collection that is under way has moved of this shard is lost.
    pub(super) fn void_collection_of(&mut self, at: usize) {
        if let Some(active) = self.active.as_mut().filter(|active| active.shard == at) {
            active.is_void = true;
        }
    }

    /// Clients wrote: as much of the victims may be read as gives that much back.
    pub(super) fn on_user_append(&mut self, size: u32) {
        self.has_news = true;
        if self.active.is_some() {
            self.credit = (self.credit + i64::from(size) * self.ratio / 256).min(64 << 20);
        }
    }
}

/// Bytes of an extent that a collection gives back or moves. At the end of one that is full is often room that the next record
/// did not fit into: to count that would have live records moved for nothing, again and again.
fn used_of(one: &super::extents::Extent, extent_size: u64) -> u64 {
    if extent_size.saturating_sub(one.end) < CHUNK_SIZE_MAX as u64 + END_SLACK {
        one.end
    } else {
        extent_size
    }
}

impl<D: Device> Engine<D> {
    /// Whether garbage collection may still make room for somebody who waits for it.
    pub(super) fn can_reclaim(&mut self, clock: Clock) -> bool {
        // What only saves time goes first.
        if self.allocator.drop_checkpoints() {
            return true;
        }
        if !self.collector.enabled || self.stopping {
            return false;
        }
        let enough = self.superblock.layout.extent_size;
        if self.allocator.reclaimable() >= enough {
            return true;
        }
        // What became garbage since the last look is not in the figures yet: whoever asks too soon waits for the next one.
        let next_us = self.collector.looked_us + self.look_interval_us();
        if clock.monotonic_us < next_us {
            self.collector.next_look_us = next_us;
            return self.collector.has_news;
        }
        self.look(clock);
        self.allocator.reclaimable() >= enough
    }

    fn look_interval_us(&self) -> u64 {
        let all_us = u64::from(self.allocator.count()) * LOOK_INTERVAL_NS_PER_EXTENT / 1_000;
        all_us.clamp(LOOK_INTERVAL_US, IDLE_LOOK_INTERVAL_US)
    }

    /// One pass of garbage collection. True when anything happened.
    pub(super) fn collect(&mut self, clock: Clock) -> bool {
        self.queue.set_pressing(self.is_waited_for());
        let mut progress = self.committer.poisoned().is_none() && self.go_on_with_units();
        if self.committer.poisoned().is_some() || self.stopping {
            for at in 0..self.shards.len() {
                self.drop_unit(at);
            }
            if std::mem::take(&mut self.collector.enabled) {
                // Nobody is to wait for what does not come any more.
                for shard in &mut self.shards {
                    self.allocator.report_reclaimable(std::mem::take(&mut shard.reclaimable), 0);
                }
            }
            return progress;
        }
        if !self.collector.enabled {
            // Another shard's commit record may be the only one that decides a batch here until its start is durable too.
            self.collector.enabled = self.allocator.settled_count() >= u32::from(self.superblock.shard_count);
            if !self.collector.enabled {
                return progress;
            }
        }
        for at in 0..self.shards.len() {
            progress |= self.write_off(at, clock) | self.let_go(at, clock) | self.log_mark(at, clock);
        }
        if self.collector.active.is_some() {
            progress |= self.go_on_collecting(clock);
            progress |= self.go_on_with_units();
            if !progress {
                // It goes on with what clients write, or the device has done; or somebody else comes to want its permission.
                let interval =
                    if self.is_pressing() { self.look_interval_us() } else { IDLE_LOOK_INTERVAL_US };
                self.collector.next_look_us = clock.monotonic_us + interval;
            }
            return progress;
        }
        if self.allocator.available_count() < self.free_target() {
            // It was not short when they were looked at last: what is left may be gone long before the next time.
            let soon_us = self.collector.looked_us + self.look_interval_us();
            self.collector.next_look_us = self.collector.next_look_us.min(soon_us);
        }
        if clock.monotonic_us >= self.collector.next_look_us {
            progress |= self.look(clock);
        }
        progress
    }

    /// Microseconds on the monotonic clock when `collect` has something to do although nothing comes in.
    pub(super) fn collect_deadline_us(&self) -> Option<u64> {
        // Another engine may come to wait for what this one can free, and can't say so.
        let has_reason = |shard: &Shard| {
            let is_cleared = shard.cleared.is_some() || shard.writes_off_before.is_some();
            !shard.stalled.is_empty() || is_cleared || shard.reclaimable > 0
        };
        let waits = self.collector.has_news
            || self.shards.iter().any(has_reason)
            || !self.collector.compactions.is_empty();
        (self.collector.enabled && waits).then_some(self.collector.next_look_us)
    }

    fn free_target(&self) -> u32 {
        let count = self.allocator.count();
        let of_shards = u32::from(self.superblock.shard_count).min(count / FREE_TARGET_DIVISOR_SMALL);
        (count / FREE_TARGET_DIVISOR).max(of_shards).max(2)
    }

    /// Whether collection goes on as fast as it can.
    fn is_pressing(&self) -> bool {
        // Another engine may wait for this one's permission to collect, and has nobody here who writes.
        !self.collector.compactions.is_empty()
            || self.is_waited_for()
            || self.allocator.is_collection_wanted()
    }

    /// Whether writers wait for what collection frees, or will.
    fn is_waited_for(&self) -> bool {
        self.allocator.available_count() == 0 || self.shards.iter().any(|shard| !shard.stalled.is_empty())
    }

    /// Extents of a shard that may be collected.
    fn candidates(&self, at: usize, clock: Clock, out: &mut Vec<Candidate>) {
        let shard = &self.shards[at];
        if !shard.is_collectable() {
            return;
        }
        let open = shard.log.open_extent().map(|open| open.header.extent);
        let oldest = shard.extents.oldest();
        let horizons = shard.extents.horizons();
        let (carried, used) = shard.extents.burden();
        let is_burdened = carried >= used / BURDEN_DIVISOR;
        for (number, one) in shard.extents.iter() {
            let is_oldest = Some(number) == oldest;
            let is_open = Some(number) == open || (!one.is_log() && one.last_frame.is_none());
            let carry = match one.state {
                _ if is_open => continue,
                ExtentState::InUse => one.carry_bytes,
                ExtentState::Damaged(Left::Newest(lost)) if !shard.is_lost(number, lost) => one.carry_bytes,
                ExtentState::Damaged(Left::Unread { carry_bytes }) => carry_bytes,
                _ => continue,
            };
            let counts = carry > 0 || one.has_clear;
            let droppable = if counts { one.part_up_to(horizons.of(number, one)) } else { 0 };
            // A FLUSHALL can't be moved: it would drop what came after it.
            if one.has_clear && droppable < 256 {
                continue;
            }
            if clock.monotonic_us < one.avoid_until_us {
                continue;
            }
            out.push(Candidate {
                shard: at,
                extent: number,
                size: self.superblock.layout.extent_size,
                used: used_of(one, self.superblock.layout.extent_size),
                live: one.live_bytes,
                carry: carry - carry * droppable / 256,
                dropped: carry * droppable / 256,
                age: self.allocator.opened_since(one.ordinal),
                is_oldest: is_oldest && is_burdened,
            });
        }
    }

    /// Looks at all extents: lets go of those that need no reading, tells the allocator what could be freed, and begins a
    /// collection where it is worth it.
    fn look(&mut self, clock: Clock) -> bool {
        let low = self.allocator.available_count() < self.free_target();
        let soon = low || !self.collector.compactions.is_empty();
        let interval = if soon { self.look_interval_us() } else { IDLE_LOOK_INTERVAL_US };
        self.collector.next_look_us = clock.monotonic_us + interval;
        self.collector.looked_us = clock.monotonic_us;
        self.collector.has_news = false;
        let extent_size = self.superblock.layout.extent_size;
        let mut candidates = Vec::new();
        let mut progress = false;
        for at in 0..self.shards.len() {
            if soon {
                self.close_stale_survivors(at);
            }
            let mut of_shard = Vec::new();
            self.shards[at].forget_superseded();
            self.candidates(at, clock, &mut of_shard);
            let held: Vec<u32> = self.prepared_extents(at).collect();
            let shard = &mut self.shards[at];
            let written = shard.written_frame;
            let last_frame = shard.log.last_frame();
            of_shard.retain(|one| {
                // Its records must be on the device, and no batch may be about to make one of them count.
                let extent = shard.extents.get(one.extent);
                let is_written = |last| extent.is_some_and(|one| !one.is_log()) || last <= written;
                let is_sealed = extent.and_then(|one| one.last_frame).is_some_and(is_written);
                if !is_sealed || held.contains(&one.extent) {
                    return false;
                }
                let cleared = shard.cleared.is_some_and(|cleared| {
                    // Somebody may still read a long value from before it.
                    cleared.frame <= written
                        && one.live == 0
                        && shard.unsettled.is_empty()
                        && shard.extents.is_before(one.extent, cleared.extent, cleared.frame)
                });
                let is_dead = one.live == 0 || (is_planted(Bug::RoundsLiveBytesDown) && one.live < 4096);
                if cleared || (is_dead && one.carry == 0 && shard.unsettled.is_empty()) {
                    shard.extents.empty(one.extent, last_frame);
                    progress = true;
                    return false;
                }
                // All of it that can be read is somewhere else.
                !extent.is_some_and(|one| matches!(one.state, ExtentState::Damaged(Left::Unread { .. })))
            });
            if shard.cleared.is_some_and(|cleared| cleared.frame <= written) && shard.unsettled.is_empty() {
                shard.cleared = None;
            }
            let gain: u64 = of_shard.iter().filter(|one| one.is_worth_it()).map(Candidate::gain).sum();
            candidates.append(&mut of_shard);
            let leaving = (shard.extents.leaving.len() + shard.survivors.victim_count()) as u64 * extent_size;
            let under_way = match &self.collector.active {
                Some(active) if active.shard == at => active.gain,
                _ => 0,
            };
            let reclaimable = gain + leaving + under_way;
            self.allocator.report_reclaimable(shard.reclaimable, reclaimable);
            shard.reclaimable = reclaimable;
        }
        if self.collector.active.is_none() && clock.monotonic_us >= self.collector.retry_us && soon {
            progress |= self.begin(&candidates, clock);
        }
        self.end_compactions(&candidates);
        progress
    }

    /// Extents with parts of batches that are not decided yet.
    fn prepared_extents(&self, at: usize) -> impl Iterator<Item = u32> + '_ {
        self.batch_holds.iter().flat_map(move |(_, hold)| hold.prepared_extents(at))
    }

    /// Whether a batch has logged a part for this key that is not decided yet.
    fn is_prepared(&self, at: usize, key: &Key) -> bool {
        self.batch_holds.iter().any(|(_, hold)| hold.has_prepared(at, key))
    }

    /// Bytes that a shard's open extents still take of what a collection moves.
    fn room_for_moved(&self, at: usize) -> u64 {
        let extent_size = self.superblock.layout.extent_size;
        let rest = |open: &OpenExtent| extent_size.saturating_sub(open.position);
        let shard = &self.shards[at];
        let of_survivors = shard.survivors.open_extent().filter(|_| self.collector.apart).map_or(0, rest);
        let of_log = shard.log.open_extent().map_or(0, rest).saturating_sub(shard.log.kept_size());
        of_survivors.max(of_log)
    }

    fn begin(&mut self, candidates: &[Candidate], clock: Clock) -> bool {
        let is_oldest_due = self.collector.since_oldest >= OLDEST_EVERY;
        let victim = match self.allocator.has_for_collection() {
            true => pick(candidates, is_oldest_due),
            // Only what fits into extents that are open already can be moved, or victims of other shards would be read and given up
            // for ever.
            false => {
                let fits = |one: &&Candidate| one.cost() + MOVE_SLACK <= self.room_for_moved(one.shard);
                let fitting: Vec<Candidate> = candidates.iter().filter(fits).copied().collect();
                probe::hit_if(!fitting.is_empty(), Probe::CollectionWithoutReserve);
                pick(&fitting, is_oldest_due).or_else(|| pick(candidates, is_oldest_due))
            }
        };
        let Some(victim) = victim else { return false };
        if !self.allocator.begin_collection() {
            return false;
        }
        let target = i64::from(self.free_target());
        let horizons = self.shards[victim.shard].extents.horizons();
        let one = self.shards[victim.shard].extents.get_mut(victim.extent);
        let Some((last_frame, one)) = one.and_then(|one| Some((one.last_frame?, one))) else {
            self.allocator.end_collection();
            return false;
        };
        one.state = ExtentState::Collecting;
        self.collector.since_oldest =
            if victim.is_oldest { 0 } else { self.collector.since_oldest.saturating_add(1) };
        // What one byte written takes from the free space, one byte of gain gives back; faster when little is left.
        let short = (target - i64::from(self.allocator.available_count())).clamp(0, target);
        let ratio = 256 * victim.size / victim.gain().max(1);
        self.collector.ratio = (ratio as i64) * (target + short) / target;
        self.collector.active = Some(Collection {
            shard: victim.shard,
            extent: victim.extent,
            horizon: horizons.of(victim.extent, one),
            order: 0,
            order_end: one.span().1,
            gain: victim.gain(),
            has_units: !one.is_log(),
            is_void: false,
            at: u64::from(self.superblock.block_size),
            end: one.end,
            next_frame: one.first_frame,
            last_frame,
            bytes: Vec::new(),
            done: 0,
            position: 0,
            is_reading: false,
            doubts: Tries::default(),
            failures: Tries::default(),
            is_searching: false,
            slow_to: 0,
            carry_read: 0,
            unread: None,
        });
        self.go_on_collecting(clock);
        true
    }

    fn go_on_collecting(&mut self, clock: Clock) -> bool {
        let pressing = self.is_pressing();
        let Some(active) = &self.collector.active else { return false };
        if active.is_void && !active.is_reading {
            if let Some(active) = self.collector.active.take() {
                self.collector.stats.abandoned += 1;
                self.leave(&active, ExtentState::InUse);
            }
            self.collector.retry_us = clock.monotonic_us + RETRY_DELAY_US;
            return true;
        }
        if active.is_reading || (self.collector.credit <= 0 && !pressing) {
            return false;
        }
        if clock.monotonic_us < self.collector.retry_us {
            return false;
        }
        let Some(mut active) = self.collector.active.take() else { return false };
        let moving = self.move_records(&mut active, clock);
        match moving {
            Moving::Pause(moved) => {
                self.collector.active = Some(active);
                moved
            }
            Moving::NeedBytes => {
                self.read_on(&mut active);
                self.collector.active = Some(active);
                true
            }
            Moving::Done => {
                self.finish_collection(&active);
                true
            }
            Moving::Avoid => {
                self.collector.stats.abandoned += 1;
                self.collector.next_look_us = 0;
                self.leave(&active, ExtentState::InUse);
                if let Some(one) = self.shards[active.shard].extents.get_mut(active.extent) {
                    one.avoid_until_us = clock.monotonic_us + AVOID_TIME_US;
                }
                true
            }
            Moving::GiveUp => {
                for (_, token) in std::mem::take(&mut self.collector.compactions) {
                    self.answers.push((token, Answer::Failed(OpError::DeviceFull)));
                }
                self.collector.stats.abandoned += 1;
                self.collector.retry_us = clock.monotonic_us + RETRY_DELAY_US;
                self.collector.next_look_us = 0;
                self.leave(&active, ExtentState::InUse);
                // Nobody is to wait for what it would free: there is no room to free it.
                if let Some(one) = self.shards[active.shard].extents.get_mut(active.extent) {
                    one.avoid_until_us = clock.monotonic_us + AVOID_TIME_US;
                }
                false
            }
            Moving::Lost(lost, whose) => {
                tracing::error!(
                    "extent {} can't be collected and stays as it is: {whose} is damaged, and is lost; it is collected once that is written again or deleted",
                    active.extent
                );
                self.collector.stats.abandoned += 1;
                self.leave(&active, ExtentState::Damaged(Left::Newest(lost)));
                false
            }
        }
    }

    fn leave(&mut self, active: &Collection, state: ExtentState) {
        if let Some(one) = self.shards[active.shard].extents.get_mut(active.extent) {
            one.state = state;
        }
        // What it has put into the unit is not to wait for another collection.
        self.close_unit(active.shard);
        self.allocator.end_collection();
    }

    fn finish_collection(&mut self, active: &Collection) {
        probe::hit(Probe::ExtentCollected);
        let left = self.left_in(active);
        let is_over = self.end_victim(active.shard, active.extent, left);
        let shard = &mut self.shards[active.shard];
        if is_over {
            // What replaces its records, and what killed the others, is in the log up to here.
            let frame = shard.log.last_frame();
            shard.extents.end(active.extent, left, frame);
        }
        shard.log.end_collection();
        match left {
            Some(_) => self.collector.stats.abandoned += 1,
            None => self.collector.stats.extents_collected += 1,
        }
        self.collector.next_look_us = 0;
        self.allocator.end_collection();
    }

    /// Reads the next piece of the victim.
    fn read_on(&mut self, active: &mut Collection) {
        active.bytes.drain(..std::mem::take(&mut active.done));
        let from = active.at + active.bytes.len() as u64;
        let piece_size = match from < active.slow_to {
            true => self.superblock.block_size as usize,
            false => self.queue.read_size_max(Class::Collect),
        };
        let size = piece_size.min((active.end.saturating_sub(from)) as usize);
        active.is_reading = true;
        let offset = self.superblock.layout.extent_offset(active.extent) + from;
        self.queue.read(io_queue::Purpose::Collect, offset, size);
    }
}
