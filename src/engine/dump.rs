//! The coordinator of a dump: every shard as it was at one moment, read while writes go on.
//!
//! ```text
//! Close, shard after shard in ascending order -> Pin on every shard -> PinRead, shard after shard -> Unpin on every shard
//! ```
//!
//! Invariant: no shard lets anything in from before the first pin is taken until its own is. So a write that somebody saw done
//! before another one began is never missing where the other one is, and a batch is in the dump in whole or not at all.

use super::op::{Answer, OpError, PinnedKey, ShardId, ShardOp};

/// One dump under way.
#[derive(Debug)]
pub struct Dump {
    shard_count: u16,
    phase: Phase,
    /// Answers that are still to come in this phase.
    left: u16,
    /// The shard that is closed, or read.
    shard: u16,
    error: Option<OpError>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Closing,
    Pinning,
    /// Nothing is under way.
    Ready,
    Reading,
    Unpinning,
}

/// What an answer comes to.
#[derive(Debug)]
pub enum DumpEvent {
    /// Every shard is pinned.
    Begun,
    /// Some keys, and whether these are the last.
    Keys {
        /// The keys.
        keys: Vec<PinnedKey>,
        /// There are no more.
        is_last: bool,
    },
    /// It can't go on; the pins are being released.
    Failed(OpError),
    /// Nothing of it is left.
    Released,
}

impl Dump {
    /// Sends the first operation.
    pub fn start(shard_count: u16, send: &mut impl FnMut(ShardId, ShardOp)) -> Dump {
        send(ShardId(0), ShardOp::Close);
        Dump { shard_count, phase: Phase::Closing, left: 1, shard: 0, error: None }
    }

    /// Whether it waits for nothing but its reader.
    pub fn is_ready(&self) -> bool {
        self.phase == Phase::Ready
    }

    /// Reads on.
    pub fn read(&mut self, send: &mut impl FnMut(ShardId, ShardOp)) {
        self.phase = Phase::Reading;
        send(ShardId(self.shard), ShardOp::PinRead);
    }

    /// Releases the pins. Only while it is ready.
    pub fn end(&mut self, send: &mut impl FnMut(ShardId, ShardOp)) {
        self.phase = Phase::Unpinning;
        self.left = self.shard_count;
        for shard in (0..self.shard_count).map(ShardId) {
            send(shard, ShardOp::Unpin);
        }
    }

    /// Takes an answer.
    pub fn on_answer(
        &mut self,
        answer: Answer,
        send: &mut impl FnMut(ShardId, ShardOp),
    ) -> Option<DumpEvent> {
        match self.phase {
            Phase::Closing => {
                // A shard refuses to close only when its node is stopping: what was closed stays so.
                if let Answer::Failed(error) = answer {
                    self.end(send);
                    return Some(DumpEvent::Failed(error));
                }
                self.shard += 1;
                if self.shard < self.shard_count {
                    send(ShardId(self.shard), ShardOp::Close);
                    return None;
                }
                (self.phase, self.left, self.shard) = (Phase::Pinning, self.shard_count, 0);
                for shard in (0..self.shard_count).map(ShardId) {
                    send(shard, ShardOp::Pin);
                }
                None
            }
            Phase::Pinning => {
                if let Answer::Failed(error) = answer {
                    self.error.get_or_insert(error);
                }
                self.left -= 1;
                if self.left > 0 {
                    return None;
                }
                match self.error.take() {
                    None => {
                        self.phase = Phase::Ready;
                        Some(DumpEvent::Begun)
                    }
                    Some(error) => {
                        self.end(send);
                        Some(DumpEvent::Failed(error))
                    }
                }
            }
            Phase::Reading => match answer {
                Answer::Pinned { keys, is_last } => {
                    self.phase = Phase::Ready;
                    self.shard += u16::from(is_last);
                    Some(DumpEvent::Keys { keys, is_last: self.shard == self.shard_count })
                }
                Answer::Failed(error) => {
                    self.end(send);
                    Some(DumpEvent::Failed(error))
                }
                _ => None,
            },
            Phase::Unpinning => {
                self.left -= 1;
                (self.left == 0).then_some(DumpEvent::Released)
            }
            Phase::Ready => None,
        }
    }
}
