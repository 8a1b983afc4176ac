//! Keys that have expired, and what goes with an entry that leaves the index.

use super::{Shard, is_expired};
use crate::engine::index::{Entry, Identity, Index};
use crate::planted::{Bug, is_planted};

impl Shard {
    /// Forgets an expired key. Nothing is logged: its record says itself when it ends. The directory keeps its name for a while.
    pub(super) fn reap(&mut self, identity: Identity) {
        self.touch(identity);
        if let Some(pending) = self.pending.get_mut(identity) {
            if pending.value.is_some() && !pending.reaped {
                pending.reaped = true;
                self.live -= 1;
                self.expiries.remove(identity);
            }
        } else {
            self.expiries.remove(identity);
            if let Some(entry) = self.index.remove(identity) {
                self.live -= 1;
                self.count_gone(&entry);
                self.forget_long(identity, &entry);
            }
        }
    }

    /// An entry has gone from the index, and its value with it.
    pub(super) fn forget_long(&mut self, identity: Identity, entry: &Entry) {
        if entry.is_long
            && let Some(one) = self.long.remove(&identity)
        {
            self.long_heap_size -= one.heap_size();
            if is_planted(Bug::BuriesChunksUnderReader) {
                one.value.pieces().iter().for_each(|piece| self.chunks.dead().push(piece.id()));
            }
        }
    }

    /// Reaps up to `count` keys that have expired. True when more may be due.
    pub(in crate::engine) fn reap_expired(&mut self, now_ms: u64, count: usize) -> bool {
        for _ in 0..count {
            match self.expiries.first() {
                Some((at, identity)) if is_expired(at, now_ms) => self.reap(identity),
                _ => return false,
            }
        }
        true
    }

    /// The last millisecond in which the next key to expire still lives.
    pub(in crate::engine) fn next_expiry_ms(&self) -> Option<u64> {
        self.expiries.first().map(|(at, _)| at)
    }
}
