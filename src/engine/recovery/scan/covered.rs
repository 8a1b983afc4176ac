//! A scan that goes on where a checkpoint was.

use super::super::checkpoint::Base;
use super::super::units::UnitsBase;
use super::*;
use crate::format::checkpoint::{ExtentSummary, ShardPosition};

/// Reads what a checkpoint does not cover. `None` where the two don't fit each other.
pub(super) fn scan_from<D: Device>(
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
        let extent = Extent::read_behind(device, superblock, header.extent, from as usize, Vec::new())?;
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

/// Whether what is in an extent is not needed any more.
fn is_retired(retired: &Retirement, one: &ExtentSummary) -> bool {
    match one.follows {
        None => retired.frames.contains(one.first_frame),
        Some(_) => retired.units.contains(one.first_frame),
    }
}

/// What need not be read since a checkpoint has it.
pub(super) struct Covered {
    pub(super) position: ShardPosition,
    /// Extents with their epochs.
    pub(super) extents: BTreeSet<(u32, u64)>,
    /// Not even what follows.
    pub(super) is_alone: bool,
}

impl<'a> Scan<'a> {
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
        let mut index = base.index.finish();
        // Behind a clean stop nothing is, and nothing was retired since: it is a look at every key that is saved.
        if !is_alone || *retired != base.retired || is_planted(Bug::BelievesRetiredExtents) {
            index.retain(&mut |identity, entry| {
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
        (out.index, out.expiries) = (index, base.expiries);
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
}
