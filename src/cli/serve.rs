//! `basalt serve`: opens or creates a device, recovers, and serves it until told to stop.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::device_path::{self, DEVICE_DEFAULT, OpenOptions, with_namespace};
use super::engine_name::EngineName;
use super::profile::{Disk, Profile};
use super::progress::Progress;
use super::{Exit, ServeArgs, config_file, fail, format, memory, note, say};
use crate::device::Namespace;
use crate::device::file::whole_blocks;
use crate::engine::device_format::{OpenError, read_superblock};
use crate::engine::io_queue::IoPolicy;
use crate::engine::io_queue::cost::DeviceProfile;
use crate::format::superblock::IndexKind;
use crate::limits::{CONNECTION_COUNT_MAX, REACTOR_COUNT_MAX, SCRUB_RATE_DEFAULT};
use crate::net::port::Port;
use crate::node::shared::ProfileSource;
use crate::node::{self, Node, NodeConfig, NodeError, Opened};
use crate::reactor::{SpinPolicy, cores};
use crate::size;

const LISTEN_DEFAULT: ([u8; 4], u16) = ([127, 0, 0, 1], 6379);

/// Descriptors that a node needs beside its connections, with room to spare.
const DESCRIPTORS_RESERVED: u64 = 64;

pub(super) fn serve(mut args: ServeArgs) -> Exit {
    if let Some(path) = args.config.take()
        && let Err(text) = config_file::apply(&mut args, &path)
    {
        return fail(Exit::Usage, text);
    }
    if let Some(why) = args.engine.and_then(EngineName::why_not_served) {
        return fail(Exit::Refused, why);
    }
    let listen = args.listen.unwrap_or_else(|| SocketAddr::from(LISTEN_DEFAULT));
    if !listen.ip().is_loopback() && !args.allow_remote_clients {
        return fail(
            Exit::Refused,
            format!(
                "{listen} can be reached from other machines, and any client may read and write everything: \
                 listen on 127.0.0.1, or say --allow-remote-clients"
            ),
        );
    }
    let reactors = match reactor_cores(&args) {
        Ok(reactors) => reactors,
        Err(text) => return fail(Exit::Usage, text),
    };
    let memory = match memory::size_max(args.memory, reactors.len()) {
        Ok(size) => size,
        Err(text) => return fail(Exit::Usage, text),
    };
    let profile = match args.profile.as_deref().map(|path| Profile::read(path).map(|read| (path, read))) {
        None => None,
        Some(Ok(found)) => Some(found),
        Some(Err(text)) => return fail(Exit::Usage, text),
    };
    // The port comes first: a second start on the same port is told so before it waits for the device or recovers it.
    let mut port = match Port::bind(listen) {
        Ok(port) => port,
        Err(error) => return fail(Exit::Failed, error),
    };
    let path = args.device.clone().unwrap_or_else(|| PathBuf::from(DEVICE_DEFAULT));
    if let Some((file, profile)) = &profile
        && is_to_be_made(&path, &args)
    {
        // Nothing is made for a node that will not be served.
        let engine = args.engine.unwrap_or_else(|| device_path::engine_default(&path));
        if let Err(text) = profile.check(file, &engine.to_string(), &Disk::beneath_new(&path)) {
            return fail(Exit::Usage, text);
        }
    }
    match prepare_device(&path, &args) {
        Ok(()) => {}
        Err((exit, text)) => return fail(exit, text),
    }
    let options = OpenOptions {
        engine: args.engine,
        spdk: Some(&args.spdk),
        // While one reactor opens the device anew, the others have theirs.
        queue_count: reactors.len() + 1,
        ..OpenOptions::default()
    };
    let namespace = match device_path::open(&path, options) {
        Ok(namespace) => namespace,
        Err(error) => return fail(Exit::Failed, error),
    };
    let engine = with_namespace!(&namespace, namespace => namespace.geometry().engine);
    let disk = || Disk::beneath(&path, namespace.model_and_serial());
    let source = profile.as_ref().map(|(file, profile)| profile.check(file, engine, &disk()));
    let source = match source.transpose() {
        Ok(source) => source.unwrap_or_default(),
        Err(text) => return fail(Exit::Usage, text),
    };
    if let Some(doubt) = profile.as_ref().and_then(|(file, profile)| profile.doubt(file, source)) {
        note(doubt);
    }
    let figures = profile.map(|(_, profile)| profile.figures().clone());
    if figures.is_some() && args.scheduler == Some(IoPolicy::Fifo) {
        note("what --profile says is not needed with --scheduler fifo: commands go as they come");
    }
    let served = with_namespace!(namespace, namespace => {
        serve_on(namespace, &args, (figures, source), reactors, memory, &mut port)
    });
    match served {
        Ok(()) => Exit::Done,
        Err(error @ NodeError::Open { source: OpenError::OtherIndex { .. }, .. }) => fail(Exit::Usage, error),
        Err(error) => fail(Exit::Failed, error),
    }
}

