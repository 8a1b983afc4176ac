//! Operations on long values: chunks are read a few at a time, and appended one behind the other as the log has room.

use bytes::BytesMut;

use super::*;
use crate::engine::action::{LongNeed, long_need};
use crate::engine::long::{LongValue, Piece, copy_into};
use crate::engine::op::Value;
use crate::engine::reads::ReadRecord;
use crate::engine::shard::{ChunkSource, Lookup};
use crate::limits::LONG_READ_DEPTH;
use crate::planted::{Bug, is_planted};
use crate::probe::{self, Probe};

/// A long value of this size is read however short memory is, as long as it is the only one.
const READ_SIZE_ALWAYS: u64 = 16 << 20;

/// An action on a long value that is being read.
pub(in crate::engine) struct LongReading {
    key: Key,
    action: Action,
    current: Current,
    depends_on: u64,
    held: bool,
    goal: Goal,
}

enum Goal {
    /// The action needs all of the value.
    Apply,
    /// What is read is the reply.
    Reply,
    /// What is read goes into pieces that are made anew.
    Edit(Edit),
}

/// A long value that is being appended.
pub(in crate::engine) struct LongAppend {
    pub(super) key: Key,
    pub(super) write: LongWrite,
    pub(super) expires_at_ms: u64,
    pub(super) reply: Reply,
}

/// Pieces of a long value on their way from the device.
pub(in crate::engine) struct LongRead {
    shard: usize,
    key: Key,
    pieces: Vec<Piece>,
    /// How many of them were asked for.
    next: usize,
    in_flight: usize,
    /// Bytes of memory that it takes.
    size: u64,
    into: Into,
    error: Option<OpError>,
    to: ReadFor,
}

/// Where the bytes of pieces go.
enum Into {
    /// Behind each other, from this byte of the value on; zeros where no piece is.
    Buffer { from: u64, bytes: BytesMut },
    /// Each by itself.
    Parts(Vec<Part>),
}

impl<D: Device> Engine<D> {
    /// Runs an action on a key whose value is long.
    pub(super) fn run_long(
        &mut self,
        at: usize,
        token: u64,
        key: Key,
        action: Action,
        lookup: Lookup,
        clock: Clock,
    ) {
        let Lookup { current: Some(current), depends_on, .. } = lookup else { return };
        let Some(value) = current.long.clone() else { return };
        let (goal, range) = match long_need(&action, value.size(), self.value_size_max) {
            Ok(LongNeed::Nothing) => {
                let hash = self.shards[at].hash(&key);
                return self.finish_key(
                    at,
                    token,
                    hash,
                    key,
                    action,
                    Some(current),
                    depends_on,
                    false,
                    clock,
                );
            }
            Ok(LongNeed::Whole) => (Goal::Apply, 0..value.size()),
            Ok(LongNeed::Range(range)) => (Goal::Reply, range),
            Ok(LongNeed::Write(part)) => {
                let edit = Edit::new(Some(&value), vec![part], self.chunk_size);
                if edit.merged().is_empty() {
                    self.write_long(at, token, key, Some(&current), edit, Vec::new(), false, clock);
                    return;
                }
                (Goal::Edit(edit), 0..0)
            }
            Ok(LongNeed::Reply(reply)) => {
                return self.answer_after(at, token, depends_on, Answer::Reply(reply));
            }
            Err(error) => {
                return self.answer_after(at, token, depends_on, Answer::Reply(Reply::Error(error)));
            }
        };
        let held = action.is_write();
        if held && !is_planted(Bug::SkipsLongHolds) {
            self.shards[at].holds.insert(key.clone(), Hold::default());
        }
        let (pieces, into, size) = match &goal {
            Goal::Edit(edit) => {
                let size = edit.merged().iter().map(Piece::size).sum();
                (edit.merged().to_vec(), Into::Parts(Vec::new()), size)
            }
            Goal::Apply | Goal::Reply => {
                let size = range.end - range.start;
                let into = Into::Buffer { from: range.start, bytes: BytesMut::new() };
                (value.overlapping(&range).to_vec(), into, size)
            }
        };
        let reading = LongReading { key: key.clone(), action, current, depends_on, held, goal };
        let id = self.suspend(at, token, State::LongReading(Box::new(reading)));
        self.enter_long_read(at, key, pieces, into, size, ReadFor::Key(id), clock);
    }

