//! A node: one device, its engine spread over reactors, and the sockets in front of it.
//!
//! [`mod@open`] turns a device into shard states; [`mod@start`] puts them on reactors, one thread each, and returns a
//! handle. The work of one reactor is in [`reactor`]; what a request needs across shards is in `tasks`.
//!
//! Invariants:
//! - A shard is owned by one reactor; every other thread reaches it through a mailbox.
//! - Nothing is served before recovery has settled on every reactor.
//! - A node that stops answers what it has taken, then marks its device as cleanly stopped.

pub mod client;
pub mod config;
mod dump;
mod info;
pub mod memory;
pub mod open;
pub mod reactor;
pub mod shared;
pub mod start;
mod tasks;

pub use client::Client;
pub use config::NodeConfig;
pub use open::{Opened, open};
pub use start::{Node, start};

use crate::device::DeviceError;
use crate::device::IoError;
use crate::engine::device_format::OpenError;
use crate::engine::op::{Answer, OpError, ShardId, ShardOp};
use crate::engine::recovery::Damage;
use crate::reactor::cores::CoreError;
use crate::reactor::thread::SpawnError;

/// An operation on its way to the reactor of its shard.
#[derive(Debug)]
pub struct ShardRequest {
    /// The shard.
    pub shard: ShardId,
    /// Comes back with the answer.
    pub tag: u64,
    /// What to do.
    pub op: ShardOp,
}

/// An answer on its way back.
#[derive(Debug)]
pub struct ShardAnswer {
    /// As in the request.
    pub tag: u64,
    /// The answer.
    pub answer: Answer,
}

/// Why a node did not start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The device could not be opened.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// It is not formatted, damaged, or not for this version.
    #[error("{device}: {source}")]
    Open {
        /// The device.
        device: String,
        /// What is wrong.
        source: OpenError,
    },
    /// The device failed while it was read.
    #[error("{device}: {source}")]
    Io {
        /// The device.
        device: String,
        /// What failed.
        source: IoError,
    },
    /// A block can't be read where newer records than all others may be.
    #[error(
        "{device}: extent {}, byte {} can't be read ({}), and the end of a log may be there. It is not served, so that nothing is written over: start again in case the fault passes; `basalt check --device {device}` lists everything", .at.extent, .at.offset, .at.what
    )]
    Unreadable {
        /// The device.
        device: String,
        /// Where.
        at: Box<Damage>,
    },
    /// A core can't be used.
    #[error(transparent)]
    Core(#[from] CoreError),
    /// A thread did not start.
    #[error(transparent)]
    Thread(#[from] SpawnError),
    /// The kernel refused something that every node needs.
    #[error("cannot {action}: {source}")]
    Os {
        /// What was tried.
        action: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// Recovery could not be made durable.
    #[error("{device}: recovery could not be settled: {source}")]
    Settle {
        /// The device.
        device: String,
        /// The cause.
        source: OpError,
    },
    /// The index alone needs more than its part of the memory.
    #[error(
        "{device}: the index of {keys} keys takes {index}, and --memory {size_max} leaves it half of that: start with --memory {needed} or more"
    )]
    Memory {
        /// The device.
        device: String,
        /// Keys found.
        keys: u64,
        /// What their index takes.
        index: String,
        /// The ceiling.
        size_max: String,
        /// A ceiling that would do.
        needed: String,
    },
    /// A reactor ended without being told to.
    #[error("a reactor ended unexpectedly; see the messages above")]
    ReactorEnded,
}
