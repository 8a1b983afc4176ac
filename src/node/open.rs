//! From a device to shard states: superblock, survey, scan, with the shards in parallel.

use std::num::NonZero;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::NodeError;
use crate::device::{Device, DeviceError, IoError, Namespace};
use crate::engine::ShardState;
use crate::engine::allocator::Allocator;
use crate::engine::device_format::begin_boot;
use crate::engine::op::ShardId;
use crate::engine::recovery::{self, Damage, ScannedShard, TornTail};
use crate::format::superblock::Superblock;
use crate::size;

/// A device whose shards are in memory, ready to be served.
pub struct Opened<N> {
    /// The device.
    pub namespace: Arc<N>,
    /// What it is formatted as.
    pub superblock: Arc<Superblock>,
    /// Free extents.
    pub allocator: Arc<Allocator>,
    /// One per shard.
    pub states: Vec<ShardState>,
    /// What the user should know: copies repaired, values damaged.
    pub notes: Vec<String>,
    /// Damaged places and values that were found.
    pub damage_count: u64,
    /// Tails that were cut.
    pub torn_tails: Vec<TornTail>,
    /// Bytes of log that were read.
    pub log_bytes: u64,
    /// Bytes of checkpoints that were read.
    pub checkpoint_bytes: u64,
    /// Keys found.
    pub keys: u64,
    /// How long it took.
    pub duration: Duration,
}

/// How far recovery is.
#[derive(Debug, Clone, Copy)]
pub struct RecoveryProgress {
    /// Bytes read.
    pub done: u64,
    /// Bytes to read.
    pub total: u64,
    /// Since the start.
    pub elapsed: Duration,
}

/// Damage beyond this is counted rather than listed; `basalt check` lists all of it.
const DAMAGE_NOTES_MAX: usize = 16;

/// How often progress is told.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// Threads for each processor while shards are read: one decodes while another waits for the device.
const THREADS_PER_PROCESSOR: usize = 2;

/// Bytes of extents that all of them may hold together, at most: half of the node's memory where that is less, as the indexes that
/// they make have the other half. As many threads as there are reactors are there in any case.
const READ_SIZE_MAX: u64 = 1 << 30;

/// Extents that one of them may hold: the one that it reads, one that it has looked into before, one of survivors, and what is read
/// again of one of them.
const EXTENTS_PER_THREAD: u64 = 4;

/// Counts a thread that reads shards for as long as it is there, also when it ends by a panic: whoever waits for them passes that on.
struct Counted<'c>(&'c AtomicUsize);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// Threads that read shards: so many, and more where they can wait for the device without being busy.
fn scan_thread_count<D: Device>(
    thread_count: usize,
    memory_size_max: u64,
    device: &D,
    superblock: &Superblock,
) -> usize {
    let mut wanted = thread_count;
    if device.wake_fd().is_some() {
        let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
        let most = scan_threads_in(memory_size_max, superblock.layout.extent_size);
        wanted = (processors * THREADS_PER_PROCESSOR).min(most).max(thread_count);
    }
    wanted.min(usize::from(superblock.shard_count)).max(1)
}

/// Threads whose extents fit into the memory.
fn scan_threads_in(memory_size_max: u64, extent_size: u64) -> usize {
    let room = READ_SIZE_MAX.min(memory_size_max / 2);
    usize::try_from(room / (EXTENTS_PER_THREAD * extent_size)).unwrap_or(usize::MAX)
}

