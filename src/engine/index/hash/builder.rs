//! An index from keys that come in its order, as a checkpoint has them: a root is made at once, when all of its keys are known.
//!
//! Invariants:
//! - What comes of it is what inserting one key after the other would have come to.
//! - A key that is out of order costs more, and nothing else: of those that come again the last one counts.

use super::super::slot::{PackedEntry, Slot, split};
use super::super::{Identity, Index};
use super::{GRANULE_SLOTS, HashIndex, Segment, owned_by};

/// Keys on their way into an index.
#[derive(Default)]
pub struct HashIndexBuilder {
    index: HashIndex,
    /// The root whose keys are coming. It has none in the index.
    root: usize,
    /// Those keys, in order.
    slots: Vec<Slot>,
    /// The last one's tag.
    last: u64,
}

impl HashIndexBuilder {
    /// Adds a key.
    #[inline]
    pub fn add(&mut self, identity: Identity, entry: PackedEntry) {
        let (root, tag) = split(identity);
        // Most keys: the next one of the same root.
        if root == self.root && tag > self.last && !self.slots.is_empty() {
            self.slots.push(Slot::packed(tag, entry));
            self.last = tag;
            return;
        }
        self.put_root();
        if self.index.roots[root].segments.is_empty() {
            (self.root, self.last) = (root, tag);
            self.slots.push(Slot::packed(tag, entry));
        } else {
            self.index.insert(identity, entry.entry());
        }
    }

    /// Keys so far.
    pub fn len(&self) -> u64 {
        self.index.len() + self.slots.len() as u64
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The index.
    pub fn finish(mut self) -> HashIndex {
        self.put_root();
        self.index
    }

    fn put_root(&mut self) {
        if !self.slots.is_empty() {
            self.index.fill_root(self.root, &self.slots);
            self.slots.clear();
        }
    }
}

impl HashIndex {
    /// Puts keys, in order, into a root that has none.
    fn fill_root(&mut self, root_at: usize, slots: &[Slot]) {
        let (part_at, owner) = owned_by(root_at);
        let (root, part) = (&mut self.roots[root_at], &mut self.parts[part_at]);
        assert!(root.segments.is_empty() && root.granules.is_empty(), "a root is filled once");
        // As many segments as it would have grown to.
        let count = slots.len().div_ceil(Self::fill_of(root_at)).max(1);
        (root.level, root.len) = (count.ilog2(), slots.len());
        root.split_count = count - (1 << root.level);
        root.segments.reserve_exact(count);
        let (mut start, mut rest) = (0, slots);
        for at in 0..count {
            let end = match at + 1 < count {
                true => rest.partition_point(|slot| slot.tag() < root.first_tag(at + 1)),
                false => rest.len(),
            };
            let segment = Segment { start, len: end as u32 };
            start = segment.granules().end as u32;
            rest = &rest[end..];
            root.segments.push(segment);
        }
        root.granules.reserve_exact(start as usize);
        let mut rest = slots;
        for segment in &root.segments {
            let (own, behind) = rest.split_at(segment.len());
            for some in own.chunks(GRANULE_SLOTS) {
                let granule = part.add(owner);
                part.slots_mut(granule)[..some.len()].copy_from_slice(some);
                root.granules.push(granule);
            }
            rest = behind;
        }
        self.len += slots.len() as u64;
        self.tables_size += root.tables_size();
    }
}
