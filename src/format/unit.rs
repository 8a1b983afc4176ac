//! A unit: what garbage collection writes at once of the records that it keeps. A header of 64 bytes, then records, then zeros
//! to the block. Units are in extents of their own, whose headers have the role of survivors.
//!
//! ```text
//!    0  4  magic "BSun"                      40  4  record count
//!    4  4  checksum of the header            44  4  checksum of the records
//!    8  8  unit: number in the shard         48  8  epoch of the extent
//!   16  8  follows: the last frame of the    56  2  shard
//!          shard's log before it             58     zero
//!   24  8  boot that wrote it
//!   32  4  size, padding included
//!   36  4  payload size: header and records
//! ```
//!
//! Units of a shard are numbered from 1 without gaps. A record in a unit is as it was where it was moved from, its sequence
//! included; in the order of the log it stands right behind the frame that its unit follows. A unit is written only when that
//! frame is durable, and one after the other, so of a shard's units only the last can be torn.
//!
//! The records have a checksum of their own besides those that each of them has: what a torn unit leaves behind may be records
//! of an earlier attempt, right in themselves, at the same places.

use super::slot::ShardId;
use super::{FormatError, Place, Reader};

/// Bytes of a unit's header.
pub const UNIT_HEADER_SIZE: usize = 64;

const MAGIC: u32 = u32::from_le_bytes(*b"BSun");
const WHAT: &str = "unit header";

/// The header of a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnitHeader {
    /// Its number in the shard.
    pub unit: u64,
    /// The frame of the shard's log behind which its records stand.
    pub follows: u64,
    /// The start of the node that wrote it.
    pub boot: u64,
    /// Bytes on the device, a multiple of the block.
    pub size: u32,
    /// Bytes of header and records; the rest is zeros.
    pub payload_size: u32,
    /// Records in it.
    pub record_count: u32,
    /// The checksum of the records.
    pub records_checksum: u32,
    /// The life of the extent that it is in.
    pub epoch: u64,
    /// The shard.
    pub shard: ShardId,
}

impl UnitHeader {
    /// The checksum of a unit's records, which start `offset` bytes into the extent.
    pub fn checksum_of(records: &[u8], place: Place, offset: u32) -> u32 {
        place.checksum(offset, &[records])
    }

