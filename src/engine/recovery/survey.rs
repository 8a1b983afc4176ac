//! Whose the extents are, from their headers, and from the frames of an extent that lost its header.

use super::frames::frame_at;
use super::read::Extent;
use super::{Damage, Held};
use crate::device::{Device, IoError, blocking};
use crate::engine::op::ShardId;
use crate::format::checkpoint::CheckpointHeader;
use crate::format::extent::{ExtentHeader, ExtentRole};
use crate::format::frame::FrameHeader;
use crate::format::superblock::Superblock;
use crate::format::unit::UnitHeader;
use crate::format::{FormatError, Place, is_zero};
use crate::probe::{self, Probe};

/// Whose the extents are.
#[derive(Debug, Default)]
pub struct Survey {
    /// Each shard's extents of the log, by their ordinals.
    chains: Vec<Vec<ExtentHeader>>,
    /// Each shard's extents of survivors.
    survivors: Vec<Vec<ExtentHeader>>,
    /// The highest ordinal on the device.
    pub ordinal_last: u64,
    /// Headers that were lost after they were durable.
    pub damage: Vec<Damage>,
    /// Extents of checkpoints.
    pub(super) checkpoints: Vec<CheckpointHeader>,
}

impl Survey {
    /// Extents of a shard.
    pub fn chains(&self, shard: ShardId) -> Chains<'_> {
        Chains {
            log: self.chains.get(usize::from(shard.0)).map_or(&[], Vec::as_slice),
            survivors: self.survivors.get(usize::from(shard.0)).map_or(&[], Vec::as_slice),
        }
    }

    fn new(superblock: &Superblock) -> Survey {
        let chains = vec![Vec::new(); usize::from(superblock.shard_count)];
        Survey { survivors: chains.clone(), chains, ..Survey::default() }
    }

    /// Extents that some header claims.
    pub fn extent_count(&self) -> usize {
        self.chains.iter().chain(&self.survivors).map(Vec::len).sum()
    }

    /// Extents of checkpoints, complete or not.
    pub fn checkpoint_extent_count(&self) -> usize {
        self.checkpoints.len()
    }

    fn add(&mut self, header: ExtentHeader) {
        self.ordinal_last = self.ordinal_last.max(header.ordinal);
        let chains = match header.role {
            ExtentRole::Log => &mut self.chains,
            ExtentRole::Survivors => &mut self.survivors,
        };
        match chains.get_mut(usize::from(header.shard.0)) {
            Some(chain) => chain.push(header),
            None => self.damage.push(Damage {
                shard: Some(header.shard.0),
                extent: header.extent,
                offset: 0,
                size: 0,
                key: None,
                what: "the extent's header names a shard that this device does not have".into(),
                held: Held::Anything,
            }),
        }
    }
}

/// The extents of one shard, each kind in the order in which they were opened.
#[derive(Debug, Clone, Copy)]
pub struct Chains<'a> {
    /// Those of its log.
    pub log: &'a [ExtentHeader],
    /// Those of its survivors.
    pub survivors: &'a [ExtentHeader],
}

impl<'a> Chains<'a> {
    /// All of them.
    pub fn iter(self) -> impl Iterator<Item = &'a ExtentHeader> {
        self.log.iter().chain(self.survivors)
    }

    /// How many there are.
    pub fn count(self) -> usize {
        self.log.len() + self.survivors.len()
    }
}

/// The epoch and shard that the first frame, or the first unit, of an extent claims.
fn claimed_place(bytes: &[u8]) -> Option<(u64, ShardId)> {
    FrameHeader::claimed_place(bytes).or_else(|| UnitHeader::claimed_place(bytes))
}

