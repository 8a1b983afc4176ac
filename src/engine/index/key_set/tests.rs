//! The set beside a `BTreeSet`, and what it takes of memory.

use super::*;
use std::collections::BTreeSet;

struct Steps(u64);

impl Steps {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        self.0 >> 20
    }
}

impl KeySet {
    /// Every invariant; the leaves that there are.
    fn check(&self) -> usize {
        let (mut last, mut len, mut size): (Option<Vec<u8>>, _, _) = (None, 0, 0);
        for leaves in &self.groups {
            assert!(!leaves.is_empty() && leaves.len() <= GROUP_LEN_MAX);
            size += taken_by(leaves);
            for leaf in leaves {
                let (mut count, mut before) = (0, Vec::new());
                leaf.each(&mut |key, item| {
                    assert!(last.as_deref().is_none_or(|last| last < key), "{last:?} and {key:?}");
                    assert_eq!(item.shared, shared_size(&before, key), "{key:?}");
                    (last, before) = (Some(key.to_vec()), key.to_vec());
                    count += 1;
                    true
                });
                assert!(count == leaf.len && count > 0);
                assert!(leaf.bytes.len() <= LEAF_SIZE_MAX || count == 1, "{} bytes", leaf.bytes.len());
                size += taken_by(&leaf.bytes);
                len += count as u64;
            }
        }
        assert_eq!((len, size), (self.len, self.size));
        self.groups.iter().map(Vec::len).sum()
    }

    fn all(&self) -> Vec<Vec<u8>> {
        let mut seen = Vec::new();
        self.ascend(Bound::Unbounded, &mut |key| {
            seen.push(key.to_vec());
            true
        });
        seen
    }
}

/// Some keys from a bound on, in both directions, as the set and the model have them.
fn alike(set: &KeySet, model: &BTreeSet<Vec<u8>>, from: Bound<&[u8]>) {
    let mut seen = Vec::new();
    set.ascend(from, &mut |key| {
        seen.push(key.to_vec());
        seen.len() < 40
    });
    let expected: Vec<_> = model.range::<[u8], _>((from, Bound::Unbounded)).take(40).cloned().collect();
    assert_eq!(seen, expected, "from {from:?}");
    seen.clear();
    set.descend(from, &mut |key| {
        seen.push(key.to_vec());
        seen.len() < 40
    });
    let expected: Vec<_> = model.range::<[u8], _>((Bound::Unbounded, from)).rev().take(40).cloned().collect();
    assert_eq!(seen, expected, "back from {from:?}");
}

fn like_a_model(of: fn(u64) -> Vec<u8>, keys: u64, steps: u64) -> usize {
    let (mut set, mut model) = (KeySet::default(), BTreeSet::new());
    let (mut state, mut most) = (Steps(7), 0);
    for step in 0..steps {
        // Two thirds are inserts until the middle, and then removes.
        let (key, is_remove) = (of(state.next() % keys), (state.next() % 3 == 0) == (step < steps / 2));
        if is_remove {
            assert_eq!(set.remove(&key), model.remove(&key), "{key:?}");
        } else {
            assert_eq!(set.insert(&key), model.insert(key.clone()), "{key:?}");
        }
        assert_eq!(set.contains(&key), !is_remove);
        if step % (steps / 64) == 0 {
            most = most.max(set.check());
            let other = of(state.next() % keys);
            for from in [Bound::Included(&key[..]), Bound::Excluded(&other), Bound::Unbounded] {
                alike(&set, &model, from);
            }
        }
    }
    assert!(set.all().iter().eq(model.iter()));
    let mut built = KeySetBuilder::default();
    model.iter().for_each(|key| built.add(key));
    let built = built.finish();
    built.check();
    assert!(built.all().iter().eq(model.iter()));
    for key in &model {
        assert!(set.remove(key));
    }
    assert!(set.is_empty() && set.groups.is_empty());
    assert_eq!((set.size, set.heap_size()), (0, 0));
    most
}

fn number(i: u64) -> Vec<u8> {
    format!("user:{:08}:name", i.wrapping_mul(2_654_435_761) % 100_000_000).into_bytes()
}

#[test]
fn it_behaves_like_a_set_of_strings() {
    let most = like_a_model(number, 150_000, 400_000);
    assert!(most > 2 * GROUP_LEN_MAX, "{most} leaves: groups were never split");
}

#[test]
fn it_behaves_like_a_set_whatever_the_strings() {
    // Of two letters and any length from none on: each is the beginning of others.
    let binary = |i: u64| (0..i % 12).map(|bit| b'a' + (i >> bit & 1) as u8).collect();
    like_a_model(binary, 50_000, 40_000);
    let bytes = |i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()[..1 + i as usize % 8].to_vec();
    like_a_model(bytes, 20_000, 60_000);
    // Longer than a leaf, and alike up to their ends.
    let long = |i: u64| {
        let mut key = vec![b'k'; [10, 300, 3_000, 65_000][i as usize % 4]];
        key.extend_from_slice(&i.to_be_bytes());
        key
    };
    like_a_model(long, 300, 6_000);
}

#[test]
fn what_is_built_out_of_order_is_whole() {
    let mut keys: Vec<Vec<u8>> = (0..20_000).map(number).collect();
    keys.sort();
    let again: Vec<_> = keys.iter().step_by(500).cloned().collect();
    keys.extend(again);
    keys.swap(10, 15_000);
    keys.swap(11_000, 19_000);
    let mut builder = KeySetBuilder::default();
    keys.iter().for_each(|key| builder.add(key));
    let set = builder.finish();
    set.check();
    let expected: BTreeSet<Vec<u8>> = keys.into_iter().collect();
    assert!(set.all().iter().eq(expected.iter()));
}

#[test]
fn it_takes_little_more_than_the_strings_do() {
    let count = 300_000;
    let (mut set, mut size) = (KeySet::default(), 0);
    for key in (0..count).map(number) {
        size += if set.insert(&key) { key.len() } else { 0 };
    }
    let (per_key, own) = (set.heap_size() as f64 / set.len() as f64, size as f64 / set.len() as f64);
    assert!(per_key < own, "{per_key:.1} bytes for keys of {own:.1}");
    // In order, as a checkpoint brings them.
    let mut builder = KeySetBuilder::default();
    set.all().iter().for_each(|key| builder.add(key));
    assert!(builder.finish().heap_size() < set.heap_size());
    // And what goes is given back.
    let keys = set.all();
    for key in keys.iter().enumerate().filter(|(i, _)| i % 10 != 0).map(|(_, key)| key) {
        assert!(set.remove(key));
    }
    set.check();
    let left = set.heap_size() as f64 / set.len() as f64;
    assert!(left < 2.0 * own, "{left:.1} bytes for keys of {own:.1}");
}
