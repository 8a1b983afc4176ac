//! The rules that every engine applies to an operation before it takes it.

use super::{Geometry, Io, IoError, IoOp, Refusal, Rejected};

/// The range that an operation touches: offset and size in bytes. A flush has none.
pub fn range(op: &IoOp) -> Option<(u64, u64)> {
    match op {
        IoOp::Read { offset, buf } | IoOp::Write { offset, buf, .. } => Some((*offset, buf.len() as u64)),
        IoOp::Deallocate { offset, size } => Some((*offset, *size)),
        IoOp::Flush => None,
    }
}

/// Whether the operation is aligned, within the device and within the transfer bound.
pub fn check(geometry: &Geometry, op: &IoOp) -> Result<(), IoError> {
    let Some((offset, size)) = range(op) else { return Ok(()) };
    let invalid = |cause| Err(IoError::Invalid { offset, size, cause });
    let alignment = match op {
        IoOp::Read { .. } => u64::from(geometry.read_alignment),
        _ => u64::from(geometry.block_size),
    };
    if size == 0 {
        return invalid("the length is zero");
    }
    if !offset.is_multiple_of(alignment) {
        return invalid("the offset is not a multiple of the block size");
    }
    if !size.is_multiple_of(alignment) {
        return invalid("the length is not a multiple of the block size");
    }
    if offset.checked_add(size).is_none_or(|end| end > geometry.size()) {
        return invalid("it ends beyond the device");
    }
    if !matches!(op, IoOp::Deallocate { .. }) && size > u64::from(geometry.transfer_size_max) {
        return invalid("it is longer than the largest transfer");
    }
    Ok(())
}

/// Gives an operation back because it can't be done.
pub fn refuse(io: Io, error: IoError) -> Rejected {
    Rejected { io, why: Refusal::Failed(error) }
}

/// Gives an operation back because the queue is at its depth.
pub fn full(io: Io) -> Rejected {
    Rejected { io, why: Refusal::Full }
}
