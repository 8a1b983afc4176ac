//! What all clients share: a journal that each appends to, and a crowd of keys that nobody touches.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::{Changes, Expect, JOURNAL, Open, World, WorldConfig, set};
use crate::engine::action::{Action, Command, Fold};
use crate::engine::batch::BatchReply;
use crate::engine::durability::Durability;
use crate::engine::index::hash_key;
use crate::engine::op::Key;
use crate::format::slot::shard_of;
use crate::sim::node::{Outcome, Request, SimNode, secret_of};
use crate::sim::promise::Promise;

/// Bytes of an entry: a few of them are a long value where chunks are short.
const ENTRY_SIZE: usize = 200;

/// Keys of the crowd that one batch makes.
const CROWD_BATCH: usize = 100;

/// One value that every client appends to.
#[derive(Default)]
pub(super) struct Journal {
    /// Entries that may be in it.
    sent: BTreeSet<Vec<u8>>,
    /// By their places, those that somebody was told of.
    told: BTreeMap<usize, Vec<u8>>,
    /// Bytes of it at the last start.
    settled: usize,
}

impl Journal {
    pub(super) fn is_empty(&self) -> bool {
        self.told.is_empty()
    }
}

/// Keys that are all in one part of their shard's index, so that it grows although they are few; as many of each shard.
pub(super) fn crowd_of(config: &WorldConfig) -> Vec<Key> {
    let secret = secret_of(config.seed);
    let mut wanted = vec![config.crowd; usize::from(config.shard_count)];
    let mut keys = Vec::new();
    for number in 0_u64.. {
        if wanted.iter().all(|left| *left == 0) {
            break;
        }
        let key = Key::from(format!("crowd:{number}"));
        let left = &mut wanted[usize::from(shard_of(&key, config.shard_count).0)];
        if *left > 0 && hash_key(&secret, &key).identity().root() == 0 {
            *left -= 1;
            keys.push(key);
        }
    }
    keys
}

impl World {
    pub(super) fn choose_journal(&mut self) -> Open {
        let mut entry = vec![0; ENTRY_SIZE];
        self.random.fill(&mut entry);
        self.journal.sent.insert(entry.clone());
        let action = Action::Append(Bytes::copy_from_slice(&entry));
        Open {
            request: Request::Single(Key::from_static(JOURNAL), action),
            expect: Expect::Journal(entry),
            changes: Changes::new(),
            seen: false,
        }
    }

    /// A request was refused: its entry must not turn up.
    pub(super) fn forget_entry(&mut self, open: &Open) {
        if let Expect::Journal(entry) = &open.expect {
            self.journal.sent.remove(entry);
        }
    }

    pub(super) fn on_journal(&mut self, entry: Vec<u8>, size: i64) {
        let place = usize::try_from(size).ok().and_then(|size| size.checked_sub(ENTRY_SIZE));
        let is_alone = place.is_some_and(|place| {
            place.is_multiple_of(ENTRY_SIZE) && self.journal.told.insert(place, entry).is_none()
        });
        if !is_alone {
            let what = format!("an append to the journal made it {size} bytes, and so did another");
            self.broken(Promise::OneOrder, &what);
        }
    }

    /// After a start: every entry that was told of is at its place, and nothing is there that nobody sent.
    pub(super) fn settle_journal(&mut self, node: &mut SimNode) {
        let found = self.read(node, &Key::from_static(JOURNAL)).unwrap_or_default();
        let entries: Vec<&[u8]> = found.chunks(ENTRY_SIZE).collect();
        let distinct: BTreeSet<&[u8]> = entries.iter().copied().collect();
        if distinct.len() != entries.len() || entries.iter().any(|one| !self.journal.sent.contains(*one)) {
            self.broken(
                Promise::OneOrder,
                &format!("the journal has {} bytes that nobody sent", found.len()),
            );
        }
        // The modes that acknowledge at once may lose its end, but not what an earlier start found.
        let kept =
            if self.config.durability == Durability::Always { usize::MAX } else { self.journal.settled };
        for (place, entry) in &self.journal.told {
            let is_there = found.get(*place..place + ENTRY_SIZE).map(|there| there == entry.as_slice());
            if !is_there.unwrap_or(*place >= kept) {
                let what = format!("an entry of the journal is not at {place} of {} bytes", found.len());
                self.broken(Promise::Acknowledged, &what);
            }
        }
        self.journal.settled = found.len();
        self.journal.told =
            entries.iter().enumerate().map(|(nth, one)| (nth * ENTRY_SIZE, one.to_vec())).collect();
        self.journal.sent = entries.iter().map(|one| one.to_vec()).collect();
    }

    /// Makes the crowd, in a life of its own.
    pub(super) fn make_crowd(&mut self) {
        if self.crowd.is_empty() {
            return;
        }
        let (engines, seed) = (self.config.engine_count, self.config.seed);
        let mut node = match SimNode::boot(&self.disk, engines, Durability::Always, self.clock, seed) {
            Ok(node) => node,
            Err(failure) => self.broken(Promise::Undamaged, &format!("no first start: {failure:?}")),
        };
        for keys in self.crowd.chunks(CROWD_BATCH) {
            let actions = keys.iter().map(|key| (key.clone(), set(key, 0)));
            let all = Command { actions: actions.collect(), fold: Fold::Ok };
            match node.run(&self.disk, Request::Batch(vec![all], Vec::new())) {
                Some(Outcome::Batch(BatchReply::Replies(_))) => {}
                other => self.broken(Promise::Answers, &format!("the crowd is not made: {other:?}")),
            }
        }
        self.clock = node.clock;
        if !node.stop(&self.disk) {
            self.broken(Promise::Answered, "the first life does not end");
        }
    }

    /// The crowd is all there.
    pub(super) fn check_crowd(&mut self, node: &mut SimNode) {
        if self.crowd.is_empty() {
            return;
        }
        // It takes as long as a hundred requests.
        let there = if self.random.chance(2, 3) { None } else { Some(self.list_crowd(node)) };
        if there.is_some_and(|there| there != self.crowd.len()) {
            self.broken(Promise::Scans, &format!("{there:?} of {} keys are listed", self.crowd.len()));
        }
        for _ in 0..20 {
            let key = &self.crowd[self.random.index(self.crowd.len())];
            if self.read(node, key).as_deref() != Some(&key[..]) {
                self.broken(Promise::Acknowledged, &format!("{key:?} is not as it was"));
            }
        }
        self.probes.hit("index of several segments");
    }

    fn list_crowd(&self, node: &mut SimNode) -> usize {
        match node.run(&self.disk, Request::Keys) {
            Some(Outcome::Keys(keys)) => self.count_crowd(&keys),
            other => self.broken(Promise::Scans, &format!("a scan after recovery: {other:?}")),
        }
    }

    /// Keys of the crowd among these, each counted once.
    pub(super) fn count_crowd(&self, keys: &[Key]) -> usize {
        let crowd: BTreeSet<&Key> = keys.iter().filter(|key| key.starts_with(b"crowd:")).collect();
        crowd.len()
    }
}
