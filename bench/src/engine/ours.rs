//! Basalt's engine in this process: one core, on a file, operations in flight as a node's clients would have them.

use std::collections::VecDeque;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use basalt::device::Namespace;
use basalt::device::file::FileOptions;
use basalt::device::uring::{UringDevice, UringNamespace};
use basalt::engine::action::{Action, Expiry, SetReply};
use basalt::engine::allocator::Allocator;
use basalt::engine::device_format::{FormatOptions, format};
use basalt::engine::durability::Durability;
use basalt::engine::memory::MemoryBudget;
use basalt::engine::op::{Answer, Clock, Key, KeyRange, Order, RangeQuery, Reply, ShardOp, Value};
use basalt::engine::range::{RangeRead, Sent};
use basalt::engine::{Engine, EngineStats};
use basalt::format::slot::shard_of;
use basalt::format::superblock::IndexKind;
use basalt::limits::SHARD_COUNT_DEFAULT_MIN;

use super::load::{Client, Load, Next, Outcome, SCAN_COUNT, Scanned, Tally, Values, key_of};
use crate::Failure;

/// As a device has that is formatted for one reactor.
const SHARD_COUNT: u16 = SHARD_COUNT_DEFAULT_MIN as u16;

/// An engine on an image.
pub struct Ours {
    engine: Engine<UringDevice>,
    allocator: Arc<Allocator>,
    extent_size: u64,
    started: Instant,
    answers: Vec<(u64, Answer)>,
    values: Values,
    recovery_bytes: u64,
}

fn clock(started: Instant) -> Clock {
    let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    Clock { unix_ms, monotonic_us: started.elapsed().as_micros() as u64 }
}

/// What to make of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// A new one of so many bytes.
    Create(u64),
    /// A file that is there is formatted.
    Format,
    /// It holds data.
    Open,
}

/// The image in a directory.
pub fn image(directory: &Path) -> PathBuf {
    directory.join("basalt.img")
}

impl Ours {
    /// Opens the image of a directory.
    pub fn open(
        directory: &Path,
        start: Start,
        index: IndexKind,
        cache_size: usize,
        values: Values,
    ) -> Result<Ours, Failure> {
        let file = image(directory);
        let started = Instant::now();
        let create_size = match start {
            Start::Create(size) => Some(size),
            Start::Format | Start::Open => None,
        };
        let options = FileOptions { create_size, ..FileOptions::default() };
        let namespace = UringNamespace::open(&file, &options)?;
        if start != Start::Open {
            let mut queue = namespace.open_queue()?;
            let uuid = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
            let uuid = uuid.to_le_bytes();
            let options = FormatOptions {
                shard_count: SHARD_COUNT,
                uuid,
                secret: uuid,
                label: "bench".to_owned(),
                index,
            };
            format(&mut queue, &options, clock(started))?;
        }
        let opened = basalt::node::open(namespace, 2, u64::MAX, &mut |_| {})?;
        let queue = opened.namespace.open_queue()?;
        let extent_size = opened.superblock.layout.extent_size;
        let recovery_bytes = opened.checkpoint_bytes + opened.log_bytes;
        let allocator = Arc::clone(&opened.allocator);
        let mut engine = Engine::new(
            Arc::clone(&opened.superblock),
            Arc::clone(&allocator),
            queue,
            opened.states,
            Durability::Always,
        );
        engine.settle(clock(started))?;
        engine.set_memory(MemoryBudget { cache_size_max: cache_size, ..MemoryBudget::default() });
        Ok(Ours { engine, allocator, extent_size, started, answers: Vec::new(), values, recovery_bytes })
    }

