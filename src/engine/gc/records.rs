//! What becomes of a victim's records: moved to the end of the log, or left behind.

use super::*;
use crate::engine::action::is_expired;
use crate::engine::log::{Draft, Moved};
use crate::engine::op::{BatchId, Key};
use crate::engine::operations::AppendError;
use crate::engine::survivors::NotStaged;
use crate::format::frame::{FRAME_HEADER_SIZE, FrameHeader};
use crate::format::record::{Record, RecordType};
use crate::format::unit::UnitHeader;
use crate::format::{FormatError, Place};
use crate::planted::{Bug, is_planted};

/// Bytes of the log that one pass may move: what comes from clients goes in between.
const PASS_SIZE_MAX: u64 = 128 << 10;

/// Records that one pass may look at, at about a microsecond each.
const PASS_COUNT_MAX: u32 = 64;

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
struct Piece {
    number: u64,
    /// Where what is in it stands in the order of frames.
    order: u64,
    size: u32,
    payload_size: u32,
}

impl Piece {
    fn decode(
        active: &Collection,
        place: Place,
        offset: u32,
        block_size: u32,
        room: u64,
    ) -> Result<Piece, FormatError> {
        if active.has_units {
            let header = UnitHeader::decode(active.rest(), place, offset, block_size, room)?;
            let UnitHeader { unit: number, follows: order, size, payload_size, .. } = header;
            return Ok(Piece { number, order, size, payload_size });
        }
        let header = FrameHeader::decode(active.rest(), place, offset, block_size, room)?;
        let FrameHeader { frame, size, payload_size, .. } = header;
        Ok(Piece { number: frame, order: frame, size, payload_size })
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
    Damaged(String),
}

impl<D: Device> Engine<D> {
    /// Deals with the records that were read, one after the other.
    pub(super) fn move_records(&mut self, active: &mut Collection, clock: Clock) -> Moving {
        let at = active.shard;
        let Some(place) = self.shards[at].place_of(active.extent) else { return Moving::GiveUp };
        let (mut moved_size, mut seen_count) = (0, 0);
        loop {
            if active.next_frame > active.last_frame {
                return Moving::Done;
            }
            let offset = active.at as u32;
            let room = active.end - active.at;
            let rest_size = active.rest().len();
            if rest_size < FRAME_HEADER_SIZE {
                let at_end = active.at + rest_size as u64 >= active.end;
                return if at_end { Moving::Damaged("it ends too early".into()) } else { Moving::NeedBytes };
            }
            let header = match Piece::decode(active, place, offset, self.superblock.block_size, room) {
                Ok(header) if header.number == active.next_frame => header,
                Ok(header) => {
                    let (got, expected) = (header.number, active.next_frame);
                    return self.doubt_bytes(active, format!("frame {got} where {expected} should be"));
                }
                Err(error) => return self.doubt_bytes(active, error.to_string()),
            };
            active.order = header.order;
            if rest_size < header.size as usize {
                return Moving::NeedBytes;
            }
            let payload = header.payload_size as usize;
            active.position = active.position.max(FRAME_HEADER_SIZE);
            while active.position < payload {
                let record_at = offset + active.position as u32;
                let bytes = std::mem::take(&mut active.bytes);
                let of_piece = bytes.get(active.done..).and_then(|rest| rest.get(active.position..payload));
                let outcome = match Record::decode(of_piece.unwrap_or_default(), place, record_at) {
                    Ok(decoded) if decoded.value_intact => self
                        .deal_with(active, &decoded.record, record_at, clock)
                        .map(|moved| (decoded.size, moved)),
                    Ok(_) => Err(Moving::Damaged("a value does not match its checksum".into())),
                    Err(error) => Err(Moving::Damaged(error.to_string())),
                };
                active.bytes = bytes;
                match outcome {
                    Ok((size, moved)) => {
                        active.position += size;
                        moved_size += moved;
                        seen_count += 1;
                    }
                    Err(Moving::Damaged(what)) => return self.doubt_bytes(active, what),
                    Err(other) => return other,
                }
                if moved_size > PASS_SIZE_MAX || seen_count >= PASS_COUNT_MAX {
                    return Moving::Pause(true);
                }
            }
            active.done += header.size as usize;
            active.at += u64::from(header.size);
            active.position = 0;
            active.next_frame += 1;
        }
    }

    /// What was read is not what was written: it is read again before anything is called damaged.
    fn doubt_bytes(&mut self, active: &mut Collection, what: String) -> Moving {
        active.tries_left = active.tries_left.saturating_sub(1);
        if active.tries_left == 0 {
            return Moving::Damaged(what);
        }
        active.bytes.clear();
        active.done = 0;
        Moving::NeedBytes
    }

    /// Deals with one record; gives the bytes that were moved for it.
    fn deal_with(
        &mut self,
        active: &Collection,
        record: &Record<'_>,
        offset: u32,
        clock: Clock,
    ) -> Result<u64, Moving> {
        let at = active.shard;
        let key = Key::copy_from_slice(record.key);
        let moved = match self.fate(active, record, &key, offset, clock) {
            Fate::Drop => return Ok(0),
            Fate::Wait => return Err(Moving::Avoid),
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
        match self.append(at, Draft { record: moved, purpose: Purpose::Collection, lazy: true }, clock) {
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
