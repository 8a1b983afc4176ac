//! A shard's log: the append point, and the frame that is being filled.
//!
//! Invariants:
//! - A frame never leaves its extent, and its place is fixed when its first record is appended.
//! - Blocks of a sealed frame are never written again.
//! - Frames and sequences are numbered without gaps within one start of the node and never go back.
//! - A frame whose write failed is written again under its number, but in another extent: nothing is written twice to a place
//!   where a write failed.

use std::sync::Arc;

use bytes::Bytes;

use super::allocator::{Allocator, Purpose};
use super::index::{Entry, KeyHash};
use crate::format::Place;
use crate::format::extent::{ExtentHeader, ExtentRole};
use crate::format::frame::{FRAME_HEADER_SIZE, FrameHeader};
use crate::format::record::{Record, RecordType};
use crate::format::retirement::{Retirement, UnitMark};
use crate::format::slot::ShardId;
use crate::format::superblock::Superblock;
use crate::limits::{FRAME_SIZE_TARGET, KEPT_FOR_RETIREMENT_MAX};

mod relocate;
#[cfg(test)]
mod tests;

pub(super) use relocate::{Move, Relocated};

/// Beside what is retired now, what the frame of a record about it takes: ranges that are added, and an empty frame of a start
/// in between.
const RETIREMENT_SLACK: u64 = 5 << 10;

/// No more of an extent than this part is kept, where that is more than `KEPT_FOR_RETIREMENT_MAX`.
const KEPT_DIVISOR: u64 = 128;

/// The extent that is being filled.
#[derive(Debug, Clone, Copy)]
pub(super) struct OpenExtent {
    pub(super) header: ExtentHeader,
    pub(super) place: Place,
    /// Bytes from the extent's start to where the next frame goes.
    pub(super) position: u64,
    /// Opened from what is kept for garbage collection: nothing new goes in until the collection has ended.
    pub(super) for_collection: bool,
}

/// A record that garbage collection has put at the end of the log.
pub(super) struct Moved {
    pub(super) hash: KeyHash,
    /// Where it came from.
    pub(super) from_extent: u32,
    pub(super) from_offset: u32,
    pub(super) at: Appended,
    /// It is this chunk, not the newest record of its key.
    pub(super) chunk: Option<u64>,
}

/// A record on its way that will be its key's in the index.
pub(super) struct NewEntry {
    pub(super) hash: KeyHash,
    pub(super) sequence: u64,
}

/// Where a record was put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Appended {
    pub(super) extent: u32,
    pub(super) offset: u32,
    pub(super) size: u32,
    pub(super) sequence: u64,
    pub(super) frame: u64,
}

impl Appended {
    /// As the index will have it.
    pub(super) fn entry(&self, expires: bool, is_part: bool, is_long: bool) -> Entry {
        Entry::new(self.extent, self.offset, self.size, expires, is_part, is_long)
    }
}

/// Why a record was not put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// The open frame must be written first.
    Stall,
    /// No extent is left for it.
    Full,
}

/// A frame on its way to the device.
pub(super) struct SealedFrame {
    pub(super) frame: u64,
    /// Byte offset on the device and bytes, to be written in any order.
    pub(super) writes: Vec<(u64, Bytes)>,
    /// Keys to move from the pending set to the index, with their sequences.
    pub(super) entries: Vec<NewEntry>,
    /// Chunks in it, by their ids.
    pub(super) chunks: Vec<u64>,
    pub(super) moved: Vec<Moved>,
    pub(super) placed: PlacedFrame,
}

/// A frame's bytes and where they are to go: what it takes to put them elsewhere.
pub(super) struct PlacedFrame {
    header: FrameHeader,
    pub(super) extent: u32,
    pub(super) place: Place,
    pub(super) is_reserve: bool,
    /// Bytes from the extent's start.
    start: u32,
    data: Bytes,
}

impl PlacedFrame {
    /// Its number.
    pub(super) fn frame(&self) -> u64 {
        self.header.frame
    }

    /// Which life of its extent it belongs to.
    pub(super) fn epoch(&self) -> u64 {
        self.header.epoch
    }

    /// Bytes from the extent's start to it.
    pub(super) fn start(&self) -> u32 {
        self.start
    }

    /// Bytes of it.
    pub(super) fn size(&self) -> u64 {
        self.data.len() as u64
    }

    /// Bytes from the extent's start to its end.
    pub(super) fn end(&self) -> u32 {
        self.start + self.header.size
    }
}

/// A record to append: what is known before it has a sequence.
#[derive(Debug, Clone, Copy)]
pub(super) struct Draft<'a> {
    pub(super) record: Record<'a>,
    pub(super) purpose: Purpose,
    /// Nobody waits for it: it goes with the next frame, and causes none for a while.
    pub(super) lazy: bool,
}

