//! What a command does to one key: pure functions from the key's state to its next state and the reply.
//!
//! The same functions serve single commands and the commands of a batch. The semantics, down to the error texts, are
//! those of Redis 7.0; where they cannot be, the function says so.

mod batch;
mod long;
mod number;
#[cfg(test)]
mod tests;

use std::ops::Range;

use bytes::{Bytes, BytesMut};

pub use batch::{KeyState, keys_of, need_of, run_commands};
pub(super) use long::{LongNeed, long_need, long_parts};
pub use number::{format_float, parse_float, parse_integer};

use super::op::{Current, Key, KeyEffect, OpError, Reply, Value};
use crate::planted::{Bug, is_planted};

/// How much of the current state an action must see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// None of it: the outcome is the same whatever is there.
    Nothing,
    /// Existence and expiry.
    Meta,
    /// Those and the length, which only the record says, unless the value is long.
    Length,
    /// All of it.
    Value,
}

/// What happens to the expiry of a key that is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    /// It has none afterwards.
    Clear,
    /// As it was.
    Keep,
    /// Milliseconds since the Unix epoch.
    At(u64),
}

/// Whether a key must, or must not, be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// NX.
    Absent,
    /// XX.
    Present,
}

/// How SET and its kin answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetReply {
    /// OK, or null when the condition did not hold.
    Ok,
    /// 1 or 0 (SETNX).
    Flag,
    /// The old value (SET GET, GETSET).
    Old,
}

/// When EXPIRE applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpireWhen {
    /// Always.
    Always,
    /// NX: only when it has none.
    None,
    /// XX: only when it has one.
    Some,
    /// GT: only when later than the present one (none counts as never).
    Later,
    /// LT: only when earlier than the present one.
    Earlier,
    /// XX and GT.
    SomeLater,
    /// XX and LT.
    SomeEarlier,
}

/// The unit and origin of a time-to-live reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TtlReply {
    /// TTL.
    Seconds,
    /// PTTL.
    Milliseconds,
    /// EXPIRETIME.
    UnixSeconds,
    /// PEXPIRETIME.
    UnixMilliseconds,
}

/// One command's work on one key.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// GET.
    Get,
    /// GET of a value of at most so many bytes; the length of a longer one.
    GetWithin(u64),
    /// EXISTS.
    Exists,
    /// TYPE.
    Type,
    /// STRLEN.
    Strlen,
    /// TTL and its kin.
    Ttl(TtlReply),
    /// SET and its kin.
    Set {
        /// The new value.
        value: Value,
        /// The new expiry.
        expiry: Expiry,
        /// NX or XX.
        condition: Option<Presence>,
        /// What to answer.
        reply: SetReply,
    },
    /// DEL, UNLINK.
    Delete,
    /// GETDEL.
    GetDelete,
    /// GETEX; `Keep` changes nothing.
    GetExpire(Expiry),
    /// APPEND.
    Append(Value),
    /// INCR and its kin.
    Increment(i64),
    /// INCRBYFLOAT.
    IncrementFloat(f64),
    /// EXPIRE and its kin; a time in the past deletes.
    Expire {
        /// Milliseconds since the Unix epoch.
        at_ms: u64,
        /// The condition.
        when: ExpireWhen,
    },
    /// PERSIST.
    Persist,
    /// GETRANGE, with Redis's negative indices.
    GetRange {
        /// First byte.
        start: i64,
        /// Last byte.
        end: i64,
    },
    /// SETRANGE.
    SetRange {
        /// Where.
        offset: u64,
        /// What.
        value: Value,
    },
}

/// What an action came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// What is to be logged, if anything.
    pub effect: Option<KeyEffect>,
    /// The answer, once that is durable.
    pub reply: Reply,
}

