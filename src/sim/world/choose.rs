//! What clients ask for: parts of values, and batches.

use std::collections::BTreeSet;

use super::{Changes, Expect, GROWN_SIZE_MAX, KEYS_PER_CLIENT, Open, State, World, key_of, set};
use crate::engine::action::{Action, Command, ExpireWhen, Expiry, Fold};
use crate::engine::op::{Key, Reply};
use crate::format::slot::shard_of;
use crate::sim::node::{Request, SimNode};

impl World {
    /// Reads or writes a part of a value, or changes when it expires.
    pub(super) fn choose_range(&mut self, client: usize, key: Key, before: State, node: &SimNode) -> Open {
        let (value, expires) = before.clone().unwrap_or_default();
        let size = value.len();
        let chunk_size = self.config.chunk_size as usize;
        let is_long = size > chunk_size;
        let (action, reply, after) = match self.random.below(8) {
            0 | 1 => {
                let (start, end) = (self.random.index(size + 10), self.random.index(size + 10));
                let part = value.get(start..size.min(end + 1)).unwrap_or_default().to_vec();
                self.probes.hit_if(is_long && part.len() > chunk_size, "range over chunks read");
                let action = Action::GetRange { start: start as i64, end: end as i64 };
                (action, Reply::Bulk(part.into()), None)
            }
            2 => {
                let had = i64::from(before.is_some() && expires != 0);
                (Action::Persist, Reply::Int(had), (had == 1).then_some(Some((value, 0))))
            }
            3 => {
                let at = self.clock.unix_ms + 20_000_000;
                self.probes.hit_if(is_long, "long value given another expiry");
                let action = Action::GetExpire(Expiry::At(at));
                match before {
                    None => (action, Reply::Nil, None),
                    Some((value, _)) => (action, Reply::Bulk(value.clone().into()), Some(Some((value, at)))),
                }
            }
            _ => {
                let patch = self.value();
                let far = self.random.chance(1, 3);
                let offset = self.random.index(size + 10) + if far { self.random.index(400_000) } else { 0 };
                let end = offset + patch.len();
                if patch.is_empty() || end as u64 > node.value_size_max().min(GROWN_SIZE_MAX) {
                    let action = Action::Strlen;
                    let reply = Reply::Int(size as i64);
                    (action, reply, None)
                } else {
                    let is_hole = offset > size + chunk_size;
                    self.probes.hit_if(is_hole, "hole in a long value");
                    self.probes.hit_if(is_long && offset < size, "long value written over in part");
                    let mut value = value;
                    value.resize(end.max(size), 0);
                    value[offset..end].copy_from_slice(&patch);
                    let reply = Reply::Int(value.len() as i64);
                    let action = Action::SetRange { offset: offset as u64, value: patch.into() };
                    (action, reply, Some(Some((value, expires))))
                }
            }
        };
        let changes = after.map(|state| (key.clone(), state)).into_iter().collect();
        self.probes.hit_if(client > 0 && is_long, "action on a long value");
        Open { request: Request::Single(key, action), expect: Expect::Reply(reply), changes, seen: false }
    }

    pub(super) fn choose_batch(&mut self, client: usize, node: &SimNode) -> Open {
        let mut changes = Changes::new();
        let mut commands = Vec::new();
        let mut replies = Vec::new();
        let mut shards = BTreeSet::new();
        for _ in 0..1 + self.random.index(5) {
            let key = key_of(client, self.random.index(KEYS_PER_CLIENT));
            shards.insert(shard_of(&key, node.shard_count()));
            let now = changes.get(&key).cloned().unwrap_or_else(|| self.state(client, &key));
            let (action, reply) = match self.random.below(4) {
                0 => {
                    changes.insert(key.clone(), None);
                    (Action::Delete, Reply::Int(i64::from(now.is_some())))
                }
                1 => (Action::Get, now.map_or(Reply::Nil, |(value, _)| Reply::Bulk(value.into()))),
                2 if self.random.chance(1, 4) && now.is_some() => {
                    let (value, _) = now.unwrap_or_default();
                    let at = self.clock.unix_ms + 20_000_000;
                    changes.insert(key.clone(), Some((value, at)));
                    (Action::Expire { at_ms: at, when: ExpireWhen::Always }, Reply::Int(1))
                }
                _ => {
                    let value = self.value();
                    changes.insert(key.clone(), Some((value.clone(), 0)));
                    (set(&value, 0), Reply::Ok)
                }
            };
            commands.push(Command { actions: vec![(key, action)], fold: Fold::One });
            replies.push(reply);
        }
        self.probes.hit_if(shards.len() > 1 && changes.len() > 1, "batch across shards");
        self.probes.hit_if(shards.len() == 1, "batch on one shard");
        Open {
            request: Request::Batch(commands, Vec::new()),
            expect: Expect::Replies(replies),
            changes,
            seen: false,
        }
    }
}
