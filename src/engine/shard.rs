//! A shard's state in memory: the index, the pending set in front of it, holds on keys, watches and expiries.
//!
//! The pending set holds what was appended to the log but is not yet on the device, with the values, so that a key can
//! be read while its record's buffer is in flight. The index holds only what has been written.
//!
//! Invariants:
//! - A key is in the pending set exactly while its newest record's frame is not written.
//! - An operation that must wait between reading a key and writing it holds the key; whoever comes next waits in line.

mod chunks;
mod listing;
mod lookup;
mod lost;
mod maps;
mod pending;
mod pin;
mod reap;
mod state;
#[cfg(test)]
mod tests;
mod walk;
mod watch;

pub(super) use chunks::ChunkSource;
pub use state::ShardState;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::action::is_expired;
use super::cache::RecordCache;
use super::extents::Extents;
use super::index::{Directory, Entry, Expiries, HashIndex, Identity, Index, KeyHash, hash_key};
use super::log::{Appended, Move, Moved, NewEntry, OpenExtent, Relocated, ShardLog};
use super::long::LongValue;
use super::op::{Answer, BatchId, Key, KeyEffect, ShardId, Value};
use super::recovery::{Doubt, FoundLong, Lost};
use super::survivors::Survivors;
use crate::format::Place;
use crate::format::record::{Record, RecordType};
use crate::format::superblock::Superblock;
use crate::planted::{Bug, is_planted};

use chunks::Chunks;
use maps::{IdentityMap, SecretHash, UpperBits};
use pending::PendingSet;
use pin::Pin;
use watch::Watch;

pub(super) use listing::Listed;
pub(super) use lookup::Lookup;
pub(super) use maps::KeyMap;
pub(super) use pin::{Before, Pinned};
pub(super) use walk::Scanned;

/// A value that a key has.
#[derive(Debug, Clone)]
pub(super) enum Stored {
    /// In memory.
    Plain(Value),
    /// In chunks.
    Long(Arc<LongValue>),
}

/// A key whose record on the device is the manifest of its value.
struct LongKey {
    key: Key,
    value: Arc<LongValue>,
}

impl LongKey {
    fn heap_size(&self) -> usize {
        2 * size_of::<(Identity, LongKey)>() + self.key.len() + self.value.heap_size()
    }
}

impl Stored {
    fn size(&self) -> u64 {
        match self {
            Stored::Plain(value) => value.len() as u64,
            Stored::Long(value) => value.size(),
        }
    }
}

/// The newest state of a key whose record is not written yet.
pub(super) struct Pending {
    pub(super) value: Option<Stored>,
    pub(super) expires_at_ms: u64,
    pub(super) at: Appended,
    hash: KeyHash,
    /// Expired and reaped: absent, whatever the record says.
    reaped: bool,
    /// Its record is a part of a batch.
    is_part: bool,
}

/// Operations waiting for a key.
#[derive(Default)]
pub(super) struct Hold {
    pub(super) waiters: VecDeque<usize>,
}

/// Answers that wait for a frame.
pub(super) type Waiters = BTreeMap<u64, Vec<(u64, Answer)>>;

/// Records that are settled together: what each needs is fetched for all of them first.
const PREFETCHED_COUNT: usize = 64;

/// A FLUSHALL: extents older than its own hold nothing any more.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cleared {
    pub(super) frame: u64,
    pub(super) extent: u32,
}

