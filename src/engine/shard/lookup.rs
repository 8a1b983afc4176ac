//! What memory knows of a key, and whether it may be told.

use super::{Shard, Stored};
use crate::engine::action::is_expired;
use crate::engine::index::{Entry, Index, KeyHash};
use crate::engine::op::{Current, Key, OpError};
use crate::probe::{self, Probe};

/// A key's state as far as memory knows it.
pub(in crate::engine) struct Lookup {
    pub(in crate::engine) current: Option<Current>,
    /// Where the value is when it is not in `current`.
    pub(in crate::engine) entry: Option<Entry>,
    /// The frame that must be durable before an answer that rests on this may leave; 0 for none.
    pub(in crate::engine) depends_on: u64,
    /// The key's hash.
    pub(in crate::engine) hash: KeyHash,
}

impl Lookup {
    /// Whether the key has a value.
    pub(in crate::engine) fn is_there(&self) -> bool {
        self.current.is_some()
    }
}

impl Shard {
    /// Whether a newer record of the key than the index has is on its way.
    pub(in crate::engine) fn is_pending(&self, key: &Key) -> bool {
        self.pending.get(self.hash(key), key).is_some()
    }

    /// Whether a key's outcome is unknown until a restart.
    pub(in crate::engine) fn is_unknown(&self, key: &Key) -> bool {
        self.unknown_all || (!self.unknown.is_empty() && self.unknown.contains_key(key))
    }

    /// Whether there is a key whose outcome is unknown until a restart.
    pub(in crate::engine) fn has_unknown(&self) -> bool {
        self.unknown_all || !self.unknown.is_empty()
    }

    /// Whether what is known of a key now is what an operation on it would go by: nobody is changing it, and nothing is unknown or
    /// in doubt here.
    pub(in crate::engine) fn answers_at_once(&self, key: &[u8]) -> bool {
        self.gate.is_empty()
            && !self.has_unknown()
            && !self.is_in_doubt()
            && (self.holds.is_empty() || !self.holds.contains_key(key))
    }

    /// Whether records were lost that may concern keys of this shard.
    pub(in crate::engine) fn is_in_doubt(&self) -> bool {
        self.doubt.is_any()
    }

    /// Why nothing can be said about a key, when records that may have been its newest were lost.
    pub(in crate::engine) fn doubt_about(&self, key: &Key) -> Option<OpError> {
        if !self.is_in_doubt() || self.is_pending(key) {
            return None;
        }
        if self.doubt.is_known(self.hash(key).identity()) && !self.doubt.keys.contains(key) {
            return None;
        }
        probe::hit(Probe::KeyInDoubt);
        Some(self.doubt_error())
    }

    pub(in crate::engine) fn doubt_error(&self) -> OpError {
        let detail = format!("shard {} lost records that may have been newer", self.id.0);
        OpError::Damaged { detail }
    }

    /// What memory knows of a key. Reaps it when it has expired.
    pub(in crate::engine) fn lookup(&mut self, key: &Key, now_ms: u64) -> Lookup {
        self.lookup_hashed(self.hash(key), key, now_ms)
    }

    /// The same where the hash is known.
    pub(in crate::engine) fn lookup_hashed(&mut self, hash: KeyHash, key: &[u8], now_ms: u64) -> Lookup {
        let expired = |at: u64| is_expired(at, now_ms);
        let identity = hash.identity();
        if let Some((own, pending)) = self.pending.at(identity) {
            let depends_on = pending.at.frame;
            match &pending.value {
                // Another key takes its place.
                _ if own != key => {}
                Some(stored) if !pending.reaped && !expired(pending.expires_at_ms) => {
                    let (value, long) = match stored {
                        Stored::Plain(value) => (Some(value.clone()), None),
                        Stored::Long(value) => (None, Some(value.clone())),
                    };
                    let (expires_at_ms, size) = (pending.expires_at_ms, stored.size());
                    let current = Current { expires_at_ms, size, value, long };
                    return Lookup { current: Some(current), entry: None, depends_on, hash };
                }
                Some(_) if !pending.reaped => self.reap(identity),
                _ => {}
            }
            return Lookup { current: None, entry: None, depends_on, hash };
        }
        // The key of a long value is in memory: that of another key with the same identity is told apart at once.
        let is_own = |entry: &Entry| !entry.is_long || self.long_key(identity).is_none_or(|own| own == key);
        let entry = self.index.get(identity).filter(is_own);
        let expires_at_ms = entry.map_or(0, |entry| self.expiry_of(identity, &entry));
        match entry {
            Some(entry) if !expired(expires_at_ms) => {
                let long = if entry.is_long { self.long_value(identity).cloned() } else { None };
                // The index does not know how long a value is: its record, which is as long at least, has to be read.
                let size = long.as_ref().map_or(0, |value| value.size());
                let current = Current { expires_at_ms, size, value: None, long };
                Lookup { current: Some(current), entry: Some(entry), depends_on: 0, hash }
            }
            Some(_) => {
                self.reap(identity);
                Lookup { current: None, entry: None, depends_on: self.clear_frame, hash }
            }
            None => Lookup { current: None, entry: None, depends_on: self.clear_frame, hash },
        }
    }
}
