//! Writing checkpoints while the shards run: an image of every shard's index, with the log position that it covers.
//!
//! ```text
//! asked for -> with the next group, note each shard's position -> once that is written, walk its index, chunk by chunk
//!           -> once everything logged meanwhile is durable, the end -> once that is durable, older checkpoints are free
//! ```
//!
//! The image is fuzzy: what changes during the walk may be in it or not. Replaying the log from the position settles it, since
//! an entry beyond the position is left out and a record behind it counts by its sequence.
//!
//! Invariants:
//! - The end is written only when every frame up to the end of the walk is durable: the image names some of them, and lacks
//!   what was overwritten before it could be indexed.
//! - A checkpoint is never needed: any trouble ends it, and its extents go back.
//! - A pass builds at most one chunk, so that no shard waits for its checkpoint.

use std::ops::Bound;

use bytes::Bytes;

use super::Engine;
use super::allocator::CheckpointChain;
use super::extents::ExtentState;
use super::index::{Entry, Identity, RecordRef};
use super::io_queue;
use super::op::{Clock, Key, KeyEffect, KeyRange, Order};
use super::shard::Shard;
use crate::device::{Device, IoError};
use crate::format::checkpoint::{
    CHECKPOINT_VERSION, CHUNK_HEADER_SIZE, CheckpointHeader, ExtentSummary, IndexedKey, IndexedLong, Item,
    PartRecord, ShardPosition, StoredChunk, UnitPosition, encode_chunk,
};
use crate::format::retirement::UnitMark;
use crate::format::{Place, front_coded};
use crate::planted::{Bug, is_planted};
use crate::probe::{self, Probe};

/// Bytes of items in a chunk, unless a single one is longer.
const CHUNK_SIZE: usize = 64 << 10;

/// Keys that one step of the walk visits.
const WALK_STEP: usize = 256;

/// Bytes of names at which such a step ends.
const NAMES_SIZE: usize = 16 << 10;

/// Bytes of log between two checkpoints, unless somebody wants it otherwise: as much as a start reads in a second or so, and
/// on a small device a part of it.
const INTERVAL_MAX: u64 = 1 << 30;
const INTERVAL_MIN: u64 = 64 << 20;
const INTERVAL_DIVISOR: u64 = 8;

/// Bytes that a reactor writes between two checkpoints of a device of this size, unless told otherwise.
pub fn interval_of(device_size: u64) -> u64 {
    (device_size / INTERVAL_DIVISOR).clamp(INTERVAL_MIN, INTERVAL_MAX)
}

/// Figures of checkpoints, for one engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct CheckpointStats {
    /// Checkpoints that were completed.
    pub written: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Checkpoints that were given up, for want of room or because something is damaged.
    pub skipped: u64,
}

/// One shard of a checkpoint.
struct Section {
    /// The last frame that the position covers.
    frame: u64,
    /// Its position, extents and so on.
    head: Items,
    /// Where the walk over its names is, which comes first; `None` before it began or where there are none.
    named: Option<Key>,
    /// Where the walk over its index is; `None` before it began.
    cursor: Option<u64>,
    /// Where the walk over its chunks is, once that over its index has ended.
    chunk: Option<u64>,
    /// The last frame when the walk ended.
    last_frame: u64,
}

/// Encoded items.
#[derive(Default)]
struct Items {
    bytes: Vec<u8>,
    /// Where each ends.
    ends: Vec<usize>,
}

impl Items {
    fn push(&mut self, item: &Item<'_>) {
        item.encode(&mut self.bytes);
        self.ends.push(self.bytes.len());
    }

    fn append(&mut self, other: Items) {
        let base = self.bytes.len();
        self.bytes.extend_from_slice(&other.bytes);
        self.ends.extend(other.ends.iter().map(|end| base + end));
    }

    /// Takes whole items, `size` bytes of them or a single longer one.
    fn take(&mut self, size: usize) -> Vec<u8> {
        let count = self.ends.partition_point(|end| *end <= size).max(1).min(self.ends.len());
        let Some(end) = count.checked_sub(1).map(|last| self.ends[last]) else { return Vec::new() };
        let rest = self.bytes.split_off(end);
        self.ends.drain(..count);
        self.ends.iter_mut().for_each(|one| *one -= end);
        std::mem::replace(&mut self.bytes, rest)
    }
}

