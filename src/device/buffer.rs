//! DMA buffers: aligned memory that moves with an I/O.

#![expect(unsafe_code, reason = "raw aligned allocations that devices read and write")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::rc::Rc;

/// Alignment of every buffer: a page, which is what O_DIRECT and NVMe PRPs ask for at most.
pub const DMA_ALIGNMENT: usize = 4096;

/// Where the memory of a buffer goes back to.
///
/// Implemented by the pools of the devices. A pool is kept alive by its buffers, so it cannot unmap under them.
pub trait DmaPool {
    /// Takes the memory back. `class` is what the pool gave when it made the buffer.
    fn release(&self, ptr: NonNull<u8>, capacity: usize, class: u32);
}

/// An owned, page-aligned buffer that a device may read or write while it is in flight.
pub struct DmaBuf {
    ptr: NonNull<u8>,
    len: usize,
    capacity: usize,
    class: u32,
    pool: Option<Rc<dyn DmaPool>>,
}

impl DmaBuf {
    /// Allocates from the heap, zeroed.
    pub fn from_heap(len: usize) -> DmaBuf {
        let capacity = len.max(1).next_multiple_of(DMA_ALIGNMENT);
        let layout = Self::heap_layout(capacity);
        // SAFETY: the layout has a non-zero size.
        let raw = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(raw) else { handle_alloc_error(layout) };
        DmaBuf { ptr, len, capacity, class: 0, pool: None }
    }

    /// Wraps memory of a pool.
    ///
    /// # Safety
    /// `ptr` points to `capacity` initialised bytes, aligned to [`DMA_ALIGNMENT`], that nothing else uses until
    /// `pool.release` is called with the same three values, and that stay mapped while `pool` lives.
    pub unsafe fn from_pool(
        ptr: NonNull<u8>,
        len: usize,
        capacity: usize,
        class: u32,
        pool: Rc<dyn DmaPool>,
    ) -> DmaBuf {
        assert!(len <= capacity, "a DMA buffer of {len} bytes can't come from {capacity}");
        DmaBuf { ptr, len, capacity, class, pool: Some(pool) }
    }

    fn heap_layout(capacity: usize) -> Layout {
        Layout::from_size_align(capacity, DMA_ALIGNMENT)
            .expect("a page-aligned size below isize::MAX is a layout")
    }

    /// What the pool said about this buffer when it made it (for `uring`: whether it is registered).
    pub fn class(&self) -> u32 {
        self.class
    }

    /// Shortens the buffer. The memory stays with it.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

impl Drop for DmaBuf {
    fn drop(&mut self) {
        match self.pool.take() {
            Some(pool) => pool.release(self.ptr, self.capacity, self.class),
            // SAFETY: without a pool the memory came from `from_heap` with this very layout.
            None => unsafe { dealloc(self.ptr.as_ptr(), Self::heap_layout(self.capacity)) },
        }
    }
}

impl Deref for DmaBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `ptr` is valid for `capacity >= len` initialised bytes and exclusively ours.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for DmaBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: `ptr` is valid for `capacity >= len` initialised bytes and exclusively ours.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl std::fmt::Debug for DmaBuf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DmaBuf").field("len", &self.len).field("class", &self.class).finish_non_exhaustive()
    }
}
