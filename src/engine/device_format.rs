//! Superblocks on a device: formatting, opening, updating.

use super::op::Clock;
use super::recovery;
use crate::device::rescue::RescueDevice;
use crate::device::{Device, IoError, blocking};
use crate::format::gpt;
use crate::format::layout::{self, EXTENTS_OFFSET, SUPERBLOCK_COPIES, TooSmall};
use crate::format::superblock::{
    self, FEATURES_KNOWN, IndexKind, NoQuorum, Quorum, SUPERBLOCK_SIZE, Superblock,
};
use crate::limits::{DEVICE_MARGIN_SIZE, EXTENT_COUNT_MAX, EXTENT_SIZE_MAX};
use crate::size;

/// What a device is to be formatted as.
#[derive(Debug, Clone)]
pub struct FormatOptions {
    /// Shards that the keys are spread over.
    pub shard_count: u16,
    /// The device's new identity.
    pub uuid: [u8; 16],
    /// The secret of its keyed hash and checksums.
    pub secret: [u8; 16],
    /// A name that people give it.
    pub label: String,
    /// How its shards know their keys.
    pub index: IndexKind,
}

/// Why a device could not be formatted or opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is too small.
    #[error(transparent)]
    TooSmall(#[from] TooSmall),
    /// It is too large.
    #[error("it has {}, and the index can name records on {} at most: make a smaller namespace, or a partition", size::show(*.size), size::show(*.size_max))]
    TooLarge {
        /// Bytes there.
        size: u64,
        /// Bytes that can be used.
        size_max: u64,
    },
    /// It has no usable superblock.
    #[error(transparent)]
    Superblock(#[from] NoQuorum),
    /// The device failed.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The device's blocks are larger than those it was formatted with.
    #[error(
        "it was formatted with blocks of {formatted} bytes, but this device has blocks of {device} bytes"
    )]
    BlockSize {
        /// In the superblock.
        formatted: u32,
        /// The device's.
        device: u32,
    },
    /// It was formatted with another index.
    #[error(
        "it was formatted with the index '{formatted}', and --index says {wanted}: leave --index out, or format another device and bring the keys over with `basalt dump` and `basalt restore`"
    )]
    OtherIndex {
        /// In the superblock.
        formatted: IndexKind,
        /// What was said.
        wanted: IndexKind,
    },
    /// Part of it is missing.
    #[error("it was formatted with {} but only {} are there: it was cut short, or is another device's copy", size::show_apart(*.formatted, *.device).0, size::show_apart(*.formatted, *.device).1)]
    Truncated {
        /// In the superblock.
        formatted: u64,
        /// The device's.
        device: u64,
    },
}

/// The most bytes of a device: what the index can name records on. A little more is taken, and left unused.
pub const DEVICE_SIZE_MAX: u64 = EXTENT_COUNT_MAX as u64 * EXTENT_SIZE_MAX;

/// Blocks of the log are at least this large, so that an image opens on devices of either common block size.
const LOG_BLOCK_SIZE_MIN: u32 = 4096;

/// Writes zeros where superblocks and partition tables stand.
fn zero_ends<D: Device>(device: &mut D) -> Result<(), IoError> {
    let (size, block) =
        (device.geometry().size(), u64::from(device.geometry().block_size.max(LOG_BLOCK_SIZE_MIN)));
    for at in [0, size - EXTENTS_OFFSET.min(size)].map(|at| at / block * block) {
        blocking::zero(device, at, EXTENTS_OFFSET.min(size - at) / block * block)?;
    }
    blocking::flush(device)
}

/// Bytes between two words of progress.
const ZERO_STEP: u64 = 64 << 20;

/// Writes zeros over the whole device; `progress` is told how many bytes are done. What had superblocks has none from the
/// beginning on, so that no crash leaves a device without its data.
pub fn zero_all<D: Device>(device: &mut D, progress: &mut dyn FnMut(u64)) -> Result<(), IoError> {
    zero_ends(device)?;
    let size = device.geometry().size();
    for at in (0..size).step_by(ZERO_STEP as usize) {
        blocking::zero(device, at, ZERO_STEP.min(size - at))?;
        progress(size.min(at + ZERO_STEP));
    }
    blocking::flush(device)
}

