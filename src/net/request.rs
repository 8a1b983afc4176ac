//! What a connection asks of its node.

use bytes::Bytes;

use crate::engine::action::{Action, Command};
use crate::engine::op::{Key, RangeQuery, WatchedKey};

/// One request; its answer is a `Completed`.
#[derive(Debug, Clone, PartialEq)]
pub enum Request {
    /// One action on one key.
    Single {
        /// The key.
        key: Key,
        /// What to do.
        action: Action,
    },
    /// Commands on several keys, all or nothing.
    Batch {
        /// In order; without `exec` there is exactly one.
        commands: Vec<Command>,
        /// Keys that must not have changed. These watches end with the batch, whatever comes of it: no `Unwatch`
        /// follows.
        watched: Vec<WatchedKey>,
        /// Whether the answer is the array of all replies, or null when a watched key changed; else it is the one
        /// command's reply.
        exec: bool,
    },
    /// Starts watching keys. Answered with `Completed::Watching`, or with an error when none of them is watched.
    Watch {
        /// The keys, each once.
        keys: Vec<Key>,
    },
    /// Ends one watch of each key. Answered with anything.
    Unwatch {
        /// The keys, once per watch.
        keys: Vec<Key>,
    },
    /// Counts keys. Answered with an integer.
    DbSize,
    /// Some keys and the cursor that goes on: an array of the cursor as a byte string, and the array of keys.
    Scan {
        /// Where to go on; 0 starts.
        cursor: u64,
        /// About how many keys to visit.
        count: usize,
        /// Only keys that match; see `net::glob`.
        pattern: Option<Bytes>,
        /// Only keys of this type.
        type_filter: Option<Bytes>,
    },
    /// All keys that match, as an array.
    Keys {
        /// See `net::glob`.
        pattern: Bytes,
    },
    /// Keys between two bounds, in order, and their values: an array of a key, its value, the next key... or of keys alone.
    Range(RangeQuery),
    /// Deletes every key. Answered with OK.
    FlushAll,
    /// Collects all garbage that is worth it. Answered with OK when that is done.
    Compact,
    /// Makes everything so far durable. Answered with OK, or what BGSAVE says.
    Save {
        /// Whether the answer may come before.
        background: bool,
    },
    /// A step of a dump.
    Dump(DumpStep),
    /// Stops the node; answered only when it does not stop.
    Shutdown {
        /// Whether to make everything durable first.
        save: bool,
    },
}

/// A step of a dump of all keys as they are at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DumpStep {
    /// Begins it. Answered with its number.
    Begin,
    /// Reads on. Answered with an array: whether these are the last keys (1 or 0), then for each its name, its value or an error,
    /// and when it expires (milliseconds since the Unix epoch, 0 for never).
    Next(u64),
    /// Ends it. Answered with OK.
    End(u64),
}

impl Request {
    /// A global request touches more keys than it names, or session state that earlier commands use, so it runs alone
    /// on its connection.
    pub fn is_global(&self) -> bool {
        match self {
            Self::Single { .. } => false,
            Self::Batch { watched, .. } => !watched.is_empty(),
            Self::Watch { .. }
            | Self::Unwatch { .. }
            | Self::DbSize
            | Self::Scan { .. }
            | Self::Keys { .. }
            | Self::Range(_)
            | Self::FlushAll
            | Self::Compact
            | Self::Save { .. }
            | Self::Dump(_)
            | Self::Shutdown { .. } => true,
        }
    }
}
