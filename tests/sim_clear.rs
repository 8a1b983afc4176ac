//! FLUSHALL beside batches: a batch is before it or after it on every shard, never before it on one and after it on another.

#![cfg(test)]

use basalt::device::sim::{SimConfig, SimDisk};
use basalt::engine::action::{Action, Command, Expiry, Fold, SetReply};
use basalt::engine::durability::Durability;
use basalt::engine::op::{Clock, Key, Reply};
use basalt::sim::node::{Outcome, Request, SimNode, format};

const SHARDS: u16 = 4;
const KEYS: usize = 12;
const WORLDS: u64 = 300;

fn set(value: &str) -> Action {
    Action::Set {
        value: value.to_owned().into(),
        expiry: Expiry::Clear,
        condition: None,
        reply: SetReply::Ok,
    }
}

fn keys() -> Vec<Key> {
    (0..KEYS).map(|number| Key::from(format!("key:{number}"))).collect()
}

fn write_all(value: &str) -> Request {
    let actions = keys().into_iter().map(|key| (key, set(value))).collect();
    Request::Batch(vec![Command { actions, fold: Fold::Ok }], Vec::new())
}

#[test]
fn a_batch_is_before_or_after_a_clear_on_every_shard() {
    let mut kept = 0;
    for seed in 0..WORLDS {
        let disk = SimDisk::new(SimConfig { block_count: (16 << 20) / 4096, ..SimConfig::default() }, seed);
        format(&disk, SHARDS, 1);
        let clock = Clock { unix_ms: 1_000_000, monotonic_us: 0 };
        let mut node = SimNode::boot(&disk, 2, Durability::Always, clock, seed).expect("a fresh disk boots");
        let requests =
            [write_all("one"), Request::Clear, write_all("two"), Request::Clear, write_all("three")];
        // In another order and at other moments in every world.
        let (mut left, mut started) = (requests.len(), 0);
        while left > 0 {
            while started < requests.len() && node.clock.monotonic_us >= started as u64 * (seed % 7) * 100 {
                let at = (started as u64 + seed) as usize % requests.len();
                node.start(started as u64, requests[at].clone());
                started += 1;
            }
            node.step();
            node.clock.monotonic_us += 100;
            left -= node.take_done().len();
            assert!(node.clock.monotonic_us < 100_000_000, "seed {seed}: a request was never answered");
        }
        let values: Vec<Option<Outcome>> =
            keys().into_iter().map(|key| node.run(&disk, Request::Single(key, Action::Get))).collect();
        assert!(
            values.iter().all(|value| *value == values[0]),
            "seed {seed}: a part of a batch was cleared: {values:?}"
        );
        kept += u64::from(values[0] != Some(Outcome::Reply(Reply::Nil)));
        let counted = if values[0] == Some(Outcome::Reply(Reply::Nil)) { 0 } else { KEYS as u64 };
        assert_eq!(node.run(&disk, Request::Count), Some(Outcome::Count(counted)), "seed {seed}");
    }
    assert!(kept > WORLDS / 10 && kept < WORLDS, "{kept} of {WORLDS} worlds ended with keys: no variety");
}
