//! Loading checkpoints: each shard's index as it was, and from where on the log is to be read.
//!
//! Invariants:
//! - A checkpoint counts in whole or not at all. One that does not costs time, never data.
//! - Nothing of it is believed that the headers on the device contradict.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::read::READ_TRIES;
use super::resolve::{FoundLong, Part};
use super::survey::Survey;
use crate::device::read_ahead::ReadAhead;
use crate::device::{Device, DmaBuf, IoError};
use crate::engine::allocator::CheckpointChain;
use crate::engine::index::{Expiries, HashIndexBuilder, Identity, KeySetBuilder, PackedEntry, RecordRef};
use crate::engine::op::{BatchId, ShardId};
use crate::format::FormatError;
use crate::format::checkpoint::{
    CHECKPOINT_VERSION, CheckpointHeader, ExtentSummary, IndexedKey, Item, PartRecord, PlainKeys,
    ShardPosition, UnitPosition, decode_chunk, decode_items,
};
use crate::format::front_coded;
use crate::format::manifest;
use crate::format::record::RecordType;
use crate::format::retirement::{Retirement, UnitMark};
use crate::format::superblock::Superblock;
use crate::probe::{self, Probe};

/// One shard of a checkpoint.
pub(super) struct Base {
    pub(super) position: ShardPosition,
    pub(super) extents: Vec<ExtentSummary>,
    pub(super) retired: Retirement,
    /// How far its units were.
    pub(super) units: UnitPosition,
    pub(super) commits: Vec<BatchId>,
    pub(super) parts: Vec<(BatchId, Part)>,
    pub(super) index: HashIndexBuilder,
    /// The keys by name, where the device was formatted so.
    pub(super) names: KeySetBuilder,
    pub(super) expiries: Expiries,
    pub(super) manifests: BTreeMap<Identity, FoundLong>,
    pub(super) chunks: BTreeMap<u64, RecordRef>,
}

impl Base {
    fn new(position: ShardPosition) -> Base {
        Base {
            position,
            extents: Vec::new(),
            retired: Retirement::default(),
            units: UnitPosition { last: 0, epoch: 0, open: None },
            commits: Vec::new(),
            parts: Vec::new(),
            index: HashIndexBuilder::default(),
            names: KeySetBuilder::default(),
            expiries: Expiries::default(),
            manifests: BTreeMap::new(),
            chunks: BTreeMap::new(),
        }
    }

    /// Whether the checkpoint has this very extent, and nothing of it need be read.
    pub(super) fn covers(&self, extent: u32, epoch: u64) -> bool {
        self.extents.iter().any(|one| one.extent == extent && one.epoch == epoch)
    }
}

/// What a checkpoint has of one shard.
pub struct ShardCheckpoint(pub(super) Base);

/// The newest complete checkpoints of all shards.
#[derive(Default)]
pub struct Checkpoints {
    bases: BTreeMap<u16, Base>,
    /// Where they are.
    pub chains: Vec<CheckpointChain>,
    /// Bytes that were read.
    pub bytes_read: u64,
    /// Checkpoints that are not there in whole: torn by a crash, or damaged.
    pub incomplete: u32,
}

impl Checkpoints {
    /// Takes what there is of a shard.
    pub fn take(&mut self, shard: ShardId) -> Option<ShardCheckpoint> {
        self.bases.remove(&shard.0).map(ShardCheckpoint)
    }

    /// Shards with a checkpoint.
    pub fn shard_count(&self) -> usize {
        self.bases.len()
    }
}

enum LoadError {
    Io(IoError),
    NotWhole,
}

impl From<FormatError> for LoadError {
    fn from(_: FormatError) -> LoadError {
        LoadError::NotWhole
    }
}

/// The extents of each checkpoint, in order.
fn headers_of(survey: &Survey) -> BTreeMap<u64, Vec<CheckpointHeader>> {
    let mut found: BTreeMap<u64, Vec<CheckpointHeader>> = BTreeMap::new();
    for header in &survey.checkpoints {
        found.entry(header.checkpoint).or_default().push(*header);
    }
    found.values_mut().for_each(|headers| headers.sort_by_key(|header| header.part));
    found
}