/// The core of each reactor: those that were named, else unpinned ones, as many as wanted or as cores can be used but one: what
/// the kernel does for sockets and files, and clients on the same machine, would take its time from reactors that wait for each
/// other.
fn reactor_cores(args: &ServeArgs) -> Result<Vec<Option<usize>>, String> {
    match &args.cores {
        Some(list) => {
            list.check().map_err(|error| error.to_string())?;
            Ok(list.cores().iter().map(|core| Some(*core)).collect())
        }
        None => {
            let count = args.reactors.map_or_else(default_reactor_count, |count| count as usize);
            Ok(vec![None; count])
        }
    }
}

/// Reactors of a node on this machine that was not told how many.
pub(super) fn default_reactor_count() -> usize {
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    // Naming cores is how a reactor is pinned: the usable ones are only counted here.
    let usable = cores::usable().map_or(count, |cores| cores.len());
    count.min(usable).saturating_sub(1).clamp(1, REACTOR_COUNT_MAX)
}

/// Whether [`prepare_device`] will create a file.
fn is_to_be_made(path: &Path, args: &ServeArgs) -> bool {
    device_path::transport_id(path).is_none()
        && args.engine != Some(EngineName::Spdk)
        && path.symlink_metadata().is_err()
}

/// Creates the file when there is none.
fn prepare_device(path: &Path, args: &ServeArgs) -> Result<(), (Exit, String)> {
    let size = args.size;
    if device_path::transport_id(path).is_some() {
        return match size {
            Some(_) => {
                Err((Exit::Usage, format!("the size of {} is what it is: leave --size out", path.display())))
            }
            None => Ok(()),
        };
    }
    if args.engine == Some(EngineName::Spdk) {
        // It drives no files, which opening says; none is made for that.
        return Ok(());
    }
    if is_to_be_made(path, args) {
        let size = size.unwrap_or(format::SIZE_DEFAULT);
        note(format!("{} is not there: creating it with {}", path.display(), size::show(size)));
        let reactor_count = reactor_cores(args).map_err(|text| (Exit::Usage, text))?.len();
        return format::create_for_serve(
            path,
            size,
            args.engine,
            args.index.unwrap_or_default(),
            reactor_count,
        );
    }
    // A file that is there keeps its size; saying another one is a mistake that must not pass unnoticed.
    if let Some(size) = size
        && let Ok(metadata) = path.metadata()
        && metadata.is_file()
        && metadata.len() != whole_blocks(size)
    {
        let (there, said) = size::show_apart(metadata.len(), size);
        let text = format!(
            "{} has {there} and --size says {said}: leave --size out, or name another file",
            path.display()
        );
        return Err((Exit::Usage, text));
    }
    Ok(())
}

/// Raises the limit on open files as far as it goes and returns how many connections fit.
fn connection_count(wanted: Option<u32>) -> usize {
    let limit = getrlimit(Resource::Nofile);
    let wanted = wanted.map_or(CONNECTION_COUNT_MAX as u64, u64::from);
    let needed = wanted + DESCRIPTORS_RESERVED;
    let current = limit.current.unwrap_or(u64::MAX);
    if current < needed {
        let raised = limit.maximum.map_or(needed, |maximum| maximum.min(needed));
        let set = setrlimit(Resource::Nofile, Rlimit { current: Some(raised), maximum: limit.maximum });
        let current = if set.is_ok() { raised } else { current };
        return wanted.min(current.saturating_sub(DESCRIPTORS_RESERVED).max(1)) as usize;
    }
    wanted as usize
}