/// The checkpoint that is being written.
struct Writing {
    number: u64,
    sections: Vec<Section>,
    /// The section that is being walked.
    at: usize,
    items: Items,
    entries: u64,
    ended: bool,
    extents: Vec<u32>,
    /// The place of the last extent's chunks, and the bytes from its start to the next one.
    open: Option<(Place, u64)>,
    chunks: u64,
    bytes: u64,
    in_flight: usize,
    failed: bool,
    /// One of its writes may still happen.
    is_loose: bool,
    /// The count of drops when it began.
    drops: u32,
    /// The group whose flush covers all of it, once everything is written.
    durable_with: Option<u64>,
    waiters: Vec<(usize, u64)>,
}

/// What one engine writes of checkpoints.
#[derive(Default)]
pub(super) struct Checkpointer {
    /// Bytes written to the device between two checkpoints; 0 for none but those that are asked for.
    interval: u64,
    written_at_last: u64,
    wanted: bool,
    is_last: bool,
    active: Option<Writing>,
    /// Shards and tokens of those who asked for the next one.
    waiters: Vec<(usize, u64)>,
    pub(super) stats: CheckpointStats,
}

impl Checkpointer {
    /// Extents of the one that is being written.
    pub(super) fn extents_held(&self) -> u32 {
        self.active.as_ref().map_or(0, |active| active.extents.len() as u32)
    }

    /// Whether one is to begin with the next group.
    pub(super) fn is_due(&self) -> bool {
        self.wanted && self.active.is_none()
    }

    /// Frames of a shard went elsewhere, or the space is wanted: the one that is being written is given up.
    pub(super) fn spoil(&mut self) {
        if let Some(active) = &mut self.active
            && !is_planted(Bug::CheckpointSurvivesRelocation)
        {
            active.failed = true;
        }
    }
}

fn indexed_key<'a>(
    identity: Identity,
    entry: &Entry,
    expires_at_ms: u64,
    long: Option<IndexedLong<'a>>,
) -> IndexedKey<'a> {
    IndexedKey {
        hash_upper: identity.upper(),
        hash_lower: identity.lower(),
        entry: entry.to_bits(),
        expires_at_ms,
        long,
    }
}

fn stored_chunk(id: u64, entry: &RecordRef) -> StoredChunk {
    StoredChunk {
        id,
        extent: entry.extent,
        offset: entry.offset,
        size: entry.size,
        value_size: entry.value_size,
        sequence: entry.sequence,
    }
}

/// Some names behind one; the last of them, when there may be more. The index is walked after its names, so that every key that it
/// has was among them, or is behind the position.
fn list_names(shard: &Shard, from: Option<Key>, items: &mut Items) -> Option<Key> {
    let directory = shard.directory().filter(|directory| !directory.is_empty())?;
    let range = KeyRange { from: from.map_or(Bound::Unbounded, Bound::Excluded), to: Bound::Unbounded };
    let (mut names, mut last, mut count) = (Vec::new(), Vec::new(), 0);
    directory.visit(&range, Order::Ascending, &mut |key| {
        let shared = if count == 0 { 0 } else { front_coded::shared_size(&last, key) };
        front_coded::push(shared, &key[shared..], &mut names);
        last.clear();
        last.extend_from_slice(key);
        count += 1;
        count < WALK_STEP && names.len() < NAMES_SIZE
    });
    if count > 0 {
        items.push(&Item::Names(&names));
    }
    (count == WALK_STEP || names.len() >= NAMES_SIZE).then(|| last.into())
}

impl<D: Device> Engine<D> {
    /// Says how many bytes are written to the device between two checkpoints; 0 leaves them to those who ask.
    pub fn set_checkpoint_interval(&mut self, bytes: u64) {
        self.checkpointer.interval = bytes;
    }

    /// Asks for a checkpoint of everything so far.
    pub(super) fn ask_for_checkpoint(&mut self, at: usize, token: u64) {
        self.checkpointer.waiters.push((at, token));
        self.want_checkpoint();
    }

    fn want_checkpoint(&mut self) {
        if !self.checkpointer.wanted {
            self.checkpointer.wanted = true;
            // It begins with a group.
            self.committer.force_flush();
        }
    }

