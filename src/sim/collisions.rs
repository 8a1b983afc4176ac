//! Keys that the index can't tell apart, which identities of five bits make of most. To the index they are one key: the later
//! one takes the other's place, who is absent from then on. Nobody ever gets another key's value.

use std::collections::{BTreeMap, BTreeSet};

use super::node::{Outcome, Request, SimNode, format_as, secret_of};
use super::promise::{Promise, broken};
use crate::device::sim::random::Random;
use crate::device::sim::{SimConfig, SimDisk};
use crate::engine::action::{Action, Command, Expiry, Fold, SetReply, TtlReply};
use crate::engine::batch::BatchReply;
use crate::engine::check::check;
use crate::engine::durability::Durability;
use crate::engine::index::narrow::Narrow;
use crate::engine::index::{Identity, hash_key};
use crate::engine::memory::MemoryBudget;
use crate::engine::op::{Clock, Key, KeyRange, Order, RangeQuery, Reply, Value};
use crate::format::slot::{ShardId, shard_of};
use crate::format::superblock::IndexKind;

const SHARDS: u16 = 2;
const CHUNK_SIZE: usize = 5_000;

/// Whose record an identity names, and what is in it.
type Model = BTreeMap<(ShardId, Identity), (Key, Value, u64)>;

/// What a run came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meetings {
    /// A key was asked for of which the index had another in its place.
    pub absent: u64,
    /// A key took another's place.
    pub taken: u64,
}

fn must(is_so: bool, promise: Promise, what: &dyn std::fmt::Debug) {
    if !is_so {
        broken(promise, &format!("{what:?}"));
    }
}

fn brief(reply: &Reply) -> String {
    match reply {
        Reply::Bulk(bytes) if bytes.len() > 40 => format!("{} bytes: {:?}", bytes.len(), &bytes[..40]),
        other => format!("{other:?}"),
    }
}

fn expect(node: &mut SimNode, disk: &SimDisk, key: &Key, action: Action, expected: &Reply) {
    match node.run(disk, Request::Single(key.clone(), action)) {
        Some(Outcome::Reply(reply)) if reply == *expected => {}
        Some(Outcome::Reply(reply)) => {
            let what = format!("{key:?} gives {}, not {}", brief(&reply), brief(expected));
            broken(Promise::Answers, &what);
        }
        other => broken(Promise::Answers, &format!("{key:?} gives {other:?}")),
    }
}

/// A node whose keys are told apart by so few bits that most have the identity of another.
struct World {
    secret: [u8; 16],
    disk: SimDisk,
    keys: Vec<Key>,
    model: Model,
}

impl World {
    fn place(&self, key: &Key) -> (ShardId, Identity) {
        (shard_of(key, SHARDS), hash_key(&self.secret, key).identity())
    }

    /// What the node must say that a key has.
    fn value_of(&self, key: &Key) -> Reply {
        let own = self.model.get(&self.place(key)).filter(|(owner, _, _)| owner == key);
        own.map_or(Reply::Nil, |(_, value, _)| Reply::Bulk(value.clone()))
    }

    fn boot(&self, clock: Clock) -> SimNode {
        let mut node = match SimNode::boot(&self.disk, 1, Durability::Always, clock, 7) {
            Ok(node) => node,
            Err(failure) => broken(Promise::Undamaged, &format!("the node does not boot: {failure:?}")),
        };
        must(node.damage.is_empty(), Promise::Undamaged, &node.damage);
        node.set_memory(MemoryBudget { cache_size_max: 256 << 10, ..MemoryBudget::default() });
        node.set_checkpoint_interval(1 << 20);
        node.set_chunk_size(CHUNK_SIZE as u64);
        node
    }

    /// The node has what the model has.
    fn compare(&self, node: &mut SimNode) {
        let disk = &self.disk;
        for key in &self.keys {
            expect(node, disk, key, Action::Get, &self.value_of(key));
            if let Some((owner, _, at_ms)) = self.model.get(&self.place(key))
                && owner == key
            {
                let at = if *at_ms == 0 { -1 } else { *at_ms as i64 };
                expect(node, disk, key, Action::Ttl(TtlReply::UnixMilliseconds), &Reply::Int(at));
            }
        }
        let expected: BTreeSet<&Key> = self.model.values().map(|(key, _, _)| key).collect();
        match node.run(disk, Request::Keys) {
            Some(Outcome::Keys(found)) => {
                must(found.iter().collect::<BTreeSet<_>>() == expected, Promise::Scans, &found)
            }
            other => broken(Promise::Scans, &format!("{other:?}")),
        }
        if node.index() == IndexKind::Ordered {
            self.compare_range(node, &expected);
        }
        match node.run(disk, Request::Dump) {
            Some(Outcome::Dump(found)) => {
                let expected: BTreeMap<_, _> =
                    self.model.values().map(|(key, value, _)| (key, value)).collect();
                let found: BTreeMap<_, _> = found.iter().map(|(key, value)| (key, value)).collect();
                must(found == expected, Promise::Dumps, &found.keys());
            }
            other => broken(Promise::Dumps, &format!("{other:?}")),
        }
        let count = node.run(disk, Request::Count);
        must(count == Some(Outcome::Count(self.model.len() as u64)), Promise::Counts, &count);
    }

