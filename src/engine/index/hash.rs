//! The index `hash`: 15 bytes a key, in arrays ordered by hash.
//!
//! ```text
//! identity   | root (10) | tag (59)                                                  |
//! roots      [ 0 ][ 1 ] ... [ 1023 ]          each: segments in order, together all of its tags
//! segment    [tag|entry][tag|entry] ...       ordered by tag; as long as it needs to be, one array
//! ```
//!
//! A root grows by linear hashing: its segments are split in two one after the other, from its lowest tags on, so that which
//! segment a tag is in follows from two numbers, and growing never moves more than one segment. Hashes are even, so a tag is
//! looked for where it would be if they were spaced evenly, and that is rarely off by more than a dozen slots.
//!
//! Invariants:
//! - Segments are in the order of their tags, and so are the slots in each.
//! - A segment's array is as large as the allocator's class for it, so that what is allocated is either slots or room for some.
//! - Roots grow at different fills, so that they do not all have the same room to spare at the same time.

use super::slot::{ROOT_BITS, SLOT_SIZE, Slot, TAG_BITS, join, split};
use super::{Entry, IDENTITY_LOWER_BITS, Identity, Index};
use crate::sys::heap::taken;
use crate::sys::prefetch::prefetch;

const ROOT_COUNT: usize = 1 << ROOT_BITS;

/// Slots of a segment, on average, at which the root splits the next one: of the first root, and nearly twice as many of the
/// last one. Shorter segments would need more headers, longer ones would take longer to insert into.
const FILL_MIN: usize = 192;

/// Slots looked at one by one around where one should be, before the rest is halved.
const STEPS_MAX: usize = 24;

/// Slots on either side of where one should be that are fetched ahead.
const PREFETCHED_COUNT: usize = 6;

/// Empty roots and segments that a scan passes over in one go, beside those that it counts as keys.
const SCAN_PASSED_MAX: usize = 4_096;

/// The most bits of a tag that tell a root's segments apart. With the root's it leaves the low bits of cursors zero.
const LEVEL_MAX: u32 = 32;

const _: () = assert!(ROOT_BITS + LEVEL_MAX < 56);

type Segment = Vec<Slot>;

/// Keys whose hashes begin with the same bits.
#[derive(Default)]
struct Root {
    /// None before the first key; otherwise 2^level and as many more as were split.
    segments: Vec<Segment>,
    /// Bits of a tag that tell segments apart which are not split yet.
    level: u32,
    /// Segments that are split, the first ones: they are told apart by one bit more.
    split_count: usize,
    /// Keys.
    len: usize,
}

impl Root {
    /// The segment of a tag, and how many bits of the tag say so. Only where there is one.
    fn segment_of(&self, tag: u64) -> (usize, u32) {
        let at = (tag >> (TAG_BITS - self.level)) as usize;
        if at < self.split_count {
            ((tag >> (TAG_BITS - self.level - 1)) as usize, self.level + 1)
        } else {
            (at + self.split_count, self.level)
        }
    }

    /// The lowest tag of a segment.
    fn first_tag(&self, segment: usize) -> u64 {
        if segment < 2 * self.split_count {
            (segment as u64) << (TAG_BITS - self.level - 1)
        } else {
            ((segment - self.split_count) as u64) << (TAG_BITS - self.level)
        }
    }

    fn table_size(&self) -> usize {
        taken_by(self.segments.capacity() * std::mem::size_of::<Segment>())
    }
}

fn taken_by(size: usize) -> usize {
    if size == 0 { 0 } else { taken(size) }
}

fn segment_size(segment: &Segment) -> usize {
    taken_by(segment.capacity() * SLOT_SIZE)
}

/// Slots that fit into what is allocated for so many.
fn capacity_for(len: usize) -> usize {
    taken_by(len * SLOT_SIZE) / SLOT_SIZE
}

/// Where a tag would be if tags were spaced evenly in its segment, which `bits` bits of it tell.
fn estimate(segment: &Segment, tag: u64, bits: u32) -> usize {
    let rest = tag << (64 - TAG_BITS) << bits;
    ((u128::from(rest) * segment.len() as u128) >> 64) as usize
}

/// Where a tag is, or where it would have to be put.
fn position(segment: &Segment, tag: u64, bits: u32) -> Result<usize, usize> {
    let mut at = estimate(segment, tag, bits);
    let found = |at: usize| match segment.get(at) {
        Some(slot) if slot.tag() == tag => Ok(at),
        _ => Err(at),
    };
    if segment.get(at).is_some_and(|slot| slot.tag() < tag) {
        for _ in 0..STEPS_MAX {
            at += 1;
            if segment.get(at).is_none_or(|slot| slot.tag() >= tag) {
                return found(at);
            }
        }
        return found(at + segment[at..].partition_point(|slot| slot.tag() < tag));
    }
    for _ in 0..STEPS_MAX {
        if at == 0 || segment[at - 1].tag() < tag {
            return found(at);
        }
        at -= 1;
    }
    found(segment[..at].partition_point(|slot| slot.tag() < tag))
}