/// Recovers a device with `thread_count` threads, or more where that is of use and `memory_size_max` bytes allow it: nothing is
/// served yet. `progress` is called from this thread now and then.
pub fn open<N: Namespace>(
    namespace: N,
    thread_count: usize,
    memory_size_max: u64,
    progress: &mut dyn FnMut(RecoveryProgress),
) -> Result<Opened<N>, NodeError> {
    let started = Instant::now();
    let device = namespace.name().to_owned();
    let io = |source| NodeError::Io { device: device.clone(), source };
    let mut queue = namespace.open_queue()?;
    let (superblock, quorum) =
        begin_boot(&mut queue).map_err(|source| NodeError::Open { device: device.clone(), source })?;
    let mut notes: Vec<String> = quorum
        .bad
        .iter()
        .map(|(copy, what)| format!("superblock copy {copy} was bad and is repaired: {what}"))
        .collect();
    let superblock = Arc::new(superblock);
    let survey = recovery::survey(&mut queue, &superblock).map_err(io)?;
    let mut read = 0;
    let mut told = Instant::now();
    let mut checkpoints = recovery::load_checkpoints(&mut queue, &superblock, &survey, &mut |bytes| {
        read += bytes;
        if told.elapsed() >= PROGRESS_INTERVAL {
            told = Instant::now();
            let total = survey.checkpoint_extent_count() as u64 * superblock.layout.extent_size;
            progress(RecoveryProgress { done: read, total: total.max(read), elapsed: started.elapsed() });
        }
    })
    .map_err(io)?;
    let chains = std::mem::take(&mut checkpoints.chains);
    let checkpoint_bytes = checkpoints.bytes_read;
    let checkpoints = Mutex::new(checkpoints);
    let thread_count = scan_thread_count(thread_count, memory_size_max, &queue, &superblock);
    drop(queue);

    let total = survey.extent_count() as u64 * superblock.layout.extent_size;
    let (next, done, left) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicUsize::new(thread_count));
    let results: Mutex<Vec<Result<ScannedShard, IoError>>> = Mutex::new(Vec::new());
    let refused: Mutex<Option<DeviceError>> = Mutex::new(None);
    std::thread::scope(|scope| {
        for _ in 0..thread_count {
            let counted = Counted(&left);
            let read_shards = || {
                let _counted = counted;
                match namespace.open_queue() {
                    // A controller has so many queues and no more. The others do the work.
                    Err(error) => *refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(error),
                    Ok(mut queue) => loop {
                        let shard = ShardId(next.fetch_add(1, Ordering::Relaxed) as u16);
                        if shard.0 >= superblock.shard_count {
                            break;
                        }
                        let base = checkpoints.lock().unwrap_or_else(PoisonError::into_inner).take(shard);
                        let result = recovery::recover_shard(
                            &mut queue,
                            &superblock,
                            shard,
                            survey.chains(shard),
                            base,
                            &mut |bytes| {
                                done.fetch_add(bytes, Ordering::Relaxed);
                            },
                        );
                        results.lock().unwrap_or_else(PoisonError::into_inner).push(result);
                    },
                }
            };
            // More threads than the system gives are not needed either: the others do the work, or it is this one's error.
            if let Err(error) = std::thread::Builder::new().spawn_scoped(scope, read_shards) {
                let name = namespace.name().to_owned();
                let error = DeviceError::Os { name, action: "start a thread that reads", source: error };
                *refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
        }
        let mut told = Instant::now();
        while left.load(Ordering::Acquire) > 0 {
            std::thread::sleep(Duration::from_millis(1));
            if told.elapsed() >= PROGRESS_INTERVAL {
                told = Instant::now();
                progress(RecoveryProgress {
                    done: done.load(Ordering::Relaxed),
                    total,
                    elapsed: started.elapsed(),
                });
            }
        }
    });

    let mut shards = Vec::new();
    for result in results.into_inner().unwrap_or_else(PoisonError::into_inner) {
        shards.push(result.map_err(io)?);
    }
    if let Some(error) = refused.into_inner().unwrap_or_else(PoisonError::into_inner)
        && shards.len() < usize::from(superblock.shard_count)
    {
        return Err(error.into());
    }
    shards.sort_by_key(ScannedShard::id);
    if let Some(at) = recovery::blocking_damage(&survey, &shards) {
        return Err(NodeError::Unreadable { device, at: Box::new(at.clone()) });
    }
    let allocator = Arc::new(recovery::rebuild_allocator(&superblock, &survey, &shards, &chains));
    let committed = recovery::committed_batches(&shards);
    let torn_tails = shards.iter().filter_map(|shard| shard.torn.clone()).collect();
    let log_bytes = shards.iter().map(|shard| shard.log_bytes).sum::<u64>();
    let states: Vec<ShardState> =
        shards.into_iter().map(|shard| shard.resolve(&committed, &superblock)).collect();
    let damage: Vec<&Damage> =
        survey.damage.iter().chain(states.iter().flat_map(ShardState::damage)).collect();
    let superseded: usize = states.iter().map(|state| state.superseded().len()).sum();
    let damage_count = (damage.len() + superseded) as u64;
    let mut damage_notes = Vec::new();
    if superseded > 0 {
        let places = size::count(superseded as u64, "damaged place");
        damage_notes.push(format!(
            "{places} that no key depends on any more: their space comes back when it is collected"
        ));
    }
    for one in damage {
        damage_notes.push(match &one.key {
            Some(key) => format!(
                "the value of key '{key}' is damaged: reading it is an error until it is written again or deleted"
            ),
            None => format!(
                "damage in extent {}, byte {} ({} bytes): {}",
                one.extent, one.offset, one.size, one.what
            ),
        });
    }
    let doubtful: Vec<String> =
        states.iter().filter(|state| state.is_in_doubt()).map(|state| state.id().0.to_string()).collect();
    if !doubtful.is_empty() {
        damage_notes.push(format!(
            "records were lost, and it is not known of which keys: in shard(s) {} every key that may be concerned answers an error until it is written again; SCAN, KEYS and DBSIZE answer an error until FLUSHALL",
            doubtful.join(", ")
        ));
    }
    let more = damage_notes.len().saturating_sub(DAMAGE_NOTES_MAX);
    if more > 0 {
        damage_notes.drain(DAMAGE_NOTES_MAX - 1..damage_notes.len() - 1);
        damage_notes.push(format!("and more damage; `basalt check --device {device}` lists all of it"));
    }
    notes.append(&mut damage_notes);
    Ok(Opened {
        namespace: Arc::new(namespace),
        allocator,
        keys: states.iter().map(ShardState::key_count).sum(),
        states,
        notes,
        damage_count,
        torn_tails,
        log_bytes,
        checkpoint_bytes,
        superblock,
        duration: started.elapsed(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Geometry;
    use crate::device::kernel::{KernelDevice, KernelEngine, KernelNamespace};
    use crate::engine::device_format::{FormatOptions, format};
    use crate::engine::op::Clock;
    use crate::format::superblock::IndexKind;

    /// A device with so many queues and no more, as a controller has.
    struct Scarce {
        inner: KernelNamespace,
        left: AtomicUsize,
    }

    impl Namespace for Scarce {
        type Queue = KernelDevice;

        fn geometry(&self) -> &Geometry {
            self.inner.geometry()
        }

        fn open_queue(&self) -> Result<KernelDevice, DeviceError> {
            let take = |left: usize| left.checked_sub(1);
            match self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
                Ok(_) => self.inner.open_queue(),
                Err(_) => Err(DeviceError::Os {
                    name: self.name().to_owned(),
                    action: "open a queue of",
                    source: std::io::Error::other("all of them are in use"),
                }),
            }
        }

        fn name(&self) -> &str {
            self.inner.name()
        }
    }

    fn opened(engine: KernelEngine, queue_count: usize, memory: u64) -> Result<Opened<Scarce>, NodeError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let inner = KernelNamespace::open(engine, &path, Some(64 << 20)).unwrap();
        let options = FormatOptions {
            shard_count: 16,
            uuid: [1; 16],
            secret: [2; 16],
            label: "test".to_owned(),
            index: IndexKind::Hash,
        };
        let clock = Clock { unix_ms: 1, monotonic_us: 1 };
        format(&mut inner.open_queue().unwrap(), &options, clock).unwrap();
        open(Scarce { inner, left: AtomicUsize::new(queue_count) }, 1, memory, &mut |_| {})
    }

    #[test]
    fn one_queue_is_enough_for_the_shards_however_many_are_wanted() {
        for engine in [KernelEngine::Pool, KernelEngine::Sync] {
            // One for the survey, and one for all shards.
            assert_eq!(opened(engine, 2, 1 << 30).unwrap().states.len(), 16);
            assert!(matches!(opened(engine, 1, 1 << 30).map(|_| ()), Err(NodeError::Device(_))));
        }
    }

    #[test]
    fn memory_bounds_the_threads() {
        assert_eq!(
            [1 << 40, 1 << 30, 512 << 20, 1 << 20].map(|memory| scan_threads_in(memory, 64 << 20)),
            [4, 2, 1, 0]
        );
    }

    #[test]
    fn threads_are_more_than_asked_for_only_where_they_can_wait() {
        let threads = |engine, memory| {
            let opened = opened(engine, 99, memory).unwrap();
            let used = 99 - opened.namespace.left.load(Ordering::Relaxed) - 1;
            let most = std::thread::available_parallelism().map_or(1, NonZero::get) * THREADS_PER_PROCESSOR;
            (used, most.min(16))
        };
        assert_eq!(threads(KernelEngine::Sync, 1 << 30).0, 1);
        let (used, most) = threads(KernelEngine::Pool, 1 << 30);
        assert_eq!(used, most);
        // Extents of 1 MiB: the memory has room for those of one thread, or of none.
        assert_eq!(threads(KernelEngine::Pool, 8 << 20).0, 1);
        assert_eq!(threads(KernelEngine::Pool, 1).0, 1);
    }
}
