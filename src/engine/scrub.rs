//! The scrubber: reads what is at rest again, at a bounded rate, so that damage is found while there may still be a copy of it
//! elsewhere.
//!
//! ```text
//! each sealed extent of each shard: read it in pieces -> every live record right? -> the next one
//!        something is not right -> every live record of the extent, one by one, as a client would read it -> report
//! ```
//!
//! Invariants:
//! - A key is called damaged only after its own record was read several times, and is still the newest of its key then.
//! - Nothing is read while clients' reads wait, and no more in a second than the rate says.

use super::Engine;
use super::extents::{Extent, ExtentState};
use super::index::{Entry, Index, RecordRef};
use super::io_queue::{Class, Purpose};
use super::op::{Clock, OpError};
use super::reads::{ReadFor, Wanted};
use crate::device::{Device, DmaBuf, IoError};
use crate::format::Place;
use crate::format::frame::{FRAME_HEADER_SIZE, FrameHeader};
use crate::format::record::{Record, RecordType};
use crate::format::unit::UnitHeader;

/// How long after the start of a pass the next one starts, at the earliest.
const PASS_INTERVAL_US: u64 = 24 * 3_600 * 1_000_000;

/// Bytes that are read at a time.
const PIECE_SIZE_MAX: usize = 256 << 10;

/// Single records that are read at a time: they count among the bytes that are read, which clients wait for.
const RECORD_READS_MAX: usize = 4;

/// Keys that are looked at in one go for those of one extent.
const WALK_COUNT: usize = 1_024;

/// Figures of the scrubber, for one engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct ScrubStats {
    /// Bytes that were read.
    pub bytes: u64,
    /// Passes over everything that have ended.
    pub passes: u64,
    /// When the last pass ended, milliseconds since the Unix epoch; 0 for never.
    pub last_pass_ms: u64,
    /// Damaged records that were found, again in each pass.
    pub damaged: u64,
}

/// What is being looked at.
enum Step {
    /// The next extent.
    Next,
    /// An extent, frame by frame.
    Extent(Reading),
    /// Every live record of an extent, one by one.
    Records(Records),
}

struct Records {
    extent: u32,
    /// Where to look for more of them; `None` at the end.
    cursor: Option<Walk>,
    /// Those that were found and not read yet. No read of them keeps the extent from being given back before its turn comes.
    found: Vec<(Wanted, Entry)>,
    /// Reads under way.
    under_way: usize,
}

impl Records {
    fn of(extent: u32) -> Records {
        Records { extent, cursor: Some(Walk::Keys(0)), found: Vec::new(), under_way: 0 }
    }

    /// Whether there is nothing to do before a read has ended.
    fn waits(&self) -> bool {
        let is_all = self.found.is_empty() && self.cursor.is_none();
        self.under_way >= RECORD_READS_MAX || (is_all && self.under_way > 0)
    }
}

#[derive(Clone, Copy)]
enum Walk {
    /// Over the index, from this cursor on.
    Keys(u64),
    /// Over the chunks, from this id on.
    Chunks(u64),
}

struct Reading {
    extent: u32,
    /// Bytes from the extent's start to `bytes`.
    at: u64,
    end: u64,
    /// What was read: frames, the first at `at`.
    bytes: Vec<u8>,
    is_reading: bool,
}

struct Pass {
    shard: usize,
    /// The last extent of the shard that was looked at.
    last: Option<u32>,
    step: Step,
}

/// The scrubber of one engine.
#[derive(Default)]
pub(super) struct Scrubber {
    /// Bytes a second; 0 for off.
    rate: u64,
    credit: i64,
    credited_us: u64,
    next_pass_us: u64,
    pass: Option<Pass>,
    pub(super) stats: ScrubStats,
}

impl Scrubber {
    fn earn(&mut self, now_us: u64) {
        let elapsed_us = now_us.saturating_sub(self.credited_us).min(1_000_000);
        self.credited_us = now_us;
        let earned = (u128::from(self.rate) * u128::from(elapsed_us) / 1_000_000) as i64;
        // What was not used is not caught up with.
        self.credit = (self.credit + earned).min(PIECE_SIZE_MAX as i64);
    }

