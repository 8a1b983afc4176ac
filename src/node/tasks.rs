//! Requests that are under way on a reactor: who asked, and what is still to come from which shard.

use bytes::Bytes;

use super::dump::DumpTask;
use crate::engine::batch::{Batch, BatchReply, Progress};
use crate::engine::clear::ClearAll;
use crate::engine::op::{Answer, Key, KeyRange, OpError, Order, Reply, ShardId, ShardOp, WatchedKey};
use crate::engine::range::{Found, RangeRead, Sent};
use crate::limits::{KEYS_SIZE_MAX, SCAN_SIZE_MAX, SCAN_STEP_MAX};
use crate::net::glob;
use crate::net::resp::Response;
use crate::net::{Completed, ConnectionId, SlotId};

/// Bytes of names in one step of SCAN or KEYS, about.
const LIST_STEP_SIZE: usize = 256 << 10;

/// Keys that the first step looks at, while it is not known how long they are.
const FIRST_STEP: usize = 64;

/// What a key found costs beside its bytes.
const FOUND_OVERHEAD: usize = 96;

/// Whom an answer is for.
pub(super) type Origin = Option<(ConnectionId, SlotId)>;

/// Something that waits for shards.
pub(super) enum Task {
    /// One action on one key.
    Single { origin: Origin },
    /// Commands on several keys.
    Batch { origin: Origin, batch: Box<Batch>, exec: bool, watched: Vec<Key> },
    /// WATCH: the keys in order, with the versions as they come.
    Watch { origin: Origin, watched: Vec<WatchedKey>, left: usize },
    /// The same on every shard, or on some.
    Gather { origin: Origin, left: usize, sum: u64, error: Option<OpError>, reply: GatherReply },
    /// FLUSHALL.
    Clear { origin: Origin, clear: ClearAll },
    /// A dump, step by step.
    Dump(Box<DumpTask>),
    /// SCAN and KEYS: shard after shard.
    Walk(Box<Walk>),
    /// KV.RANGE: all shards beside each other.
    Range { origin: Origin, read: Box<RangeRead> },
}

/// What the answers of all shards come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GatherReply {
    /// Their sum.
    Sum,
    /// OK.
    Ok,
    /// OK, and the time is noted as that of the last save.
    Saved,
}

/// A walk over all keys.
pub(super) struct Walk {
    pub(super) origin: Origin,
    pub(super) shard: u16,
    pub(super) count: usize,
    pub(super) pattern: Option<Bytes>,
    /// SCAN stops after `count` keys and gives a cursor; KEYS goes on to the end.
    pub(super) is_scan: bool,
    /// No key has the type that was asked for.
    pub(super) nothing_matches: bool,
    visited: usize,
    found: Vec<Response>,
    found_size: usize,
    /// Bytes that it may find, as far as memory goes; set before each answer.
    pub(super) room: usize,
    /// The step that is under way: its cursor within the shard, and keys that it visits.
    step: (u64, usize),
    /// What every matching key begins with, where the index knows keys by name.
    prefix: Option<Key>,
    /// What is still to be listed of the shard, where keys are listed by name.
    rest: Option<KeyRange>,
}

impl Walk {
    pub(super) fn scan(
        origin: Origin,
        cursor: u64,
        count: usize,
        pattern: Option<Bytes>,
        none: bool,
        is_ordered: bool,
    ) -> Walk {
        let prefix = pattern.as_ref().filter(|_| is_ordered).map(|pattern| glob::literal_prefix(pattern));
        // The low byte of a cursor is the shard; the rest is the shard's own cursor, whose low byte is zero.
        Walk {
            origin,
            shard: (cursor & 0xff) as u16,
            count,
            pattern,
            is_scan: true,
            nothing_matches: none,
            visited: 0,
            found: Vec::new(),
            found_size: 0,
            room: 0,
            step: (cursor & !0xff, count.min(FIRST_STEP)),
            prefix: prefix.filter(|prefix| !prefix.is_empty()).map(Key::from),
            rest: None,
        }
    }

    pub(super) fn keys(origin: Origin, pattern: Bytes, is_ordered: bool) -> Walk {
        let prefix = is_ordered.then(|| Key::from(glob::literal_prefix(&pattern)));
        Walk {
            origin,
            shard: 0,
            count: SCAN_STEP_MAX,
            pattern: Some(pattern),
            is_scan: false,
            nothing_matches: false,
            visited: 0,
            found: Vec::new(),
            found_size: 0,
            room: 0,
            step: (0, FIRST_STEP),
            rest: prefix.clone().map(KeyRange::of_prefix),
            prefix,
        }
    }

    /// Bytes of memory that what it has found takes.
    pub(super) fn found_size(&self) -> usize {
        self.found_size
    }

    /// Who asked is gone: it ends with the answer that is on its way, and what it has found goes now.
    pub(super) fn abandon(&mut self) {
        self.origin = None;
        self.forget();
    }

    fn forget(&mut self) {
        (self.found, self.found_size) = (Vec::new(), 0);
    }

