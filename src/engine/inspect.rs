//! What is on a device, for people: superblock, extents, frames and records, the history of a key. Nothing is written.
//!
//! Sizes are bytes and say so in their names, as do times (milliseconds since the Unix epoch).

mod checkpoints;

use std::collections::BTreeSet;
use std::sync::Arc;

pub use checkpoints::{CheckpointState, CheckpointView, CheckpointedShardView};

use super::device_format::{OpenError, read_copies, read_superblock_for_rescue};
use super::index::{Index, hash_key};
use super::op::{Key, ShardId};
use super::recovery::{
    self, Damage, Decisions, Found, FoundLong, FrameRead, ReadExtent, ScannedShard, SeenRecord, UnitRead,
    frames_of, units_of,
};
use crate::device::Device;
use crate::device::rescue::RescueDevice;
use crate::format::extent::{ExtentHeader, ExtentRole};
use crate::format::manifest::ManifestPiece;
use crate::format::record::RecordType;
use crate::format::slot::{shard_of, slot_of};
use crate::format::superblock::{FORMAT_VERSION, Superblock};

/// A superblock and its copies.
#[derive(Debug, Clone, serde::Serialize)]
pub struct SuperblockView {
    /// The device's identity.
    pub uuid: String,
    /// The name that people gave it.
    pub label: String,
    /// Version of the format.
    pub format_version: u32,
    /// One more at every update.
    pub generation: u64,
    /// Starts of the node on it.
    pub boot: u64,
    /// When it was formatted.
    pub created_ms: u64,
    /// Bytes that it was formatted with.
    pub device_size_bytes: u64,
    /// Bytes that are there.
    pub found_size_bytes: u64,
    /// Bytes of a block of the log.
    pub block_size_bytes: u32,
    /// Bytes of an extent.
    pub extent_size_bytes: u64,
    /// Extents.
    pub extent_count: u32,
    /// Shards.
    pub shard_count: u16,
    /// How keys are found.
    pub index: &'static str,
    /// The copies.
    pub copies: Vec<CopyView>,
}

/// One copy of the superblock.
#[derive(Debug, Clone, serde::Serialize)]
pub struct CopyView {
    /// Its number.
    pub copy: usize,
    /// Where it is on the device.
    pub offset_bytes: u64,
    /// Its generation, when it is intact.
    pub generation: Option<u64>,
    /// What is wrong with it.
    pub error: Option<String>,
}

/// One extent.
#[derive(Debug, Clone, serde::Serialize)]
pub struct ExtentView {
    /// Its number.
    pub extent: u32,
    /// Where it starts on the device.
    pub offset_bytes: u64,
    /// What it is used for.
    pub state: ExtentUse,
    /// Whose it is, or was.
    pub shard: Option<u16>,
    /// Unique to this life of it.
    pub epoch: Option<u64>,
    /// Its place among the extents in the order in which they were opened; 0 when its header was lost.
    pub ordinal: Option<u64>,
    /// The start of the node that opened it.
    pub boot: Option<u64>,
    /// What is in it: frames of a shard's log, or units of what garbage collection has kept.
    pub holds: Option<&'static str>,
    /// Number of the first frame in it, or the first unit.
    pub first_frame: Option<u64>,
    /// Number of the last frame in it; none while it is being filled.
    pub last_frame: Option<u64>,
    /// Opened from what is kept for deletes and commit records.
    pub reserve: bool,
    /// Bytes from its start that are in use.
    pub used_bytes: u64,
    /// Bytes of records that are the newest of their keys.
    pub live_bytes: u64,
    /// Bytes of deletes and commit records, which may have to be kept.
    pub carried_bytes: u64,
    /// The others that are in use: headers, padding, what was overwritten.
    pub dead_bytes: u64,
}

/// What an extent is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ExtentUse {
    /// Never used.
    Free,
    /// Used once; nothing in it counts any more.
    Stale,
    /// A shard's log ends in it.
    Open,
    /// A shard's log is in it, and goes on elsewhere.
    Sealed,
}

