//! What a connection remembers between commands: its protocol, its name, its open transaction, its watches.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::backend::Backend;
use super::command::{Call, CommandSpec, Fail, Local, Plan, command_reply, find, help_reply};
use super::resp::{Response, Version};
use crate::engine::op::{Key, WatchedKey};
use crate::limits::{KEY_SIZE_MAX, MULTI_COMMAND_COUNT_MAX};

/// Bytes of arguments that one MULTI may queue.
pub const MULTI_SIZE_MAX: usize = 64 << 20;

/// Keys that one connection may watch.
pub const WATCH_COUNT_MAX: usize = 4_096;

/// What an argument or a queued command costs beside its bytes.
pub const ARGUMENT_OVERHEAD_SIZE: usize = 64;

const _: () = assert!(MULTI_SIZE_MAX > KEY_SIZE_MAX);

/// The state; small, since every idle connection has one.
#[derive(Debug, Default)]
pub struct Session {
    /// The protocol version.
    pub version: Version,
    /// CLIENT SETNAME.
    pub name: Bytes,
    /// The open transaction.
    pub multi: Option<Box<Multi>>,
    /// Watches that hold.
    pub watched: Vec<WatchedKey>,
    /// Bytes that they hold.
    watched_size: usize,
}

/// A transaction between MULTI and EXEC. Lines are kept as they came and read again at EXEC, because relative expiries
/// count from then.
#[derive(Debug, Default)]
pub struct Multi {
    lines: Vec<(&'static CommandSpec, Vec<Bytes>)>,
    size: usize,
    /// A line was refused, so EXEC will be too.
    pub failed: bool,
}

/// What arguments cost while they wait.
pub fn size_of(args: &[Bytes]) -> usize {
    args.iter().map(|arg| arg.len() + ARGUMENT_OVERHEAD_SIZE).sum()
}

/// Whether a command acts at once even inside MULTI.
pub fn acts_inside_multi(spec: &CommandSpec) -> bool {
    matches!(spec.name, "multi" | "exec" | "discard" | "watch" | "quit" | "reset")
}

impl Multi {
    /// Queues a line, or says why the transaction cannot have it.
    pub fn queue(&mut self, spec: &'static CommandSpec, args: Vec<Bytes>, now_ms: u64) -> Result<(), Fail> {
        let size = size_of(&args);
        if self.lines.len() >= MULTI_COMMAND_COUNT_MAX || self.size + size > MULTI_SIZE_MAX {
            return Err(format!(
                "ERR a transaction may have {MULTI_COMMAND_COUNT_MAX} commands and {MULTI_SIZE_MAX} bytes"
            )
            .into());
        }
        match (spec.plan)(&Call { spec, args: &args, now_ms }) {
            Ok(Plan::Global(_)) => {
                return Err(format!("ERR Command '{}' is not allowed inside a transaction", spec.name).into());
            }
            // Unknown subcommands are found when queueing; other mistakes are replies among those of EXEC.
            Err(fail) if matches!(spec.name, "client" | "config" | "command") => return Err(fail),
            Ok(Plan::Data(_) | Plan::Local(_)) | Err(_) => {}
        }
        self.size += size;
        self.lines.push((spec, args));
        Ok(())
    }

    /// Bytes of the lines.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The lines' plans, as of now.
    pub fn plans(self, now_ms: u64) -> impl Iterator<Item = Result<Plan, Fail>> {
        self.lines.into_iter().map(move |(spec, args)| (spec.plan)(&Call { spec, args: &args, now_ms }))
    }
}

impl Session {
    /// Finds a command and checks how many arguments it has.
    pub fn look_up(args: &[Bytes]) -> Result<&'static CommandSpec, Fail> {
        match args.first().and_then(|name| find(name)) {
            Some(spec) if spec.accepts(args.len()) => Ok(spec),
            // `plan` has the words for what is wrong.
            _ => match super::command::plan(args, 0) {
                Err(fail) => Err(fail),
                Ok(_) => Err("ERR unknown command".into()),
            },
        }
    }

