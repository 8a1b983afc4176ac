//! What all reactors of a node see: settings that may change, and each other's figures.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::memory::MemoryPlan;
use crate::device::Health;
use crate::engine::allocator::Allocator;
use crate::engine::durability::Durability;
use crate::engine::io_queue::{ClassStats, IoBounds, IoPolicy};
use crate::engine::op::Clock;
use crate::format::superblock::Superblock;
use crate::reactor::control::ControlSender;

/// A rare message to a reactor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    /// Finish what was taken and end. Without `save`, what no flush covers yet may be lost.
    Stop {
        /// Whether to make everything durable first.
        save: bool,
    },
    /// Use another durability mode.
    Durability(Durability),
}

/// Figures that a reactor publishes about once a loop; others only read them.
#[derive(Debug, Default)]
pub struct Figures {
    /// Keys in its shards.
    pub keys: AtomicU64,
    /// Bytes of their newest records.
    pub live_bytes: AtomicU64,
    /// Bytes written to the device.
    pub bytes_written: AtomicU64,
    /// Bytes read from the device.
    pub bytes_read: AtomicU64,
    /// Bytes of keys and values that writes brought.
    pub user_bytes: AtomicU64,
    /// Flushes.
    pub flushes: AtomicU64,
    /// Groups committed.
    pub groups: AtomicU64,
    /// Records appended.
    pub records: AtomicU64,
    /// Reads that found a damaged record.
    pub damaged_reads: AtomicU64,
    /// Extents that were left because a write failed in them.
    pub extents_left: AtomicU64,
    /// Bytes that were read again to find damage.
    pub scrub_bytes: AtomicU64,
    /// Passes of that over everything.
    pub scrub_passes: AtomicU64,
    /// When the last of them ended, milliseconds since the Unix epoch.
    pub scrub_last_pass_ms: AtomicU64,
    /// Damaged records that they found.
    pub scrub_damaged: AtomicU64,
    /// Extents that garbage collection emptied.
    pub gc_extents_collected: AtomicU64,
    /// Extents that it gave back.
    pub gc_extents_freed: AtomicU64,
    /// Bytes of records that it moved.
    pub gc_bytes_moved: AtomicU64,
    /// Bytes that the device was told to be free.
    pub gc_bytes_trimmed: AtomicU64,
    /// Checkpoints written.
    pub checkpoints: AtomicU64,
    /// Their bytes.
    pub checkpoint_bytes: AtomicU64,
    /// Checkpoints given up.
    pub checkpoints_skipped: AtomicU64,
    /// Collections that it gave up.
    pub gc_abandoned: AtomicU64,
    /// Connections now.
    pub connections: AtomicU64,
    /// Connections ever.
    pub accepted: AtomicU64,
    /// Connections refused.
    pub rejected: AtomicU64,
    /// Commands.
    pub commands: AtomicU64,
    /// Bytes from clients.
    pub received_bytes: AtomicU64,
    /// Bytes to clients.
    pub sent_bytes: AtomicU64,
    /// Connections closed for want of memory.
    pub evicted: AtomicU64,
    /// Reads that the cache answered.
    pub cache_hits: AtomicU64,
    /// Reads that it could not answer.
    pub cache_misses: AtomicU64,
    /// Bytes of memory of the cache.
    pub cache_memory: AtomicU64,
    /// Of the index.
    pub index_memory: AtomicU64,
    /// Of what is on its way to the device.
    pub log_memory: AtomicU64,
    /// Of what is being read.
    pub reads_memory: AtomicU64,
    /// Of connections.
    pub connections_memory: AtomicU64,
    /// Commands to the device of each class, in the order of [`crate::engine::io_queue::Class::ALL`].
    pub io: [ClassFigures; 5],
    /// What its scheduler goes by, from the start on.
    pub io_bounds: OnceLock<IoBounds>,
}

/// The same for the commands of one class.
#[derive(Debug, Default)]
pub struct ClassFigures {
    /// Commands that the device took.
    pub commands: AtomicU64,
    /// Bytes that they moved.
    pub bytes: AtomicU64,
    /// Commands that wait for their turn.
    pub waiting: AtomicU64,
    /// The longest that one has waited, in microseconds.
    pub wait_us_max: AtomicU64,
}

impl ClassFigures {
    /// Publishes what an engine says.
    pub fn set(&self, stats: &ClassStats) {
        self.commands.store(stats.commands, Ordering::Relaxed);
        self.bytes.store(stats.bytes, Ordering::Relaxed);
        self.waiting.store(stats.waiting, Ordering::Relaxed);
        self.wait_us_max.store(stats.wait_us_max, Ordering::Relaxed);
    }
}

/// What a start read of the device.
#[derive(Debug, Clone, Copy, Default)]
pub struct Recovery {
    /// Bytes of checkpoints.
    pub checkpoint_bytes: u64,
    /// Bytes of log.
    pub log_bytes: u64,
    /// Milliseconds that it took.
    pub duration_ms: u64,
    /// Damaged places and values in what was read.
    pub damage_count: u64,
}

/// Asks the device what it last said of its health.
pub type HealthSource = Box<dyn Fn() -> Option<Health> + Send + Sync>;

/// The device of a node, as INFO names it.
pub struct DeviceFacts {
    /// As its user named it.
    pub name: String,
    /// The I/O engine.
    pub engine: &'static str,
    /// Its health.
    pub health: HealthSource,
    /// In which order it is given commands.
    pub scheduler: IoPolicy,
    /// Where its figures are from.
    pub profile: ProfileSource,
}

