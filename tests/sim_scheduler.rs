//! The scheduler on a simulated disk that garbage collection and the scrubber would keep busy by themselves: what clients ask for
//! is done within a bound in the disk's own time, and so is the background's work. In the order of arrival it is not.

#![cfg(test)]

use basalt::device::sim::random::Random;
use basalt::device::sim::{SimConfig, SimDisk};
use basalt::engine::EngineStats;
use basalt::engine::action::{Action, Expiry, SetReply};
use basalt::engine::durability::Durability;
use basalt::engine::io_queue::cost::{ASSUMED, DeviceProfile};
use basalt::engine::io_queue::{Class, IoPolicy, IoSettings};
use basalt::engine::op::{Clock, Key, Reply};
use basalt::sim::node::{Outcome, Request, SimNode, format};

const BLOCK: usize = 4096;

/// Bytes that the disk transfers between two polls, and how long that takes by the node's clock.
const BYTES_PER_POLL: u64 = 16 << 10;
const POLL_US: u64 = 100;

const KEYS: u64 = 1_000;
const VALUE_SIZE: usize = 12_000;
const READS: u64 = 400;

/// What a disk that is such can do.
fn profile() -> DeviceProfile {
    let bytes_per_second = (BYTES_PER_POLL * 1_000_000 / POLL_US) as f64;
    let iops = bytes_per_second / BLOCK as f64;
    DeviceProfile {
        read_iops: iops,
        write_iops: iops,
        read_bytes_per_second: bytes_per_second,
        write_bytes_per_second: bytes_per_second,
        read_latency_p99_us: 10.0 * POLL_US as f64,
        ..ASSUMED
    }
}

fn key(number: u64) -> Key {
    Key::from(format!("key:{number}"))
}

fn set(number: u64, round: u8) -> Request {
    let value = vec![round; VALUE_SIZE].into();
    let expiry = Expiry::Clear;
    Request::Single(key(number), Action::Set { value, expiry, condition: None, reply: SetReply::Ok })
}

fn step(node: &mut SimNode) {
    node.step();
    node.clock.monotonic_us += POLL_US;
}

/// Polls of the disk until the request is answered.
fn polls_of(node: &mut SimNode, request: Request, wanted: &Outcome) -> u64 {
    node.start(1, request);
    for polls in 1..100_000 {
        step(node);
        if let Some((_, outcome)) = node.take_done().into_iter().find(|(id, _)| *id == 1) {
            assert_eq!(outcome, *wanted);
            return polls;
        }
    }
    panic!("never answered");
}

/// What a client saw who asked for one thing after the other while everything was collected and read again.
#[derive(Debug)]
struct Seen {
    read_polls_max: u64,
    write_polls_max: u64,
    polls: u64,
    collected: u64,
    scrubbed: u64,
    stats: EngineStats,
}

/// A node with garbage all over the place, on such a disk.
fn node_with_garbage(io: &IoSettings, random: &mut Random, seed: u64) -> SimNode {
    let config = SimConfig {
        block_count: (96 << 20) / BLOCK as u64,
        bytes_per_poll: Some(BYTES_PER_POLL),
        ..SimConfig::default()
    };
    let disk = SimDisk::new(config, seed);
    format(&disk, 2, seed);
    let clock = Clock { unix_ms: 1_000_000, monotonic_us: 0 };
    let mut node = SimNode::boot(&disk, 1, Durability::Always, clock, seed).expect("the disk boots");
    node.set_io(io);
    for number in 0..KEYS {
        node.start(10 + number, set(number, 0));
    }
    // Half of it becomes garbage, all over the place.
    for number in 0..KEYS {
        if random.chance(1, 2) {
            node.start(10_000 + number, set(number, 0));
        }
    }
    while node.stats().any(|stats| stats.records < KEYS) || node.stats().any(|stats| stats.keys < KEYS) {
        step(&mut node);
    }
    for _ in 0..2_000 {
        step(&mut node);
    }
    node.take_done();
    node
}

