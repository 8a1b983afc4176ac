//! Records that were read or written lately, in memory, so that reading a hot one again needs no device.
//!
//! The cache is looked up by the key's hash and believed only where all 128 bits of it are the key's and the record is where the
//! index says. What was overwritten or deleted does not match any more; and as a key's record at a new place replaces, or removes,
//! what is here of the key, it matches never again, not even when an extent is in another life. Which records stay is decided by `quick_cache` (a CLOCK-PRO close to S3-FIFO: what is
//! seen once leaves first). Its hash is that of the key with the device's secret, and it knows no time and no randomness, so
//! that a run repeats exactly.
//!
//! Invariants:
//! - `size` counts the memory of the values and of the tables, and is at most `size_max` once `adjust` has been everywhere.
//! - The cache is made of segments of a few MiB, each with a table of its own: when one grows or shrinks, it does so
//!   within a millisecond.

use std::hash::{BuildHasher, Hasher};

use quick_cache::unsync::{Cache, DefaultLifecycle};
use quick_cache::{OptionsBuilder, Weighter};

use super::index::{Entry, KeyHash};
use super::op::Value;
use crate::planted::{Bug, is_planted};
use crate::sys::prefetch::prefetch;

/// About how large one segment may get.
const SEGMENT_SIZE: usize = 4 << 20;

/// The most segments: beyond 16 GiB a cache has larger ones.
const SEGMENT_COUNT_MAX: usize = 4_096;

/// A value is kept when it is no larger than this part of a segment.
const VALUE_PART: usize = 8;

/// A written value up to this size is kept as its writer brought it. Longer ones may sit in a larger allocation; reading
/// them once gives an exact copy.
const WRITTEN_VALUE_SIZE_MAX: usize = 16 << 10;

/// Segments that one `adjust` brings to the size that is wanted.
const ADJUST_STEP: usize = 4;

/// The memory of a record's place in the tables, just after they have doubled.
const PLACE_SIZE: u64 = 160;

/// One evicted record is remembered for so many bytes of a segment: each takes a place, too.
const BYTES_PER_GHOST: usize = 2_048;

const _: () = assert!(SEGMENT_COUNT_MAX.is_power_of_two());
const _: () = assert!(WRITTEN_VALUE_SIZE_MAX < SEGMENT_SIZE / VALUE_PART);
// A segment's capacity leaves an eighth of it to them.
const _: () = assert!(BYTES_PER_GHOST as u64 > 8 * PLACE_SIZE);

struct Cached {
    /// The part of the hash that it is not looked up by.
    lower: u64,
    extent: u32,
    offset: u32,
    value: Value,
}

impl Cached {
    fn is(&self, hash: KeyHash, extent: u32, offset: u32) -> bool {
        let is_place = (self.extent, self.offset) == (extent, offset) || is_planted(Bug::ServesStaleCache);
        self.lower == hash.lower() && is_place
    }
}

#[derive(Clone)]
struct HeapSize;

impl Weighter<u64, Cached> for HeapSize {
    /// What the value takes of the heap (its bytes, the counter that its copies share, and what an allocator adds to both),
    /// and its place in the tables.
    fn weight(&self, _hash: &u64, cached: &Cached) -> u64 {
        const SHARED: u64 = 32;
        (cached.value.len() as u64 + 8).next_multiple_of(16).max(32) + SHARED + PLACE_SIZE
    }
}

/// The keys are hashes already.
#[derive(Clone, Copy)]
struct AsItIs;

struct HashItself(u64);

impl Hasher for HashItself {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }
    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
    fn finish(&self) -> u64 {
        self.0
    }
}

impl BuildHasher for AsItIs {
    type Hasher = HashItself;
    fn build_hasher(&self) -> HashItself {
        HashItself(0)
    }
}

type Segment = Cache<u64, Cached, HeapSize, AsItIs>;

/// The memory that a segment takes.
fn segment_size(segment: &Segment) -> usize {
    let values = segment.weight() - PLACE_SIZE * segment.len() as u64;
    values as usize + segment.memory_used().total()
}

/// The weight that a segment of this size may hold; never 0, which would make it forget how many ghosts it keeps.
fn capacity(share: usize) -> u64 {
    (share / 8 * 7).max(1) as u64
}

fn new_segment(share: usize) -> Option<Segment> {
    let options = OptionsBuilder::new()
        .shards(1)
        .estimated_items_capacity(share / BYTES_PER_GHOST)
        .ghost_allocation(1.0)
        .weight_capacity(capacity(share))
        .build();
    Some(Cache::with_options(options.ok()?, HeapSize, AsItIs, DefaultLifecycle::default()))
}

/// The cache of one engine. It starts without any room.
#[derive(Default)]
pub(super) struct RecordCache {
    /// None, or a power of two.
    segments: Vec<Segment>,
    size: usize,
    size_max: usize,
    /// Segments from this one on are yet to be brought to the size that is wanted.
    adjusted: usize,
    hit_count: u64,
    miss_count: u64,
}

