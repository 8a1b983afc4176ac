//! Commands on keys whatever they hold, and on all keys together.

use std::ops::Bound;

use bytes::Bytes;

use super::{Call, Fail, NOT_AN_INTEGER, Plan, SYNTAX};
use crate::engine::action::{Action, Fold};
use crate::engine::op::{KeyRange, Order, RangeQuery};
use crate::limits::{PATTERN_SIZE_MAX, RANGE_COUNT_DEFAULT, RANGE_COUNT_MAX};
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

/// A bound as those of ZRANGEBYLEX: whether it is the lower one of the range makes `-` and `+` mean something or nothing.
fn bound(argument: &Bytes, is_lower: bool) -> Result<Option<Bound<Bytes>>, Fail> {
    match &argument[..] {
        b"-" => Ok(is_lower.then_some(Bound::Unbounded)),
        b"+" => Ok((!is_lower).then_some(Bound::Unbounded)),
        [b'[', ..] => Ok(Some(Bound::Included(argument.slice(1..)))),
        [b'(', ..] => Ok(Some(Bound::Excluded(argument.slice(1..)))),
        _ => {
            Err("ERR min or max not valid string range item: it begins with '[' or '(', or is '-' or '+'"
                .into())
        }
    }
}

pub fn range(call: &Call<'_>) -> Result<Plan, Fail> {
    let (mut limit, mut order, mut with_values) = (RANGE_COUNT_DEFAULT, Order::Ascending, true);
    let mut at = 3;
    while at < call.args.len() {
        if call.is(at, "REV") {
            order = Order::Descending;
        } else if call.is(at, "KEYS") {
            with_values = false;
        } else if call.is(at, "LIMIT") && at + 1 < call.args.len() {
            at += 1;
            let number =
                usize::try_from(call.integer(at)?).ok().filter(|one| (1..=RANGE_COUNT_MAX).contains(one));
            limit = number.ok_or_else(|| format!("ERR LIMIT is out of range: 1 to {RANGE_COUNT_MAX}"))?;
        } else {
            return Err(SYNTAX);
        }
        at += 1;
    }
    let (lower, upper) = if order == Order::Ascending { (1, 2) } else { (2, 1) };
    let bounds = bound(&call.args[lower], true)?.zip(bound(&call.args[upper], false)?);
    // Nothing is above the greatest key or below the least one.
    let (from, to) = bounds.unwrap_or((Bound::Included(Bytes::new()), Bound::Excluded(Bytes::new())));
    let range = KeyRange { from, to };
    Ok(Plan::Global(Request::Range(RangeQuery { range, order, limit, with_values })))
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
