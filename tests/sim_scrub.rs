//! The scrubber on simulated disks: it finds every damaged live record, names nothing that is right, keeps to its rate, and sees
//! nothing wrong in extents that are collected under it.

#![cfg(test)]

use basalt::device::sim::random::Random;
use basalt::device::sim::{Fault, FaultKind, FaultOp, SimConfig, SimDisk};
use basalt::engine::action::{Action, Expiry, SetReply};
use basalt::engine::durability::Durability;
use basalt::engine::io_queue::Class;
use basalt::engine::op::{Clock, Key, Reply};
use basalt::engine::scrub::ScrubStats;
use basalt::sim::node::{Outcome, Request, SimNode, format};

const BLOCK: usize = 4096;
const KEYS: u64 = 400;

fn key(number: u64) -> Key {
    Key::from(format!("key:{number}"))
}

/// A value that begins with what no other value has.
fn value(number: u64, round: u64) -> Vec<u8> {
    let mut value = format!("value {number} of round {round} ").into_bytes();
    value.resize(6_000, b'.');
    value
}

fn disk(seed: u64) -> SimDisk {
    let config = SimConfig { block_count: (24 << 20) / BLOCK as u64, ..SimConfig::default() };
    let disk = SimDisk::new(config, seed);
    format(&disk, 2, seed);
    disk
}

fn boot(disk: &SimDisk) -> SimNode {
    let clock = Clock { unix_ms: 1_000_000, monotonic_us: 0 };
    SimNode::boot(disk, 1, Durability::Always, clock, 7).expect("the disk boots")
}

fn set(node: &mut SimNode, disk: &SimDisk, number: u64, round: u64) {
    let (value, expiry) = (value(number, round).into(), Expiry::Clear);
    let action = Action::Set { value, expiry, condition: None, reply: SetReply::Ok };
    assert_eq!(node.run(disk, Request::Single(key(number), action)), Some(Outcome::Reply(Reply::Ok)));
}

fn scrubbed(node: &SimNode) -> ScrubStats {
    node.stats().map(|stats| stats.scrub).next().expect("one engine")
}

/// Runs passes until so many have ended.
fn pass(node: &mut SimNode, passes: u64) {
    for _ in 0..2_000_000 {
        if scrubbed(node).passes >= passes {
            return;
        }
        node.step();
        // A pass begins once a day.
        let is_over = scrubbed(node).passes > 0 && passes > scrubbed(node).passes;
        node.clock.monotonic_us += if is_over { 60_000_000 } else { 100 };
    }
    panic!("{passes} passes never ended: {:?}", scrubbed(node));
}

/// Where each key's newest value is, by its first bytes.
fn places(disk: &SimDisk, number: u64, round: u64) -> Vec<u64> {
    let needle = &value(number, round)[..24];
    let mut found = Vec::new();
    for block in disk.written_blocks() {
        let bytes = disk.read_raw(block * BLOCK as u64, BLOCK);
        found.extend(memchr::memmem::find_iter(&bytes, needle).map(|at| block * BLOCK as u64 + at as u64));
    }
    found
}

#[test]
fn every_damaged_record_is_found_and_no_other() {
    let disk = disk(1);
    let mut node = boot(&disk);
    // The old values are dead: damage to them is none.
    for round in 0..2 {
        for number in 0..KEYS {
            set(&mut node, &disk, number, round);
        }
    }
    // Whatever is sealed is scrubbed; what is being filled is not.
    node.set_scrub_rate(1 << 30);
    pass(&mut node, 1);
    let clean = scrubbed(&node);
    assert!(clean.damaged == 0 && clean.bytes > 2 << 20, "{clean:?}");

    let mut damaged = 0;
    for number in (0..KEYS / 2).step_by(10) {
        for (round, is_live) in [(0, false), (1, true)] {
            if let [at] = places(&disk, number, round)[..] {
                disk.flip_bit(at + 7, 3);
                damaged += u64::from(is_live);
            }
        }
    }
    // A block that can't be read: the others of its extent are right.
    let at = places(&disk, 5, 1)[0] / BLOCK as u64;
    disk.make_unreadable(at);
    pass(&mut node, 2);
    let found = scrubbed(&node);
    assert!(damaged > 10, "only {damaged} records were damaged");
    assert!(found.damaged > damaged && found.damaged <= damaged + 3, "{damaged} were damaged: {found:?}");
}