impl RecordCache {
    /// Bytes of memory that it takes.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// Look-ups that found the record, and those that did not.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.hit_count, self.miss_count)
    }

    /// Says how large it may be. It gets there with the next calls of `adjust`.
    pub(super) fn set_size_max(&mut self, size_max: usize) {
        if self.segments.is_empty() && size_max > 0 {
            self.make_segments(size_max);
        }
        self.size_max = size_max;
        self.adjusted = 0;
    }

    fn make_segments(&mut self, size_max: usize) {
        let count = (size_max / SEGMENT_SIZE).clamp(1, SEGMENT_COUNT_MAX);
        let count = 1 << count.ilog2();
        self.segments = (0..count).filter_map(|_| new_segment(size_max / count)).collect();
        self.size = self.segments.iter().map(segment_size).sum();
    }

    /// Brings some segments to the size that is wanted. Cheap when all are; to be called again and again.
    pub(super) fn adjust(&mut self) {
        if self.adjusted == self.segments.len() {
            return;
        }
        let share = self.size_max / self.segments.len();
        let end = (self.adjusted + ADJUST_STEP).min(self.segments.len());
        for segment in &mut self.segments[self.adjusted..end] {
            self.size -= segment_size(segment);
            if segment.capacity() != capacity(share) {
                segment.set_capacity(capacity(share));
            }
            // Tables never shrink by themselves.
            if segment_size(segment) > share
                && let Some(empty) = new_segment(share)
            {
                *segment = empty;
            }
            self.size += segment_size(segment);
        }
        self.adjusted = end;
        if end == self.segments.len() && self.size_max == 0 {
            // The tables go too.
            self.segments = Vec::new();
            self.size = 0;
            self.adjusted = 0;
        }
    }

    fn segment(&self, hash: KeyHash) -> usize {
        // The tables use the lowest and the highest bits.
        (hash.upper() >> 32) as usize & (self.segments.len() - 1)
    }

    /// Begins to fetch what is here of a key.
    pub(super) fn prefetch(&self, hash: KeyHash) {
        if !self.segments.is_empty()
            && let Some(cached) = self.segments[self.segment(hash)].peek(&hash.upper())
        {
            prefetch(&cached.value[..]);
        }
    }

    /// The value of a key's record at this place, if it is here.
    pub(super) fn get(&mut self, hash: KeyHash, extent: u32, offset: u32) -> Option<Value> {
        if self.segments.is_empty() {
            return None;
        }
        let at = self.segment(hash);
        match self.segments[at].get(&hash.upper()) {
            Some(cached) if cached.is(hash, extent, offset) => {
                self.hit_count += 1;
                Some(cached.value.clone())
            }
            _ => {
                self.miss_count += 1;
                None
            }
        }
    }

    /// The same, and a look-up that finds nothing does not count: another one follows.
    pub(super) fn get_if_here(&mut self, hash: KeyHash, extent: u32, offset: u32) -> Option<&Value> {
        if self.segments.is_empty() {
            return None;
        }
        let at = self.segment(hash);
        let cached = self.segments[at].get(&hash.upper()).filter(|cached| cached.is(hash, extent, offset))?;
        self.hit_count += 1;
        Some(&cached.value)
    }

    /// Keeps a key's newest record, if it is worth it: it replaces what was here of the key.
    pub(super) fn insert(&mut self, hash: KeyHash, extent: u32, offset: u32, value: Value) {
        if self.segments.is_empty() {
            return;
        }
        if value.len() > self.size_max / self.segments.len() / VALUE_PART {
            return self.remove(hash);
        }
        let at = self.segment(hash);
        let segment = &mut self.segments[at];
        self.size -= segment_size(segment);
        let cached = Cached { lower: hash.lower(), extent, offset, value };
        segment.insert(hash.upper(), cached);
        self.size += segment_size(segment);
    }

    /// The same for one that was written.
    pub(super) fn insert_written(&mut self, hash: KeyHash, extent: u32, offset: u32, value: Value) {
        if is_planted(Bug::ServesStaleCache) {
            return;
        }
        if value.len() <= WRITTEN_VALUE_SIZE_MAX {
            self.insert(hash, extent, offset, value);
        } else {
            self.remove(hash);
        }
    }

    /// A record has a new place: it is the same value.
    pub(super) fn on_moved(&mut self, hash: KeyHash, from: &Entry, to: &Entry) {
        if self.segments.is_empty() {
            return;
        }
        let was = self.segments[self.segment(hash)].peek(&hash.upper());
        let value = was.filter(|was| was.is(hash, from.extent, from.offset));
        if let Some(value) = value.map(|was| was.value.clone()) {
            self.insert(hash, to.extent, to.offset, value);
        }
    }

    /// Gives up what is here of a key.
    pub(super) fn remove(&mut self, hash: KeyHash) {
        if self.segments.is_empty() {
            return;
        }
        let at = self.segment(hash);
        let segment = &mut self.segments[at];
        self.size -= segment_size(segment);
        segment.remove(&hash.upper());
        self.size += segment_size(segment);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXTENT: u32 = 3;

    /// Hashes as a keyed hash gives them.
    fn hash(i: u64) -> KeyHash {
        super::super::index::hash_key(&[9; 16], &i.to_le_bytes())
    }

    fn cache(size_max: usize) -> RecordCache {
        let mut cache = RecordCache::default();
        cache.set_size_max(size_max);
        settle(&mut cache);
        cache
    }

    fn settle(cache: &mut RecordCache) {
        for _ in 0..=cache.segments.len() {
            cache.adjust();
        }
    }

    fn value(size: usize) -> Value {
        Value::from(vec![7; size])
    }

    #[test]
    fn only_the_very_record_is_answered() {
        let mut cache = cache(1 << 20);
        cache.insert(hash(1), EXTENT, 10, value(5));
        assert_eq!(cache.get(hash(1), EXTENT, 10), Some(value(5)));
        assert_eq!(cache.get(hash(1), EXTENT, 11), None, "another place");
        assert_eq!(cache.get(hash(1), 4, 10), None, "another extent");
        assert_eq!(cache.get(hash(2), EXTENT, 10), None, "another key");
        assert_eq!(cache.get(hash(1).with_other_lower(), EXTENT, 10), None, "a key alike in 64 bits");
        assert_eq!(cache.counts(), (1, 4));
        cache.insert_written(hash(1), EXTENT, 12, value(7));
        assert_eq!(cache.get(hash(1), EXTENT, 10), None, "an overwritten one is given up");
        assert_eq!(cache.get(hash(1), EXTENT, 12), Some(value(7)));
        cache.insert_written(hash(1), EXTENT, 13, value(WRITTEN_VALUE_SIZE_MAX + 1));
        assert_eq!(cache.get(hash(1), EXTENT, 12), None, "by one that is not kept, too");
        let at = |offset: u32| Entry::new(EXTENT, offset, 100, false, false, false);
        cache.insert(hash(1), EXTENT, 14, value(1));
        cache.on_moved(hash(1), &at(13), &at(15));
        assert_eq!(cache.get(hash(1), EXTENT, 14), Some(value(1)), "what moved was another one");
        cache.on_moved(hash(1), &at(14), &at(20));
        assert_eq!(cache.get(hash(1), EXTENT, 14), None);
        assert_eq!(cache.get(hash(1), EXTENT, 20), Some(value(1)));
        cache.insert(hash(1), EXTENT, 21, value((1 << 20) / VALUE_PART + 1));
        assert_eq!(cache.get(hash(1), EXTENT, 20), None, "one too long for the cache replaces it as well");
        cache.insert(hash(1), EXTENT, 22, value(1));
        cache.remove(hash(1));
        assert_eq!(cache.get(hash(1), EXTENT, 22), None);
    }

    #[test]
    fn it_takes_no_more_than_it_may_and_gives_back_what_it_may_no_longer_have() {
        let mut cache = cache(32 << 20);
        assert_eq!(cache.segments.len(), 8);
        let mut largest = 0;
        for i in 0..400_000 {
            cache.insert(hash(i), EXTENT, i as u32, value((i % 400) as usize));
            cache.adjust();
            largest = largest.max(cache.size());
        }
        assert!(largest > 16 << 20 && largest <= 32 << 20, "{largest} bytes at most");
        let counted: usize = cache.segments.iter().map(segment_size).sum();
        assert_eq!(cache.size(), counted);
        cache.set_size_max(8 << 20);
        settle(&mut cache);
        assert!(cache.size() <= 8 << 20, "{} bytes", cache.size());
        cache.set_size_max(0);
        settle(&mut cache);
        assert_eq!(cache.size(), 0);
        cache.insert(hash(1), EXTENT, 1, value(1));
        assert_eq!(cache.get(hash(1), EXTENT, 1), None);
        cache.set_size_max(1 << 20);
        settle(&mut cache);
        cache.insert(hash(1), EXTENT, 1, value(1));
        assert_eq!(cache.get(hash(1), EXTENT, 1), Some(value(1)));
    }

    #[test]
    fn what_is_read_often_survives_a_scan_and_large_values_are_not_admitted() {
        let mut cache = cache(4 << 20);
        let read = |cache: &mut RecordCache, i: u64| {
            if cache.get(hash(i), EXTENT, i as u32).is_none() {
                cache.insert(hash(i), EXTENT, i as u32, value(100));
                return false;
            }
            true
        };
        for round in 0..200_000 {
            read(&mut cache, round % 1_000);
            read(&mut cache, 10_000 + round);
        }
        let kept = (0..1_000).filter(|i| read(&mut cache, *i)).count();
        assert!(kept > 950, "{kept} of 1000 hot records were kept");
        cache.insert(hash(1), EXTENT, 5_000_000, value((4 << 20) / VALUE_PART + 1));
        assert_eq!(cache.get(hash(1), EXTENT, 5_000_000), None);
    }
}