    /// Writes the checkpoint of a clean stop, when nothing else happens any more.
    pub(super) fn checkpoint_and_wait(&mut self, clock: Clock) {
        while self.checkpointer.active.is_some() && self.committer.poisoned().is_none() {
            self.step(clock);
        }
        self.checkpointer.is_last = true;
        self.want_checkpoint();
        while (self.checkpointer.wanted || self.checkpointer.active.is_some())
            && self.committer.poisoned().is_none()
        {
            if !self.step(clock) {
                std::hint::spin_loop();
            }
        }
    }

    /// A group has just taken the open frames of every shard: a good moment for positions.
    pub(super) fn begin_checkpoint(&mut self) {
        // What a unit under way follows may be before a position that is taken now.
        if !self.checkpointer.is_due() || self.shards.iter().any(|shard| shard.survivors.is_busy()) {
            return;
        }
        self.checkpointer.wanted = false;
        self.checkpointer.written_at_last = self.queue.bytes_written;
        let waiters = std::mem::take(&mut self.checkpointer.waiters);
        self.shards.iter_mut().for_each(Shard::forget_superseded);
        if !self.shards.iter().all(Shard::is_collectable) || self.committer.poisoned().is_some() {
            self.checkpointer.stats.skipped += 1;
            waiters.into_iter().for_each(|(at, token)| self.sync(at, token));
            return;
        }
        let sections = (0..self.shards.len()).map(|at| self.section(at)).collect();
        self.checkpointer.active = Some(Writing {
            number: self.allocator.next_ordinal(),
            sections,
            at: 0,
            items: Items::default(),
            entries: 0,
            ended: false,
            extents: Vec::new(),
            open: None,
            chunks: 0,
            bytes: 0,
            in_flight: 0,
            failed: false,
            is_loose: false,
            drops: self.allocator.checkpoint_drops(),
            durable_with: None,
            waiters,
        });
    }

    /// A shard's position, and what goes with it.
    fn section(&self, at: usize) -> Section {
        let shard = &self.shards[at];
        let frame = shard.log.last_frame();
        let last_unit = shard.survivors.last();
        let mut head = Items::default();
        let open = shard.log.open_extent().map(|open| (open.header.extent, open.position as u32));
        head.push(&Item::Shard(ShardPosition {
            shard: shard.id,
            frame,
            boot: self.superblock.boot,
            next_sequence: shard.log.next_sequence(),
            open,
            clean: self.checkpointer.is_last,
        }));
        for (number, one) in shard.extents.iter() {
            let is_empty = !one.is_log() && one.end <= u64::from(self.superblock.block_size);
            if is_empty || matches!(one.state, ExtentState::Retired { .. } | ExtentState::Trimming) {
                continue;
            }
            head.push(&Item::Extent(ExtentSummary {
                extent: number,
                epoch: one.epoch,
                first_frame: one.first_frame,
                last_frame: one.last_frame.unwrap_or(if one.is_log() { frame } else { last_unit }),
                follows: one.follows,
                end: one.end,
                carry_bytes: one.carry_bytes,
                carry_parts: one.carry_parts,
                has_clear: one.has_clear,
                is_reserve: one.is_reserve,
            }));
        }
        let retired = shard.log.retired();
        for (first, last) in retired.frames.iter() {
            head.push(&Item::Retired(first, last));
        }
        for (first, last) in retired.units.iter() {
            head.push(&Item::RetiredUnits(first, last));
        }
        let mark = shard.survivors.mark();
        if mark != UnitMark::default() {
            let open = shard.survivors.open_extent().map(|open| (open.header.extent, open.position as u32));
            head.push(&Item::Units(UnitPosition { last: last_unit, epoch: mark.epoch, open }));
        }
        for batch in &shard.unsettled {
            head.push(&Item::Commit((batch.boot, batch.number)));
        }
        for (batch, coordinator, key, effect, appended) in
            self.batch_holds.iter().flat_map(|(_, hold)| hold.undecided(at))
        {
            if is_planted(Bug::CheckpointLacksParts) {
                continue;
            }
            let (value_size, manifest) = match effect {
                KeyEffect::Put { value, .. } => (value.len() as u32, None),
                KeyEffect::Long { value, .. } => (value.size() as u32, Some(value.manifest())),
                KeyEffect::Delete => (0, None),
            };
            let record = PartRecord {
                key,
                extent: appended.extent,
                offset: appended.offset,
                size: appended.size,
                value_size,
                sequence: appended.sequence,
                expires_at_ms: effect.stored_expiry().unwrap_or(0),
                manifest: manifest.as_deref(),
            };
            let is_delete = matches!(effect, KeyEffect::Delete);
            head.push(&Item::Part((batch.boot, batch.number), coordinator, is_delete, record));
        }
        Section { frame, head, named: None, cursor: None, chunk: None, last_frame: frame }
    }

