//! A node on a simulated disk: engines that share the shards, batch coordinators, and messages that take their time.
//!
//! It boots with the same calls in the same order as `node::open` and `node::start`.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use slab::Slab;

use super::probe::Probes;
use super::promise::{Promise, broken};
use crate::device::sim::random::Random;
use crate::device::sim::{SimDevice, SimDisk};
use crate::engine::action::{Action, Command, Expiry, SetReply};
use crate::engine::allocator::Allocator;
use crate::engine::batch::{Batch, BatchReply, Progress};
use crate::engine::clear::ClearAll;
use crate::engine::device_format::{self, FormatOptions, OpenError};
use crate::engine::dump::{Dump, DumpEvent};
use crate::engine::durability::Durability;
use crate::engine::io_queue::IoSettings;
use crate::engine::memory::MemoryBudget;
use crate::engine::op::{
    Answer, BatchId, Clock, Direct, DirectReply, Key, OpError, PinnedKey, RangeQuery, Reply, ShardId,
    ShardOp, Value, WatchedKey,
};
use crate::engine::range::{Found, RangeRead};
use crate::engine::recovery::{self, Damage};
use crate::engine::{Engine, EngineStats, value_size_max};
use crate::format::slot::shard_of;
use crate::format::superblock::{IndexKind, Superblock};
use crate::probe::{self, Probe};

/// What a client asks of the node.
#[derive(Debug, Clone)]
pub enum Request {
    /// One action on one key.
    Single(Key, Action),
    /// Commands on several keys, all or nothing, unless a watched key changed.
    Batch(Vec<Command>, Vec<WatchedKey>),
    /// Starts a watch.
    Watch(Key),
    /// Counts keys on every shard.
    Count,
    /// All keys, by scanning every shard.
    Keys,
    /// The keys that begin so, by scanning every shard.
    KeysOf(Key),
    /// Keys in order, and their values.
    Range(RangeQuery),
    /// Drops every key.
    Clear,
    /// Makes everything durable.
    Sync,
    /// Collects all garbage that is worth it.
    Compact,
    /// All keys as they are at one moment, read while others write.
    Dump,
}

/// What the node answers.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    /// Of a single action.
    Reply(Reply),
    /// Of a batch.
    Batch(BatchReply),
    /// Of a watch.
    Watching(u64),
    /// Of a count.
    Count(u64),
    /// Of a scan.
    Keys(Vec<Key>),
    /// Of a range.
    Range(Found),
    /// Of a dump: keys and values.
    Dump(Vec<(Key, Value)>),
    /// Of the others: done, or why not.
    Done(Result<(), OpError>),
}

/// Why a node did not boot.
#[derive(Debug)]
pub enum BootFailure {
    /// The disk went away (a power cut, in a simulation).
    Gone,
    /// It can't be opened.
    Open(OpenError),
    /// Acknowledged data is lost and it is not known whose.
    Damaged(Vec<Damage>),
}

struct Task {
    id: u64,
    left: usize,
    kind: TaskKind,
}

enum TaskKind {
    Single,
    Watch,
    Batch(Box<Batch>),
    Count(u64),
    /// The same on some shards.
    Each(Option<OpError>),
    Clear(ClearAll),
    Dump(Dump, Result<Vec<(Key, Value)>, OpError>),
    Keys {
        shard: u16,
        found: Vec<Key>,
        prefix: Option<Key>,
    },
    Range(RangeRead),
}

struct Message {
    shard: ShardId,
    tag: u64,
    op: ShardOp,
}

/// A node that is up.
pub struct SimNode {
    superblock: Arc<Superblock>,
    allocator: Arc<Allocator>,
    engines: Vec<Engine<SimDevice>>,
    mail: Vec<VecDeque<Message>>,
    tasks: Slab<Task>,
    done: Vec<(u64, Outcome)>,
    batch_counter: u64,
    random: Random,
    /// The time, which only the simulation moves.
    pub clock: Clock,
    /// What recovery came to.
    pub probes: Probes,
    /// What recovery found lost.
    pub damage: Vec<Damage>,
}

/// Keys that one step of a scan visits: few, so that scans and writes interleave.
const SCAN_STEP: usize = 7;

/// The secret that keys are hashed with on a disk that was formatted with this seed.
pub fn secret_of(seed: u64) -> [u8; 16] {
    [seed as u8 ^ 0x5a; 16]
}

