//! A record: one change to one key, a chunk of a long value, or the mark that ends a batch.
//!
//! ```text
//!    0  4  checksum of everything up to and including the key
//!    4  4  checksum of the value
//!    8  8  sequence
//!   16  1  type: 1 put, 2 delete, 3 batch commit, 4 clear, 5 retired, 6 chunk
//!   17  1  flags: 1 has an expiry, 2 belongs to a batch, 4 of a long value
//!   18  1  database
//!   19  1  value kind (0 string)
//!   20  .  key length, varint
//!    .  .  value length, varint
//!    .  8  expiry, milliseconds since the Unix epoch          (flag 1)
//!    . 18  batch: boot 8, number 8, coordinator shard 2       (flag 2)
//!    .  8  put: length of the long value; chunk: its id             (flag 4)
//!    .  .  key
//!    .  .  value; of a long value its manifest: see [`super::manifest`]
//! ```
//!
//! Two checksums rather than one, so that a damaged value is still reported by its key. Both cover the record's place.

use super::frame_ranges::FRAME_RANGE_SIZE;
use super::slot::ShardId;
use super::{FormatError, Place, Reader, put_varint, varint_size};
use crate::limits::KEY_SIZE_MAX;

const WHAT: &str = "record";
const FIXED_SIZE: usize = 20;
const BATCH_SIZE: usize = 18;
const FLAG_EXPIRY: u8 = 1;
const FLAG_BATCH: u8 = 2;
const FLAG_LONG: u8 = 4;

/// What a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordType {
    /// The key has this value.
    Put,
    /// The key is gone.
    Delete,
    /// The batch happened. The value is the number of participants, 2 bytes; 0 in a copy of another shard's commit record and
    /// in one that was moved.
    Commit,
    /// Everything in this shard before this sequence is dead.
    Clear,
    /// Frames that the shard's log does not need any more: the value is [`super::frame_ranges::FrameRanges`]. The newest one
    /// counts.
    Retired,
    /// A part of a long value. It counts as long as the newest record of its key names it.
    Chunk,
}

/// Which batch a record belongs to, and which shard decides it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchMark {
    /// The start of the node that made it.
    pub boot: u64,
    /// Unique within that start.
    pub number: u64,
    /// The shard whose commit record decides.
    pub coordinator: ShardId,
}

/// A record, borrowed from whatever holds its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'a> {
    /// What it says.
    pub kind: RecordType,
    /// Its place in the shard's history.
    pub sequence: u64,
    /// The database number.
    pub database: u8,
    /// Milliseconds since the Unix epoch, 0 for none.
    pub expires_at_ms: u64,
    /// The batch that it is a part of.
    pub batch: Option<BatchMark>,
    /// Of a put whose value is long: its length, and `value` is the manifest. Of a chunk: its id. Otherwise 0.
    pub long: u64,
    /// The key; empty in commit and clear records.
    pub key: &'a [u8],
    /// The value; empty in deletes and clears.
    pub value: &'a [u8],
}

/// A decoded record and whether its value is what was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decoded<'a> {
    /// The record. Its value is not to be used when `value_intact` is false.
    pub record: Record<'a>,
    /// Bytes that it takes.
    pub size: usize,
    /// The value matches its checksum.
    pub value_intact: bool,
}

