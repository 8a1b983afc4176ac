//! The scan of one shard: its frames in order, and what their absence means.

mod copies;
mod lost;
mod survivors;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::checkpoint::{Base, ShardCheckpoint};
use super::frames::{FrameRead, frame_at, read_frame, retirements, salvage};
use super::history::History;
use super::read::{Extent, reread};
use super::resolve::{Doubt, ScannedShard};
use super::survey::Chains;
use super::units::{ReadFrom, Units, UnitsBase};
use super::{Damage, TornTail};
use crate::device::{Device, IoError};
use crate::engine::extents;
use crate::engine::index::{Directory, Expiries, HashIndex, Index};
use crate::engine::log::OpenExtent;
use crate::engine::op::ShardId;
use crate::engine::survivors::FoundUnits;
use crate::format::Place;
use crate::format::checkpoint::{ExtentSummary, ShardPosition};
use crate::format::extent::ExtentHeader;
use crate::format::retirement::Retirement;
use crate::format::superblock::{IndexKind, Superblock};
use crate::planted::{Bug, is_planted};
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

/// Reads what a checkpoint does not cover. `None` where the two don't fit each other.
fn scan_from<D: Device>(
    device: &mut D,
    superblock: &Superblock,
    base: Base,
    chain: Chains<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<Option<ScannedShard>, IoError> {
    let position = base.position;
    // Every start is counted before it writes anything, so if none was since, nothing is behind the position.
    let is_alone = position.clean && position.boot + 1 == superblock.boot;
    let mut kept = None;
    let mut newest = None;
    let behind = |header: &&ExtentHeader| {
        let is_open = position.open.is_some_and(|(open, _)| open == header.extent);
        let is_covered = base.covers(header.extent, header.epoch);
        (is_covered && is_open) || (!is_covered && header.first_frame > position.frame)
    };
    for header in chain.log.iter().rev().filter(behind).filter(|_| !is_alone) {
        let from =
            if base.covers(header.extent, header.epoch) { position.open.map_or(0, |open| open.1) } else { 0 };
        let extent = Extent::read_behind(device, superblock, header.extent, from as usize)?;
        newest = retirements(superblock, position.shard, header, &extent.bytes).into_iter().next();
        kept.get_or_insert((header.extent, extent));
        if newest.is_some() {
            break;
        }
    }
    let retired = newest.map_or_else(|| base.retired.clone(), |(_, retired)| retired);
    let is_there = |one: &ExtentSummary| {
        is_retired(&retired, one)
            || chain.iter().any(|header| header.extent == one.extent && header.epoch == one.epoch)
    };
    let is_known = |open: Option<(u32, u32)>| {
        open.is_none_or(|(open, _)| base.extents.iter().any(|one| one.extent == open))
    };
    let is_open_there = is_known(position.open);
    // An extent that is neither retired nor there was lost: the whole log says what that means.
    if !is_open_there || !base.extents.iter().all(is_there) {
        return Ok(None);
    }
    let scan = Scan::from_base(superblock, base, chain, &retired, is_alone);
    let scanned = scan_with(device, superblock, scan, chain, &mut kept, progress)?;
    // One that was torn off with the tail had not retired anything yet; then it is not worth another way.
    if scanned.retired.1 != retired {
        return Ok(None);
    }
    // Every key of the index has its name, or is a part whose batch is decided later.
    let parts: usize = scanned.parts.values().map(Vec::len).sum();
    if scanned.directory.as_ref().is_some_and(|names| names.len() + (parts as u64) < scanned.index.len()) {
        return Ok(None);
    }
    probe::hit(if is_alone { Probe::CheckpointAlone } else { Probe::CheckpointAndLog });
    Ok(Some(scanned))
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
    for header in chain.log.iter().filter(|header| !retired.frames.contains(header.first_frame)) {
        if header.ordinal == 0 {
            scan.lost_header(header.extent);
        }
        let Some(from) = scan.start_of(header) else { continue };
        let Extent { bytes, unreadable } = match kept.take_if(|(number, _)| *number == header.extent) {
            Some((_, extent)) => extent,
            None => Extent::read_behind(device, superblock, header.extent, from)?,
        };
        let size = (bytes.len() - from) as u64;
        let mut read = |extent, from| Extent::read_part(device, superblock, extent, from);
        scan.extent(header, from, bytes, unreadable, &mut read)?;
        progress(size + std::mem::take(&mut scan.units.bytes_read));
    }
    let mut read = |extent, from| Extent::read_part(device, superblock, extent, from);
    scan.end_units(&mut read)?;
    progress(scan.units.bytes_read);
    Ok(scan.finish())
}

/// Whether what is in an extent is not needed any more.
fn is_retired(retired: &Retirement, one: &ExtentSummary) -> bool {
    match one.follows {
        None => retired.frames.contains(one.first_frame),
        Some(_) => retired.units.contains(one.first_frame),
    }
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

/// What need not be read since a checkpoint has it.
struct Covered {
    position: ShardPosition,
    /// Extents with their epochs.
    extents: BTreeSet<(u32, u64)>,
    /// Not even what follows.
    is_alone: bool,
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

    /// A scan that goes on where a checkpoint was.
    fn from_base(
        superblock: &'a Superblock,
        mut base: Base,
        chain: Chains<'a>,
        retired: &'a Retirement,
        is_alone: bool,
    ) -> Scan<'a> {
        let position = base.position;
        let units = base.units;
        let of_units = UnitsBase {
            last: units.last,
            open: units.open,
            covered: base.extents.iter().map(|one| (one.extent, one.epoch)).collect(),
            frame: position.frame,
        };
        let any = chain;
        let chain = if is_alone { Chains { survivors: &[], ..chain } } else { chain };
        let mut scan = Scan::new(superblock, position.shard, chain, retired, of_units);
        scan.survivors = any.survivors;
        scan.out.units.is_any = !any.survivors.is_empty();
        scan.out.units.last = units.last;
        let stays = |one: &&ExtentSummary| !is_retired(retired, one);
        let place = |one: &ExtentSummary| {
            Place::new(&superblock.uuid, &superblock.secret, position.shard, one.extent, one.epoch)
        };
        let out = &mut scan.out;
        let ends = [position.open, units.open];
        let end_of =
            |extent: u32| ends.iter().flatten().find(|(open, _)| *open == extent).map(|(_, end)| *end);
        for one in base.extents.iter().filter(stays) {
            out.places.insert(one.extent, place(one));
            out.used_extents.push(one.extent);
            let extent = extents::Extent {
                last_frame: Some(one.last_frame),
                end: one.end,
                carry_bytes: one.carry_bytes,
                carry_parts: one.carry_parts,
                has_clear: one.has_clear,
                follows: one.follows,
                ..extents::Extent::new(place(one), one.epoch, one.first_frame, one.is_reserve)
            };
            out.extents.insert(one.extent, extent);
        }
        // What was written behind the position is read again, and what was moved from retired extents is behind it.
        let mut known = vec![false; superblock.layout.extent_count as usize];
        for extent in out.places.keys() {
            if let Some(is_known) = known.get_mut(*extent as usize) {
                *is_known = true;
            }
        }
        let known = |extent: u32| known.get(extent as usize).is_some_and(|is_known| *is_known);
        let is_before = |extent: u32, offset: u32| {
            (known(extent) || is_planted(Bug::BelievesRetiredExtents))
                && end_of(extent).is_none_or(|end| offset < end)
        };
        // Behind a clean stop nothing is, and nothing was retired since: it is a look at every key that is saved.
        if !is_alone || *retired != base.retired || is_planted(Bug::BelievesRetiredExtents) {
            base.index.retain(&mut |identity, entry| {
                let stays = is_before(entry.extent, entry.offset);
                if !stays {
                    base.expiries.remove(identity);
                    base.manifests.remove(&identity);
                }
                stays
            });
        }
        base.chunks.retain(|_, chunk| is_before(chunk.extent, chunk.offset));
        // Names of what was left out go with the sweep, or come again.
        out.directory = out.directory.is_some().then(|| base.names.finish().into());
        (out.index, out.expiries) = (base.index, base.expiries);
        (out.manifests, out.chunks) = (base.manifests, base.chunks);
        for (batch, part) in base.parts.into_iter().filter(|(_, part)| known(part.record.extent)) {
            out.parts.entry(batch).or_default().push(part);
        }
        out.commits = base.commits.into_iter().map(|batch| (batch, 0)).collect();
        out.retired = (0, base.retired);
        (out.last_frame, out.last_boot, out.clean) = (position.frame, position.boot, position.clean);
        out.accepted_sequence = position.next_sequence;
        out.last_sequence = position.next_sequence - 1;
        let open_stays = position.open.filter(|(open, _)| known(*open));
        scan.append_at = open_stays.map(|(open, end)| (open, u64::from(end)));
        let header_of = |extent: u32, epoch: u64| {
            any.survivors.iter().find(|header| header.extent == extent && header.epoch == epoch)
        };
        for header in any.survivors {
            if let Some(one) =
                scan.out.extents.get_mut(&header.extent).filter(|one| one.epoch == header.epoch)
            {
                one.ordinal = header.ordinal;
            }
        }
        scan.out.units.open = units.open.filter(|(open, _)| known(*open)).and_then(|(open, end)| {
            let one = base.extents.iter().find(|one| one.extent == open)?;
            let header = *header_of(open, one.epoch)?;
            let position = u64::from(end);
            Some(OpenExtent { header, place: place(one), position, for_collection: false })
        });
        let extents = base.extents.iter().map(|one| (one.extent, one.epoch)).collect();
        scan.covered = Some(Covered { position, extents, is_alone });
        scan.skip_retired();
        scan
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
    /// it must look the same twice, since a medium may be wrong once and right the next time.
    fn extent(
        &mut self,
        header: &ExtentHeader,
        from: usize,
        mut bytes: Vec<u8>,
        mut unreadable: Vec<usize>,
        read_from: &mut ReadFrom<'_>,
    ) -> Result<(), IoError> {
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
        Ok(())
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
        for found in read.records {
            if found.retired.is_some() {
                self.out.retired.0 = read.header.frame;
            }
            self.out.apply(found, &self.superblock.secret);
        }
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
