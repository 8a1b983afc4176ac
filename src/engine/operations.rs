//! Operations: what happens to each from its arrival to its answer.
//!
//! Each function either answers an operation or suspends it in the slab, where what it waits for knows its id. Shared
//! state changes only in the step that runs once: `install` after a successful append.

use std::sync::Arc;

use super::Engine;
use super::action::{Action, Need, is_expired, long_parts};
use super::allocator::Purpose;
use super::index::KeyHash;
use super::log::{Appended, Draft, Move, NoRoom};
use super::long::{Edit, LongWrite, Part};
use super::op::{
    Answer, BatchId, Clock, Current, HoldId, Key, KeyEffect, LockReads, OpError, Reply, ShardId, ShardOp,
    Value, WatchedKey,
};
use super::reads::{ReadFor, Wanted};
use super::shard::Hold;
use crate::device::Device;
use crate::format::record::{BatchMark, Record, RecordType};
use crate::limits::KEY_SIZE_MAX;
use crate::planted::{Bug, is_planted};

mod batches;
mod gate;
mod long;
mod pins;
mod scans;

pub(super) use batches::commit_record;
use long::LongAppend;
pub(super) use long::LongRead;

/// An operation that waits.
pub(super) struct Operation {
    pub(super) token: u64,
    pub(super) shard: usize,
    pub(super) state: State,
}

/// What an operation needs to go on: exactly what is alive while it waits.
pub(super) enum State {
    /// Waits for its key, or at the gate.
    Key { key: Key, action: Action },
    /// Waits for the key's value; `held` when it will write.
    Reading { key: Key, action: Action, expires_at_ms: u64, held: bool },
    /// Waits for room in the log, holding its key.
    Append { key: Key, effect: KeyEffect, reply: Reply },
    /// Waits for chunks of a long value, or for the pieces that a write to it needs.
    LongReading(Box<long::LongReading>),
    /// Waits for room in the log for the next chunk, holding its key.
    AppendLong(Box<long::LongAppend>),
    /// Waits for one of its keys, or at the gate.
    Lock(Box<LockState>),
    /// Waits for values of its keys, all held.
    LockReading(Box<LockReading>),
    /// Waits for room in the log.
    Prepare(Box<PrepareState>),
    /// Waits for room in the log.
    Commit { batch: BatchId, participant_count: u16 },
    /// Waits for room in the log: a copy of another shard's commit record.
    CommitCopy { batch: BatchId, coordinator: ShardId },
    /// Waits at the gate until nothing holds a key.
    Clear,
    /// Waits at the gate until nothing holds a key, to take a pin.
    Pin,
    /// Waits for keys that are on the device.
    Scanning(Box<scans::Scanning>),
    /// Waits for values of a pin's keys.
    PinReading(Box<pins::PinReading>),
    /// Waits at the gate until nothing holds a key, to be told of it.
    Close,
    /// Keeps the gate closed until its Clear comes.
    Closed,
}

pub(super) struct LockState {
    keys: Vec<Key>,
    watched: Vec<WatchedKey>,
    reads: LockReads,
    /// Keys before this one are held.
    next: usize,
}

pub(super) struct LockReading {
    keys: Vec<Key>,
    current: Vec<Result<Option<Current>, OpError>>,
    dirty: bool,
    depends_on: u64,
    reads_left: usize,
    values_size: u64,
    /// Of what is read, only the length counts.
    only_lengths: bool,
}

pub(super) struct PrepareState {
    hold: HoldId,
    batch: BatchId,
    coordinator: ShardId,
    participant_count: u16,
    effects: Vec<(Key, KeyEffect)>,
    next: usize,
    /// The next effect's value, when it is long and not all of it is in the log.
    long: Option<LongWrite>,
    frame: u64,
}

/// Keys held for a batch on one shard, and what it has logged for them.
pub(super) struct BatchHold {
    shard: usize,
    /// Bytes of the values that were read for it.
    values_size: u64,
    keys: Vec<Key>,
    prepared: Vec<(Key, KeyEffect, Appended)>,
    /// What was prepared for, and who decides it.
    batch: Option<(BatchId, ShardId, u16)>,
}

impl BatchHold {
    /// Whether a part of this key was logged.
    pub(super) fn has_prepared(&self, shard: usize, key: &Key) -> bool {
        self.shard == shard && self.prepared.iter().any(|(one, _, _)| one == key)
    }

