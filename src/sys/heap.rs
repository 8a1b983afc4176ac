//! The system's allocator with a count beside it: how many bytes of heap the process has in use, whoever took them.
//!
//! The program installs it; in a process that doesn't, nothing is known.
//!
//! Invariants: the count is exact but for `BATCH_SIZE` bytes per thread, which count on their own and add up now and then,
//! so that threads do not fight over one cache line.

#![expect(unsafe_code, reason = "a global allocator, which hands every call on to the system's")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicIsize, Ordering};

/// Bytes that a thread counts before it adds them up.
const BATCH_SIZE: isize = 32 << 10;

static ALLOCATED: AtomicIsize = AtomicIsize::new(0);

thread_local! {
    // Neither an initialiser nor a destructor: it can be used inside an allocator and while a thread ends.
    static UNCOUNTED: Cell<isize> = const { Cell::new(0) };
}

/// Bytes of heap in use, with what the allocator itself needs beside each piece; `None` when nobody counts.
pub fn allocated() -> Option<u64> {
    match ALLOCATED.load(Ordering::Relaxed) {
        0 => None,
        size => Some(u64::try_from(size).unwrap_or(0)),
    }
}

/// What a piece of so many bytes takes: a word beside it, in steps of two.
fn taken(size: usize) -> isize {
    (size.saturating_add(8).next_multiple_of(16).max(32)) as isize
}

fn count_if(succeeded: bool, size: isize) {
    if !succeeded {
        return;
    }
    let uncounted = UNCOUNTED.get() + size;
    if uncounted.abs() < BATCH_SIZE {
        UNCOUNTED.set(uncounted);
    } else {
        UNCOUNTED.set(0);
        ALLOCATED.fetch_add(uncounted, Ordering::Relaxed);
    }
}

/// The system's allocator, counting.
#[derive(Debug, Clone, Copy, Default)]
pub struct CountingAllocator;

// SAFETY: every call goes to `System`, with the arguments as they came, and its result is returned as it is; counting
// neither allocates nor panics.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps what `GlobalAlloc::alloc` asks for, which is what `System` asks for.
        let ptr = unsafe { System.alloc(layout) };
        count_if(!ptr.is_null(), taken(layout.size()));
        ptr
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as for `alloc`.
        let ptr = unsafe { System.alloc_zeroed(layout) };
        count_if(!ptr.is_null(), taken(layout.size()));
        ptr
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count_if(true, -taken(layout.size()));
        // SAFETY: the caller has `ptr` from this allocator, which is to say from `System`, with this layout.
        unsafe { System.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as for `dealloc`; the caller keeps what `GlobalAlloc::realloc` asks of `size`.
        let ptr = unsafe { System.realloc(ptr, layout, size) };
        count_if(!ptr.is_null(), taken(size) - taken(layout.size()));
        ptr
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_and_given_back_is_counted() {
        // Other tests of the process do not use this allocator, so the count is this test's alone.
        let allocator = CountingAllocator;
        let layout = Layout::from_size_align(1 << 20, 4096).unwrap();
        // SAFETY: the layout has a non-zero size.
        let ptr = unsafe { allocator.alloc_zeroed(layout) };
        assert!(!ptr.is_null());
        let first = allocated().unwrap();
        assert!(first >= 1 << 20, "{first}");
        // SAFETY: `ptr` is this allocator's, of this layout, and the new size is not zero.
        let ptr = unsafe { allocator.realloc(ptr, layout, 3 << 20) };
        assert_eq!(allocated().unwrap() - first, 2 << 20);
        let layout = Layout::from_size_align(3 << 20, 4096).unwrap();
        // SAFETY: `ptr` came from `realloc` with this size and alignment.
        unsafe { allocator.dealloc(ptr, layout) };
        assert!(allocated().unwrap_or(0) < 1 << 10);
        // Little by little: a thread adds up at the latest after a batch.
        let small = Layout::from_size_align(100, 8).unwrap();
        // SAFETY: the layout has a non-zero size.
        let many: Vec<_> = (0..2_000).map(|_| unsafe { allocator.alloc(small) }).collect();
        let counted = allocated().unwrap() as isize;
        assert!((2_000 * 112 - counted).abs() <= BATCH_SIZE, "{counted}");
        for ptr in many {
            // SAFETY: each is this allocator's, of this layout.
            unsafe { allocator.dealloc(ptr, small) };
        }
    }
}
