//! Dumps beside writers: money moves between accounts on all shards, extents are collected, and every dump has the same sum and
//! every account once.

#![cfg(test)]

use std::collections::BTreeMap;

use basalt::device::sim::random::Random;
use basalt::device::sim::{SimConfig, SimDisk};
use basalt::engine::action::{Action, Command, Expiry, Fold, SetReply};
use basalt::engine::durability::Durability;
use basalt::engine::memory::MemoryBudget;
use basalt::engine::op::{Clock, Key, OpError, Reply};
use basalt::sim::node::{Outcome, Request, SimNode, format};

const SHARDS: u16 = 4;
const ACCOUNTS: usize = 60;
const BALANCE: usize = 1_000;

fn worlds() -> u64 {
    std::env::var("BASALT_SEEDS").ok().map_or(40, |text| text.parse().expect("a number"))
}

/// An account's balance, and ballast that fills the device.
fn balance(amount: usize, ballast: usize) -> Action {
    let mut value = format!("{amount:08}").into_bytes();
    value.resize(8 + ballast, b'.');
    Action::Set { value: value.into(), expiry: Expiry::Clear, condition: None, reply: SetReply::Ok }
}

fn account(number: usize) -> Key {
    Key::from(format!("account:{number}"))
}

/// A world: writers, and dumps at any moment.
struct World {
    disk: SimDisk,
    node: SimNode,
    random: Random,
    balances: Vec<usize>,
    ballast: usize,
    next: u64,
    /// Requests under way, with the accounts that they change; `None` for dumps.
    open: BTreeMap<u64, Option<[usize; 2]>>,
    dumps: u64,
    lost: u64,
}

impl World {
    fn new(seed: u64, ballast: usize) -> World {
        let config = SimConfig { block_count: (24 << 20) / 4096, ..SimConfig::default() };
        let disk = SimDisk::new(config, seed);
        format(&disk, SHARDS, 1);
        let clock = Clock { unix_ms: 1_000_000, monotonic_us: 0 };
        let node = SimNode::boot(&disk, 2, Durability::Always, clock, seed).expect("a fresh disk boots");
        let random = Random::new(seed);
        let balances = vec![BALANCE; ACCOUNTS];
        let mut world = World {
            disk,
            node,
            random,
            balances,
            ballast,
            next: 0,
            open: BTreeMap::new(),
            dumps: 0,
            lost: 0,
        };
        let actions = (0..ACCOUNTS).map(|number| (account(number), balance(BALANCE, ballast))).collect();
        let all = Request::Batch(vec![Command { actions, fold: Fold::Ok }], Vec::new());
        assert!(matches!(world.node.run(&world.disk, all), Some(Outcome::Batch(_))));
        world
    }

    fn start(&mut self, request: Request, accounts: Option<[usize; 2]>) {
        self.next += 1;
        self.open.insert(self.next, accounts);
        self.node.start(self.next, request);
    }

    /// Moves money between two accounts, or makes a key that is none of the accounts, or deletes it.
    fn write(&mut self) {
        let (from, to) = (self.random.index(ACCOUNTS), self.random.index(ACCOUNTS));
        // Balances are written, not changed: two transfers of one account have no order.
        if from == to || self.open.values().flatten().flatten().any(|one| *one == from || *one == to) {
            let key = Key::from(format!("other:{}", self.random.index(60)));
            let action = if self.random.chance(1, 2) { Action::Delete } else { balance(7, self.ballast) };
            return self.start(Request::Single(key, action), Some([ACCOUNTS; 2]));
        }
        let amount = self.random.index(self.balances[from] + 1);
        self.balances[from] -= amount;
        self.balances[to] += amount;
        let pair = [from, to].map(|one| (account(one), balance(self.balances[one], self.ballast)));
        let command = Command { actions: pair.to_vec(), fold: Fold::Ok };
        self.start(Request::Batch(vec![command], Vec::new()), Some([from, to]));
    }

    fn step(&mut self, seed: u64) {
        self.node.step();
        self.node.clock.monotonic_us += 2_000;
        for (id, outcome) in self.node.take_done() {
            let is_dump = self.open.remove(&id) == Some(None);
            match outcome {
                Outcome::Dump(keys) => self.check(&keys, seed),
                Outcome::Done(Err(OpError::DumpLost { .. })) if is_dump => self.lost += 1,
                Outcome::Batch(basalt::engine::batch::BatchReply::Replies(_)) => {}
                Outcome::Reply(Reply::Ok | Reply::Int(_)) => {}
                other => panic!("seed {seed}: {other:?}"),
            }
        }
    }

