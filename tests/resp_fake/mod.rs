//! A node of one map, for driving connections: real actions on real states, answered at once or when told.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{SystemTime, UNIX_EPOCH};

use basalt::engine::action::{Action, Expiry, SetReply, is_expired, keys_of, run_commands};
use basalt::engine::op::{Clock, Current, Direct, DirectReply, Key, KeyEffect, OpError, Reply, WatchedKey};
use basalt::net::{
    Backend, Completed, Connection, ConnectionId, Request, RequestLimits, Response, SlotId, Started,
};
use bytes::Bytes;

pub const SIZE_MAX: u64 = 1 << 20;

#[derive(Default)]
pub struct Fake {
    pub keys: BTreeMap<Key, Current>,
    pub versions: HashMap<Key, u64>,
    pub watch_count: i64,
    /// Answers come through `pending` instead of at once.
    pub deferred: bool,
    pub pending: VecDeque<(SlotId, Completed)>,
    /// How many of the next requests are refused.
    pub refusals: usize,
    pub started: Vec<Request>,
    /// Direct requests are answered at once.
    pub direct: bool,
    pub direct_count: usize,
}

impl Fake {
    fn now_ms(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
    }

    pub fn get(&self, key: &str) -> Option<Bytes> {
        self.keys.get(key.as_bytes()).and_then(|current| current.value.clone())
    }

    fn change(&mut self, key: Key, effect: KeyEffect) {
        *self.versions.entry(key.clone()).or_default() += 1;
        match effect {
            KeyEffect::Long { .. } => unreachable!("the fake makes no chunks"),
            KeyEffect::Delete => {
                self.keys.remove(&key);
            }
            KeyEffect::Put { value, expires_at_ms } => {
                self.keys.insert(
                    key,
                    Current { expires_at_ms, size: value.len() as u64, value: Some(value), long: None },
                );
            }
        }
    }

    fn reap(&mut self) {
        let now_ms = self.now_ms();
        self.keys.retain(|_, current| !is_expired(current.expires_at_ms, now_ms));
    }

    fn run(&mut self, request: Request) -> Completed {
        self.reap();
        let now_ms = self.now_ms();
        let bulks = |keys: Vec<Key>| Response::Array(keys.into_iter().map(Response::Bulk).collect());
        match request {
            Request::Single { key, action } => match action.apply(self.keys.get(&key), now_ms, SIZE_MAX) {
                Ok(outcome) => {
                    if let Some(effect) = outcome.effect {
                        self.change(key, effect);
                    }
                    outcome.reply.into()
                }
                Err(error) => Reply::Error(error).into(),
            },
            Request::Batch { commands, watched, exec } => {
                self.watch_count -= watched.len() as i64;
                if watched.iter().any(|w| self.versions.get(&w.key).copied().unwrap_or(0) != w.version) {
                    return Response::Nil.into();
                }
                let mut states = keys_of(&commands)
                    .into_iter()
                    .map(|k| (k.clone(), Ok(self.keys.get(&k).cloned())))
                    .collect();
                let (mut replies, effects) = run_commands(commands, &mut states, now_ms, SIZE_MAX);
                for (key, effect) in effects {
                    self.change(key, effect);
                }
                if exec { Reply::Array(replies).into() } else { replies.remove(0).into() }
            }
            Request::Watch { keys } => {
                self.watch_count += keys.len() as i64;
                let watched =
                    |key: Key| WatchedKey { version: self.versions.get(&key).copied().unwrap_or(0), key };
                Completed::Watching(keys.into_iter().map(watched).collect())
            }
            Request::Unwatch { keys } => {
                self.watch_count -= keys.len() as i64;
                Response::Ok.into()
            }
            Request::DbSize => Response::Int(self.keys.len() as i64).into(),
            Request::Keys { pattern } => {
                let matches = |key: &&Key| basalt::net::glob::matches(&pattern, key);
                bulks(self.keys.keys().filter(matches).cloned().collect()).into()
            }
            Request::Scan { pattern, type_filter, .. } => {
                let wanted = |key: &&Key| {
                    pattern.as_ref().is_none_or(|p| basalt::net::glob::matches(p, key))
                        && type_filter.as_ref().is_none_or(|t| t.eq_ignore_ascii_case(b"string"))
                };
                let keys = self.keys.keys().filter(wanted).cloned().collect();
                Response::Array(vec![Response::bulk("0"), bulks(keys)]).into()
            }
            Request::Range(_) => Reply::Error(OpError::NotOrdered).into(),
            Request::FlushAll => {
                let keys: Vec<Key> = self.keys.keys().cloned().collect();
                keys.into_iter().for_each(|key| self.change(key, KeyEffect::Delete));
                Response::Ok.into()
            }
            Request::Compact | Request::Dump(_) | Request::Save { .. } | Request::Shutdown { .. } => {
                Response::Ok.into()
            }
        }
    }

