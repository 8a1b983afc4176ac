//! COMMAND: what clients ask about commands, answered from the table.

use bytes::Bytes;

use super::{COMMANDS, Call, CommandSpec, Fail, Local, Plan, find, help, unknown_subcommand, wrong_arity};
use crate::net::glob;
use crate::net::resp::Response;

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CommandQuery {
    /// Everything.
    All,
    /// How many there are.
    Count,
    /// Names that match.
    List(Option<Bytes>),
    /// The table's lines for these names, or all.
    Info(Vec<Bytes>),
    /// The documentation of these names, or all.
    Docs(Vec<Bytes>),
    /// The keys of a command line.
    Keys(Vec<Bytes>),
}

pub fn command(call: &Call<'_>) -> Result<Plan, Fail> {
    let rest = || call.args[2..].to_vec();
    let query = match () {
        () if call.args.len() == 1 => CommandQuery::All,
        () if call.is(1, "COUNT") && call.args.len() == 2 => CommandQuery::Count,
        () if call.is(1, "COUNT") => return Err(wrong_arity("command|count")),
        () if call.is(1, "INFO") => CommandQuery::Info(rest()),
        () if call.is(1, "DOCS") => CommandQuery::Docs(rest()),
        () if call.is(1, "LIST") && call.args.len() == 2 => CommandQuery::List(None),
        () if call.is(1, "LIST")
            && call.args.len() == 5
            && call.is(2, "FILTERBY")
            && call.is(3, "PATTERN") =>
        {
            CommandQuery::List(Some(call.args[4].clone()))
        }
        () if call.is(1, "LIST") => return Err(super::SYNTAX),
        () if call.is(1, "GETKEYS") && call.args.len() >= 4 => {
            let line = rest();
            let Some(spec) = find(&line[0]) else { return Err("ERR Invalid command specified".into()) };
            if spec.keys.0 == 0 {
                return Err("ERR The command has no key arguments".into());
            }
            if !spec.accepts(line.len()) {
                return Err("ERR Invalid number of arguments specified for command".into());
            }
            CommandQuery::Keys(keys_of(spec, &line))
        }
        () if call.is(1, "GETKEYS") => return Err(wrong_arity("command|getkeys")),
        () if call.is(1, "HELP") && call.args.len() == 2 => {
            return Ok(Plan::Local(Local::Help("COMMAND", help::COMMAND)));
        }
        () if call.is(1, "HELP") => return Err(wrong_arity("command|help")),
        () => return Err(unknown_subcommand(call)),
    };
    Ok(Plan::Local(Local::Command(query)))
}

fn keys_of(spec: &CommandSpec, line: &[Bytes]) -> Vec<Bytes> {
    let (first, last, step) = spec.keys;
    let first = usize::try_from(first).unwrap_or(0);
    let last =
        usize::try_from(last).unwrap_or_else(|_| line.len().saturating_sub(last.unsigned_abs() as usize));
    let step = usize::try_from(step).unwrap_or(1).max(1);
    (first..=last).step_by(step).filter_map(|at| line.get(at).cloned()).collect()
}

/// The answer.
pub fn command_reply(query: &CommandQuery) -> Response {
    let chosen = |names: &[Bytes]| -> Vec<Option<&'static CommandSpec>> {
        if names.is_empty() {
            COMMANDS.iter().map(Some).collect()
        } else {
            names.iter().map(|n| find(n)).collect()
        }
    };
    match query {
        CommandQuery::All => Response::Array(COMMANDS.iter().map(info).collect()),
        CommandQuery::Count => Response::Int(i64::try_from(COMMANDS.len()).unwrap_or(i64::MAX)),
        CommandQuery::List(pattern) => {
            let matches = |name: &str| pattern.as_ref().is_none_or(|p| glob::matches(p, name.as_bytes()));
            let names = COMMANDS.iter().filter(|spec| matches(spec.name));
            Response::Array(names.map(|spec| Response::bulk(spec.name)).collect())
        }
        CommandQuery::Info(names) => {
            Response::Array(chosen(names).into_iter().map(|spec| spec.map_or(Response::Nil, info)).collect())
        }
        CommandQuery::Docs(names) => Response::Map(
            chosen(names).into_iter().flatten().map(|spec| (Response::bulk(spec.name), docs(spec))).collect(),
        ),
        CommandQuery::Keys(keys) => Response::Array(keys.iter().cloned().map(Response::Bulk).collect()),
    }
}

fn info(spec: &CommandSpec) -> Response {
    let status = |text: &&'static str| Response::Simple((*text).into());
    let number = |number: i32| Response::Int(i64::from(number));
    Response::Array(vec![
        Response::bulk(spec.name),
        number(spec.arity),
        Response::Set(spec.flags.iter().map(status).collect()),
        number(spec.keys.0),
        number(spec.keys.1),
        number(spec.keys.2),
        // Access categories, hints, key specifications and subcommands: nothing here uses them.
        Response::Set(vec![]),
        Response::Array(vec![]),
        Response::Array(vec![]),
        Response::Array(vec![]),
    ])
}

fn docs(spec: &CommandSpec) -> Response {
    Response::Map(
        [("summary", spec.summary), ("since", spec.since), ("group", spec.group)]
            .into_iter()
            .map(|(name, text)| (Response::bulk(name), Response::bulk(text)))
            .collect(),
    )
}
