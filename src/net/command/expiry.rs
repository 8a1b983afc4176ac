//! Expiries: the units they come in, and the commands that set and read them.

use super::{Call, Fail, Plan};
use crate::engine::action::{Action, ExpireWhen, TtlReply};

/// What an expiry's number counts, and from when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Seconds,
    Milliseconds,
    UnixSeconds,
    UnixMilliseconds,
}

impl Unit {
    /// The unit of an option of SET and GETEX.
    pub fn of_option(option: &[u8]) -> Option<Self> {
        [
            ("EX", Self::Seconds),
            ("PX", Self::Milliseconds),
            ("EXAT", Self::UnixSeconds),
            ("PXAT", Self::UnixMilliseconds),
        ]
        .into_iter()
        .find(|(name, _)| option.eq_ignore_ascii_case(name.as_bytes()))
        .map(|(_, unit)| unit)
    }

    /// The instant in milliseconds since the epoch; `None` when 63 bits do not hold it.
    fn instant(self, number: i64, now_ms: u64) -> Option<i64> {
        let ms = match self {
            Self::Seconds | Self::UnixSeconds => number.checked_mul(1000)?,
            Self::Milliseconds | Self::UnixMilliseconds => number,
        };
        match self {
            Self::Seconds | Self::Milliseconds => ms.checked_add(i64::try_from(now_ms).ok()?),
            Self::UnixSeconds | Self::UnixMilliseconds => Some(ms),
        }
    }
}

fn invalid(call: &Call<'_>) -> Fail {
    format!("ERR invalid expire time in '{}' command", call.spec.name).into()
}

/// The instant that an argument names; its number must be above zero.
pub fn positive(call: &Call<'_>, at: usize, unit: Unit) -> Result<u64, Fail> {
    let number = call.integer(at)?;
    let instant = if number > 0 { unit.instant(number, call.now_ms) } else { None };
    instant.and_then(|ms| u64::try_from(ms).ok()).ok_or_else(|| invalid(call))
}

fn plan(call: &Call<'_>, unit: Unit) -> Result<Plan, Fail> {
    let when = condition(call)?;
    let instant = unit.instant(call.integer(2)?, call.now_ms).ok_or_else(|| invalid(call))?;
    // Whatever is before the epoch is as long past as the epoch.
    call.one(Action::Expire { at_ms: u64::try_from(instant).unwrap_or(0), when })
}

fn condition(call: &Call<'_>) -> Result<ExpireWhen, Fail> {
    let (mut nx, mut xx, mut gt, mut lt) = (false, false, false, false);
    for at in 3..call.args.len() {
        match () {
            () if call.is(at, "NX") => nx = true,
            () if call.is(at, "XX") => xx = true,
            () if call.is(at, "GT") => gt = true,
            () if call.is(at, "LT") => lt = true,
            () => {
                return Err(
                    format!("ERR Unsupported option {}", String::from_utf8_lossy(&call.args[at])).into()
                );
            }
        }
    }
    match (nx, xx, gt, lt) {
        (true, false, false, false) => Ok(ExpireWhen::None),
        (true, ..) => Err("ERR NX and XX, GT or LT options at the same time are not compatible".into()),
        (_, _, true, true) => Err("ERR GT and LT options at the same time are not compatible".into()),
        (_, true, true, _) => Ok(ExpireWhen::SomeLater),
        (_, true, _, true) => Ok(ExpireWhen::SomeEarlier),
        (_, true, ..) => Ok(ExpireWhen::Some),
        (_, _, true, _) => Ok(ExpireWhen::Later),
        (_, _, _, true) => Ok(ExpireWhen::Earlier),
        _ => Ok(ExpireWhen::Always),
    }
}

pub fn expire(call: &Call<'_>) -> Result<Plan, Fail> {
    plan(call, Unit::Seconds)
}

pub fn pexpire(call: &Call<'_>) -> Result<Plan, Fail> {
    plan(call, Unit::Milliseconds)
}

pub fn expireat(call: &Call<'_>) -> Result<Plan, Fail> {
    plan(call, Unit::UnixSeconds)
}

pub fn pexpireat(call: &Call<'_>) -> Result<Plan, Fail> {
    plan(call, Unit::UnixMilliseconds)
}

pub fn ttl(call: &Call<'_>) -> Result<Plan, Fail> {
    call.one(Action::Ttl(TtlReply::Seconds))
}

pub fn pttl(call: &Call<'_>) -> Result<Plan, Fail> {
    call.one(Action::Ttl(TtlReply::Milliseconds))
}

pub fn expiretime(call: &Call<'_>) -> Result<Plan, Fail> {
    call.one(Action::Ttl(TtlReply::UnixSeconds))
}

pub fn pexpiretime(call: &Call<'_>) -> Result<Plan, Fail> {
    call.one(Action::Ttl(TtlReply::UnixMilliseconds))
}

pub fn persist(call: &Call<'_>) -> Result<Plan, Fail> {
    call.one(Action::Persist)
}
