//! Reading extents of a medium that may fail, or be wrong once and right the next time.

use crate::device::{Device, IoError, blocking};
use crate::format::superblock::Superblock;
use crate::probe::{self, Probe};

/// An extent as read, with the blocks that can't be.
pub(in crate::engine) struct Extent {
    pub(in crate::engine) bytes: Vec<u8>,
    /// Byte offsets of blocks that are zeros here because the device fails to read them.
    pub(in crate::engine) unreadable: Vec<usize>,
}

/// Times that a failing read is tried.
pub(super) const READ_TRIES: u32 = 3;

impl Extent {
    pub(in crate::engine) fn read<D: Device>(
        device: &mut D,
        superblock: &Superblock,
        extent: u32,
    ) -> Result<Extent, IoError> {
        Self::read_part(device, superblock, extent, 0)
    }

    /// Reads from `from` on; what is before it is zeros.
    pub(super) fn read_behind<D: Device>(
        device: &mut D,
        superblock: &Superblock,
        extent: u32,
        from: usize,
    ) -> Result<Extent, IoError> {
        let mut read = Self::read_part(device, superblock, extent, from)?;
        read.bytes.splice(..0, std::iter::repeat_n(0, from));
        Ok(read)
    }

    /// Reads from `from` on; `bytes` starts there.
    pub(super) fn read_part<D: Device>(
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

/// Reads some blocks; `None` when the device can't, however often it is asked.
pub(in crate::engine) fn read_tried<D: Device>(
    device: &mut D,
    offset: u64,
    size: usize,
) -> Result<Option<Vec<u8>>, IoError> {
    for _ in 0..READ_TRIES {
        match blocking::read(device, offset, size) {
            Ok(bytes) => return Ok(Some(bytes)),
            Err(IoError::UnrecoveredRead { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Reads the rest of an extent until it looks the same twice. False when it never does: the medium can't be believed.
pub(super) fn reread(
    bytes: &mut Vec<u8>,
    unreadable: &mut Vec<usize>,
    from: usize,
    again: &mut dyn FnMut(usize) -> Result<Extent, IoError>,
) -> Result<bool, IoError> {
    for _ in 0..READ_TRIES {
        let rest = again(from)?;
        let is_same = bytes[from..] == rest.bytes;
        bytes.truncate(from);
        bytes.extend_from_slice(&rest.bytes);
        unreadable.retain(|at| *at < from);
        unreadable.extend(rest.unreadable);
        if is_same {
            return Ok(true);
        }
        probe::hit(Probe::RecoveryReadUnstable);
    }
    Ok(false)
}
