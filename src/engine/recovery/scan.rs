//! The scan of one shard: its frames in order, and what their absence means.

mod copies;
mod covered;
mod lost;
mod survivors;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::checkpoint::ShardCheckpoint;
use super::frames::{FrameRead, frame_at, lost_below, read_frame, retirements, salvage};
use super::history::History;
use super::read::{Extent, reread};
use super::resolve::{Doubt, ScannedShard};
use super::survey::Chains;
use super::units::{ReadFrom, Units, UnitsBase};
use super::{Damage, Held, TornTail};
use crate::device::{Device, IoError};
use crate::engine::extents;
use crate::engine::index::{Directory, Expiries, HashIndex, Index};
use crate::engine::log::OpenExtent;
use crate::engine::op::ShardId;
use crate::engine::survivors::FoundUnits;
use crate::format::Place;
use crate::format::extent::ExtentHeader;
use crate::format::retirement::Retirement;
use crate::format::superblock::{IndexKind, Superblock};
use crate::planted::{Bug, is_planted};
use crate::probe::{self, Probe};

use covered::{Covered, scan_from};

/// Reads one shard's log. `progress` is told bytes as they are read.
///
/// Which frames are retired must be known before the log is read, or their absence looks like damage. The newest record that
/// says so is in the newest extents; but it counts only if its own frame does, which only reading the log tells. So each is
/// tried, the newest first: one whose frame is torn off with the tail had not retired anything yet.
pub fn scan_shard<D: Device>(
    device: &mut D,
    superblock: &Superblock,
    id: ShardId,
    chain: Chains<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<ScannedShard, IoError> {
    scan_shard_watching(device, superblock, id, chain, &BTreeSet::new(), progress)
}

/// The same, and takes note of every record of some keys.
pub fn scan_shard_watching<D: Device>(
    device: &mut D,
    superblock: &Superblock,
    id: ShardId,
    chain: Chains<'_>,
    watched: &BTreeSet<Bytes>,
    progress: &mut dyn FnMut(u64),
) -> Result<ScannedShard, IoError> {
    let mut kept = None;
    let mut tries = 0;
    for header in chain.log.iter().rev() {
        let extent = Extent::read(device, superblock, header.extent)?;
        let found = retirements(superblock, id, header, &extent.bytes);
        // The scan needs it again.
        kept.get_or_insert((header.extent, extent));
        for (frame, retired) in found {
            probe::hit_if(tries > 0, Probe::OlderRetirementTaken);
            tries += 1;
            let scan = Scan::new(superblock, id, chain, &retired, UnitsBase::default()).watching(watched);
            let scanned = scan_with(device, superblock, scan, chain, &mut kept, progress)?;
            // Numbers of frames that were torn off come again, hence both.
            if scanned.retired == (frame, retired) {
                return Ok(scanned);
            }
        }
    }
    let nothing = Retirement::default();
    let scan = Scan::new(superblock, id, chain, &nothing, UnitsBase::default()).watching(watched);
    scan_with(device, superblock, scan, chain, &mut kept, progress)
}

/// The state of one shard from its checkpoint and the log behind it, or from the whole log where there is none.
pub fn recover_shard<D: Device>(
    device: &mut D,
    superblock: &Superblock,
    id: ShardId,
    chain: Chains<'_>,
    base: Option<ShardCheckpoint>,
    progress: &mut dyn FnMut(u64),
) -> Result<ScannedShard, IoError> {
    let Some(ShardCheckpoint(base)) = base else {
        return scan_shard(device, superblock, id, chain, progress);
    };
    match scan_from(device, superblock, base, chain, progress)? {
        Some(scanned) => Ok(scanned),
        None => {
            probe::hit(Probe::CheckpointRefused);
            scan_shard(device, superblock, id, chain, progress)
        }
    }
}

fn scan_with<D: Device>(
    device: &mut D,
    superblock: &Superblock,
    mut scan: Scan<'_>,
    chain: Chains<'_>,
    kept: &mut Option<(u32, Extent)>,
    progress: &mut dyn FnMut(u64),
) -> Result<ScannedShard, IoError> {
    let retired = scan.retired;
    let mut room = Vec::new();
    for header in chain.log.iter().filter(|header| !retired.frames.contains(header.first_frame)) {
        if header.ordinal == 0 {
            scan.lost_header(header.extent);
        }
        let Some(from) = scan.start_of(header) else { continue };
        let Extent { bytes, unreadable } = match kept.take_if(|(number, _)| *number == header.extent) {
            Some((_, extent)) => extent,
            None => Extent::read_behind(device, superblock, header.extent, from, std::mem::take(&mut room))?,
        };
        let size = (bytes.len() - from) as u64;
        let mut read = |extent, from| Extent::read_part(device, superblock, extent, from);
        room = scan.extent(header, from, bytes, unreadable, &mut read)?;
        progress(size + std::mem::take(&mut scan.units.bytes_read));
    }
    let mut read = |extent, from| Extent::read_part(device, superblock, extent, from);
    scan.end_units(&mut read)?;
    progress(scan.units.bytes_read);
    Ok(scan.finish())
}

/// The state of one shard's scan.
pub(super) struct Scan<'a> {
    superblock: &'a Superblock,
    /// Frames and units that need not be there.
    retired: &'a Retirement,
    /// The units, to be put between the frames.
    units: Units<'a>,
    /// Every extent of the log, and of survivors.
    log: &'a [ExtentHeader],
    survivors: &'a [ExtentHeader],
    /// The first frames of the log's extents, in order, and where in `log` they are.
    first_frames: Vec<(u64, usize)>,
    out: ScannedShard,
    /// Frames behind a gap, or damaged ones, until it is known whether the missing ones were durable.
    suspects: Vec<FrameRead>,
    /// The most that any suspect calls durable.
    suspects_durable: u64,
    /// Headers by extent, for the append point.
    headers: BTreeMap<u32, ExtentHeader>,
    append_at: Option<(u32, u64)>,
    /// What the checkpoint covers, if there is one.
    covered: Option<Covered>,
}

