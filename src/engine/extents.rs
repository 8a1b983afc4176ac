//! A shard's extents: what of each is live, and how far each is on its way back to the allocator.
//!
//! Invariants:
//! - `live_bytes` of an extent is the sum of the sizes of the index entries that name it, exactly, as those have them: rounded up
//!   a little.
//! - An extent is given back only after a record that retires its frames is durable, which is logged only after everything
//!   that replaces its records is.
//!
//! An extent has either frames of the log or units of survivors. What stands in a unit comes right behind the frame that the unit
//! follows, so both have their place in one order, that of the frames.

use std::collections::BTreeMap;

use super::index::Entry;
use super::recovery::Lost;
use crate::format::Place;
use crate::format::record::RecordType;

/// One extent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    /// What its records' checksums start from.
    pub(super) place: Place,
    /// Which of its lives.
    pub(super) epoch: u64,
    /// Number of the first frame in it; of survivors, of the first unit.
    pub(super) first_frame: u64,
    /// Number of the last frame in it, or the last unit, once another extent was opened behind it.
    pub(super) last_frame: Option<u64>,
    /// Of survivors: the frames of the log that its first and its last unit follow.
    pub(super) follows: Option<(u64, u64)>,
    /// Its place among all extents of the device in the order in which they were opened; 0 where that is not known.
    pub(super) ordinal: u64,
    /// Bytes from its start that are in use.
    pub(super) end: u64,
    /// Bytes of records that the index names.
    pub(super) live_bytes: u64,
    /// Live records that count only while their batch's commit record is there.
    pub(super) live_parts: u64,
    /// Bytes of records that may have to be kept although no key names them: deletes, commit records.
    pub(super) carry_bytes: u64,
    /// Parts of batches among those: they too count only while their batch's commit record is there.
    pub(super) carry_parts: u64,
    /// A FLUSHALL is in it.
    pub(super) has_clear: bool,
    /// It came from the reserve.
    pub(super) is_reserve: bool,
    /// A write failed in it: it is not given back before a restart.
    pub(super) is_left: bool,
    /// Microseconds on the monotonic clock until when it is not collected.
    pub(super) avoid_until_us: u64,
    pub(super) state: ExtentState,
}

/// Bytes that a record counts with among those that may have to be kept although no key names them.
pub(super) fn carried_size(kind: RecordType, size: u32, value_size: u32, expires: bool) -> Option<u32> {
    match kind {
        RecordType::Delete | RecordType::Commit | RecordType::Clear => Some(size),
        RecordType::Put if expires => Some(size - value_size),
        RecordType::Put | RecordType::Retired | RecordType::Chunk => None,
    }
}

impl Extent {
    /// Counts a record that may have to be kept although no key names it. One that expires says, until every older record of
    /// its key is gone, that the key is absent, as a delete does.
    pub(super) fn count_carried(
        &mut self,
        kind: RecordType,
        is_part: bool,
        size: u32,
        value_size: u32,
        expires: bool,
    ) {
        let Some(carried) = carried_size(kind, size, value_size, expires) else { return };
        self.carry_bytes += u64::from(carried);
        self.carry_parts += u64::from(is_part && kind != RecordType::Commit);
        self.has_clear |= kind == RecordType::Clear;
    }

    /// An extent with nothing in it.
    pub(super) fn new(place: Place, epoch: u64, first_frame: u64, is_reserve: bool) -> Extent {
        Extent {
            place,
            epoch,
            first_frame,
            last_frame: None,
            follows: None,
            ordinal: 0,
            end: 0,
            live_bytes: 0,
            live_parts: 0,
            carry_bytes: 0,
            carry_parts: 0,
            has_clear: false,
            is_reserve,
            is_left: false,
            avoid_until_us: 0,
            state: ExtentState::InUse,
        }
    }

    /// Whether it has frames of the log.
    pub(super) fn is_log(&self) -> bool {
        self.follows.is_none()
    }

    /// The places in the order of frames of the first and the last thing in it.
    pub(super) fn span(&self) -> (u64, u64) {
        self.follows.unwrap_or((self.first_frame, self.last_frame.unwrap_or(u64::MAX)))
    }

