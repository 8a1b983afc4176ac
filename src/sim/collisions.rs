//! Keys that the index can't tell apart, which identities of five bits make of most. To the index they are one key: the later
//! one takes the other's place, who is absent from then on. Nobody ever gets another key's value.

use std::collections::{BTreeMap, BTreeSet};

use super::node::{Outcome, Request, SimNode, format};
use crate::device::sim::random::Random;
use crate::device::sim::{SimConfig, SimDisk};
use crate::engine::action::{Action, Command, Expiry, Fold, SetReply, TtlReply};
use crate::engine::check::check;
use crate::engine::durability::Durability;
use crate::engine::index::{Identity, hash_key, narrow};
use crate::engine::memory::MemoryBudget;
use crate::engine::op::{Clock, Key, Reply, Value};
use crate::format::slot::{ShardId, shard_of};

const SHARDS: u16 = 2;
const SEED: u64 = 3;
const CHUNK_SIZE: usize = 5_000;

/// Whose record an identity names, and what is in it.
type Model = BTreeMap<(ShardId, Identity), (Key, Value, u64)>;

fn place(key: &Key) -> (ShardId, Identity) {
    // The secret that `format` makes of the seed.
    (shard_of(key, SHARDS), hash_key(&[SEED as u8 ^ 0x5a; 16], key).identity())
}

fn reply(node: &mut SimNode, disk: &SimDisk, key: &Key, action: Action) -> Reply {
    match node.run(disk, Request::Single(key.clone(), action)) {
        Some(Outcome::Reply(reply)) => reply,
        other => panic!("{other:?}"),
    }
}

fn set(value: Value, expiry: Expiry) -> Action {
    Action::Set { value, expiry, condition: None, reply: SetReply::Ok }
}