/// Formats a disk, with the index `hash`.
pub fn format(disk: &SimDisk, shard_count: u16, seed: u64) {
    format_as(disk, shard_count, seed, IndexKind::Hash);
}

/// Formats a disk.
pub fn format_as(disk: &SimDisk, shard_count: u16, seed: u64, index: IndexKind) {
    let (uuid, secret) = ([seed as u8; 16], secret_of(seed));
    let options = FormatOptions { shard_count, uuid, secret, label: String::new(), index };
    device_format::format(&mut disk.open_queue(), &options, Clock::default())
        .expect("formatting a simulated disk without faults succeeds");
}

impl SimNode {
    /// Starts a node of `engine_count` engines.
    pub fn boot(
        disk: &SimDisk,
        engine_count: usize,
        durability: Durability,
        clock: Clock,
        seed: u64,
    ) -> Result<SimNode, BootFailure> {
        let failed = |error| if disk.is_off() { BootFailure::Gone } else { BootFailure::Open(error) };
        let mut queue = disk.open_queue();
        let (superblock, _) = device_format::begin_boot(&mut queue).map_err(failed)?;
        let superblock = Arc::new(superblock);
        let io = |error| failed(OpenError::Io(error));
        let survey = recovery::survey(&mut queue, &superblock).map_err(io)?;
        let mut checkpoints =
            recovery::load_checkpoints(&mut queue, &superblock, &survey, &mut |_| {}).map_err(io)?;
        let chains = std::mem::take(&mut checkpoints.chains);
        let (mut scanned, mut from_log) = (Vec::new(), Vec::new());
        for shard in (0..superblock.shard_count).map(ShardId) {
            let chain = survey.chains(shard);
            let base = checkpoints.take(shard);
            // Whatever comes from a checkpoint, the log alone must say as well.
            if base.is_some() {
                from_log.push(
                    recovery::scan_shard(&mut queue, &superblock, shard, chain, &mut |_| {}).map_err(io)?,
                );
            }
            let found = recovery::recover_shard(&mut queue, &superblock, shard, chain, base, &mut |_| {});
            scanned.push(found.map_err(io)?);
        }
        let damage: Vec<Damage> =
            survey.damage.iter().chain(scanned.iter().flat_map(|shard| &shard.damage)).cloned().collect();
        if recovery::blocking_damage(&survey, &scanned).is_some() {
            return Err(BootFailure::Damaged(damage));
        }
        let mut probes = Probes::default();
        for shard in &scanned {
            probes.hit_if(shard.torn.is_some(), "torn tail cut");
            probes.hit_if(!shard.damage.is_empty(), "damaged value kept by its key");
            probes.hit_if(shard.used_extents.len() > 1, "log over several extents recovered");
            let void = survey.chains(shard.id()).count() > shard.used_extents.len();
            probes.hit_if(void, "extent without an accepted frame freed");
        }
        let allocator = Arc::new(recovery::rebuild_allocator(&superblock, &survey, &scanned, &chains));
        let committed = recovery::committed_batches(&scanned);
        let undecided =
            scanned.iter().flat_map(|shard| &shard.batches_seen).any(|batch| !committed.is_committed(batch));
        probes.hit_if(undecided, "parts without a commit record dropped");
        let mut states: Vec<Vec<_>> = std::iter::repeat_with(Vec::new).take(engine_count).collect();
        for shard in scanned {
            let at = usize::from(shard.id().0) * engine_count / usize::from(superblock.shard_count);
            let is_damaged = !shard.damage.is_empty();
            let state = shard.resolve(&committed, &superblock);
            let same = from_log.iter().position(|one| one.id() == state.id());
            if let Some(other) = same.map(|same| from_log.swap_remove(same))
                && !is_damaged
                && other.damage.is_empty()
            {
                let other = other.resolve(&committed, &superblock);
                let difference =
                    state.difference(&other, &mut queue, &superblock, clock.unix_ms).map_err(io)?;
                if let Some(difference) = difference {
                    let what = format!("shard {}: {difference}", state.id().0);
                    broken(Promise::Checkpoints, &what);
                }
            }
            states[at].push(state);
        }
        let mut engines = Vec::new();
        for states in states {
            let (superblock, allocator) = (Arc::clone(&superblock), Arc::clone(&allocator));
            let mut engine = Engine::new(superblock, allocator, disk.open_queue(), states, durability);
            engine.settle(clock).map_err(|_| BootFailure::Gone)?;
            engines.push(engine);
        }
        Ok(SimNode {
            mail: std::iter::repeat_with(VecDeque::new).take(engine_count).collect(),
            superblock,
            allocator,
            engines,
            tasks: Slab::new(),
            done: Vec::new(),
            batch_counter: 0,
            random: Random::new(seed),
            clock,
            probes,
            damage,
        })
    }

