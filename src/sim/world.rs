//! Clients against a simulated node, with a model beside, and crashes.
//!
//! Every client owns its keys and has one request at a time, so its model is exact: after each answer it knows the state
//! of its keys, and at a crash at most its one pending request is open, which must then have happened as a whole or not at
//! all. What any client was told before a crash, observers of others' keys included, must hold after it.

mod answers;
mod choose;
mod config;
mod listing;
mod settle;
mod shared;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

pub use config::WorldConfig;
use shared::{Journal, crowd_of};

use super::node::{BootFailure, Outcome, Request, SimNode, format_as};
use super::probe::Probes;
use super::promise::{Promise, broken};
use crate::device::sim::random::Random;
use crate::device::sim::{CrashChoice, Fault, FaultKind, FaultOp, Keep, SimConfig, SimDisk};
use crate::engine::action::{Action, Expiry, Presence, SetReply, TtlReply};
use crate::engine::check::check;
use crate::engine::memory::MemoryBudget;
use crate::engine::op::{Clock, Key, RangeQuery, Reply};
use crate::format::slot::ShardId;

/// What a run came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Over everything that the disks did.
    pub trace: u64,
    /// Crashes.
    pub crashes: u64,
    /// Requests that were answered.
    pub answered: u64,
    /// Situations.
    pub probes: Probes,
}

type State = Option<(Vec<u8>, u64)>;
type Changes = BTreeMap<Key, State>;

/// What the answer of a request must be.
enum Expect {
    /// Exactly this.
    Reply(Reply),
    /// Exactly these.
    Replies(Vec<Reply>),
    /// At least these keys, and no others of the client's.
    Keys,
    /// The client's keys, and no others.
    OwnKeys,
    /// These keys of the client's, and their values.
    Range(RangeQuery),
    /// What these keys of the client's are, and none of its others.
    Dump,
    /// Anything that the owner's model allows: a look at another client's key.
    Look { owner: usize, key: Key },
    /// The shared counter: a number that nobody else got.
    Counter,
    /// The length of the shared journal: this entry is at its end, and no other was there.
    Journal(Vec<u8>),
    /// OK.
    Done,
}

struct Open {
    request: Request,
    expect: Expect,
    changes: Changes,
    /// Somebody saw that it happened.
    seen: bool,
}

struct Client {
    states: Changes,
    open: Option<(u64, Open)>,
    /// The states that no crash can take back any more. Only the modes that acknowledge at once tell them from `states`.
    base: Changes,
    /// What was acknowledged since, in order: its changes, and the shards of a batch across shards (which is durable there).
    history: Vec<(Changes, BTreeSet<ShardId>)>,
}

impl Client {
    fn is_dumping(&self) -> bool {
        self.open.as_ref().is_some_and(|(_, open)| matches!(open.expect, Expect::Dump))
    }
}

struct World {
    config: WorldConfig,
    random: Random,
    disk: SimDisk,
    clients: Vec<Client>,
    probes: Probes,
    clock: Clock,
    next_id: u64,
    answered: u64,
    crashes: u64,
    counter_answered: BTreeSet<i64>,
    counter_sent: u64,
    counter_settled: i64,
    journal: Journal,
    /// Keys that are made at the beginning and stay.
    crowd: Vec<Key>,
    /// This life's node may have no more keys.
    memory_is_short: bool,
}

/// Passes of the node without an answer after which there will be none.
const PASSES_MAX: usize = 400_000;

/// Bytes a second of the scrubber where it never comes to rest, and how far apart its passes begin.
const SCRUB_RATE: u64 = 1 << 30;
const DAY_US: u64 = 86_400_000_000;

const CLIENTS: usize = 5;
const KEYS_PER_CLIENT: usize = 12;
/// Values grow up to here, so that the disks hold them.
const GROWN_SIZE_MAX: u64 = 1 << 20;

const COUNTER: &[u8] = b"shared:counter";
const JOURNAL: &[u8] = b"shared:journal";