impl Action {
    /// How much of the current state `apply` must see.
    pub fn need(&self) -> Need {
        match self {
            Self::Set { reply: SetReply::Old, .. } => Need::Value,
            Self::Set { expiry: Expiry::Clear | Expiry::At(_), condition: None, .. } => Need::Nothing,
            Self::Set { .. } => Need::Meta,
            Self::Exists | Self::Type | Self::Ttl(_) | Self::Delete => Need::Meta,
            Self::Strlen => Need::Length,
            Self::Get
            | Self::GetWithin(_)
            | Self::GetDelete
            | Self::GetExpire(_)
            | Self::Append(_)
            | Self::Increment(_)
            | Self::IncrementFloat(_)
            | Self::Expire { .. }
            | Self::Persist
            | Self::GetRange { .. }
            | Self::SetRange { .. } => Need::Value,
        }
    }

    /// Whether the action can have an effect, so that a node that takes no writes can refuse it beforehand.
    pub fn is_write(&self) -> bool {
        !matches!(
            self,
            Self::Get
                | Self::GetWithin(_)
                | Self::Exists
                | Self::Type
                | Self::Strlen
                | Self::Ttl(_)
                | Self::GetRange { .. }
                | Self::GetExpire(Expiry::Keep)
        )
    }

    /// The next state and the reply. `current` is `None` for a key that is absent or expired; its value is there when
    /// `need` says `Value`. `size_max` bounds the value.
    pub fn apply(self, current: Option<&Current>, now_ms: u64, size_max: u64) -> Result<Outcome, OpError> {
        let outcome = match self {
            Self::Get => read(bulk_or_nil(current)),
            Self::GetWithin(size_max) => read(match current {
                Some(current) if value_of(current).len() as u64 > size_max => count(current.size),
                _ => bulk_or_nil(current),
            }),
            Self::Exists => read(flag(current.is_some())),
            Self::Type => read(Reply::Simple(if current.is_some() { "string" } else { "none" })),
            Self::Strlen => read(count(current.map_or(0, |c| c.size))),
            Self::Ttl(unit) => read(time_to_live(current, unit, now_ms)),
            Self::Set { value, expiry, condition, reply } => {
                return set(current, value, expiry, condition, reply, size_max);
            }
            Self::Delete => delete_if(current.is_some(), flag(current.is_some())),
            Self::GetDelete => delete_if(current.is_some(), bulk_or_nil(current)),
            Self::GetExpire(expiry) => get_expire(current, expiry, now_ms),
            Self::Append(tail) => return append(current, &tail, size_max),
            Self::Increment(by) => return increment(current, by, size_max),
            Self::IncrementFloat(by) => return increment_float(current, by, size_max),
            Self::Expire { at_ms, when } => expire(current, at_ms, when, now_ms),
            Self::Persist => match current {
                Some(c) if c.expires_at_ms != 0 => keep(c, 0, Reply::Int(1)),
                _ => read(Reply::Int(0)),
            },
            Self::GetRange { start, end } => read(Reply::Bulk(range(current, start, end))),
            Self::SetRange { offset, value } => return set_range(current, offset, &value, size_max),
        };
        Ok(outcome)
    }
}

/// Whether a key with this expiry (0 for none) is gone. As in Redis, it still lives in its last millisecond.
pub fn is_expired(expires_at_ms: u64, now_ms: u64) -> bool {
    expires_at_ms != 0 && now_ms > expires_at_ms && !is_planted(Bug::ServesExpired)
}

fn read(reply: Reply) -> Outcome {
    Outcome { effect: None, reply }
}

fn put(value: Value, expires_at_ms: u64, reply: Reply) -> Outcome {
    Outcome { effect: Some(KeyEffect::Put { value, expires_at_ms }), reply }
}

/// Stores the same value with another expiry.
fn keep(current: &Current, expires_at_ms: u64, reply: Reply) -> Outcome {
    match &current.long {
        Some(value) => {
            let effect = KeyEffect::Long { value: value.clone(), expires_at_ms };
            Outcome { effect: Some(effect), reply }
        }
        None => put(value_of(current).clone(), expires_at_ms, reply),
    }
}

fn delete_if(present: bool, reply: Reply) -> Outcome {
    Outcome { effect: present.then_some(KeyEffect::Delete), reply }
}

fn flag(yes: bool) -> Reply {
    Reply::Int(i64::from(yes))
}

