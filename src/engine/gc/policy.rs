//! Which extent to collect next: a pure function of what is known about each.
//!
//! Greedy: the one that frees the most for what must be moved. Greedy alone would never look at an old extent that is almost
//! all live; but deletes and commit records can be dropped only once everything older is gone, so every now and then it is the
//! oldest extent's turn.

/// An extent that may be collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) struct Candidate {
    /// Its shard, among those of the engine.
    pub(in crate::engine) shard: usize,
    /// Its number.
    pub(in crate::engine) extent: u32,
    /// Bytes that it gives back.
    pub(in crate::engine) size: u64,
    /// Bytes of live records.
    pub(in crate::engine) live: u64,
    /// Bytes of deletes and commit records.
    pub(in crate::engine) carry: u64,
    /// Nothing older is left in its shard.
    pub(in crate::engine) is_oldest: bool,
}

/// A collection that frees less than this part of an extent is not worth what it moves.
const GAIN_MIN_DIVISOR: u64 = 16;

impl Candidate {
    /// Bytes that have to be moved.
    pub(in crate::engine) fn cost(&self) -> u64 {
        let carry = if self.is_oldest { 0 } else { self.carry };
        (self.live + carry).min(self.size)
    }

    /// Bytes that are free afterwards and are not now.
    pub(in crate::engine) fn gain(&self) -> u64 {
        self.size - self.cost()
    }

    /// Whether it frees enough.
    pub(in crate::engine) fn is_worth_it(&self) -> bool {
        self.gain() >= self.size / GAIN_MIN_DIVISOR
    }
}

/// Chooses the next extent. With `oldest`, one that is the oldest of its shard, if any is worth it.
pub(in crate::engine) fn pick(candidates: &[Candidate], oldest: bool) -> Option<Candidate> {
    let worth = || candidates.iter().filter(|one| one.is_worth_it());
    let best = |one: &&Candidate| (one.gain(), u32::MAX - one.extent);
    let of_oldest = worth().filter(|one| one.is_oldest && one.carry > 0).max_by_key(best);
    of_oldest.filter(|_| oldest).or_else(|| worth().max_by_key(best)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1600;

    fn candidate(extent: u32, live: u64, carry: u64, is_oldest: bool) -> Candidate {
        Candidate { shard: 0, extent, size: SIZE, live, carry, is_oldest }
    }

    #[test]
    fn picks() {
        let dead = candidate(1, 0, 0, false);
        let half = candidate(2, 800, 0, false);
        let full = candidate(3, 1_550, 0, false);
        let deletes = candidate(4, 0, 1_550, false);
        let old_deletes = candidate(5, 0, 1_550, true);
        let old = candidate(6, 1_000, 20, true);
        let table: &[(&[Candidate], bool, Option<u32>)] = &[
            (&[], false, None),
            (&[full], false, None),
            (&[half, full], false, Some(2)),
            (&[half, dead, full], false, Some(1)),
            // Deletes count as live until nothing older is left.
            (&[deletes], false, None),
            (&[half, deletes], false, Some(2)),
            (&[half, old_deletes], false, Some(5)),
            // The oldest one's turn.
            (&[half, dead, old], true, Some(6)),
            (&[half, dead, full], true, Some(1)),
            (&[candidate(7, 800, 0, false), half], false, Some(2)),
        ];
        for (candidates, oldest, expected) in table {
            assert_eq!(pick(candidates, *oldest).map(|one| one.extent), *expected, "{candidates:?} {oldest}");
        }
    }

    #[test]
    fn more_live_bytes_than_the_extent_has_do_not_wrap() {
        assert_eq!(candidate(1, SIZE, SIZE, false).gain(), 0);
    }
}
