//! A sorted set of byte strings that takes little more memory than they do.
//!
//! ```text
//! groups   [ leaves ][ leaves ] ...          at most GROUP_LEN_MAX leaves each
//! leaf     first key | key | key ...         front-coded (see `format::front_coded`), about LEAF_SIZE_MAX bytes at most
//! ```
//!
//! A leaf is looked for by first keys, which are stored in whole, and gone through from its beginning. What is in it is never
//! decoded to be compared: how much a key shares with the one before it says which of two is greater in most cases.
//!
//! Invariants:
//! - No group and no leaf is empty, and keys ascend throughout.
//! - Each key says of as many bytes as possible that they are those of the key before it.
//! - Growing and shrinking touch a leaf and a group, and the list of groups, which is short.

use std::ops::Bound;

use crate::format::front_coded::{push, shared_size};
use crate::sys::heap::taken;

#[cfg(test)]
mod tests;

/// Bytes of a leaf at which it is split, unless it has but one key.
const LEAF_SIZE_MAX: usize = 2048;

/// Bytes below which a leaf is made one with its neighbour, if what comes of it is no longer than this many.
const LEAF_SIZE_MIN: usize = LEAF_SIZE_MAX / 4;
const LEAF_SIZE_MERGED: usize = LEAF_SIZE_MAX * 3 / 4;

/// Bytes of a leaf that is filled in order: some keys more may come.
const LEAF_SIZE_FILLED: usize = LEAF_SIZE_MAX * 7 / 8;

/// Leaves of a group at which it is split.
const GROUP_LEN_MAX: usize = 256;

/// Some keys in order.
#[derive(Default)]
struct Leaf {
    bytes: Vec<u8>,
    len: usize,
}

/// Where a key of a leaf is.
#[derive(Clone, Copy)]
struct Item {
    start: usize,
    shared: usize,
    /// Where the bytes begin that it does not share, and where they end.
    rest: usize,
    end: usize,
}

/// Where a key would be in a leaf.
struct Place {
    /// The first key that is not less.
    next: Option<Item>,
    /// Bytes that it has in common with the key before that.
    shared_before: usize,
    /// And with that.
    shared_next: usize,
    is_there: bool,
}

fn varint(bytes: &[u8], at: &mut usize) -> usize {
    let (mut number, mut shift) = (0, 0);
    loop {
        let byte = bytes[*at];
        *at += 1;
        number |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return number;
        }
        shift += 7;
    }
}

fn taken_by<T>(vec: &Vec<T>) -> usize {
    if vec.capacity() == 0 { 0 } else { taken(vec.capacity() * size_of::<T>()) }
}

impl Leaf {
    /// The first key; the empty one of a leaf that has none yet.
    fn first_key(&self) -> &[u8] {
        if self.bytes.is_empty() {
            return &[];
        }
        let item = self.item(0);
        &self.bytes[item.rest..item.end]
    }

    fn item(&self, start: usize) -> Item {
        let mut at = start;
        let (shared, size) = (varint(&self.bytes, &mut at), varint(&self.bytes, &mut at));
        Item { start, shared, rest: at, end: at + size }
    }

    /// Visits keys from the first one on, and what has them decoded, as long as it is wanted.
    fn each(&self, visit: &mut dyn FnMut(&[u8], Item) -> bool) -> bool {
        let (mut key, mut at) = (Vec::new(), 0);
        while at < self.bytes.len() {
            let item = self.item(at);
            key.truncate(item.shared);
            key.extend_from_slice(&self.bytes[item.rest..item.end]);
            at = item.end;
            if !visit(&key, item) {
                return false;
            }
        }
        true
    }

    fn place(&self, key: &[u8]) -> Place {
        let (mut shared_before, mut at) = (0, 0);
        while at < self.bytes.len() {
            let item = self.item(at);
            at = item.end;
            // It differs from the key before it where, or behind where, that differs from this one: so it is less too.
            if item.shared > shared_before {
                continue;
            }
            if item.shared < shared_before {
                let shared_next = item.shared;
                return Place { next: Some(item), shared_before, shared_next, is_there: false };
            }
            let (rest, wanted) = (&self.bytes[item.rest..item.end], &key[shared_before..]);
            let more = shared_size(rest, wanted);
            if rest.get(more) < wanted.get(more) {
                shared_before += more;
                continue;
            }
            let is_there = more == rest.len() && more == wanted.len();
            let shared_next = shared_before + more;
            return Place { next: Some(item), shared_before, shared_next, is_there };
        }
        Place { next: None, shared_before, shared_next: 0, is_there: false }
    }

