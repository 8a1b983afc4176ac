//! Bytes on the device: every on-disk type with its encoding and decoding side by side. No I/O here.
//!
//! All integers are little-endian. The device, from its first byte to its last:
//!
//! ```text
//! 0          protective MBR and GPT                      (DEVICE_MARGIN_SIZE)
//! 1 MiB      superblock copy 0, copy 1 at +512 KiB       (1 MiB)
//! 2 MiB      extent 0, extent 1, ... each extent_size long
//! size-2 MiB superblock copy 2, copy 3 at +512 KiB       (1 MiB)
//! size-1 MiB backup GPT                                  (DEVICE_MARGIN_SIZE)
//! ```
//!
//! An extent is a header block and then frames; a frame is what one log write carries: a header and records, padded to
//! the block. Frames of a shard are numbered without gaps across its extents, so a missing one is always noticed. A value that
//! is longer than a chunk is kept in chunk records, and the put of its key has a [`manifest`] that names them. What garbage
//! collection keeps is in extents of its own, in units instead of frames: see [`mod@unit`].
//!
//! Invariants:
//! - Decoding never panics, on any input.
//! - Every byte of a block is covered by a checksum or checked to be zero.
//! - Checksums of extent headers, frames and records also cover where they are (see [`Place`]), so stale, misplaced or
//!   misdirected bytes never pass.

pub mod checkpoint;
pub mod extent;
pub mod frame;
pub mod frame_ranges;
pub mod front_coded;
pub mod gpt;
pub mod layout;
pub mod manifest;
pub mod record;
pub mod retirement;
pub mod slot;
pub mod superblock;
pub mod unit;

use crate::format::slot::ShardId;

/// Why bytes are not what they should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The bytes end too early.
    #[error("{what}: needs {expected} bytes, {got} are there")]
    Short {
        /// The type.
        what: &'static str,
        /// Bytes needed.
        expected: usize,
        /// Bytes there.
        got: usize,
    },
    /// The type's magic number is not there: this was never one.
    #[error("{what}: magic number is {got:#x}, expected {expected:#x}")]
    Magic {
        /// The type.
        what: &'static str,
        /// The number expected.
        expected: u64,
        /// The number found.
        got: u64,
    },
    /// The checksum does not match: damaged, torn, or not written for this place.
    #[error("{what}: checksum is {got:#010x}, expected {expected:#010x}")]
    Checksum {
        /// The type.
        what: &'static str,
        /// As computed.
        expected: u32,
        /// As stored.
        got: u32,
    },
    /// The checksum is right but a field is not one that this version writes.
    #[error("{what}: {field} is {got}")]
    Field {
        /// The type.
        what: &'static str,
        /// The field.
        field: &'static str,
        /// Its value.
        got: u64,
    },
    /// A feature that this version does not know.
    #[error(
        "the device needs features that this version of basalt does not have (incompatible bits {bits:#x}); use the version that formatted it"
    )]
    UnknownFeature {
        /// The unknown bits.
        bits: u64,
    },
    /// An index that this version does not know.
    #[error(
        "the device was formatted with an index that this version of basalt does not have (kind {got}); use the version that formatted it"
    )]
    UnknownIndex {
        /// The number of its kind.
        got: u8,
    },
    /// A format version that this version does not know.
    #[error("the device has format version {got}, this version of basalt reads {expected}")]
    Version {
        /// The version read.
        expected: u32,
        /// The version found.
        got: u32,
    },
}

/// Where bytes are on which device: what every checksum in the log starts from.
///
/// The device's secret is part of it, so that bytes which a client stores as a value can't be made to pass as a frame.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    seed: u32,
}

impl Place {
    /// A place: one life (epoch) of one extent in one shard's log on one device.
    pub fn new(uuid: &[u8; 16], secret: &[u8; 16], shard: ShardId, extent: u32, epoch: u64) -> Place {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(secret);
        hasher.update(uuid);
        hasher.update(&shard.0.to_le_bytes());
        hasher.update(&extent.to_le_bytes());
        hasher.update(&epoch.to_le_bytes());
        Place { seed: hasher.finalize() }
    }

    /// The checksum of `parts` at `offset` bytes into the extent.
    pub fn checksum(self, offset: u32, parts: &[&[u8]]) -> u32 {
        let mut hasher = crc32fast::Hasher::new_with_initial(self.seed);
        hasher.update(&offset.to_le_bytes());
        for part in parts {
            hasher.update(part);
        }
        hasher.finalize()
    }
}

/// Whether these are zeros, as padding is: a cache line at a time, since in small frames it is most of what is read.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (lines, rest) = bytes.as_chunks::<64>();
    let is_line_zero = |line: &[u8; 64]| line.iter().fold(0, |all, byte| all | byte) == 0;
    lines.iter().all(is_line_zero) && rest.iter().all(|byte| *byte == 0)
}

