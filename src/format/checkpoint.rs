//! Checkpoints: a ready-to-load image of the indexes of some shards, with the log positions that they cover.
//!
//! A checkpoint is a chain of extents, each a header block and then chunks; a chunk holds whole items.
//!
//! ```text
//! header block                                chunk, padded to the block with zeros
//!    0  8  magic "BASALTcp"                      0  4  magic "CHNK"
//!    8  4  checksum of the block                 4  4  checksum of the rest of the header and of the items
//!   12  4  extent                               8  4  bytes of the items
//!   16  8  epoch: unique to this life           12  4  zero
//!   24  8  checkpoint: its number               16  8  number of the chunk, from 0 throughout the chain
//!   32  4  part: place in the chain, from 0     24     items
//!   36  8  boot that wrote it
//!   44  4  version of what is in it
//!   48     zero to the end of the block
//! ```
//!
//! Items, each a tag byte and its fields: a shard's position begins its section, then come the extents, retired frames and units,
//! how far its units were, commit records, undecided parts, index entries and chunks of that shard, in any order; one end item closes the checkpoint. An index
//! entry is what the index holds in memory, which knows no keys: bits of the hash and a place. That of a long value has key and
//! manifest, which are in memory too. On a device whose index is `ordered`, lists of names have the keys, as
//! [`super::front_coded`] says.
//!
//! A checkpoint of another version is left alone, as a torn one is. Version 0 had keys and sequences.
//!
//! A checkpoint counts only when every chunk up to the end item is intact. It is disposable: the log gives the same.

use super::slot::ShardId;
use super::{FormatError, Place, Reader};

#[cfg(test)]
mod tests;

/// `BASALTcp` as a little-endian number.
pub const CHECKPOINT_MAGIC: u64 = u64::from_le_bytes(*b"BASALTcp");

/// The version that is written, and the only one that is read.
pub const CHECKPOINT_VERSION: u32 = 1;

const CHUNK_MAGIC: u32 = u32::from_le_bytes(*b"CHNK");
const WHAT: &str = "checkpoint header";
const CHUNK: &str = "checkpoint chunk";
const ITEM: &str = "checkpoint item";

/// Bytes of a chunk before its items.
pub const CHUNK_HEADER_SIZE: usize = 24;

/// The first block of each of a checkpoint's extents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointHeader {
    /// The extent's number.
    pub extent: u32,
    /// Unique to this life of the extent.
    pub epoch: u64,
    /// The checkpoint: later ones have higher numbers.
    pub checkpoint: u64,
    /// Place in the chain.
    pub part: u32,
    /// The start of the node that wrote it.
    pub boot: u64,
    /// Version of what is in it.
    pub version: u32,
}

impl CheckpointHeader {
    fn checksum(uuid: &[u8; 16], secret: &[u8; 16], block: &[u8]) -> u32 {
        let place = Place::new(uuid, secret, ShardId(u16::MAX), u32::MAX, u64::MAX - 1);
        place.checksum(0, &[&block[..8], &block[12..]])
    }

