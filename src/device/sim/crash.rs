//! What a power cut leaves of the writes that were not yet durable.
//!
//! Invariants: a durable write is never a matter of choice; every write that is not durable, completed or in flight, may
//! persist wholly, in part or not at all, independently of every other.

use std::ops::Range;
use std::rc::Rc;

use super::image::Image;
use super::random::Random;

/// The smallest piece of a write that persists all or not at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tear {
    /// One block of the device.
    Block,
    /// 512 bytes, as on a drive that shows 4096 and writes 512.
    Sector512,
    /// Single bytes: worse than any drive.
    Byte,
}

impl Tear {
    /// The piece in bytes on a device of this block size.
    pub fn size(self, block_size: u32) -> usize {
        match self {
            Tear::Block => block_size as usize,
            Tear::Sector512 => 512,
            Tear::Byte => 1,
        }
    }
}

/// Which part of one write persists. Byte counts are rounded down to whole pieces of the disk's [`Tear`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Nothing.
    None,
    /// Everything.
    All,
    /// The first so many bytes.
    Prefix(usize),
    /// The last so many bytes.
    Suffix(usize),
    /// Each piece or not, as this seed tosses.
    Holes(u64),
}

impl Keep {
    /// A random way to tear a write of this size.
    pub fn random(random: &mut Random, size: usize, piece: usize) -> Keep {
        let pieces = (size / piece) as u64;
        match random.below(8) {
            0 => Keep::None,
            1 | 2 => Keep::All,
            3 | 4 => Keep::Prefix(random.below(pieces + 1) as usize * piece),
            5 | 6 => Keep::Suffix(random.below(pieces + 1) as usize * piece),
            _ => Keep::Holes(random.next_u64()),
        }
    }

    /// The ranges of a write of `size` bytes that persist, ascending.
    pub(super) fn ranges(self, size: usize, piece: usize) -> Vec<Range<usize>> {
        let whole = |bytes: usize| bytes.min(size) / piece * piece;
        let one = |range: Range<usize>| if range.is_empty() { Vec::new() } else { vec![range] };
        match self {
            Keep::None => Vec::new(),
            Keep::All => one(0..size),
            Keep::Prefix(bytes) => one(0..whole(bytes)),
            Keep::Suffix(bytes) => one(size - whole(bytes)..size),
            Keep::Holes(seed) => {
                let mut random = Random::new(seed);
                let mut toss = 0;
                let mut ranges: Vec<Range<usize>> = Vec::new();
                for (index, start) in (0..size).step_by(piece).enumerate() {
                    if index % 64 == 0 {
                        toss = random.next_u64();
                    }
                    if toss >> (index % 64) & 1 == 1 {
                        let end = size.min(start + piece);
                        match ranges.last_mut() {
                            Some(last) if last.end == start => last.end = end,
                            _ => ranges.push(start..end),
                        }
                    }
                }
                ranges
            }
        }
    }
}

/// A write (or deallocation) that a power cut may undo.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnflushedWrite {
    /// Ascends in the order of submission; never reused on one disk.
    pub id: u64,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// Its completion was delivered; otherwise it was in flight.
    pub completed: bool,
    /// It is a deallocation: it tears at whole blocks only.
    pub deallocation: bool,
}

/// How a crash chooses.
#[derive(Debug, Clone)]
pub enum CrashChoice {
    /// No unflushed write persists.
    Nothing,
    /// Every unflushed write persists, in flight ones too.
    Everything,
    /// Any subset, torn in any way, in any order.
    Random(Random),
}

impl CrashChoice {
    /// The random choice of this seed.
    pub fn seeded(seed: u64) -> CrashChoice {
        CrashChoice::Random(Random::new(seed))
    }

    /// Picks what persists, in the order in which it does.
    pub fn pick(&mut self, unflushed: &[UnflushedWrite], piece: usize) -> Vec<(u64, Keep)> {
        match self {
            CrashChoice::Nothing => Vec::new(),
            CrashChoice::Everything => unflushed.iter().map(|write| (write.id, Keep::All)).collect(),
            CrashChoice::Random(random) => {
                let keep_quarters = random.below(5);
                let tears = random.chance(1, 2);
                let mut picked = Vec::new();
                for write in unflushed {
                    if !random.chance(keep_quarters, 4) {
                        continue;
                    }
                    let keep = match tears && random.chance(1, 2) {
                        true => Keep::random(random, write.size as usize, piece),
                        false => Keep::All,
                    };
                    picked.push((write.id, keep));
                }
                random.shuffle(&mut picked);
                picked
            }
        }
    }
}