    /// Whether a restart would read it.
    fn stays(&self) -> bool {
        !matches!(
            self.state,
            ExtentState::Emptied { .. } | ExtentState::Retired { .. } | ExtentState::Trimming
        )
    }

    /// How much of it, in 1/256, stands at places up to `horizon`, as if it were spread evenly.
    pub(super) fn part_up_to(&self, horizon: u64) -> u64 {
        let (first, last) = self.span();
        if horizon >= last {
            return 256;
        }
        let count = (u128::from(horizon) + 1).saturating_sub(u128::from(first));
        (count * 256 / (u128::from(last - first) + 1)) as u64
    }
}

/// How far an extent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ExtentState {
    /// In use.
    InUse,
    /// Being collected.
    Collecting,
    /// Something in it is damaged.
    Damaged(Left),
    /// Nothing in it is needed once this frame is durable.
    Emptied {
        /// The frame.
        frame: u64,
    },
    /// It is free once this frame, which says so, is durable.
    Retired {
        /// The frame.
        frame: u64,
    },
    /// It is free once the device has been told so.
    Trimming,
}

/// What is left behind in an extent that something is damaged in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// A record that can't be read and is the newest of its key: the extent is collected again once it is not any more.
    Newest(Lost),
    /// Records that nobody can name, among them deletes and the like of so many bytes: nothing else of it is needed once the index
    /// has nothing in it.
    Unread {
        /// The bytes.
        carry_bytes: u64,
    },
}

/// The lowest of some numbers of extents, and the next one.
#[derive(Debug, Clone, Copy, Default)]
struct Lowest {
    first: Option<(u64, u32)>,
    second: Option<u64>,
}

impl Lowest {
    fn add(&mut self, extent: u32, number: u64) {
        match self.first {
            Some((lowest, _)) if lowest <= number => {
                self.second = Some(self.second.map_or(number, |second| second.min(number)));
            }
            before => {
                self.second = before.map(|(lowest, _)| lowest);
                self.first = Some((number, extent));
            }
        }
    }

    /// The lowest number of any other extent than this one.
    fn but(&self, extent: u32) -> Option<u64> {
        match self.first {
            Some((_, own)) if own == extent => self.second,
            first => first.map(|(lowest, _)| lowest),
        }
    }
}

/// Where the oldest things of a shard are.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Horizons {
    /// First frames of extents of the log.
    frames: Lowest,
    /// What the first units of extents of survivors follow, and their numbers.
    follows: Lowest,
    units: Lowest,
}

impl Horizons {
    /// Up to which place in the order of frames nothing in any other extent is older than what this one has: a delete that stands
    /// there has nothing left to hide. 0 when there is no such place.
    pub(super) fn of(&self, number: u32, one: &Extent) -> u64 {
        let before_log = self.frames.but(number).map_or(u64::MAX, |first| first.saturating_sub(1));
        let before_units = match one.is_log() {
            true => self.follows.but(number).unwrap_or(u64::MAX),
            // Units stand in the order of their numbers.
            false if self.units.but(number).is_none_or(|first| first > one.first_frame) => u64::MAX,
            false => 0,
        };
        before_log.min(before_units)
    }
}

/// All extents of a shard.
#[derive(Debug, Default)]
pub(super) struct Extents {
    all: BTreeMap<u32, Extent>,
    /// Extents in the states `Emptied`, `Retired` and `Trimming`.
    pub(super) leaving: Vec<u32>,
}

impl Extents {
    pub(super) fn get(&self, number: u32) -> Option<&Extent> {
        self.all.get(&number)
    }

    pub(super) fn get_mut(&mut self, number: u32) -> Option<&mut Extent> {
        self.all.get_mut(&number)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Extent)> {
        self.all.iter().map(|(number, extent)| (*number, extent))
    }

    pub(super) fn add(&mut self, number: u32, extent: Extent) {
        self.all.insert(number, extent);
    }

    pub(super) fn remove(&mut self, number: u32) -> Option<Extent> {
        self.leaving.retain(|one| *one != number);
        self.all.remove(&number)
    }

