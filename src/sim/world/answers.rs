//! What the node answers against what it must.

use std::collections::{BTreeMap, BTreeSet};

use super::{Expect, KEYS_PER_CLIENT, State, World, brief, key_of, short};
use crate::engine::action::{Action, Expiry};
use crate::engine::batch::BatchReply;
use crate::engine::durability::Durability;
use crate::engine::op::{Key, OpError, Reply, Value};
use crate::sim::node::{Outcome, Request, SimNode};
use crate::sim::promise::Promise;

impl World {
    pub(super) fn on_done(&mut self, id: u64, outcome: Outcome, node: &SimNode) {
        // What is answered after the power went never reached anyone.
        if self.disk.is_off() {
            return;
        }
        let Some(at) =
            self.clients.iter().position(|client| client.open.as_ref().is_some_and(|(open, _)| *open == id))
        else {
            self.broken(Promise::Answered, "an answer that nobody waits for");
        };
        let Some((_, open)) = self.clients[at].open.take() else { return };
        self.answered += 1;
        let full = |error: &OpError| matches!(error, OpError::DeviceFull | OpError::ReserveExhausted);
        let short_of_memory = matches!(
            &outcome,
            Outcome::Reply(Reply::Error(OpError::OutOfMemory))
                | Outcome::Batch(BatchReply::Failed(OpError::OutOfMemory))
        );
        if short_of_memory {
            self.probes.hit("write refused for want of memory");
            // What is shared is made once and is not in anyone's model; nor is what expires as it is written.
            let expires =
                matches!(open.request, Request::Single(_, Action::Set { expiry: Expiry::At(_), .. }));
            let is_long = |value: &[u8]| value.len() as u64 > self.config.chunk_size;
            let grows = expires
                || open.changes.values().flatten().any(|(value, _)| is_long(value))
                || matches!(open.expect, Expect::Counter | Expect::Journal(_))
                || open.changes.iter().any(|(key, after)| {
                    let before = self.state(at, key);
                    after.as_ref().is_some_and(|(_, expires)| {
                        before.is_none_or(|(_, expired)| expired == 0 && *expires != 0)
                    })
                });
            if !self.memory_is_short || !grows {
                self.broken(
                    Promise::Refusals,
                    &format!("{:?} refused for want of memory", short(&open.request)),
                );
            }
            self.forget_entry(&open);
            return;
        }
        let refused = match &outcome {
            Outcome::Reply(Reply::Error(error)) | Outcome::Batch(BatchReply::Failed(error)) => full(error),
            _ => false,
        };
        if refused {
            self.probes.hit("write refused by a full device");
            let available = node.available_extents();
            if available > 0 && !open.changes.is_empty() && available > u32::from(node.shard_count()) {
                self.broken(
                    Promise::Refusals,
                    &format!("refused as full while {available} extents are available"),
                );
            }
            self.forget_entry(&open);
            return;
        }
        match (&open.expect, outcome) {
            (Expect::Reply(expected), Outcome::Reply(reply)) => {
                if *expected != reply {
                    self.broken(
                        Promise::Answers,
                        &format!("{:?} got {}", short(&open.request), brief(&reply)),
                    );
                }
            }
            (Expect::Replies(expected), Outcome::Batch(BatchReply::Replies(replies))) => {
                if *expected != replies {
                    self.broken(
                        Promise::Answers,
                        &format!("a batch got {:?}", replies.iter().map(brief).collect::<Vec<_>>()),
                    );
                }
            }
            (Expect::Look { owner, key }, Outcome::Reply(reply)) => self.look(*owner, key, &reply),
            (Expect::Counter, Outcome::Reply(Reply::Int(number))) => {
                if number <= self.counter_settled || !self.counter_answered.insert(number) {
                    self.broken(Promise::OneOrder, &format!("the counter gave {number} twice"));
                }
            }
            (Expect::Keys, Outcome::Keys(keys)) => self.on_keys(at, &keys),
            (Expect::OwnKeys, Outcome::Keys(keys)) => self.on_own_keys(at, &keys),
            (Expect::Range(query), Outcome::Range(found)) => self.on_range(at, query, &found),
            (Expect::Journal(entry), Outcome::Reply(Reply::Int(size))) => {
                self.on_journal(entry.clone(), size)
            }
            (Expect::Dump, Outcome::Dump(found)) => self.on_dump(at, &found),
            // A dump gives way to whoever needs the room.
            (Expect::Dump, Outcome::Done(Err(OpError::DumpLost { .. }))) => {
                self.probes.hit("dump given up");
            }
            (Expect::Done, Outcome::Done(Ok(()))) => {}
            // There may be no room for what would have to be moved.
            (Expect::Done, Outcome::Done(Err(OpError::DeviceFull)))
                if matches!(open.request, Request::Compact) =>
            {
                self.probes.hit("compaction without room");
            }
            (_, outcome) => {
                self.broken(Promise::Answers, &format!("{:?} got {outcome:?}", short(&open.request)))
            }
        }
        if self.config.durability != Durability::Always {
            self.remember(at, &open, node.shard_count());
        }
        self.clients[at].states.extend(open.changes);
    }

