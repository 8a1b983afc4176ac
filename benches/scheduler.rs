//! What the I/O scheduler does for clients: latency of uncached GETs and durable PUTs that arrive at a fixed rate while everything is
//! collected and scrubbed as fast as it goes, with shares and in the order of arrival, beside a device that has nothing else to do.
//!
//! The two policies take turns, each run on an image of its own; figures are medians of the runs.
//!
//! `scripts/bench-scheduler` runs it (`--help` for its options).
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::panic,
    reason = "a benchmark prints its figures, or why there are none"
)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use basalt::device::file::FileOptions;
use basalt::device::uring::{UringDevice, UringNamespace};
use basalt::engine::action::{Action, Expiry, SetReply};
use basalt::engine::durability::Durability;
use basalt::engine::io_queue::{Class, IoPolicy, IoSettings};
use basalt::engine::op::{Answer, Clock, Reply, ShardId, ShardOp, Value};
use basalt::engine::{Engine, EngineStats};
use basalt::format::slot::shard_of;
use hdrhistogram::Histogram;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

#[expect(dead_code, reason = "others use other parts")]
mod common;

use common::{Fresh, Options, fresh_engine, key_of, machine};

const SHARD_COUNT: u16 = 16;

/// PUTs in flight while the image is filled.
const DEPTH: usize = 64;

/// Live bytes as part of the device; as much again is written over them, so that half of it is garbage.
const FILL: f64 = 0.4;

/// Operations in flight beyond which nothing more is asked: the latency counts from when it was due all the same.
const IN_FLIGHT_MAX: usize = 4_096;

/// A histogram without bounds would count what is above its first ones at the lowest of them.
const LATENCY_US_MAX: u64 = 1 << 32;

/// Tokens from here on are not of the load.
const OTHERS: u64 = 1 << 60;

/// The scrubber begins a pass once a day.
const DAY_US: u64 = 86_400_000_000;

const QUANTILES: [(&str, f64); 3] = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)];

const USAGE: &str = "\
usage: scripts/bench-scheduler [--file PATH] [--size MIB] [--value BYTES] [--runs N] [--seconds S] [--gets N] [--puts N]
  --file PATH     an image file that is made for this and removed [default: in the target directory]
  --size MIB      its size [default: 4096]
  --value BYTES   length of a value [default: 4000]
  --runs N        runs of each policy, in turns [default: 3]
  --seconds S     length of a measurement [default: 5]
  --gets N        GETs a second [default: 2000]
  --puts N        durable PUTs a second [default: 200]";

struct Args {
    file: PathBuf,
    size: u64,
    value_size: usize,
    runs: usize,
    seconds: u64,
    gets: f64,
    puts: f64,
}

fn parse() -> Option<Args> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    let mut args = Args {
        file: target.join(format!("bench-scheduler-{}.img", std::process::id())),
        size: 4 << 30,
        value_size: 4000,
        runs: 3,
        seconds: 5,
        gets: 2_000.0,
        puts: 200.0,
    };
    let mut given = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(option) = given.next() {
        let value = given.next()?;
        match option.as_str() {
            "--file" => args.file = value.into(),
            "--size" => args.size = value.parse::<u64>().ok()? << 20,
            "--value" => args.value_size = value.parse().ok().filter(|size| *size > 0)?,
            "--runs" => args.runs = value.parse().ok().filter(|runs| *runs > 0)?,
            "--seconds" => args.seconds = value.parse().ok().filter(|seconds| *seconds > 0)?,
            "--gets" => args.gets = value.parse().ok().filter(|rate| *rate > 0.0)?,
            "--puts" => args.puts = value.parse().ok().filter(|rate| *rate > 0.0)?,
            _ => return None,
        }
    }
    Some(args)
}

/// Latencies of one measurement, in microseconds, and what the background moved meanwhile.
struct Measured {
    gets: Histogram<u64>,
    puts: Histogram<u64>,
    background_per_second: f64,
}

/// The measurements of one side, one for each run.
#[derive(Default)]
struct Side(Vec<Measured>);

impl Side {
    fn median(&self, figure: impl Fn(&Measured) -> f64) -> f64 {
        let mut all: Vec<f64> = self.0.iter().map(figure).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    }
}

