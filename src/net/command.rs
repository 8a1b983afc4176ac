//! Command lines: what they are called, how many arguments they take, and what they come to.
//!
//! Invariants: a line is either understood completely or refused with Redis 7.0's words; nothing is done here, a
//! `Plan` says what is to be done.

mod expiry;
mod help;
mod introspection;
mod keyspace;
mod session;
mod string;
mod table;

use std::borrow::Cow;

use bytes::Bytes;

use super::request::Request;
use crate::engine::action::{Action, Command, Fold, parse_integer};
use crate::engine::op::{Key, OpError};
use crate::limits::KEY_SIZE_MAX;

pub use help::reply as help_reply;
pub use introspection::{CommandQuery, command_reply};
pub use table::COMMANDS;

/// The text of an error reply, its prefix included.
pub type Fail = Cow<'static, str>;

const SYNTAX: Fail = Cow::Borrowed("ERR syntax error");
const NOT_AN_INTEGER: Fail = Cow::Borrowed("ERR value is not an integer or out of range");

/// One line of the command table.
#[derive(Debug)]
pub struct CommandSpec {
    /// In lower case.
    pub name: &'static str,
    /// Arguments, the name included; negative for at least that many.
    pub arity: i32,
    /// Redis's flags.
    pub flags: &'static [&'static str],
    /// First key, last key (negative from the end), step; zeros for none.
    pub keys: (i32, i32, i32),
    /// What kind of command it is.
    pub group: &'static str,
    /// The Redis version that brought it.
    pub since: &'static str,
    /// What it does.
    pub summary: &'static str,
    /// Reads its arguments.
    pub plan: fn(&Call<'_>) -> Result<Plan, Fail>,
}

impl CommandSpec {
    /// Whether this many arguments, the name included, are right.
    pub fn accepts(&self, count: usize) -> bool {
        let arity = self.arity.unsigned_abs() as usize;
        if self.arity < 0 { count >= arity } else { count == arity }
    }
}

/// A command line that has the right number of arguments.
#[derive(Debug, Clone, Copy)]
pub struct Call<'a> {
    /// Its line of the table.
    pub spec: &'static CommandSpec,
    /// The name and the arguments.
    pub args: &'a [Bytes],
    /// Milliseconds since the Unix epoch: what relative expiries start from.
    pub now_ms: u64,
}

/// What a command line comes to.
#[derive(Debug, Clone, PartialEq)]
pub enum Plan {
    /// Work on keys.
    Data(Command),
    /// Work on everything.
    Global(Request),
    /// Work that the connection does itself.
    Local(Local),
}

/// Work that needs no keys.
#[derive(Debug, Clone, PartialEq)]
pub enum Local {
    /// PING with its argument.
    Ping(Option<Bytes>),
    /// ECHO.
    Echo(Bytes),
    /// HELLO.
    Hello {
        /// The version asked for.
        version: Option<super::resp::Version>,
        /// SETNAME.
        name: Option<Bytes>,
    },
    /// QUIT.
    Quit,
    /// RESET.
    Reset,
    /// SELECT of the only database.
    Select,
    /// TIME.
    Time,
    /// LASTSAVE.
    LastSave,
    /// INFO with its sections.
    Info(Vec<Bytes>),
    /// CONFIG GET with its patterns.
    ConfigGet(Vec<Bytes>),
    /// CONFIG SET with its pairs.
    ConfigSet(Vec<(Bytes, Bytes)>),
    /// CONFIG RESETSTAT.
    ConfigResetStat,
    /// COMMAND and its subcommands.
    Command(CommandQuery),
    /// CLIENT ID.
    ClientId,
    /// HELP of a command, about these subcommands.
    Help(&'static str, &'static [help::Usage]),
    /// CLIENT INFO.
    ClientInfo,
    /// CLIENT GETNAME.
    ClientGetName,
    /// CLIENT SETNAME.
    ClientSetName(Bytes),
    /// CLIENT SETINFO, and other switches that change nothing here.
    ClientIgnored,
    /// MULTI.
    Multi,
    /// EXEC.
    Exec,
    /// DISCARD.
    Discard,
    /// WATCH.
    Watch(Vec<Key>),
    /// UNWATCH.
    Unwatch,
}

/// Finds a command by its name in any case.
pub fn find(name: &[u8]) -> Option<&'static CommandSpec> {
    const NAME_SIZE_MAX: usize = 16;
    let mut lower = [0u8; NAME_SIZE_MAX];
    let lower = lower.get_mut(..name.len())?;
    lower.copy_from_slice(name);
    lower.make_ascii_lowercase();
    COMMANDS.binary_search_by(|spec| spec.name.as_bytes().cmp(lower)).ok().map(|at| &COMMANDS[at])
}

/// Reads a command line, which is not empty.
pub fn plan(args: &[Bytes], now_ms: u64) -> Result<Plan, Fail> {
    let Some(spec) = args.first().and_then(|name| find(name)) else { return Err(unknown(args)) };
    if !spec.accepts(args.len()) {
        return Err(wrong_arity(spec.name));
    }
    (spec.plan)(&Call { spec, args, now_ms })
}

fn wrong_arity(name: &str) -> Fail {
    format!("ERR wrong number of arguments for '{name}' command").into()
}

