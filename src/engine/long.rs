//! Long values: a value that is longer than one chunk is kept in chunks, each a record of its own, and named by its manifest,
//! which is what the index knows of the key.
//!
//! ```text
//! value    |  slot 0  |  slot 1  |  slot 2  |          a slot is as long as the longest chunk
//! pieces   [========] [====][=] .......... [==]        what no piece covers reads as zeros and is not stored
//! ```
//!
//! A chunk never changes. Writing a part of a value makes new chunks for the pieces that it touches, and a new manifest.
//!
//! Invariants:
//! - A chunk is live exactly as long as a `ChunkRef` to it exists: in a value that a key has, that a reader or a dump still
//!   reads, or that is being written. Whoever has a value may read it to its end, whatever becomes of the key.
//! - The record with the manifest is appended behind the chunks that it names, in the same log, so that recovery finds the old
//!   value or the new one.
//! - Pieces are ascending and do not overlap.

mod edit;

use std::ops::Range;
use std::sync::Arc;

use crossbeam_queue::SegQueue;

use crate::format::manifest::{self, ManifestPiece};

pub(super) use edit::{Edit, LongWrite, Part, copy_into};

/// Chunks that nobody refers to any more, for their shard to count as garbage.
pub(super) type DeadChunks = SegQueue<u64>;

/// Keeps a chunk alive. Values cross threads with batches, hence the queue.
pub(super) struct ChunkRef {
    id: u64,
    dead: Arc<DeadChunks>,
}

impl ChunkRef {
    pub(super) fn new(id: u64, dead: &Arc<DeadChunks>) -> Arc<ChunkRef> {
        Arc::new(ChunkRef { id, dead: Arc::clone(dead) })
    }
}

impl Drop for ChunkRef {
    fn drop(&mut self) {
        self.dead.push(self.id);
    }
}

/// A part of a long value: all that its chunk holds.
#[derive(Clone)]
pub(super) struct Piece {
    start: u32,
    size: u32,
    chunk: Arc<ChunkRef>,
}

impl Piece {
    pub(super) fn new(start: u32, size: u32, chunk: Arc<ChunkRef>) -> Piece {
        Piece { start, size, chunk }
    }

    /// Its chunk's id.
    pub(super) fn id(&self) -> u64 {
        self.chunk.id
    }

    /// Bytes from the value's start to it.
    pub(super) fn start(&self) -> u64 {
        u64::from(self.start)
    }

    /// Bytes from the value's start to its end.
    pub(super) fn end(&self) -> u64 {
        self.start() + u64::from(self.size)
    }

    /// Bytes of it.
    pub(super) fn size(&self) -> u64 {
        u64::from(self.size)
    }
}

/// A long value, without its bytes.
pub struct LongValue {
    size: u64,
    pieces: Vec<Piece>,
}

impl std::fmt::Debug for LongValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes in {} pieces", self.size, self.pieces.len())
    }
}

impl PartialEq for LongValue {
    /// Chunks never change: the same ones are the same bytes.
    fn eq(&self, other: &LongValue) -> bool {
        self.size == other.size && self.manifest_pieces().eq(other.manifest_pieces())
    }
}

impl LongValue {
    pub(super) fn new(size: u64, pieces: Vec<Piece>) -> LongValue {
        LongValue { size, pieces }
    }

    /// The value that recovery found, its chunks kept alive from now on.
    pub(super) fn found(size: u64, pieces: &[ManifestPiece], dead: &Arc<DeadChunks>) -> LongValue {
        let alive = |one: &ManifestPiece| Piece::new(one.start, one.size, ChunkRef::new(one.id, dead));
        LongValue { size, pieces: pieces.iter().map(alive).collect() }
    }

    /// Bytes of the value.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Pieces with bytes in this range.
    pub(super) fn overlapping(&self, range: &Range<u64>) -> &[Piece] {
        overlapping(&self.pieces, range)
    }

    fn manifest_pieces(&self) -> impl Iterator<Item = ManifestPiece> + '_ {
        self.pieces.iter().map(|one| ManifestPiece { start: one.start, size: one.size, id: one.id() })
    }

    /// What its record stores.
    pub(super) fn manifest(&self) -> Vec<u8> {
        manifest::encode(self.manifest_pieces())
    }

    /// Bytes of memory that it takes, about.
    pub(super) fn heap_size(&self) -> usize {
        const CHUNK_REF_SIZE: usize = 48;
        self.pieces.capacity() * (size_of::<Piece>() + CHUNK_REF_SIZE)
    }
}

fn overlapping<'a>(pieces: &'a [Piece], range: &Range<u64>) -> &'a [Piece] {
    if range.is_empty() {
        return &[];
    }
    let first = pieces.partition_point(|one| one.end() <= range.start);
    let last = pieces.partition_point(|one| one.start() < range.end);
    &pieces[first..last.max(first)]
}
