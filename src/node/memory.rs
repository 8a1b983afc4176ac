//! One ceiling over a node's memory: who gets how much of it, and what happens when it runs short.
//!
//! Everything that a node takes is in one of three parts. The *index* (with the expiries) grows with the keys and can't be
//! given up: beyond its part, writes of new keys are refused. *Traffic* is everything that comes and goes with requests
//! (connections, arguments, replies, values on their way, buffers): beyond its part sockets are not read and new connections
//! are refused, and if that does not help, the connection that holds the most is closed. The *cache* gets the rest.
//!
//! Traffic is not added up from what is known of it: it is all of the heap, which the allocator counts, but index and cache.
//! So nothing can be forgotten.
//!
//! Invariant: the parts at their bounds, and what a reactor takes between two looks, are less than the ceiling.

use std::sync::atomic::{AtomicU64, Ordering};

use super::shared::{Figures, Shared};
use crate::engine::memory::{MemoryBudget, MemoryUse};
use crate::limits::{ENGINE_READ_SIZE_MAX, MEMORY_PER_REACTOR_MIN, MEMORY_SIZE_MIN};
use crate::sys::heap;

/// The smallest ceiling for so many reactors: their buffers alone take a part of it.
pub fn memory_size_min(reactor_count: usize) -> u64 {
    MEMORY_SIZE_MIN + MEMORY_PER_REACTOR_MIN * reactor_count as u64
}

/// How long memory may be short before the connection that holds the most is closed.
const STUCK_TIME_US: u64 = 500_000;

/// How long it may go on until the next one is.
const EVICTION_INTERVAL_US: u64 = 20_000;

/// How short memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Pressure {
    /// There is enough.
    #[default]
    None,
    /// Nothing more is read from clients.
    Short,
    /// Connections are closed, those that hold the most first.
    Exhausted,
}

/// The ceiling and the parts that it is divided into: a pure function of its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The ceiling.
    pub size_max: u64,
    reactor_count: u64,
}

impl MemoryPlan {
    /// The plan of a node.
    pub fn new(size_max: u64, reactor_count: usize) -> MemoryPlan {
        MemoryPlan { size_max, reactor_count: reactor_count.max(1) as u64 }
    }

    /// Bytes that the index may have: half.
    pub fn index_size_max(&self) -> u64 {
        self.size_max / 2
    }

    /// Bytes of traffic at which memory is short: a quarter.
    pub fn traffic_size_max(&self) -> u64 {
        self.size_max / 4
    }

    /// Bytes of traffic at which connections are closed. What is left above it, together with what the cache leaves free,
    /// is for the allocator's own losses and for the program itself.
    pub fn traffic_size_exhausted(&self) -> u64 {
        self.size_max / 16 * 5
    }

    /// Bytes of a value that may be brought or read in one piece: half of the traffic, since what is read is beside what was
    /// there before.
    pub fn long_value_size_max(&self) -> u64 {
        self.traffic_size_max() / 2
    }

    /// Bytes of keys that the walks of one reactor may have found: a quarter of its traffic, since they are written out beside.
    pub fn found_size_max(&self) -> u64 {
        self.traffic_size_max() / self.reactor_count / 4
    }

    /// Bytes that the cache of the whole node may have beside an index of this size.
    pub fn cache_size_max(&self, index: u64) -> u64 {
        (self.size_max / 8 * 5).saturating_sub(index)
    }

    /// How short memory is at so much traffic.
    pub fn pressure(&self, traffic: u64) -> Pressure {
        if traffic >= self.traffic_size_exhausted() {
            Pressure::Exhausted
        } else if traffic >= self.traffic_size_max() {
            Pressure::Short
        } else {
            Pressure::None
        }
    }

    /// What one reactor's engine may take.
    pub fn budget(&self, index: u64, pressure: Pressure) -> MemoryBudget {
        let traffic_share = self.traffic_size_max() / self.reactor_count;
        // Steps, so that an index that grows by and by does not move the cache's bound on every loop.
        let step = (self.size_max / 256).max(1);
        let cache = self.cache_size_max(index) / step * step;
        let reads = ENGINE_READ_SIZE_MAX.min(traffic_share as usize / 8);
        MemoryBudget {
            cache_size_max: (cache / self.reactor_count) as usize,
            index_may_grow: index < self.index_size_max(),
            reads_size_max: if pressure == Pressure::None { reads } else { 0 },
            batch_values_size_max: traffic_share / 2,
            long_value_size_max: self.long_value_size_max(),
            long_reads_size_max: if pressure == Pressure::None { self.long_value_size_max() } else { 0 },
        }
    }
}