fn beside_the_background(policy: IoPolicy, seed: u64) -> Seen {
    let mut random = Random::new(seed);
    let io = IoSettings { policy, profile: profile(), ..IoSettings::default() };
    let mut node = node_with_garbage(&io, &mut random, seed);
    let before = node.stats().next().expect("one engine");
    node.set_scrub_rate(1 << 40);
    let mut seen = Seen {
        read_polls_max: 0,
        write_polls_max: 0,
        polls: 0,
        collected: 0,
        scrubbed: 0,
        stats: EngineStats::default(),
    };
    let value = Outcome::Reply(Reply::Bulk(vec![0; VALUE_SIZE].into()));
    for nth in 0..READS {
        // Passes begin once a day, and after a day without clients the background has the whole disk for a moment.
        if nth % 50 == 0 {
            node.start(2, Request::Compact);
            node.clock.monotonic_us += 86_400_000_000;
            for _ in 0..20 {
                polls_of(&mut node, Request::Single(key(random.below(KEYS)), Action::Get), &value);
            }
        }
        let polls = polls_of(&mut node, Request::Single(key(random.below(KEYS)), Action::Get), &value);
        seen.read_polls_max = seen.read_polls_max.max(polls);
        seen.polls += polls;
        if nth % 8 == 0 {
            let polls = polls_of(&mut node, set(random.below(KEYS), 0), &Outcome::Reply(Reply::Ok));
            seen.write_polls_max = seen.write_polls_max.max(polls);
            seen.polls += polls;
        }
    }
    seen.stats = node.stats().next().expect("one engine");
    seen.collected = seen.stats.io[Class::Collect as usize].bytes - before.io[Class::Collect as usize].bytes;
    seen.scrubbed = seen.stats.io[Class::Scrub as usize].bytes;
    seen
}

/// A millisecond of the disk's time is what the background may have in flight (the profile's 99 % of single reads), a read itself
/// takes a poll and up to four of delay, and a value may be read or written beside it.
const POLLS_MAX: u64 = 1_000 / POLL_US + 8;

#[test]
fn reads_and_writes_are_done_within_a_bound_beside_collection_and_scrubbing() {
    for seed in 0..4 {
        let shares = beside_the_background(IoPolicy::Shares, seed);
        assert!(shares.read_polls_max <= POLLS_MAX, "seed {seed}: {shares:?}");
        // A write and its flush.
        assert!(shares.write_polls_max <= 2 * POLLS_MAX, "seed {seed}: {shares:?}");
        // Nobody starves the background either: together it had a good part of what the disk did.
        let all = shares.polls * BYTES_PER_POLL;
        assert!(shares.collected + shares.scrubbed > all / 6, "seed {seed}: {shares:?} of {all}");
        assert!(shares.collected > 1 << 20 && shares.scrubbed > 1 << 20, "seed {seed}: {shares:?}");

        let fifo = beside_the_background(IoPolicy::Fifo, seed);
        assert!(fifo.read_polls_max > 2 * POLLS_MAX, "seed {seed}: nothing to be saved from: {fifo:?}");
        assert!(fifo.collected > 1 << 20 && fifo.scrubbed > 1 << 20, "seed {seed}: {fifo:?}");
    }
}

#[test]
fn what_an_engine_does_by_itself_is_no_client() {
    for seed in 0..2 {
        let io = IoSettings { profile: profile(), ..IoSettings::default() };
        let mut node = node_with_garbage(&io, &mut Random::new(seed), seed);
        let stats = |node: &SimNode| node.stats().next().expect("one engine");
        let before = stats(&node);
        node.clock.monotonic_us += 1_000_000;
        node.start(2, Request::Compact);
        let is_over = |node: &mut SimNode| node.take_done().iter().any(|(id, _)| *id == 2);
        for polls in 0.. {
            assert!(polls < 100_000, "it is never compacted: {:?}", stats(&node));
            step(&mut node);
            // Records of what is collected and retired are committed; no client uses the device for all that.
            assert!(io.activity.is_quiet(node.clock.monotonic_us), "after {polls} polls");
            if is_over(&mut node) {
                break;
            }
        }
        let after = stats(&node);
        assert!(
            after.groups > before.groups && after.gc.extents_freed > before.gc.extents_freed,
            "{after:?}"
        );
        // A client's write is one.
        polls_of(&mut node, set(1, 0), &Outcome::Reply(Reply::Ok));
        assert!(!io.activity.is_quiet(node.clock.monotonic_us));
    }
}