fn main() {
    let Some(args) = parse() else {
        eprintln!("{USAGE}");
        std::process::exit(2);
    };
    let mib = args.size >> 20;
    println!("machine: {}", machine());
    println!(
        "command: scripts/bench-scheduler --size {mib} --value {} --runs {} --seconds {} --gets {} --puts {}",
        args.value_size, args.runs, args.seconds, args.gets, args.puts
    );
    println!(
        "{mib} MiB, uring, {SHARD_COUNT} shards on one engine, no cache, durability always, half of what is written is garbage\n"
    );
    let (mut quiet, mut shares, mut fifo) = (Side::default(), Side::default(), Side::default());
    for run in 0..args.runs {
        for turn in 0..2 {
            let is_fifo = (run + turn) % 2 == 1;
            let policy = if is_fifo { IoPolicy::Fifo } else { IoPolicy::Shares };
            eprintln!("run {} of {}, {policy}: filling", run + 1, args.runs);
            let mut rig = Rig::new(&args, policy);
            rig.fill();
            eprintln!("run {} of {}, {policy}: measuring", run + 1, args.runs);
            quiet.0.push(rig.measure(&args, false));
            let side = if is_fifo { &mut fifo } else { &mut shares };
            side.0.push(rig.measure(&args, true));
        }
    }
    tell(&quiet, &shares, &fifo);
}

fn tell(quiet: &Side, shares: &Side, fifo: &Side) {
    println!("{:<22} {:>10} {:>10} {:>10} {:>13}", "", "alone", "shares", "fifo", "shares / fifo");
    let of_gets: fn(&Measured) -> &Histogram<u64> = |one| &one.gets;
    let of_puts: fn(&Measured) -> &Histogram<u64> = |one| &one.puts;
    for (name, latencies) in [("uncached GET", of_gets), ("durable PUT", of_puts)] {
        for (label, quantile) in QUANTILES {
            let of =
                |side: &Side| side.median(|one| latencies(one).value_at_quantile(quantile) as f64 / 1_000.0);
            let (alone, with, without) = (of(quiet), of(shares), of(fifo));
            println!(
                "{:<22} {alone:>7.2} ms {with:>7.2} ms {without:>7.2} ms {:>13.2}",
                format!("{name}, {label}"),
                with / without
            );
        }
    }
    let of = |side: &Side| side.median(|one| one.background_per_second / 1e6);
    let (alone, with, without) = (of(quiet), of(shares), of(fifo));
    println!(
        "{:<22} {alone:>5.0} MB/s {with:>5.0} MB/s {without:>5.0} MB/s {:>13.2}",
        "background",
        with / without
    );
}

/// Bytes that garbage collection and the scrubber moved.
fn background(stats: &EngineStats) -> u64 {
    stats.io[Class::Collect as usize].bytes + stats.io[Class::Scrub as usize].bytes
}

/// An engine on a new image.
struct Rig {
    engine: Engine<UringDevice>,
    file: PathBuf,
    value: Value,
    key_count: u64,
    random: SmallRng,
    started: Instant,
    /// Days that the engine's clock is ahead.
    days: u64,
    answers: Vec<(u64, Answer)>,
}

impl Rig {
    fn new(args: &Args, policy: IoPolicy) -> Rig {
        let options = FileOptions { create_size: Some(args.size), ..FileOptions::default() };
        let namespace = UringNamespace::open(&args.file, &options).unwrap_or_else(|error| panic!("{error}"));
        let started = Instant::now();
        let options = Options {
            shard_count: SHARD_COUNT,
            durability: Durability::Never,
            io: IoSettings { policy, ..IoSettings::default() },
            writes_zeros: false,
        };
        let clock = Clock { unix_ms: 1_000_000, monotonic_us: 0 };
        let Fresh { engine, layout, .. } = fresh_engine(namespace, &options, clock);
        let live = f64::from(layout.extent_count) * layout.extent_size as f64 * FILL;
        let key_count = live as u64 / (args.value_size + key_of(0).len()) as u64;
        Rig {
            engine,
            file: args.file.clone(),
            value: Value::from(vec![0x5a; args.value_size]),
            key_count,
            random: SmallRng::seed_from_u64(7),
            started,
            days: 0,
            answers: Vec::new(),
        }
    }

    fn now(&self) -> Clock {
        let monotonic_us = self.elapsed_us() + self.days * DAY_US;
        Clock { unix_ms: 1_000_000 + monotonic_us / 1_000, monotonic_us }
    }

    fn elapsed_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// Puts every key once, and then as many that are chosen at random.
    fn fill(&mut self) {
        let (mut next, mut in_flight) = (0, 0);
        while next < 2 * self.key_count || in_flight > 0 {
            while next < 2 * self.key_count && in_flight < DEPTH {
                let number =
                    if next < self.key_count { next } else { self.random.random_range(0..self.key_count) };
                self.submit(next, number, true);
                (next, in_flight) = (next + 1, in_flight + 1);
            }
            in_flight -= self.poll(&mut |_| {});
        }
        self.engine.set_durability(Durability::Always);
    }

