//! Reading a record back: the sectors around it, in pieces that the device takes, then the checks.
//!
//! A record is never believed before its checksums, its place and its key are what the index says. A read fails
//! is repeated a few times (a medium may give on the second try what it refused on the first); after that the operation gets an
//! error, never "not found". That is said only where the record is intact and that of another key with the same identity.

use bytes::Bytes;

use super::Engine;
use super::index::{Entry, Identity, Index, KeyHash};
use super::io_queue::{Class, Purpose};
use super::op::{Clock, Key, OpError, Value};
use crate::device::{Device, DmaBuf, IoError};
use crate::format::record::{Record, RecordType};
use crate::limits::KEY_SIZE_MAX;
use crate::planted::{Bug, is_planted};

/// Times that a read is tried.
const READ_TRIES: u32 = 3;

/// Whom a value is for.
#[derive(Debug, Clone, Copy)]
pub(super) enum ReadFor {
    /// The operation with this id.
    Key(usize),
    /// One of the keys of a lock.
    Lock {
        /// Its operation's id.
        operation: usize,
        /// Which key.
        index: usize,
    },
    /// A long value that is being read.
    Piece {
        /// Its read.
        read: usize,
        /// Bytes from the value's start to the piece.
        start: u64,
    },
    /// Nobody: whether it can be read is what is asked.
    Scrub,
    /// One of the keys of a pin.
    Pin {
        /// Its operation's id.
        operation: usize,
        /// Which key.
        index: usize,
    },
    /// A step of a scan, which wants the key.
    Scan(usize),
}

/// Which record is wanted at a place.
#[derive(Debug, Clone)]
pub(super) enum Wanted {
    /// The newest of this key.
    Key(Key, KeyHash),
    /// The newest of the key with this identity, whichever it is.
    Identity(Identity),
    /// The same, of which nothing but the key is wanted: the value is not read.
    KeyOf(Identity),
    /// A chunk, of this key if that is known.
    Chunk {
        /// The chunk.
        id: u64,
        /// Its sequence.
        sequence: u64,
        /// Whose it is.
        key: Option<Key>,
    },
}

/// A record as it was read.
#[derive(Debug, Clone, Default)]
pub(super) struct ReadRecord {
    /// Whose it is.
    pub(super) key: Key,
    /// Its value, where that was wanted.
    pub(super) value: Value,
}

/// A record on its way from the device.
pub(super) struct ReadJob {
    shard: usize,
    wanted: Wanted,
    /// Where it is.
    entry: Entry,
    /// Device offset and size of what is read.
    offset: u64,
    size: usize,
    /// Size of what is around all of the record, or all that a key can take.
    whole_size: usize,
    /// Bytes in them before the record.
    skip: usize,
    /// The blocks, when they come in several pieces.
    assembled: Vec<u8>,
    pieces_left: usize,
    error: Option<IoError>,
    tries_left: u32,
    to: ReadFor,
}

impl ReadJob {
    /// Whether it reads from this extent.
    pub(super) fn is_of(&self, shard: usize, extent: u32) -> bool {
        self.shard == shard && self.entry.extent == extent
    }
}

/// What is read of a record of which nothing but the key is wanted, at first.
const HEAD_SIZE: u32 = 512;

impl<D: Device> Engine<D> {
    pub(super) fn start_read(&mut self, at: usize, wanted: Wanted, entry: &Entry, to: ReadFor) {
        let there = self.shards[at].readable_end(entry.extent).saturating_sub(entry.offset);
        let record_size = entry.size().min(there);
        let first_size = if let Wanted::KeyOf(_) = wanted { record_size.min(HEAD_SIZE) } else { record_size };
        let alignment = self.queue.device().geometry().read_alignment;
        let around = |size| self.superblock.around(entry.extent, entry.offset, size, alignment);
        let (offset, size, skip) = around(first_size);
        // A key ends there at last; what is behind it is not wanted.
        let key_end = if let Wanted::KeyOf(_) = wanted { HEAD_SIZE + KEY_SIZE_MAX as u32 } else { u32::MAX };
        let (_, whole_size, _) = around(record_size.min(key_end));
        let job = ReadJob {
            shard: at,
            wanted,
            entry: *entry,
            offset,
            size,
            whole_size,
            skip,
            assembled: Vec::new(),
            pieces_left: 0,
            error: None,
            tries_left: READ_TRIES,
            to,
        };
        let id = self.reads.insert(job);
        if let ReadFor::Scrub = to {
            // The scrubber keeps to a few of its own at a time, which waits for no memory: clients' reads go first by their share.
            self.reads_size += self.reads[id].size;
            self.send_read(id);
            return;
        }
        self.reads_waiting.push_back(id);
        self.start_reads();
    }