    /// The header block.
    pub fn encode(&self, uuid: &[u8; 16], secret: &[u8; 16], block_size: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(block_size);
        out.extend_from_slice(&CHECKPOINT_MAGIC.to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.extent.to_le_bytes());
        out.extend_from_slice(&self.epoch.to_le_bytes());
        out.extend_from_slice(&self.checkpoint.to_le_bytes());
        out.extend_from_slice(&self.part.to_le_bytes());
        out.extend_from_slice(&self.boot.to_le_bytes());
        out.extend_from_slice(&self.version.to_le_bytes());
        out.resize(block_size, 0);
        let sum = Self::checksum(uuid, secret, &out);
        out[8..12].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// Reads the header block of extent number `extent`. A magic error means that there is none.
    pub fn decode(
        block: &[u8],
        uuid: &[u8; 16],
        secret: &[u8; 16],
        extent: u32,
    ) -> Result<CheckpointHeader, FormatError> {
        let mut reader = Reader::new(WHAT, block);
        let magic = reader.u64()?;
        if magic != CHECKPOINT_MAGIC {
            return Err(FormatError::Magic { what: WHAT, expected: CHECKPOINT_MAGIC, got: magic });
        }
        let stored = reader.u32()?;
        let expected = Self::checksum(uuid, secret, block);
        if stored != expected {
            return Err(FormatError::Checksum { what: WHAT, expected, got: stored });
        }
        let number = reader.u32()?;
        if number != extent {
            return Err(FormatError::Field { what: WHAT, field: "extent number", got: u64::from(number) });
        }
        let header = CheckpointHeader {
            extent,
            epoch: reader.u64()?,
            checkpoint: reader.u64()?,
            part: reader.u32()?,
            boot: reader.u64()?,
            version: reader.u32()?,
        };
        // What another version has there is not for this one to judge.
        if header.version != CHECKPOINT_VERSION {
            return Ok(header);
        }
        reader.zeros(block.len() - reader.position(), "reserved bytes")?;
        Ok(header)
    }

    /// What the checksums of its chunks start from.
    pub fn place(&self, uuid: &[u8; 16], secret: &[u8; 16]) -> Place {
        Place::new(uuid, secret, ShardId(u16::MAX), self.extent, self.epoch)
    }
}

/// A chunk of these items, whole blocks, to be written `offset` bytes into its extent.
pub fn encode_chunk(items: &[u8], number: u64, place: Place, offset: u32, block_size: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity((CHUNK_HEADER_SIZE + items.len()).next_multiple_of(block_size));
    out.extend_from_slice(&CHUNK_MAGIC.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&(items.len() as u32).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&number.to_le_bytes());
    out.extend_from_slice(items);
    let sum = place.checksum(offset, &[&out[..4], &out[8..]]);
    out[4..8].copy_from_slice(&sum.to_le_bytes());
    out.resize(out.len().next_multiple_of(block_size), 0);
    out
}

/// Reads the chunk at the start of `bytes`: its items, and the bytes that it takes.
pub fn decode_chunk(
    bytes: &[u8],
    number: u64,
    place: Place,
    offset: u32,
    block_size: usize,
) -> Result<(&[u8], usize), FormatError> {
    let mut reader = Reader::new(CHUNK, bytes);
    let magic = reader.u32()?;
    if magic != CHUNK_MAGIC {
        return Err(FormatError::Magic {
            what: CHUNK,
            expected: u64::from(CHUNK_MAGIC),
            got: u64::from(magic),
        });
    }
    let stored = reader.u32()?;
    let size = reader.u32()? as usize;
    reader.zeros(4, "reserved bytes")?;
    let got = reader.u64()?;
    let items = reader.take(size)?;
    let expected = place.checksum(offset, &[&bytes[..4], &bytes[8..CHUNK_HEADER_SIZE + size]]);
    if stored != expected {
        return Err(FormatError::Checksum { what: CHUNK, expected, got: stored });
    }
    if got != number {
        return Err(FormatError::Field { what: CHUNK, field: "number", got });
    }
    let end = reader.position().next_multiple_of(block_size);
    reader.zeros(end - reader.position(), "padding")?;
    Ok((items, end))
}

/// Where a shard's log was, and with it what begins the shard's section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardPosition {
    /// The shard.
    pub shard: ShardId,
    /// The last frame that the section covers.
    pub frame: u64,
    /// The boot of that frame.
    pub boot: u64,
    /// The next sequence to be given.
    pub next_sequence: u64,
    /// The extent that was being filled, and the bytes from its start to the next frame.
    pub open: Option<(u32, u32)>,
    /// Nothing was in flight, and the node stopped: as long as no later start was, nothing follows.
    pub clean: bool,
}

/// What is known of an extent of a shard's log without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentSummary {
    /// The extent.
    pub extent: u32,
    /// Which of its lives.
    pub epoch: u64,
    /// Its first frame.
    pub first_frame: u64,
    /// Its last frame so far.
    pub last_frame: u64,
    /// Bytes from its start that are in use.
    pub end: u64,
    /// Bytes of records that may have to be kept although no key names them.
    pub carry_bytes: u64,
    /// Parts of batches among those.
    pub carry_parts: u64,
    /// A FLUSHALL is in it.
    pub has_clear: bool,
    /// It came from the reserve.
    pub is_reserve: bool,
    /// Of survivors, where the numbers above are those of units: the frames that its first and its last unit follow.
    pub follows: Option<(u64, u64)>,
}

/// How far a shard's units were, for a shard that has had any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnitPosition {
    /// The last unit that the section covers.
    pub last: u64,
    /// Later ones count only in extents whose epoch is at least this.
    pub epoch: u64,
    /// The extent that was being filled, and the bytes from its start to the next unit.
    pub open: Option<(u32, u32)>,
}

