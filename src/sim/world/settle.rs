//! After a crash: what is there against what every client was told.

use std::collections::{BTreeMap, BTreeSet};

use super::{COUNTER, Changes, KEYS_PER_CLIENT, Open, State, World, key_of, short};
use crate::engine::durability::Durability;
use crate::engine::op::Key;
use crate::format::slot::{ShardId, shard_of};
use crate::sim::node::{Request, SimNode};
use crate::sim::promise::Promise;

impl World {
    /// Keeps what a crash may still take back.
    pub(super) fn remember(&mut self, client: usize, open: &Open, shard_count: u16) {
        if matches!(open.request, Request::Sync) {
            // What this client was told before it asked is durable now. Others were told more meanwhile.
            let client = &mut self.clients[client];
            client.base = client.states.clone();
            client.history.clear();
        } else if !open.changes.is_empty() {
            // Deleting what is not there logs nothing and makes no shard a participant.
            let logged = open
                .changes
                .iter()
                .filter(|(key, after)| after.is_some() || self.state(client, key).is_some());
            let shards: BTreeSet<_> = logged.map(|(key, _)| shard_of(key, shard_count)).collect();
            let across = if shards.len() > 1 { shards } else { BTreeSet::new() };
            self.clients[client].history.push((open.changes.clone(), across));
        }
    }

    /// After a crash in a mode that acknowledges at once: each shard has a prefix of the client's history, and every batch
    /// across shards that was acknowledged.
    fn settle_prefix(&mut self, client: usize, open: Option<Open>, found: &BTreeMap<Key, State>) {
        let mut history = std::mem::take(&mut self.clients[client].history);
        let acknowledged = history.len();
        history.extend(open.map(|open| (open.changes, BTreeSet::new())));
        let now = self.clock.unix_ms;
        let live = |state: &State| state.clone().filter(|(_, expires)| *expires == 0 || *expires > now);
        let mut settled = Changes::new();
        for shard in 0..self.config.shard_count {
            let is_here = |key: &Key| shard_of(key, self.config.shard_count).0 == shard;
            let mut states: Changes =
                found.keys().filter(|key| is_here(key)).map(|key| (key.clone(), None)).collect();
            states.extend(
                self.clients[client]
                    .base
                    .iter()
                    .filter(|(key, _)| is_here(key))
                    .map(|(k, v)| (k.clone(), v.clone())),
            );
            // The longest prefix that fits; an earlier one that fits too is the same state.
            let durable = history.iter().rposition(|(_, across)| across.contains(&ShardId(shard)));
            let mut best = None;
            for length in 0..=history.len() {
                let fits = states
                    .iter()
                    .all(|(key, state)| found.get(key).is_none_or(|found| live(state) == *found));
                if fits && durable.is_none_or(|durable| length > durable) {
                    best = Some((length, states.clone()));
                }
                if let Some((changes, _)) = history.get(length) {
                    states.extend(
                        changes.iter().filter(|(key, _)| is_here(key)).map(|(k, v)| (k.clone(), v.clone())),
                    );
                }
            }
            match best {
                Some((length, states)) => {
                    self.probes.hit_if(length < acknowledged, "the end of a shard's history was lost");
                    settled.extend(states);
                }
                None => self.broken(
                    Promise::Acknowledged,
                    &format!(
                        "client {client}, shard {shard}: no prefix of {} changes gives what is there",
                        history.len()
                    ),
                ),
            }
        }
        self.clients[client].base = settled.clone();
        self.clients[client].states = settled;
    }

    /// Every key is as its owner was told; an open request happened as a whole or not at all.
    pub(super) fn settle(&mut self, client: usize, node: &mut SimNode) {
        let open = self.clients[client].open.take();
        let mut found = BTreeMap::new();
        for number in 0..KEYS_PER_CLIENT {
            let key = key_of(client, number);
            found.insert(key.clone(), self.read_state(node, &key));
        }
        if self.config.durability != Durability::Always {
            self.settle_prefix(client, open.map(|(_, open)| open), &found);
            return;
        }
        let fits = |world: &World, changes: &Changes| {
            found.iter().all(|(key, found)| match changes.get(key) {
                Some(state) => state == found,
                None => world.state(client, key) == *found,
            })
        };
        let nothing = Changes::new();
        match open {
            Some((_, open)) if !open.changes.is_empty() => {
                let (before, after) = (fits(self, &nothing), fits(self, &open.changes));
                if !before && !after {
                    self.broken(
                        Promise::WholeOrNot,
                        &format!("client {client}: {:?} is neither done nor undone", short(&open.request)),
                    );
                }
                if open.seen && !after {
                    self.broken(
                        Promise::Observed,
                        &format!("client {client}: a write that was seen is gone"),
                    );
                }
                self.probes.hit_if(after && !before, "an open write had happened");
                self.probes.hit_if(before && !after, "an open write had not happened");
                if after {
                    self.clients[client].states.extend(open.changes);
                }
            }
            _ => {
                if !fits(self, &nothing) {
                    let wrong: Vec<_> = found
                        .iter()
                        .filter(|(key, found)| self.state(client, key) != **found)
                        .map(|(key, found)| {
                            let short =
                                |state: &State| state.as_ref().map(|(v, expires)| (v.len(), *expires));
                            (key.clone(), short(found), short(&self.state(client, key)))
                        })
                        .collect();
                    self.broken(
                        Promise::Acknowledged,
                        &format!(
                            "client {client}: acknowledged state is lost (key, found, expected): {wrong:?}"
                        ),
                    );
                }
            }
        }
    }

    pub(super) fn settle_counter(&mut self, node: &mut SimNode) {
        let found = match self.read(node, &Key::from_static(COUNTER)) {
            None => 0,
            Some(text) => String::from_utf8_lossy(&text).parse().unwrap_or(-1),
        };
        let answered = if self.config.durability == Durability::Always {
            self.counter_answered.last().copied().unwrap_or(self.counter_settled)
        } else {
            0
        };
        let sent = i64::try_from(self.counter_sent).unwrap_or(i64::MAX);
        if found < answered || found > sent {
            self.broken(
                Promise::Acknowledged,
                &format!("the counter is {found}, {answered} was answered, {sent} were sent"),
            );
        }
        // Numbers up to here are given; open increments beyond it never happened.
        self.counter_settled = found;
        self.counter_answered.clear();
        self.counter_sent = found as u64;
    }
}
