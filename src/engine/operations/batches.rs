//! What a shard does for a batch: hold keys, log parts, commit, let go.

use super::*;
use crate::engine::op::BatchOutcome;
use crate::limits::BATCH_VALUES_SIZE_MAX;
use crate::planted::{Bug, is_planted};

impl<D: Device> Engine<D> {
    /// Holds the keys one after another, in their order, waiting in line for each.
    pub(super) fn go_on_locking(&mut self, at: usize, token: u64, mut lock: Box<LockState>, clock: Clock) {
        while let Some(key) = lock.keys.get(lock.next).cloned() {
            if self.shards[at].holds.contains_key(&key) {
                let id = self.suspend(at, token, State::Lock(lock));
                if let Some(hold) = self.shards[at].holds.get_mut(&key) {
                    hold.waiters.push_back(id);
                }
                return;
            }
            self.shards[at].holds.insert(key, Hold::default());
            lock.next += 1;
        }
        self.read_locked(at, token, *lock, clock);
    }

    pub(super) fn read_locked(&mut self, at: usize, token: u64, lock: LockState, clock: Clock) {
        let LockState { keys, watched, reads, .. } = lock;
        let (needs_values, only_lengths) =
            (matches!(reads, LockReads::Values { .. }), reads == LockReads::Lengths);
        let mut left = if let LockReads::Values { size_max } = reads { size_max } else { 0 };
        let room = self.batch_values_room();
        let mut values_size = 0;
        let mut depends_on = 0;
        let mut wanted = Vec::new();
        let mut wanted_long = Vec::new();
        let mut current = Vec::with_capacity(keys.len());
        for (index, key) in keys.iter().enumerate() {
            let error = self.unknown_error(at, key).or_else(|| self.shards[at].doubt_about(key));
            if let Some(error) = error {
                current.push(Err(error));
                continue;
            }
            let lookup = self.shards[at].lookup(key, clock.unix_ms);
            depends_on = depends_on.max(lookup.depends_on);
            if needs_values {
                let size = match (&lookup.current, lookup.entry) {
                    (Some(current), Some(entry)) if current.long.is_none() => entry.value_size_max(key),
                    (current, _) => current.as_ref().map_or(0, |current| current.size),
                };
                match left.checked_sub(size) {
                    Some(_) if values_size + size > room => {
                        current.push(Err(OpError::MemoryShort));
                        continue;
                    }
                    Some(rest) => {
                        left = rest;
                        values_size += size;
                    }
                    None => {
                        current.push(Err(OpError::ValuesTooLarge { size_max: BATCH_VALUES_SIZE_MAX }));
                        continue;
                    }
                }
            }
            let mut found = lookup.current;
            if (needs_values || only_lengths)
                && let Some(entry) = lookup.entry
            {
                match self.cached(lookup.hash, &entry) {
                    _ if entry.is_long => {}
                    Some(value) => found = found.map(|found| found.with_read(value, only_lengths)),
                    None => wanted.push((index, key.clone(), lookup.hash, entry)),
                }
            }
            if needs_values {
                match found.as_ref().map(|found| (&found.value, &found.long)) {
                    Some((None, Some(value))) => wanted_long.push((index, key.clone(), value.clone())),
                    Some((None, None)) if lookup.entry.is_some_and(|entry| entry.is_long) => {
                        current.push(Err(self.lost_manifest(at, key)));
                        continue;
                    }
                    _ => {}
                }
            }
            current.push(Ok(found));
        }
        // After the look-ups: they reap, and a watched key that expired has changed.
        let dirty = watched.iter().any(|one| !self.shards[at].is_unchanged(&one.key, one.version));
        self.batch_values_size += values_size;
        let reads_left = wanted.len() + wanted_long.len();
        let reading = LockReading { keys, current, dirty, depends_on, reads_left, values_size, only_lengths };
        if reads_left == 0 {
            self.finish_lock(at, token, reading);
            return;
        }
        let id = self.suspend(at, token, State::LockReading(Box::new(reading)));
        for (index, key, hash, entry) in wanted {
            self.start_read(at, Wanted::Key(key, hash), &entry, ReadFor::Lock { operation: id, index });
        }
        for (index, key, value) in wanted_long {
            self.start_long_read(at, key, &value, ReadFor::Lock { operation: id, index }, clock);
        }
    }