fn assert_holds(node: &mut SimNode, disk: &SimDisk, model: &Model, keys: &[Key]) {
    for key in keys {
        let own = model.get(&place(key)).filter(|(owner, _, _)| owner == key);
        let expected = own.map_or(Reply::Nil, |(_, value, _)| Reply::Bulk(value.clone()));
        assert_eq!(reply(node, disk, key, Action::Get), expected, "{key:?}");
        if let Some((_, _, at_ms)) = own {
            let expected = if *at_ms == 0 { -1 } else { *at_ms as i64 };
            let ttl = reply(node, disk, key, Action::Ttl(TtlReply::UnixMilliseconds));
            assert_eq!(ttl, Reply::Int(expected), "{key:?}");
        }
    }
    let expected: BTreeSet<Key> = model.values().map(|(key, _, _)| key.clone()).collect();
    match node.run(disk, Request::Keys) {
        Some(Outcome::Keys(found)) => assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), expected),
        other => panic!("{other:?}"),
    }
    match node.run(disk, Request::Dump) {
        Some(Outcome::Dump(found)) => {
            let expected: BTreeMap<_, _> = model.values().map(|(key, value, _)| (key, value)).collect();
            assert_eq!(found.iter().map(|(key, value)| (key, value)).collect::<BTreeMap<_, _>>(), expected);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(node.run(disk, Request::Count), Some(Outcome::Count(model.len() as u64)));
}

fn boot(disk: &SimDisk, clock: Clock) -> SimNode {
    let mut node = SimNode::boot(disk, 1, Durability::Always, clock, 7).expect("the disk boots");
    node.set_memory(MemoryBudget { cache_size_max: 256 << 10, ..MemoryBudget::default() });
    node.set_checkpoint_interval(1 << 20);
    node.set_chunk_size(CHUNK_SIZE as u64);
    node
}

#[test]
fn keys_of_one_identity_take_each_others_place_and_never_lend_their_values() {
    narrow::set(5);
    let disk = SimDisk::new(SimConfig { block_count: (24 << 20) / 4096, ..SimConfig::default() }, SEED);
    format(&disk, SHARDS, SEED);
    let mut random = Random::new(11);
    let keys: Vec<Key> = (0..200).map(|i| Key::from(format!("key:{i}"))).collect();
    let mut clock = Clock { unix_ms: 1_000_000, monotonic_us: 0 };
    let (mut model, mut absent, mut taken) = (Model::new(), 0, 0);
    for round in 0..6 {
        let mut node = boot(&disk, clock);
        assert!(node.damage.is_empty(), "{:?}", node.damage);
        assert_holds(&mut node, &disk, &model, &keys);
        for step in 0..700_u64 {
            let key = &keys[random.index(keys.len())];
            let there = model.get(&place(key)).cloned();
            let own = there.clone().filter(|(owner, _, _)| owner == key);
            absent += u64::from(there.is_some() && own.is_none());
            // The key of a long value is in memory, so that it is known without a read.
            let is_seen =
                there.as_ref().is_some_and(|(owner, value, _)| owner == key || value.len() <= CHUNK_SIZE);
            match random.below(10) {
                0..=4 => {
                    let size = [10, 300, 3_000, 20_000][random.index(4)];
                    let value = Value::from(format!("{key:?} {round} {step} {}", "v".repeat(size)));
                    let at_ms = if random.chance(1, 4) { clock.unix_ms + 100_000_000 } else { 0 };
                    let expiry = if at_ms == 0 { Expiry::Clear } else { Expiry::At(at_ms) };
                    assert_eq!(reply(&mut node, &disk, key, set(value.clone(), expiry)), Reply::Ok);
                    model.insert(place(key), (key.clone(), value, at_ms));
                    taken += u64::from(there.is_some() && own.is_none());
                }
                5 => {
                    // What the index takes for the key is deleted, whosever it is.
                    let expected = Reply::Int(i64::from(is_seen));
                    if is_seen {
                        model.remove(&place(key));
                    }
                    assert_eq!(reply(&mut node, &disk, key, Action::Delete), expected);
                }
                6 => {
                    let expected = Reply::Int(i64::from(is_seen));
                    assert_eq!(reply(&mut node, &disk, key, Action::Exists), expected);
                }
                7 => {
                    let (mut value, at_ms) =
                        own.map_or((Vec::new(), 0), |(_, value, at)| (value.to_vec(), at));
                    value.extend_from_slice(b"tail");
                    let expected = Reply::Int(value.len() as i64);
                    assert_eq!(reply(&mut node, &disk, key, Action::Append("tail".into())), expected);
                    model.insert(place(key), (key.clone(), value.into(), at_ms));
                }
                8 => {
                    let other = &keys[random.index(keys.len())];
                    let get = |key: &Key| (key.clone(), Action::Get);
                    let actions = vec![get(key), get(other)];
                    let expected = [key, other].map(|key| {
                        let own = model.get(&place(key)).filter(|(owner, _, _)| owner == key);
                        own.map_or(Reply::Nil, |(_, value, _)| Reply::Bulk(value.clone()))
                    });
                    let batch = Request::Batch(vec![Command { actions, fold: Fold::Array }], Vec::new());
                    let found = node.run(&disk, batch);
                    let replies = vec![Reply::Array(expected.to_vec())];
                    let expected = crate::engine::batch::BatchReply::Replies(replies);
                    assert_eq!(found, Some(Outcome::Batch(expected)));
                }
                _ => {
                    let own = own.map_or(Reply::Nil, |(_, value, _)| Reply::Bulk(value));
                    assert_eq!(reply(&mut node, &disk, key, Action::Get), own);
                }
            }
        }
        assert_holds(&mut node, &disk, &model, &keys);
        clock = node.clock;
        if round % 2 == 0 {
            assert!(node.stop(&disk));
        } else {
            drop(node);
        }
        let report = check(&mut disk.open_queue(), &mut |_, _| {}).expect("the image can be read");
        assert!(report.is_clean(), "{:?}", report.damage);
        assert_eq!(report.keys, model.len() as u64);
    }
    assert!(absent > 1_000 && taken > 500, "{absent} meetings, {taken} places taken");
}