    /// The step that is to be made.
    pub(super) fn op(&self) -> (ShardId, ShardOp) {
        let ((cursor, count), order) = (self.step, Order::Ascending);
        let op = match self.rest.clone() {
            Some(range) => ShardOp::List { range, order, count, size_max: LIST_STEP_SIZE },
            None => ShardOp::Scan { cursor, count, prefix: self.prefix.clone() },
        };
        (ShardId(self.shard), op)
    }

    /// Takes an answer.
    pub(super) fn on_answer(&mut self, answer: Answer, shard_count: u16) -> Step {
        if self.origin.is_none() {
            return Step::Ended;
        }
        let next = match answer {
            Answer::Scanned { cursor, keys, unreadable } => {
                self.on_scanned(cursor, keys, unreadable, shard_count)
            }
            Answer::Listed { keys, next } => self.on_listed(keys, next, shard_count),
            Answer::Failed(error) => {
                self.forget();
                Err(Response::from(Reply::Error(error)))
            }
            _ => {
                self.forget();
                Err(Response::error("ERR the listing was answered with something else".to_owned()))
            }
        };
        match next {
            Ok((shard, op)) => Step::Send(shard, op),
            Err(response) => complete(self.origin, response),
        }
    }

    /// Takes names that a shard has listed, as `on_scanned` does.
    fn on_listed(
        &mut self,
        keys: Vec<Key>,
        next: Option<Key>,
        shard_count: u16,
    ) -> Result<(ShardId, ShardOp), Response> {
        // Any other cursor than that of the end goes on in this shard.
        let cursor = u64::from(next.is_some());
        self.rest = match next {
            Some(next) => self.rest.take().map(|rest| rest.after(next, Order::Ascending)),
            None => self.prefix.clone().map(KeyRange::of_prefix),
        };
        self.on_scanned(cursor, keys, None, shard_count)
    }

    /// Takes a shard's keys and returns the operation that goes on, or the reply.
    fn on_scanned(
        &mut self,
        cursor: u64,
        keys: Vec<Key>,
        unreadable: Option<OpError>,
        shard_count: u16,
    ) -> Result<(ShardId, ShardOp), Response> {
        if let Some(error) = unreadable {
            return self.on_unreadable(cursor, error, shard_count);
        }
        self.visited += keys.len();
        self.fit_step(&keys);
        if !self.nothing_matches {
            let matching = keys
                .into_iter()
                .filter(|key| self.pattern.as_ref().is_none_or(|pattern| glob::matches(pattern, key)));
            for key in matching {
                self.found_size += key.len() + FOUND_OVERHEAD;
                self.found.push(Response::Bulk(key));
            }
            if !self.is_scan && self.found_size > KEYS_SIZE_MAX.min(self.room) {
                return Err(self.too_many());
            }
        }
        if cursor == 0 {
            self.shard += 1;
            if self.shard == shard_count {
                return Err(self.reply(0));
            }
        }
        if self.is_scan && (self.visited >= self.count || self.found_size >= SCAN_SIZE_MAX.min(self.room)) {
            return Err(self.reply(cursor | u64::from(self.shard)));
        }
        self.step.0 = cursor;
        Ok(self.op())
    }

    /// The next step looks at as many keys as have about the bytes of one step, if they are as long as these.
    fn fit_step(&mut self, keys: &[Key]) {
        let size: usize = keys.iter().map(Key::len).sum();
        if let Some(count) = LIST_STEP_SIZE.saturating_mul(keys.len()).checked_div(size) {
            self.step.1 = count.clamp(1, self.count.clamp(1, SCAN_STEP_MAX));
        }
    }

    /// A step met a record whose key cannot be read. Shorter steps come up to it, so that the reply before has all keys that are
    /// listed ahead of it, and a client that goes on behind it misses none.
    fn on_unreadable(
        &mut self,
        cursor: u64,
        error: OpError,
        shard_count: u16,
    ) -> Result<(ShardId, ShardOp), Response> {
        let (start, count) = self.step;
        let error = Box::new(error);
        if !self.is_scan {
            self.forget();
            return Err(Reply::Error(OpError::UnlistedKey(error)).into());
        }
        if count > 1 {
            self.step.1 = count / 2;
            return Ok(self.op());
        }
        if self.visited > 0 {
            return Err(self.reply(start | u64::from(self.shard)));
        }
        let next = match cursor {
            0 if self.shard + 1 == shard_count => 0,
            0 => u64::from(self.shard) + 1,
            _ => cursor | u64::from(self.shard),
        };
        Err(Reply::Error(OpError::UnreadableKey { error, next }).into())
    }

    fn too_many(&mut self) -> Response {
        self.forget();
        Response::error(match self.room {
            KEYS_SIZE_MAX.. => format!("ERR more than {KEYS_SIZE_MAX} bytes of keys: use SCAN"),
            room => {
                format!("OOM more than {room} bytes of keys, all that the node has memory for now: use SCAN")
            }
        })
    }