/// One shard.
pub(super) struct Shard {
    pub(super) id: ShardId,
    superblock: Arc<Superblock>,
    index: HashIndex,
    /// The names of the keys in the index, in order, where the device was formatted so.
    directory: Option<Directory>,
    /// The values of the keys whose record in the index is a manifest. By identity, as is everything that goes with the index.
    long: IdentityMap<LongKey>,
    long_heap_size: usize,
    chunks: Chunks,
    pending: PendingSet,
    pub(super) holds: KeyMap<Hold>,
    /// Operations that wait for room in the log, in order.
    pub(super) stalled: VecDeque<usize>,
    /// Operations that wait behind a Clear or Close; that is the first.
    pub(super) gate: VecDeque<usize>,
    pub(super) log: ShardLog,
    pub(super) survivors: Survivors,
    pub(super) extents: Extents,
    /// Of everything that is damaged it is known whose it is.
    is_accounted_for: bool,
    /// There was a FLUSHALL, and an extent begins with this frame, which is that of the FLUSHALL or one before it: everything from
    /// before the extent can be retired, what was lost among it.
    pub(super) writes_off_before: Option<u64>,
    /// Manifests that can't be read, with their extents, as long as they are the newest records of their keys.
    lost_manifests: Vec<(u32, Lost)>,
    pub(super) copies_due: Vec<(BatchId, ShardId)>,
    /// Batches that this shard decided and whose parts are not yet known to stand without it.
    pub(super) unsettled: BTreeSet<BatchId>,
    /// The last FLUSHALL, while extents from before it are still there.
    pub(super) cleared: Option<Cleared>,
    /// Bytes that garbage collection could free, as the allocator was told.
    pub(super) reclaimable: u64,
    watches: IdentityMap<Watch>,
    version: u64,
    /// When keys expire: as their newest records say, on the device or not.
    expiries: Expiries,
    live: u64,
    live_bytes: u64,
    /// Extent and start of the frame that is on its way to the device.
    pub(super) being_written: Option<(u32, u32)>,
    /// Frames up to this one are on the device, maybe in its volatile cache.
    pub(super) written_frame: u64,
    /// Frames up to this one are durable.
    pub(super) durable_frame: u64,
    /// The frame of the last Clear.
    clear_frame: u64,
    /// Answers that wait for a frame to be durable.
    pub(super) waiters: Waiters,
    /// Keys whose last write ended in an unknown outcome.
    unknown: KeyMap<()>,
    /// A Clear ended in an unknown outcome: nothing can be said about any key.
    unknown_all: bool,
    /// The last frame on the device was written by a clean stop.
    pub(super) clean: bool,
    /// What can't be said because records were lost.
    doubt: Doubt,
    /// The shard as it was at one moment, for a dump.
    pin: Option<Box<Pin>>,
}

impl Shard {
    pub(super) fn new(mut state: ShardState, superblock: Arc<Superblock>) -> Shard {
        let hash = SecretHash(superblock.secret);
        let mut live_bytes = 0;
        let mut extents = std::mem::take(&mut state.extents);
        // By number rather than by looking each up in a tree: there are as many entries as keys.
        let mut live: Vec<(u64, u64)> = vec![(0, 0); extents.number_end()];
        state.each(&mut |_, entry| {
            let size = u64::from(entry.size());
            live_bytes += size;
            if let Some((bytes, parts)) = live.get_mut(entry.extent as usize) {
                *bytes += size;
                *parts += u64::from(entry.is_part);
            }
        });
        extents.add_live(&live);
        let chunks = Chunks::default();
        let mut long = IdentityMap::with_hasher(UpperBits);
        let mut long_heap_size = 0;
        for (identity, FoundLong { key, size, pieces }) in std::mem::take(&mut state.manifests) {
            let value = Arc::new(LongValue::found(size, &pieces, chunks.dead()));
            let one = LongKey { key, value };
            long_heap_size += one.heap_size();
            long.insert(identity, one);
        }
        let mut shard = Shard {
            id: state.id,
            live: state.index.len(),
            index: state.index,
            directory: state.directory,
            long,
            long_heap_size,
            chunks,
            pending: PendingSet::default(),
            holds: KeyMap::with_hasher(hash),
            stalled: VecDeque::new(),
            gate: VecDeque::new(),
            survivors: Survivors::new(
                state.id,
                Arc::clone(&superblock),
                state.units,
                state.log.retired().mark,
            ),
            log: state.log,
            extents,
            is_accounted_for: state.is_collectable,
            writes_off_before: None,
            lost_manifests: state.lost_manifests,
            copies_due: state.copies_due,
            unsettled: BTreeSet::new(),
            cleared: None,
            reclaimable: 0,
            watches: IdentityMap::with_hasher(UpperBits),
            version: 0,
            expiries: state.expiries,
            live_bytes,
            being_written: None,
            written_frame: state.durable_frame,
            durable_frame: state.durable_frame,
            clear_frame: 0,
            waiters: Waiters::new(),
            unknown: KeyMap::with_hasher(hash),
            unknown_all: false,
            clean: state.clean,
            doubt: state.doubt,
            pin: None,
            superblock,
        };
        shard.take_chunks(state.chunks);
        shard
    }

    pub(super) fn hash(&self, key: &[u8]) -> KeyHash {
        hash_key(&self.superblock.secret, key)
    }

