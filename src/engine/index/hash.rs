//! The index `hash`: 15 bytes a key, in arrays ordered by hash.
//!
//! ```text
//! identity   | root (10) | tag (59)                                                  |
//! roots      [ 0 ][ 1 ] ... [ 1023 ]          each: segments in order, together all of its tags
//! segment    [tag|entry][tag|entry] ...       ordered by tag, without gaps, as long as it needs to be
//! granules   [ 17 slots ][ 17 slots ] ...     what segments are made of; only a segment's last one has room
//! ```
//!
//! A root grows by linear hashing: its segments are split in two one after the other, from its lowest tags on, so that which
//! segment a tag is in follows from two numbers, and growing never moves more than one segment. Hashes are even, so a tag is
//! looked for where it would be if they were spaced evenly, and that is rarely off by more than a dozen slots.
//!
//! Invariants:
//! - Segments are in the order of their tags, and so are the slots in each.
//! - A root's granules are listed in that order too, so a tag's place in the list can be told from the tag.
//! - Roots grow at different fills, so that they do not all have the same room to spare at the same time.

mod builder;

pub use builder::HashIndexBuilder;

use super::granules::{GRANULE_SLOTS, Granules, Moved};
use super::slot::{ROOT_BITS, SLOT_SIZE, Slot, TAG_BITS, join, split};
use super::{Entry, IDENTITY_LOWER_BITS, Identity, Index};
use crate::planted::{Bug, is_planted};
use crate::sys::heap::taken;
use crate::sys::prefetch::prefetch;

const ROOT_COUNT: usize = 1 << ROOT_BITS;

/// Granules of every fourth root are kept together: what is left of the root's number fits into the byte that a granule has for
/// it.
const PART_COUNT: usize = 4;

const _: () = assert!(ROOT_COUNT / PART_COUNT == 1 << 8);

/// Slots of a segment, on average, at which the root splits the next one: of the first root, and nearly twice as many of the
/// last one. Shorter segments would waste more of their last granules, longer ones would take longer to insert into.
const FILL_MIN: usize = 240;

/// Granules looked at one by one around where a tag should be, before the rest is halved.
const STEPS_MAX: usize = 4;

/// Empty roots and segments that a scan passes over in one go, beside those that it counts as keys.
const SCAN_PASSED_MAX: usize = 4_096;

/// The most bits of a tag that tell a root's segments apart. With the root's it leaves the low bits of cursors zero.
const LEVEL_MAX: u32 = 32;

const _: () = assert!(ROOT_BITS + LEVEL_MAX < 56);

/// Where a segment is in its root's list of granules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    /// The first of its granules.
    start: u32,
    /// Keys.
    len: u32,
}

impl Segment {
    fn len(self) -> usize {
        self.len as usize
    }

    fn granules(self) -> std::ops::Range<usize> {
        let start = self.start as usize;
        start..start + self.len().div_ceil(GRANULE_SLOTS)
    }
}

/// Keys whose hashes begin with the same bits.
#[derive(Default)]
struct Root {
    /// None before the first key; otherwise 2^level and as many more as were split.
    segments: Vec<Segment>,
    /// The granules of all segments.
    granules: Vec<u32>,
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

    fn granules_of(&self, segment: usize) -> &[u32] {
        &self.granules[self.segments[segment].granules()]
    }

    /// A segment has granules at the end of its part of the list that it did not have, or not any more.
    fn shift_behind(&mut self, segment: usize, by: i64) {
        for one in &mut self.segments[segment + 1..] {
            one.start = (i64::from(one.start) + by) as u32;
        }
    }

    fn tables_size(&self) -> usize {
        taken_by(self.segments.capacity() * std::mem::size_of::<Segment>())
            + taken_by(self.granules.capacity() * std::mem::size_of::<u32>())
    }
}

fn taken_by(size: usize) -> usize {
    if size == 0 { 0 } else { taken(size) }
}

/// Room for so many more. A doubling would leave room for as many again, in each of a thousand roots.
fn reserve<T>(table: &mut Vec<T>, more: usize) {
    if table.len() + more > table.capacity() {
        table.reserve_exact(more + table.len() / 16);
    }
}

/// Where a tag would be among so many if tags were spaced evenly, when the first bits of it are said already.
fn estimate(len: usize, tag: u64, bits: u32) -> usize {
    let rest = tag << (64 - TAG_BITS) << bits;
    ((u128::from(rest) * len as u128) >> 64) as usize
}