/// Whether these may be a whole checkpoint that can be read. Those of another version cost time, as torn ones do.
fn is_chain(headers: &[CheckpointHeader]) -> bool {
    let is_next = |(at, header): (usize, &CheckpointHeader)| {
        header.part as usize == at && header.version == CHECKPOINT_VERSION
    };
    headers.iter().enumerate().all(is_next)
}

/// A checkpoint that is on the device, in whole or not.
pub struct FoundCheckpoint {
    /// Its number.
    pub checkpoint: u64,
    /// Its extents, in order.
    pub headers: Vec<CheckpointHeader>,
    /// What it has of each shard; none when it does not count.
    pub shards: Option<Vec<CheckpointedShard>>,
}

/// What a checkpoint has of one shard.
pub struct CheckpointedShard {
    /// How far the log is covered.
    pub position: ShardPosition,
    /// Extents that the log was in.
    pub extents: usize,
    /// Keys.
    pub keys: u64,
    /// Those of them that have an expiry.
    pub expiring_keys: u64,
    /// Those of them whose value is long.
    pub long_values: u64,
    /// Chunks of long values.
    pub chunks: u64,
    /// Parts of batches that were not decided.
    pub undecided_parts: u64,
    /// A start takes the shard from this checkpoint.
    pub is_newest: bool,
}

