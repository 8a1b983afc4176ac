//! The index: where each key's newest record is.
//!
//! [`Index`] is the seam; [`HashIndex`] is the simplest correct kind: it keeps whole keys in memory. Its buckets cover
//! contiguous ranges of the keyed hash, so a scan's cursor is a hash and survives growth.

use std::hash::Hasher;

use siphasher::sip::SipHasher13;

use crate::sys::prefetch::prefetch;

/// Where a record is and what can be known without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The extent.
    pub extent: u32,
    /// Bytes from the extent's start to the record.
    pub offset: u32,
    /// Bytes of the record.
    pub size: u32,
    /// Bytes of the value.
    pub value_size: u32,
    /// The record's sequence.
    pub sequence: u64,
    /// Milliseconds since the Unix epoch, 0 for none.
    pub expires_at_ms: u64,
    /// The record is a part of a batch: it counts only while the batch's commit record is there.
    pub is_part: bool,
    /// The value is long: the record is its manifest, and `value_size` is the length of the value.
    pub is_long: bool,
}

/// The keyed hash of a key: the device's secret keeps clients from choosing collisions.
pub fn hash_key(secret: &[u8; 16], key: &[u8]) -> u64 {
    let mut hasher = SipHasher13::new_with_key(secret);
    hasher.write(key);
    hasher.finish()
}

/// What a shard needs of an index. Hashes are those of [`hash_key`].
pub trait Index {
    /// The entry of a key.
    fn get(&self, hash: u64, key: &[u8]) -> Option<&Entry>;
    /// Begins to fetch where the slots of a hash are said to be.
    fn prefetch_bucket(&self, hash: u64);
    /// Begins to fetch the slots of a hash; `prefetch_bucket` was called a while ago.
    fn prefetch_slots(&self, hash: u64);
    /// Sets the entry of a key and returns the one it replaces.
    fn insert(&mut self, hash: u64, key: &[u8], entry: Entry) -> Option<Entry>;
    /// Removes a key and returns its entry.
    fn remove(&mut self, hash: u64, key: &[u8]) -> Option<Entry>;
    /// Keys in it.
    fn len(&self) -> u64;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Bytes of memory that it takes.
    fn heap_size(&self) -> usize;
    /// Removes all.
    fn clear(&mut self);
    /// Keeps the entries that this wants.
    fn retain(&mut self, keep: &mut dyn FnMut(&Entry) -> bool);
    /// Visits keys whose hash is at or after `cursor` until about `count` were visited. Returns the cursor to go on with,
    /// 0 at the end. Every key with a hash in `cursor..next` was visited; the low 8 bits of a cursor are zero.
    fn scan(&self, cursor: u64, count: usize, visit: &mut dyn FnMut(&[u8], &Entry)) -> u64;
}

/// Bytes of a key that its slot holds itself.
const SHORT_KEY_SIZE_MAX: usize = 22;

/// A key. Following a pointer to compare it would be one more miss of the processor's cache in each look-up.
enum StoredKey {
    Short { size: u8, bytes: [u8; SHORT_KEY_SIZE_MAX] },
    Long(Box<[u8]>),
}

// As much as the box takes alone, but for its alignment.
const _: () = assert!(std::mem::size_of::<StoredKey>() == 24);

impl StoredKey {
    fn new(key: &[u8]) -> StoredKey {
        let mut bytes = [0; SHORT_KEY_SIZE_MAX];
        match bytes.get_mut(..key.len()) {
            Some(start) => {
                start.copy_from_slice(key);
                StoredKey::Short { size: key.len() as u8, bytes }
            }
            None => StoredKey::Long(key.into()),
        }
    }

    fn as_slice(&self) -> &[u8] {
        match self {
            StoredKey::Short { size, bytes } => &bytes[..usize::from(*size)],
            StoredKey::Long(key) => key,
        }
    }

    /// Bytes of memory beside the slot.
    fn heap_size(&self) -> usize {
        match self {
            StoredKey::Short { .. } => 0,
            StoredKey::Long(key) => allocated(key.len()),
        }
    }
}

struct Slot {
    hash: u64,
    key: StoredKey,
    entry: Entry,
}

impl Slot {
    fn is_of(&self, hash: u64, key: &[u8]) -> bool {
        self.hash == hash && self.key.as_slice() == key
    }
}

/// Keys per bucket, on average, at which a segment's buckets double.
const BUCKET_LOAD_MAX: usize = 4;

/// Buckets of an empty segment, and the most of one, as powers of two. The most is what is moved at once when the index
/// grows: 4,096 keys, well within a millisecond.
const BITS_MIN: u32 = 4;
const BITS_MAX: u32 = 10;

