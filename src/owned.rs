//! Copies of short byte strings that may be shared and kept for long, each in one piece of memory.

use bytes::Bytes;

/// Short bytes, with how many they are. As the owner of a `Bytes` they lie right behind its counter: one piece of memory, where
/// a copied slice has two as soon as it is shared.
struct Short<const N: usize> {
    size: u8,
    bytes: [u8; N],
}

impl<const N: usize> AsRef<[u8]> for Short<N> {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..usize::from(self.size)]
    }
}

fn short<const N: usize>(from: &[u8]) -> Bytes {
    let mut bytes = [0; N];
    bytes[..from.len()].copy_from_slice(from);
    Bytes::from_owner(Short { size: from.len() as u8, bytes })
}

/// A copy of them.
pub fn owned(bytes: &[u8]) -> Bytes {
    match bytes.len() {
        0 => Bytes::new(),
        1..=23 => short::<23>(bytes),
        24..=55 => short::<55>(bytes),
        56..=119 => short::<119>(bytes),
        _ => Bytes::copy_from_slice(bytes),
    }
}