/// A little-endian cursor over bytes that may be anything.
pub(crate) struct Reader<'a> {
    what: &'static str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(what: &'static str, bytes: &'a [u8]) -> Reader<'a> {
        Reader { what, bytes, at: 0 }
    }

    pub(crate) fn position(&self) -> usize {
        self.at
    }

    pub(crate) fn take(&mut self, count: usize) -> Result<&'a [u8], FormatError> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else {
            let expected = self.at.saturating_add(count);
            return Err(FormatError::Short { what: self.what, expected, got: self.bytes.len() });
        };
        let slice = &self.bytes[self.at..end];
        self.at = end;
        Ok(slice)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, FormatError> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, FormatError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// An unsigned LEB128 number of at most 32 bits, in its shortest form (any other form is an error, so that a
    /// record has one encoding).
    pub(crate) fn varint(&mut self) -> Result<u32, FormatError> {
        let mut value: u64 = 0;
        for shift in [0u32, 7, 14, 21, 28] {
            let byte = self.u8()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                if (byte == 0 && shift != 0) || value > u64::from(u32::MAX) {
                    break;
                }
                return Ok(value as u32);
            }
        }
        Err(FormatError::Field { what: self.what, field: "length", got: value })
    }

    /// The rest must be zero: reserved bytes are.
    pub(crate) fn zeros(&mut self, count: usize, field: &'static str) -> Result<(), FormatError> {
        let bytes = self.take(count)?;
        if is_zero(bytes) {
            return Ok(());
        }
        let got = bytes.iter().find(|b| **b != 0).map_or(0, |byte| u64::from(*byte));
        Err(FormatError::Field { what: self.what, field, got })
    }
}

/// Appends `value` as unsigned LEB128 in its shortest form.
pub(crate) fn put_varint(out: &mut Vec<u8>, mut value: u32) {
    while value >= 0x80 {
        out.push((value as u8) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Bytes that `put_varint` takes.
pub(crate) const fn varint_size(value: u32) -> usize {
    match value {
        0..0x80 => 1,
        0x80..0x4000 => 2,
        0x4000..0x20_0000 => 3,
        0x20_0000..0x1000_0000 => 4,
        _ => 5,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_round_trip_in_one_form() {
        for value in
            [0, 1, 127, 128, 16_383, 16_384, 2_097_151, 2_097_152, 268_435_455, 268_435_456, u32::MAX]
        {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, value);
            assert_eq!(bytes.len(), varint_size(value));
            assert_eq!(Reader::new("test", &bytes).varint(), Ok(value));
        }
        assert!(Reader::new("test", &[0x80, 0x00]).varint().is_err(), "a longer form of zero");
        assert!(Reader::new("test", &[0xff, 0xff, 0xff, 0xff, 0x1f]).varint().is_err(), "33 bits");
        assert!(Reader::new("test", &[0x80; 6]).varint().is_err());
    }

    #[test]
    fn zeros_are_zeros_wherever_a_bit_is_set() {
        let mut bytes = [0; 200];
        for end in 0..bytes.len() {
            assert!(is_zero(&bytes[..end]));
            bytes[end] = 1 << (end % 8);
            assert!(is_zero(&bytes[..end]) && !is_zero(&bytes[..=end]) && !is_zero(&bytes));
            bytes[end] = 0;
        }
        assert!(Reader::new("test", &[0, 0]).zeros(2, "padding").is_ok());
        let error = FormatError::Field { what: "test", field: "padding", got: 7 };
        assert_eq!(Reader::new("test", &[0, 7, 8]).zeros(3, "padding"), Err(error));
        assert!(Reader::new("test", &[0]).zeros(2, "padding").is_err(), "too short");
    }

    #[test]
    fn a_checksum_depends_on_every_part_of_the_place() {
        let base = Place::new(&[1; 16], &[2; 16], ShardId(3), 4, 5);
        let sum = base.checksum(6, &[b"bytes"]);
        let others = [
            Place::new(&[9; 16], &[2; 16], ShardId(3), 4, 5).checksum(6, &[b"bytes"]),
            Place::new(&[1; 16], &[9; 16], ShardId(3), 4, 5).checksum(6, &[b"bytes"]),
            Place::new(&[1; 16], &[2; 16], ShardId(9), 4, 5).checksum(6, &[b"bytes"]),
            Place::new(&[1; 16], &[2; 16], ShardId(3), 9, 5).checksum(6, &[b"bytes"]),
            Place::new(&[1; 16], &[2; 16], ShardId(3), 4, 9).checksum(6, &[b"bytes"]),
            base.checksum(9, &[b"bytes"]),
            base.checksum(6, &[b"bytez"]),
        ];
        assert!(others.iter().all(|other| *other != sum));
    }
}
