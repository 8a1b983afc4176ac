//! A caller in the same process: the same mailboxes as the network uses, without sockets.
//!
//! Submit and reap, or call and wait. Requests on one key keep their order.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::shared::Shared;
use super::{ShardAnswer, ShardRequest};
use crate::engine::action::{Action, Command};
use crate::engine::batch::{Batch, BatchReply, Progress};
use crate::engine::op::{Answer, BatchId, Key, OpError, Reply, ShardId, ShardOp};
use crate::format::slot::shard_of;
use crate::limits::MAILBOX_RING_CAPACITY;
use crate::reactor::ClientEnd;

/// How long a call waits before it says that the node does not answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// The node has ended, or did not answer in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the node does not answer")]
pub struct NodeGone;

/// An in-process caller of a node.
pub struct Client {
    end: ClientEnd<ShardRequest, ShardAnswer>,
    shared: Arc<Shared>,
    peer: usize,
    batch_counter: u64,
    /// Answers that came while another was waited for.
    early: BTreeMap<u64, Answer>,
    next_tag: u64,
}

impl Client {
    pub(super) fn new(end: ClientEnd<ShardRequest, ShardAnswer>, shared: Arc<Shared>, peer: usize) -> Client {
        Client { end, shared, peer, batch_counter: 0, early: BTreeMap::new(), next_tag: 0 }
    }

    /// Sends an action. The reply comes from `reap` with the number that is returned here; the action comes back when the
    /// mailbox is full: reap, then try again.
    pub fn submit(&mut self, key: Key, action: Action) -> Result<u64, (Key, Action)> {
        let shard = shard_of(&key, self.shared.superblock.shard_count);
        let tag = self.next_tag & 0xffff_ffff;
        match self.send(shard, tag, ShardOp::Key { key, action }) {
            Ok(()) => {
                self.next_tag += 1;
                Ok(tag)
            }
            Err(ShardOp::Key { key, action }) => Err((key, action)),
            Err(_) => Err((Key::new(), Action::Get)),
        }
    }

    /// Publishes what was submitted and takes the replies that are there.
    pub fn reap(&mut self, mut each: impl FnMut(u64, Reply)) -> usize {
        self.end.flush();
        let mut count = 0;
        for (tag, answer) in std::mem::take(&mut self.early) {
            each(tag, reply_of(answer));
            count += 1;
        }
        count
            + self
                .end
                .receive_answers(MAILBOX_RING_CAPACITY, |_, answer| each(answer.tag, reply_of(answer.answer)))
    }

    /// Waits until something may be there to reap.
    pub fn wait(&mut self, timeout: Duration) {
        // A failed wait only means looking earlier.
        let _ = self.end.wait(Some(timeout));
    }

    /// Does one action and waits for its reply.
    pub fn call(&mut self, key: Key, action: Action) -> Result<Reply, NodeGone> {
        let (mut key, mut action) = (key, action);
        let deadline = Instant::now() + CALL_TIMEOUT;
        let tag = loop {
            match self.submit(key, action) {
                Ok(tag) => break tag,
                Err(back) => (key, action) = back,
            }
            self.collect(deadline)?;
        };
        self.answer_to(tag, deadline).map(reply_of)
    }

    /// Runs commands as one batch, all or nothing, and waits for the replies.
    pub fn batch(&mut self, commands: Vec<Command>) -> Result<Result<Vec<Reply>, OpError>, NodeGone> {
        let deadline = Instant::now() + CALL_TIMEOUT;
        self.batch_counter += 1;
        let superblock = Arc::clone(&self.shared.superblock);
        let number = (self.peer as u64) << 48 | self.batch_counter;
        let id = BatchId { boot: superblock.boot, number };
        let value_size_max = crate::engine::value_size_max(&superblock);
        let mut batch = Batch::new(id, commands, Vec::new(), superblock.shard_count, value_size_max);
        let mut sends = Vec::new();
        let now_ms = self.shared.clock().unix_ms;
        let mut progress = batch.start(now_ms, &mut |shard, op| sends.push((shard, op)));
        let mut waiting: Vec<(u64, ShardId)> = Vec::new();
        let mut reply = None;
        loop {
            if let Progress::Reply(found) = progress {
                reply = Some(found);
            }
            for (shard, op) in sends.drain(..) {
                let tag = self.next_tag & 0xffff_ffff;
                self.next_tag += 1;
                let mut op = op;
                while let Err(back) = self.send(shard, tag, op) {
                    op = back;
                    self.collect(deadline)?;
                }
                waiting.push((tag, shard));
            }
            if batch.is_finished() {
                break;
            }
            let Some((tag, shard)) = waiting.pop() else { break };
            let answer = self.answer_to(tag, deadline)?;
            let now_ms = self.shared.clock().unix_ms;
            progress = batch.on_answer(shard, answer, now_ms, &mut |shard, op| sends.push((shard, op)));
        }
        Ok(match reply {
            Some(BatchReply::Replies(replies)) => Ok(replies),
            Some(BatchReply::Failed(error)) => Err(error),
            // Without watches a batch is never dirty, and it always has a reply by its end.
            Some(BatchReply::Dirty) | None => Err(OpError::Busy),
        })
    }

    fn send(&mut self, shard: ShardId, tag: u64, op: ShardOp) -> Result<(), ShardOp> {
        let to = self.shared.reactor_of(shard);
        self.end.send_request(to, ShardRequest { shard, tag, op }).map_err(|full| full.0.op)
    }

    fn collect(&mut self, deadline: Instant) -> Result<(), NodeGone> {
        self.end.flush();
        let early = &mut self.early;
        let found = self.end.receive_answers(MAILBOX_RING_CAPACITY, |_, answer| {
            early.insert(answer.tag, answer.answer);
        });
        if found == 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || (0..self.end.reactor_count()).any(|reactor| self.end.is_abandoned(reactor)) {
                return Err(NodeGone);
            }
            self.wait(left.min(Duration::from_millis(100)));
        }
        Ok(())
    }

    fn answer_to(&mut self, tag: u64, deadline: Instant) -> Result<Answer, NodeGone> {
        loop {
            if let Some(answer) = self.early.remove(&tag) {
                return Ok(answer);
            }
            self.collect(deadline)?;
        }
    }
}

fn reply_of(answer: Answer) -> Reply {
    match answer {
        Answer::Reply(reply) => reply,
        Answer::Failed(error) => Reply::Error(error),
        Answer::Count(count) => Reply::Int(i64::try_from(count).unwrap_or(i64::MAX)),
        _ => Reply::Ok,
    }
}
