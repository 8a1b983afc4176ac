//! What is answered at once is what the operation would have answered; where that is not known yet, nothing is answered at once.

#![cfg(test)]

use basalt::device::sim::{SimConfig, SimDisk};
use basalt::engine::action::{Action, Expiry, SetReply};
use basalt::engine::durability::Durability;
use basalt::engine::memory::MemoryBudget;
use basalt::engine::op::{Clock, Direct, Key, Reply};
use basalt::sim::node::{Outcome, Request, SimNode, format};

const BLOCK: usize = 4096;

/// In which a message arrives.
const STEPS: usize = 4;

fn disk(seed: u64) -> SimDisk {
    let config = SimConfig {
        block_count: (64 << 20) / BLOCK as u64,
        // Long enough to look at the node meanwhile.
        delay_polls_max: 1_000,
        ..SimConfig::default()
    };
    let disk = SimDisk::new(config, seed);
    format(&disk, 1, seed);
    disk
}

fn boot(disk: &SimDisk, durability: Durability, cache_size_max: usize) -> SimNode {
    let clock = Clock { unix_ms: 1_000_000, monotonic_us: 0 };
    let mut node = SimNode::boot(disk, 1, durability, clock, 7).expect("the disk boots");
    node.set_memory(MemoryBudget { cache_size_max, ..MemoryBudget::default() });
    node
}

fn set(key: &'static str, value: &[u8]) -> Request {
    let value = value.to_vec().into();
    let action = Action::Set { value, expiry: Expiry::Clear, condition: None, reply: SetReply::Ok };
    Request::Single(Key::from(key), action)
}

fn get(node: &mut SimNode, key: &str) -> Option<Reply> {
    node.run_direct(Direct::Get { key: key.as_bytes() })
}

fn put(node: &mut SimNode, key: &str, value: &[u8]) -> Option<Reply> {
    node.run_direct(Direct::Set { key: key.as_bytes(), value })
}

fn bulk(text: &'static str) -> Option<Reply> {
    Some(Reply::Bulk(text.into()))
}

fn done(node: &mut SimNode, disk: &SimDisk, request: Request) {
    assert_eq!(node.run(disk, request), Some(Outcome::Reply(Reply::Ok)));
}

/// Starts a request and lets the node do everything that it can without the disk.
fn start(node: &mut SimNode, request: Request) {
    node.start(1_000, request);
    for _ in 0..STEPS {
        node.step();
    }
    assert!(node.take_done().is_empty(), "it waits for the disk");
}

/// Lets the disk finish what is under way.
fn finish(node: &mut SimNode, disk: &SimDisk) {
    assert!(node.run(disk, Request::Sync).is_some());
    node.take_done();
}

#[test]
fn nothing_is_told_before_it_is_durable() {
    let disk = disk(1);
    let mut node = boot(&disk, Durability::Always, 1 << 20);
    assert_eq!(get(&mut node, "a"), Some(Reply::Nil));
    done(&mut node, &disk, set("a", b"old"));
    assert_eq!(get(&mut node, "a"), bulk("old"));
    assert_eq!(put(&mut node, "a", b"new"), None, "the mode answers later");
    start(&mut node, set("a", b"new"));
    assert_eq!(get(&mut node, "a"), None, "neither the old value nor one that a crash could take back");
    start(&mut node, set("b", b"first"));
    assert_eq!(get(&mut node, "b"), None);
    finish(&mut node, &disk);
    assert_eq!((get(&mut node, "a"), get(&mut node, "b")), (bulk("new"), bulk("first")));
    start(&mut node, Request::Single(Key::from("a"), Action::Delete));
    assert_eq!(get(&mut node, "a"), None, "not there is no more durable than a value");
    finish(&mut node, &disk);
    assert_eq!(get(&mut node, "a"), Some(Reply::Nil));
}

