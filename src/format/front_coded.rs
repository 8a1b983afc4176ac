//! Byte strings in ascending order, each without the bytes that it shares with the one before it.
//!
//! ```text
//! varint  bytes shared with the string before, as many as there are; 0 for the first
//! varint  bytes of the rest
//!         the rest
//! ```
//!
//! A checkpoint stores a shard's keys so, and the ordered index keeps them so in memory. Varints are LEB128 in their shortest form.

use super::{FormatError, Reader};
use crate::limits::KEY_SIZE_MAX;

const WHAT: &str = "list of keys";

/// Bytes that two strings have in common from their beginning on.
pub fn shared_size(one: &[u8], other: &[u8]) -> usize {
    one.iter().zip(other).take_while(|(a, b)| a == b).count()
}

fn push_varint(mut number: usize, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Appends a string of which `shared` bytes are those of the one before it.
pub fn push(shared: usize, rest: &[u8], out: &mut Vec<u8>) {
    push_varint(shared, out);
    push_varint(rest.len(), out);
    out.extend_from_slice(rest);
}

/// Visits every string. An error where the bytes are not such a list, strings that are no keys or out of order included.
pub fn decode(bytes: &[u8], visit: &mut dyn FnMut(&[u8])) -> Result<(), FormatError> {
    let wrong = |field, got: usize| FormatError::Field { what: WHAT, field, got: got as u64 };
    let mut reader = Reader::new(WHAT, bytes);
    let mut last: Vec<u8> = Vec::new();
    let mut is_first = true;
    while reader.position() < bytes.len() {
        let (shared, size) = (reader.varint()? as usize, reader.varint()? as usize);
        if shared > last.len() || shared + size > KEY_SIZE_MAX {
            return Err(wrong("length", shared + size));
        }
        let rest = reader.take(size)?;
        // As many as there are, and more than before: both follow from the first byte that is not shared.
        if !is_first && rest.first() <= last.get(shared) {
            return Err(wrong("order", shared));
        }
        last.truncate(shared);
        last.extend_from_slice(rest);
        is_first = false;
        visit(&last);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(keys: &[&[u8]]) -> Vec<u8> {
        let (mut out, mut last) = (Vec::new(), &b""[..]);
        for key in keys {
            let shared = shared_size(last, key);
            push(shared, &key[shared..], &mut out);
            last = key;
        }
        out
    }

    fn back(bytes: &[u8]) -> Result<Vec<Vec<u8>>, FormatError> {
        let mut seen = Vec::new();
        decode(bytes, &mut |key| seen.push(key.to_vec()))?;
        Ok(seen)
    }

    #[test]
    fn lists_round_trip() {
        let long = vec![7; KEY_SIZE_MAX];
        let keys: [&[u8]; 8] = [b"", b"\0", b"a", b"a\0", b"ab", b"abc", b"b", b"b\xff"];
        assert_eq!(back(&list(&keys)).unwrap(), keys);
        assert_eq!(back(&list(&[&long[..9], &long])).unwrap(), [&long[..9], &long]);
        assert_eq!(back(&[]).unwrap(), Vec::<Vec<u8>>::new());
        assert!(list(&keys).len() < keys.iter().map(|key| key.len() + 2).sum::<usize>());
    }

    #[test]
    fn what_is_out_of_order_or_no_key_is_refused_and_nothing_panics() {
        for keys in [&[&b"b"[..], b"a"][..], &[b"a", b"a"], &[b"", b""], &[b"ab", b"a"]] {
            assert!(back(&list(keys)).is_err(), "{keys:?}");
        }
        // Fewer bytes than are shared, more than there were, and one byte too many.
        assert!(back(&[0, 2, b'a', b'b', 1, 1, b'b']).is_err());
        assert!(back(&[0, 1, b'a', 2, 1, b'b']).is_err());
        assert!(back(&list(&[&vec![7; KEY_SIZE_MAX + 1]])).is_err());
        let bytes = list(&[b"abc", b"abd", b"b"]);
        for at in 0..bytes.len() {
            // Cut between two keys, the rest is a list.
            let _ = back(&bytes[..at]);
            for bit in 0..8 {
                let mut flipped = bytes.clone();
                flipped[at] ^= 1 << bit;
                let _ = back(&flipped);
            }
        }
        assert!(back(&bytes[..bytes.len() - 1]).is_err() && back(&bytes[..1]).is_err());
    }
}