    /// Parts of this shard that nothing has decided yet, each with its batch and who decides it.
    pub(super) fn undecided(
        &self,
        shard: usize,
    ) -> impl Iterator<Item = (BatchId, ShardId, &Key, &KeyEffect, &Appended)> {
        let batch = self.batch.filter(|_| self.shard == shard);
        batch.into_iter().flat_map(|(batch, coordinator, _)| {
            self.prepared.iter().map(move |(key, effect, at)| (batch, coordinator, key, effect, at))
        })
    }

    /// Extents of a shard that hold parts which nothing has decided yet.
    pub(super) fn prepared_extents(&self, shard: usize) -> impl Iterator<Item = u32> + '_ {
        let of_shard = if self.shard == shard { self.prepared.as_slice() } else { &[] };
        of_shard.iter().map(|(_, _, appended)| appended.extent)
    }

    /// Records of this shard are elsewhere now.
    pub(super) fn on_moved(&mut self, shard: usize, moves: &[Move]) {
        if self.shard == shard {
            for (_, _, at) in &mut self.prepared {
                *at = moves.iter().find_map(|one| one.target(at)).unwrap_or(*at);
            }
        }
    }
}

impl<D: Device> Engine<D> {
    /// Takes an operation: one on a key begins with the next pass, every other at once.
    pub(super) fn admit(&mut self, at: usize, token: u64, op: ShardOp, clock: Clock) {
        match op {
            ShardOp::Key { key, action } => self.arrive(at, token, key, action),
            ShardOp::Lock { keys, watched, reads } => {
                let lock = Box::new(LockState { keys, watched, reads, next: 0 });
                if self.shards[at].gate.is_empty() {
                    self.go_on_locking(at, token, lock, clock);
                } else {
                    let id = self.suspend(at, token, State::Lock(lock));
                    self.shards[at].gate.push_back(id);
                }
            }
            ShardOp::Prepare { hold, batch, coordinator, participant_count, effects } => {
                let (next, long, frame) = (0, None, 0);
                let prepare =
                    PrepareState { hold, batch, coordinator, participant_count, effects, next, long, frame };
                self.enter_log(at, token, State::Prepare(Box::new(prepare)), clock);
            }
            ShardOp::Commit { batch, participant_count } => {
                self.enter_log(at, token, State::Commit { batch, participant_count }, clock);
            }
            ShardOp::Release { hold, outcome } => self.release_hold(token, hold, outcome, clock),
            ShardOp::Forget { batch } => {
                self.shards[at].unsettled.remove(&batch);
                self.answers.push((token, Answer::Done));
            }
            ShardOp::Close => self.close_gate(at, token, clock),
            ShardOp::Clear => self.take_gate(at, token, State::Clear, clock),
            ShardOp::Pin => self.take_gate(at, token, State::Pin, clock),
            ShardOp::PinRead => self.read_pinned(at, token, clock),
            ShardOp::Unpin => self.unpin(at, token),
            ShardOp::Watch { key } => {
                // Reaped first, so that an expiry that is already past does not count as a change later.
                self.shards[at].lookup(&key, clock.unix_ms);
                let version = self.shards[at].watch(&key);
                self.answers.push((token, Answer::Watching { version }));
            }
            ShardOp::Unwatch { keys } => {
                for key in &keys {
                    self.shards[at].unwatch(key);
                }
                self.answers.push((token, Answer::Done));
            }
            // What may be missing can be neither listed nor counted.
            ShardOp::Scan { .. } | ShardOp::List { .. } | ShardOp::Count if self.shards[at].is_in_doubt() => {
                self.answers.push((token, Answer::Failed(self.shards[at].doubt_error())));
            }
            ShardOp::Scan { .. } | ShardOp::List { .. } | ShardOp::Count if self.shards[at].has_unknown() => {
                self.answers.push((token, Answer::Failed(self.outcome_unknown())));
            }
            ShardOp::Scan { cursor, count, prefix } => self.scan(at, token, cursor, count, prefix, clock),
            ShardOp::List { range, order, count, size_max } => {
                self.list(at, token, &range, order, count, size_max, clock);
            }
            ShardOp::Count => {
                self.shards[at].reap_expired(clock.unix_ms, usize::MAX);
                let depends_on = self.shards[at].depends_on_all();
                let count = self.shards[at].live();
                self.answer_after(at, token, depends_on, Answer::Count(count));
            }
            ShardOp::Sync => self.sync(at, token),
            ShardOp::Compact => self.compact(at, token),
            ShardOp::Checkpoint => self.ask_for_checkpoint(at, token),
        }
    }

