//! Reading a shard's units: what garbage collection has kept, each unit to be put behind the frame that it follows.
//!
//! A unit is written only when the frame that it follows is durable, and alone: only the last one can be torn, and then nobody
//! rests on it yet. So what is missing before another unit, or up to the mark that the log has, was lost.

use std::collections::VecDeque;

use super::frames::{Found, found_at};
use super::read::{Extent, reread};
use super::{Damage, Held};
use crate::device::IoError;
use crate::engine::op::ShardId;
use crate::format::extent::ExtentHeader;
use crate::format::retirement::Retirement;
use crate::format::superblock::Superblock;
use crate::format::unit::{UNIT_HEADER_SIZE, UnitHeader};
use crate::format::{Place, is_zero};
use crate::probe::{self, Probe};

/// Reads an extent from a byte on; what it gives starts there.
pub(super) type ReadFrom<'r> = dyn FnMut(u32, usize) -> Result<Extent, IoError> + 'r;

/// A unit as read.
pub(in crate::engine) struct UnitRead {
    pub(in crate::engine) header: UnitHeader,
    pub(super) extent: ExtentHeader,
    pub(super) place: Place,
    /// Bytes from the extent's start.
    pub(in crate::engine) offset: u64,
    pub(in crate::engine) records: Vec<Found>,
    pub(in crate::engine) damage: Vec<Damage>,
    /// Not every record was found.
    pub(super) lacks_records: bool,
    /// The records are what was written.
    is_intact: bool,
}

/// What comes next of a shard's units.
pub(super) enum NextUnit {
    /// So many units were durable and are not there.
    Missing { first: u64, count: u64 },
    /// The next one.
    Unit(Box<UnitRead>),
}

struct Reading {
    header: ExtentHeader,
    place: Place,
    /// The extent's bytes from its start; those before where reading began are zeros.
    bytes: Vec<u8>,
    unreadable: Vec<usize>,
    at: usize,
    /// What is there has been read twice.
    is_sure: bool,
    /// Units from this number on are in a later extent.
    limit: u64,
}

/// Where a checkpoint has units up to.
#[derive(Default)]
pub(super) struct UnitsBase {
    /// The last unit.
    pub(super) last: u64,
    /// The extent in which the next one may be, and from which byte on.
    pub(super) open: Option<(u32, u32)>,
    /// Extents that need not be read, with their epochs.
    pub(super) covered: Vec<(u32, u64)>,
    /// Units that follow an earlier frame never counted.
    pub(super) frame: u64,
}

/// A shard's units, read one after the other.
pub(super) struct Units<'a> {
    superblock: &'a Superblock,
    shard: ShardId,
    chain: &'a [ExtentHeader],
    retired: &'a Retirement,
    base: UnitsBase,
    /// The next extent of the chain.
    next_extent: usize,
    reading: Option<Reading>,
    /// The last unit that was read, whether it counts or not.
    last_read: u64,
    /// The last unit that was given.
    last: u64,
    queue: VecDeque<UnitRead>,
    is_at_end: bool,
    /// Bytes that were read since somebody asked.
    pub(super) bytes_read: u64,
}

