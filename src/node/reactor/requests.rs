//! What a connection's request starts: tasks, and what each sends to the shards.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use bytes::Bytes;

use super::{Core, tag};
use crate::device::Device;
use crate::engine::action::Command;
use crate::engine::batch::Batch;
use crate::engine::clear::ClearAll;
use crate::engine::op::{BatchId, Clock, Direct, DirectReply, Key, ShardId, ShardOp, WatchedKey};
use crate::format::slot::shard_of;
use crate::limits::NODE_TASKS_MAX;
use crate::net::resp::Response;
use crate::net::{Backend, Completed, ConnectionId, Request, SlotId, Started};
use crate::node::info;
use crate::node::memory::Pressure;
use crate::node::tasks::{GatherReply, Origin, Task, batch_step};

impl<D: Device> Core<D> {
    pub(super) fn unwatch(&mut self, origin: Origin, keys: Vec<Key>) {
        let shard_count = self.shared.superblock.shard_count;
        let mut by_shard: BTreeMap<ShardId, Vec<Key>> = BTreeMap::new();
        for key in keys {
            by_shard.entry(shard_of(&key, shard_count)).or_default().push(key);
        }
        let ops = by_shard.into_iter().map(|(shard, keys)| (shard, ShardOp::Unwatch { keys })).collect();
        self.gather(origin, GatherReply::Ok, ops);
    }

    fn gather(&mut self, origin: Origin, reply: GatherReply, ops: Vec<(ShardId, ShardOp)>) {
        let task = Task::Gather { origin, left: ops.len(), sum: 0, error: None, reply };
        let id = self.tasks.insert(task);
        for (shard, op) in ops {
            self.send_step(shard, tag(0, shard.0, id), op);
        }
    }

    fn on_every_shard(&mut self, origin: Origin, reply: GatherReply, op: impl Fn() -> ShardOp) -> Started {
        let shards = (0..self.shared.superblock.shard_count).map(ShardId);
        self.gather(origin, reply, shards.map(|shard| (shard, op())).collect());
        Started::Later
    }

    fn start_batch(
        &mut self,
        origin: Origin,
        commands: Vec<Command>,
        watched: Vec<WatchedKey>,
        exec: bool,
    ) -> Started {
        self.batch_counter += 1;
        let id = BatchId {
            boot: self.shared.superblock.boot,
            number: (self.index as u64) << 48 | self.batch_counter,
        };
        let mut keys: Vec<Key> = watched.iter().map(|one| one.key.clone()).collect();
        let shard_count = self.shared.superblock.shard_count;
        let batch = Batch::new(id, commands, watched, shard_count, self.engine.value_size_max());
        let mut sends = Vec::new();
        let task = self.tasks.vacant_key();
        let mut batch = Box::new(batch);
        let progress = batch.start(self.clock.unix_ms, &mut |shard, op| sends.push((shard, op)));
        let step = batch_step(origin, &batch, progress, exec, &mut keys);
        self.tasks.insert(Task::Batch { origin, batch, exec, watched: keys });
        for (shard, op) in sends {
            self.send_step(shard, tag(0, shard.0, task), op);
        }
        self.take_step(task, step);
        Started::Later
    }
}