    /// Writes keys `0..count` once each; they are durable at the end.
    pub fn load(&mut self, count: u64, depth: usize) -> Result<(), Failure> {
        self.engine.set_durability(Durability::Never);
        let (mut next, mut in_flight) = (0, 0);
        while next < count || in_flight > 0 {
            while next < count && in_flight < depth {
                self.put(next, next)?;
                (next, in_flight) = (next + 1, in_flight + 1);
            }
            in_flight -= self.poll(&mut |_, answer| expect_ok(&answer))?;
        }
        // Durable like the others' last commit: one more write waits for everything before it.
        self.engine.set_durability(Durability::Always);
        self.put(0, 0)?;
        while self.poll(&mut |_, answer| expect_ok(&answer))? == 0 {}
        Ok(())
    }

    fn submit(&mut self, key: Key, token: u64, action: Action) -> Result<(), Failure> {
        let shard = shard_of(&key, SHARD_COUNT);
        let clock = clock(self.started);
        let submitted = self.engine.submit(shard, token, ShardOp::Key { key, action }, clock);
        submitted.map_err(|_| "the engine admits no more operations".into())
    }

    fn put(&mut self, number: u64, token: u64) -> Result<(), Failure> {
        let value = Value::from(self.values.of(number));
        let action = Action::Set { value, expiry: Expiry::Clear, condition: None, reply: SetReply::Ok };
        self.submit(Key::from(key_of(number)), token, action)
    }

    fn poll(&mut self, each: &mut dyn FnMut(u64, Answer) -> Result<(), Failure>) -> Result<usize, Failure> {
        let clock = clock(self.started);
        self.engine.poll(clock, &mut self.answers);
        let count = self.answers.len();
        for (token, answer) in std::mem::take(&mut self.answers) {
            each(token, answer)?;
        }
        Ok(count)
    }

    /// Clients that each wait for one answer before they ask again, for a while.
    pub fn run(&mut self, load: &Load) -> Result<Tally, Failure> {
        let mut clients: Vec<Client> = (0..load.clients).map(|at| Client::new(load, at)).collect();
        let mut tally = Tally::new();
        let mut waiting: Vec<(Next, Instant)> = Vec::new();
        let begun = Instant::now();
        for (at, client) in clients.iter_mut().enumerate() {
            let next = client.next(load);
            waiting.push((next, Instant::now()));
            self.ask(next, at as u64)?;
        }
        let mut in_flight = clients.len();
        let mut done = Vec::new();
        while in_flight > 0 {
            self.poll(&mut |token, answer| {
                done.push((token as usize, answer));
                Ok(())
            })?;
            let is_over = begun.elapsed() >= load.time;
            for (at, answer) in done.drain(..) {
                let (next, since) = waiting[at];
                let outcome = self.check(next, &answer)?;
                // The write of a read-modify-write comes next; the client still waits.
                if let (Next::ReadModifyWrite(number), Outcome::Read) = (next, outcome) {
                    waiting[at].0 = Next::Update(number);
                    self.put(number, at as u64)?;
                    continue;
                }
                tally.add(next, since.elapsed());
                if is_over {
                    in_flight -= 1;
                    continue;
                }
                let next = clients[at].next(load);
                waiting[at] = (next, Instant::now());
                self.ask(next, at as u64)?;
            }
        }
        tally.seconds = begun.elapsed().as_secs_f64();
        Ok(tally)
    }

