//! The extent allocator: which extents are free. One per node, shared by its reactors without a lock.
//!
//! Invariants:
//! - No extent is taken twice: taking is one atomic bit operation.
//! - The last `reserve` free extents go only to records that free space or end batches; the last ones above them only to the
//!   records that garbage collection moves, so that a full device can be emptied again. Those may take the last of all where nothing
//!   else gives any back.
//! - Epochs are never repeated: each is the boot number, which grows with every start, above a counter.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::planted::{Bug, is_planted};

/// What an extent is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// New data.
    Data,
    /// Records that garbage collection moves.
    Collection,
    /// The same, where nothing else is left for them and no extent is about to be free: then those that are kept for deletes, too,
    /// since what is moved gives back more than it takes.
    LastCollection,
    /// The same, to an extent apart from the log: never the last one, which the log may need to say what is free now.
    Survivors,
    /// Deletes, commit records, FLUSHALL.
    Reserve,
    /// Records that say which extents are free now.
    Retirement,
    /// An image of indexes, which only saves time: never the last extents.
    Checkpoint,
}

/// The extents of one complete checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointChain {
    /// Its number.
    pub checkpoint: u64,
    /// Shards whose newest checkpoint it is.
    pub shards: Vec<u16>,
    /// Its extents.
    pub extents: Vec<u32>,
}

/// A checkpoint leaves at least this part of the extents to data: less than garbage collection keeps free, or a device that was
/// filled once would never have one again. Where the room is wanted after all, it is the first to go.
const CHECKPOINT_LEAVES_DIVISOR: i64 = 256;

/// Bits of an epoch that count within one start of the node.
const EPOCH_COUNTER_BITS: u32 = 32;

/// Free extents of a device.
pub struct Allocator {
    used: Vec<AtomicU64>,
    count: u32,
    free: AtomicI64,
    /// Extents that only `Reserve` takes.
    reserve: i64,
    /// How many of those are taken.
    reserve_taken: AtomicI64,
    /// Free extents above those that only `Collection` takes too.
    collection_reserve: i64,
    /// Shards that may move records at a time, each with an extent of the collection's reserve.
    collections_left: AtomicI64,
    /// Somebody was refused such a permission since one was given back.
    is_collection_wanted: AtomicBool,
    epoch: AtomicU64,
    ordinal: AtomicU64,
    /// Shards whose start is durable.
    settled_shards: AtomicU32,
    /// Bytes that garbage collection could free, summed over all shards.
    reclaimable: AtomicU64,
    /// Checkpoints that a start would load. Touched when one is written or given up, so a lock costs nothing.
    checkpoints: Mutex<Vec<CheckpointChain>>,
    /// Extents of checkpoints that are being written.
    checkpoint_extents: AtomicU32,
    /// How often checkpoints were given up for their space.
    checkpoint_drops: AtomicU32,
}

impl Purpose {
    /// Whether it is what garbage collection moves within the log.
    pub fn is_collection(self) -> bool {
        matches!(self, Purpose::Collection | Purpose::LastCollection)
    }
}

impl Allocator {
    /// All `count` extents free, `reserve` of them kept back for deletes and `collection_reserve` for garbage collection.
    /// `ordinal_last` is the highest that any extent on the device carries.
    pub fn new(count: u32, reserve: u32, collection_reserve: u32, boot: u64, ordinal_last: u64) -> Allocator {
        Allocator {
            used: std::iter::repeat_with(|| AtomicU64::new(0)).take(count.div_ceil(64) as usize).collect(),
            count,
            free: AtomicI64::new(i64::from(count)),
            reserve: i64::from(reserve),
            reserve_taken: AtomicI64::new(0),
            collection_reserve: i64::from(collection_reserve),
            collections_left: AtomicI64::new(i64::from(collection_reserve).max(1)),
            is_collection_wanted: AtomicBool::new(false),
            epoch: AtomicU64::new(boot << EPOCH_COUNTER_BITS),
            ordinal: AtomicU64::new(ordinal_last),
            settled_shards: AtomicU32::new(0),
            reclaimable: AtomicU64::new(0),
            checkpoints: Mutex::new(Vec::new()),
            checkpoint_extents: AtomicU32::new(0),
            checkpoint_drops: AtomicU32::new(0),
        }
    }