    /// Starts reads that wait, in order, as far as the bound on their bytes allows.
    pub(super) fn start_reads(&mut self) {
        while let Some(id) = self.reads_waiting.front().copied() {
            let size = self.reads[id].size;
            // What was read and now waits for room in the log counts: it leaves without any read.
            let held = self.reads_size + self.stalled_size;
            if held > 0 && held + size > self.memory.reads_size_max {
                return;
            }
            self.reads_waiting.pop_front();
            self.reads_size += size;
            self.send_read(id);
        }
    }

    fn send_read(&mut self, id: usize) {
        let job = &mut self.reads[id];
        let class = if let ReadFor::Scrub = job.to { Class::Scrub } else { Class::Read };
        let piece_size = self.queue.read_size_max(class);
        job.tries_left -= 1;
        job.error = None;
        job.pieces_left = job.size.div_ceil(piece_size);
        if job.pieces_left > 1 {
            job.assembled.resize(job.size, 0);
        }
        let (offset, size) = (job.offset, job.size);
        for at in (0..size).step_by(piece_size) {
            let piece = piece_size.min(size - at);
            self.queue.read_as(class, Purpose::Read { job: id, at }, offset + at as u64, piece);
        }
    }

    pub(super) fn on_read_piece(
        &mut self,
        id: usize,
        at: usize,
        buf: Option<DmaBuf>,
        status: Result<(), IoError>,
        clock: Clock,
    ) {
        let job = &mut self.reads[id];
        job.pieces_left -= 1;
        match (&status, &buf) {
            (Ok(()), Some(buf)) if !job.assembled.is_empty() => {
                job.assembled[at..at + buf.len()].copy_from_slice(buf);
            }
            (Ok(()), _) => {}
            (Err(error), _) => job.error = Some(error.clone()),
        }
        if job.pieces_left > 0 {
            return;
        }
        let assembled = std::mem::take(&mut job.assembled);
        let whole: &[u8] = match &buf {
            Some(buf) if assembled.is_empty() => buf,
            _ => &assembled,
        };
        let job = &self.reads[id];
        let result = match &job.error {
            Some(error) => Err(OpError::ReadFailed { detail: error.to_string() }),
            None => self.verify(job, whole),
        };
        if result.is_err() && job.size < job.whole_size {
            // The key goes on behind what was read.
            let job = &mut self.reads[id];
            self.reads_size += job.whole_size - job.size;
            (job.tries_left, job.size) = (READ_TRIES, job.whole_size);
            self.send_read(id);
            return;
        }
        if result.is_err() && job.tries_left > 0 {
            self.send_read(id);
            return;
        }
        if let Err(OpError::Damaged { detail }) = &result
            && !matches!(job.to, ReadFor::Scrub)
        {
            self.stats.damaged_reads += 1;
            tracing::error!("damaged record: {detail}");
        }
        // Whose record it is that can't be had: a dump has nothing else that says so.
        let known_key = match (&result, &self.reads[id]) {
            (Err(_), job) if matches!(job.to, ReadFor::Pin { .. }) => self.key_there(job, whole),
            _ => None,
        };
        drop(buf);
        let job = self.reads.remove(id);
        self.reads_size -= job.size;
        // What a dump or a scrub reads is not what clients read; and what is not the newest any more is of no use.
        if let (Ok(Some(record)), Wanted::Key(_, hash)) = (&result, &job.wanted) {
            let newest = self.shards[job.shard].index().get(hash.identity());
            if newest.is_some_and(|newest| newest.is_at(job.entry.extent, job.entry.offset)) {
                self.cache.insert(*hash, job.entry.extent, job.entry.offset, record.value.clone());
            }
        }
        self.start_reads();
        match job.to {
            ReadFor::Key(operation) => {
                self.on_key_read(operation, result.map(|found| found.map(|one| one.value)), clock);
            }
            ReadFor::Lock { operation, index } => {
                self.on_lock_read(operation, index, result.map(|found| found.map(|one| one.value)));
            }
            ReadFor::Scrub => self.on_scrub_record(job.shard, &job.wanted, &job.entry, result.err()),
            ReadFor::Piece { read, start } => {
                self.on_piece_read(read, start, result.map(value_of), clock);
            }
            ReadFor::Pin { operation, index } => {
                self.on_pin_read(operation, index, result.map(Option::unwrap_or_default), known_key);
            }
            ReadFor::Scan(operation) => {
                self.on_scan_read(operation, result.map(|found| found.unwrap_or_default().key));
            }
        }
    }

