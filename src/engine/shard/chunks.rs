//! Where a shard's chunks are, and what of them is live.
//!
//! Invariants:
//! - Every chunk that somebody refers to is here, from when it is appended.
//! - Those that are on the device, and only those, count in the live bytes of their extents.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Shard;
use crate::engine::index::{Identity, RecordRef};
use crate::engine::log::{Appended, Move, Moved};
use crate::engine::long::{ChunkRef, DeadChunks, LongValue};
use crate::engine::op::{Key, Value};

/// A chunk whose frame is not on the device yet.
struct Unwritten {
    at: Appended,
    bytes: Value,
}

/// Where a chunk's bytes are to be had.
pub(in crate::engine) enum ChunkSource {
    Memory(Value),
    Device(RecordRef),
}

/// The chunks of a shard. Ordered by their ids, so that a checkpoint can walk over them piece by piece.
#[derive(Default)]
pub(in crate::engine) struct Chunks {
    stored: BTreeMap<u64, RecordRef>,
    unwritten: BTreeMap<u64, Unwritten>,
    dead: Arc<DeadChunks>,
}

/// What a chunk takes in the tables.
const CHUNK_OVERHEAD: usize = 72;

impl Chunks {
    fn is_empty(&self) -> bool {
        self.stored.is_empty() && self.unwritten.is_empty()
    }

    /// Where values say that they do not need their chunks any more.
    pub(in crate::engine) fn dead(&self) -> &Arc<DeadChunks> {
        &self.dead
    }

    /// Bytes of memory that they take.
    pub(in crate::engine) fn heap_size(&self) -> usize {
        (self.stored.len() + self.unwritten.len()) * CHUNK_OVERHEAD
    }

    /// A chunk that is on the device.
    pub(in crate::engine) fn stored(&self, id: u64) -> Option<&RecordRef> {
        self.stored.get(&id)
    }

    /// Chunks that are on the device, from an id on.
    pub(in crate::engine) fn stored_from(&self, id: u64) -> impl Iterator<Item = (u64, &RecordRef)> {
        self.stored.range(id..).map(|(id, entry)| (*id, entry))
    }

    /// Where a chunk is.
    pub(in crate::engine) fn source(&self, id: u64) -> Option<ChunkSource> {
        if let Some(one) = self.unwritten.get(&id) {
            return Some(ChunkSource::Memory(one.bytes.clone()));
        }
        self.stored.get(&id).copied().map(ChunkSource::Device)
    }
}

impl Shard {
    /// The chunks.
    pub(in crate::engine) fn chunks(&self) -> &Chunks {
        &self.chunks
    }

    /// The value of a key whose newest record on the device is a manifest. None where that can't be read.
    pub(in crate::engine) fn long_value(&self, identity: Identity) -> Option<&Arc<LongValue>> {
        self.long.get(&identity).map(|one| &one.value)
    }

    /// Such a key.
    pub(in crate::engine) fn long_key(&self, identity: Identity) -> Option<&Key> {
        self.long.get(&identity).map(|one| &one.key)
    }

    /// The key whose value a chunk is of, by looking through all of them.
    pub(in crate::engine) fn key_of_chunk(&self, id: u64) -> Option<&Key> {
        let has_chunk = |value: &LongValue| value.pieces().iter().any(|one| one.id() == id);
        self.long.values().find(|one| has_chunk(&one.value)).map(|one| &one.key)
    }

    /// A chunk was appended.
    pub(in crate::engine) fn add_chunk(&mut self, id: u64, at: Appended, bytes: Value) -> Arc<ChunkRef> {
        self.chunks.unwritten.insert(id, Unwritten { at, bytes });
        self.log.note_chunk(id);
        ChunkRef::new(id, &self.chunks.dead)
    }

    /// Takes chunks that recovery found.
    pub(super) fn take_chunks(&mut self, chunks: BTreeMap<u64, RecordRef>) {
        for one in chunks.values() {
            self.count_live(&one.entry());
        }
        self.chunks.stored = chunks;
    }

    /// Chunks are on the device.
    pub(super) fn on_chunks_written(&mut self, ids: &[u64]) {
        for id in ids {
            // Dead already: it never counts.
            let Some(Unwritten { at, bytes }) = self.chunks.unwritten.remove(id) else { continue };
            let chunk = RecordRef {
                extent: at.extent,
                offset: at.offset,
                size: at.size,
                value_size: bytes.len() as u32,
                sequence: at.sequence,
                expires_at_ms: 0,
                is_part: false,
                is_long: false,
            };
            self.count_live(&chunk.entry());
            self.chunks.stored.insert(*id, chunk);
        }
    }

    /// Frames that were not written yet are elsewhere now.
    pub(super) fn on_chunks_relocated(&mut self, moves: &[Move]) {
        for one in self.chunks.unwritten.values_mut() {
            one.at = moves.iter().find_map(|one_move| one_move.target(&one.at)).unwrap_or(one.at);
        }
    }

    /// A chunk that garbage collection moved is written at its new place.
    pub(super) fn on_chunk_collected(&mut self, id: u64, moved: &Moved) {
        let Some(chunk) = self.chunks.stored.get_mut(&id) else { return };
        if (chunk.extent, chunk.offset) != (moved.from_extent, moved.from_offset) {
            return;
        }
        let before = *chunk;
        let at = &moved.at;
        let (extent, offset, size, sequence) = (at.extent, at.offset, at.size, at.sequence);
        *chunk = RecordRef { extent, offset, size, sequence, ..before };
        let after = *chunk;
        self.count_gone(&before.entry());
        self.count_live(&after.entry());
    }

    /// Chunks that nobody refers to any more are garbage.
    pub(in crate::engine) fn bury_chunks(&mut self) {
        if self.chunks.is_empty() {
            return;
        }
        while let Some(id) = self.chunks.dead.pop() {
            self.chunks.unwritten.remove(&id);
            if let Some(chunk) = self.chunks.stored.remove(&id) {
                self.count_gone(&chunk.entry());
            }
        }
    }

    /// After a FLUSHALL: extents count nothing any more, but what is still being read is still there.
    pub(super) fn recount_chunks(&mut self) {
        while let Some(id) = self.chunks.dead.pop() {
            self.chunks.unwritten.remove(&id);
            self.chunks.stored.remove(&id);
        }
        let stored: Vec<RecordRef> = self.chunks.stored.values().copied().collect();
        stored.iter().for_each(|chunk| self.count_live(&chunk.entry()));
    }
}
