//! The index beside a map: growth, scans, keys that have nearly the same hash, and what a key costs.

use super::*;
use std::collections::{BTreeMap, BTreeSet};

fn entry(number: u64) -> Entry {
    let record = RecordRef {
        extent: (number >> 20) as u32 & 0xfffff,
        offset: number as u32 & 0xfffff,
        size: 100 + number as u32 % 400,
        value_size: 1,
        sequence: number,
        expires_at_ms: number % 3,
        is_part: number.is_multiple_of(5),
        is_long: number.is_multiple_of(7),
    };
    record.entry()
}

fn identity(i: u64) -> Identity {
    hash_key(&[3; 16], &i.to_le_bytes()).identity()
}

/// Hashes of a few bits: most of what a look-up meets is nearly the same.
fn narrow(i: u64) -> Identity {
    let hash = hash_key(&[4; 16], &i.to_le_bytes());
    Identity { upper: 0xabc << 52 | hash.upper >> 60 << 8 | hash.lower >> 62, lower: (hash.lower & 1) as u8 }
}

struct Steps(u64);

impl Steps {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        self.0 >> 20
    }
}

fn all(index: &HashIndex, count: usize) -> Vec<(Identity, Entry)> {
    let (mut cursor, mut seen) = (0, Vec::new());
    loop {
        let before = cursor;
        cursor = index.scan(cursor, count, &mut |identity, entry| seen.push((identity, *entry)));
        assert_eq!(cursor & 0xff, 0);
        assert!(cursor == 0 || cursor > before);
        if cursor == 0 {
            return seen;
        }
    }
}

fn like_a_map(of: fn(u64) -> Identity, keys: u64, steps: u64) -> usize {
    let (mut index, mut model) = (HashIndex::default(), BTreeMap::new());
    let (mut state, mut most) = (Steps(7), 0);
    for step in 0..steps {
        // Two thirds are inserts until the middle, and then removes.
        let (one, is_remove) = (of(state.next() % keys), (state.next() % 3 == 0) == (step < steps / 2));
        if is_remove {
            assert_eq!(index.remove(one), model.remove(&one));
        } else {
            assert_eq!(index.insert(one, entry(step)), model.insert(one, entry(step)));
        }
        assert_eq!(index.get(one), model.get(&one).copied());
        assert_eq!(index.len(), model.len() as u64);
        if step.is_multiple_of(steps / 16) {
            most = most.max(index.check());
            let expected: Vec<(Identity, Entry)> = model.iter().map(|(one, entry)| (*one, *entry)).collect();
            assert!(all(&index, 37) == expected, "step {step}");
        }
    }
    index.check();
    let kept = |entry: &Entry| entry.offset.is_multiple_of(3);
    index.retain(&mut |one, entry| {
        assert_eq!(model.get(&one), Some(entry));
        kept(entry)
    });
    model.retain(|_, entry| kept(entry));
    index.check();
    assert!(all(&index, 1_000) == model.iter().map(|(one, entry)| (*one, *entry)).collect::<Vec<_>>());
    for one in model.keys() {
        assert!(index.remove(*one).is_some());
    }
    assert!(index.is_empty() && index.check() <= 1_024);
    index.clear();
    assert_eq!(index.heap_size(), HashIndex::default().heap_size());
    most
}

#[test]
fn it_behaves_like_a_map() {
    let most = like_a_map(identity, 700_000, 1_600_000);
    assert!(most > 1_024, "{most} segments: it never grew");
}

#[test]
fn it_behaves_like_a_map_however_uneven_the_hashes() {
    like_a_map(narrow, 5_000, 60_000);
    // All in one root, as far apart as can be.
    let steep = |i: u64| Identity { upper: 1u64 << (i % 54), lower: (i / 54) as u8 % 32 };
    like_a_map(steep, 20_000, 60_000);
    let dense = |i: u64| Identity { upper: i, lower: 0 };
    let most = like_a_map(dense, 20_000, 200_000);
    assert!(most > 20, "{most} segments");
}

#[test]
fn what_is_appended_is_inserted_whatever_the_order() {
    let (mut appended, mut inserted) = (HashIndex::default(), HashIndex::default());
    let mut keys: Vec<(Identity, Entry)> = (0..600_000).map(|i| (identity(i), entry(i))).collect();
    keys.sort_by_key(|(one, _)| *one);
    // Some come again, with another entry, and some out of order.
    let again: Vec<_> = keys.iter().step_by(1_000).map(|(one, _)| (*one, entry(1))).collect();
    keys.extend(again);
    keys.swap(10, 500_000);
    for (one, entry) in keys {
        appended.append(one, entry);
        inserted.insert(one, entry);
    }
    assert!(appended.check() > 1_024);
    assert_eq!(appended.len(), 600_000);
    assert!(all(&appended, 1_000) == all(&inserted, 1_000));
}

