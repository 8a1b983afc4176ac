//! From the scans of all shards to their states: records applied in order, batches decided, doubt settled.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

use super::frames::Found;
use super::history::{History, SeenRecord};
use super::survey::Survey;
use super::{Damage, Held, TornTail};
use crate::engine::allocator::{Allocator, CheckpointChain};
use crate::engine::extents::{Extent, Extents};
use crate::engine::index::{Directory, Expiries, HashIndex, Identity, Index, RecordRef, hash_key};
use crate::engine::log::{OpenExtent, ShardLog};
use crate::engine::op::{BatchId, ShardId};
use crate::engine::shard::ShardState;
use crate::engine::survivors::FoundUnits;
use crate::format::Place;
use crate::format::layout::{collection_extent_count, reserve_extent_count};
use crate::format::manifest::ManifestPiece;
use crate::format::record::RecordType;
use crate::format::retirement::Retirement;
use crate::format::superblock::Superblock;
use crate::planted::{Bug, is_planted};
use crate::probe::{self, Probe};

/// Records ahead of the one that is applied whose slots are fetched: what memory answers in the time of one.
const FETCH_AHEAD: usize = 12;

/// A part of a batch whose commit record may be in another shard.
pub(super) struct Part {
    pub(super) kind: RecordType,
    pub(super) key: Bytes,
    pub(super) record: RecordRef,
    pub(super) pieces: Option<Vec<ManifestPiece>>,
    pub(super) coordinator: ShardId,
}

/// A key whose record is a manifest that can be read: what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::engine) struct FoundLong {
    pub(in crate::engine) key: Bytes,
    /// Bytes of the value.
    pub(in crate::engine) size: u64,
    pub(in crate::engine) pieces: Vec<ManifestPiece>,
}

/// The newest record of a key, or of a chunk, that can't be read: it is lost as long as it is the newest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) enum Lost {
    /// Of the key with this identity, so many bytes into its extent.
    Key(Identity, u32),
    /// Of the chunk with this id.
    Chunk(u64, u32),
}

/// What the scan of one shard found.
pub struct ScannedShard {
    pub(super) id: ShardId,
    pub(super) index: HashIndex,
    /// The keys in order, where the device was formatted so.
    pub(super) directory: Option<Directory>,
    pub(super) expiries: Expiries,
    /// Long values.
    pub(super) manifests: BTreeMap<Identity, FoundLong>,
    /// Every chunk that was seen, the newest copy of each.
    pub(in crate::engine) chunks: BTreeMap<u64, RecordRef>,
    /// Those whose newest copy can't be read.
    pub(in crate::engine) damaged_chunks: BTreeSet<u64>,
    pub(super) parts: BTreeMap<BatchId, Vec<Part>>,
    /// Keys of which a record counted while a part was undecided, with the sequence of the last one: a part that is decided later
    /// may be older. Whatever came before all parts is older than each.
    pub(super) since_parts: BTreeMap<Identity, u64>,
    /// Batches that this shard's commit records name, with their participant counts.
    pub commits: Vec<(BatchId, u16)>,
    /// Batches that this shard has parts of.
    pub batches_seen: BTreeSet<BatchId>,
    /// What was lost.
    pub damage: Vec<Damage>,
    /// Where the log was cut.
    pub torn: Option<TornTail>,
    /// A block behind the last frame that can't be read: the log may go on there.
    pub(super) unreadable_tail: Option<Damage>,
    /// Frames accepted.
    pub frame_count: u64,
    /// Records in them.
    pub record_count: u64,
    /// Bytes of them, headers and padding included.
    pub log_bytes: u64,
    pub(super) places: BTreeMap<u32, Place>,
    /// Extents with accepted frames.
    pub(super) extents: BTreeMap<u32, Extent>,
    /// Frames that are not needed any more, and the frame that says so.
    pub(super) retired: (u64, Retirement),
    /// How far its units are.
    pub(super) units: FoundUnits,
    pub(super) open: Option<OpenExtent>,
    /// Extents that hold accepted frames: in use.
    pub used_extents: Vec<u32>,
    /// What can't be said because records were lost.
    pub(super) doubt: Doubt,
    pub(super) last_frame: u64,
    pub(super) last_boot: u64,
    /// The sequence behind the last accepted record.
    pub(super) accepted_sequence: u64,
    /// The highest sequence seen anywhere, cut frames included: none is ever issued again.
    pub(super) last_sequence: u64,
    pub(super) clean: bool,
    pub(super) history: History,
}