/// The append point of one shard.
pub(super) struct ShardLog {
    shard: ShardId,
    superblock: Arc<Superblock>,
    open: Option<OpenExtent>,
    /// The open extent's header is not on the device yet.
    header_pending: bool,
    /// The frame being filled: header space, then records. Empty when there is none.
    staging: Vec<u8>,
    record_count: u32,
    first_sequence: u64,
    entries: Vec<NewEntry>,
    chunks: Vec<u64>,
    moved: Vec<Moved>,
    /// Something is in the frame that somebody waits for.
    is_urgent: bool,
    /// What is not needed any more, and whose extents may have been given back.
    retired: Retirement,
    next_sequence: u64,
    next_frame: u64,
    boot: u64,
    /// Write an empty frame with the next group: at start (what follows the append point is void) or at a clean stop.
    marker: Option<Marker>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Marker {
    Start,
    CleanStop,
}

impl ShardLog {
    /// A log that goes on behind what recovery found.
    pub(super) fn new(
        shard: ShardId,
        superblock: Arc<Superblock>,
        open: Option<OpenExtent>,
        next_sequence: u64,
        next_frame: u64,
        retired: Retirement,
    ) -> ShardLog {
        let boot = superblock.boot;
        ShardLog {
            shard,
            superblock,
            open,
            header_pending: false,
            staging: Vec::new(),
            record_count: 0,
            first_sequence: next_sequence,
            entries: Vec::new(),
            chunks: Vec::new(),
            moved: Vec::new(),
            is_urgent: false,
            retired,
            next_sequence,
            next_frame,
            boot,
            marker: None,
        }
    }

    fn extent_size(&self) -> u64 {
        self.superblock.layout.extent_size
    }

    fn block_size(&self) -> u64 {
        u64::from(self.superblock.block_size)
    }

    /// Bytes left in the open extent for another frame's records.
    fn room(&self) -> u64 {
        match &self.open {
            Some(open) => self.extent_size().saturating_sub(open.position + FRAME_HEADER_SIZE as u64),
            None => 0,
        }
    }

    /// The same for records of this kind. At the end is room that only a record of what is retired takes: a log that is full
    /// while no extent is free could never free one.
    fn room_for(&self, purpose: Purpose) -> u64 {
        match purpose {
            Purpose::Retirement => self.room(),
            _ => self.room().saturating_sub(self.kept_size()),
        }
    }

    /// Bytes of that room.
    pub(super) fn kept_size(&self) -> u64 {
        let record = retired_record(&[]).size() + self.retired.size();
        let frame = (FRAME_HEADER_SIZE + record) as u64 + RETIREMENT_SLACK;
        let most = KEPT_FOR_RETIREMENT_MAX.max(self.extent_size() / KEPT_DIVISOR).max(self.block_size());
        frame.next_multiple_of(self.block_size()).min(most)
    }

    /// Whether a frame waits to be written.
    pub(super) fn is_dirty(&self) -> bool {
        !self.staging.is_empty() || self.marker.is_some()
    }

    /// Whether somebody waits for the frame being filled.
    pub(super) fn is_urgent(&self) -> bool {
        (!self.staging.is_empty() && self.is_urgent) || self.marker.is_some()
    }

    /// Bytes in the frame being filled.
    pub(super) fn staged_size(&self) -> usize {
        self.staging.len()
    }

    /// The last frame that has been closed; 0 before the first.
    pub(super) fn last_sealed(&self) -> u64 {
        self.next_frame - 1
    }

    /// The last frame that anything was appended to; 0 before the first.
    pub(super) fn last_frame(&self) -> u64 {
        if self.is_dirty() { self.next_frame } else { self.next_frame - 1 }
    }

    /// Asks for an empty frame, unless there is no room for one (then nothing can follow the last frame either).
    pub(super) fn mark_start(&mut self) {
        self.mark(Marker::Start);
    }

    /// Asks for the frame that says: nothing was in flight when the node stopped.
    pub(super) fn mark_clean_stop(&mut self) {
        self.mark(Marker::CleanStop);
    }

    fn mark(&mut self, marker: Marker) {
        if self.open.is_some() && self.room() > 0 {
            self.marker = Some(marker);
        }
    }

