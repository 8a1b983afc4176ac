//! What a shard is asked and what it answers. These are the values that travel through the mailboxes.

mod key_range;

use bytes::Bytes;

pub use crate::format::slot::ShardId;
pub use key_range::{KeyRange, Order, RangeQuery};

use std::sync::Arc;

use super::action::Action;
use super::long::LongValue;

/// A key's bytes.
pub type Key = Bytes;

/// A value's bytes.
pub type Value = Bytes;

/// Wall-clock time, handed in by the reactor once per loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Clock {
    /// Milliseconds since the Unix epoch: what expiries are compared with.
    pub unix_ms: u64,
    /// Microseconds on a clock that never steps back: what intervals are measured with.
    pub monotonic_us: u64,
}

/// Why an operation was not done. `Display` gives the text of a Redis error reply, prefix included.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpError {
    /// INCR and its kin on something else.
    #[error("ERR value is not an integer or out of range")]
    NotAnInteger,
    /// INCRBYFLOAT on something else.
    #[error("ERR value is not a valid float")]
    NotAFloat,
    /// The sum leaves 64 bits.
    #[error("ERR increment or decrement would overflow")]
    Overflow,
    /// The sum is not a number that can be stored.
    #[error("ERR increment would produce NaN or Infinity")]
    NotFinite,
    /// The value is longer than this device can keep.
    #[error(
        "ERR value of {size} bytes is longer than the {size_max} bytes that this node keeps in one value"
    )]
    ValueTooLarge {
        /// Bytes asked for.
        size: u64,
        /// Bytes allowed.
        size_max: u64,
    },
    /// The key is longer than a record can carry.
    #[error("ERR key of {size} bytes is longer than the {size_max} bytes that this node keeps in one key")]
    KeyTooLarge {
        /// Bytes asked for.
        size: u64,
        /// Bytes allowed.
        size_max: u64,
    },
    /// What one command or transaction reads or makes is longer than the node holds for one.
    #[error(
        "ERR the values that one command or transaction reads or makes are longer than {size_max} bytes together: ask for fewer at a time"
    )]
    ValuesTooLarge {
        /// Bytes allowed.
        size_max: u64,
    },
    /// No free extent is left for new data.
    #[error("OOM device is full: new data needs a larger device; reads and deletes go on")]
    DeviceFull,
    /// Even the space reserved for deletes is used up.
    #[error(
        "OOM device is full and the space reserved for deletes is used up: try again in a while, or move to a larger device; reads go on"
    )]
    ReserveExhausted,
    /// The index has used up its part of the memory.
    #[error(
        "OOM command not allowed when used memory > 'maxmemory': the index is as large as --memory lets it be; delete keys or start with more"
    )]
    OutOfMemory,
    /// Other batches hold what there is for values.
    #[error(
        "OOM command not allowed when used memory > 'maxmemory': the values do not fit beside those of other commands and transactions; ask for fewer at a time, or try again"
    )]
    MemoryShort,
    /// The record does not match its checksum.
    #[error(
        "IOERR the stored record of this key is damaged: {detail}; `basalt check` names all damage once the node is stopped"
    )]
    Damaged {
        /// Where and what.
        detail: String,
    },
    /// A long value does not fit into the memory that there is for requests.
    #[error(
        "OOM a value of {size} bytes does not fit into the memory for requests (at most {size_max} bytes): read it with GETRANGE, or start with a larger --memory"
    )]
    ValueBeyondMemory {
        /// Bytes of it.
        size: u64,
        /// Bytes allowed.
        size_max: u64,
    },
    /// The device failed a read.
    #[error("IOERR the device failed the read: {detail}")]
    ReadFailed {
        /// The device's words.
        detail: String,
    },
    /// The device failed a write or flush: it may or may not be there after a restart.
    #[error("IOERR outcome unknown until restart: {detail}")]
    OutcomeUnknown {
        /// The device's words.
        detail: String,
    },
    /// After a failed write or flush nothing more is accepted.
    #[error("READONLY the device failed a write, so nothing more is accepted until restart: {detail}")]
    ReadOnly {
        /// The device's words.
        detail: String,
    },
    /// A record that cannot be read keeps a scan from naming its key.
    #[error("{error}; its key is not listed, and SCAN {next} goes on behind it")]
    UnreadableKey {
        /// What became of the read.
        error: Box<OpError>,
        /// The cursor behind it.
        next: u64,
    },
    /// The same for KEYS, which has no cursor.
    #[error("{0}; its key cannot be listed: SCAN lists all others")]
    UnlistedKey(Box<OpError>),
    /// A record that cannot be read keeps KV.RANGE from giving its value.
    #[error(
        "{error}; it is the value of '{key}', whose turn it is: KEYS lists it, and KV.RANGE goes on behind it with '({key}' as its bound"
    )]
    UnreadableValue {
        /// What became of the read.
        error: Box<OpError>,
        /// The key, bytes that are no text escaped.
        key: String,
    },
    /// Keys are asked for in order, and the index has none.
    #[error(
        "ERR this device has the index 'hash', which has no order of keys: `basalt format --index ordered` makes one that has, and `basalt dump` and `basalt restore` bring the keys over"
    )]
    NotOrdered,
    /// Only one dump at a time.
    #[error("BUSY another dump is under way: wait for it, or a quarter of a minute if its reader has gone")]
    DumpBusy,
    /// A dump did not come to its end.
    #[error("ERR the dump was given up: {why}; begin another one")]
    DumpLost {
        /// The reason.
        why: &'static str,
    },
    /// The engine has as many operations as it admits.
    #[error("BUSY too many operations in flight, try again")]
    Busy,
    /// The node is stopping.
    #[error("LOADING the node is shutting down")]
    Stopping,
}

