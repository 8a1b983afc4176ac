//! Ranges of frame numbers: the value of a `Retired` record, which says what of a shard's log is not needed any more.
//!
//! ```text
//! 16 bytes a range, ascending, never touching:
//!   0  8  first frame          8  8  last frame
//! ```
//!
//! The extents of retired frames may hold anything by now: they may be free, or another shard's.

use super::{FormatError, Reader};

const WHAT: &str = "retired frames";

/// Bytes of one range.
pub const FRAME_RANGE_SIZE: usize = 16;

/// Frames that the log does not need any more: disjoint ranges, both ends included.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FrameRanges {
    /// Ascending; between two of them is at least one frame.
    ranges: Vec<(u64, u64)>,
}

impl FrameRanges {
    /// The ranges, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.ranges.iter().copied()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Ranges in it.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether a frame is in one of them.
    pub fn contains(&self, frame: u64) -> bool {
        self.end_of(frame).is_some()
    }

    /// The last frame of the range that this frame is in.
    pub fn end_of(&self, frame: u64) -> Option<u64> {
        let at = self.ranges.partition_point(|(_, last)| *last < frame);
        self.ranges.get(at).filter(|(first, _)| *first <= frame).map(|(_, last)| *last)
    }

    /// Adds a range, merging it with those that it touches.
    pub fn insert(&mut self, first: u64, last: u64) {
        if first > last {
            return;
        }
        let from = self.ranges.partition_point(|(_, end)| end.saturating_add(1) < first);
        let to = self.ranges.partition_point(|(start, _)| *start <= last.saturating_add(1));
        let merged = match self.ranges.get(from..to) {
            Some([only]) => (first.min(only.0), last.max(only.1)),
            Some([head, .., tail]) => (first.min(head.0), last.max(tail.1)),
            _ => (first, last),
        };
        self.ranges.splice(from..to, [merged]);
    }

    /// Bytes that `encode` makes.
    pub fn size(&self) -> usize {
        self.ranges.len() * FRAME_RANGE_SIZE
    }

    /// The value of the record.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.size());
        for (first, last) in &self.ranges {
            out.extend_from_slice(&first.to_le_bytes());
            out.extend_from_slice(&last.to_le_bytes());
        }
        out
    }

    /// Reads the value of the record.
    pub fn decode(bytes: &[u8]) -> Result<FrameRanges, FormatError> {
        let field = |field, got| FormatError::Field { what: WHAT, field, got };
        if !bytes.len().is_multiple_of(FRAME_RANGE_SIZE) {
            return Err(field("size", bytes.len() as u64));
        }
        let mut reader = Reader::new(WHAT, bytes);
        let mut ranges = Vec::with_capacity(bytes.len() / FRAME_RANGE_SIZE);
        // Frames are numbered from 1; a gap of at least one frame is between two ranges.
        let mut lowest = 1;
        while reader.position() < bytes.len() {
            let (first, last) = (reader.u64()?, reader.u64()?);
            if first < lowest || last < first || last > u64::MAX - 2 {
                return Err(field("range", first));
            }
            lowest = last + 2;
            ranges.push((first, last));
        }
        Ok(FrameRanges { ranges })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(of: &[(u64, u64)]) -> FrameRanges {
        let mut ranges = FrameRanges::default();
        for (first, last) in of {
            ranges.insert(*first, *last);
        }
        ranges
    }

    #[test]
    fn they_merge_whatever_the_order() {
        let all = ranges(&[(5, 7), (1, 2), (9, 9), (8, 8), (3, 4), (20, 30), (25, 40), (6, 6)]);
        assert_eq!(all.ranges, [(1, 9), (20, 40)]);
        assert_eq!(ranges(&[(10, 12), (1, 3), (2, 11)]).ranges, [(1, 12)]);
        assert_eq!(ranges(&[(3, 2)]).ranges, []);
    }

    #[test]
    fn they_behave_like_a_set() {
        let mut state = 11u64;
        for _ in 0..200 {
            let (mut all, mut model) = (FrameRanges::default(), std::collections::BTreeSet::new());
            for _ in 0..20 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let (first, length) = ((state >> 40) % 60 + 1, (state >> 33) % 5);
                all.insert(first, first + length);
                model.extend(first..=first + length);
                for frame in 0..70 {
                    assert_eq!(all.contains(frame), model.contains(&frame), "{frame} in {all:?}");
                }
                assert!(all.ranges.windows(2).all(|pair| pair[0].1 + 1 < pair[1].0), "{all:?}");
                assert_eq!(FrameRanges::decode(&all.encode()).as_ref(), Ok(&all));
            }
        }
    }

    #[test]
    fn what_is_no_list_of_ranges_is_refused() {
        let bytes = ranges(&[(1, 2), (4, 9)]).encode();
        assert_eq!(bytes.len(), 32);
        for cut in [1, 15, 17, 31] {
            assert!(FrameRanges::decode(&bytes[..cut]).is_err());
        }
        for bad in [[0u64, 3], [4, 3], [1, u64::MAX]] {
            let bytes: Vec<u8> = bad.iter().flat_map(|number| number.to_le_bytes()).collect();
            assert!(FrameRanges::decode(&bytes).is_err(), "{bad:?}");
        }
        let touching: Vec<u8> = [1u64, 2, 3, 4].iter().flat_map(|number| number.to_le_bytes()).collect();
        assert!(FrameRanges::decode(&touching).is_err());
    }
}