/// Every checkpoint that is on the device, the newest first. `progress` is told bytes as they are read.
pub fn find_checkpoints<D: Device>(
    device: &mut D,
    superblock: &Superblock,
    survey: &Survey,
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<FoundCheckpoint>, IoError> {
    let mut out = Vec::new();
    let mut taken = BTreeSet::new();
    for (checkpoint, headers) in headers_of(survey).into_iter().rev() {
        let loaded = if is_chain(&headers) {
            load_chain(device, superblock, &headers, progress)
        } else {
            Err(LoadError::NotWhole)
        };
        let shards = match loaded {
            Ok(bases) => Some(bases.iter().map(|base| describe(base, &mut taken)).collect()),
            Err(LoadError::NotWhole) => None,
            Err(LoadError::Io(error)) => return Err(error),
        };
        out.push(FoundCheckpoint { checkpoint, headers, shards });
    }
    Ok(out)
}

fn describe(base: &Base, taken: &mut BTreeSet<u16>) -> CheckpointedShard {
    CheckpointedShard {
        position: base.position,
        extents: base.extents.len(),
        keys: base.index.len(),
        expiring_keys: base.expiries.len() as u64,
        long_values: base.manifests.len() as u64,
        chunks: base.chunks.len() as u64,
        undecided_parts: base.parts.len() as u64,
        is_newest: taken.insert(base.position.shard.0),
    }
}

/// Loads the newest complete checkpoint of every shard. `progress` is told bytes as they are read.
pub fn load_checkpoints<D: Device>(
    device: &mut D,
    superblock: &Superblock,
    survey: &Survey,
    progress: &mut dyn FnMut(u64),
) -> Result<Checkpoints, IoError> {
    let mut out = Checkpoints::default();
    for (checkpoint, headers) in headers_of(survey).into_iter().rev() {
        let loaded = if is_chain(&headers) {
            load_chain(device, superblock, &headers, &mut |bytes| {
                out.bytes_read += bytes;
                progress(bytes);
            })
        } else {
            Err(LoadError::NotWhole)
        };
        match loaded {
            Ok(bases) => {
                let mut shards = Vec::new();
                for base in bases {
                    let shard = base.position.shard.0;
                    if shard < superblock.shard_count && !out.bases.contains_key(&shard) {
                        out.bases.insert(shard, base);
                        shards.push(shard);
                    }
                }
                if !shards.is_empty() {
                    let extents = headers.iter().map(|header| header.extent).collect();
                    out.chains.push(CheckpointChain { checkpoint, shards, extents });
                }
            }
            Err(LoadError::NotWhole) => {
                probe::hit(Probe::CheckpointTorn);
                out.incomplete += 1;
            }
            Err(LoadError::Io(error)) => return Err(error),
        }
        if out.bases.len() == usize::from(superblock.shard_count) {
            break;
        }
    }
    Ok(out)
}

/// The next piece of a chain. One that can't be read makes the checkpoint useless.
fn next_piece<D: Device>(ahead: &mut ReadAhead<'_, D>) -> Result<DmaBuf, LoadError> {
    match ahead.next_piece() {
        Some(Ok(piece)) => Ok(piece),
        Some(Err(IoError::UnrecoveredRead { .. })) | None => Err(LoadError::NotWhole),
        Some(Err(error)) => Err(LoadError::Io(error)),
    }
}

fn load_chain<D: Device>(
    device: &mut D,
    superblock: &Superblock,
    headers: &[CheckpointHeader],
    progress: &mut dyn FnMut(u64),
) -> Result<Vec<Base>, LoadError> {
    let (layout, block) = (superblock.layout, u64::from(superblock.block_size));
    let range =
        |header: &CheckpointHeader| (layout.extent_offset(header.extent) + block, layout.extent_size - block);
    let mut ahead = ReadAhead::new(device, headers.iter().map(range), READ_TRIES);
    let mut bases = Vec::new();
    let (mut entries, mut chunk) = (0, 0);
    let mut ended = None;
    for header in headers {
        if ended.is_some() {
            break;
        }
        let place = header.place(&superblock.uuid, &superblock.secret);
        let (mut at, mut read_to) = (block, block);
        let mut window: Vec<u8> = Vec::new();
        let mut taken = 0;
        while ended.is_none() && at < layout.extent_size {
            match decode_chunk(&window[taken..], chunk, place, at as u32, block as usize) {
                Ok((items, size)) => {
                    decode_items(items, &mut |item| {
                        if let Item::End(count) = item {
                            ended = Some(count);
                        }
                        take(item, superblock, &mut bases, &mut entries)
                    })?;
                    taken += size;
                    at += size as u64;
                    chunk += 1;
                }
                // The chunk is longer than what was read of it.
                Err(FormatError::Short { .. }) if read_to < layout.extent_size => {
                    let piece = next_piece(&mut ahead)?;
                    window.drain(..std::mem::take(&mut taken));
                    window.extend_from_slice(&piece);
                    read_to += piece.len() as u64;
                    progress(piece.len() as u64);
                }
                // The rest did not fit here: the chain's next extent goes on with this chunk.
                Err(_) => break,
            }
        }
        // Torn at its end, or its first chunk is not what was written: no other extent makes up for it.
        if ended.is_none() && (at == block || header.part + 1 == headers.len() as u32) {
            return Err(LoadError::NotWhole);
        }
        while ended.is_none() && read_to < layout.extent_size {
            let size = next_piece(&mut ahead)?.len() as u64;
            read_to += size;
            progress(size);
        }
    }
    if ended != Some(entries) || !bases.iter().all(|base| is_sound(base, superblock)) {
        return Err(LoadError::NotWhole);
    }
    Ok(bases)
}

/// Whether a shard's positions can be those of a log on this device.
fn is_sound(base: &Base, superblock: &Superblock) -> bool {
    let (block, extent_size) = (u64::from(superblock.block_size), superblock.layout.extent_size);
    let is_end = |open: Option<(u32, u32)>| {
        open.is_none_or(|(_, end)| {
            (block..=extent_size).contains(&u64::from(end)) && u64::from(end).is_multiple_of(block)
        })
    };
    let position = base.position;
    is_end(position.open)
        && is_end(base.units.open)
        && position.next_sequence > 0
        && position.boot <= superblock.boot
}

fn part_of(kind: RecordType, record: &PartRecord<'_>, coordinator: ShardId) -> Result<Part, FormatError> {
    let pieces =
        record.manifest.map(|bytes| manifest::decode(bytes, u64::from(record.value_size))).transpose()?;
    let found = RecordRef {
        extent: record.extent,
        offset: record.offset,
        size: record.size,
        value_size: record.value_size,
        sequence: record.sequence,
        expires_at_ms: record.expires_at_ms,
        is_part: true,
        is_long: record.manifest.is_some(),
    };
    Ok(Part { kind, key: Bytes::copy_from_slice(record.key), record: found, pieces, coordinator })
}

fn wrong(field: &'static str, got: u64) -> FormatError {
    FormatError::Field { what: "checkpoint entry", field, got }
}

/// Whose an entry is, and what it says.
#[inline]
fn packed(upper: u64, lower: u8, entry: u64) -> Result<(Identity, PackedEntry), FormatError> {
    let identity = Identity::from_parts(upper, lower).ok_or_else(|| wrong("hash", u64::from(lower)))?;
    let entry = PackedEntry::from_bits(entry).ok_or_else(|| wrong("entry", entry))?;
    Ok((identity, entry))
}

/// Takes keys into a shard's index that neither expire nor are long.
fn take_plain(base: &mut Base, keys: PlainKeys<'_>) -> Result<(), FormatError> {
    for (upper, lower, entry) in keys.iter() {
        let (identity, entry) = packed(upper, lower, entry)?;
        if entry.expires() {
            return Err(wrong("expiry", 0));
        }
        base.index.add(identity, entry);
    }
    Ok(())
}

/// Takes a key into a shard's index.
fn take_key(base: &mut Base, key: &IndexedKey<'_>) -> Result<(), FormatError> {
    let (identity, entry) = packed(key.hash_upper, key.hash_lower, key.entry)?;
    if entry.expires() != (key.expires_at_ms != 0) {
        return Err(wrong("expiry", key.expires_at_ms));
    }
    if let Some(long) = &key.long {
        let found = FoundLong {
            key: Bytes::copy_from_slice(long.key),
            size: u64::from(long.value_size),
            pieces: manifest::decode(long.manifest, u64::from(long.value_size))?,
        };
        base.manifests.insert(identity, found);
    }
    base.index.add(identity, entry);
    if entry.expires() {
        base.expiries.set(identity, key.expires_at_ms);
    }
    Ok(())
}

fn take(
    item: Item<'_>,
    superblock: &Superblock,
    bases: &mut Vec<Base>,
    entries: &mut u64,
) -> Result<(), FormatError> {
    if let Item::Shard(position) = item {
        // A shard that comes twice, or is none of the device's, is nothing that was written.
        let shard = position.shard.0;
        if shard >= superblock.shard_count || bases.iter().any(|base| base.position.shard.0 == shard) {
            return Err(wrong("shard", u64::from(shard)));
        }
        bases.push(Base::new(position));
        return Ok(());
    }
    if let Item::End(_) = item {
        return Ok(());
    }
    let Some(base) = bases.last_mut() else {
        return Err(FormatError::Field { what: "checkpoint", field: "first item", got: 0 });
    };
    match item {
        Item::Shard(_) | Item::End(_) => {}
        Item::Chunk(chunk) => {
            let found = RecordRef {
                extent: chunk.extent,
                offset: chunk.offset,
                size: chunk.size,
                value_size: chunk.value_size,
                sequence: chunk.sequence,
                expires_at_ms: 0,
                is_part: false,
                is_long: false,
            };
            base.chunks.insert(chunk.id, found);
        }
        Item::Extent(summary) => base.extents.push(summary),
        Item::Retired(first, last) => base.retired.frames.insert(first, last),
        Item::RetiredUnits(first, last) => base.retired.units.insert(first, last),
        Item::Units(position) => {
            base.retired.mark = UnitMark { last: position.last, epoch: position.epoch };
            base.units = position;
        }
        Item::Commit((boot, number)) => base.commits.push(BatchId { boot, number }),
        Item::Part((boot, number), coordinator, is_delete, record) => {
            let kind = if is_delete { RecordType::Delete } else { RecordType::Put };
            base.parts.push((BatchId { boot, number }, part_of(kind, &record, coordinator)?));
        }
        Item::Names(names) => front_coded::decode(names, &mut |key| base.names.add(key))?,
        Item::Plain(keys) => {
            *entries += keys.count() as u64;
            take_plain(base, keys)?;
        }
        Item::Entry(key) => {
            *entries += 1;
            take_key(base, &key)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::index::Index;
    use crate::format::checkpoint::{UnitPosition, decode_items};

    fn base() -> Base {
        Base::new(ShardPosition {
            shard: ShardId(0),
            frame: 1,
            boot: 1,
            next_sequence: 1,
            open: None,
            clean: true,
        })
    }

    /// What becomes of keys that are stored so.
    fn taken(keys: &[IndexedKey<'_>]) -> Result<Base, FormatError> {
        let (mut bytes, mut bases, mut entries) = (Vec::new(), vec![base()], 0);
        keys.iter().for_each(|key| Item::Entry(*key).encode(&mut bytes));
        decode_items(&bytes, &mut |item| take(item, &Superblock::for_tests(4), &mut bases, &mut entries))?;
        assert_eq!(entries, keys.len() as u64);
        Ok(bases.remove(0))
    }

    #[test]
    fn keys_that_could_not_have_been_stored_are_refused() {
        const EXPIRES: u64 = 1;
        let key = |number: u64| IndexedKey {
            hash_upper: number << 40,
            hash_lower: 31,
            entry: 1 << 60 | number << 3,
            expires_at_ms: 0,
            long: None,
        };
        let expiring =
            |number| IndexedKey { entry: key(number).entry | EXPIRES, expires_at_ms: 7, ..key(number) };
        let loaded = taken(&[key(1), key(2), expiring(3), key(4)]).ok().unwrap();
        let index = loaded.index.finish();
        for one in [key(1), key(2), expiring(3), key(4)] {
            let identity = Identity::from_parts(one.hash_upper, one.hash_lower).unwrap();
            assert_eq!(index.get(identity).map(|entry| entry.to_bits()), Some(one.entry));
            assert_eq!(loaded.expiries.get(identity), one.expires_at_ms);
        }
        let refused = |wrong| taken(&[key(1), wrong, key(3)]).is_err();
        assert!(refused(IndexedKey { hash_lower: 32, ..key(2) }), "more of the hash than there is");
        assert!(refused(IndexedKey { entry: 1 << 61, ..key(2) }), "more than an entry has");
        assert!(refused(IndexedKey { entry: expiring(2).entry, ..key(2) }), "an expiry that is not there");
        assert!(
            refused(IndexedKey { entry: key(2).entry, ..expiring(2) }),
            "an expiry of a key that has none"
        );
        assert!(!refused(key(2)));
        let (mut bytes, mut entries) = (Vec::new(), 0);
        Item::Entry(key(1)).encode(&mut bytes);
        let without_shard = decode_items(&bytes, &mut |item| {
            take(item, &Superblock::for_tests(4), &mut Vec::new(), &mut entries)
        });
        assert!(without_shard.is_err());
    }
    #[test]
    fn positions_that_no_log_has_are_not_believed() {
        let superblock = Superblock::for_tests(4);
        let extent_size = superblock.layout.extent_size as u32;
        assert!(is_sound(&base(), &superblock));
        let at = |change: &dyn Fn(&mut ShardPosition)| {
            let mut base = base();
            change(&mut base.position);
            is_sound(&base, &superblock)
        };
        assert!(at(&|position| position.open = Some((1, extent_size))));
        assert!(!at(&|position| position.open = Some((1, extent_size + 4096))), "behind the extent's end");
        assert!(!at(&|position| position.open = Some((1, 4097))), "within a block");
        assert!(!at(&|position| position.open = Some((1, 0))), "in the extent's header");
        assert!(!at(&|position| position.next_sequence = 0));
        assert!(!at(&|position| position.boot = superblock.boot + 1), "a start that is still to come");
        let units = Base { units: UnitPosition { open: Some((1, 4097)), ..base().units }, ..base() };
        assert!(!is_sound(&units, &superblock));
    }

    #[test]
    fn a_shard_comes_once_and_is_one_of_the_device() {
        let mut entries = 0;
        let mut take_shard = |number: u16, bases: &mut Vec<Base>| {
            let position = ShardPosition { shard: ShardId(number), ..base().position };
            take(Item::Shard(position), &Superblock::for_tests(4), bases, &mut entries)
        };
        let mut bases = Vec::new();
        assert!(take_shard(3, &mut bases).is_ok() && take_shard(0, &mut bases).is_ok());
        assert!(take_shard(3, &mut bases).is_err() && take_shard(4, &mut bases).is_err());
        assert_eq!(bases.len(), 2);
    }
}