/// A request that is read where it arrived, without a copy of its own: the commonest two, without options.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direct<'a> {
    /// GET.
    Get {
        /// The key.
        key: &'a [u8],
    },
    /// SET.
    Set {
        /// The key.
        key: &'a [u8],
        /// Its value from now on, without an expiry.
        value: &'a [u8],
    },
}

impl<'a> Direct<'a> {
    /// The key.
    pub fn key(&self) -> &'a [u8] {
        match self {
            Direct::Get { key } | Direct::Set { key, .. } => key,
        }
    }

    /// Whether it changes nothing.
    pub fn is_read(&self) -> bool {
        matches!(self, Direct::Get { .. })
    }
}

/// The answer to it, when it is there at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirectReply<'a> {
    /// The key's value.
    Value(&'a Value),
    /// The key is not there.
    Nil,
    /// It is written.
    Ok,
}

/// The typed result of one command; the network layer gives it its RESP form.
#[derive(Debug, Clone, PartialEq)]
pub enum Reply {
    /// `+OK`
    Ok,
    /// Null.
    Nil,
    /// An integer.
    Int(i64),
    /// A bulk string.
    Bulk(Bytes),
    /// A simple string.
    Simple(&'static str),
    /// An array.
    Array(Vec<Reply>),
    /// An error.
    Error(OpError),
}

/// What a watch saw: the key's version then. Versions only move forward, per shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchedKey {
    /// The key.
    pub key: Key,
    /// Its version when it was watched.
    pub version: u64,
}