impl<'a> Scan<'a> {
    fn new(
        superblock: &'a Superblock,
        id: ShardId,
        chain: Chains<'a>,
        retired: &'a Retirement,
        base: UnitsBase,
    ) -> Scan<'a> {
        let out = ScannedShard {
            id,
            index: HashIndex::default(),
            directory: (superblock.index == IndexKind::Ordered).then(Directory::default),
            expiries: Expiries::default(),
            manifests: BTreeMap::new(),
            chunks: BTreeMap::new(),
            damaged_chunks: BTreeSet::new(),
            parts: BTreeMap::new(),
            since_parts: BTreeMap::new(),
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
            retired: (0, Retirement::default()),
            units: FoundUnits { is_any: !chain.survivors.is_empty(), ..FoundUnits::default() },
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
        let mut first_frames: Vec<_> =
            chain.log.iter().enumerate().map(|(at, header)| (header.first_frame, at)).collect();
        first_frames.sort_unstable();
        let mut scan = Scan {
            superblock,
            retired,
            units: Units::new(superblock, id, chain.survivors, retired, base),
            log: chain.log,
            survivors: chain.survivors,
            first_frames,
            out,
            suspects: Vec::new(),
            suspects_durable: 0,
            headers: BTreeMap::new(),
            append_at: None,
            covered: None,
        };
        scan.skip_retired();
        scan
    }

    /// Notes every record of these keys.
    fn watching(mut self, keys: &BTreeSet<Bytes>) -> Self {
        self.out.history = History::of(keys.clone());
        self
    }

    /// From which byte an extent is to be read; `None` when nothing of it is.
    fn start_of(&mut self, header: &ExtentHeader) -> Option<usize> {
        let whole = self.superblock.block_size as usize;
        let Some(covered) = &self.covered else { return Some(whole) };
        if !covered.extents.contains(&(header.extent, header.epoch)) {
            // Its frames were void already, or are behind the position.
            let is_behind = header.first_frame > covered.position.frame && !covered.is_alone;
            return is_behind.then_some(whole);
        }
        self.headers.insert(header.extent, *header);
        let open = covered.position.open.filter(|(open, _)| *open == header.extent && !covered.is_alone);
        open.map(|(_, end)| end as usize)
    }

    /// Passes over frames that are retired: the log goes on behind them.
    fn skip_retired(&mut self) {
        if let Some(last) = self.retired.frames.end_of(self.out.last_frame + 1) {
            probe::hit(Probe::RetiredFramesSkipped);
            self.out.last_frame = last;
        }
    }