    fn suspend(&mut self, at: usize, token: u64, state: State) -> usize {
        self.operations.insert(Operation { token, shard: at, state })
    }

    /// Answers once `frame` is durable, where the mode asks for it; at once otherwise.
    fn answer_after(&mut self, at: usize, token: u64, frame: u64, answer: Answer) {
        if self.committer.waits() {
            self.answer_when_durable(at, token, frame, answer);
        } else {
            self.answers.push((token, answer));
        }
    }

    /// Answers once `frame` is durable, whatever the mode.
    fn answer_when_durable(&mut self, at: usize, token: u64, frame: u64, answer: Answer) {
        let shard = &mut self.shards[at];
        if frame <= shard.durable_frame || is_planted(Bug::AcknowledgesEarly) {
            self.answers.push((token, answer));
        } else if let Some(error) = self.committer.poisoned() {
            // It will never be known to be durable.
            self.answer_unknown(token, answer, error.to_string());
        } else {
            shard.waiters.entry(frame).or_default().push((token, answer));
            if !self.committer.waits() {
                self.committer.force_flush();
            }
        }
    }

    /// Answers that the outcome is unknown, in place of what would have been answered.
    pub(super) fn answer_unknown(&mut self, token: u64, answer: Answer, detail: String) {
        let error = OpError::OutcomeUnknown { detail };
        let answer = match answer {
            Answer::Reply(_) => Answer::Reply(Reply::Error(error)),
            Answer::Locked { hold, .. } => {
                self.abandoned.push(hold);
                Answer::Failed(error)
            }
            _ => Answer::Failed(error),
        };
        self.answers.push((token, answer));
    }

    pub(super) fn sync(&mut self, at: usize, token: u64) {
        if let Some(error) = self.committer.poisoned() {
            self.answers.push((token, Answer::Failed(error)));
            return;
        }
        let frame = self.shards[at].log.last_frame();
        self.answer_when_durable(at, token, frame, Answer::Done);
    }

    // --- one key -----------------------------------------------------------------------------------------------

    pub(super) fn enter_key(
        &mut self,
        at: usize,
        token: u64,
        hash: KeyHash,
        key: Key,
        action: Action,
        clock: Clock,
    ) {
        if key.len() > KEY_SIZE_MAX {
            let error = OpError::KeyTooLarge { size: key.len() as u64, size_max: KEY_SIZE_MAX as u64 };
            self.answers.push((token, Answer::Reply(Reply::Error(error))));
            return;
        }
        if !self.shards[at].gate.is_empty() {
            let id = self.suspend(at, token, State::Key { key, action });
            self.shards[at].gate.push_back(id);
        } else {
            self.run_key(at, token, hash, key, action, clock);
        }
    }

    /// Runs an action on a key, or puts it in line when the key is held.
    fn run_key(&mut self, at: usize, token: u64, hash: KeyHash, key: Key, action: Action, clock: Clock) {
        if self.shards[at].holds.contains_key(&key) {
            let id = self.suspend(at, token, State::Key { key: key.clone(), action });
            if let Some(hold) = self.shards[at].holds.get_mut(&key) {
                hold.waiters.push_back(id);
            }
            return;
        }
        if let Some(error) = self.unknown_error(at, &key) {
            self.answers.push((token, Answer::Reply(Reply::Error(error))));
            return;
        }
        if action.need() != Need::Nothing
            && let Some(error) = self.shards[at].doubt_about(&key)
        {
            self.answers.push((token, Answer::Reply(Reply::Error(error))));
            return;
        }
        let lookup = self.shards[at].lookup_hashed(hash, &key, clock.unix_ms);
        let needs_record = action.need() >= Need::Length;
        if needs_record && lookup.current.as_ref().is_some_and(|current| current.long.is_some()) {
            self.run_long(at, token, key, action, lookup, clock);
            return;
        }
        match lookup.entry {
            Some(entry) if needs_record && entry.is_long => {
                let error = self.lost_manifest(at, &key);
                self.answers.push((token, Answer::Reply(Reply::Error(error))));
            }
            Some(entry) if needs_record => {
                if let Some(value) = self.cached(hash, &entry) {
                    let current = lookup.current.map(|current| current.with_value(value));
                    self.finish_key(at, token, hash, key, action, current, lookup.depends_on, false, clock);
                    return;
                }
                let held = action.is_write();
                if held && !is_planted(Bug::SkipsHolds) {
                    self.shards[at].holds.insert(key.clone(), Hold::default());
                }
                let expires_at_ms = lookup.current.map_or(0, |current| current.expires_at_ms);
                let id =
                    self.suspend(at, token, State::Reading { key: key.clone(), action, expires_at_ms, held });
                self.start_read(at, Wanted::Key(key, hash), &entry, ReadFor::Key(id));
            }
            _ => {
                self.finish_key(at, token, hash, key, action, lookup.current, lookup.depends_on, false, clock)
            }
        }
    }

