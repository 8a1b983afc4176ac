//! Every bound of the program in one place, each with its reason.

/// Slots that keys hash to, as in Redis Cluster, so that clients' own slot arithmetic holds.
pub const SLOT_COUNT: u16 = 16_384;

/// Shards of a device formatted without another wish, for each reactor of the machine that formats it, so that it can go to a
/// machine with four times the cores. Not more: each has a log of its own, and a group of writes takes at least a block in
/// every log that it touches. Measured with 50 clients, values of 100 bytes and one reactor, 16 requests deep: 4 shards acknowledge
/// 17 % more than 16.
pub const SHARDS_PER_REACTOR: usize = 4;

/// The fewest shards of such a device: one that was formatted on a small machine is to have a use for more cores.
pub const SHARD_COUNT_DEFAULT_MIN: usize = 4;

/// The most shards of such a device: as many as there can be reactors.
pub const SHARD_COUNT_DEFAULT_MAX: usize = 64;

/// Bytes that each shard of such a device has at least: sixteen of the smallest extents, two of which it keeps open or back.
pub const SHARD_SIZE_DEFAULT_MIN: u64 = 16 << 20;

/// Shards of a device of `size` bytes that is formatted where a node has so many reactors.
pub fn default_shard_count(reactor_count: usize, size: u64) -> u16 {
    let wanted = reactor_count.saturating_mul(SHARDS_PER_REACTOR);
    let room = (size / SHARD_SIZE_DEFAULT_MIN).clamp(1, SHARD_COUNT_DEFAULT_MAX as u64) as usize;
    wanted.clamp(SHARD_COUNT_DEFAULT_MIN, SHARD_COUNT_DEFAULT_MAX).min(room) as u16
}

/// The most shards that a device may be formatted with: 256 open extents are already 16 GiB at the default size.
pub const SHARD_COUNT_MAX: u16 = 256;

/// The most reactors in one node.
pub const REACTOR_COUNT_MAX: usize = 64;

/// The longest key, in bytes. Redis allows 512 MiB, but a key is in one piece wherever it is; 64 KiB - 1 is what fits two bytes.
pub const KEY_SIZE_MAX: usize = 65_535;

/// The longest value, in bytes: as Redis bounds it (proto-max-bulk-len).
pub const VALUE_SIZE_MAX: usize = 512 << 20;

/// A value may take this part of a device: while it is overwritten, old and new are both there.
pub const VALUE_DEVICE_DIVISOR: u64 = 3;

/// The longest value that is one record, and the longest chunk of a longer one. Two of them fit a frame, and four the smallest
/// extent.
pub const CHUNK_SIZE_MAX: usize = 250 << 10;

/// Pieces of a long value within one chunk's length of it, beyond which they are made one. With `VALUE_SIZE_MAX` it bounds the
/// manifest, which must fit the smallest extent.
pub const PIECES_PER_CHUNK_MAX: usize = 8;

/// The same once the last of them is written: appending leaves no more behind it.
pub const PIECES_PER_FULL_CHUNK_MAX: usize = 3;

/// Pieces of one long value: far more than writing makes, so that a manifest that lies can't fill the memory.
pub const PIECE_COUNT_MAX: usize = 1 << 20;

/// Chunks of one long value that are read at a time: enough to keep a device busy, few enough to leave others their turn.
pub const LONG_READ_DEPTH: usize = 8;

/// The default extent, in bytes.
pub const EXTENT_SIZE_MAX: u64 = 64 << 20;

/// The smallest extent, in bytes: on devices so small that fewer than `EXTENTS_PER_SHARD` larger ones would fit a shard.
pub const EXTENT_SIZE_MIN: u64 = 1 << 20;

/// The most extents of a device: with the largest ones 64 TiB, which is what an entry of the index has bits for.
pub const EXTENT_COUNT_MAX: u32 = 1 << 20;

/// Extents are halved until every shard could hold this many: what each keeps open, what is kept back for deletes and what is kept
/// free is then a small part of the device, and garbage collection moves so much less.
pub const EXTENTS_PER_SHARD: u64 = 128;

/// Bytes at each end of a device that stay outside the log: the partition table lives there.
pub const DEVICE_MARGIN_SIZE: u64 = 1 << 20;

/// One frame (what one log write carries) closes at this many bytes, unless a single record is larger.
pub const FRAME_SIZE_TARGET: usize = 512 << 10;

/// Entries of one ring of a mailbox. Full is back-pressure, so this bounds what one reactor can owe another.
pub const MAILBOX_RING_CAPACITY: usize = 1_024;

/// Replies that one connection may have outstanding; reading from it stops at this many.
pub const REPLY_SLOTS_MAX: usize = 1_024;

/// Bytes of unsent replies at which a connection is no longer read from.
pub const REPLY_BUFFER_SIZE_MAX: usize = 1 << 20;

/// Connections that one reactor serves.
pub const CONNECTION_COUNT_MAX: usize = 10_000;

/// Commands that one MULTI may queue.
pub const MULTI_COMMAND_COUNT_MAX: usize = 65_536;

/// Arguments of one command, as Redis bounds them.
pub const ARGUMENT_COUNT_MAX: usize = 1 << 20;

/// Bytes of keys that one KEYS may find.
pub const KEYS_SIZE_MAX: usize = 64 << 20;

/// Bytes of keys at which one SCAN answers, however many keys it was asked for.
pub const SCAN_SIZE_MAX: usize = 4 << 20;

/// Keys that one KV.RANGE gives when it does not say.
pub const RANGE_COUNT_DEFAULT: usize = 1_000;

/// Keys that one KV.RANGE may ask for.
pub const RANGE_COUNT_MAX: usize = 10_000;