/// What the index says of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexedKey<'a> {
    /// The first 64 bits of the key's hash.
    pub hash_upper: u64,
    /// Those behind them that the index has.
    pub hash_lower: u8,
    /// Where its newest record is, as the index packs it.
    pub entry: u64,
    /// Milliseconds since the Unix epoch, 0 for none.
    pub expires_at_ms: u64,
    /// What is in memory of a long value.
    pub long: Option<IndexedLong<'a>>,
}

const PLAIN_KEY_SIZE: usize = 19;

/// What the index says of keys that neither expire nor are long, one behind the other as they are stored. There is at least one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlainKeys<'a>(&'a [[u8; PLAIN_KEY_SIZE]]);

impl<'a> PlainKeys<'a> {
    /// Those that bytes start with.
    fn at_start(bytes: &'a [u8]) -> Option<PlainKeys<'a>> {
        let (keys, _) = bytes.as_chunks::<PLAIN_KEY_SIZE>();
        let count = keys.iter().take_while(|key| key[..2] == [TAG_ENTRY, 0]).count();
        (count > 0).then(|| PlainKeys(&keys[..count]))
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Of each, the first 64 bits of its hash, those behind them, and where its newest record is, as in [`IndexedKey`].
    #[inline]
    pub fn iter(self) -> impl Iterator<Item = (u64, u8, u64)> + use<'a> {
        self.0.iter().map(|key| {
            let (numbers, _) = key[3..].as_chunks::<8>();
            (u64::from_le_bytes(numbers[0]), key[2], u64::from_le_bytes(numbers[1]))
        })
    }
}

/// What is in memory of a long value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexedLong<'a> {
    /// The key.
    pub key: &'a [u8],
    /// Bytes of the value.
    pub value_size: u32,
    /// Where they are.
    pub manifest: &'a [u8],
}

/// A part of a batch that was not decided yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartRecord<'a> {
    /// The key.
    pub key: &'a [u8],
    /// The extent.
    pub extent: u32,
    /// Bytes from the extent's start.
    pub offset: u32,
    /// Bytes of the record.
    pub size: u32,
    /// Bytes of the value.
    pub value_size: u32,
    /// Its sequence.
    pub sequence: u64,
    /// Milliseconds since the Unix epoch, 0 for none.
    pub expires_at_ms: u64,
    /// Of a long value: its manifest, and `value_size` is the length of the value.
    pub manifest: Option<&'a [u8]>,
}

/// Where a chunk of a long value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredChunk {
    /// Its id.
    pub id: u64,
    /// The extent.
    pub extent: u32,
    /// Bytes from the extent's start.
    pub offset: u32,
    /// Bytes of the record.
    pub size: u32,
    /// Bytes of the value that are in it.
    pub value_size: u32,
    /// Its sequence.
    pub sequence: u64,
}

/// A batch: the start of the node that numbered it, and its number.
pub type BatchNumber = (u64, u64);

