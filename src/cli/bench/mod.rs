//! `basalt bench device`: what I/O engines get of a device.
//!
//! Runs are interleaved: each run visits every point of every engine once, so that a machine that slows down slows all of
//! them. A figure is the median of its runs.

mod html;
mod report;
mod table;
pub(super) mod target;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use self::report::{DurablePoint, Engine, Machine, Point, Report};
use self::target::{Failure, TAIL_SIZE, Target, TargetArgs};
use super::device_path::{AnyNamespace, with_namespace};
use super::engine_name::EngineName;
use super::progress::Progress;
use super::{Exit, fail, fail_on, note, say};
use crate::device::Namespace;
use crate::limits::DEVICE_DEPTH;
use crate::measure::durable::{self, Durable, DurableLoad, Order};
use crate::measure::load::{self, Load, Measured, Pattern};
use crate::size;
use crate::sys::usage::SystemCalls;

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Debug, Subcommand)]
enum BenchCommand {
    /// Measure a device through one or several I/O engines, side by side.
    Device(DeviceBenchArgs),
}

/// What is done to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Workload {
    /// Random reads.
    Randread,
    /// Random writes.
    Randwrite,
    /// Sequential reads.
    Seqread,
    /// Sequential writes.
    Seqwrite,
    /// 70 % random reads, 30 % random writes.
    Mixed,
    /// Single writes that are made durable, into different kinds of space.
    Durable,
}

impl Workload {
    fn pattern(self) -> Option<Pattern> {
        Some(match self {
            Workload::Randread => Pattern::RandomRead,
            Workload::Randwrite => Pattern::RandomWrite,
            Workload::Seqread => Pattern::SequentialRead,
            Workload::Seqwrite => Pattern::SequentialWrite,
            Workload::Mixed => Pattern::Mixed,
            Workload::Durable => return None,
        })
    }

    fn name(self) -> &'static str {
        match self {
            Workload::Randread => "randread",
            Workload::Randwrite => "randwrite",
            Workload::Seqread => "seqread",
            Workload::Seqwrite => "seqwrite",
            Workload::Mixed => "mixed",
            Workload::Durable => "durable",
        }
    }

    fn is_read_only(self) -> bool {
        self.pattern().is_some_and(Pattern::is_read_only)
    }
}

#[derive(Debug, Args)]
struct DeviceBenchArgs {
    #[command(flatten)]
    target: TargetArgs,
    /// Engines: uring, aio, pool, sync, buffered, mmap or spdk; uring with +registered, +unregistered, +sqpoll or +iopoll
    /// behind it [default: uring, or spdk for a controller]
    #[arg(long, value_name = "ENGINE", value_delimiter = ',')]
    engine: Vec<EngineName>,
    /// Bytes of one read or write
    #[arg(long, value_name = "SIZE", value_delimiter = ',', value_parser = size::parse, default_value = "4KiB")]
    block_size: Vec<u64>,
    /// Operations in flight at a time; as many threads, up to 64, where an engine does one at a time
    #[arg(long, value_name = "COUNT", value_delimiter = ',', default_value = "1,4,16,64", value_parser = clap::value_parser!(u16).range(1..=DEVICE_DEPTH as i64))]
    depth: Vec<u16>,
    /// What is measured
    #[arg(
        long,
        value_name = "NAME",
        value_delimiter = ',',
        default_value = "randread,randwrite,seqread,seqwrite,mixed,durable"
    )]
    workload: Vec<Workload>,
    /// Seconds that each point is measured, after a quarter of that to warm up
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, value_parser = seconds)]
    seconds: f64,
    /// Times that each point is measured; the median counts
    #[arg(long, value_name = "COUNT", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=99))]
    runs: u16,
    /// Write all figures as JSON to this file; - is standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a page with plots to this file; it needs nothing but a browser
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

pub(super) fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("'{text}' is no number of seconds"))?;
    let is_possible = (0.01..=3600.0).contains(&seconds);
    is_possible.then_some(seconds).ok_or_else(|| "seconds are from 0.01 to 3600".to_owned())
}

/// Threads of a load, where an engine does one operation at a time.
const THREAD_COUNT_MAX: usize = 64;

pub(super) fn bench(args: &BenchArgs) -> Exit {
    let BenchCommand::Device(args) = &args.command;
    match bench_device(args) {
        Ok(report) => finish(args, &report),
        Err((exit, text)) => {
            fail_on(args.target.name(), args.json.as_deref().is_some_and(is_stdout), exit, text)
        }
    }
}

fn is_stdout(path: &Path) -> bool {
    path.as_os_str() == "-"
}