    /// Shards of the node.
    pub fn shard_count(&self) -> u16 {
        self.superblock.shard_count
    }

    /// How shards know their keys.
    pub fn index(&self) -> IndexKind {
        self.superblock.index
    }

    /// The longest value.
    pub fn value_size_max(&self) -> u64 {
        value_size_max(&self.superblock)
    }

    /// Extents that data may take.
    pub fn available_extents(&self) -> u32 {
        self.allocator.available_count()
    }

    /// Extents that are in use, and those of them that shards and checkpoints have.
    pub fn extents_used(&self) -> (u32, u32) {
        let used = self.allocator.count() - self.allocator.free_count();
        let of_checkpoints: usize = self.allocator.checkpoints().iter().map(|one| one.extents.len()).sum();
        let of_engines: u32 = self.engines.iter().map(Engine::extents_held).sum();
        (used, of_engines + of_checkpoints as u32)
    }

    /// Says how many bytes are written between two checkpoints.
    pub fn set_checkpoint_interval(&mut self, bytes: u64) {
        for engine in &mut self.engines {
            engine.set_checkpoint_interval(bytes);
        }
    }

    /// Changes how long a chunk of a long value may be.
    pub fn set_chunk_size(&mut self, size: u64) {
        for engine in &mut self.engines {
            engine.set_chunk_size(size);
        }
    }

    /// Says whether what garbage collection keeps goes to extents of its own.
    pub fn set_survivors_apart(&mut self, apart: bool) {
        for engine in &mut self.engines {
            engine.set_survivors_apart(apart);
        }
    }

    /// Says whether the disk is told which extents are free.
    pub fn set_trim(&mut self, trims: bool) {
        for engine in &mut self.engines {
            engine.set_trim(trims);
        }
    }

    /// Changes what every engine may take of the memory.
    pub fn set_memory(&mut self, budget: MemoryBudget) {
        for engine in &mut self.engines {
            engine.set_memory(budget);
        }
    }

    /// Reads that caches answered.
    pub fn cache_hits(&self) -> u64 {
        self.engines.iter().map(|engine| engine.stats().cache_hits).sum()
    }

    /// Changes how every engine uses the disk. Before anything else is asked of the node.
    pub fn set_io(&mut self, settings: &IoSettings) {
        for engine in &mut self.engines {
            engine.set_io(settings);
        }
    }

    /// Changes how many bytes a second every engine reads again.
    pub fn set_scrub_rate(&mut self, bytes_per_s: u64) {
        for engine in &mut self.engines {
            engine.set_scrub_rate(bytes_per_s);
        }
    }