impl ScannedShard {
    /// Applies the records of a unit, which stands behind every frame that was read so far: each is the newest of its key whatever
    /// was lost before, and its sequence is that of when it was first written.
    pub(super) fn apply_survivors(&mut self, found: Vec<Found>, secret: &[u8; 16]) {
        if self.doubt.below > 0 {
            let keyed = |one: &&Found| matches!(one.kind, RecordType::Put | RecordType::Delete);
            let keys = found.iter().filter(keyed).map(|one| hash_key(secret, &one.key).identity());
            self.doubt.known.extend(keys);
        }
        self.apply_all(found, secret);
    }

    /// Applies records in order. What each will look up is fetched while others before it are applied.
    pub(super) fn apply_all(&mut self, found: Vec<Found>, secret: &[u8; 16]) {
        let identities: Vec<Identity> =
            found.iter().map(|one| hash_key(secret, &one.key).identity()).collect();
        let first = |count: usize| identities.iter().take(count);
        first(2 * FETCH_AHEAD).for_each(|one| self.index.prefetch_segment(*one));
        first(FETCH_AHEAD).for_each(|one| self.index.prefetch_slots(*one));
        for (at, one) in found.into_iter().enumerate() {
            if let Some(later) = identities.get(at + 2 * FETCH_AHEAD) {
                self.index.prefetch_segment(*later);
            }
            if let Some(next) = identities.get(at + FETCH_AHEAD) {
                self.index.prefetch_slots(*next);
            }
            self.apply(one, identities[at], secret);
        }
    }

    fn apply(&mut self, found: Found, identity: Identity, secret: &[u8; 16]) {
        self.record_count += 1;
        self.history.on_record(&found);
        let Found {
            kind,
            key,
            record,
            batch,
            participant_count,
            retired,
            chunk,
            pieces,
            stored_size,
            value_intact,
        } = found;
        if let Some(extent) = self.extents.get_mut(&record.extent) {
            let expires = record.expires_at_ms != 0;
            extent.count_carried(kind, batch.is_some(), record.size, stored_size, expires);
        }
        if let Some(id) = chunk {
            let copy = self.chunks.entry(id).or_insert(record);
            if record.sequence >= copy.sequence {
                *copy = record;
                if !value_intact {
                    self.damaged_chunks.insert(id);
                } else if !self.damaged_chunks.is_empty() {
                    self.damaged_chunks.remove(&id);
                }
            }
            return;
        }
        match (kind, batch) {
            (RecordType::Commit, Some((batch, _))) => {
                // A commit record with a damaged count still decides; the count serves the cross-check alone.
                let count = if value_intact { participant_count } else { 0 };
                self.commits.push((batch, count));
                // Whichever shard has decided, the parts of this one stand behind a record of its own.
                let parts = self.parts.remove(&batch).unwrap_or_default();
                self.apply_parts(parts, secret);
                if self.parts.is_empty() {
                    self.since_parts.clear();
                }
            }
            (RecordType::Retired, _) => {
                if let Some(retired) = retired {
                    self.retired.1 = retired;
                }
            }
            (RecordType::Clear, _) if is_planted(Bug::ForgetsClear) => {}
            (RecordType::Clear, _) => {
                self.index.clear();
                self.directory.iter_mut().for_each(Directory::clear);
                self.expiries = Expiries::default();
                self.manifests.clear();
                self.chunks.clear();
                self.parts.clear();
                self.since_parts.clear();
                self.doubt.clear_before(record.sequence);
            }
            (kind, Some((batch, coordinator))) => {
                self.batches_seen.insert(batch);
                self.parts.entry(batch).or_default().push(Part { kind, key, record, pieces, coordinator });
            }
            (kind, None) => self.apply_one(kind, &key, identity, record, pieces),
        }
    }

