//! Writing a part of a long value: which pieces stay, which are made anew, and out of which bytes. Pure functions.
//!
//! A piece that is written over is made anew with what it had beside that. Pieces that touch the new one and are no longer
//! than it are made one with it: appending many short tails so costs each byte a few times, and leaves few pieces.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use bytes::BytesMut;

use super::{ChunkRef, LongValue, Piece, overlapping};
use crate::engine::op::Value;
use crate::limits::{PIECES_PER_CHUNK_MAX, PIECES_PER_FULL_CHUNK_MAX};
use crate::planted::{Bug, is_planted};

/// Bytes at a place of a value.
#[derive(Debug, Clone)]
pub(in crate::engine) struct Part {
    pub(in crate::engine) start: u64,
    pub(in crate::engine) bytes: Value,
}

impl Part {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }
}

/// What writing some parts comes to.
pub(in crate::engine) struct Edit {
    size: u64,
    kept: Vec<Piece>,
    /// Pieces whose bytes go into new ones; those that parts cover are not among them.
    merged: Vec<Piece>,
    parts: Vec<Part>,
    /// The new pieces, ascending.
    made: Vec<Range<u64>>,
}

impl Edit {
    /// Writes `parts` over `old`, later ones over earlier ones. No piece gets longer than `chunk_size`.
    pub(in crate::engine) fn new(old: Option<&LongValue>, parts: Vec<Part>, chunk_size: u64) -> Edit {
        let old_pieces = old.map_or(&[][..], LongValue::pieces);
        let end = parts.iter().map(Part::end).max().unwrap_or(0);
        let mut edit = Edit {
            size: end.max(old.map_or(0, LongValue::size)),
            kept: Vec::new(),
            merged: Vec::new(),
            parts,
            made: Vec::new(),
        };
        let mut spans: Vec<Range<u64>> = Vec::new();
        for range in touched(&edit.parts, chunk_size) {
            let slot = range.start / chunk_size * chunk_size;
            let span = grow(range, &(slot..slot + chunk_size), old_pieces);
            match spans.last_mut() {
                // A longer piece, made when chunks were longer, may reach over several slots.
                Some(last) if last.end > span.start => last.end = last.end.max(span.end),
                _ => spans.push(span),
            }
        }
        let mut rest = old_pieces;
        for span in &spans {
            let gone = overlapping(rest, span);
            let before = rest.partition_point(|one| one.end() <= span.start);
            edit.kept.extend_from_slice(&rest[..before]);
            rest = &rest[before + gone.len()..];
            let is_covered = |piece: &&Piece| {
                !edit.parts.iter().any(|part| part.start <= piece.start() && piece.end() <= part.end())
            };
            edit.merged.extend(gone.iter().filter(is_covered).cloned());
        }
        edit.kept.extend_from_slice(rest);
        for span in spans {
            let mut start = span.start;
            while start < span.end {
                let end = span.end.min((start / chunk_size + 1) * chunk_size);
                edit.made.push(start..end);
                start = end;
            }
        }
        edit
    }

    /// Bytes of the value afterwards.
    pub(in crate::engine) fn size(&self) -> u64 {
        self.size
    }

    /// Pieces whose bytes are needed.
    pub(in crate::engine) fn merged(&self) -> &[Piece] {
        &self.merged
    }

    /// What is to be written, with the bytes of the pieces that were needed.
    pub(in crate::engine) fn compose(self, read: Vec<Part>) -> LongWrite {
        let Edit { size, kept, parts, made, .. } = self;
        let mut parts: Vec<Part> = read.into_iter().chain(parts).collect();
        if is_planted(Bug::OldBytesWinOverEdit) {
            parts.reverse();
        }
        let mut left = VecDeque::with_capacity(made.len());
        for range in made {
            // Written pieces are in order, and so what is over for one is over for all that follow.
            parts.retain(|part| part.end() > range.start);
            left.push_back((range.start as u32, compose(&parts, &range)));
        }
        LongWrite { size, pieces: kept, left }
    }
}

/// The ranges that parts write to, one for each slot that they touch.
fn touched(parts: &[Part], chunk_size: u64) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for part in parts {
        let mut start = part.start;
        while start < part.end() {
            let end = part.end().min((start / chunk_size + 1) * chunk_size);
            ranges.push(start..end);
            start = end;
        }
    }
    ranges.sort_by_key(|range| range.start);
    ranges.dedup_by(|next, last| {
        let same_slot = next.start / chunk_size == last.start / chunk_size;
        if same_slot {
            last.end = last.end.max(next.end);
        }
        same_slot
    });
    ranges
}