    /// Appends a record to the frame being filled.
    pub(super) fn append(&mut self, draft: Draft<'_>, allocator: &Allocator) -> Result<Appended, NoRoom> {
        let size = draft.record.size();
        if self.staging.is_empty() {
            self.make_room(size as u64, draft.purpose, allocator)?;
        } else if self.staging.len() + size > FRAME_SIZE_TARGET
            || (self.staging.len() - FRAME_HEADER_SIZE + size) as u64 > self.room_for(draft.purpose)
            || self.is_reserved_for_others(draft.purpose)
        {
            return Err(NoRoom::Stall);
        }
        let Some(open) = self.open else { return Err(NoRoom::Full) };
        if self.staging.is_empty() {
            self.staging.resize(FRAME_HEADER_SIZE, 0);
            self.first_sequence = self.next_sequence;
            self.record_count = 0;
            self.is_urgent = false;
            // Recovery must know what is retired before it reads a shard's log, and looks for it in the newest extent.
            if open.position == self.block_size() && draft.record.kind != RecordType::Retired {
                let value = self.retired.encode();
                self.stage(retired_record(&value), &open);
            }
        }
        self.is_urgent |= !draft.lazy;
        Ok(self.stage(draft.record, &open))
    }

    /// Encodes a record into the frame being filled.
    fn stage(&mut self, record: Record<'_>, open: &OpenExtent) -> Appended {
        let record = Record { sequence: self.next_sequence, ..record };
        let offset = open.position as u32 + self.staging.len() as u32;
        record.encode(&mut self.staging, open.place, offset);
        self.record_count += 1;
        self.next_sequence += 1;
        Appended {
            extent: open.header.extent,
            offset,
            size: record.size() as u32,
            sequence: record.sequence,
            frame: self.next_frame,
        }
    }

    /// Notes how far the shard's units are durable. The next record that says what is retired says that too.
    pub(super) fn set_mark(&mut self, mark: UnitMark) {
        self.retired.mark = mark;
    }

    /// Logs that these frames, and these units, are not needed any more, besides those that were before. Their extents may be
    /// given back once that is durable.
    pub(super) fn retire(
        &mut self,
        frames: impl IntoIterator<Item = (u64, u64)>,
        units: impl IntoIterator<Item = (u64, u64)>,
        allocator: &Allocator,
    ) -> Result<Appended, NoRoom> {
        let mut retired = self.retired.clone();
        frames.into_iter().for_each(|(first, last)| retired.frames.insert(first, last));
        units.into_iter().for_each(|(first, last)| retired.units.insert(first, last));
        let value = retired.encode();
        let draft = Draft { record: retired_record(&value), purpose: Purpose::Retirement, lazy: false };
        let appended = self.append(draft, allocator)?;
        self.retired = retired;
        Ok(appended)
    }

    /// Logs what is retired once more, with the mark as it is now. That frees nothing, so it leaves alone what is kept for
    /// records that do.
    pub(super) fn log_retired(&mut self, allocator: &Allocator) -> Result<Appended, NoRoom> {
        let value = self.retired.encode();
        let draft = Draft { record: retired_record(&value), purpose: Purpose::Survivors, lazy: false };
        self.append(draft, allocator)
    }

    /// Says that a record just appended is one that was moved here.
    pub(super) fn note_moved(&mut self, moved: Moved) {
        self.moved.push(moved);
    }

    /// Says that the record just appended is a chunk of a value that is being written.
    pub(super) fn note_chunk(&mut self, id: u64) {
        self.chunks.push(id);
    }

    /// The collection that opened an extent for itself has ended: what is left of the extent is for everyone.
    pub(super) fn end_collection(&mut self) {
        if let Some(open) = &mut self.open {
            open.for_collection = false;
        }
    }

    /// Says that the record just appended is the newest of its key, to be moved to the index once it is written.
    pub(super) fn note_entry(&mut self, hash: KeyHash, sequence: u64) {
        self.entries.push(NewEntry { hash, sequence });
    }

    fn is_reserved_for_others(&self, purpose: Purpose) -> bool {
        purpose == Purpose::Data && self.open.is_some_and(|open| open.header.reserve || open.for_collection)
    }

    /// Opens another extent when the open one can't take a frame with `size` bytes of records.
    fn make_room(&mut self, size: u64, purpose: Purpose, allocator: &Allocator) -> Result<(), NoRoom> {
        if size <= self.room_for(purpose) && !self.is_reserved_for_others(purpose) {
            return Ok(());
        }
        self.open_another(purpose, allocator)
    }

    /// Has the next record begin an extent, with the first frame of it.
    pub(super) fn begin_extent(&mut self, purpose: Purpose, allocator: &Allocator) -> Result<(), NoRoom> {
        if !self.staging.is_empty() {
            return Err(NoRoom::Stall);
        }
        if self.open.is_some_and(|open| open.position == self.block_size()) {
            return Ok(());
        }
        self.open_another(purpose, allocator)
    }

