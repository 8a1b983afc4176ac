//! The coordinator of FLUSHALL: every shard's keys dropped at one moment, as seen by batches across shards.
//!
//! ```text
//! Close, shard after shard in ascending order -> Clear on every shard -> the reply
//! ```
//!
//! Invariant: a closed shard holds no key and lets nothing in until its Clear. Batches take shards in the same order, so a batch
//! is before the clear on every shard or after it on every shard, and neither waits for the other in a circle.

use super::op::{Answer, OpError, ShardId, ShardOp};

/// One FLUSHALL under way.
#[derive(Debug)]
pub struct ClearAll {
    shard_count: u16,
    closed: u16,
    /// Answers to Clear that are still to come.
    left: u16,
    error: Option<OpError>,
}

impl ClearAll {
    /// Sends the first operation.
    pub fn start(shard_count: u16, send: &mut impl FnMut(ShardId, ShardOp)) -> ClearAll {
        send(ShardId(0), ShardOp::Close);
        ClearAll { shard_count, closed: 0, left: 0, error: None }
    }

    /// Takes an answer; gives the outcome with the last one.
    pub fn on_answer(
        &mut self,
        answer: Answer,
        send: &mut impl FnMut(ShardId, ShardOp),
    ) -> Option<Result<(), OpError>> {
        if let Answer::Failed(error) = answer {
            self.error.get_or_insert(error);
        }
        if self.left > 0 {
            self.left -= 1;
            return (self.left == 0).then(|| self.error.take().map_or(Ok(()), Err));
        }
        // A shard refuses to close only when its node is stopping: what was closed stays so.
        if let Some(error) = self.error.take() {
            return Some(Err(error));
        }
        self.closed += 1;
        if self.closed < self.shard_count {
            send(ShardId(self.closed), ShardOp::Close);
        } else {
            self.left = self.shard_count;
            for shard in (0..self.shard_count).map(ShardId) {
                send(shard, ShardOp::Clear);
            }
        }
        None
    }
}