    /// Keys that are there. Expired ones that were not reaped yet count, as in Redis; callers reap first.
    pub(super) fn live(&self) -> u64 {
        self.live
    }

    /// Bytes of the newest records that are on the device.
    pub(super) fn live_bytes(&self) -> u64 {
        self.live_bytes
    }

    /// The expiry of a key that is stored, past or not; 0 for none.
    pub(super) fn stored_expiry(&self, key: &Key) -> Option<u64> {
        let hash = self.hash(key);
        match self.pending.at(hash.identity()) {
            Some((_, pending)) => {
                (pending.value.is_some() && !pending.reaped).then_some(pending.expires_at_ms)
            }
            None => {
                let entry = self.index.get(hash.identity())?;
                Some(self.expiry_of(hash.identity(), &entry))
            }
        }
    }

    /// When a key expires whose newest record is on the device; 0 for never.
    fn expiry_of(&self, identity: Identity, entry: &Entry) -> u64 {
        if entry.expires { self.expiries.get(identity) } else { 0 }
    }

    /// Extents of the log, but those that were left after a failed write.
    pub(super) fn extents_held(&self) -> u32 {
        let open = self.log.open_extent().map(|open| open.header.extent);
        let is_new = open.is_some_and(|open| self.extents.get(open).is_none());
        let held = self.extents.iter().filter(|(_, one)| !one.is_left).count();
        held as u32 + u32::from(is_new)
    }

    /// Bytes of memory that grow with the number of keys.
    pub(super) fn index_heap_size(&self) -> usize {
        let long = self.chunks.heap_size() + self.long_heap_size;
        let names = self.directory.as_ref().map_or(0, Directory::heap_size);
        self.index.heap_size() + names + self.expiries.heap_size() + self.pin_size() + long
    }

    /// Bytes of memory of what is on its way to the device.
    pub(super) fn log_heap_size(&self) -> usize {
        self.log.staged_size() + self.pending.heap_size() + self.survivors.heap_size()
    }

    /// The place that records of an extent were written for.
    pub(super) fn place_of(&self, extent: u32) -> Option<Place> {
        if let Some(open) = self.log.open_extent()
            && open.header.extent == extent
        {
            return Some(open.place);
        }
        self.extents.get(extent).map(|one| one.place)
    }

    /// Bytes from an extent's start to what is being written there, or will be. Sizes that the index gives are rounded up, and what
    /// is behind a record may be on its way.
    pub(super) fn readable_end(&self, extent: u32) -> u32 {
        let open = self.log.open_extent().filter(|open| open.header.extent == extent);
        match self.being_written {
            _ if is_planted(Bug::ReadsIntoWrites) => u32::MAX,
            Some((one, start)) if one == extent => start,
            _ if let Some(one) = self.extents.get(extent).filter(|one| !one.is_log()) => one.end as u32,
            _ => open.map_or(u32::MAX, |open| open.position as u32),
        }
    }

    /// Notes how far the open extent is filled.
    pub(super) fn note_filled(&mut self) {
        if let Some(open) = self.log.open_extent().copied() {
            self.note_open(&open).end = open.position;
        }
    }

    fn note_open(&mut self, open: &OpenExtent) -> &mut super::extents::Extent {
        let header = &open.header;
        let (number, epoch, first_frame) = (header.extent, header.epoch, header.first_frame);
        let extent = self.extents.open(number, open.place, epoch, first_frame, header.reserve);
        extent.ordinal = header.ordinal;
        extent
    }

    /// Notes a record that was appended.
    pub(super) fn note_appended(&mut self, record: &Record<'_>, at: &Appended) {
        let Some(open) = self.log.open_extent().copied() else { return };
        let extent = self.note_open(&open);
        let (is_part, value_size) = (record.batch.is_some(), record.value.len() as u32);
        extent.count_carried(record.kind, is_part, at.size, value_size, record.expires_at_ms != 0);
        if record.kind == RecordType::Clear {
            self.cleared = Some(Cleared { frame: at.frame, extent: at.extent });
        }
    }

    /// Where the keys' records are, of those that are on the device.
    pub(super) fn index(&self) -> &HashIndex {
        &self.index
    }

    /// The entry of a key whose newest record is on the device.
    pub(super) fn entry(&self, key: &[u8]) -> Option<Entry> {
        self.index.get(self.hash(key).identity())
    }

    /// What is on the device of a key with this identity, unless something newer is on its way.
    pub(super) fn settled(&self, identity: Identity) -> Option<Entry> {
        self.index.get(identity).filter(|_| !self.pending.contains(identity))
    }

