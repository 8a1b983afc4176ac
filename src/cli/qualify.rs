//! `basalt qualify`: whether a device does what the durability contract takes for granted, as far as software can see, and how
//! fast it is in three dimensions.

mod claims;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use self::claims::Surroundings;
use super::bench::target::{QUEUE_COUNT, Target, TargetArgs};
use super::device_path::with_namespace;
use super::engine_name::EngineName;
use super::profile::{self, Disk, Profile};
use super::progress::Progress;
use super::{Exit, fail, fail_on, note, say};
use crate::device::{Geometry, Namespace};
use crate::engine::io_queue::cost::{self, DeviceProfile};
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
    /// Keep what was measured in this file, which `basalt serve --profile` goes by
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
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

#[derive(Debug, Serialize)]
struct Report {
    device: String,
    engine: String,
    /// Nothing failed.
    qualified: bool,
    lines: Vec<Line>,
    /// The three dimensions.
    figures: DeviceProfile,
}

/// Random reads in flight that are tried, to find how many a device needs to be busy and how many a second it does then.
const READ_DEPTHS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];

/// Random writes in flight that are tried: the most that they give is wanted, not with how many.
const WRITE_DEPTHS: [usize; 4] = [1, 8, 32, 128];

/// Long transfers in flight that are tried: a drive in the machine needs few, one behind a network many.
const BANDWIDTH_DEPTHS: [usize; 3] = [1, 8, 32];

/// The part of the most reads a second that counts as busy.
const BUSY_PART: f64 = 0.95;

/// More in flight are not tried once so many depths in a row have brought no more.
const IN_VAIN_MAX: usize = 2;

/// Steps at most: seven self-tests, and each depth.
const STEPS: u64 = (7 + READ_DEPTHS.len() + WRITE_DEPTHS.len() + 2 * BANDWIDTH_DEPTHS.len()) as u64;

pub(super) fn qualify(args: &QualifyArgs) -> Exit {
    let engine = args.engine.unwrap_or_else(|| args.target.engine_default());
    let failed = |exit, text: String| fail_on(args.target.name(), args.json, exit, text);
    if let Some(why) = engine.why_not_served() {
        return failed(Exit::Refused, why.to_owned());
    }
    if let Some(Err((exit, text))) = args.profile.as_deref().map(profile::check_place) {
        return failed(exit, text);
    }
    let target = match Target::new(&args.target, engine, true) {
        Ok(target) => target,
        Err((exit, text)) => return failed(exit, text),
    };
    let (report, disk) = match run(args, engine, &target) {
        Ok(measured) => measured,
        Err(text) => return failed(Exit::Failed, format!("{}: {text}", target.name)),
    };
    let written = args.profile.as_deref().map(|path| keep(&report, disk, path)).transpose();
    if args.json {
        say(serde_json::json!(report));
    } else {
        print(&report);
    }
    // The report is there already, one object: what became of the profile is said in words.
    if let Err(text) = written {
        return fail(Exit::Failed, text);
    }
    if report.qualified { Exit::Done } else { Exit::Failed }
}

/// Writes the profile of what was measured.
fn keep(report: &Report, disk: Disk, path: &Path) -> Result<(), String> {
    if !disk.is_identified() {
        note(format!(
            "{disk} has no serial number: its profile will be taken for that of any that looks the same, with a note"
        ));
    }
    Profile::new(&report.engine, disk, report.figures.clone()).write(path)?;
    note(format!("what was measured is in {0}: `basalt serve --profile {0}` goes by it", path.display()));
    Ok(())
}

/// Also says which disk it was.
fn run(args: &QualifyArgs, engine: EngineName, target: &Target) -> Result<(Report, Disk), String> {
    target.fill(engine)?;
    let mut progress = Progress::new("qualifying");
    let mut step = 0;
    let mut lines = Vec::new();
    let mut add = |lines: &mut Vec<Line>, name, verdict| {
        step += 1;
        progress.show_count(step, STEPS, "steps");
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
    let mut figures = cost::ASSUMED;
    let disk = match namespace.model_and_serial() {
        Some(controller) => Disk::beneath(target.path(), Some(controller)),
        None => Disk::of(target.queue.as_ref()),
    };
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
        let mut rates = |pattern, block_size, depths: &[usize]| {
            sweep(depths, &mut |depth| {
                step += 1;
                progress.show_count(step, STEPS, "steps");
                measure(args, target, namespace, pattern, depth, block_size)
            })
        };
        let small = cost::SMALL_SIZE as usize;
        let reads = rates(Pattern::RandomRead, small, &READ_DEPTHS)?;
        figures.read_iops = reads.most();
        figures.read_depth = reads.depth();
        figures.read_latency_p50_us = micros(&reads.first.reads, 0.5);
        figures.read_latency_p99_us = micros(&reads.first.reads, 0.99);
        figures.write_iops = rates(Pattern::RandomWrite, small, &WRITE_DEPTHS)?.most();
        // A device may not take transfers that long.
        let large = cost::LARGE_SIZE.min(namespace.geometry().transfer_size_max.into()) as usize;
        let mut bandwidth = |pattern| -> Result<f64, String> {
            Ok(rates(pattern, large, &BANDWIDTH_DEPTHS)?.most() * large as f64)
        };
        figures.read_bytes_per_second = bandwidth(Pattern::SequentialRead)?;
        figures.write_bytes_per_second = bandwidth(Pattern::SequentialWrite)?;
    });
    // What is not so is not kept either, and a node would not go by it.
    let verdict = figures.check().map(|()| "each is one that a device may have".to_owned());
    lines.push(Line::of("figures", verdict.map_err(|error| error.to_string())));
    progress.end();
    let qualified = lines.iter().all(|line| line.outcome != Outcome::Fail);
    let (device, engine) = (target.name.clone(), engine.to_string());
    Ok((Report { device, engine, qualified, lines, figures }, disk))
}

