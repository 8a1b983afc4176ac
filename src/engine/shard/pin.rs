//! A pin: a shard as it was at one moment, given out piece by piece while writes go on.
//!
//! The pin walks the index in the order of the keyed hash. A key that is written before the walk has reached it leaves behind
//! what it was: the place of its record, or the value where that was not written yet. What garbage collection moves is the
//! same value elsewhere, and needs nothing.
//!
//! Invariants:
//! - Of every key, the pin gives what it was when the pin was taken, once, unless it has expired since.
//! - An extent that holds a record which the pin will still give is not given back.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::{Shard, Stored};
use crate::engine::action::is_expired;
use crate::engine::index::{Entry, Identity, Index};
use crate::engine::long::LongValue;
use crate::engine::op::{Key, Value};
use crate::planted::{Bug, is_planted};

/// What a key was.
#[derive(Debug, Clone)]
pub(in crate::engine) enum Before {
    /// A record that is on the device.
    Stored {
        /// Where it is.
        entry: Entry,
        /// Milliseconds since the Unix epoch, 0 for none.
        expires_at_ms: u64,
    },
    /// A long value, whose chunks it keeps alive.
    Long {
        /// The value.
        value: Arc<LongValue>,
        /// Milliseconds since the Unix epoch, 0 for none.
        expires_at_ms: u64,
    },
    /// A value that was on its way there.
    Value {
        /// The value.
        value: Value,
        /// Milliseconds since the Unix epoch, 0 for none.
        expires_at_ms: u64,
    },
}

impl Before {
    /// Milliseconds since the Unix epoch, 0 for none.
    pub(in crate::engine) fn expires_at_ms(&self) -> u64 {
        match self {
            Before::Stored { expires_at_ms, .. }
            | Before::Long { expires_at_ms, .. }
            | Before::Value { expires_at_ms, .. } => *expires_at_ms,
        }
    }

    /// Bytes of the value, at most.
    pub(in crate::engine) fn value_size(&self) -> usize {
        match self {
            Before::Stored { entry, .. } => entry.size() as usize,
            Before::Long { value, .. } => value.size() as usize,
            Before::Value { value, .. } => value.len(),
        }
    }

    fn long_size(&self) -> u64 {
        match self {
            Before::Long { value, .. } => value.size(),
            Before::Stored { .. } | Before::Value { .. } => 0,
        }
    }

    /// What it holds of the memory.
    fn heap_size(&self) -> usize {
        match self {
            Before::Stored { .. } => 0,
            Before::Long { value, .. } => value.heap_size(),
            Before::Value { value, .. } => value.len(),
        }
    }

    fn of(stored: &Stored, expires_at_ms: u64) -> Before {
        match stored {
            Stored::Plain(value) => Before::Value { value: value.clone(), expires_at_ms },
            Stored::Long(value) => Before::Long { value: value.clone(), expires_at_ms },
        }
    }

    fn extent(&self) -> Option<u32> {
        match self {
            Before::Stored { entry, .. } => Some(entry.extent),
            Before::Long { .. } | Before::Value { .. } => None,
        }
    }
}

/// A key that was pinned.
#[derive(Debug)]
pub(in crate::engine) struct Pinned {
    pub(in crate::engine) identity: Identity,
    /// None where its record on the device says it.
    pub(in crate::engine) key: Option<Key>,
    pub(in crate::engine) before: Before,
}

impl Pinned {
    fn key_size(&self) -> usize {
        self.key.as_ref().map_or(0, Key::len)
    }
}

/// Keys of a pin, and whether they are its last.
pub(in crate::engine) type Taken = (Vec<Pinned>, bool);

/// What one key that was kept costs beside its bytes.
const KEPT_OVERHEAD: usize = 160;