/// The piece that is made for a range of a slot: what it touches that is no longer goes into it, and everything of the slot
/// where there would be too many pieces.
fn grow(range: Range<u64>, slot: &Range<u64>, pieces: &[Piece]) -> Range<u64> {
    let with = |range: &Range<u64>, others: &[Piece]| {
        let start = others.first().map_or(range.start, |one| one.start().min(range.start));
        let end = others.last().map_or(range.end, |one| one.end().max(range.end));
        start..end
    };
    let of_slot = overlapping(pieces, slot);
    let is_inside = |one: &Piece| slot.start <= one.start() && one.end() <= slot.end;
    let mut range = with(&range, overlapping(of_slot, &range));
    loop {
        let size = range.end - range.start;
        let neighbour = of_slot.iter().find(|one| {
            let touches = one.end() == range.start || one.start() == range.end;
            touches && one.size() <= size && is_inside(one)
        });
        match neighbour {
            Some(one) => range = range.start.min(one.start())..range.end.max(one.end()),
            None => break,
        }
    }
    let others = of_slot.len() - overlapping(of_slot, &range).len();
    // Whoever fills a slot to its end tidies it up: hardly anybody comes back to it.
    let others_max = if range.end == slot.end { PIECES_PER_FULL_CHUNK_MAX } else { PIECES_PER_CHUNK_MAX };
    if others < others_max { range } else { with(&range, of_slot) }
}

/// The bytes of a range: those of the parts, later ones over earlier ones, and zeros.
fn compose(parts: &[Part], range: &Range<u64>) -> Value {
    let inside = |part: &&Part| part.start < range.end && part.end() > range.start;
    let mut found = parts.iter().filter(inside);
    if let (Some(only), None) = (found.next(), found.next())
        && only.start <= range.start
        && only.end() >= range.end
    {
        let from = (range.start - only.start) as usize;
        return only.bytes.slice(from..from + (range.end - range.start) as usize);
    }
    let mut bytes = BytesMut::zeroed((range.end - range.start) as usize);
    for part in parts.iter().filter(inside) {
        copy_into(&mut bytes, range.start, part.start, &part.bytes);
    }
    bytes.freeze()
}

/// Copies what stands at `start` into a buffer that stands at `from`, as far as they overlap.
pub(in crate::engine) fn copy_into(buffer: &mut [u8], from: u64, start: u64, bytes: &[u8]) {
    let (first, last) = (start.max(from), (start + bytes.len() as u64).min(from + buffer.len() as u64));
    if first < last {
        buffer[(first - from) as usize..(last - from) as usize]
            .copy_from_slice(&bytes[(first - start) as usize..(last - start) as usize]);
    }
}

/// A long value that is being written: pieces that are in the log, and the bytes of those that are not.
pub(in crate::engine) struct LongWrite {
    size: u64,
    pieces: Vec<Piece>,
    left: VecDeque<(u32, Value)>,
}

impl LongWrite {
    /// The bytes of the next piece to be appended.
    pub(in crate::engine) fn next(&self) -> Option<&Value> {
        self.left.front().map(|(_, bytes)| bytes)
    }

    /// The next piece is in this chunk now.
    pub(in crate::engine) fn on_appended(&mut self, chunk: Arc<ChunkRef>) {
        if let Some((start, bytes)) = self.left.pop_front() {
            self.pieces.push(Piece::new(start, bytes.len() as u32, chunk));
        }
    }

    /// Bytes that are still to be appended.
    pub(in crate::engine) fn size_left(&self) -> usize {
        self.left.iter().map(|(_, bytes)| bytes.len()).sum()
    }

