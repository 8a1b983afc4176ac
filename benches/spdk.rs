//! The engine on an NVMe/TCP target beside SPDK's own perf tool on the same target: GETs of records that fill one 4096-byte
//! block against random reads of such blocks, and durable PUTs against random writes.
//!
//! `scripts/bench-spdk` finds SPDK and runs it (`--help` for its options). The target polls the last core; the contenders take
//! turns on the first, so that a machine that slows down slows both. The engine runs as a reactor hosts it: one thread that
//! submits, polls, takes answers and reads the clock once in each pass.
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::panic,
    reason = "a benchmark prints its figures, or why there are none"
)]

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use basalt::device::spdk::{EnvOptions, SpdkNamespace, SpdkOptions, SpdkQueue};
use basalt::device::transport_id::TransportId;
use basalt::engine::Engine;
use basalt::engine::action::{Action, Expiry, SetReply};
use basalt::engine::allocator::Allocator;
use basalt::engine::durability::Durability;
use basalt::engine::io_queue::IoSettings;
use basalt::engine::op::{Answer, Clock, Key, Reply, ShardOp, Value};
use basalt::format::frame::FRAME_HEADER_SIZE;
use basalt::format::record::{Record, RecordType};
use basalt::format::slot::shard_of;
use basalt::reactor::cores::{pin_current, usable};

#[expect(dead_code, reason = "others use other parts")]
mod common;
#[path = "../tests/common/nvmf_target.rs"]
#[expect(dead_code, reason = "shared with the tests, which use other parts")]
mod nvmf_target;

use common::{Fresh, Options, clock, fresh_engine};
use nvmf_target::{Backing, Target};

/// What one GET reads.
const BLOCK_SIZE: usize = 4096;

/// Records that are read at random, and the blocks of the namespace that the perf tool reads at random: the same number.
const KEY_COUNT: usize = 1 << 16;

/// Where the engine's log goes; what the records take is written over several times in a run of PUTs.
const ENGINE_MIB: u64 = 3 << 10;

const SHARD_COUNT: u16 = 16;

/// A run of PUTs ends while this share of the extents is still free: above what garbage collection begins at, which would move
/// records on top of what is measured.
const FREE_PERCENT_MIN: u32 = 15;

const USAGE: &str = "\
usage: scripts/bench-spdk [--runs N] [--seconds S] [--depths N,N]
  --runs N      turns that each contender gets [default: 5]
  --seconds S   length of a turn [default: 2]
  --depths N,N  operations in flight [default: 32,128]";

struct Args {
    runs: usize,
    seconds: u64,
    depths: Vec<usize>,
}

fn parse() -> Option<Args> {
    let mut args = Args { runs: 5, seconds: 2, depths: vec![32, 128] };
    let mut given = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(option) = given.next() {
        let value = given.next()?;
        match option.as_str() {
            "--runs" => args.runs = value.parse().ok().filter(|runs| *runs > 0)?,
            "--seconds" => args.seconds = value.parse().ok().filter(|seconds| *seconds > 0)?,
            "--depths" => {
                args.depths = value.split(',').map(|depth| depth.parse().ok()).collect::<Option<_>>()?
            }
            _ => return None,
        }
    }
    Some(args)
}

fn main() {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::WARN).init();
    let Some(args) = parse() else {
        eprintln!("{USAGE}");
        std::process::exit(2);
    };
    let cores = usable().unwrap_or_default();
    let (initiator, target_core) = (cores.first().copied().unwrap_or(0), nvmf_target::core());
    if initiator == target_core {
        println!("SKIPPED: target and initiator need a core each");
        return;
    }
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(" unknown");
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    println!(
        "machine: {} cores of {}, kernel {}; the target on core {target_core}, the initiator on core {initiator}",
        cores.len(),
        model.trim_start_matches([' ', '\t', ':']),
        kernel.trim()
    );
    let depths = args.depths.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    println!("command: scripts/bench-spdk --runs {} --seconds {} --depths {depths}", args.runs, args.seconds);

    let blocks =
        Backing::Malloc { size_mib: (KEY_COUNT * BLOCK_SIZE) as u64 >> 20, block_size: BLOCK_SIZE as u32 };
    let log = Backing::Malloc { size_mib: ENGINE_MIB, block_size: BLOCK_SIZE as u32 };
    eprintln!("starting the target");
    let target = Target::start(&[blocks, log]);
    pin_current(initiator).expect("a usable core");
    let bench =
        Bench { args: &args, initiator, perf_id: target.transport_id(0), engine_id: target.transport_id(1) };
    println!(
        "both: {BLOCK_SIZE}-byte blocks over NVMe/TCP on loopback, one queue pair, memory of the target behind it, ordinary pages"
    );
    println!("{}\n", counters_note());
    println!(
        "{:<22} {:>5} {:>9} {:>9} {:>9}  operations/s over {} runs",
        "", "depth", "min", "median", "max", args.runs
    );
    for &depth in &args.depths {
        for pair in [[Kind::PerfRead, Kind::Get], [Kind::PerfWrite, Kind::Put]] {
            bench.compare(depth, pair);
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    PerfRead,
    Get,
    PerfWrite,
    Put,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::PerfRead => "perf random read",
            Kind::Get => "basalt GET",
            Kind::PerfWrite => "perf random write",
            Kind::Put => "basalt durable PUT",
        }
    }
}

