//! A shard's extents: what of each is live, and how far each is on its way back to the allocator.
//!
//! Invariants:
//! - `live_bytes` of an extent is the sum of the sizes of the index entries that name it, exactly, as those have them: rounded up
//!   a little.
//! - An extent is given back only after a record that retires its frames is durable, which is logged only after everything
//!   that replaces its records is.

use std::collections::BTreeMap;

use super::index::Entry;
use crate::format::Place;
use crate::format::record::RecordType;

/// One extent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    /// What its records' checksums start from.
    pub(super) place: Place,
    /// Which of its lives.
    pub(super) epoch: u64,
    /// Number of the first frame in it.
    pub(super) first_frame: u64,
    /// Number of the last frame in it, once another extent was opened behind it.
    pub(super) last_frame: Option<u64>,
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
        let carried = match kind {
            RecordType::Delete | RecordType::Commit | RecordType::Clear => size,
            RecordType::Put if expires => size - value_size,
            RecordType::Put | RecordType::Retired | RecordType::Chunk => return,
        };
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
}

/// How far an extent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ExtentState {
    /// In use.
    InUse,
    /// Being collected.
    Collecting,
    /// It can't be collected: something in it is damaged.
    Damaged,
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

    /// The extent that is being filled; every other one has ended.
    pub(super) fn open(
        &mut self,
        number: u32,
        place: Place,
        epoch: u64,
        first_frame: u64,
        is_reserve: bool,
    ) -> &mut Extent {
        if !self.all.contains_key(&number) {
            for other in self.all.values_mut().filter(|other| other.last_frame.is_none()) {
                other.last_frame = Some(first_frame - 1);
            }
        }
        self.all.entry(number).or_insert(Extent::new(place, epoch, first_frame, is_reserve))
    }

    /// An entry is in the index now.
    pub(super) fn on_entry(&mut self, entry: &Entry) {
        if let Some(extent) = self.all.get_mut(&entry.extent) {
            extent.live_bytes += u64::from(entry.size());
            extent.live_parts += u64::from(entry.is_part);
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

    /// The oldest extent that holds anything a restart would read.
    pub(super) fn oldest(&self) -> Option<u32> {
        let stays = |one: &&Extent| {
            !matches!(
                one.state,
                ExtentState::Emptied { .. } | ExtentState::Retired { .. } | ExtentState::Trimming
            )
        };
        let stay = self.all.iter().filter(|(_, one)| stays(one));
        stay.min_by_key(|(_, one)| one.first_frame).map(|(number, _)| *number)
    }

    /// The frames that go with an extent. The last one in it may be in the next extent too, after a failed write, and then
    /// belongs there.
    pub(super) fn frames_of(&self, number: u32) -> Option<(u64, u64)> {
        let one = self.get(number)?;
        let end = |of: &Extent| of.last_frame.unwrap_or(u64::MAX);
        let is_behind = |other: &&Extent| {
            other.first_frame > one.first_frame
                || (other.first_frame == one.first_frame && end(other) > end(one))
        };
        let next = self.all.values().filter(is_behind).map(|other| other.first_frame).min();
        Some((one.first_frame, one.last_frame?.min(next.map_or(u64::MAX, |next| next - 1))))
    }

    /// Whether an older extent has records that a commit record in this one may decide.
    pub(super) fn has_older_parts(&self, number: u32) -> bool {
        let Some(one) = self.get(number) else { return false };
        let has_parts = |other: &Extent| other.live_parts + other.carry_parts > 0;
        self.all.values().any(|other| other.first_frame < one.first_frame && has_parts(other))
    }

    /// Nothing in an extent is needed once a frame is durable.
    pub(super) fn empty(&mut self, number: u32, frame: u64) {
        if let Some(extent) = self.all.get_mut(&number) {
            extent.state = ExtentState::Emptied { frame };
            self.leaving.push(number);
        }
    }

    /// A frame went to another extent, and with it whatever follows it: extents that were opened for what follows are void.
    pub(super) fn on_relocated(&mut self, left: u32, frame: u64) {
        self.all.retain(|_, one| one.first_frame < frame);
        for one in self.all.values_mut().filter(|one| one.last_frame.is_none_or(|last| last >= frame)) {
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
