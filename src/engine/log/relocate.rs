//! Leaving an extent where a write failed: its last frame, and what was appended behind it since, go elsewhere.
//!
//! Frames before the failed one stay where they are. On the device both the failed attempt, whatever is left of it, and the
//! frame in its new extent carry the same number; recovery takes the one in the later extent.

use bytes::Bytes;

use super::{Appended, NoRoom, PlacedFrame, ShardLog};
use crate::engine::allocator::{Allocator, Purpose};
use crate::format::Place;
use crate::format::frame::{FRAME_HEADER_SIZE, FrameHeader};
use crate::format::record::Record;

/// Records that are in another place now: all of an extent from an offset on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) struct Move {
    from_extent: u32,
    from_offset: u32,
    to_extent: u32,
    to_offset: u32,
}

impl Move {
    /// Where a record is now. `None` when this move is not about it.
    pub(in crate::engine) fn target(&self, at: &Appended) -> Option<Appended> {
        (at.extent == self.from_extent && at.offset >= self.from_offset).then(|| Appended {
            extent: self.to_extent,
            offset: at.offset - self.from_offset + self.to_offset,
            ..*at
        })
    }
}

/// A frame that has been put elsewhere.
pub(in crate::engine) struct Relocated {
    pub(in crate::engine) placed: PlacedFrame,
    pub(in crate::engine) writes: Vec<(u64, Bytes)>,
    /// What moved; the frame first, then what was appended behind it.
    pub(in crate::engine) moves: Vec<Move>,
}

/// The same records for another place.
fn moved(bytes: &[u8], from: (Place, u32), to: (Place, u32)) -> Vec<u8> {
    let mut out = vec![0; FRAME_HEADER_SIZE];
    let mut position = FRAME_HEADER_SIZE;
    while position < bytes.len() {
        let decoded = Record::decode(&bytes[position..], from.0, from.1 + position as u32)
            .expect("what this log encoded itself decodes");
        decoded.record.encode(&mut out, to.0, to.1 + position as u32);
        position += decoded.size;
    }
    out
}

impl ShardLog {
    /// Puts a sealed frame whose write failed into another extent, with everything that was appended since. `Full` when
    /// there is none; then nothing has changed.
    pub(in crate::engine) fn relocate(
        &mut self,
        failed: &PlacedFrame,
        allocator: &Allocator,
    ) -> Result<Relocated, NoRoom> {
        let staged = self.staging.len() as u64;
        let frame_size = failed.data.len() as u64;
        // The next frame may have opened an extent of its own, which stays behind, unwritten; its number in the chain would
        // be wrong.
        let next = self.open.filter(|open| open.header.extent != failed.extent);
        let used = self.block_size() + frame_size + staged.max(FRAME_HEADER_SIZE as u64);
        let fits = used + self.kept_size() <= self.extent_size();
        let mut target = self.take_extent(failed.header.frame, Purpose::Reserve, allocator)?;
        let start = target.position as u32;
        let data = {
            let payload = failed.header.payload_size as usize;
            let from = (failed.place, failed.start);
            let mut data = moved(&failed.data[..payload], from, (target.place, start));
            let header = FrameHeader { epoch: target.header.epoch, ..failed.header };
            data[..FRAME_HEADER_SIZE].copy_from_slice(&header.encode(target.place, start));
            data.resize(failed.data.len(), 0);
            Bytes::from(data)
        };
        // The extent for what was appended since, when it does not fit behind the frame.
        let rest = match ((staged > 0 || self.marker.is_some()) && !fits)
            .then(|| self.take_extent(self.next_frame, Purpose::Reserve, allocator))
        {
            Some(Err(error)) => {
                allocator.give_back(target.header.extent);
                if target.header.reserve {
                    allocator.count_reserve(false);
                }
                return Err(error);
            }
            Some(Ok(extent)) => Some(extent),
            None => None,
        };
        let superblock = &self.superblock;
        let extent_offset = superblock.layout.extent_offset(target.header.extent);
        let block = superblock.block_size as usize;
        let header = target.header.encode(&superblock.uuid, &superblock.secret, block);
        let placed = PlacedFrame {
            header: FrameHeader { epoch: target.header.epoch, ..failed.header },
            extent: target.header.extent,
            place: target.place,
            is_reserve: target.header.reserve,
            start,
            data,
        };
        let writes = vec![
            (extent_offset, Bytes::from(header)),
            (extent_offset + u64::from(start), placed.data.clone()),
        ];
        let mut moves = vec![Move {
            from_extent: failed.extent,
            from_offset: failed.start,
            to_extent: target.header.extent,
            to_offset: start,
        }];
        target.position += frame_size;
        let header_pending = rest.is_some();
        let open = rest.unwrap_or(target);
        if let Some(old) = self.open.filter(|_| staged > 0) {
            let (from, to) = (old.position as u32, open.position as u32);
            self.staging = moved(&self.staging, (old.place, from), (open.place, to));
            // The more specific move comes first where both are about one extent.
            moves.insert(
                0,
                Move {
                    from_extent: old.header.extent,
                    from_offset: from,
                    to_extent: open.header.extent,
                    to_offset: to,
                },
            );
        }
        if let Some(next) = next {
            allocator.give_back(next.header.extent);
            if next.header.reserve {
                allocator.count_reserve(false);
            }
        }
        for one in &mut self.moved {
            one.at = moves.iter().find_map(|one_move| one_move.target(&one.at)).unwrap_or(one.at);
        }
        self.header_pending = header_pending;
        self.open = Some(open);
        Ok(Relocated { placed, writes, moves })
    }
}
