//! The engine beside other stores, in process: same keys, values, clients and memory, every write durable.
//!
//! Each store runs in a process of its own, in a control group with the same ceiling of memory (page cache included), so that
//! data four times that size really comes from the device.

pub mod load;
pub mod ours;
pub mod peers;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::cgroup::MemoryGroup;
use crate::report::{Better, Report, Row, Runs};
use crate::{Failure, Plan, progress};
use basalt::format::superblock::IndexKind;
use load::{Load, Tally, Values, Workload};
use ours::{Ours, Setup, Start};

const OURS: &str = "basalt";

/// Clients at a time, in every workload.
const CLIENTS: usize = 64;

const VALUE_SIZE: usize = 1_024;

/// The part of the memory that a store is told to use as its cache: some need as much again for what they write.
const CACHE_DIVISOR: u64 = 4;

/// What a process of one store is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Task {
    store: String,
    directory: PathBuf,
    /// A control group's list of processes.
    group: Option<PathBuf>,
    keys: u64,
    /// Bytes of cache.
    cache_size: u64,
    seconds: f64,
    seed: u64,
    /// It was killed, and is to come back.
    is_restart: bool,
}

/// What it found.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Found {
    load_per_second: f64,
    results: Vec<Measured>,
    written_per_user_byte: f64,
    space_per_user_byte: f64,
    open_seconds: f64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Measured {
    workload: Workload,
    per_second: f64,
    p99_us: u64,
}

impl Task {
    fn load(&self, workload: Workload) -> Load {
        let time = Duration::from_secs_f64(self.seconds);
        Load { workload, keys: self.keys, clients: CLIENTS, time, seed: self.seed }
    }
}

impl Measured {
    fn of(workload: Workload, tally: &Tally) -> Measured {
        let per_second = tally.count as f64 / tally.seconds;
        Measured { workload, per_second, p99_us: tally.latencies.value_at_quantile(0.99) }
    }
}

/// One store, opened.
enum Opened {
    Ours(Box<Ours>),
    Peer(Box<dyn peers::Store>),
}

/// Runs as the process of one store. Prints what it found as one line, and then writes on until it is killed.
pub fn run_task(text: &str) -> Result<(), Failure> {
    let task: Task = serde_json::from_str(text)?;
    // Threads that have little each would have 2 MiB each, in every store, and be killed at the ceiling.
    rustix::thread::disable_transparent_huge_pages(true)?;
    if let Some(group) = &task.group {
        std::fs::write(group, std::process::id().to_string())?;
    }
    let values = Values::new(VALUE_SIZE);
    let mut found = Found::default();
    // Its own device, since the kind of index that has keys in order is chosen when one is formatted.
    if task.store == OURS && !task.is_restart {
        let directory = task.directory.join("ordered");
        std::fs::create_dir_all(&directory)?;
        let start = Start::Create(image_size(&task));
        let mut ours = Ours::open(&directory, setup(&task, start, IndexKind::Ordered), values.clone())?;
        ours.load(task.keys, CLIENTS)?;
        let tally = ours.scan(&task.load(Workload::Scan))?;
        found.results.push(Measured::of(Workload::Scan, &tally));
        drop(ours);
        std::fs::remove_dir_all(&directory)?;
    }
    let begun = Instant::now();
    let mut store = open(&task, &values)?;
    if task.is_restart {
        match &mut store {
            Opened::Ours(ours) => ours.get_one(0)?,
            Opened::Peer(peer) => {
                let mut is_there = false;
                peer.get(&load::key_of(0), &mut |value| is_there = value.is_some())?;
                if !is_there {
                    return Err(format!("{} has lost its keys", task.store).into());
                }
            }
        }
        found.open_seconds = begun.elapsed().as_secs_f64();
        println!("{}", serde_json::to_string(&found)?);
        return Ok(());
    }
    let begun = Instant::now();
    match &mut store {
        Opened::Ours(ours) => ours.load(task.keys, CLIENTS)?,
        Opened::Peer(peer) => peers::load(peer.as_ref(), &values, task.keys)?,
    }
    found.load_per_second = task.keys as f64 / begun.elapsed().as_secs_f64();
    let mut writes = task.keys;
    for workload in Workload::ALL {
        if workload == Workload::Scan && task.store == OURS {
            continue;
        }
        let tally = run_load(&mut store, &values, &task.load(workload))?;
        writes += tally.writes;
        found.results.push(Measured::of(workload, &tally));
    }
    let user_bytes = (writes * (VALUE_SIZE + load::key_of(0).len()) as u64) as f64;
    let live_bytes = (task.keys * (VALUE_SIZE + load::key_of(0).len()) as u64) as f64;
    let (written, space) = match &store {
        Opened::Ours(ours) => (ours.stats()?.bytes_written, ours.space_used()),
        Opened::Peer(_) => (own_write_bytes(), space_of(&task.directory)?),
    };
    found.written_per_user_byte = written as f64 / user_bytes;
    found.space_per_user_byte = space as f64 / live_bytes;
    println!("{}", serde_json::to_string(&found)?);
    std::io::stdout().flush()?;
    // The end comes from outside, in the middle of writes.
    loop {
        run_load(&mut store, &values, &task.load(Workload::Overwrite))?;
    }
}