#[test]
fn a_medium_that_is_wrong_once_is_not_called_damaged() {
    let mut struck = 0;
    // Most wrong bits hit a live record; a few hit padding.
    for seed in 0..10 {
        let disk = disk(seed);
        let mut node = boot(&disk);
        for number in 0..KEYS {
            set(&mut node, &disk, number, 0);
        }
        for nth in [0, 2, 5] {
            disk.inject(Fault { nth, op: FaultOp::Read, kind: FaultKind::WrongRead, sticky: false });
        }
        node.set_scrub_rate(1 << 30);
        pass(&mut node, 1);
        let found = scrubbed(&node);
        assert!(found.damaged == 0, "seed {seed}: {found:?}");
        struck += disk.faults_struck();
    }
    assert!(struck >= 20, "only {struck} reads were wrong");
}

#[test]
fn nothing_is_wrong_with_what_is_overwritten_and_collected_meanwhile() {
    let mut freed = 0;
    for seed in 0..10 {
        let disk = disk(seed);
        let mut node = boot(&disk);
        let mut random = Random::new(seed);
        node.set_scrub_rate(1 << 30);
        let mut id = 0;
        for round in 0..4_000 {
            let (value, expiry) = (value(random.below(KEYS / 4), round).into(), Expiry::Clear);
            let action = Action::Set { value, expiry, condition: None, reply: SetReply::Ok };
            id += 1;
            node.start(id, Request::Single(key(random.below(KEYS / 4)), action));
            for _ in 0..3 {
                node.step();
                // So that a day passes now and then.
                node.clock.monotonic_us += if random.chance(1, 50) { 86_400_000_000 } else { 2_000 };
            }
            for (_, outcome) in node.take_done() {
                assert_eq!(outcome, Outcome::Reply(Reply::Ok), "seed {seed}");
            }
        }
        let found = scrubbed(&node);
        assert!(found.damaged == 0 && found.passes > 3, "seed {seed}: {found:?}");
        freed +=
            basalt::probe::take().filter(|(name, _)| *name == "extent freed").map(|(_, n)| n).sum::<u64>();
    }
    assert!(freed > 20, "{freed} extents were freed");
}

#[test]
fn records_that_are_read_one_by_one_keep_to_the_rate() {
    let disk = disk(5);
    let mut node = boot(&disk);
    for number in 0..KEYS {
        set(&mut node, &disk, number, 0);
    }
    // One damaged record has every live record of its extent read by itself.
    let mut damaged = 0;
    for number in (0..KEYS / 2).step_by(20) {
        if let [at] = places(&disk, number, 0)[..] {
            disk.flip_bit(at + 7, 3);
            damaged += 1;
        }
    }
    assert!(damaged > 5);
    let rate = 200_000;
    node.set_scrub_rate(rate);
    let bytes = |node: &SimNode| {
        node.stats().map(|stats| stats.io[Class::Scrub as usize].bytes).next().expect("one engine")
    };
    let from_us = node.clock.monotonic_us;
    while scrubbed(&node).passes == 0 {
        node.step();
        node.clock.monotonic_us += 1_000;
        let elapsed_us = node.clock.monotonic_us - from_us;
        assert!(elapsed_us < 600_000_000, "the pass never ends: {:?}", scrubbed(&node));
        // A piece, and what may be under way of single records; damaged ones are tried again.
        let most = rate * elapsed_us / 1_000_000 + (256 << 10) + (64 << 10) + damaged * (32 << 10);
        assert!(bytes(&node) <= most, "{} bytes in {elapsed_us} us, {most} at most", bytes(&node));
    }
    assert!(scrubbed(&node).damaged >= damaged / 2, "{:?}", scrubbed(&node));
}

#[test]
fn the_rate_is_kept() {
    let disk = disk(3);
    let mut node = boot(&disk);
    for number in 0..KEYS {
        set(&mut node, &disk, number, 0);
    }
    let rate = 100_000;
    node.set_scrub_rate(rate);
    let from_us = node.clock.monotonic_us;
    while node.clock.monotonic_us - from_us < 10_000_000 {
        node.step();
        node.clock.monotonic_us += 1_000;
    }
    let bytes = scrubbed(&node).bytes;
    // One piece more than the rate, at most, and no less than that.
    assert!(bytes <= 10 * rate + 2 * (256 << 10) && bytes >= 7 * rate, "{bytes} bytes in 10 s");
    node.set_scrub_rate(0);
    for _ in 0..10_000 {
        node.step();
        node.clock.monotonic_us += 1_000;
    }
    assert!(scrubbed(&node).bytes == bytes, "it goes on although it was stopped");
}
