//! The command line: what a person types, and what they are told.
//!
//! Results go to standard output, everything else to standard error. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused
//! for safety; `check` and `salvage` add 4 (damage found) and 8 (could not run), `dump` 4 (something can't be read, and was left
//! out).

mod bench;
mod check;
mod config_file;
mod device;
mod device_path;
mod doctor;
mod dump;
mod engine_name;
mod export;
mod format;
mod inspect;
mod memory;
mod node_client;
mod profile;
mod progress;
mod qualify;
mod salvage;
mod serve;

use std::fmt::Display;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use self::device_path::DEVICE_DEFAULT;
use self::engine_name::EngineName;
use crate::engine::durability::Durability;
use crate::engine::io_queue::IoPolicy;
use crate::format::superblock::IndexKind;
use crate::limits::{CONNECTION_COUNT_MAX, REACTOR_COUNT_MAX, SHARD_COUNT_MAX};
use crate::reactor::cores::CoreList;
use crate::size;

/// A storage node: a log-structured key-value engine on one device, for Redis clients.
#[derive(Debug, Parser)]
#[command(name = "basalt", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a device to Redis clients; without arguments, ./basalt.img, created when it is not there.
    Serve(ServeArgs),
    /// Format a device. Refuses one that carries data.
    Format(FormatArgs),
    /// Read everything on a device and verify it: exit code 0 clean, 4 damage found, 8 could not run.
    Check(CheckArgs),
    /// Export everything that can be read of a device, damaged or not, to be loaded with `redis-cli --pipe` or `basalt restore`:
    /// exit code 0 everything, 4 something was lost or is in doubt, 8 could not run. Writes nothing to the device.
    Salvage(SalvageArgs),
    /// Save all keys of a running node, as they are at one moment, to a file for `restore` or `redis-cli --pipe`: exit code 0
    /// everything, 4 something that cannot be read was left out, 1 no dump.
    Dump(dump::DumpArgs),
    /// Load a file that `dump` or `salvage` wrote into a running node.
    Restore(dump::RestoreArgs),
    /// Show what is on a device that is not served: superblock, extents, one extent's records, one key's records.
    Inspect(inspect::InspectArgs),
    /// NVMe controllers: show them, give them to user space and back.
    Device(device::DeviceArgs),
    /// Measure what I/O engines get of a device: reads and writes over queue depth, and durable writes.
    Bench(bench::BenchArgs),
    /// Try out whether a device does what durability rests on, as far as software can see, and measure it: exit code 0 when nothing
    /// failed.
    Qualify(qualify::QualifyArgs),
    /// Look at this machine and explain what keeps a node from running well: exit code 0 when `serve` on a file works.
    Doctor(doctor::DoctorArgs),
}

/// When the device is told which space is free.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
enum Trim {
    /// On for a controller, off for a file.
    #[default]
    Auto,
    /// Always.
    On,
    /// Never.
    Off,
}

impl Trim {
    fn wanted(self) -> Option<bool> {
        match self {
            Trim::Auto => None,
            Trim::On => Some(true),
            Trim::Off => Some(false),
        }
    }
}