/// One turn of one contender.
struct Figure {
    per_second: f64,
    counted: Option<Counted>,
    /// Bytes that the device moved for each operation.
    device_bytes: f64,
}

struct Bench<'a> {
    args: &'a Args,
    initiator: usize,
    perf_id: String,
    engine_id: String,
}

impl Bench<'_> {
    fn compare(&self, depth: usize, pair: [Kind; 2]) {
        let mut figures = [Vec::new(), Vec::new()];
        for run in 1..=self.args.runs {
            for (kind, figures) in pair.into_iter().zip(&mut figures) {
                eprintln!("depth {depth}, run {run} of {}: {}", self.args.runs, kind.name());
                figures.push(match kind {
                    Kind::PerfRead => self.perf(depth, "randread"),
                    Kind::PerfWrite => self.perf(depth, "randwrite"),
                    Kind::Get => Loaded::new(self).get(depth, self.duration()),
                    Kind::Put => Loaded::new(self).put(depth, self.duration()),
                });
            }
        }
        let mut medians = [0.0; 2];
        for ((kind, figures), median) in pair.iter().zip(&mut figures).zip(&mut medians) {
            figures.sort_by(|a, b| a.per_second.total_cmp(&b.per_second));
            let middle = &figures[figures.len() / 2];
            *median = middle.per_second;
            let (min, max) = (figures[0].per_second, figures[figures.len() - 1].per_second);
            let mut more = format!("{:.0} ns each", 1e9 / *median);
            if let Some(Counted { cycles, instructions }) = middle.counted {
                more += &format!(", {cycles:.0} cycles, {instructions:.0} instructions");
            }
            if *kind == Kind::Put {
                more += &format!(", {:.0} bytes written", middle.device_bytes);
            }
            println!("{:<22} {depth:>5} {min:>9.0} {median:>9.0} {max:>9.0}  {more}", kind.name());
        }
        let [perf, basalt] = medians;
        println!("{} / {}, depth {depth}: {:.1} %", pair[1].name(), pair[0].name(), basalt / perf * 100.0);
    }

    fn duration(&self) -> Duration {
        Duration::from_secs(self.args.seconds)
    }

    /// Runs the perf tool and takes its own count of I/O per second.
    fn perf(&self, depth: usize, pattern: &str) -> Figure {
        let tool = nvmf_target::program().with_file_name("spdk_nvme_perf");
        let seconds = self.args.seconds.to_string();
        let mut command = Command::new(&tool);
        command.args(["--no-huge", "-s", "512", "-o", &BLOCK_SIZE.to_string(), "-w", pattern]);
        command.args(["-q", &depth.to_string(), "-t", &seconds, "-c", &format!("[{}]", self.initiator)]);
        command
            .args(["-r", &self.perf_id])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", tool.display()));
        let counter = Counter::start(child.id(), self.args.seconds);
        let output = child.wait_with_output().expect("the perf tool can be waited for");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let total = text
            .lines()
            .find_map(|line| line.trim().strip_prefix("Total")?.split_once(':'))
            .map(|(_, rest)| rest);
        let per_second = total.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
        let Some(per_second) = per_second.filter(|_| output.status.success()) else {
            panic!("{command:?}: {}\n{text}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
        };
        Figure { per_second, counted: Counter::end(counter, per_second), device_bytes: BLOCK_SIZE as f64 }
    }
}

