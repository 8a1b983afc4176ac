//! The directory: a shard's keys in order, beside the index, on devices of the kind `ordered`.
//!
//! The index goes by identities and knows no keys, so whoever takes an entry out of it by its identity alone, as expiry does,
//! cannot take the key out of the directory. Such a key stays as a *leftover* until somebody comes by it: a listing believes a
//! name only where the index has its identity, and drops it otherwise.
//!
//! Invariants:
//! - Every key that the index has is in the directory. So leftovers are as many as it has keys more than the index.
//! - Leftovers are swept out when they are more than a sixteenth of the keys (and some hundred), a few names at a time.

use std::ops::Bound;

use super::key_set::KeySet;
use crate::engine::op::{KeyRange, Order};

/// One key in so many may be a leftover before they are swept out: each then costs as many look-ups.
const LEFTOVER_DIVISOR: u64 = 16;

/// Leftovers that are not worth a sweep, whatever the number of keys.
const LEFTOVER_COUNT_MIN: u64 = 512;

/// A shard's keys in order.
#[derive(Default)]
pub struct Directory {
    keys: KeySet,
    /// The last name that the sweep under way has looked at.
    swept_to: Option<Vec<u8>>,
}

impl From<KeySet> for Directory {
    fn from(keys: KeySet) -> Directory {
        Directory { keys, swept_to: None }
    }
}

impl Directory {
    /// The index has this key.
    pub fn insert(&mut self, key: &[u8]) {
        self.keys.insert(key);
    }

    /// The index has this key no more.
    pub fn remove(&mut self, key: &[u8]) {
        self.keys.remove(key);
    }

    /// The index is empty.
    pub fn clear(&mut self) {
        self.keys.clear();
        self.swept_to = None;
    }

    /// Names in it, leftovers included.
    pub fn len(&self) -> u64 {
        self.keys.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Bytes of memory that it takes.
    pub fn heap_size(&self) -> usize {
        self.keys.heap_size() + self.swept_to.as_ref().map_or(0, Vec::capacity)
    }

    /// Visits the names of a range in an order, as long as `visit` wants more.
    pub fn visit(&self, range: &KeyRange, order: Order, visit: &mut dyn FnMut(&[u8]) -> bool) {
        fn plain(bound: &Bound<crate::engine::op::Key>) -> Bound<&[u8]> {
            bound.as_ref().map(|key| &key[..])
        }
        match order {
            Order::Ascending => {
                self.keys.ascend(plain(&range.from), &mut |key| range.contains(key) && visit(key));
            }
            Order::Descending => {
                self.keys.descend(plain(&range.to), &mut |key| range.contains(key) && visit(key));
            }
        }
    }

    /// Goes on with the sweep under way, or begins one where the index has so few keys that it is worth it: `is_known` says of
    /// `count` names whether the index has them, and those that it has not go. True when more is to be done.
    pub fn sweep(&mut self, index_len: u64, count: usize, is_known: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        let leftovers = self.len().saturating_sub(index_len);
        if self.swept_to.is_none() && leftovers <= LEFTOVER_COUNT_MIN.max(index_len / LEFTOVER_DIVISOR) {
            return false;
        }
        let from = self.swept_to.take();
        let from = from.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
        let (mut gone, mut last, mut seen) = (Vec::new(), None, 0);
        self.keys.ascend(from, &mut |key| {
            seen += 1;
            if !is_known(key) {
                gone.push(key.to_vec());
            }
            if seen == count {
                last = Some(key.to_vec());
            }
            seen < count
        });
        for key in gone {
            self.keys.remove(&key);
        }
        self.swept_to = last;
        self.swept_to.is_some()
    }

    /// Whether a sweep is under way.
    pub fn is_sweeping(&self) -> bool {
        self.swept_to.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Directory, range: &KeyRange, order: Order) -> Vec<String> {
        let mut seen = Vec::new();
        directory.visit(range, order, &mut |key| {
            seen.push(String::from_utf8(key.to_vec()).unwrap());
            true
        });
        seen
    }

    #[test]
    fn ranges_are_visited_in_both_orders() {
        let mut directory = Directory::default();
        ["b", "a", "ab", "c", "abc"].iter().for_each(|key| directory.insert(key.as_bytes()));
        let all = KeyRange::all();
        assert_eq!(names(&directory, &all, Order::Ascending), ["a", "ab", "abc", "b", "c"]);
        assert_eq!(names(&directory, &all, Order::Descending), ["c", "b", "abc", "ab", "a"]);
        let part = KeyRange { from: Bound::Excluded("a".into()), to: Bound::Included("b".into()) };
        assert_eq!(names(&directory, &part, Order::Ascending), ["ab", "abc", "b"]);
        assert_eq!(names(&directory, &part, Order::Descending), ["b", "abc", "ab"]);
        let prefix = KeyRange::of_prefix("ab".into());
        assert_eq!(names(&directory, &prefix, Order::Descending), ["abc", "ab"]);
        directory.remove(b"ab");
        assert_eq!(names(&directory, &prefix, Order::Ascending), ["abc"]);
        directory.clear();
        assert!(directory.is_empty() && names(&directory, &all, Order::Ascending).is_empty());
    }

    #[test]
    fn leftovers_are_swept_out_once_they_are_many_and_nothing_else_is() {
        let mut directory = Directory::default();
        let key = |i: u64| format!("key:{i:06}").into_bytes();
        (0..10_000).for_each(|i| directory.insert(&key(i)));
        let is_left = |name: &[u8], every: u64| {
            let number: u64 = std::str::from_utf8(&name[4..]).unwrap().parse().unwrap();
            number.is_multiple_of(every)
        };
        // A few are let be.
        assert!(!directory.sweep(9_500, 100, &mut |_| unreachable!("there are too few")));
        let mut steps = 0;
        while directory.sweep(5_000, 100, &mut |name| is_left(name, 2)) {
            steps += 1;
            // What comes meanwhile stays, before and behind.
            directory.insert(&key(20_000 + 2 * steps));
            directory.insert(&key(2 * steps));
            assert!(directory.is_sweeping());
        }
        assert!((100..110).contains(&steps), "{steps}");
        assert_eq!(directory.len(), 5_000 + steps);
        assert!(!directory.is_sweeping());
        assert!(
            names(&directory, &KeyRange::all(), Order::Ascending)
                .iter()
                .all(|one| is_left(one.as_bytes(), 2))
        );
    }
}