/// The longest prefix of hashes that segments are told apart by. With the buckets' bits it leaves the low bits of cursors zero.
const DEPTH_MAX: u32 = 40;

const _: () = assert!(DEPTH_MAX + BITS_MAX <= 56);

/// The simplest correct index: whole keys in memory, buckets by the hash's upper bits.
///
/// It is made of segments, each with the keys whose hashes begin with the same bits. A full one is split in two; a directory
/// over the first bits of hashes says which is whose (extendible hashing), so that growing never moves more than a segment.
pub struct HashIndex {
    /// By the first `directory_bits` of a hash: its segment.
    directory: Vec<u32>,
    directory_bits: u32,
    segments: Vec<Segment>,
    len: u64,
    /// Bytes of the buckets' slots and of the keys, as an allocator gives them.
    slots_size: usize,
    /// Bytes of the segments' buckets.
    buckets_size: usize,
}

/// Keys whose hashes begin with the same `depth` bits, in buckets by the bits that follow.
struct Segment {
    depth: u32,
    bits: u32,
    len: usize,
    buckets: Vec<Vec<Slot>>,
}

impl Segment {
    fn new(depth: u32, bits: u32) -> Segment {
        let buckets = std::iter::repeat_with(Vec::new).take(1 << bits).collect();
        Segment { depth, bits, len: 0, buckets }
    }

    fn bucket(&self, hash: u64) -> usize {
        ((hash << self.depth) >> (64 - self.bits)) as usize
    }

    fn buckets_size(&self) -> usize {
        allocated(self.buckets.capacity() * std::mem::size_of::<Vec<Slot>>())
    }

    fn slots_size(&self) -> usize {
        self.buckets.iter().map(bucket_size).sum()
    }

    fn push(&mut self, slot: Slot) {
        let at = self.bucket(slot.hash);
        self.buckets[at].push(slot);
        self.len += 1;
    }

    fn is_full(&self) -> bool {
        self.len > BUCKET_LOAD_MAX << self.bits
    }
}

impl Default for HashIndex {
    fn default() -> Self {
        let first = Segment::new(0, BITS_MIN);
        HashIndex {
            directory: vec![0],
            directory_bits: 0,
            len: 0,
            slots_size: 0,
            buckets_size: first.buckets_size(),
            segments: vec![first],
        }
    }
}

/// What an allocation of so many bytes takes: a word for the allocator, in steps of two.
fn allocated(size: usize) -> usize {
    if size == 0 { 0 } else { (size + 8).next_multiple_of(16).max(32) }
}

fn bucket_size(bucket: &Vec<Slot>) -> usize {
    allocated(bucket.capacity() * std::mem::size_of::<Slot>())
}

impl HashIndex {
    fn segment(&self, hash: u64) -> usize {
        // A shift by all 64 bits is none at all, and an empty prefix is the first place.
        let at = hash.checked_shr(64 - self.directory_bits).unwrap_or(0);
        self.directory[at as usize] as usize
    }

    /// Makes room in a segment that is full: twice the buckets, or two segments of it.
    fn grow(&mut self, at: usize, hash: u64) {
        let Segment { depth, bits, .. } = self.segments[at];
        // A shard's hashes are even. Were they not, the directory would not grow beyond what the keys deserve.
        let may_split = depth < DEPTH_MAX && self.len >> depth >= 1 << BITS_MIN;
        let parts = match bits {
            BITS_MAX if !may_split => return,
            BITS_MAX => [Segment::new(depth + 1, BITS_MAX), Segment::new(depth + 1, BITS_MAX)],
            _ => [Segment::new(depth, bits + 1), Segment::new(0, 0)],
        };
        let is_split = bits == BITS_MAX;
        let old = std::mem::replace(&mut self.segments[at], Segment::new(0, 0));
        self.slots_size -= old.slots_size();
        self.buckets_size -= old.buckets_size();
        let [mut low, mut high] = parts;
        for slot in old.buckets.into_iter().flatten() {
            let is_high = is_split && (slot.hash << depth) >> 63 == 1;
            if is_high { high.push(slot) } else { low.push(slot) }
        }
        self.slots_size += low.slots_size();
        self.buckets_size += low.buckets_size();
        self.segments[at] = low;
        if is_split {
            self.slots_size += high.slots_size();
            self.buckets_size += high.buckets_size();
            self.add(high, hash);
        }
    }

