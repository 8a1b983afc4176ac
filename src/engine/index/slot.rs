//! What a slot of the index holds, in 15 bytes.
//!
//! ```text
//! bits of the slot, taken as a little-endian number
//! 119 .. 61   tag: the bits of the identity behind those that choose the root
//!  60 .. 15   where the record is: extent (20), bytes from the extent's start (26)
//!  14 ..  3   bytes of the record: exponent (4), mantissa (8)
//!   2 ..  0   has an expiry, is a part of a batch, is long
//! ```

use super::{Entry, IDENTITY_BITS, IDENTITY_LOWER_BITS, Identity};

/// Bits of an identity that choose the root.
pub(super) const ROOT_BITS: u32 = 10;
pub(super) const TAG_BITS: u32 = IDENTITY_BITS - ROOT_BITS;
pub(super) const EXTENT_BITS: u32 = 20;
pub(super) const OFFSET_BITS: u32 = 26;
const SIZE_BITS: u32 = SIZE_EXPONENT_BITS + SIZE_MANTISSA_BITS;
const SIZE_EXPONENT_BITS: u32 = 4;
const SIZE_MANTISSA_BITS: u32 = 8;
const FLAG_BITS: u32 = 3;
const EXPIRES: u64 = 1;
/// Bits of what is not the tag.
pub(super) const PAYLOAD_BITS: u32 = EXTENT_BITS + OFFSET_BITS + SIZE_BITS + FLAG_BITS;

pub(super) const SLOT_SIZE: usize = 15;

const _: () = assert!(TAG_BITS + PAYLOAD_BITS == 8 * SLOT_SIZE as u32);
// The last eight bytes hold the tag and nothing else but the bits of the payload below it.
const _: () = assert!(PAYLOAD_BITS >= 56 && PAYLOAD_BITS < 64 && TAG_BITS < 64);

/// One key.
#[derive(Clone, Copy, Default)]
pub(super) struct Slot([u8; SLOT_SIZE]);

const _: () = assert!(std::mem::size_of::<Slot>() == SLOT_SIZE);

/// An entry as a slot has it, and a checkpoint: what is not the tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedEntry(u64);

impl PackedEntry {
    /// What a checkpoint stored. None where no entry is stored so.
    #[inline]
    pub fn from_bits(bits: u64) -> Option<PackedEntry> {
        (bits < 1 << PAYLOAD_BITS).then_some(PackedEntry(bits))
    }

    /// As a checkpoint stores it.
    pub fn bits(self) -> u64 {
        self.0
    }

    /// It has an expiry, which is kept elsewhere.
    #[inline]
    pub fn expires(self) -> bool {
        self.0 & EXPIRES != 0
    }

    /// What it says.
    pub fn entry(self) -> Entry {
        entry_of(self.0)
    }
}

impl From<&Entry> for PackedEntry {
    fn from(entry: &Entry) -> PackedEntry {
        PackedEntry(payload_of(entry))
    }
}

impl Slot {
    pub(super) fn new(tag: u64, entry: &Entry) -> Slot {
        Slot::packed(tag, entry.into())
    }

    #[inline]
    pub(super) fn packed(tag: u64, PackedEntry(payload): PackedEntry) -> Slot {
        let bits = u128::from(tag) << PAYLOAD_BITS | u128::from(payload);
        let mut bytes = [0; SLOT_SIZE];
        bytes.copy_from_slice(&bits.to_le_bytes()[..SLOT_SIZE]);
        Slot(bytes)
    }

    #[inline]
    pub(super) fn tag(&self) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[SLOT_SIZE - 8..]);
        u64::from_le_bytes(bytes) >> (PAYLOAD_BITS - 56)
    }

    pub(super) fn entry(&self) -> Entry {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.0[..8]);
        entry_of(u64::from_le_bytes(bytes) & ((1 << PAYLOAD_BITS) - 1))
    }
}

/// The root of an identity, and the tag within it.
pub(super) fn split(identity: Identity) -> (usize, u64) {
    let root = identity.upper >> (64 - ROOT_BITS);
    let rest = identity.upper & (u64::MAX >> ROOT_BITS);
    (root as usize, rest << IDENTITY_LOWER_BITS | u64::from(identity.lower))
}