fn finish(args: &DeviceBenchArgs, report: &Report) -> Exit {
    let json = serde_json::json!(report);
    if !args.json.as_deref().is_some_and(is_stdout) {
        say(table::table(report));
    }
    let texts = [
        (&args.json, serde_json::to_string_pretty(&json).unwrap_or_default() + "\n"),
        (&args.html, html::page(report)),
    ];
    for (path, text) in texts {
        let Some(path) = path else { continue };
        if is_stdout(path) {
            say(text.trim_end());
        } else if let Err(error) = std::fs::write(path, text) {
            return fail(Exit::Failed, format!("cannot write {}: {error}", path.display()));
        }
    }
    Exit::Done
}

/// One thing that is measured, once in each run.
struct Measurement {
    engine: EngineName,
    block_size: usize,
    what: What,
    loads: Vec<Measured>,
    durables: Vec<Durable>,
}

enum What {
    Load(Workload, Pattern, usize),
    Durable(&'static Kind),
}

/// A way of making a write durable, into one kind of space.
struct Kind {
    name: &'static str,
    order: Order,
    fua: bool,
    place: Place,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Blocks that were written before.
    Written,
    /// Blocks that the file system has allocated and not yet marked as written.
    Preallocated,
    /// A hole at the end of the file: the file system allocates as it is written, which is what appending to a file costs.
    Hole,
}

const KINDS: [Kind; 5] = [
    Kind { name: "append, flush", order: Order::Once, fua: false, place: Place::Hole },
    Kind { name: "preallocated, flush", order: Order::Once, fua: false, place: Place::Preallocated },
    Kind { name: "recycled, flush", order: Order::Around, fua: false, place: Place::Written },
    Kind { name: "overwrite, flush", order: Order::Same, fua: false, place: Place::Written },
    Kind { name: "recycled, FUA", order: Order::Around, fua: true, place: Place::Written },
];

fn bench_device(args: &DeviceBenchArgs) -> Result<Report, Failure> {
    let engines =
        if args.engine.is_empty() { vec![args.target.engine_default()] } else { args.engine.clone() };
    let is_written = !args.workload.iter().all(|workload| workload.is_read_only());
    let target = Target::new(&args.target, engines[0], is_written)?;
    let mut notes = Vec::new();
    let mut facts = Vec::new();
    let mut plan = Vec::new();
    for &engine in &engines {
        let namespace = target.open(engine).map_err(|text| (Exit::Failed, text))?;
        let geometry = with_namespace!(&namespace, namespace => namespace.geometry().clone());
        facts.push(Engine::new(&geometry));
        if matches!(engine.to_string().as_str(), "buffered" | "mmap") {
            notes.push(format!("{engine}: what the page cache holds is part of its figures"));
        }
        for block_size in args.block_size.iter().map(|size| *size as usize) {
            let is_possible = block_size > 0 && block_size.is_multiple_of(geometry.block_size as usize);
            if !is_possible || block_size > geometry.transfer_size_max as usize {
                let text = format!(
                    "--block-size {}: {engine} takes multiples of {} bytes up to {}",
                    size::show(block_size as u64),
                    geometry.block_size,
                    size::show(geometry.transfer_size_max.into())
                );
                return Err((Exit::Usage, text));
            }
            plan.extend(plan_of(args, engine, block_size, geometry.blocks.transfer, &target));
        }
    }
    if target.temporary.is_none() && args.workload.contains(&Workload::Durable) {
        notes.push("appending and writing to preallocated space are measured on a temporary file only: leave --device out".into());
    }
    if let Err(why) = SystemCalls::new() {
        notes.push(why);
    }
    if is_written || target.temporary.is_some() {
        target.fill(engines[0]).map_err(|text| (Exit::Failed, text))?;
    }
    measure(args, &target, &mut plan, &mut notes)?;
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        device: target.name.clone(),
        machine: machine(&target),
        seconds: args.seconds,
        runs: args.runs.into(),
        size_bytes: target.size,
        engines: facts,
        points: Vec::new(),
        durable: Vec::new(),
        notes,
    };
    for one in &plan {
        let engine = one.engine.to_string();
        match &one.what {
            What::Load(workload, _, depth) => {
                report.points.extend(Point::new(engine, workload.name(), one.block_size, *depth, &one.loads));
            }
            What::Durable(kind) => {
                report.durable.extend(DurablePoint::new(engine, kind.name, one.block_size, &one.durables));
            }
        }
    }
    for text in &report.notes {
        note(text);
    }
    if is_written && target.temporary.is_none() {
        note(format!(
            "{} is full of test data now; `basalt format --force` makes it a device again",
            target.name
        ));
    }
    Ok(report)
}

