//! What was appended to a shard's log and is not yet on the device, by identity: as in the index, the later one of two keys with
//! the same identity takes the other's place.
//!
//! It is looked up with hashes that its caller has already: a write comes here three times before it is settled.

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use super::Pending;
use crate::engine::index::{Identity, KeyHash};
use crate::engine::op::Key;

/// The newest states of keys whose records are on their way.
#[derive(Default)]
pub(in crate::engine) struct PendingSet {
    table: HashTable<(Key, Pending)>,
}

fn has(identity: Identity) -> impl Fn(&(Key, Pending)) -> bool {
    move |(_, pending)| pending.hash.identity() == identity
}

impl PendingSet {
    /// Whose state it is that takes the place of what the index says of an identity, and that state.
    pub(super) fn at(&self, identity: Identity) -> Option<&(Key, Pending)> {
        self.table.find(identity.upper(), has(identity))
    }

    /// A key's own state.
    pub(super) fn get(&self, hash: KeyHash, key: &[u8]) -> Option<&Pending> {
        self.at(hash.identity()).filter(|(own, _)| own == key).map(|(_, pending)| pending)
    }

    pub(super) fn get_mut(&mut self, identity: Identity) -> Option<&mut Pending> {
        self.table.find_mut(identity.upper(), has(identity)).map(|(_, pending)| pending)
    }

    pub(super) fn contains(&self, identity: Identity) -> bool {
        self.at(identity).is_some()
    }

    /// Sets a key's state; its hash is the state's own.
    pub(super) fn insert(&mut self, key: Key, pending: Pending) {
        let identity = pending.hash.identity();
        let hash_of = |(_, pending): &(Key, Pending)| pending.hash.upper();
        match self.table.entry(identity.upper(), has(identity), hash_of) {
            Entry::Occupied(mut there) => *there.get_mut() = (key, pending),
            Entry::Vacant(place) => {
                place.insert((key, pending));
            }
        }
    }

    pub(super) fn remove(&mut self, identity: Identity) {
        if let Ok(found) = self.table.find_entry(identity.upper(), has(identity)) {
            found.remove();
        }
    }

    /// Removes the state at an identity if it is the one that is meant.
    pub(super) fn remove_if(
        &mut self,
        hash: KeyHash,
        is_meant: impl Fn(&Pending) -> bool,
    ) -> Option<(Key, Pending)> {
        let has = has(hash.identity());
        let is_it = |one: &(Key, Pending)| has(one) && is_meant(&one.1);
        let found = self.table.find_entry(hash.upper(), is_it).ok()?;
        Some(found.remove().0)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&Key, &Pending)> {
        self.table.iter().map(|(key, pending)| (key, pending))
    }

    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut Pending> {
        self.table.iter_mut().map(|(_, pending)| pending)
    }

    /// Takes everything out.
    pub(super) fn drain(&mut self) -> Vec<(Key, Pending)> {
        self.table.drain().collect()
    }

    pub(super) fn clear(&mut self) {
        self.table.clear();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// Bytes of memory that the table takes; what keys and values take is not in it.
    pub(super) fn heap_size(&self) -> usize {
        self.table.capacity() * std::mem::size_of::<(Key, Pending)>()
    }
}