    /// Scans of a device with the index `ordered`: clients that each wait for one before they begin another, for a while.
    pub fn scan(&mut self, load: &Load) -> Result<Tally, Failure> {
        let mut tally = Tally::new();
        let mut scans: Vec<(Client, Next, Instant, RangeRead)> = Vec::new();
        // What the engine did not admit, with its token.
        let mut held: VecDeque<(u64, Sent)> = VecDeque::new();
        let begun = Instant::now();
        for at in 0..load.clients {
            let mut client = Client::new(load, at);
            let next = client.next(load);
            let read = begin_scan(next, &mut |one| held.push_back((at as u64, one)));
            scans.push((client, next, Instant::now(), read));
        }
        let (mut in_flight, mut done) = (scans.len(), Vec::new());
        while in_flight > 0 {
            while let Some((client, (part, shard, op))) = held.pop_front() {
                let clock = clock(self.started);
                if let Err(op) = self.engine.submit(shard, client << 16 | u64::from(part), op, clock) {
                    held.push_front((client, (part, shard, op)));
                    break;
                }
            }
            self.poll(&mut |token, answer| {
                done.push((token, answer));
                Ok(())
            })?;
            let is_over = begun.elapsed() >= load.time;
            for (token, answer) in done.drain(..) {
                let at = token >> 16;
                let (client, next, since, read) = &mut scans[at as usize];
                let mut send = |one| held.push_back((at, one));
                let Some(outcome) = read.on_answer(token as u16, answer, &mut send) else { continue };
                let found = outcome.map_err(|error| format!("{next:?}: {error}"))?;
                let Next::Scan(first) = *next else { continue };
                let mut scanned = Scanned::from(first);
                for (key, value) in &found {
                    scanned.take(&self.values, key, value.as_deref().unwrap_or_default());
                }
                scanned.end(load.keys)?;
                tally.add(*next, since.elapsed());
                if is_over {
                    in_flight -= 1;
                    continue;
                }
                (*next, *since) = (client.next(load), Instant::now());
                *read = begin_scan(*next, &mut send);
            }
        }
        tally.seconds = begun.elapsed().as_secs_f64();
        Ok(tally)
    }

    fn ask(&mut self, next: Next, token: u64) -> Result<(), Failure> {
        match next {
            Next::Update(number) => self.put(number, token),
            Next::Scan(_) => Err("a device with the index `hash` has no keys in order".into()),
            Next::Read(number) | Next::Miss(number) | Next::ReadModifyWrite(number) => {
                self.submit(Key::from(key_of(number)), token, Action::Get)
            }
        }
    }

    fn check(&self, next: Next, answer: &Answer) -> Result<Outcome, Failure> {
        match (next, answer) {
            (Next::Update(_), Answer::Reply(Reply::Ok)) => Ok(Outcome::Written),
            (Next::Read(number) | Next::ReadModifyWrite(number), Answer::Reply(Reply::Bulk(value)))
                if self.values.is_of(number, value) =>
            {
                Ok(Outcome::Read)
            }
            (Next::Miss(_), Answer::Reply(Reply::Nil)) => Ok(Outcome::Read),
            _ => Err(format!("{next:?} was answered {answer:?}").into()),
        }
    }

    /// Bytes that were read to open it.
    pub fn recovery_bytes(&self) -> u64 {
        self.recovery_bytes
    }

    /// Stops cleanly.
    pub fn stop(&mut self) -> Result<(), Failure> {
        let clock = clock(self.started);
        Ok(self.engine.stop(clock, &mut self.answers)?)
    }

    /// Bytes of the device that are in use.
    pub fn space_used(&self) -> u64 {
        u64::from(self.allocator.count() - self.allocator.available_count()) * self.extent_size
    }

    /// Reads one key.
    pub fn get_one(&mut self, number: u64) -> Result<(), Failure> {
        self.ask(Next::Read(number), 0)?;
        let mut answers = Vec::new();
        while self.poll(&mut |_, answer| {
            answers.push(answer);
            Ok(())
        })? == 0
        {}
        self.check(Next::Read(number), &answers[0]).map(|_| ())
    }

    /// What the engine counts.
    pub fn stats(&self) -> EngineStats {
        self.engine.stats()
    }
}

fn begin_scan(next: Next, send: &mut impl FnMut(Sent)) -> RangeRead {
    let from = match next {
        Next::Scan(first) => Bound::Included(Key::from(key_of(first))),
        _ => Bound::Unbounded,
    };
    let range = KeyRange { from, to: Bound::Unbounded };
    let query = RangeQuery { range, order: Order::Ascending, limit: SCAN_COUNT, with_values: true };
    RangeRead::start(query, SHARD_COUNT, send)
}

fn expect_ok(answer: &Answer) -> Result<(), Failure> {
    match answer {
        Answer::Reply(Reply::Ok) => Ok(()),
        other => Err(format!("a write was answered {other:?}").into()),
    }
}
