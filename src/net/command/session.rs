//! Commands on the connection and the server.

use std::borrow::Cow;

use bytes::Bytes;

use super::{Call, Fail, Local, Plan, SYNTAX, help, unknown_subcommand, wrong_arity};
use crate::net::resp::Version;

fn local(local: Local) -> Result<Plan, Fail> {
    Ok(Plan::Local(local))
}

pub fn ping(call: &Call<'_>) -> Result<Plan, Fail> {
    if call.args.len() > 2 {
        return Err(wrong_arity(call.spec.name));
    }
    local(Local::Ping(call.args.get(1).cloned()))
}

pub fn echo(call: &Call<'_>) -> Result<Plan, Fail> {
    local(Local::Echo(call.args[1].clone()))
}

pub fn auth(call: &Call<'_>) -> Result<Plan, Fail> {
    Err(match call.args.len() {
        2 => "ERR AUTH <password> called without any password configured for the default user. Are you sure your configuration is correct?".into(),
        3 if is_default_user(&call.args[1]) => return local(Local::ClientIgnored),
        3 => WRONG_USER,
        _ => SYNTAX,
    })
}

const WRONG_USER: Fail = Cow::Borrowed("WRONGPASS invalid username-password pair or user is disabled.");

/// The one user there is, who needs no password: as in Redis, any will do.
fn is_default_user(name: &[u8]) -> bool {
    name == b"default"
}

pub fn hello(call: &Call<'_>) -> Result<Plan, Fail> {
    let mut version = None;
    if call.args.len() > 1 {
        let number = call.integer(1).map_err(|_| "ERR Protocol version is not an integer or out of range")?;
        version = Some(match number {
            2 => Version::Resp2,
            3 => Version::Resp3,
            _ => return Err("NOPROTO unsupported protocol version".into()),
        });
    }
    let mut name = None;
    let mut at = 2;
    while at < call.args.len() {
        let more = call.args.len() - 1 - at;
        if call.is(at, "AUTH") && more >= 2 {
            if !is_default_user(&call.args[at + 1]) {
                return Err(WRONG_USER);
            }
            at += 3;
        } else if call.is(at, "SETNAME") && more >= 1 {
            name = Some(client_name(&call.args[at + 1])?);
            at += 2;
        } else {
            let option = String::from_utf8_lossy(&call.args[at]);
            return Err(format!("ERR Syntax error in HELLO option '{option}'").into());
        }
    }
    local(Local::Hello { version, name })
}

fn client_name(name: &Bytes) -> Result<Bytes, Fail> {
    if !name.iter().all(|b| (b'!'..=b'~').contains(b)) {
        return Err("ERR Client names cannot contain spaces, newlines or special characters.".into());
    }
    Ok(name.clone())
}

pub fn quit(_: &Call<'_>) -> Result<Plan, Fail> {
    local(Local::Quit)
}

pub fn reset(_: &Call<'_>) -> Result<Plan, Fail> {
    local(Local::Reset)
}

pub fn select(call: &Call<'_>) -> Result<Plan, Fail> {
    match call.integer(1)? {
        0 => local(Local::Select),
        _ => Err("ERR DB index is out of range".into()),
    }
}

pub fn time(_: &Call<'_>) -> Result<Plan, Fail> {
    local(Local::Time)
}

pub fn lastsave(_: &Call<'_>) -> Result<Plan, Fail> {
    local(Local::LastSave)
}

pub fn info(call: &Call<'_>) -> Result<Plan, Fail> {
    local(Local::Info(call.args[1..].to_vec()))
}

/// Checks how many arguments a subcommand has, its own name and its command's included; negative for at least.
fn subcommand_arity(call: &Call<'_>, arity: i32) -> Result<(), Fail> {
    let count = call.args.len();
    let expected = arity.unsigned_abs() as usize;
    if if arity < 0 { count >= expected } else { count == expected } {
        return Ok(());
    }
    let subcommand = String::from_utf8_lossy(&call.args[1]).to_lowercase();
    Err(wrong_arity(&format!("{}|{subcommand}", call.spec.name)))
}

pub fn config(call: &Call<'_>) -> Result<Plan, Fail> {
    let rest = &call.args[2..];
    if call.is(1, "GET") {
        subcommand_arity(call, -3)?;
        local(Local::ConfigGet(rest.to_vec()))
    } else if call.is(1, "SET") {
        subcommand_arity(call, -4)?;
        if !rest.len().is_multiple_of(2) {
            return Err(SYNTAX);
        }
        local(Local::ConfigSet(rest.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect()))
    } else if call.is(1, "RESETSTAT") {
        subcommand_arity(call, 2)?;
        local(Local::ConfigResetStat)
    } else if call.is(1, "HELP") {
        subcommand_arity(call, 2)?;
        local(Local::Help("CONFIG", help::CONFIG))
    } else {
        Err(unknown_subcommand(call))
    }
}

pub fn client(call: &Call<'_>) -> Result<Plan, Fail> {
    let switch = || {
        subcommand_arity(call, 3)?;
        if call.is(2, "ON") || call.is(2, "OFF") { local(Local::ClientIgnored) } else { Err(SYNTAX) }
    };
    match () {
        () if call.is(1, "ID") => subcommand_arity(call, 2).and_then(|()| local(Local::ClientId)),
        () if call.is(1, "INFO") => subcommand_arity(call, 2).and_then(|()| local(Local::ClientInfo)),
        () if call.is(1, "GETNAME") => subcommand_arity(call, 2).and_then(|()| local(Local::ClientGetName)),
        () if call.is(1, "SETNAME") => {
            subcommand_arity(call, 3)?;
            local(Local::ClientSetName(client_name(&call.args[2])?))
        }
        () if call.is(1, "SETINFO") => {
            subcommand_arity(call, 4)?;
            if !call.is(2, "LIB-NAME") && !call.is(2, "LIB-VER") {
                let option = String::from_utf8_lossy(&call.args[2]);
                return Err(format!("ERR Unrecognized option '{option}'").into());
            }
            local(Local::ClientIgnored)
        }
        () if call.is(1, "NO-EVICT") || call.is(1, "NO-TOUCH") => switch(),
        () if call.is(1, "HELP") => {
            subcommand_arity(call, 2).and_then(|()| local(Local::Help("CLIENT", help::CLIENT)))
        }
        () => Err(unknown_subcommand(call)),
    }
}

pub fn multi(_: &Call<'_>) -> Result<Plan, Fail> {
    local(Local::Multi)
}

pub fn exec(_: &Call<'_>) -> Result<Plan, Fail> {
    local(Local::Exec)
}

pub fn discard(_: &Call<'_>) -> Result<Plan, Fail> {
    local(Local::Discard)
}

pub fn watch(call: &Call<'_>) -> Result<Plan, Fail> {
    local(Local::Watch((1..call.args.len()).map(|at| call.key(at)).collect::<Result<Vec<_>, Fail>>()?))
}

pub fn unwatch(_: &Call<'_>) -> Result<Plan, Fail> {
    local(Local::Unwatch)
}