    fn apply_one(
        &mut self,
        kind: RecordType,
        key: &Bytes,
        identity: Identity,
        record: RecordRef,
        pieces: Option<Vec<ManifestPiece>>,
    ) {
        if let Some(pieces) = pieces {
            let found = FoundLong { key: key.clone(), size: u64::from(record.value_size), pieces };
            self.manifests.insert(identity, found);
        } else if !self.manifests.is_empty() {
            self.manifests.remove(&identity);
        }
        if let Some(directory) = &mut self.directory {
            match kind {
                RecordType::Put if is_planted(Bug::DirectoryIgnoresLog) => {}
                RecordType::Put => directory.insert(key),
                _ => directory.remove(key),
            }
        }
        let (before, expires_at_ms) = if kind == RecordType::Put {
            (self.index.insert(identity, record.entry()), record.expires_at_ms)
        } else {
            (self.index.remove(identity), 0)
        };
        if expires_at_ms != 0 || before.is_some_and(|before| before.expires) {
            self.expiries.set(identity, expires_at_ms);
        }
        if self.doubt.below > 0 && record.sequence >= self.doubt.below {
            self.doubt.known.insert(identity);
        }
        if !self.parts.is_empty() {
            self.note_since_parts(identity, record.sequence);
        }
    }

    /// A record of a key counts. What garbage collection has kept comes late with an early sequence: a delete that is only carried
    /// along is no reason for a part to win over what has replaced it since.
    fn note_since_parts(&mut self, identity: Identity, sequence: u64) {
        let newest = self.since_parts.entry(identity).or_insert(sequence);
        *newest = (*newest).max(sequence);
    }

    /// The sequence of the newest record of a key that counts, if any part could be older.
    fn newest_since_parts(&self, identity: Identity) -> u64 {
        self.since_parts.get(&identity).copied().unwrap_or(0)
    }

    fn apply_parts(&mut self, mut parts: Vec<Part>, secret: &[u8; 16]) {
        parts.sort_by_key(|part| part.record.sequence);
        for Part { kind, key, record, pieces, .. } in parts {
            let identity = hash_key(secret, &key).identity();
            let newest = self.newest_since_parts(identity);
            if record.sequence > newest || is_planted(Bug::LateCommitWins) {
                self.apply_one(kind, &key, identity, record, pieces);
                // Another part may still be decided.
                self.note_since_parts(identity, record.sequence);
            }
        }
    }

    /// Decides batches, with the commit records of every shard, and makes the shard's state.
    pub fn resolve(mut self, decisions: &Decisions, superblock: &Arc<Superblock>) -> ShardState {
        let parts = std::mem::take(&mut self.parts);
        let (decided, undecided): (Vec<_>, Vec<_>) = parts.into_iter().partition(|(batch, _)| {
            decisions.committed.contains(batch) || is_planted(Bug::CountsUndecidedParts)
        });
        // Only another shard's record decides these so far.
        let copies_due =
            decided.iter().filter_map(|(batch, parts)| Some((*batch, parts.first()?.coordinator))).collect();
        let decided = decided.into_iter().flat_map(|(_, parts)| parts).collect();
        self.apply_parts(decided, &superblock.secret);
        for part in undecided.into_iter().flat_map(|(_, parts)| parts) {
            probe::hit(Probe::UndecidedPartsDropped);
            let newest = self.newest_since_parts(hash_key(&superblock.secret, &part.key).identity());
            let is_newest = newest < part.record.sequence;
            if is_newest && decisions.doubtful.contains(&part.coordinator) {
                self.doubt.keys.insert(part.key);
            }
        }
        self.settle_chunks();
        let damage = std::mem::take(&mut self.damage);
        let (superseded, damage): (Vec<_>, Vec<_>) =
            damage.into_iter().partition(|one| self.is_superseded(one, &superblock.secret));
        let lost_manifests = self.lost_manifests(&damage, &superblock.secret);
        let log = ShardLog::new(
            self.id,
            Arc::clone(superblock),
            self.open,
            self.last_sequence + 1 + SEQUENCE_GAP,
            self.last_frame + 1,
            self.retired.1,
        );
        let mut extents = Extents::default();
        // Where damage left records of an extent without any of its frames, the extent is known by its place alone.
        for (number, place) in &self.places {
            let known = self.extents.remove(number).or_else(|| {
                self.used_extents.contains(number).then(|| Extent {
                    last_frame: Some(0),
                    carry_bytes: superblock.layout.extent_size,
                    ..Extent::new(*place, 0, 0, false)
                })
            });
            if let Some(extent) = known {
                extents.add(*number, extent);
            }
        }
        ShardState {
            id: self.id,
            index: self.index,
            directory: self.directory,
            expiries: self.expiries,
            manifests: self.manifests,
            chunks: self.chunks,
            log,
            units: self.units,
            extents,
            is_collectable: damage.iter().all(|one| matches!(one.held, Held::Value(_) | Held::Chunk(_))),
            lost_manifests,
            damage,
            superseded,
            copies_due,
            durable_frame: self.last_frame,
            clean: self.clean,
            doubt: self.doubt,
        }
    }

