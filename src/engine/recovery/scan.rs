//! The scan of one shard: its frames in order, and what their absence means.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::frames::{FrameRead, frame_at, read_frame, salvage};
use super::history::History;
use super::read::{Extent, reread};
use super::resolve::{Doubt, ScannedShard};
use super::{Damage, TornTail};
use crate::device::{Device, IoError};
use crate::engine::extents;
use crate::engine::index::HashIndex;
use crate::engine::log::OpenExtent;
use crate::engine::op::ShardId;
use crate::format::Place;
use crate::format::extent::ExtentHeader;
use crate::format::frame_ranges::FrameRanges;
use crate::format::superblock::Superblock;
use crate::probe::{self, Probe};

/// Reads one shard's log. `progress` is told bytes as they are read.
///
/// Which frames are retired must be known before the log is read, or their absence looks like damage. The newest record that
/// says so is in the newest extents; but it counts only if its own frame does, which only reading the log tells. So each is
/// tried, the newest first: one whose frame is torn off with the tail had not retired anything yet.
pub fn scan_shard<D: Device>(
    device: &mut D,
    superblock: &Superblock,
    id: ShardId,
    chain: &[ExtentHeader],
    progress: &mut dyn FnMut(u64),
) -> Result<ScannedShard, IoError> {
    scan_shard_watching(device, superblock, id, chain, &BTreeSet::new(), progress)
}

/// The same, and takes note of every record of some keys.
pub fn scan_shard_watching<D: Device>(
    device: &mut D,
    superblock: &Superblock,
    id: ShardId,
    chain: &[ExtentHeader],
    watched: &BTreeSet<Bytes>,
    progress: &mut dyn FnMut(u64),
) -> Result<ScannedShard, IoError> {
    let mut kept = None;
    let mut tries = 0;
    for header in chain.iter().rev() {
        let extent = Extent::read(device, superblock, header.extent)?;
        let found = retirements(superblock, id, header, &extent.bytes);
        // The scan needs it again.
        kept.get_or_insert((header.extent, extent));
        for (frame, retired) in found {
            probe::hit_if(tries > 0, Probe::OlderRetirementTaken);
            tries += 1;
            let scanned = scan_with(device, superblock, id, (chain, watched), &retired, &mut kept, progress)?;
            // Numbers of frames that were torn off come again, hence both.
            if scanned.retired == (frame, retired) {
                return Ok(scanned);
            }
        }
    }
    scan_with(device, superblock, id, (chain, watched), &FrameRanges::default(), &mut kept, progress)
}