/// The words for an unknown command, with as much of its arguments as Redis shows.
fn unknown(args: &[Bytes]) -> Fail {
    const SHOWN_SIZE_MAX: usize = 128;
    // Redis prints with `%s`, which ends at a zero byte.
    let shown = |bytes: &[u8], size_max: usize| {
        let bytes = &bytes[..bytes.len().min(size_max)];
        let end = memchr::memchr(0, bytes).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    };
    let mut rest = String::new();
    for argument in args.iter().skip(1) {
        if rest.len() >= SHOWN_SIZE_MAX {
            break;
        }
        let argument = shown(argument, SHOWN_SIZE_MAX - rest.len());
        rest.push_str(&format!("'{argument}' "));
    }
    let name = args.first().map_or(String::new(), |name| shown(name, SHOWN_SIZE_MAX));
    format!("ERR unknown command '{name}', with args beginning with: {rest}").into()
}

/// The words for an unknown subcommand.
fn unknown_subcommand(call: &Call<'_>) -> Fail {
    let subcommand = String::from_utf8_lossy(&call.args[1]).into_owned();
    format!("ERR unknown subcommand '{subcommand}'. Try {} HELP.", call.spec.name.to_uppercase()).into()
}

impl Call<'_> {
    fn key(&self, at: usize) -> Result<Key, Fail> {
        let key = &self.args[at];
        if key.len() > KEY_SIZE_MAX {
            let error = OpError::KeyTooLarge { size: key.len() as u64, size_max: KEY_SIZE_MAX as u64 };
            return Err(error.to_string().into());
        }
        Ok(key.clone())
    }

    fn integer(&self, at: usize) -> Result<i64, Fail> {
        parse_integer(&self.args[at]).ok_or(NOT_AN_INTEGER)
    }

    fn is(&self, at: usize, word: &str) -> bool {
        self.args.get(at).is_some_and(|arg| arg.eq_ignore_ascii_case(word.as_bytes()))
    }

    /// A command with one action on its first argument.
    fn one(&self, action: Action) -> Result<Plan, Fail> {
        Ok(Plan::Data(Command { actions: vec![(self.key(1)?, action)], fold: Fold::One }))
    }

    /// A command with the same action on all its arguments.
    fn each(&self, action: &Action, fold: Fold) -> Result<Plan, Fail> {
        let actions = (1..self.args.len())
            .map(|at| Ok((self.key(at)?, action.clone())))
            .collect::<Result<Vec<_>, Fail>>()?;
        Ok(Plan::Data(Command { actions, fold }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str) -> Vec<Bytes> {
        text.split(' ').map(|word| Bytes::copy_from_slice(word.as_bytes())).collect()
    }

    #[test]
    fn help_names_subcommands_that_there_are() {
        let all = [("client", help::CLIENT), ("command", help::COMMAND), ("config", help::CONFIG)];
        for (command, usages) in all {
            let known = |subcommand: &str| match plan(&line(&format!("{command} {subcommand}")), 0) {
                Err(error) => !error.contains("unknown subcommand"),
                Ok(_) => true,
            };
            assert!(usages.is_sorted(), "{command}");
            assert!(known("help") && !known("helps"), "{command}");
            for (usage, _) in usages {
                let name = usage.split(' ').next().expect("a name");
                assert!(known(name), "{command} {name}");
            }
            let lines = match plan(&line(&format!("{command} help")), 0) {
                Ok(Plan::Local(Local::Help(name, told))) if told == usages => help::reply(name, told),
                other => panic!("{command} help: {other:?}"),
            };
            let crate::net::resp::Response::Array(lines) = lines else { panic!("{command}: {lines:?}") };
            assert_eq!(lines.len(), 1 + 2 * (usages.len() + 1), "{command}");
        }
    }

    #[test]
    fn the_table_is_sorted_and_complete() {
        assert!(COMMANDS.is_sorted_by(|a, b| a.name < b.name));
        for spec in COMMANDS {
            assert_eq!(find(spec.name.to_uppercase().as_bytes()).map(|s| s.name), Some(spec.name));
            assert_eq!(spec.name, spec.name.to_lowercase());
            assert!(spec.arity != 0 && !spec.summary.is_empty() && !spec.since.is_empty(), "{}", spec.name);
        }
        assert!(find(b"").is_none() && find(&[b'x'; 100]).is_none());
    }

    #[test]
    fn no_argument_makes_a_plan_panic() {
        for spec in COMMANDS {
            for word in
                ["", "x", "1", "-1", "GET", "EX", "9223372036854775807", "-9223372036854775808", "\u{e9}"]
            {
                for count in 0..7 {
                    let mut args = line(spec.name);
                    args.extend((0..count).map(|_| Bytes::from(word)));
                    let _ = plan(&args, u64::MAX / 2);
                }
            }
        }
    }

    #[test]
    fn keys_that_are_too_long_are_refused() {
        let long = Bytes::from(vec![b'k'; KEY_SIZE_MAX + 1]);
        for args in
            [vec![Bytes::from("GET"), long.clone()], vec![Bytes::from("MGET"), Bytes::from("a"), long]]
        {
            assert_eq!(
                plan(&args, 0).unwrap_err(),
                "ERR key of 65536 bytes is longer than the 65535 bytes that this node keeps in one key"
            );
        }
    }
}
