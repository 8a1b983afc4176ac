//! What is lost of a shard, and what of it has been superseded since: it is lost as long as it is the newest.

use super::Shard;
use crate::engine::allocator::{Allocator, Purpose};
use crate::engine::extents::Extent;
use crate::engine::index::{Index, RecordRef};
use crate::engine::log::NoRoom;
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

    /// Before a FLUSHALL of a shard that lost records of unknown keys: its record is to begin an extent, or the extent that it is in, of
    /// which something may be lost as well, would have to stay.
    pub(in crate::engine) fn begin_writing_off(&mut self, allocator: &Allocator) -> Result<(), NoRoom> {
        match self.is_accounted_for {
            true => Err(NoRoom::Full),
            false => self.log.begin_extent(Purpose::Reserve, allocator),
        }
    }

    /// Whether such a FLUSHALL is not durable yet.
    pub(in crate::engine) fn waits_to_write_off(&self) -> bool {
        self.writes_off_before.is_some() && self.clear_frame > self.durable_frame
    }

    /// After that FLUSHALL nothing from before its extent is needed, whether it is there or not. Logs that all of it is retired, found or
    /// lost, once the FLUSHALL is durable and nobody rests on anything older.
    pub(in crate::engine) fn write_off(&mut self, allocator: &Allocator) -> Option<Result<(), NoRoom>> {
        let first = self.writes_off_before?;
        if self.waits_to_write_off() || !self.unsettled.is_empty() || self.survivors.is_busy() {
            return None;
        }
        let is_old = |one: &Extent| !one.is_log() || one.first_frame < first;
        // Somebody may still read a long value.
        if self.extents.iter().any(|(_, one)| is_old(one) && one.live_bytes > 0) {
            return None;
        }
        let last_unit = self.survivors.last().max(self.log.retired().mark.last);
        let units = (last_unit > 0).then_some((1, last_unit));
        let appended = match self.log.retire([(1, first - 1)], units, allocator) {
            Ok(appended) => appended,
            Err(error) => return Some(Err(error)),
        };
        self.extents.close_survivors(last_unit);
        self.survivors.close();
        self.extents.retire_all(is_old, appended.frame);
        self.writes_off_before = None;
        self.is_accounted_for = true;
        self.clean = false;
        Some(Ok(()))
    }

    /// Forgets the damaged manifests whose keys were written or deleted since.
    pub(in crate::engine) fn forget_superseded(&mut self) {
        let mut lost = std::mem::take(&mut self.lost_manifests);
        lost.retain(|(extent, lost)| self.is_lost(*extent, *lost));
        self.lost_manifests = lost;
    }
}