    /// Puts a segment into the upper half of what the segment of a hash had of the directory.
    fn add(&mut self, segment: Segment, hash: u64) {
        if segment.depth > self.directory_bits {
            self.directory = self.directory.iter().flat_map(|one| [*one, *one]).collect();
            self.directory_bits += 1;
        }
        let new = self.segments.len() as u32;
        let count = 1 << (self.directory_bits - segment.depth);
        // Both halves begin with the same bits but the last.
        let prefix = hash >> (64 - segment.depth) | 1;
        let first = prefix as usize * count;
        self.directory[first..first + count].fill(new);
        self.segments.push(segment);
    }
}

impl Index for HashIndex {
    fn get(&self, hash: u64, key: &[u8]) -> Option<&Entry> {
        let segment = &self.segments[self.segment(hash)];
        let bucket = &segment.buckets[segment.bucket(hash)];
        bucket.iter().find(|slot| slot.is_of(hash, key)).map(|slot| &slot.entry)
    }

    fn prefetch_bucket(&self, hash: u64) {
        let segment = &self.segments[self.segment(hash)];
        prefetch(&segment.buckets[segment.bucket(hash)]);
    }

    fn prefetch_slots(&self, hash: u64) {
        let segment = &self.segments[self.segment(hash)];
        let bucket = &segment.buckets[segment.bucket(hash)];
        bucket.iter().take(BUCKET_LOAD_MAX).for_each(prefetch);
    }

    fn insert(&mut self, hash: u64, key: &[u8], entry: Entry) -> Option<Entry> {
        let segment_at = self.segment(hash);
        let segment = &mut self.segments[segment_at];
        let at = segment.bucket(hash);
        let bucket = &mut segment.buckets[at];
        if let Some(slot) = bucket.iter_mut().find(|slot| slot.is_of(hash, key)) {
            return Some(std::mem::replace(&mut slot.entry, entry));
        }
        self.slots_size -= bucket_size(bucket);
        let key = StoredKey::new(key);
        self.slots_size += key.heap_size();
        bucket.push(Slot { hash, key, entry });
        self.slots_size += bucket_size(bucket);
        segment.len += 1;
        self.len += 1;
        if segment.is_full() {
            self.grow(segment_at, hash);
        }
        None
    }

