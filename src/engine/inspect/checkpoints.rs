//! The checkpoints that are on a device, for people.

use super::Inspection;
use crate::device::Device;
use crate::engine::device_format::OpenError;
use crate::engine::recovery::{self, CheckpointedShard, FoundCheckpoint};
use crate::format::checkpoint::CHECKPOINT_VERSION;

/// One checkpoint.
#[derive(Debug, Clone, serde::Serialize)]
pub struct CheckpointView {
    /// Its number: later ones have higher ones.
    pub checkpoint: u64,
    /// Whether a start can use it.
    pub state: CheckpointState,
    /// The start of the node that wrote it.
    pub boot: u64,
    /// Version of what is in it.
    pub version: u32,
    /// Its extents, in order.
    pub extents: Vec<u32>,
    /// What it has of each shard; nothing when it is not whole.
    pub shards: Vec<CheckpointedShardView>,
}

/// Whether a start can use a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckpointState {
    /// A start reads it.
    Used,
    /// It is whole, and there are newer ones of all its shards.
    Superseded,
    /// Its end or something of it is missing or damaged: it was cut short, or its space has been used again. It costs nothing but
    /// time.
    Incomplete,
    /// Another version of the program wrote it, which costs time as well.
    Foreign,
}

/// What a checkpoint has of one shard.
#[derive(Debug, Clone, serde::Serialize)]
pub struct CheckpointedShardView {
    /// The shard.
    pub shard: u16,
    /// A start takes the shard from this checkpoint.
    pub used: bool,
    /// The log up to this frame is covered.
    pub frame: u64,
    /// The log ended there with a clean stop.
    pub clean_stop: bool,
    /// No record of the log up to there has this sequence or a higher one.
    pub next_sequence: u64,
    /// Extents that the log was in.
    pub log_extents: usize,
    /// Keys.
    pub keys: u64,
    /// Those of them that have an expiry.
    pub expiring_keys: u64,
    /// Those of them whose value is long.
    pub long_values: u64,
    /// Chunks of long values.
    pub chunks: u64,
    /// Parts of batches that were not decided.
    pub undecided_parts: u64,
}

impl<D: Device> Inspection<D> {
    /// Every checkpoint on the device, the newest first. `progress` is told bytes done and bytes to do.
    pub fn checkpoints(
        &mut self,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Vec<CheckpointView>, OpenError> {
        let survey = recovery::survey(&mut self.device, &self.superblock)?;
        let total = survey.checkpoint_extent_count() as u64 * self.superblock.layout.extent_size;
        let mut done = 0;
        let found = recovery::find_checkpoints(&mut self.device, &self.superblock, &survey, &mut |bytes| {
            done += bytes;
            progress(done, total);
        })?;
        Ok(found.iter().map(CheckpointView::from).collect())
    }
}

impl From<&FoundCheckpoint> for CheckpointView {
    fn from(found: &FoundCheckpoint) -> CheckpointView {
        let version = found.headers.first().map_or(CHECKPOINT_VERSION, |header| header.version);
        let state = match &found.shards {
            Some(shards) if shards.iter().any(|shard| shard.is_newest) => CheckpointState::Used,
            Some(_) => CheckpointState::Superseded,
            None if version != CHECKPOINT_VERSION => CheckpointState::Foreign,
            None => CheckpointState::Incomplete,
        };
        CheckpointView {
            checkpoint: found.checkpoint,
            state,
            boot: found.headers.first().map_or(0, |header| header.boot),
            version,
            extents: found.headers.iter().map(|header| header.extent).collect(),
            shards: found.shards.iter().flatten().map(CheckpointedShardView::from).collect(),
        }
    }
}

impl From<&CheckpointedShard> for CheckpointedShardView {
    fn from(one: &CheckpointedShard) -> CheckpointedShardView {
        CheckpointedShardView {
            shard: one.position.shard.0,
            used: one.is_newest,
            frame: one.position.frame,
            clean_stop: one.position.clean,
            next_sequence: one.position.next_sequence,
            log_extents: one.extents,
            keys: one.keys,
            expiring_keys: one.expiring_keys,
            long_values: one.long_values,
            chunks: one.chunks,
            undecided_parts: one.undecided_parts,
        }
    }
}
