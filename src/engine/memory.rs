//! What an engine may take of the node's memory, and what it refuses when there is no more.
//!
//! The node sets the budget and may change it on every loop. What grows with the number of keys (the index and the
//! expiries) is refused with an error where it would go beyond; the cache shrinks; reads wait.

use super::Engine;
use super::index::{Entry, KeyHash};
use super::op::{Key, KeyEffect, OpError, Value};
use crate::device::Device;
use crate::limits::ENGINE_READ_SIZE_MAX;

/// The engine's part of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryBudget {
    /// Bytes of the cache.
    pub cache_size_max: usize,
    /// Whether there may be more keys, or more keys with an expiry.
    pub index_may_grow: bool,
    /// Bytes of records that are read at a time; 0 lets one record after another be read.
    pub reads_size_max: usize,
    /// Bytes of values that all batches under way may hold; one batch alone may have more.
    pub batch_values_size_max: u64,
    /// Bytes of a long value that may be read in one piece.
    pub long_value_size_max: u64,
    /// Bytes of long values that are read at a time; more wait. One of a few MiB may always be read.
    pub long_reads_size_max: u64,
}

impl Default for MemoryBudget {
    /// As large as needed, but no cache.
    fn default() -> MemoryBudget {
        MemoryBudget {
            cache_size_max: 0,
            index_may_grow: true,
            reads_size_max: ENGINE_READ_SIZE_MAX,
            batch_values_size_max: u64::MAX,
            long_value_size_max: u64::MAX,
            long_reads_size_max: u64::MAX,
        }
    }
}

/// Where an engine's memory is, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct MemoryUse {
    /// The cache of records.
    pub cache: u64,
    /// The index and the expiries.
    pub index: u64,
    /// Frames that are being filled and values that are on their way to the device.
    pub log: u64,
    /// Records that are being read, values of batches under way, and values that wait for room in the log.
    pub reads: u64,
}

impl<D: Device> Engine<D> {
    /// Changes what the engine may take.
    pub fn set_memory(&mut self, budget: MemoryBudget) {
        if budget.cache_size_max != self.memory.cache_size_max {
            self.cache.set_size_max(budget.cache_size_max);
        }
        self.memory = budget;
    }

    /// What it takes now.
    pub fn memory_use(&self) -> MemoryUse {
        MemoryUse {
            cache: self.cache.size() as u64,
            index: self.shards.iter().map(|shard| shard.index_heap_size() as u64).sum(),
            log: self.shards.iter().map(|shard| shard.log_heap_size() as u64).sum(),
            reads: (self.reads_size + self.stalled_size) as u64
                + self.batch_values_size
                + self.long_reads_size,
        }
    }

    /// The value of a record that the index names, when it is in the cache.
    pub(super) fn cached(&mut self, hash: KeyHash, entry: &Entry) -> Option<Value> {
        self.cache.get(hash, entry.extent, entry.offset)
    }

    /// Bytes of values that another batch may read.
    pub(super) fn batch_values_room(&self) -> u64 {
        match self.batch_values_size {
            // Alone it may have all that one batch may.
            0 => u64::MAX,
            size => self.memory.batch_values_size_max.saturating_sub(size),
        }
    }

    /// The error for an effect that needs more memory than there may be.
    /// `expires_at_ms` is that of what is stored.
    pub(super) fn refuse_growth(&self, expires_at_ms: Option<u64>, effect: &KeyEffect) -> Option<OpError> {
        let expires_then_ms = effect.stored_expiry()?;
        let grows = expires_at_ms.is_none_or(|expires_at_ms| expires_at_ms == 0 && expires_then_ms != 0);
        // A long value has a place in memory for each of its chunks.
        let grows = grows || effect.value_size() as u64 > self.chunk_size;
        (grows && !self.memory.index_may_grow).then_some(OpError::OutOfMemory)
    }

    /// The same for the effects of a batch.
    pub(super) fn refuse_batch_growth(&self, at: usize, effects: &[(Key, KeyEffect)]) -> Option<OpError> {
        if self.memory.index_may_grow {
            return None;
        }
        effects
            .iter()
            .find_map(|(key, effect)| self.refuse_growth(self.shards[at].stored_expiry(key), effect))
    }
}
