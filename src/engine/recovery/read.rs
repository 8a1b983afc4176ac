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
        Self::read_behind(device, superblock, extent, 0, Vec::new())
    }

    /// Reads from `from` on; what is before it is zeros. It goes where another extent was, if one is done with: memory that the
    /// system gives anew costs as much as the read.
    pub(super) fn read_behind<D: Device>(
        device: &mut D,
        superblock: &Superblock,
        extent: u32,
        from: usize,
        room: Vec<u8>,
    ) -> Result<Extent, IoError> {
        let mut bytes = room;
        bytes.resize(superblock.layout.extent_size as usize, 0);
        let (before, rest) = bytes.split_at_mut(from);
        before.fill(0);
        let unreadable = Self::fill(device, superblock, extent, from, rest)?;
        Ok(Extent { bytes, unreadable })
    }

    /// Reads from `from` on; `bytes` starts there.
    pub(super) fn read_part<D: Device>(
        device: &mut D,
        superblock: &Superblock,
        extent: u32,
        from: usize,
    ) -> Result<Extent, IoError> {
        let mut bytes = vec![0; superblock.layout.extent_size as usize - from];
        let unreadable = Self::fill(device, superblock, extent, from, &mut bytes)?;
        Ok(Extent { bytes, unreadable })
    }

    /// Reads from `from` on, and says which blocks can't be.
    fn fill<D: Device>(
        device: &mut D,
        superblock: &Superblock,
        extent: u32,
        from: usize,
        bytes: &mut [u8],
    ) -> Result<Vec<usize>, IoError> {
        let offset = superblock.layout.extent_offset(extent) + from as u64;
        let mut unreadable = Vec::new();
        if fill_tried(device, offset, bytes)? {
            return Ok(unreadable);
        }
        let block = superblock.block_size as usize;
        for (at, one) in (0..).step_by(block).zip(bytes.chunks_mut(block)) {
            if !fill_tried(device, offset + at as u64, one)? {
                one.fill(0);
                unreadable.push(from + at);
            }
        }
        Ok(unreadable)
    }
}

/// Reads some blocks; `None` when the device can't, however often it is asked.
pub(in crate::engine) fn read_tried<D: Device>(
    device: &mut D,
    offset: u64,
    size: usize,
) -> Result<Option<Vec<u8>>, IoError> {
    let mut bytes = vec![0; size];
    Ok(fill_tried(device, offset, &mut bytes)?.then_some(bytes))
}

/// The same for bytes that are there already; false when the device can't, and then they are anything.
fn fill_tried<D: Device>(device: &mut D, offset: u64, bytes: &mut [u8]) -> Result<bool, IoError> {
    for _ in 0..READ_TRIES {
        match blocking::read_into(device, offset, bytes) {
            Ok(()) => return Ok(true),
            Err(IoError::UnrecoveredRead { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
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