/// What is in an extent, whether it counts or not.
#[derive(Debug, Clone, serde::Serialize)]
pub struct ExtentContents {
    /// Its number.
    pub extent: u32,
    /// Where it starts on the device.
    pub offset_bytes: u64,
    /// Whose it is; none when it has no header, not even one that its frames tell of.
    pub shard: Option<u16>,
    /// Unique to this life of it.
    pub epoch: Option<u64>,
    /// The start of the node that opened it.
    pub boot: Option<u64>,
    /// What is in it: frames of a shard's log, or units of what garbage collection has kept.
    pub holds: Option<&'static str>,
    /// Its frames, or units.
    pub frames: Vec<FrameView>,
    /// Offsets from the extent's start of blocks that the device can't read.
    pub unreadable_offsets_bytes: Vec<usize>,
}

/// One frame.
#[derive(Debug, Clone, serde::Serialize)]
pub struct FrameView {
    /// Its number.
    pub frame: u64,
    /// From the extent's start.
    pub offset_bytes: u64,
    /// On the device, padding included.
    pub size_bytes: u32,
    /// Of header and records.
    pub payload_bytes: u32,
    /// Every frame up to this one was durable when it was written.
    pub durable_frame: Option<u64>,
    /// Of a unit: the frame of the log behind which its records stand.
    pub follows_frame: Option<u64>,
    /// Of its first record; the others follow it. Records of a unit have those that they had before.
    pub first_sequence: Option<u64>,
    /// The start of the node that wrote it.
    pub boot: u64,
    /// It marks a clean stop.
    pub clean_stop: bool,
    /// Its records.
    pub records: Vec<RecordView>,
    /// What is wrong with it.
    pub damage: Vec<Damage>,
}

/// One record.
#[derive(Debug, Clone, serde::Serialize)]
pub struct RecordView {
    /// What it says.
    pub kind: &'static str,
    /// The key, bytes that are no text escaped.
    pub key: String,
    /// Its place in the shard's history.
    pub sequence: u64,
    /// The extent.
    pub extent: u32,
    /// From the extent's start.
    pub offset_bytes: u32,
    /// Of the whole record.
    pub size_bytes: u32,
    /// Of the value.
    pub value_bytes: u32,
    /// When it expires; 0 for never.
    pub expires_at_ms: u64,
    /// The batch that it belongs to: boot and number.
    pub batch: Option<String>,
    /// The value matches its checksum.
    pub value_intact: bool,
}

/// What is known of one key.
#[derive(Debug, Clone, serde::Serialize)]
pub struct KeyView {
    /// The key, bytes that are no text escaped.
    pub key: String,
    /// Its slot.
    pub slot: u16,
    /// Its shard.
    pub shard: u16,
    /// Whether it is there.
    pub state: KeyState,
    /// Its newest record.
    pub newest: Option<RecordView>,
    /// The chunks of a long value.
    pub chunks: Option<ChunksView>,
    /// Every other record of it that is still there, the newest first.
    pub others: Vec<OtherRecord>,
}

/// The chunks of a long value.
#[derive(Debug, Clone, serde::Serialize)]
pub struct ChunksView {
    /// How many there are.
    pub count: usize,
    /// How many of them can't be read.
    pub damaged: usize,
}

/// Whether a key is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyState {
    /// It is.
    Present,
    /// It was, and has expired.
    Expired,
    /// It is not.
    Absent,
    /// It is, and its value can't be read.
    Damaged,
    /// Records were lost that may have been newer.
    Doubtful,
}

/// A record that is not the newest of its key.
#[derive(Debug, Clone, serde::Serialize)]
pub struct OtherRecord {
    /// The record.
    #[serde(flatten)]
    pub record: RecordView,
    /// Why it does not count.
    pub why: &'static str,
}

/// A device that is looked at.
pub struct Inspection<D> {
    device: RescueDevice<D>,
    superblock: Arc<Superblock>,
    /// What is wrong with the device as a whole.
    pub notes: Vec<String>,
}

impl<D: Device> Inspection<D> {
    /// Reads the superblock: one copy of it will do.
    pub fn open(device: D) -> Result<Inspection<D>, OpenError> {
        let mut device = RescueDevice::new(device);
        let (superblock, notes) = read_superblock_for_rescue(&mut device)?;
        Ok(Inspection { device, superblock: Arc::new(superblock), notes })
    }

