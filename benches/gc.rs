//! Garbage collection on a device that is filled to 50, 70, 80 and 90 %, with uniform and Zipf-distributed overwrites: bytes
//! written to the device for each byte that was put, beside the analytic figure of a greedy cleaner, and what it does to the
//! latency of durable PUTs that arrive at a fixed rate.
//!
//! What is written is counted while nobody waits for durability: the padding of small groups to whole blocks is no matter of
//! garbage collection.
//!
//! `scripts/bench-gc` runs it (`--help` for its options).
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::panic,
    reason = "a benchmark prints its figures, or why there are none"
)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use basalt::device::file::FileOptions;
use basalt::device::uring::{UringDevice, UringNamespace};
use basalt::engine::action::{Action, Expiry, SetReply};
use basalt::engine::allocator::Allocator;
use basalt::engine::durability::Durability;
use basalt::engine::io_queue::IoSettings;
use basalt::engine::op::{Answer, Clock, Reply, ShardOp, Value};
use basalt::engine::{Engine, EngineStats};
use basalt::format::record::{Record, RecordType};
use basalt::format::slot::shard_of;
use basalt::limits::SHARD_COUNT_DEFAULT_MIN;
use hdrhistogram::Histogram;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, Zipf};

mod common;

use common::{Fresh, Options, clock, fresh_engine, key_of, machine};

/// As a device has that is formatted for one reactor.
const SHARD_COUNT: u16 = SHARD_COUNT_DEFAULT_MIN as u16;

/// PUTs in flight while no rate is given.
const DEPTH: usize = 64;

/// A histogram without bounds would count what is above its first ones at the lowest of them.
const LATENCY_US_MAX: u64 = 1 << 32;

/// Each rank has a key of its own, far from the one of the next: a prime that no count of keys is a multiple of.
const HOT_KEYS_APART: u128 = 0x9e37_79b9_7f4a_7c55;

/// Of YCSB.
const ZIPF_EXPONENT: f64 = 0.99;

const USAGE: &str = "\
usage: scripts/bench-gc [--file PATH] [--size BYTES] [--fills N,N] [--value BYTES] [--rounds N] [--seconds S] [--rate PERCENT]
  --file PATH     an image file that is made for this and removed [default: in the target directory]
  --size MIB      its size [default: 4096]
  --fills N,N     bytes of live records as percent of those of all extents [default: 50,70,80,90]
  --value BYTES   length of a value [default: 4000]
  --rounds N      times that all live bytes are overwritten; the last one is measured [default: 3]
  --seconds S     length of a measurement of latency, 0 for none [default: 5]
  --rate PERCENT  its offered load, of what the engine sustains while it collects [default: 20]";

struct Args {
    file: PathBuf,
    size: u64,
    fills: Vec<u64>,
    value_size: usize,
    rounds: u64,
    seconds: u64,
    rate_percent: f64,
}

fn parse() -> Option<Args> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from);
    let mut args = Args {
        file: target.join(format!("bench-gc-{}.img", std::process::id())),
        size: 4 << 30,
        fills: vec![50, 70, 80, 90],
        value_size: 4000,
        rounds: 3,
        seconds: 5,
        rate_percent: 20.0,
    };
    let mut given = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(option) = given.next() {
        let value = given.next()?;
        match option.as_str() {
            "--file" => args.file = value.into(),
            "--size" => args.size = value.parse::<u64>().ok()? << 20,
            "--fills" => {
                args.fills = value.split(',').map(|fill| fill.parse().ok()).collect::<Option<_>>()?;
            }
            "--value" => args.value_size = value.parse().ok()?,
            "--rounds" => args.rounds = value.parse().ok().filter(|rounds| *rounds > 0)?,
            "--seconds" => args.seconds = value.parse().ok()?,
            "--rate" => args.rate_percent = value.parse().ok()?,
            _ => return None,
        }
    }
    Some(args)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pattern {
    Uniform,
    Zipf,
}

fn main() {
    let Some(args) = parse() else {
        eprintln!("{USAGE}");
        std::process::exit(2);
    };
    let mib = args.size >> 20;
    println!("machine: {}", machine());
    let fills = args.fills.iter().map(u64::to_string).collect::<Vec<_>>().join(",");
    println!(
        "command: scripts/bench-gc --size {mib} --fills {fills} --value {} --rounds {} --seconds {} --rate {}",
        args.value_size, args.rounds, args.seconds, args.rate_percent
    );
    println!(
        "{mib} MiB, uring, {SHARD_COUNT} shards on one engine, durability always, {DEPTH} PUTs in flight\n"
    );
    println!(
        "{:<8} {:>5} {:>9} {:>8} {:>6} {:>10}  latency of PUTs in microseconds",
        "", "fill", "written", "greedy,", "ratio", "PUTs/s"
    );
    println!(
        "{:<8} {:>5} {:>9} {:>8} {:>6} {:>10}  {:>9} {:>26} {:>26}",
        "pattern", "", "/ put", "analytic", "", "", "PUTs/s", "off p50 p99 p99.9", "on p50 p99 p99.9"
    );
    for &fill in &args.fills {
        for pattern in [Pattern::Uniform, Pattern::Zipf] {
            measure(&args, fill, pattern);
        }
    }
}

