//! What a shard does for a scan: walk the index, and read the keys; and for a listing, which is from memory.
//!
//! Whatever becomes of the keys while they are read: those that were there throughout are in the answer.

use super::*;
use crate::engine::op::{KeyRange, Order};
use crate::engine::shard::{Listed, Scanned};

/// A step of a scan, some of whose keys are being read.
pub(in crate::engine) struct Scanning {
    next: u64,
    keys: Vec<Key>,
    depends_on: u64,
    reads_left: usize,
    /// Why not all of them can be named.
    error: Option<OpError>,
}

impl<D: Device> Engine<D> {
    pub(super) fn scan(
        &mut self,
        at: usize,
        token: u64,
        cursor: u64,
        count: usize,
        prefix: Option<Key>,
        clock: Clock,
    ) {
        let shard = &self.shards[at];
        let of_prefix = prefix.and_then(|prefix| shard.scan_prefix(cursor, count, &prefix, clock.unix_ms));
        let Scanned { next, keys, stored } =
            of_prefix.unwrap_or_else(|| shard.scan(cursor, count, clock.unix_ms));
        let depends_on = self.shards[at].depends_on_all();
        let scanning = Scanning { next, keys, depends_on, reads_left: stored.len(), error: None };
        if stored.is_empty() {
            return self.finish_scan(at, token, scanning);
        }
        let id = self.suspend(at, token, State::Scanning(Box::new(scanning)));
        for (identity, entry) in stored {
            self.start_read(at, Wanted::KeyOf(identity), &entry, ReadFor::Scan(id));
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of the operation")]
    pub(super) fn list(
        &mut self,
        at: usize,
        token: u64,
        range: &KeyRange,
        order: Order,
        count: usize,
        size_max: usize,
        clock: Clock,
    ) {
        match self.shards[at].list(range, order, count, size_max, clock.unix_ms) {
            Some(Listed { keys, next }) => {
                let depends_on = self.shards[at].depends_on_all();
                self.answer_after(at, token, depends_on, Answer::Listed { keys, next });
            }
            None => self.answers.push((token, Answer::Failed(OpError::NotOrdered))),
        }
    }

    /// One of the keys that `Scanning` waited for is there, or can't be had.
    pub(in crate::engine) fn on_scan_read(&mut self, id: usize, key: Result<Key, OpError>) {
        let Some(operation) = self.operations.get_mut(id) else { return };
        let State::Scanning(scanning) = &mut operation.state else { return };
        match key {
            Ok(key) => scanning.keys.push(key),
            Err(error) => scanning.error = Some(error),
        }
        scanning.reads_left -= 1;
        if scanning.reads_left == 0 {
            let Operation { token, shard, state } = self.operations.remove(id);
            if let State::Scanning(scanning) = state {
                self.finish_scan(shard, token, *scanning);
            }
        }
    }

    fn finish_scan(&mut self, at: usize, token: u64, scanning: Scanning) {
        let Scanning { next, keys, depends_on, error: unreadable, .. } = scanning;
        self.answer_after(at, token, depends_on, Answer::Scanned { cursor: next, keys, unreadable });
    }
}
