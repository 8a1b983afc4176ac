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

use super::{KeyMap, Shard, Stored};
use crate::engine::action::is_expired;
use crate::engine::index::{Entry, Index};
use crate::engine::long::LongValue;
use crate::engine::op::{Key, Value};

/// What a key was.
#[derive(Debug, Clone)]
pub(in crate::engine) enum Before {
    /// A record that is on the device.
    Stored(Entry),
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
            Before::Stored(entry) => entry.expires_at_ms,
            Before::Long { expires_at_ms, .. } | Before::Value { expires_at_ms, .. } => *expires_at_ms,
        }
    }

    /// Bytes of the value.
    pub(in crate::engine) fn value_size(&self) -> usize {
        match self {
            Before::Stored(entry) => entry.value_size as usize,
            Before::Long { value, .. } => value.size() as usize,
            Before::Value { value, .. } => value.len(),
        }
    }

    fn long_size(&self) -> u64 {
        match self {
            Before::Long { value, .. } => value.size(),
            Before::Stored(_) | Before::Value { .. } => 0,
        }
    }

    /// What it holds of the memory.
    fn heap_size(&self) -> usize {
        match self {
            Before::Stored(_) => 0,
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
            Before::Stored(entry) => Some(entry.extent),
            Before::Long { .. } | Before::Value { .. } => None,
        }
    }
}

/// Keys of a pin, and whether they are its last.
pub(in crate::engine) type Taken = (Vec<(Key, Before)>, bool);

/// What one key that was kept costs beside its bytes.
const KEPT_OVERHEAD: usize = 160;

/// A shard as it was.
#[derive(Debug, Default)]
pub(in crate::engine) struct Pin {
    /// Keys whose hash is lower were walked over.
    cursor: u64,
    is_walked: bool,
    /// Keys ahead of the walk that were written since, and what they were; `None` for absent.
    before: BTreeMap<(u64, Key), Option<Before>>,
    /// Keys that were walked over and not given yet.
    queue: VecDeque<(Key, Before)>,
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

    fn keep(&mut self, key: &Key, before: Option<&Before>) {
        self.size += KEPT_OVERHEAD + key.len();
        self.size += before.map_or(0, Before::heap_size);
        self.long_size += before.map_or(0, Before::long_size);
        if let Some(extent) = before.and_then(Before::extent) {
            *self.held.entry(extent).or_default() += 1;
        }
    }

    fn forget(&mut self, key: &Key, before: Option<&Before>) {
        self.size -= KEPT_OVERHEAD + key.len();
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

fn stored_before(long: &KeyMap<Arc<LongValue>>, key: &Key, entry: &Entry) -> Before {
    match long.get(key).filter(|_| entry.is_long) {
        Some(value) => Before::Long { value: value.clone(), expires_at_ms: entry.expires_at_ms },
        None => Before::Stored(*entry),
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
        let is_garbage = |key: &Key, before: &Before| match before {
            Before::Long { value, .. } => !self.long.get(key).is_some_and(|now| Arc::ptr_eq(now, value)),
            Before::Stored(_) | Before::Value { .. } => false,
        };
        pin.queue.iter().any(|(key, before)| is_garbage(key, before))
            || pin
                .before
                .iter()
                .any(|((_, key), before)| before.as_ref().is_some_and(|before| is_garbage(key, before)))
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
    pub(super) fn note_before(&mut self, key: &Key, hash: u64) {
        let Some(pin) = self.pin.as_mut().filter(|pin| pin.lost.is_none()) else { return };
        if pin.is_behind(hash) || pin.before.contains_key(&(hash, key.clone())) {
            return;
        }
        let before = match self.pending.get(hash, key) {
            Some(pending) if pending.reaped => None,
            Some(pending) => pending.value.as_ref().map(|stored| Before::of(stored, pending.expires_at_ms)),
            None => self.index.get(hash, key).map(|entry| stored_before(&self.long, key, entry)),
        };
        pin.keep(key, before.as_ref());
        pin.before.insert((hash, key.clone()), before);
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
            let Some((key, before)) = pin.queue.pop_front() else { break };
            pin.forget(&key, Some(&before));
            taken_size += key.len() + before.value_size();
            taken.push((key, before));
        }
        let is_last = pin.is_walked && pin.queue.is_empty();
        self.pin = Some(pin);
        Ok((taken, is_last))
    }

    /// Walks over some keys and queues them.
    fn walk_pin(&self, pin: &mut Pin, count: usize, now_ms: u64) {
        let from = pin.cursor;
        let mut found: Vec<(Key, Before)> = Vec::new();
        let written = &pin.before;
        let is_changed =
            |key: &Key, hash: u64| !written.is_empty() && written.contains_key(&(hash, key.clone()));
        let next = self.index.scan(from, count, &mut |key, entry| {
            let (hash, key) = (self.hash(key), Key::copy_from_slice(key));
            if !self.pending.contains(hash, &key) && !is_changed(&key, hash) {
                let before = stored_before(&self.long, &key, entry);
                found.push((key, before));
            }
        });
        for (key, pending) in self.pending.iter() {
            let in_range = pending.hash >= from && (next == 0 || pending.hash < next);
            if in_range
                && !pending.reaped
                && let Some(stored) = &pending.value
                && !is_changed(key, pending.hash)
            {
                found.push((key.clone(), Before::of(stored, pending.expires_at_ms)));
            }
        }
        let ahead = if next == 0 { BTreeMap::new() } else { pin.before.split_off(&(next, Key::new())) };
        let passed = std::mem::replace(&mut pin.before, ahead);
        for ((_, key), before) in passed {
            pin.forget(&key, before.as_ref());
            found.extend(before.map(|before| (key, before)));
        }
        for (key, before) in found {
            if !is_expired(before.expires_at_ms(), now_ms) {
                pin.keep(&key, Some(&before));
                pin.queue.push_back((key, before));
            }
        }
        (pin.cursor, pin.is_walked) = (next, next == 0);
    }
}
