//! How long a node takes to be there again: after a clean stop, and killed in the middle of writes. Beside it, the time that
//! fio takes for as many bytes of the same file.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::device::fio;
use crate::engine::load::{Load, Values, Workload};
use crate::engine::ours::{Ours, Setup, Start, image};
use crate::engine::resident;
use crate::report::{Better, Report, Row, Runs};
use crate::{Failure, Plan, progress};

/// Small, so that what counts is the number of keys.
const VALUE_SIZE: usize = 16;

/// Bytes of log between the checkpoint and the kill.
const LOG_SIZE: u64 = 1 << 30;

const WRITERS: usize = 256;

/// What a process is to do with the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Phase {
    /// Make it, load it, stop.
    Load,
    /// Open it, and end without a stop.
    Open,
    /// Open it, and stop.
    Stop,
    /// Open it, and write until the end comes from outside.
    Write,
}

/// What a process is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Task {
    directory: PathBuf,
    phase: Phase,
    keys: u64,
}

/// What it found.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Found {
    seconds: f64,
    bytes_read: u64,
    resident_per_key: f64,
}

/// Runs as one of the processes.
pub fn run_task(text: &str) -> Result<(), Failure> {
    let task: Task = serde_json::from_str(text)?;
    let values = Values::new(VALUE_SIZE);
    let size = (task.keys * 160).max(1 << 30) + 4 * LOG_SIZE;
    let start = if task.phase == Phase::Load { Start::Create(size) } else { Start::Open };
    let begun = Instant::now();
    let mut ours = Ours::open(&task.directory, Setup::plain(start), values)?;
    if task.phase != Phase::Load {
        ours.get_one(task.keys - 1)?;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let bytes_read = ours.recovery_bytes();
    let before = resident();
    match task.phase {
        Phase::Load => ours.load(task.keys, WRITERS)?,
        Phase::Open | Phase::Stop => {}
        Phase::Write => {
            let until = ours.stats()?.bytes_written + LOG_SIZE;
            while ours.stats()?.bytes_written < until {
                overwrite(&mut ours, task.keys)?;
            }
        }
    }
    let resident_per_key = (resident().saturating_sub(before)) as f64 / task.keys as f64;
    if matches!(task.phase, Phase::Load | Phase::Stop) {
        ours.stop()?;
    }
    println!("{}", serde_json::to_string(&Found { seconds, bytes_read, resident_per_key })?);
    std::io::stdout().flush()?;
    if task.phase == Phase::Write {
        loop {
            overwrite(&mut ours, task.keys)?;
        }
    }
    Ok(())
}

fn overwrite(ours: &mut Ours, keys: u64) -> Result<(), Failure> {
    let time = Duration::from_millis(200);
    let load = Load { workload: Workload::Overwrite, keys, clients: WRITERS, time, seed: 3 };
    ours.run(&load).map(|_| ())
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(directory: &Path, phase: Phase, keys: u64) -> Result<Found, Failure> {
    let task = Task { directory: directory.to_owned(), phase, keys };
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--restart-task", &serde_json::to_string(&task)?])
        .stdout(Stdio::piped())
        .spawn()?;
    let out = child.stdout.take().ok_or("the process has no output")?;
    let mut running = Running(child);
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line)?;
    if line.is_empty() {
        return Err(format!("{phase:?} of the restarts ended without figures: {}", running.0.wait()?).into());
    }
    if phase != Phase::Write {
        running.0.wait()?;
    }
    Ok(serde_json::from_str(&line)?)
}

/// Measures both restarts.
pub fn run(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    let keys: u64 = if plan.quick { 5_000_000 } else { 100_000_000 };
    let directory = plan.directory.join("restart");
    std::fs::create_dir_all(&directory)?;
    progress(&format!("restart: loading {keys} keys"));
    let loaded = start(&directory, Phase::Load, keys)?;
    let (mut clean, mut clean_raw) = (Runs::default(), Runs::default());
    for run in 0..plan.runs {
        progress(&format!("restart: after a clean stop, run {} of {}", run + 1, plan.runs));
        let found = start(&directory, Phase::Open, keys)?;
        clean.0.push(found.seconds);
        clean_raw.0.push(raw_seconds(&image(&directory), found.bytes_read)?);
        if run + 1 < plan.runs {
            // Opening it counted as a start that did not stop; a clean stop comes first again.
            start(&directory, Phase::Stop, keys)?;
        }
    }
    progress("restart: writing a GiB, and kill -9");
    start(&directory, Phase::Write, keys)?;
    let (mut killed, mut killed_raw) = (Runs::default(), Runs::default());
    for run in 0..plan.runs {
        progress(&format!("restart: after kill -9, run {} of {}", run + 1, plan.runs));
        let found = start(&directory, Phase::Open, keys)?;
        killed.0.push(found.seconds);
        killed_raw.0.push(raw_seconds(&image(&directory), found.bytes_read)?);
    }
    std::fs::remove_dir_all(&directory)?;
    let row = |name: String, ours, raw| {
        Row::new("restart", name, "s", Better::Lower, ours, ("fio, same bytes", raw)).with_goal(2.0)
    };
    report.rows.push(row(format!("{keys} keys, after a clean stop"), clean, clean_raw));
    report.rows.push(row(format!("{keys} keys, after kill -9 behind 1 GiB of log"), killed, killed_raw));
    let per_key = Runs(vec![loaded.resident_per_key]);
    let name = format!("resident memory of the process for each of {keys} keys");
    report.rows.push(
        Row::new("restart", name, "bytes", Better::Lower, per_key, ("its goal", Runs(vec![16.0])))
            .with_goal(1.0),
    );
    Ok(())
}

/// What fio takes to read so many bytes of the file in order.
fn raw_seconds(file: &Path, bytes: u64) -> Result<f64, Failure> {
    let job = fio(
        file,
        &[
            "--readonly".into(),
            "--rw=read".into(),
            "--bs=1M".into(),
            "--iodepth=8".into(),
            format!("--size={}", bytes.max(64 << 20)),
        ],
    )?;
    let per_second = job["read"]["bw_bytes"].as_f64().ok_or("fio says nothing of reads")?;
    Ok(bytes as f64 / per_second)
}
