//! What becomes of a victim's records: moved to the end of the log, or left behind.

use std::ops::Range;

use super::*;
use crate::engine::action::is_expired;
use crate::engine::extents::carried_size;
use crate::engine::log::{Draft, Moved};
use crate::engine::op::{BatchId, Key};
use crate::engine::operations::AppendError;
use crate::engine::recovery::Lost;
use crate::engine::survivors::NotStaged;
use crate::format::frame::{FRAME_HEADER_SIZE, FrameHeader};
use crate::format::record::{Decoded, Record, RecordType};
use crate::format::unit::UnitHeader;
use crate::format::{FormatError, Place};
use crate::planted::{Bug, is_planted};

/// Bytes of the log that one pass may move: what comes from clients goes in between.
const PASS_SIZE_MAX: u64 = 128 << 10;

/// Records that one pass may look at, at about a microsecond each; and while writers wait for what is collected, who would not be
/// served sooner by shorter ones.
const PASS_COUNT_MAX: u32 = 64;
const PASS_COUNT_WAITED_FOR_MAX: u32 = 512;

/// What to do with a record of a victim.
enum Fate {
    Drop,
    /// A batch is about to change its key.
    Wait,
    MoveLive,
    MoveDelete,
    MoveCommit,
}

/// A frame or a unit of a victim, from its header.
pub(super) struct Piece {
    pub(super) number: u64,
    /// Where what is in it stands in the order of frames.
    order: u64,
    pub(super) size: u32,
    pub(super) payload_size: u32,
    /// Sequences that its records may have: those of a frame; in a unit, all that were issued.
    pub(super) sequences: Range<u64>,
}

impl Piece {
    pub(super) fn decode(
        active: &Collection,
        place: Place,
        offset: u32,
        block_size: u32,
        room: u64,
        issued: u64,
    ) -> Result<Piece, FormatError> {
        if active.has_units {
            let header = UnitHeader::decode(active.rest(), place, offset, block_size, room)?;
            let UnitHeader { unit: number, follows: order, size, payload_size, .. } = header;
            return Ok(Piece { number, order, size, payload_size, sequences: 1..issued });
        }
        let header = FrameHeader::decode(active.rest(), place, offset, block_size, room)?;
        let FrameHeader { frame, size, payload_size, first_sequence: first, record_count, .. } = header;
        let sequences = first..first.saturating_add(u64::from(record_count));
        Ok(Piece { number: frame, order: frame, size, payload_size, sequences })
    }
}

pub(super) enum Moving {
    /// Everything that could be moved for now has been; whether that was anything.
    Pause(bool),
    /// The frames that were read are done.
    NeedBytes,
    Done,
    /// It can't go on for now; another extent may do.
    Avoid,
    /// It can't go on.
    GiveUp,
    /// A record that has to be moved can't be read; whose it is.
    Lost(Lost, String),
}

/// What one pass has done.
#[derive(Default)]
struct Pass {
    /// Bytes that were moved.
    moved_size: u64,
    /// Records that were looked at, and may be.
    seen_count: u32,
    count_max: u32,
}

/// Bytes of a record that count among those of deletes and the like.
fn carried(Decoded { record, size, .. }: &Decoded<'_>) -> u64 {
    let (size, value_size, expires) = (*size as u32, record.value.len() as u32, record.expires_at_ms != 0);
    carried_size(record.kind, size, value_size, expires).map_or(0, u64::from)
}

impl<D: Device> Engine<D> {
    /// Deals with the records that were read, one after the other.
    pub(super) fn move_records(&mut self, active: &mut Collection, clock: Clock) -> Moving {
        let Some(place) = self.shards[active.shard].place_of(active.extent) else { return Moving::GiveUp };
        let count_max = if self.is_waited_for() { PASS_COUNT_WAITED_FOR_MAX } else { PASS_COUNT_MAX };
        let mut pass = Pass { count_max, ..Pass::default() };
        loop {
            if active.next_frame > active.last_frame {
                return Moving::Done;
            }
            let piece = match self.next_piece(active, place) {
                Ok(piece) => piece,
                Err(stop) => return stop,
            };
            if let Err(stop) = self.move_piece(active, &piece, place, &mut pass, clock) {
                return stop;
            }
            active.skip(piece.size as usize);
            active.next_frame = piece.number + 1;
        }
    }

    /// Deals with the records of a frame or a unit, from where it was left on.
    fn move_piece(
        &mut self,
        active: &mut Collection,
        piece: &Piece,
        place: Place,
        pass: &mut Pass,
        clock: Clock,
    ) -> Result<(), Moving> {
        let payload = piece.payload_size as usize;
        active.order = piece.order;
        active.position = active.position.max(FRAME_HEADER_SIZE);
        while active.position < payload {
            let record_at = active.at as u32 + active.position as u32;
            let bytes = std::mem::take(&mut active.bytes);
            let of_piece = bytes.get(active.done..).and_then(|rest| rest.get(active.position..payload));
            let dealt = match Record::decode(of_piece.unwrap_or_default(), place, record_at) {
                Ok(decoded) => {
                    let moved = self.deal_with(active, &decoded, record_at, clock);
                    Ok(moved.map(|moved| (decoded.size, moved, carried(&decoded))))
                }
                Err(error) => Err(error.to_string()),
            };
            active.bytes = bytes;
            match dealt {
                Ok(Ok((size, moved, carried))) => {
                    active.position += size;
                    active.carry_read += carried;
                    pass.moved_size += moved;
                    pass.seen_count += 1;
                }
                // What was read may not be what is there: it is read again before anything is called damaged.
                Ok(Err(Moving::Lost(..))) | Err(_) if active.try_again() => return Err(Moving::NeedBytes),
                Err(what) => active.skip_record(piece, place, what),
                Ok(Err(stop)) => return Err(stop),
            }
            if pass.moved_size > PASS_SIZE_MAX || pass.seen_count >= pass.count_max {
                return Err(Moving::Pause(true));
            }
        }
        Ok(())
    }

