//! Checking a device: everything is read, every checksum and every cross-reference verified, nothing written.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::device_format::{OpenError, read_superblock};
use super::op::{BatchId, ShardId};
use super::recovery::{self, Damage, Held, ScannedShard, TornTail};
use crate::device::Device;
use crate::format::layout::SUPERBLOCK_COPIES;
use crate::format::superblock::Superblock;

/// What a check found.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Report {
    /// The device's identity.
    pub uuid: String,
    /// Starts of the node on it.
    pub boot: u64,
    /// Shards.
    pub shard_count: u16,
    /// Bytes that it was formatted with.
    pub device_size_bytes: u64,
    /// Bytes of one extent.
    pub extent_size_bytes: u64,
    /// Extents on it.
    pub extent_count: u32,
    /// Extents that hold data.
    pub extents_used: u32,
    /// Keys, expired ones that are still stored included.
    pub keys: u64,
    /// Frames read.
    pub frames: u64,
    /// Records read.
    pub records: u64,
    /// Bytes of frames, padding included.
    pub log_bytes: u64,
    /// Complete checkpoints; what they say was compared with the log.
    pub checkpoints: u32,
    /// Checkpoints that are not there in whole: cut short by a crash, or given up. They cost time, never data.
    pub incomplete_checkpoints: u32,
    /// Superblock copies that are not as the others, with what is wrong with each.
    pub bad_superblock_copies: Vec<String>,
    /// What was acknowledged and can't be read back, or may not be.
    pub damage: Vec<Damage>,
    /// Damaged bytes that nothing depends on any more that a client could ask for: records that were written over or deleted
    /// since, and padding.
    pub superseded: Vec<Damage>,
    /// Tails that were in flight when the node died: normal after a crash, and no damage.
    pub torn_tails: Vec<TornTail>,
}

impl Report {
    /// Whether nothing is wrong that a client could come to see.
    pub fn is_clean(&self) -> bool {
        self.damage.is_empty() && self.bad_superblock_copies.is_empty()
    }
}

/// Reads and verifies everything. `progress` is told bytes done and bytes to do.
pub fn check<D: Device>(device: &mut D, progress: &mut dyn FnMut(u64, u64)) -> Result<Report, OpenError> {
    let quorum = read_superblock(device)?;
    let superblock = Arc::new(quorum.superblock);
    let survey = recovery::survey(device, &superblock)?;
    let total = survey.extent_count() as u64 * superblock.layout.extent_size;
    let mut done = 0;
    let mut shards = Vec::new();
    for shard in (0..superblock.shard_count).map(ShardId) {
        let scanned = recovery::scan_shard(device, &superblock, shard, survey.chains(shard), &mut |bytes| {
            done += bytes;
            progress(done, total);
        })?;
        shards.push(scanned);
    }
    let mut damage = survey.damage.clone();
    damage.extend(missing_parts(&shards));
    let committed = recovery::committed_batches(&shards);
    let mut report = Report {
        uuid: uuid::Uuid::from_bytes(superblock.uuid).to_string(),
        boot: superblock.boot,
        shard_count: superblock.shard_count,
        device_size_bytes: superblock.layout.device_size,
        extent_size_bytes: superblock.layout.extent_size,
        extent_count: superblock.layout.extent_count,
        extents_used: shards.iter().map(|shard| shard.used_extents.len() as u32).sum(),
        keys: 0,
        frames: shards.iter().map(|shard| shard.frame_count).sum(),
        records: shards.iter().map(|shard| shard.record_count).sum(),
        log_bytes: shards.iter().map(|shard| shard.log_bytes).sum(),
        bad_superblock_copies: quorum
            .bad
            .iter()
            .map(|(copy, what)| format!("copy {copy} of {SUPERBLOCK_COPIES}: {what}"))
            .collect(),
        torn_tails: shards.iter().filter_map(|shard| shard.torn.clone()).collect(),
        damage,
        superseded: Vec::new(),
        checkpoints: 0,
        incomplete_checkpoints: 0,
    };
    let mut checkpoints = recovery::load_checkpoints(device, &superblock, &survey, &mut |_| {})?;
    report.checkpoints = checkpoints.chains.len() as u32;
    report.incomplete_checkpoints = checkpoints.incomplete;
    // As the next start would read it: a checkpoint of a clean stop counts alone only if no start came since.
    let started = Superblock { boot: superblock.boot + 1, ..(*superblock).clone() };
    for shard in shards {
        let id = shard.id();
        let state = shard.resolve(&committed, &superblock);
        let is_sound = state.damage().is_empty();
        report.keys += state.key_count();
        report.damage.extend_from_slice(state.damage());
        report.superseded.extend_from_slice(state.superseded());
        for (key, missing, entry) in state.incomplete_values() {
            report.damage.push(Damage {
                shard: Some(id.0),
                extent: entry.extent,
                offset: u64::from(entry.offset),
                size: u64::from(entry.size()),
                key: Some(key.escape_ascii().to_string()),
                what: format!("{missing} chunk(s) of its value are not there"),
                held: Held::Anything,
            });
        }
        // Where the log has damage, the checkpoint may well know more.
        if let Some(base) = checkpoints.take(id).filter(|_| is_sound) {
            let chain = survey.chains(id);
            let recovered = recovery::recover_shard(device, &started, id, chain, Some(base), &mut |_| {})?;
            let other = recovered.resolve(&committed, &superblock);
            // Keys with an expiry may be gone from one of the two.
            if let Some(difference) = other.difference(&state, device, &superblock, u64::MAX)? {
                report.damage.push(Damage {
                    shard: Some(id.0),
                    extent: 0,
                    offset: 0,
                    size: 0,
                    key: None,
                    what: format!("the checkpoint and the log disagree: {difference}"),
                    held: Held::Anything,
                });
            }
        }
    }
    Ok(report)
}

/// A committed batch has parts in as many shards as its commit record says, unless a FLUSHALL made them void or garbage
/// collection has been there.
pub(super) fn missing_parts(shards: &[ScannedShard]) -> Vec<Damage> {
    if shards.iter().any(ScannedShard::has_retired) {
        return Vec::new();
    }
    let mut seen: BTreeMap<BatchId, u16> = BTreeMap::new();
    for batch in shards.iter().flat_map(|shard| &shard.batches_seen) {
        *seen.entry(*batch).or_default() += 1;
    }
    let commits =
        shards.iter().flat_map(|shard| shard.commits.iter().map(move |commit| (shard.id(), commit)));
    commits
        .filter(|(_, (batch, participants))| seen.get(batch).copied().unwrap_or(0) < *participants)
        .map(|(shard, (batch, participants))| Damage {
            shard: Some(shard.0),
            extent: 0,
            offset: 0,
            size: 0,
            key: None,
            what: format!(
                "batch {}.{} was committed by {participants} shards, parts are in {}",
                batch.boot,
                batch.number,
                seen.get(batch).copied().unwrap_or(0)
            ),
            held: Held::Anything,
        })
        .collect()
}