    fn unknown_error(&self, at: usize, key: &Key) -> Option<OpError> {
        self.shards[at].is_unknown(key).then(|| self.outcome_unknown())
    }

    fn outcome_unknown(&self) -> OpError {
        let detail = self.committer.poisoned().map_or_else(String::new, |error| error.to_string());
        OpError::OutcomeUnknown { detail }
    }

    /// The value that `Reading` waited for is there, or can't be had, or there is none.
    pub(super) fn on_key_read(&mut self, id: usize, value: Result<Option<Value>, OpError>, clock: Clock) {
        let Operation { token, shard: at, state } = self.operations.remove(id);
        let State::Reading { key, action, expires_at_ms, held } = state else { return };
        match value {
            Err(error) => {
                self.answers.push((token, Answer::Reply(Reply::Error(error))));
                if held {
                    self.release_key(at, &key, clock);
                }
            }
            Ok(value) => {
                let value = value.filter(|_| !is_expired(expires_at_ms, clock.unix_ms));
                let current = value.map(|value| Current {
                    expires_at_ms,
                    size: value.len() as u64,
                    value: Some(value),
                    long: None,
                });
                let hash = self.shards[at].hash(&key);
                self.finish_key(at, token, hash, key, action, current, 0, held, clock);
            }
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one operation, which live only here together"
    )]
    fn finish_key(
        &mut self,
        at: usize,
        token: u64,
        hash: KeyHash,
        key: Key,
        action: Action,
        current: Option<Current>,
        depends_on: u64,
        held: bool,
        clock: Clock,
    ) {
        match long_parts(&action, current.as_ref(), self.chunk_size, self.value_size_max) {
            Ok(None) => {}
            Ok(Some(parts)) => {
                let edit = Edit::new(None, parts, self.chunk_size);
                return self.write_long(at, token, key, current.as_ref(), edit, Vec::new(), held, clock);
            }
            Err(error) => {
                self.answers.push((token, Answer::Reply(Reply::Error(error))));
                if held {
                    self.release_key(at, &key, clock);
                }
                return;
            }
        }
        let outcome = action.apply(current.as_ref(), clock.unix_ms, self.value_size_max);
        let (effect, reply) = match outcome {
            Ok(outcome) => (outcome.effect, outcome.reply),
            Err(error) => (None, Reply::Error(error)),
        };
        let Some(effect) = effect else {
            self.answer_after(at, token, depends_on, Answer::Reply(reply));
            if held {
                self.release_key(at, &key, clock);
            }
            return;
        };
        if let Some(error) =
            self.refuse_growth(current.as_ref().map(|current| current.expires_at_ms), &effect)
        {
            self.answers.push((token, Answer::Reply(Reply::Error(error))));
            if held {
                self.release_key(at, &key, clock);
            }
            return;
        }
        if let KeyEffect::Put { value, expires_at_ms } = &effect
            && value.len() as u64 > self.chunk_size
        {
            let (part, expires_at_ms) = (Part { start: 0, bytes: value.clone() }, *expires_at_ms);
            let write = Edit::new(None, vec![part], self.chunk_size).compose(Vec::new());
            return self.enter_long(at, token, LongAppend { key, write, expires_at_ms, reply }, held, clock);
        }
        // Behind those that already wait for room: the log keeps the order of arrival.
        let left = if self.shards[at].stalled.is_empty() {
            self.try_append_key(at, token, hash, &key, effect, reply, clock)
        } else {
            Some((effect, reply))
        };
        match left {
            Some((effect, reply)) => self.stall_key(at, token, key, effect, reply, held),
            None if held => self.release_key(at, &key, clock),
            None => {}
        }
    }