/// Runs a world to its end. Panics where a promise is broken; the message names the seed.
pub fn run(config: WorldConfig) -> Summary {
    let disk_config = SimConfig {
        block_count: config.disk_size / 4096,
        tear: config.tear,
        depth: 16,
        transfer_size_max: 128 << 10,
        ..SimConfig::default()
    };
    let disk = SimDisk::new(disk_config, config.seed);
    format_as(&disk, config.shard_count, config.seed, config.index);
    let mut world = World {
        random: Random::new(config.seed),
        disk,
        clients: std::iter::repeat_with(|| Client {
            states: Changes::new(),
            open: None,
            base: Changes::new(),
            history: Vec::new(),
        })
        .take(CLIENTS)
        .collect(),
        probes: Probes::default(),
        clock: Clock { unix_ms: 1_000_000, monotonic_us: 0 },
        next_id: 1,
        answered: 0,
        crashes: 0,
        counter_answered: BTreeSet::new(),
        counter_sent: 0,
        counter_settled: 0,
        journal: Journal::default(),
        crowd: crowd_of(&config),
        memory_is_short: false,
        config,
    };
    world.make_crowd();
    world.life();
    for (name, count) in crate::probe::take() {
        world.probes.add_count(name, count);
    }
    let trace = world.disk.trace_hash();
    Summary { trace, crashes: world.crashes, answered: world.answered, probes: world.probes }
}

fn key_of(client: usize, number: usize) -> Key {
    Key::from(format!("c{client}:k{number}"))
}

fn set(value: &[u8], expires_at_ms: u64) -> Action {
    let expiry = if expires_at_ms == 0 { Expiry::Clear } else { Expiry::At(expires_at_ms) };
    Action::Set { value: Bytes::copy_from_slice(value), expiry, condition: None, reply: SetReply::Ok }
}

impl World {
    #[track_caller]
    fn broken(&self, promise: Promise, what: &str) -> ! {
        let (seed, crash, request) = (self.config.seed, self.crashes, self.next_id);
        broken(promise, &format!("seed {seed}: {what} (crash {crash}, request {request})"))
    }

    fn life(&mut self) {
        let mut started = 0;
        while started < self.config.requests {
            let mut node = self.boot();
            // A life is short often enough for crashes to hit everything, and long enough to fill extents.
            let scale = self.random.index(9);
            let requests = 1 + self.random.index(1 << scale);
            let cut = self.random.chance(3, 4);
            self.memory_is_short = self.random.chance(1, 12);
            node.set_trim(self.config.trim);
            node.set_survivors_apart(self.config.survivors_apart);
            node.set_checkpoint_interval(self.config.checkpoint_interval);
            node.set_chunk_size(self.config.chunk_size);
            node.set_memory(MemoryBudget {
                cache_size_max: self.config.cache_size,
                index_may_grow: !self.memory_is_short,
                ..MemoryBudget::default()
            });
            if self.config.scrubs {
                node.set_scrub_rate(SCRUB_RATE);
                self.slow_some_reads();
            }
            if cut {
                let events = self.disk.events();
                let within = self.random.below(4 * requests as u64 + 8);
                self.disk.power_cut_at(events + within);
            }
            // Each takes an extent, and one that finds none ends the acceptance of writes.
            let room = node.available_extents() > 6;
            if room && (self.config.writes_fail || self.random.chance(1, 3)) {
                self.fail_some_writes();
            }
            let until = started + requests;
            let struck = self.disk.faults_struck();
            let mut is_hit = false;
            let mut waited = 0;
            while started < until && !self.disk.is_off() {
                let sent = self.send(&mut node);
                started += sent;
                waited = if sent > 0 { 0 } else { waited + 1 };
                if waited > PASSES_MAX {
                    self.broken(Promise::Answered, "nobody is answered any more");
                }
                self.pass(&mut node);
                // Just after a write has failed is when little may go wrong besides.
                // Power that has gone does not come back in between.
                if !is_hit && !self.config.scrubs && self.disk.faults_struck() > struck && !self.disk.is_off()
                {
                    is_hit = true;
                    if self.random.chance(1, 2) {
                        self.disk.power_cut_at(self.disk.events() + self.random.below(24));
                        self.probes.hit("power cut soon after a write failed");
                    }
                }
            }
            if cut {
                for _ in 0..self.random.index(200) {
                    self.pass(&mut node);
                }
            }
            self.probes.hit_if(node.cache_hits() > 0, "read answered from the cache");
            if self.disk.is_off() || self.random.chance(1, 2) {
                self.crash(node);
            } else {
                self.drain(&mut node);
                if self.disk.is_off() {
                    self.crash(node);
                    continue;
                }
                self.disk.power_cut_at(u64::MAX);
                self.check_scrubs(&node);
                self.whole_checks(&mut node);
                if self.random.chance(1, 4) {
                    self.let_expire(&mut node);
                }
                if self.random.chance(1, 3) {
                    self.disk.power_cut_at(self.disk.events() + self.random.below(40));
                }
                if node.stop(&self.disk) && !self.disk.is_off() {
                    // A clean stop leaves nothing that a crash could take back.
                    for client in &mut self.clients {
                        client.base = client.states.clone();
                        client.history.clear();
                    }
                    self.probes.hit("clean stop");
                } else {
                    self.probes.hit("crash during a clean stop");
                    self.power_up();
                }
                self.check_image();
            }
        }
        let node = self.boot();
        drop(node);
    }