    /// Notes a checkpoint whose extents were taken: older ones of the same shards are not needed any more.
    pub fn add_checkpoint(&self, chain: CheckpointChain) {
        let mut chains = self.checkpoints.lock().unwrap_or_else(PoisonError::into_inner);
        for older in chains.iter_mut() {
            older.shards.retain(|shard| !chain.shards.contains(shard));
        }
        chains.push(chain);
        for superseded in chains.extract_if(.., |chain| chain.shards.is_empty()) {
            superseded.extents.into_iter().for_each(|extent| self.give_back(extent));
        }
    }

    /// How often checkpoints were given up for their space: one that was begun before the last time is not to go on.
    pub fn checkpoint_drops(&self) -> u32 {
        self.checkpoint_drops.load(Ordering::Acquire)
    }

    /// Takes an extent for a checkpoint that is being written.
    pub fn take_for_checkpoint(&self) -> Option<u32> {
        let extent = self.take(Purpose::Checkpoint)?;
        self.checkpoint_extents.fetch_add(1, Ordering::AcqRel);
        Some(extent)
    }

    /// A checkpoint with so many extents is not being written any more; unless it is complete, they are free.
    pub fn end_checkpoint(&self, extents: &[u32], is_complete: bool) {
        if !is_complete && !is_planted(Bug::LeaksCheckpointExtents) {
            extents.iter().for_each(|extent| self.give_back(*extent));
        }
        self.checkpoint_extents.fetch_sub(extents.len() as u32, Ordering::AcqRel);
    }

    /// A checkpoint was given up of which a write may still happen: nobody gets its extents before a restart.
    pub fn leave_checkpoint(&self, extents: &[u32]) {
        self.end_checkpoint(extents, true);
    }

    /// Gives up every checkpoint: the log says the same, and its space is wanted. True when there was any, or one is being
    /// written, which then ends soon.
    pub fn drop_checkpoints(&self) -> bool {
        self.checkpoint_drops.fetch_add(1, Ordering::AcqRel);
        let chains = std::mem::take(&mut *self.checkpoints.lock().unwrap_or_else(PoisonError::into_inner));
        let had_any = !chains.is_empty() || self.checkpoint_extents.load(Ordering::Acquire) > 0;
        for extent in chains.into_iter().flat_map(|chain| chain.extents) {
            self.give_back(extent);
        }
        had_any
    }

    /// The checkpoints that a start would load.
    pub fn checkpoints(&self) -> Vec<CheckpointChain> {
        self.checkpoints.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes that shards have made their start durable.
    pub fn on_settled(&self, shard_count: u32) {
        self.settled_shards.fetch_add(shard_count, Ordering::AcqRel);
    }

    /// Shards that have made their start durable.
    pub fn settled_count(&self) -> u32 {
        self.settled_shards.load(Ordering::Acquire)
    }

    /// Takes one of the few permissions to move records; `end_collection` gives it back.
    pub fn begin_collection(&self) -> bool {
        let is_given = self
            .collections_left
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| (left > 0).then_some(left - 1))
            .is_ok();
        if !is_given {
            self.is_collection_wanted.store(true, Ordering::Release);
        }
        is_given
    }

