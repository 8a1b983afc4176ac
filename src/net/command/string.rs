//! Commands on string values.

use super::expiry::{self, Unit};
use super::{Call, Fail, NOT_AN_INTEGER, Plan, SYNTAX, wrong_arity};
use crate::engine::action::{Action, Command, Expiry, Fold, Presence, SetReply, parse_float};
use crate::engine::op::Value;

fn plain_set(value: Value) -> Action {
    Action::Set { value, expiry: Expiry::Clear, condition: None, reply: SetReply::Ok }
}

pub fn get(call: &Call<'_>) -> Result<Plan, Fail> {
    call.one(Action::Get)
}

pub fn set(call: &Call<'_>) -> Result<Plan, Fail> {
    let options = Options::read(call, 3, true)?;
    let expiry = options.expiry(call)?.unwrap_or(if options.keep { Expiry::Keep } else { Expiry::Clear });
    let reply = if options.get { SetReply::Old } else { SetReply::Ok };
    call.one(Action::Set { value: call.args[2].clone(), expiry, condition: options.condition, reply })
}

pub fn getex(call: &Call<'_>) -> Result<Plan, Fail> {
    let options = Options::read(call, 2, false)?;
    let expiry = options.expiry(call)?.unwrap_or(if options.persist { Expiry::Clear } else { Expiry::Keep });
    call.one(Action::GetExpire(expiry))
}

/// The options that SET and GETEX share.
#[derive(Default)]
struct Options {
    condition: Option<Presence>,
    get: bool,
    keep: bool,
    persist: bool,
    /// The unit, and where its number is. The same unit may be given again; the last number counts.
    expire: Option<(Unit, usize)>,
}

impl Options {
    fn read(call: &Call<'_>, from: usize, is_set: bool) -> Result<Self, Fail> {
        let mut options = Self::default();
        let mut at = from;
        while at < call.args.len() {
            let unit = Unit::of_option(&call.args[at]);
            let no_expiry = options.expire.is_none() && !options.persist && !options.keep;
            if is_set && call.is(at, "NX") && options.condition != Some(Presence::Present) {
                options.condition = Some(Presence::Absent);
            } else if is_set && call.is(at, "XX") && options.condition != Some(Presence::Absent) {
                options.condition = Some(Presence::Present);
            } else if is_set && call.is(at, "GET") {
                options.get = true;
            } else if is_set && call.is(at, "KEEPTTL") && (no_expiry || options.keep) {
                options.keep = true;
            } else if !is_set && call.is(at, "PERSIST") && (no_expiry || options.persist) {
                options.persist = true;
            } else if let Some(unit) = unit
                && (no_expiry || options.expire.is_some_and(|(earlier, _)| earlier == unit))
                && at + 1 < call.args.len()
            {
                at += 1;
                options.expire = Some((unit, at));
            } else {
                return Err(SYNTAX);
            }
            at += 1;
        }
        Ok(options)
    }

    fn expiry(&self, call: &Call<'_>) -> Result<Option<Expiry>, Fail> {
        self.expire.map(|(unit, at)| expiry::positive(call, at, unit).map(Expiry::At)).transpose()
    }
}

fn set_with(call: &Call<'_>, unit: Unit) -> Result<Plan, Fail> {
    let expiry = Expiry::At(expiry::positive(call, 2, unit)?);
    call.one(Action::Set { value: call.args[3].clone(), expiry, condition: None, reply: SetReply::Ok })
}

pub fn setex(call: &Call<'_>) -> Result<Plan, Fail> {
    set_with(call, Unit::Seconds)
}

pub fn psetex(call: &Call<'_>) -> Result<Plan, Fail> {
    set_with(call, Unit::Milliseconds)
}

pub fn setnx(call: &Call<'_>) -> Result<Plan, Fail> {
    call.one(Action::Set {
        value: call.args[2].clone(),
        expiry: Expiry::Clear,
        condition: Some(Presence::Absent),
        reply: SetReply::Flag,
    })
}

pub fn getset(call: &Call<'_>) -> Result<Plan, Fail> {
    let value = call.args[2].clone();
    call.one(Action::Set { value, expiry: Expiry::Clear, condition: None, reply: SetReply::Old })
}

pub fn getdel(call: &Call<'_>) -> Result<Plan, Fail> {
    call.one(Action::GetDelete)
}

pub fn mget(call: &Call<'_>) -> Result<Plan, Fail> {
    call.each(&Action::Get, Fold::Array)
}

fn set_many(call: &Call<'_>, fold: Fold) -> Result<Plan, Fail> {
    if call.args.len().is_multiple_of(2) {
        return Err(wrong_arity(call.spec.name));
    }
    let pair = |at: usize| Ok((call.key(at)?, plain_set(call.args[at + 1].clone())));
    let actions = (1..call.args.len()).step_by(2).map(pair).collect::<Result<Vec<_>, Fail>>()?;
    Ok(Plan::Data(Command { actions, fold }))
}

pub fn mset(call: &Call<'_>) -> Result<Plan, Fail> {
    set_many(call, Fold::Ok)
}

pub fn msetnx(call: &Call<'_>) -> Result<Plan, Fail> {
    set_many(call, Fold::AllAbsent)
}

pub fn strlen(call: &Call<'_>) -> Result<Plan, Fail> {
    call.one(Action::Strlen)
}

pub fn append(call: &Call<'_>) -> Result<Plan, Fail> {
    call.one(Action::Append(call.args[2].clone()))
}

pub fn incr(call: &Call<'_>) -> Result<Plan, Fail> {
    call.one(Action::Increment(1))
}

pub fn decr(call: &Call<'_>) -> Result<Plan, Fail> {
    call.one(Action::Increment(-1))
}

pub fn incrby(call: &Call<'_>) -> Result<Plan, Fail> {
    call.one(Action::Increment(call.integer(2)?))
}

pub fn decrby(call: &Call<'_>) -> Result<Plan, Fail> {
    let by = call.integer(2)?.checked_neg().ok_or("ERR decrement would overflow")?;
    call.one(Action::Increment(by))
}

pub fn incrbyfloat(call: &Call<'_>) -> Result<Plan, Fail> {
    let by = parse_float(&call.args[2]).ok_or("ERR value is not a valid float")?;
    call.one(Action::IncrementFloat(by))
}

pub fn getrange(call: &Call<'_>) -> Result<Plan, Fail> {
    call.one(Action::GetRange { start: call.integer(2)?, end: call.integer(3)? })
}

pub fn setrange(call: &Call<'_>) -> Result<Plan, Fail> {
    let offset = call.integer(2).map_err(|_| NOT_AN_INTEGER)?;
    let offset = u64::try_from(offset).map_err(|_| "ERR offset is out of range")?;
    call.one(Action::SetRange { offset, value: call.args[3].clone() })
}
