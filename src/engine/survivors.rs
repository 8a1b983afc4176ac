//! Survivors: what garbage collection keeps goes to extents of its own, so that what lives long is apart from what is new and
//! soon overwritten, and is not moved again and again with it.
//!
//! ```text
//! filling -> full, or the victim is done -> [the log up to here is durable] -> one write -> [flush] -> installed
//! ```
//!
//! Invariants:
//! - One unit of a shard at a time: it is filled, written and durable before the next one begins. So of all units only the last
//!   can be torn.
//! - A unit follows the last frame that was closed when its first record was put in. Every record in it was the newest of its
//!   key then, in an older frame; whatever replaces it goes into a later one.
//! - The index is changed only when a unit is durable, and a victim counts as emptied only then. A unit that fails is forgotten:
//!   everything in it is still where it was.
//! - Between the two there is no checkpoint's position: what a unit behind a position says is newer than the position.

use std::sync::Arc;

use bytes::Bytes;

use super::Engine;
use super::allocator::{Allocator, Purpose};
use super::extents::{Extent, ExtentState, Left};
use super::io_queue;
use super::log::{Appended, Moved, OpenExtent};
use super::op::Clock;
use crate::device::{Device, IoError};
use crate::format::Place;
use crate::format::extent::{ExtentHeader, ExtentRole};
use crate::format::record::Record;
use crate::format::retirement::UnitMark;
use crate::format::slot::ShardId;
use crate::format::superblock::Superblock;
use crate::format::unit::{UNIT_HEADER_SIZE, UnitHeader};
use crate::planted::{Bug, is_planted};
use crate::probe::{self, Probe};

/// Bytes of a unit, at most, unless a single record is longer: enough to make its flush cheap, and little to do again when it fails.
const UNIT_SIZE_MAX: u64 = 1 << 20;

/// A unit takes no more than this part of an extent.
const UNITS_PER_EXTENT_MIN: u64 = 4;

/// An open extent with as much garbage as this part of an extent may be closed before it is full.
const STALE_DIVISOR: u64 = 8;

/// Extents for each shard below which survivors go to the log: another open extent would cost too much of the device.
const EXTENTS_PER_SHARD_MIN: u32 = 16;

/// What recovery found of a shard's units.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct FoundUnits {
    /// The last one; 0 for none.
    pub(super) last: u64,
    /// Where the next one may go.
    pub(super) open: Option<OpenExtent>,
    /// There are extents of survivors, whether anything in them counts or not.
    pub(super) is_any: bool,
}

/// How far the unit that is being made is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Records are put in.
    Filling,
    /// Nothing more is put in; what it rests on must be durable before it is written.
    Closed,
    /// So many writes are under way.
    Writing(usize),
    /// It is durable with this group.
    Written(u64),
}

/// The unit that is being made.
struct Unit {
    stage: Stage,
    extent: u32,
    place: Place,
    /// Bytes from the extent's start.
    start: u64,
    follows: u64,
    /// The last frame when the last record was put in: what made that record the newest of its key, a batch's commit record
    /// perhaps, is in the log up to there.
    rests_on: u64,
    bytes: Vec<u8>,
    record_count: u32,
    moved: Vec<Moved>,
    /// Bytes of deletes and commit records in it.
    carry_bytes: u64,
    /// Extents of which everything that is kept is in units up to this one; of those that have something left, what that is.
    victims: Vec<(u32, Option<Left>)>,
    failed: bool,
}

/// Why a record was not put into a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NotStaged {
    /// A unit must be durable first.
    Busy,
    /// There is no extent for it.
    NoRoom,
}

/// A shard's units, as far as they are being made.
pub(super) struct Survivors {
    shard: ShardId,
    superblock: Arc<Superblock>,
    open: Option<OpenExtent>,
    /// The open extent's header is not on the device yet.
    header_pending: bool,
    unit: Option<Unit>,
    /// The last unit that is durable.
    last: u64,
    mark: UnitMark,
    /// The mark must be logged.
    mark_due: bool,
    is_any: bool,
}