    /// Reads the frames of one extent. `read` reads the rest of it once more, and the extents of units: before anything is called torn or damaged
    /// it must look the same twice, since a medium may be wrong once and right the next time. Gives the memory of the bytes back.
    fn extent(
        &mut self,
        header: &ExtentHeader,
        from: usize,
        mut bytes: Vec<u8>,
        mut unreadable: Vec<usize>,
        read_from: &mut ReadFrom<'_>,
    ) -> Result<Vec<u8>, IoError> {
        let superblock = self.superblock;
        let block = superblock.block_size as usize;
        let place =
            Place::new(&superblock.uuid, &superblock.secret, self.out.id, header.extent, header.epoch);
        self.headers.insert(header.extent, *header);
        self.out.places.insert(header.extent, place);
        let mut at = from;
        let mut sure = false;
        while at < bytes.len() {
            let found = frame_at(&bytes, at, place, superblock);
            let read = found.map(|(frame, size)| {
                read_frame(&bytes[at..at + size], frame, header.extent, at, place, self.out.id)
            });
            let is_plain = read.as_ref().is_some_and(|read| read.damage.is_empty());
            if !is_plain && !sure {
                sure = true;
                let mut again = |from| read_from(header.extent, from);
                if !reread(&mut bytes, &mut unreadable, at, &mut again)? {
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
            let is_void = frame.boot < self.out.last_boot
                || frame.frame <= self.out.last_frame
                || self.has_later_copy(&frame, header, read_from)?;
            let before = self.out.last_frame;
            if is_void {
                probe::hit(Probe::StaleFrameSkipped);
            } else {
                self.frame(read, &bytes, read_from)?;
            }
            // Only a frame that counts says where the next one is: a void one may reach over what replaced its end.
            at += if self.out.last_frame > before && self.out.last_frame >= frame.frame {
                frame.size as usize
            } else {
                block
            };
        }
        Ok(bytes)
    }

    fn frame(&mut self, read: FrameRead, bytes: &[u8], read_from: &mut ReadFrom<'_>) -> Result<(), IoError> {
        // A boot goes on from where its recovery cut: what older boots left from that number on is void. Within one boot a
        // number comes again only in another extent, after the write in the earlier one failed.
        let (frame, boot, extent) = (read.header.frame, read.header.boot, read.extent);
        self.suspects
            .retain(|one| one.header.frame < frame || (one.header.boot >= boot && one.extent == extent));
        self.suspects_durable = self.suspects.iter().map(|one| one.header.durable).max().unwrap_or(0);
        let is_next = read.header.frame == self.out.last_frame + 1 || is_planted(Bug::AcceptsGaps);
        if is_next && read.damage.is_empty() && self.suspects.is_empty() {
            return self.accept(read, read_from);
        }
        // An older boot's leftovers behind a suspect of a newer one can't be its successors.
        if self.suspects.last().is_some_and(|last| read.header.boot < last.header.boot) {
            return Ok(());
        }
        self.suspects_durable = self.suspects_durable.max(read.header.durable);
        self.suspects.push(read);
        if self.suspects_durable > self.out.last_frame {
            self.judge(bytes, read_from)?;
        }
        Ok(())
    }

    /// A frame behind the gap says that the gap was durable: take what can be trusted and report the rest. `bytes` are
    /// those of the extent that is being read.
    fn judge(&mut self, bytes: &[u8], read_from: &mut ReadFrom<'_>) -> Result<(), IoError> {
        for read in std::mem::take(&mut self.suspects) {
            if read.header.frame <= self.out.last_frame {
                continue;
            }
            // What nobody calls durable may still turn out torn, and then nothing behind it happened.
            let lost_to = (read.header.frame - 1).min(self.suspects_durable);
            if lost_to > self.out.last_frame {
                self.bring_units(self.out.last_frame, read_from)?;
                // Those that stand among the lost frames come before what is said of all of them.
                let among = self.bring_units(lost_to - 1, read_from)? > 0;
                self.lose(lost_to, &read, bytes, among);
            }
            let proven = read.header.frame <= self.suspects_durable;
            let is_next = read.header.frame == self.out.last_frame + 1;
            if is_next && (read.damage.is_empty() || proven) {
                self.out.damage.extend(read.damage.iter().cloned());
                self.accept(read, read_from)?;
            } else {
                self.suspects.push(read);
            }
        }
        Ok(())
    }

    fn accept(&mut self, read: FrameRead, read_from: &mut ReadFrom<'_>) -> Result<(), IoError> {
        self.bring_units(read.header.frame - 1, read_from)?;
        if let Some(mark) = read.records.iter().filter_map(|found| found.retired.as_ref()).next_back() {
            self.require_units(mark.mark.last, read.header.first_sequence);
        }
        let out = &mut self.out;
        out.last_frame = read.header.frame;
        out.last_boot = read.header.boot;
        out.clean = read.header.clean;
        out.frame_count += 1;
        out.log_bytes += u64::from(read.header.size);
        if !out.extents.contains_key(&read.extent) && !out.used_extents.contains(&read.extent) {
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
            let epoch = header.map_or(0, |header| header.epoch);
            // The header's number, not that of the first frame that counts: a frame whose write failed may count where it was
            // first written, and is in the next extent again.
            let first_frame = header.map_or(read.header.frame, |header| header.first_frame);
            let extent = out
                .extents
                .entry(read.extent)
                .or_insert_with(|| extents::Extent::new(*place, epoch, first_frame, is_reserve));
            extent.last_frame = Some(read.header.frame);
            extent.end = read.offset + u64::from(read.header.size);
        }
        if read.records.iter().any(|found| found.retired.is_some()) {
            out.retired.0 = read.header.frame;
        }
        out.apply_all(read.records, &self.superblock.secret);
        self.skip_retired();
        Ok(())
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
        for header in self.headers.values() {
            if let Some(extent) = out.extents.get_mut(&header.extent) {
                extent.ordinal = header.ordinal;
            }
        }
        let (last, mark) = (out.units.last, out.retired.1.mark);
        let newest = self.survivors.last();
        out.units.open = out.units.open.filter(|open| {
            // The next unit goes behind the last one, where nothing else was begun since.
            newest.is_some_and(|newest| {
                (newest.extent, newest.epoch) == (open.header.extent, open.header.epoch)
            }) && open.header.epoch >= mark.epoch
                && out.extents.get(&open.header.extent).is_some_and(|one| one.last_frame == Some(last))
        });
        if let Some(open) = out.units.open
            && let Some(extent) = out.extents.get_mut(&open.header.extent)
        {
            extent.last_frame = None;
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