/// Keys by their identities.
pub struct HashIndex {
    roots: Vec<Root>,
    len: u64,
    /// Bytes that segments and the tables of them take.
    segments_size: usize,
}

impl Default for HashIndex {
    fn default() -> Self {
        let roots = std::iter::repeat_with(Root::default).take(ROOT_COUNT).collect();
        HashIndex { roots, len: 0, segments_size: 0 }
    }
}

impl HashIndex {
    /// Slots of a segment, on average, that a root has when it grows.
    fn fill_of(root: usize) -> usize {
        FILL_MIN + FILL_MIN * root / ROOT_COUNT
    }

    fn find(&self, identity: Identity) -> Option<&Slot> {
        let (at, tag) = split(identity);
        let root = &self.roots[at];
        if root.segments.is_empty() {
            return None;
        }
        let (at, bits) = root.segment_of(tag);
        let segment = &root.segments[at];
        position(segment, tag, bits).ok().map(|at| &segment[at])
    }

    /// Splits the next segment of a root that has too many keys for its segments.
    fn grow(&mut self, at: usize) {
        let root = &mut self.roots[at];
        if root.len <= root.segments.len() * Self::fill_of(at) || root.level == LEVEL_MAX {
            return;
        }
        let low_at = 2 * root.split_count;
        let middle = (2 * root.split_count as u64 + 1) << (TAG_BITS - root.level - 1);
        self.segments_size -= segment_size(&root.segments[low_at]) + root.table_size();
        let both = std::mem::take(&mut root.segments[low_at]);
        let (low, high) = both.split_at(both.partition_point(|slot| slot.tag() < middle));
        if root.segments.len() == root.segments.capacity() {
            // A doubling would leave room for as many again, in each of a thousand roots.
            root.segments.reserve_exact(root.segments.len() / 8 + 1);
        }
        root.segments[low_at] = filled_with(&[low]);
        root.segments.insert(low_at + 1, filled_with(&[high]));
        root.split_count += 1;
        if root.split_count == 1 << root.level {
            (root.level, root.split_count) = (root.level + 1, 0);
        }
        let segments = &root.segments[low_at..low_at + 2];
        self.segments_size += segments.iter().map(segment_size).sum::<usize>() + root.table_size();
    }

    /// Makes one again of the two segments that were split last, in a root that has few keys for its segments.
    fn shrink(&mut self, at: usize) {
        let root = &mut self.roots[at];
        if root.segments.len() < 2 || root.len >= root.segments.len() * Self::fill_of(at) / 2 {
            return;
        }
        if root.split_count == 0 {
            (root.level, root.split_count) = (root.level - 1, 1 << (root.level - 1));
        }
        root.split_count -= 1;
        let low_at = 2 * root.split_count;
        let high = root.segments.remove(low_at + 1);
        let low = &mut root.segments[low_at];
        self.segments_size -= segment_size(low) + segment_size(&high);
        *low = filled_with(&[&low[..], &high[..]]);
        self.segments_size += segment_size(low);
    }
}

/// A segment with these slots, and the room that comes with them.
fn filled_with(parts: &[&[Slot]]) -> Segment {
    let mut segment = Segment::new();
    segment.reserve_exact(capacity_for(parts.iter().map(|part| part.len()).sum()));
    parts.iter().for_each(|part| segment.extend_from_slice(part));
    segment
}

impl Index for HashIndex {
    fn get(&self, identity: Identity) -> Option<Entry> {
        self.find(identity).map(Slot::entry)
    }

    fn prefetch_segment(&self, identity: Identity) {
        let (at, tag) = split(identity);
        let root = &self.roots[at];
        if !root.segments.is_empty() {
            prefetch(&root.segments[root.segment_of(tag).0]);
        }
    }

    fn prefetch_slots(&self, identity: Identity) {
        let (at, tag) = split(identity);
        let root = &self.roots[at];
        if root.segments.is_empty() {
            return;
        }
        let (at, bits) = root.segment_of(tag);
        let segment = &root.segments[at];
        let at = estimate(segment, tag, bits);
        for at in [at.saturating_sub(PREFETCHED_COUNT), at, at + PREFETCHED_COUNT] {
            if let Some(slot) = segment.get(at) {
                prefetch(slot);
            }
        }
    }