/// Where a tag is in a segment, or where it would have to be put.
fn position(part: &Granules, listed: &[u32], len: usize, tag: u64, bits: u32) -> Result<usize, usize> {
    if len == 0 {
        return Err(0);
    }
    let used = |at: usize| &part.get(listed[at]).slots[..GRANULE_SLOTS.min(len - at * GRANULE_SLOTS)];
    let mut at = estimate(len, tag, bits) / GRANULE_SLOTS;
    for step in 0.. {
        if step == STEPS_MAX {
            at = listed.partition_point(|one| part.get(*one).slots[0].tag() <= tag).saturating_sub(1);
        }
        let slots = used(at);
        if tag < slots[0].tag() {
            if at == 0 {
                return Err(0);
            }
            if step < STEPS_MAX {
                at -= 1;
                continue;
            }
        }
        if slots[slots.len() - 1].tag() < tag {
            let is_next = listed.get(at + 1).is_some_and(|next| part.get(*next).slots[0].tag() <= tag);
            if is_next && step < STEPS_MAX {
                at += 1;
                continue;
            }
            return Err(at * GRANULE_SLOTS + slots.len());
        }
        let before = slots.iter().filter(|slot| slot.tag() < tag).count();
        let found = at * GRANULE_SLOTS + before;
        return if slots[before].tag() == tag { Ok(found) } else { Err(found) };
    }
    unreachable!("the loop has no end")
}

/// Where granules of a root are, and what they know of it.
fn owned_by(root: usize) -> (usize, u8) {
    (root % PART_COUNT, (root / PART_COUNT) as u8)
}

/// Keys by their identities.
pub struct HashIndex {
    roots: Vec<Root>,
    parts: [Granules; PART_COUNT],
    len: u64,
    /// Bytes that the tables of all roots take.
    tables_size: usize,
}

impl Default for HashIndex {
    fn default() -> Self {
        let roots = std::iter::repeat_with(Root::default).take(ROOT_COUNT).collect();
        HashIndex { roots, parts: Default::default(), len: 0, tables_size: 0 }
    }
}

impl HashIndex {
    /// Slots of a segment, on average, that a root has when it grows.
    fn fill_of(root: usize) -> usize {
        FILL_MIN + FILL_MIN * root / ROOT_COUNT
    }

    fn find(&self, identity: Identity) -> Option<&Slot> {
        let (root_at, tag) = split(identity);
        let root = &self.roots[root_at];
        if root.segments.is_empty() {
            return None;
        }
        let part = &self.parts[owned_by(root_at).0];
        let (at, bits) = root.segment_of(tag);
        let listed = root.granules_of(at);
        let found = position(part, listed, root.segments[at].len(), tag, bits).ok()?;
        Some(&part.get(listed[found / GRANULE_SLOTS]).slots[found % GRANULE_SLOTS])
    }

    /// The slots of a segment from one of them on.
    fn slots_from(&self, root_at: usize, segment: usize, first: usize) -> impl Iterator<Item = &Slot> {
        let (root, part) = (&self.roots[root_at], &self.parts[owned_by(root_at).0]);
        let count = root.segments[segment].len().saturating_sub(first);
        let listed = &root.granules_of(segment)
            [(first / GRANULE_SLOTS).min(root.segments[segment].granules().len())..];
        let slots = listed.iter().flat_map(|at| &part.get(*at).slots);
        slots.skip(first % GRANULE_SLOTS).take(count)
    }

    /// All slots of a segment, for `for_each`: it takes a granule as a whole.
    fn slots_of(&self, root_at: usize, segment: usize) -> impl Iterator<Item = &Slot> {
        let (root, part) = (&self.roots[root_at], &self.parts[owned_by(root_at).0]);
        let len = root.segments[segment].len();
        let listed = root.granules_of(segment).iter().enumerate();
        listed.flat_map(move |(nth, at)| &part.get(*at).slots[..GRANULE_SLOTS.min(len - nth * GRANULE_SLOTS)])
    }

    /// Writes slots over those of a segment from one of them on. It has the granules for them.
    fn write(&mut self, root_at: usize, start: usize, first: usize, slots: &[Slot]) {
        let (root, part) = (&self.roots[root_at], &mut self.parts[owned_by(root_at).0]);
        for (at, slot) in (first..).zip(slots) {
            part.slots_mut(root.granules[start + at / GRANULE_SLOTS])[at % GRANULE_SLOTS] = *slot;
        }
    }