impl Survivors {
    pub(super) fn new(
        shard: ShardId,
        superblock: Arc<Superblock>,
        found: FoundUnits,
        mark: UnitMark,
    ) -> Survivors {
        Survivors {
            shard,
            superblock,
            open: found.open,
            header_pending: false,
            unit: None,
            last: found.last,
            mark: UnitMark { last: found.last, ..mark },
            mark_due: false,
            is_any: found.is_any,
        }
    }

    /// The last unit that is durable; 0 before the first.
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// How far the units are durable.
    pub(super) fn mark(&self) -> UnitMark {
        self.mark
    }

    /// The extent that is being filled.
    pub(super) fn open_extent(&self) -> Option<&OpenExtent> {
        self.open.as_ref()
    }

    /// Whether a unit is being made.
    pub(super) fn is_busy(&self) -> bool {
        self.unit.is_some()
    }

    /// Whether a unit is on its way to the device.
    pub(super) fn is_under_way(&self) -> bool {
        matches!(&self.unit, Some(Unit { stage: Stage::Writing(_) | Stage::Written(_), .. }))
    }

    /// The next unit goes to another extent.
    pub(super) fn close(&mut self) {
        self.open = None;
        self.header_pending = false;
    }

    /// Extents that are free once the unit is durable.
    pub(super) fn victim_count(&self) -> usize {
        self.unit.as_ref().map_or(0, |unit| unit.victims.len())
    }

    /// Bytes of memory of the unit that is being made.
    pub(super) fn heap_size(&self) -> usize {
        self.unit
            .as_ref()
            .map_or(0, |unit| unit.bytes.capacity() + unit.moved.capacity() * size_of::<Moved>())
    }

    /// What is behind the last unit, of an earlier start or of an attempt that failed, is void from now on: the next unit goes
    /// to another extent, and the log has to say so.
    fn void_what_follows(&mut self, allocator: &Allocator) {
        self.close();
        self.mark = UnitMark { last: self.last, epoch: allocator.next_epoch() };
        self.mark_due = true;
    }

    fn open_another(&mut self, allocator: &Allocator) -> Result<OpenExtent, NotStaged> {
        let extent = allocator
            .take(Purpose::Data)
            .or_else(|| allocator.take(Purpose::Survivors))
            .ok_or(NotStaged::NoRoom)?;
        let superblock = &self.superblock;
        let header = ExtentHeader {
            extent,
            shard: self.shard,
            epoch: allocator.next_epoch(),
            ordinal: allocator.next_ordinal(),
            first_frame: self.last + 1,
            boot: superblock.boot,
            reserve: false,
            role: ExtentRole::Survivors,
        };
        let place = Place::new(&superblock.uuid, &superblock.secret, self.shard, extent, header.epoch);
        let position = u64::from(superblock.block_size);
        let open = OpenExtent { header, place, position, for_collection: false };
        self.open = Some(open);
        self.header_pending = true;
        self.is_any = true;
        Ok(open)
    }
}

impl<D: Device> Engine<D> {
    /// Whether survivors have extents of their own on a device like this.
    pub(super) fn has_room_for_survivors(superblock: &Superblock) -> bool {
        superblock.layout.extent_count >= EXTENTS_PER_SHARD_MIN * u32::from(superblock.shard_count)
    }

    /// Says whether survivors have extents of their own, whatever the device's size: for simulations, which have smaller ones.
    pub fn set_survivors_apart(&mut self, apart: bool) {
        self.collector.apart = apart;
    }

    fn unit_size_max(&self) -> u64 {
        UNIT_SIZE_MAX.min(self.superblock.layout.extent_size / UNITS_PER_EXTENT_MIN)
    }