    /// The superblock.
    pub fn superblock(&mut self) -> Result<SuperblockView, OpenError> {
        let (copies, _) = read_copies(&mut self.device)?;
        let one = &self.superblock;
        let layout = one.layout;
        let copies = copies.iter().enumerate().map(|(copy, bytes)| {
            let decoded = Superblock::decode(bytes);
            CopyView {
                copy,
                offset_bytes: layout.superblock_offset(copy),
                generation: decoded.as_ref().ok().map(|(_, found)| found.generation),
                error: match decoded {
                    Ok((at, _)) if at != copy => Some(format!("it is copy {at}")),
                    Ok(_) => None,
                    Err(error) => Some(error.to_string()),
                },
            }
        });
        Ok(SuperblockView {
            uuid: uuid::Uuid::from_bytes(one.uuid).to_string(),
            label: one.label.clone(),
            format_version: FORMAT_VERSION,
            generation: one.generation,
            boot: one.boot,
            created_ms: one.created_ms,
            device_size_bytes: layout.device_size,
            found_size_bytes: self.device.real_size(),
            block_size_bytes: one.block_size,
            extent_size_bytes: layout.extent_size,
            extent_count: layout.extent_count,
            shard_count: one.shard_count,
            index: one.index.name(),
            copies: copies.collect(),
        })
    }

    /// Every extent. `progress` is told bytes done and bytes to do.
    pub fn extents(&mut self, progress: &mut dyn FnMut(u64, u64)) -> Result<Vec<ExtentView>, OpenError> {
        let survey = recovery::survey(&mut self.device, &self.superblock)?;
        let (superblock, layout) = (Arc::clone(&self.superblock), self.superblock.layout);
        let mut views: Vec<ExtentView> = (0..layout.extent_count)
            .map(|extent| ExtentView::free(extent, layout.extent_offset(extent)))
            .collect();
        let total = survey.extent_count() as u64 * layout.extent_size;
        let mut done = 0;
        let mut shards = Vec::new();
        for shard in (0..superblock.shard_count).map(ShardId) {
            for header in survey.chains(shard).iter() {
                if let Some(view) = views.get_mut(header.extent as usize) {
                    view.claim(header);
                }
            }
            let chain = survey.chains(shard);
            let scanned = recovery::scan_shard(&mut self.device, &superblock, shard, chain, &mut |bytes| {
                done += bytes;
                progress(done, total);
            })?;
            shards.push(scanned);
        }
        let decisions = recovery::committed_batches(&shards);
        for shard in shards {
            let mut state = shard.resolve(&decisions, &superblock);
            let mut cursor = 0;
            loop {
                let extents = &mut state.extents;
                cursor = state.index.scan(cursor, 4096, &mut |_, entry| extents.on_entry(entry));
                if cursor == 0 {
                    break;
                }
            }
            for chunk in state.chunks.values() {
                state.extents.on_entry(&chunk.entry());
            }
            for (number, extent) in state.extents.iter() {
                let Some(view) = views.get_mut(number as usize) else { continue };
                let is_open = extent.last_frame.is_none();
                view.state = if is_open { ExtentUse::Open } else { ExtentUse::Sealed };
                view.last_frame = extent.last_frame;
                view.used_bytes = extent.end;
                view.live_bytes = extent.live_bytes;
                // A record that is live and expires is counted among those that may have to be kept as well.
                view.carried_bytes = extent.carry_bytes.min(extent.end.saturating_sub(extent.live_bytes));
                view.dead_bytes = extent.end.saturating_sub(view.live_bytes + view.carried_bytes);
            }
        }
        Ok(views)
    }