fn count(number: u64) -> Reply {
    Reply::Int(i64::try_from(number).unwrap_or(i64::MAX))
}

fn value_of(current: &Current) -> &Value {
    current.value.as_ref().expect("a state is read with its value when the action's need is Value")
}

fn bulk_or_nil(current: Option<&Current>) -> Reply {
    current.map_or(Reply::Nil, |c| Reply::Bulk(value_of(c).clone()))
}

fn old_bytes(current: Option<&Current>) -> &[u8] {
    current.map_or(&[], |c| value_of(c))
}

fn old_expiry(current: Option<&Current>) -> u64 {
    current.map_or(0, |c| c.expires_at_ms)
}

fn check_size(size: u64, size_max: u64) -> Result<(), OpError> {
    if size > size_max { Err(OpError::ValueTooLarge { size, size_max }) } else { Ok(()) }
}

fn time_to_live(current: Option<&Current>, unit: TtlReply, now_ms: u64) -> Reply {
    let Some(current) = current else { return Reply::Int(-2) };
    if current.expires_at_ms == 0 {
        return Reply::Int(-1);
    }
    let left_ms = current.expires_at_ms.saturating_sub(now_ms);
    let rounded = |ms: u64| ms.saturating_add(500) / 1000;
    count(match unit {
        TtlReply::Seconds => rounded(left_ms),
        TtlReply::Milliseconds => left_ms,
        TtlReply::UnixSeconds => rounded(current.expires_at_ms),
        TtlReply::UnixMilliseconds => current.expires_at_ms,
    })
}

fn set(
    current: Option<&Current>,
    value: Value,
    expiry: Expiry,
    condition: Option<Presence>,
    reply: SetReply,
    size_max: u64,
) -> Result<Outcome, OpError> {
    check_size(value.len() as u64, size_max)?;
    let holds = match condition {
        None => true,
        Some(Presence::Absent) => current.is_none(),
        Some(Presence::Present) => current.is_some(),
    };
    let reply = match reply {
        SetReply::Ok if holds => Reply::Ok,
        SetReply::Ok => Reply::Nil,
        SetReply::Flag => flag(holds),
        SetReply::Old => bulk_or_nil(current),
    };
    if !holds {
        return Ok(read(reply));
    }
    let expires_at_ms = match expiry {
        Expiry::Clear => 0,
        Expiry::Keep => old_expiry(current),
        Expiry::At(at_ms) => at_ms,
    };
    Ok(put(value, expires_at_ms, reply))
}

fn get_expire(current: Option<&Current>, expiry: Expiry, now_ms: u64) -> Outcome {
    let reply = bulk_or_nil(current);
    let Some(current) = current else { return read(reply) };
    match expiry {
        Expiry::Keep => read(reply),
        Expiry::Clear if current.expires_at_ms == 0 => read(reply),
        Expiry::Clear => keep(current, 0, reply),
        Expiry::At(at_ms) if at_ms <= now_ms => delete_if(true, reply),
        Expiry::At(at_ms) => keep(current, at_ms, reply),
    }
}

fn append(current: Option<&Current>, tail: &[u8], size_max: u64) -> Result<Outcome, OpError> {
    let old = old_bytes(current);
    let size = old.len() as u64 + tail.len() as u64;
    check_size(size, size_max)?;
    let mut value = BytesMut::with_capacity(old.len() + tail.len());
    value.extend_from_slice(old);
    value.extend_from_slice(tail);
    Ok(put(value.freeze(), old_expiry(current), count(size)))
}

fn increment(current: Option<&Current>, by: i64, size_max: u64) -> Result<Outcome, OpError> {
    let old = match current {
        None => 0,
        Some(current) => parse_integer(value_of(current)).ok_or(OpError::NotAnInteger)?,
    };
    let new = old.checked_add(by).ok_or(OpError::Overflow)?;
    let value = Bytes::copy_from_slice(itoa::Buffer::new().format(new).as_bytes());
    check_size(value.len() as u64, size_max)?;
    Ok(put(value, old_expiry(current), Reply::Int(new)))
}

