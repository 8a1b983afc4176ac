//! A shard's state as recovery hands it over.

use std::collections::BTreeMap;

use crate::device::{Device, IoError};
use crate::engine::action::is_expired;
use crate::engine::extents::Extents;
use crate::engine::index::{Directory, Entry, Expiries, HashIndex, Identity, Index, RecordRef, hash_key};
use crate::engine::log::ShardLog;
use crate::engine::op::{BatchId, Key, KeyRange, Order, ShardId};
use crate::engine::recovery::{Damage, Doubt, FoundLong, Lost, read_tried};
use crate::engine::survivors::FoundUnits;
use crate::format::record::Record;
use crate::format::superblock::Superblock;

/// What recovery hands over.
pub struct ShardState {
    pub(in crate::engine) id: ShardId,
    pub(in crate::engine) index: HashIndex,
    /// The keys in order, where the device was formatted so.
    pub(in crate::engine) directory: Option<Directory>,
    pub(in crate::engine) expiries: Expiries,
    /// Keys whose record is a manifest that can be read, and their values.
    pub(in crate::engine) manifests: BTreeMap<Identity, FoundLong>,
    /// Chunks that those name.
    pub(in crate::engine) chunks: BTreeMap<u64, RecordRef>,
    pub(in crate::engine) log: ShardLog,
    pub(in crate::engine) units: FoundUnits,
    pub(in crate::engine) extents: Extents,
    pub(in crate::engine) durable_frame: u64,
    pub(in crate::engine) clean: bool,
    pub(in crate::engine) doubt: Doubt,
    /// Of everything that is damaged it is known whose it is, so garbage can be told from what was lost.
    pub(in crate::engine) is_collectable: bool,
    /// Manifests that can't be read, with their extents: chunks of theirs look like garbage.
    pub(in crate::engine) lost_manifests: Vec<(u32, Lost)>,
    /// Damage that keys are affected by, or may be.
    pub(in crate::engine) damage: Vec<Damage>,
    /// Damage that nothing depends on any more that a client could ask for.
    pub(in crate::engine) superseded: Vec<Damage>,
    /// Batches with live parts here that only another shard's commit record decides, with that shard.
    pub(in crate::engine) copies_due: Vec<(BatchId, ShardId)>,
}

impl ShardState {
    /// Keys in it, expired ones that are still stored included.
    pub fn key_count(&self) -> u64 {
        self.index.len()
    }

    /// Bytes of memory that the index takes.
    pub fn index_size(&self) -> u64 {
        let names = self.directory.as_ref().map_or(0, Directory::heap_size);
        (self.index.heap_size() + names + self.expiries.heap_size()) as u64
    }

    /// Whether records were lost that may concern keys of this shard: those keys answer an error.
    pub fn is_in_doubt(&self) -> bool {
        self.doubt.is_any()
    }

