//! The memory of an index: granules of one size, kept close together.
//!
//! ```text
//! granule   [slot 0][slot 1] ... [slot 16][owner]      256 bytes: four cache lines
//! chunk     [granule] x 256                            64 KiB
//! ```
//!
//! Pieces of one size leave no holes that another piece does not fit into. When one is given back, the last one takes its
//! place, so that memory goes back to the system as keys go; whoever owns that one is told its new number.
//!
//! Invariants: granules 0 to `len` are somebody's, and nothing else is; no chunk but the last has room.

use super::slot::{SLOT_SIZE, Slot};
use crate::sys::heap::taken;

/// Slots in a granule.
pub(super) const GRANULE_SLOTS: usize = 17;

/// With the allocator's bytes for their alignment, 256 would take the next larger class of pages.
const CHUNK_GRANULES: usize = 255;

/// Slots, and whose they are.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Granule {
    pub(super) slots: [Slot; GRANULE_SLOTS],
    owner: u8,
}

#[cfg(test)]
impl Granule {
    pub(super) fn owner(&self) -> u8 {
        self.owner
    }
}

const GRANULE_SIZE: usize = std::mem::size_of::<Granule>();
const _: () = assert!(GRANULE_SIZE == 256 && GRANULE_SLOTS * SLOT_SIZE + 1 == GRANULE_SIZE);

type Chunk = Box<[Granule; CHUNK_GRANULES]>;

/// Granules by number.
#[derive(Default)]
pub(super) struct Granules {
    chunks: Vec<Chunk>,
    len: usize,
}

/// A granule that has another number now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Moved {
    pub(super) from: u32,
    pub(super) to: u32,
    pub(super) owner: u8,
}

fn new_chunk() -> Chunk {
    let empty = Granule { slots: [Slot::default(); GRANULE_SLOTS], owner: 0 };
    let chunk: Box<[Granule]> = vec![empty; CHUNK_GRANULES].into_boxed_slice();
    chunk.try_into().unwrap_or_else(|_| unreachable!("it was made of that length"))
}

impl Granules {
    #[inline]
    pub(super) fn get(&self, at: u32) -> &Granule {
        &self.chunks[at as usize / CHUNK_GRANULES][at as usize % CHUNK_GRANULES]
    }

    #[inline]
    pub(super) fn slots_mut(&mut self, at: u32) -> &mut [Slot; GRANULE_SLOTS] {
        &mut self.chunks[at as usize / CHUNK_GRANULES][at as usize % CHUNK_GRANULES].slots
    }

    /// One more, of whatever content.
    pub(super) fn add(&mut self, owner: u8) -> u32 {
        if self.len == self.chunks.len() * CHUNK_GRANULES {
            self.chunks.push(new_chunk());
        }
        let at = u32::try_from(self.len).expect("granules of 2^32 numbers are a terabyte");
        self.chunks[self.len / CHUNK_GRANULES][self.len % CHUNK_GRANULES].owner = owner;
        self.len += 1;
        at
    }

    /// Gives one back. Says which one took its number, where another did.
    #[must_use]
    pub(super) fn remove(&mut self, at: u32) -> Option<Moved> {
        self.len -= 1;
        let last = self.len as u32;
        let moved = (at != last).then(|| {
            let granule = *self.get(last);
            self.chunks[at as usize / CHUNK_GRANULES][at as usize % CHUNK_GRANULES] = granule;
            Moved { from: last, to: at, owner: granule.owner }
        });
        // One chunk more than needed stays, or the next key but one might have it come and go for ever.
        let needed = self.len.div_ceil(CHUNK_GRANULES) + 1;
        if self.chunks.len() > needed || self.len == 0 {
            self.chunks.truncate(if self.len == 0 { 0 } else { needed });
        }
        moved
    }

    /// Bytes that all of them take.
    pub(super) fn heap_size(&self) -> usize {
        let table = self.chunks.capacity() * std::mem::size_of::<Chunk>();
        self.chunks.len() * taken(CHUNK_GRANULES * GRANULE_SIZE) + if table == 0 { 0 } else { taken(table) }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.len
    }
}
