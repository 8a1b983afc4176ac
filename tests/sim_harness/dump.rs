//! Money moves between accounts on all shards, extents are collected, and dumps are taken meanwhile.

use std::collections::BTreeMap;

use basalt::device::sim::random::Random;
use basalt::device::sim::{SimConfig, SimDisk};
use basalt::engine::action::{Action, Command, Expiry, Fold, SetReply};
use basalt::engine::durability::Durability;
use basalt::engine::op::{Clock, Key, OpError, Reply};
use basalt::sim::node::{Outcome, Request, SimNode, format};
use basalt::sim::promise::{Promise, broken};

pub const SHARDS: u16 = 4;
pub const ACCOUNTS: usize = 60;
pub const BALANCE: usize = 1_000;

/// An account's balance, and ballast that fills the device.
pub fn balance(amount: usize, ballast: usize) -> Action {
    let mut value = format!("{amount:08}").into_bytes();
    value.resize(8 + ballast, b'.');
    Action::Set { value: value.into(), expiry: Expiry::Clear, condition: None, reply: SetReply::Ok }
}

pub fn account(number: usize) -> Key {
    Key::from(format!("account:{number}"))
}

/// A world: writers, and dumps at any moment.
pub struct World {
    pub disk: SimDisk,
    pub node: SimNode,
    pub random: Random,
    pub balances: Vec<usize>,
    pub ballast: usize,
    pub next: u64,
    /// Requests under way, with the accounts that they change; `None` for dumps.
    pub open: BTreeMap<u64, Option<[usize; 2]>>,
    pub dumps: u64,
    pub lost: u64,
}

impl World {
    pub fn new(seed: u64, ballast: usize) -> World {
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

    pub fn start(&mut self, request: Request, accounts: Option<[usize; 2]>) {
        self.next += 1;
        self.open.insert(self.next, accounts);
        self.node.start(self.next, request);
    }

    /// Moves money between two accounts, or makes a key that is none of the accounts, or deletes it.
    pub fn write(&mut self) {
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
                other => broken(Promise::Dumps, &format!("seed {seed}: {other:?}")),
            }
        }
    }

    fn check(&mut self, keys: &[(Key, basalt::engine::op::Value)], seed: u64) {
        self.dumps += 1;
        let mut all: BTreeMap<&Key, usize> = BTreeMap::new();
        for (key, value) in keys {
            let amount = std::str::from_utf8(&value[..8]).unwrap().parse().unwrap();
            if all.insert(key, amount).is_some() {
                broken(Promise::Dumps, &format!("seed {seed}: {key:?} came twice"));
            }
        }
        let accounts: Vec<usize> =
            (0..ACCOUNTS).filter_map(|number| all.get(&account(number)).copied()).collect();
        if accounts.len() != ACCOUNTS {
            broken(Promise::Dumps, &format!("seed {seed}: accounts are missing"));
        }
        let sum: usize = accounts.iter().sum();
        if sum != ACCOUNTS * BALANCE {
            broken(Promise::Dumps, &format!("seed {seed}: a part of a transfer is in the dump"));
        }
    }

    pub fn run(&mut self, writes: usize, seed: u64) {
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
            if self.node.clock.monotonic_us >= deadline {
                broken(Promise::Answered, &format!("seed {seed}: {:?} never ended", self.open));
            }
        }
    }
}