impl Record<'_> {
    /// Bytes that `encode` appends.
    pub fn size(&self) -> usize {
        FIXED_SIZE
            + varint_size(self.key.len() as u32)
            + varint_size(self.value.len() as u32)
            + if self.expires_at_ms != 0 { 8 } else { 0 }
            + if self.batch.is_some() { BATCH_SIZE } else { 0 }
            + if self.long != 0 { 8 } else { 0 }
            + self.key.len()
            + self.value.len()
    }

    /// Whether it stores a value by naming its chunks.
    pub fn is_manifest(&self) -> bool {
        self.kind == RecordType::Put && self.long != 0
    }

    /// Bytes of the value that a put stores, wherever they are.
    pub fn value_size(&self) -> u32 {
        if self.is_manifest() { self.long as u32 } else { self.value.len() as u32 }
    }

    /// Appends the record, which will stand `offset` bytes into its extent.
    pub fn encode(&self, out: &mut Vec<u8>, place: Place, offset: u32) {
        let start = out.len();
        out.extend_from_slice(&[0; 4]);
        let value_sum = place.checksum(offset, &[self.value]);
        out.extend_from_slice(&value_sum.to_le_bytes());
        out.extend_from_slice(&self.sequence.to_le_bytes());
        let flags = if self.expires_at_ms != 0 { FLAG_EXPIRY } else { 0 }
            | if self.batch.is_some() { FLAG_BATCH } else { 0 }
            | if self.long != 0 { FLAG_LONG } else { 0 };
        let kind = match self.kind {
            RecordType::Put => 1,
            RecordType::Delete => 2,
            RecordType::Commit => 3,
            RecordType::Clear => 4,
            RecordType::Retired => 5,
            RecordType::Chunk => 6,
        };
        out.extend_from_slice(&[kind, flags, self.database, 0]);
        put_varint(out, self.key.len() as u32);
        put_varint(out, self.value.len() as u32);
        if self.expires_at_ms != 0 {
            out.extend_from_slice(&self.expires_at_ms.to_le_bytes());
        }
        if let Some(batch) = self.batch {
            out.extend_from_slice(&batch.boot.to_le_bytes());
            out.extend_from_slice(&batch.number.to_le_bytes());
            out.extend_from_slice(&batch.coordinator.0.to_le_bytes());
        }
        if self.long != 0 {
            out.extend_from_slice(&self.long.to_le_bytes());
        }
        out.extend_from_slice(self.key);
        let sum = place.checksum(offset, &[&out[start + 4..]]);
        out[start..start + 4].copy_from_slice(&sum.to_le_bytes());
        out.extend_from_slice(self.value);
    }

    /// Reads the record that stands `offset` bytes into its extent and starts `bytes`.
    ///
    /// An error means that not even the key can be trusted; a damaged value is reported in the result.
    pub fn decode(bytes: &[u8], place: Place, offset: u32) -> Result<Decoded<'_>, FormatError> {
        let Head { record, value_at, value_size, value_sum } = Head::decode(bytes, place, offset)?;
        let mut reader = Reader::new(WHAT, bytes);
        reader.take(value_at)?;
        let value = reader.take(value_size)?;
        let value_intact = place.checksum(offset, &[value]) == value_sum;
        Ok(Decoded { record: Record { value, ..record }, size: reader.position(), value_intact })
    }

    /// Reads what the record that stands `offset` bytes into its extent and starts `bytes` says of its key: all but the value, of
    /// which nothing needs to be there.
    pub fn decode_head(bytes: &[u8], place: Place, offset: u32) -> Result<Record<'_>, FormatError> {
        Head::decode(bytes, place, offset).map(|head| head.record)
    }
}

/// A record up to its value.
struct Head<'a> {
    /// Without its value.
    record: Record<'a>,
    value_at: usize,
    value_size: usize,
    value_sum: u32,
}