    /// Some of the next writes fail, in whole, in part or not really: never so many that a group runs out of tries.
    fn fail_some_writes(&mut self) {
        let mut nth = 0;
        for _ in 0..1 + self.random.index(3) {
            nth += if self.config.writes_fail { 8 } else { 20 } + self.random.below(40);
            let keep = Keep::random(&mut self.random, 16 << 10, 512);
            let kind =
                if self.random.chance(1, 4) { FaultKind::Aborted(keep) } else { FaultKind::Error(keep) };
            self.disk.inject(Fault { nth, op: FaultOp::Write, kind, sticky: false });
        }
        self.probes.hit("writes fail");
    }

    /// Some of the next reads take so long that much happens meanwhile.
    fn slow_some_reads(&mut self) {
        let mut nth = 0;
        for _ in 0..40 {
            nth += self.random.below(8);
            let kind = FaultKind::Slow(20 + self.random.below(200));
            self.disk.inject(Fault { nth, op: FaultOp::Read, kind, sticky: false });
        }
    }

    /// Starts a request for an idle client. Returns how many were started.
    fn send(&mut self, node: &mut SimNode) -> usize {
        let at = self.random.index(CLIENTS);
        if self.clients[at].open.is_some() {
            return 0;
        }
        let open = self.choose(at, node);
        let id = self.next_id;
        self.next_id += 1;
        node.start(id, open.request.clone());
        self.clients[at].open = Some((id, open));
        1
    }

    fn value(&mut self) -> Vec<u8> {
        let scale = self.config.value_scale;
        let size = match self.random.below(40) {
            0 => 0,
            1..=24 => self.random.index(200 * scale),
            25..=36 => self.random.index(9_000 * scale),
            37 | 38 => self.random.index(150_000),
            _ => self.random.index(620_000),
        };
        let mut value = vec![0; size];
        self.random.fill(&mut value);
        value
    }

    fn state(&self, client: usize, key: &Key) -> State {
        let state = self.clients[client].states.get(key).cloned().flatten();
        // Expiries are far from the clock or long past, so no answer depends on the moment.
        state.filter(|(_, expires)| *expires == 0 || *expires > self.clock.unix_ms)
    }