    /// The header for a unit that starts `offset` bytes into its extent.
    pub fn encode(&self, place: Place, offset: u32) -> [u8; UNIT_HEADER_SIZE] {
        let mut out = [0; UNIT_HEADER_SIZE];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[8..16].copy_from_slice(&self.unit.to_le_bytes());
        out[16..24].copy_from_slice(&self.follows.to_le_bytes());
        out[24..32].copy_from_slice(&self.boot.to_le_bytes());
        out[32..36].copy_from_slice(&self.size.to_le_bytes());
        out[36..40].copy_from_slice(&self.payload_size.to_le_bytes());
        out[40..44].copy_from_slice(&self.record_count.to_le_bytes());
        out[44..48].copy_from_slice(&self.records_checksum.to_le_bytes());
        out[48..56].copy_from_slice(&self.epoch.to_le_bytes());
        out[56..58].copy_from_slice(&self.shard.0.to_le_bytes());
        let sum = place.checksum(offset, &[&out[..4], &out[8..]]);
        out[4..8].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// Reads the header of a unit that starts `offset` bytes into its extent, of which `room` bytes are left.
    pub fn decode(
        bytes: &[u8],
        place: Place,
        offset: u32,
        block_size: u32,
        room: u64,
    ) -> Result<UnitHeader, FormatError> {
        let mut reader = Reader::new(WHAT, bytes);
        let magic = reader.u32()?;
        if magic != MAGIC {
            return Err(FormatError::Magic { what: WHAT, expected: u64::from(MAGIC), got: u64::from(magic) });
        }
        let stored = reader.u32()?;
        let header = reader.take(UNIT_HEADER_SIZE - 8)?;
        let expected = place.checksum(offset, &[&bytes[..4], header]);
        if stored != expected {
            return Err(FormatError::Checksum { what: WHAT, expected, got: stored });
        }
        let field = |field, got| FormatError::Field { what: WHAT, field, got };
        let mut reader = Reader::new(WHAT, header);
        let unit = reader.u64()?;
        if unit == 0 {
            return Err(field("number", unit));
        }
        let (follows, boot) = (reader.u64()?, reader.u64()?);
        let size = reader.u32()?;
        if size == 0 || size % block_size != 0 || u64::from(size) > room {
            return Err(field("size", u64::from(size)));
        }
        let payload_size = reader.u32()?;
        if (payload_size as usize) < UNIT_HEADER_SIZE
            || payload_size > size
            || size - payload_size >= block_size
        {
            return Err(field("payload size", u64::from(payload_size)));
        }
        let (record_count, records_checksum) = (reader.u32()?, reader.u32()?);
        let epoch = reader.u64()?;
        let shard = ShardId(reader.u16()?);
        reader.zeros(6, "reserved bytes")?;
        Ok(UnitHeader {
            unit,
            follows,
            boot,
            size,
            payload_size,
            record_count,
            records_checksum,
            epoch,
            shard,
        })
    }

    /// The epoch and shard that a unit's header claims, not verified: what to make the place from when the extent's header is
    /// lost.
    pub fn claimed_place(bytes: &[u8]) -> Option<(u64, ShardId)> {
        let mut reader = Reader::new(WHAT, bytes.get(..UNIT_HEADER_SIZE)?);
        if reader.u32() != Ok(MAGIC) {
            return None;
        }
        reader.take(44).ok()?;
        Some((reader.u64().ok()?, ShardId(reader.u16().ok()?)))
    }

    /// Whether bytes start like a unit's header: a cheap look before the checksum.
    pub fn has_magic(bytes: &[u8]) -> bool {
        bytes.starts_with(&MAGIC.to_le_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: UnitHeader = UnitHeader {
        unit: 12,
        follows: 1_100,
        boot: 3,
        size: 8192,
        payload_size: 5000,
        record_count: 7,
        records_checksum: 0x1234_5678,
        epoch: 5,
        shard: ShardId(1),
    };

    fn place() -> Place {
        Place::new(&[1; 16], &[2; 16], ShardId(1), 4, 5)
    }

    #[test]
    fn round_trip_and_any_flipped_bit() {
        let bytes = HEADER.encode(place(), 4096);
        assert_eq!(UnitHeader::decode(&bytes, place(), 4096, 4096, 8192), Ok(HEADER));
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes;
                flipped[at] ^= 1 << bit;
                let decoded = UnitHeader::decode(&flipped, place(), 4096, 4096, 8192);
                assert!(decoded.is_err(), "byte {at} bit {bit}");
            }
        }
        assert_eq!(UnitHeader::claimed_place(&bytes), Some((5, ShardId(1))));
        assert!(UnitHeader::decode(&bytes, place(), 8192, 4096, 8192).is_err(), "misplaced");
        assert!(UnitHeader::decode(&bytes, place(), 4096, 4096, 4096).is_err(), "longer than the extent");
        for cut in 0..UNIT_HEADER_SIZE {
            assert!(UnitHeader::decode(&bytes[..cut], place(), 4096, 4096, 8192).is_err());
        }
    }

    #[test]
    fn lying_fields_are_refused_under_a_right_checksum() {
        for lie in [
            UnitHeader { unit: 0, ..HEADER },
            UnitHeader { size: 0, ..HEADER },
            UnitHeader { size: 5000, ..HEADER },
            UnitHeader { payload_size: 9000, ..HEADER },
            UnitHeader { payload_size: 4096, ..HEADER },
            UnitHeader { payload_size: 63, size: 4096, ..HEADER },
        ] {
            let bytes = lie.encode(place(), 0);
            assert!(UnitHeader::decode(&bytes, place(), 0, 4096, 1 << 20).is_err(), "{lie:?}");
        }
    }
}