impl<D: Device> Backend for Core<D> {
    fn start(&mut self, connection: ConnectionId, slot: SlotId, request: Request) -> Started {
        if self.tasks.len() >= NODE_TASKS_MAX {
            return Started::Refused(request);
        }
        let origin = Some((connection, slot));
        match request {
            Request::Single { key, action } => {
                let shard = shard_of(&key, self.shared.superblock.shard_count);
                let id = self.tasks.insert(Task::Single { origin });
                let sent = self.send_new(shard, tag(0, shard.0, id), ShardOp::Key { key, action });
                match sent {
                    Ok(()) => Started::Later,
                    Err(op) => {
                        self.tasks.remove(id);
                        match op {
                            ShardOp::Key { key, action } => Started::Refused(Request::Single { key, action }),
                            _ => Started::Later,
                        }
                    }
                }
            }
            Request::Batch { commands, watched, exec } => self.start_batch(origin, commands, watched, exec),
            Request::Watch { keys } if keys.len() > usize::from(u16::MAX) => {
                let text = format!("ERR one WATCH can't name more than {} keys", u16::MAX);
                Started::Now(Completed::Reply(Response::Error(text.into())))
            }
            Request::Watch { keys } => {
                let shard_count = self.shared.superblock.shard_count;
                let watched = keys.iter().map(|key| WatchedKey { key: key.clone(), version: 0 }).collect();
                let id = self.tasks.insert(Task::Watch { origin, watched, left: keys.len() });
                for (at, key) in keys.into_iter().enumerate() {
                    let shard = shard_of(&key, shard_count);
                    self.send_step(shard, tag(0, at as u16, id), ShardOp::Watch { key });
                }
                Started::Later
            }
            Request::Unwatch { keys } if keys.is_empty() => Started::Now(Completed::Reply(Response::Ok)),
            Request::Unwatch { keys } => {
                self.unwatch(origin, keys);
                Started::Later
            }
            Request::DbSize => self.on_every_shard(origin, GatherReply::Sum, || ShardOp::Count),
            Request::FlushAll => {
                let mut sends = Vec::new();
                let shard_count = self.shared.superblock.shard_count;
                let clear = ClearAll::start(shard_count, &mut |shard, op| sends.push((shard, op)));
                let id = self.tasks.insert(Task::Clear { origin, clear });
                for (shard, op) in sends {
                    self.send_step(shard, tag(0, shard.0, id), op);
                }
                Started::Later
            }
            Request::Compact => self.on_every_shard(origin, GatherReply::Ok, || ShardOp::Compact),
            Request::Save { background: false } => {
                self.on_every_shard(origin, GatherReply::Saved, || ShardOp::Checkpoint)
            }
            Request::Save { background: true } => {
                self.on_every_shard(None, GatherReply::Saved, || ShardOp::Checkpoint);
                Started::Now(Completed::Reply(Response::Simple("Background saving started".into())))
            }
            Request::Scan { cursor, count, pattern, type_filter } => {
                self.start_scan(origin, cursor, count, pattern, type_filter)
            }
            Request::Keys { pattern } => self.start_keys(origin, pattern),
            Request::Range(query) => self.start_range(origin, query),
            Request::Dump(step) => self.dump_step(origin, step),
            Request::Shutdown { save } => {
                if self.shared.ask_to_stop(save) {
                    self.shutdown = origin;
                    Started::Later
                } else {
                    let text = "ERR Errors trying to SHUTDOWN. Check logs.";
                    Started::Now(Completed::Reply(Response::Error(text.into())))
                }
            }
        }
    }

    fn run_at_once(
        &mut self,
        requests: &[Direct<'_>],
        tell: &mut dyn FnMut(DirectReply<'_>) -> bool,
    ) -> usize {
        let shard_count = self.shared.superblock.shard_count;
        // The engine stops at a shard that is another reactor's.
        let requests = requests.iter().map(|request| (shard_of(request.key(), shard_count), *request));
        self.engine.run_at_once(requests, self.clock, tell)
    }

    fn abandon(&mut self, connection: ConnectionId) -> bool {
        self.abandon_walk(connection)
    }

    fn info(&mut self, sections: &[Bytes]) -> String {
        info::info(&self.shared, sections)
    }

    fn config_get(&mut self, pattern: &[u8]) -> Vec<(String, String)> {
        info::config_get(&self.shared, self.engine.value_size_max(), pattern)
    }

    fn config_set(&mut self, pairs: &[(Bytes, Bytes)]) -> Result<(), String> {
        info::config_set(&self.shared, pairs)
    }

    fn config_reset_stat(&mut self) {
        let commands = self.shared.sum(|figures| &figures.commands);
        self.shared.commands_at_reset.store(commands, Ordering::Relaxed);
    }

    fn clock(&self) -> Clock {
        self.clock
    }

    fn is_memory_short(&self) -> bool {
        self.memory.pressure() >= Pressure::Short
    }

    fn must_evict(&self) -> bool {
        // Of the reactors' connections it is those that hold more than their share.
        let own = self.shared.figures[self.index].connections_memory.load(Ordering::Relaxed);
        let all = self.shared.sum(|figures| &figures.connections_memory);
        self.memory.must_evict() && own * self.shared.reactor_count() as u64 >= all
    }

    fn value_size_max(&self) -> u64 {
        // A longer one may come to be piece by piece.
        self.engine.value_size_max().min(self.shared.memory.long_value_size_max())
    }

    fn last_save_unix_s(&self) -> u64 {
        self.shared.last_save_s.load(Ordering::Relaxed)
    }
}
