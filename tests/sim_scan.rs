//! Scans read the keys that they list, and nothing else has to: what presence is asked of reads nothing, present or not.

#![cfg(test)]

use std::collections::BTreeSet;

use basalt::device::sim::{SimConfig, SimDisk};
use basalt::engine::action::{Action, Expiry, SetReply, TtlReply};
use basalt::engine::durability::Durability;
use basalt::engine::op::{Clock, Key, OpError, Reply};
use basalt::sim::node::{Outcome, Request, SimNode, format};

const BLOCK: usize = 4096;

/// What a read takes at least.
const SECTOR: u64 = 512;

fn disk(seed: u64) -> SimDisk {
    let config = SimConfig { block_count: (64 << 20) / BLOCK as u64, ..SimConfig::default() };
    let disk = SimDisk::new(config, seed);
    format(&disk, 2, seed);
    disk
}

fn boot(disk: &SimDisk) -> SimNode {
    let clock = Clock { unix_ms: 1_000_000, monotonic_us: 0 };
    SimNode::boot(disk, 1, Durability::Always, clock, 7).expect("the disk boots")
}

fn reply(node: &mut SimNode, disk: &SimDisk, key: &Key, action: Action) -> Reply {
    match node.run(disk, Request::Single(key.clone(), action)) {
        Some(Outcome::Reply(reply)) => reply,
        other => panic!("{other:?}"),
    }
}

fn set(node: &mut SimNode, disk: &SimDisk, key: &Key, size: usize) {
    let value = vec![b'v'; size].into();
    let action = Action::Set { value, expiry: Expiry::Clear, condition: None, reply: SetReply::Ok };
    assert_eq!(reply(node, disk, key, action), Reply::Ok);
}

fn keys(node: &mut SimNode, disk: &SimDisk) -> BTreeSet<Key> {
    match node.run(disk, Request::Keys) {
        Some(Outcome::Keys(found)) => found.into_iter().collect(),
        other => panic!("{other:?}"),
    }
}

fn bytes_read(node: &SimNode) -> u64 {
    node.stats().map(|stats| stats.bytes_read).sum()
}

#[test]
fn keys_of_every_length_are_listed_whatever_their_values() {
    let disk = disk(1);
    let mut node = boot(&disk);
    let mut expected = BTreeSet::new();
    for (i, size) in
        [0, 1, 100, 440, 480, 511, 512, 513, 1_000, 4_000, 4_096, 9_000, 65_535].into_iter().enumerate()
    {
        for value_size in [0, 10, 5_000, 300_000] {
            let mut key = format!("{i}:{value_size}:").into_bytes();
            key.resize(size.max(key.len()), b'k');
            let key = Key::from(key);
            set(&mut node, &disk, &key, value_size);
            expected.insert(key);
        }
    }
    assert_eq!(keys(&mut node, &disk), expected);
    assert!(node.stop(&disk));
    // From a checkpoint; the simulation compares it with what the log says.
    let mut node = boot(&disk);
    assert_eq!(keys(&mut node, &disk), expected);
}

#[test]
fn a_scan_reads_keys_and_leaves_values_alone() {
    let disk = disk(2);
    let mut node = boot(&disk);
    let all: BTreeSet<Key> = (0..200).map(|i| Key::from(format!("key:{i}"))).collect();
    all.iter().for_each(|key| set(&mut node, &disk, key, 60_000));
    let before = bytes_read(&node);
    assert_eq!(keys(&mut node, &disk), all);
    let read = bytes_read(&node) - before;
    assert!((200 * SECTOR..=400 * SECTOR).contains(&read), "{read} bytes for 200 keys");
}

#[test]
fn what_asks_for_presence_reads_nothing_and_neither_does_a_miss() {
    let disk = disk(3);
    let mut node = boot(&disk);
    let all: Vec<Key> = (0..400).map(|i| Key::from(format!("key:{i}"))).collect();
    all.iter().for_each(|key| set(&mut node, &disk, key, 100));
    let before = bytes_read(&node);
    for i in 0..2_000 {
        assert_eq!(reply(&mut node, &disk, &Key::from(format!("none:{i}")), Action::Get), Reply::Nil);
    }
    for key in &all[..100] {
        set(&mut node, &disk, key, 200);
        assert_eq!(reply(&mut node, &disk, key, Action::Exists), Reply::Int(1));
        assert_eq!(reply(&mut node, &disk, key, Action::Ttl(TtlReply::Milliseconds)), Reply::Int(-1));
        assert_eq!(reply(&mut node, &disk, key, Action::Delete), Reply::Int(1));
        assert_eq!(reply(&mut node, &disk, key, Action::Delete), Reply::Int(0));
    }
    assert_eq!(node.run(&disk, Request::Count), Some(Outcome::Count(300)));
    assert_eq!(bytes_read(&node), before, "something was read");
    // The length is in the record alone.
    assert_eq!(reply(&mut node, &disk, &all[200], Action::Strlen), Reply::Int(100));
    let read = bytes_read(&node) - before;
    assert!((1..=2).contains(&(read / SECTOR)), "{read} bytes for a length");
}

#[test]
fn a_key_that_cannot_be_read_fails_the_scan_and_one_whose_value_cannot_be_is_listed() {
    let disk = disk(4);
    let mut node = boot(&disk);
    let all: BTreeSet<Key> = (0..50).map(|i| Key::from(format!("a long enough key:{i:04}"))).collect();
    all.iter().for_each(|key| set(&mut node, &disk, key, 2_000));
    let place = |key: &Key| {
        let blocks = disk.written_blocks();
        let found = blocks.iter().find_map(|block| {
            let at = memchr::memmem::find(&disk.read_raw(block * BLOCK as u64, BLOCK), key)?;
            Some(block * BLOCK as u64 + at as u64)
        });
        found.expect("the key is in one block")
    };
    let mut all_keys = all.iter();
    let (first, second) = (all_keys.next().unwrap(), all_keys.next().unwrap());
    disk.flip_bit(place(first) + first.len() as u64 + 100, 1);
    assert!(matches!(reply(&mut node, &disk, first, Action::Get), Reply::Error(OpError::Damaged { .. })));
    assert_eq!(keys(&mut node, &disk), all, "its key is intact");
    disk.flip_bit(place(second), 1);
    assert!(matches!(reply(&mut node, &disk, second, Action::Get), Reply::Error(OpError::Damaged { .. })));
    let found = node.run(&disk, Request::Keys);
    assert!(matches!(found, Some(Outcome::Done(Err(OpError::Damaged { .. })))), "{found:?}");
}
