//! The bytes of a simulated medium: sparse, and cheap to clone, because exhaustive tests make very many images.
//!
//! Blocks are shared between images and replaced, never changed in place. A block that was never written reads as
//! pseudo-random bytes of the image's own seed, so that code which takes fresh blocks for zeros fails.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::random::{Random, mix};

/// Blocks of one shared chunk: an image of n blocks costs n / 64 entries when it diverges.
const CHUNK_BLOCK_COUNT: usize = 64;

type Chunk = [Option<Rc<[u8]>>; CHUNK_BLOCK_COUNT];

/// What a medium holds. Cloning shares every block.
#[derive(Clone)]
pub struct Image {
    block_size: usize,
    pristine_seed: u64,
    chunks: Rc<BTreeMap<u64, Rc<Chunk>>>,
}

impl Image {
    /// A medium on which nothing was ever written.
    pub fn pristine(block_size: u32, seed: u64) -> Image {
        Image { block_size: block_size as usize, pristine_seed: seed, chunks: Rc::default() }
    }

    /// Bytes of one block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Copies the block into `into`, which has its size.
    pub fn read_block(&self, block: u64, into: &mut [u8]) {
        match self.get(block) {
            Some(bytes) => into.copy_from_slice(bytes),
            None => Random::new(mix(self.pristine_seed) ^ block).fill(into),
        }
    }

    /// Whether the block was ever written (and not forgotten since).
    pub fn is_written(&self, block: u64) -> bool {
        self.get(block).is_some()
    }

    /// Replaces the block; `None` makes it one that was never written.
    pub fn set_block(&mut self, block: u64, bytes: Option<Rc<[u8]>>) {
        assert!(bytes.as_ref().is_none_or(|bytes| bytes.len() == self.block_size), "a block of another size");
        let (chunk, slot) = place(block);
        let chunks = Rc::make_mut(&mut self.chunks);
        if bytes.is_none() && !chunks.contains_key(&chunk) {
            return;
        }
        let entry = chunks.entry(chunk).or_insert_with(|| Rc::new([const { None }; CHUNK_BLOCK_COUNT]));
        Rc::make_mut(entry)[slot] = bytes;
    }

    /// Copies bytes from any offset.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        let mut scratch = vec![0; self.block_size];
        for (block, start, part) in self.parts(offset, into.len()) {
            let target = &mut into[part.clone()];
            if target.len() == self.block_size {
                self.read_block(block, target);
            } else {
                self.read_block(block, &mut scratch);
                target.copy_from_slice(&scratch[start..start + part.len()]);
            }
        }
    }

    /// Writes bytes at any offset.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        let parts: Vec<_> = self.parts(offset, bytes.len()).collect();
        for (block, start, part) in parts {
            let source = &bytes[part];
            let mut content = vec![0; self.block_size];
            if source.len() < self.block_size {
                self.read_block(block, &mut content);
            }
            content[start..start + source.len()].copy_from_slice(source);
            self.set_block(block, Some(content.into()));
        }
    }

    /// The blocks that were written, in order.
    pub fn written_blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.chunks.iter().flat_map(|(chunk, slots)| {
            let base = chunk * CHUNK_BLOCK_COUNT as u64;
            (base..).zip(slots.iter()).filter(|(_, slot)| slot.is_some()).map(|(block, _)| block)
        })
    }

    /// Block, first byte within it, and the range of the caller's bytes, for each block that the bytes touch.
    fn parts(
        &self,
        offset: u64,
        len: usize,
    ) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> + use<> {
        let block_size = self.block_size;
        let mut done = 0;
        std::iter::from_fn(move || {
            if done == len {
                return None;
            }
            let at = offset + done as u64;
            let start = (at % block_size as u64) as usize;
            let part = done..len.min(done + block_size - start);
            done = part.end;
            Some((at / block_size as u64, start, part))
        })
    }

    fn get(&self, block: u64) -> Option<&Rc<[u8]>> {
        let (chunk, slot) = place(block);
        self.chunks.get(&chunk)?[slot].as_ref()
    }
}

fn place(block: u64) -> (u64, usize) {
    let count = CHUNK_BLOCK_COUNT as u64;
    (block / count, (block % count) as usize)
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image")
            .field("block_size", &self.block_size)
            .field("written_blocks", &self.written_blocks().count())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_diverge_and_pristine_blocks_are_noise_of_the_seed() {
        let first = Image::pristine(512, 9);
        let mut second = first.clone();
        second.write(1000, &[7; 100]);
        let (mut a, mut b) = (vec![0; 2048], vec![0; 2048]);
        first.read(0, &mut a);
        second.read(0, &mut b);
        assert_eq!(a[..1000], b[..1000]);
        assert_eq!(b[1000..1100], [7; 100]);
        assert_eq!(a[1100..], b[1100..]);
        assert_ne!(a[..512], a[512..1024]);
        assert!(a.iter().filter(|&&byte| byte == 0).count() < 40);
        assert_eq!(second.written_blocks().collect::<Vec<_>>(), [1, 2]);
        Image::pristine(512, 10).read(0, &mut b);
        assert_ne!(a, b);
    }

    #[test]
    fn a_far_block_costs_one_chunk() {
        let mut image = Image::pristine(4096, 1);
        image.write((1 << 40) + 5, b"far");
        let mut three = [0; 3];
        image.read((1 << 40) + 5, &mut three);
        assert_eq!(&three, b"far");
        image.set_block((1 << 40) / 4096, None);
        assert_eq!(image.written_blocks().count(), 0);
    }
}