fn increment_float(current: Option<&Current>, by: f64, size_max: u64) -> Result<Outcome, OpError> {
    let old = match current {
        None => 0.0,
        Some(current) => parse_float(value_of(current)).ok_or(OpError::NotAFloat)?,
    };
    let new = old + by;
    if !new.is_finite() {
        return Err(OpError::NotFinite);
    }
    let value = Bytes::from(format_float(new));
    check_size(value.len() as u64, size_max)?;
    Ok(put(value.clone(), old_expiry(current), Reply::Bulk(value)))
}

fn expire(current: Option<&Current>, at_ms: u64, when: ExpireWhen, now_ms: u64) -> Outcome {
    let Some(current) = current else { return read(Reply::Int(0)) };
    let old = current.expires_at_ms;
    let has = old != 0;
    let applies = match when {
        ExpireWhen::Always => true,
        ExpireWhen::None => !has,
        ExpireWhen::Some => has,
        // No expiry is the latest of all.
        ExpireWhen::Later | ExpireWhen::SomeLater => has && at_ms > old,
        ExpireWhen::Earlier => !has || at_ms < old,
        ExpireWhen::SomeEarlier => has && at_ms < old,
    };
    if !applies {
        read(Reply::Int(0))
    } else if at_ms <= now_ms {
        delete_if(true, Reply::Int(1))
    } else {
        keep(current, at_ms, Reply::Int(1))
    }
}

/// The part of a value between two indices, both included; a negative index counts from the end.
fn range(current: Option<&Current>, start: i64, end: i64) -> Bytes {
    let Some(current) = current else { return Bytes::new() };
    let value = value_of(current);
    let range = range_of(value.len() as u64, start, end);
    value.slice(range.start as usize..range.end as usize)
}

/// The bytes of a value of `size` bytes between two indices, both included; a negative index counts from the end.
fn range_of(size: u64, start: i64, end: i64) -> Range<u64> {
    let size = i64::try_from(size).unwrap_or(i64::MAX);
    if size == 0 || (start < 0 && end < 0 && start > end) {
        return 0..0;
    }
    let from_end = |index: i64| if index < 0 { (size + index).max(0) } else { index };
    let (start, end) = (from_end(start), from_end(end).min(size - 1));
    if start <= end { start as u64..end as u64 + 1 } else { 0..0 }
}

fn set_range(
    current: Option<&Current>,
    offset: u64,
    patch: &[u8],
    size_max: u64,
) -> Result<Outcome, OpError> {
    let old = old_bytes(current);
    if patch.is_empty() {
        return Ok(read(count(old.len() as u64)));
    }
    let end = offset.saturating_add(patch.len() as u64);
    check_size(end, size_max)?;
    let too_large = |_| OpError::ValueTooLarge { size: end, size_max };
    let (start, end) =
        (usize::try_from(offset).map_err(too_large)?, usize::try_from(end).map_err(too_large)?);
    let mut value = BytesMut::zeroed(end.max(old.len()));
    value[..old.len()].copy_from_slice(old);
    value[start..end].copy_from_slice(patch);
    let size = value.len() as u64;
    Ok(put(value.freeze(), old_expiry(current), count(size)))
}

/// One command of a batch: actions on keys, and how their replies make one.
#[derive(Debug, Clone, PartialEq)]
pub struct Command {
    /// In order; a later one sees what an earlier one did.
    pub actions: Vec<(Key, Action)>,
    /// How the replies are folded.
    pub fold: Fold,
}

/// How the replies of a command's actions become its reply.
#[derive(Debug, Clone, PartialEq)]
pub enum Fold {
    /// The only one.
    One,
    /// All of them as an array (MGET).
    Array,
    /// Their sum (DEL, EXISTS).
    Sum,
    /// OK (MSET).
    Ok,
    /// 1 when none of the keys was there, else nothing is done and 0 (MSETNX).
    AllAbsent,
    /// A reply known beforehand (PING inside MULTI).
    Constant(Reply),
}