    fn stall_key(&mut self, at: usize, token: u64, key: Key, effect: KeyEffect, reply: Reply, held: bool) {
        if !held {
            self.shards[at].holds.insert(key.clone(), Hold::default());
        }
        self.stalled_size += effect.value_size();
        let id = self.suspend(at, token, State::Append { key, effect, reply });
        self.shards[at].stalled.push_back(id);
    }

    /// Appends and answers; gives effect and reply back when the log has no room yet.
    #[expect(clippy::too_many_arguments, reason = "the parts of one operation, as above")]
    fn try_append_key(
        &mut self,
        at: usize,
        token: u64,
        hash: KeyHash,
        key: &Key,
        effect: KeyEffect,
        reply: Reply,
        clock: Clock,
    ) -> Option<(KeyEffect, Reply)> {
        let manifest = effect_manifest(&effect);
        match self.append(at, effect_draft(key, &effect, &manifest, None), clock) {
            Ok(appended) => {
                let shard = &mut self.shards[at];
                shard.log.note_entry(hash, appended.sequence);
                shard.install(hash, key.clone(), effect, appended, false);
                self.answer_after(at, token, appended.frame, Answer::Reply(reply));
                None
            }
            Err(AppendError::Stall) => Some((effect, reply)),
            Err(AppendError::Failed(error)) => {
                self.answers.push((token, Answer::Reply(Reply::Error(error))));
                None
            }
        }
    }

    /// Ends a hold and lets those go on who waited for the key, in order, until one of them holds it again.
    fn release_key(&mut self, at: usize, key: &Key, clock: Clock) {
        let Some(Hold { mut waiters }) = self.shards[at].holds.remove(key) else { return };
        while let Some(id) = waiters.pop_front() {
            self.resume(id, clock);
            if let Some(hold) = self.shards[at].holds.get_mut(key) {
                hold.waiters.append(&mut waiters);
                return;
            }
        }
    }

    /// Goes on with an operation that waited for a key or at the gate.
    fn resume(&mut self, id: usize, clock: Clock) {
        let Operation { token, shard, state } = self.operations.remove(id);
        match state {
            State::Key { key, action } => {
                let hash = self.shards[shard].hash(&key);
                self.run_key(shard, token, hash, key, action, clock);
            }
            State::Lock(lock) => self.go_on_locking(shard, token, lock, clock),
            state => self.enter_log(shard, token, state, clock),
        }
    }

    // --- the log -----------------------------------------------------------------------------------------------

    pub(super) fn append(
        &mut self,
        at: usize,
        draft: Draft<'_>,
        clock: Clock,
    ) -> Result<Appended, AppendError> {
        if let Some(error) = self.committer.poisoned() {
            return Err(AppendError::Failed(error));
        }
        let user_size = match draft.record {
            // Its chunks brought the bytes.
            record if record.is_manifest() => record.key.len(),
            record if record.kind == RecordType::Chunk => record.value.len(),
            record => record.key.len() + record.value.len(),
        } as u64;
        match self.shards[at].log.append(draft, &self.allocator) {
            Ok(appended) => {
                self.shards[at].clean = false;
                self.shards[at].note_appended(&draft.record, &appended);
                self.committer.on_append(draft.lazy, clock);
                self.stats.records += 1;
                if !draft.lazy {
                    // No command is there for it before its group begins, and the background is to know of it.
                    self.committer.on_client_append();
                    self.queue.note_client();
                }
                if !draft.purpose.is_collection() {
                    self.stats.user_bytes += user_size;
                    self.collector.on_user_append(appended.size);
                }
                Ok(appended)
            }
            Err(NoRoom::Stall) => Err(AppendError::Stall),
            // Whoever waits for room waits for garbage collection, as long as that has something to free.
            Err(NoRoom::Full) if !draft.purpose.is_collection() && self.can_reclaim(clock) => {
                Err(AppendError::Stall)
            }
            Err(NoRoom::Full) => Err(AppendError::Failed(match draft.purpose {
                Purpose::Data => OpError::DeviceFull,
                _ => OpError::ReserveExhausted,
            })),
        }
    }

    /// Runs an operation that appends, behind those that wait for room.
    fn enter_log(&mut self, at: usize, token: u64, state: State, clock: Clock) {
        let id = self.suspend(at, token, state);
        self.shards[at].stalled.push_back(id);
        if self.shards[at].stalled.len() == 1 {
            self.resume_stalled(at, clock);
        }
    }

