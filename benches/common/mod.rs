//! What the benchmarks of a single engine share: a new one, its clock, names of keys, and words for the machine.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use basalt::device::Namespace;
use basalt::engine::Engine;
use basalt::engine::allocator::Allocator;
use basalt::engine::device_format::{FormatOptions, format, zero_all};
use basalt::engine::durability::Durability;
use basalt::engine::io_queue::IoSettings;
use basalt::engine::op::{Clock, Key};
use basalt::format::layout::Layout;
use basalt::format::superblock::IndexKind;

/// How a device is formatted and used.
pub struct Options {
    pub shard_count: u16,
    pub durability: Durability,
    pub io: IoSettings,
    /// Everything is written once before, as `basalt format` does: the first write to a block of a file that was only allocated
    /// waits for the file system.
    pub writes_zeros: bool,
}

/// An engine with all shards of a device that was just formatted.
pub struct Fresh<N: Namespace> {
    pub engine: Engine<N::Queue>,
    pub allocator: Arc<Allocator>,
    pub layout: Layout,
}

/// Formats a device under an identity of its own, or what an earlier run wrote would be taken for records of this one that
/// lost their headers.
pub fn fresh_engine<N: Namespace + 'static>(namespace: N, options: &Options, clock: Clock) -> Fresh<N> {
    let mut queue = namespace.open_queue().expect("a queue");
    if options.writes_zeros {
        zero_all(&mut queue, &mut |_| {}).expect("zeros can be written");
    }
    let uuid = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos()).to_le_bytes();
    let format_options = FormatOptions {
        shard_count: options.shard_count,
        uuid,
        secret: uuid,
        label: "bench".to_owned(),
        index: IndexKind::Hash,
    };
    format(&mut queue, &format_options, clock).expect("the device can be formatted");
    drop(queue);
    let opened = basalt::node::open(namespace, 1, u64::MAX, &mut |_| {}).expect("what was formatted opens");
    let queue = opened.namespace.open_queue().expect("a queue");
    let (superblock, allocator) = (Arc::clone(&opened.superblock), Arc::clone(&opened.allocator));
    let mut engine =
        Engine::new(superblock, Arc::clone(&allocator), queue, opened.states, options.durability);
    engine.set_io(&options.io);
    engine.settle(clock).expect("a new device settles");
    Fresh { engine, allocator, layout: opened.superblock.layout }
}

/// Time since `started`, and of the day.
pub fn clock(started: Instant) -> Clock {
    let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    Clock { unix_ms, monotonic_us: started.elapsed().as_micros() as u64 }
}

/// The name of a key, the same length for each.
pub fn key_of(number: u64) -> Key {
    Key::from(format!("key:{number:012}"))
}

/// Processor and kernel.
pub fn machine() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("an unknown processor");
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{cores} cores of {}, kernel {}", model.trim_start_matches([' ', '\t', ':']), kernel.trim())
}
