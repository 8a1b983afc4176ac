//! What the bare file can do by fio's measure, and what the engine gets of it: same file, same depth, same I/O engine, one core.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::engine::load::{Load, Values, Workload, key_of};
use crate::engine::ours::{Ours, Setup, Start, image};
use crate::report::{Better, Report, Row, Runs};
use crate::{Failure, Plan, machine, progress};

const VALUE_SIZE: usize = 1_024;

/// Writers at a time.
const WRITERS: usize = 64;

/// Runs fio on a file and returns its first job.
pub fn fio(file: &Path, arguments: &[String]) -> Result<Value, Failure> {
    let output = Command::new("fio")
        .args(["--name=bench", "--output-format=json", "--ioengine=io_uring", "--direct=1", "--thread"])
        .arg(format!("--filename={}", file.display()))
        .args(arguments)
        .output()
        .map_err(|error| format!("fio cannot be run ({error}): install the package fio"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        return Err(format!("fio failed: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    // Warnings may stand before it.
    let json: Value = serde_json::from_str(text.find('{').map_or("", |at| &text[at..]))?;
    Ok(json["jobs"][0].clone())
}

fn seconds(plan: &Plan) -> u64 {
    if plan.quick { 3 } else { 8 }
}

/// Measures reads and durable writes.
pub fn run(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    let version =
        machine::first_line("fio", &["--version"]).ok_or("fio is missing: install the package fio")?;
    report.versions.push(version);
    let size: u64 = if plan.quick { 1 << 30 } else { 4 << 30 };
    let directory = plan.directory.join("device");
    std::fs::create_dir_all(&directory)?;
    let (file, raw) = (image(&directory), directory.join("raw"));
    progress("device: writing the files once");
    for one in [&file, &raw] {
        let size = if one == &raw { 1 << 30 } else { size };
        fio(one, &["--rw=write".into(), "--bs=1M".into(), "--iodepth=8".into(), format!("--size={size}")])?;
    }
    let values = Values::new(VALUE_SIZE);
    writes_without_collection(plan, report, &directory, &values, size)?;
    let mut ours = Ours::open(&directory, Setup::plain(Start::Format), values.clone())?;
    let keys = size * 7 / 10 / (VALUE_SIZE as u64 + 64);
    progress("device: loading the engine");
    ours.load(keys, WRITERS)?;
    for depth in [32, 128] {
        reads(plan, report, &mut ours, &file, keys, depth)?;
    }
    let mut row = Writes::default();
    for run in 0..plan.runs {
        progress(&format!("device: durable writes, 70 % full, run {} of {}", run + 1, plan.runs));
        row.run(plan, &mut ours, &raw, keys, run)?;
    }
    report.rows.push(row.finish("with garbage collection, 70 % full"));
    drop(ours);
    std::fs::remove_dir_all(&directory)?;
    report.notes.push(format!(
        "device: fio reads 4 KiB blocks anywhere in the file that the engine keeps its data in; the engine reads {VALUE_SIZE}-byte values \
         of keys chosen uniformly, uncached, and verifies them"
    ));
    Ok(())
}

fn reads(
    plan: &Plan,
    report: &mut Report,
    ours: &mut Ours,
    file: &Path,
    keys: u64,
    depth: usize,
) -> Result<(), Failure> {
    let (mut own, mut bare) = (Runs::default(), Runs::default());
    for run in 0..plan.runs {
        progress(&format!("device: random reads at depth {depth}, run {} of {}", run + 1, plan.runs));
        let job = fio(
            file,
            &[
                "--readonly".into(),
                "--rw=randread".into(),
                "--bs=4k".into(),
                "--norandommap".into(),
                "--time_based".into(),
                format!("--iodepth={depth}"),
                format!("--runtime={}", seconds(plan)),
            ],
        )?;
        bare.0.push(job["read"]["iops"].as_f64().ok_or("fio says nothing of reads")?);
        let load = Load {
            workload: Workload::ReadUniform,
            keys,
            clients: depth,
            time: Duration::from_secs(seconds(plan)),
            seed: u64::from(run),
        };
        let tally = ours.run(&load)?;
        own.0.push(tally.count as f64 / tally.seconds);
    }
    let name = format!("GET of uncached 1 KiB records, one core, depth {depth}");
    let row = Row::new("device", name, "operations/s", Better::Higher, own, ("fio randread 4k", bare));
    report.rows.push(row.with_goal(0.95));
    Ok(())
}

/// Durable writes into a device that was just formatted, for less time than it takes to fill it: nothing is collected.
fn writes_without_collection(
    plan: &Plan,
    report: &mut Report,
    directory: &Path,
    values: &Values,
    size: u64,
) -> Result<(), Failure> {
    let raw = directory.join("raw");
    let mut row = Writes::default();
    for run in 0..plan.runs {
        progress(&format!("device: durable writes, newly formatted, run {} of {}", run + 1, plan.runs));
        let mut ours = Ours::open(directory, Setup::plain(Start::Format), values.clone())?;
        let keys = size / 20 / (VALUE_SIZE as u64 + 64);
        ours.load(keys, WRITERS)?;
        row.run(plan, &mut ours, &raw, keys, run)?;
        if ours.stats()?.gc.extents_collected > 0 {
            report.notes.push(format!("device: garbage was collected in run {} on a new device", run + 1));
        }
    }
    report.rows.push(row.finish("newly formatted"));
    Ok(())
}

/// Durable writes beside those of the bare file, run by run.
#[derive(Default)]
struct Writes {
    own: Runs,
    bare: Runs,
    block: u64,
}

impl Writes {
    fn run(&mut self, plan: &Plan, ours: &mut Ours, raw: &Path, keys: u64, run: u16) -> Result<(), Failure> {
        let before = ours.stats()?;
        let load = Load {
            workload: Workload::Overwrite,
            keys,
            clients: WRITERS,
            time: Duration::from_secs(seconds(plan)),
            seed: 1_000 + u64::from(run),
        };
        let tally = ours.run(&load)?;
        let after = ours.stats()?;
        let at = |quantile| tally.latencies.value_at_quantile(quantile);
        progress(&format!(
            "device: PUT latency p50 {} us, p99 {} us, p99.9 {} us, longest {} us; {} groups, {} flushes, {} MiB moved",
            at(0.5),
            at(0.99),
            at(0.999),
            tally.latencies.max(),
            after.groups - before.groups,
            after.flushes - before.flushes,
            (after.gc.bytes_moved - before.gc.bytes_moved) >> 20
        ));
        let user_bytes = tally.count * (VALUE_SIZE + key_of(0).len()) as u64;
        self.own.0.push(user_bytes as f64 / tally.seconds / 1e6);
        // The raw file gets what a group of ours is, followed by the same call.
        let group = (after.bytes_written - before.bytes_written) / (after.groups - before.groups).max(1);
        self.block = (group / 4_096).max(1) * 4_096;
        let job = fio(
            raw,
            &[
                "--rw=write".into(),
                format!("--bs={}", self.block),
                "--fdatasync=1".into(),
                "--iodepth=1".into(),
                "--time_based".into(),
                format!("--runtime={}", seconds(plan)),
                "--size=1g".into(),
                "--overwrite=1".into(),
            ],
        )?;
        self.bare.0.push(job["write"]["bw_bytes"].as_f64().ok_or("fio says nothing of writes")? / 1e6);
        Ok(())
    }

    fn finish(self, state: &str) -> Row {
        let name = format!("durable PUT, {WRITERS} writers, 1 KiB, {state}");
        let peer = format!("fio write {}k+sync", self.block >> 10);
        Row::new("device", name, "MB/s", Better::Higher, self.own, (peer, self.bare)).with_goal(0.8)
    }
}