    /// Keys with a long value that lacks chunks: how many, and where the manifest is.
    pub(in crate::engine) fn incomplete_values(&self) -> impl Iterator<Item = (&Key, usize, Entry)> + '_ {
        self.manifests.iter().filter_map(|(identity, FoundLong { key, pieces, .. })| {
            let missing = pieces.iter().filter(|one| !self.chunks.contains_key(&one.id)).count();
            let entry = self.index.get(*identity)?;
            (missing > 0).then_some((key, missing, entry))
        })
    }

    /// Damage that keys are affected by, or may be.
    pub fn damage(&self) -> &[Damage] {
        &self.damage
    }

    /// Damaged bytes that nothing depends on any more that a client could ask for: records that were written over or deleted
    /// since, and padding.
    pub fn superseded(&self) -> &[Damage] {
        &self.superseded
    }

    /// Which shard it is.
    pub fn id(&self) -> ShardId {
        self.id
    }

    /// In what this state and another of the same shard, found another way, say different things about a key. One that has
    /// expired may be there or not. Where the same record may be in two places, it is read.
    pub fn difference<D: Device>(
        &self,
        other: &ShardState,
        device: &mut D,
        superblock: &Superblock,
        now_ms: u64,
    ) -> Result<Option<String>, IoError> {
        // A frame whose write failed may be there and in the next extent again: it is the same record.
        let anywhere = |chunk: &RecordRef| RecordRef { extent: 0, offset: 0, ..*chunk };
        let mut found = None;
        for one in [self, other] {
            if let Some(identity) = one.unnamed(superblock, now_ms) {
                return Ok(Some(format!(
                    "{identity:x?} is in the index, and its key is not in the directory"
                )));
            }
        }
        let mut elsewhere = Vec::new();
        for (one, another) in [(self, other), (other, self)] {
            one.each(&mut |identity, entry| {
                let expires_at_ms = one.expiries.get(identity);
                if found.is_some() || is_expired(expires_at_ms, now_ms) {
                    return;
                }
                let there = another.index.get(identity);
                let is_alike = there.is_some_and(|there| {
                    there.elsewhere(entry.extent, entry.offset) == *entry
                        && another.expiries.get(identity) == expires_at_ms
                });
                if !is_alike || entry.expires != (expires_at_ms != 0) {
                    found = Some(format!("{identity:x?}: {entry:?} and {there:?}"));
                    return;
                }
                elsewhere.extend(there.filter(|there| there != entry).map(|there| (*entry, there)));
                let (value, other_value) = (one.manifests.get(&identity), another.manifests.get(&identity));
                if value != other_value {
                    found = Some(format!("{identity:x?}: {value:?} and {other_value:?}"));
                }
                for piece in value.iter().flat_map(|value| &value.pieces) {
                    let (here, there) = (one.chunks.get(&piece.id), another.chunks.get(&piece.id));
                    if here.map(anywhere) != there.map(anywhere) {
                        found = Some(format!("{identity:x?}: chunk {}: {here:?} and {there:?}", piece.id));
                    }
                }
            });
            if found.is_some() {
                return Ok(found);
            }
            for (here, there) in elsewhere.drain(..) {
                let (read_here, read_there) =
                    (one.read(&here, device, superblock)?, another.read(&there, device, superblock)?);
                if read_here.is_none() || read_here != read_there {
                    let records = format!("{here:?} is {read_here:?} and {there:?} is {read_there:?}");
                    return Ok(Some(records));
                }
            }
        }
        Ok(None)
    }

    /// A key of the index that the directory does not have, unless it has expired.
    fn unnamed(&self, superblock: &Superblock, now_ms: u64) -> Option<Identity> {
        let directory = self.directory.as_ref()?;
        let mut named = Vec::new();
        directory.visit(&KeyRange::all(), Order::Ascending, &mut |key| {
            named.push(hash_key(&superblock.secret, key).identity());
            true
        });
        named.sort_unstable();
        let mut unnamed = None;
        self.each(&mut |identity, _| {
            if named.binary_search(&identity).is_err() && !is_expired(self.expiries.get(identity), now_ms) {
                unnamed = Some(identity);
            }
        });
        unnamed
    }

    /// The sequence and the key of a record.
    fn read<D: Device>(
        &self,
        entry: &Entry,
        device: &mut D,
        superblock: &Superblock,
    ) -> Result<Option<(u64, Key)>, IoError> {
        let Some(extent) = self.extents.get(entry.extent) else { return Ok(None) };
        let (offset, size, skip) = superblock.blocks_of(entry.extent, entry.offset, entry.size());
        let Some(bytes) = read_tried(device, offset, size)? else { return Ok(None) };
        let decoded = Record::decode(&bytes[skip..], extent.place, entry.offset).ok();
        Ok(decoded.map(|one| (one.record.sequence, Key::copy_from_slice(one.record.key))))
    }

    pub(super) fn each(&self, visit: &mut dyn FnMut(Identity, &Entry)) {
        self.index.each(visit);
    }
}