fn plan_of(
    args: &DeviceBenchArgs,
    engine: EngineName,
    block_size: usize,
    is_one_at_a_time: bool,
    target: &Target,
) -> Vec<Measurement> {
    let mut whats = Vec::new();
    for &workload in &args.workload {
        match workload.pattern() {
            Some(pattern) => {
                let depths = args.depth.iter().map(|depth| usize::from(*depth));
                let possible = depths.filter(|depth| !is_one_at_a_time || *depth <= THREAD_COUNT_MAX);
                whats.extend(possible.map(|depth| What::Load(workload, pattern, depth)));
            }
            None => {
                let is_possible = |kind: &&Kind| kind.place == Place::Written || target.temporary.is_some();
                whats.extend(KINDS.iter().filter(is_possible).map(What::Durable));
            }
        }
    }
    let measurement =
        |what| Measurement { engine, block_size, what, loads: Vec::new(), durables: Vec::new() };
    whats.into_iter().map(measurement).collect()
}

fn measure(
    args: &DeviceBenchArgs,
    target: &Target,
    plan: &mut [Measurement],
    notes: &mut Vec<String>,
) -> Result<(), Failure> {
    let total = (plan.len() * usize::from(args.runs)) as u64;
    let mut progress = Progress::new("measuring");
    let mut done = 0;
    for run in 0..args.runs {
        for one in plan.iter_mut() {
            progress.show_count(done, total, "points");
            done += 1;
            target.settle();
            let namespace = target.open(one.engine).map_err(|text| (Exit::Failed, text))?;
            let measured = match &one.what {
                What::Load(_, pattern, depth) => {
                    let load = Load {
                        pattern: *pattern,
                        block_size: one.block_size,
                        depth: *depth,
                        region: 0..target.size,
                        warm_up: Duration::from_secs_f64(args.seconds / 4.0),
                        duration: Duration::from_secs_f64(args.seconds),
                        seed: u64::from(run) * 1000 + *depth as u64,
                    };
                    with_namespace!(&namespace, namespace => load::run(namespace, &load))
                        .map(|measured| one.loads.push(measured))
                        .map_err(|error| error.to_string())
                }
                What::Durable(kind) => durable_of(args, target, kind, one.block_size, &namespace)
                    .map(|measured| one.durables.extend(measured))
                    .or_else(|(is_fatal, text)| {
                        let text = format!("{}: {text}", kind.name);
                        if !is_fatal && !notes.contains(&text) {
                            notes.push(text.clone());
                        }
                        if is_fatal { Err(text) } else { Ok(()) }
                    }),
            };
            measured.map_err(|text| (Exit::Failed, format!("{}, {}: {text}", target.name, one.engine)))?;
        }
    }
    progress.end();
    Ok(())
}

/// `None` where the space for it can't be had; an error says whether it ends everything.
fn durable_of(
    args: &DeviceBenchArgs,
    target: &Target,
    kind: &Kind,
    block_size: usize,
    namespace: &AnyNamespace,
) -> Result<Option<Durable>, (bool, String)> {
    if kind.place != Place::Written {
        target.renew_tail().map_err(|text| (false, text))?;
    }
    let region = match kind.place {
        Place::Written => 0..target.size,
        Place::Preallocated => target.size..target.size + TAIL_SIZE,
        Place::Hole => target.size + TAIL_SIZE..target.size + 2 * TAIL_SIZE,
    };
    let duration = Duration::from_secs_f64(args.seconds);
    let load = DurableLoad { block_size, region, order: kind.order, fua: kind.fua, duration };
    with_namespace!(namespace, namespace => {
        let geometry = namespace.geometry();
        if kind.fua && !geometry.fua {
            return Err((false, format!("{} has no FUA writes on this device", geometry.engine)));
        }
        let mut queue = namespace.open_queue().map_err(|error| (true, error.to_string()))?;
        durable::run(&mut queue, &load).map(Some).map_err(|error| (true, error.to_string()))
    })
}

fn machine(target: &Target) -> Machine {
    let uname = rustix::system::uname();
    Machine {
        kernel: format!("{} {}", uname.sysname().to_string_lossy(), uname.release().to_string_lossy()),
        processors: std::thread::available_parallelism().map_or(1, usize::from),
        block_device: target.queue.as_ref().map(|queue| queue.name()),
        write_cache: target.queue.as_ref().and_then(|queue| queue.attribute("write_cache")),
    }
}