#[test]
fn a_mode_that_answers_early_answers_at_once_and_keeps_what_it_said() {
    let disk = disk(2);
    let mut node = boot(&disk, Durability::Never, 1 << 20);
    assert_eq!(put(&mut node, "a", b"1"), Some(Reply::Ok));
    assert_eq!(get(&mut node, "a"), bulk("1"));
    assert_eq!(put(&mut node, "a", b"2"), Some(Reply::Ok));
    done(&mut node, &disk, set("b", b"3"));
    let expiry = Expiry::At(1_000_500);
    let action = Action::Set { value: "x".into(), expiry, condition: None, reply: SetReply::Ok };
    done(&mut node, &disk, Request::Single(Key::from("c"), action));
    assert_eq!(put(&mut node, "c", b"4"), Some(Reply::Ok), "it does not expire any more");
    node.clock.unix_ms += 1_000;
    assert_eq!(get(&mut node, "c"), bulk("4"));
    finish(&mut node, &disk);
    assert!(node.stop(&disk));
    let mut node = boot(&disk, Durability::Never, 1 << 20);
    for (key, value) in [("a", "2"), ("b", "3"), ("c", "4")] {
        let request = Request::Single(Key::from(key), Action::Get);
        assert_eq!(node.run(&disk, request), Some(Outcome::Reply(Reply::Bulk(value.into()))));
    }
}

#[test]
fn what_is_not_in_memory_is_read_by_an_operation() {
    let disk = disk(3);
    let mut node = boot(&disk, Durability::Always, 0);
    done(&mut node, &disk, set("a", b"1"));
    assert_eq!(get(&mut node, "a"), None);
    let long = vec![7; 300_000];
    done(&mut node, &disk, set("long", &long));
    node.set_durability(Durability::Never);
    assert_eq!(get(&mut node, "long"), None);
    assert_eq!(put(&mut node, "a", &long), None, "it is made of chunks");
    assert_eq!(put(&mut node, "long", b"short"), Some(Reply::Ok));
    assert_eq!(get(&mut node, "long"), bulk("short"));
}

#[test]
fn keys_that_somebody_holds_are_left_alone() {
    let disk = disk(4);
    let mut node = boot(&disk, Durability::Never, 0);
    done(&mut node, &disk, set("n", b"5"));
    finish(&mut node, &disk);
    // It reads the value, which nobody has in memory.
    start(&mut node, Request::Single(Key::from("n"), Action::Increment(1)));
    assert_eq!((get(&mut node, "n"), put(&mut node, "n", b"100")), (None, None));
    assert_eq!(put(&mut node, "other", b"1"), Some(Reply::Ok));
    // It waits at the gate for the one that holds a key, and all keys behind it.
    node.start(1_001, Request::Clear);
    for _ in 0..STEPS {
        node.step();
    }
    assert_eq!((get(&mut node, "other"), put(&mut node, "other", b"2")), (None, None));
    finish(&mut node, &disk);
    assert_eq!((get(&mut node, "n"), get(&mut node, "other")), (Some(Reply::Nil), Some(Reply::Nil)));
}

#[test]
fn an_index_that_may_not_grow_takes_no_new_keys_at_once() {
    let disk = disk(5);
    let mut node = boot(&disk, Durability::Never, 1 << 20);
    assert_eq!(put(&mut node, "a", b"1"), Some(Reply::Ok));
    node.set_memory(MemoryBudget { index_may_grow: false, ..MemoryBudget::default() });
    assert_eq!(put(&mut node, "a", b"2"), Some(Reply::Ok));
    assert_eq!(put(&mut node, "b", b"1"), None);
}

#[test]
fn reads_that_are_mostly_in_vain_are_seldom_tried_and_found_again_when_they_are_not() {
    let disk = disk(6);
    let mut node = boot(&disk, Durability::Always, 1 << 20);
    done(&mut node, &disk, set("hot", b"1"));
    done(&mut node, &disk, set("cold", &[0; 100_000]));
    assert_eq!(get(&mut node, "hot"), bulk("1"));
    // A value of this length is not kept when it is written.
    (0..100).for_each(|_| assert_eq!(get(&mut node, "cold"), None));
    let tries_until = (1..200).find(|_| get(&mut node, "hot").is_some()).expect("it is tried again");
    assert!((2..=64).contains(&tries_until), "{tries_until}");
    (0..100).for_each(|_| assert_eq!(get(&mut node, "hot"), bulk("1")));
}