/// A shard as it was.
#[derive(Debug, Default)]
pub(in crate::engine) struct Pin {
    /// Keys whose hash is lower were walked over.
    cursor: u64,
    is_walked: bool,
    /// Keys ahead of the walk that were written since, and what they were; `None` for absent.
    before: BTreeMap<Identity, Option<Pinned>>,
    /// Keys that were walked over and not given yet.
    queue: VecDeque<Pinned>,
    /// How many of those are records in which extent.
    held: BTreeMap<u32, usize>,
    /// Bytes of memory of `before` and `queue`.
    size: usize,
    /// Bytes of long values in them, whose chunks are kept on the device.
    long_size: u64,
    /// It was given up.
    lost: Option<&'static str>,
}

impl Pin {
    fn is_behind(&self, hash: u64) -> bool {
        self.is_walked || hash < self.cursor
    }

    fn keep(&mut self, pinned: Option<&Pinned>) {
        let before = pinned.map(|one| &one.before);
        self.size += KEPT_OVERHEAD + pinned.map_or(0, Pinned::key_size);
        self.size += before.map_or(0, Before::heap_size);
        self.long_size += before.map_or(0, Before::long_size);
        if let Some(extent) = before.and_then(Before::extent) {
            *self.held.entry(extent).or_default() += 1;
        }
    }

    fn forget(&mut self, pinned: Option<&Pinned>) {
        let before = pinned.map(|one| &one.before);
        self.size -= KEPT_OVERHEAD + pinned.map_or(0, Pinned::key_size);
        self.size -= before.map_or(0, Before::heap_size);
        self.long_size -= before.map_or(0, Before::long_size);
        if let Some(extent) = before.and_then(Before::extent)
            && let Some(count) = self.held.get_mut(&extent)
        {
            *count -= 1;
            if *count == 0 {
                self.held.remove(&extent);
            }
        }
    }
}

impl Shard {
    /// Takes a pin of the shard as it is. False when there is one.
    pub(in crate::engine) fn take_pin(&mut self) -> bool {
        if self.pin.is_some() {
            return false;
        }
        self.pin = Some(Box::default());
        true
    }

    /// Lets go of the pin.
    pub(in crate::engine) fn release_pin(&mut self) {
        self.pin = None;
    }

    /// Gives the pin up: whoever reads on is told why.
    pub(in crate::engine) fn lose_pin(&mut self, why: &'static str) {
        if let Some(pin) = self.pin.as_mut().filter(|pin| pin.lost.is_none()) {
            **pin = Pin { lost: Some(why), ..Pin::default() };
        }
    }

    /// Bytes of memory of the pin.
    pub(in crate::engine) fn pin_size(&self) -> usize {
        self.pin.as_ref().map_or(0, |pin| pin.size)
    }

    /// Whether the pin keeps long values on the device that their keys do not have any more.
    pub(in crate::engine) fn pins_long_garbage(&self) -> bool {
        let Some(pin) = self.pin.as_ref().filter(|pin| pin.long_size > 0) else { return false };
        let is_garbage = |identity: Identity, before: &Before| match before {
            Before::Long { value, .. } => {
                !self.long_value(identity).is_some_and(|now| Arc::ptr_eq(now, value))
            }
            Before::Stored { .. } | Before::Value { .. } => false,
        };
        pin.queue.iter().chain(pin.before.values().flatten()).any(|one| is_garbage(one.identity, &one.before))
    }

    /// Whether the pin will still read from an extent.
    pub(in crate::engine) fn is_pinned(&self, extent: u32) -> bool {
        self.pin.as_ref().is_some_and(|pin| pin.held.contains_key(&extent))
    }