    /// One of the values that `LockReading` waited for is there, or can't be had.
    pub(in crate::engine) fn on_lock_read(
        &mut self,
        id: usize,
        index: usize,
        value: Result<Option<Value>, OpError>,
    ) {
        let Some(operation) = self.operations.get_mut(id) else { return };
        let State::LockReading(reading) = &mut operation.state else { return };
        let current = &mut reading.current[index];
        match value {
            Ok(Some(value)) => {
                if let Ok(found) = current {
                    *found = found.take().map(|found| found.with_read(value, reading.only_lengths));
                }
            }
            // It is another key's.
            Ok(None) => *current = Ok(None),
            Err(error) => *current = Err(error),
        }
        reading.reads_left -= 1;
        if reading.reads_left == 0 {
            let Operation { token, shard, state } = self.operations.remove(id);
            if let State::LockReading(reading) = state {
                self.finish_lock(shard, token, *reading);
            }
        }
    }

    pub(super) fn finish_lock(&mut self, at: usize, token: u64, reading: LockReading) {
        let LockReading { keys, current, dirty, depends_on, values_size, .. } = reading;
        let hold = BatchHold { shard: at, values_size, keys, prepared: Vec::new(), batch: None };
        let hold = self.batch_holds.insert(hold);
        let answer = Answer::Locked { hold: HoldId(hold as u64), current, dirty };
        self.answer_after(at, token, depends_on, answer);
    }

    /// Logs a batch's effects. Gives itself back when the log has no room yet.
    pub(super) fn prepare(
        &mut self,
        at: usize,
        token: u64,
        mut prepare: Box<PrepareState>,
        clock: Clock,
    ) -> Option<State> {
        let batch = BatchMark {
            boot: prepare.batch.boot,
            number: prepare.batch.number,
            coordinator: prepare.coordinator,
        };
        if prepare.next == 0
            && let Some(error) = self.refuse_batch_growth(at, &prepare.effects)
        {
            self.answers.push((token, Answer::Failed(error)));
            return None;
        }
        if let Some(hold) = self.batch_holds.get_mut(prepare.hold.0 as usize) {
            hold.batch = Some((prepare.batch, prepare.coordinator, prepare.participant_count));
        }
        while let Some((key, effect)) = prepare.effects.get(prepare.next).cloned() {
            let effect = match self.prepare_long(at, &mut prepare, &key, effect, clock) {
                Ok(effect) => effect,
                Err(AppendError::Stall) => return Some(State::Prepare(prepare)),
                Err(AppendError::Failed(error)) => {
                    self.answers.push((token, Answer::Failed(error)));
                    return None;
                }
            };
            let manifest = effect_manifest(&effect);
            match self.append(at, effect_draft(&key, &effect, &manifest, Some(batch)), clock) {
                Ok(appended) => {
                    prepare.frame = appended.frame;
                    prepare.next += 1;
                    let hash = self.shards[at].hash(&key);
                    self.shards[at].log.note_entry(hash, appended.sequence);
                    if let Some(hold) = self.batch_holds.get_mut(prepare.hold.0 as usize) {
                        hold.prepared.push((key, effect, appended));
                    }
                }
                Err(AppendError::Stall) => return Some(State::Prepare(prepare)),
                Err(AppendError::Failed(error)) => {
                    self.answers.push((token, Answer::Failed(error)));
                    return None;
                }
            }
        }
        if prepare.participant_count == 1 {
            // Alone, this shard decides at once: the commit record follows its parts in the same log.
            return self.commit(at, token, prepare.batch, 1, clock).map(|_| State::Prepare(prepare));
        }
        // Shards lose different tails in a relaxed mode, so that a commit record could outlive a part, or what was built
        // on a part its commit record: across shards a batch is made durable step by step whatever the mode.
        if is_planted(Bug::PreparesEarly) {
            self.answers.push((token, Answer::Done));
            return None;
        }
        self.answer_when_durable(at, token, prepare.frame, Answer::Done);
        None
    }