/// What a write does to one block.
#[derive(Debug, Clone)]
pub(super) enum BlockWrite {
    /// Nothing (any more): a later durable write took its place.
    Skip,
    /// Replaces it.
    Bytes(Rc<[u8]>),
    /// Makes it one that was never written.
    Forget,
}

/// A write that is not durable.
#[derive(Debug, Clone)]
pub(super) struct Pending {
    pub offset: u64,
    pub blocks: Vec<BlockWrite>,
    /// Position in the order of completion; `None` while in flight.
    pub completed: Option<u64>,
    pub deallocation: bool,
}

impl Pending {
    /// Applies the chosen part to the image.
    pub fn apply(&self, image: &mut Image, keep: Keep, piece: usize) {
        let block_size = image.block_size();
        let piece = if self.deallocation { block_size } else { piece };
        for range in keep.ranges(self.blocks.len() * block_size, piece) {
            let mut at = range.start;
            while at < range.end {
                let index = at / block_size;
                let end = range.end.min((index + 1) * block_size);
                let block = self.offset / block_size as u64 + index as u64;
                let is_whole = end - at == block_size;
                match &self.blocks[index] {
                    BlockWrite::Skip => {}
                    BlockWrite::Bytes(bytes) if is_whole => image.set_block(block, Some(Rc::clone(bytes))),
                    BlockWrite::Bytes(bytes) => {
                        let start = at - index * block_size;
                        image.write(self.offset + at as u64, &bytes[start..start + end - at]);
                    }
                    BlockWrite::Forget => image.set_block(block, None),
                }
                at = end;
            }
        }
    }

    /// Cuts it down to the chosen part, which is merged with what the image holds.
    pub fn tear(&mut self, image: &Image, keep: Keep, piece: usize) {
        let mut torn = image.clone();
        self.apply(&mut torn, keep, piece);
        let block_size = image.block_size();
        let piece = if self.deallocation { block_size } else { piece };
        let ranges = keep.ranges(self.blocks.len() * block_size, piece);
        for (index, write) in self.blocks.iter_mut().enumerate() {
            let own = index * block_size..(index + 1) * block_size;
            let is_touched = ranges.iter().any(|range| range.start < own.end && own.start < range.end);
            match write {
                BlockWrite::Bytes(bytes) if is_touched => {
                    let mut content = vec![0; block_size];
                    torn.read_block(self.offset / block_size as u64 + index as u64, &mut content);
                    *bytes = content.into();
                }
                _ if is_touched => {}
                _ => *write = BlockWrite::Skip,
            }
        }
    }

    /// Forgets what it does to blocks that a later write made durable.
    pub fn supersede(&mut self, offset: u64, size: u64, block_size: u64) {
        for (index, write) in self.blocks.iter_mut().enumerate() {
            let at = self.offset + index as u64 * block_size;
            if offset <= at && at < offset + size {
                *write = BlockWrite::Skip;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_cover_what_their_names_say() {
        let bounds = |keep: Keep, piece| {
            keep.ranges(2048, piece).into_iter().map(|range| (range.start, range.end)).collect::<Vec<_>>()
        };
        assert_eq!(bounds(Keep::Prefix(1000), 512), [(0, 512)]);
        assert_eq!(bounds(Keep::Suffix(1024), 512), [(1024, 2048)]);
        assert_eq!(bounds(Keep::Suffix(9999), 512), [(0, 2048)]);
        assert_eq!(bounds(Keep::Prefix(511), 512), []);
        assert_eq!(bounds(Keep::Prefix(511), 1), [(0, 511)]);
        let holes = Keep::Holes(3).ranges(1 << 20, 512);
        let kept: usize = holes.iter().map(Range::len).sum();
        assert!((400 << 10..624 << 10).contains(&kept), "{kept}");
        assert!(holes.windows(2).all(|pair| pair[0].end < pair[1].start));
    }
}