    /// Whether a piece of this extent is being read.
    pub(super) fn is_reading(&self, shard: usize, extent: u32) -> bool {
        let Some(Pass { shard: of, step: Step::Extent(reading), .. }) = &self.pass else { return false };
        *of == shard && reading.extent == extent && reading.is_reading
    }
}

enum Verdict {
    Right,
    Suspect,
    NeedBytes,
}

impl<D: Device> Engine<D> {
    /// Changes how many bytes a second are read again; 0 stops it.
    pub fn set_scrub_rate(&mut self, bytes_per_s: u64) {
        self.scrubber.rate = bytes_per_s;
    }

    /// Microseconds on the monotonic clock when `scrub` has something to do although nothing comes in.
    pub(super) fn scrub_deadline_us(&self) -> Option<u64> {
        let scrubber = &self.scrubber;
        if scrubber.rate == 0 {
            return None;
        }
        match scrubber.pass.as_ref().map(|pass| &pass.step) {
            None => Some(scrubber.next_pass_us),
            Some(Step::Extent(Reading { is_reading: true, .. })) => None,
            Some(Step::Records(records)) if records.waits() => None,
            Some(_) => {
                let missing = (1 - scrubber.credit).max(0) as u128 * 1_000_000;
                // A millisecond at least: a slow rate need not be kept to the microsecond.
                let wait_us = missing.div_ceil(u128::from(scrubber.rate)).clamp(1_000, 60_000_000);
                Some(scrubber.credited_us.saturating_add(wait_us as u64))
            }
        }
    }

    /// One pass of the loop. True when anything happened.
    pub(super) fn scrub(&mut self, clock: Clock) -> bool {
        let now_us = clock.monotonic_us;
        if self.scrubber.rate == 0 || self.stopping || self.committer.poisoned().is_some() {
            return false;
        }
        if self.scrubber.pass.is_none() {
            if now_us < self.scrubber.next_pass_us || self.shards.is_empty() {
                return false;
            }
            self.scrubber.next_pass_us = now_us.saturating_add(PASS_INTERVAL_US);
            self.scrubber.pass = Some(Pass { shard: 0, last: None, step: Step::Next });
        }
        self.scrubber.earn(now_us);
        if self.scrubber.credit <= 0 {
            return false;
        }
        let Some(mut pass) = self.scrubber.pass.take() else { return false };
        let (progress, is_done) = match std::mem::replace(&mut pass.step, Step::Next) {
            Step::Next => (true, !self.next_extent(&mut pass)),
            Step::Extent(reading) => (self.scrub_extent(&mut pass, reading), false),
            Step::Records(records) => (self.scrub_records(&mut pass, records), false),
        };
        if is_done {
            self.scrubber.stats.passes += 1;
            self.scrubber.stats.last_pass_ms = clock.unix_ms;
        } else {
            self.scrubber.pass = Some(pass);
        }
        progress
    }

    /// Goes on to the next sealed extent. False at the end.
    fn next_extent(&self, pass: &mut Pass) -> bool {
        while let Some(shard) = self.shards.get(pass.shard) {
            let next = shard.extents.iter().find(|(number, one)| {
                pass.last.is_none_or(|last| *number > last)
                    && matches!(one.state, ExtentState::InUse | ExtentState::Damaged(_))
                    && one.last_frame.is_some_and(|last| !one.is_log() || last <= shard.written_frame)
            });
            if let Some((extent, one)) = next {
                pass.last = Some(extent);
                let at = u64::from(self.superblock.block_size);
                let reading = Reading { extent, at, end: one.end, bytes: Vec::new(), is_reading: false };
                pass.step = Step::Extent(reading);
                return true;
            }
            pass.shard += 1;
            pass.last = None;
        }
        false
    }

