//! How emptied extents go back to the allocator, and to the device.

use super::*;
use crate::device::Deallocate;
use crate::engine::allocator::Allocator;
use crate::engine::log::{Appended, NoRoom};
use crate::planted::{Bug, is_planted};

/// Logs that the frames and units of emptied extents are not needed any more: of all of them, or of as many as there is room to
/// say it of; the others leave the list.
fn retire(shard: &mut Shard, emptied: &mut Vec<u32>, allocator: &Allocator) -> Result<Appended, NoRoom> {
    loop {
        let frames: Vec<_> = emptied.iter().filter_map(|number| shard.extents.frames_of(*number)).collect();
        let units: Vec<_> = emptied.iter().filter_map(|number| shard.extents.units_of(*number)).collect();
        match shard.log.retire(frames, units, allocator) {
            Err(NoRoom::Full) if emptied.len() > 1 => emptied.truncate(emptied.len() / 2),
            done => return done,
        }
    }
}

impl<D: Device> Engine<D> {
    /// Retires the frames of emptied extents and gives retired extents back, as far as what that rests on is durable.
    pub(super) fn let_go(&mut self, at: usize, clock: Clock) -> bool {
        if self.shards[at].extents.leaving.is_empty() {
            return false;
        }
        let shard = &mut self.shards[at];
        let durable = shard.durable_frame;
        let (mut emptied, mut retired, mut waits) = (Vec::new(), Vec::new(), false);
        for number in &shard.extents.leaving {
            match shard.extents.get(*number).map(|one| one.state) {
                Some(ExtentState::Emptied { frame }) if frame <= durable => emptied.push(*number),
                Some(ExtentState::Retired { frame }) if frame <= durable || is_planted(Bug::FreesEarly) => {
                    retired.push(*number)
                }
                Some(ExtentState::Trimming) => {}
                _ => waits = true,
            }
        }
        let mut progress = false;
        // A commit record that a batch still rests on must be somewhere else before its frame may go; it was moved.
        if !emptied.is_empty() {
            match retire(shard, &mut emptied, &self.allocator) {
                Ok(appended) => {
                    shard.clean = false;
                    for number in emptied {
                        if let Some(one) = shard.extents.get_mut(number) {
                            one.state = ExtentState::Retired { frame: appended.frame };
                        }
                    }
                    self.stats.records += 1;
                    self.committer.on_append(false, clock);
                    waits = true;
                    progress = true;
                }
                // The open frame goes first.
                Err(_) => waits = true,
            }
        }
        for number in retired {
            let is_read = self.reads.iter().any(|(_, job)| job.is_of(at, number))
                && !is_planted(Bug::FreesExtentUnderReader);
            let is_scrubbed =
                self.scrubber.is_reading(at, number) && !is_planted(Bug::FreesExtentUnderScrubber);
            let is_pinned = self.shards[at].is_pinned(number) && !is_planted(Bug::FreesPinnedExtents);
            if is_read || is_scrubbed || is_pinned {
                continue;
            }
            progress = true;
            // Nobody else may write there before the device has dropped what is there.
            let is_left = self.shards[at].extents.get(number).is_some_and(|one| one.is_left);
            if self.collector.trims && !is_left {
                if let Some(one) = self.shards[at].extents.get_mut(number) {
                    one.state = ExtentState::Trimming;
                }
                let layout = self.superblock.layout;
                let purpose = io_queue::Purpose::Trim { shard: at, extent: number };
                self.queue.deallocate(purpose, layout.extent_offset(number), layout.extent_size);
                if is_planted(Bug::ReusesWhileTrimming) {
                    self.give_back(at, number);
                }
            } else {
                self.give_back(at, number);
            }
        }
        if waits {
            self.committer.hurry();
        }
        progress
    }

    /// Of a shard that lost records of unknown keys and was cleared since: retires everything from before.
    pub(super) fn write_off(&mut self, at: usize, clock: Clock) -> bool {
        if self.shards[at].waits_to_write_off() && !self.committer.is_in_group() {
            // Nobody else may want it durable.
            self.committer.hurry();
        }
        match self.shards[at].write_off(&self.allocator) {
            Some(Ok(())) => {
                let id = self.shards[at].id.0;
                tracing::info!("shard {id}: what was lost is written off, and garbage is collected again");
                self.stats.records += 1;
                self.committer.on_append(false, clock);
                true
            }
            Some(Err(_)) => {
                // The open frame goes first.
                self.committer.hurry();
                false
            }
            None => false,
        }
    }

    fn give_back(&mut self, at: usize, number: u32) {
        let Some(one) = self.shards[at].extents.remove(number) else { return };
        if one.is_left {
            return;
        }
        if one.is_reserve {
            self.allocator.count_reserve(false);
        }
        self.allocator.give_back(number);
        self.collector.stats.extents_freed += 1;
        self.collector.next_look_us = 0;
        probe::hit(Probe::ExtentFreed);
    }

    /// Says whether the device is told which extents are free.
    pub fn set_trim(&mut self, trims: bool) {
        self.collector.trims = trims && self.queue.device().geometry().deallocate != Deallocate::None;
    }

    /// The device was told that an extent is free. It need not have listened: the extent is free either way.
    pub(in crate::engine) fn on_trimmed(&mut self, at: usize, number: u32, status: Result<(), IoError>) {
        match status {
            Ok(()) => {
                self.collector.stats.bytes_trimmed += self.superblock.layout.extent_size;
                probe::hit(Probe::ExtentTrimmed);
            }
            Err(error) => {
                tracing::warn!("{error}; free space is not given back to the device any more");
                self.collector.trims = false;
                // It may still happen, to whatever would be there by then: nobody gets the extent before a restart.
                if error.is_outcome_unknown()
                    && let Some(one) = self.shards[at].extents.get_mut(number)
                {
                    one.is_left = true;
                    self.stats.extents_left += 1;
                }
            }
        }
        self.give_back(at, number);
    }

    /// Asks for everything of a shard to be collected that is worth it. The answer comes when that is done.
    pub(in crate::engine) fn compact(&mut self, at: usize, token: u64) {
        self.collector.compactions.push((at, token));
        self.collector.next_look_us = 0;
    }

    pub(super) fn end_compactions(&mut self, candidates: &[Candidate]) {
        if self.collector.compactions.is_empty() || self.collector.active.is_some() {
            return;
        }
        let (shards, answers) = (&self.shards, &mut self.answers);
        self.collector.compactions.retain(|(at, token)| {
            let is_left = candidates.iter().any(|one| one.shard == *at && one.is_worth_it());
            let is_done =
                !is_left && shards[*at].extents.leaving.is_empty() && !shards[*at].survivors.is_busy();
            if is_done {
                answers.push((*token, Answer::Done));
            }
            !is_done
        });
    }
}
