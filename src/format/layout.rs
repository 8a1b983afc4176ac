//! Where things are on a device: a pure function of its size, block size and extent size.

use crate::limits::{DEVICE_MARGIN_SIZE, EXTENT_SIZE_MAX, EXTENT_SIZE_MIN, EXTENTS_PER_SHARD};

/// Copies of the superblock.
pub const SUPERBLOCK_COPIES: usize = 4;

/// Bytes between the margin and the extents, at each end: two superblock copies live there.
const SUPERBLOCK_AREA_SIZE: u64 = 1 << 20;

/// Bytes between two copies in one area: far enough apart that one bad region takes one copy.
const SUPERBLOCK_COPY_STRIDE: u64 = 512 << 10;

/// Bytes from the device's start to its first extent.
pub const EXTENTS_OFFSET: u64 = DEVICE_MARGIN_SIZE + SUPERBLOCK_AREA_SIZE;

/// Sizes that a device is formatted with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of the device that are used.
    pub device_size: u64,
    /// Bytes of one extent.
    pub extent_size: u64,
    /// Extents on the device.
    pub extent_count: u32,
}

/// A device is too small for its shards.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{size} bytes are too few for {shard_count} shard(s), which need {size_min}")]
pub struct TooSmall {
    /// Bytes there.
    pub size: u64,
    /// Shards asked for.
    pub shard_count: u16,
    /// Bytes needed.
    pub size_min: u64,
}

/// Extents of a device that only deletes, commit records and FLUSHALL may take: one for each shard.
pub fn reserve_extent_count(shard_count: u16) -> u32 {
    u32::from(shard_count)
}

/// Extents above those that only garbage collection may take: one for each shard that moves records at a time.
pub fn collection_extent_count(shard_count: u16) -> u32 {
    u32::from(shard_count).div_ceil(4)
}

/// The fewest bytes of a device with so many shards: one open extent and one reserved one for each, and those of garbage
/// collection.
pub fn size_min(shard_count: u16) -> u64 {
    let extent_count = 2 * u64::from(shard_count) + u64::from(collection_extent_count(shard_count));
    2 * EXTENTS_OFFSET + extent_count * EXTENT_SIZE_MIN
}

/// Chooses the sizes for a device: the largest extent, up to 64 MiB, of which every shard could have 128.
pub fn choose(size: u64, shard_count: u16) -> Result<Layout, TooSmall> {
    let size_min = size_min(shard_count);
    if size < size_min {
        return Err(TooSmall { size, shard_count, size_min });
    }
    // Copies 2 and 3 stand at a multiple of 64 KiB, so what is beyond the last one stays unused.
    let area = (size & !0xffff) - 2 * EXTENTS_OFFSET;
    let wanted = area / (EXTENTS_PER_SHARD * u64::from(shard_count));
    // `wanted` may be 0 on the smallest devices; the floor of the clamp covers it.
    let extent_size = (1u64 << wanted.max(1).ilog2()).clamp(EXTENT_SIZE_MIN, EXTENT_SIZE_MAX);
    let extent_count = u32::try_from(area / extent_size).unwrap_or(u32::MAX);
    Ok(Layout { device_size: size, extent_size, extent_count })
}

impl Layout {
    /// First byte of a superblock copy.
    pub fn superblock_offset(&self, copy: usize) -> u64 {
        superblock_offset(self.device_size, copy)
    }

    /// First byte of an extent.
    pub fn extent_offset(&self, extent: u32) -> u64 {
        EXTENTS_OFFSET + u64::from(extent) * self.extent_size
    }
}

/// First byte of a superblock copy on a device of `device_size` bytes.
pub fn superblock_offset(device_size: u64, copy: usize) -> u64 {
    let area =
        if copy < 2 { DEVICE_MARGIN_SIZE } else { (device_size & !0xffff).saturating_sub(EXTENTS_OFFSET) };
    area + (copy as u64 % 2) * SUPERBLOCK_COPY_STRIDE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_overlap_and_extents_scale() {
        for (size, extent_size) in [
            (40u64 << 20, 1u64 << 20),
            ((512 << 20) + 4096, 1 << 20),
            (4 << 30, 1 << 20),
            (16 << 30, 4 << 20),
            (128 << 30, 32 << 20),
            (1 << 40, 64 << 20),
        ] {
            let layout = choose(size, 16).unwrap();
            assert_eq!(layout.extent_size, extent_size, "{size}");
            let end = layout.extent_offset(layout.extent_count);
            assert!(end <= layout.superblock_offset(2));
            assert!(layout.superblock_offset(3) + 65_536 <= size - DEVICE_MARGIN_SIZE + (512 << 10));
            assert!(layout.superblock_offset(1) + 65_536 <= layout.extent_offset(0));
            assert!(layout.extent_count >= 32);
        }
        let error = choose(39 << 20, 16).unwrap_err();
        assert_eq!(error.size_min, 40 << 20);
    }
}