    fn scrub_extent(&mut self, pass: &mut Pass, mut reading: Reading) -> bool {
        if reading.is_reading {
            pass.step = Step::Extent(reading);
            return false;
        }
        match self.look_at_frames(pass.shard, &mut reading) {
            Verdict::Right => {}
            Verdict::Suspect => {
                pass.step = Step::Records(Records::of(reading.extent));
            }
            Verdict::NeedBytes => {
                let from = reading.at + reading.bytes.len() as u64;
                let piece_size = self.queue.read_size_max(Class::Scrub).min(PIECE_SIZE_MAX);
                let size = piece_size.min((reading.end - from) as usize);
                let offset = self.superblock.layout.extent_offset(reading.extent) + from;
                self.queue.read(Purpose::Scrub, offset, size);
                self.scrubber.credit -= size as i64;
                self.scrubber.stats.bytes += size as u64;
                reading.is_reading = true;
                pass.step = Step::Extent(reading);
            }
        }
        true
    }

    /// Looks at the frames that were read, as far as they are whole.
    fn look_at_frames(&self, at: usize, reading: &mut Reading) -> Verdict {
        let shard = &self.shards[at];
        // Given back meanwhile: there is nothing in it any more.
        let Some(place) = shard.place_of(reading.extent) else { return Verdict::Right };
        loop {
            let is_at_end = reading.at + reading.bytes.len() as u64 >= reading.end;
            if reading.at >= reading.end {
                return Verdict::Right;
            }
            let short = if is_at_end { Verdict::Suspect } else { Verdict::NeedBytes };
            if reading.bytes.len() < FRAME_HEADER_SIZE {
                return short;
            }
            let (offset, room) = (reading.at as u32, reading.end - reading.at);
            let Some((size, payload)) = self.sizes_at(at, reading, place, room) else {
                return Verdict::Suspect;
            };
            if reading.bytes.len() < size {
                return short;
            }
            let mut position = FRAME_HEADER_SIZE;
            while position < payload {
                let record_at = offset + position as u32;
                let Ok(decoded) = Record::decode(&reading.bytes[position..payload], place, record_at) else {
                    return Verdict::Suspect;
                };
                let record = decoded.record;
                let is_live = || {
                    let entry = match record.kind {
                        RecordType::Put => shard.entry(record.key),
                        RecordType::Chunk => shard.chunks().stored(record.long).map(RecordRef::entry),
                        _ => None,
                    };
                    entry.is_some_and(|one| one.is_at(reading.extent, record_at))
                };
                if !decoded.value_intact && is_live() {
                    return Verdict::Suspect;
                }
                position += decoded.size;
            }
            reading.bytes.drain(..size);
            reading.at += size as u64;
        }
    }

    /// Bytes of the frame, or the unit, that is next, and of its header and records.
    fn sizes_at(&self, at: usize, reading: &Reading, place: Place, room: u64) -> Option<(usize, usize)> {
        let (offset, block) = (reading.at as u32, self.superblock.block_size);
        let is_log = self.shards[at].extents.get(reading.extent).is_none_or(Extent::is_log);
        let (size, payload_size) = if is_log {
            let header = FrameHeader::decode(&reading.bytes, place, offset, block, room).ok()?;
            (header.size, header.payload_size)
        } else {
            let header = UnitHeader::decode(&reading.bytes, place, offset, block, room).ok()?;
            (header.size, header.payload_size)
        };
        Some((size as usize, payload_size as usize))
    }

    pub(super) fn on_scrub_piece(&mut self, buf: Option<DmaBuf>, status: Result<(), IoError>) {
        let Some(Pass { step, .. }) = &mut self.scrubber.pass else { return };
        let Step::Extent(reading) = step else { return };
        reading.is_reading = false;
        match (status, buf) {
            (Ok(()), Some(buf)) => reading.bytes.extend_from_slice(&buf),
            _ => *step = Step::Records(Records::of(reading.extent)),
        }
    }

