//! Walks over keys: SCAN, KEYS and KV.RANGE.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{Core, tag};
use crate::device::Device;
use crate::engine::op::{Answer, RangeQuery};
use crate::engine::range::{RangeRead, Sent};
use crate::format::superblock::IndexKind;
use crate::net::resp::Response;
use crate::net::{Completed, ConnectionId, Started};
use crate::node::tasks::{Origin, Task, Walk};

/// The walks of a reactor's connections.
#[derive(Debug, Default)]
pub(super) struct Walks {
    /// Their tasks, by the generation of the connection, which has one at a time.
    tasks: BTreeMap<u64, usize>,
    /// Bytes of the keys that they have found.
    found_size: usize,
}

impl Walks {
    fn begun(&mut self, origin: Origin, task: usize) {
        self.tasks.extend(origin.map(|(connection, _)| (connection.generation, task)));
    }

    /// A request of a connection has its reply.
    pub(super) fn ended(&mut self, connection: ConnectionId) {
        if !self.tasks.is_empty() {
            self.tasks.remove(&connection.generation);
        }
    }
}

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
        let ((shard, op), origin) = (walk.op(), walk.origin);
        let id = self.tasks.insert(Task::Walk(Box::new(walk)));
        self.walks.begun(origin, id);
        self.send_step(shard, tag(0, shard.0, id), op);
        Started::Later
    }

    /// Hands an answer to a walk, with the memory that is left for what it finds.
    pub(super) fn on_walk_answer(&mut self, id: usize, answer: Answer) {
        let Some(Task::Walk(walk)) = self.tasks.get_mut(id) else { return };
        let room = usize::try_from(self.shared.memory.found_size_max()).unwrap_or(usize::MAX);
        let others_size = self.walks.found_size - walk.found_size();
        walk.room = room.saturating_sub(others_size);
        let step = walk.on_answer(answer, self.shared.superblock.shard_count);
        self.walks.found_size = others_size + walk.found_size();
        self.take_step(id, step);
    }

    /// Ends what a connection that has gone would have listed, if anything. A walk through all keys takes long, and memory, for nothing.
    pub(super) fn abandon_walk(&mut self, connection: ConnectionId) -> bool {
        let Some(id) = self.walks.tasks.remove(&connection.generation) else { return false };
        match self.tasks.get_mut(id) {
            Some(Task::Walk(walk)) => {
                self.walks.found_size -= walk.found_size();
                walk.abandon();
            }
            Some(Task::Range { origin, read }) => {
                *origin = None;
                read.abandon();
            }
            _ => {}
        }
        true
    }

    pub(super) fn start_range(&mut self, origin: Origin, query: RangeQuery) -> Started {
        let mut sends = Vec::new();
        let read = RangeRead::start(query, self.shared.superblock.shard_count, &mut |one| sends.push(one));
        let id = self.tasks.insert(Task::Range { origin, read: Box::new(read) });
        self.walks.begun(origin, id);
        self.send_parts(id, sends);
        Started::Later
    }

    pub(super) fn send_parts(&mut self, task: usize, sends: Vec<Sent>) {
        for (part, shard, op) in sends {
            self.send_step(shard, tag(0, part, task), op);
        }
    }
}