    /// Gives back a granule that is in nobody's list any more. The lists name all others.
    fn give_back(&mut self, part_at: usize, granule: u32) {
        let part = &mut self.parts[part_at];
        let Some(Moved { from, to, owner }) = part.remove(granule) else { return };
        let root = &mut self.roots[usize::from(owner) * PART_COUNT + part_at];
        let segment = root.segment_of(part.get(to).slots[0].tag()).0;
        let range = root.segments[segment].granules();
        let listed = root.granules[range].iter_mut().find(|one| **one == from);
        *listed.expect("a granule is in the list of its segment") = to;
    }

    /// Splits the next segment of a root that has too many keys for its segments.
    fn grow(&mut self, root_at: usize) {
        let root = &self.roots[root_at];
        if root.len <= root.segments.len() * Self::fill_of(root_at) || root.level == LEVEL_MAX {
            return;
        }
        self.tables_size -= root.tables_size();
        let (part_at, owner) = owned_by(root_at);
        let low_at = 2 * root.split_count;
        let middle = (2 * root.split_count as u64 + 1) << (TAG_BITS - root.level - 1);
        let (low, listed) = (root.segments[low_at], root.granules_of(low_at));
        let kept =
            position(&self.parts[part_at], listed, low.len(), middle, root.level).unwrap_or_else(|at| at);
        let kept = if is_planted(Bug::SplitsIndexWrongly) { kept.midpoint(low.len()) } else { kept };
        let moved: Vec<Slot> = self.slots_from(root_at, low_at, kept).copied().collect();

        // The upper half begins a granule of its own, for which it may need one more.
        let root = &mut self.roots[root_at];
        let start = low.granules().start + kept.div_ceil(GRANULE_SLOTS);
        let end = start + moved.len().div_ceil(GRANULE_SLOTS);
        let is_one_more = end > low.granules().end;
        if is_one_more {
            reserve(&mut root.granules, 1);
            root.granules.insert(end - 1, self.parts[part_at].add(owner));
        }
        reserve(&mut root.segments, 1);
        root.segments[low_at].len = kept as u32;
        root.segments.insert(low_at + 1, Segment { start: start as u32, len: moved.len() as u32 });
        root.shift_behind(low_at + 1, i64::from(is_one_more));
        root.split_count += 1;
        if root.split_count == 1 << root.level {
            (root.level, root.split_count) = (root.level + 1, 0);
        }
        self.tables_size += root.tables_size();
        self.write(root_at, start, 0, &moved);
    }

    /// Makes one again of the two segments that were split last, in a root that has few keys for its segments.
    fn shrink(&mut self, root_at: usize) {
        let root = &mut self.roots[root_at];
        if root.segments.len() < 2 || root.len >= root.segments.len() * Self::fill_of(root_at) / 2 {
            return;
        }
        self.tables_size -= root.tables_size();
        if root.split_count == 0 {
            (root.level, root.split_count) = (root.level - 1, 1 << (root.level - 1));
        }
        root.split_count -= 1;
        let low_at = 2 * root.split_count;
        let moved: Vec<Slot> = self.slots_from(root_at, low_at + 1, 0).copied().collect();
        let root = &mut self.roots[root_at];
        let high = root.segments.remove(low_at + 1);
        let low = root.segments[low_at];
        root.segments[low_at].len += high.len;
        // The two last granules may have had room for the slots of one.
        let end = root.segments[low_at].granules().end;
        let spare = (end < high.granules().end).then(|| root.granules.remove(end));
        root.shift_behind(low_at, -i64::from(spare.is_some()));
        root.segments.shrink_to(root.segments.len() + root.segments.len() / 16);
        root.granules.shrink_to(root.granules.len() + root.granules.len() / 16);
        self.tables_size += root.tables_size();
        self.write(root_at, low.granules().start, low.len(), &moved);
        if let Some(spare) = spare {
            self.give_back(owned_by(root_at).0, spare);
        }
    }
}

impl Index for HashIndex {
    fn get(&self, identity: Identity) -> Option<Entry> {
        self.find(identity).map(Slot::entry)
    }

    fn prefetch_segment(&self, identity: Identity) {
        let (at, tag) = split(identity);
        let root = &self.roots[at];
        if root.segments.is_empty() {
            return;
        }
        prefetch(&root.segments[root.segment_of(tag).0]);
        // Granules hold about as many keys each, so the list is as even as the hashes.
        if let Some(listed) = root.granules.get(estimate(root.granules.len(), tag, 0)) {
            prefetch(listed);
        }
    }