    /// Names of keys whose place another has taken may be left; their values are nobody's.
    fn compare_range(&self, node: &mut SimNode, expected: &BTreeSet<&Key>) {
        let (range, order) = (KeyRange::all(), Order::Ascending);
        let query = RangeQuery { range, order, limit: usize::MAX, with_values: true };
        match node.run(&self.disk, Request::Range(query)) {
            Some(Outcome::Range(found)) => {
                let is_right = found.iter().map(|(key, _)| key).eq(expected.iter().copied())
                    && found.iter().all(|(key, value)| {
                        value.as_ref().is_some_and(|value| Reply::Bulk(value.clone()) == self.value_of(key))
                    });
                must(is_right, Promise::Scans, &found.iter().map(|(key, _)| key).collect::<Vec<_>>());
            }
            other => broken(Promise::Scans, &format!("{other:?}")),
        }
    }

    /// One request, whose answer is known.
    fn step(&mut self, node: &mut SimNode, random: &mut Random, name: &str, meetings: &mut Meetings) {
        let key = self.keys[random.index(self.keys.len())].clone();
        let place = self.place(&key);
        let there = self.model.get(&place).cloned();
        let own = there.clone().filter(|(owner, _, _)| *owner == key);
        meetings.absent += u64::from(there.is_some() && own.is_none());
        // The key of a long value is in memory, so that it is known without a read.
        let is_seen =
            there.as_ref().is_some_and(|(owner, value, _)| *owner == key || value.len() <= CHUNK_SIZE);
        match random.below(10) {
            0..=4 => {
                let size = [10, 300, 3_000, 20_000][random.index(4)];
                let value = Value::from(format!("{key:?} {name} {}", "v".repeat(size)));
                let at_ms = if random.chance(1, 4) { node.clock.unix_ms + 100_000_000 } else { 0 };
                let expiry = if at_ms == 0 { Expiry::Clear } else { Expiry::At(at_ms) };
                expect(node, &self.disk, &key, set(value.clone(), expiry), &Reply::Ok);
                meetings.taken += u64::from(there.is_some() && own.is_none());
                self.model.insert(place, (key, value, at_ms));
            }
            5 => {
                // What the index takes for the key is deleted, whosever it is.
                if is_seen {
                    self.model.remove(&place);
                }
                expect(node, &self.disk, &key, Action::Delete, &Reply::Int(i64::from(is_seen)));
            }
            6 => expect(node, &self.disk, &key, Action::Exists, &Reply::Int(i64::from(is_seen))),
            7 => {
                let (mut value, at_ms) = own.map_or((Vec::new(), 0), |(_, value, at)| (value.to_vec(), at));
                value.extend_from_slice(b"tail");
                let size = Reply::Int(value.len() as i64);
                expect(node, &self.disk, &key, Action::Append("tail".into()), &size);
                self.model.insert(place, (key, value.into(), at_ms));
            }
            8 => {
                let both = [key, self.keys[random.index(self.keys.len())].clone()];
                let actions = both.iter().map(|key| (key.clone(), Action::Get)).collect();
                let replies = vec![Reply::Array(both.iter().map(|key| self.value_of(key)).collect())];
                let batch = Request::Batch(vec![Command { actions, fold: Fold::Array }], Vec::new());
                let found = node.run(&self.disk, batch);
                let is_right = found == Some(Outcome::Batch(BatchReply::Replies(replies)));
                must(is_right, Promise::Answers, &both);
            }
            _ => expect(node, &self.disk, &key, Action::Get, &self.value_of(&key)),
        }
    }
}

fn set(value: Value, expiry: Expiry) -> Action {
    Action::Set { value, expiry, condition: None, reply: SetReply::Ok }
}

/// Six lives of a node, stopped or killed in turn. Panics where a promise is broken.
pub fn run(seed: u64) -> Meetings {
    let _narrow = Narrow::to(5);
    let config = SimConfig { block_count: (24 << 20) / 4096, ..SimConfig::default() };
    let keys = (0..200).map(|i| Key::from(format!("key:{i}"))).collect();
    let mut world =
        World { secret: secret_of(seed), disk: SimDisk::new(config, seed), keys, model: Model::new() };
    let index = if seed % 2 == 1 { IndexKind::Ordered } else { IndexKind::Hash };
    format_as(&world.disk, SHARDS, seed, index);
    let mut random = Random::new(seed);
    let mut clock = Clock { unix_ms: 1_000_000, monotonic_us: 0 };
    let mut meetings = Meetings { absent: 0, taken: 0 };
    for round in 0..6 {
        let mut node = world.boot(clock);
        world.compare(&mut node);
        for step in 0..700 {
            world.step(&mut node, &mut random, &format!("{round} {step}"), &mut meetings);
        }
        world.compare(&mut node);
        clock = node.clock;
        if round % 2 == 0 {
            must(node.stop(&world.disk), Promise::Answered, &"a clean stop");
        } else {
            drop(node);
        }
        match check(&mut world.disk.open_queue(), &mut |_, _| {}) {
            Ok(report) => {
                must(report.is_clean() && report.superseded.is_empty(), Promise::Undamaged, &report.damage);
                must(report.keys == world.model.len() as u64, Promise::Counts, &report.keys);
            }
            Err(error) => broken(Promise::Undamaged, &format!("check cannot run: {error}")),
        }
    }
    meetings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_one_identity_take_each_others_place_and_never_lend_their_values() {
        for seed in [2, 3] {
            let meetings = run(seed);
            assert!(meetings.absent > 1_000 && meetings.taken > 500, "{meetings:?}");
        }
    }
}
