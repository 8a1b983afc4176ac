//! A bounded pool of page-aligned heap memory: what the engines without registered memory allocate from.
//!
//! Invariants: the bytes of the buffers that are out never exceed the bound; memory that has come back is kept for the
//! next buffer of the same capacity, up to `DMA_KEPT_SIZE_MAX`, and freed when the bound needs the room.

#![expect(unsafe_code, reason = "raw aligned allocations that become DMA buffers")]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::rc::Rc;

use super::buffer::{DMA_ALIGNMENT, DmaBuf, DmaPool};
use crate::limits::DMA_KEPT_SIZE_MAX;

/// The class of heap buffers, see [`DmaBuf::class`].
pub const CLASS_HEAP: u32 = 0;

/// A bounded pool. Its buffers keep it alive.
#[derive(Debug)]
pub struct HeapPool {
    state: RefCell<State>,
}

#[derive(Debug)]
struct State {
    size_max: usize,
    /// Bytes that are out.
    out_size: usize,
    /// Buffers that are out.
    out_count: usize,
    /// Bytes that have come back and are kept.
    kept_size: usize,
    kept: BTreeMap<usize, Vec<NonNull<u8>>>,
}

impl HeapPool {
    /// A pool that hands out at most `size_max` bytes at a time.
    pub fn new(size_max: usize) -> Rc<HeapPool> {
        let state = State { size_max, out_size: 0, out_count: 0, kept_size: 0, kept: BTreeMap::new() };
        Rc::new(HeapPool { state: RefCell::new(state) })
    }

    /// A buffer of `size` bytes, or `None` when the bound would be passed. Its contents are unspecified.
    pub fn allocate(self: &Rc<Self>, size: usize) -> Option<DmaBuf> {
        let capacity = size.max(1).checked_next_multiple_of(DMA_ALIGNMENT)?;
        let ptr = self.state.borrow_mut().take(capacity)?;
        let pool: Rc<dyn DmaPool> = Rc::clone(self) as Rc<dyn DmaPool>;
        // SAFETY: `take` gave `capacity` initialised, page-aligned bytes that it no longer knows; they are freed only
        // after `release` gave them back, and then by `State` alone.
        Some(unsafe { DmaBuf::from_pool(ptr, size, capacity, CLASS_HEAP, pool) })
    }

    /// Buffers handed out and not yet dropped.
    pub fn outstanding(&self) -> usize {
        self.state.borrow().out_count
    }
}

impl State {
    fn take(&mut self, capacity: usize) -> Option<NonNull<u8>> {
        if capacity > self.size_max - self.out_size {
            return None;
        }
        let reused = self.kept.get_mut(&capacity).and_then(Vec::pop);
        let ptr = match reused {
            Some(ptr) => {
                self.kept_size -= capacity;
                ptr
            }
            None => {
                if self.out_size + self.kept_size + capacity > self.size_max {
                    self.free_kept();
                }
                let layout = layout(capacity)?;
                // SAFETY: the layout has a non-zero size.
                NonNull::new(unsafe { alloc_zeroed(layout) })?
            }
        };
        self.out_size += capacity;
        self.out_count += 1;
        Some(ptr)
    }

    fn free_kept(&mut self) {
        for (capacity, list) in std::mem::take(&mut self.kept) {
            let Some(layout) = layout(capacity) else { continue };
            for ptr in list {
                // SAFETY: it was allocated by `take` with this layout and is in no buffer.
                unsafe { dealloc(ptr.as_ptr(), layout) };
            }
        }
        self.kept_size = 0;
    }
}

/// `None` for a capacity that no address space holds.
fn layout(capacity: usize) -> Option<Layout> {
    Layout::from_size_align(capacity, DMA_ALIGNMENT).ok()
}

impl DmaPool for HeapPool {
    fn release(&self, ptr: NonNull<u8>, capacity: usize, _class: u32) {
        let mut state = self.state.borrow_mut();
        state.out_size -= capacity;
        state.out_count -= 1;
        if state.kept_size + capacity > DMA_KEPT_SIZE_MAX {
            state.free_kept();
        }
        state.kept_size += capacity;
        state.kept.entry(capacity).or_default().push(ptr);
    }
}

impl Drop for State {
    fn drop(&mut self) {
        self.free_kept();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_holds_and_what_comes_back_can_be_taken_again() {
        let pool = HeapPool::new(64 << 10);
        let mut held: Vec<DmaBuf> = (0..16).map(|_| pool.allocate(4096).unwrap()).collect();
        assert!(pool.allocate(512).is_none());
        assert_eq!(pool.outstanding(), 16);
        held.truncate(8);
        // Another capacity: the kept memory makes room for it.
        let large = pool.allocate(32 << 10).unwrap();
        assert_eq!(large.len(), 32 << 10);
        assert_eq!(large.as_ptr().addr() % DMA_ALIGNMENT, 0);
        assert!(pool.allocate(4096).is_none());
        drop((large, held));
        assert_eq!(pool.outstanding(), 0);
        assert!(pool.allocate(usize::MAX).is_none());
    }

    #[test]
    fn a_buffer_outlives_the_handle_of_its_pool() {
        let pool = HeapPool::new(1 << 20);
        let mut buf = pool.allocate(8192).unwrap();
        drop(pool);
        buf.fill(7);
        assert!(buf.iter().all(|&byte| byte == 7));
    }
}