    fn choose(&mut self, client: usize, node: &SimNode) -> Open {
        let key = key_of(client, self.random.index(KEYS_PER_CLIENT));
        let before = self.state(client, &key);
        let single = |action: Action, reply: Reply, after: Option<State>| Open {
            request: Request::Single(key.clone(), action),
            expect: Expect::Reply(reply),
            changes: after.map(|state| (key.clone(), state)).into_iter().collect(),
            seen: false,
        };
        let bulk =
            |state: &State| state.as_ref().map_or(Reply::Nil, |(value, _)| Reply::Bulk(value.clone().into()));
        let expires = before.as_ref().map_or(0, |(_, expires)| *expires);
        match self.random.below(100) {
            0..=29 => {
                let mut value = self.value();
                // Long values expire more often: few are ever written, and their chunks go before their records do.
                let is_long = value.len() as u64 > self.config.chunk_size;
                let expires = match self.random.below(if is_long { 4 } else { 12 }) {
                    0 => self.clock.unix_ms + 10_000_000,
                    1 => self.clock.unix_ms.saturating_sub(10),
                    _ => 0,
                };
                if is_long && expires != 0 && expires < self.clock.unix_ms {
                    // Its chunks fill most of an extent, which is free again before the one of its manifest is.
                    value.resize(value.len().max(600_000) + self.random.index(400_000), 0);
                }
                let after = (expires == 0 || expires > self.clock.unix_ms).then(|| (value.clone(), expires));
                single(set(&value, expires), Reply::Ok, Some(after))
            }
            30..=40 => single(Action::Get, bulk(&before), None),
            41..=44 => self.choose_journal(),
            45..=54 => {
                let gone = i64::from(before.is_some());
                single(Action::Delete, Reply::Int(gone), Some(None))
            }
            55..=59 => {
                let more = self.value();
                let mut value = before.map_or(Vec::new(), |(value, _)| value);
                value.extend_from_slice(&more);
                let reply = Reply::Int(value.len() as i64);
                if value.len() as u64 > node.value_size_max().min(GROWN_SIZE_MAX) {
                    let there = i64::from(self.state(client, &key).is_some());
                    return single(Action::Exists, Reply::Int(there), None);
                }
                let is_long = (value.len() - more.len()) as u64 > self.config.chunk_size;
                self.probes.hit_if(is_long, "append to a long value");
                single(Action::Append(more.into()), reply, Some(Some((value, expires))))
            }
            60 | 61 => self.choose_range(client, key, before, node),
            62 => {
                let value = self.value();
                let action = Action::Set {
                    value: value.clone().into(),
                    expiry: Expiry::Keep,
                    condition: Some(if self.random.chance(1, 2) {
                        Presence::Absent
                    } else {
                        Presence::Present
                    }),
                    reply: SetReply::Old,
                };
                let absent = matches!(action, Action::Set { condition: Some(Presence::Absent), .. });
                let applies = absent == before.is_none();
                let after = applies.then_some(Some((value, expires)));
                single(action, bulk(&before), after)
            }
            63..=66 => {
                let owner = self.random.index(CLIENTS);
                let key = key_of(owner, self.random.index(KEYS_PER_CLIENT));
                Open {
                    request: Request::Single(key.clone(), Action::Get),
                    expect: Expect::Look { owner, key },
                    changes: Changes::new(),
                    seen: false,
                }
            }
            67..=71 => {
                self.counter_sent += 1;
                Open {
                    request: Request::Single(Key::from_static(COUNTER), Action::Increment(1)),
                    expect: Expect::Counter,
                    changes: Changes::new(),
                    seen: false,
                }
            }
            72..=91 => self.choose_batch(client, node),
            // A node takes one dump at a time.
            94 if !self.clients.iter().any(Client::is_dumping) => {
                Open { request: Request::Dump, expect: Expect::Dump, changes: Changes::new(), seen: false }
            }
            92..=94 => self.choose_listing(client),
            95 => {
                // Not drawn, so that what else a seed comes to stays the same.
                let is_even = self.clock.monotonic_us.is_multiple_of(2);
                let request = if is_even { Request::Sync } else { Request::Compact };
                Open { request, expect: Expect::Done, changes: Changes::new(), seen: false }
            }
            _ => single(Action::Strlen, Reply::Int(before.map_or(0, |(value, _)| value.len() as i64)), None),
        }
    }