    /// Reads the next live record of an extent, or looks for more of them. True when anything happened.
    fn scrub_records(&mut self, pass: &mut Pass, mut records: Records) -> bool {
        if records.waits() {
            pass.step = Step::Records(records);
            return false;
        }
        if let Some((wanted, entry)) = records.found.pop() {
            // It may have been overwritten or moved while others were read.
            if self.is_where_it_was(pass.shard, &wanted, &entry) {
                records.under_way += 1;
                self.scrubber.credit -= i64::from(entry.size().max(self.superblock.block_size));
                self.scrubber.stats.bytes += u64::from(entry.size());
                self.start_read(pass.shard, wanted, &entry, ReadFor::Scrub);
            }
        } else if let Some(from) = records.cursor {
            records.cursor = self.find_records(pass.shard, records.extent, from, &mut records.found);
        } else {
            // The next extent's turn.
            return true;
        }
        pass.step = Step::Records(records);
        true
    }

    /// Looks for live records of an extent among those that the index names next, and says where to go on.
    fn find_records(
        &self,
        at: usize,
        extent: u32,
        from: Walk,
        found: &mut Vec<(Wanted, Entry)>,
    ) -> Option<Walk> {
        let shard = &self.shards[at];
        match from {
            Walk::Keys(from) => {
                let next = shard.index().scan(from, WALK_COUNT, &mut |identity, entry| {
                    if entry.extent == extent {
                        found.push((Wanted::Identity(identity), *entry));
                    }
                });
                Some(if next == 0 { Walk::Chunks(0) } else { Walk::Keys(next) })
            }
            Walk::Chunks(from) => {
                for (nth, (id, chunk)) in shard.chunks().stored_from(from).enumerate() {
                    if nth == WALK_COUNT {
                        return Some(Walk::Chunks(id));
                    }
                    if chunk.extent == extent {
                        let wanted = Wanted::Chunk { id, sequence: chunk.sequence, key: None };
                        found.push((wanted, chunk.entry()));
                    }
                }
                None
            }
        }
    }

    fn is_where_it_was(&self, at: usize, wanted: &Wanted, entry: &Entry) -> bool {
        let shard = &self.shards[at];
        let there = match wanted {
            Wanted::Chunk { id, sequence, .. } => {
                shard.chunks().stored(*id).filter(|one| one.sequence == *sequence).map(RecordRef::entry)
            }
            Wanted::Identity(identity) | Wanted::KeyOf(identity) => shard.index().get(*identity),
            Wanted::Key(_, hash) => shard.index().get(hash.identity()),
        };
        there.is_some_and(|there| there == *entry)
    }

    /// One of those records was read, several times if need be.
    pub(super) fn on_scrub_record(
        &mut self,
        at: usize,
        wanted: &Wanted,
        entry: &Entry,
        error: Option<OpError>,
    ) {
        if let Some(Pass { step: Step::Records(records), .. }) = &mut self.scrubber.pass {
            records.under_way -= 1;
        }
        let Some(error) = error else { return };
        // What was overwritten, deleted or moved meanwhile does not matter any more.
        let shard = &self.shards[at];
        let (newest, whose) = match wanted {
            Wanted::Chunk { id, .. } => match (shard.key_of_chunk(*id), shard.chunks().stored(*id)) {
                (Some(key), Some(there)) => (Some(there.entry()), format!("key '{}'", key.escape_ascii())),
                _ => (None, String::new()),
            },
            // Where the key can be read, the error says it.
            Wanted::Identity(identity) | Wanted::KeyOf(identity) => {
                (shard.settled(*identity), "a key".to_owned())
            }
            Wanted::Key(key, hash) => {
                (shard.settled(hash.identity()), format!("key '{}'", key.escape_ascii()))
            }
        };
        if newest.is_some_and(|there| there == *entry) {
            self.scrubber.stats.damaged += 1;
            let shard = shard.id.0;
            tracing::error!("scrub: {whose} of shard {shard} is damaged: {error}");
        }
    }
}
