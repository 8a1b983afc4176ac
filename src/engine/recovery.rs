//! Recovery: from the bytes on the device to each shard's state, by scanning the log.
//!
//! First a survey reads every extent's header, which gives each shard its chain of extents. Then shards are scanned
//! independently, in any number of threads; last, with every shard's commit records known, batches are decided.
//!
//! What a frame's absence means (see `format::frame`): the frames of a shard are numbered without gaps and never go back
//! in boot, so the log ends at the first number that is missing. If any frame behind that gap says that the missing one
//! was durable, it was lost after it was acknowledged: that is damage. If none does, it was in flight when the node
//! died: a torn tail, and whatever lies behind it never happened.
//!
//! Invariants:
//! - Nothing is written here. Doing it again gives the same result.
//! - A frame counts as a whole or not at all, unless it is damaged; then each record that can be trusted counts.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

use super::allocator::Allocator;
use super::index::{Entry, HashIndex, Index, hash_key};
use super::log::{OpenExtent, ShardLog};
use super::op::{BatchId, ShardId};
use super::shard::ShardState;
use crate::device::{Device, IoError, blocking};
use crate::format::Place;
use crate::format::extent::ExtentHeader;
use crate::format::frame::{FRAME_HEADER_SIZE, FrameHeader};
use crate::format::layout::reserve_extent_count;
use crate::format::record::{Decoded, Record, RecordType};
use crate::format::superblock::Superblock;

/// Something that was acknowledged and can't be read back.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Damage {
    /// The shard, where it is known.
    pub shard: Option<u16>,
    /// The extent.
    pub extent: u32,
    /// Bytes from the extent's start.
    pub offset: u64,
    /// Bytes concerned.
    pub size: u64,
    /// The key, where it could be read.
    pub key: Option<String>,
    /// What is wrong.
    pub what: String,
}

/// The end of a log that was in flight when the node died, and was cut.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct TornTail {
    /// The shard.
    pub shard: u16,
    /// The extent.
    pub extent: u32,
    /// Bytes from the extent's start.
    pub offset: u64,
    /// The first frame that is not there.
    pub frame: u64,
}

/// Whose the extents are.
#[derive(Debug, Default)]
pub struct Survey {
    /// Each shard's extents, by their ordinals.
    chains: Vec<Vec<ExtentHeader>>,
    /// The highest ordinal on the device.
    pub ordinal_last: u64,
    /// Headers that were lost after they were durable.
    pub damage: Vec<Damage>,
}

impl Survey {
    /// Extents of a shard's chain.
    pub fn chain(&self, shard: ShardId) -> &[ExtentHeader] {
        self.chains.get(usize::from(shard.0)).map_or(&[], Vec::as_slice)
    }

    /// Extents that some header claims.
    pub fn extent_count(&self) -> usize {
        self.chains.iter().map(Vec::len).sum()
    }
}