    /// The value, once everything is appended.
    pub(in crate::engine) fn finish(mut self) -> LongValue {
        self.pieces.sort_by_key(Piece::start);
        LongValue::new(self.size, self.pieces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::long::DeadChunks;
    use crate::format::manifest;
    use bytes::Bytes;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const CHUNK: u64 = 100;

    /// Chunks as a shard has them.
    #[derive(Default)]
    struct Store {
        dead: Arc<DeadChunks>,
        chunks: BTreeMap<u64, Bytes>,
        next: u64,
        written: usize,
        read: usize,
    }

    impl Store {
        fn write(&mut self, old: Option<&LongValue>, parts: &[(u64, &[u8])]) -> LongValue {
            let part =
                |(start, bytes): &(u64, &[u8])| Part { start: *start, bytes: Bytes::copy_from_slice(bytes) };
            let edit = Edit::new(old, parts.iter().map(part).collect(), CHUNK);
            let read: Vec<Part> = edit
                .merged()
                .iter()
                .map(|one| Part { start: one.start(), bytes: self.chunks[&one.id()].clone() })
                .collect();
            self.read += read.len();
            let mut write = edit.compose(read);
            while let Some(bytes) = write.next().cloned() {
                assert!(!bytes.is_empty() && bytes.len() as u64 <= CHUNK);
                self.next += 1;
                self.written += bytes.len();
                self.chunks.insert(self.next, bytes);
                write.on_appended(ChunkRef::new(self.next, &self.dead));
            }
            let value = write.finish();
            let ends = value.pieces().windows(2).all(|two| two[0].end() <= two[1].start());
            assert!(ends && value.pieces().last().is_none_or(|last| last.end() <= value.size()));
            let back = manifest::decode(&value.manifest(), value.size()).unwrap();
            assert_eq!(LongValue::found(value.size(), &back, &Arc::default()), value);
            value
        }

        fn bytes(&mut self, value: &LongValue) -> Vec<u8> {
            while let Some(id) = self.dead.pop() {
                assert!(self.chunks.remove(&id).is_some(), "chunk {id} died twice");
            }
            let mut out = vec![0; value.size() as usize];
            for piece in value.pieces() {
                copy_into(&mut out, 0, piece.start(), &self.chunks[&piece.id()]);
            }
            out
        }
    }

    #[test]
    fn a_whole_value_is_cut_into_chunks_and_dies_with_its_last_holder() {
        let mut store = Store::default();
        let bytes: Vec<u8> = (0..=255).cycle().take(1_050).collect();
        let value = store.write(None, &[(0, &bytes)]);
        assert_eq!((value.pieces().len(), value.size(), store.read), (11, 1_050, 0));
        assert_eq!(store.bytes(&value), bytes);
        let reader = value.pieces().to_vec();
        drop(value);
        assert!(store.dead.is_empty());
        drop(reader);
        assert_eq!(store.dead.len(), 11);
    }

    #[test]
    fn a_tail_costs_itself_and_many_short_ones_leave_few_pieces() {
        let mut store = Store::default();
        let mut model = vec![7; 1_000];
        let mut value = store.write(None, &[(0, &model)]);
        store.written = 0;
        value = store.write(Some(&value), &[(1_000, b"tail")]);
        assert_eq!((store.written, store.read), (4, 0));
        model.extend_from_slice(b"tail");
        for nth in 0..2_000u32 {
            value = store.write(Some(&value), &[(model.len() as u64, &[nth as u8])]);
            model.push(nth as u8);
            let full = model.len() / 100 * PIECES_PER_FULL_CHUNK_MAX;
            assert!(value.pieces().len() <= full + PIECES_PER_CHUNK_MAX);
        }
        assert!(store.written < 2_000 * 8, "{} bytes", store.written);
        assert_eq!(store.bytes(&value), model);
    }

    #[test]
    fn what_is_written_over_whole_is_not_read_and_a_hole_is_not_stored() {
        let mut store = Store::default();
        let value = store.write(None, &[(0, &[1; 500])]);
        let value = store.write(Some(&value), &[(100, &[2; 300])]);
        assert_eq!((store.read, value.pieces().len()), (0, 5));
        let value = store.write(Some(&value), &[(150, &[3; 100])]);
        assert_eq!((store.read, value.pieces().len()), (2, 5));
        store.written = 0;
        let value = store.write(Some(&value), &[(400_000_000, b"far")]);
        assert_eq!((store.written, value.size()), (3, 400_000_003));
        assert_eq!(value.overlapping(&(500..400_000_000)).len(), 0);
        assert_eq!(value.overlapping(&(499..400_000_001)).len(), 2);
        assert_eq!(value.overlapping(&(10..10)).len(), 0);
    }

    proptest! {
        #[test]
        fn writes_anywhere_read_back_as_they_are_in_memory(
            first in prop::option::of(1usize..700),
            writes in prop::collection::vec((0u64..900, 1usize..260), 1..60),
        ) {
            let mut store = Store::default();
            let mut model = vec![0xaa; first.unwrap_or(0)];
            let mut value = first.map(|_| store.write(None, &[(0, &model)]));
            for (nth, (at, size)) in writes.into_iter().enumerate() {
                // A few long ones, mostly short ones.
                let size = if nth % 5 == 0 { size } else { 1 + size % 7 };
                let patch = vec![nth as u8 + 1; size];
                let end = at as usize + size;
                if model.len() < end {
                    model.resize(end, 0);
                }
                model[at as usize..end].copy_from_slice(&patch);
                let next = store.write(value.as_ref(), &[(at, &patch)]);
                value = Some(next);
                let value = value.as_ref().unwrap();
                prop_assert_eq!(store.bytes(value), model.clone());
                prop_assert_eq!(store.chunks.len(), value.pieces().len());
                prop_assert!(value.pieces().len() <= (model.len() / 100 + 1) * PIECES_PER_CHUNK_MAX);
            }
        }
    }
}