    fn pass(&mut self, node: &mut SimNode) {
        node.step();
        node.clock.monotonic_us += self.random.below(400);
        if self.config.scrubs && self.random.chance(1, 40) {
            // A pass begins once a day.
            node.clock.monotonic_us += DAY_US;
        }
        node.clock.unix_ms += self.random.below(2);
        self.clock = node.clock;
        for (id, outcome) in node.take_done() {
            self.on_done(id, outcome, node);
        }
    }

    fn drain(&mut self, node: &mut SimNode) {
        for _ in 0..PASSES_MAX {
            if self.disk.is_off() || self.clients.iter().all(|client| client.open.is_none()) {
                return;
            }
            self.pass(node);
        }
        self.broken(Promise::Answered, "a request was never answered");
    }

    /// Nothing is damaged here: the scrubber must not say so, whatever was written over and freed under it.
    fn check_scrubs(&mut self, node: &SimNode) {
        let found: u64 = node.stats().map(|stats| stats.scrub.damaged).sum();
        if found > 0 {
            self.broken(Promise::Undamaged, &format!("the scrubber calls {found} records damaged"));
        }
        let passes: u64 = node.stats().map(|stats| stats.scrub.passes).sum();
        self.probes.hit_if(passes > 1, "everything scrubbed again");
    }

    /// Power off, whatever is open stays open; then up again.
    fn crash(&mut self, node: SimNode) {
        if !self.disk.is_off() && self.random.chance(1, 2) {
            // Only the process dies: what it wrote stays in the disk's cache, and what recovery reads from there can still
            // be lost to a later power cut unless recovery flushes it.
            self.probes.hit_if(!self.disk.unflushed().is_empty(), "process killed, disk cache kept");
            drop(node);
            self.crashes += 1;
            self.check_image();
            return;
        }
        if !self.disk.is_off() {
            self.disk.power_cut_at(0);
        }
        self.probes.hit_if(!self.disk.unflushed().is_empty(), "crash with unflushed writes");
        drop(node);
        self.power_up();
    }

    fn power_up(&mut self) {
        self.crashes += 1;
        let mut choice = match self.random.below(8) {
            0 => CrashChoice::Nothing,
            1 => CrashChoice::Everything,
            _ => CrashChoice::seeded(self.random.next_u64()),
        };
        self.disk.crash(&mut choice);
        self.check_image();
    }

    fn check_image(&mut self) {
        // A cut that was armed for what came before must not hit the check.
        self.disk.power_cut_at(u64::MAX);
        match check(&mut self.disk.open_queue(), &mut |_, _| {}) {
            Ok(report) if report.damage.is_empty() && report.superseded.is_empty() => {}
            Ok(report) => {
                let (damage, superseded) = (report.damage, report.superseded);
                let what = format!("check finds damage after a crash: {damage:?}, {superseded:?}");
                self.broken(Promise::Undamaged, &what)
            }
            Err(error) => {
                self.broken(Promise::Undamaged, &format!("check cannot run after a crash: {error}"))
            }
        }
    }

    /// Boots, through crashes of the recovery itself, and settles every client's open request.
    fn boot(&mut self) -> SimNode {
        // Recovery's own writes are few, and a start that fails is tried again: nothing to learn from failing those.
        self.disk.clear_faults();
        let mut node = loop {
            if self.random.chance(1, 4) {
                let events = self.disk.events();
                self.disk.power_cut_at(events + self.random.below(60));
                self.probes.hit("power cut armed during recovery");
            }
            let (engines, durability) = (self.config.engine_count, self.config.durability);
            let booted = SimNode::boot(&self.disk, engines, durability, self.clock, self.random.next_u64());
            match booted {
                Ok(node) if !self.disk.is_off() => break node,
                Ok(_) | Err(BootFailure::Gone) => {
                    self.probes.hit("crash during recovery");
                    self.power_up();
                }
                Err(failure) => {
                    self.broken(Promise::Undamaged, &format!("the node does not boot: {failure:?}"))
                }
            }
        };
        self.probes.add(&std::mem::take(&mut node.probes));
        if !node.damage.is_empty() {
            self.broken(
                Promise::Undamaged,
                &format!("recovery finds damage after a crash: {:?}", node.damage),
            );
        }
        // A cut that was armed for the recovery but came too late must not hit the checks below.
        self.disk.power_cut_at(u64::MAX);
        for at in 0..CLIENTS {
            self.settle(at, &mut node);
        }
        self.settle_counter(&mut node);
        self.settle_journal(&mut node);
        self.check_crowd(&mut node);
        self.check_count(&mut node);
        self.clock = node.clock;
        node
    }