/// What a checkpoint is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item<'a> {
    /// Begins a shard's section.
    Shard(ShardPosition),
    /// One of its extents.
    Extent(ExtentSummary),
    /// Frames that it does not need any more, both ends included.
    Retired(u64, u64),
    /// A batch that it decided and that other shards may still rest on.
    Commit(BatchNumber),
    /// A part of a batch that was not decided yet: its coordinator, and whether the key is deleted.
    Part(BatchNumber, ShardId, bool, PartRecord<'a>),
    /// A key. What is read back of one that neither expires nor is long is in [`Item::Plain`].
    Entry(IndexedKey<'a>),
    /// Such keys that stand together, as most do.
    Plain(PlainKeys<'a>),
    /// The end, with the number of keys in all.
    End(u64),
    /// A chunk of a long value.
    Chunk(StoredChunk),
    /// Some of the shard's keys, front-coded. Those of a section are in order, and some may have gone.
    Names(&'a [u8]),
    /// How far the shard's units were.
    Units(UnitPosition),
    /// Units that it does not need any more, both ends included.
    RetiredUnits(u64, u64),
}

const TAG_ENTRY: u8 = 6;

const KEY_EXPIRES: u8 = 1;
const KEY_IS_LONG: u8 = 2;

fn encode_key(key: &IndexedKey<'_>, out: &mut Vec<u8>) {
    let flags = if key.expires_at_ms != 0 { KEY_EXPIRES } else { 0 }
        | if key.long.is_some() { KEY_IS_LONG } else { 0 };
    out.extend_from_slice(&[flags, key.hash_lower]);
    out.extend_from_slice(&key.hash_upper.to_le_bytes());
    out.extend_from_slice(&key.entry.to_le_bytes());
    if key.expires_at_ms != 0 {
        out.extend_from_slice(&key.expires_at_ms.to_le_bytes());
    }
    if let Some(long) = &key.long {
        out.extend_from_slice(&(long.key.len() as u16).to_le_bytes());
        out.extend_from_slice(&long.value_size.to_le_bytes());
        out.extend_from_slice(&(long.manifest.len() as u32).to_le_bytes());
        out.extend_from_slice(long.key);
        out.extend_from_slice(long.manifest);
    }
}

fn decode_key<'a>(reader: &mut Reader<'a>) -> Result<IndexedKey<'a>, FormatError> {
    let flags = reader.u8()?;
    if flags > KEY_EXPIRES | KEY_IS_LONG {
        return Err(FormatError::Field { what: ITEM, field: "flags", got: u64::from(flags) });
    }
    let hash_lower = reader.u8()?;
    let (hash_upper, entry) = (reader.u64()?, reader.u64()?);
    let expires_at_ms = if flags & KEY_EXPIRES != 0 { reader.u64()? } else { 0 };
    let long = if flags & KEY_IS_LONG != 0 {
        let (key_size, value_size, manifest_size) = (reader.u16()?, reader.u32()?, reader.u32()?);
        let (key, manifest) = (reader.take(usize::from(key_size))?, reader.take(manifest_size as usize)?);
        Some(IndexedLong { key, value_size, manifest })
    } else {
        None
    };
    Ok(IndexedKey { hash_upper, hash_lower, entry, expires_at_ms, long })
}

fn encode_part(record: &PartRecord<'_>, out: &mut Vec<u8>) {
    out.extend_from_slice(&(record.key.len() as u16).to_le_bytes());
    out.push(u8::from(record.manifest.is_some()));
    for number in [record.extent, record.offset, record.size, record.value_size] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    out.extend_from_slice(&record.sequence.to_le_bytes());
    out.extend_from_slice(&record.expires_at_ms.to_le_bytes());
    out.extend_from_slice(record.key);
    if let Some(manifest) = record.manifest {
        out.extend_from_slice(&(manifest.len() as u32).to_le_bytes());
        out.extend_from_slice(manifest);
    }
}

fn decode_part<'a>(reader: &mut Reader<'a>) -> Result<PartRecord<'a>, FormatError> {
    let key_size = usize::from(reader.u16()?);
    let is_long = decode_flag(reader)?;
    let mut record = PartRecord {
        extent: reader.u32()?,
        offset: reader.u32()?,
        size: reader.u32()?,
        value_size: reader.u32()?,
        sequence: reader.u64()?,
        expires_at_ms: reader.u64()?,
        key: reader.take(key_size)?,
        manifest: None,
    };
    if is_long {
        let size = reader.u32()? as usize;
        record.manifest = Some(reader.take(size)?);
    }
    Ok(record)
}

fn decode_flag(reader: &mut Reader<'_>) -> Result<bool, FormatError> {
    match reader.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        got => Err(FormatError::Field { what: ITEM, field: "flag", got: u64::from(got) }),
    }
}