/// Formats a device: partition table, empty extents, superblocks, in that order, so that a crash before the end leaves
/// none. Whatever was there is gone.
pub fn format<D: Device>(
    device: &mut D,
    options: &FormatOptions,
    clock: Clock,
) -> Result<Superblock, OpenError> {
    let geometry = device.geometry().clone();
    let size = geometry.size();
    let layout = layout::choose(size, options.shard_count)?;
    if layout.extent_count > EXTENT_COUNT_MAX {
        return Err(OpenError::TooLarge { size, size_max: DEVICE_SIZE_MAX });
    }
    let block_size = geometry.block_size.max(LOG_BLOCK_SIZE_MIN);
    // First of all no old superblock is left, then no old extent header.
    zero_ends(device)?;
    let headers: Vec<u64> = (0..layout.extent_count).map(|extent| layout.extent_offset(extent)).collect();
    blocking::zero_many(device, &headers, block_size as usize)?;
    let table = gpt::encode(&options.uuid, size, geometry.partition_block_size);
    let mut start = table.start;
    start.resize(start.len().next_multiple_of(block_size as usize), 0);
    blocking::write(device, 0, &start)?;
    // The backup table ends with the device, whatever the log's block is.
    let unit = geometry.block_size as usize;
    let mut end = vec![0; table.end.len().next_multiple_of(unit)];
    let pad = end.len() - table.end.len();
    end[pad..].copy_from_slice(&table.end);
    if size.is_multiple_of(unit as u64) && end.len() as u64 <= DEVICE_MARGIN_SIZE {
        blocking::write(device, size - end.len() as u64, &end)?;
    }
    blocking::flush(device)?;
    let superblock = Superblock {
        uuid: options.uuid,
        secret: options.secret,
        layout,
        block_size,
        shard_count: options.shard_count,
        index: options.index,
        features: FEATURES_KNOWN,
        generation: 1,
        parent: 0,
        boot: 0,
        created_ms: clock.unix_ms,
        label: options.label.clone(),
    };
    write_superblock(device, &superblock, [[0, 1], [2, 3]])?;
    Ok(superblock)
}

/// Writes a generation: two copies, flush, the other two, flush.
fn write_superblock<D: Device>(
    device: &mut D,
    superblock: &Superblock,
    order: [[usize; 2]; 2],
) -> Result<(), IoError> {
    for pair in order {
        for copy in pair {
            let mut bytes = superblock.encode(copy);
            bytes.resize(SUPERBLOCK_SIZE.next_multiple_of(superblock.block_size as usize), 0);
            blocking::write(device, superblock.layout.superblock_offset(copy), &bytes)?;
        }
        blocking::flush(device)?;
    }
    Ok(())
}

/// Reads the copies and chooses. Checks that the device fits what it was formatted as.
pub fn read_superblock<D: Device>(device: &mut D) -> Result<Quorum, OpenError> {
    let (copies, size) = read_copies(device)?;
    if size > device.geometry().size() {
        return Err(OpenError::Truncated { formatted: size, device: device.geometry().size() });
    }
    let quorum = superblock::choose(&copies)?;
    check_block_size(&quorum.superblock, device)?;
    Ok(quorum)
}