/// A freshly formatted engine with every record in a block of its own.
struct Loaded {
    engine: Engine<SpdkQueue>,
    value: Value,
    started: Instant,
    answers: Vec<(u64, Answer)>,
    random: u64,
    is_over: bool,
    allocator: Arc<Allocator>,
}

impl Loaded {
    fn new(bench: &Bench<'_>) -> Loaded {
        let id = TransportId::parse(&bench.engine_id).expect("the target's name");
        let env = EnvOptions { no_hugepages: true, ..EnvOptions::default() };
        let options = SpdkOptions { env, queue_count: 1, ..SpdkOptions::default() };
        let namespace = SpdkNamespace::open(&id, &options).unwrap_or_else(|error| panic!("{error}"));
        let started = Instant::now();
        let options = Options {
            shard_count: SHARD_COUNT,
            durability: Durability::Always,
            io: IoSettings::default(),
            writes_zeros: false,
        };
        let Fresh { engine, allocator, .. } = fresh_engine(namespace, &options, clock(started));
        let value = Value::from(vec![0x5a; value_size(&key_of(0))]);
        let mut loaded = Loaded {
            engine,
            value,
            started,
            answers: Vec::new(),
            random: 0x9e37_79b9_7f4a_7c15,
            is_over: false,
            allocator,
        };
        loaded.load();
        loaded
    }

    /// Puts every key with one PUT in flight on each shard: each gets a frame, and so a block, of its own.
    fn load(&mut self) {
        let mut of_shard: Vec<Vec<usize>> = vec![Vec::new(); usize::from(SHARD_COUNT)];
        for number in 0..KEY_COUNT {
            of_shard[usize::from(shard_of(&key_of(number), SHARD_COUNT).0)].push(number);
        }
        while of_shard.iter().any(|keys| !keys.is_empty()) {
            let round: Vec<usize> = of_shard.iter_mut().filter_map(Vec::pop).collect();
            let mut left = round.len();
            for number in round {
                self.submit(number, self.put_action(), clock(self.started));
            }
            while left > 0 {
                left -= self.poll(clock(self.started), |reply| assert_eq!(*reply, Reply::Ok));
            }
        }
    }

    fn put_action(&self) -> Action {
        Action::Set { value: self.value.clone(), expiry: Expiry::Clear, condition: None, reply: SetReply::Ok }
    }

    /// The key is made as a connection makes it: its bytes copied once.
    fn submit(&mut self, number: usize, action: Action, now: Clock) {
        let key = key_of(number);
        let shard = shard_of(&key, SHARD_COUNT);
        let submitted = self.engine.submit(shard, number as u64, ShardOp::Key { key, action }, now);
        assert!(submitted.is_ok(), "the engine admits more than that");
    }

    fn poll(&mut self, now: Clock, mut check: impl FnMut(&Reply)) -> usize {
        self.engine.poll(now, &mut self.answers);
        let count = self.answers.len();
        for (_, answer) in self.answers.drain(..) {
            match &answer {
                Answer::Reply(reply) => check(reply),
                other => panic!("not an answer to GET or SET: {other:?}"),
            }
        }
        count
    }

    fn random_number(&mut self) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 20) as usize % KEY_COUNT
    }

    /// Whether so few extents are left that garbage collection would begin soon.
    fn is_full(&self) -> bool {
        self.allocator.available_count() <= self.allocator.count() * FREE_PERCENT_MIN / 100
    }

    /// Keeps `depth` operations in flight for a while, or until the device is full.
    fn run(
        &mut self,
        depth: usize,
        duration: Duration,
        action: &Action,
        check: impl Fn(&Reply),
    ) -> (f64, u64) {
        let begun = clock(self.started).monotonic_us;
        let end = begun + duration.as_micros() as u64;
        let (mut in_flight, mut done) = (0, 0);
        loop {
            let now = clock(self.started);
            self.is_over |= now.monotonic_us >= end || self.is_full();
            if self.is_over && in_flight == 0 {
                return (done as f64 * 1e6 / (now.monotonic_us - begun) as f64, done);
            }
            while !self.is_over && in_flight < depth {
                let number = self.random_number();
                self.submit(number, action.clone(), now);
                in_flight += 1;
            }
            let count = self.poll(now, &check);
            in_flight -= count;
            done += count as u64;
        }
    }

    fn get(mut self, depth: usize, duration: Duration) -> Figure {
        let size = self.value.len();
        let before = self.engine.stats();
        let counter = Counter::start(thread_id(), duration.as_secs());
        let check =
            |reply: &Reply| assert!(matches!(reply, Reply::Bulk(value) if value.len() == size), "{reply:?}");
        let (per_second, done) = self.run(depth, duration, &Action::Get, check);
        let read = self.engine.stats().bytes_read - before.bytes_read;
        let device_bytes = read as f64 / done as f64;
        // The first record of an extent shares its block with another one of the log's, and reaches into the next.
        assert!(
            device_bytes < BLOCK_SIZE as f64 * 1.01,
            "a GET reads {device_bytes:.0} bytes, not just one block"
        );
        Figure { per_second, counted: Counter::end(counter, per_second), device_bytes }
    }

    fn put(mut self, depth: usize, duration: Duration) -> Figure {
        let before = self.engine.stats();
        let counter = Counter::start(thread_id(), duration.as_secs());
        let check = |reply: &Reply| assert_eq!(*reply, Reply::Ok);
        let action = self.put_action();
        let (per_second, done) = self.run(depth, duration, &action, check);
        let after = self.engine.stats();
        // Extents in which nothing is left are given back on the way, which moves nothing.
        assert_eq!(
            after.gc.extents_collected, before.gc.extents_collected,
            "garbage was collected in what is measured"
        );
        let written = after.bytes_written - before.bytes_written;
        let device_bytes = written as f64 / done as f64;
        Figure { per_second, counted: Counter::end(counter, per_second), device_bytes }
    }
}