impl Item<'_> {
    /// Appends it.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut numbers = |tag: u8, numbers: &[u64]| {
            out.push(tag);
            for number in numbers {
                out.extend_from_slice(&number.to_le_bytes());
            }
        };
        match self {
            Item::Shard(position) => {
                numbers(1, &[position.frame, position.boot, position.next_sequence]);
                let (extent, end) = position.open.unwrap_or((u32::MAX, 0));
                out.extend_from_slice(&extent.to_le_bytes());
                out.extend_from_slice(&end.to_le_bytes());
                out.extend_from_slice(&position.shard.0.to_le_bytes());
                out.push(u8::from(position.clean));
            }
            Item::Extent(one) => {
                let known = [one.epoch, one.first_frame, one.last_frame, one.end];
                match one.follows {
                    None => numbers(2, &known),
                    Some((first, last)) => {
                        numbers(12, &[first, last]);
                        known.iter().for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
                    }
                }
                out.extend_from_slice(&one.carry_bytes.to_le_bytes());
                out.extend_from_slice(&one.carry_parts.to_le_bytes());
                out.extend_from_slice(&one.extent.to_le_bytes());
                out.extend_from_slice(&[u8::from(one.has_clear), u8::from(one.is_reserve)]);
            }
            Item::Retired(first, last) => numbers(3, &[*first, *last]),
            Item::Commit((boot, number)) => numbers(4, &[*boot, *number]),
            Item::Part((boot, number), coordinator, is_delete, record) => {
                numbers(5, &[*boot, *number]);
                out.extend_from_slice(&coordinator.0.to_le_bytes());
                out.push(u8::from(*is_delete));
                encode_part(record, out);
            }
            Item::Entry(key) => {
                out.push(TAG_ENTRY);
                encode_key(key, out);
            }
            Item::Plain(PlainKeys(keys)) => out.extend_from_slice(keys.as_flattened()),
            Item::End(count) => numbers(7, &[*count]),
            Item::Chunk(chunk) => {
                numbers(8, &[chunk.id, chunk.sequence]);
                for number in [chunk.extent, chunk.offset, chunk.size, chunk.value_size] {
                    out.extend_from_slice(&number.to_le_bytes());
                }
            }
            Item::Names(names) => {
                out.push(9);
                out.extend_from_slice(&(names.len() as u32).to_le_bytes());
                out.extend_from_slice(names);
            }
            Item::Units(position) => {
                numbers(10, &[position.last, position.epoch]);
                let (extent, end) = position.open.unwrap_or((u32::MAX, 0));
                out.extend_from_slice(&extent.to_le_bytes());
                out.extend_from_slice(&end.to_le_bytes());
            }
            Item::RetiredUnits(first, last) => numbers(11, &[*first, *last]),
        }
    }
}

/// Reads the items of a chunk, one after the other.
pub fn decode_items<'a>(
    bytes: &'a [u8],
    take: &mut dyn FnMut(Item<'a>) -> Result<(), FormatError>,
) -> Result<(), FormatError> {
    let mut reader = Reader::new(ITEM, bytes);
    while reader.position() < bytes.len() {
        let reader = &mut reader;
        if let Some(keys) = PlainKeys::at_start(&bytes[reader.position()..]) {
            reader.take(keys.count() * PLAIN_KEY_SIZE)?;
            take(Item::Plain(keys))?;
            continue;
        }
        let item = match reader.u8()? {
            1 => {
                let (frame, boot, next_sequence) = (reader.u64()?, reader.u64()?, reader.u64()?);
                let (extent, end) = (reader.u32()?, reader.u32()?);
                let open = (extent != u32::MAX).then_some((extent, end));
                let shard = ShardId(reader.u16()?);
                let clean = decode_flag(reader)?;
                Item::Shard(ShardPosition { shard, frame, boot, next_sequence, open, clean })
            }
            tag @ (2 | 12) => Item::Extent(ExtentSummary {
                follows: if tag == 12 { Some((reader.u64()?, reader.u64()?)) } else { None },
                epoch: reader.u64()?,
                first_frame: reader.u64()?,
                last_frame: reader.u64()?,
                end: reader.u64()?,
                carry_bytes: reader.u64()?,
                carry_parts: reader.u64()?,
                extent: reader.u32()?,
                has_clear: decode_flag(reader)?,
                is_reserve: decode_flag(reader)?,
            }),
            3 => Item::Retired(reader.u64()?, reader.u64()?),
            4 => Item::Commit((reader.u64()?, reader.u64()?)),
            5 => {
                let batch = (reader.u64()?, reader.u64()?);
                let coordinator = ShardId(reader.u16()?);
                let is_delete = decode_flag(reader)?;
                Item::Part(batch, coordinator, is_delete, decode_part(reader)?)
            }
            TAG_ENTRY => Item::Entry(decode_key(reader)?),
            7 => Item::End(reader.u64()?),
            8 => Item::Chunk(StoredChunk {
                id: reader.u64()?,
                sequence: reader.u64()?,
                extent: reader.u32()?,
                offset: reader.u32()?,
                size: reader.u32()?,
                value_size: reader.u32()?,
            }),
            9 => {
                let size = reader.u32()? as usize;
                Item::Names(reader.take(size)?)
            }
            10 => {
                let (last, epoch) = (reader.u64()?, reader.u64()?);
                let (extent, end) = (reader.u32()?, reader.u32()?);
                let open = (extent != u32::MAX).then_some((extent, end));
                Item::Units(UnitPosition { last, epoch, open })
            }
            11 => Item::RetiredUnits(reader.u64()?, reader.u64()?),
            tag => return Err(FormatError::Field { what: ITEM, field: "tag", got: u64::from(tag) }),
        };
        take(item)?;
    }
    Ok(())
}
