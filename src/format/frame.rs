//! A frame: what one log write carries. A header of 64 bytes, then records, then zeros to the block.
//!
//! ```text
//!    0  4  magic "BSfr"                      32  8  boot that wrote it
//!    4  4  checksum of the header            40  4  frame size, padding included
//!    8  8  frame: number in the shard        44  4  payload size: header and records
//!   16  8  durable: frames up to this one    48  4  record count
//!          were durable when it was issued   52  1  1 at a clean stop: nothing follows in flight
//!   24  8  sequence of its first record      53  8  epoch of the extent
//!                                            61  2  shard
//!                                            63  1  zero
//! ```
//!
//! Frames of a shard are numbered from 1 without gaps, whatever extents they are in, and never go back in `boot`. The
//! `durable` field tells a torn tail from damage: a frame that is missing but that a later one calls durable was lost.
//! Epoch and shard are also part of the checksum's place; they stand here so that frames still say whose they are when
//! the extent's header is lost.

use super::slot::ShardId;
use super::{FormatError, Place, Reader};

/// Bytes of a frame header.
pub const FRAME_HEADER_SIZE: usize = 64;

const MAGIC: u32 = u32::from_le_bytes(*b"BSfr");
const WHAT: &str = "frame header";

/// The header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// Its number in the shard.
    pub frame: u64,
    /// Every frame up to this one was durable when this one was issued.
    pub durable: u64,
    /// Sequence of its first record; the others follow without gaps.
    pub first_sequence: u64,
    /// The start of the node that wrote it.
    pub boot: u64,
    /// Bytes on the device, a multiple of the block.
    pub size: u32,
    /// Bytes of header and records; the rest is zeros.
    pub payload_size: u32,
    /// Records in it.
    pub record_count: u32,
    /// Written by a clean stop.
    pub clean: bool,
    /// The life of the extent that it is in.
    pub epoch: u64,
    /// The shard.
    pub shard: ShardId,
}