    /// Figures of every engine.
    pub fn stats(&self) -> impl Iterator<Item = EngineStats> + '_ {
        self.engines.iter().map(Engine::stats)
    }

    /// Changes the durability mode of every engine.
    pub fn set_durability(&mut self, durability: Durability) {
        for engine in &mut self.engines {
            engine.set_durability(durability);
        }
    }

    fn engine_of(&self, shard: ShardId) -> usize {
        usize::from(shard.0) * self.engines.len() / usize::from(self.shard_count())
    }

    fn post(&mut self, shard: ShardId, part: u16, task: usize, op: ShardOp) {
        let to = self.engine_of(shard);
        self.mail[to].push_back(Message { shard, tag: u64::from(part) << 32 | task as u64, op });
    }

    fn add(&mut self, id: u64, left: usize, kind: TaskKind) -> usize {
        self.tasks.insert(Task { id, left, kind })
    }

    /// Starts a request; its outcome comes from `take_done` under `id`.
    pub fn start(&mut self, id: u64, request: Request) {
        let shards = self.shard_count();
        match request {
            Request::Single(key, action) => {
                let task = self.add(id, 1, TaskKind::Single);
                self.post(shard_of(&key, shards), 0, task, ShardOp::Key { key, action });
            }
            Request::Watch(key) => {
                let task = self.add(id, 1, TaskKind::Watch);
                self.post(shard_of(&key, shards), 0, task, ShardOp::Watch { key });
            }
            Request::Batch(commands, watched) => {
                self.batch_counter += 1;
                let batch_id = BatchId { boot: self.superblock.boot, number: self.batch_counter };
                let mut by_shard: BTreeMap<ShardId, Vec<Key>> = BTreeMap::new();
                for one in &watched {
                    by_shard.entry(shard_of(&one.key, shards)).or_default().push(one.key.clone());
                }
                let mut batch = Batch::new(batch_id, commands, watched, shards, self.value_size_max());
                let mut sends = Vec::new();
                let progress = batch.start(self.clock.unix_ms, &mut |shard, op| sends.push((shard, op)));
                let task = self.add(id, 0, TaskKind::Batch(Box::new(batch)));
                self.after_batch(task, sends, progress);
                // The watches end with the batch; the messages come behind its own.
                for (shard, keys) in by_shard {
                    let task = self.add(u64::MAX, 1, TaskKind::Each(None));
                    self.post(shard, 0, task, ShardOp::Unwatch { keys });
                }
            }
            Request::Clear => {
                let mut sends = Vec::new();
                let clear = ClearAll::start(shards, &mut |shard, op| sends.push((shard, op)));
                let task = self.add(id, 0, TaskKind::Clear(clear));
                for (shard, op) in sends {
                    self.post(shard, shard.0, task, op);
                }
            }
            Request::Dump => {
                let mut sends = Vec::new();
                let dump = Dump::start(shards, &mut |shard, op| sends.push((shard, op)));
                let task = self.add(id, 0, TaskKind::Dump(dump, Ok(Vec::new())));
                for (shard, op) in sends {
                    self.post(shard, shard.0, task, op);
                }
            }
            Request::Count | Request::Sync | Request::Compact => {
                let kind =
                    if matches!(request, Request::Count) { TaskKind::Count(0) } else { TaskKind::Each(None) };
                let task = self.add(id, usize::from(shards), kind);
                for shard in (0..shards).map(ShardId) {
                    let op = match request {
                        Request::Count => ShardOp::Count,
                        Request::Compact => ShardOp::Compact,
                        _ => ShardOp::Checkpoint,
                    };
                    self.post(shard, 0, task, op);
                }
            }
            Request::Keys => self.scan(id, None),
            Request::KeysOf(prefix) => self.scan(id, Some(prefix)),
            Request::Range(query) => {
                let mut sends = Vec::new();
                let read = RangeRead::start(query, shards, &mut |one| sends.push(one));
                let task = self.add(id, 0, TaskKind::Range(read));
                for (part, shard, op) in sends {
                    self.post(shard, part, task, op);
                }
            }
        }
    }

    fn scan(&mut self, id: u64, prefix: Option<Key>) {
        let kind = TaskKind::Keys { shard: 0, found: Vec::new(), prefix: prefix.clone() };
        let task = self.add(id, 1, kind);
        self.post(ShardId(0), 0, task, ShardOp::Scan { cursor: 0, count: SCAN_STEP, prefix });
    }

    fn after_batch(&mut self, task: usize, sends: Vec<(ShardId, ShardOp)>, progress: Progress) {
        for (shard, op) in sends {
            self.post(shard, shard.0, task, op);
        }
        let Some(Task { id, kind: TaskKind::Batch(batch), .. }) = self.tasks.get(task) else { return };
        let (id, is_finished) = (*id, batch.is_finished());
        if let Progress::Reply(reply) = progress {
            self.done.push((id, Outcome::Batch(reply)));
        }
        if is_finished {
            self.tasks.remove(task);
        }
    }

    /// One pass: some messages arrive, the engines advance, answers are carried on. True when anything happened.
    pub fn step(&mut self) -> bool {
        let mut any = self.read_dumps();
        for at in 0..self.engines.len() {
            let arriving =
                self.random.index(self.mail[at].len() + 1).max(usize::from(self.random.chance(1, 2)));
            for _ in 0..arriving {
                let Some(Message { shard, tag, op }) = self.mail[at].pop_front() else { break };
                any = true;
                if let Some(reply) = self.run_at_once(tag, &op) {
                    self.on_answer(tag, Answer::Reply(reply));
                    continue;
                }
                if let Err(op) = self.engines[at].submit(shard, tag, op, self.clock) {
                    self.mail[at].push_front(Message { shard, tag, op });
                    break;
                }
            }
            let mut answers = Vec::new();
            any |= self.engines[at].poll(self.clock, &mut answers);
            for (tag, answer) in answers {
                self.on_answer(tag, answer);
            }
        }
        any
    }

    /// Every other GET, and SET without options, is tried at once first, as by a connection that is owed nothing.
    fn run_at_once(&mut self, tag: u64, op: &ShardOp) -> Option<Reply> {
        let request = match op {
            _ if !tag.is_multiple_of(2) => return None,
            ShardOp::Key { key, action: Action::Get } => Direct::Get { key },
            ShardOp::Key {
                key,
                action: Action::Set { value, expiry: Expiry::Clear, condition: None, reply: SetReply::Ok },
            } => Direct::Set { key, value },
            _ => return None,
        };
        self.run_direct(request)
    }

    /// Tries a direct request; none where it can't be answered at once.
    pub fn run_direct(&mut self, request: Direct<'_>) -> Option<Reply> {
        let shard = shard_of(request.key(), self.shard_count());
        let at = self.engine_of(shard);
        let mut reply = None;
        self.engines[at].run_at_once(std::iter::once((shard, request)), self.clock, |told| {
            reply = Some(match told {
                DirectReply::Value(value) => Reply::Bulk(value.clone()),
                DirectReply::Nil => Reply::Nil,
                DirectReply::Ok => Reply::Ok,
            });
            false
        });
        match &reply {
            None => {}
            Some(Reply::Ok) => probe::hit(Probe::WrittenAtOnce),
            Some(_) => probe::hit(Probe::ReadAtOnce),
        }
        reply
    }

    /// Lets dumps read on, after a while: their readers write what they get, and a pin must hold meanwhile.
    fn read_dumps(&mut self) -> bool {
        let mut sends = Vec::new();
        for (task, one) in &mut self.tasks {
            if let TaskKind::Dump(dump, _) = &mut one.kind
                && dump.is_ready()
                && self.random.chance(1, 100)
            {
                dump.read(&mut |shard, op| sends.push((shard, task, op)));
            }
        }
        let any = !sends.is_empty();
        for (shard, task, op) in sends {
            self.post(shard, shard.0, task, op);
        }
        any
    }

    fn on_answer(&mut self, tag: u64, answer: Answer) {
        let (task_id, part) = ((tag & 0xffff_ffff) as usize, (tag >> 32) as u16);
        let shards = self.shard_count();
        let now_ms = self.clock.unix_ms;
        let Some(task) = self.tasks.get_mut(task_id) else { return };
        let id = task.id;
        task.left = task.left.saturating_sub(1);
        let is_last = task.left == 0;
        match (&mut task.kind, answer) {
            (TaskKind::Batch(batch), answer) => {
                let mut sends = Vec::new();
                let progress =
                    batch.on_answer(ShardId(part), answer, now_ms, &mut |shard, op| sends.push((shard, op)));
                self.after_batch(task_id, sends, progress);
            }
            (TaskKind::Clear(clear), answer) => {
                let mut sends = Vec::new();
                let done = clear.on_answer(answer, &mut |shard, op| sends.push((shard, op)));
                for (shard, op) in sends {
                    self.post(shard, shard.0, task_id, op);
                }
                if let Some(result) = done {
                    self.finish(task_id, Outcome::Done(result));
                }
            }
            (TaskKind::Dump(dump, found), answer) => {
                let mut sends = Vec::new();
                let send = &mut |shard, op| sends.push((shard, op));
                let mut outcome = None;
                match dump.on_answer(answer, send) {
                    None => {}
                    Some(DumpEvent::Begun) => {}
                    Some(DumpEvent::Failed(error)) => *found = Err(error),
                    Some(DumpEvent::Keys { keys, is_last }) => {
                        for PinnedKey { key, value, .. } in keys {
                            match (value, found.as_mut()) {
                                (Ok(value), Ok(found)) => {
                                    found.push((key.expect("what has been read has its key"), value))
                                }
                                (Err(error), Ok(_)) => *found = Err(error),
                                _ => {}
                            }
                        }
                        if is_last {
                            dump.end(send);
                        }
                    }
                    Some(DumpEvent::Released) => {
                        outcome = Some(match std::mem::replace(found, Ok(Vec::new())) {
                            Ok(found) => Outcome::Dump(found),
                            Err(error) => Outcome::Done(Err(error)),
                        });
                    }
                }
                for (shard, op) in sends {
                    self.post(shard, shard.0, task_id, op);
                }
                if let Some(outcome) = outcome {
                    self.finish(task_id, outcome);
                }
            }
            (TaskKind::Range(read), answer) => {
                let mut sends = Vec::new();
                let found = read.on_answer(part, answer, &mut |one| sends.push(one));
                for (part, shard, op) in sends {
                    self.post(shard, part, task_id, op);
                }
                if let Some(found) = found {
                    self.finish(
                        task_id,
                        found.map_or_else(|error| Outcome::Done(Err(error)), Outcome::Range),
                    );
                }
            }
            (TaskKind::Single, Answer::Reply(reply)) => self.finish(task_id, Outcome::Reply(reply)),
            (TaskKind::Watch, Answer::Watching { version }) => {
                self.finish(task_id, Outcome::Watching(version))
            }
            (TaskKind::Count(sum), Answer::Count(count)) => {
                *sum += count;
                let sum = *sum;
                if is_last {
                    self.finish(task_id, Outcome::Count(sum));
                }
            }
            (TaskKind::Each(error), answer) => {
                if let Answer::Failed(one) = answer {
                    error.get_or_insert(one);
                }
                let result = error.clone().map_or(Ok(()), Err);
                if is_last && id == u64::MAX {
                    self.tasks.remove(task_id);
                } else if is_last {
                    self.finish(task_id, Outcome::Done(result));
                }
            }
            (TaskKind::Keys { .. }, Answer::Scanned { unreadable: Some(error), .. }) => {
                self.finish(task_id, Outcome::Done(Err(error)));
            }
            (TaskKind::Keys { shard, found, prefix }, Answer::Scanned { cursor, keys, unreadable: None }) => {
                found.extend(keys);
                if cursor == 0 {
                    *shard += 1;
                }
                let next = ShardId(*shard);
                if next.0 == shards {
                    let found = std::mem::take(found);
                    self.finish(task_id, Outcome::Keys(found));
                } else {
                    task.left = 1;
                    let op = ShardOp::Scan { cursor, count: SCAN_STEP, prefix: prefix.clone() };
                    self.post(next, 0, task_id, op);
                }
            }
            (_, Answer::Failed(error)) => self.finish(task_id, Outcome::Done(Err(error))),
            (_, answer) => broken(Promise::Answers, &format!("an answer that fits no request: {answer:?}")),
        }
    }

    fn finish(&mut self, task: usize, outcome: Outcome) {
        let id = self.tasks.remove(task).id;
        self.done.push((id, outcome));
    }

    /// Outcomes since the last call.
    pub fn take_done(&mut self) -> Vec<(u64, Outcome)> {
        std::mem::take(&mut self.done)
    }

    /// Runs one request to its end. `None` when the disk went away meanwhile.
    pub fn run(&mut self, disk: &SimDisk, request: Request) -> Option<Outcome> {
        self.start(u64::MAX - 1, request);
        // In the modes without a flush deadline the time has to move for anything to be written.
        for _ in 0..200_000 {
            self.step();
            self.clock.monotonic_us += 100;
            if disk.is_off() {
                return None;
            }
            if let Some(at) = self.done.iter().position(|(id, _)| *id == u64::MAX - 1) {
                return Some(self.done.swap_remove(at).1);
            }
        }
        broken(Promise::Answered, "a request was never answered")
    }

    /// A clean stop. False when the disk went away meanwhile.
    pub fn stop(mut self, disk: &SimDisk) -> bool {
        // The real node drains its tasks first: batches under way would never be released otherwise.
        for _ in 0..200_000 {
            if self.tasks.is_empty() || disk.is_off() {
                break;
            }
            self.step();
            self.clock.monotonic_us += 100;
        }
        let mut late = Vec::new();
        self.engines.iter_mut().all(|engine| engine.stop(self.clock, &mut late).is_ok())
    }
}