impl Head<'_> {
    fn decode(bytes: &[u8], place: Place, offset: u32) -> Result<Head<'_>, FormatError> {
        let field = |field, got| FormatError::Field { what: WHAT, field, got };
        let mut reader = Reader::new(WHAT, bytes);
        let stored = reader.u32()?;
        let value_sum = reader.u32()?;
        let sequence = reader.u64()?;
        let kind = reader.u8()?;
        let flags = reader.u8()?;
        let database = reader.u8()?;
        let value_kind = reader.u8()?;
        let key_size = reader.varint()? as usize;
        let value_size = reader.varint()? as usize;
        // Bounds come before the checksum, which needs the key's end, and are believed only after it.
        if flags & !(FLAG_EXPIRY | FLAG_BATCH | FLAG_LONG) != 0 {
            return Err(field("flags", u64::from(flags)));
        }
        if key_size > KEY_SIZE_MAX {
            return Err(field("key length", key_size as u64));
        }
        let expires_at_ms = if flags & FLAG_EXPIRY != 0 { reader.u64()? } else { 0 };
        let batch = if flags & FLAG_BATCH != 0 {
            Some(BatchMark {
                boot: reader.u64()?,
                number: reader.u64()?,
                coordinator: ShardId(reader.u16()?),
            })
        } else {
            None
        };
        let long = if flags & FLAG_LONG != 0 { reader.u64()? } else { 0 };
        let key = reader.take(key_size)?;
        let expected = place.checksum(offset, &[&bytes[4..reader.position()]]);
        if stored != expected {
            return Err(FormatError::Checksum { what: WHAT, expected, got: stored });
        }
        if value_kind != 0 {
            return Err(field("value kind", u64::from(value_kind)));
        }
        if flags & FLAG_EXPIRY != 0 && expires_at_ms == 0 {
            return Err(field("expiry", 0));
        }
        if flags & FLAG_LONG != 0 && long == 0 {
            return Err(field("length of a long value", 0));
        }
        let kind = match kind {
            1 => RecordType::Put,
            2 => RecordType::Delete,
            3 => RecordType::Commit,
            4 => RecordType::Clear,
            5 => RecordType::Retired,
            6 => RecordType::Chunk,
            other => return Err(field("type", u64::from(other))),
        };
        let shape_is_right = match kind {
            // Places in a value are 32 bits wide.
            RecordType::Put => long <= u64::from(u32::MAX),
            RecordType::Delete => value_size == 0 && expires_at_ms == 0 && long == 0,
            RecordType::Commit => {
                key_size == 0 && value_size == 2 && batch.is_some() && expires_at_ms == 0 && long == 0
            }
            RecordType::Clear => key_size == 0 && value_size == 0 && expires_at_ms == 0 && long == 0,
            RecordType::Retired => {
                key_size == 0
                    && value_size.is_multiple_of(FRAME_RANGE_SIZE)
                    && expires_at_ms == 0
                    && batch.is_none()
                    && long == 0
            }
            RecordType::Chunk => long != 0 && value_size > 0 && expires_at_ms == 0 && batch.is_none(),
        };
        if !shape_is_right {
            return Err(field("value length", value_size as u64));
        }
        let record = Record { kind, sequence, database, expires_at_ms, batch, long, key, value: &[] };
        Ok(Head { record, value_at: reader.position(), value_size, value_sum })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Place {
        Place::new(&[1; 16], &[2; 16], ShardId(7), 4, 5)
    }

    fn samples() -> Vec<Record<'static>> {
        let put = Record {
            kind: RecordType::Put,
            sequence: 42,
            database: 0,
            expires_at_ms: 0,
            batch: None,
            long: 0,
            key: b"user:1000",
            value: b"a value that is a little longer than the key",
        };
        let batch = Some(BatchMark { boot: 3, number: 0x0001_0000_0000_0009, coordinator: ShardId(2) });
        vec![
            put,
            Record { value: b"", ..put },
            Record { key: b"", ..put },
            Record { expires_at_ms: 1_700_000_000_000, batch, database: 3, ..put },
            Record { kind: RecordType::Delete, value: b"", ..put },
            Record { kind: RecordType::Commit, key: b"", value: &[2, 0], batch, ..put },
            Record { kind: RecordType::Clear, key: b"", value: b"", ..put },
            Record { kind: RecordType::Retired, key: b"", value: &[1; 32], ..put },
            Record { kind: RecordType::Chunk, long: 1 << 40, ..put },
            Record { long: 512 << 20, expires_at_ms: 1_700_000_000_000, batch, ..put },
        ]
    }

    #[test]
    fn round_trip() {
        for record in samples() {
            let mut out = vec![0xee; 3];
            record.encode(&mut out, place(), 4096);
            assert_eq!(out.len() - 3, record.size());
            out.extend_from_slice(b"what follows");
            let decoded = Record::decode(&out[3..], place(), 4096).unwrap();
            assert_eq!(decoded, Decoded { record, size: record.size(), value_intact: true });
            // Its head needs nothing of the value.
            let value_at = record.size() - record.value.len();
            let head = Record::decode_head(&out[3..3 + value_at], place(), 4096).unwrap();
            assert_eq!(head, Record { value: b"", ..record });
            assert!(Record::decode_head(&out[3..2 + value_at], place(), 4096).is_err());
        }
    }

    #[test]
    fn any_flipped_bit_is_noticed_and_a_bad_value_keeps_its_key() {
        for record in samples() {
            let mut bytes = Vec::new();
            record.encode(&mut bytes, place(), 64);
            let value_at = bytes.len() - record.value.len();
            for at in 0..bytes.len() {
                for bit in 0..8 {
                    let mut flipped = bytes.clone();
                    flipped[at] ^= 1 << bit;
                    match Record::decode(&flipped, place(), 64) {
                        Err(_) => assert!(at < value_at, "byte {at}"),
                        Ok(decoded) => {
                            assert!(at >= value_at && !decoded.value_intact, "byte {at} bit {bit}");
                            assert_eq!(decoded.record.key, record.key);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn misplaced_or_cut_records_are_refused() {
        for record in samples() {
            let mut bytes = Vec::new();
            record.encode(&mut bytes, place(), 64);
            assert!(Record::decode(&bytes, place(), 128).is_err());
            let other = Place::new(&[1; 16], &[2; 16], ShardId(7), 4, 6);
            assert!(Record::decode(&bytes, other, 64).is_err());
            for cut in 0..bytes.len() {
                assert!(Record::decode(&bytes[..cut], place(), 64).is_err());
            }
        }
    }

    #[test]
    fn chunks_and_long_values_that_no_version_writes_are_refused() {
        let chunk = samples().into_iter().find(|record| record.kind == RecordType::Chunk).unwrap();
        let batch = samples().into_iter().find_map(|record| record.batch);
        for lie in [
            Record { long: 0, ..chunk },
            Record { value: b"", ..chunk },
            Record { expires_at_ms: 1, ..chunk },
            Record { batch, ..chunk },
            Record { kind: RecordType::Put, long: 1 << 32, ..chunk },
            Record { kind: RecordType::Delete, value: b"", ..chunk },
        ] {
            let mut bytes = Vec::new();
            lie.encode(&mut bytes, place(), 0);
            assert!(matches!(Record::decode(&bytes, place(), 0), Err(FormatError::Field { .. })), "{lie:?}");
        }
    }

    #[test]
    fn random_bytes_never_panic() {
        let mut state = 1u64;
        for _ in 0..20_000 {
            let bytes: Vec<u8> = (0..64)
                .map(|_| {
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state >> 56) as u8
                })
                .collect();
            assert!(Record::decode(&bytes, place(), 0).is_err());
        }
    }
}