/// What the spdk engine takes; nothing to the others.
#[derive(Debug, Clone, Default, Args)]
struct SpdkArgs {
    /// Memory for SPDK and its DMA buffers [default: 512MiB, or what hugepages are free]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    spdk_memory: Option<u64>,
    /// Give SPDK ordinary pages even where hugepages are free.
    #[arg(long)]
    no_hugepages: bool,
    /// Seconds that a command may take; then it is aborted, and if that fails, the controller reset [default: 30]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600))]
    command_timeout: Option<u32>,
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// File, block device, or NVMe controller: 0000:01:00.0, or 'trtype:TCP traddr:... subnqn:...', with ns:N where it has
    /// several namespaces [default: ./basalt.img]
    #[arg(long, value_name = "PATH")]
    device: Option<PathBuf>,
    /// How it is read and written: uring, aio, pool, sync, buffered or spdk; uring with +registered, +unregistered, +sqpoll or
    /// +iopoll behind it [default: spdk for a controller; else uring, or sync where io_uring is forbidden]
    #[arg(long, value_name = "ENGINE")]
    engine: Option<EngineName>,
    /// Size of a file that is created, such as 4GiB or 4G; 4GB are 4,000,000,000 bytes. Whole blocks of 4 KiB [default: 4GiB]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    size: Option<u64>,
    /// Index of a device that is created: hash, or ordered, which knows the keys in order (as for format); where the device is there,
    /// it must be of that kind [default: hash]
    #[arg(long, value_name = "KIND")]
    index: Option<IndexKind>,
    /// Address and port; port 0 lets the kernel choose one [default: 127.0.0.1:6379]
    #[arg(long, value_name = "ADDRESS:PORT", value_parser = listen_address)]
    listen: Option<std::net::SocketAddr>,
    /// Cores to pin reactors to, one each, such as 0,1 or 0-3; with a controller they never sleep [default: unpinned
    /// reactors, see --reactors]
    #[arg(long, value_name = "LIST", conflicts_with = "reactors")]
    cores: Option<CoreList>,
    /// Reactors, pinned to no core [default: one per core, but one core is left to the kernel and to clients on this machine]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=REACTOR_COUNT_MAX as i64))]
    reactors: Option<u32>,
    /// When a write is acknowledged: always, interval=MS, bytes=N or never [default: always]
    #[arg(long, value_name = "MODE")]
    durability: Option<Durability>,
    /// Tell the device which space is free: on, off or auto, which is on for a controller and off for a file, where it punches
    /// holes [default: auto]
    #[arg(long, value_name = "WHEN")]
    trim: Option<Trim>,
    /// Bytes that each reactor writes between two checkpoints of the index, from which a start goes on; 0 writes them at a
    /// clean stop and at SAVE only [default: an eighth of the device, 64MiB to 1GiB]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    checkpoint_interval: Option<u64>,
    /// Connections that are served at a time [default: 10000, fewer where the limit on open files is lower]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=CONNECTION_COUNT_MAX as i64))]
    max_clients: Option<u32>,
    /// Memory that the node may take, such as 1GiB: for its index, its cache, and its clients' requests and replies [default:
    /// a quarter of the machine's memory, or of what this process's control group may have]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory: Option<u64>,
    /// Bytes a second that are read again to find damage; 0 for none [default: 8MiB]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    scrub_rate: Option<u64>,
    /// What the device can do, as `basalt qualify --profile` has measured it: costs of commands, bounds and queue depth follow
    /// from it [default: what most drives can do]
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// Order of commands to the device: shares, by what they are for, or fifo, as they come, to compare with [default: shares]
    #[arg(long, value_name = "POLICY")]
    scheduler: Option<IoPolicy>,
    /// Listen on an address that other machines can reach, although any client may read and write everything.
    #[arg(long)]
    allow_remote_clients: bool,
    /// TOML file with the same settings, named as the options; options win.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    spdk: SpdkArgs,
}