    /// Puts a record that is kept into the shard's unit. Everything in its victim stands up to `victim_end` in the order of frames.
    pub(super) fn stage_survivor(
        &mut self,
        at: usize,
        record: &Record<'_>,
        from: (u32, u32),
        victim_end: u64,
        is_live: bool,
    ) -> Result<u64, NotStaged> {
        if !self.collector.apart {
            return Err(NotStaged::NoRoom);
        }
        let (unit_size_max, extent_size) = (self.unit_size_max(), self.superblock.layout.extent_size);
        let is_checkpoint_due = self.checkpointer.is_due();
        let shard = &mut self.shards[at];
        let hash = shard.hash(record.key);
        let (size, alone) = (record.size() as u64, (UNIT_HEADER_SIZE + record.size()) as u64);
        let survivors = &mut shard.survivors;
        match &survivors.unit {
            Some(unit) if unit.stage != Stage::Filling => return Err(NotStaged::Busy),
            // It stands before a part of this victim.
            Some(unit) if unit.follows < victim_end => {
                self.close_unit(at);
                return Err(NotStaged::Busy);
            }
            Some(unit) => {
                let filled = unit.bytes.len() as u64 + size;
                if filled > unit_size_max || unit.start + filled > extent_size {
                    self.close_unit(at);
                    return Err(NotStaged::Busy);
                }
            }
            None if is_checkpoint_due => return Err(NotStaged::Busy),
            None => {
                let open = match survivors.open {
                    Some(open) if open.position + alone.max(unit_size_max / 8) <= extent_size => open,
                    _ if alone + u64::from(self.superblock.block_size) > extent_size => {
                        return Err(NotStaged::NoRoom);
                    }
                    _ => {
                        let open = survivors.open_another(&self.allocator)?;
                        let header = &open.header;
                        shard.extents.close_survivors(shard.survivors.last);
                        let one = Extent::new(open.place, header.epoch, header.first_frame, false);
                        let follows = shard.log.last_sealed();
                        let one = Extent {
                            follows: Some((follows, follows)),
                            ordinal: header.ordinal,
                            end: open.position,
                            ..one
                        };
                        shard.extents.add(header.extent, one);
                        open
                    }
                };
                let follows = shard.log.last_sealed();
                shard.survivors.unit = Some(Unit {
                    stage: Stage::Filling,
                    extent: open.header.extent,
                    place: open.place,
                    start: open.position,
                    follows,
                    rests_on: follows,
                    bytes: vec![0; UNIT_HEADER_SIZE],
                    record_count: 0,
                    moved: Vec::new(),
                    carry_bytes: 0,
                    victims: Vec::new(),
                    failed: false,
                });
            }
        }
        let Some(unit) = &mut shard.survivors.unit else { return Err(NotStaged::NoRoom) };
        let offset = (unit.start + unit.bytes.len() as u64) as u32;
        record.encode(&mut unit.bytes, unit.place, offset);
        unit.record_count += 1;
        if is_live {
            let at = Appended {
                extent: unit.extent,
                offset,
                size: size as u32,
                sequence: record.sequence,
                frame: 0,
            };
            let chunk = (record.kind == crate::format::record::RecordType::Chunk).then_some(record.long);
            unit.moved.push(Moved { hash, from_extent: from.0, from_offset: from.1, at, chunk });
        }
        let mut carried = Extent::new(unit.place, 0, 0, false);
        let expires = record.expires_at_ms != 0;
        carried.count_carried(
            record.kind,
            record.batch.is_some(),
            size as u32,
            record.value.len() as u32,
            expires,
        );
        unit.carry_bytes += carried.carry_bytes;
        Ok(size)
    }

    /// A victim is done. False when it waits for a unit: it is emptied with that.
    pub(super) fn end_victim(&mut self, at: usize, extent: u32, left: Option<Left>) -> bool {
        let Some(unit) = &mut self.shards[at].survivors.unit else { return true };
        unit.victims.push((extent, left));
        self.close_unit(at);
        false
    }

    /// Nothing more goes into the shard's unit.
    pub(super) fn close_unit(&mut self, at: usize) {
        let shard = &mut self.shards[at];
        if let Some(unit) = &mut shard.survivors.unit
            && unit.stage == Stage::Filling
        {
            unit.stage = Stage::Closed;
            unit.rests_on = shard.log.last_frame();
            if unit.rests_on > shard.durable_frame {
                // What it rests on may be in no hurry of its own.
                self.committer.hurry();
            }
        }
    }