/// Bytes of keys and values at which the reply of a KV.RANGE ends, unless there is one value only: what one client may have
/// under way beside others.
pub const RANGE_SIZE_MAX: usize = 4 << 20;

/// Values that a KV.RANGE reads ahead, so that the device has something to do; those that are longer come when it is their turn.
pub const RANGE_AHEAD_COUNT: usize = 32;

/// Bytes of the longest value that is read ahead.
pub const RANGE_AHEAD_SIZE: usize = 128 << 10;

const _: () = assert!(RANGE_AHEAD_COUNT * RANGE_AHEAD_SIZE <= RANGE_SIZE_MAX);

/// Keys that one step of SCAN or KEYS visits on a shard: enough to be quick, few enough not to hold its reactor.
pub const SCAN_STEP_MAX: usize = 512;

/// Bytes of values that one command or transaction may read from the device, and that its replies may carry: as many as it may
/// bring as arguments.
pub const BATCH_VALUES_SIZE_MAX: u64 = 64 << 20;

/// Bytes a second that a node reads again to find damage: a terabyte in a day and a half.
pub const SCRUB_RATE_DEFAULT: u64 = 8 << 20;

/// Keys that one step of a dump reads.
pub const DUMP_KEYS_MAX: usize = 256;

/// Bytes of keys and values at which one step of a dump ends; one key may be larger.
pub const DUMP_PART_SIZE: usize = 1 << 20;

/// The longest pattern of KEYS and SCAN: it is matched with many keys in one go, byte for byte.
pub const PATTERN_SIZE_MAX: usize = 4 << 10;

/// Operations that one engine has admitted and not yet answered.
pub const ENGINE_OPERATIONS_MAX: usize = 65_536;

/// Bytes of records that one engine reads at a time; more reads wait. One record larger than this is read alone.
pub const ENGINE_READ_SIZE_MAX: usize = 32 << 20;

/// The ceiling of a node's memory where nothing is known of the machine's.
pub const MEMORY_SIZE_DEFAULT: u64 = 1 << 30;

/// The smallest ceiling of a node's memory, before what each reactor adds: a value at its limit passes through several
/// buffers on its way.
pub const MEMORY_SIZE_MIN: u64 = 192 << 20;

/// What each reactor adds to the smallest ceiling: its buffers for the device and its tables.
pub const MEMORY_PER_REACTOR_MIN: u64 = 32 << 20;

/// Bytes of DMA memory that a device queue keeps for the next buffers while it is not in use.
pub const DMA_KEPT_SIZE_MAX: usize = 8 << 20;

/// Commands of one device queue that may be in flight.
pub const DEVICE_DEPTH: usize = 256;

/// Seconds that dropping a device queue waits for what is in flight. Beyond the kernel's own timeouts of block devices (30 s).
pub const DROP_WAIT_SECONDS_MAX: u64 = 120;

/// Threads of one queue of the `pool` engine. Each has one transfer under way: fewer leave a drive idle, and more than this cost
/// switches without giving most drives more to do.
pub const POOL_THREAD_COUNT: usize = 16;

/// Bytes at the end of an extent, at most, that only a record of what is retired takes; more where a block, or a 128th of the
/// extent, is more.
pub const KEPT_FOR_RETIREMENT_MAX: u64 = 12 << 10;

/// Bytes of DMA buffers that one device queue hands out, beyond which taking one fails and the caller waits.
pub const DMA_SIZE_MAX: usize = 256 << 20;

const _: () = assert!(SLOT_COUNT.is_power_of_two());
const _: () = assert!(MAILBOX_RING_CAPACITY.is_power_of_two());
const _: () = assert!(EXTENT_SIZE_MIN.is_power_of_two() && EXTENT_SIZE_MAX.is_power_of_two());
const _: () = assert!(SHARD_COUNT_DEFAULT_MAX <= SHARD_COUNT_MAX as usize);
// Each with some room for headers and keys.
const _: () = assert!(2 * CHUNK_SIZE_MAX + 8192 <= FRAME_SIZE_TARGET);
const _: () = assert!(4 * CHUNK_SIZE_MAX as u64 + 12_288 <= EXTENT_SIZE_MIN - KEPT_FOR_RETIREMENT_MAX);
// A run of a manifest takes 23 bytes at most.
const _: () = assert!(
    (VALUE_SIZE_MAX / CHUNK_SIZE_MAX + 1) * PIECES_PER_CHUNK_MAX * 23 + KEY_SIZE_MAX
        < EXTENT_SIZE_MIN as usize / 2
);
// A frame at its target must fit the smallest extent beside its header block.
const _: () = assert!((FRAME_SIZE_TARGET as u64) < EXTENT_SIZE_MIN);

/// Requests that one reactor's connections may have under way; more wait in their connections' buffers.
pub const NODE_TASKS_MAX: usize = 65_536;

/// In-process callers of one node.
pub const NODE_CLIENTS_MAX: usize = 64;

/// Times that the frames of one group go to another extent because a write failed. Several in a row are no matter of single
/// blocks any more.
pub const RELOCATIONS_MAX: u32 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_go_by_reactors_where_there_is_room_for_them() {
        let table = [(1, 4 << 30, 4), (3, 4 << 30, 12), (7, 4 << 30, 28), (7, 64 << 20, 4), (1, 40 << 20, 2)];
        for (reactors, size, shards) in table {
            assert_eq!(default_shard_count(reactors, size), shards, "{reactors} reactors, {size} bytes");
            assert!(crate::format::layout::choose(size, shards).is_ok(), "{shards} shards in {size} bytes");
        }
        assert_eq!(default_shard_count(63, 1 << 40), 64);
        assert_eq!(default_shard_count(1, 0), 1);
    }
}