    fn check_count(&self, node: &mut SimNode) {
        let expected = (0..CLIENTS).map(|client| self.live(client)).sum::<u64>() + self.crowd.len() as u64;
        let is_counting = self.counter_settled > 0 || !self.counter_answered.is_empty();
        let counter = u64::from(is_counting) + u64::from(!self.journal.is_empty());
        match node.run(&self.disk, Request::Count) {
            Some(Outcome::Count(count)) if count == expected + counter => self.check_names(node, count),
            other => self.broken(
                Promise::Counts,
                &format!("{} keys are there, the node counts {other:?}", expected + counter),
            ),
        }
    }

    fn live(&self, client: usize) -> u64 {
        (0..KEYS_PER_CLIENT).filter(|number| self.state(client, &key_of(client, *number)).is_some()).count()
            as u64
    }

    fn read(&self, node: &mut SimNode, key: &Key) -> Option<Vec<u8>> {
        match node.run(&self.disk, Request::Single(key.clone(), Action::Get)) {
            Some(Outcome::Reply(Reply::Nil)) => None,
            Some(Outcome::Reply(Reply::Bulk(value))) => Some(value.to_vec()),
            other => self.broken(Promise::Answers, &format!("GET {key:?} after recovery: {other:?}")),
        }
    }

    /// A key's value and when it expires.
    fn read_state(&self, node: &mut SimNode, key: &Key) -> State {
        let value = self.read(node, key)?;
        let action = Action::Ttl(TtlReply::UnixMilliseconds);
        match node.run(&self.disk, Request::Single(key.clone(), action)) {
            Some(Outcome::Reply(Reply::Int(-1))) => Some((value, 0)),
            Some(Outcome::Reply(Reply::Int(at))) if at > 0 => Some((value, at as u64)),
            other => self.broken(Promise::Answers, &format!("PEXPIRETIME {key:?} after recovery: {other:?}")),
        }
    }

    /// Lets the time pass until whatever has an expiry has expired. Nothing is open, so that everybody knows what that is.
    fn let_expire(&mut self, node: &mut SimNode) {
        node.clock.unix_ms += 30_000_000;
        self.clock = node.clock;
        self.probes.hit("everything with an expiry has expired");
        self.check_count(node);
        self.whole_checks(node);
    }

    /// Every extent that is not free is some shard's or some checkpoint's: others would never be free again.
    fn check_extents(&self, node: &SimNode) {
        let (used, known) = node.extents_used();
        if used != known {
            self.broken(Promise::Space, &format!("{used} extents are in use, {known} of them for something"));
        }
    }

    fn whole_checks(&mut self, node: &mut SimNode) {
        for client in 0..CLIENTS {
            for number in 0..KEYS_PER_CLIENT {
                let key = key_of(client, number);
                let expected = self.state(client, &key).map(|(value, _)| value);
                if self.read(node, &key) != expected {
                    self.broken(
                        Promise::Answers,
                        &format!("client {client}: {key:?} is not as acknowledged"),
                    );
                }
            }
        }
        self.check_extents(node);
        self.clock = node.clock;
    }
}

fn brief(reply: &Reply) -> String {
    match reply {
        Reply::Bulk(bytes) => format!("{} bytes", bytes.len()),
        other => format!("{other:?}"),
    }
}

fn short(request: &Request) -> String {
    let text = format!("{request:?}");
    text.chars().take(200).collect()
}
