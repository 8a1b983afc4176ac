//! The coordinator of a batch: commands on keys of any shards, all or nothing.
//!
//! A state machine that sends operations to shards and takes their answers; whoever drives it (a connection's reactor,
//! the simulator, a caller in the same process) only carries them.
//!
//! ```text
//! Lock, shard after shard in ascending order -> run the commands on what was read -> Prepare on every shard that has
//! effects -> Commit on the coordinator (the lowest of them) -> Release everywhere -> the reply
//!                                            and, once that is durable, Forget on the coordinator
//! ```
//!
//! Invariants:
//! - Keys are taken in one global order (shard, then key), so batches never wait for each other in a circle.
//! - The commit record is logged only after every part is durable, and the reply leaves only after the commit record is,
//!   whatever the durability mode: shards lose different tails. A batch on one shard has its commit record behind its parts
//!   in the same log, needs no second step and follows the mode.
//! - Whatever happens, every hold is released.

use std::collections::BTreeMap;

use super::action::{Command, KeyState, Need, need_of, run_commands};
use super::op::{
    Answer, BatchId, BatchOutcome, HoldId, Key, KeyEffect, LockReads, OpError, Reply, ShardId, ShardOp,
    WatchedKey,
};
use crate::format::slot::shard_of;
use crate::limits::BATCH_VALUES_SIZE_MAX;

/// How far a batch is.
#[derive(Debug, PartialEq)]
pub enum Progress {
    /// Waiting for shards.
    Waiting,
    /// Its keys are all held: whatever comes later on the same connection queues behind it at the shards.
    Locked,
    /// Done. The state is to be dropped once `is_finished` says so.
    Reply(BatchReply),
}

/// What a batch came to.
#[derive(Debug, PartialEq)]
pub enum BatchReply {
    /// One reply a command, in order.
    Replies(Vec<Reply>),
    /// A watched key had changed: nothing was done.
    Dirty,
    /// Nothing was done, or (`OutcomeUnknown`) only a restart tells.
    Failed(OpError),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Locking,
    Preparing,
    Committing,
    Releasing,
    Forgetting,
}

struct Participant {
    keys: Vec<Key>,
    watched: Vec<WatchedKey>,
    hold: Option<HoldId>,
    effects: Vec<(Key, KeyEffect)>,
}

/// One batch under way.
pub struct Batch {
    id: BatchId,
    commands: Vec<Command>,
    participants: BTreeMap<ShardId, Participant>,
    states: BTreeMap<Key, KeyState>,
    phase: Phase,
    /// Answers that are still to come in this phase.
    left: usize,
    dirty: bool,
    need: Need,
    /// Bytes of the values that were read.
    values_size: u64,
    failure: Option<OpError>,
    /// The shard that has decided, while it must remember that.
    coordinator: Option<ShardId>,
    replies: Vec<Reply>,
    value_size_max: u64,
}

impl Batch {
    /// A batch of `commands`; watched keys must be as they were.
    pub fn new(
        id: BatchId,
        commands: Vec<Command>,
        watched: Vec<WatchedKey>,
        shard_count: u16,
        value_size_max: u64,
    ) -> Batch {
        let mut participants: BTreeMap<ShardId, Participant> = BTreeMap::new();
        let need = need_of(&commands);
        let mut add = |key: &Key, watch: Option<WatchedKey>| {
            let one = participants.entry(shard_of(key, shard_count)).or_insert_with(|| Participant {
                keys: Vec::new(),
                watched: Vec::new(),
                hold: None,
                effects: Vec::new(),
            });
            one.keys.push(key.clone());
            one.watched.extend(watch);
        };
        for (key, _) in commands.iter().flat_map(|command| &command.actions) {
            add(key, None);
        }
        for one in watched {
            add(&one.key.clone(), Some(one));
        }
        for one in participants.values_mut() {
            one.keys.sort_unstable();
            one.keys.dedup();
        }
        Batch {
            id,
            commands,
            participants,
            states: BTreeMap::new(),
            phase: Phase::Locking,
            left: 0,
            dirty: false,
            need,
            values_size: 0,
            failure: None,
            coordinator: None,
            replies: Vec::new(),
            value_size_max,
        }
    }

    /// Sends the first operations. A batch without keys is done at once.
    pub fn start(&mut self, now_ms: u64, send: &mut impl FnMut(ShardId, ShardOp)) -> Progress {
        if self.participants.is_empty() {
            return self.run(now_ms, send);
        }
        self.lock_next(None, send);
        Progress::Waiting
    }

    /// Whether every answer has come in and the state can be dropped.
    pub fn is_finished(&self) -> bool {
        matches!(self.phase, Phase::Releasing | Phase::Forgetting) && self.left == 0
    }