    /// Whether nothing that a client could ask for depends on damaged bytes, now that everything is known.
    fn is_superseded(&self, damage: &Damage, secret: &[u8; 16]) -> bool {
        let is_there =
            |extent: u32, offset: u32| (extent, u64::from(offset)) == (damage.extent, damage.offset);
        match &damage.held {
            Held::Anything => false,
            Held::Nothing => true,
            Held::Value(key) => {
                let entry = self.index.get(hash_key(secret, key).identity());
                entry.is_none_or(|entry| !is_there(entry.extent, entry.offset))
            }
            Held::Chunk(id) => self.chunks.get(id).is_none_or(|chunk| !is_there(chunk.extent, chunk.offset)),
            // Each says all that the ones before it did, or what they retired and is missing is damage of its own.
            Held::Retirement(frame) => self.retired.0 > *frame,
        }
    }

    /// Manifests among what is damaged, with their extents: nobody knows which chunks they name.
    fn lost_manifests(&self, damage: &[Damage], secret: &[u8; 16]) -> Vec<(u32, Lost)> {
        let manifest = |one: &Damage| {
            let Held::Value(key) = &one.held else { return None };
            let identity = hash_key(secret, key).identity();
            let entry = self.index.get(identity).filter(|entry| entry.is_long)?;
            Some((entry.extent, Lost::Key(identity, entry.offset)))
        };
        damage.iter().filter_map(manifest).collect()
    }

    /// Keeps the chunks that some value names. Those of a write that was cut short are named by none.
    fn settle_chunks(&mut self) {
        if self.chunks.is_empty() && self.manifests.is_empty() {
            return;
        }
        let mut named = BTreeSet::new();
        for (identity, found) in std::mem::take(&mut self.manifests) {
            let Some(entry) = self.index.get(identity) else { continue };
            let is_whole = found.pieces.iter().all(|one| self.chunks.contains_key(&one.id));
            // The chunks of a key that has expired are garbage before its record is. Its end is known again although the clock
            // may have been set back.
            let is_known = self.damage.iter().all(|one| one.held != Held::Anything);
            if !is_whole && entry.expires && is_known {
                probe::hit(Probe::ExpiredManifestDropped);
                self.index.remove(identity);
                self.directory.iter_mut().for_each(|directory| directory.remove(&found.key));
                self.expiries.remove(identity);
                continue;
            }
            named.extend(found.pieces.iter().map(|one| one.id));
            self.manifests.insert(identity, found);
        }
        let found = self.chunks.len();
        self.chunks.retain(|id, _| named.contains(id));
        probe::hit_if(self.chunks.len() < found, Probe::OrphanChunksDropped);
    }

    /// Which shard it is.
    pub fn id(&self) -> ShardId {
        self.id
    }

    /// Every record that counts of the keys that were watched, the oldest first.
    pub(in crate::engine) fn history(&self) -> &[SeenRecord] {
        &self.history.records
    }

    /// A block behind the last frame that can't be read: newer records than all others may be there.
    pub(in crate::engine) fn unreadable_tail(&self) -> Option<&Damage> {
        self.unreadable_tail.as_ref()
    }

    /// Whether a part of its log is not needed any more.
    pub fn has_retired(&self) -> bool {
        !self.retired.1.is_empty()
    }
}

