//! Units, put where they belong between the frames of the log.

use super::super::units::{NextUnit, ReadFrom, UnitRead};
use super::*;

impl Scan<'_> {
    /// Applies the units that follow frames up to this one, before the next frame is. Gives how many there were.
    pub(super) fn bring_units(&mut self, up_to: u64, read: &mut ReadFrom<'_>) -> Result<u64, IoError> {
        let mut count = 0;
        while self.units.next_follows(read)?.is_some_and(|follows| follows <= up_to) {
            count += 1;
            match self.units.take() {
                Some(NextUnit::Unit(unit)) => self.accept_unit(*unit),
                Some(NextUnit::Missing { first, count }) => {
                    self.lose_units(first, count, self.out.accepted_sequence);
                }
                None => break,
            }
        }
        Ok(count)
    }

    fn accept_unit(&mut self, unit: UnitRead) {
        probe::hit(Probe::UnitRecovered);
        let out = &mut self.out;
        let UnitRead { header, extent, place, offset, records, damage, lacks_records, .. } = unit;
        out.log_bytes += u64::from(header.size);
        out.places.insert(extent.extent, place);
        let end = offset + u64::from(header.size);
        let one = out.extents.entry(extent.extent).or_insert_with(|| {
            out.used_extents.push(extent.extent);
            let one = extents::Extent::new(place, extent.epoch, extent.first_frame, false);
            extents::Extent {
                follows: Some((header.follows, header.follows)),
                ordinal: extent.ordinal,
                ..one
            }
        });
        one.follows = Some((one.follows.map_or(header.follows, |(first, _)| first), header.follows));
        one.last_frame = Some(header.unit);
        one.end = end;
        out.units.last = header.unit;
        out.units.open = Some(OpenExtent { header: extent, place, position: end, for_collection: false });
        if lacks_records {
            out.doubt.raise_all(out.accepted_sequence);
        }
        out.damage.extend(damage);
        out.apply_survivors(records, &self.superblock.secret);
    }

    /// The next frame says that units up to this one were durable before it, which begins with this sequence: what it says
    /// itself, and what follows it, is newer than what they held.
    pub(super) fn require_units(&mut self, last: u64, next_sequence: u64) {
        if let Some((first, count)) = self.units.give_up(last) {
            self.lose_units(first, count, next_sequence);
        }
    }

    /// Units that were durable are not there: what they held is not where it was before any more.
    fn lose_units(&mut self, first: u64, count: u64, next_sequence: u64) {
        probe::hit(Probe::DurableUnitMissing);
        let out = &mut self.out;
        out.damage.push(Damage {
            shard: Some(out.id.0),
            extent: out.units.open.map_or(0, |open| open.header.extent),
            offset: out.units.open.map_or(0, |open| open.position),
            size: 0,
            key: None,
            what: format!("{count} unit(s) from number {first} on were durable and are not there"),
            held: Held::Anything,
        });
        out.units.last = first + count - 1;
        out.doubt.raise_all(next_sequence);
    }

    /// The log has ended. Units that follow later frames say that those were durable.
    pub(super) fn end_units(&mut self, read: &mut ReadFrom<'_>) -> Result<(), IoError> {
        for extent in self.units.without_header() {
            self.lost_header(extent);
        }
        self.bring_units(self.out.last_frame, read)?;
        while let Some(follows) = self.units.next_follows(read)?.filter(|follows| *follows != u64::MAX) {
            if follows > self.out.last_frame {
                self.suspects_durable = self.suspects_durable.max(follows);
                self.judge(&[], read)?;
            }
            if follows > self.out.last_frame {
                self.lose_tail(follows);
            }
            self.bring_units(self.out.last_frame, read)?;
        }
        self.bring_units(u64::MAX, read)?;
        let last = self.units.last();
        self.out.units.last = self.out.units.last.max(last);
        Ok(())
    }

    /// Frames up to this one were durable, and nothing behind the last one that counts is there.
    fn lose_tail(&mut self, last: u64) {
        probe::hit(Probe::DurableFrameMissing);
        let out = &mut self.out;
        let (first, missing) = (out.last_frame + 1, last - out.last_frame);
        let (extent, offset) = self.append_at.unwrap_or((0, 0));
        out.damage.push(Damage {
            shard: Some(out.id.0),
            extent,
            offset,
            size: 0,
            key: None,
            what: format!("{missing} frame(s) from number {first} on were durable and are not there"),
            held: Held::Anything,
        });
        out.last_frame = last;
        out.doubt.raise_all(out.accepted_sequence);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::super::frames::Found;
    use super::*;
    use crate::engine::index::RecordRef;
    use crate::engine::op::BatchId;
    use crate::engine::recovery::committed_batches;
    use crate::format::record::RecordType;

    fn found(kind: RecordType, sequence: u64, batch: Option<u64>) -> Found {
        Found {
            kind,
            key: Bytes::from_static(b"key"),
            record: RecordRef {
                extent: 1,
                offset: 4096,
                size: 50,
                value_size: 5,
                sequence,
                expires_at_ms: 0,
                is_part: batch.is_some(),
                is_long: false,
            },
            batch: batch.map(|number| (BatchId { boot: 1, number }, ShardId(0))),
            participant_count: 1,
            retired: None,
            chunk: None,
            pieces: None,
            stored_size: 5,
            value_intact: true,
        }
    }

    /// A part whose batch a checkpoint has as committed, what has replaced it, and an old delete that garbage collection has moved
    /// behind both.
    #[test]
    fn a_part_that_is_decided_last_does_not_win_over_what_an_old_delete_stands_behind() {
        let superblock = Arc::new(Superblock::for_tests(4));
        for (replaced, keys) in [(false, 1), (true, 0)] {
            let (chain, retired) = (Chains { log: &[], survivors: &[] }, Retirement::default());
            let mut scan = Scan::new(&superblock, ShardId(0), chain, &retired, UnitsBase::default());
            let out = &mut scan.out;
            out.commits.push((BatchId { boot: 1, number: 5 }, 1));
            out.apply_all(vec![found(RecordType::Put, 20, Some(5))], &superblock.secret);
            if replaced {
                out.apply_all(vec![found(RecordType::Delete, 30, None)], &superblock.secret);
                out.apply_survivors(vec![found(RecordType::Delete, 10, None)], &superblock.secret);
            }
            let shards = [scan.finish()];
            let decisions = committed_batches(&shards);
            let [shard] = shards;
            assert_eq!(shard.resolve(&decisions, &superblock).key_count(), keys, "replaced: {replaced}");
        }
    }
}
