//! What a shard does for a dump: take a pin, read from it, let it go.

use bytes::Bytes;

use super::*;
use crate::engine::extents::ExtentState;
use crate::engine::op::PinnedKey;
use crate::engine::reads::{ReadRecord, Wanted};
use crate::engine::shard::{Before, Pinned};
use crate::limits::{DUMP_KEYS_MAX, DUMP_PART_SIZE};

/// Keys of a pin, some of whose values are being read.
pub(in crate::engine) struct PinReading {
    keys: Vec<PinnedKey>,
    reads_left: usize,
    is_last: bool,
}

impl<D: Device> Engine<D> {
    /// Takes a pin of a shard into which nothing comes. The frame that must be durable before anybody is told.
    pub(super) fn take_pin(&mut self, at: usize) -> Result<u64, OpError> {
        // What may be missing can't be dumped.
        if self.shards[at].is_in_doubt() {
            return Err(self.shards[at].doubt_error());
        }
        if self.shards[at].has_unknown() || self.committer.poisoned().is_some() {
            return Err(self.outcome_unknown());
        }
        if self.shards[at].take_pin() { Ok(self.shards[at].depends_on_all()) } else { Err(OpError::DumpBusy) }
    }

    pub(super) fn unpin(&mut self, at: usize, token: u64) {
        self.shards[at].release_pin();
        self.answers.push((token, Answer::Done));
    }

    pub(super) fn read_pinned(&mut self, at: usize, token: u64, clock: Clock) {
        let next = self.shards[at].next_pinned(DUMP_KEYS_MAX, DUMP_PART_SIZE, clock.unix_ms);
        let (taken, is_last) = match next {
            Ok(next) => next,
            Err(why) => {
                self.answers.push((token, Answer::Failed(OpError::DumpLost { why })));
                return;
            }
        };
        let (mut keys, mut wanted) = (Vec::with_capacity(taken.len()), Vec::new());
        let mut wanted_long = Vec::new();
        for (index, Pinned { identity, key, before }) in taken.into_iter().enumerate() {
            let expires_at_ms = before.expires_at_ms();
            let value = match before {
                Before::Value { value, .. } => value,
                Before::Long { value, .. } => {
                    wanted_long.push((index, key.clone().unwrap_or_default(), value));
                    Bytes::new()
                }
                Before::Stored { entry, .. } => {
                    wanted.push((index, identity, entry));
                    Bytes::new()
                }
            };
            keys.push(PinnedKey { key, value: Ok(value), expires_at_ms });
        }
        let reading = PinReading { keys, reads_left: wanted.len() + wanted_long.len(), is_last };
        if reading.reads_left == 0 {
            self.finish_pin_read(token, reading);
            return;
        }
        let id = self.suspend(at, token, State::PinReading(Box::new(reading)));
        for (index, identity, entry) in wanted {
            self.start_read(at, Wanted::Identity(identity), &entry, ReadFor::Pin { operation: id, index });
        }
        for (index, key, value) in wanted_long {
            self.start_long_read(at, key, &value, ReadFor::Pin { operation: id, index }, clock);
        }
    }

    /// One of the records that `PinReading` waited for is there, or can't be had; then its key may still be known.
    pub(in crate::engine) fn on_pin_read(
        &mut self,
        id: usize,
        index: usize,
        record: Result<ReadRecord, OpError>,
        known_key: Option<Key>,
    ) {
        let Some(operation) = self.operations.get_mut(id) else { return };
        let State::PinReading(reading) = &mut operation.state else { return };
        let one = &mut reading.keys[index];
        match record {
            Ok(record) => (one.key, one.value) = (Some(record.key), Ok(record.value)),
            Err(error) => {
                one.key = one.key.take().or(known_key);
                one.value = Err(error);
            }
        }
        reading.reads_left -= 1;
        if reading.reads_left == 0 {
            let Operation { token, state, .. } = self.operations.remove(id);
            if let State::PinReading(reading) = state {
                self.finish_pin_read(token, *reading);
            }
        }
    }

    fn finish_pin_read(&mut self, token: u64, reading: PinReading) {
        let PinReading { keys, is_last, .. } = reading;
        self.answers.push((token, Answer::Pinned { keys, is_last }));
    }

    /// Gives pins up that stand in the way of writes: a dump can be made again.
    pub(in crate::engine) fn check_pins(&mut self) {
        let is_full = self.allocator.available_count() == 0;
        let may_grow = self.memory.index_may_grow;
        for shard in &mut self.shards {
            if !may_grow && shard.pin_size() > 0 {
                shard.lose_pin("what was written since takes more memory than the node may have");
            }
            let keeps_space = is_full
                && (shard.pins_long_garbage()
                    || shard.pinned_extents().any(|extent| {
                        shard
                            .extents
                            .get(extent)
                            .is_some_and(|one| matches!(one.state, ExtentState::Retired { .. }))
                    }));
            if keeps_space {
                shard.lose_pin("what was written since takes more space than the device has");
            }
        }
    }
}