/// The allocator as the scans found it.
pub fn rebuild_allocator(
    superblock: &Superblock,
    survey: &Survey,
    shards: &[ScannedShard],
    checkpoints: &[CheckpointChain],
) -> Allocator {
    let layout = superblock.layout;
    let reserve = reserve_extent_count(superblock.shard_count);
    let collection = collection_extent_count(superblock.shard_count);
    let allocator =
        Allocator::new(layout.extent_count, reserve, collection, superblock.boot, survey.ordinal_last);
    for shard in shards {
        for _ in shard.extents.values().filter(|extent| extent.is_reserve) {
            allocator.count_reserve(true);
        }
        for extent in &shard.used_extents {
            allocator.claim(*extent);
        }
    }
    for chain in checkpoints {
        if chain.extents.iter().all(|extent| allocator.claim(*extent)) {
            allocator.add_checkpoint(chain.clone());
        }
    }
    allocator
}

/// What keeps a device from being served: it can't be read, and newer records than all others may be there, of a shard
/// that would then write over them, or of any shard.
pub fn blocking_damage<'a>(survey: &'a Survey, shards: &'a [ScannedShard]) -> Option<&'a Damage> {
    let anywhere = survey.damage.iter().find(|one| one.shard.is_none());
    anywhere.or_else(|| shards.iter().find_map(|shard| shard.unreadable_tail.as_ref()))
}

/// Sequences that a start leaves out: a torn frame that nobody can read may have used some, and none is ever issued again.
pub(super) const SEQUENCE_GAP: u64 = 1 << 32;

/// What the commit records of all shards say about the batches.
#[derive(Debug, Default)]
pub struct Decisions {
    committed: BTreeSet<BatchId>,
    /// Shards that lost records, commit records perhaps among them.
    doubtful: BTreeSet<ShardId>,
}

impl Decisions {
    /// Whether a commit record decided this batch.
    pub fn is_committed(&self, batch: &BatchId) -> bool {
        self.committed.contains(batch)
    }

    /// Nothing is known of a shard: batches that it decided are in doubt.
    pub(in crate::engine) fn on_unknown_shard(&mut self, shard: ShardId) {
        self.doubtful.insert(shard);
    }
}

/// Which batches happened, with the commit records of every shard known.
pub fn committed_batches(shards: &[ScannedShard]) -> Decisions {
    Decisions {
        committed: shards.iter().flat_map(|shard| shard.commits.iter().map(|(batch, _)| *batch)).collect(),
        doubtful: shards.iter().filter(|shard| shard.doubt.below > 0).map(|shard| shard.id).collect(),
    }
}

/// What can't be said about keys because records were lost that may have been newer than those that are there. Such keys
/// answer that they are damaged, never with an old value and never with "not found".
#[derive(Debug, Default)]
pub struct Doubt {
    /// Records with lower sequences may have been replaced by lost ones, and keys without a record may have lost it.
    pub(in crate::engine) below: u64,
    /// Keys in doubt although their record is newer: their batch was decided by a lost record.
    pub(in crate::engine) keys: BTreeSet<Bytes>,
    /// Keys of which the newest record is known, whether it says that they are there or that they are not.
    pub(in crate::engine) known: BTreeSet<Identity>,
}

impl Doubt {
    /// Records with lower sequences were lost, and nothing that was seen so far is newer than they may have been.
    pub(super) fn raise_all(&mut self, below: u64) {
        self.below = self.below.max(below);
        self.known.clear();
    }

    /// A FLUSHALL: whatever was lost before it is dead as well, and what was lost behind it is not.
    fn clear_before(&mut self, sequence: u64) {
        if self.below <= sequence {
            *self = Doubt::default();
        } else {
            self.known.clear();
        }
    }

    /// Records with lower sequences were lost.
    pub(super) fn raise(&mut self, below: u64) {
        if below > self.below {
            self.below = below;
            // What was seen before may have been written again by what is lost.
            self.known.clear();
        }
    }

    /// Whether a key's newest record is known, or that it never had any, as far as sequences tell.
    pub(in crate::engine) fn is_known(&self, identity: Identity) -> bool {
        self.below == 0 || self.known.contains(&identity)
    }

    /// Whether anything is in doubt.
    pub(in crate::engine) fn is_any(&self) -> bool {
        self.below > 0 || !self.keys.is_empty()
    }
}
