//! Whose the extents are, from their headers, and from the frames of an extent that lost its header.

use super::Damage;
use super::frames::frame_at;
use super::read::Extent;
use crate::device::{Device, IoError, blocking};
use crate::engine::op::ShardId;
use crate::format::Place;
use crate::format::extent::ExtentHeader;
use crate::format::frame::FrameHeader;
use crate::format::superblock::Superblock;
use crate::probe::{self, Probe};

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