    /// Reads all of a long value.
    pub(super) fn start_long_read(
        &mut self,
        at: usize,
        key: Key,
        value: &LongValue,
        to: ReadFor,
        clock: Clock,
    ) {
        let into = Into::Buffer { from: 0, bytes: BytesMut::new() };
        self.enter_long_read(at, key, value.pieces().to_vec(), into, value.size(), to, clock);
    }

    #[expect(clippy::too_many_arguments, reason = "the parts of one read, which live only here together")]
    fn enter_long_read(
        &mut self,
        shard: usize,
        key: Key,
        pieces: Vec<Piece>,
        into: Into,
        size: u64,
        to: ReadFor,
        clock: Clock,
    ) {
        let read = LongRead { shard, key, pieces, next: 0, in_flight: 0, size, into, error: None, to };
        let id = self.long_reads.insert(read);
        self.long_reads_waiting.push_back(id);
        self.start_long_reads(clock);
    }

    /// Starts reads of long values that wait, in order, as far as the bound on their bytes allows.
    pub(in crate::engine) fn start_long_reads(&mut self, clock: Clock) {
        while let Some(id) = self.long_reads_waiting.front().copied() {
            let read = &mut self.long_reads[id];
            let (size, size_max) = (read.size, self.memory.long_value_size_max);
            let is_refused = size > size_max && size > READ_SIZE_ALWAYS;
            let fits = self.long_reads_size + size <= self.memory.long_reads_size_max
                || (self.long_reads_size == 0 && size <= READ_SIZE_ALWAYS);
            if !fits && !is_refused {
                return;
            }
            self.long_reads_waiting.pop_front();
            self.long_reads_size += size;
            if is_refused {
                read.error = Some(OpError::ValueBeyondMemory { size, size_max });
            } else if let Into::Buffer { bytes, .. } = &mut read.into {
                *bytes = BytesMut::zeroed(size as usize);
            }
            self.go_on_reading(id, clock);
        }
    }

    /// Asks for the next pieces, and ends the read behind the last one.
    fn go_on_reading(&mut self, id: usize, clock: Clock) {
        loop {
            let read = &mut self.long_reads[id];
            if read.in_flight >= LONG_READ_DEPTH || read.error.is_some() {
                break;
            }
            let Some(piece) = read.pieces.get(read.next) else { break };
            read.next += 1;
            let (chunk, start) = (piece.id(), piece.start());
            match self.shards[read.shard].chunks().source(chunk) {
                Some(ChunkSource::Memory(bytes)) => read.take(start, bytes),
                Some(ChunkSource::Device(entry)) => {
                    read.in_flight += 1;
                    let (shard, sequence) = (read.shard, entry.sequence);
                    let wanted = Wanted::Chunk { id: chunk, sequence, key: Some(read.key.clone()) };
                    let to = ReadFor::Piece { read: id, start };
                    self.start_read(shard, wanted, &entry.entry(), to);
                }
                None => {
                    let detail = format!("the chunk of its value at byte {start} is not there");
                    tracing::error!("key '{}': {detail}", read.key.escape_ascii());
                    read.error = Some(OpError::Damaged { detail });
                    self.stats.damaged_reads += 1;
                }
            }
        }
        let read = &self.long_reads[id];
        if read.in_flight > 0 || (read.error.is_none() && read.next < read.pieces.len()) {
            return;
        }
        let LongRead { shard, key, pieces, size, into, error, to, .. } = self.long_reads.remove(id);
        let first = |pieces: &[Piece]| pieces.first().map(Piece::id);
        let identity = self.shards[shard].hash(&key).identity();
        let now = self.shards[shard].long_value(identity);
        let is_outlived = now.is_none_or(|now| first(now.pieces()) != first(&pieces));
        probe::hit_if(is_outlived && matches!(into, Into::Buffer { from: 0, .. }), Probe::LongReadOutlived);
        self.long_reads_size -= size;
        let (bytes, parts) = match into {
            Into::Buffer { bytes, .. } => (bytes.freeze(), Vec::new()),
            Into::Parts(parts) => (Value::new(), parts),
        };
        let result = error.map_or(Ok(bytes), Err);
        match to {
            ReadFor::Key(operation) => self.on_long_read(operation, result, parts, clock),
            ReadFor::Lock { operation, index } => self.on_lock_read(operation, index, result.map(Some)),
            ReadFor::Pin { operation, index } => {
                self.on_pin_read(operation, index, result.map(|value| ReadRecord { key, value }), None);
            }
            ReadFor::Piece { .. } | ReadFor::Scrub | ReadFor::Scan(_) => {}
        }
    }

