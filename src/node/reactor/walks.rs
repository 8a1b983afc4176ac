//! Walks over keys: SCAN, KEYS and KV.RANGE.

use bytes::Bytes;

use super::{Core, tag};
use crate::device::Device;
use crate::engine::op::RangeQuery;
use crate::engine::range::{RangeRead, Sent};
use crate::format::superblock::IndexKind;
use crate::net::resp::Response;
use crate::net::{Completed, Started};
use crate::node::tasks::{Origin, Task, Walk};

impl<D: Device> Core<D> {
    /// Whether keys are known by name.
    fn is_ordered(&self) -> bool {
        self.shared.superblock.index == IndexKind::Ordered
    }

    pub(super) fn start_scan(
        &mut self,
        origin: Origin,
        cursor: u64,
        count: usize,
        pattern: Option<Bytes>,
        type_filter: Option<Bytes>,
    ) -> Started {
        let none = type_filter.is_some_and(|kind| !kind.eq_ignore_ascii_case(b"string"));
        self.start_walk(Walk::scan(origin, cursor, count, pattern, none, self.is_ordered()))
    }

    pub(super) fn start_keys(&mut self, origin: Origin, pattern: Bytes) -> Started {
        self.start_walk(Walk::keys(origin, pattern, self.is_ordered()))
    }

    fn start_walk(&mut self, walk: Walk) -> Started {
        if walk.shard >= self.shared.superblock.shard_count {
            // Not a cursor that this node gave: the walk is over, as Redis has it for any number.
            let empty = vec![Response::Bulk("0".into()), Response::Array(Vec::new())];
            return Started::Now(Completed::Reply(Response::Array(empty)));
        }
        let (shard, op) = walk.op();
        let id = self.tasks.insert(Task::Walk(Box::new(walk)));
        self.send_step(shard, tag(0, shard.0, id), op);
        Started::Later
    }

    pub(super) fn start_range(&mut self, origin: Origin, query: RangeQuery) -> Started {
        let mut sends = Vec::new();
        let read = RangeRead::start(query, self.shared.superblock.shard_count, &mut |one| sends.push(one));
        let id = self.tasks.insert(Task::Range { origin, read: Box::new(read) });
        self.send_parts(id, sends);
        Started::Later
    }

    pub(super) fn send_parts(&mut self, task: usize, sends: Vec<Sent>) {
        for (part, shard, op) in sends {
            self.send_step(shard, tag(0, part, task), op);
        }
    }
}
