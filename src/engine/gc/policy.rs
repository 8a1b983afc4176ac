//! Which extent to collect next: a pure function of what is known about each.
//!
//! Cost and benefit, as in Rosenblum and Ousterhout's log-structured file system (SOSP 1991): what a collection frees for what it
//! reads and writes, times the age. What is old and still live will be live for long, so what it frees stays free for long;
//! in what is young more dies for nothing. The age counts by its square root: in a model with 2,048 extents, 70 % full, that moves as
//! little as greedy does under uniform overwrites (1.93 bytes written for each byte put, by either) and 40 % less
//! under Zipf-distributed ones (1.71 rather than 2.17).
//!
//! Deletes and commit records can be dropped only once everything older is gone. So every now and then, where there are many, it is
//! the oldest extent's turn.

/// An extent that may be collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) struct Candidate {
    /// Its shard, among those of the engine.
    pub(in crate::engine) shard: usize,
    /// Its number.
    pub(in crate::engine) extent: u32,
    /// Bytes that it gives back.
    pub(in crate::engine) size: u64,
    /// Bytes of it that count: without what is left at its end because nothing fitted there.
    pub(in crate::engine) used: u64,
    /// Bytes of live records.
    pub(in crate::engine) live: u64,
    /// Bytes of deletes and commit records that have to be kept.
    pub(in crate::engine) carry: u64,
    /// Bytes of those that have not: what they could matter to is gone.
    pub(in crate::engine) dropped: u64,
    /// Extents that were opened since.
    pub(in crate::engine) age: u64,
    /// It has the oldest of what there is in its shard, where there is much that could be dropped if it were gone.
    pub(in crate::engine) is_oldest: bool,
}

/// A collection that frees less than this part of an extent is not worth what it moves.
const GAIN_MIN_DIVISOR: u64 = 16;

impl Candidate {
    /// Bytes that have to be moved.
    pub(in crate::engine) fn cost(&self) -> u64 {
        (self.live + self.carry).min(self.size)
    }

    /// Bytes that are free afterwards and are not now.
    pub(in crate::engine) fn gain(&self) -> u64 {
        self.used.saturating_sub(self.cost())
    }

    /// Whether it frees enough.
    pub(in crate::engine) fn is_worth_it(&self) -> bool {
        self.gain() >= self.size / GAIN_MIN_DIVISOR
    }
}

/// What a collection frees for what it takes, and how long that is good for: the square of it.
fn worth(one: &Candidate) -> f64 {
    let part = one.gain() as f64 / (one.size + one.cost()) as f64;
    part * part * one.age.max(1) as f64
}

/// Chooses the next extent. With `oldest`, one that is the oldest of its shard, if any is worth it.
pub(in crate::engine) fn pick(candidates: &[Candidate], oldest: bool) -> Option<Candidate> {
    let all = || candidates.iter().filter(|one| one.is_worth_it());
    let better = |one: &&Candidate, other: &&Candidate| {
        worth(one).total_cmp(&worth(other)).then(other.extent.cmp(&one.extent))
    };
    let of_oldest = all().filter(|one| one.is_oldest && one.dropped > 0).max_by(better);
    of_oldest.filter(|_| oldest).or_else(|| all().max_by(better)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1600;

    fn candidate(extent: u32, live: u64, carry: u64, is_oldest: bool) -> Candidate {
        let (carry, dropped) = if is_oldest { (0, carry) } else { (carry, 0) };
        Candidate { shard: 0, extent, size: SIZE, used: SIZE, live, carry, dropped, age: 16, is_oldest }
    }

    #[test]
    fn age_makes_up_for_what_is_live() {
        let of = |extent: u32, live: u64, age: u64| Candidate { age, ..candidate(extent, live, 0, false) };
        let table: &[(&[Candidate], u32)] = &[
            // Half of it free, against a third of it free that was so four times as long.
            (&[of(1, 800, 1), of(2, 800, 2)], 2),
            (&[of(1, 800, 10), of(2, 1_060, 20)], 1),
            (&[of(1, 800, 10), of(2, 1_060, 40)], 2),
            // Hardly anything is gained, however old it is.
            (&[of(1, 800, 1), of(2, 1_550, 1 << 40)], 1),
            // One that was opened just now can be the only one.
            (&[of(1, 800, 0)], 1),
        ];
        for (candidates, expected) in table {
            assert_eq!(pick(candidates, false).map(|one| one.extent), Some(*expected), "{candidates:?}");
        }
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
    fn room_that_nothing_fits_into_is_no_gain() {
        let full = Candidate { used: 1_200, ..candidate(1, 1_190, 0, false) };
        assert!(!full.is_worth_it() && Candidate { used: SIZE, ..full }.is_worth_it());
    }

    #[test]
    fn more_live_bytes_than_the_extent_has_do_not_wrap() {
        assert_eq!(candidate(1, SIZE, SIZE, false).gain(), 0);
    }
}
