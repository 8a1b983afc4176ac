//! What was durable and is not there any more, and what can't be read.

use super::*;

impl Scan<'_> {
    /// Frames of the log are in an extent whose header is not there any more. Had they been retired, the extent could be in
    /// another life whose header was in flight when the node died.
    pub(super) fn lost_header(&mut self, extent: u32) {
        probe::hit(Probe::OrphanExtentLost);
        self.out.damage.push(Damage {
            shard: Some(self.out.id.0),
            extent,
            offset: 0,
            size: u64::from(self.superblock.block_size),
            key: None,
            what: "the extent's header was lost; its frames are read without it".into(),
            held: Held::Anything,
        });
    }

    /// A block that can't be read where a frame may have been: what it held can't be told from what never was.
    pub(super) fn unreadable(&mut self, extent: u32, at: usize) {
        let damage = Damage {
            shard: Some(self.out.id.0),
            extent,
            offset: at as u64,
            size: u64::from(self.superblock.block_size),
            key: None,
            what: "the device can't read it".into(),
            held: Held::Anything,
        };
        self.out.unreadable_tail.get_or_insert_with(|| damage.clone());
        self.out.damage.push(damage);
    }

    /// Frames up to `lost_to` were durable and are not there; `next` is the first frame behind them.
    pub(super) fn lose(&mut self, lost_to: u64, next: &FrameRead, bytes: &[u8], has_units_among: bool) {
        probe::hit(Probe::DurableFrameMissing);
        let out = &mut self.out;
        let (first, missing) = (out.last_frame + 1, lost_to - out.last_frame);
        let (extent, offset, size) = match self.append_at {
            Some((extent, from)) if extent == next.extent => (extent, from, next.offset - from),
            _ => (next.extent, 0, next.offset),
        };
        out.damage.push(Damage {
            shard: Some(out.id.0),
            extent,
            offset,
            size,
            key: None,
            what: format!("{missing} frame(s) from number {first} on were durable and are not there"),
            held: Held::Anything,
        });
        let starts_boot = next.header.boot > out.last_boot;
        // The first frame of a start behind an unclean stop is empty.
        let is_one = missing == 1 && lost_to == next.header.frame - 1;
        // A unit of an earlier start that follows it says that it is older than this one.
        let is_older = self.units.next_boot().is_some_and(|boot| boot <= out.last_boot);
        let is_start_mark = starts_boot && is_one && !out.clean && !is_older;
        let expected = out.accepted_sequence..next.header.first_sequence;
        out.last_frame = lost_to;
        if let Some(last) = self.retired.frames.end_of(lost_to + 1) {
            out.last_frame = last;
        }
        if is_start_mark || expected.is_empty() {
            return;
        }
        // Records may be intact although the header of their frame is not. Between two frames of one start their sequences
        // say whether any is missing.
        let same_extent = self.append_at.filter(|(extent, _)| *extent == next.extent);
        let range = match same_extent {
            Some((_, from)) => from as usize..next.offset as usize,
            None => self.superblock.block_size as usize..next.offset as usize,
        };
        let found = if starts_boot || lost_to < next.header.frame - 1 {
            Vec::new()
        } else if let Some(place) = out.places.get(&next.extent).copied() {
            salvage(bytes, range, expected.clone(), next.extent, place)
        } else {
            Vec::new()
        };
        let below = if has_units_among { expected.end } else { lost_below(&found, &expected) };
        out.doubt.raise(below);
        let damaged = found.iter().filter(|one| !one.value_intact).map(|one| one.damaged_value(out.id));
        out.damage.extend(damaged);
        out.apply_all(found, &self.superblock.secret);
        out.accepted_sequence = expected.end;
        if !out.used_extents.contains(&next.extent) {
            out.used_extents.push(next.extent);
        }
    }
}