/// Where a node has the figures of its device from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ProfileSource {
    /// They are assumed.
    #[default]
    Assumed,
    /// They were measured, of the disk with the same serial number.
    Identified,
    /// They were measured, of a disk that looks the same; nothing tells it from others.
    Unidentified,
}

/// State of a node that all its threads see.
pub struct Shared {
    /// What the device is formatted as.
    pub superblock: Arc<Superblock>,
    /// Free extents.
    pub allocator: Arc<Allocator>,
    /// The device.
    pub device: DeviceFacts,
    /// Where it listens.
    pub address: Option<std::net::SocketAddr>,
    /// Connections that the node serves.
    pub connection_count_max: usize,
    /// What its memory is divided into.
    pub memory: MemoryPlan,
    /// One per reactor.
    pub figures: Vec<Figures>,
    /// Reactors that have answered everything they took, after a stop.
    pub quiet_count: AtomicUsize,
    /// When everything was last made durable on request, seconds since the Unix epoch.
    pub last_save_s: AtomicU64,
    /// What the start read.
    pub recovery: Recovery,
    /// Somebody makes a dump.
    pub dump_running: AtomicBool,
    /// Something went wrong that whoever waits for the node must hear of.
    pub failed: AtomicBool,
    /// Command count when CONFIG RESETSTAT was last used.
    pub commands_at_reset: AtomicU64,
    durability: Mutex<Durability>,
    controls: Mutex<Vec<ControlSender<Control>>>,
    stop: Mutex<Option<Sender<bool>>>,
    started: Instant,
}

impl Shared {
    /// For a node of `reactor_count` reactors.
    pub fn new(
        superblock: Arc<Superblock>,
        allocator: Arc<Allocator>,
        device: DeviceFacts,
        recovery: Recovery,
        address: Option<std::net::SocketAddr>,
        config: &super::NodeConfig,
    ) -> Shared {
        Shared {
            superblock,
            allocator,
            device,
            address,
            connection_count_max: config.connection_count_max,
            memory: MemoryPlan::new(config.memory_size_max, config.cores.len()),
            figures: config.cores.iter().map(|_| Figures::default()).collect(),
            quiet_count: AtomicUsize::new(0),
            last_save_s: AtomicU64::new(unix_ms() / 1_000),
            recovery,
            dump_running: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            commands_at_reset: AtomicU64::new(0),
            durability: Mutex::new(config.durability),
            controls: Mutex::new(Vec::new()),
            stop: Mutex::new(None),
            started: Instant::now(),
        }
    }

    /// Reactors of the node.
    pub fn reactor_count(&self) -> usize {
        self.figures.len()
    }

    /// The reactor of a shard: contiguous ranges, as even as they come.
    pub fn reactor_of(&self, shard: crate::engine::op::ShardId) -> usize {
        usize::from(shard.0) * self.reactor_count() / usize::from(self.superblock.shard_count)
    }

    /// The time of now.
    pub fn clock(&self) -> Clock {
        Clock { unix_ms: unix_ms(), monotonic_us: self.started.elapsed().as_micros() as u64 }
    }

    /// Seconds since the start.
    pub fn uptime_s(&self) -> u64 {
        self.started.elapsed().as_secs()
    }

    /// The sum of a figure over all reactors.
    pub fn sum(&self, figure: impl Fn(&Figures) -> &AtomicU64) -> u64 {
        self.figures.iter().map(|one| figure(one).load(Ordering::Relaxed)).sum()
    }

    /// The greatest of a figure over all reactors.
    pub fn most(&self, figure: impl Fn(&Figures) -> &AtomicU64) -> u64 {
        self.figures.iter().map(|one| figure(one).load(Ordering::Relaxed)).max().unwrap_or(0)
    }

    /// The least of a figure over all reactors.
    pub fn least(&self, figure: impl Fn(&Figures) -> &AtomicU64) -> u64 {
        self.figures.iter().map(|one| figure(one).load(Ordering::Relaxed)).min().unwrap_or(0)
    }

    /// What the schedulers of all reactors go by: what one has is a part of the device's, what a command costs is the same for all.
    pub fn io_bounds(&self) -> IoBounds {
        let bounds = self.figures.iter().filter_map(|one| one.io_bounds.get());
        bounds
            .copied()
            .reduce(|sum, one| IoBounds {
                background_us: sum.background_us + one.background_us,
                depth: sum.depth + one.depth,
                ..one
            })
            .unwrap_or_default()
    }

    /// The durability mode in force.
    pub fn durability(&self) -> Durability {
        *self.durability.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the durability mode on every reactor.
    pub fn set_durability(&self, durability: Durability) {
        *self.durability.lock().unwrap_or_else(PoisonError::into_inner) = durability;
        self.tell(Control::Durability(durability));
    }

    /// Says where reactors take control messages, and who is told that a client asked the node to stop.
    pub fn connect(&self, controls: Vec<ControlSender<Control>>, stop: Sender<bool>) {
        *self.controls.lock().unwrap_or_else(PoisonError::into_inner) = controls;
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner) = Some(stop);
    }

    /// Sends a message to every reactor.
    pub fn tell(&self, message: Control) {
        for control in self.controls.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            // The queue is larger than what any caller sends; a full one means a reactor that has ended.
            let _ = control.send(message);
        }
    }

    /// Asks whoever runs the node to stop it. False when nobody listens any more.
    pub fn ask_to_stop(&self, save: bool) -> bool {
        let stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
        stop.as_ref().is_some_and(|stop| stop.send(save).is_ok())
    }
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