    /// Brings every shard's unit forward. True when anything happened.
    pub(super) fn go_on_with_units(&mut self) -> bool {
        let mut progress = false;
        for at in 0..self.shards.len() {
            let shard = &self.shards[at];
            let Some(unit) = &shard.survivors.unit else { continue };
            match unit.stage {
                Stage::Filling if self.checkpointer.is_due() => self.close_unit(at),
                Stage::Filling => continue,
                Stage::Closed
                    if unit.rests_on > shard.durable_frame && !is_planted(Bug::UnitOvertakesLog) =>
                {
                    continue;
                }
                Stage::Closed => self.write_unit(at),
                Stage::Written(group) if group <= self.committer.durable_group() => self.install_unit(at),
                Stage::Writing(_) | Stage::Written(_) => continue,
            }
            progress = true;
        }
        progress
    }

    fn write_unit(&mut self, at: usize) {
        let block = self.superblock.block_size as usize;
        let shard = &mut self.shards[at];
        let survivors = &mut shard.survivors;
        let Some(unit) = &mut survivors.unit else { return };
        let payload_size = unit.bytes.len();
        let offset = unit.start as u32;
        let records = &unit.bytes[UNIT_HEADER_SIZE..];
        let records_checksum = UnitHeader::checksum_of(records, unit.place, offset + UNIT_HEADER_SIZE as u32);
        let Some(open) = &mut survivors.open else { return };
        let header = UnitHeader {
            unit: survivors.last + 1,
            follows: unit.follows + u64::from(is_planted(Bug::UnitFollowsLater)),
            boot: self.superblock.boot,
            size: payload_size.next_multiple_of(block) as u32,
            payload_size: payload_size as u32,
            record_count: unit.record_count,
            records_checksum,
            epoch: open.header.epoch,
            shard: survivors.shard,
        };
        unit.bytes[..UNIT_HEADER_SIZE].copy_from_slice(&header.encode(unit.place, offset));
        unit.bytes.resize(header.size as usize, 0);
        open.position = unit.start + u64::from(header.size);
        let data = Bytes::from(std::mem::take(&mut unit.bytes));
        let purpose = io_queue::Purpose::Survivors { shard: at };
        let extent_offset = self.superblock.layout.extent_offset(unit.extent);
        let mut left = 0;
        if std::mem::take(&mut survivors.header_pending) {
            let header = open.header.encode(&self.superblock.uuid, &self.superblock.secret, block);
            left += self.queue.write_for(purpose, extent_offset, &Bytes::from(header));
        }
        left += self.queue.write_for(purpose, extent_offset + unit.start, &data);
        unit.stage = Stage::Writing(left);
    }

    /// A piece of a unit was written, or was not.
    pub(super) fn on_unit_write(&mut self, at: usize, status: Result<(), IoError>, clock: Clock) {
        if let Err(error) = &status
            && !matches!(error, IoError::WriteFault { .. } | IoError::Aborted)
        {
            self.poison(error, clock);
        }
        let Some(unit) = &mut self.shards[at].survivors.unit else { return };
        let Stage::Writing(left) = &mut unit.stage else { return };
        *left -= 1;
        if let Err(error) = status {
            tracing::warn!(
                "{error}; extent {} is left, and what garbage collection kept there stays where it was",
                unit.extent
            );
            unit.failed = true;
        }
        if *left > 0 {
            return;
        }
        if unit.failed {
            self.fail_unit(at);
            return;
        }
        unit.stage = Stage::Written(self.committer.group_count() + 1);
        self.committer.hurry();
    }

    /// A unit was not written, or not in whole.
    fn fail_unit(&mut self, at: usize) {
        probe::hit(Probe::UnitFailed);
        let shard = &mut self.shards[at];
        let Some(unit) = shard.survivors.unit.take() else { return };
        let last = shard.survivors.last;
        if let Some(extent) = shard.extents.get_mut(unit.extent) {
            extent.is_left = true;
            extent.last_frame = Some(last);
            self.stats.extents_left += 1;
        }
        shard.survivors.void_what_follows(&self.allocator);
        for (victim, _) in unit.victims {
            if let Some(victim) = shard.extents.get_mut(victim) {
                victim.state = ExtentState::InUse;
            }
        }
        // What it moved before is to be moved again.
        self.collector.void_collection_of(at);
        if self.checkpointer.is_due() {
            self.committer.force_flush();
        }
    }