    fn check(&mut self, keys: &[(Key, basalt::engine::op::Value)], seed: u64) {
        self.dumps += 1;
        let mut all: BTreeMap<&Key, usize> = BTreeMap::new();
        for (key, value) in keys {
            let amount = std::str::from_utf8(&value[..8]).unwrap().parse().unwrap();
            assert!(all.insert(key, amount).is_none(), "seed {seed}: {key:?} came twice");
        }
        let accounts: Vec<usize> =
            (0..ACCOUNTS).filter_map(|number| all.get(&account(number)).copied()).collect();
        assert_eq!(accounts.len(), ACCOUNTS, "seed {seed}: accounts are missing");
        let sum: usize = accounts.iter().sum();
        assert_eq!(sum, ACCOUNTS * BALANCE, "seed {seed}: a part of a transfer is in the dump");
    }

    fn run(&mut self, writes: usize, seed: u64) {
        for _ in 0..writes {
            while self.open.len() > 20 {
                self.step(seed);
            }
            self.write();
            if self.random.chance(1, 60) && !self.open.values().any(Option::is_none) {
                self.start(Request::Dump, None);
            }
            self.step(seed);
        }
        let deadline = self.node.clock.monotonic_us + 600_000_000;
        while !self.open.is_empty() {
            self.step(seed);
            assert!(self.node.clock.monotonic_us < deadline, "seed {seed}: {:?} never ended", self.open);
        }
    }
}

#[test]
fn a_dump_is_of_one_moment_whatever_is_written_and_collected() {
    let (mut dumps, mut lost, mut freed) = (0, 0, 0);
    for seed in 0..worlds() {
        let mut world = World::new(seed, [40, 3_000, 9_000][seed as usize % 3]);
        world.run(1_500, seed);
        dumps += world.dumps;
        lost += world.lost;
        freed +=
            basalt::probe::take().filter(|(name, _)| *name == "extent freed").map(|(_, n)| n).sum::<u64>();
    }
    println!("{dumps} dumps, {lost} given up, {freed} extents freed");
    assert!(dumps > 2 * worlds() && freed > worlds(), "{dumps} dumps, {freed} extents freed");
}

/// What stands in the way of writes, or is emptied under it, is given up and says so; another dump can follow.
#[test]
fn a_dump_gives_way() {
    let mut world = World::new(3, 100);
    world.start(Request::Dump, None);
    world.start(Request::Clear, None);
    world.start(Request::Dump, None);
    for _ in 0..5_000 {
        world.node.step();
        world.node.clock.monotonic_us += 50;
    }
    let mut outcomes = Vec::new();
    for (id, outcome) in world.node.take_done() {
        outcomes.push((id, matches!(outcome, Outcome::Dump(_)), outcome));
    }
    assert_eq!(outcomes.len(), 3, "{outcomes:?}");
    assert!(
        outcomes.iter().any(|(id, _, outcome)| *id == 2 && *outcome == Outcome::Done(Ok(()))),
        "{outcomes:?}"
    );

    let mut world = World::new(4, 100);
    let is_busy = |outcome: &Outcome| *outcome == Outcome::Done(Err(OpError::DumpBusy));
    world.start(Request::Dump, None);
    world.start(Request::Dump, None);
    let mut busy = 0;
    for _ in 0..5_000 {
        world.node.step();
        world.node.clock.monotonic_us += 50;
        busy += world.node.take_done().iter().filter(|(_, outcome)| is_busy(outcome)).count();
    }
    assert!(busy <= 1, "both dumps were refused");
    // No room for what was overwritten: writes go on, the dump does not. There are enough keys that it takes a while.
    for hundred in 0..40 {
        let keys = (0..100).map(|number| (Key::from(format!("more:{hundred}:{number}")), balance(1, 10)));
        let command = Command { actions: keys.collect(), fold: Fold::Ok };
        let done = world.node.run(&world.disk, Request::Batch(vec![command], Vec::new()));
        assert!(matches!(done, Some(Outcome::Batch(_))));
    }
    world.node.set_memory(MemoryBudget { index_may_grow: false, ..MemoryBudget::default() });
    world.open.clear();
    for _ in 0..20 {
        world.start(Request::Dump, None);
        for _ in 0..50 {
            world.write();
            world.node.step();
            world.node.clock.monotonic_us += 50;
        }
        let outcome = |node: &mut SimNode| node.take_done();
        for _ in 0..8_000 {
            world.node.step();
            world.node.clock.monotonic_us += 50;
            for (_, outcome) in outcome(&mut world.node) {
                world.lost += u64::from(matches!(outcome, Outcome::Done(Err(OpError::DumpLost { .. }))));
                world.dumps += u64::from(matches!(outcome, Outcome::Dump(_)));
            }
        }
    }
    assert!(world.lost > 0, "no dump was given up for want of memory");
    world.node.set_memory(MemoryBudget::default());
    let whole = world.node.run(&world.disk, Request::Dump);
    assert!(matches!(whole, Some(Outcome::Dump(_))), "{whole:?}");
}