/// What the frames of an extent say is retired, each with its number, the newest first.
fn retirements(
    superblock: &Superblock,
    id: ShardId,
    header: &ExtentHeader,
    bytes: &[u8],
) -> Vec<(u64, FrameRanges)> {
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

fn scan_with<D: Device>(
    device: &mut D,
    superblock: &Superblock,
    id: ShardId,
    (chain, watched): (&[ExtentHeader], &BTreeSet<Bytes>),
    retired: &FrameRanges,
    kept: &mut Option<(u32, Extent)>,
    progress: &mut dyn FnMut(u64),
) -> Result<ScannedShard, IoError> {
    let mut scan = Scan::new(superblock, id, retired);
    scan.out.history = History::of(watched.clone());
    for header in chain.iter().filter(|header| !retired.contains(header.first_frame)) {
        if header.ordinal == 0 {
            scan.lost_header(header.extent);
        }
        let Extent { bytes, unreadable } = match kept.take_if(|(number, _)| *number == header.extent) {
            Some((_, extent)) => extent,
            None => Extent::read(device, superblock, header.extent)?,
        };
        let size = bytes.len() as u64;
        let mut again = |from| Extent::read_part(device, superblock, header.extent, from);
        scan.extent(header, bytes, unreadable, &mut again)?;
        progress(size);
    }
    Ok(scan.finish())
}

/// The state of one shard's scan.
pub(super) struct Scan<'a> {
    superblock: &'a Superblock,
    /// Frames that need not be there.
    retired: &'a FrameRanges,
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
    fn new(superblock: &'a Superblock, id: ShardId, retired: &'a FrameRanges) -> Scan<'a> {
        let out = ScannedShard {
            id,
            index: HashIndex::default(),
            parts: BTreeMap::new(),
            deletes: BTreeMap::new(),
            commits: Vec::new(),
            batches_seen: BTreeSet::new(),
            damage: Vec::new(),
            torn: None,
            unreadable_tail: None,
            frame_count: 0,
            record_count: 0,
            log_bytes: 0,
            places: BTreeMap::new(),
            extents: BTreeMap::new(),
            retired: (0, FrameRanges::default()),
            open: None,
            used_extents: Vec::new(),
            doubt: Doubt::default(),
            accepted_sequence: 1,
            last_frame: 0,
            last_boot: 0,
            last_sequence: 0,
            clean: false,
            history: History::default(),
        };
        let mut scan = Scan {
            superblock,
            retired,
            out,
            suspects: Vec::new(),
            suspects_durable: 0,
            headers: BTreeMap::new(),
            append_at: None,
        };
        scan.skip_retired();
        scan
    }

    /// Passes over frames that are retired: the log goes on behind them.
    fn skip_retired(&mut self) {
        if let Some(last) = self.retired.end_of(self.out.last_frame + 1) {
            probe::hit(Probe::RetiredFramesSkipped);
            self.out.last_frame = last;
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
                if !reread(&mut bytes, &mut unreadable, at, again)? {
                    let offset = superblock.layout.extent_offset(header.extent) + at as u64;
                    return Err(IoError::UnrecoveredRead { offset, size: (bytes.len() - at) as u64 });
                }
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

    /// Frames of the log are in an extent whose header is not there any more. Had they been retired, the extent could be in
    /// another life whose header was in flight when the node died.
    fn lost_header(&mut self, extent: u32) {
        probe::hit(Probe::OrphanExtentLost);
        self.out.damage.push(Damage {
            shard: Some(self.out.id.0),
            extent,
            offset: 0,
            size: u64::from(self.superblock.block_size),
            key: None,
            what: "the extent's header was lost; its frames are read without it".into(),
        });
    }

    /// A block that can't be read where a frame may have been: what it held can't be told from what never was.
    fn unreadable(&mut self, extent: u32, at: usize) {
        let damage = Damage {
            shard: Some(self.out.id.0),
            extent,
            offset: at as u64,
            size: u64::from(self.superblock.block_size),
            key: None,
            what: "the device can't read it".into(),
        };
        self.out.unreadable_tail.get_or_insert_with(|| damage.clone());
        self.out.damage.push(damage);
    }

    fn frame(&mut self, read: FrameRead, bytes: &[u8]) {
        // A boot goes on from where its recovery cut: what older boots left from that number on is void. Within one boot a
        // number comes again only in another extent, after the write in the earlier one failed.
        let (frame, boot, extent) = (read.header.frame, read.header.boot, read.extent);
        self.suspects
            .retain(|one| one.header.frame < frame || (one.header.boot >= boot && one.extent == extent));
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
        if let Some(last) = self.retired.end_of(lost_to + 1) {
            out.last_frame = last;
        }
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
        // What can't be read before this frame was none of its successors.
        out.unreadable_tail = None;
        if let Some(place) = out.places.get(&read.extent) {
            let header = self.headers.get(&read.extent);
            let is_reserve = header.is_some_and(|header| header.reserve);
            // The header's number, not that of the first frame that counts: a frame whose write failed may count where it was
            // first written, and is in the next extent again.
            let first_frame = header.map_or(read.header.frame, |header| header.first_frame);
            let extent = out
                .extents
                .entry(read.extent)
                .or_insert_with(|| extents::Extent::new(*place, first_frame, is_reserve));
            extent.last_frame = Some(read.header.frame);
            extent.end = read.offset + u64::from(read.header.size);
        }
        for found in read.records {
            if found.retired.is_some() {
                self.out.retired.0 = read.header.frame;
            }
            self.out.apply(found, &self.superblock.secret);
        }
        self.skip_retired();
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
            out.open = Some(OpenExtent { header: *header, place: *place, position, for_collection: false });
            if let Some(extent) = out.extents.get_mut(&extent) {
                extent.last_frame = None;
            }
        }
        self.out
    }
}
