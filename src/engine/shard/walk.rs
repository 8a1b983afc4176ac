//! Walks over a shard's keys, in the order of their hashes.

use super::Shard;
use crate::engine::action::is_expired;
use crate::engine::index::{Entry, Identity, Index};
use crate::engine::op::Key;

/// What a step of a scan found.
pub(in crate::engine) struct Scanned {
    /// The next cursor, 0 at the end.
    pub(in crate::engine) next: u64,
    /// Keys that are in memory: on their way to the device, or with a long value.
    pub(in crate::engine) keys: Vec<Key>,
    /// Where the others are to be read.
    pub(in crate::engine) stored: Vec<(Identity, Entry)>,
}

impl Shard {
    /// Visits what is on the device, and when it expires, from a cursor on, but for what will be replaced by what is on its way.
    /// Gives the next cursor, 0 at the end.
    pub(in crate::engine) fn walk(
        &self,
        cursor: u64,
        count: usize,
        visit: &mut dyn FnMut(Identity, &Entry, u64),
    ) -> u64 {
        self.index.scan(cursor, count, &mut |identity, entry| {
            if !self.pending.contains(identity) {
                visit(identity, entry, self.expiry_of(identity, entry));
            }
        })
    }

    /// Live keys from a cursor on, and the next cursor.
    pub(in crate::engine) fn scan(&self, cursor: u64, count: usize, now_ms: u64) -> Scanned {
        let (mut keys, mut stored) = (Vec::new(), Vec::new());
        let live = |expires_at_ms: u64| !is_expired(expires_at_ms, now_ms);
        let next = self.walk(cursor, count, &mut |identity, entry, expires_at_ms| {
            if !live(expires_at_ms) {
                return;
            }
            match self.long.get(&identity).filter(|_| entry.is_long) {
                Some(one) => keys.push(one.key.clone()),
                None => stored.push((identity, *entry)),
            }
        });
        // The pending set is small; its keys belong to the range of hashes that the index just covered.
        for (key, pending) in self.pending.iter() {
            let hash = pending.hash.upper();
            let in_range = hash >= cursor && (next == 0 || hash < next);
            if in_range && pending.value.is_some() && !pending.reaped && live(pending.expires_at_ms) {
                keys.push(key.clone());
            }
        }
        Scanned { next, keys, stored }
    }
}
