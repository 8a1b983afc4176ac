//! `basalt qualify`: whether a device does what the durability contract takes for granted, as far as software can see, and how
//! fast it is in three dimensions.

mod claims;

use std::time::Duration;

use clap::Args;
use serde::Serialize;

use self::claims::Surroundings;
use super::bench::target::{Target, TargetArgs};
use super::device_path::with_namespace;
use super::engine_name::EngineName;
use super::progress::Progress;
use super::{Exit, fail, say};
use crate::device::{Geometry, Namespace};
use crate::measure::durable::{self, Durable, DurableLoad, Order};
use crate::measure::load::{self, Load, Pattern};
use crate::measure::selftest;
use crate::size;

#[derive(Debug, Args)]
pub(super) struct QualifyArgs {
    #[command(flatten)]
    target: TargetArgs,
    /// How it is read and written (as for serve) [default: uring, or spdk for a controller]
    #[arg(long, value_name = "ENGINE")]
    engine: Option<EngineName>,
    /// Seconds that each figure is measured
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0, value_parser = super::bench::seconds)]
    seconds: f64,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

/// What came of one line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Pass,
    /// Nothing is wrong for certain, but something can't be taken for granted.
    Doubt,
    Fail,
}

/// One line of the report.
#[derive(Debug, Serialize)]
struct Line {
    name: &'static str,
    outcome: Outcome,
    why: String,
}

impl Line {
    fn of(name: &'static str, verdict: Result<String, String>) -> Line {
        let (outcome, why) = match verdict {
            Ok(seen) => (Outcome::Pass, seen),
            Err(wrong) => (Outcome::Fail, wrong),
        };
        Line { name, outcome, why }
    }
}

/// The three dimensions.
#[derive(Debug, Default, Serialize)]
struct Figures {
    read_iops: f64,
    write_iops: f64,
    read_bytes_per_second: f64,
    write_bytes_per_second: f64,
    read_latency_p50_us: f64,
    read_latency_p99_us: f64,
    durable_write_latency_p50_us: f64,
    durable_write_latency_p99_us: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    device: String,
    engine: String,
    /// Nothing failed.
    qualified: bool,
    lines: Vec<Line>,
    figures: Figures,
}

/// Operations in flight, and bytes of each, for operations per second and for bandwidth.
const IOPS_LOAD: (usize, usize) = (32, 4096);
const BANDWIDTH_LOAD: (usize, usize) = (8, 256 << 10);

pub(super) fn qualify(args: &QualifyArgs) -> Exit {
    let engine = args.engine.unwrap_or_else(|| args.target.engine_default());
    if let Some(why) = engine.why_not_served() {
        return fail(Exit::Refused, why);
    }
    let target = match Target::new(&args.target, engine, true) {
        Ok(target) => target,
        Err((exit, text)) => return fail(exit, text),
    };
    let report = match run(args, engine, &target) {
        Ok(report) => report,
        Err(text) => return fail(Exit::Failed, format!("{}: {text}", target.name)),
    };
    if args.json {
        say(serde_json::json!(report));
    } else {
        print(&report);
    }
    if report.qualified { Exit::Done } else { Exit::Failed }
}