    /// Somebody else's key: its owner's last state, or the one that its open request makes.
    fn look(&mut self, owner: usize, key: &Key, reply: &Reply) {
        let matches = |state: &State| match (state, reply) {
            (None, Reply::Nil) => true,
            (Some((value, _)), Reply::Bulk(found)) => value == found,
            _ => false,
        };
        let before = self.state(owner, key);
        if let Some((_, open)) = &mut self.clients[owner].open
            && let Some(after) = open.changes.get(key)
            && matches(after)
            && !matches(&before)
        {
            open.seen = true;
            self.probes.hit("an open write was seen by another client");
        } else if !matches(&before) {
            // The owner may have moved on since the look began; only a value that was never written is wrong.
            self.probes.hit("a look at a key that moved on");
        }
    }

    fn on_keys(&mut self, client: usize, keys: &[Key]) {
        let crowd = self.count_crowd(keys);
        if crowd != self.crowd.len() {
            self.broken(Promise::Scans, &format!("a scan lists {crowd} of {} keys", self.crowd.len()));
        }
        let found: BTreeSet<&Key> = keys.iter().collect();
        for number in 0..KEYS_PER_CLIENT {
            let key = key_of(client, number);
            if self.state(client, &key).is_some() != found.contains(&key) {
                self.broken(
                    Promise::Scans,
                    &format!("a scan {} {key:?}", if found.contains(&key) { "invented" } else { "missed" }),
                );
            }
        }
    }

    fn on_dump(&mut self, client: usize, found: &[(Key, Value)]) {
        let mine = (0..KEYS_PER_CLIENT).map(|number| key_of(client, number));
        let expected: BTreeMap<Key, Vec<u8>> =
            mine.filter_map(|key| Some((key.clone(), self.state(client, &key)?.0))).collect();
        let prefix = format!("c{client}:");
        let is_mine = |key: &Key| key.starts_with(prefix.as_bytes());
        let got: Vec<&(Key, Value)> = found.iter().filter(|(key, _)| is_mine(key)).collect();
        // Nothing of this client's was under way, so that the moment makes no difference.
        let is_right = got.len() == expected.len()
            && got.iter().all(|(key, value)| expected.get(key).is_some_and(|wanted| *wanted == *value));
        let others = found.iter().filter(|(key, _)| key.starts_with(b"crowd:")).count();
        if !is_right || others != self.crowd.len() {
            let got: Vec<_> = got.iter().map(|(key, value)| (key, value.len())).collect();
            let wanted: Vec<_> = expected.iter().map(|(key, value)| (key, value.len())).collect();
            let what = format!("client {client}: it has {got:?} and {others} others, not {wanted:?}");
            self.broken(Promise::Dumps, &what);
        }
        self.probes.hit("dump beside writers");
    }
}