/// What a device did with ever more operations in flight.
struct Sweep {
    /// With the first depth.
    first: load::Measured,
    /// Operations a second by depth, from the fewest on.
    rates: Vec<(usize, f64)>,
}

impl Sweep {
    /// The most operations a second.
    fn most(&self) -> f64 {
        self.rates.iter().map(|(_, rate)| *rate).fold(0.0, f64::max)
    }

    /// The fewest in flight with nearly the most operations a second, of those that were tried.
    fn depth(&self) -> u32 {
        let busy = self.rates.iter().find(|(_, rate)| *rate >= self.most() * BUSY_PART);
        busy.map_or(1, |(depth, _)| *depth as u32)
    }
}

/// Measures with more and more in flight, until that brings no more or the device takes no more (`None`).
fn sweep(
    depths: &[usize],
    measure: &mut dyn FnMut(usize) -> Result<Option<load::Measured>, String>,
) -> Result<Sweep, String> {
    let mut swept: Option<Sweep> = None;
    let mut in_vain = 0;
    for depth in depths {
        let Some(measured) = measure(*depth)? else { break };
        let rate = rate(&measured);
        let Some(sweep) = &mut swept else {
            swept = Some(Sweep { first: measured, rates: vec![(*depth, rate)] });
            continue;
        };
        in_vain = if rate * BUSY_PART > sweep.most() { 0 } else { in_vain + 1 };
        sweep.rates.push((*depth, rate));
        if in_vain >= IN_VAIN_MAX {
            break;
        }
    }
    swept.ok_or_else(|| format!("the device does not take {} operations at a time", depths[0]))
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
) -> Result<Option<load::Measured>, String> {
    let geometry = namespace.geometry();
    let block_size = block_size.max(geometry.block_size as usize).min(geometry.transfer_size_max as usize);
    // An engine that does one at a time has a thread and a queue for each, and operations in flight are kept apart.
    let queues = if geometry.blocks.transfer { QUEUE_COUNT } else { usize::MAX };
    let room = (target.size / block_size as u64 / load::BLOCKS_PER_DEPTH) as usize;
    if depth > queues.min(geometry.depth as usize).min(room).max(1) {
        return Ok(None);
    }
    let load = Load {
        pattern,
        block_size,
        depth,
        region: 0..target.size,
        warm_up: Duration::from_secs_f64(args.seconds / 4.0),
        duration: Duration::from_secs_f64(args.seconds),
        seed: 1,
    };
    load::run(namespace, &load).map(Some).map_err(|error| error.to_string())
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
        "      {:<21}{:.0} random reads a second, {:.0} random writes (4 KiB); {} reads in flight keep it busy",
        "IOPS", figures.read_iops, figures.write_iops, figures.read_depth
    ));
    say(format!(
        "      {:<21}{} read a second, {} written (256 KiB at a time, or what the device takes)",
        "bandwidth",
        bandwidth(figures.read_bytes_per_second),
        bandwidth(figures.write_bytes_per_second)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(rate: f64) -> load::Measured {
        let (reads, writes) = (crate::measure::latencies(), crate::measure::latencies());
        let (count, elapsed) = (rate as u64, Duration::from_secs(1));
        load::Measured { count, elapsed, reads, writes, context_switches: 0, system_calls_per_io: None }
    }

    /// A device that does so many operations a second with so many in flight, and takes no more: what was tried, the most that it
    /// did, and how many it needs.
    fn swept(rates: &[(usize, f64)]) -> (usize, f64, u32) {
        let mut tried = 0;
        let sweep = sweep(&READ_DEPTHS, &mut |depth| {
            let rate = rates.iter().find(|(of, _)| *of == depth).map(|(_, rate)| *rate);
            tried = if rate.is_some() { depth } else { tried };
            Ok(rate.map(measured))
        });
        let sweep = sweep.unwrap();
        (tried, sweep.most(), sweep.depth())
    }

    #[test]
    fn a_device_is_busy_with_the_fewest_reads_that_give_nearly_the_most() {
        for (rates, expected) in [
            // More than 32 bring more, up to what it takes.
            (
                &[(1, 10.0), (2, 20.0), (4, 40.0), (8, 80.0), (16, 160.0), (32, 320.0), (64, 400.0)][..],
                (64, 400.0, 64),
            ),
            // It goes on although one was slow, and ends after two that bring no more.
            (&[(1, 100.0), (2, 90.0), (4, 200.0), (8, 201.0), (16, 209.0), (32, 900.0)][..], (16, 209.0, 4)),
            (&[(1, 100.0), (2, 90.0), (4, 104.0), (8, 1000.0)][..], (4, 104.0, 1)),
            (&[(1, 7.0)][..], (1, 7.0, 1)),
        ] {
            assert_eq!(swept(rates), expected, "{rates:?}");
        }
        let none = sweep(&READ_DEPTHS, &mut |_| Ok(None)).err().unwrap();
        assert!(none.contains("does not take 1 operation"), "{none}");
    }
}
