//! Frames and the records in them, as read: intact, damaged, or found behind damage by their own checksums.

use std::ops::Range;

use bytes::Bytes;

use super::survey::lost_header;
use super::units::{UnitRead, unit_at};
use super::{Damage, Held};
use crate::engine::index::RecordRef;
use crate::engine::op::{BatchId, ShardId};
use crate::format::extent::{ExtentHeader, ExtentRole};
use crate::format::frame::{FRAME_HEADER_SIZE, FrameHeader};
use crate::format::manifest::{self, ManifestPiece};
use crate::format::record::{Decoded, Record, RecordType};
use crate::format::retirement::Retirement;
use crate::format::superblock::Superblock;
use crate::format::{FormatError, Place, is_zero};
use crate::probe::{self, Probe};

/// A record of a frame, owned.
pub(in crate::engine) struct Found {
    pub(in crate::engine) kind: RecordType,
    pub(in crate::engine) key: Bytes,
    pub(in crate::engine) record: RecordRef,
    pub(in crate::engine) batch: Option<(BatchId, ShardId)>,
    pub(in crate::engine) participant_count: u16,
    /// What a record of that kind says is retired.
    pub(in crate::engine) retired: Option<Retirement>,
    /// The id of a chunk.
    pub(in crate::engine) chunk: Option<u64>,
    /// The pieces of a long value, where its manifest can be read.
    pub(in crate::engine) pieces: Option<Vec<ManifestPiece>>,
    /// Bytes that the record stores of it.
    pub(in crate::engine) stored_size: u32,
    pub(in crate::engine) value_intact: bool,
}

/// A frame as read, with what is wrong with it.
pub(in crate::engine) struct FrameRead {
    pub(in crate::engine) header: FrameHeader,
    pub(in crate::engine) extent: u32,
    pub(in crate::engine) offset: u64,
    pub(in crate::engine) records: Vec<Found>,
    pub(in crate::engine) damage: Vec<Damage>,
    /// Records with sequences below this one were lost; 0 when none was.
    pub(in crate::engine) lost_below: u64,
}

pub(super) fn frame_at(
    bytes: &[u8],
    at: usize,
    place: Place,
    superblock: &Superblock,
) -> Option<(FrameHeader, usize)> {
    let rest = bytes.get(at..)?;
    if !FrameHeader::has_magic(rest) {
        return None;
    }
    let header =
        FrameHeader::decode(rest, place, at as u32, superblock.block_size, rest.len() as u64).ok()?;
    Some((header, header.size as usize))
}

pub(super) fn read_frame(
    bytes: &[u8],
    header: FrameHeader,
    extent: u32,
    at: usize,
    place: Place,
    shard: ShardId,
) -> FrameRead {
    let mut read = FrameRead {
        header,
        extent,
        offset: at as u64,
        records: Vec::new(),
        damage: Vec::new(),
        lost_below: 0,
    };
    let payload = header.payload_size as usize;
    let mut position = FRAME_HEADER_SIZE;
    let damage = |offset: usize, size: usize, key: Option<&[u8]>, what: String| Damage {
        shard: Some(shard.0),
        extent,
        offset: (at + offset) as u64,
        size: size as u64,
        key: key.map(|key| key.escape_ascii().to_string()),
        what,
        held: Held::Anything,
    };
    for number in 0..header.record_count {
        let (record, size) = match found_at(&bytes[..payload], position, at, extent, place) {
            Ok(found) => found,
            Err(error) => {
                let what = format!("records of frame {} from here on are unreadable: {error}", header.frame);
                read.damage.push(damage(position, payload - position, None, what));
                // Each record carries its own checksum: those behind the damage can still be found.
                probe::hit(Probe::RecordsSalvaged);
                let first = header.first_sequence + u64::from(number);
                let expected = first..header.first_sequence + u64::from(header.record_count);
                let shifted = Shifted { bytes: &bytes[..payload], at };
                let found = shifted.salvage(position, expected.clone(), extent, place);
                read.lost_below = lost_below(&found, &expected);
                for one in &found {
                    if !one.value_intact {
                        read.damage.push(one.damaged_value(shard));
                    }
                }
                read.records.extend(found);
                return read;
            }
        };
        if record.record.sequence != header.first_sequence + u64::from(number) {
            let what = format!("sequence {} is out of order", record.record.sequence);
            read.damage.push(damage(position, size, Some(&record.key), what));
        }
        if !record.value_intact {
            let mut damage = record.damaged_value(shard);
            if record.kind == RecordType::Retired {
                damage.held = Held::Retirement(header.frame);
            }
            read.damage.push(damage);
        }
        read.records.push(record);
        position += size;
    }
    if position != payload || !is_zero(&bytes[payload..]) {
        let what =
            format!("frame {} does not end where its records do, or its padding is not zero", header.frame);
        let mut damage = damage(position, bytes.len() - position, None, what);
        // Every record is there, so what is behind them holds nothing.
        if position == payload {
            damage.held = Held::Nothing;
        }
        read.damage.push(damage);
    }
    read
}

