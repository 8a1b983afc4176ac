//! What a command does to one key: pure functions from the key's state to its next state and the reply.
//!
//! The same functions serve single commands and the commands of a batch.

use super::op::{Current, Key, KeyEffect, OpError, Reply, Value};

/// How much of the current state an action must see.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// None of it: the outcome is the same whatever is there.
    Nothing,
    /// Existence, expiry and length.
    Meta,
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
        Need::Value
    }

    /// The next state and the reply. `current` is `None` for a key that is absent or expired; its value is there when
    /// `need` says `Value`. `size_max` bounds the value.
    pub fn apply(self, _current: Option<&Current>, _now_ms: u64, _size_max: u64) -> Result<Outcome, OpError> {
        Ok(Outcome { effect: None, reply: Reply::Nil })
    }
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