/// Reads every extent's header.
pub fn survey<D: Device>(device: &mut D, superblock: &Superblock) -> Result<Survey, IoError> {
    let mut survey = Survey::default();
    survey.chains.resize(usize::from(superblock.shard_count), Vec::new());
    let block = superblock.block_size as usize;
    let layout = superblock.layout;
    let offsets: Vec<u64> = (0..layout.extent_count).map(|extent| layout.extent_offset(extent)).collect();
    let mut orphans = Vec::new();
    // The block behind the header says whose the extent is when the header does not.
    blocking::read_many(device, &offsets, 2 * block, |extent, bytes| {
        let extent = extent as u32;
        match ExtentHeader::decode(&bytes[..block], &superblock.uuid, &superblock.secret, extent) {
            Ok(header) if header.shard.0 < superblock.shard_count => {
                survey.ordinal_last = survey.ordinal_last.max(header.ordinal);
                survey.chains[usize::from(header.shard.0)].push(header);
            }
            Ok(header) => survey.damage.push(Damage {
                shard: Some(header.shard.0),
                extent,
                offset: 0,
                size: block as u64,
                key: None,
                what: "the extent's header names a shard that this device does not have".into(),
            }),
            Err(error) => {
                if let Some((epoch, shard)) = FrameHeader::claimed_place(&bytes[block..]) {
                    orphans.push((extent, epoch, shard, error));
                }
            }
        }
    })?;
    for (extent, epoch, shard, error) in orphans {
        // A header that was still in flight when the node died is no loss; one that frames behind it rest on is.
        let place = Place::new(&superblock.uuid, &superblock.secret, shard, extent, epoch);
        let bytes = blocking::read(device, layout.extent_offset(extent), layout.extent_size as usize)?;
        let mut first = None;
        let mut at = block;
        let mut lost = false;
        while let Some((frame, size)) = frame_at(&bytes, at, place, superblock) {
            let first = *first.get_or_insert(frame.frame);
            lost |= frame.durable >= first;
            at += size;
        }
        if lost {
            survey.damage.push(Damage {
                shard: Some(shard.0),
                extent,
                offset: 0,
                size: layout.extent_size,
                key: None,
                what: format!("the extent's header was lost, its frames are there ({error})"),
            });
        }
    }
    for (shard, chain) in survey.chains.iter_mut().enumerate() {
        chain.sort_by_key(|header| header.ordinal);
        for pair in chain.windows(2).filter(|pair| pair[0].ordinal == pair[1].ordinal) {
            survey.damage.push(Damage {
                shard: Some(shard as u16),
                extent: pair[1].extent,
                offset: 0,
                size: block as u64,
                key: None,
                what: format!("extent {} has the same place in the shard's chain", pair[0].extent),
            });
        }
    }
    Ok(survey)
}

fn frame_at(bytes: &[u8], at: usize, place: Place, superblock: &Superblock) -> Option<(FrameHeader, usize)> {
    let rest = bytes.get(at..)?;
    if !FrameHeader::has_magic(rest) {
        return None;
    }
    let header =
        FrameHeader::decode(rest, place, at as u32, superblock.block_size, rest.len() as u64).ok()?;
    Some((header, header.size as usize))
}

/// A record of a frame, owned.
struct Found {
    kind: RecordType,
    key: Bytes,
    entry: Entry,
    batch: Option<(BatchId, ShardId)>,
    participant_count: u16,
    value_intact: bool,
}

/// A frame as read, with what is wrong with it.
struct FrameRead {
    header: FrameHeader,
    extent: u32,
    offset: u64,
    records: Vec<Found>,
    damage: Vec<Damage>,
}

/// A part of a batch whose commit record may be in another shard.
struct Part {
    kind: RecordType,
    key: Bytes,
    entry: Entry,
}

/// What the scan of one shard found.
pub struct ScannedShard {
    id: ShardId,
    index: HashIndex,
    parts: BTreeMap<BatchId, Vec<Part>>,
    /// Deletes that came while a part was undecided, with their sequences.
    deletes: BTreeMap<Bytes, u64>,
    /// Batches that this shard's commit records name, with their participant counts.
    pub commits: Vec<(BatchId, u16)>,
    /// Batches that this shard has parts of.
    pub batches_seen: BTreeSet<BatchId>,
    /// What was lost.
    pub damage: Vec<Damage>,
    /// Where the log was cut.
    pub torn: Option<TornTail>,
    /// Frames accepted.
    pub frame_count: u64,
    /// Records in them.
    pub record_count: u64,
    /// Bytes of them, headers and padding included.
    pub log_bytes: u64,
    places: BTreeMap<u32, Place>,
    open: Option<OpenExtent>,
    /// Extents that hold accepted frames: in use.
    pub used_extents: Vec<u32>,
    last_frame: u64,
    last_boot: u64,
    /// The highest sequence seen anywhere, cut frames included: none is ever issued again.
    last_sequence: u64,
    clean: bool,
}