/// What the frames of an extent say is retired, each with its number, the newest first.
pub(super) fn retirements(
    superblock: &Superblock,
    id: ShardId,
    header: &ExtentHeader,
    bytes: &[u8],
) -> Vec<(u64, Retirement)> {
    let block = superblock.block_size as usize;
    let place = Place::new(&superblock.uuid, &superblock.secret, id, header.extent, header.epoch);
    let mut found = Vec::new();
    let mut at = block;
    while at < bytes.len() {
        let Some((frame, size)) = frame_at(bytes, at, place, superblock) else {
            at += block;
            continue;
        };
        let read = read_frame(&bytes[at..at + size], frame, header.extent, at, place, id);
        let retired = read.records.into_iter().filter_map(|record| record.retired).last();
        found.extend(retired.map(|retired| (frame.frame, retired)));
        at += size;
    }
    found.reverse();
    found
}

/// The frames of an extent, given whole, whether they count or not, and its header or what they say in its place.
pub(in crate::engine) fn frames_of(
    bytes: &[u8],
    extent: u32,
    superblock: &Superblock,
) -> (Option<ExtentHeader>, Vec<FrameRead>) {
    let block = superblock.block_size as usize;
    let header = ExtentHeader::decode(&bytes[..block], &superblock.uuid, &superblock.secret, extent).ok();
    let lost = lost_header(bytes, extent, header.as_ref(), superblock);
    let Some(header) = lost.or(header) else { return (None, Vec::new()) };
    if header.role == ExtentRole::Survivors {
        return (Some(header), Vec::new());
    }
    let place = Place::new(&superblock.uuid, &superblock.secret, header.shard, extent, header.epoch);
    let mut frames = Vec::new();
    let mut at = block;
    while at < bytes.len() {
        let Some((frame, size)) = frame_at(bytes, at, place, superblock) else {
            at += block;
            continue;
        };
        frames.push(read_frame(&bytes[at..at + size], frame, extent, at, place, header.shard));
        at += size;
    }
    (Some(header), frames)
}

/// The units of an extent of survivors, given whole, whether they count or not.
pub(in crate::engine) fn units_of(
    bytes: &[u8],
    header: &ExtentHeader,
    superblock: &Superblock,
) -> Vec<UnitRead> {
    let block = superblock.block_size as usize;
    let (uuid, secret) = (&superblock.uuid, &superblock.secret);
    let place = Place::new(uuid, secret, header.shard, header.extent, header.epoch);
    let mut units = Vec::new();
    let mut at = block;
    while at < bytes.len() {
        let found = unit_at(bytes, at, header, place, superblock);
        at += found.as_ref().map_or(block, |unit| unit.header.size as usize);
        units.extend(found);
    }
    units
}

