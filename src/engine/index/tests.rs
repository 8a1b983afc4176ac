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
            let mut each = Vec::new();
            index.each(&mut |one, entry| each.push((one, *entry)));
            assert!(each == expected, "step {step}");
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

fn built(keys: impl IntoIterator<Item = (Identity, Entry)>) -> HashIndex {
    let mut builder = HashIndexBuilder::default();
    assert!(builder.is_empty());
    for (at, (one, entry)) in keys.into_iter().enumerate() {
        builder.add(one, PackedEntry::from(&entry));
        assert!(!builder.is_empty() && builder.len() <= at as u64 + 1);
    }
    let len = builder.len();
    let index = builder.finish();
    assert_eq!(index.len(), len);
    index
}

/// What is built is what inserting comes to: the same keys in as many segments, and where they come in order, in no more bytes.
fn is_built_as_inserted(keys: Vec<(Identity, Entry)>) {
    let mut inserted = HashIndex::default();
    for (one, entry) in &keys {
        inserted.insert(*one, *entry);
    }
    let is_in_order = keys.is_sorted_by(|(one, _), (next, _)| one < next);
    let mut built = built(keys);
    assert_eq!(built.check(), inserted.check());
    assert!(!is_in_order || built.heap_size() <= inserted.heap_size());
    let expected = all(&inserted, 1_000);
    assert!(all(&built, 1_000) == expected);
    assert!(expected.iter().all(|(one, entry)| built.get(*one) == Some(*entry)));
    // It goes on as any other.
    for number in 0..20_000 {
        let (one, entry) = (identity(number << 32), entry(number));
        assert_eq!(built.insert(one, entry), inserted.insert(one, entry));
    }
    for (one, _) in expected.iter().step_by(3) {
        assert_eq!(built.remove(*one), inserted.remove(*one));
    }
    assert_eq!(built.check(), inserted.check());
    assert!(all(&built, 1_000) == all(&inserted, 1_000));
}

fn sorted(keys: impl Iterator<Item = Identity>) -> Vec<(Identity, Entry)> {
    let keys: BTreeSet<Identity> = keys.collect();
    keys.into_iter().enumerate().map(|(at, one)| (one, entry(at as u64))).collect()
}

#[test]
fn what_is_built_in_order_is_what_would_be_inserted() {
    let keys = sorted((0..600_000).map(identity));
    assert!(built(keys.clone()).check() > 1_024);
    is_built_as_inserted(keys);
    is_built_as_inserted(sorted((0..900).map(identity)));
    is_built_as_inserted(sorted((0..5_000).map(narrow)));
    // All in one root, as near to each other as can be, and as far.
    is_built_as_inserted(sorted((0..20_000).map(|i| Identity { upper: i, lower: 0 })));
    is_built_as_inserted(sorted(
        (0..1_728).map(|i| Identity { upper: 1 << (i % 54), lower: (i / 54) as u8 }),
    ));
    is_built_as_inserted(Vec::new());
}

#[test]
fn what_is_built_of_keys_out_of_order_or_twice_is_what_would_be_inserted() {
    let mut keys = sorted((0..60_000).map(identity));
    // Some come again, with another entry: at once, in the same root, and much later.
    let again: Vec<_> = keys.iter().step_by(1_000).map(|(one, _)| (*one, entry(1))).collect();
    keys.insert(31, (keys[30].0, entry(2)));
    keys.insert(41, (keys[20].0, entry(3)));
    keys.extend(again);
    keys.swap(10, 50_000);
    keys.swap(200, 201);
    is_built_as_inserted(keys);
    is_built_as_inserted((0..60_000).rev().map(|i| (identity(i), entry(i))).collect());
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
