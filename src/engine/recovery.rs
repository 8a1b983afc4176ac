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
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::allocator::Allocator;
use super::index::{Entry, HashIndex, Index, hash_key};
use super::log::{OpenExtent, ShardLog};
use super::op::{BatchId, ShardId};
use super::shard::ShardState;
use crate::device::{Device, IoError, blocking};
use crate::format::extent::ExtentHeader;
use crate::format::frame::{FRAME_HEADER_SIZE, FrameHeader};
use crate::format::layout::reserve_extent_count;
use crate::format::record::{Decoded, Record, RecordType};
use crate::format::superblock::Superblock;
use crate::format::{FormatError, Place};
use crate::probe::{self, Probe};

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

    fn add(&mut self, header: ExtentHeader) {
        self.ordinal_last = self.ordinal_last.max(header.ordinal);
        match self.chains.get_mut(usize::from(header.shard.0)) {
            Some(chain) => chain.push(header),
            None => self.damage.push(Damage {
                shard: Some(header.shard.0),
                extent: header.extent,
                offset: 0,
                size: 0,
                key: None,
                what: "the extent's header names a shard that this device does not have".into(),
            }),
        }
    }
}

/// Reads every extent's header.
pub fn survey<D: Device>(device: &mut D, superblock: &Superblock) -> Result<Survey, IoError> {
    let mut survey = Survey::default();
    survey.chains.resize(usize::from(superblock.shard_count), Vec::new());
    let block = superblock.block_size as usize;
    let layout = superblock.layout;
    let offsets: Vec<u64> = (0..layout.extent_count).map(|extent| layout.extent_offset(extent)).collect();
    let mut suspects = Vec::new();
    // The block behind the header says whose the extent is when the header does not.
    let mut header_at = |extent: u32, bytes: &[u8], survey: &mut Survey| {
        let header = ExtentHeader::decode(&bytes[..block], &superblock.uuid, &superblock.secret, extent);
        let claimed = FrameHeader::claimed_place(&bytes[block..]);
        match header {
            // Frames of a later life than the header's: the header is a stale one, or its last write was lost.
            Ok(header) if claimed.is_some_and(|(epoch, _)| epoch > header.epoch) => {
                suspects.push((extent, Some(header)));
            }
            Ok(header) => survey.add(header),
            // An extent that was never used has a header of zeros.
            Err(_) if claimed.is_some() || bytes[..block].iter().any(|byte| *byte != 0) => {
                suspects.push((extent, None));
            }
            Err(_) => {}
        }
    };
    let quick = blocking::read_many(device, &offsets, 2 * block, |extent, bytes| {
        header_at(extent as u32, bytes, &mut survey);
    });
    match quick {
        Ok(()) => {}
        Err(IoError::UnrecoveredRead { .. }) => {
            // Some header can't be read: one by one, so that the others can.
            survey = Survey::default();
            survey.chains.resize(usize::from(superblock.shard_count), Vec::new());
            suspects.clear();
            suspects.extend((0..layout.extent_count).map(|extent| (extent, None)));
        }
        Err(error) => return Err(error),
    }
    for (extent, header) in suspects {
        let Extent { bytes, unreadable } = Extent::read(device, superblock, extent)?;
        // The first look may have been a wrong read.
        let header = ExtentHeader::decode(&bytes[..block], &superblock.uuid, &superblock.secret, extent)
            .ok()
            .or(header);
        match lost_header(&bytes, extent, header.as_ref(), superblock) {
            Some(found) => {
                probe::hit(Probe::OrphanExtentLost);
                survey.damage.push(Damage {
                    shard: Some(found.shard.0),
                    extent,
                    offset: 0,
                    size: block as u64,
                    key: None,
                    what: "the extent's header was lost; its frames are read without it".into(),
                });
                survey.add(found);
            }
            None => {
                if let Some(header) = header {
                    survey.add(header);
                } else if unreadable.contains(&0) {
                    survey.damage.push(Damage {
                        shard: None,
                        extent,
                        offset: 0,
                        size: block as u64,
                        key: None,
                        what: "the extent's header can't be read".into(),
                    });
                }
            }
        }
    }
    for (shard, chain) in survey.chains.iter_mut().enumerate() {
        // The order of opening. A header that was lost has no ordinal; the others agree with their ordinals.
        chain.sort_by_key(|header| (header.boot, header.first_frame, header.ordinal));
        for pair in chain.windows(2).filter(|pair| pair[1].ordinal != 0 && pair[0].ordinal >= pair[1].ordinal)
        {
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

/// The header of an extent that lost it after frames behind it were known to be durable, made from those frames.
fn lost_header(
    bytes: &[u8],
    extent: u32,
    known: Option<&ExtentHeader>,
    superblock: &Superblock,
) -> Option<ExtentHeader> {
    let block = superblock.block_size as usize;
    let mut best: Option<ExtentHeader> = None;
    let mut proven = 0;
    for at in (block..bytes.len()).step_by(block) {
        let Some((epoch, shard)) = FrameHeader::claimed_place(&bytes[at..]) else { continue };
        let newest = best.as_ref().or(known).map_or(0, |header| header.epoch);
        if epoch < newest || shard.0 >= superblock.shard_count {
            continue;
        }
        let place = Place::new(&superblock.uuid, &superblock.secret, shard, extent, epoch);
        let Some((frame, _)) = frame_at(bytes, at, place, superblock) else { continue };
        proven = if epoch > newest || best.is_none() { frame.durable } else { proven.max(frame.durable) };
        if known.is_none_or(|known| known.epoch != epoch) && (best.is_none() || epoch > newest) {
            let (first_frame, boot) = (frame.frame, frame.boot);
            let reserve = false;
            best = Some(ExtentHeader { extent, shard, epoch, ordinal: 0, first_frame, boot, reserve });
        }
    }
    // A header that was still in flight when the node died is no loss; one that frames behind it rest on is.
    let best = best?;
    if proven < best.first_frame {
        probe::hit(Probe::OrphanExtentTorn);
        return None;
    }
    Some(best)
}

/// An extent as read, with the blocks that can't be.
struct Extent {
    bytes: Vec<u8>,
    /// Byte offsets of blocks that are zeros here because the device fails to read them.
    unreadable: Vec<usize>,
}

/// Times that a failing read is tried.
const READ_TRIES: u32 = 3;

impl Extent {
    fn read<D: Device>(device: &mut D, superblock: &Superblock, extent: u32) -> Result<Extent, IoError> {
        Self::read_part(device, superblock, extent, 0)
    }

    /// Reads from `from` on; `bytes` starts there.
    fn read_part<D: Device>(
        device: &mut D,
        superblock: &Superblock,
        extent: u32,
        from: usize,
    ) -> Result<Extent, IoError> {
        let offset = superblock.layout.extent_offset(extent) + from as u64;
        let size = superblock.layout.extent_size as usize - from;
        if let Some(bytes) = read_tried(device, offset, size)? {
            return Ok(Extent { bytes, unreadable: Vec::new() });
        }
        let block = superblock.block_size as usize;
        let (mut bytes, mut unreadable) = (Vec::with_capacity(size), Vec::new());
        for at in (0..size).step_by(block) {
            match read_tried(device, offset + at as u64, block)? {
                Some(one) => bytes.extend_from_slice(&one),
                None => {
                    bytes.resize(at + block, 0);
                    unreadable.push(from + at);
                }
            }
        }
        Ok(Extent { bytes, unreadable })
    }
}

fn read_tried<D: Device>(device: &mut D, offset: u64, size: usize) -> Result<Option<Vec<u8>>, IoError> {
    for _ in 0..READ_TRIES {
        match blocking::read(device, offset, size) {
            Ok(bytes) => return Ok(Some(bytes)),
            Err(IoError::UnrecoveredRead { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
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
    /// Records with sequences below this one were lost; 0 when none was.
    lost_below: u64,
}

/// A part of a batch whose commit record may be in another shard.
struct Part {
    kind: RecordType,
    key: Bytes,
    entry: Entry,
    coordinator: ShardId,
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
    /// What can't be said because records were lost.
    doubt: Doubt,
    last_frame: u64,
    last_boot: u64,
    /// The sequence behind the last accepted record.
    accepted_sequence: u64,
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
        let Extent { bytes, unreadable } = Extent::read(device, superblock, header.extent)?;
        let size = bytes.len() as u64;
        let mut again = |from| Extent::read_part(device, superblock, header.extent, from);
        scan.extent(header, bytes, unreadable, &mut again)?;
        progress(size);
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
    /// Something behind the last accepted frame can't be read.
    lost_tail: bool,
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
            doubt: Doubt::default(),
            accepted_sequence: 1,
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
            lost_tail: false,
        }
    }

    /// Reads the frames of one extent. `again` reads the rest of it once more: before anything is called torn or damaged
    /// it must look the same twice, since a medium may be wrong once and right the next time.
    fn extent(
        &mut self,
        header: &ExtentHeader,
        mut bytes: Vec<u8>,
        mut unreadable: Vec<usize>,
        again: &mut dyn FnMut(usize) -> Result<Extent, IoError>,
    ) -> Result<(), IoError> {
        let superblock = self.superblock;
        let block = superblock.block_size as usize;
        let place =
            Place::new(&superblock.uuid, &superblock.secret, self.out.id, header.extent, header.epoch);
        self.headers.insert(header.extent, *header);
        self.out.places.insert(header.extent, place);
        let mut at = block;
        let mut sure = false;
        while at < bytes.len() {
            let found = frame_at(&bytes, at, place, superblock);
            let read = found.map(|(frame, size)| {
                read_frame(&bytes[at..at + size], frame, header.extent, at, place, self.out.id)
            });
            let is_plain = read.as_ref().is_some_and(|read| read.damage.is_empty());
            if !is_plain && !sure {
                sure = true;
                reread(&mut bytes, &mut unreadable, at, again)?;
                continue;
            }
            let Some(read) = read else {
                // Not a frame: go on at the next block, for frames behind a lost one are what tells damage from a tear.
                if unreadable.contains(&at) {
                    self.unreadable(header.extent, at);
                }
                at += block;
                continue;
            };
            let frame = read.header;
            let past = frame.first_sequence.saturating_add(u64::from(frame.record_count));
            self.out.last_sequence = self.out.last_sequence.max(past.saturating_sub(1));
            // What an older boot left behind the append point of a newer one, or an earlier number again, is void.
            let is_void = frame.boot < self.out.last_boot || frame.frame <= self.out.last_frame;
            let before = self.out.last_frame;
            if is_void {
                probe::hit(Probe::StaleFrameSkipped);
            } else {
                self.frame(read, &bytes);
            }
            // Only a frame that counts says where the next one is: a void one may reach over what replaced its end.
            at += if self.out.last_frame > before && self.out.last_frame >= frame.frame {
                frame.size as usize
            } else {
                block
            };
        }
        Ok(())
    }

    /// A block that can't be read where a frame may have been: what it held can't be told from what never was.
    fn unreadable(&mut self, extent: u32, at: usize) {
        self.out.damage.push(Damage {
            shard: Some(self.out.id.0),
            extent,
            offset: at as u64,
            size: u64::from(self.superblock.block_size),
            key: None,
            what: "the device can't read it".into(),
        });
        self.lost_tail = true;
    }

    fn frame(&mut self, read: FrameRead, bytes: &[u8]) {
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
            self.judge(bytes);
        }
    }

    /// A frame behind the gap says that the gap was durable: take what can be trusted and report the rest. `bytes` are
    /// those of the extent that is being read.
    fn judge(&mut self, bytes: &[u8]) {
        for read in std::mem::take(&mut self.suspects) {
            if read.header.frame <= self.out.last_frame {
                continue;
            }
            // What nobody calls durable may still turn out torn, and then nothing behind it happened.
            let lost_to = (read.header.frame - 1).min(self.suspects_durable);
            if lost_to > self.out.last_frame {
                self.lose(lost_to, &read, bytes);
            }
            let proven = read.header.frame <= self.suspects_durable;
            let is_next = read.header.frame == self.out.last_frame + 1;
            if is_next && (read.damage.is_empty() || proven) {
                self.out.damage.extend(read.damage.iter().cloned());
                self.accept(read);
            } else {
                self.suspects.push(read);
            }
        }
    }

    /// Frames up to `lost_to` were durable and are not there; `next` is the first frame behind them.
    fn lose(&mut self, lost_to: u64, next: &FrameRead, bytes: &[u8]) {
        probe::hit(Probe::DurableFrameMissing);
        let out = &mut self.out;
        let (first, missing) = (out.last_frame + 1, lost_to - out.last_frame);
        let (extent, offset, size) = match self.append_at {
            Some((extent, from)) if extent == next.extent => (extent, from, next.offset - from),
            _ => (next.extent, 0, next.offset),
        };
        out.damage.push(Damage {
            shard: Some(out.id.0),
            extent,
            offset,
            size,
            key: None,
            what: format!("{missing} frame(s) from number {first} on were durable and are not there"),
        });
        let starts_boot = next.header.boot > out.last_boot;
        // The first frame of a start behind an unclean stop is empty.
        let is_start_mark = starts_boot && missing == 1 && !out.clean && lost_to == next.header.frame - 1;
        let expected = out.accepted_sequence..next.header.first_sequence;
        out.last_frame = lost_to;
        if is_start_mark || expected.is_empty() {
            return;
        }
        // Records may be intact although the header of their frame is not. Between two frames of one start their sequences
        // say whether any is missing.
        let same_extent = self.append_at.filter(|(extent, _)| *extent == next.extent);
        let range = match same_extent {
            Some((_, from)) => from as usize..next.offset as usize,
            None => self.superblock.block_size as usize..next.offset as usize,
        };
        let found = if starts_boot || lost_to < next.header.frame - 1 {
            Vec::new()
        } else if let Some(place) = out.places.get(&next.extent).copied() {
            salvage(bytes, range, expected.clone(), next.extent, place)
        } else {
            Vec::new()
        };
        if found.len() as u64 != expected.end - expected.start {
            out.doubt.raise(expected.end);
        }
        for one in found {
            if !one.value_intact {
                out.damage.push(one.damaged_value(out.id));
            }
            out.apply(one, &self.superblock.secret);
        }
        out.accepted_sequence = expected.end;
        if out.used_extents.last() != Some(&next.extent) {
            out.used_extents.push(next.extent);
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
        out.doubt.raise(read.lost_below);
        out.accepted_sequence = read.header.first_sequence + u64::from(read.header.record_count);
        self.lost_tail = false;
        for found in read.records {
            self.out.apply(found, &self.superblock.secret);
        }
    }

    fn finish(mut self) -> ScannedShard {
        let out = &mut self.out;
        if let Some(first) = self.suspects.first() {
            probe::hit(Probe::TornTailCut);
            if self.suspects.iter().any(|one| !one.damage.is_empty()) {
                probe::hit(Probe::TornFrameSeen);
            }
            // Whatever came behind a clean stop did not stop cleanly.
            out.clean = false;
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
        if self.lost_tail {
            // Newer records than all of these may have been there. They are not written over, so that it stays known.
            out.doubt.raise(out.last_sequence + 1);
            out.open = None;
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
                let count = expected.end - expected.start;
                let shifted = Shifted { bytes: &bytes[..payload], at };
                let found = shifted.salvage(position, expected.clone(), extent, place);
                if found.len() as u64 != count {
                    read.lost_below = expected.end;
                }
                for one in &found {
                    if !one.value_intact {
                        read.damage.push(one.damaged_value(shard));
                    }
                }
                read.records.extend(found);
                return read;
            }
        };
        if record.entry.sequence != header.first_sequence + u64::from(number) {
            let what = format!("sequence {} is out of order", record.entry.sequence);
            read.damage.push(damage(position, size, Some(&record.key), what));
        }
        if !record.value_intact {
            read.damage.push(record.damaged_value(shard));
        }
        read.records.push(record);
        position += size;
    }
    if position != payload || bytes[payload..].iter().any(|byte| *byte != 0) {
        let what =
            format!("frame {} does not end where its records do, or its padding is not zero", header.frame);
        read.damage.push(damage(position, bytes.len() - position, None, what));
    }
    read
}

/// The record `position` bytes into `bytes`, which start `at` bytes into the extent.
fn found_at(
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
    let entry = Entry {
        extent,
        offset,
        size: size as u32,
        value_size: record.value.len() as u32,
        sequence: record.sequence,
        expires_at_ms: record.expires_at_ms,
    };
    let batch = record.batch.map(|mark| (BatchId { boot: mark.boot, number: mark.number }, mark.coordinator));
    let key = Bytes::copy_from_slice(record.key);
    Ok((Found { kind: record.kind, key, entry, batch, participant_count, value_intact }, size))
}

/// Bytes that start `at` bytes into their extent.
struct Shifted<'a> {
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
                next = record.entry.sequence + 1;
                found.push(record);
                position += size;
            } else {
                position += 1;
            }
        }
        found
    }
}

/// Records with these sequences between two places of an extent whose bytes are given whole.
fn salvage(bytes: &[u8], range: Range<usize>, expected: Range<u64>, extent: u32, place: Place) -> Vec<Found> {
    let Some(slice) = bytes.get(range.clone()) else { return Vec::new() };
    probe::hit(Probe::RecordsSalvaged);
    Shifted { bytes: slice, at: range.start }.salvage(0, expected, extent, place)
}

/// Reads the rest of an extent until it looks the same twice.
fn reread(
    bytes: &mut Vec<u8>,
    unreadable: &mut Vec<usize>,
    from: usize,
    again: &mut dyn FnMut(usize) -> Result<Extent, IoError>,
) -> Result<(), IoError> {
    for _ in 0..READ_TRIES {
        let rest = again(from)?;
        let is_same = bytes[from..] == rest.bytes;
        bytes.truncate(from);
        bytes.extend_from_slice(&rest.bytes);
        unreadable.retain(|at| *at < from);
        unreadable.extend(rest.unreadable);
        if is_same {
            break;
        }
        probe::hit(Probe::RecoveryReadUnstable);
    }
    Ok(())
}

impl Found {
    fn damaged_value(&self, shard: ShardId) -> Damage {
        Damage {
            shard: Some(shard.0),
            extent: self.entry.extent,
            offset: u64::from(self.entry.offset),
            size: u64::from(self.entry.size),
            key: Some(self.key.escape_ascii().to_string()),
            what: "the value does not match its checksum".into(),
        }
    }
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
                // Whatever was lost before is dead as well.
                self.doubt = Doubt::default();
            }
            (kind, Some((batch, coordinator))) => {
                self.batches_seen.insert(batch);
                self.parts.entry(batch).or_default().push(Part { kind, key, entry, coordinator });
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
            if self.doubt.below > 0 && entry.sequence >= self.doubt.below {
                self.doubt.known_absent.insert(key.clone());
            }
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
    pub fn resolve(mut self, decisions: &Decisions, superblock: &Arc<Superblock>) -> ShardState {
        let parts = std::mem::take(&mut self.parts);
        let (decided, undecided): (Vec<_>, Vec<_>) =
            parts.into_iter().partition(|(batch, _)| decisions.committed.contains(batch));
        let decided = decided.into_iter().flat_map(|(_, parts)| parts).collect();
        self.apply_parts(decided, &superblock.secret);
        for part in undecided.into_iter().flat_map(|(_, parts)| parts) {
            probe::hit(Probe::UndecidedPartsDropped);
            let newest = self.index.get(hash_key(&superblock.secret, &part.key), &part.key);
            let is_newest = newest.is_none_or(|newest| newest.sequence < part.entry.sequence);
            if is_newest && decisions.doubtful.contains(&part.coordinator) {
                self.doubt.keys.insert(part.key);
            }
        }
        let log = ShardLog::new(
            self.id,
            Arc::clone(superblock),
            self.open,
            self.last_sequence + 1 + SEQUENCE_GAP,
            self.last_frame + 1,
        );
        ShardState {
            id: self.id,
            index: self.index,
            log,
            places: self.places,
            durable_frame: self.last_frame,
            clean: self.clean,
            doubt: self.doubt,
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

/// Sequences that a start leaves out: a torn frame that nobody can read may have used some, and none is ever issued again.
const SEQUENCE_GAP: u64 = 1 << 32;

/// What the commit records of all shards say about the batches.
#[derive(Debug, Default)]
pub struct Decisions {
    committed: BTreeSet<BatchId>,
    /// Shards that lost records, commit records perhaps among them.
    doubtful: BTreeSet<ShardId>,
}

impl Decisions {
    /// Whether a commit record decided this batch.
    pub fn is_committed(&self, batch: &BatchId) -> bool {
        self.committed.contains(batch)
    }
}

/// Which batches happened, with the commit records of every shard known.
pub fn committed_batches(shards: &[ScannedShard]) -> Decisions {
    Decisions {
        committed: shards.iter().flat_map(|shard| shard.commits.iter().map(|(batch, _)| *batch)).collect(),
        doubtful: shards.iter().filter(|shard| shard.doubt.below > 0).map(|shard| shard.id).collect(),
    }
}

/// What can't be said about keys because records were lost that may have been newer than those that are there. Such keys
/// answer that they are damaged, never with an old value and never with "not found".
#[derive(Debug, Default)]
pub(super) struct Doubt {
    /// Records with lower sequences may have been replaced by lost ones, and keys without a record may have lost it.
    pub(super) below: u64,
    /// Keys in doubt although their record is newer: their batch was decided by a lost record.
    pub(super) keys: BTreeSet<Bytes>,
    /// Keys that are known to be absent.
    pub(super) known_absent: BTreeSet<Bytes>,
}

impl Doubt {
    /// Records with lower sequences were lost.
    fn raise(&mut self, below: u64) {
        if below > self.below {
            self.below = below;
            // What was seen to be deleted before may have been written again by what is lost.
            self.known_absent.clear();
        }
    }

    /// Whether anything is in doubt.
    pub(super) fn is_any(&self) -> bool {
        self.below > 0 || !self.keys.is_empty()
    }
}
