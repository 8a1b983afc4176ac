//! The process's allocator (mimalloc) with a count beside it: how many bytes of heap the process has in use, whoever took them.
//!
//! The program installs it; in a process that doesn't, nothing is known.
//!
//! Invariants: the count is exact but for `BATCH_SIZE` bytes per thread, which count on their own and add up now and then,
//! so that threads do not fight over one cache line.

#![expect(unsafe_code, reason = "a global allocator, which hands every call on to another")]

use std::alloc::{GlobalAlloc, Layout};
use std::cell::Cell;
use std::ffi::c_long;
use std::sync::atomic::{AtomicIsize, Ordering};

use mimalloc::MiMalloc;

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

/// What a piece of so many bytes takes: mimalloc has classes of 16 bytes up to 128, then eight to each doubling.
pub fn taken(size: usize) -> usize {
    let step = if size <= 128 { 16 } else { size.next_power_of_two() / 16 };
    size.max(1).checked_next_multiple_of(step).unwrap_or(size)
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

/// How long mimalloc keeps what was given back before the system gets it. Its own second would let the resident memory of a
/// node run far ahead of what it has in use, which is what `--memory` bounds.
const PURGE_DELAY_MS: c_long = 10;

/// `mi_option_purge_delay`, for which the bindings have no name; a test looks at its default.
const PURGE_DELAY_OPTION: libmimalloc_sys::mi_option_t = 15;

/// Sets the allocator up, once, early.
pub fn set_up() {
    // SAFETY: an option of mimalloc's, set while the process has one thread; any number of milliseconds will do.
    unsafe { libmimalloc_sys::mi_option_set(PURGE_DELAY_OPTION, PURGE_DELAY_MS) }
}

/// mimalloc, counting. It takes half the time of the C library's, where values of many sizes come and go.
#[derive(Debug, Clone, Copy, Default)]
pub struct CountingAllocator;

// SAFETY: every call goes to `MiMalloc`, with the arguments as they came, and its result is returned as it is; counting
// neither allocates nor panics.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps what `GlobalAlloc::alloc` asks for, which is what `MiMalloc` asks for.
        let ptr = unsafe { MiMalloc.alloc(layout) };
        count_if(!ptr.is_null(), taken(layout.size()) as isize);
        ptr
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as for `alloc`.
        let ptr = unsafe { MiMalloc.alloc_zeroed(layout) };
        count_if(!ptr.is_null(), taken(layout.size()) as isize);
        ptr
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        count_if(true, -(taken(layout.size()) as isize));
        // SAFETY: the caller has `ptr` from this allocator, which is to say from `MiMalloc`, with this layout.
        unsafe { MiMalloc.dealloc(ptr, layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as for `dealloc`; the caller keeps what `GlobalAlloc::realloc` asks of `size`.
        let ptr = unsafe { MiMalloc.realloc(ptr, layout, size) };
        count_if(!ptr.is_null(), taken(size) as isize - taken(layout.size()) as isize);
        ptr
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_that_is_set_is_the_purge_delay() {
        // SAFETY: reads an option.
        let before = unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY_OPTION) };
        assert_eq!(before, 1_000, "mimalloc's own, or another option");
        set_up();
        // SAFETY: as above.
        assert_eq!(unsafe { libmimalloc_sys::mi_option_get(PURGE_DELAY_OPTION) }, PURGE_DELAY_MS);
    }

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