    fn remove(&mut self, hash: u64, key: &[u8]) -> Option<Entry> {
        let segment_at = self.segment(hash);
        let segment = &mut self.segments[segment_at];
        let at = segment.bucket(hash);
        let bucket = &mut segment.buckets[at];
        let found = bucket.iter().position(|slot| slot.is_of(hash, key))?;
        segment.len -= 1;
        self.len -= 1;
        let slot = bucket.swap_remove(found);
        self.slots_size -= slot.key.heap_size();
        Some(slot.entry)
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn heap_size(&self) -> usize {
        let directory = self.directory.capacity() * std::mem::size_of::<u32>()
            + self.segments.capacity() * std::mem::size_of::<Segment>();
        directory + self.buckets_size + self.slots_size
    }

    fn clear(&mut self) {
        *self = HashIndex::default();
    }

    fn retain(&mut self, keep: &mut dyn FnMut(&Entry) -> bool) {
        let mut keys_size = 0;
        for segment in &mut self.segments {
            for bucket in &mut segment.buckets {
                let before = bucket.len();
                bucket.retain(|slot| {
                    let stays = keep(&slot.entry);
                    keys_size += if stays { 0 } else { slot.key.heap_size() };
                    stays
                });
                segment.len -= before - bucket.len();
                self.len -= (before - bucket.len()) as u64;
            }
        }
        self.slots_size -= keys_size;
    }

    fn scan(&self, cursor: u64, count: usize, visit: &mut dyn FnMut(&[u8], &Entry)) -> u64 {
        let (mut visited, mut passed, mut at) = (0, 0, cursor);
        loop {
            let segment = &self.segments[self.segment(at)];
            let first = segment.bucket(at);
            // Hashes of one bucket.
            let width = 1_u64 << (64 - segment.depth - segment.bits);
            for bucket in &segment.buckets[first..] {
                // The first bucket may have been split from one that an earlier call visited in part of its range.
                for slot in bucket.iter().filter(|slot| slot.hash >= cursor) {
                    visit(slot.key.as_slice(), &slot.entry);
                    visited += 1;
                }
                passed += 1;
                // To where the next bucket's hashes begin; past the last one it is 0.
                at = (at & !(width - 1)).wrapping_add(width);
                // Empty buckets count a little, so that a sparse index can't hold its thread for long.
                if at == 0 || visited >= count || passed > count.saturating_mul(16) {
                    return at;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    fn entry(sequence: u64) -> Entry {
        Entry {
            extent: 1,
            offset: 2,
            size: 3,
            value_size: 4,
            sequence,
            expires_at_ms: 0,
            is_part: false,
            is_long: false,
        }
    }

    fn key(i: u32) -> Vec<u8> {
        format!("key:{i}").into_bytes()
    }

    #[test]
    fn keys_of_every_length_are_kept_whole() {
        let mut index = HashIndex::default();
        let keys: Vec<Vec<u8>> = (0..100).map(|size| vec![b'k'; size]).collect();
        for (at, key) in keys.iter().enumerate() {
            // All in one bucket, each the beginning of the next.
            assert_eq!(index.insert(1, key, entry(at as u64)), None);
        }
        let empty_size = HashIndex::default().heap_size();
        for (at, key) in keys.iter().enumerate() {
            assert_eq!(index.get(1, key), Some(&entry(at as u64)));
        }
        let mut seen = Vec::new();
        assert_eq!(index.scan(0, 1_000, &mut |key, _| seen.push(key.to_vec())), 0);
        assert_eq!(seen, keys);
        for (at, key) in keys.iter().enumerate() {
            assert_eq!(index.remove(1, key), Some(entry(at as u64)));
        }
        // Slots stay allocated; what long keys took is given back.
        let slots: usize = index.segments.iter().map(Segment::slots_size).sum();
        assert_eq!(index.slots_size, slots);
        assert!(index.heap_size() > empty_size);
    }

    #[test]
    fn it_behaves_like_a_map() {
        let mut index = HashIndex::default();
        let mut model = BTreeMap::new();
        let mut state = 7u64;
        for step in 0..150_000u64 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let k = key((state >> 40) as u32 % 30_000);
            let hash = hash_key(&[3; 16], &k);
            match (state >> 33) % 3 {
                0 => assert_eq!(index.remove(hash, &k), model.remove(&k)),
                _ => assert_eq!(index.insert(hash, &k, entry(step)), model.insert(k.clone(), entry(step))),
            }
            assert_eq!(index.get(hash, &k), model.get(&k));
            assert_eq!(index.len(), model.len() as u64);
        }
        assert!(index.segments.len() > 3, "{} segments", index.segments.len());
        let slots: usize = index.segments.iter().map(Segment::slots_size).sum();
        let buckets: usize = index.segments.iter().map(Segment::buckets_size).sum();
        assert_eq!((index.slots_size, index.buckets_size), (slots, buckets));
        assert!(index.segments.iter().all(|one| one.buckets.len() <= 1 << BITS_MAX && !one.is_full()));
        index.retain(&mut |one| one.sequence.is_multiple_of(3));
        model.retain(|_, one: &mut Entry| one.sequence.is_multiple_of(3));
        assert_eq!(index.len(), model.len() as u64);
        assert!(model.iter().all(|(k, one)| index.get(hash_key(&[3; 16], k), k) == Some(one)));
        index.clear();
        assert!(index.is_empty());
    }

    #[test]
    fn colliding_hashes_are_told_apart_by_their_keys() {
        let mut index = HashIndex::default();
        for i in 0..100 {
            index.insert(42, &key(i), entry(u64::from(i)));
        }
        assert_eq!(index.len(), 100);
        assert_eq!(index.get(42, &key(17)), Some(&entry(17)));
        assert_eq!(index.remove(42, &key(17)), Some(entry(17)));
        assert_eq!(index.get(42, &key(17)), None);
    }

    #[test]
    fn a_scan_returns_what_was_there_throughout_whatever_grows_or_goes() {
        let mut index = HashIndex::default();
        let hash = |k: &[u8]| hash_key(&[1; 16], k);
        for i in 0..500 {
            index.insert(hash(&key(i)), &key(i), entry(0));
        }
        let (mut cursor, mut seen, mut added) = (0, BTreeSet::new(), 1_000);
        let mut rounds = 0;
        loop {
            cursor = index.scan(cursor, 10, &mut |k, _| {
                seen.insert(k.to_vec());
            });
            assert_eq!(cursor & 0xff, 0);
            if cursor == 0 {
                break;
            }
            rounds += 1;
            // Bounded, or the scan's share of a growing index would shrink for ever.
            for _ in 0..if added < 20_000 { 200 } else { 0 } {
                index.insert(hash(&key(added)), &key(added), entry(0));
                added += 1;
            }
            index.remove(hash(&key(500 + rounds)), &key(500 + rounds));
        }
        assert!(
            rounds > 10 && index.segments.len() > 3,
            "{rounds} rounds, {} segments",
            index.segments.len()
        );
        assert!((0..500).all(|i| seen.contains(&key(i))));
    }
}