    /// Lets operations append that waited for room, in order, until one has to wait again.
    pub(super) fn resume_stalled(&mut self, at: usize, clock: Clock) {
        while let Some(id) = self.shards[at].stalled.front().copied() {
            let Operation { token, state, .. } = self.operations.remove(id);
            let again = match state {
                State::Append { key, effect, reply } => {
                    let size = effect.value_size();
                    let hash = self.shards[at].hash(&key);
                    match self.try_append_key(at, token, hash, &key, effect, reply, clock) {
                        Some((effect, reply)) => Some(State::Append { key, effect, reply }),
                        None => {
                            // Out of the line before the key is released: who waited for it comes behind the others.
                            self.shards[at].stalled.pop_front();
                            self.stalled_size -= size;
                            self.release_key(at, &key, clock);
                            continue;
                        }
                    }
                }
                State::AppendLong(long) => {
                    let (key, before) = (long.key.clone(), long.write.size_left());
                    let again = self.append_long(at, token, *long, clock);
                    let left = match &again {
                        Some(State::AppendLong(long)) => long.write.size_left(),
                        _ => 0,
                    };
                    self.stalled_size -= before - left;
                    match again {
                        None => {
                            self.shards[at].stalled.pop_front();
                            self.release_key(at, &key, clock);
                            continue;
                        }
                        // It has had a frame's worth: whoever is behind it comes first now.
                        Some(state) if left < before && self.shards[at].stalled.len() > 1 => {
                            let id = self.suspend(at, token, state);
                            self.shards[at].stalled.rotate_left(1);
                            if let Some(last) = self.shards[at].stalled.back_mut() {
                                *last = id;
                            }
                            continue;
                        }
                        again => again,
                    }
                }
                State::Prepare(prepare) => self.prepare(at, token, prepare, clock),
                State::Commit { batch, participant_count } => {
                    self.commit(at, token, batch, participant_count, clock)
                }
                State::CommitCopy { batch, coordinator } => {
                    self.copy_commit(at, token, batch, coordinator, clock)
                }
                state => Some(state),
            };
            match again {
                Some(state) => {
                    let id = self.suspend(at, token, state);
                    self.shards[at].stalled[0] = id;
                    return;
                }
                None => {
                    self.shards[at].stalled.pop_front();
                }
            }
        }
    }

    /// Ends an operation that waited for room, after the device failed.
    pub(super) fn fail_stalled(&mut self, at: usize, id: usize, error: OpError, clock: Clock) {
        let Operation { token, state, .. } = self.operations.remove(id);
        match state {
            State::Append { key, effect, .. } => {
                self.stalled_size -= effect.value_size();
                self.answers.push((token, Answer::Reply(Reply::Error(error))));
                self.release_key(at, &key, clock);
            }
            State::AppendLong(long) => {
                self.stalled_size -= long.write.size_left();
                self.answers.push((token, Answer::Reply(Reply::Error(error))));
                self.release_key(at, &long.key, clock);
            }
            _ => self.answers.push((token, Answer::Failed(error))),
        }
    }
}

pub(super) enum AppendError {
    Stall,
    Failed(OpError),
}

/// What the record of an effect stores where the value is long.
fn effect_manifest(effect: &KeyEffect) -> Vec<u8> {
    match effect {
        KeyEffect::Long { value, .. } => value.manifest(),
        KeyEffect::Put { .. } | KeyEffect::Delete => Vec::new(),
    }
}

fn effect_draft<'a>(
    key: &'a Key,
    effect: &'a KeyEffect,
    manifest: &'a [u8],
    batch: Option<BatchMark>,
) -> Draft<'a> {
    let mut long = 0;
    let (kind, value, expires_at_ms, purpose): (_, &[u8], _, _) = match effect {
        KeyEffect::Put { value, expires_at_ms } => (RecordType::Put, value, *expires_at_ms, Purpose::Data),
        KeyEffect::Long { value, expires_at_ms } => {
            long = value.size();
            (RecordType::Put, manifest, *expires_at_ms, Purpose::Data)
        }
        KeyEffect::Delete => (RecordType::Delete, &[], 0, Purpose::Reserve),
    };
    let record = Record { kind, sequence: 0, database: 0, expires_at_ms, batch, long, key, value };
    Draft { record, purpose, lazy: false }
}
