//! A dump that a client reads: its steps, and its end when nobody reads on.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::shared::Shared;
use super::tasks::{Origin, Step};
use crate::engine::dump::{Dump, DumpEvent};
use crate::engine::op::{Answer, OpError, Reply, ShardId, ShardOp};
use crate::net::Completed;
use crate::net::resp::Response;

/// How long a dump waits for its reader. Its pins cost memory and space as long as it is there.
pub(super) const IDLE_TIME_US: u64 = 15_000_000;

/// The right to make a dump: there is one.
pub(super) struct Permit(Arc<Shared>);

impl Permit {
    pub(super) fn take(shared: &Arc<Shared>) -> Option<Permit> {
        let taken = shared.dump_running.compare_exchange(false, true, Ordering::AcqRel, Ordering::Acquire);
        taken.is_ok().then(|| Permit(Arc::clone(shared)))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.dump_running.store(false, Ordering::Release);
    }
}

/// A dump under way.
pub(super) struct DumpTask {
    pub(super) dump: Dump,
    /// What its reader calls it.
    pub(super) number: u64,
    /// Who waits for its next answer.
    pub(super) origin: Origin,
    /// Since when it waits for its reader, microseconds.
    pub(super) idle_since_us: Option<u64>,
    pub(super) _permit: Permit,
}

impl DumpTask {
    pub(super) fn on_answer(&mut self, answer: Answer, send: &mut impl FnMut(ShardId, ShardOp)) -> Step {
        let (response, done) = match self.dump.on_answer(answer, send) {
            None => return Step::Waiting,
            Some(DumpEvent::Begun) => (Response::Int(self.number as i64), false),
            Some(DumpEvent::Failed(error)) => (Response::from(Reply::Error(error)), false),
            Some(DumpEvent::Keys { keys, is_last }) => {
                let mut items = Vec::with_capacity(1 + 3 * keys.len());
                items.push(Response::Int(i64::from(is_last)));
                for one in keys {
                    items.push(one.key.map_or(Response::Nil, Response::Bulk));
                    items.push(match one.value {
                        Ok(value) => Response::Bulk(value),
                        Err(error) => Response::from(Reply::Error(error)),
                    });
                    items.push(Response::Int(one.expires_at_ms as i64));
                }
                (Response::Array(items), false)
            }
            Some(DumpEvent::Released) => (Response::Ok, true),
        };
        match (self.origin.take(), done) {
            (None, true) => Step::Ended,
            (None, false) => Step::Waiting,
            (origin, done) => {
                let completed = Completed::Reply(response);
                Step::Complete { origin, completed, done, unwatch: Vec::new() }
            }
        }
    }

    /// Whether its reader has been away for too long at this moment.
    pub(super) fn is_abandoned(&mut self, now_us: u64, is_stopping: bool) -> bool {
        if !self.dump.is_ready() {
            self.idle_since_us = None;
            return false;
        }
        let since = *self.idle_since_us.get_or_insert(now_us);
        is_stopping || now_us.saturating_sub(since) > IDLE_TIME_US
    }
}

/// The answer to somebody who names a dump that is not there.
pub(super) fn no_such_dump() -> Response {
    let why = "there is none of that number, or its reader was away for too long";
    Response::from(Reply::Error(OpError::DumpLost { why }))
}