#[derive(Debug, Args)]
struct FormatArgs {
    /// File, block device or NVMe controller (as for serve); a file that is not there is created
    #[arg(long, value_name = "PATH")]
    device: PathBuf,
    /// How it is written (as for serve); the device is the same whichever it is
    #[arg(long, value_name = "ENGINE")]
    engine: Option<EngineName>,
    /// Size of a file that is created, such as 4GiB or 4G; 4GB are 4,000,000,000 bytes. Whole blocks of 4 KiB [default: 4GiB]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    size: Option<u64>,
    /// Shards that the keys are spread over: the most reactors that can ever share the device [default: four for each reactor that
    /// a node has on this machine, 4 to 64, and fewer on devices under 16 MiB for each]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=i64::from(SHARD_COUNT_MAX)))]
    shards: Option<u16>,
    /// What a shard knows of its keys in memory: hash, 16 bytes of each; ordered, also their names in order, for KV.RANGE, SCAN and
    /// KEYS of a prefix
    #[arg(long, value_name = "KIND", default_value_t = IndexKind::Hash)]
    index: IndexKind,
    /// A name for the device, up to 32 bytes
    #[arg(long, value_name = "NAME", default_value = "")]
    label: String,
    /// Leave the blocks of a file unwritten: formats at once, but the first write to each block takes longer
    #[arg(long)]
    quick: bool,
    /// Format although there is data on it. All of it is lost.
    #[arg(long)]
    force: bool,
    /// Serial number of the controller that --force is meant for
    #[arg(long, value_name = "NUMBER", requires = "force")]
    serial: Option<String>,
    #[command(flatten)]
    spdk: SpdkArgs,
}

#[derive(Debug, Args)]
struct CheckArgs {
    /// File, block device or NVMe controller, as for serve
    #[arg(long, value_name = "PATH", default_value = DEVICE_DEFAULT)]
    device: PathBuf,
    /// How it is read (as for serve)
    #[arg(long, value_name = "ENGINE")]
    engine: Option<EngineName>,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    spdk: SpdkArgs,
}

#[derive(Debug, Args)]
struct SalvageArgs {
    /// File, block device or NVMe controller, as for serve; no node may be serving it
    #[arg(long, value_name = "PATH", default_value = DEVICE_DEFAULT)]
    device: PathBuf,
    /// File for the keys, as RESP commands; - is standard output
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
    /// Leave out keys whose value may not be the newest, because newer records may have been lost.
    #[arg(long)]
    only_certain: bool,
    /// Replace the file if it is there.
    #[arg(long)]
    force: bool,
    /// Summary as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    spdk: SpdkArgs,
}

/// What a command ended with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Exit {
    #[default]
    Done,
    Failed,
    Usage,
    Refused,
    DamageFound,
    CouldNotRun,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(match exit {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::Refused => 3,
            Exit::DamageFound => 4,
            Exit::CouldNotRun => 8,
        })
    }
}

/// Runs a command and returns its exit code.
pub fn run(cli: Cli) -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("BASALT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        .init();
    match cli.command {
        Command::Serve(args) => serve::serve(args),
        Command::Format(args) => format::format(&args),
        Command::Check(args) => check::check(&args),
        Command::Salvage(args) => salvage::salvage(&args),
        Command::Dump(args) => dump::dump(&args),
        Command::Restore(args) => dump::restore(&args),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Device(args) => device::device(&args),
        Command::Bench(args) => bench::bench(&args),
        Command::Qualify(args) => qualify::qualify(&args),
        Command::Doctor(args) => doctor::doctor(&args),
    }
    .into()
}

/// A line for the user on standard output. A closed pipe is no reason to stop.
fn say(text: impl Display) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// A line beside the result, on standard error.
fn note(text: impl Display) {
    let _ = writeln!(std::io::stderr().lock(), "basalt: {text}");
}

/// An error, on standard error, and the exit code that goes with it.
fn fail(exit: Exit, text: impl Display) -> Exit {
    let _ = writeln!(std::io::stderr().lock(), "basalt: error: {text}");
    exit
}

/// The same of a command that reports on a device, as an object on standard output too where a script asks for JSON.
fn fail_on(device: impl Display, is_json: bool, exit: Exit, text: impl Display) -> Exit {
    if is_json {
        say(serde_json::json!({ "device": device.to_string(), "error": text.to_string() }));
    }
    fail(exit, text)
}

/// An address to listen on. Names are not looked up: what they mean may change.
fn listen_address(text: &str) -> Result<std::net::SocketAddr, String> {
    text.parse()
        .map_err(|_| "it is an IP address and a port, such as 127.0.0.1:6379 or [::1]:6379".to_owned())
}
