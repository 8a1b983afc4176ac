//! `basalt qualify`: whether a device does what the durability contract takes for granted, as far as software can see, and how
//! fast it is in three dimensions.

mod claims;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use self::claims::Surroundings;
use super::bench::target::{Target, TargetArgs};
use super::device_path::with_namespace;
use super::engine_name::EngineName;
use super::profile::{self, Disk, Profile};
use super::progress::Progress;
use super::{Exit, fail_on, note, say};
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

/// Operations in flight, and bytes of each, for operations per second and for bandwidth.
const IOPS_LOAD: (usize, usize) = (32, cost::SMALL_SIZE as usize);
const BANDWIDTH_LOAD: (usize, usize) = (8, cost::LARGE_SIZE as usize);

/// Reads in flight that are tried beside one and as many as for `IOPS_LOAD`, to find how many a device needs to be busy.
const DEPTHS: [usize; 4] = [4, 8, 16, 64];

/// The part of the most reads a second that counts as busy.
const BUSY_PART: f64 = 0.95;

const STEPS: u64 = 13 + DEPTHS.len() as u64;

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
    if let Some(path) = &args.profile {
        let profile = Profile::new(&report.engine, disk, report.figures.clone());
        if let Err(text) = profile.write(path) {
            return failed(Exit::Failed, text);
        }
        note(format!("what was measured is in {0}: `basalt serve --profile {0}` goes by it", path.display()));
    }
    if args.json {
        say(serde_json::json!(report));
    } else {
        print(&report);
    }
    if report.qualified { Exit::Done } else { Exit::Failed }
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
        let mut load = |pattern, (depth, block_size): (usize, usize)| {
            step += 1;
            progress.show_count(step, STEPS, "steps");
            measure(args, target, namespace, pattern, depth, block_size)
        };
        figures.read_iops = rate(&load(Pattern::RandomRead, IOPS_LOAD)?);
        figures.write_iops = rate(&load(Pattern::RandomWrite, IOPS_LOAD)?);
        // A device may not take transfers that long.
        let large = BANDWIDTH_LOAD.1.min(namespace.geometry().transfer_size_max as usize) as f64;
        figures.read_bytes_per_second = rate(&load(Pattern::SequentialRead, BANDWIDTH_LOAD)?) * large;
        figures.write_bytes_per_second = rate(&load(Pattern::SequentialWrite, BANDWIDTH_LOAD)?) * large;
        let single = load(Pattern::RandomRead, (1, IOPS_LOAD.1))?;
        figures.read_latency_p50_us = micros(&single.reads, 0.5);
        figures.read_latency_p99_us = micros(&single.reads, 0.99);
        let mut rates = vec![(1, rate(&single)), (IOPS_LOAD.0, figures.read_iops)];
        for depth in DEPTHS {
            rates.push((depth, rate(&load(Pattern::RandomRead, (depth, IOPS_LOAD.1))?)));
        }
        figures.read_depth = depth_of(&mut rates);
    });
    progress.end();
    let qualified = lines.iter().all(|line| line.outcome != Outcome::Fail);
    let (device, engine) = (target.name.clone(), engine.to_string());
    Ok((Report { device, engine, qualified, lines, figures }, disk))
}

/// The fewest reads in flight with nearly the most reads a second, of those that were tried.
fn depth_of(rates: &mut [(usize, f64)]) -> u32 {
    rates.sort_by_key(|(depth, _)| *depth);
    let most = rates.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
    let busy = rates.iter().find(|(_, rate)| *rate >= most * BUSY_PART);
    busy.map_or(1, |(depth, _)| *depth as u32)
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
        "      {:<21}{:.0} random reads a second, {:.0} random writes (4 KiB, {} in flight); {} reads keep it busy",
        "IOPS", figures.read_iops, figures.write_iops, IOPS_LOAD.0, figures.read_depth
    ));
    say(format!(
        "      {:<21}{} read a second, {} written (256 KiB at a time, or what the device takes, {} in flight)",
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_busy_with_the_fewest_reads_that_give_nearly_the_most() {
        for (rates, depth) in [
            (vec![(1, 10.0), (32, 100.0), (4, 40.0), (8, 80.0), (16, 96.0), (64, 101.0)], 16),
            (vec![(1, 100.0), (32, 90.0), (4, 104.0)], 1),
            (vec![(1, 10.0), (64, 200.0), (32, 100.0)], 64),
        ] {
            assert_eq!(depth_of(&mut rates.clone()), depth, "{rates:?}");
        }
    }
}