/// One operation on one shard.
#[derive(Debug)]
pub enum ShardOp {
    /// One action on one key, ordered by arrival with every other operation on it. Answer: `Reply`.
    Key {
        /// The key.
        key: Key,
        /// What to do.
        action: Action,
    },
    /// Starts watching a key. Answer: `Watching`.
    Watch {
        /// The key.
        key: Key,
    },
    /// Ends one watch of each key. Answer: `Done`.
    Unwatch {
        /// The keys, once per watch.
        keys: Vec<Key>,
    },
    /// Holds keys for a batch, in the order given (the caller sorts them), and reads them. Answer: `Locked`.
    Lock {
        /// The keys, sorted, each once.
        keys: Vec<Key>,
        /// Versions that must still hold.
        watched: Vec<WatchedKey>,
        /// What is read of them.
        reads: LockReads,
    },
    /// Logs a batch's effects on held keys. Answer: `Done` when durable (by the mode), or `Failed`.
    Prepare {
        /// The hold that `Locked` named.
        hold: HoldId,
        /// The batch.
        batch: BatchId,
        /// The shard that logs the commit record. When it is this shard and the only one, the commit record
        /// follows at once.
        coordinator: ShardId,
        /// Shards that take part.
        participant_count: u16,
        /// What to log.
        effects: Vec<(Key, KeyEffect)>,
    },
    /// Logs the commit record of a batch. Answer: `Done` when durable, or `Failed`.
    Commit {
        /// The batch.
        batch: BatchId,
        /// Shards that took part.
        participant_count: u16,
    },
    /// Ends a hold: prepared effects become visible, or never happened, by the outcome. Answer: `Done`, for a committed batch
    /// once what this shard has of it no longer needs the coordinator's commit record, or `Failed` when it will go on needing
    /// it.
    Release {
        /// The hold that `Locked` named.
        hold: HoldId,
        /// The outcome.
        outcome: BatchOutcome,
    },
    /// Every participant of a batch stands without the commit record that this shard logged. Answer: `Done`.
    Forget {
        /// The batch.
        batch: BatchId,
    },
    /// Keys in hash order from a cursor. Answer: `Scanned`.
    Scan {
        /// Where to go on; 0 starts.
        cursor: u64,
        /// About how many keys to visit.
        count: usize,
        /// Only keys that begin so are wanted. Others may come.
        prefix: Option<Key>,
    },
    /// Keys in their own order. Answer: `Listed`, or `Failed` where the index is not `ordered`.
    List {
        /// Which.
        range: KeyRange,
        /// Which of them first.
        order: Order,
        /// About how many to list.
        count: usize,
        /// Bytes of keys to list at most, unless the first is longer.
        size_max: usize,
    },
    /// Counts keys. Answer: `Count`.
    Count,
    /// Lets nothing in any more that takes keys, until `Clear`. Answer: `Done` once nothing holds a key.
    Close,
    /// Drops every key of the shard, as a logged record, and opens it again if it was closed. Answer: `Done` when durable.
    Clear,
    /// Takes a pin of the shard as it is, and opens it again if it was closed. Answer: `Done` when what is pinned is durable (by
    /// the mode).
    Pin,
    /// Reads on from the pin. Answer: `Pinned`, or `Failed` when it was given up.
    PinRead,
    /// Lets go of the pin, if there is one. Answer: `Done`.
    Unpin,
    /// Makes everything logged so far durable, whatever the mode. Answer: `Done`.
    Sync,
    /// Collects every extent of which that frees a part worth it. Answer: `Done`.
    Compact,
    /// Writes a checkpoint of everything so far, which is durable before the answer whatever comes of the checkpoint.
    Checkpoint,
}

/// What a batch has to read of its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockReads {
    /// Nothing: existence and expiry are known.
    Nothing,
    /// Records of which the length is not known. The values are not kept.
    Lengths,
    /// All values, up to so many bytes of them. A key whose value does not fit any more has an error instead.
    Values {
        /// Bytes.
        size_max: u64,
    },
}

/// Names a hold on one shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HoldId(pub u64);

/// How a batch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchOutcome {
    /// Its commit record is durable (by the mode).
    Committed,
    /// No commit record was logged.
    Aborted,
    /// The commit record may or may not be on the device: only a restart tells.
    Unknown,
}

/// A batch's global id: never reused, since `boot` grows with every start of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BatchId {
    /// The start of the node that made it.
    pub boot: u64,
    /// Unique within that start: the coordinator's reactor in the upper 16 bits, a counter below.
    pub number: u64,
}