    /// Those of the keys that are not watched yet, each once: a watch keeps the oldest version.
    pub fn not_watched(&self, keys: Vec<Key>) -> Vec<Key> {
        let watched: BTreeSet<&Key> = self.watched.iter().map(|watched| &watched.key).collect();
        let mut keys: Vec<Key> = keys.into_iter().filter(|key| !watched.contains(key)).collect();
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// Bytes of memory that it holds beside itself.
    pub fn size(&self) -> usize {
        self.name.len() + self.watched_size + self.multi.as_ref().map_or(0, |multi| multi.size())
    }

    /// Remembers watches.
    pub fn add_watched(&mut self, watched: Vec<WatchedKey>) {
        self.watched_size += watched.iter().map(|one| one.key.len() + ARGUMENT_OVERHEAD_SIZE).sum::<usize>();
        self.watched.extend(watched);
    }

    /// Ends all watches; the shards have yet to be told.
    pub fn take_watched(&mut self) -> Vec<Key> {
        self.take_watches().into_iter().map(|watched| watched.key).collect()
    }

    /// The same, with the versions that were seen.
    pub fn take_watches(&mut self) -> Vec<WatchedKey> {
        self.watched_size = 0;
        std::mem::take(&mut self.watched)
    }

    /// HELLO's answer.
    pub fn hello(&mut self, id: u64, version: Option<Version>, name: Option<Bytes>) -> Response {
        self.version = version.unwrap_or(self.version);
        if let Some(name) = name {
            self.name = name;
        }
        let proto = if self.version == Version::Resp3 { 3 } else { 2 };
        let pair = |name: &str, value: Response| (Response::bulk(name), value);
        Response::Map(vec![
            pair("server", Response::bulk("basalt")),
            pair("version", Response::bulk(env!("CARGO_PKG_VERSION"))),
            pair("proto", Response::Int(proto)),
            pair("id", Response::Int(i64::try_from(id).unwrap_or(i64::MAX))),
            pair("mode", Response::bulk("standalone")),
            pair("role", Response::bulk("master")),
            pair("modules", Response::Array(vec![])),
        ])
    }

    /// CLIENT INFO's line.
    pub fn describe(&self, id: u64, peer: &str) -> String {
        let name = String::from_utf8_lossy(&self.name);
        let queued =
            self.multi.as_ref().map_or(-1, |multi| i64::try_from(multi.lines.len()).unwrap_or(i64::MAX));
        let resp = if self.version == Version::Resp3 { 3 } else { 2 };
        let watch = self.watched.len();
        format!("id={id} addr={peer} name={name} db=0 multi={queued} watch={watch} resp={resp}\n")
    }

    /// Answers what needs neither the connection nor its keys; `None` for what steers the connection.
    pub fn answer<B: Backend>(
        &mut self,
        local: Local,
        id: u64,
        peer: &str,
        backend: &mut B,
    ) -> Option<Response> {
        let number = |n: u64| Response::Int(i64::try_from(n).unwrap_or(i64::MAX));
        Some(match local {
            Local::Ping(None) => Response::Simple("PONG".into()),
            Local::Ping(Some(text)) | Local::Echo(text) => Response::Bulk(text),
            Local::Hello { version, name } => self.hello(id, version, name),
            Local::Select | Local::ClientIgnored => Response::Ok,
            Local::Time => {
                let ms = backend.clock().unix_ms;
                let text = |n: u64| Response::Bulk(n.to_string().into());
                Response::Array(vec![text(ms / 1000), text(ms % 1000 * 1000)])
            }
            Local::LastSave => number(backend.last_save_unix_s()),
            Local::Info(sections) => Response::Verbatim(backend.info(&sections)),
            Local::ConfigGet(patterns) => {
                let mut pairs: Vec<(String, String)> =
                    patterns.iter().flat_map(|p| backend.config_get(p)).collect();
                pairs.sort_unstable();
                pairs.dedup();
                Response::Map(pairs.iter().map(|(n, v)| (Response::bulk(n), Response::bulk(v))).collect())
            }
            Local::ConfigSet(pairs) => match backend.config_set(&pairs) {
                Ok(()) => Response::Ok,
                Err(text) => Response::error(text),
            },
            Local::ConfigResetStat => {
                backend.config_reset_stat();
                Response::Ok
            }
            Local::Command(query) => command_reply(&query),
            Local::Help(command, usages) => help_reply(command, usages),
            Local::ClientId => number(id),
            Local::ClientInfo => Response::Verbatim(self.describe(id, peer)),
            Local::ClientGetName if self.name.is_empty() => Response::Nil,
            Local::ClientGetName => Response::Bulk(self.name.clone()),
            Local::ClientSetName(name) => {
                self.name = name;
                Response::Ok
            }
            Local::Quit
            | Local::Reset
            | Local::Multi
            | Local::Exec
            | Local::Discard
            | Local::Watch(_)
            | Local::Unwatch => {
                return None;
            }
        })
    }
}
