//! Keys by their names, on devices whose index is `ordered`: ranges in order, prefixes in the order of hashes.

use super::walk::Scanned;
use super::{Shard, is_expired};
use crate::engine::index::{Directory, Identity, Index, hash_key};
use crate::engine::op::{Key, KeyRange, Order};
use crate::probe::{self, Probe};

/// Names that a listing looks at for each one that is asked for, and some more: those of expired keys count as well.
const VISITED_PER_KEY: usize = 2;
const VISITED_MORE: usize = 64;

/// Keys of a prefix that are few: a step of a scan goes through all of them. It takes about a tenth of a microsecond for each.
const PREFIX_FEW: usize = 4_096;

/// Bytes that they may have, since each step copies them.
const PREFIX_SIZE_MAX: usize = 1 << 20;

/// A scan through few keys gives an eighth of them in a step at least, so that it goes through them eight times at most.
const PREFIX_STEPS: usize = 8;

/// Names that one pass sweeps.
const SWEEP_COUNT: usize = 256;

/// What a step of a listing found.
pub(in crate::engine) struct Listed {
    /// Live keys, in order.
    pub(in crate::engine) keys: Vec<Key>,
    /// The last name that was looked at, behind which to go on; none at the end of the range.
    pub(in crate::engine) next: Option<Key>,
}

impl Shard {
    /// Whether its keys are known by name.
    pub(in crate::engine) fn directory(&self) -> Option<&Directory> {
        self.directory.as_ref()
    }

    /// The index has a key.
    pub(super) fn name(&mut self, key: &[u8]) {
        if let Some(directory) = &mut self.directory {
            directory.insert(key);
        }
    }

    /// The index has a key no more.
    pub(super) fn unname(&mut self, key: &[u8]) {
        if let Some(directory) = &mut self.directory {
            directory.remove(key);
        }
    }

    /// Whether the index has a key that has not expired, and nothing newer is on its way; `None` where it has none of its identity.
    fn is_live(&self, identity: Identity, now_ms: u64) -> Option<bool> {
        if self.pending.contains(identity) {
            return Some(false);
        }
        let entry = self.index.get(identity)?;
        Some(!is_expired(self.expiry_of(identity, &entry), now_ms))
    }

    /// Live keys that are on their way to the device.
    fn pending_keys(&self, now_ms: u64) -> impl Iterator<Item = (u64, &Key)> {
        let is_live = move |expires_at_ms: u64| !is_expired(expires_at_ms, now_ms);
        self.pending.iter().filter_map(move |(key, pending)| {
            let is_there = pending.value.is_some() && !pending.reaped && is_live(pending.expires_at_ms);
            is_there.then_some((pending.hash.upper(), key))
        })
    }

    /// About `count` live keys of a range, the first ones in this order, until they have `size_max` bytes. None where keys are not
    /// known by name.
    pub(in crate::engine) fn list(
        &mut self,
        range: &KeyRange,
        order: Order,
        count: usize,
        size_max: usize,
        now_ms: u64,
    ) -> Option<Listed> {
        let directory = self.directory.as_ref()?;
        let visited_max = count.saturating_mul(VISITED_PER_KEY).saturating_add(VISITED_MORE);
        let (mut keys, mut next, mut left_over): (Vec<Key>, _, Vec<Key>) = (Vec::new(), None, Vec::new());
        let (mut size, mut visited) = (0, 0);
        directory.visit(range, order, &mut |key| {
            visited += 1;
            match self.is_live(hash_key(&self.superblock.secret, key).identity(), now_ms) {
                Some(true) => {
                    size += key.len();
                    keys.push(Key::copy_from_slice(key));
                }
                Some(false) => {}
                None => left_over.push(Key::copy_from_slice(key)),
            }
            let is_enough = keys.len() >= count || size >= size_max || visited >= visited_max;
            if is_enough {
                next = Some(Key::copy_from_slice(key));
            }
            !is_enough
        });
        // The pending set is small; its keys belong between those that were just looked at.
        let is_covered = |key: &Key| {
            range.contains(key)
                && next.as_ref().is_none_or(|next| match order {
                    Order::Ascending => key <= next,
                    Order::Descending => key >= next,
                })
        };
        keys.extend(self.pending_keys(now_ms).map(|(_, key)| key).filter(|key| is_covered(key)).cloned());
        keys.sort_unstable();
        if order == Order::Descending {
            keys.reverse();
        }
        probe::hit_if(!left_over.is_empty(), Probe::LeftoverMet);
        left_over.iter().for_each(|key| self.unname(key));
        Some(Listed { keys, next })
    }

    /// What a step of a scan would find of the keys that begin so, where those are few. Every one of them whose hash is from the
    /// cursor up to the next one is there, as in any other step, so a scan may go from one way to the other.
    pub(in crate::engine) fn scan_prefix(
        &self,
        cursor: u64,
        count: usize,
        prefix: &Key,
        now_ms: u64,
    ) -> Option<Scanned> {
        let range = KeyRange::of_prefix(prefix.clone());
        let (mut found, mut visited, mut size) = (Vec::new(), 0, 0);
        self.directory.as_ref()?.visit(&range, Order::Ascending, &mut |key| {
            visited += 1;
            size += key.len();
            let hash = hash_key(&self.superblock.secret, key);
            if hash.upper() >= cursor && self.is_live(hash.identity(), now_ms) == Some(true) {
                found.push((hash.upper(), Key::copy_from_slice(key)));
            }
            visited <= PREFIX_FEW && size <= PREFIX_SIZE_MAX
        });
        if visited > PREFIX_FEW || size > PREFIX_SIZE_MAX {
            return None;
        }
        probe::hit(Probe::PrefixScanned);
        let pending = self.pending_keys(now_ms);
        let pending = pending.filter(|(hash, key)| *hash >= cursor && range.contains(key));
        found.extend(pending.map(|(hash, key)| (hash, key.clone())));
        found.sort_unstable();
        let taken = count.max(visited.div_ceil(PREFIX_STEPS)).min(found.len());
        // The low byte of a cursor is not this shard's: up to the next one that ends in zeros.
        let behind = taken.checked_sub(1).and_then(|last| (found[last].0 | 0xff).checked_add(1));
        let next = behind.filter(|behind| found.last().is_some_and(|(hash, _)| hash >= behind));
        let is_taken = |(hash, _): &(u64, Key)| next.is_none_or(|next| *hash < next);
        let keys = found.into_iter().filter(is_taken).map(|(_, key)| key).collect();
        Some(Scanned { next: next.unwrap_or(0), keys, stored: Vec::new() })
    }

    /// Looks at some names of keys that may have gone, once in a millisecond at most.
    pub(in crate::engine) fn sweep_directory(&mut self) {
        let (index, secret) = (&self.index, &self.superblock.secret);
        let Some(directory) = &mut self.directory else { return };
        let is_more = directory.sweep(index.len(), SWEEP_COUNT, &mut |key| {
            index.get(hash_key(secret, key).identity()).is_some()
        });
        probe::hit_if(is_more, Probe::DirectorySwept);
    }

    /// Whether there are more names to look at.
    pub(in crate::engine) fn is_sweeping(&self) -> bool {
        self.directory.as_ref().is_some_and(Directory::is_sweeping)
    }
}