    /// What is in one extent; `None` when the device has no such extent.
    pub fn extent(&mut self, extent: u32) -> Result<Option<ExtentContents>, OpenError> {
        let superblock = Arc::clone(&self.superblock);
        if extent >= superblock.layout.extent_count {
            return Ok(None);
        }
        let ReadExtent { bytes, unreadable } = ReadExtent::read(&mut self.device, &superblock, extent)?;
        let (header, frames) = frames_of(&bytes, extent, &superblock);
        let survivors = header.filter(|header| header.role == ExtentRole::Survivors);
        let units = survivors.map_or_else(Vec::new, |header| units_of(&bytes, &header, &superblock));
        Ok(Some(ExtentContents {
            extent,
            offset_bytes: superblock.layout.extent_offset(extent),
            shard: header.map(|header| header.shard.0),
            epoch: header.map(|header| header.epoch),
            boot: header.map(|header| header.boot),
            holds: header.map(|header| holds(&header)),
            frames: frames
                .into_iter()
                .map(FrameView::from)
                .chain(units.into_iter().map(FrameView::from))
                .collect(),
            unreadable_offsets_bytes: unreadable,
        }))
    }

    /// What is known of one key at a moment.
    pub fn key(
        &mut self,
        key: &Key,
        now_ms: u64,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<KeyView, OpenError> {
        let superblock = Arc::clone(&self.superblock);
        let id = shard_of(key, superblock.shard_count);
        let survey = recovery::survey(&mut self.device, &superblock)?;
        let watched = BTreeSet::from([key.clone()]);
        let extents = |shard| survey.chains(shard).count() as u64 * superblock.layout.extent_size;
        let (mut total, mut done) = (extents(id), 0);
        let mut scan = |device: &mut RescueDevice<D>, shard: ShardId, total: u64| {
            let chain = survey.chains(shard);
            recovery::scan_shard_watching(device, &superblock, shard, chain, &watched, &mut |bytes| {
                done += bytes;
                progress(done, total);
            })
        };
        let mut shards = vec![scan(&mut self.device, id, total)?];
        let own = recovery::committed_batches(&shards);
        let is_open = |one: &SeenRecord| one.batch.is_some_and(|batch| !own.is_committed(&batch));
        // Another shard may have decided a batch that the key was in.
        if shards[0].history().iter().any(is_open) {
            total = survey.extent_count() as u64 * superblock.layout.extent_size;
            for shard in (0..superblock.shard_count).map(ShardId).filter(|shard| *shard != id) {
                shards.push(scan(&mut self.device, shard, total)?);
            }
        }
        let decisions = recovery::committed_batches(&shards);
        Ok(key_view(key, shards.swap_remove(0), &decisions, &superblock, now_ms))
    }
}

fn key_view(
    key: &Key,
    mut scanned: ScannedShard,
    decisions: &Decisions,
    superblock: &Arc<Superblock>,
    now_ms: u64,
) -> KeyView {
    let mut history = scanned.history().to_vec();
    history.sort_by_key(|one| std::cmp::Reverse(one.record.sequence));
    let damaged = std::mem::take(&mut scanned.damaged_chunks);
    let state = scanned.resolve(decisions, superblock);
    let identity = hash_key(&superblock.secret, key).identity();
    let entry = state.index.get(identity);
    let is_newest =
        |one: &SeenRecord| entry.is_some_and(|entry| entry.is_at(one.record.extent, one.record.offset));
    let newest = history.iter().find(|one| is_newest(one));
    let chunks = newest.and_then(|_| state.manifests.get(&identity)).map(|FoundLong { pieces, .. }| {
        let is_bad = |one: &&ManifestPiece| damaged.contains(&one.id) || !state.chunks.contains_key(&one.id);
        ChunksView { count: pieces.len(), damaged: pieces.iter().filter(is_bad).count() }
    });
    let is_doubtful = !state.doubt.is_known(identity);
    let others = history.iter().filter(|one| !is_newest(one)).map(|one| OtherRecord {
        record: RecordView::from(one),
        why: match one {
            one if one.is_cleared => "before a FLUSHALL",
            one if one.batch.is_some_and(|batch| !decisions.is_committed(&batch)) => {
                "its batch was not committed"
            }
            one if newest.is_none_or(|newest| one.record.sequence > newest.record.sequence) => match one.kind
            {
                RecordType::Delete => "it says that the key is gone",
                _ => "a later record says that the key is gone",
            },
            _ => "older",
        },
    });
    KeyView {
        key: key.escape_ascii().to_string(),
        slot: slot_of(key),
        shard: state.id.0,
        state: match newest {
            _ if is_doubtful || state.doubt.keys.contains(key) => KeyState::Doubtful,
            None => KeyState::Absent,
            Some(one) if super::action::is_expired(one.record.expires_at_ms, now_ms) => KeyState::Expired,
            Some(one) if !one.value_intact => KeyState::Damaged,
            Some(_) if chunks.as_ref().is_some_and(|chunks| chunks.damaged > 0) => KeyState::Damaged,
            Some(_) => KeyState::Present,
        },
        others: others.collect(),
        newest: newest.map(RecordView::from),
        chunks,
    }
}

impl ExtentView {
    fn free(extent: u32, offset_bytes: u64) -> ExtentView {
        ExtentView {
            extent,
            offset_bytes,
            state: ExtentUse::Free,
            shard: None,
            epoch: None,
            ordinal: None,
            boot: None,
            holds: None,
            first_frame: None,
            last_frame: None,
            reserve: false,
            used_bytes: 0,
            live_bytes: 0,
            carried_bytes: 0,
            dead_bytes: 0,
        }
    }

