//! One core of Basalt's side: an engine with its part of the shards, and its part of the clients, who ask for keys of all shards.
//! What is another core's goes there and back through the rings of a node.

use std::collections::VecDeque;
use std::ops::Bound;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use basalt::device::uring::UringDevice;
use basalt::engine::Engine;
use basalt::engine::action::{Action, Expiry, SetReply};
use basalt::engine::op::{
    Answer, Clock, Direct, DirectReply, Key, KeyRange, Order, RangeQuery, Reply, ShardId, ShardOp, Value,
};
use basalt::engine::range::{RangeRead, Sent};
use basalt::format::slot::shard_of;
use basalt::reactor::MeshEnd;

use crate::Failure;
use crate::engine::load::{Client, Load, Next, Outcome, SCAN_COUNT, Scanned, Tally, Values, key_of};

/// The upper bits of an engine's token say which core asks.
const ORIGIN_SHIFT: u32 = 48;

/// An operation on a shard, with its token.
pub type Asked = (ShardId, u64, ShardOp);

/// The answer, with the same token.
pub type Told = (u64, Answer);

/// The time of now.
pub fn clock(started: Instant) -> Clock {
    let unix_ms = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    Clock { unix_ms, monotonic_us: started.elapsed().as_micros() as u64 }
}

/// Whether the cores are done. Each goes on serving the others until all are.
pub struct Ending {
    busy: AtomicUsize,
    failed: AtomicBool,
}

impl Ending {
    /// So many cores are at work.
    pub fn new(count: usize) -> Ending {
        Ending { busy: AtomicUsize::new(count), failed: AtomicBool::new(false) }
    }

    /// One of them failed: the others' answers may never come.
    pub fn fail(&self) {
        self.failed.store(true, Ordering::Release);
    }
}

/// A core's part of the work, until all cores are done with theirs.
struct Work<'a> {
    ending: &'a Ending,
    is_told: bool,
}

impl Work<'_> {
    fn goes_on(&mut self, in_flight: usize) -> bool {
        if in_flight == 0 && !self.is_told {
            self.is_told = true;
            self.ending.busy.fetch_sub(1, Ordering::AcqRel);
        }
        self.ending.busy.load(Ordering::Acquire) > 0 && !self.ending.failed.load(Ordering::Acquire)
    }
}

/// One core.
pub struct Worker {
    pub engine: Engine<UringDevice>,
    pub mesh: MeshEnd<Asked, Told>,
    pub shard_count: u16,
    pub started: Instant,
    pub values: Values,
    answers: Vec<Told>,
    /// What a full ring or the engine refused: where it goes, whose it is, and what it is.
    held: VecDeque<(usize, usize, Asked)>,
    held_answers: VecDeque<(usize, Told)>,
}

impl Worker {
    /// One with an engine of its own.
    pub fn new(
        engine: Engine<UringDevice>,
        mesh: MeshEnd<Asked, Told>,
        shard_count: u16,
        started: Instant,
        values: Values,
    ) -> Worker {
        let (answers, held, held_answers) = (Vec::new(), VecDeque::new(), VecDeque::new());
        Worker { engine, mesh, shard_count, started, values, answers, held, held_answers }
    }

    fn count(&self) -> usize {
        self.mesh.peer_count()
    }

    fn try_send(&mut self, to: usize, origin: usize, asked: Asked) -> Result<(), Asked> {
        if to != self.mesh.index() {
            return self.mesh.send_request(to, asked).map_err(|full| full.0);
        }
        let (shard, token, op) = asked;
        let full_token = (origin as u64) << ORIGIN_SHIFT | token;
        let submitted = self.engine.submit(shard, full_token, op, clock(self.started));
        submitted.map_err(|op| (shard, token, op))
    }

    fn send_from(&mut self, to: usize, origin: usize, asked: Asked) {
        if !self.held.is_empty() {
            self.held.push_back((to, origin, asked));
        } else if let Err(asked) = self.try_send(to, origin, asked) {
            self.held.push_back((to, origin, asked));
        }
    }

    fn send(&mut self, shard: ShardId, token: u64, op: ShardOp) {
        let to = usize::from(shard.0) * self.count() / usize::from(self.shard_count);
        self.send_from(to, self.mesh.index(), (shard, token, op));
    }

    fn send_key(&mut self, key: Key, token: u64, action: Action) {
        self.send(shard_of(&key, self.shard_count), token, ShardOp::Key { key, action });
    }

    fn put(&mut self, number: u64, token: u64) {
        let value = Value::from(self.values.of(number));
        let action = Action::Set { value, expiry: Expiry::Clear, condition: None, reply: SetReply::Ok };
        self.send_key(Key::from(key_of(number)), token, action);
    }

