//! What was appended to a shard's log and is not yet on the device, by key.
//!
//! It is looked up with hashes that its caller has already: a write comes here three times before it is settled.

use hashbrown::HashTable;

use super::Pending;
use crate::engine::index::{Identity, KeyHash};
use crate::engine::op::Key;

/// The newest states of keys whose records are on their way.
#[derive(Default)]
pub(in crate::engine) struct PendingSet {
    table: HashTable<(Key, Pending)>,
}

impl PendingSet {
    pub(super) fn get(&self, hash: KeyHash, key: &[u8]) -> Option<&Pending> {
        self.table.find(hash.upper(), |(one, _)| one == key).map(|(_, pending)| pending)
    }

    pub(super) fn get_mut(&mut self, hash: KeyHash, key: &[u8]) -> Option<&mut Pending> {
        self.table.find_mut(hash.upper(), |(one, _)| one == key).map(|(_, pending)| pending)
    }

    pub(super) fn contains(&self, hash: KeyHash, key: &[u8]) -> bool {
        self.get(hash, key).is_some()
    }

    /// Whether a key that the index can't tell from this one is here.
    pub(super) fn has_identity(&self, identity: Identity) -> bool {
        let is_meant = |pending: &Pending| pending.hash.identity() == identity;
        self.table.find(identity.upper(), |(_, pending)| is_meant(pending)).is_some()
    }

    /// A key that the index can't tell from this one.
    pub(super) fn key_of(&self, identity: Identity) -> Option<(KeyHash, Key)> {
        let is_meant = |pending: &Pending| pending.hash.identity() == identity;
        let found = self.table.find(identity.upper(), |(_, pending)| is_meant(pending));
        found.map(|(key, pending)| (pending.hash, key.clone()))
    }

    /// Sets a key's state; its hash is the state's own.
    pub(super) fn insert(&mut self, key: Key, pending: Pending) {
        let entry = self.table.entry(
            pending.hash.upper(),
            |(one, _)| *one == key,
            |(_, pending)| pending.hash.upper(),
        );
        match entry {
            hashbrown::hash_table::Entry::Occupied(mut there) => there.get_mut().1 = pending,
            hashbrown::hash_table::Entry::Vacant(place) => {
                place.insert((key, pending));
            }
        }
    }

    pub(super) fn remove(&mut self, hash: KeyHash, key: &[u8]) -> Option<Pending> {
        self.remove_if(hash, key, |_| true).map(|(_, pending)| pending)
    }

    /// Removes a key's state if it is the one that is meant.
    pub(super) fn remove_if(
        &mut self,
        hash: KeyHash,
        key: &[u8],
        is_meant: impl Fn(&Pending) -> bool,
    ) -> Option<(Key, Pending)> {
        let found =
            self.table.find_entry(hash.upper(), |(one, pending)| one == key && is_meant(pending)).ok()?;
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
