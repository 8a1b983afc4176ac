//! Basalt beside its peers: `scripts/bench` builds and runs this.
//!
//! Sections: `device` (what the bare file can do, beside what the engine gets of it), `engine` (the engine beside other stores in
//! process, by YCSB's workloads), `restart` (how long a start takes) and `server` (a node beside redis-server). All sides take turns within each run, so
//! that what the machine does meanwhile meets all of them; ratios are of medians.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a benchmark prints its figures")]

mod cgroup;
mod device;
mod engine;
mod html;
mod machine;
mod report;
mod restart;
mod server;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};

use machine::Machine;
use report::Report;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Section {
    /// The bare file, and the engine on it.
    Device,
    /// The engine beside other stores.
    Engine,
    /// How long a start takes.
    Restart,
    /// The node beside redis-server.
    Server,
}

/// Measures Basalt beside its peers, in one run on one machine.
#[derive(Debug, Parser)]
#[command(name = "scripts/bench", version)]
struct Args {
    /// 3 short runs of everything instead of 5 longer ones
    #[arg(long)]
    quick: bool,
    /// Only these parts
    #[arg(long, value_delimiter = ',', default_value = "device,engine,restart,server")]
    only: Vec<Section>,
    /// Runs, instead of 5 (or 3)
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=99))]
    runs: Option<u16>,
    /// Write the figures as JSON to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a page with plots to this file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Where data is kept while it runs: a directory on the device that is to be measured
    #[arg(long, value_name = "DIRECTORY", default_value = "target", overrides_with = "dir")]
    dir: PathBuf,
    /// The program to measure as a server
    #[arg(long, value_name = "FILE", env = "BASALT", hide = true)]
    basalt: Option<PathBuf>,
    /// What a process of one store is to do
    #[arg(long, hide = true)]
    task: Option<String>,
    /// What a process of the restarts is to do
    #[arg(long, hide = true)]
    restart_task: Option<String>,
    /// Fill an index with so many keys
    #[arg(long, hide = true)]
    index_keys: Option<u64>,
}

/// What every section is told.
pub struct Plan {
    /// A directory of its own, removed at the end.
    pub directory: PathBuf,
    /// The program.
    pub basalt: PathBuf,
    /// How often each side is measured.
    pub runs: u16,
    /// Shorter measurements.
    pub quick: bool,
}

/// Why there are no figures.
pub type Failure = Box<dyn std::error::Error>;

/// Says what is under way.
pub fn progress(text: &str) {
    eprintln!("{text}");
}

fn main() -> ExitCode {
    let args = Args::parse();
    let outcome = match (&args.task, &args.restart_task, args.index_keys) {
        (Some(task), _, _) => engine::run_task(task),
        (None, Some(task), _) => restart::run_task(task),
        (None, None, Some(keys)) => {
            engine::fill_index(keys);
            Ok(())
        }
        (None, None, None) => run(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("scripts/bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Failure> {
    std::fs::create_dir_all(&args.dir)?;
    let directory = tempfile::Builder::new().prefix("bench.").tempdir_in(&args.dir)?;
    let runs = args.runs.unwrap_or(if args.quick { 3 } else { 5 });
    let plan = Plan {
        directory: directory.path().to_owned(),
        basalt: args.basalt.clone().unwrap_or_else(|| "basalt".into()),
        runs,
        quick: args.quick,
    };
    let command: Vec<String> = std::env::args().skip(1).collect();
    let mut report = Report {
        machine: Machine::here(&args.dir),
        command: format!("scripts/bench {}", command.join(" ")),
        versions: Vec::new(),
        rows: Vec::new(),
        notes: Vec::new(),
    };
    for section in &args.only {
        match section {
            Section::Device => device::run(&plan, &mut report)?,
            Section::Engine => engine::run(&plan, &mut report)?,
            Section::Restart => restart::run(&plan, &mut report)?,
            Section::Server => server::run(&plan, &mut report)?,
        }
    }
    print!("{}", report::table(&report));
    if let Some(file) = &args.html {
        std::fs::write(file, html::page(&report))?;
    }
    if let Some(file) = &args.json {
        std::fs::write(file, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    Ok(())
}