/// Bytes of the image: twice what is put into it.
fn image_size(task: &Task) -> u64 {
    (task.keys * (VALUE_SIZE as u64 + 64) * 2).max(256 << 20)
}

/// As a node would be set up: a core is left over for the kernel, or what the engines wait for would wait for them. On two cores, engines
/// on both make half as many durable writes as one alone, since each flushes for itself, and read no faster.
fn setup(task: &Task, start: Start, index: IndexKind) -> Setup {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let cores = cores.saturating_sub(1).clamp(1, CLIENTS);
    Setup { start, index, cache_size: task.cache_size as usize, cores }
}

fn open(task: &Task, values: &Values) -> Result<Opened, Failure> {
    if task.store == OURS {
        let start = if task.is_restart { Start::Open } else { Start::Create(image_size(task)) };
        let ours = Ours::open(&task.directory, setup(task, start, IndexKind::Hash), values.clone())?;
        return Ok(Opened::Ours(Box::new(ours)));
    }
    Ok(Opened::Peer(peers::open(&task.store, &task.directory, task.cache_size)?))
}

fn run_load(store: &mut Opened, values: &Values, load: &Load) -> Result<Tally, Failure> {
    match store {
        Opened::Ours(ours) => ours.run(load),
        Opened::Peer(peer) => peers::run(peer.as_ref(), values, load),
    }
}

/// Bytes that this process had written to a device, by the kernel's count.
fn own_write_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/io").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// Bytes that a directory takes on its device.
fn space_of(directory: &Path) -> Result<u64, Failure> {
    use std::os::unix::fs::MetadataExt;
    let mut size = 0;
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        size += if metadata.is_dir() { space_of(&entry.path())? } else { metadata.blocks() * 512 };
    }
    Ok(size)
}

/// A process of one store, which ends with us.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(task: &Task) -> Result<(Running, Found), Failure> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--task", &serde_json::to_string(task)?])
        .stdout(Stdio::piped())
        .spawn()?;
    let out = child.stdout.take().ok_or("the process has no output")?;
    let running = Running(child);
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line)?;
    if line.is_empty() {
        let mut running = running;
        let status = running.0.wait()?;
        return Err(format!("{} ended without figures: {status}", task.store).into());
    }
    Ok((running, serde_json::from_str(&line)?))
}

/// One size of data.
struct Size {
    name: &'static str,
    keys: u64,
    has_goals: bool,
}

/// Measures all stores, at both sizes.
pub fn run(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    let memory: u64 = if plan.quick { 256 << 20 } else { 512 << 20 };
    let keys_in = |bytes: u64| bytes / (VALUE_SIZE as u64 + 16);
    let sizes = [
        Size { name: "data 4x memory", keys: keys_in(4 * memory), has_goals: true },
        Size { name: "data in cache", keys: keys_in(memory / 8), has_goals: false },
    ];
    let group = match MemoryGroup::new(memory) {
        Ok(group) => Some(group),
        Err(why) => {
            report.notes.push(format!(
                "engine: memory is not limited ({why}), so stores that read through the page cache have all of it"
            ));
            None
        }
    };
    let mut stores = vec![OURS];
    stores.extend(peers::names());
    report.versions.push(format!("stores: {}, clients: {CLIENTS}", stores.join(", ")));
    report.notes.push(format!(
        "engine: {} MiB of memory for each store, a quarter of it as its cache; values of {VALUE_SIZE} bytes; {CLIENTS} clients, in Basalt \
         operations in flight with an engine on each core but one, elsewhere threads on all cores; every write durable before it is answered (fjall: \
         SyncData after each insert, redb: a durable transaction for each, rocksdb: sync=true); rocksdb with Bloom filters, without \
         compression; scans are of a Basalt device with the index `ordered`, everything else of one with the index `hash`",
        memory >> 20
    ));
    for size in sizes {
        let found = measure(plan, report, &stores, &size, memory, group.as_ref())?;
        add_rows(report, &stores, &size, &found);
    }
    index_row(plan, report)
}