    /// Puts bytes in the place of others, with no more room behind them than the allocator has anyway.
    fn replace(&mut self, start: usize, end: usize, with: &[u8]) {
        let size = self.bytes.len() - (end - start) + with.len();
        if size > self.bytes.capacity() {
            self.bytes.reserve_exact(taken(size) - self.bytes.len());
        }
        self.bytes.splice(start..end, with.iter().copied());
        if taken(size) < self.bytes.capacity() - self.bytes.capacity() / 4 {
            self.bytes.shrink_to(taken(size));
        }
    }

    fn insert(&mut self, key: &[u8], place: &Place) {
        let mut patch = Vec::with_capacity(key.len() + 8);
        push(place.shared_before, &key[place.shared_before..], &mut patch);
        let (start, end) = match place.next {
            Some(next) => {
                let rest = next.rest + place.shared_next - next.shared;
                push(place.shared_next, &self.bytes[rest..next.end], &mut patch);
                (next.start, next.end)
            }
            None => (self.bytes.len(), self.bytes.len()),
        };
        self.replace(start, end, &patch);
        self.len += 1;
    }

    fn remove(&mut self, item: Item) {
        let mut patch = Vec::new();
        let mut end = item.end;
        if end < self.bytes.len() {
            let next = self.item(end);
            // What the next key shared with the one that goes, and that one not with the one before it.
            let shared = item.shared.min(next.shared);
            let mut rest = self.bytes[item.rest..item.rest + next.shared - shared].to_vec();
            rest.extend_from_slice(&self.bytes[next.rest..next.end]);
            push(shared, &rest, &mut patch);
            end = next.end;
        }
        self.replace(item.start, end, &patch);
        self.len -= 1;
    }

    /// Takes the keys from one of them on into a leaf of their own.
    fn split_at(&mut self, key: &[u8], item: Item, len: usize) -> Leaf {
        let mut bytes = Vec::new();
        push(0, key, &mut bytes);
        bytes.extend_from_slice(&self.bytes[item.end..]);
        let upper = Leaf { bytes, len: self.len - len };
        self.bytes.truncate(item.start);
        self.bytes.shrink_to(taken(item.start));
        self.len = len;
        upper
    }

    /// The key where half of the bytes are, or the last one, and how many are before it. Never the first, which stays.
    fn middle(&self, is_last: bool) -> Option<(Vec<u8>, Item, usize)> {
        let (mut found, mut before) = (None, 0);
        let (half, end) = (self.bytes.len() / 2, self.bytes.len());
        self.each(&mut |key, item| {
            if before > 0 && (item.end == end || (!is_last && item.end > half)) {
                found = Some((key.to_vec(), item, before));
                return false;
            }
            before += 1;
            true
        });
        found
    }

    /// Takes the keys of the next leaf in.
    fn merge(&mut self, next: Leaf) {
        let mut last = Vec::new();
        self.each(&mut |key, item| {
            if item.end == self.bytes.len() {
                last = key.to_vec();
            }
            true
        });
        let (first, end) = (next.first_key(), next.item(0).end);
        let shared = shared_size(&last, first);
        let mut patch = Vec::new();
        push(shared, &first[shared..], &mut patch);
        patch.extend_from_slice(&next.bytes[end..]);
        let at = self.bytes.len();
        self.replace(at, at, &patch);
        self.len += next.len;
    }
}

/// Byte strings in order.
#[derive(Default)]
pub struct KeySet {
    groups: Vec<Vec<Leaf>>,
    len: u64,
    /// Bytes that leaves and groups take.
    size: usize,
}

impl KeySet {
    /// Strings in it.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of memory that it takes.
    pub fn heap_size(&self) -> usize {
        self.size + taken_by(&self.groups)
    }

    /// Whether a string is in it.
    pub fn contains(&self, key: &[u8]) -> bool {
        !self.groups.is_empty() && {
            let (group, leaf) = self.find(key);
            self.groups[group][leaf].place(key).is_there
        }
    }

    /// Adds a string. False where it was there.
    pub fn insert(&mut self, key: &[u8]) -> bool {
        if self.groups.is_empty() {
            self.push_leaf(Leaf::default());
        }
        let (group, at) = self.find(key);
        let leaf = &mut self.groups[group][at];
        let place = leaf.place(key);
        if place.is_there {
            return false;
        }
        self.size -= taken_by(&leaf.bytes);
        leaf.insert(key, &place);
        self.size += taken_by(&leaf.bytes);
        self.len += 1;
        let is_end =
            place.next.is_none() && group + 1 == self.groups.len() && at + 1 == self.groups[group].len();
        if self.groups[group][at].bytes.len() > LEAF_SIZE_MAX {
            self.split_leaf(group, at, is_end);
        }
        true
    }