    /// The extent of the log that is being filled; every other one has ended.
    pub(super) fn open(
        &mut self,
        number: u32,
        place: Place,
        epoch: u64,
        first_frame: u64,
        is_reserve: bool,
    ) -> &mut Extent {
        if !self.all.contains_key(&number) {
            for other in self.all.values_mut().filter(|other| other.is_log() && other.last_frame.is_none()) {
                other.last_frame = Some(first_frame - 1);
            }
        }
        self.all.entry(number).or_insert(Extent::new(place, epoch, first_frame, is_reserve))
    }

    /// The extent of survivors that was being filled has ended with this unit.
    pub(super) fn close_survivors(&mut self, last_unit: u64) {
        for one in self.all.values_mut().filter(|one| !one.is_log() && one.last_frame.is_none()) {
            one.last_frame = Some(last_unit);
        }
    }

    /// An entry is in the index now.
    pub(super) fn on_entry(&mut self, entry: &Entry) {
        if let Some(extent) = self.all.get_mut(&entry.extent) {
            extent.live_bytes += u64::from(entry.size());
            extent.live_parts += u64::from(entry.is_part);
        }
    }

    /// One more than the highest number of an extent.
    pub(super) fn number_end(&self) -> usize {
        self.all.last_key_value().map_or(0, |(number, _)| *number as usize + 1)
    }

    /// Entries are in the index now: of each extent by its number, their bytes, and how many of them are parts of batches.
    pub(super) fn add_live(&mut self, live: &[(u64, u64)]) {
        for (number, extent) in &mut self.all {
            if let Some((bytes, parts)) = live.get(*number as usize) {
                extent.live_bytes += bytes;
                extent.live_parts += parts;
            }
        }
    }

    /// An entry is in the index no more.
    pub(super) fn on_gone(&mut self, entry: &Entry) {
        if let Some(extent) = self.all.get_mut(&entry.extent) {
            extent.live_bytes -= u64::from(entry.size());
            extent.live_parts -= u64::from(entry.is_part);
        }
    }

    /// Every entry has gone from the index.
    pub(super) fn on_clear(&mut self) {
        for extent in self.all.values_mut() {
            (extent.live_bytes, extent.live_parts) = (0, 0);
        }
    }

    /// The extent that holds the oldest of what a restart would read.
    pub(super) fn oldest(&self) -> Option<u32> {
        let stay = self.all.iter().filter(|(_, one)| one.stays());
        stay.min_by_key(|(_, one)| (one.span().0, one.first_frame)).map(|(number, _)| *number)
    }

    /// Bytes of what has to be kept although no key names it, and bytes in use.
    pub(super) fn burden(&self) -> (u64, u64) {
        let stay = self.all.values().filter(|one| one.stays());
        stay.fold((0, 0), |(carried, used), one| (carried + one.carry_bytes, used + one.end))
    }

    /// Where the oldest things of the shard are.
    pub(super) fn horizons(&self) -> Horizons {
        let mut out = Horizons::default();
        for (number, one) in self.all.iter().filter(|(_, one)| one.stays()) {
            match one.follows {
                None => out.frames.add(*number, one.first_frame),
                Some((first, _)) => {
                    out.follows.add(*number, first);
                    out.units.add(*number, one.first_frame);
                }
            }
        }
        out
    }

    /// The frames that go with an extent of the log. The last one in it may be in the next extent too, after a failed write, and
    /// then belongs there.
    pub(super) fn frames_of(&self, number: u32) -> Option<(u64, u64)> {
        let one = self.get(number).filter(|one| one.is_log())?;
        let end = |of: &Extent| of.last_frame.unwrap_or(u64::MAX);
        let is_behind = |other: &&Extent| {
            other.is_log()
                && (other.first_frame > one.first_frame
                    || (other.first_frame == one.first_frame && end(other) > end(one)))
        };
        let next = self.all.values().filter(is_behind).map(|other| other.first_frame).min();
        Some((one.first_frame, one.last_frame?.min(next.map_or(u64::MAX, |next| next - 1))))
    }

    /// The units that go with an extent of survivors.
    pub(super) fn units_of(&self, number: u32) -> Option<(u64, u64)> {
        let one = self.get(number).filter(|one| !one.is_log())?;
        Some((one.first_frame, one.last_frame?))
    }

