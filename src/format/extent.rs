//! The extent header: the first block of an extent says whose it is.
//!
//! ```text
//!    0  8  magic "BASALTex"       28  8  ordinal: place in the shard's chain of extents
//!    8  4  checksum of the block  36  8  first frame: number of the first frame in it
//!   12  4  extent                 44  8  boot that opened it
//!   16  2  shard                  52  1  1 when it came from the reserve
//!   18  1  role                   53     zero to the end of the block
//!   19  1  zero
//!   20  8  epoch: unique to this life of the extent
//! ```
//!
//! Roles: 1 has frames of a shard's log, 2 has units of survivors, and `first frame` is the number of its first unit.
//!
//! The checksum covers the whole block and the device's UUID and secret, not the epoch (which is read from here): a
//! header is how the epoch becomes known.

use super::slot::ShardId;
use super::{FormatError, Place, Reader};

/// `BASALTex` as a little-endian number.
pub const EXTENT_MAGIC: u64 = u64::from_le_bytes(*b"BASALTex");

const WHAT: &str = "extent header";
const ROLE_LOG: u8 = 1;
const ROLE_SURVIVORS: u8 = 2;

/// What an extent is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ExtentRole {
    /// Frames of a shard's log.
    Log,
    /// Units of what garbage collection keeps of a shard's log.
    Survivors,
}

/// Whose an extent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentHeader {
    /// Its number: misdirected headers are noticed.
    pub extent: u32,
    /// The shard whose log it belongs to.
    pub shard: ShardId,
    /// Unique to this life of the extent.
    pub epoch: u64,
    /// Place in the shard's chain: strictly increasing, gaps allowed where extents were freed.
    pub ordinal: u64,
    /// Number of the first frame in it, or the first unit.
    pub first_frame: u64,
    /// The start of the node that opened it.
    pub boot: u64,
    /// Opened from the reserve: only deletes and commit records go in.
    pub reserve: bool,
    /// What is in it.
    pub role: ExtentRole,
}

impl ExtentHeader {
    /// The header block.
    pub fn encode(&self, uuid: &[u8; 16], secret: &[u8; 16], block_size: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(block_size);
        out.extend_from_slice(&EXTENT_MAGIC.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.extent.to_le_bytes());
        out.extend_from_slice(&self.shard.0.to_le_bytes());
        let role = match self.role {
            ExtentRole::Log => ROLE_LOG,
            ExtentRole::Survivors => ROLE_SURVIVORS,
        };
        out.extend_from_slice(&[role, 0]);
        out.extend_from_slice(&self.epoch.to_le_bytes());
        out.extend_from_slice(&self.ordinal.to_le_bytes());
        out.extend_from_slice(&self.first_frame.to_le_bytes());
        out.extend_from_slice(&self.boot.to_le_bytes());
        out.push(u8::from(self.reserve));
        out.resize(block_size, 0);
        let sum = Self::checksum(uuid, secret, &out);
        out[8..12].copy_from_slice(&sum.to_le_bytes());
        out
    }

    fn checksum(uuid: &[u8; 16], secret: &[u8; 16], block: &[u8]) -> u32 {
        let place = Place::new(uuid, secret, ShardId(u16::MAX), u32::MAX, u64::MAX);
        place.checksum(0, &[&block[..8], &block[12..]])
    }

    /// Reads a header block of extent number `extent`. A magic error means that there is none.
    pub fn decode(
        block: &[u8],
        uuid: &[u8; 16],
        secret: &[u8; 16],
        extent: u32,
    ) -> Result<ExtentHeader, FormatError> {
        let mut reader = Reader::new(WHAT, block);
        let magic = reader.u64()?;
        if magic != EXTENT_MAGIC {
            return Err(FormatError::Magic { what: WHAT, expected: EXTENT_MAGIC, got: magic });
        }
        let stored = reader.u32()?;
        let expected = Self::checksum(uuid, secret, block);
        if stored != expected {
            return Err(FormatError::Checksum { what: WHAT, expected, got: stored });
        }
        let field = |field, got| FormatError::Field { what: WHAT, field, got };
        let number = reader.u32()?;
        if number != extent {
            return Err(field("extent number", u64::from(number)));
        }
        let shard = ShardId(reader.u16()?);
        let role = match reader.u8()? {
            ROLE_LOG => ExtentRole::Log,
            ROLE_SURVIVORS => ExtentRole::Survivors,
            got => return Err(field("role", u64::from(got))),
        };
        reader.zeros(1, "reserved bytes")?;
        let epoch = reader.u64()?;
        let ordinal = reader.u64()?;
        let first_frame = reader.u64()?;
        let boot = reader.u64()?;
        let reserve = reader.u8()?;
        if reserve > 1 {
            return Err(field("reserve flag", u64::from(reserve)));
        }
        reader.zeros(block.len() - reader.position(), "reserved bytes")?;
        Ok(ExtentHeader { extent, shard, epoch, ordinal, first_frame, boot, reserve: reserve == 1, role })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: ExtentHeader = ExtentHeader {
        extent: 5,
        shard: ShardId(3),
        epoch: 0x0001_0000_0002,
        ordinal: 9,
        first_frame: 77,
        boot: 4,
        reserve: true,
        role: ExtentRole::Survivors,
    };

    #[test]
    fn round_trip_and_any_flipped_bit() {
        let block = HEADER.encode(&[1; 16], &[2; 16], 4096);
        assert_eq!(block.len(), 4096);
        assert_eq!(ExtentHeader::decode(&block, &[1; 16], &[2; 16], 5), Ok(HEADER));
        for at in 0..block.len() {
            let mut flipped = block.clone();
            flipped[at] ^= 1 << (at % 8);
            assert!(ExtentHeader::decode(&flipped, &[1; 16], &[2; 16], 5).is_err(), "byte {at}");
        }
    }

    #[test]
    fn another_device_place_or_length_is_refused() {
        let block = HEADER.encode(&[1; 16], &[2; 16], 4096);
        assert!(ExtentHeader::decode(&block, &[9; 16], &[2; 16], 5).is_err());
        assert!(ExtentHeader::decode(&block, &[1; 16], &[9; 16], 5).is_err());
        assert!(ExtentHeader::decode(&block, &[1; 16], &[2; 16], 6).is_err());
        for cut in [0, 7, 11, 60] {
            assert!(ExtentHeader::decode(&block[..cut], &[1; 16], &[2; 16], 5).is_err());
        }
    }
}