/// A reactor's view of the node's memory. `refresh` looks once a loop; in between, `pressure` costs one load.
#[derive(Debug)]
pub(super) struct MemoryView {
    plan: MemoryPlan,
    /// Index and cache of all reactors, when last looked.
    kept: u64,
    /// Since when, on the monotonic clock, memory has been short without an end.
    short_since_us: Option<u64>,
    is_stuck: bool,
}

impl MemoryView {
    pub(super) fn new(plan: MemoryPlan) -> MemoryView {
        MemoryView { plan, kept: 0, short_since_us: None, is_stuck: false }
    }

    /// Publishes what this reactor takes, and says what its engine may take.
    pub(super) fn refresh(
        &mut self,
        shared: &Shared,
        own: &Figures,
        used: MemoryUse,
        now_us: u64,
    ) -> MemoryBudget {
        let set = |figure: &AtomicU64, value| figure.store(value, Ordering::Relaxed);
        set(&own.cache_memory, used.cache);
        set(&own.index_memory, used.index);
        set(&own.log_memory, used.log);
        set(&own.reads_memory, used.reads);
        let index = shared.sum(|figures| &figures.index_memory);
        self.kept = index + shared.sum(|figures| &figures.cache_memory);
        let pressure = self.pressure();
        self.is_stuck = false;
        if pressure == Pressure::None {
            self.short_since_us = None;
        } else if now_us.saturating_sub(*self.short_since_us.get_or_insert(now_us)) >= STUCK_TIME_US {
            self.is_stuck = true;
            // Each connection that is closed gets the time to make a difference.
            self.short_since_us = Some(now_us.saturating_sub(STUCK_TIME_US - EVICTION_INTERVAL_US));
        }
        self.plan.budget(index, pressure)
    }

    /// Whether connections are to be closed: memory is exhausted, or what is short is held by clients that do not go on. Who
    /// is not read can't even be seen to have left.
    pub(super) fn must_evict(&self) -> bool {
        let pressure = self.pressure();
        pressure == Pressure::Exhausted || (self.is_stuck && pressure == Pressure::Short)
    }

    /// How short memory is just now.
    pub(super) fn pressure(&self) -> Pressure {
        heap::allocated().map_or(Pressure::None, |heap| self.plan.pressure(heap.saturating_sub(self.kept)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_fit_under_the_ceiling() {
        for reactor_count in [1, 2, 7, 64] {
            for size_max in [memory_size_min(reactor_count), 3 << 30, 100 << 30] {
                let plan = MemoryPlan::new(size_max, reactor_count);
                for index in [0, plan.index_size_max() / 3, plan.index_size_max()] {
                    let budget = plan.budget(index, Pressure::None);
                    let cache = (budget.cache_size_max * reactor_count) as u64;
                    let sum = index + cache + plan.traffic_size_exhausted();
                    assert!(sum <= size_max / 16 * 15, "{size_max} {reactor_count} {index}: {sum}");
                    // Even beside the largest index there is a cache.
                    assert!(cache > size_max / 16);
                    assert!(budget.reads_size_max >= 1 << 20);
                }
            }
        }
    }

    #[test]
    fn what_is_refused_follows_from_what_is_used() {
        let plan = MemoryPlan::new(1 << 30, 2);
        assert!(plan.budget((512 << 20) - 1, Pressure::None).index_may_grow);
        assert!(!plan.budget(512 << 20, Pressure::None).index_may_grow);
        assert_eq!(plan.budget(0, Pressure::Short).reads_size_max, 0);
        assert_eq!(plan.pressure((256 << 20) - 1), Pressure::None);
        assert_eq!(plan.pressure(256 << 20), Pressure::Short);
        assert_eq!(plan.pressure(320 << 20), Pressure::Exhausted);
        assert!(
            plan.budget(100 << 20, Pressure::None).cache_size_max
                < plan.budget(0, Pressure::None).cache_size_max
        );
    }
}
