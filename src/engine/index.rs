//! The index: where each key's newest record is.
//!
//! Keys are on the device, not in memory. Of a key the index knows [`IDENTITY_BITS`] bits of its keyed hash, its *identity*: two
//! keys of one shard with the same identity are one to it, and the later one takes the other's place. With 16 shards that
//! happens to any of 100 million keys with a chance of 5 in 10 million, and nobody can look for such keys without the device's
//! secret. Whoever reads a record compares the key, so such a key is absent, never another key's value.
//!
//! [`Index`] is the seam, [`HashIndex`] is behind it. It is ordered by identity, so a scan's cursor is a hash. On devices of the kind
//! `ordered` a [`Directory`] stands beside it, which has the keys in their own order.

mod directory;
mod expiries;
mod granules;
mod hash;
mod key_set;
mod slot;
#[cfg(test)]
mod tests;

pub use directory::Directory;
pub use expiries::Expiries;
pub use hash::{HashIndex, HashIndexBuilder};
pub use key_set::{KeySet, KeySetBuilder};
pub use slot::PackedEntry;

use std::hash::Hasher;

use crate::format::record::{Record, RecordType};
use crate::limits::{EXTENT_COUNT_MAX, EXTENT_SIZE_MAX};
use siphasher::sip128::{Hasher128, SipHasher13};

use slot::round_up_size;

/// Bits of a key's hash that the index tells keys apart by.
pub const IDENTITY_BITS: u32 = 64 + IDENTITY_LOWER_BITS;

/// Those beyond the first 64.
const IDENTITY_LOWER_BITS: u32 = 5;

// Entries can name every record of every device.
const _: () =
    assert!(EXTENT_COUNT_MAX == 1 << slot::EXTENT_BITS && EXTENT_SIZE_MAX == 1 << slot::OFFSET_BITS);

/// The keyed hash of a key: the device's secret keeps clients from choosing collisions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyHash {
    upper: u64,
    lower: u64,
}

impl KeyHash {
    /// The first 64 bits: what order, cursors and tables go by.
    pub fn upper(self) -> u64 {
        self.upper
    }

    /// The other 64 bits.
    pub fn lower(self) -> u64 {
        self.lower
    }

    #[cfg(test)]
    pub(super) fn with_other_lower(self) -> KeyHash {
        KeyHash { lower: !self.lower, ..self }
    }

    /// What the index knows of it.
    pub fn identity(self) -> Identity {
        Identity { upper: self.upper, lower: (self.lower >> (64 - IDENTITY_LOWER_BITS)) as u8 }
    }
}

/// What the index knows of a key: the first bits of its hash. In the order of the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    upper: u64,
    lower: u8,
}

impl Identity {
    /// The first 64 bits of the hash, and the few behind them. None where those are more than there can be.
    pub fn from_parts(upper: u64, lower: u8) -> Option<Identity> {
        (lower < 1 << IDENTITY_LOWER_BITS).then_some(Identity { upper, lower })
    }

    /// The first one whose hash is at or after a cursor.
    pub fn at_cursor(cursor: u64) -> Identity {
        Identity { upper: cursor, lower: 0 }
    }

    /// The first 64 bits of the hash.
    pub fn upper(self) -> u64 {
        self.upper
    }

    /// The bits behind those.
    pub fn lower(self) -> u8 {
        self.lower
    }

    /// The part of the index that it is in: each grows by itself.
    pub fn root(self) -> usize {
        slot::split(self).0
    }
}

/// The hash of a key with the device's secret.
pub fn hash_key(secret: &[u8; 16], key: &[u8]) -> KeyHash {
    let mut hasher = SipHasher13::new_with_key(secret);
    hasher.write(key);
    let (upper, lower) = hasher.finish128().as_u64();
    let hash = KeyHash { upper, lower };
    #[cfg(any(test, feature = "planted-bugs"))]
    let hash = narrow::narrowed(hash);
    hash
}

/// Identities of few bits, for tests of what happens when two keys have the same one.
#[cfg(any(test, feature = "planted-bugs"))]
pub(crate) mod narrow {
    use std::cell::Cell;

    use super::{IDENTITY_LOWER_BITS, KeyHash};

