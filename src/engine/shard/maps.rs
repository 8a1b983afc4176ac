//! Maps by keys and by identities: no randomness of the process, no collisions that clients could choose.

use std::hash::{BuildHasher, Hasher};

use hashbrown::HashMap;
use siphasher::sip::SipHasher13;

use crate::engine::index::Identity;
use crate::engine::op::Key;

/// Hashes keys with the device's secret: no randomness of the process, no collisions that clients could choose.
#[derive(Clone, Copy)]
pub(in crate::engine) struct SecretHash(pub(in crate::engine) [u8; 16]);

impl BuildHasher for SecretHash {
    type Hasher = SipHasher13;
    fn build_hasher(&self) -> SipHasher13 {
        SipHasher13::new_with_key(&self.0)
    }
}

pub(in crate::engine) type KeyMap<V> = HashMap<Key, V, SecretHash>;

/// Takes identities as they are: they are hashes.
#[derive(Debug, Clone, Copy)]
pub(in crate::engine) struct UpperBits;

/// Keeps the last 64 bits that it was given, which are the first of an identity.
pub(in crate::engine) struct UpperBitsHasher(u64);

impl Hasher for UpperBitsHasher {
    fn write(&mut self, _bytes: &[u8]) {}
    fn write_u8(&mut self, _lower: u8) {}
    fn write_u64(&mut self, upper: u64) {
        self.0 = upper;
    }
    fn finish(&self) -> u64 {
        self.0
    }
}

impl BuildHasher for UpperBits {
    type Hasher = UpperBitsHasher;
    fn build_hasher(&self) -> UpperBitsHasher {
        UpperBitsHasher(0)
    }
}

pub(in crate::engine) type IdentityMap<V> = HashMap<Identity, V, UpperBits>;
