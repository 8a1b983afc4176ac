//! Garbage collection on simulated disks that are nearly full: writers never wait for ever, and what is moved stays in bounds.

#![cfg(test)]

use basalt::device::sim::random::Random;
use basalt::device::sim::{SimConfig, SimDisk};
use basalt::engine::action::{Action, Expiry, SetReply};
use basalt::engine::durability::Durability;
use basalt::engine::op::{Clock, Key, Reply, Value};
use basalt::probe;
use basalt::sim::node::{Outcome, Request, SimNode, format};

/// Extents of 1 MiB: what survives has extents of its own from 16 for each shard on.
const DISK_SIZE: u64 = 140 << 20;
const VALUE_SIZE: u64 = 60_000;

/// What a record takes beside its value.
const RECORD_OVERHEAD: u64 = 60;

/// PUTs that are under way at a time.
const DEPTH: u64 = 64;

/// Time on the node's clock from one step to the next.
const STEP_US: u64 = 100;

/// Steps in which somebody must be answered: many more than any collection takes.
const STEPS_MAX: u32 = 20_000;

/// Puts `count` keys, chosen at random or one after the other. Gives the most steps in a row in which nobody was answered.
fn put(node: &mut SimNode, count: u64, value_size: u64, mut choose: impl FnMut(u64) -> u64) -> u32 {
    let value = Value::from(vec![7; value_size as usize]);
    let (mut sent, mut answered, mut silent, mut silent_max) = (0, 0, 0, 0);
    while answered < count {
        while sent < count && sent - answered < DEPTH {
            let action = Action::Set {
                value: value.clone(),
                expiry: Expiry::Clear,
                condition: None,
                reply: SetReply::Ok,
            };
            node.start(sent, Request::Single(Key::from(format!("key:{:08}", choose(sent))), action));
            sent += 1;
        }
        node.step();
        node.clock.monotonic_us += STEP_US;
        silent += 1;
        for (id, outcome) in node.take_done() {
            assert_eq!(outcome, Outcome::Reply(Reply::Ok), "PUT {id} of {count}");
            answered += 1;
            silent = 0;
        }
        silent_max = silent_max.max(silent);
        assert!(silent < STEPS_MAX, "nobody is answered any more after {answered} of {count} PUTs");
    }
    silent_max
}

/// What overwriting everything came to.
struct Overwritten {
    /// Bytes written for each byte put, in the last round.
    amplification: f64,
    /// The most steps in a row in which nobody was answered.
    silent_max: u32,
}

/// Fills a device of so many shards to a part of its extents and overwrites everything several times.
fn overwrite(shards: u16, fill_percent: u64, value_size: u64, rounds: u32) -> Overwritten {
    let config = SimConfig { block_count: DISK_SIZE / 4096, ..SimConfig::default() };
    let disk = SimDisk::new(config, u64::from(shards));
    format(&disk, shards, 3);
    let clock = Clock { unix_ms: 1_000_000, monotonic_us: 0 };
    let mut node = SimNode::boot(&disk, 1, Durability::Always, clock, 7).expect("the disk boots");
    let keys = DISK_SIZE * fill_percent / 100 / (value_size + RECORD_OVERHEAD);
    let mut random = Random::new(11);
    put(&mut node, keys, value_size, |number| number);
    let (mut amplification, mut silent_max) = (0.0, 0);
    for _ in 0..rounds {
        let before = node.stats().next().expect("one engine");
        silent_max = silent_max.max(put(&mut node, keys, value_size, |_| random.below(keys)));
        let after = node.stats().next().expect("one engine");
        let written = after.bytes_written - before.bytes_written;
        amplification = written as f64 / (after.user_bytes - before.user_bytes) as f64;
    }
    Overwritten { amplification, silent_max }
}

#[test]
fn writers_on_a_device_that_is_nearly_full_never_wait_for_ever() {
    let _ = probe::take();
    for (shards, fill_percent) in [(4, 70), (4, 85), (2, 80), (6, 75)] {
        let Overwritten { amplification, .. } = overwrite(shards, fill_percent, VALUE_SIZE, 4);
        println!("{shards} shards, {fill_percent} %: {amplification:.2} written for each byte put");
        // Greedy's analytic figures are 1.9 to 3.7; extents of 17 records and a third of the device kept back allow no more.
        assert!(amplification < 12.0, "{shards} shards, {fill_percent} %: {amplification:.2} written");
    }
    let hits = probe::take().find(|(name, _)| *name == "collection without an extent of its own");
    assert!(hits.is_some_and(|(_, count)| count > 0), "no collection had to do with what is open");
}

/// The extents are looked at ten times a second while many are free. Those that are left then may be gone much sooner.
#[test]
fn writers_do_not_wait_until_it_is_time_to_look_for_garbage() {
    for (shards, fill_percent) in [(4, 40), (2, 60)] {
        let Overwritten { silent_max, .. } = overwrite(shards, fill_percent, VALUE_SIZE, 4);
        println!("{shards} shards, {fill_percent} %: nobody was answered in {silent_max} steps");
        assert!(
            u64::from(silent_max) * STEP_US < 50_000,
            "{silent_max} steps of {STEP_US} us without an answer"
        );
    }
}

/// A pass of a collection is short, so that clients are served in between; who waits for its outcome is not served by that.
#[test]
fn short_records_are_collected_as_fast_as_they_are_waited_for() {
    let Overwritten { silent_max, .. } = overwrite(4, 85, 300, 2);
    println!("nobody was answered in {silent_max} steps");
    assert!(silent_max < 100, "nobody was answered in {silent_max} steps");
}