    /// Takes the answer of a shard.
    pub fn on_answer(
        &mut self,
        shard: ShardId,
        answer: Answer,
        now_ms: u64,
        send: &mut impl FnMut(ShardId, ShardOp),
    ) -> Progress {
        self.left -= 1;
        match (self.phase, answer) {
            (Phase::Locking, Answer::Locked { hold, current, dirty }) => {
                self.dirty |= dirty;
                if let Some(one) = self.participants.get_mut(&shard) {
                    one.hold = Some(hold);
                    self.values_size += current.iter().flatten().flatten().map(|one| one.size).sum::<u64>();
                    self.states.extend(one.keys.iter().cloned().zip(current));
                }
                if self.failure.is_none() && !self.dirty && self.lock_next(Some(shard), send) {
                    return Progress::Waiting;
                }
                match self.run(now_ms, send) {
                    Progress::Waiting => Progress::Locked,
                    other => other,
                }
            }
            (Phase::Locking, Answer::Failed(error)) => {
                self.failure.get_or_insert(error);
                self.release(BatchOutcome::Aborted, send)
            }
            (Phase::Preparing, answer) => {
                if let Answer::Failed(error) = answer {
                    self.failure.get_or_insert(error);
                }
                if self.left > 0 {
                    return Progress::Waiting;
                }
                match &self.failure {
                    // One shard decides with its parts: if the device failed then, only a restart tells.
                    Some(OpError::OutcomeUnknown { .. }) => self.release(BatchOutcome::Unknown, send),
                    Some(_) => self.release(BatchOutcome::Aborted, send),
                    None => self.commit(send),
                }
            }
            (Phase::Committing, answer) => match answer {
                Answer::Failed(error @ OpError::OutcomeUnknown { .. }) => {
                    self.failure = Some(error);
                    self.release(BatchOutcome::Unknown, send)
                }
                Answer::Failed(error) => {
                    self.failure = Some(error);
                    self.release(BatchOutcome::Aborted, send)
                }
                _ => {
                    self.coordinator = Some(shard);
                    self.release(BatchOutcome::Committed, send)
                }
            },
            (Phase::Releasing, answer) => {
                if matches!(answer, Answer::Failed(_)) {
                    // It goes on needing the coordinator's record.
                    self.coordinator = None;
                }
                if self.left == 0
                    && let Some(coordinator) = self.coordinator.take()
                {
                    self.phase = Phase::Forgetting;
                    self.left = 1;
                    send(coordinator, ShardOp::Forget { batch: self.id });
                }
                Progress::Waiting
            }
            _ => Progress::Waiting,
        }
    }

    /// Locks the next shard after `last`. False when there is none.
    fn lock_next(&mut self, last: Option<ShardId>, send: &mut impl FnMut(ShardId, ShardOp)) -> bool {
        let next = self.participants.iter().find(|(shard, _)| last.is_none_or(|last| **shard > last));
        let Some((shard, one)) = next else { return false };
        let (keys, watched) = (one.keys.clone(), one.watched.clone());
        let reads = match self.need {
            Need::Nothing | Need::Meta => LockReads::Nothing,
            Need::Length => LockReads::Lengths,
            Need::Value => {
                LockReads::Values { size_max: BATCH_VALUES_SIZE_MAX.saturating_sub(self.values_size) }
            }
        };
        send(*shard, ShardOp::Lock { keys, watched, reads });
        self.left = 1;
        true
    }

    /// Every key is held: runs the commands and sends their effects.
    fn run(&mut self, now_ms: u64, send: &mut impl FnMut(ShardId, ShardOp)) -> Progress {
        if self.failure.is_some() || self.dirty {
            return self.release(BatchOutcome::Aborted, send);
        }
        let commands = std::mem::take(&mut self.commands);
        let mut states = std::mem::take(&mut self.states);
        let (replies, effects) = run_commands(commands, &mut states, now_ms, self.value_size_max);
        self.replies = replies;
        let mut by_shard: BTreeMap<ShardId, Vec<(Key, KeyEffect)>> = BTreeMap::new();
        for (key, effect) in effects {
            let shard = self.participants.iter().find(|(_, one)| one.keys.binary_search(&key).is_ok());
            if let Some((shard, _)) = shard {
                by_shard.entry(*shard).or_default().push((key, effect));
            }
        }
        let Some(coordinator) = by_shard.keys().next().copied() else {
            return self.release(BatchOutcome::Committed, send);
        };
        self.phase = Phase::Preparing;
        self.left = by_shard.len();
        let participant_count = by_shard.len() as u16;
        for (shard, effects) in by_shard {
            let Some(one) = self.participants.get_mut(&shard) else { continue };
            one.effects.clone_from(&effects);
            let Some(hold) = one.hold else { continue };
            send(shard, ShardOp::Prepare { hold, batch: self.id, coordinator, participant_count, effects });
        }
        Progress::Waiting
    }

    fn commit(&mut self, send: &mut impl FnMut(ShardId, ShardOp)) -> Progress {
        let mut shards =
            self.participants.iter().filter(|(_, one)| !one.effects.is_empty()).map(|(shard, _)| *shard);
        let coordinator = shards.next();
        let participant_count = 1 + shards.count() as u16;
        match coordinator {
            Some(coordinator) if participant_count > 1 => {
                self.phase = Phase::Committing;
                self.left = 1;
                send(coordinator, ShardOp::Commit { batch: self.id, participant_count });
                Progress::Waiting
            }
            _ => self.release(BatchOutcome::Committed, send),
        }
    }

    fn release(&mut self, outcome: BatchOutcome, send: &mut impl FnMut(ShardId, ShardOp)) -> Progress {
        self.phase = Phase::Releasing;
        self.left = 0;
        for (shard, one) in &mut self.participants {
            if let Some(hold) = one.hold.take() {
                self.left += 1;
                send(*shard, ShardOp::Release { hold, outcome });
            }
        }
        Progress::Reply(if let Some(error) = self.failure.take() {
            BatchReply::Failed(error)
        } else if self.dirty {
            BatchReply::Dirty
        } else {
            BatchReply::Replies(std::mem::take(&mut self.replies))
        })
    }
}