    fn reply(&mut self, cursor: u64) -> Response {
        self.found_size = 0;
        let found = Response::Array(std::mem::take(&mut self.found));
        if self.is_scan {
            Response::Array(vec![Response::Bulk(cursor.to_string().into()), found])
        } else {
            found
        }
    }
}

/// The reply of a batch as its connection is told it.
pub(super) fn batch_response(reply: BatchReply, exec: bool) -> Response {
    match reply {
        BatchReply::Replies(replies) if exec => {
            Response::Array(replies.into_iter().map(Response::from).collect())
        }
        BatchReply::Replies(replies) => replies.into_iter().next().unwrap_or(Reply::Nil).into(),
        BatchReply::Dirty => Response::NilArray,
        BatchReply::Failed(error) => Response::from(Reply::Error(error)),
    }
}

/// Keys, or keys and values in turn.
fn range_response(found: Found) -> Response {
    let flat = found.into_iter().flat_map(|(key, value)| [Some(key), value]);
    Response::Array(flat.flatten().map(Response::Bulk).collect())
}

/// What became of a task with an answer.
pub(super) enum Step {
    /// It waits for more.
    Waiting,
    /// Its keys are held.
    Locked(Origin),
    /// It has its reply; `done` when nothing more comes.
    Complete { origin: Origin, completed: Completed, done: bool, unwatch: Vec<Key> },
    /// It goes on with another operation.
    Send(ShardId, ShardOp),
    /// It goes on with some, each with a part of its own.
    SendParts(Vec<Sent>),
    /// It has ended without a reply to give.
    Ended,
}

impl Task {
    /// Takes an answer. `tag` is what the operation was sent with: the shard, or a key's position.
    pub(super) fn on_answer(
        &mut self,
        tag: u16,
        answer: Answer,
        now_ms: u64,
        shard_count: u16,
        send: &mut impl FnMut(ShardId, ShardOp),
    ) -> Step {
        match self {
            Task::Single { origin } => {
                let response = match answer {
                    Answer::Reply(reply) => reply.into(),
                    Answer::Failed(error) => Response::from(Reply::Error(error)),
                    _ => Response::Nil,
                };
                complete(*origin, response)
            }
            Task::Batch { origin, batch, exec, watched } => {
                let progress = batch.on_answer(ShardId(tag), answer, now_ms, send);
                batch_step(*origin, batch, progress, *exec, watched)
            }
            Task::Watch { origin, watched, left } => {
                if let (Answer::Watching { version }, Some(one)) = (answer, watched.get_mut(usize::from(tag)))
                {
                    one.version = version;
                }
                *left -= 1;
                if *left > 0 {
                    return Step::Waiting;
                }
                let completed = Completed::Watching(std::mem::take(watched));
                Step::Complete { origin: *origin, completed, done: true, unwatch: Vec::new() }
            }
            Task::Gather { origin, left, sum, error, reply } => {
                match answer {
                    Answer::Count(count) => *sum += count,
                    Answer::Failed(one) => {
                        error.get_or_insert(one);
                    }
                    _ => {}
                }
                *left -= 1;
                if *left > 0 {
                    return Step::Waiting;
                }
                let response = match (error.take(), reply) {
                    (Some(error), _) => Response::from(Reply::Error(error)),
                    (None, GatherReply::Sum) => Response::Int(i64::try_from(*sum).unwrap_or(i64::MAX)),
                    (None, GatherReply::Ok | GatherReply::Saved) => Response::Ok,
                };
                complete(*origin, response)
            }
            Task::Clear { origin, clear } => match clear.on_answer(answer, send) {
                None => Step::Waiting,
                Some(Ok(())) => complete(*origin, Response::Ok),
                Some(Err(error)) => complete(*origin, Response::from(Reply::Error(error))),
            },
            Task::Dump(dump) => dump.on_answer(answer, send),
            Task::Walk(walk) => walk.on_answer(answer, shard_count),
            Task::Range { origin, read } => {
                let mut sends = Vec::new();
                match read.on_answer(tag, answer, &mut |one| sends.push(one)) {
                    None => Step::SendParts(sends),
                    Some(_) if origin.is_none() => Step::Ended,
                    Some(Ok(found)) => complete(*origin, range_response(found)),
                    Some(Err(error)) => complete(*origin, Response::from(Reply::Error(error))),
                }
            }
        }
    }
}

fn complete(origin: Origin, response: Response) -> Step {
    Step::Complete { origin, completed: Completed::Reply(response), done: true, unwatch: Vec::new() }
}

/// What a batch's progress means for its task.
pub(super) fn batch_step(
    origin: Origin,
    batch: &Batch,
    progress: Progress,
    exec: bool,
    watched: &mut Vec<Key>,
) -> Step {
    match progress {
        Progress::Locked => Step::Locked(origin),
        Progress::Reply(reply) => Step::Complete {
            origin,
            completed: Completed::Reply(batch_response(reply, exec)),
            done: batch.is_finished(),
            unwatch: std::mem::take(watched),
        },
        Progress::Waiting if batch.is_finished() => Step::Ended,
        Progress::Waiting => Step::Waiting,
    }
}