    /// Takes a string out. False where it was not there.
    pub fn remove(&mut self, key: &[u8]) -> bool {
        if self.groups.is_empty() {
            return false;
        }
        let (group, at) = self.find(key);
        let leaf = &mut self.groups[group][at];
        let Place { next: Some(item), is_there: true, .. } = leaf.place(key) else { return false };
        self.size -= taken_by(&leaf.bytes);
        leaf.remove(item);
        self.size += taken_by(&leaf.bytes);
        self.len -= 1;
        if leaf.len == 0 {
            self.remove_leaf(group, at);
        } else if leaf.bytes.len() < LEAF_SIZE_MIN {
            self.merge_leaf(group, at);
        }
        true
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        *self = KeySet::default();
    }

    /// Visits strings in ascending order from a bound on, as long as `visit` wants more.
    pub fn ascend(&self, from: Bound<&[u8]>, visit: &mut dyn FnMut(&[u8]) -> bool) {
        if self.groups.is_empty() {
            return;
        }
        let is_before = |key: &[u8]| match from {
            Bound::Included(from) => key < from,
            Bound::Excluded(from) => key <= from,
            Bound::Unbounded => false,
        };
        let (group, leaf) = match from {
            Bound::Included(from) | Bound::Excluded(from) => self.find(from),
            Bound::Unbounded => (0, 0),
        };
        let leaves = self.groups[group..].iter().flatten().skip(leaf);
        for (nth, leaf) in leaves.enumerate() {
            if !leaf.each(&mut |key, _| (nth == 0 && is_before(key)) || visit(key)) {
                return;
            }
        }
    }

    /// Visits strings in descending order from a bound on, as long as `visit` wants more.
    pub fn descend(&self, from: Bound<&[u8]>, visit: &mut dyn FnMut(&[u8]) -> bool) {
        let Some(last) = self.groups.last() else { return };
        let is_behind = |key: &[u8]| match from {
            Bound::Included(from) => key > from,
            Bound::Excluded(from) => key >= from,
            Bound::Unbounded => false,
        };
        let (group, leaf) = match from {
            Bound::Included(from) | Bound::Excluded(from) => self.find(from),
            Bound::Unbounded => (self.groups.len() - 1, last.len() - 1),
        };
        let before = self.groups[..group].iter().rev().flat_map(|leaves| leaves.iter().rev());
        let leaves = self.groups[group][..=leaf].iter().rev().chain(before);
        let (mut keys, mut ends) = (Vec::new(), Vec::new());
        for leaf in leaves {
            keys.clear();
            ends.clear();
            leaf.each(&mut |key, _| {
                ends.push(keys.len());
                keys.extend_from_slice(key);
                true
            });
            let mut end = keys.len();
            for start in ends.iter().rev() {
                let key = &keys[*start..end];
                end = *start;
                if !is_behind(key) && !visit(key) {
                    return;
                }
            }
        }
    }

    /// The leaf that a key is in if it is anywhere. There must be one.
    fn find(&self, key: &[u8]) -> (usize, usize) {
        let group = self.groups.partition_point(|leaves| leaves[0].first_key() <= key).saturating_sub(1);
        let leaf = self.groups[group].partition_point(|leaf| leaf.first_key() <= key).saturating_sub(1);
        (group, leaf)
    }

    fn push_leaf(&mut self, leaf: Leaf) {
        if self.groups.last().is_none_or(|leaves| leaves.len() == GROUP_LEN_MAX) {
            self.groups.push(Vec::new());
        }
        self.size += taken_by(&leaf.bytes);
        let last = self.groups.len() - 1;
        self.change_group(last, |leaves| leaves.push(leaf));
    }

    /// Changes the leaves of a group; what they take themselves is the caller's to count.
    fn change_group<T>(&mut self, group: usize, change: impl FnOnce(&mut Vec<Leaf>) -> T) -> T {
        let leaves = &mut self.groups[group];
        self.size -= taken_by(leaves);
        let out = change(leaves);
        self.size += taken_by(leaves);
        out
    }

