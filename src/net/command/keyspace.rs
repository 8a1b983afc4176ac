//! Commands on keys whatever they hold, and on all keys together.

use bytes::Bytes;

use super::{Call, Fail, NOT_AN_INTEGER, Plan, SYNTAX};
use crate::engine::action::{Action, Fold};
use crate::limits::PATTERN_SIZE_MAX;
use crate::net::request::{DumpStep, Request};

/// Keys that one SCAN looks at when it does not say.
const SCAN_COUNT_DEFAULT: usize = 10;

/// Keys that one SCAN may ask for: a step runs between others' operations.
const SCAN_COUNT_MAX: usize = 10_000;

pub fn del(call: &Call<'_>) -> Result<Plan, Fail> {
    call.each(&Action::Delete, Fold::Sum)
}

pub fn exists(call: &Call<'_>) -> Result<Plan, Fail> {
    call.each(&Action::Exists, Fold::Sum)
}

pub fn type_of(call: &Call<'_>) -> Result<Plan, Fail> {
    call.one(Action::Type)
}

pub fn dbsize(_: &Call<'_>) -> Result<Plan, Fail> {
    Ok(Plan::Global(Request::DbSize))
}

fn pattern(pattern: &Bytes) -> Result<Bytes, Fail> {
    match pattern.len() {
        ..=PATTERN_SIZE_MAX => Ok(pattern.clone()),
        size => Err(format!("ERR pattern of {size} bytes is longer than {PATTERN_SIZE_MAX} bytes").into()),
    }
}

pub fn keys(call: &Call<'_>) -> Result<Plan, Fail> {
    Ok(Plan::Global(Request::Keys { pattern: pattern(&call.args[1])? }))
}

pub fn scan(call: &Call<'_>) -> Result<Plan, Fail> {
    let digits = std::str::from_utf8(&call.args[1]).ok().filter(|text| !text.starts_with('+'));
    let cursor: u64 = digits.and_then(|text| text.parse().ok()).ok_or("ERR invalid cursor")?;
    let (mut count, mut filter, mut type_filter) = (SCAN_COUNT_DEFAULT, None, None);
    for at in (2..call.args.len()).step_by(2) {
        let Some(argument) = call.args.get(at + 1) else { return Err(SYNTAX) };
        if call.is(at, "COUNT") {
            let number = call.integer(at + 1)?;
            if number < 1 {
                return Err(SYNTAX);
            }
            count = usize::try_from(number).map_err(|_| NOT_AN_INTEGER)?.min(SCAN_COUNT_MAX);
        } else if call.is(at, "MATCH") {
            filter = Some(pattern(argument)?);
        } else if call.is(at, "TYPE") {
            type_filter = Some(argument.clone());
        } else {
            return Err(SYNTAX);
        }
    }
    Ok(Plan::Global(Request::Scan { cursor, count, pattern: filter, type_filter }))
}

pub fn flush(call: &Call<'_>) -> Result<Plan, Fail> {
    match call.args.len() {
        1 => {}
        2 if call.is(1, "ASYNC") || call.is(1, "SYNC") => {}
        _ => return Err(SYNTAX),
    }
    Ok(Plan::Global(Request::FlushAll))
}

pub fn dump(call: &Call<'_>) -> Result<Plan, Fail> {
    let number = || u64::try_from(call.integer(2)?).map_err(|_| NOT_AN_INTEGER);
    let step = match call.args.len() {
        2 if call.is(1, "BEGIN") => DumpStep::Begin,
        3 if call.is(1, "NEXT") => DumpStep::Next(number()?),
        3 if call.is(1, "END") => DumpStep::End(number()?),
        _ => return Err(SYNTAX),
    };
    Ok(Plan::Global(Request::Dump(step)))
}

pub fn compact(_: &Call<'_>) -> Result<Plan, Fail> {
    Ok(Plan::Global(Request::Compact))
}

pub fn save(_: &Call<'_>) -> Result<Plan, Fail> {
    Ok(Plan::Global(Request::Save { background: false }))
}

pub fn bgsave(call: &Call<'_>) -> Result<Plan, Fail> {
    match call.args.len() {
        1 => {}
        2 if call.is(1, "SCHEDULE") => {}
        _ => return Err(SYNTAX),
    }
    Ok(Plan::Global(Request::Save { background: true }))
}

pub fn shutdown(call: &Call<'_>) -> Result<Plan, Fail> {
    let (mut save, mut no_save) = (false, false);
    for at in 1..call.args.len() {
        match () {
            () if call.is(at, "SAVE") => save = true,
            () if call.is(at, "NOSAVE") => no_save = true,
            () if call.is(at, "NOW") || call.is(at, "FORCE") => {}
            () => return Err(SYNTAX),
        }
    }
    if save && no_save {
        return Err(SYNTAX);
    }
    Ok(Plan::Global(Request::Shutdown { save: !no_save }))
}