    fn prefetch_slots(&self, identity: Identity) {
        let (root_at, tag) = split(identity);
        let root = &self.roots[root_at];
        if root.segments.is_empty() {
            return;
        }
        let (at, bits) = root.segment_of(tag);
        let at_in = estimate(root.segments[at].len(), tag, bits) / GRANULE_SLOTS;
        if let Some(granule) = root.granules_of(at).get(at_in) {
            let granule = self.parts[owned_by(root_at).0].get(*granule);
            granule.slots.iter().step_by(64 / SLOT_SIZE).for_each(prefetch);
        }
    }

    fn insert(&mut self, identity: Identity, entry: Entry) -> Option<Entry> {
        let (root_at, tag) = split(identity);
        let (part_at, owner) = owned_by(root_at);
        let (root, part) = (&mut self.roots[root_at], &mut self.parts[part_at]);
        if root.segments.is_empty() {
            root.segments.reserve_exact(1);
            root.segments.push(Segment { start: 0, len: 0 });
            self.tables_size += root.tables_size();
        }
        let (at, bits) = root.segment_of(tag);
        let segment = root.segments[at];
        let slot = Slot::new(tag, &entry);
        let place = match position(part, root.granules_of(at), segment.len(), tag, bits) {
            Ok(found) => {
                let granule = root.granules_of(at)[found / GRANULE_SLOTS];
                let before = &mut part.slots_mut(granule)[found % GRANULE_SLOTS];
                return Some(std::mem::replace(before, slot).entry());
            }
            Err(place) => place,
        };
        let (last, last_len) = (segment.len() / GRANULE_SLOTS, segment.len() % GRANULE_SLOTS);
        if last_len == 0 {
            self.tables_size -= root.tables_size();
            reserve(&mut root.granules, 1);
            root.granules.insert(segment.granules().end, part.add(owner));
            root.shift_behind(at, 1);
            self.tables_size += root.tables_size();
        }
        // What falls out of a granule goes into the next one.
        let mut carried = slot;
        let mut from = place % GRANULE_SLOTS;
        for nth in place / GRANULE_SLOTS..=last {
            let slots = part.slots_mut(root.granules[segment.start as usize + nth]);
            let end = if nth == last { last_len } else { GRANULE_SLOTS - 1 };
            let out = slots[end];
            slots.copy_within(from..end, from + 1);
            slots[from] = carried;
            (carried, from) = (out, 0);
        }
        root.segments[at].len += 1;
        root.len += 1;
        self.len += 1;
        self.grow(root_at);
        None
    }