impl<'a> Units<'a> {
    pub(super) fn new(
        superblock: &'a Superblock,
        shard: ShardId,
        chain: &'a [ExtentHeader],
        retired: &'a Retirement,
        base: UnitsBase,
    ) -> Units<'a> {
        Units {
            superblock,
            shard,
            chain,
            retired,
            next_extent: 0,
            reading: None,
            last_read: base.last,
            last: base.last,
            base,
            queue: VecDeque::new(),
            is_at_end: false,
            bytes_read: 0,
        }
    }

    /// Extents with units that are needed, whose headers are not there any more.
    pub(super) fn without_header(&self) -> impl Iterator<Item = u32> + use<'a> {
        let (chain, retired) = (self.chain, self.retired);
        let is_lost = |header: &&ExtentHeader| header.ordinal == 0;
        let lost = chain.iter().filter(is_lost);
        lost.filter(|header| !retired.units.contains(header.first_frame)).map(|header| header.extent)
    }

    /// The last unit that was given, or that is retired behind it.
    pub(super) fn last(&self) -> u64 {
        self.retired.units.end_of(self.last + 1).unwrap_or(self.last)
    }

    /// The place in the order of frames of what comes next.
    pub(super) fn next_follows(&mut self, read: &mut ReadFrom<'_>) -> Result<Option<u64>, IoError> {
        self.fill(read)?;
        Ok(match self.queue.front() {
            Some(unit) => Some(unit.header.follows),
            None if self.missing_up_to(self.retired.mark.last + 1).is_some() => Some(u64::MAX),
            None => None,
        })
    }

    /// The boot that wrote the unit that comes next, if it is known which one does.
    pub(super) fn next_boot(&self) -> Option<u64> {
        self.queue.front().map(|unit| unit.header.boot)
    }

    /// Units between the last one and this one that are not there and were not retired.
    fn missing_up_to(&self, next: u64) -> Option<(u64, u64)> {
        let first = self.last() + 1;
        (first < next).then(|| (first, next - first))
    }

    /// Gives what comes next.
    pub(super) fn take(&mut self) -> Option<NextUnit> {
        let next = self.queue.front().map_or(self.retired.mark.last + 1, |unit| unit.header.unit);
        if let Some((first, count)) = self.missing_up_to(next) {
            self.last = next - 1;
            return Some(NextUnit::Missing { first, count });
        }
        let unit = self.queue.pop_front()?;
        self.last = unit.header.unit;
        Some(NextUnit::Unit(Box::new(unit)))
    }

    /// Counts as lost what is missing up to this unit; nothing when the next one that there is may still be one of those.
    pub(super) fn give_up(&mut self, last: u64) -> Option<(u64, u64)> {
        let is_ahead = self.queue.front().is_some_and(|unit| unit.header.unit <= last);
        let missing = self.missing_up_to(last + 1).filter(|_| !is_ahead)?;
        self.last = last;
        Some(missing)
    }

    /// Reads on until it is known whether the next unit counts.
    fn fill(&mut self, read: &mut ReadFrom<'_>) -> Result<(), IoError> {
        // One that is not as it was written counts only when something says that it was durable: the next one does.
        while !self.is_at_end && self.queue.back().is_none_or(|unit| !unit.is_intact) {
            match self.read_next(read)? {
                Some(unit) => self.queue.push_back(unit),
                None => self.is_at_end = true,
            }
        }
        if self.is_at_end
            && let Some(unit) = self.queue.back()
            && !unit.is_intact
            && unit.header.unit > self.retired.mark.last.max(self.base.last)
        {
            probe::hit(Probe::TornUnitCut);
            self.queue.pop_back();
        }
        Ok(())
    }

    /// The extent to read next, and from where.
    fn next_reading(&mut self, read: &mut ReadFrom<'_>) -> Result<Option<Reading>, IoError> {
        let block = self.superblock.block_size as usize;
        while let Some(header) = self.chain.get(self.next_extent) {
            self.next_extent += 1;
            if self.retired.units.contains(header.first_frame) {
                continue;
            }
            let open = self.base.open.filter(|(open, _)| *open == header.extent);
            let from = match self.base.covered.contains(&(header.extent, header.epoch)) {
                true => match open {
                    Some((_, from)) => from as usize,
                    None => continue,
                },
                // It was void already, or is behind the checkpoint.
                false if header.first_frame <= self.base.last => continue,
                false => block,
            };
            let later = &self.chain[self.next_extent..];
            let limit = later.iter().map(|later| later.first_frame).min().unwrap_or(u64::MAX);
            let Extent { mut bytes, unreadable } = read(header.extent, from)?;
            self.bytes_read += bytes.len() as u64;
            bytes.splice(..0, std::iter::repeat_n(0, from));
            let (uuid, secret) = (&self.superblock.uuid, &self.superblock.secret);
            let place = Place::new(uuid, secret, self.shard, header.extent, header.epoch);
            let header = *header;
            return Ok(Some(Reading { header, place, bytes, unreadable, at: from, is_sure: false, limit }));
        }
        Ok(None)
    }

    /// The next unit whose header can be believed.
    fn read_next(&mut self, read: &mut ReadFrom<'_>) -> Result<Option<UnitRead>, IoError> {
        let block = self.superblock.block_size as usize;
        loop {
            let Some(mut reading) =
                self.reading.take().map_or_else(|| self.next_reading(read), |one| Ok(Some(one)))?
            else {
                return Ok(None);
            };
            while reading.at < reading.bytes.len() {
                let unit = self.unit_at(&reading);
                if !unit.as_ref().is_some_and(|unit| unit.is_intact) && !reading.is_sure {
                    reading.is_sure = true;
                    let extent = reading.header.extent;
                    let mut again = |from| read(extent, from);
                    let Reading { bytes, unreadable, at, .. } = &mut reading;
                    if !reread(bytes, unreadable, *at, &mut again)? {
                        let offset = self.superblock.layout.extent_offset(extent) + *at as u64;
                        return Err(IoError::UnrecoveredRead { offset, size: (bytes.len() - *at) as u64 });
                    }
                    continue;
                }
                let Some(unit) = unit.filter(|unit| !self.is_void(unit, reading.limit)) else {
                    reading.at += block;
                    continue;
                };
                reading.at += unit.header.size as usize;
                self.last_read = unit.header.unit;
                self.reading = Some(reading);
                return Ok(Some(unit));
            }
        }
    }

    /// Whether a unit never counted, or does not count any more.
    fn is_void(&self, unit: &UnitRead, limit: u64) -> bool {
        let UnitHeader { unit: number, follows, epoch, .. } = unit.header;
        let is_late = self.retired.mark.voids(number, epoch) || follows < self.base.frame;
        number <= self.last_read || self.retired.units.contains(number) || number >= limit || is_late
    }

    fn unit_at(&self, reading: &Reading) -> Option<UnitRead> {
        unit_at(&reading.bytes, reading.at, &reading.header, reading.place, self.superblock)
    }
}