    /// Extents that the pin will still read from.
    pub(in crate::engine) fn pinned_extents(&self) -> impl Iterator<Item = u32> + '_ {
        self.pin.iter().flat_map(|pin| pin.held.keys().copied())
    }

    /// A key is about to be written: what it is now is kept, if the pin has not come to it.
    pub(super) fn note_before(&mut self, identity: Identity) {
        let Some(pin) = self.pin.as_ref().filter(|pin| pin.lost.is_none()) else { return };
        let is_known = pin.is_behind(identity.upper()) || pin.before.contains_key(&identity);
        if is_known || is_planted(Bug::PinMissesOverwrites) {
            return;
        }
        let before = match self.pending.at(identity) {
            Some((_, pending)) if pending.reaped => None,
            Some((key, pending)) => pending.value.as_ref().map(|stored| {
                let before = Before::of(stored, pending.expires_at_ms);
                Pinned { identity, key: Some(key.clone()), before }
            }),
            None => self.index.get(identity).map(|entry| {
                let expires_at_ms = self.expiry_of(identity, &entry);
                self.pinned(identity, entry, expires_at_ms)
            }),
        };
        let Some(pin) = self.pin.as_mut() else { return };
        pin.keep(before.as_ref());
        pin.before.insert(identity, before);
    }

    /// A key whose newest record is on the device.
    fn pinned(&self, identity: Identity, entry: Entry, expires_at_ms: u64) -> Pinned {
        let long = self.long_value(identity).zip(self.long_key(identity)).filter(|_| entry.is_long);
        match long {
            Some((value, key)) => {
                let before = Before::Long { value: value.clone(), expires_at_ms };
                Pinned { identity, key: Some(key.clone()), before }
            }
            None => Pinned { identity, key: None, before: Before::Stored { entry, expires_at_ms } },
        }
    }

    /// The next keys of the pin: about `count` of them, and values of about `size` bytes together, and whether these are the
    /// last.
    pub(in crate::engine) fn next_pinned(
        &mut self,
        count: usize,
        size: usize,
        now_ms: u64,
    ) -> Result<Taken, &'static str> {
        let Some(mut pin) = self.pin.take() else { return Err("it has ended") };
        if let Some(why) = pin.lost {
            self.pin = Some(pin);
            return Err(why);
        }
        while pin.queue.len() < count && !pin.is_walked {
            self.walk_pin(&mut pin, count, now_ms);
        }
        let (mut taken, mut taken_size) = (Vec::new(), 0);
        while taken.len() < count && (taken.is_empty() || taken_size < size) {
            let Some(one) = pin.queue.pop_front() else { break };
            pin.forget(Some(&one));
            taken_size += one.key_size() + one.before.value_size();
            taken.push(one);
        }
        let is_last = pin.is_walked && pin.queue.is_empty();
        self.pin = Some(pin);
        Ok((taken, is_last))
    }

    /// Walks over some keys and queues them.
    fn walk_pin(&self, pin: &mut Pin, count: usize, now_ms: u64) {
        let from = pin.cursor;
        let mut found: Vec<Pinned> = Vec::new();
        let written = &pin.before;
        let is_changed = |identity: Identity| !written.is_empty() && written.contains_key(&identity);
        let next = self.walk(from, count, &mut |identity, entry, expires_at_ms| {
            if !is_changed(identity) {
                found.push(self.pinned(identity, *entry, expires_at_ms));
            }
        });
        for (key, pending) in self.pending.iter() {
            let (identity, hash) = (pending.hash.identity(), pending.hash.upper());
            let in_range = hash >= from && (next == 0 || hash < next);
            if in_range
                && !pending.reaped
                && let Some(stored) = &pending.value
                && !is_changed(identity)
            {
                let before = Before::of(stored, pending.expires_at_ms);
                found.push(Pinned { identity, key: Some(key.clone()), before });
            }
        }
        let ahead =
            if next == 0 { BTreeMap::new() } else { pin.before.split_off(&Identity::at_cursor(next)) };
        let passed = std::mem::replace(&mut pin.before, ahead);
        for before in passed.into_values() {
            pin.forget(before.as_ref());
            found.extend(before);
        }
        for one in found {
            if !is_expired(one.before.expires_at_ms(), now_ms) {
                pin.keep(Some(&one));
                pin.queue.push_back(one);
            }
        }
        (pin.cursor, pin.is_walked) = (next, next == 0);
    }
}