pub(super) fn join(root: usize, tag: u64) -> Identity {
    let upper = (root as u64) << (64 - ROOT_BITS) | tag >> IDENTITY_LOWER_BITS;
    Identity { upper, lower: (tag & ((1 << IDENTITY_LOWER_BITS) - 1)) as u8 }
}

fn payload_of(entry: &Entry) -> u64 {
    assert!(entry.extent < 1 << EXTENT_BITS && entry.offset < 1 << OFFSET_BITS, "no device has such a place");
    let place = u64::from(entry.extent) << OFFSET_BITS | u64::from(entry.offset);
    let flags = u64::from(entry.expires) | u64::from(entry.is_part) << 1 | u64::from(entry.is_long) << 2;
    (place << SIZE_BITS | u64::from(size_code(entry.size))) << FLAG_BITS | flags
}

fn entry_of(payload: u64) -> Entry {
    let place = payload >> (FLAG_BITS + SIZE_BITS);
    let has = |flag: u64| payload & flag != 0;
    Entry {
        extent: (place >> OFFSET_BITS) as u32,
        offset: (place & ((1 << OFFSET_BITS) - 1)) as u32,
        size: size_of((payload >> FLAG_BITS & ((1 << SIZE_BITS) - 1)) as u32),
        expires: has(EXPIRES),
        is_part: has(2),
        is_long: has(4),
    }
}

/// The bits for a size: the lowest that stand for no less. Sizes below 512 are exact, others are rounded up by less than a
/// 256th.
pub(super) fn size_code(size: u32) -> u32 {
    const BASE: u32 = 1 << SIZE_MANTISSA_BITS;
    if size < BASE {
        return size;
    }
    let mut exponent = size.ilog2() - SIZE_MANTISSA_BITS;
    let mut whole = size.div_ceil(1 << exponent);
    if whole == 2 * BASE {
        (exponent, whole) = (exponent + 1, BASE);
    }
    let code = (exponent + 1) << SIZE_MANTISSA_BITS | (whole - BASE);
    assert!(code < 1 << SIZE_BITS, "a record of {size} bytes");
    code
}

/// The size that those bits stand for.
fn size_of(code: u32) -> u32 {
    const BASE: u32 = 1 << SIZE_MANTISSA_BITS;
    match code >> SIZE_MANTISSA_BITS {
        0 => code,
        exponent => (BASE + (code & (BASE - 1))) << (exponent - 1),
    }
}

/// A record's size as an entry has it.
pub(super) fn round_up_size(size: u32) -> u32 {
    size_of(size_code(size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_up_by_little_and_the_same_way_again() {
        for size in (0..1 << 20).chain([(1 << 22) + 1, 511 << 14]) {
            let rounded = round_up_size(size);
            assert!(rounded >= size && rounded - size <= size / 256, "{size}: {rounded}");
            assert!(size >= 512 || rounded == size);
            assert_eq!(round_up_size(rounded), rounded);
        }
    }

    #[test]
    fn a_slot_holds_the_whole_of_every_field() {
        let last = Entry {
            extent: (1 << EXTENT_BITS) - 1,
            offset: (1 << OFFSET_BITS) - 1,
            size: 511 << 14,
            expires: true,
            is_part: true,
            is_long: true,
        };
        let none = Entry { extent: 0, offset: 0, size: 0, expires: false, is_part: false, is_long: false };
        let mut entries = vec![last, none];
        entries.extend([
            Entry { extent: last.extent, ..none },
            Entry { offset: last.offset, ..none },
            Entry { size: last.size, ..none },
            Entry { expires: true, ..none },
            Entry { is_part: true, ..none },
            Entry { is_long: true, ..none },
        ]);
        for entry in entries {
            for tag in [0, 1, (1 << TAG_BITS) - 1, 0x0123_4567_89ab_cdef & ((1 << TAG_BITS) - 1)] {
                let slot = Slot::new(tag, &entry);
                assert_eq!((slot.tag(), slot.entry()), (tag, entry));
            }
        }
    }

    #[test]
    fn an_identity_is_root_and_tag() {
        for identity in [
            Identity { upper: 0, lower: 0 },
            Identity { upper: u64::MAX, lower: 31 },
            Identity { upper: 0x0123_4567_89ab_cdef, lower: 9 },
        ] {
            let (root, tag) = split(identity);
            assert!(root < 1 << ROOT_BITS && tag < 1 << TAG_BITS);
            assert_eq!(join(root, tag), identity);
        }
    }
}
