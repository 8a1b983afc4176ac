//! The gate of a shard: whoever takes keys waits there while a FLUSHALL closes or clears the shard.

use super::{AppendError, Operation, State};
use crate::device::Device;
use crate::engine::Engine;
use crate::engine::allocator::Purpose;
use crate::engine::log::{Draft, NoRoom};
use crate::engine::op::{Answer, Clock};
use crate::format::record::{Record, RecordType};

impl<D: Device> Engine<D> {
    /// Closes the gate behind those that hold keys.
    pub(super) fn close_gate(&mut self, at: usize, token: u64, clock: Clock) {
        let id = self.suspend(at, token, State::Close);
        self.shards[at].gate.push_back(id);
        self.open_gate(at, clock);
    }

    /// Clears or pins the shard, once nothing holds a key.
    pub(super) fn take_gate(&mut self, at: usize, token: u64, state: State, clock: Clock) {
        let first = self.shards[at].gate.front().and_then(|id| self.operations.get_mut(*id));
        match first {
            // Whoever closed the gate is who goes on: others wait behind it.
            Some(first) if matches!(first.state, State::Closed) => {
                (first.token, first.state) = (token, state);
            }
            _ => {
                let id = self.suspend(at, token, state);
                self.shards[at].gate.push_back(id);
            }
        }
        self.open_gate(at, clock);
    }

    /// Runs a Clear or Pin once nothing holds a key or waits for room, then lets those in who came after it.
    pub(in crate::engine) fn open_gate(&mut self, at: usize, clock: Clock) {
        while let Some(id) = self.shards[at].gate.front().copied() {
            let is_free = self.shards[at].holds.is_empty() && self.shards[at].stalled.is_empty();
            match self.operations.get_mut(id) {
                Some(Operation { state: State::Closed, .. }) => return,
                Some(Operation { state: State::Clear | State::Pin | State::Close, .. }) if !is_free => return,
                Some(Operation { state: State::Clear, .. }) => {}
                Some(Operation { state: State::Pin, .. }) => {
                    self.shards[at].gate.pop_front();
                    let token = self.operations.remove(id).token;
                    match self.take_pin(at) {
                        Ok(frame) => self.answer_after(at, token, frame, Answer::Done),
                        Err(error) => self.answers.push((token, Answer::Failed(error))),
                    }
                    continue;
                }
                Some(Operation { state: state @ State::Close, token, .. }) => {
                    *state = State::Closed;
                    self.answers.push((*token, Answer::Done));
                    return;
                }
                _ => {
                    self.shards[at].gate.pop_front();
                    self.resume(id, clock);
                    continue;
                }
            }
            // What was lost can be written off only with all extents from before that of the Clear.
            let begins = match self.committer.poisoned() {
                // The open frame is never written, so nobody is to wait for it: the append is refused.
                Some(_) => false,
                None => match self.shards[at].begin_writing_off(&self.allocator) {
                    Err(NoRoom::Stall) => return,
                    begun => begun.is_ok(),
                },
            };
            let record = Record {
                kind: RecordType::Clear,
                sequence: 0,
                database: 0,
                expires_at_ms: 0,
                batch: None,
                long: 0,
                key: &[],
                value: &[],
            };
            let answer =
                match self.append(at, Draft { record, purpose: Purpose::Reserve, lazy: false }, clock) {
                    Err(AppendError::Stall) => return,
                    Err(AppendError::Failed(error)) => Err(error),
                    Ok(appended) => {
                        self.shards[at].clear(appended.frame);
                        if begins {
                            // Without an extent of its own, what an earlier one has begun is still right.
                            self.shards[at].writes_off_before = Some(appended.frame);
                        }
                        Ok(appended.frame)
                    }
                };
            self.shards[at].gate.pop_front();
            let token = self.operations.remove(id).token;
            match answer {
                Ok(frame) => self.answer_after(at, token, frame, Answer::Done),
                Err(error) => self.answers.push((token, Answer::Failed(error))),
            }
        }
    }
}
