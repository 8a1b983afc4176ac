//! Keys by name on simulated disks: what listing them reads, what becomes of the names of keys that have gone, and ranges whose
//! values are of every length.

#![cfg(test)]

use std::collections::BTreeSet;
use std::ops::Bound;

use basalt::device::sim::{SimConfig, SimDisk};
use basalt::engine::action::{Action, Expiry, SetReply};
use basalt::engine::durability::Durability;
use basalt::engine::op::{Clock, Key, KeyRange, OpError, Order, RangeQuery, Reply};
use basalt::engine::range::Found;
use basalt::format::superblock::IndexKind;
use basalt::limits::RANGE_SIZE_MAX;
use basalt::probe;
use basalt::sim::node::{Outcome, Request, SimNode, format, format_as};

const BLOCK: usize = 4096;

/// What a read takes at least.
const SECTOR: u64 = 512;

fn disk(seed: u64) -> SimDisk {
    let config = SimConfig { block_count: (128 << 20) / BLOCK as u64, ..SimConfig::default() };
    let disk = SimDisk::new(config, seed);
    format_as(&disk, 4, seed, IndexKind::Ordered);
    disk
}

fn boot(disk: &SimDisk, unix_ms: u64) -> SimNode {
    let clock = Clock { unix_ms, monotonic_us: 0 };
    SimNode::boot(disk, 2, Durability::Always, clock, 7).expect("the disk boots")
}

fn reply(node: &mut SimNode, disk: &SimDisk, key: &Key, action: Action) -> Reply {
    match node.run(disk, Request::Single(key.clone(), action)) {
        Some(Outcome::Reply(reply)) => reply,
        other => panic!("{other:?}"),
    }
}

fn set(node: &mut SimNode, disk: &SimDisk, key: &Key, size: usize, expiry: Expiry) {
    let value = vec![b'v'; size].into();
    let action = Action::Set { value, expiry, condition: None, reply: SetReply::Ok };
    assert_eq!(reply(node, disk, key, action), Reply::Ok);
}

fn query(range: KeyRange, with_values: bool) -> RangeQuery {
    RangeQuery { range, order: Order::Ascending, limit: usize::MAX, with_values }
}

fn range(node: &mut SimNode, disk: &SimDisk, query: RangeQuery) -> Found {
    match node.run(disk, Request::Range(query)) {
        Some(Outcome::Range(found)) => found,
        other => panic!("{other:?}"),
    }
}

fn names(node: &mut SimNode, disk: &SimDisk) -> Vec<Key> {
    range(node, disk, query(KeyRange::all(), false)).into_iter().map(|(key, _)| key).collect()
}

fn scan(node: &mut SimNode, disk: &SimDisk, prefix: &'static str) -> BTreeSet<Key> {
    match node.run(disk, Request::KeysOf(prefix.into())) {
        Some(Outcome::Keys(found)) => {
            found.into_iter().filter(|key| key.starts_with(prefix.as_bytes())).collect()
        }
        other => panic!("{other:?}"),
    }
}

fn bytes_read(node: &SimNode) -> u64 {
    node.stats().map(|stats| stats.bytes_read).sum()
}

#[test]
fn listing_keys_by_name_reads_nothing() {
    let disk = disk(1);
    let mut node = boot(&disk, 1_000_000);
    let all: BTreeSet<Key> =
        (0..600).map(|i| Key::from(format!("{}:{i}", ["a", "b", "bb"][i % 3]))).collect();
    all.iter().for_each(|key| set(&mut node, &disk, key, 2_000, Expiry::Clear));
    let before = bytes_read(&node);
    assert!(names(&mut node, &disk).iter().eq(&all));
    let of = |prefix: &str| all.iter().filter(|key| key.starts_with(prefix.as_bytes())).cloned().collect();
    for prefix in ["a:", "b", "bb:5", "c"] {
        let expected: BTreeSet<Key> = of(prefix);
        assert_eq!(scan(&mut node, &disk, prefix), expected);
    }
    assert_eq!(bytes_read(&node), before, "something was read");
    let values = range(&mut node, &disk, query(KeyRange::of_prefix("bb:5".into()), true));
    assert_eq!(values.len(), of("bb:5").len());
    let read = (bytes_read(&node) - before) / SECTOR;
    // Each value takes four, and what stands around it.
    assert!(read >= 1 && read <= 6 * values.len() as u64, "{read} sectors for {} values", values.len());
}

#[test]
fn ranges_of_many_steps_miss_nothing_between_them() {
    let disk = disk(6);
    let mut node = boot(&disk, 1_000_000);
    // Each is the beginning of ten others; a shard has more than it lists in a step.
    let all: BTreeSet<Key> = (0..6_000).map(|i: u32| Key::from(i.to_string())).collect();
    all.iter().for_each(|key| set(&mut node, &disk, key, 10, Expiry::Clear));
    assert!(names(&mut node, &disk).iter().eq(&all));
    for order in [Order::Ascending, Order::Descending] {
        let (mut found, mut rest) = (Vec::new(), KeyRange::all());
        loop {
            let query = RangeQuery { range: rest.clone(), order, limit: 700, with_values: false };
            let page = range(&mut node, &disk, query);
            let Some((last, _)) = page.last().cloned() else { break };
            found.extend(page.into_iter().map(|(key, _)| key));
            rest = rest.after(last, order);
        }
        if order == Order::Descending {
            found.reverse();
        }
        assert!(found.iter().eq(&all), "{order:?}: {} of {} keys", found.len(), all.len());
    }
}