/// What can be had of the superblock by who only reads: a single copy will do, and a part of the device may be missing. Says
/// what is wrong.
pub fn read_superblock_for_rescue<D: Device>(
    device: &mut RescueDevice<D>,
) -> Result<(Superblock, Vec<String>), OpenError> {
    let (copies, size) = read_copies(device)?;
    let mut notes = Vec::new();
    if size > device.geometry().size() {
        let (formatted, real) = size::show_apart(size, device.geometry().size());
        notes.push(format!("it was formatted with {formatted} but only {real} are there"));
    }
    let superblock = match superblock::choose(&copies) {
        Ok(Quorum { superblock, bad }) => {
            let bad = bad.iter().map(|(copy, what)| format!("superblock copy {copy}: {what}"));
            notes.extend(bad);
            superblock
        }
        Err(error @ NoQuorum::Damaged { .. }) => {
            let superblock = superblock::choose_any(&copies).ok_or_else(|| error.clone())?;
            notes.push(format!("{error}; one is, and is believed"));
            superblock
        }
        Err(error @ NoQuorum::Mixed { .. }) => {
            let mut best: Option<(usize, Superblock)> = None;
            for one in superblock::of_each_device(&copies) {
                check_block_size(&one, device)?;
                device.extend_to(one.layout.device_size);
                let count = recovery::survey(device, &one)?.extent_count();
                if best.as_ref().is_none_or(|(most, _)| count > *most) {
                    best = Some((count, one));
                }
            }
            let (_, superblock) = best.ok_or_else(|| error.clone())?;
            let uuid = uuid::Uuid::from_bytes(superblock.uuid);
            notes.push(format!("{error}; {uuid} has the most extents here and is believed"));
            superblock
        }
        Err(error) => return Err(error.into()),
    };
    check_block_size(&superblock, device)?;
    device.extend_to(superblock.layout.device_size);
    Ok((superblock, notes))
}

fn check_block_size<D: Device>(superblock: &Superblock, device: &D) -> Result<(), OpenError> {
    let (formatted, device) = (superblock.block_size, device.geometry().block_size);
    if formatted % device != 0 { Err(OpenError::BlockSize { formatted, device }) } else { Ok(()) }
}

/// The copies as read, those that are missing empty, and the size that the device was formatted with.
pub(super) fn read_copies<D: Device>(
    device: &mut D,
) -> Result<([Vec<u8>; SUPERBLOCK_COPIES], u64), OpenError> {
    let geometry = device.geometry().clone();
    let length = SUPERBLOCK_SIZE.next_multiple_of(geometry.block_size as usize);
    let read = |device: &mut D, device_size: u64, copy: usize| {
        let offset = layout::superblock_offset(device_size, copy);
        if offset + length as u64 > geometry.size() || !offset.is_multiple_of(u64::from(geometry.block_size))
        {
            return Ok(Vec::new());
        }
        let mut last = Vec::new();
        // A copy that does not read well may do so the second time.
        for _ in 0..2 {
            match blocking::read(device, offset, length) {
                Ok(bytes) if Superblock::decode(&bytes).is_ok() => return Ok(bytes),
                Ok(bytes) => last = bytes,
                // One unreadable copy is what the others are for.
                Err(IoError::UnrecoveredRead { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(last)
    };
    let mut copies: [Vec<u8>; SUPERBLOCK_COPIES] = Default::default();
    copies[0] = read(device, geometry.size(), 0)?;
    copies[1] = read(device, geometry.size(), 1)?;
    // A device that grew keeps its far copies where its old end was.
    let formatted = copies[..2].iter().find_map(|bytes| Superblock::decode(bytes).ok());
    let size = formatted.map_or(geometry.size(), |(_, superblock)| superblock.layout.device_size);
    // Where the first two are of another device, this one's own are still at its end.
    let ends = [Some(size), Some(geometry.size()).filter(|end| *end != size)];
    for copy in [2, 3] {
        for end in ends.into_iter().flatten() {
            if Superblock::decode(&copies[copy]).is_err() {
                let found = read(device, end, copy)?;
                if copies[copy].is_empty() || Superblock::decode(&found).is_ok() {
                    copies[copy] = found;
                }
            }
        }
    }
    Ok((copies, size))
}

/// Opens a device for a start of the node: the next boot is durable in every copy before anything else happens.
pub fn begin_boot<D: Device>(device: &mut D) -> Result<(Superblock, Quorum), OpenError> {
    let quorum = read_superblock(device)?;
    let mut superblock = quorum.superblock.next();
    superblock.boot += 1;
    superblock.features |= FEATURES_KNOWN;
    // What was read may sit in a volatile cache; it is what a crash falls back to.
    blocking::flush(device)?;
    write_superblock(device, &superblock, quorum.update_order())?;
    Ok((superblock, quorum))
}