/// Reads every extent's header.
pub fn survey<D: Device>(device: &mut D, superblock: &Superblock) -> Result<Survey, IoError> {
    let mut survey = Survey::new(superblock);
    let block = superblock.block_size as usize;
    let layout = superblock.layout;
    let offsets: Vec<u64> = (0..layout.extent_count).map(|extent| layout.extent_offset(extent)).collect();
    let mut suspects = Vec::new();
    // The block behind the header says whose the extent is when the header does not.
    let mut header_at = |extent: u32, bytes: &[u8], survey: &mut Survey| {
        let header = ExtentHeader::decode(&bytes[..block], &superblock.uuid, &superblock.secret, extent);
        let claimed = claimed_place(&bytes[block..]);
        // One of a checkpoint is no suspect: what is in it is looked at when it is loaded, and is never needed.
        if header.is_err()
            && let Ok(header) = checkpoint_header(&bytes[..block], superblock, extent)
        {
            survey.ordinal_last = survey.ordinal_last.max(header.checkpoint);
            survey.checkpoints.push(header);
            return;
        }
        match header {
            // Frames of a later life than the header's: the header is a stale one, or its last write was lost.
            Ok(header) if claimed.is_some_and(|(epoch, _)| epoch > header.epoch) => {
                suspects.push((extent, Some(header)));
            }
            Ok(header) => survey.add(header),
            // One of a checkpoint is no suspect: what is in it is looked at when it is loaded, and is never needed.
            // An extent that was never used has a header of zeros.
            Err(_) if claimed.is_some() || !is_zero(&bytes[..block]) => {
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
            survey = Survey::new(superblock);
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
                // Whether that is damage is for the shard's scan to say: the frames may be those of an earlier life.
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
                        held: Held::Anything,
                    });
                }
            }
        }
    }
    let Survey { chains, survivors, damage, .. } = &mut survey;
    for (shard, chain) in chains.iter_mut().enumerate().chain(survivors.iter_mut().enumerate()) {
        // The order of opening. A header that was lost has no ordinal; the others agree with their ordinals.
        chain.sort_by_key(|header| (header.boot, header.first_frame, header.ordinal));
        for pair in chain.windows(2).filter(|pair| pair[1].ordinal != 0 && pair[0].ordinal >= pair[1].ordinal)
        {
            damage.push(Damage {
                shard: Some(shard as u16),
                extent: pair[1].extent,
                offset: 0,
                size: block as u64,
                key: None,
                what: format!("extent {} has the same place in the shard's chain", pair[0].extent),
                held: Held::Anything,
            });
        }
    }
    Ok(survey)
}

fn checkpoint_header(
    block: &[u8],
    superblock: &Superblock,
    extent: u32,
) -> Result<CheckpointHeader, FormatError> {
    CheckpointHeader::decode(block, &superblock.uuid, &superblock.secret, extent)
}

/// What a frame, or a unit, says of itself.
struct Numbers {
    first_frame: u64,
    /// Up to which number everything was durable when it was issued.
    durable: u64,
    boot: u64,
    role: ExtentRole,
}

fn numbers_at(bytes: &[u8], at: usize, place: Place, superblock: &Superblock) -> Option<Numbers> {
    if let Some((frame, _)) = frame_at(bytes, at, place, superblock) {
        let FrameHeader { frame: first_frame, durable, boot, .. } = frame;
        return Some(Numbers { first_frame, durable, boot, role: ExtentRole::Log });
    }
    let rest = bytes.get(at..).filter(|rest| UnitHeader::has_magic(rest))?;
    let unit = UnitHeader::decode(rest, place, at as u32, superblock.block_size, rest.len() as u64).ok()?;
    // Units are written one after the other.
    let (first_frame, durable) = (unit.unit, unit.unit - 1);
    Some(Numbers { first_frame, durable, boot: unit.boot, role: ExtentRole::Survivors })
}

/// The header of an extent that lost it after frames behind it were known to be durable, made from those frames.
pub(super) fn lost_header(
    bytes: &[u8],
    extent: u32,
    known: Option<&ExtentHeader>,
    superblock: &Superblock,
) -> Option<ExtentHeader> {
    let block = superblock.block_size as usize;
    let mut best: Option<ExtentHeader> = None;
    let mut proven = 0;
    for at in (block..bytes.len()).step_by(block) {
        let Some((epoch, shard)) = claimed_place(&bytes[at..]) else { continue };
        let newest = best.as_ref().or(known).map_or(0, |header| header.epoch);
        if epoch < newest || shard.0 >= superblock.shard_count {
            continue;
        }
        let place = Place::new(&superblock.uuid, &superblock.secret, shard, extent, epoch);
        let Some(found) = numbers_at(bytes, at, place, superblock) else { continue };
        let Numbers { first_frame, durable, boot, role } = found;
        proven = if epoch > newest || best.is_none() { durable } else { proven.max(durable) };
        if known.is_none_or(|known| known.epoch != epoch) && (best.is_none() || epoch > newest) {
            let reserve = false;
            best = Some(ExtentHeader { extent, shard, epoch, ordinal: 0, first_frame, boot, reserve, role });
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
