//! Victims that something is damaged in.
//!
//! What is dead may be damaged, and nobody needs to know. What matters is a record that has to be moved:
//!
//! - Its header is right and its value is not. It is known whose it is, and lost as long as it is the newest of its key. The extent
//!   stays as it is until that is written again or deleted, and is then collected as any other.
//! - Nothing of it can be read, or nothing of its frame. Everything else is moved. The index says whether anything in the extent is
//!   still the newest of a key, and the extent's count of deletes and the like says whether any of those is among what was not found:
//!   they would keep older records of their keys from coming back. When neither is, the extent is free, as one is in which
//!   everything is dead.

use super::records::{Moving, Piece};
use super::*;
use crate::engine::recovery::Lost;
use crate::format::Place;
use crate::format::record::{Record, RecordType};

/// How long an extent is left alone that could not be read for a reason that is none of the medium's.
const UNREAD_TIME_US: u64 = 10_000_000;

/// How often something was tried at a place, the last one at which it did not go well.
#[derive(Default)]
pub(super) struct Tries {
    place: u64,
    count: u32,
}

impl Tries {
    /// Counts one that did not; whether to try again.
    fn try_again(&mut self, place: u64) -> bool {
        if self.place != place {
            *self = Tries { place, count: 0 };
        }
        self.count += 1;
        self.count < READ_TRIES
    }
}

impl Collection {
    /// What was read does not look right: whether to read it again.
    pub(super) fn try_again(&mut self) -> bool {
        let is_again = self.doubts.try_again(self.at + self.position as u64);
        if is_again {
            self.bytes.clear();
            self.done = 0;
        }
        is_again
    }

    /// Goes on behind so many bytes.
    pub(super) fn skip(&mut self, size: usize) {
        self.done += size;
        self.at += size as u64;
        self.position = 0;
    }

    /// Goes on at the next record of a frame, or a unit, that can be read: each has a checksum of its own.
    pub(super) fn skip_record(&mut self, piece: &Piece, place: Place, what: String) {
        probe::hit(Probe::CollectionMetDamage);
        self.unread.get_or_insert(what);
        let payload = piece.payload_size as usize;
        let is_record = |position: &usize| {
            let rest = self.rest().get(*position..payload).unwrap_or_default();
            let sequence = rest.get(8..16).and_then(|bytes| Some(u64::from_le_bytes(bytes.try_into().ok()?)));
            sequence.is_some_and(|sequence| piece.sequences.contains(&sequence))
                && Record::decode(rest, place, self.at as u32 + *position as u32).is_ok()
        };
        self.position = (self.position + 1..payload).find(is_record).unwrap_or(payload);
    }
}

impl<D: Device> Engine<D> {
    /// The frame, or the unit, that is next, when all of it was read. One whose header is not there is passed over.
    pub(super) fn next_piece(&self, active: &mut Collection, place: Place) -> Result<Piece, Moving> {
        let block = self.superblock.block_size;
        let issued = self.shards[active.shard].log.next_sequence();
        loop {
            let room = active.end - active.at;
            if room == 0 {
                active.unread.get_or_insert_with(|| "it ends too early".into());
                return Err(Moving::Done);
            }
            if (active.rest().len() as u64) < u64::from(block).min(room) {
                return Err(Moving::NeedBytes);
            }
            let piece = Piece::decode(active, place, active.at as u32, block, room, issued);
            let numbers = active.next_frame..=active.last_frame;
            let what = match piece {
                Ok(piece) if piece.number == active.next_frame || active.is_searching => {
                    if numbers.contains(&piece.number) {
                        if active.rest().len() < piece.size as usize {
                            return Err(Moving::NeedBytes);
                        }
                        // The passes that go on in it look for no other.
                        active.is_searching = false;
                        active.next_frame = piece.number;
                        return Ok(piece);
                    }
                    String::new()
                }
                Ok(piece) => format!("frame {} where {} should be", piece.number, active.next_frame),
                Err(error) => error.to_string(),
            };
            // What lies between it and the next one need not look like anything.
            if !active.is_searching {
                if active.try_again() {
                    return Err(Moving::NeedBytes);
                }
                probe::hit(Probe::CollectionMetDamage);
                active.unread.get_or_insert(what);
                active.is_searching = true;
            }
            active.skip(u64::from(block).min(room) as usize);
        }
    }

    /// A record that has to be moved and can't be read.
    pub(super) fn lost(&self, record: &Record<'_>, key: &Key, at: usize, offset: u32) -> Moving {
        probe::hit(Probe::CollectionMetLost);
        let lost = match record.kind {
            RecordType::Chunk => Lost::Chunk(record.long, offset),
            _ => Lost::Key(self.shards[at].hash(key).identity(), offset),
        };
        Moving::Lost(lost, format!("the value of key '{}'", key.escape_ascii()))
    }

    /// What a collection that has come to its end leaves behind.
    pub(super) fn left_in(&self, active: &Collection) -> Option<Left> {
        let what = active.unread.as_ref()?;
        let all = self.shards[active.shard].extents.get(active.extent).map_or(0, |one| one.carry_bytes);
        // Nothing is counted too low; if it seems so, it is not known what the count is of.
        let carry_bytes = all.checked_sub(active.carry_read).unwrap_or(all);
        tracing::error!(
            "something in extent {} can't be read: {what}; it is free once nothing in it is needed, and `basalt check` names all damage once the node is stopped",
            active.extent
        );
        Some(Left::Unread { carry_bytes })
    }

    pub(in crate::engine) fn on_collect_read(
        &mut self,
        buf: Option<DmaBuf>,
        status: Result<(), IoError>,
        clock: Clock,
    ) {
        let block = u64::from(self.superblock.block_size);
        let Some(active) = &mut self.collector.active else { return };
        active.is_reading = false;
        let from = active.at + active.bytes.len() as u64;
        match (status, buf) {
            (Ok(()), Some(buf)) => {
                self.collector.credit -= buf.len() as i64;
                active.bytes.extend_from_slice(&buf);
            }
            (_, _) if active.failures.try_again(from) => {}
            // The blocks around one that can't be read may well be right.
            (Err(IoError::UnrecoveredRead { size, .. }), _) if from >= active.slow_to => {
                active.slow_to = from + size.max(block);
                active.failures = Tries::default();
            }
            (Err(IoError::UnrecoveredRead { .. }), _) => {
                active.bytes.resize(active.bytes.len() + block as usize, 0);
            }
            (status, _) => {
                let what = status.map_or_else(|error| error.to_string(), |()| "no data".into());
                // What is on the medium may well be right.
                if let Some(active) = self.collector.active.take() {
                    tracing::warn!("extent {} can't be collected for now: {what}", active.extent);
                    self.collector.stats.abandoned += 1;
                    self.leave(&active, ExtentState::InUse);
                    if let Some(one) = self.shards[active.shard].extents.get_mut(active.extent) {
                        one.avoid_until_us = clock.monotonic_us + UNREAD_TIME_US;
                    }
                }
                return;
            }
        }
        self.go_on_collecting(clock);
    }
}