fn key_of(mut number: usize) -> Key {
    let mut text = *b"key:00000000";
    for digit in text[4..].iter_mut().rev() {
        *digit += (number % 10) as u8;
        number /= 10;
    }
    Key::copy_from_slice(&text)
}

/// The value with which a record of this key just fills a block beside its frame's header.
fn value_size(key: &Key) -> usize {
    let room = BLOCK_SIZE - FRAME_HEADER_SIZE;
    let size = |value: &[u8]| {
        Record {
            sequence: 0,
            database: 0,
            key,
            value,
            kind: RecordType::Put,
            expires_at_ms: 0,
            batch: None,
            long: 0,
        }
        .size()
    };
    let zeros = vec![0; room];
    (0..room).rev().find(|length| size(&zeros[..*length]) <= room).unwrap_or(0)
}

fn thread_id() -> u32 {
    rustix::thread::gettid().as_raw_nonzero().get() as u32
}

/// What the processor counted for each operation, in user mode and in the kernel.
#[derive(Debug, Clone, Copy)]
struct Counted {
    cycles: f64,
    instructions: f64,
}

/// Linux's `perf stat` beside a turn; `None` where there is none, or where the machine counts nothing.
struct Counter {
    child: Child,
    seconds: f64,
}

fn counts(output: &std::process::Output) -> Option<(f64, f64)> {
    let text = String::from_utf8_lossy(&output.stderr);
    let figure =
        |event: &str| text.lines().find(|line| line.contains(event))?.split(',').next()?.parse::<f64>().ok();
    Some((figure("cycles")?, figure("instructions")?))
}

fn stat() -> Command {
    let mut command = Command::new("perf");
    command.args(["stat", "-x", ",", "-e", "cycles,instructions"]);
    command
}

fn is_counting() -> bool {
    stat().arg("true").output().is_ok_and(|output| counts(&output).is_some())
}

fn counters_note() -> &'static str {
    if is_counting() {
        "cycles and instructions: by `perf stat` of the initiator's thread, in the middle of each turn, idle polls included"
    } else {
        "cycles and instructions: not counted, since `perf stat` is not there or this machine lets nobody count them"
    }
}

impl Counter {
    /// Counts in the middle of a turn of a thread.
    fn start(thread: u32, turn_seconds: u64) -> Option<Counter> {
        if !is_counting() {
            return None;
        }
        let seconds = turn_seconds as f64 / 2.0;
        let mut command = stat();
        // The perf tool needs about half a second to begin.
        command.args(["--delay", "600", "-t", &thread.to_string(), "sleep", &(0.6 + seconds).to_string()]);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        Some(Counter { child: command.spawn().ok()?, seconds })
    }

    fn end(counter: Option<Counter>, per_second: f64) -> Option<Counted> {
        let Counter { child, seconds } = counter?;
        let (cycles, instructions) = counts(&child.wait_with_output().ok()?)?;
        let operations = per_second * seconds;
        Some(Counted { cycles: cycles / operations, instructions: instructions / operations })
    }
}
