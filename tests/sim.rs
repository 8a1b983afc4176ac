//! The engine on simulated disks: random worlds with crashes against a model, from one seed each.
//!
//! `BASALT_SEEDS=20000 cargo test --release --test sim` is the long run; `scripts/sim SEED` replays one seed and says what
//! it came to. Every run is repeatable: a failure names its seed.

#![cfg(test)]

use basalt::sim::probe::Probes;
use basalt::sim::world::{Summary, WorldConfig, run};

/// Situations that the random worlds must come to.
const PROBES: &[&str] = &[
    "torn tail cut",
    "log over several extents recovered",
    "read at once",
    "parts without a commit record dropped",
    "batch across shards",
    "batch on one shard",
    "crash with unflushed writes",
    "crash during recovery",
    "crash during a clean stop",
    "process killed, disk cache kept",
    "an open write had happened",
    "an open write had not happened",
    "write refused by a full device",
    "clean stop",
    "read answered from the cache",
    "write refused for want of memory",
    "extent collected",
    "extent freed",
    "extent trimmed",
    "retired frames skipped",
    "older retirement taken",
    "collection met a held key",
    "checkpoint written",
    "checkpoint given up",
    "shard recovered from a checkpoint alone",
    "shard recovered from a checkpoint and the log behind it",
    "incomplete checkpoint passed over",
    "append to a long value",
    "range over chunks read",
    "long value given another expiry",
    "hole in a long value",
    "long value written over in part",
    "long value read although its key has another",
    "long value waits for room",
    "chunk moved",
    "chunks without a manifest dropped",
    "manifest of an expired key dropped",
    "everything with an expiry has expired",
    "dump beside writers",
    "power cut soon after a write failed",
    "scan of a prefix",
    "few keys of a prefix scanned",
    "range of keys",
    "name of a key that has gone met",
];

fn count_from_env(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")),
        Err(_) => default,
    }
}

fn run_seeds(first: u64, count: u64) -> (Probes, u64, u64) {
    let (mut probes, mut crashes, mut answered) = (Probes::default(), 0, 0);
    for seed in first..first + count {
        let Summary { probes: seen, crashes: more, answered: done, .. } =
            run(WorldConfig::from_seed(seed, 1_000));
        probes.add(&seen);
        crashes += more;
        answered += done;
    }
    (probes, crashes, answered)
}

/// Two tests share the seeds, so that two cores do.
fn random_worlds(half: u64) {
    let count = count_from_env("BASALT_SEEDS", 200) / 2;
    let (probes, crashes, answered) = run_seeds(1_000_000 * half, count);
    println!("{count} seeds, {crashes} crashes, {answered} answers\n{probes}");
    assert!(count < 40 || probes.missing(PROBES).is_empty(), "never came to: {:?}", probes.missing(PROBES));
}

#[test]
fn random_worlds_keep_every_promise_first_half() {
    random_worlds(0);
}

#[test]
fn random_worlds_keep_every_promise_second_half() {
    random_worlds(1);
}

/// The modes that acknowledge at once: what a crash leaves is a prefix of each shard's history, batches across shards are
/// there as acknowledged, and what was once found stays.
#[test]
fn relaxed_worlds_keep_a_prefix_of_every_shard() {
    let count = count_from_env("BASALT_SEEDS", 200) / 2;
    let mut probes = Probes::default();
    for seed in 0..count {
        probes.add(&run(WorldConfig::relaxed_from_seed(seed, 1_000)).probes);
    }
    println!("{probes}");
    let wanted = [
        "the end of a shard's history was lost",
        "torn tail cut",
        "extent without an accepted frame freed",
        "written at once",
    ];
    assert!(count < 40 || probes.missing(&wanted).is_empty(), "never came to: {:?}", probes.missing(&wanted));
}

/// Small disks that are written many times over: garbage is collected all the time, and what is kept goes to extents of its own
/// in three worlds of four.
#[test]
fn full_worlds_keep_every_promise() {
    let count = count_from_env("BASALT_SEEDS", 200).div_ceil(10);
    let mut probes = Probes::default();
    for seed in 0..count {
        probes.add(&run(WorldConfig::full_from_seed(seed, 2_000)).probes);
    }
    println!("{probes}");
    let wanted = [
        "unit of survivors installed",
        "unit of survivors recovered",
        "torn unit left out",
        "extent collected",
        "extent freed",
    ];
    assert!(count < 20 || probes.missing(&wanted).is_empty(), "never came to: {:?}", probes.missing(&wanted));
}

/// The same beside the scrubber, whose reads go on while extents are collected and used again.
#[test]
fn scrubbed_worlds_keep_every_promise() {
    let count = count_from_env("BASALT_SEEDS", 200).div_ceil(10);
    let mut probes = Probes::default();
    for seed in 0..count {
        probes.add(&run(WorldConfig::scrubbed_from_seed(seed, 1_000)).probes);
    }
    println!("{probes}");
    let wanted = ["everything scrubbed again", "extent freed"];
    assert!(count < 20 || probes.missing(&wanted).is_empty(), "never came to: {:?}", probes.missing(&wanted));
}

/// The same where writes fail all the time.
#[test]
fn failing_worlds_keep_every_promise() {
    let count = count_from_env("BASALT_SEEDS", 200).div_ceil(10);
    let mut probes = Probes::default();
    for seed in 0..count {
        probes.add(&run(WorldConfig::failing_from_seed(seed, 1_000)).probes);
    }
    println!("{probes}");
}

/// Every index is of several segments from the beginning, and all of it survives.
#[test]
fn crowded_worlds_keep_every_key() {
    let count = count_from_env("BASALT_SEEDS", 200).div_ceil(40);
    let mut probes = Probes::default();
    for seed in 0..count {
        probes.add(&run(WorldConfig::crowded_from_seed(seed, 200)).probes);
    }
    assert!(probes.missing(&["index of several segments"]).is_empty());
}

/// Without this no seed would be worth anything.
#[test]
fn a_seed_run_twice_gives_the_same_trace() {
    for seed in 0..5 {
        let first = run(WorldConfig::from_seed(seed, 400));
        let second = run(WorldConfig::from_seed(seed, 400));
        assert_eq!(first, second, "seed {seed}");
    }
}

/// `scripts/sim SEED` runs this one.
#[test]
#[ignore = "runs one seed that scripts/sim names"]
fn replay() {
    let seed = count_from_env("BASALT_SEED", 0);
    let of = match std::env::var("BASALT_WORLD").as_deref() {
        Err(_) | Ok("") => WorldConfig::from_seed,
        Ok("relaxed") => WorldConfig::relaxed_from_seed,
        Ok("full") => WorldConfig::full_from_seed,
        Ok("scrubbed") => WorldConfig::scrubbed_from_seed,
        Ok("failing") => WorldConfig::failing_from_seed,
        Ok("long") => WorldConfig::long_from_seed,
        Ok("crowded") => WorldConfig::crowded_from_seed,
        Ok(other) => {
            panic!("BASALT_WORLD={other} is none of relaxed, full, scrubbed, failing, long and crowded")
        }
    };
    let summary = run(of(seed, count_from_env("BASALT_REQUESTS", 1_000) as usize));
    println!(
        "seed {seed}: trace {:016x}, {} crashes, {} answers",
        summary.trace, summary.crashes, summary.answered
    );
    println!("{}", summary.probes);
}