    /// One pass: rings in, the engine, rings out. What this core's clients are told goes to `told`.
    fn poll(&mut self, told: &mut Vec<Told>) {
        let own = self.mesh.index();
        while let Some((to, origin, asked)) = self.held.pop_front() {
            if let Err(asked) = self.try_send(to, origin, asked) {
                self.held.push_front((to, origin, asked));
                break;
            }
        }
        while let Some((to, answer)) = self.held_answers.pop_front() {
            if let Err(full) = self.mesh.send_answer(to, answer) {
                self.held_answers.push_front((to, full.0));
                break;
            }
        }
        let mut asked = Vec::new();
        if self.held_answers.is_empty() && self.count() > 1 {
            self.mesh.receive_requests(usize::MAX, |from, one| asked.push((from, one)));
            self.mesh.receive_answers(usize::MAX, |_, one| told.push(one));
        }
        for (from, one) in asked {
            self.send_from(own, from, one);
        }
        let mut answers = std::mem::take(&mut self.answers);
        self.engine.poll(clock(self.started), &mut answers);
        for (token, answer) in answers.drain(..) {
            let (origin, token) = ((token >> ORIGIN_SHIFT) as usize, token & ((1 << ORIGIN_SHIFT) - 1));
            if origin == own {
                told.push((token, answer));
            } else if let Err(full) = self.mesh.send_answer(origin, (token, answer)) {
                self.held_answers.push_back((origin, full.0));
            }
        }
        self.answers = answers;
        self.mesh.flush();
    }

    /// Writes this core's part of the keys `0..count`, without waiting for each to be durable.
    pub fn load(&mut self, count: u64, depth: usize, ending: &Ending) -> Result<(), Failure> {
        let mut work = Work { ending, is_told: false };
        let (mut next, step) = (self.mesh.index() as u64, self.count() as u64);
        let (mut in_flight, mut told) = (0, Vec::new());
        while work.goes_on(in_flight + usize::from(next < count)) {
            while next < count && in_flight < depth {
                self.put(next, 0);
                (next, in_flight) = (next + step, in_flight + 1);
            }
            self.poll(&mut told);
            in_flight -= told.len();
            told.drain(..).try_for_each(|(_, answer)| expect(&answer, &Answer::Reply(Reply::Ok)))?;
        }
        Ok(())
    }

    /// Waits until everything in this core's shards is durable.
    pub fn sync(&mut self, ending: &Ending) -> Result<(), Failure> {
        let mut work = Work { ending, is_told: false };
        let (own, count) = (self.mesh.index(), self.count());
        let shards = (0..self.shard_count)
            .filter(|shard| usize::from(*shard) * count / usize::from(self.shard_count) == own);
        let shards: Vec<ShardId> = shards.map(ShardId).collect();
        let (mut in_flight, mut told) = (shards.len(), Vec::new());
        shards.into_iter().for_each(|shard| self.send(shard, 0, ShardOp::Sync));
        while work.goes_on(in_flight) {
            self.poll(&mut told);
            in_flight -= told.len();
            told.drain(..).try_for_each(|(_, answer)| expect(&answer, &Answer::Done))?;
        }
        Ok(())
    }

    /// This core's part of the clients.
    fn clients(&self, load: &Load) -> Vec<Client> {
        (self.mesh.index()..load.clients).step_by(self.count()).map(|at| Client::new(load, at)).collect()
    }

    /// Clients that each wait for one answer before they ask again, for a while.
    pub fn run(&mut self, load: &Load, ending: &Ending) -> Result<Tally, Failure> {
        let mut work = Work { ending, is_told: false };
        let mut clients = self.clients(load);
        let begun = Instant::now();
        let mut tally = Tally::new();
        let mut waiting: Vec<(Next, Instant)> = vec![(Next::Read(0), begun); clients.len()];
        let mut due: Vec<usize> = (0..clients.len()).collect();
        let (mut in_flight, mut told, mut reads, mut ended) =
            (clients.len(), Vec::new(), Vec::new(), Vec::new());
        while work.goes_on(in_flight) {
            let is_over = begun.elapsed() >= load.time;
            for at in due.drain(..) {
                if is_over {
                    in_flight -= 1;
                    continue;
                }
                let next = clients[at].next(load);
                waiting[at] = (next, Instant::now());
                match next {
                    Next::Update(number) => self.put(number, at as u64),
                    Next::Read(number) | Next::Miss(number) | Next::ReadModifyWrite(number) => {
                        reads.push((at, next, key_of(number)));
                    }
                    Next::Scan(_) => return Err("the index `hash` has no keys in order".into()),
                }
            }
            self.read(&mut reads, &mut ended);
            self.poll(&mut told);
            for (token, answer) in told.drain(..) {
                let at = token as usize;
                ended.push((at, self.check(waiting[at].0, &answer)?));
            }
            for (at, outcome) in ended.drain(..) {
                let (next, since) = waiting[at];
                match (next, outcome) {
                    (_, Outcome::Wrong) => return Err(format!("{next:?} was answered wrong").into()),
                    // The write of a read-modify-write comes next; the client still waits.
                    (Next::ReadModifyWrite(number), Outcome::Read) => {
                        waiting[at].0 = Next::Update(number);
                        self.put(number, at as u64);
                    }
                    _ => {
                        tally.add(next, since.elapsed());
                        due.push(at);
                    }
                }
            }
        }
        tally.seconds = begun.elapsed().as_secs_f64();
        Ok(tally)
    }