/// A device keeps the index that it was formatted with; saying another one is a mistake that must not pass unnoticed.
fn check_index<N: Namespace>(namespace: &N, wanted: IndexKind) -> Result<(), NodeError> {
    let failed = |source| NodeError::Open { device: namespace.name().to_owned(), source };
    let formatted = read_superblock(&mut namespace.open_queue()?).map_err(failed)?.superblock.index;
    if formatted != wanted { Err(failed(OpenError::OtherIndex { formatted, wanted })) } else { Ok(()) }
}

fn serve_on<N: Namespace>(
    namespace: N,
    args: &ServeArgs,
    (io_profile, io_profile_source): (Option<DeviceProfile>, ProfileSource),
    mut reactors: Vec<Option<usize>>,
    memory_size_max: u64,
    port: &mut Port,
) -> Result<(), NodeError> {
    if let Some(wanted) = args.index {
        check_index(&namespace, wanted)?;
    }
    let mut progress = Progress::new("recovering");
    let opened = node::open(namespace, reactors.len(), memory_size_max, &mut |at| {
        progress.show(at.done, at.total);
    })?;
    progress.end();
    for text in &opened.notes {
        note(text);
    }
    for torn in &opened.torn_tails {
        note(format!(
            "shard {}: cut a write that was in flight at the last crash; no acknowledged data is affected",
            torn.shard
        ));
    }
    let shards = usize::from(opened.superblock.shard_count);
    if reactors.len() > shards {
        note(format!(
            "{shards} shards keep at most {shards} of {} reactors busy; the others are not started",
            reactors.len()
        ));
        reactors.truncate(shards);
    }
    let durability = args.durability.unwrap_or_default();
    // Cores that were given to reactors are theirs: what SPDK polls wakes nobody.
    let is_polled = opened.namespace.geometry().engine == "spdk" && args.cores.is_some();
    let config = NodeConfig {
        durability,
        checkpoint_interval: args.checkpoint_interval,
        trim: args.trim.unwrap_or_default().wanted(),
        spin: if is_polled { SpinPolicy::Forever } else { SpinPolicy::default() },
        cores: reactors,
        connection_count_max: connection_count(args.max_clients),
        memory_size_max,
        scrub_rate: args.scrub_rate.unwrap_or(SCRUB_RATE_DEFAULT),
        io_policy: args.scheduler.unwrap_or_default(),
        io_profile,
        io_profile_source,
        ..NodeConfig::default()
    };
    let summary = summary(&opened);
    let signals =
        Signals::new([SIGINT, SIGTERM]).map_err(|source| NodeError::Os { action: "take signals", source })?;
    let node = node::start(opened, Some(port), &config)?;
    stop_on_signals(&node, signals);
    say(format!(
        "basalt {}: {summary}, durability {durability}, {}, {} of memory, listening on {}",
        env!("CARGO_PKG_VERSION"),
        size::count(config.cores.len() as u64, "reactor"),
        size::show(memory_size_max),
        port.address()
    ));
    node.run()?;
    note("stopped cleanly");
    Ok(())
}

fn summary<N: Namespace>(opened: &Opened<N>) -> String {
    let geometry = opened.namespace.geometry();
    format!(
        "{} ({}, {}, {}), {} recovered from {} of checkpoints and {} of log in {:.2} s",
        opened.namespace.name(),
        size::show(opened.superblock.layout.device_size),
        geometry.engine,
        size::count(opened.superblock.shard_count.into(), "shard"),
        size::count(opened.keys, "key"),
        size::show(opened.checkpoint_bytes),
        size::show(opened.log_bytes),
        opened.duration.as_secs_f64()
    )
}

/// A signal that comes so soon after the first is the same wish: supervisors send it to a process and to its group.
const SIGNAL_GRACE: Duration = Duration::from_millis(500);

/// The first signal stops the node cleanly; a later one ends the process at once, as somebody who insists expects.
fn stop_on_signals(node: &Node, mut signals: Signals) {
    let stop = node.stop_sender();
    std::thread::spawn(move || {
        let mut first: Option<Instant> = None;
        for _ in signals.forever() {
            match first {
                Some(at) if at.elapsed() < SIGNAL_GRACE => continue,
                Some(_) => {
                    note("ending at once: what was not yet acknowledged may be lost");
                    std::process::exit(1);
                }
                None => first = Some(Instant::now()),
            }
            if stop.send(true).is_err() {
                std::process::exit(1);
            }
            note("stopping: finishing what was taken (a second signal ends at once)");
        }
    });
}