/// Reads one shard's log. `progress` is told bytes as they are read.
pub fn scan_shard<D: Device>(
    device: &mut D,
    superblock: &Superblock,
    id: ShardId,
    chain: &[ExtentHeader],
    progress: &mut dyn FnMut(u64),
) -> Result<ScannedShard, IoError> {
    let mut scan = Scan::new(superblock, id);
    for header in chain {
        let offset = superblock.layout.extent_offset(header.extent);
        let bytes = blocking::read(device, offset, superblock.layout.extent_size as usize)?;
        scan.extent(header, &bytes);
        progress(bytes.len() as u64);
    }
    Ok(scan.finish())
}

/// The state of one shard's scan.
struct Scan<'a> {
    superblock: &'a Superblock,
    out: ScannedShard,
    /// Frames behind a gap, or damaged ones, until it is known whether the missing ones were durable.
    suspects: Vec<FrameRead>,
    /// The most that any suspect calls durable.
    suspects_durable: u64,
    /// Headers by extent, for the append point.
    headers: BTreeMap<u32, ExtentHeader>,
    append_at: Option<(u32, u64)>,
}

impl<'a> Scan<'a> {
    fn new(superblock: &'a Superblock, id: ShardId) -> Scan<'a> {
        let out = ScannedShard {
            id,
            index: HashIndex::default(),
            parts: BTreeMap::new(),
            deletes: BTreeMap::new(),
            commits: Vec::new(),
            batches_seen: BTreeSet::new(),
            damage: Vec::new(),
            torn: None,
            frame_count: 0,
            record_count: 0,
            log_bytes: 0,
            places: BTreeMap::new(),
            open: None,
            used_extents: Vec::new(),
            last_frame: 0,
            last_boot: 0,
            last_sequence: 0,
            clean: false,
        };
        Scan {
            superblock,
            out,
            suspects: Vec::new(),
            suspects_durable: 0,
            headers: BTreeMap::new(),
            append_at: None,
        }
    }

    fn extent(&mut self, header: &ExtentHeader, bytes: &[u8]) {
        let superblock = self.superblock;
        let block = superblock.block_size as usize;
        let place =
            Place::new(&superblock.uuid, &superblock.secret, self.out.id, header.extent, header.epoch);
        self.headers.insert(header.extent, *header);
        self.out.places.insert(header.extent, place);
        let mut at = block;
        while at < bytes.len() {
            let Some((frame, size)) = frame_at(bytes, at, place, superblock) else {
                // Not a frame: go on at the next block, for frames behind a lost one are what tells damage from a tear.
                at += block;
                continue;
            };
            let past = frame.first_sequence.saturating_add(u64::from(frame.record_count));
            self.out.last_sequence = self.out.last_sequence.max(past.saturating_sub(1));
            // What an older boot left behind the append point of a newer one, or an earlier number again, is void.
            if frame.boot >= self.out.last_boot && frame.frame > self.out.last_frame {
                let read = read_frame(&bytes[at..at + size], frame, header.extent, at, place, self.out.id);
                self.frame(read);
            }
            at += size;
        }
    }

    fn frame(&mut self, read: FrameRead) {
        // A boot goes on from where its recovery cut: what older boots left from that number on is void.
        let (frame, boot) = (read.header.frame, read.header.boot);
        self.suspects.retain(|one| one.header.boot >= boot || one.header.frame < frame);
        self.suspects_durable = self.suspects.iter().map(|one| one.header.durable).max().unwrap_or(0);
        let is_next = read.header.frame == self.out.last_frame + 1;
        if is_next && read.damage.is_empty() && self.suspects.is_empty() {
            self.accept(read);
            return;
        }
        // An older boot's leftovers behind a suspect of a newer one can't be its successors.
        if self.suspects.last().is_some_and(|last| read.header.boot < last.header.boot) {
            return;
        }
        self.suspects_durable = self.suspects_durable.max(read.header.durable);
        self.suspects.push(read);
        if self.suspects_durable > self.out.last_frame {
            self.judge();
        }
    }

    /// A frame behind the gap says that the gap was durable: take what can be trusted and report the rest.
    fn judge(&mut self) {
        for read in std::mem::take(&mut self.suspects) {
            // What nobody calls durable may still turn out torn.
            let proven = read.header.frame <= self.suspects_durable;
            if read.header.frame <= self.out.last_frame {
                continue;
            }
            let missing = read.header.frame - self.out.last_frame - 1;
            if missing > 0 && self.out.last_frame < self.suspects_durable {
                let first = self.out.last_frame + 1;
                let (extent, offset, size) = match self.append_at {
                    Some((extent, from)) if extent == read.extent => (extent, from, read.offset - from),
                    _ => (read.extent, 0, read.offset),
                };
                self.out.damage.push(Damage {
                    shard: Some(self.out.id.0),
                    extent,
                    offset,
                    size,
                    key: None,
                    what: format!("{missing} frame(s) from number {first} on were durable and are not there"),
                });
                self.out.last_frame = read.header.frame - 1;
            }
            let is_next = read.header.frame == self.out.last_frame + 1;
            if is_next && (read.damage.is_empty() || proven) {
                self.out.damage.extend(read.damage.iter().cloned());
                self.accept(read);
            } else {
                self.suspects.push(read);
            }
        }
    }

    fn accept(&mut self, read: FrameRead) {
        let out = &mut self.out;
        out.last_frame = read.header.frame;
        out.last_boot = read.header.boot;
        out.clean = read.header.clean;
        out.frame_count += 1;
        out.log_bytes += u64::from(read.header.size);
        if out.used_extents.last() != Some(&read.extent) {
            out.used_extents.push(read.extent);
        }
        self.append_at = Some((read.extent, read.offset + u64::from(read.header.size)));
        for found in read.records {
            self.out.apply(found, &self.superblock.secret);
        }
    }

    fn finish(mut self) -> ScannedShard {
        let out = &mut self.out;
        if let Some(first) = self.suspects.first() {
            out.torn = Some(TornTail {
                shard: out.id.0,
                extent: first.extent,
                offset: first.offset,
                frame: out.last_frame + 1,
            });
        }
        // Extents without an accepted frame are free again: what they hold never happened.
        if let Some((extent, position)) = self.append_at
            && let Some(header) = self.headers.get(&extent)
            && let Some(place) = out.places.get(&extent)
        {
            out.open = Some(OpenExtent { header: *header, place: *place, position });
        }
        self.out
    }
}

fn read_frame(
    bytes: &[u8],
    header: FrameHeader,
    extent: u32,
    at: usize,
    place: Place,
    shard: ShardId,
) -> FrameRead {
    let mut read = FrameRead { header, extent, offset: at as u64, records: Vec::new(), damage: Vec::new() };
    let payload = header.payload_size as usize;
    let mut position = FRAME_HEADER_SIZE;
    let damage = |offset: usize, size: usize, key: Option<&[u8]>, what: String| Damage {
        shard: Some(shard.0),
        extent,
        offset: (at + offset) as u64,
        size: size as u64,
        key: key.map(|key| key.escape_ascii().to_string()),
        what,
    };
    for number in 0..header.record_count {
        let offset = (at + position) as u32;
        let Decoded { record, size, value_intact } =
            match Record::decode(&bytes[position..payload], place, offset) {
                Ok(decoded) => decoded,
                Err(error) => {
                    let what =
                        format!("records of frame {} from here on are unreadable: {error}", header.frame);
                    read.damage.push(damage(position, payload - position, None, what));
                    return read;
                }
            };
        if record.sequence != header.first_sequence + u64::from(number) {
            let what = format!("sequence {} is out of order", record.sequence);
            read.damage.push(damage(position, size, Some(record.key), what));
        }
        if !value_intact {
            let what = "the value does not match its checksum".to_owned();
            read.damage.push(damage(position, size, Some(record.key), what));
        }
        let participants = match (record.kind, value_intact, record.value) {
            (RecordType::Commit, true, [low, high]) => u16::from_le_bytes([*low, *high]),
            _ => 0,
        };
        read.records.push(Found {
            kind: record.kind,
            key: Bytes::copy_from_slice(record.key),
            entry: Entry {
                extent,
                offset,
                size: size as u32,
                value_size: record.value.len() as u32,
                sequence: record.sequence,
                expires_at_ms: record.expires_at_ms,
            },
            batch: record
                .batch
                .map(|mark| (BatchId { boot: mark.boot, number: mark.number }, mark.coordinator)),
            participant_count: participants,
            value_intact,
        });
        position += size;
    }
    if position != payload || bytes[payload..].iter().any(|byte| *byte != 0) {
        let what =
            format!("frame {} does not end where its records do, or its padding is not zero", header.frame);
        read.damage.push(damage(position, bytes.len() - position, None, what));
    }
    read
}

impl ScannedShard {
    fn apply(&mut self, found: Found, secret: &[u8; 16]) {
        self.record_count += 1;
        let Found { kind, key, entry, batch, participant_count, value_intact } = found;
        match (kind, batch) {
            (RecordType::Commit, Some((batch, _))) => {
                // A commit record with a damaged count still decides; the count serves the cross-check alone.
                let count = if value_intact { participant_count } else { 0 };
                self.commits.push((batch, count));
                if count == 1 {
                    let parts = self.parts.remove(&batch).unwrap_or_default();
                    self.apply_parts(parts, secret);
                }
            }
            (RecordType::Clear, _) => {
                self.index.clear();
                self.parts.clear();
                self.deletes.clear();
            }
            (kind, Some((batch, _))) => {
                self.batches_seen.insert(batch);
                self.parts.entry(batch).or_default().push(Part { kind, key, entry });
            }
            (kind, None) => self.apply_one(kind, &key, entry, secret),
        }
    }

