//! A manifest: the value of a put whose value is long. It names the chunks that the value is made of, not where they are.
//!
//! ```text
//! runs, ascending: pieces of one size behind each other, whose chunks have ids behind each other
//!   .  bytes of zeros before it that are not stored, varint
//!   .  bytes of each piece, varint
//!   .  pieces, varint
//!   8  id of the first piece's chunk
//! ```
//!
//! What no piece covers reads as zeros. The length of the value stands in the record's header.

use super::{FormatError, Reader, put_varint};
use crate::limits::PIECE_COUNT_MAX;

const WHAT: &str = "manifest";

/// A piece of a long value: all that its chunk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManifestPiece {
    /// Bytes from the value's start to it.
    pub start: u32,
    /// Bytes of it.
    pub size: u32,
    /// Its chunk, unique in the shard for good.
    pub id: u64,
}

/// The manifest of these pieces, which are ascending and do not overlap.
pub fn encode(pieces: impl IntoIterator<Item = ManifestPiece>) -> Vec<u8> {
    let mut out = Vec::new();
    let mut end = 0;
    let mut run: Option<(ManifestPiece, u32)> = None;
    let mut put = |(first, count): (ManifestPiece, u32)| {
        put_varint(&mut out, first.start - end);
        put_varint(&mut out, first.size);
        put_varint(&mut out, count);
        out.extend_from_slice(&first.id.to_le_bytes());
        end = first.start + first.size * count;
    };
    for piece in pieces {
        match &mut run {
            Some((first, count))
                if first.size == piece.size
                    && first.start + first.size * *count == piece.start
                    && first.id.checked_add(u64::from(*count)) == Some(piece.id) =>
            {
                *count += 1;
            }
            run => {
                if let Some(done) = run.replace((piece, 1)) {
                    put(done);
                }
            }
        }
    }
    if let Some(last) = run {
        put(last);
    }
    out
}

/// The pieces of a value of `length` bytes.
pub fn decode(bytes: &[u8], length: u64) -> Result<Vec<ManifestPiece>, FormatError> {
    let field = |field, got| FormatError::Field { what: WHAT, field, got };
    let mut reader = Reader::new(WHAT, bytes);
    let mut pieces = Vec::new();
    let mut end: u64 = 0;
    while reader.position() < bytes.len() {
        let start = end + u64::from(reader.varint()?);
        let size = reader.varint()?;
        let count = reader.varint()?;
        let id = reader.u64()?;
        if size == 0 || count == 0 {
            return Err(field("piece", 0));
        }
        end = start + u64::from(size) * u64::from(count);
        if end > length.min(u64::from(u32::MAX)) {
            return Err(field("end of a piece", end));
        }
        if pieces.len() + count as usize > PIECE_COUNT_MAX {
            return Err(field("pieces", u64::from(count)));
        }
        if id == 0 || id.checked_add(u64::from(count)).is_none() {
            return Err(field("chunk", id));
        }
        // Its end is known to be within 32 bits.
        pieces.extend((0..count).map(|nth| ManifestPiece {
            start: start as u32 + nth * size,
            size,
            id: id + u64::from(nth),
        }));
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(start: u32, size: u32, id: u64) -> ManifestPiece {
        ManifestPiece { start, size, id }
    }

    #[test]
    fn round_trip_in_runs() {
        let long: Vec<ManifestPiece> =
            (0..2_000).map(|nth| piece(nth * 256_000, 256_000, 77 + u64::from(nth))).collect();
        let bytes = encode(long.clone());
        assert!(bytes.len() < 32, "one run: {} bytes", bytes.len());
        assert_eq!(decode(&bytes, 512 << 20), Ok(long));
        for pieces in [
            vec![],
            vec![piece(0, 1, 1)],
            vec![piece(400 << 20, 5, 9)],
            vec![piece(0, 10, 4), piece(10, 10, 5), piece(20, 10, 7), piece(30, 9, 8), piece(50, 9, 9)],
            vec![piece(3, 10, u64::MAX - 1)],
        ] {
            assert_eq!(decode(&encode(pieces.clone()), 512 << 20), Ok(pieces));
        }
    }

    #[test]
    fn what_no_version_writes_is_refused_and_nothing_panics() {
        let run = |gap: u32, size: u32, count: u32, id: u64| {
            let mut out = Vec::new();
            put_varint(&mut out, gap);
            put_varint(&mut out, size);
            put_varint(&mut out, count);
            out.extend_from_slice(&id.to_le_bytes());
            out
        };
        assert!(decode(&run(0, 10, 1, 1), 10).is_ok());
        for bad in [
            run(0, 0, 1, 1),
            run(0, 10, 0, 1),
            run(0, 10, 1, 0),
            run(1, 10, 1, 1),
            run(0, 1, 11, 1),
            run(0, 5, 2, u64::MAX),
            run(u32::MAX, u32::MAX, u32::MAX, 1),
        ] {
            assert!(decode(&bad, 10).is_err(), "{bad:?}");
        }
        // As many pieces as a small manifest can claim would fill the memory.
        assert!(decode(&run(0, 1, 512 << 20, 1), 512 << 20).is_err());
        let bytes = run(3, 4, 1, 1);
        for cut in 1..bytes.len() {
            assert!(decode(&bytes[..cut], 10).is_err());
        }
        let mut state = 1u64;
        for _ in 0..20_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let _ = decode(&[state.to_le_bytes(), (state >> 7).to_be_bytes()].concat(), 1 << 30);
        }
    }
}