    /// Makes two of a leaf. What is only ever added to at its end leaves full leaves behind.
    fn split_leaf(&mut self, group: usize, at: usize, is_end: bool) {
        let leaf = &mut self.groups[group][at];
        let Some((key, item, before)) = leaf.middle(is_end) else { return };
        self.size -= taken_by(&leaf.bytes);
        let upper = leaf.split_at(&key, item, before);
        self.size += taken_by(&leaf.bytes) + taken_by(&upper.bytes);
        self.change_group(group, |leaves| leaves.insert(at + 1, upper));
        let len = self.groups[group].len();
        if len > GROUP_LEN_MAX {
            let kept = if is_end { GROUP_LEN_MAX } else { len / 2 };
            let upper = self.change_group(group, |leaves| {
                let upper = leaves.split_off(kept);
                leaves.shrink_to_fit();
                upper
            });
            self.size += taken_by(&upper);
            self.groups.insert(group + 1, upper);
        }
    }

    fn remove_leaf(&mut self, group: usize, at: usize) {
        let leaf = self.change_group(group, |leaves| leaves.remove(at));
        self.size -= taken_by(&leaf.bytes);
        self.tidy_group(group);
    }

    /// Makes one of a short leaf and a neighbour, where that is not too long.
    fn merge_leaf(&mut self, group: usize, at: usize) {
        let leaves = &self.groups[group];
        let fits = |low: usize| {
            low + 1 < leaves.len()
                && leaves[low].bytes.len() + leaves[low + 1].bytes.len() <= LEAF_SIZE_MERGED
        };
        let Some(low) = [Some(at), at.checked_sub(1)].into_iter().flatten().find(|low| fits(*low)) else {
            return;
        };
        let next = self.change_group(group, |leaves| leaves.remove(low + 1));
        self.size -= taken_by(&next.bytes);
        let leaf = &mut self.groups[group][low];
        self.size -= taken_by(&leaf.bytes);
        leaf.merge(next);
        self.size += taken_by(&leaf.bytes);
        self.tidy_group(group);
    }

    /// A group has a leaf less.
    fn tidy_group(&mut self, group: usize) {
        if self.groups[group].is_empty() {
            let leaves = self.groups.remove(group);
            self.size -= taken_by(&leaves);
        } else if self.groups[group].len() < GROUP_LEN_MAX / 4 {
            let fits = |low: usize| {
                low + 1 < self.groups.len()
                    && self.groups[low].len() + self.groups[low + 1].len() <= GROUP_LEN_MAX / 2
            };
            let low = [Some(group), group.checked_sub(1)].into_iter().flatten().find(|low| fits(*low));
            if let Some(low) = low {
                let mut next = self.groups.remove(low + 1);
                self.size -= taken_by(&next);
                self.change_group(low, |leaves| leaves.append(&mut next));
            }
        }
        if self.groups.is_empty() || self.groups.len() < self.groups.capacity() / 4 {
            self.groups.shrink_to_fit();
        }
    }
}

/// A set that is made of strings which mostly come in order.
#[derive(Default)]
pub struct KeySetBuilder {
    set: KeySet,
    last: Vec<u8>,
    open: Leaf,
}

impl KeySetBuilder {
    /// Adds a string.
    pub fn add(&mut self, key: &[u8]) {
        if self.open.len > 0 && key <= self.last.as_slice() {
            self.seal();
            self.set.insert(key);
            return;
        }
        if self.open.len == 0 && !self.set.is_empty() && !self.is_behind(key) {
            self.set.insert(key);
            return;
        }
        if self.open.bytes.len() + key.len() > LEAF_SIZE_FILLED {
            self.seal();
        }
        let shared = if self.open.len == 0 { 0 } else { shared_size(&self.last, key) };
        push(shared, &key[shared..], &mut self.open.bytes);
        self.open.len += 1;
        self.last.clear();
        self.last.extend_from_slice(key);
    }

    /// Whether a string is greater than all that were added.
    fn is_behind(&self, key: &[u8]) -> bool {
        let mut is_behind = true;
        self.set.descend(Bound::Unbounded, &mut |last| {
            is_behind = key > last;
            false
        });
        is_behind
    }

    fn seal(&mut self) {
        if self.open.len > 0 {
            let mut leaf = std::mem::take(&mut self.open);
            leaf.bytes.shrink_to(taken(leaf.bytes.len()));
            self.set.len += leaf.len as u64;
            self.set.push_leaf(leaf);
        }
    }

    /// The set.
    pub fn finish(mut self) -> KeySet {
        self.seal();
        self.set
    }
}