    /// One pass of the checkpoint. True when anything happened.
    pub(super) fn go_on_with_checkpoint(&mut self) -> bool {
        let Checkpointer { interval, written_at_last, active, .. } = &self.checkpointer;
        let Some(writing) = active else {
            let since = self.queue.bytes_written - written_at_last;
            if *interval > 0 && since >= *interval && !self.stopping && self.committer.poisoned().is_none() {
                self.want_checkpoint();
            }
            return false;
        };
        if writing.in_flight > 0 {
            return false;
        }
        let is_unwanted = writing.drops != self.allocator.checkpoint_drops();
        if writing.failed || is_unwanted || self.committer.poisoned().is_some() {
            self.give_up_checkpoint();
            return true;
        }
        match writing.durable_with {
            Some(group) if group <= self.committer.durable_group() => {
                self.complete_checkpoint();
                true
            }
            Some(_) => false,
            None => self.write_chunk(),
        }
    }

    /// Fills a chunk and writes it. False when there is nothing to do for now.
    fn write_chunk(&mut self) -> bool {
        let Some(mut writing) = self.checkpointer.active.take() else { return false };
        let ready = self.fill(&mut writing);
        if ready {
            let written = self.write_items(&mut writing);
            writing.failed |= !written;
        } else if writing.ended {
            // Everything is written; the next group's flush covers it.
            writing.durable_with = Some(self.committer.group_count() + 1);
            self.committer.force_flush();
        }
        let progress = ready || writing.durable_with.is_some();
        self.checkpointer.active = Some(writing);
        progress
    }

    /// Collects items until a chunk is full or everything is there. False when nothing is to be written now.
    fn fill(&mut self, writing: &mut Writing) -> bool {
        while writing.items.bytes.len() < CHUNK_SIZE && !writing.ended {
            let Some(section) = writing.sections.get_mut(writing.at) else {
                // What the image names, or lacks, must be durable before it may count.
                let is_durable =
                    |(shard, section): (&Shard, &Section)| shard.durable_frame >= section.last_frame;
                if !self.shards.iter().zip(&writing.sections).all(is_durable) {
                    self.committer.force_flush();
                    return false;
                }
                writing.items.push(&Item::End(writing.entries));
                writing.ended = true;
                break;
            };
            let shard = &self.shards[writing.at];
            if shard.written_frame < section.frame {
                return false;
            }
            let cursor = match section.cursor {
                Some(cursor) => cursor,
                None => {
                    writing.items.append(std::mem::take(&mut section.head));
                    section.named = list_names(shard, section.named.take(), &mut writing.items);
                    if section.named.is_some() {
                        continue;
                    }
                    0
                }
            };
            let (items, entries) = (&mut writing.items, &mut writing.entries);
            if let Some(from) = section.chunk {
                // Whatever a manifest behind the position names and is not behind it itself has been here all the while.
                section.chunk = None;
                for (nth, (id, one)) in shard.chunks().stored_from(from).enumerate() {
                    if nth == WALK_STEP {
                        section.chunk = Some(id);
                        break;
                    }
                    items.push(&Item::Chunk(stored_chunk(id, one)));
                }
                section.last_frame = shard.log.last_frame();
                if section.chunk.is_none() {
                    writing.at += 1;
                }
                continue;
            }
            // What is about to be replaced is left out: what replaces it is behind the position.
            let next = shard.walk(cursor, WALK_STEP, &mut |identity, entry, expires_at_ms| {
                let long = shard.long_value(identity).zip(shard.long_key(identity));
                let manifest =
                    long.filter(|_| entry.is_long).map(|(value, key)| (value, key, value.manifest()));
                let long = manifest.as_ref().map(|(value, key, manifest)| IndexedLong {
                    key,
                    value_size: value.size() as u32,
                    manifest,
                });
                items.push(&Item::Entry(indexed_key(identity, entry, expires_at_ms, long)));
                *entries += 1;
            });
            // A record that was overwritten while it was on its way never gets into the index: what replaced it must be there.
            section.last_frame = shard.log.last_frame();
            section.cursor = Some(next);
            if next == 0 {
                section.chunk = Some(0);
            }
        }
        !writing.items.bytes.is_empty()
    }