    /// Logs a commit record. Gives itself back when the log has no room yet.
    pub(super) fn commit(
        &mut self,
        at: usize,
        token: u64,
        batch: BatchId,
        participant_count: u16,
        clock: Clock,
    ) -> Option<State> {
        let count = participant_count.to_le_bytes();
        let record = commit_record(batch, self.shards[at].id, &count);
        let appended = self.append(at, Draft { record, purpose: Purpose::Reserve, lazy: false }, clock);
        if appended.is_ok() && !is_planted(Bug::ForgetsUnsettledBatches) {
            // Kept until every participant can do without it.
            self.shards[at].unsettled.insert(batch);
        }
        match appended {
            Ok(appended) if participant_count > 1 => {
                self.answer_when_durable(at, token, appended.frame, Answer::Done);
            }
            Ok(appended) => self.answer_after(at, token, appended.frame, Answer::Done),
            Err(AppendError::Stall) => return Some(State::Commit { batch, participant_count }),
            Err(AppendError::Failed(error)) => self.answers.push((token, Answer::Failed(error))),
        }
        None
    }

    /// Logs that another shard has committed a batch, so that the parts here stand without that shard's record. Gives itself
    /// back when the log has no room yet.
    pub(super) fn copy_commit(
        &mut self,
        at: usize,
        token: u64,
        batch: BatchId,
        coordinator: ShardId,
        clock: Clock,
    ) -> Option<State> {
        let record = commit_record(batch, coordinator, &[0, 0]);
        match self.append(at, Draft { record, purpose: Purpose::Reserve, lazy: true }, clock) {
            // Nobody is in a hurry: not even in the modes that acknowledge at once does this cause a flush of its own.
            Ok(appended) => {
                self.shards[at].waiters.entry(appended.frame).or_default().push((token, Answer::Done));
            }
            Err(AppendError::Stall) => return Some(State::CommitCopy { batch, coordinator }),
            Err(AppendError::Failed(error)) => self.answers.push((token, Answer::Failed(error))),
        }
        None
    }

    pub(super) fn release_hold(&mut self, token: u64, hold: HoldId, outcome: BatchOutcome, clock: Clock) {
        let Some(BatchHold { shard, values_size, keys, prepared, batch }) =
            self.batch_holds.try_remove(hold.0 as usize)
        else {
            self.answers.push((token, Answer::Done));
            return;
        };
        self.batch_values_size -= values_size;
        // A batch that failed although its parts were logged: on a failed device only a restart tells.
        let unknown = outcome == BatchOutcome::Unknown
            || (outcome == BatchOutcome::Aborted && self.committer.poisoned().is_some());
        for (key, effect, appended) in prepared {
            // In a mode that acknowledges at once the batch may be told of before its frame was written.
            let never_written =
                self.committer.poisoned().is_some() && appended.frame > self.shards[shard].written_frame;
            if unknown || never_written {
                self.shards[shard].mark_unknown(key);
            } else if outcome == BatchOutcome::Committed {
                let hash = self.shards[shard].hash(&key);
                self.shards[shard].install(hash, key, effect, appended, true);
                // It may be in the index at once.
                self.cache.remove(hash);
            }
        }
        match batch {
            Some((batch, coordinator, _))
                if outcome == BatchOutcome::Committed && coordinator != self.shards[shard].id =>
            {
                self.enter_log(shard, token, State::CommitCopy { batch, coordinator }, clock);
            }
            Some((batch, _, 1)) => {
                self.shards[shard].unsettled.remove(&batch);
                self.answers.push((token, Answer::Done));
            }
            _ => self.answers.push((token, Answer::Done)),
        }
        for key in keys {
            self.release_key(shard, &key, clock);
        }
    }

    /// Gives up holds whose `Locked` answer never left. A pass of its own: what waited for their keys goes on here.
    pub(in crate::engine) fn abandon_holds(&mut self, clock: Clock) {
        while let Some(hold) = self.abandoned.pop() {
            let Some(BatchHold { shard, values_size, keys, .. }) =
                self.batch_holds.try_remove(hold.0 as usize)
            else {
                continue;
            };
            self.batch_values_size -= values_size;
            for key in keys {
                self.release_key(shard, &key, clock);
            }
        }
    }
}

/// The record that decides a batch, or a copy of it. `count` is the number of participants, 0 in a copy.
pub(in crate::engine) fn commit_record(batch: BatchId, coordinator: ShardId, count: &[u8; 2]) -> Record<'_> {
    Record {
        kind: RecordType::Commit,
        sequence: 0,
        database: 0,
        expires_at_ms: 0,
        batch: Some(BatchMark { boot: batch.boot, number: batch.number, coordinator }),
        long: 0,
        key: &[],
        value: count,
    }
}