    /// Gives a permission of `begin_collection` back.
    pub fn end_collection(&self) {
        self.is_collection_wanted.store(false, Ordering::Release);
        self.collections_left.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether somebody waits for such a permission: who has one is not to rest on it.
    pub fn is_collection_wanted(&self) -> bool {
        self.is_collection_wanted.load(Ordering::Acquire)
    }

    /// Changes one shard's part of what could be freed.
    pub fn report_reclaimable(&self, before: u64, after: u64) {
        self.reclaimable.fetch_add(after.wrapping_sub(before), Ordering::AcqRel);
    }

    /// Bytes that garbage collection could free, in all shards.
    pub fn reclaimable(&self) -> u64 {
        self.reclaimable.load(Ordering::Acquire)
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

    /// Extents of the reserve that are not taken yet.
    fn reserve_left(&self) -> i64 {
        (self.reserve - self.reserve_taken.load(Ordering::Acquire)).max(0)
    }

    /// Counts an extent as one of the reserve, from when it is opened to when it is free again.
    pub fn count_reserve(&self, opened: bool) {
        self.reserve_taken.fetch_add(if opened { 1 } else { -1 }, Ordering::AcqRel);
    }

    /// Takes a free extent, the lowest one.
    pub fn take(&self, purpose: Purpose) -> Option<u32> {
        let floor = match purpose {
            Purpose::Data => self.reserve_left() + self.collection_reserve,
            Purpose::Collection => self.reserve_left(),
            Purpose::Survivors => self.reserve_left().max(1),
            Purpose::Reserve if self.reserve_left() == 0 => return None,
            Purpose::Reserve => self.collection_reserve,
            Purpose::Retirement | Purpose::LastCollection => 0,
            Purpose::Checkpoint => {
                self.reserve_left()
                    + self.collection_reserve
                    + (i64::from(self.count) / CHECKPOINT_LEAVES_DIVISOR).max(2)
            }
        };
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

    /// Gives back an extent that was never written, or that nothing on the device needs any more.
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

    /// Extents that were opened since the one with this ordinal.
    pub fn opened_since(&self, ordinal: u64) -> u64 {
        self.ordinal.load(Ordering::Acquire).saturating_sub(ordinal)
    }

    /// Free extents, those of the reserve included.
    pub fn free_count(&self) -> u32 {
        self.free.load(Ordering::Acquire).max(0) as u32
    }

    /// Free extents that new data may take.
    pub fn available_count(&self) -> u32 {
        (self.free.load(Ordering::Acquire) - self.reserve_left() - self.collection_reserve).max(0) as u32
    }

    /// Whether a collection could open an extent for what it moves.
    pub fn has_for_collection(&self) -> bool {
        self.free.load(Ordering::Acquire) > self.reserve_left()
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
        let allocator = Allocator::new(100, 3, 2, 1, 0);
        assert!(allocator.claim(0) && !allocator.claim(0) && !allocator.claim(100));
        let mut taken: Vec<u32> = std::iter::from_fn(|| allocator.take(Purpose::Data)).collect();
        assert_eq!((taken.len(), allocator.available_count(), allocator.free_count()), (94, 0, 5));
        assert!(allocator.has_for_collection());
        taken.extend(std::iter::from_fn(|| allocator.take(Purpose::Collection)));
        assert_eq!((taken.len(), allocator.free_count()), (96, 3));
        assert!(!allocator.has_for_collection());
        allocator.give_back(allocator.take(Purpose::LastCollection).unwrap());
        allocator.give_back(taken.pop().unwrap());
        allocator.give_back(taken.pop().unwrap());
        // Deletes leave garbage collection its own.
        for _ in 0..3 {
            taken.extend(allocator.take(Purpose::Reserve));
            allocator.count_reserve(true);
        }
        assert_eq!((allocator.take(Purpose::Reserve), allocator.available_count()), (None, 0));
        taken.extend(std::iter::from_fn(|| allocator.take(Purpose::Retirement)));
        taken.sort_unstable();
        assert_eq!(taken, (1..100).collect::<Vec<_>>());
        assert_eq!(allocator.take(Purpose::Retirement), None);
        assert!(allocator.next_epoch() < allocator.next_epoch());
        assert!(Allocator::new(1, 0, 0, 2, 0).next_epoch() > allocator.next_epoch());
    }

    #[test]
    fn who_has_a_permission_is_told_that_it_is_wanted() {
        let allocator = Allocator::new(100, 3, 1, 1, 0);
        assert!(allocator.begin_collection() && !allocator.is_collection_wanted());
        assert!(!allocator.begin_collection() && allocator.is_collection_wanted());
        allocator.end_collection();
        assert!(!allocator.is_collection_wanted() && allocator.begin_collection());
    }

    #[test]
    fn survivors_leave_the_last_extent_to_the_log() {
        let allocator = Allocator::new(10, 1, 1, 1, 0);
        while allocator.take(Purpose::Data).is_some() {}
        assert!(allocator.take(Purpose::Reserve).is_some());
        allocator.count_reserve(true);
        assert_eq!((allocator.free_count(), allocator.take(Purpose::Survivors)), (1, None));
        assert!(allocator.take(Purpose::Collection).is_some());
    }

    #[test]
    fn concurrent_takers_never_share() {
        let allocator = Allocator::new(1_000, 8, 2, 1, 0);
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