    /// Writes a chunk of what was collected, into a fresh extent where the last one is full.
    fn write_items(&mut self, writing: &mut Writing) -> bool {
        let layout = self.superblock.layout;
        let block = self.superblock.block_size as usize;
        let items = writing.items.take(CHUNK_SIZE);
        let size = (CHUNK_HEADER_SIZE + items.len()).next_multiple_of(block) as u64;
        let fits = writing.open.is_some_and(|(_, end)| end + size <= layout.extent_size);
        if !fits {
            let Some(extent) = self.allocator.take_for_checkpoint() else { return false };
            let header = CheckpointHeader {
                extent,
                epoch: self.allocator.next_epoch(),
                checkpoint: writing.number,
                part: writing.extents.len() as u32,
                boot: self.superblock.boot,
                version: CHECKPOINT_VERSION,
            };
            let (uuid, secret) = (&self.superblock.uuid, &self.superblock.secret);
            let bytes = Bytes::from(header.encode(uuid, secret, block));
            writing.bytes += bytes.len() as u64;
            writing.in_flight +=
                self.queue.write_for(io_queue::Purpose::Checkpoint, layout.extent_offset(extent), &bytes);
            writing.extents.push(extent);
            writing.open = Some((header.place(uuid, secret), block as u64));
        }
        let (Some((place, end)), Some(extent)) = (writing.open, writing.extents.last()) else { return false };
        let chunk = Bytes::from(encode_chunk(&items, writing.chunks, place, end as u32, block));
        writing.bytes += size;
        writing.chunks += 1;
        writing.open = Some((place, end + size));
        let offset = layout.extent_offset(*extent) + end;
        writing.in_flight += self.queue.write_for(io_queue::Purpose::Checkpoint, offset, &chunk);
        true
    }

    pub(super) fn on_checkpoint_write(&mut self, status: Result<(), IoError>) {
        let Some(writing) = &mut self.checkpointer.active else { return };
        writing.in_flight -= 1;
        if let Err(error) = status {
            tracing::warn!("{error}; no checkpoint is written this time");
            writing.failed = true;
            writing.is_loose |= error.is_outcome_unknown();
        }
    }

    fn give_up_checkpoint(&mut self) {
        let Some(writing) = self.checkpointer.active.take() else { return };
        probe::hit(Probe::CheckpointGivenUp);
        self.checkpointer.stats.skipped += 1;
        if writing.is_loose {
            self.stats.extents_left += writing.extents.len() as u64;
            self.allocator.leave_checkpoint(&writing.extents);
        } else {
            self.allocator.end_checkpoint(&writing.extents, false);
        }
        self.end_checkpoint(writing.waiters);
    }

    fn complete_checkpoint(&mut self) {
        let Some(writing) = self.checkpointer.active.take() else { return };
        probe::hit(Probe::CheckpointWritten);
        self.checkpointer.stats.written += 1;
        self.checkpointer.stats.bytes += writing.bytes;
        self.allocator.end_checkpoint(&writing.extents, true);
        self.allocator.add_checkpoint(CheckpointChain {
            checkpoint: writing.number,
            shards: self.shards.iter().map(|shard| shard.id.0).collect(),
            extents: writing.extents,
        });
        self.end_checkpoint(writing.waiters);
    }

    fn end_checkpoint(&mut self, waiters: Vec<(usize, u64)>) {
        for (at, token) in waiters {
            self.sync(at, token);
        }
        if self.checkpointer.wanted {
            // Somebody asked for another one meanwhile.
            self.committer.force_flush();
        }
    }
}