    /// Whether another extent has records that a commit record in this one may decide.
    pub(super) fn has_older_parts(&self, number: u32) -> bool {
        let Some(one) = self.get(number) else { return false };
        let has_parts = |other: &Extent| other.live_parts + other.carry_parts > 0;
        let is_older = |other: &Extent| match one.follows {
            None => other.span().0 < one.first_frame,
            Some((_, last)) => other.span().0 <= last,
        };
        self.all.iter().any(|(other, extent)| *other != number && is_older(extent) && has_parts(extent))
    }

    /// Whether everything in an extent stands before a frame that is in `of`, and not in that extent itself.
    pub(super) fn is_before(&self, number: u32, of: u32, frame: u64) -> bool {
        let (Some(one), Some(of)) = (self.get(number), self.get(of)) else { return false };
        match one.follows {
            None => one.first_frame < of.first_frame,
            Some((_, last)) => one.last_frame.is_some() && last < frame,
        }
    }

    /// Nothing in an extent is needed once a frame is durable.
    pub(super) fn empty(&mut self, number: u32, frame: u64) {
        if let Some(extent) = self.all.get_mut(&number) {
            extent.state = ExtentState::Emptied { frame };
            self.leaving.push(number);
        }
    }

    /// Nothing in these extents is needed: they are free once this frame, which says so, is durable.
    pub(super) fn retire_all(&mut self, which: impl Fn(&Extent) -> bool, frame: u64) {
        for (number, one) in self.all.iter_mut().filter(|(_, one)| one.stays() && which(one)) {
            one.state = ExtentState::Retired { frame };
            self.leaving.push(*number);
        }
    }

    /// A collection of an extent has come to its end: nothing in it is needed once a frame is durable, unless something is left.
    pub(super) fn end(&mut self, number: u32, left: Option<Left>, frame: u64) {
        match (left, self.all.get_mut(&number)) {
            (Some(left), Some(extent)) => extent.state = ExtentState::Damaged(left),
            (_, _) => self.empty(number, frame),
        }
    }