    fn insert(&mut self, identity: Identity, entry: Entry) -> Option<Entry> {
        let (root_at, tag) = split(identity);
        let root = &mut self.roots[root_at];
        if root.segments.is_empty() {
            root.segments.reserve_exact(1);
            root.segments.push(Segment::new());
            self.segments_size += root.table_size();
        }
        let (at, bits) = root.segment_of(tag);
        let segment = &mut root.segments[at];
        let slot = Slot::new(tag, &entry);
        match position(segment, tag, bits) {
            Ok(at) => Some(std::mem::replace(&mut segment[at], slot).entry()),
            Err(at) => {
                if segment.len() == segment.capacity() {
                    self.segments_size -= segment_size(segment);
                    segment.reserve_exact(capacity_for(segment.len() + 1) - segment.len());
                    self.segments_size += segment_size(segment);
                }
                segment.insert(at, slot);
                root.len += 1;
                self.len += 1;
                self.grow(root_at);
                None
            }
        }
    }

    fn remove(&mut self, identity: Identity) -> Option<Entry> {
        let (root_at, tag) = split(identity);
        let root = &mut self.roots[root_at];
        if root.segments.is_empty() {
            return None;
        }
        let (at, bits) = root.segment_of(tag);
        let segment = &mut root.segments[at];
        let found = position(segment, tag, bits).ok()?;
        let entry = segment.remove(found).entry();
        // Only once a good part of it is unused, or the next key would have it grow again.
        if segment.len() + segment.len() / 4 + 4 < segment.capacity() {
            self.segments_size -= segment_size(segment);
            segment.shrink_to(capacity_for(segment.len()));
            self.segments_size += segment_size(segment);
        }
        root.len -= 1;
        self.len -= 1;
        self.shrink(root_at);
        Some(entry)
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn heap_size(&self) -> usize {
        taken_by(self.roots.capacity() * std::mem::size_of::<Root>()) + self.segments_size
    }

    fn clear(&mut self) {
        *self = HashIndex::default();
    }

    fn retain(&mut self, keep: &mut dyn FnMut(Identity, &Entry) -> bool) {
        for (root_at, root) in self.roots.iter_mut().enumerate() {
            for segment in &mut root.segments {
                let before = segment.len();
                segment.retain(|slot| keep(join(root_at, slot.tag()), &slot.entry()));
                root.len -= before - segment.len();
                self.len -= (before - segment.len()) as u64;
            }
        }
    }

    fn scan(&self, cursor: u64, count: usize, visit: &mut dyn FnMut(Identity, &Entry)) -> u64 {
        const CURSOR_STEP: u64 = 1 << 8;
        let (mut visited, mut passed) = (0, 0);
        let passed_max = count.saturating_mul(16).saturating_add(SCAN_PASSED_MAX);
        let (first_root, first_tag) = split(Identity { upper: cursor, lower: 0 });
        // Where the last key that was visited is, as cursors can tell.
        let mut last = u64::MAX;
        for (root_at, root) in self.roots.iter().enumerate().skip(first_root) {
            let from = if root_at == first_root { first_tag } else { 0 };
            let first_segment = if root.segments.is_empty() { 0 } else { root.segment_of(from).0 };
            passed += 1;
            for (at, segment) in root.segments.iter().enumerate().skip(first_segment) {
                if passed > passed_max {
                    return join(root_at, root.first_tag(at).max(from)).upper / CURSOR_STEP * CURSOR_STEP;
                }
                passed += 1;
                for slot in &segment[segment.partition_point(|slot| slot.tag() < from)..] {
                    let identity = join(root_at, slot.tag());
                    let place = identity.upper / CURSOR_STEP;
                    if visited >= count.max(1) && place != last {
                        return place * CURSOR_STEP;
                    }
                    visit(identity, &slot.entry());
                    visited += 1;
                    last = place;
                }
            }
        }
        0
    }
}

const _: () = assert!(TAG_BITS - IDENTITY_LOWER_BITS + ROOT_BITS == 64);

#[cfg(test)]
impl HashIndex {
    /// Checks every invariant, and how many segments there are.
    pub(super) fn check(&self) -> usize {
        let mut size = 0;
        for (root_at, root) in self.roots.iter().enumerate() {
            let expected = if root.segments.is_empty() { 0 } else { (1 << root.level) + root.split_count };
            assert_eq!(root.segments.len(), expected, "root {root_at}");
            assert_eq!(root.len, root.segments.iter().map(Vec::len).sum::<usize>());
            for (at, segment) in root.segments.iter().enumerate() {
                assert!(segment.is_sorted_by(|one, next| one.tag() < next.tag()));
                assert!(segment.iter().all(|slot| root.segment_of(slot.tag()).0 == at));
                assert_eq!(root.segment_of(root.first_tag(at)).0, at);
                size += segment_size(segment);
            }
            size += root.table_size();
        }
        assert_eq!(size, self.segments_size);
        assert_eq!(self.len, self.roots.iter().map(|root| root.len as u64).sum::<u64>());
        self.roots.iter().map(|root| root.segments.len()).sum()
    }
}