    fn remove(&mut self, identity: Identity) -> Option<Entry> {
        let (root_at, tag) = split(identity);
        let part_at = owned_by(root_at).0;
        let (root, part) = (&mut self.roots[root_at], &mut self.parts[part_at]);
        if root.segments.is_empty() {
            return None;
        }
        let (at, bits) = root.segment_of(tag);
        let segment = root.segments[at];
        let listed = root.granules_of(at);
        let found = position(part, listed, segment.len(), tag, bits).ok()?;
        let entry = part.get(listed[found / GRANULE_SLOTS]).slots[found % GRANULE_SLOTS].entry();
        let (last, last_at) = ((segment.len() - 1) / GRANULE_SLOTS, (segment.len() - 1) % GRANULE_SLOTS);
        let mut from = found % GRANULE_SLOTS;
        for nth in found / GRANULE_SLOTS..=last {
            let next = (nth < last).then(|| part.get(listed[nth + 1]).slots[0]);
            let slots = part.slots_mut(listed[nth]);
            let end = if nth == last { last_at } else { GRANULE_SLOTS - 1 };
            slots.copy_within(from + 1..=end, from);
            if let Some(next) = next {
                slots[end] = next;
            }
            from = 0;
        }
        root.segments[at].len -= 1;
        root.len -= 1;
        self.len -= 1;
        if last_at == 0 {
            let spare = root.granules.remove(segment.granules().end - 1);
            root.shift_behind(at, -1);
            self.give_back(part_at, spare);
        }
        self.shrink(root_at);
        Some(entry)
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn heap_size(&self) -> usize {
        let roots = taken_by(self.roots.capacity() * std::mem::size_of::<Root>());
        roots + self.tables_size + self.parts.iter().map(Granules::heap_size).sum::<usize>()
    }

    fn clear(&mut self) {
        *self = HashIndex::default();
    }

    fn retain(&mut self, keep: &mut dyn FnMut(Identity, &Entry) -> bool) {
        let mut behind: Vec<Slot> = Vec::new();
        for root_at in 0..ROOT_COUNT {
            let part_at = owned_by(root_at).0;
            let (mut kept, mut spare) = (Vec::new(), Vec::new());
            let before = self.roots[root_at].len;
            for at in 0..self.roots[root_at].segments.len() {
                let segment = self.roots[root_at].segments[at];
                // Slots are written from the first one on that does not stay where it is: mostly there is none.
                let mut stay = 0;
                behind.clear();
                self.slots_of(root_at, at).enumerate().for_each(|(nth, slot)| {
                    match keep(join(root_at, slot.tag()), &slot.entry()) {
                        true if stay == nth => stay += 1,
                        true => behind.push(*slot),
                        false => {}
                    }
                });
                self.write(root_at, segment.granules().start, stay, &behind);
                let root = &mut self.roots[root_at];
                let after = Segment { start: kept.len() as u32, len: (stay + behind.len()) as u32 };
                let listed = &root.granules[segment.granules()];
                let (used, unused) = listed.split_at(after.granules().len());
                kept.extend_from_slice(used);
                spare.extend_from_slice(unused);
                // Until the list is replaced, the next segments are where they were.
                root.segments[at].len = after.len;
                root.len -= segment.len() - after.len();
            }
            let root = &mut self.roots[root_at];
            self.len -= (before - root.len) as u64;
            if spare.is_empty() {
                continue;
            }
            self.tables_size -= root.tables_size();
            let mut start = 0;
            for segment in &mut root.segments {
                segment.start = start;
                start += segment.granules().len() as u32;
            }
            root.granules = kept;
            self.tables_size += root.tables_size();
            // From the last one on: what takes the place of one is then never one that is to go as well.
            spare.sort_unstable();
            while let Some(one) = spare.pop() {
                self.give_back(part_at, one);
            }
        }
    }

    fn each(&self, visit: &mut dyn FnMut(Identity, &Entry)) {
        for (root_at, root) in self.roots.iter().enumerate() {
            for at in 0..root.segments.len() {
                self.slots_of(root_at, at).for_each(|slot| visit(join(root_at, slot.tag()), &slot.entry()));
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
            let part = &self.parts[owned_by(root_at).0];
            passed += 1;
            for (at, segment) in root.segments.iter().enumerate().skip(first_segment) {
                if passed > passed_max {
                    return join(root_at, root.first_tag(at).max(from)).upper / CURSOR_STEP * CURSOR_STEP;
                }
                passed += 1;
                let bits = root.segment_of(root.first_tag(at)).1;
                // The first segment's tags go on from `from`, those of the next ones are all behind it.
                let first = if root.first_tag(at) >= from {
                    0
                } else {
                    position(part, root.granules_of(at), segment.len(), from, bits).unwrap_or_else(|at| at)
                };
                for slot in self.slots_from(root_at, at, first) {
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
        let mut owned = [const { std::collections::BTreeSet::new() }; PART_COUNT];
        for (root_at, root) in self.roots.iter().enumerate() {
            let expected = if root.segments.is_empty() { 0 } else { (1 << root.level) + root.split_count };
            assert_eq!(root.segments.len(), expected, "root {root_at}");
            assert_eq!(root.len, root.segments.iter().map(|one| one.len()).sum::<usize>());
            let mut start = 0;
            for (at, segment) in root.segments.iter().enumerate() {
                assert_eq!(segment.granules().start, start, "root {root_at}, segment {at}");
                start = segment.granules().end;
                assert!(self.slots_from(root_at, at, 0).is_sorted_by(|one, next| one.tag() < next.tag()));
                assert!(self.slots_from(root_at, at, 0).all(|slot| root.segment_of(slot.tag()).0 == at));
                assert_eq!(root.segment_of(root.first_tag(at)).0, at);
            }
            assert_eq!(root.granules.len(), start);
            let (part, owner) = owned_by(root_at);
            for granule in &root.granules {
                assert!(owned[part].insert(*granule), "two lists have granule {granule} of part {part}");
                assert_eq!(self.parts[part].get(*granule).owner(), owner);
            }
            size += root.tables_size();
        }
        for (part, owned) in self.parts.iter().zip(owned) {
            assert_eq!(part.len(), owned.len());
            assert!(owned.last().is_none_or(|last| (*last as usize) < part.len()));
        }
        assert_eq!(size, self.tables_size);
        assert_eq!(self.len, self.roots.iter().map(|root| root.len as u64).sum::<u64>());
        self.roots.iter().map(|root| root.segments.len()).sum()
    }
}