fn run(args: &QualifyArgs, engine: EngineName, target: &Target) -> Result<Report, String> {
    target.fill(engine)?;
    let mut progress = Progress::new("qualifying");
    let mut step = 0;
    let mut lines = Vec::new();
    let mut add = |lines: &mut Vec<Line>, name, verdict| {
        step += 1;
        progress.show_count(step, 13, "steps");
        lines.push(Line::of(name, verdict));
    };
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let surroundings = Surroundings::of(target.temporary.as_ref(), target.queue.clone(), target.path());
    let namespace = target.open(engine)?;
    let second = target.open(engine).map(drop);
    let claim = match second {
        Err(why) if why.contains("in use") => Ok("a second open is refused while it is in use".to_owned()),
        Err(why) => Err(format!("a second open failed for another reason: {why}")),
        Ok(()) => Err("it could be opened twice at a time".to_owned()),
    };
    let mut figures = Figures::default();
    with_namespace!(&namespace, namespace => {
        let geometry = namespace.geometry().clone();
        let queue = || namespace.open_queue().map_err(|error| text(&error));
        // SPDK shares a controller among the queues of one process only through one namespace.
        if geometry.engine != "spdk" {
            add(&mut lines, "claim", claim);
        }
        let (mut writer, mut reader) = (queue()?, queue()?);
        add(&mut lines, "independent writes", selftest::writes_are_independent(&mut writer, &mut reader));
        add(&mut lines, "reads beside writes", selftest::reads_beside_writes_are_right(&mut writer));
        add(&mut lines, "alignment", selftest::alignment_is_as_claimed(&mut writer));
        add(&mut lines, "deallocation", selftest::deallocation_is_as_claimed(&mut writer));
        add(&mut lines, "atomicity", claims::atomicity(&geometry, target.queue.as_ref()));
        let durable = |writer: &mut _, fua| durable_writes(args, target, &geometry, writer, fua);
        let flushed = durable(&mut writer, false)?;
        let forced = if geometry.fua { Some(durable(&mut writer, true)?) } else { None };
        let (outcome, why) = claims::flush(&geometry, &surroundings, &flushed, forced.as_ref());
        lines.push(Line { name: "flush", outcome, why });
        figures.durable_write_latency_p50_us = micros(&flushed.total, 0.5);
        figures.durable_write_latency_p99_us = micros(&flushed.total, 0.99);
        selftest::leave_something(&mut writer).map_err(|error| text(&error))?;
    });
    // Everything is closed before it is opened anew.
    drop(namespace);
    target.settle();
    let namespace = target.open(engine)?;
    with_namespace!(&namespace, namespace => {
        let mut queue = namespace.open_queue().map_err(|error| text(&error))?;
        add(&mut lines, "opened anew", selftest::is_there_again(&mut queue));
        drop(queue);
        let mut load = |pattern, (depth, block_size): (usize, usize)| {
            step += 1;
            progress.show_count(step, 13, "steps");
            measure(args, target, namespace, pattern, depth, block_size)
        };
        figures.read_iops = rate(&load(Pattern::RandomRead, IOPS_LOAD)?);
        figures.write_iops = rate(&load(Pattern::RandomWrite, IOPS_LOAD)?);
        figures.read_bytes_per_second = rate(&load(Pattern::SequentialRead, BANDWIDTH_LOAD)?) * BANDWIDTH_LOAD.1 as f64;
        figures.write_bytes_per_second = rate(&load(Pattern::SequentialWrite, BANDWIDTH_LOAD)?) * BANDWIDTH_LOAD.1 as f64;
        let single = load(Pattern::RandomRead, (1, IOPS_LOAD.1))?.reads;
        figures.read_latency_p50_us = micros(&single, 0.5);
        figures.read_latency_p99_us = micros(&single, 0.99);
    });
    progress.end();
    let qualified = lines.iter().all(|line| line.outcome != Outcome::Fail);
    Ok(Report { device: target.name.clone(), engine: engine.to_string(), qualified, lines, figures })
}

fn micros(latencies: &crate::measure::Latencies, quantile: f64) -> f64 {
    latencies.value_at_quantile(quantile) as f64 / 1000.0
}

fn rate(measured: &load::Measured) -> f64 {
    measured.count as f64 / measured.elapsed.as_secs_f64()
}

fn measure<N: Namespace>(
    args: &QualifyArgs,
    target: &Target,
    namespace: &N,
    pattern: Pattern,
    depth: usize,
    block_size: usize,
) -> Result<load::Measured, String> {
    let geometry = namespace.geometry();
    let load = Load {
        pattern,
        block_size: block_size.max(geometry.block_size as usize).min(geometry.transfer_size_max as usize),
        depth: depth.min(geometry.depth as usize),
        region: 0..target.size,
        warm_up: Duration::from_secs_f64(args.seconds / 4.0),
        duration: Duration::from_secs_f64(args.seconds),
        seed: 1,
    };
    load::run(namespace, &load).map_err(|error| error.to_string())
}

/// Single blocks, one after the other, each made durable.
fn durable_writes<D: crate::device::Device>(
    args: &QualifyArgs,
    target: &Target,
    geometry: &Geometry,
    queue: &mut D,
    fua: bool,
) -> Result<Durable, String> {
    let load = DurableLoad {
        block_size: geometry.block_size as usize,
        region: 0..target.size,
        order: Order::Around,
        fua,
        duration: Duration::from_secs_f64(args.seconds),
    };
    durable::run(queue, &load).map_err(|error| error.to_string())
}

fn print(report: &Report) {
    say(format!("{} through {}", report.device, report.engine));
    for line in &report.lines {
        let outcome = match line.outcome {
            Outcome::Pass => "pass",
            Outcome::Doubt => "DOUBT",
            Outcome::Fail => "FAIL",
        };
        say(format!("{outcome:<6}{:<21}{}", line.name, line.why));
    }
    let figures = &report.figures;
    let bandwidth = |bytes: f64| size::show(bytes as u64);
    say(format!(
        "      {:<21}{:.0} random reads a second, {:.0} random writes (4 KiB, {} in flight)",
        "IOPS", figures.read_iops, figures.write_iops, IOPS_LOAD.0
    ));
    say(format!(
        "      {:<21}{} read a second, {} written (256 KiB, {} in flight)",
        "bandwidth",
        bandwidth(figures.read_bytes_per_second),
        bandwidth(figures.write_bytes_per_second),
        BANDWIDTH_LOAD.0
    ));
    say(format!(
        "      {:<21}read {:.0} us (99 %: {:.0} us), durable write {:.0} us (99 %: {:.0} us), one at a time",
        "latency",
        figures.read_latency_p50_us,
        figures.read_latency_p99_us,
        figures.durable_write_latency_p50_us,
        figures.durable_write_latency_p99_us
    ));
    say(if report.qualified {
        "qualified, as far as software can see: what a power cut does to the drive's cache, no program can test".to_owned()
    } else {
        "NOT qualified: what failed above is what durability rests on".to_owned()
    });
}
