//! Basalt's engine in this process: on a file, on one core or several, operations in flight as a node's clients would have them.

mod worker;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use basalt::device::Namespace;
use basalt::device::file::FileOptions;
use basalt::device::uring::UringNamespace;
use basalt::engine::allocator::Allocator;
use basalt::engine::device_format::{FormatOptions, format};
use basalt::engine::durability::Durability;
use basalt::engine::io_queue::IoSettings;
use basalt::engine::memory::MemoryBudget;
use basalt::engine::op::ShardId;

use basalt::engine::{Engine, EngineStats, ShardState};
use basalt::format::slot::shard_of;
use basalt::format::superblock::IndexKind;
use basalt::limits::{MAILBOX_RING_CAPACITY, default_shard_count};
use basalt::reactor::mesh;

use self::worker::{Ending, Worker, clock};
use super::load::{Load, Tally, Values, key_of};
use crate::Failure;

/// An engine for each core, on an image.
pub struct Ours {
    cores: Vec<Core>,
    shard_count: u16,
    allocator: Arc<Allocator>,
    extent_size: u64,
    recovery_bytes: u64,
}

/// What to make of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// A new one of so many bytes.
    Create(u64),
    /// A file that is there is formatted.
    Format,
    /// It holds data.
    Open,
}

/// The image in a directory.
pub fn image(directory: &Path) -> PathBuf {
    directory.join("basalt.img")
}

/// How an image is used.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// What to make of it first.
    pub start: Start,
    /// The index, where it is formatted.
    pub index: IndexKind,
    /// Bytes of cache, of all cores together.
    pub cache_size: usize,
    /// Cores.
    pub cores: usize,
}

impl Setup {
    /// One core and no cache.
    pub fn plain(start: Start) -> Setup {
        Setup { start, index: IndexKind::Hash, cache_size: 0, cores: 1 }
    }
}

impl Ours {
    /// Opens the image of a directory.
    pub fn open(directory: &Path, setup: Setup, values: Values) -> Result<Ours, Failure> {
        let file = image(directory);
        let started = Instant::now();
        let create_size = match setup.start {
            Start::Create(size) => Some(size),
            Start::Format | Start::Open => None,
        };
        let options = FileOptions { create_size, ..FileOptions::default() };
        let namespace = UringNamespace::open(&file, &options)?;
        if setup.start != Start::Open {
            let mut queue = namespace.open_queue()?;
            let uuid = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
            let uuid = uuid.to_le_bytes();
            let options = FormatOptions {
                shard_count: default_shard_count(setup.cores, std::fs::metadata(&file)?.len()),
                uuid,
                secret: uuid,
                label: "bench".to_owned(),
                index: setup.index,
            };
            format(&mut queue, &options, clock(started))?;
        }
        let opened = basalt::node::open(namespace, 2, u64::MAX, &mut |_| {})?;
        let extent_size = opened.superblock.layout.extent_size;
        let recovery_bytes = opened.checkpoint_bytes + opened.log_bytes;
        let allocator = Arc::clone(&opened.allocator);
        let shard_count = opened.superblock.shard_count;
        let io = IoSettings { queue_count: setup.cores as u32, ..IoSettings::default() };
        let (namespace, superblock) = (Arc::new(opened.namespace), opened.superblock);
        let mut states = opened.states.into_iter().peekable();
        let mut cores = Vec::new();
        for (index, end) in mesh(setup.cores, MAILBOX_RING_CAPACITY).into_iter().enumerate() {
            let is_own = |state: &ShardState| core_of(state.id(), setup.cores, shard_count) == index;
            let own: Vec<ShardState> = std::iter::from_fn(|| states.next_if(is_own)).collect();
            let (namespace, superblock) = (Arc::clone(&namespace), Arc::clone(&superblock));
            let (allocator, io, values) = (Arc::clone(&allocator), io.clone(), values.clone());
            // An engine stays on the thread that made it.
            cores.push(Core::start(move || {
                let queue = namespace.open_queue()?;
                let mut engine = Engine::new(superblock, allocator, queue, own, Durability::Always);
                engine.set_io(&io);
                engine.settle(clock(started))?;
                let cache_size_max = setup.cache_size / setup.cores;
                engine.set_memory(MemoryBudget { cache_size_max, ..MemoryBudget::default() });
                Ok(Worker::new(engine, end, shard_count, started, values))
            })?);
        }
        cores.iter().try_for_each(Core::wait)?;
        Ok(Ours { cores, shard_count, allocator, extent_size, recovery_bytes })
    }