    /// Makes an appended effect the key's newest state.
    pub(super) fn install(
        &mut self,
        hash: KeyHash,
        key: Key,
        effect: KeyEffect,
        at: Appended,
        is_part: bool,
    ) {
        let identity = hash.identity();
        self.touch(identity);
        if self.is_in_doubt() {
            self.doubt.keys.remove(&key);
            // Its older records do not matter any more.
            self.doubt.known.insert(identity);
        }
        self.note_before(identity);
        // Whether anything was there, and whether it would have expired.
        let (was_there, did_expire) = match self.pending.at(identity) {
            Some((_, pending)) => {
                let was_there = pending.value.is_some() && !pending.reaped;
                (was_there, was_there && pending.expires_at_ms != 0)
            }
            None => self.index.get(identity).map_or((false, false), |entry| (true, entry.expires)),
        };
        let (value, expires_at_ms) = match effect {
            KeyEffect::Put { value, expires_at_ms } => (Some(Stored::Plain(value)), expires_at_ms),
            KeyEffect::Long { value, expires_at_ms } => (Some(Stored::Long(value)), expires_at_ms),
            KeyEffect::Delete => (None, 0),
        };
        self.live = self.live + u64::from(value.is_some()) - u64::from(was_there);
        let is_kept = is_planted(Bug::KeepsOldExpiry) && value.is_some();
        if (did_expire && !is_kept) || expires_at_ms != 0 {
            self.expiries.set(identity, expires_at_ms);
        }
        let pending = Pending { value, expires_at_ms, at, hash, reaped: false, is_part };
        if at.frame <= self.written_frame {
            self.settle(&key, &pending);
            self.pending.remove(identity);
        } else {
            self.pending.insert(key, pending);
        }
    }

    /// A record of the device counts from now on.
    fn count_live(&mut self, entry: &Entry) {
        self.live_bytes += u64::from(entry.size());
        self.extents.on_entry(entry);
    }

    /// It does not any more.
    fn count_gone(&mut self, entry: &Entry) {
        self.live_bytes -= u64::from(entry.size());
        self.extents.on_gone(entry);
    }

    /// Moves a written state into the index.
    fn settle(&mut self, key: &Key, pending: &Pending) {
        let identity = pending.hash.identity();
        let before = match &pending.value {
            Some(value) if !pending.reaped => {
                let is_long = matches!(value, Stored::Long(_));
                let entry = pending.at.entry(pending.expires_at_ms != 0, pending.is_part, is_long);
                self.count_live(&entry);
                if !(pending.is_part && is_planted(Bug::DirectoryForgetsKey)) {
                    self.name(key);
                }
                self.index.insert(identity, entry)
            }
            _ => {
                self.unname(key);
                self.index.remove(identity)
            }
        };
        if let Some(before) = before {
            self.count_gone(&before);
            self.forget_long(identity, &before);
        }
        if let Some(Stored::Long(value)) = &pending.value
            && !pending.reaped
        {
            // A copy of its own: the key may sit in a larger allocation.
            let one = LongKey { key: Key::copy_from_slice(key), value: value.clone() };
            self.long_heap_size += one.heap_size();
            self.long.insert(identity, one);
        }
    }

    /// A record that garbage collection moved is written at its new place.
    pub(super) fn on_collected(&mut self, moved: &Moved, cache: &mut RecordCache) {
        if let Some(id) = moved.chunk {
            return self.on_chunk_collected(id, moved);
        }
        let identity = moved.hash.identity();
        let Some(before) = self.index.get(identity) else { return };
        // Whoever wrote the key since is newer than the copy. Nothing else can be where it was: its extent is still in use.
        if !before.is_at(moved.from_extent, moved.from_offset) {
            return;
        }
        let entry = moved.at.entry(before.expires, false, before.is_long);
        self.index.insert(identity, entry);
        cache.on_moved(moved.hash, &before, &entry);
        self.count_gone(&before);
        self.count_live(&entry);
    }