#[test]
fn keys_of_one_identity_are_one_key_and_any_other_bit_tells_two_apart() {
    let mut index = HashIndex::default();
    let one = identity(1);
    index.insert(one, entry(1));
    assert_eq!(index.insert(one, entry(2)), Some(entry(1)), "the later one takes its place");
    assert_eq!((index.len(), index.get(one)), (1, Some(entry(2))));
    for bit in 0..64 {
        let other = Identity { upper: one.upper ^ 1 << bit, ..one };
        assert_eq!(index.get(other), None, "bit {bit}");
        assert_eq!(index.insert(other, entry(bit)), None);
    }
    for bit in 0..IDENTITY_LOWER_BITS {
        let other = Identity { lower: one.lower ^ 1 << bit, ..one };
        assert_eq!(index.insert(other, entry(3)), None, "lower bit {bit}");
    }
    assert_eq!((index.len(), index.get(one)), (1 + u64::from(IDENTITY_BITS), Some(entry(2))));
}

#[test]
fn the_hash_of_a_key_is_all_of_its_bits_and_needs_the_secret() {
    let one = hash_key(&[1; 16], b"key");
    assert_ne!(one, hash_key(&[2; 16], b"key"));
    assert_ne!(one, hash_key(&[1; 16], b"kez"));
    assert_eq!(one.identity().upper(), one.upper());
    assert_eq!(u64::from(one.identity().lower()), one.lower() >> 59);
    assert_eq!(Identity::from_parts(1, 32), None);
    // What the bits are worth: among many keys, each bit of an identity is set in half.
    let count = 4_096;
    for bit in 0..IDENTITY_BITS {
        let is_set = |i: &u64| {
            let one = identity(*i);
            if bit < 64 { one.upper >> bit & 1 == 1 } else { one.lower >> (bit - 64) & 1 == 1 }
        };
        let set = (0..count).filter(is_set).count();
        assert!((1_800..2_300).contains(&set), "bit {bit} is set in {set} of {count}");
    }
}

#[test]
fn a_scan_returns_what_was_there_throughout_whatever_grows_or_goes() {
    let mut index = HashIndex::default();
    let stays: BTreeSet<Identity> = (0..3_000).map(identity).collect();
    stays.iter().for_each(|one| assert_eq!(index.insert(*one, entry(0)), None));
    let (mut cursor, mut seen, mut rounds, mut before) = (0, BTreeSet::new(), 0, index.check());
    let mut has_shrunk = false;
    loop {
        cursor = index.scan(cursor, 10, &mut |one, _| {
            seen.insert(one);
        });
        rounds += 1;
        if cursor == 0 {
            break;
        }
        // It grows for a while, and then loses all of that again.
        for i in (0..4_000).map(|i| 1_000_000 + rounds % 100 * 4_000 + i) {
            if rounds < 100 {
                index.insert(identity(i), entry(1));
            } else if rounds < 200 {
                index.remove(identity(i));
            }
        }
        let now = index.check();
        has_shrunk |= now < before;
        before = now;
    }
    assert!(rounds > 200 && has_shrunk, "{rounds} rounds");
    assert!(stays.iter().all(|one| seen.contains(one)));
}

#[test]
fn a_key_takes_no_more_than_16_bytes() {
    let mut index = HashIndex::default();
    let (mut next, mut worst) = (0, 0.0);
    // Whatever the number of keys, from where the fixed part does not count any more.
    while next < 3_300_000 {
        index.insert(identity(next), entry(next));
        next += 1;
        if next > 1_600_000 && next.is_multiple_of(20_000) {
            worst = f64::max(worst, index.heap_size() as f64 / index.len() as f64);
        }
    }
    assert!(worst <= 16.0, "{worst:.3} bytes a key");
    index.check();
    // And back: what keys leave behind is given back.
    let full = index.heap_size();
    for i in 0..next {
        if i % 4 != 0 {
            assert!(index.remove(identity(i)).is_some());
        }
    }
    let per_key = index.heap_size() as f64 / index.len() as f64;
    assert!(per_key <= 20.0, "{per_key:.3} bytes a key, of {full} bytes when it was full");
}
