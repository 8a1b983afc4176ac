//! Reading a record back: the blocks around it, in pieces that the device takes, then the checks.
//!
//! A record is never believed before its checksums, its place, its key and its sequence are what the index says. A read
//! that fails is repeated a few times (a medium may give on the second try what it refused on the first); after that the
//! operation gets an error, never "not found".

use bytes::Bytes;

use super::Engine;
use super::index::Entry;
use super::io_queue::Purpose;
use super::op::{Clock, Key, OpError, Value};
use crate::device::{Device, DmaBuf, IoError};
use crate::format::record::{Record, RecordType};

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
}

/// A record on its way from the device.
pub(super) struct ReadJob {
    shard: usize,
    key: Key,
    entry: Entry,
    /// It is this chunk, not the newest record of the key.
    chunk: Option<u64>,
    /// Device offset and size of the blocks around the record.
    offset: u64,
    size: usize,
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

impl<D: Device> Engine<D> {
    pub(super) fn start_read(&mut self, at: usize, key: Key, entry: Entry, to: ReadFor) {
        self.start_record_read(at, key, entry, None, to);
    }

    pub(super) fn start_record_read(
        &mut self,
        at: usize,
        key: Key,
        entry: Entry,
        chunk: Option<u64>,
        to: ReadFor,
    ) {
        let block = u64::from(self.superblock.block_size);
        let start = self.superblock.layout.extent_offset(entry.extent) + u64::from(entry.offset);
        let end = start + u64::from(entry.size);
        let offset = start / block * block;
        let size = (end.next_multiple_of(block) - offset) as usize;
        let job = ReadJob {
            shard: at,
            key,
            entry,
            chunk,
            offset,
            size,
            assembled: Vec::new(),
            pieces_left: 0,
            error: None,
            tries_left: READ_TRIES,
            to,
        };
        let id = self.reads.insert(job);
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
        let piece_size = self.queue.transfer_size_max();
        let job = &mut self.reads[id];
        job.tries_left -= 1;
        job.error = None;
        job.pieces_left = job.size.div_ceil(piece_size);
        if job.pieces_left > 1 {
            job.assembled.resize(job.size, 0);
        }
        let (offset, size) = (job.offset, job.size);
        for at in (0..size).step_by(piece_size) {
            let piece = piece_size.min(size - at);
            self.queue.read(Purpose::Read { job: id, at }, offset + at as u64, piece);
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
        drop(buf);
        let job = self.reads.remove(id);
        self.reads_size -= job.size;
        // What a dump or a scrub reads is not what clients read.
        if let Ok(value) = &result
            && !matches!(job.to, ReadFor::Pin { .. } | ReadFor::Scrub | ReadFor::Piece { .. })
        {
            let shard = &self.shards[job.shard];
            self.cache.insert(shard.hash(&job.key), shard.id, job.entry.sequence, value);
        }
        self.start_reads();
        match job.to {
            ReadFor::Key(operation) => self.on_key_read(operation, result, clock),
            ReadFor::Lock { operation, index } => self.on_lock_read(operation, index, result),
            ReadFor::Scrub => {
                self.on_scrub_record(job.shard, &job.key, job.chunk, &job.entry, result.as_ref().err());
            }
            ReadFor::Piece { read, start } => self.on_piece_read(read, start, result, clock),
            ReadFor::Pin { operation, index } => self.on_pin_read(operation, index, result),
        }
    }

    fn verify(&self, job: &ReadJob, blocks: &[u8]) -> Result<Value, OpError> {
        let entry = &job.entry;
        let damaged = |what: String| OpError::Damaged {
            detail: format!("extent {} byte {}: {what}", entry.extent, entry.offset),
        };
        let Some(place) = self.shards[job.shard].place_of(entry.extent) else {
            return Err(damaged("the extent is not this shard's".into()));
        };
        let skip = entry.offset as usize % self.superblock.block_size as usize;
        let bytes = blocks.get(skip..skip + entry.size as usize).unwrap_or_default();
        let decoded =
            Record::decode(bytes, place, entry.offset).map_err(|error| damaged(error.to_string()))?;
        let record = decoded.record;
        let is_kind = match job.chunk {
            Some(id) => record.kind == RecordType::Chunk && record.long == id,
            None => record.kind == RecordType::Put,
        };
        // Who reads a chunk for its own sake does not know whose it is.
        let is_key = record.key == &*job.key || (job.chunk.is_some() && matches!(job.to, ReadFor::Scrub));
        if !is_kind || !is_key || record.sequence != entry.sequence {
            return Err(damaged("the record is another one than the index names".into()));
        }
        if !decoded.value_intact {
            return Err(damaged("the value does not match its checksum".into()));
        }
        Ok(Bytes::copy_from_slice(record.value))
    }
}