    /// A frame, and what was appended behind it, are elsewhere now.
    pub(super) fn on_moved(&mut self, left: u32, relocated: &Relocated) {
        let moves: &[Move] = &relocated.moves;
        let placed = &relocated.placed;
        self.being_written = Some((placed.extent, placed.start()));
        self.extents.on_relocated(left, placed.frame());
        // What it carries is not counted again: it is too much rather than too little.
        let extent =
            self.extents.open(placed.extent, placed.place, placed.epoch(), placed.frame(), placed.is_reserve);
        extent.carry_bytes = placed.size();
        extent.carry_parts = 1;
        extent.end = u64::from(placed.end());
        if let Some(open) = self.log.open_extent().copied() {
            let staged = self.log.staged_size() as u64;
            let extent = self.note_open(&open);
            extent.carry_bytes += staged;
            extent.carry_parts += 1;
        }
        if let Some(cleared) = &mut self.cleared
            && cleared.frame >= placed.frame()
        {
            // Where its record is now does not matter enough to follow it: the extents are collected one by one.
            self.cleared = None;
        }
        if let Some(first) = &mut self.writes_off_before {
            // Its extent may be gone: it is in that of this frame then, which was written in this start, so nothing of it is lost.
            *first = (*first).min(placed.frame());
        }
        for pending in self.pending.values_mut().filter(|_| !is_planted(Bug::RelocationLeavesKeys)) {
            pending.at = moves.iter().find_map(|one| one.target(&pending.at)).unwrap_or(pending.at);
        }
        self.on_chunks_relocated(moves);
    }

    /// A frame is on the device: its records can be read from there.
    pub(super) fn on_written(
        &mut self,
        frame: u64,
        entries: &[NewEntry],
        chunks: &[u64],
        moved: &[Moved],
        cache: &mut RecordCache,
    ) {
        self.written_frame = self.written_frame.max(frame);
        self.being_written = None;
        self.on_chunks_written(chunks);
        for one in moved {
            self.on_collected(one, cache);
        }
        for some in entries.chunks(PREFETCHED_COUNT) {
            some.iter().for_each(|one| self.index.prefetch_segment(one.hash.identity()));
            some.iter().for_each(|one| self.index.prefetch_slots(one.hash.identity()));
            some.iter().for_each(|one| cache.prefetch(one.hash));
            for NewEntry { hash, sequence } in some {
                let is_newest = |pending: &Pending| pending.at.sequence == *sequence;
                let Some((key, pending)) = self.pending.remove_if(*hash, is_newest) else { continue };
                self.settle(&key, &pending);
                match pending.value {
                    Some(Stored::Plain(value)) if !pending.reaped => {
                        cache.insert_written(pending.hash, pending.at.extent, pending.at.offset, value);
                    }
                    _ => cache.remove(pending.hash),
                }
            }
        }
    }

    /// Drops every key. The record that says so is in `frame`.
    pub(super) fn clear(&mut self, frame: u64) {
        let watched: Vec<Identity> = self.watches.keys().copied().collect();
        for identity in watched {
            if self.pending.contains(identity) || self.index.get(identity).is_some() {
                self.touch(identity);
            }
        }
        self.lose_pin("a FLUSHALL came in between");
        self.index.clear();
        self.directory.iter_mut().for_each(Directory::clear);
        self.extents.on_clear();
        self.pending.clear();
        self.expiries = Expiries::default();
        self.long.clear();
        self.long_heap_size = 0;
        self.live = 0;
        self.live_bytes = 0;
        self.recount_chunks();
        self.doubt = Doubt::default();
        self.clear_frame = frame;
    }

    /// After a failed write or flush: what was pending may or may not be there after a restart.
    pub(super) fn poison(&mut self) {
        self.lose_pin("the device failed a write");
        for (key, pending) in self.pending.drain() {
            if pending.value.is_some() && !pending.reaped {
                self.live -= 1;
                self.expiries.remove(pending.hash.identity());
            }
            // What it replaces is no more known to be there than it is itself.
            let identity = pending.hash.identity();
            self.unname(&key);
            if let Some(entry) = self.index.remove(identity) {
                self.count_gone(&entry);
                self.forget_long(identity, &entry);
            }
            self.unknown.insert(key, ());
        }
        self.unknown_all |= self.clear_frame > self.durable_frame;
    }

    /// Marks one more key whose outcome only a restart tells.
    pub(super) fn mark_unknown(&mut self, key: Key) {
        self.unknown.insert(key, ());
    }

    /// The frame that an answer about the whole shard rests on.
    pub(super) fn depends_on_all(&self) -> u64 {
        let pending = if self.pending.is_empty() { 0 } else { self.log.last_frame() };
        pending.max(self.clear_frame)
    }
}