#[test]
fn names_of_what_has_expired_are_swept_out_and_come_back_with_their_keys() {
    let disk = disk(2);
    let mut node = boot(&disk, 1_000_000);
    let key = |i: usize| Key::from(format!("key:{i:05}"));
    for i in 0..6_000 {
        let expiry = if i % 4 == 0 { Expiry::Clear } else { Expiry::At(50_000_000) };
        set(&mut node, &disk, &key(i), 10, expiry);
    }
    let _ = probe::take();
    node.clock.unix_ms = 60_000_000;
    assert_eq!(node.run(&disk, Request::Count), Some(Outcome::Count(1_500)));
    for _ in 0..200 {
        node.clock.unix_ms += 1;
        node.step();
    }
    assert!(probe::take().any(|(name, _)| name == "directory swept"), "4,500 names are left over");
    let stays: BTreeSet<Key> = (0..6_000).step_by(4).map(key).collect();
    assert!(names(&mut node, &disk).iter().eq(&stays));
    assert!(probe::take().all(|(name, _)| name != "name of a key that has gone met"), "none is left over");
    // Those that are few are let be, and met by listings.
    for i in 0..100 {
        set(&mut node, &disk, &key(i * 4 + 1), 10, Expiry::At(70_000_000));
    }
    node.clock.unix_ms = 80_000_000;
    assert_eq!(node.run(&disk, Request::Count), Some(Outcome::Count(1_500)));
    assert!(names(&mut node, &disk).iter().eq(&stays));
    assert!(probe::take().any(|(name, _)| name == "name of a key that has gone met"));
    assert!(names(&mut node, &disk).iter().eq(&stays));
    assert!(probe::take().all(|(name, _)| name != "name of a key that has gone met"), "they were dropped");
    // A clock that is set back over a restart brings back what its records still say.
    drop(node);
    let mut node = boot(&disk, 65_000_000);
    assert_eq!(names(&mut node, &disk).len(), 1_600);
}

#[test]
fn ranges_with_values_of_every_length_end_where_they_must() {
    let disk = disk(3);
    let mut node = boot(&disk, 1_000_000);
    let sizes = [10, 130 << 10, 3 << 20, 1 << 20, 200 << 10, 0, 9 << 20, 5, 250 << 10, 4 << 20, 1];
    let key = |i: usize| Key::from(format!("{i:02}"));
    sizes.iter().enumerate().for_each(|(i, size)| set(&mut node, &disk, &key(i), *size, Expiry::Clear));
    let mut pages = Vec::new();
    let mut rest = KeyRange::all();
    loop {
        let found = range(&mut node, &disk, query(rest.clone(), true));
        let Some((last, _)) = found.last().cloned() else { break };
        let lengths: Vec<usize> = found.iter().map(|(_, value)| value.as_ref().unwrap().len()).collect();
        assert!(lengths.len() == 1 || lengths.iter().sum::<usize>() <= RANGE_SIZE_MAX, "{lengths:?}");
        pages.push(lengths);
        rest = KeyRange { from: Bound::Excluded(last), to: Bound::Unbounded };
    }
    assert_eq!(pages.concat(), sizes);
    let counts: Vec<usize> = pages.iter().map(Vec::len).collect();
    assert_eq!(counts, [3, 3, 1, 2, 1, 1], "{pages:?}");
}

#[test]
fn a_value_that_cannot_be_read_is_named_when_it_is_its_turn() {
    let disk = disk(4);
    let mut node = boot(&disk, 1_000_000);
    let all: Vec<Key> = (0..50).map(|i| Key::from(format!("a long enough key:{i:04}"))).collect();
    all.iter().for_each(|key| set(&mut node, &disk, key, 2_000, Expiry::Clear));
    let bad = &all[20];
    let place = disk.written_blocks().iter().find_map(|block| {
        let at = memchr::memmem::find(&disk.read_raw(block * BLOCK as u64, BLOCK), bad)?;
        Some(block * BLOCK as u64 + at as u64)
    });
    disk.flip_bit(place.expect("the key is in one block") + bad.len() as u64 + 100, 1);
    let found = range(&mut node, &disk, query(KeyRange::all(), true));
    assert!(found.iter().map(|(key, _)| key).eq(&all[..20]), "what is before it comes first");
    let behind = |key: &Key| KeyRange { from: Bound::Excluded(key.clone()), to: Bound::Unbounded };
    match node.run(&disk, Request::Range(query(behind(&all[19]), true))) {
        Some(Outcome::Done(Err(OpError::UnreadableValue { key, error }))) => {
            assert_eq!(key, "a long enough key:0020");
            assert!(matches!(*error, OpError::Damaged { .. }), "{error}");
        }
        other => panic!("{other:?}"),
    }
    let found = range(&mut node, &disk, query(behind(bad), true));
    assert!(found.iter().map(|(key, _)| key).eq(&all[21..]));
    assert!(names(&mut node, &disk).iter().eq(&all), "names are not read");
}

#[test]
fn a_device_without_names_says_what_it_would_take() {
    let disk = SimDisk::new(SimConfig { block_count: (64 << 20) / BLOCK as u64, ..SimConfig::default() }, 5);
    format(&disk, 2, 5);
    let mut node = boot(&disk, 1_000_000);
    let found = node.run(&disk, Request::Range(query(KeyRange::all(), true)));
    assert_eq!(found, Some(Outcome::Done(Err(OpError::NotOrdered))));
}
