//! When keys expire: of those that do, by their identities and in the order of time. Most keys never do, so the index has no room
//! for it.
//!
//! Invariant: the tables are small, so that none of them takes long when it grows.

use std::collections::BTreeSet;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use super::Identity;
use crate::sys::heap::taken;

/// Tables, by the first bits of the identity.
const TABLE_BITS: u32 = 10;

/// What a place in the tree takes, on average.
const ORDERED_SIZE: usize = 48;

/// The expiries of a shard's keys.
#[derive(Default)]
pub struct Expiries {
    /// None before the first key.
    tables: Vec<HashTable<(Identity, u64)>>,
    tables_size: usize,
    order: BTreeSet<(u64, Identity)>,
}

/// The first bits are alike in a table, and the tables use the first bits and the last ones.
fn mixed(identity: Identity) -> u64 {
    identity.upper.rotate_left(32)
}

fn table_of(identity: Identity) -> usize {
    (identity.upper >> (64 - TABLE_BITS)) as usize
}

impl Expiries {
    /// When a key expires, in milliseconds since the Unix epoch; 0 for never.
    pub fn get(&self, identity: Identity) -> u64 {
        let Some(table) = self.tables.get(table_of(identity)) else { return 0 };
        table.find(mixed(identity), |(one, _)| *one == identity).map_or(0, |(_, at_ms)| *at_ms)
    }

    /// Says when a key expires; 0 for never.
    pub fn set(&mut self, identity: Identity, at_ms: u64) {
        if at_ms == 0 {
            return self.remove(identity);
        }
        if self.tables.is_empty() {
            self.tables = std::iter::repeat_with(HashTable::new).take(1 << TABLE_BITS).collect();
        }
        let table = &mut self.tables[table_of(identity)];
        let size = taken(table.allocation_size());
        match table.entry(mixed(identity), |(one, _)| *one == identity, |(one, _)| mixed(*one)) {
            Entry::Occupied(mut there) => {
                let before = std::mem::replace(&mut there.get_mut().1, at_ms);
                self.order.remove(&(before, identity));
            }
            Entry::Vacant(place) => {
                place.insert((identity, at_ms));
            }
        }
        self.tables_size = self.tables_size + taken(table.allocation_size()) - size;
        self.order.insert((at_ms, identity));
    }

    /// A key does not expire, or is not there, any more.
    pub fn remove(&mut self, identity: Identity) {
        let Some(table) = self.tables.get_mut(table_of(identity)) else { return };
        if let Ok(found) = table.find_entry(mixed(identity), |(one, _)| *one == identity) {
            let ((_, at_ms), _) = found.remove();
            self.order.remove(&(at_ms, identity));
        }
    }

    /// The key that expires first, and when.
    pub fn first(&self) -> Option<(u64, Identity)> {
        self.order.first().copied()
    }

    /// Keys that expire.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether no key does.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Bytes of memory that they take.
    pub fn heap_size(&self) -> usize {
        let tables = self.tables.capacity() * std::mem::size_of::<HashTable<(Identity, u64)>>();
        let tables = if tables == 0 { 0 } else { taken(tables) };
        tables + self.tables_size + self.order.len() * ORDERED_SIZE
    }
}

#[cfg(test)]
mod tests {
    use super::super::hash_key;
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn they_are_a_map_in_the_order_of_time() {
        let (mut expiries, mut model) = (Expiries::default(), BTreeMap::new());
        let mut state = 5u64;
        for _ in 0..60_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let identity = hash_key(&[3; 16], &((state >> 40) % 8_000).to_le_bytes()).identity();
            match (state >> 33) % 4 {
                0 => {
                    expiries.remove(identity);
                    model.remove(&identity);
                }
                1 => {
                    expiries.set(identity, 0);
                    model.remove(&identity);
                }
                _ => {
                    let at_ms = 1 + (state >> 20) % 1_000;
                    expiries.set(identity, at_ms);
                    model.insert(identity, at_ms);
                }
            }
            assert_eq!(expiries.get(identity), model.get(&identity).copied().unwrap_or(0));
        }
        let order: BTreeSet<(u64, Identity)> = model.iter().map(|(one, at_ms)| (*at_ms, *one)).collect();
        assert_eq!((expiries.first(), expiries.len()), (order.first().copied(), order.len()));
        assert_eq!(expiries.order, order);
        let tables: usize = expiries.tables.iter().map(|one| taken(one.allocation_size())).sum::<usize>();
        let none = taken(HashTable::<(Identity, u64)>::new().allocation_size()) << TABLE_BITS;
        assert_eq!(expiries.tables_size, tables - none);
        let largest = expiries.tables.iter().map(HashTable::len).max().unwrap();
        assert!(largest < 40, "{largest} of {} keys in one table", expiries.len());
    }
}
