//! Frames that are there twice: a frame whose write failed goes to another extent under the same number, and the failed attempt may
//! be whole on the device all the same.

use super::super::units::ReadFrom;
use super::*;
use crate::format::frame::FrameHeader;

impl Scan<'_> {
    /// Whether a frame is in a later extent again, which begins with it. That is the one that counts: extents are collected, and
    /// frames retired, from the first one of an extent on, so no two extents may have the same one.
    pub(super) fn has_later_copy(
        &self,
        frame: &FrameHeader,
        extent: &ExtentHeader,
        read: &mut ReadFrom<'_>,
    ) -> Result<bool, IoError> {
        let superblock = self.superblock;
        let block = superblock.block_size as usize;
        let from = self.first_frames.partition_point(|(first, _)| *first < frame.frame);
        for (_, at) in self.first_frames[from..].iter().take_while(|(first, _)| *first == frame.frame) {
            let later = &self.log[*at];
            if later.boot != frame.boot || later.ordinal <= extent.ordinal {
                continue;
            }
            let Extent { mut bytes, .. } = read(later.extent, block)?;
            bytes.splice(..0, std::iter::repeat_n(0, block));
            let place =
                Place::new(&superblock.uuid, &superblock.secret, self.out.id, later.extent, later.epoch);
            let Some((found, size)) = frame_at(&bytes, block, place, superblock) else { continue };
            let copy =
                read_frame(&bytes[block..block + size], found, later.extent, block, place, self.out.id);
            if found.frame == frame.frame && copy.damage.is_empty() {
                probe::hit(Probe::LaterCopyTaken);
                return Ok(true);
            }
        }
        Ok(false)
    }
}