    /// Reads: at once what can be, together; the rest as operations.
    fn read(&mut self, reads: &mut Vec<(usize, Next, String)>, ended: &mut Vec<(usize, Outcome)>) {
        let Self { engine, values, shard_count, started, .. } = self;
        let (shard_count, started) = (*shard_count, *started);
        let mut late = Vec::new();
        let mut rest = &reads[..];
        while !rest.is_empty() {
            let requests = rest.iter().map(|(_, _, key)| {
                let key = key.as_bytes();
                (shard_of(key, shard_count), Direct::Get { key })
            });
            let mut asked = rest.iter();
            let count = engine.run_at_once(requests, clock(started), |reply| {
                if let Some((at, next, _)) = asked.next() {
                    ended.push((*at, outcome_of(values, *next, reply)));
                }
                true
            });
            if let Some((at, _, key)) = rest.get(count) {
                late.push((*at, Key::copy_from_slice(key.as_bytes())));
            }
            rest = rest.get(count + 1..).unwrap_or_default();
        }
        reads.clear();
        late.into_iter().for_each(|(at, key)| self.send_key(key, at as u64, Action::Get));
    }

    fn check(&self, next: Next, answer: &Answer) -> Result<Outcome, Failure> {
        let reply = match answer {
            Answer::Reply(Reply::Ok) => DirectReply::Ok,
            Answer::Reply(Reply::Nil) => DirectReply::Nil,
            Answer::Reply(Reply::Bulk(value)) => DirectReply::Value(value),
            _ => return Err(format!("{next:?} was answered {answer:?}").into()),
        };
        Ok(outcome_of(&self.values, next, reply))
    }

    /// Scans of a device with the index `ordered`: clients that each wait for one before they begin another, for a while.
    pub fn scan(&mut self, load: &Load, ending: &Ending) -> Result<Tally, Failure> {
        let mut work = Work { ending, is_told: false };
        let mut tally = Tally::new();
        let mut scans: Vec<(Client, Next, Instant, RangeRead)> = Vec::new();
        let (mut told, mut sends) = (Vec::new(), Vec::new());
        let begun = Instant::now();
        for (at, mut client) in self.clients(load).into_iter().enumerate() {
            let next = client.next(load);
            let read = begin_scan(next, self.shard_count, &mut |one| sends.push((at, one)));
            scans.push((client, next, Instant::now(), read));
        }
        let mut in_flight = scans.len();
        while work.goes_on(in_flight) {
            for (at, (part, shard, op)) in sends.drain(..) {
                self.send(shard, (at as u64) << 16 | u64::from(part), op);
            }
            self.poll(&mut told);
            let is_over = begun.elapsed() >= load.time;
            for (token, answer) in told.drain(..) {
                let at = (token >> 16) as usize;
                let (client, next, since, read) = &mut scans[at];
                let mut send = |one| sends.push((at, one));
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
                *read = begin_scan(*next, self.shard_count, &mut send);
            }
        }
        tally.seconds = begun.elapsed().as_secs_f64();
        Ok(tally)
    }

    /// Reads one key of this core's, alone.
    pub fn get_one(&mut self, number: u64) -> Result<(), Failure> {
        self.send_key(Key::from(key_of(number)), 0, Action::Get);
        let mut told = Vec::new();
        while told.is_empty() {
            self.poll(&mut told);
        }
        match self.check(Next::Read(number), &told[0].1)? {
            Outcome::Read => Ok(()),
            _ => Err(format!("key {number} was answered wrong").into()),
        }
    }
}

fn outcome_of(values: &Values, next: Next, reply: DirectReply<'_>) -> Outcome {
    match (next, reply) {
        (Next::Update(_), DirectReply::Ok) => Outcome::Written,
        (Next::Read(number) | Next::ReadModifyWrite(number), DirectReply::Value(value))
            if values.is_of(number, value) =>
        {
            Outcome::Read
        }
        (Next::Miss(_), DirectReply::Nil) => Outcome::Read,
        _ => Outcome::Wrong,
    }
}

fn begin_scan(next: Next, shard_count: u16, send: &mut impl FnMut(Sent)) -> RangeRead {
    let from = match next {
        Next::Scan(first) => Bound::Included(Key::from(key_of(first))),
        _ => Bound::Unbounded,
    };
    let range = KeyRange { from, to: Bound::Unbounded };
    let query = RangeQuery { range, order: Order::Ascending, limit: SCAN_COUNT, with_values: true };
    RangeRead::start(query, shard_count, send)
}

fn expect(answer: &Answer, wanted: &Answer) -> Result<(), Failure> {
    match (answer, wanted) {
        (Answer::Reply(Reply::Ok), Answer::Reply(Reply::Ok)) | (Answer::Done, Answer::Done) => Ok(()),
        _ => Err(format!("it was answered {answer:?}, not {wanted:?}").into()),
    }
}