    fn claim(&mut self, header: &ExtentHeader) {
        self.state = ExtentUse::Stale;
        self.shard = Some(header.shard.0);
        self.epoch = Some(header.epoch);
        self.ordinal = Some(header.ordinal);
        self.boot = Some(header.boot);
        self.holds = Some(holds(header));
        self.first_frame = Some(header.first_frame);
        self.reserve = header.reserve;
    }
}

impl From<FrameRead> for FrameView {
    fn from(read: FrameRead) -> FrameView {
        let header = read.header;
        FrameView {
            frame: header.frame,
            offset_bytes: read.offset,
            size_bytes: header.size,
            payload_bytes: header.payload_size,
            durable_frame: Some(header.durable),
            follows_frame: None,
            first_sequence: Some(header.first_sequence),
            boot: header.boot,
            clean_stop: header.clean,
            records: read.records.into_iter().map(RecordView::from).collect(),
            damage: read.damage,
        }
    }
}

impl From<UnitRead> for FrameView {
    fn from(read: UnitRead) -> FrameView {
        let header = read.header;
        FrameView {
            frame: header.unit,
            offset_bytes: read.offset,
            size_bytes: header.size,
            payload_bytes: header.payload_size,
            durable_frame: None,
            follows_frame: Some(header.follows),
            first_sequence: None,
            boot: header.boot,
            clean_stop: false,
            records: read.records.into_iter().map(RecordView::from).collect(),
            damage: read.damage,
        }
    }
}

impl From<Found> for RecordView {
    fn from(found: Found) -> RecordView {
        RecordView::from(&SeenRecord {
            kind: found.kind,
            key: found.key,
            record: found.record,
            batch: found.batch.map(|(batch, _)| batch),
            value_intact: found.value_intact,
            is_cleared: false,
            pieces: None,
        })
    }
}

/// What an extent has, by the name that `inspect` gives it.
fn holds(header: &ExtentHeader) -> &'static str {
    match header.role {
        ExtentRole::Log => "log",
        ExtentRole::Survivors => "survivors",
    }
}

impl From<&SeenRecord> for RecordView {
    fn from(one: &SeenRecord) -> RecordView {
        RecordView {
            kind: match one.kind {
                RecordType::Put => "put",
                RecordType::Delete => "delete",
                RecordType::Commit => "commit",
                RecordType::Clear => "clear",
                RecordType::Retired => "retired",
                RecordType::Chunk => "chunk",
            },
            key: one.key.escape_ascii().to_string(),
            sequence: one.record.sequence,
            extent: one.record.extent,
            offset_bytes: one.record.offset,
            size_bytes: one.record.size,
            value_bytes: one.record.value_size,
            expires_at_ms: one.record.expires_at_ms,
            batch: one.batch.map(|batch| format!("{}.{}", batch.boot, batch.number)),
            value_intact: one.value_intact,
        }
    }
}
