//! Dumps that clients of a reactor read.

use super::{Core, tag};
use crate::device::Device;
use crate::engine::dump::Dump;
use crate::engine::op::{OpError, Reply};
use crate::net::request::DumpStep;
use crate::net::resp::Response;
use crate::net::{Completed, Started};
use crate::node::dump::{DumpTask, Permit, no_such_dump};
use crate::node::tasks::{Origin, Task};

impl<D: Device> Core<D> {
    /// One step of a dump.
    pub(super) fn dump_step(&mut self, origin: Origin, step: DumpStep) -> Started {
        let now = |response| Started::Now(Completed::Reply(response));
        let mut sends = Vec::new();
        let id = match step {
            DumpStep::Begin => {
                let Some(permit) = Permit::take(&self.shared) else {
                    return now(Response::from(Reply::Error(OpError::DumpBusy)));
                };
                let shard_count = self.shared.superblock.shard_count;
                let dump = Dump::start(shard_count, &mut |shard, op| sends.push((shard, op)));
                let id = self.tasks.vacant_key();
                self.batch_counter += 1;
                let number = (self.index as u64) << 48 | (self.batch_counter & 0xffff) << 32 | id as u64;
                let task = DumpTask { dump, number, origin, idle_since_us: None, _permit: permit };
                self.tasks.insert(Task::Dump(Box::new(task)));
                self.dump = Some(id);
                id
            }
            DumpStep::Next(number) | DumpStep::End(number) => {
                let id = (number & 0xffff_ffff) as usize;
                let Some(Task::Dump(task)) = self.tasks.get_mut(id) else { return now(no_such_dump()) };
                if task.number != number || !task.dump.is_ready() {
                    return now(no_such_dump());
                }
                task.origin = origin;
                let send = &mut |shard, op| sends.push((shard, op));
                if matches!(step, DumpStep::Next(_)) {
                    task.dump.read(send)
                } else {
                    task.dump.end(send)
                }
                id
            }
        };
        for (shard, op) in sends {
            self.send_step(shard, tag(0, shard.0, id), op);
        }
        Started::Later
    }

    /// Ends a dump that nobody reads on from.
    pub(super) fn watch_dump(&mut self, is_stopping: bool) {
        let Some(id) = self.dump else { return };
        let Some(Task::Dump(task)) = self.tasks.get_mut(id) else {
            self.dump = None;
            return;
        };
        if !task.is_abandoned(self.clock.monotonic_us, is_stopping) {
            return;
        }
        if !is_stopping {
            tracing::warn!("a dump was given up: nobody reads on from it");
        }
        let mut sends = Vec::new();
        task.dump.end(&mut |shard, op| sends.push((shard, op)));
        for (shard, op) in sends {
            self.send_step(shard, tag(0, shard.0, id), op);
        }
    }
}
