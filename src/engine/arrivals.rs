//! Operations on one key that arrived since the last pass. They begin together, so that what they will look up is fetched for all
//! of them at once: one after the other, each would wait for the processor's cache several times.
//!
//! Invariant: they begin in the order in which they came, and before anything that came after them.

use super::Engine;
use super::action::{Action, Need};
use super::index::{Index, KeyHash};
use super::op::{Clock, Key};
use crate::device::Device;

pub(super) struct Arrival {
    pub(super) at: usize,
    pub(super) token: u64,
    pub(super) hash: KeyHash,
    pub(super) key: Key,
    pub(super) action: Action,
}

impl<D: Device> Engine<D> {
    pub(super) fn arrive(&mut self, at: usize, token: u64, key: Key, action: Action) {
        let hash = self.shards[at].hash(&key);
        self.shards[at].index().prefetch_segment(hash.identity());
        self.arrivals.push(Arrival { at, token, hash, key, action });
    }

    /// Begins what has arrived. True when there was anything.
    pub(super) fn begin_arrivals(&mut self, clock: Clock) -> bool {
        if self.arrivals.is_empty() {
            return false;
        }
        let mut arrivals = std::mem::take(&mut self.arrivals);
        for one in &arrivals {
            self.shards[one.at].index().prefetch_slots(one.hash.identity());
        }
        for one in arrivals.iter().filter(|one| one.action.need() >= Need::Length) {
            self.cache.prefetch(one.hash);
        }
        for Arrival { at, token, hash, key, action } in arrivals.drain(..) {
            self.enter_key(at, token, hash, key, action, clock);
        }
        // Nothing arrives while they begin: the buffer is kept for the next ones.
        self.arrivals = arrivals;
        true
    }
}