fn measure(
    plan: &Plan,
    report: &mut Report,
    stores: &[&str],
    size: &Size,
    memory: u64,
    group: Option<&MemoryGroup>,
) -> Result<Vec<Vec<Found>>, Failure> {
    let mut found: Vec<Vec<Found>> = vec![Vec::new(); stores.len()];
    for run in 0..plan.runs {
        for (at, store) in stores.iter().enumerate() {
            progress(&format!("engine, {}, run {} of {}: {store}", size.name, run + 1, plan.runs));
            let directory = plan.directory.join(store);
            std::fs::create_dir_all(&directory)?;
            let mut task = Task {
                store: (*store).to_owned(),
                directory: directory.clone(),
                group: group.map(MemoryGroup::procs),
                keys: size.keys,
                cache_size: memory / CACHE_DIVISOR,
                seconds: if plan.quick { 1.0 } else { 6.0 },
                seed: u64::from(run),
                is_restart: false,
            };
            let outcome = start(&task).and_then(|(running, mut one)| {
                // In the middle of durable writes.
                std::thread::sleep(Duration::from_millis(500));
                drop(running);
                task.is_restart = true;
                one.open_seconds = start(&task)?.1.open_seconds;
                Ok(one)
            });
            std::fs::remove_dir_all(&directory)?;
            match outcome {
                Ok(one) => found[at].push(one),
                Err(error) if *store == OURS => return Err(error),
                Err(error) => report.notes.push(format!("engine: {}: {error}", size.name)),
            }
        }
    }
    Ok(found)
}

fn add_rows(report: &mut Report, stores: &[&str], size: &Size, found: &[Vec<Found>]) {
    let of = |at: usize, figure: &dyn Fn(&Found) -> f64| Runs(found[at].iter().map(figure).collect());
    let mut compare =
        |name: &str, unit, better: Better, goal: Option<f64>, figure: &dyn Fn(&Found) -> f64| {
            let ours = of(0, figure);
            let mut peers: Vec<(&str, Runs)> = (1..stores.len())
                .filter(|at| !found[*at].is_empty())
                .map(|at| (stores[at], of(at, figure)))
                .collect();
            peers.sort_by(|one, other| other.1.median().total_cmp(&one.1.median()));
            if better == Better::Lower {
                peers.reverse();
            }
            // The goal is set against the best of them.
            for (place, (peer, runs)) in peers.into_iter().enumerate() {
                let row = Row::new(
                    "engine",
                    format!("{name} ({})", size.name),
                    unit,
                    better,
                    ours.clone(),
                    (peer, runs),
                );
                report.rows.push(match goal {
                    Some(goal) if place == 0 => row.with_goal(goal),
                    _ => row,
                });
            }
        };
    compare("load", "records/s", Better::Higher, None, &|one| one.load_per_second);
    for workload in Workload::ALL {
        let goal = size.has_goals.then_some(if workload.is_write() { 1.5 } else { 2.0 });
        let at = |one: &Found| one.results.iter().find(|one| one.workload == workload).cloned();
        let rate = |one: &Found| at(one).map_or(0.0, |one| one.per_second);
        compare(workload.name(), "operations/s", Better::Higher, goal, &rate);
        if matches!(workload, Workload::A | Workload::ReadUniform) {
            let p99 = |one: &Found| at(one).map_or(0.0, |one| one.p99_us as f64);
            compare(&format!("p99 of {}", workload.name()), "us", Better::Lower, None, &p99);
        }
    }
    compare("written to the device", "bytes per byte put", Better::Lower, None, &|one| {
        one.written_per_user_byte
    });
    compare("space used", "bytes per live byte", Better::Lower, None, &|one| one.space_per_user_byte);
    compare("restart after kill -9", "s", Better::Lower, None, &|one| one.open_seconds);
}

/// What a key takes of the memory, by what the system gives to a process that has nothing but the index.
fn index_row(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    let keys: u64 = if plan.quick { 20_000_000 } else { 100_000_000 };
    progress(&format!("engine: the index with {keys} keys"));
    let output = Command::new(std::env::current_exe()?).args(["--index-keys", &keys.to_string()]).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let per_key: f64 = text.trim().parse().map_err(|_| format!("the index gave no figure: {text}"))?;
    let name = format!("index `hash`, resident memory for each of {keys} keys");
    let goal = ("its goal", Runs(vec![16.0]));
    let row = Row::new("engine", name, "bytes", Better::Lower, Runs(vec![per_key]), goal);
    report.rows.push(row.with_goal(1.0));
    Ok(())
}

/// Bytes of memory that this process has.
pub fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// Fills 16 indexes, as a node has them, and prints the bytes of resident memory for each key.
pub fn fill_index(keys: u64) {
    use basalt::engine::index::{HashIndex, Index, RecordRef, hash_key};
    let before = resident();
    let mut shards: Vec<HashIndex> = (0..16).map(|_| HashIndex::default()).collect();
    let record = RecordRef {
        extent: 3,
        offset: 4_096,
        size: 300,
        value_size: 1,
        sequence: 1,
        expires_at_ms: 0,
        is_part: false,
        is_long: false,
    };
    for key in 0..keys {
        let identity = hash_key(&[3; 16], &key.to_le_bytes()).identity();
        shards[(key % 16) as usize].insert(identity, record.entry());
    }
    println!("{}", (resident() - before) as f64 / keys as f64);
}