impl FrameHeader {
    /// The header for a frame that starts `offset` bytes into its extent.
    pub fn encode(&self, place: Place, offset: u32) -> [u8; FRAME_HEADER_SIZE] {
        let mut out = [0; FRAME_HEADER_SIZE];
        out[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        out[8..16].copy_from_slice(&self.frame.to_le_bytes());
        out[16..24].copy_from_slice(&self.durable.to_le_bytes());
        out[24..32].copy_from_slice(&self.first_sequence.to_le_bytes());
        out[32..40].copy_from_slice(&self.boot.to_le_bytes());
        out[40..44].copy_from_slice(&self.size.to_le_bytes());
        out[44..48].copy_from_slice(&self.payload_size.to_le_bytes());
        out[48..52].copy_from_slice(&self.record_count.to_le_bytes());
        out[52] = u8::from(self.clean);
        out[53..61].copy_from_slice(&self.epoch.to_le_bytes());
        out[61..63].copy_from_slice(&self.shard.0.to_le_bytes());
        let sum = place.checksum(offset, &[&out[..4], &out[8..]]);
        out[4..8].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// Reads the header of a frame that starts `offset` bytes into its extent, of which `room` bytes are left.
    pub fn decode(
        bytes: &[u8],
        place: Place,
        offset: u32,
        block_size: u32,
        room: u64,
    ) -> Result<FrameHeader, FormatError> {
        let mut reader = Reader::new(WHAT, bytes);
        let magic = reader.u32()?;
        if magic != MAGIC {
            return Err(FormatError::Magic { what: WHAT, expected: u64::from(MAGIC), got: u64::from(magic) });
        }
        let stored = reader.u32()?;
        let header = reader.take(FRAME_HEADER_SIZE - 8)?;
        let expected = place.checksum(offset, &[&bytes[..4], header]);
        if stored != expected {
            return Err(FormatError::Checksum { what: WHAT, expected, got: stored });
        }
        let field = |field, got| FormatError::Field { what: WHAT, field, got };
        let mut reader = Reader::new(WHAT, header);
        let frame = reader.u64()?;
        let durable = reader.u64()?;
        if frame == 0 || durable >= frame {
            return Err(field("durable frame", durable));
        }
        let first_sequence = reader.u64()?;
        let boot = reader.u64()?;
        let size = reader.u32()?;
        if size == 0 || size % block_size != 0 || u64::from(size) > room {
            return Err(field("frame size", u64::from(size)));
        }
        let payload_size = reader.u32()?;
        if (payload_size as usize) < FRAME_HEADER_SIZE
            || payload_size > size
            || size - payload_size >= block_size
        {
            return Err(field("payload size", u64::from(payload_size)));
        }
        let record_count = reader.u32()?;
        let clean = reader.u8()?;
        if clean > 1 {
            return Err(field("clean flag", u64::from(clean)));
        }
        let epoch = reader.u64()?;
        let shard = ShardId(reader.u16()?);
        reader.zeros(1, "reserved bytes")?;
        Ok(FrameHeader {
            frame,
            durable,
            first_sequence,
            boot,
            size,
            payload_size,
            record_count,
            clean: clean == 1,
            epoch,
            shard,
        })
    }

    /// The epoch and shard that a frame header claims, not verified: what to make the place from when the extent's header
    /// is lost.
    pub fn claimed_place(bytes: &[u8]) -> Option<(u64, ShardId)> {
        let mut reader = Reader::new(WHAT, bytes.get(..FRAME_HEADER_SIZE)?);
        if reader.u32() != Ok(MAGIC) {
            return None;
        }
        reader.take(49).ok()?;
        Some((reader.u64().ok()?, ShardId(reader.u16().ok()?)))
    }

    /// Whether bytes start like a frame header: a cheap look before the checksum.
    pub fn has_magic(bytes: &[u8]) -> bool {
        bytes.starts_with(&MAGIC.to_le_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: FrameHeader = FrameHeader {
        frame: 12,
        durable: 11,
        first_sequence: 100,
        boot: 3,
        size: 8192,
        payload_size: 5000,
        record_count: 7,
        clean: false,
        epoch: 5,
        shard: ShardId(0),
    };

    fn place() -> Place {
        Place::new(&[1; 16], &[2; 16], ShardId(0), 4, 5)
    }

    #[test]
    fn round_trip_and_any_flipped_bit() {
        let bytes = HEADER.encode(place(), 4096);
        assert_eq!(FrameHeader::decode(&bytes, place(), 4096, 4096, 8192), Ok(HEADER));
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut flipped = bytes;
                flipped[at] ^= 1 << bit;
                assert!(
                    FrameHeader::decode(&flipped, place(), 4096, 4096, 8192).is_err(),
                    "byte {at} bit {bit}"
                );
            }
        }
        assert_eq!(FrameHeader::claimed_place(&bytes), Some((5, ShardId(0))));
        assert!(FrameHeader::decode(&bytes, place(), 8192, 4096, 8192).is_err(), "misplaced");
        assert!(FrameHeader::decode(&bytes, place(), 4096, 4096, 4096).is_err(), "longer than the extent");
        for cut in 0..FRAME_HEADER_SIZE {
            assert!(FrameHeader::decode(&bytes[..cut], place(), 4096, 4096, 8192).is_err());
        }
    }

    #[test]
    fn lying_fields_are_refused_under_a_right_checksum() {
        for lie in [
            FrameHeader { frame: 0, durable: 0, ..HEADER },
            FrameHeader { durable: 12, ..HEADER },
            FrameHeader { size: 0, ..HEADER },
            FrameHeader { size: 5000, ..HEADER },
            FrameHeader { payload_size: 9000, ..HEADER },
            FrameHeader { payload_size: 4096, ..HEADER },
            FrameHeader { payload_size: 63, size: 4096, ..HEADER },
        ] {
            let bytes = lie.encode(place(), 0);
            assert!(FrameHeader::decode(&bytes, place(), 0, 4096, 1 << 20).is_err(), "{lie:?}");
        }
    }
}
