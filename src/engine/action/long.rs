//! What an action needs of a long value, and which actions make one. Pure functions.

use std::ops::Range;

use super::{Action, SetReply, check_size, old_bytes, range_of};
use crate::engine::long::Part;
use crate::engine::op::{Current, OpError, Reply};

/// What an action on a long value needs, beside what `apply` needs.
#[derive(Debug)]
pub(in crate::engine) enum LongNeed {
    /// No bytes: `apply` does without.
    Nothing,
    /// All of it, for `apply`.
    Whole,
    /// The reply is this range of it.
    Range(Range<u64>),
    /// The value changes in this part; the length afterwards is the reply.
    Write(Part),
    /// The reply is known.
    Reply(Reply),
}

/// What an action needs of a long value of `size` bytes. Values may get `size_max` bytes long.
pub(in crate::engine) fn long_need(action: &Action, size: u64, size_max: u64) -> Result<LongNeed, OpError> {
    let length = || LongNeed::Reply(Reply::Int(i64::try_from(size).unwrap_or(i64::MAX)));
    Ok(match action {
        Action::GetWithin(size_max) if size > *size_max => length(),
        Action::Get | Action::GetWithin(_) | Action::GetDelete | Action::GetExpire(_) => LongNeed::Whole,
        Action::Set { reply: SetReply::Old, .. } => LongNeed::Whole,
        Action::GetRange { start, end } => LongNeed::Range(range_of(size, *start, *end)),
        Action::Append(tail) if tail.is_empty() => length(),
        Action::SetRange { value, .. } if value.is_empty() => length(),
        Action::Append(tail) => {
            check_size(size.saturating_add(tail.len() as u64), size_max)?;
            LongNeed::Write(Part { start: size, bytes: tail.clone() })
        }
        Action::SetRange { offset, value } => {
            check_size(offset.saturating_add(value.len() as u64), size_max)?;
            LongNeed::Write(Part { start: *offset, bytes: value.clone() })
        }
        // No number is that long.
        Action::Increment(_) => return Err(OpError::NotAnInteger),
        Action::IncrementFloat(_) => return Err(OpError::NotAFloat),
        Action::Exists
        | Action::Type
        | Action::Strlen
        | Action::Ttl(_)
        | Action::Set { .. }
        | Action::Delete
        | Action::Expire { .. }
        | Action::Persist => LongNeed::Nothing,
    })
}

/// The parts of the value that an action makes of one that is in memory, or of none, where that is longer than a chunk: so
/// that nothing is made of a hole.
pub(in crate::engine) fn long_parts(
    action: &Action,
    current: Option<&Current>,
    chunk_size: u64,
    size_max: u64,
) -> Result<Option<Vec<Part>>, OpError> {
    let (start, bytes) = match action {
        Action::Append(tail) => (current.map_or(0, |current| current.size), tail),
        Action::SetRange { offset, value } if !value.is_empty() => (*offset, value),
        _ => return Ok(None),
    };
    let old = old_bytes(current);
    let end = start.saturating_add(bytes.len() as u64).max(old.len() as u64);
    if end <= chunk_size {
        return Ok(None);
    }
    check_size(end, size_max)?;
    let old = current.and_then(|current| current.value.clone()).map(|bytes| Part { start: 0, bytes });
    let new = Part { start, bytes: bytes.clone() };
    Ok(Some(old.into_iter().chain([new]).filter(|part| !part.bytes.is_empty()).collect()))
}