/// The record `position` bytes into `bytes`, which start `at` bytes into the extent.
pub(super) fn found_at(
    bytes: &[u8],
    position: usize,
    at: usize,
    extent: u32,
    place: Place,
) -> Result<(Found, usize), FormatError> {
    let offset = (at + position) as u32;
    let Decoded { record, size, value_intact } = Record::decode(&bytes[position..], place, offset)?;
    let participant_count = match (record.kind, value_intact, record.value) {
        (RecordType::Commit, true, [low, high]) => u16::from_le_bytes([*low, *high]),
        _ => 0,
    };
    let record_ref = RecordRef {
        extent,
        offset,
        size: size as u32,
        value_size: record.value_size(),
        sequence: record.sequence,
        expires_at_ms: record.expires_at_ms,
        is_part: record.batch.is_some(),
        is_long: record.is_manifest(),
    };
    let retired = match record.kind {
        RecordType::Retired if value_intact => Some(Retirement::decode(record.value)?),
        _ => None,
    };
    let batch = record.batch.map(|mark| (BatchId { boot: mark.boot, number: mark.number }, mark.coordinator));
    let key = Bytes::copy_from_slice(record.key);
    let chunk = (record.kind == RecordType::Chunk).then_some(record.long);
    let pieces = match record.is_manifest() && value_intact {
        true => manifest::decode(record.value, record.long).ok(),
        false => None,
    };
    let stored_size = record.value.len() as u32;
    let found = Found {
        kind: record.kind,
        key,
        record: record_ref,
        batch,
        participant_count,
        retired,
        chunk,
        pieces,
        stored_size,
        value_intact,
    };
    Ok((found, size))
}

/// Bytes that start `at` bytes into their extent.
pub(super) struct Shifted<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Shifted<'_> {
    /// Records with these sequences, wherever they are from `position` on, in order.
    fn salvage(&self, mut position: usize, expected: Range<u64>, extent: u32, place: Place) -> Vec<Found> {
        let mut found: Vec<Found> = Vec::new();
        let mut next = expected.start;
        while position + 16 <= self.bytes.len() && next < expected.end {
            let mut sequence = [0; 8];
            sequence.copy_from_slice(&self.bytes[position + 8..position + 16]);
            // The checksum is tried only where the sequence could be right.
            if (next..expected.end).contains(&u64::from_le_bytes(sequence))
                && let Ok((record, size)) = found_at(self.bytes, position, self.at, extent, place)
            {
                next = record.record.sequence + 1;
                found.push(record);
                position += size;
            } else {
                position += 1;
            }
        }
        found
    }
}

/// The sequence behind the last of these that was not found; 0 when all were.
pub(super) fn lost_below(found: &[Found], expected: &Range<u64>) -> u64 {
    if found.len() as u64 == expected.end - expected.start {
        return 0;
    }
    let is_there = |(nth, one): &(u64, &Found)| one.record.sequence + nth + 1 == expected.end;
    expected.end - (0..).zip(found.iter().rev()).take_while(is_there).count() as u64
}

/// Records with these sequences between two places of an extent whose bytes are given whole.
pub(super) fn salvage(
    bytes: &[u8],
    range: Range<usize>,
    expected: Range<u64>,
    extent: u32,
    place: Place,
) -> Vec<Found> {
    let Some(slice) = bytes.get(range.clone()) else { return Vec::new() };
    probe::hit(Probe::RecordsSalvaged);
    Shifted { bytes: slice, at: range.start }.salvage(0, expected, extent, place)
}

impl Found {
    pub(super) fn damaged_value(&self, shard: ShardId) -> Damage {
        Damage {
            shard: Some(shard.0),
            extent: self.record.extent,
            offset: u64::from(self.record.offset),
            size: u64::from(self.record.size),
            key: (self.kind != RecordType::Retired).then(|| self.key.escape_ascii().to_string()),
            what: "the value does not match its checksum".into(),
            held: match (self.kind, self.chunk) {
                (RecordType::Put, _) => Held::Value(self.key.clone()),
                (RecordType::Chunk, Some(id)) => Held::Chunk(id),
                // It decides its batch all the same.
                (RecordType::Commit, _) => Held::Nothing,
                _ => Held::Anything,
            },
        }
    }
}