    /// The record, when what was read is what is wanted. None when it is that of another key which the index can't tell from the
    /// one that is wanted: then that one is absent.
    fn verify(&self, job: &ReadJob, blocks: &[u8]) -> Result<Option<ReadRecord>, OpError> {
        let ReadJob { entry, wanted, .. } = job;
        let damaged = |what: String| OpError::Damaged {
            detail: format!("extent {} byte {}: {what}", entry.extent, entry.offset),
        };
        let shard = &self.shards[job.shard];
        let Some(place) = shard.place_of(entry.extent) else {
            return Err(damaged("the extent is not this shard's".into()));
        };
        let bytes = blocks.get(job.skip..).unwrap_or_default();
        let (record, value_intact) = match wanted {
            Wanted::KeyOf(_) => Record::decode_head(bytes, place, entry.offset).map(|record| (record, true)),
            _ => Record::decode(bytes, place, entry.offset).map(|one| (one.record, one.value_intact)),
        }
        .map_err(|error| damaged(error.to_string()))?;
        let has_identity = |identity: Identity| {
            shard.hash(record.key).identity() == identity && record.kind == RecordType::Put
        };
        let is_wanted = match wanted {
            Wanted::Key(key, hash) => {
                let is_key = record.key == &**key || is_planted(Bug::TrustsIdentity);
                if !is_key && has_identity(hash.identity()) {
                    return Ok(None);
                }
                is_key && record.kind == RecordType::Put
            }
            Wanted::Identity(identity) | Wanted::KeyOf(identity) => has_identity(*identity),
            Wanted::Chunk { id, sequence, key } => {
                let is_key = key.as_ref().is_none_or(|key| record.key == &**key);
                record.kind == RecordType::Chunk
                    && record.long == *id
                    && record.sequence == *sequence
                    && is_key
            }
        };
        if !is_wanted {
            return Err(damaged("the record is another one than the index names".into()));
        }
        let key = Key::copy_from_slice(record.key);
        if !value_intact && !is_planted(Bug::TrustsValues) {
            let what = match wanted {
                Wanted::Identity(_) => {
                    format!("the value of '{}' does not match its checksum", key.escape_ascii())
                }
                _ => "the value does not match its checksum".into(),
            };
            return Err(damaged(what));
        }
        Ok(Some(ReadRecord { key, value: Bytes::copy_from_slice(record.value) }))
    }
}

impl<D: Device> Engine<D> {
    /// The key of a record whose value is not what it should be, if header and key are.
    fn key_there(&self, job: &ReadJob, blocks: &[u8]) -> Option<Key> {
        let (Wanted::Identity(identity), shard) = (&job.wanted, &self.shards[job.shard]) else { return None };
        let (place, bytes) = (shard.place_of(job.entry.extent)?, blocks.get(job.skip..)?);
        let record = Record::decode_head(bytes, place, job.entry.offset).ok()?;
        let is_wanted = record.kind == RecordType::Put && shard.hash(record.key).identity() == *identity;
        is_wanted.then(|| Key::copy_from_slice(record.key))
    }
}

fn value_of(found: Option<ReadRecord>) -> Value {
    found.unwrap_or_default().value
}