    /// Deals with one record; gives the bytes that were moved for it.
    fn deal_with(
        &mut self,
        active: &Collection,
        Decoded { record, value_intact, .. }: &Decoded<'_>,
        offset: u32,
        clock: Clock,
    ) -> Result<u64, Moving> {
        let at = active.shard;
        let key = Key::copy_from_slice(record.key);
        let moved = match self.fate(active, record, &key, offset, clock) {
            Fate::Drop => return Ok(0),
            Fate::Wait => return Err(Moving::Avoid),
            // Nothing else needs the value.
            Fate::MoveLive if !value_intact => return Err(self.lost(record, &key, at, offset)),
            Fate::MoveLive => Record {
                batch: None,
                expires_at_ms: if is_planted(Bug::MoveForgetsExpiry) { 0 } else { record.expires_at_ms },
                ..*record
            },
            Fate::MoveDelete => Record {
                kind: RecordType::Delete,
                value: &[],
                expires_at_ms: 0,
                batch: None,
                long: 0,
                ..*record
            },
            Fate::MoveCommit => Record { value: &[0, 0], ..*record },
        };
        let is_live = matches!(moved.kind, RecordType::Put | RecordType::Chunk);
        match self.stage_survivor(at, &moved, (active.extent, offset), active.order_end, is_live) {
            Ok(size) => {
                probe::hit_if(moved.kind == RecordType::Chunk, Probe::ChunkMoved);
                self.collector.stats.bytes_moved += size;
                return Ok(size);
            }
            Err(NotStaged::Busy) => return Err(Moving::Pause(false)),
            Err(NotStaged::NoRoom) => {}
        }
        // Crashes leave extents of survivors half filled, until all that is kept for collections is in them.
        let is_freeing = |shard: &Shard| !shard.extents.leaving.is_empty() || shard.survivors.is_busy();
        let purpose = match self.shards.iter().any(is_freeing) {
            true => Purpose::Collection,
            false => Purpose::LastCollection,
        };
        match self.append(at, Draft { record: moved, purpose, lazy: true }, clock) {
            Ok(appended) => {
                if is_live {
                    let moved = Moved {
                        hash: self.shards[at].hash(&key),
                        from_extent: active.extent,
                        from_offset: offset,
                        at: appended,
                        chunk: (record.kind == RecordType::Chunk).then_some(record.long),
                    };
                    self.shards[at].log.note_moved(moved);
                }
                probe::hit_if(moved.kind == RecordType::Chunk, Probe::ChunkMoved);
                self.collector.stats.bytes_moved += u64::from(appended.size);
                Ok(u64::from(appended.size))
            }
            // The frame must go first: what fills it must not wait for the lazy ones' time.
            Err(AppendError::Stall) => {
                self.committer.hurry();
                Err(Moving::Pause(false))
            }
            Err(AppendError::Failed(_)) => Err(Moving::GiveUp),
        }
    }

    fn fate(
        &mut self,
        active: &Collection,
        record: &Record<'_>,
        key: &Key,
        offset: u32,
        clock: Clock,
    ) -> Fate {
        let at = active.shard;
        let shard = &self.shards[at];
        // Nothing older of the key can be anywhere else.
        let is_last = active.order <= active.horizon;
        match record.kind {
            RecordType::Retired => Fate::Drop,
            // Only the oldest extent may have one, and then nothing is left that it drops.
            RecordType::Clear => Fate::Drop,
            RecordType::Commit => {
                let Some(mark) = record.batch else { return Fate::Drop };
                let batch = BatchId { boot: mark.boot, number: mark.number };
                let is_needed =
                    shard.unsettled.contains(&batch) || shard.extents.has_older_parts(active.extent);
                if is_needed && !is_planted(Bug::DropsCommitRecords) { Fate::MoveCommit } else { Fate::Drop }
            }
            // Whoever needs it keeps it among the shard's chunks.
            RecordType::Chunk => match shard.chunks().stored(record.long) {
                Some(one) if one.extent == active.extent && one.offset == offset => Fate::MoveLive,
                _ => Fate::Drop,
            },
            RecordType::Put | RecordType::Delete => {
                if shard.is_pending(key) {
                    return Fate::Drop;
                }
                let entry = shard.entry(key);
                let is_here = entry.is_some_and(|one| one.is_at(active.extent, offset));
                let needed = match (record.kind, entry) {
                    (_, Some(_)) => is_here,
                    // Absent: this says so, as does one that expires, or an older record of the key would come back.
                    (RecordType::Delete, None) => !is_last && !is_planted(Bug::DropsTombstones),
                    (_, None) => record.expires_at_ms != 0 && !is_last,
                };
                if !needed {
                    return Fate::Drop;
                }
                if shard.holds.contains_key(key)
                    && self.is_prepared(at, key)
                    && !is_planted(Bug::MovesHeldKeys)
                {
                    probe::hit(Probe::CollectionMetHold);
                    return Fate::Wait;
                }
                if is_here && !is_expired(record.expires_at_ms, clock.unix_ms) {
                    return Fate::MoveLive;
                }
                if is_here {
                    // Reaps it.
                    self.shards[at].lookup(key, clock.unix_ms);
                    if is_last {
                        return Fate::Drop;
                    }
                }
                Fate::MoveDelete
            }
        }
    }
}