    /// Delivers the pending answer at a place, as if it came first.
    pub fn deliver(&mut self, connection: &mut Connection, at: usize) {
        if let Some((slot, completed)) = self.pending.remove(at) {
            connection.complete(slot, completed);
            connection.advance(self);
        }
    }
}

impl Backend for Fake {
    fn start(&mut self, _: ConnectionId, slot: SlotId, request: Request) -> Started {
        if self.refusals > 0 {
            self.refusals -= 1;
            return Started::Refused(request);
        }
        self.started.push(request.clone());
        let completed = self.run(request);
        if self.deferred {
            self.pending.push_back((slot, completed));
            return Started::Later;
        }
        Started::Now(completed)
    }

    fn run_at_once(
        &mut self,
        requests: &[Direct<'_>],
        tell: &mut dyn FnMut(DirectReply<'_>) -> bool,
    ) -> usize {
        let mut count = 0;
        let requests = if self.direct { requests } else { &[] };
        for request in requests {
            let key = Key::copy_from_slice(request.key());
            let action = match request {
                Direct::Get { .. } => Action::Get,
                Direct::Set { value, .. } => Action::Set {
                    value: Bytes::copy_from_slice(value),
                    expiry: Expiry::Clear,
                    condition: None,
                    reply: SetReply::Ok,
                },
            };
            count += 1;
            let more = match self.run(Request::Single { key, action }) {
                Completed::Reply(Response::Ok) => tell(DirectReply::Ok),
                Completed::Reply(Response::Nil) => tell(DirectReply::Nil),
                Completed::Reply(Response::Bulk(value)) => tell(DirectReply::Value(&value)),
                other => unreachable!("{other:?} for {request:?}"),
            };
            if !more {
                break;
            }
        }
        self.direct_count += count;
        count
    }

    fn info(&mut self, _: &[Bytes]) -> String {
        "# Server\r\n".into()
    }

    fn config_get(&mut self, pattern: &[u8]) -> Vec<(String, String)> {
        if basalt::net::glob::matches(pattern, b"maxmemory") {
            return vec![("maxmemory".into(), "0".into())];
        }
        vec![]
    }

    fn config_set(&mut self, pairs: &[(Bytes, Bytes)]) -> Result<(), String> {
        let name = String::from_utf8_lossy(&pairs[0].0);
        Err(format!("ERR Unknown option or number of arguments for CONFIG SET - '{name}'"))
    }

    fn config_reset_stat(&mut self) {}

    fn clock(&self) -> Clock {
        Clock { unix_ms: self.now_ms(), monotonic_us: self.now_ms() * 1000 }
    }

    fn value_size_max(&self) -> u64 {
        SIZE_MAX
    }

    fn last_save_unix_s(&self) -> u64 {
        1
    }
}

pub fn connection() -> Connection {
    let limits = RequestLimits { argument_size_max: SIZE_MAX as usize, command_size_max: 4 << 20 };
    Connection::new(ConnectionId { index: 0, generation: 7 }, None, limits)
}

pub fn encode(args: &[&[u8]]) -> Vec<u8> {
    let mut stream = format!("*{}\r\n", args.len()).into_bytes();
    for argument in args {
        stream.extend_from_slice(format!("${}\r\n", argument.len()).as_bytes());
        stream.extend_from_slice(argument);
        stream.extend_from_slice(b"\r\n");
    }
    stream
}

/// A line of words; `''` is an empty one, `_` stands for a space.
pub fn line(text: &str) -> Vec<u8> {
    let words: Vec<String> =
        text.split(' ').map(|w| if w == "''" { String::new() } else { w.replace('_', " ") }).collect();
    encode(&words.iter().map(String::as_bytes).collect::<Vec<_>>())
}

/// Everything that the connection has to say now.
pub fn take_output(connection: &mut Connection, fake: &mut Fake) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        connection.advance(fake);
        if connection.output().is_empty() {
            return all;
        }
        all.extend_from_slice(connection.output());
        let size = connection.output().len();
        connection.sent(size);
    }
}

pub fn send(connection: &mut Connection, fake: &mut Fake, bytes: &[u8]) -> String {
    connection.received(bytes);
    String::from_utf8_lossy(&take_output(connection, fake)).into_owned()
}