    /// A frame went to another extent, and with it whatever follows it: extents that were opened for what follows are void.
    pub(super) fn on_relocated(&mut self, left: u32, frame: u64) {
        self.all.retain(|_, one| !one.is_log() || one.first_frame < frame);
        let ends_behind = |one: &&mut Extent| one.is_log() && one.last_frame.is_none_or(|last| last >= frame);
        for one in self.all.values_mut().filter(ends_behind) {
            one.last_frame = Some(frame - 1);
        }
        if let Some(extent) = self.all.get_mut(&left) {
            extent.is_left = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::slot::ShardId;

    fn extents(first_frames: &[(u32, u64)]) -> Extents {
        let mut extents = Extents::default();
        for (number, first_frame) in first_frames {
            let place = Place::new(&[1; 16], &[2; 16], ShardId(0), *number, 1);
            extents.open(*number, place, 1, *first_frame, false);
        }
        extents
    }

    #[test]
    fn the_next_extent_ends_this_one_whatever_their_numbers() {
        let extents = extents(&[(7, 1), (3, 11), (9, 30)]);
        let last = |number: u32| extents.get(number).unwrap().last_frame;
        assert_eq!([7, 3, 9].map(last), [Some(10), Some(29), None]);
        let mut extents = extents;
        extents.get_mut(7).unwrap().last_frame = Some(11);
        assert_eq!([7, 3, 9].map(|number| extents.frames_of(number)), [Some((1, 10)), Some((11, 29)), None]);
        // Only one frame, which is in the next extent again: nothing of it may be retired.
        let one = *extents.get(9).unwrap();
        extents.add(2, Extent { last_frame: Some(30), ..one });
        assert_eq!(extents.frames_of(2), Some((30, 29)));
    }

    #[test]
    fn a_frame_that_went_elsewhere_takes_what_follows_along() {
        let mut extents = extents(&[(7, 1), (3, 11), (9, 30)]);
        extents.on_relocated(3, 29);
        assert!(extents.get(9).is_none() && extents.get(3).is_some_and(|one| one.is_left));
        let place = extents.get(3).unwrap().place;
        extents.open(5, place, 1, 29, false);
        let last = |number: u32| extents.get(number).unwrap().last_frame;
        assert_eq!([7, 3, 5].map(last), [Some(10), Some(28), None]);
    }

    #[test]
    fn what_is_leaving_is_no_older_extent() {
        let mut extents = extents(&[(7, 1), (3, 11), (9, 30)]);
        assert_eq!(extents.oldest(), Some(7));
        extents.empty(7, 40);
        assert_eq!(extents.oldest(), Some(3));
        extents.get_mut(3).unwrap().live_parts = 1;
        assert!(extents.has_older_parts(9) && !extents.has_older_parts(3));
        assert!(extents.remove(7).is_some() && extents.leaving.is_empty());
    }

    fn survivors(extents: &mut Extents, number: u32, units: (u64, u64), follows: (u64, u64)) {
        let place = Place::new(&[1; 16], &[2; 16], ShardId(0), number, 1);
        let one = Extent::new(place, 1, units.0, false);
        extents.add(number, Extent { last_frame: Some(units.1), follows: Some(follows), ..one });
    }

    #[test]
    fn what_is_older_than_everything_else_is_told_across_both_kinds() {
        let mut extents = extents(&[(7, 1), (3, 11), (9, 30)]);
        survivors(&mut extents, 20, (1, 4), (5, 25));
        survivors(&mut extents, 21, (5, 6), (25, 28));
        let horizon = |extents: &Extents, number: u32| {
            let one = extents.get(number).unwrap();
            let horizon = extents.horizons().of(number, one);
            (horizon, one.part_up_to(horizon))
        };
        // Frames 1 to 10: what stands behind frame 5 may be older than those behind it.
        assert_eq!(horizon(&extents, 7), (5, 128));
        // Older frames are in extent 7.
        assert_eq!(horizon(&extents, 3), (0, 0));
        assert_eq!(horizon(&extents, 20), (0, 0));
        extents.empty(7, 40);
        // Units behind frame 5 to 25, and frame 11 is somewhere else.
        assert_eq!(horizon(&extents, 20), (10, 256 * 6 / 21));
        assert_eq!(horizon(&extents, 21), (0, 0), "units of extent 20 are older");
        extents.empty(3, 41);
        assert_eq!(horizon(&extents, 20), (29, 256));
        extents.empty(20, 42);
        assert_eq!(horizon(&extents, 21), (29, 256));
        // The open extent of the log: nothing stands before its first frame but those units.
        assert_eq!(horizon(&extents, 9).0, 25);
        assert_eq!(extents.oldest(), Some(21));
    }

    #[test]
    fn units_are_no_frames() {
        let mut extents = extents(&[(7, 1), (3, 11)]);
        survivors(&mut extents, 20, (1, 4), (5, 9));
        assert_eq!((extents.frames_of(20), extents.units_of(20)), (None, Some((1, 4))));
        assert_eq!((extents.frames_of(7), extents.units_of(7)), (Some((1, 10)), None));
        // Before a FLUSHALL in frame 10 of extent 7, not before one in frame 9.
        assert!(extents.is_before(20, 7, 10) && !extents.is_before(20, 7, 9));
        assert!(extents.is_before(7, 3, 12) && !extents.is_before(3, 3, 12));
        extents.get_mut(7).unwrap().live_parts = 1;
        assert!(extents.has_older_parts(20) && extents.has_older_parts(3) && !extents.has_older_parts(7));
        // A frame of the log that goes elsewhere leaves units where they are, whatever their numbers.
        extents.on_relocated(3, 2);
        assert!(extents.get(3).is_none() && extents.get(20).is_some_and(|one| one.last_frame == Some(4)));
    }

    #[test]
    fn live_bytes_follow_the_entries() {
        let mut extents = extents(&[(7, 1)]);
        let entry = Entry::new(7, 4096, 100, false, true, false);
        extents.on_entry(&entry);
        extents.on_entry(&Entry::new(7, 5000, 20, false, false, false));
        let one = extents.get(7).unwrap();
        assert_eq!((one.live_bytes, one.live_parts), (120, 1));
        extents.on_gone(&entry);
        let one = extents.get(7).unwrap();
        assert_eq!((one.live_bytes, one.live_parts), (20, 0));
    }
}