    fn apply_one(&mut self, kind: RecordType, key: &Bytes, entry: Entry, secret: &[u8; 16]) {
        let hash = hash_key(secret, key);
        if kind == RecordType::Put {
            self.index.insert(hash, key, entry);
        } else {
            self.index.remove(hash, key);
            if !self.parts.is_empty() {
                self.deletes.insert(key.clone(), entry.sequence);
            }
        }
    }

    fn apply_parts(&mut self, mut parts: Vec<Part>, secret: &[u8; 16]) {
        parts.sort_by_key(|part| part.entry.sequence);
        for Part { kind, key, entry, .. } in parts {
            let newest = self.index.get(hash_key(secret, &key), &key).map_or(0, |newest| newest.sequence);
            let deleted = self.deletes.get(&key).copied().unwrap_or(0);
            if entry.sequence > newest.max(deleted) {
                self.apply_one(kind, &key, entry, secret);
            }
        }
    }

    /// Decides batches, with the commit records of every shard, and makes the shard's state.
    pub fn resolve(mut self, committed: &BTreeSet<BatchId>, superblock: &Arc<Superblock>) -> ShardState {
        let parts = std::mem::take(&mut self.parts);
        let decided = parts.into_iter().filter(|(batch, _)| committed.contains(batch));
        let decided = decided.flat_map(|(_, parts)| parts).collect();
        self.apply_parts(decided, &superblock.secret);
        let log = ShardLog::new(
            self.id,
            Arc::clone(superblock),
            self.open,
            self.last_sequence + 1,
            self.last_frame + 1,
        );
        ShardState {
            id: self.id,
            index: self.index,
            log,
            places: self.places,
            durable_frame: self.last_frame,
            clean: self.clean,
        }
    }

    /// Which shard it is.
    pub fn id(&self) -> ShardId {
        self.id
    }
}

/// The allocator as the scans found it.
pub fn rebuild_allocator(superblock: &Superblock, survey: &Survey, shards: &[ScannedShard]) -> Allocator {
    let layout = superblock.layout;
    let reserve = reserve_extent_count(superblock.shard_count);
    let allocator = Allocator::new(layout.extent_count, reserve, superblock.boot, survey.ordinal_last);
    for shard in shards {
        for extent in &shard.used_extents {
            allocator.claim(*extent);
        }
    }
    allocator
}

/// Batches that some shard committed.
pub fn committed_batches(shards: &[ScannedShard]) -> BTreeSet<BatchId> {
    shards.iter().flat_map(|shard| shard.commits.iter().map(|(batch, _)| *batch)).collect()
}
