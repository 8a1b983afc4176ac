//! What is lost of a shard, and what of it has been superseded since: it is lost as long as it is the newest.

use super::Shard;
use crate::engine::index::{Index, RecordRef};
use crate::engine::recovery::Lost;

impl Shard {
    /// Whether garbage may be collected: it can be told from what was lost.
    pub(in crate::engine) fn is_collectable(&self) -> bool {
        let is_known = self.is_accounted_for && self.lost_manifests.is_empty();
        is_known && !self.is_in_doubt() && !self.has_unknown()
    }

    /// Whether a record that can't be read is still the newest of its key, or of its chunk.
    pub(in crate::engine) fn is_lost(&self, extent: u32, lost: Lost) -> bool {
        match lost {
            Lost::Key(identity, offset) => {
                self.index.get(identity).is_some_and(|entry| entry.is_at(extent, offset))
            }
            Lost::Chunk(id, offset) => {
                let chunk = self.chunks.stored(id).map(RecordRef::entry);
                chunk.is_some_and(|entry| entry.is_at(extent, offset))
            }
        }
    }

    /// Forgets the damaged manifests whose keys were written or deleted since.
    pub(in crate::engine) fn forget_superseded(&mut self) {
        let mut lost = std::mem::take(&mut self.lost_manifests);
        lost.retain(|(extent, lost)| self.is_lost(*extent, *lost));
        self.lost_manifests = lost;
    }
}