    thread_local! {
        static BITS: Cell<u32> = const { Cell::new(64) };
    }

    /// While this lives, identities have few bits on this thread. Hashes tell keys apart as before.
    pub(crate) struct Narrow;

    impl Narrow {
        pub(crate) fn to(bits: u32) -> Narrow {
            BITS.set(bits);
            Narrow
        }
    }

    impl Drop for Narrow {
        fn drop(&mut self) {
            BITS.set(64);
        }
    }

    pub(super) fn narrowed(hash: KeyHash) -> KeyHash {
        match BITS.get() {
            64 => hash,
            bits => KeyHash {
                upper: hash.upper >> (64 - bits) << (64 - bits),
                lower: hash.lower & (u64::MAX >> IDENTITY_LOWER_BITS),
            },
        }
    }
}

/// What the index says of a key: where its newest record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The extent.
    pub extent: u32,
    /// Bytes from the extent's start to the record.
    pub offset: u32,
    /// Bytes of the record, rounded up to what a slot can say.
    size: u32,
    /// It has an expiry, which is kept elsewhere.
    pub expires: bool,
    /// The record is a part of a batch: it counts only while the batch's commit record is there.
    pub is_part: bool,
    /// The value is long: the record is its manifest.
    pub is_long: bool,
}

impl Entry {
    /// Names a record.
    pub fn new(extent: u32, offset: u32, size: u32, expires: bool, is_part: bool, is_long: bool) -> Entry {
        Entry { extent, offset, size: round_up_size(size), expires, is_part, is_long }
    }

    /// Bytes of the record, and up to 0.4 % more.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Bytes of the value that is in the record, at most, if the record is this key's.
    pub fn value_size_max(&self, key: &[u8]) -> u64 {
        let without = Record {
            kind: RecordType::Put,
            sequence: 0,
            database: 0,
            expires_at_ms: u64::from(self.expires),
            batch: None,
            long: 0,
            key,
            value: &[],
        };
        u64::from(self.size).saturating_sub(without.size() as u64)
    }

    /// The same record in another place.
    pub fn elsewhere(self, extent: u32, offset: u32) -> Entry {
        Entry { extent, offset, ..self }
    }

    /// Whether it names the record at this place.
    pub fn is_at(&self, extent: u32, offset: u32) -> bool {
        self.extent == extent && self.offset == offset
    }

    /// As a checkpoint stores it.
    pub fn to_bits(&self) -> u64 {
        PackedEntry::from(self).bits()
    }
}

/// Where a record is and what it says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordRef {
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
    /// The record is a part of a batch.
    pub is_part: bool,
    /// The value is long: the record is its manifest, and `value_size` is the length of the value.
    pub is_long: bool,
}

impl RecordRef {
    /// What the index keeps of it.
    pub fn entry(&self) -> Entry {
        let expires = self.expires_at_ms != 0;
        Entry::new(self.extent, self.offset, self.size, expires, self.is_part, self.is_long)
    }
}

/// What a shard needs of an index.
pub trait Index {
    /// The entry of a key.
    fn get(&self, identity: Identity) -> Option<Entry>;
    /// Begins to fetch where the slots around an identity are said to be.
    fn prefetch_segment(&self, identity: Identity);
    /// Begins to fetch those slots; `prefetch_segment` was called a while ago.
    fn prefetch_slots(&self, identity: Identity);
    /// Sets the entry of a key and returns the one it replaces.
    fn insert(&mut self, identity: Identity, entry: Entry) -> Option<Entry>;
    /// Removes a key and returns its entry.
    fn remove(&mut self, identity: Identity) -> Option<Entry>;
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
    fn retain(&mut self, keep: &mut dyn FnMut(Identity, &Entry) -> bool);
    /// Visits all keys, in order.
    fn each(&self, visit: &mut dyn FnMut(Identity, &Entry));
    /// Visits keys whose hash is at or after `cursor`, in order, until about `count` were visited. Returns the cursor to go on
    /// with, 0 at the end. Every key with a hash in `cursor..next` was visited; the low 8 bits of a cursor are zero.
    fn scan(&self, cursor: u64, count: usize, visit: &mut dyn FnMut(Identity, &Entry)) -> u64;
}