    /// Has every core do its part.
    fn on_each<T: Send + 'static>(
        &self,
        work: impl Fn(&mut Worker, &Ending) -> Result<T, Failure> + Send + Sync + 'static,
    ) -> Result<Vec<T>, Failure> {
        let shared = Arc::new((Ending::new(self.cores.len()), work));
        let ask = |core: &Core| {
            let shared = Arc::clone(&shared);
            core.ask(move |worker| {
                let (ending, work) = &*shared;
                work(worker, ending).inspect_err(|_| ending.fail())
            })
        };
        let answers: Vec<_> = self.cores.iter().map(ask).collect();
        answers.into_iter().map(|answer| answer?.wait()).collect()
    }

    /// Writes keys `0..count` once each; they are durable at the end.
    pub fn load(&mut self, count: u64, depth: usize) -> Result<(), Failure> {
        let depth = depth.div_ceil(self.cores.len());
        self.set_durability(Durability::Never)?;
        self.on_each(move |worker, ending| worker.load(count, depth, ending))?;
        self.set_durability(Durability::Always)?;
        self.on_each(Worker::sync).map(|_| ())
    }

    fn set_durability(&mut self, durability: Durability) -> Result<(), Failure> {
        let set = move |worker: &mut Worker, _: &Ending| {
            worker.engine.set_durability(durability);
            Ok(())
        };
        self.on_each(set).map(|_| ())
    }

    /// Clients that each wait for one answer before they ask again, for a while.
    pub fn run(&mut self, load: &Load) -> Result<Tally, Failure> {
        let load = *load;
        self.on_each(move |worker, ending| worker.run(&load, ending)).map(together)
    }

    /// Scans of a device with the index `ordered`: clients that each wait for one before they begin another, for a while.
    pub fn scan(&mut self, load: &Load) -> Result<Tally, Failure> {
        let load = *load;
        self.on_each(move |worker, ending| worker.scan(&load, ending)).map(together)
    }

    /// Bytes that were read to open it.
    pub fn recovery_bytes(&self) -> u64 {
        self.recovery_bytes
    }

    /// Stops cleanly.
    pub fn stop(&mut self) -> Result<(), Failure> {
        let stop = |worker: &mut Worker| Ok(worker.engine.stop(clock(worker.started), &mut Vec::new())?);
        self.cores.iter().try_for_each(|core| core.ask(stop)?.wait())
    }

    /// Bytes of the device that are in use.
    pub fn space_used(&self) -> u64 {
        u64::from(self.allocator.count() - self.allocator.available_count()) * self.extent_size
    }

    /// Reads one key.
    pub fn get_one(&mut self, number: u64) -> Result<(), Failure> {
        let shard = shard_of(key_of(number).as_bytes(), self.shard_count);
        let core = &self.cores[core_of(shard, self.cores.len(), self.shard_count)];
        core.ask(move |worker| worker.get_one(number))?.wait()
    }

    /// What the engines count.
    pub fn stats(&self) -> Result<EngineStats, Failure> {
        let mut all = EngineStats::default();
        for stats in self.on_each(|worker, _| Ok(worker.engine.stats()))? {
            all.bytes_written += stats.bytes_written;
            all.groups += stats.groups;
            all.flushes += stats.flushes;
            all.gc.bytes_moved += stats.gc.bytes_moved;
            all.gc.extents_collected += stats.gc.extents_collected;
        }
        Ok(all)
    }
}

/// A core's thread, with its engine. It ends with this.
struct Core {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

type Job = Box<dyn FnOnce(&mut Result<Worker, String>) + Send>;

/// What a core was asked for. A failure's words leave its thread, not the failure.
struct Asking<T>(Receiver<Result<T, String>>);

impl<T> Asking<T> {
    fn wait(self) -> Result<T, Failure> {
        Ok(self.0.recv().map_err(|_| "a core's thread has ended")??)
    }
}

impl Core {
    fn start(make: impl FnOnce() -> Result<Worker, Failure> + Send + 'static) -> Result<Core, Failure> {
        let (jobs, received) = channel::<Job>();
        let thread = std::thread::Builder::new().name("core".to_owned()).spawn(move || {
            let mut worker = make().map_err(|failure| failure.to_string());
            for job in received {
                job(&mut worker);
            }
        })?;
        Ok(Core { jobs: Some(jobs), thread: Some(thread) })
    }

    fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Worker) -> Result<T, Failure> + Send + 'static,
    ) -> Result<Asking<T>, Failure> {
        let (answer, asking) = channel();
        let job = move |worker: &mut Result<Worker, String>| {
            let done = match worker {
                Ok(worker) => work(worker).map_err(|failure| failure.to_string()),
                Err(why) => Err(why.clone()),
            };
            // Nobody waits for it any more where another core has failed.
            let _ = answer.send(done);
        };
        let jobs = self.jobs.as_ref().ok_or("the core is stopped")?;
        jobs.send(Box::new(job)).map_err(|_| "a core's thread has ended")?;
        Ok(Asking(asking))
    }

    /// Until it is ready.
    fn wait(&self) -> Result<(), Failure> {
        self.ask(|_| Ok(()))?.wait()
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn core_of(shard: ShardId, cores: usize, shard_count: u16) -> usize {
    usize::from(shard.0) * cores / usize::from(shard_count)
}

fn together(tallies: Vec<Tally>) -> Tally {
    let mut all = Tally::new();
    for one in tallies {
        all.merge(&one);
        all.seconds = all.seconds.max(one.seconds);
    }
    all
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::load::Workload;
    use super::*;

    #[test]
    fn cores_serve_each_others_clients_and_find_everything_again() {
        let directory = tempfile::tempdir().unwrap();
        let (keys, values) = (2_000, Values::new(100));
        let setup = Setup {
            start: Start::Create(64 << 20),
            index: IndexKind::Ordered,
            cache_size: 1 << 20,
            cores: 2,
        };
        let mut ours = Ours::open(directory.path(), setup, values.clone()).unwrap();
        ours.load(keys, 64).unwrap();
        for workload in Workload::ALL {
            let load = Load { workload, keys, clients: 8, time: Duration::from_millis(50), seed: 1 };
            let tally = if workload == Workload::Scan { ours.scan(&load) } else { ours.run(&load) };
            let tally = tally.unwrap();
            assert!(tally.count >= 8, "{workload:?}: {} operations", tally.count);
            assert_eq!(tally.writes == tally.count, workload == Workload::Overwrite);
        }
        assert!(ours.stats().unwrap().bytes_written > keys * 100);
        ours.stop().unwrap();
        drop(ours);
        let setup = Setup { start: Start::Open, cores: 3, ..setup };
        let mut ours = Ours::open(directory.path(), setup, values).unwrap();
        (0..keys).for_each(|number| ours.get_one(number).unwrap());
        assert!(ours.get_one(keys).is_err());
    }
}
