//! Recovery: from the bytes on the device to each shard's state, by scanning the log.
//!
//! First a survey reads every extent's header, which gives each shard its chain of extents. Then shards are scanned
//! independently, in any number of threads; last, with every shard's commit records known, batches are decided.
//!
//! What a frame's absence means (see `format::frame`): the frames of a shard are numbered without gaps and never go back
//! in boot, so the log ends at the first number that is missing. If any frame behind that gap says that the missing one
//! was durable, it was lost after it was acknowledged: that is damage. If none does, it was in flight when the node
//! died: a torn tail, and whatever lies behind it never happened.
//!
//! What garbage collection has kept is in units, which are read alongside: each is put behind the frame that it follows (see
//! `units.rs`).
//!
//! Invariants:
//! - Nothing is written here. Doing it again gives the same result.
//! - A frame counts as a whole or not at all, unless it is damaged; then each record that can be trusted counts.

mod checkpoint;
mod frames;
mod history;
mod read;
mod resolve;
mod scan;
mod survey;
mod units;

use bytes::Bytes;

pub use checkpoint::{
    CheckpointedShard, Checkpoints, FoundCheckpoint, ShardCheckpoint, find_checkpoints, load_checkpoints,
};
pub(in crate::engine) use frames::{Found, FrameRead, frames_of, units_of};
pub(in crate::engine) use history::SeenRecord;
pub(in crate::engine) use read::{Extent as ReadExtent, read_tried};
pub use resolve::{Decisions, ScannedShard, blocking_damage, committed_batches, rebuild_allocator};
pub(in crate::engine) use resolve::{Doubt, FoundLong, Lost};
pub use scan::{recover_shard, scan_shard, scan_shard_watching};
pub use survey::{Chains, Survey, survey};
pub(in crate::engine) use units::UnitRead;

/// Something that was acknowledged and can't be read back.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Damage {
    /// The shard, where it is known.
    pub shard: Option<u16>,
    /// The extent.
    pub extent: u32,
    /// Bytes from the extent's start.
    pub offset: u64,
    /// Bytes concerned.
    pub size: u64,
    /// The key, where it could be read.
    pub key: Option<String>,
    /// What is wrong.
    pub what: String,
    /// What was there.
    #[serde(skip)]
    pub(in crate::engine) held: Held,
}

/// What damaged bytes held, as far as what is left of them says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::engine) enum Held {
    /// Anything: records whose keys nobody knows, perhaps.
    #[default]
    Anything,
    /// Nothing that anybody asks for: padding, or the count of a commit record that decides without it.
    Nothing,
    /// The value of this key's record at that place.
    Value(Bytes),
    /// A chunk of a long value.
    Chunk(u64),
    /// What is retired, as the record of this frame said.
    Retirement(u64),
}

/// The end of a log that was in flight when the node died, and was cut.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct TornTail {
    /// The shard.
    pub shard: u16,
    /// The extent.
    pub extent: u32,
    /// Bytes from the extent's start.
    pub offset: u64,
    /// The first frame that is not there.
    pub frame: u64,
}