    /// A piece is there, or can't be had.
    pub(in crate::engine) fn on_piece_read(
        &mut self,
        id: usize,
        start: u64,
        result: Result<Value, OpError>,
        clock: Clock,
    ) {
        let read = &mut self.long_reads[id];
        read.in_flight -= 1;
        match result {
            Ok(bytes) => read.take(start, bytes),
            Err(error) => read.error = Some(error),
        }
        self.go_on_reading(id, clock);
    }

    /// What an action on a long value waited for is there, or can't be had.
    fn on_long_read(&mut self, id: usize, read: Result<Value, OpError>, parts: Vec<Part>, clock: Clock) {
        let Operation { token, shard: at, state } = self.operations.remove(id);
        let State::LongReading(reading) = state else { return };
        let LongReading { key, action, current, depends_on, held, goal } = *reading;
        let value = match read {
            Ok(value) => value,
            Err(error) => {
                self.answers.push((token, Answer::Reply(Reply::Error(error))));
                if held {
                    self.release_key(at, &key, clock);
                }
                return;
            }
        };
        if is_expired(current.expires_at_ms, clock.unix_ms) {
            let hash = self.shards[at].hash(&key);
            return self.finish_key(at, token, hash, key, action, None, depends_on, held, clock);
        }
        match goal {
            Goal::Apply => {
                let current = Current { value: Some(value), ..current };
                let hash = self.shards[at].hash(&key);
                self.finish_key(at, token, hash, key, action, Some(current), depends_on, held, clock);
            }
            Goal::Reply => {
                self.answer_after(at, token, depends_on, Answer::Reply(Reply::Bulk(value)));
            }
            Goal::Edit(edit) => {
                self.write_long(at, token, key, Some(&current), edit, parts, held, clock);
            }
        }
    }