    /// Asks for keys at rates that do not wait for answers. Latency counts from when an operation was due.
    fn measure(&mut self, args: &Args, beside_background: bool) -> Measured {
        if beside_background {
            self.engine.set_scrub_rate(u64::MAX / 2);
            for shard in (0..SHARD_COUNT).map(ShardId) {
                self.compact(shard);
            }
        }
        let mut measured = Measured {
            gets: Histogram::new_with_max(LATENCY_US_MAX, 3).expect("a histogram"),
            puts: Histogram::new_with_max(LATENCY_US_MAX, 3).expect("a histogram"),
            background_per_second: 0.0,
        };
        let before = self.engine.stats();
        let mut passes = before.scrub.passes;
        let begun_ns = self.started.elapsed().as_nanos() as f64;
        let end_ns = begun_ns + Duration::from_secs(args.seconds).as_nanos() as f64;
        // Even tokens are GETs, odd ones PUTs.
        let intervals = [1e9 / args.gets, 1e9 / args.puts];
        let due_ns = |token: u64| begun_ns + (token / 2) as f64 * intervals[(token % 2) as usize];
        let (mut next, mut in_flight) = ([0, 1], 0);
        loop {
            let now_ns = self.started.elapsed().as_nanos() as f64;
            // Whatever was due is asked, however late.
            let is_over = next.iter().all(|token| due_ns(*token) >= end_ns);
            if is_over && in_flight == 0 {
                break;
            }
            for (kind, token) in next.iter_mut().enumerate() {
                while due_ns(*token) <= now_ns.min(end_ns) && in_flight < IN_FLIGHT_MAX {
                    let number = self.random.random_range(0..self.key_count);
                    self.submit(*token, number, kind == 1);
                    *token += 2;
                    in_flight += 1;
                }
            }
            let mut done = Vec::new();
            self.poll(&mut |token| done.push(token));
            let now_ns = self.started.elapsed().as_nanos() as f64;
            for token in done {
                if let Some(shard) = token.checked_sub(OTHERS) {
                    self.compact(ShardId(shard as u16));
                    continue;
                }
                in_flight -= 1;
                let latencies = if token % 2 == 0 { &mut measured.gets } else { &mut measured.puts };
                latencies.saturating_record(((now_ns - due_ns(token)) / 1e3) as u64);
            }
            let stats = &self.engine.stats().scrub;
            if beside_background && stats.passes > passes {
                passes = stats.passes;
                self.days += 1;
            }
        }
        let seconds = (self.started.elapsed().as_nanos() as f64 - begun_ns) / 1e9;
        let moved = background(&self.engine.stats()) - background(&before);
        assert!(moved > 0 || !beside_background, "nothing was collected in what is to show its cost");
        measured.background_per_second = moved as f64 / seconds;
        measured
    }

    fn compact(&mut self, shard: ShardId) {
        let now = self.now();
        let submitted = self.engine.submit(shard, OTHERS + u64::from(shard.0), ShardOp::Compact, now);
        assert!(submitted.is_ok(), "the engine admits more than that");
    }

    fn submit(&mut self, token: u64, number: u64, is_put: bool) {
        let key = key_of(number);
        let shard = shard_of(&key, SHARD_COUNT);
        let put = Action::Set {
            value: self.value.clone(),
            expiry: Expiry::Clear,
            condition: None,
            reply: SetReply::Ok,
        };
        let action = if is_put { put } else { Action::Get };
        let submitted = self.engine.submit(shard, token, ShardOp::Key { key, action }, self.now());
        assert!(submitted.is_ok(), "the engine admits more than that");
    }

    fn poll(&mut self, each: &mut dyn FnMut(u64)) -> usize {
        let now = self.now();
        self.engine.poll(now, &mut self.answers);
        let count = self.answers.len();
        for (token, answer) in self.answers.drain(..) {
            let is_right = match &answer {
                Answer::Reply(Reply::Bulk(value)) => *value == self.value,
                Answer::Reply(Reply::Ok) | Answer::Done => true,
                _ => false,
            };
            assert!(is_right, "an operation was answered {answer:?}");
            each(token);
        }
        count
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Best effort: a file that is left over is named by its process.
        let _ = std::fs::remove_file(&self.file);
    }
}