/// The unit at a place of an extent whose bytes are given whole, if its header can be believed.
pub(super) fn unit_at(
    bytes: &[u8],
    at: usize,
    extent: &ExtentHeader,
    place: Place,
    superblock: &Superblock,
) -> Option<UnitRead> {
    let rest = bytes.get(at..).filter(|rest| UnitHeader::has_magic(rest))?;
    let header = UnitHeader::decode(rest, place, at as u32, superblock.block_size, rest.len() as u64).ok()?;
    let payload = header.payload_size as usize;
    let records = &rest[UNIT_HEADER_SIZE..payload];
    let sum = UnitHeader::checksum_of(records, place, (at + UNIT_HEADER_SIZE) as u32);
    let mut unit = UnitRead {
        header,
        extent: *extent,
        place,
        offset: at as u64,
        records: Vec::new(),
        damage: Vec::new(),
        lacks_records: false,
        is_intact: sum == header.records_checksum,
    };
    let damage = |offset: usize, size: usize, what: String| Damage {
        shard: Some(extent.shard.0),
        extent: extent.extent,
        offset: (at + offset) as u64,
        size: size as u64,
        key: None,
        what,
        held: Held::Anything,
    };
    let mut position = UNIT_HEADER_SIZE;
    let mut lost_from = None;
    while position < payload {
        match found_at(&rest[..payload], position, at, extent.extent, place) {
            Ok((found, size)) => {
                if !found.value_intact {
                    unit.damage.push(found.damaged_value(extent.shard));
                }
                unit.records.push(found);
                position += size;
            }
            // Each record has a checksum of its own: those behind the damage can still be found.
            Err(error) => {
                lost_from.get_or_insert((position, error));
                position += 1;
            }
        }
    }
    unit.lacks_records = unit.records.len() != header.record_count as usize;
    if let Some((from, error)) = lost_from {
        let what = format!("records of unit {} from here on are unreadable: {error}", header.unit);
        unit.damage.push(damage(from, payload - from, what));
    } else if unit.lacks_records {
        let what =
            format!("unit {} has {} records of {}", header.unit, unit.records.len(), header.record_count);
        unit.damage.push(damage(0, payload, what));
    }
    if !is_zero(&rest[payload..header.size as usize]) {
        let what = format!("the padding of unit {} is not zero", header.unit);
        let mut damage = damage(payload, header.size as usize - payload, what);
        if unit.is_intact && !unit.lacks_records {
            damage.held = Held::Nothing;
        }
        unit.damage.push(damage);
        unit.is_intact = false;
    }
    if !unit.is_intact && unit.damage.is_empty() {
        let what = format!("the records of unit {} do not match its checksum", header.unit);
        unit.damage.push(damage(0, payload, what));
    }
    unit.is_intact &= unit.damage.is_empty();
    Some(unit)
}