fn measure(args: &Args, fill: u64, pattern: Pattern) {
    let what = format!("{pattern:?}, {fill} %");
    eprintln!("{what}: filling");
    let mut rig = Rig::new(args, fill, pattern);
    rig.fill();
    let mut per_second = 0.0;
    let mut written_per_put = 0.0;
    for round in 1..=args.rounds {
        eprintln!("{what}: overwriting, round {round} of {}", args.rounds);
        let (before, begun) = (rig.engine.stats(), Instant::now());
        rig.put_all(rig.key_count);
        per_second = rig.key_count as f64 / begun.elapsed().as_secs_f64();
        written_per_put = amplification(&before, &rig.engine.stats());
    }
    let analytic = greedy(fill as f64 / 100.0);
    let mut latencies = String::new();
    if args.seconds > 0 {
        let rate = per_second * args.rate_percent / 100.0;
        eprintln!("{what}: latency while garbage is collected");
        let on = rig.put_at_rate(rate, args.seconds);
        assert!(on.1 > 0, "no garbage was collected in what is to show its cost");
        drop(rig);
        eprintln!("{what}: filling anew");
        let mut rig = Rig::new(args, fill, pattern);
        rig.fill();
        eprintln!("{what}: latency before garbage is collected");
        let off = rig.put_at_rate(rate, args.seconds);
        let off_text = if off.1 == 0 { figures(&off.0) } else { "-".to_owned() };
        latencies = format!("{rate:>9.0} {off_text:>26} {:>26}", figures(&on.0));
    }
    println!(
        "{:<8} {fill:>4}% {written_per_put:>9.2} {analytic:>8.2} {:>6.2} {per_second:>10.0}  {latencies}",
        format!("{pattern:?}").to_lowercase(),
        written_per_put / analytic
    );
}

fn figures(histogram: &Histogram<u64>) -> String {
    let at = |quantile| histogram.value_at_quantile(quantile);
    format!("{} {} {}", at(0.5), at(0.99), at(0.999))
}

/// Bytes written to the device for each byte of keys and values.
fn amplification(before: &EngineStats, after: &EngineStats) -> f64 {
    (after.bytes_written - before.bytes_written) as f64 / (after.user_bytes - before.user_bytes) as f64
}

/// Write amplification of a greedy cleaner under uniform overwrites, for extents of many records: with a = 1 / fill, it is
/// a / (a + W(-a e^-a)), W being Lambert's function (P. Desnoyers, "Analytic Models of SSD Write Performance", ACM
/// Transactions on Storage 10(2), 2014).
fn greedy(fill: f64) -> f64 {
    let alpha = 1.0 / fill;
    let argument = -alpha * (-alpha).exp();
    // The principal branch, by Newton's method from 0.
    let mut w = 0.0_f64;
    for _ in 0..200 {
        w -= (w * w.exp() - argument) / (w.exp() * (w + 1.0));
    }
    alpha / (alpha + w)
}

/// An engine on a new image.
struct Rig {
    engine: Engine<UringDevice>,
    allocator: Arc<Allocator>,
    file: PathBuf,
    value: Value,
    key_count: u64,
    pattern: Pattern,
    zipf: Zipf<f64>,
    random: SmallRng,
    started: Instant,
    answers: Vec<(u64, Answer)>,
}

