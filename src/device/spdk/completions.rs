//! Where SPDK's callbacks leave their word: a slot for each command that may be in flight.
//!
//! Invariants: a slot's address does not change while a command has it; the callback runs inside a poll of the queue's own
//! thread and touches nothing but its slot and the list of what is ready, which has room for all slots.

#![expect(unsafe_code, reason = "SPDK keeps pointers to the slots")]

use std::cell::Cell;
use std::ffi::c_void;
use std::ptr::NonNull;

use spdk_sys::{basalt_completion_status, spdk_nvme_cpl};

use super::status::Status;

/// The slots of one queue.
pub(super) struct Completions {
    /// From a box that is freed in `drop`: SPDK has pointers into it, which a move of the box itself would invalidate.
    inner: NonNull<Inner>,
}

struct Inner {
    slots: Box<[Slot]>,
    ready: Box<[Cell<u32>]>,
    ready_count: Cell<usize>,
}

struct Slot {
    inner: Cell<*const Inner>,
    index: u32,
    status: Cell<u32>,
}

impl Completions {
    pub(super) fn new(count: u32) -> Completions {
        let slot =
            |index| Slot { inner: Cell::new(std::ptr::null()), index, status: Cell::new(Status::SUCCESS.0) };
        let inner = Box::new(Inner {
            slots: (0..count).map(slot).collect(),
            ready: (0..count).map(Cell::new).collect(),
            ready_count: Cell::new(0),
        });
        let inner = NonNull::from(Box::leak(inner));
        let completions = Completions { inner };
        for slot in &completions.inner().slots {
            slot.inner.set(inner.as_ptr());
        }
        completions
    }

    fn inner(&self) -> &Inner {
        // SAFETY: the box is freed in `drop` only, and everything in it is changed through cells by this thread.
        unsafe { self.inner.as_ref() }
    }

    /// What to give SPDK with the command of a slot, beside [`on_completion`].
    pub(super) fn context(&self, slot: u32) -> *mut c_void {
        std::ptr::from_ref(&self.inner().slots[slot as usize]).cast_mut().cast()
    }

    /// The next slot whose command has completed since, in the order of completion from `at` on.
    pub(super) fn ready(&self, at: usize) -> Option<(u32, Status)> {
        let inner = self.inner();
        let index = inner.ready[..inner.ready_count.get()].get(at)?.get();
        Some((index, Status(inner.slots[index as usize].status.get())))
    }

    /// Forgets what `ready` gave.
    pub(super) fn clear(&self) {
        self.inner().ready_count.set(0);
    }
}

impl Drop for Completions {
    fn drop(&mut self) {
        // SAFETY: it came from a box; the queue pair has been freed, so SPDK calls nobody back any more.
        drop(unsafe { Box::from_raw(self.inner.as_ptr()) });
    }
}

/// Stores the status and returns.
///
/// # Safety
/// For SPDK alone, with the context of a slot and a completion.
pub(super) unsafe extern "C" fn on_completion(context: *mut c_void, completion: *const spdk_nvme_cpl) {
    // SAFETY: the context is a slot of a queue whose pair is being polled or freed, so the slots live.
    let slot = unsafe { &*context.cast::<Slot>() };
    // SAFETY: SPDK gives a completion that lives during the call.
    slot.status.set(unsafe { basalt_completion_status(completion) });
    // SAFETY: set when the slots were made, and as old as they.
    let inner = unsafe { &*slot.inner.get() };
    let count = inner.ready_count.get();
    // Each slot has one command at most, so there is room; an index out of range must not unwind into C.
    if let Some(place) = inner.ready.get(count) {
        place.set(slot.index);
        inner.ready_count.set(count + 1);
    }
}