    /// A unit is durable: its records are the ones that count.
    fn install_unit(&mut self, at: usize) {
        probe::hit(Probe::UnitInstalled);
        let shard = &mut self.shards[at];
        let Some(unit) = shard.survivors.unit.take() else { return };
        let end = shard.survivors.open.map_or(unit.start, |open| open.position);
        if let Some(extent) = shard.extents.get_mut(unit.extent) {
            let first = match extent.follows {
                Some((first, _)) if unit.start > u64::from(self.superblock.block_size) => first,
                _ => unit.follows,
            };
            extent.follows = Some((first, unit.follows));
            extent.end = end;
            extent.carry_bytes += unit.carry_bytes;
        }
        let survivors = &mut shard.survivors;
        survivors.last += 1;
        survivors.mark.last = survivors.last;
        shard.log.set_mark(survivors.mark);
        for one in &unit.moved {
            shard.on_collected(one, &mut self.cache);
        }
        shard.clean = false;
        let frame = shard.log.last_frame();
        for (victim, left) in unit.victims {
            shard.extents.end(victim, left, frame);
        }
        self.collector.on_room();
        if self.checkpointer.is_due() {
            self.committer.force_flush();
        }
    }

    /// Logs that what lies behind the shard's last unit is void, where that is due. True when it was.
    pub(super) fn log_mark(&mut self, at: usize, clock: Clock) -> bool {
        let shard = &mut self.shards[at];
        if !shard.survivors.mark_due {
            return false;
        }
        shard.log.set_mark(shard.survivors.mark);
        if shard.log.log_retired(&self.allocator).is_err() {
            // The next extent of the log begins with it, and the next record of what is retired has it.
            return false;
        }
        shard.survivors.mark_due = false;
        shard.clean = false;
        self.stats.records += 1;
        self.committer.on_append(false, clock);
        true
    }

    /// At a start behind anything but a clean stop: units may be there that nobody was told of.
    pub(super) fn void_units(&mut self, at: usize, clock: Clock) {
        let shard = &mut self.shards[at];
        if !shard.survivors.is_any {
            return;
        }
        shard.extents.close_survivors(shard.survivors.last);
        shard.survivors.void_what_follows(&self.allocator);
        self.log_mark(at, clock);
    }

    /// The node stops: a unit that is not on its way is forgotten, as everything in it is still where it was.
    pub(super) fn drop_unit(&mut self, at: usize) {
        let shard = &mut self.shards[at];
        if shard.survivors.is_under_way() {
            return;
        }
        let Some(unit) = shard.survivors.unit.take() else { return };
        for (victim, _) in unit.victims {
            if let Some(victim) = shard.extents.get_mut(victim) {
                victim.state = ExtentState::InUse;
            }
        }
    }

    /// Closes a shard's open extent of survivors, so that it can be collected, when all of it could go, or when there is much
    /// garbage in it. Anything less would have the same records moved from one extent to the next without end.
    pub(super) fn close_stale_survivors(&mut self, at: usize) {
        let block = u64::from(self.superblock.block_size);
        let extent_size = self.superblock.layout.extent_size;
        let shard = &mut self.shards[at];
        if shard.survivors.is_busy() || !shard.is_collectable() {
            return;
        }
        let Some(open) = shard.survivors.open else { return };
        let number = open.header.extent;
        let Some(one) = shard.extents.get(number).filter(|one| one.end > block) else { return };
        let can_go = one.live_bytes == 0
            && (one.carry_bytes == 0 || one.part_up_to(shard.extents.horizons().of(number, one)) == 256);
        let dead = (one.end - block).saturating_sub(one.live_bytes + one.carry_bytes);
        let is_stale = dead >= extent_size / STALE_DIVISOR && one.live_bytes <= one.end / 2;
        if can_go || is_stale {
            shard.extents.close_survivors(shard.survivors.last);
            shard.survivors.close();
        }
    }
}
