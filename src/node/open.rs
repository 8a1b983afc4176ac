//! From a device to shard states: superblock, survey, scan, with the shards in parallel.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::NodeError;
use crate::device::{DeviceError, IoError, Namespace};
use crate::engine::ShardState;
use crate::engine::allocator::Allocator;
use crate::engine::device_format::begin_boot;
use crate::engine::op::ShardId;
use crate::engine::recovery::{self, Damage, ScannedShard, TornTail};
use crate::format::superblock::Superblock;

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

enum ScanError {
    Device(DeviceError),
    Io(IoError),
}

/// Recovers a device with `thread_count` threads. `progress` is called from this thread now and then.
pub fn open<N: Namespace>(
    namespace: N,
    thread_count: usize,
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
    drop(queue);

    let total = survey.extent_count() as u64 * superblock.layout.extent_size;
    let (next, done, left) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicUsize::new(thread_count.max(1)));
    let results: Mutex<Vec<Result<ScannedShard, ScanError>>> = Mutex::new(Vec::new());
    let push = |result| results.lock().unwrap_or_else(PoisonError::into_inner).push(result);
    std::thread::scope(|scope| {
        for _ in 0..thread_count.max(1) {
            scope.spawn(|| {
                match namespace.open_queue() {
                    Err(error) => push(Err(ScanError::Device(error))),
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
                        push(result.map_err(ScanError::Io));
                    },
                }
                left.fetch_sub(1, Ordering::Release);
            });
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
        match result {
            Ok(shard) => shards.push(shard),
            Err(ScanError::Io(error)) => return Err(io(error)),
            Err(ScanError::Device(error)) => return Err(error.into()),
        }
    }
    shards.sort_by_key(ScannedShard::id);
    let damage: Vec<&Damage> =
        survey.damage.iter().chain(shards.iter().flat_map(|shard| &shard.damage)).collect();
    if let Some(at) = recovery::blocking_damage(&survey, &shards) {
        return Err(NodeError::Unreadable { device, at: Box::new(at.clone()) });
    }
    let damage_count = damage.len() as u64;
    let mut damage_notes = Vec::new();
    for one in damage {
        damage_notes.push(match &one.key {
            Some(key) => format!("the value of key '{key}' is damaged: reading it is an error"),
            None => format!(
                "damage in extent {}, byte {} ({} bytes): {}",
                one.extent, one.offset, one.size, one.what
            ),
        });
    }
    let allocator = Arc::new(recovery::rebuild_allocator(&superblock, &survey, &shards, &chains));
    let committed = recovery::committed_batches(&shards);
    let torn_tails = shards.iter().filter_map(|shard| shard.torn.clone()).collect();
    let log_bytes = shards.iter().map(|shard| shard.log_bytes).sum::<u64>();
    let states: Vec<ShardState> =
        shards.into_iter().map(|shard| shard.resolve(&committed, &superblock)).collect();
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