    /// Writes an edit of a key's value; its length afterwards is the reply.
    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one operation, which live only here together"
    )]
    pub(super) fn write_long(
        &mut self,
        at: usize,
        token: u64,
        key: Key,
        current: Option<&Current>,
        edit: Edit,
        read: Vec<Part>,
        held: bool,
        clock: Clock,
    ) {
        let reply = Reply::Int(i64::try_from(edit.size()).unwrap_or(i64::MAX));
        let expires_at_ms = current.map_or(0, |current| current.expires_at_ms);
        let long = LongAppend { key, write: edit.compose(read), expires_at_ms, reply };
        self.enter_long(at, token, long, held, clock);
    }

    /// Appends a long value, behind those that already wait for room. It takes several frames, so the key is held.
    pub(super) fn enter_long(&mut self, at: usize, token: u64, long: LongAppend, held: bool, clock: Clock) {
        let key = long.key.clone();
        if !held {
            self.shards[at].holds.insert(key.clone(), Hold::default());
        }
        // Each chunk takes a place in memory.
        if !self.memory.index_may_grow {
            self.answers.push((token, Answer::Reply(Reply::Error(OpError::OutOfMemory))));
            return self.release_key(at, &key, clock);
        }
        let left = if self.shards[at].stalled.is_empty() {
            self.append_long(at, token, long, clock)
        } else {
            Some(State::AppendLong(Box::new(long)))
        };
        let Some(state) = left else { return self.release_key(at, &key, clock) };
        if let State::AppendLong(long) = &state {
            probe::hit(Probe::LongWriteStalled);
            self.stalled_size += long.write.size_left();
        }
        let id = self.suspend(at, token, state);
        self.shards[at].stalled.push_back(id);
    }

    /// Appends what there is room for, and answers when that was all. Gives back how to go on otherwise.
    pub(super) fn append_long(
        &mut self,
        at: usize,
        token: u64,
        mut long: LongAppend,
        clock: Clock,
    ) -> Option<State> {
        match self.append_chunks(at, &long.key, &mut long.write, clock) {
            Ok(()) => {}
            Err(AppendError::Stall) => return Some(State::AppendLong(Box::new(long))),
            Err(AppendError::Failed(error)) => {
                self.answers.push((token, Answer::Reply(Reply::Error(error))));
                return None;
            }
        }
        let LongAppend { key, write, expires_at_ms, reply } = long;
        let effect = KeyEffect::Long { value: Arc::new(write.finish()), expires_at_ms };
        let hash = self.shards[at].hash(&key);
        let left = self.try_append_key(at, token, hash, &key, effect, reply, clock);
        left.map(|(effect, reply)| State::Append { key, effect, reply })
    }

    fn append_chunks(
        &mut self,
        at: usize,
        key: &Key,
        write: &mut LongWrite,
        clock: Clock,
    ) -> Result<(), AppendError> {
        while let Some(bytes) = write.next().cloned() {
            // Sequences are never issued twice, so this names the chunk for good. Its own may be the next one, where the record
            // that begins an extent comes first.
            let id = self.shards[at].log.next_sequence();
            let record = Record {
                kind: RecordType::Chunk,
                sequence: 0,
                database: 0,
                expires_at_ms: 0,
                batch: None,
                long: id,
                key,
                value: &bytes,
            };
            let draft = Draft { record, purpose: Purpose::Data, lazy: false };
            let appended = self.append(at, draft, clock)?;
            let chunk = self.shards[at].add_chunk(id, appended, bytes);
            write.on_appended(chunk);
        }
        Ok(())
    }

    /// Logs the chunks of a batch's next effect where its value is long, and gives the effect that names them.
    pub(super) fn prepare_long(
        &mut self,
        at: usize,
        prepare: &mut PrepareState,
        key: &Key,
        effect: KeyEffect,
        clock: Clock,
    ) -> Result<KeyEffect, AppendError> {
        let (value, expires_at_ms) = match effect {
            KeyEffect::Put { value, expires_at_ms } if value.len() as u64 > self.chunk_size => {
                (value, expires_at_ms)
            }
            short => return Ok(short),
        };
        let mut write = prepare.long.take().unwrap_or_else(|| {
            Edit::new(None, vec![Part { start: 0, bytes: value }], self.chunk_size).compose(Vec::new())
        });
        if let Err(error) = self.append_chunks(at, key, &mut write, clock) {
            prepare.long = Some(write);
            return Err(error);
        }
        let effect = KeyEffect::Long { value: Arc::new(write.finish()), expires_at_ms };
        prepare.effects[prepare.next].1 = effect.clone();
        Ok(effect)
    }

    /// The error for a key whose manifest can't be read.
    pub(super) fn lost_manifest(&self, at: usize, key: &Key) -> OpError {
        let place = self.shards[at].entry(key).map_or((0, 0), |entry| (entry.extent, entry.offset));
        OpError::Damaged {
            detail: format!(
                "extent {} byte {}: the manifest of its long value can't be read",
                place.0, place.1
            ),
        }
    }
}

impl LongRead {
    fn take(&mut self, start: u64, bytes: Value) {
        match &mut self.into {
            Into::Buffer { from, bytes: buffer } => copy_into(buffer, *from, start, &bytes),
            Into::Parts(parts) => parts.push(Part { start, bytes }),
        }
    }
}