/// What a batch does to one key.
#[derive(Debug, Clone, PartialEq)]
pub enum KeyEffect {
    /// Stores a value.
    Put {
        /// The value.
        value: Value,
        /// Milliseconds since the Unix epoch, 0 for none.
        expires_at_ms: u64,
    },
    /// Stores a long value whose chunks are in the log already.
    Long {
        /// The value.
        value: Arc<LongValue>,
        /// Milliseconds since the Unix epoch, 0 for none.
        expires_at_ms: u64,
    },
    /// Deletes the key.
    Delete,
}

impl KeyEffect {
    /// Bytes of the value that it holds.
    pub fn value_size(&self) -> usize {
        match self {
            KeyEffect::Put { value, .. } => value.len(),
            KeyEffect::Long { .. } | KeyEffect::Delete => 0,
        }
    }

    /// When what it stores expires: milliseconds since the Unix epoch, 0 for never. None where it stores nothing.
    pub fn stored_expiry(&self) -> Option<u64> {
        match self {
            KeyEffect::Put { expires_at_ms, .. } | KeyEffect::Long { expires_at_ms, .. } => {
                Some(*expires_at_ms)
            }
            KeyEffect::Delete => None,
        }
    }
}

/// A key's state as a batch found it.
#[derive(Debug, Clone, PartialEq)]
pub struct Current {
    /// Milliseconds since the Unix epoch, 0 for none.
    pub expires_at_ms: u64,
    /// Bytes of the value, where it is in memory or long; nobody knows those of another one that was not read.
    pub size: u64,
    /// The value, when it was asked for.
    pub value: Option<Value>,
    /// Where a long value is, so that it can be stored again without its bytes.
    pub long: Option<Arc<LongValue>>,
}

impl Current {
    /// The same with the value, which was read.
    pub fn with_value(self, value: Value) -> Current {
        Current { size: value.len() as u64, value: Some(value), ..self }
    }

    /// The same with a value that was read, or only with its length.
    pub fn with_read(self, value: Value, only_length: bool) -> Current {
        let size = value.len() as u64;
        if only_length { Current { size, ..self } } else { self.with_value(value) }
    }
}

/// A key as a pin has it.
#[derive(Debug, Clone, PartialEq)]
pub struct PinnedKey {
    /// The key; none where its record can't be read and nothing else says whose that is.
    pub key: Option<Key>,
    /// Its value, or why it can't be read.
    pub value: Result<Value, OpError>,
    /// Milliseconds since the Unix epoch, 0 for none.
    pub expires_at_ms: u64,
}

/// What a shard answers.
#[derive(Debug)]
pub enum Answer {
    /// The result of `Key`.
    Reply(Reply),
    /// The version that a watch saw.
    Watching {
        /// To be handed to `Lock`.
        version: u64,
    },
    /// Keys are held.
    Locked {
        /// To be handed to `Prepare` and `Release`.
        hold: HoldId,
        /// The states, in the order of the keys.
        current: Vec<Result<Option<Current>, OpError>>,
        /// Whether a watched key changed.
        dirty: bool,
    },
    /// A step is done.
    Done,
    /// A step failed.
    Failed(OpError),
    /// Keys from a scan.
    Scanned {
        /// Where to go on within this shard; 0 when it is at its end.
        cursor: u64,
        /// Live keys.
        keys: Vec<Key>,
        /// Why there may be more: the record of one of them cannot be read, and the key is in it.
        unreadable: Option<OpError>,
    },
    /// Keys from a listing.
    Listed {
        /// Live keys, in the order that was asked for.
        keys: Vec<Key>,
        /// Behind which name to go on; none when the range is at its end in this shard.
        next: Option<Key>,
    },
    /// Keys of a pin.
    Pinned {
        /// As they were.
        keys: Vec<PinnedKey>,
        /// There are no more in this shard.
        is_last: bool,
    },
    /// How many keys there are.
    Count(u64),
}
