//! The extent allocator: which extents are free. One per node, shared by its reactors without a lock.
//!
//! Invariants:
//! - No extent is taken twice: taking is one atomic bit operation.
//! - The last `reserve` free extents go only to records that free space or end batches.
//! - Epochs are never repeated: each is the boot number, which grows with every start, above a counter.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// What an extent is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// New data.
    Data,
    /// Deletes, commit records, FLUSHALL.
    Reserve,
}

/// Bits of an epoch that count within one start of the node.
const EPOCH_COUNTER_BITS: u32 = 32;

/// Free extents of a device.
pub struct Allocator {
    used: Vec<AtomicU64>,
    count: u32,
    free: AtomicI64,
    reserve: i64,
    epoch: AtomicU64,
    ordinal: AtomicU64,
}

impl Allocator {
    /// All `count` extents free, `reserve` of them kept back. `ordinal_last` is the highest that any extent on the device
    /// carries.
    pub fn new(count: u32, reserve: u32, boot: u64, ordinal_last: u64) -> Allocator {
        Allocator {
            used: std::iter::repeat_with(|| AtomicU64::new(0)).take(count.div_ceil(64) as usize).collect(),
            count,
            free: AtomicI64::new(i64::from(count)),
            reserve: i64::from(reserve),
            epoch: AtomicU64::new(boot << EPOCH_COUNTER_BITS),
            ordinal: AtomicU64::new(ordinal_last),
        }
    }

    /// Marks an extent found in use at recovery. False when it already was, or is not on the device.
    pub fn claim(&self, extent: u32) -> bool {
        if extent >= self.count {
            return false;
        }
        let bit = 1 << (extent % 64);
        let before = self.used[extent as usize / 64].fetch_or(bit, Ordering::AcqRel);
        if before & bit == 0 {
            self.free.fetch_sub(1, Ordering::AcqRel);
        }
        before & bit == 0
    }

    /// Takes a free extent, the lowest one.
    pub fn take(&self, purpose: Purpose) -> Option<u32> {
        let floor = if purpose == Purpose::Data { self.reserve } else { 0 };
        // The count is taken first, so that two takers can't both have the last extent above the reserve.
        let counted = self
            .free
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |free| (free > floor).then_some(free - 1));
        if counted.is_err() {
            return None;
        }
        for (at, word) in self.used.iter().enumerate() {
            let mut seen = word.load(Ordering::Acquire);
            loop {
                let bit = seen.trailing_ones();
                let extent = at as u32 * 64 + bit;
                if bit == 64 || extent >= self.count {
                    break;
                }
                match word.compare_exchange_weak(seen, seen | 1 << bit, Ordering::AcqRel, Ordering::Acquire) {
                    Ok(_) => return Some(extent),
                    Err(now) => seen = now,
                }
            }
        }
        // Between the count and the search no bit can be lost: extents are given back bit first, count second.
        self.free.fetch_add(1, Ordering::AcqRel);
        None
    }

    /// Gives back an extent that was taken and never written.
    pub fn give_back(&self, extent: u32) {
        // The bit first, then the count: see `take`.
        self.used[extent as usize / 64].fetch_and(!(1 << (extent % 64)), Ordering::AcqRel);
        self.free.fetch_add(1, Ordering::AcqRel);
    }

    /// An epoch that no extent ever had.
    pub fn next_epoch(&self) -> u64 {
        self.epoch.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// A place in a chain behind every extent on the device.
    pub fn next_ordinal(&self) -> u64 {
        self.ordinal.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// Free extents, those of the reserve included.
    pub fn free_count(&self) -> u32 {
        self.free.load(Ordering::Acquire).max(0) as u32
    }

    /// Free extents that new data may take.
    pub fn available_count(&self) -> u32 {
        (self.free.load(Ordering::Acquire) - self.reserve).max(0) as u32
    }

    /// Extents on the device.
    pub fn count(&self) -> u32 {
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_kept_for_those_who_may_take_it() {
        let allocator = Allocator::new(100, 3, 1, 0);
        assert!(allocator.claim(0) && !allocator.claim(0) && !allocator.claim(100));
        let mut taken: Vec<u32> = std::iter::from_fn(|| allocator.take(Purpose::Data)).collect();
        assert_eq!((taken.len(), allocator.available_count(), allocator.free_count()), (96, 0, 3));
        taken.extend(std::iter::from_fn(|| allocator.take(Purpose::Reserve)));
        taken.sort_unstable();
        assert_eq!(taken, (1..100).collect::<Vec<_>>());
        assert_eq!(allocator.take(Purpose::Reserve), None);
        assert!(allocator.next_epoch() < allocator.next_epoch());
        assert!(Allocator::new(1, 0, 2, 0).next_epoch() > allocator.next_epoch());
    }

    #[test]
    fn concurrent_takers_never_share() {
        let allocator = Allocator::new(1_000, 10, 1, 0);
        let mut all: Vec<u32> = std::thread::scope(|scope| {
            let takers: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| std::iter::from_fn(|| allocator.take(Purpose::Data)).collect::<Vec<_>>())
                })
                .collect();
            takers.into_iter().flat_map(|taker| taker.join().unwrap()).collect()
        });
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 990);
    }
}