    fn open_another(&mut self, purpose: Purpose, allocator: &Allocator) -> Result<(), NoRoom> {
        // The header of an extent that was opened but got no frame yet would be lost by opening another.
        if self.header_pending {
            return Err(NoRoom::Stall);
        }
        self.open = Some(self.take_extent(self.next_frame, purpose, allocator)?);
        self.header_pending = true;
        // The new extent's epoch voids whatever follows the old append point.
        if self.marker == Some(Marker::Start) {
            self.marker = None;
        }
        Ok(())
    }

    /// A fresh extent whose first frame will be this one.
    fn take_extent(
        &self,
        first_frame: u64,
        purpose: Purpose,
        allocator: &Allocator,
    ) -> Result<OpenExtent, NoRoom> {
        let (extent, from) = match allocator.take(Purpose::Data) {
            Some(extent) => (extent, Purpose::Data),
            None if purpose == Purpose::Data => return Err(NoRoom::Full),
            None => (allocator.take(purpose).ok_or(NoRoom::Full)?, purpose),
        };
        let reserve = from == Purpose::Reserve;
        if reserve {
            allocator.count_reserve(true);
        }
        let header = ExtentHeader {
            extent,
            shard: self.shard,
            epoch: allocator.next_epoch(),
            ordinal: allocator.next_ordinal(),
            first_frame,
            boot: self.boot,
            reserve,
            role: ExtentRole::Log,
        };
        let place = self.place(&header);
        let for_collection = from.is_collection() || matches!(from, Purpose::Survivors | Purpose::Retirement);
        Ok(OpenExtent { header, place, position: self.block_size(), for_collection })
    }

    pub(super) fn place(&self, header: &ExtentHeader) -> Place {
        let superblock = &self.superblock;
        Place::new(&superblock.uuid, &superblock.secret, header.shard, header.extent, header.epoch)
    }

    /// The sequence that comes next.
    pub(super) fn next_sequence(&self) -> u64 {
        self.next_sequence
    }

    /// What is not needed any more.
    pub(super) fn retired(&self) -> &Retirement {
        &self.retired
    }

    /// The open extent, whose place readers need.
    pub(super) fn open_extent(&self) -> Option<&OpenExtent> {
        self.open.as_ref()
    }

    /// Closes the frame being filled and says what to write. `durable` is the last frame known to be durable.
    pub(super) fn seal(&mut self, durable: u64) -> Option<SealedFrame> {
        if !self.is_dirty() {
            return None;
        }
        let marker = self.marker.take();
        let block = self.block_size() as usize;
        let open = self.open.as_mut()?;
        if self.staging.is_empty() {
            self.staging.resize(FRAME_HEADER_SIZE, 0);
            self.first_sequence = self.next_sequence;
            self.record_count = 0;
        }
        self.is_urgent = false;
        let mut data = std::mem::take(&mut self.staging);
        let payload_size = data.len();
        data.resize(payload_size.next_multiple_of(block), 0);
        let header = FrameHeader {
            frame: self.next_frame,
            durable,
            first_sequence: self.first_sequence,
            boot: self.boot,
            size: data.len() as u32,
            payload_size: payload_size as u32,
            record_count: self.record_count,
            clean: marker == Some(Marker::CleanStop),
            epoch: open.header.epoch,
            shard: self.shard,
        };
        let start = open.position;
        data[..FRAME_HEADER_SIZE].copy_from_slice(&header.encode(open.place, start as u32));
        open.position += data.len() as u64;
        let extent_offset = self.superblock.layout.extent_offset(open.header.extent);
        let mut writes = Vec::with_capacity(2);
        if std::mem::take(&mut self.header_pending) {
            let bytes = open.header.encode(&self.superblock.uuid, &self.superblock.secret, block);
            writes.push((extent_offset, Bytes::from(bytes)));
        }
        let placed = PlacedFrame {
            header,
            extent: open.header.extent,
            place: open.place,
            is_reserve: open.header.reserve,
            start: start as u32,
            data: Bytes::from(data),
        };
        writes.push((extent_offset + start, placed.data.clone()));
        self.next_frame += 1;
        let (entries, moved) = (std::mem::take(&mut self.entries), std::mem::take(&mut self.moved));
        let chunks = std::mem::take(&mut self.chunks);
        Some(SealedFrame { frame: header.frame, writes, entries, chunks, moved, placed })
    }
}

fn retired_record(value: &[u8]) -> Record<'_> {
    Record {
        kind: RecordType::Retired,
        sequence: 0,
        database: 0,
        expires_at_ms: 0,
        batch: None,
        long: 0,
        key: &[],
        value,
    }
}
