//! The value of a `Retired` record: what of a shard's log and of its units is not needed any more, and how far its units are
//! known to be durable.
//!
//! ```text
//! a shard that never had units:   ranges of frames, see [`super::frame_ranges`]
//! others:    0  8  all ones: no frame has this number
//!            8  8  number of ranges of frames
//!           16  8  units up to this one are durable
//!           24  8  epoch: units behind that one count only in extents of this or a later life
//!           32     ranges of frames, then ranges of units, 16 bytes each
//! ```

use super::frame_ranges::{FRAME_RANGE_SIZE, FrameRanges};
use super::{FormatError, Reader};

const WHAT: &str = "retirement";
const EXTENDED: u64 = u64::MAX;
const EXTENDED_SIZE: usize = 32;

/// How far a shard's units are known to be durable.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct UnitMark {
    /// Units up to this one are durable; 0 before the first.
    pub last: u64,
    /// Later ones count only in extents whose epoch is at least this: what an earlier start, or an attempt that failed, may have
    /// left behind is void.
    pub epoch: u64,
}

impl UnitMark {
    /// Whether a unit in an extent of this epoch is void.
    pub fn voids(&self, unit: u64, epoch: u64) -> bool {
        unit > self.last && epoch < self.epoch
    }
}

/// What is not needed any more.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Retirement {
    /// Frames of the log.
    pub frames: FrameRanges,
    /// Units.
    pub units: FrameRanges,
    /// How far the units are known to be durable.
    pub mark: UnitMark,
}

impl Retirement {
    /// Whether nothing of a log is retired.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty() && self.units.is_empty()
    }

    fn is_plain(&self) -> bool {
        self.units.is_empty() && self.mark == UnitMark::default()
    }

    /// Bytes that `encode` makes.
    pub fn size(&self) -> usize {
        let extension = if self.is_plain() { 0 } else { EXTENDED_SIZE };
        extension + self.frames.size() + self.units.size()
    }

    /// The value of the record.
    pub fn encode(&self) -> Vec<u8> {
        if self.is_plain() {
            return self.frames.encode();
        }
        let mut out = Vec::with_capacity(self.size());
        for number in [EXTENDED, self.frames.len() as u64, self.mark.last, self.mark.epoch] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.frames.encode());
        out.extend_from_slice(&self.units.encode());
        out
    }

    /// Reads the value of the record.
    pub fn decode(bytes: &[u8]) -> Result<Retirement, FormatError> {
        let mut reader = Reader::new(WHAT, bytes);
        if bytes.len() < EXTENDED_SIZE || reader.u64()? != EXTENDED {
            return Ok(Retirement { frames: FrameRanges::decode(bytes)?, ..Retirement::default() });
        }
        let count = reader.u64()?;
        let mark = UnitMark { last: reader.u64()?, epoch: reader.u64()? };
        let rest = &bytes[EXTENDED_SIZE..];
        let size = usize::try_from(count).ok().and_then(|count| count.checked_mul(FRAME_RANGE_SIZE));
        let Some((frames, units)) = size.and_then(|size| rest.split_at_checked(size)) else {
            return Err(FormatError::Field { what: WHAT, field: "number of ranges", got: count });
        };
        Ok(Retirement { frames: FrameRanges::decode(frames)?, units: FrameRanges::decode(units)?, mark })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(of: &[(u64, u64)]) -> FrameRanges {
        let mut ranges = FrameRanges::default();
        of.iter().for_each(|(first, last)| ranges.insert(*first, *last));
        ranges
    }

    fn whole() -> Retirement {
        let mark = UnitMark { last: 9, epoch: 1 << 33 };
        Retirement { frames: ranges(&[(1, 4), (9, 9)]), units: ranges(&[(2, 3)]), mark }
    }

    #[test]
    fn round_trips_with_and_without_units() {
        let plain = Retirement { frames: ranges(&[(1, 4), (9, 9)]), ..Retirement::default() };
        // As versions without units wrote it.
        assert_eq!(plain.encode(), plain.frames.encode());
        let marked = Retirement { mark: UnitMark { last: 0, epoch: 7 }, ..Retirement::default() };
        for one in [Retirement::default(), plain, whole(), marked] {
            assert_eq!(one.encode().len(), one.size());
            assert_eq!(Retirement::decode(&one.encode()), Ok(one));
        }
    }

    #[test]
    fn other_bytes_are_refused_and_never_panic() {
        let bytes = whole().encode();
        for cut in 0..bytes.len() {
            assert!(Retirement::decode(&bytes[..cut]) != Ok(whole()), "cut at {cut}");
        }
        for count in [3, 4, u64::MAX, u64::MAX / 16 + 1] {
            let mut lie = bytes.clone();
            lie[8..16].copy_from_slice(&u64::to_le_bytes(count));
            assert!(Retirement::decode(&lie).is_err(), "{count}");
        }
    }

    #[test]
    fn a_mark_voids_what_is_behind_it_in_earlier_lives() {
        let mark = UnitMark { last: 9, epoch: 5 };
        let voids = |unit, epoch| mark.voids(unit, epoch);
        assert_eq!([voids(9, 4), voids(10, 4), voids(10, 5), voids(10, 6)], [false, true, false, false]);
    }
}
