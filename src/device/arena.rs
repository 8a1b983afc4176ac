//! One region of page-aligned memory, carved into buffers of a few sizes, that the kernel can register as a whole.
//!
//! Invariants: a slot is in exactly one buffer or in the free list of its class; the region is freed after its last
//! buffer, since every buffer holds the arena.

#![expect(unsafe_code, reason = "raw aligned memory that becomes DMA buffers")]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::RefCell;
use std::ptr::NonNull;
use std::rc::Rc;

use super::buffer::{DMA_ALIGNMENT, DmaBuf, DmaPool};

/// Sizes and counts of the slots, ascending. 7 MiB in all, below the 8 MiB that many systems let a user lock.
const CLASSES: [(usize, usize); 4] = [(4 << 10, 512), (16 << 10, 64), (64 << 10, 32), (256 << 10, 8)];

/// Bytes of one arena.
pub const ARENA_SIZE: usize = {
    let mut size = 0;
    let mut class = 0;
    while class < CLASSES.len() {
        assert!(CLASSES[class].0.is_multiple_of(DMA_ALIGNMENT));
        size += CLASSES[class].0 * CLASSES[class].1;
        class += 1;
    }
    size
};

/// The region. Its buffers keep it alive.
#[derive(Debug)]
pub struct Arena {
    base: NonNull<u8>,
    layout: Layout,
    /// Byte offsets of the free slots of each class.
    free: RefCell<[Vec<usize>; CLASSES.len()]>,
}

impl Arena {
    /// Maps a region; `None` when there is no memory.
    pub fn new() -> Option<Rc<Arena>> {
        let layout = Layout::from_size_align(ARENA_SIZE, DMA_ALIGNMENT).ok()?;
        // SAFETY: the layout has a non-zero size.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        let mut start = 0;
        let free = CLASSES.map(|(size, count)| {
            let slots = (0..count).rev().map(|index| start + index * size).collect();
            start += size * count;
            slots
        });
        Some(Rc::new(Arena { base, layout, free: RefCell::new(free) }))
    }

    /// The start of the region, to register its [`ARENA_SIZE`] bytes.
    pub fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// A buffer of the smallest class that holds `size` bytes; `None` when no class does or that one has run out.
    pub fn allocate(self: &Rc<Self>, size: usize) -> Option<DmaBuf> {
        let class = CLASSES.iter().position(|&(slot_size, _)| size <= slot_size)?;
        let offset = self.free.borrow_mut()[class].pop()?;
        let pool: Rc<dyn DmaPool> = Rc::clone(self) as Rc<dyn DmaPool>;
        let capacity = CLASSES[class].0;
        // SAFETY: offsets in the free lists are within the region.
        let ptr = unsafe { self.base.add(offset) };
        // SAFETY: the slot is page-aligned, was zeroed at first, has just left the free list, and the region lives as
        // long as the pool. Classes count from 1: 0 is the heap's.
        Some(unsafe { DmaBuf::from_pool(ptr, size, capacity, class as u32 + 1, pool) })
    }

    /// Whether the memory lies in this arena. (The class of a buffer does not say of which arena it is.)
    pub fn contains(&self, bytes: &[u8]) -> bool {
        let start = self.base.as_ptr().addr();
        let at = bytes.as_ptr().addr();
        start <= at && at + bytes.len() <= start + ARENA_SIZE
    }
}

impl DmaPool for Arena {
    fn release(&self, ptr: NonNull<u8>, _capacity: usize, class: u32) {
        let offset = ptr.as_ptr().addr() - self.base.as_ptr().addr();
        self.free.borrow_mut()[class as usize - 1].push(offset);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` with this layout; no buffer is left, since each would hold the arena.
        unsafe { dealloc(self.base.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_disjoint_and_come_back() {
        let arena = Arena::new().unwrap();
        for round in 0..2 {
            let mut held = Vec::new();
            for (class, &(size, count)) in CLASSES.iter().enumerate() {
                for index in 0..count {
                    let mut buf = arena.allocate(size).unwrap();
                    assert!(arena.contains(&buf) && buf.as_ptr().addr() % DMA_ALIGNMENT == 0);
                    buf.fill((class * 50 + index % 50 + round) as u8);
                    held.push((buf, (class * 50 + index % 50 + round) as u8));
                }
                assert!(arena.allocate(size).is_none());
            }
            assert!(held.iter().all(|(buf, byte)| buf.iter().all(|found| found == byte)));
        }
        assert!(arena.allocate((256 << 10) + 1).is_none());
        assert!(!arena.contains(&DmaBuf::from_heap(4096)));
    }
}