impl Rig {
    fn new(args: &Args, fill: u64, pattern: Pattern) -> Rig {
        let options = FileOptions { create_size: Some(args.size), ..FileOptions::default() };
        let namespace = UringNamespace::open(&args.file, &options).unwrap_or_else(|error| panic!("{error}"));
        let started = Instant::now();
        let options = Options {
            shard_count: SHARD_COUNT,
            durability: Durability::Never,
            io: IoSettings::default(),
            writes_zeros: true,
        };
        let Fresh { engine, allocator, layout } = fresh_engine(namespace, &options, clock(started));
        let live = u64::from(layout.extent_count) * layout.extent_size * fill / 100;
        let value = Value::from(vec![0x5a; args.value_size]);
        // What the cleaner keeps or moves are records: that is what the analytic figure takes for its blocks.
        let record_size = Record {
            kind: RecordType::Put,
            sequence: 0,
            database: 0,
            expires_at_ms: 0,
            batch: None,
            long: 0,
            key: &key_of(0),
            value: &value,
        }
        .size();
        let key_count = live / record_size as u64;
        Rig {
            engine,
            allocator,
            file: args.file.clone(),
            value,
            key_count,
            pattern,
            zipf: Zipf::new(key_count as f64, ZIPF_EXPONENT).expect("a distribution"),
            random: SmallRng::seed_from_u64(7),
            started,
            answers: Vec::new(),
        }
    }

    fn now(&self) -> Clock {
        clock(self.started)
    }

    /// Puts every key once, in an order that has nothing to do with how often it is put later.
    fn fill(&mut self) {
        let (mut next, mut in_flight) = (0, 0);
        while next < self.key_count || in_flight > 0 {
            while next < self.key_count && in_flight < DEPTH {
                self.submit(next, next);
                (next, in_flight) = (next + 1, in_flight + 1);
            }
            in_flight -= self.poll(&mut |_| {});
        }
    }

    /// Overwrites `count` keys, as fast as the engine takes them.
    fn put_all(&mut self, count: u64) {
        let (mut sent, mut in_flight) = (0, 0);
        while sent < count || in_flight > 0 {
            while sent < count && in_flight < DEPTH {
                let number = self.choose();
                self.submit(number, sent);
                (sent, in_flight) = (sent + 1, in_flight + 1);
            }
            in_flight -= self.poll(&mut |_| {});
        }
    }

    /// Overwrites keys at a rate that does not wait for answers. Latency counts from when a PUT was due. Ends early where
    /// collection would begin and has not; returns latencies and the extents that were collected.
    fn put_at_rate(&mut self, per_second: f64, seconds: u64) -> (Histogram<u64>, u64) {
        self.engine.set_durability(Durability::Always);
        let mut latencies = Histogram::<u64>::new_with_max(LATENCY_US_MAX, 3).expect("a histogram");
        let interval = 1e6 / per_second;
        let before = self.engine.stats().gc.extents_collected;
        let began_collecting = self.is_low();
        let begun = self.now().monotonic_us;
        let end = begun + Duration::from_secs(seconds).as_micros() as u64;
        let (mut sent, mut in_flight) = (0_u64, 0);
        let due = |number: u64| begun + (number as f64 * interval) as u64;
        loop {
            let now = self.now().monotonic_us;
            let is_over = now >= end || (!began_collecting && self.is_low());
            if is_over && in_flight == 0 {
                break;
            }
            while !is_over && due(sent) <= now && in_flight < 4_096 {
                let number = self.choose();
                self.submit(number, sent);
                (sent, in_flight) = (sent + 1, in_flight + 1);
            }
            let mut done = Vec::new();
            in_flight -= self.poll(&mut |token| done.push(token));
            let now = self.now().monotonic_us;
            for token in done {
                latencies.saturating_record(now - due(token));
            }
        }
        (latencies, self.engine.stats().gc.extents_collected - before)
    }

    /// Whether so few extents are free that garbage is collected, or will be soon.
    fn is_low(&self) -> bool {
        self.allocator.available_count() <= self.allocator.count() / 16
    }

    fn choose(&mut self) -> u64 {
        match self.pattern {
            Pattern::Uniform => self.random.random_range(0..self.key_count),
            // Scattered, as hot keys are.
            Pattern::Zipf => {
                let rank = self.zipf.sample(&mut self.random) as u64;
                (u128::from(rank) * HOT_KEYS_APART % u128::from(self.key_count)) as u64
            }
        }
    }

    fn submit(&mut self, number: u64, token: u64) {
        let key = key_of(number);
        let shard = shard_of(&key, SHARD_COUNT);
        let action = Action::Set {
            value: self.value.clone(),
            expiry: Expiry::Clear,
            condition: None,
            reply: SetReply::Ok,
        };
        let submitted = self.engine.submit(shard, token, ShardOp::Key { key, action }, self.now());
        assert!(submitted.is_ok(), "the engine admits more than that");
    }

    fn poll(&mut self, each: &mut dyn FnMut(u64)) -> usize {
        let now = self.now();
        self.engine.poll(now, &mut self.answers);
        let count = self.answers.len();
        for (token, answer) in self.answers.drain(..) {
            assert!(matches!(answer, Answer::Reply(Reply::Ok)), "a PUT was answered {answer:?}");
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
