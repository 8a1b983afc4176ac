//! What SPDK calls back with about a controller: events, timeouts, removal.
//!
//! Callbacks run inside a poll, on whichever thread polls; they store a word or send an abort, and return.

#![expect(unsafe_code, reason = "callbacks from SPDK")]

use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use spdk_sys::*;

use super::controller::{Phase, Shared};

/// The admin queue's own timeout.
const ADMIN_TIMEOUT_US: u64 = 30_000_000;

/// Controller status: ready, and fatal.
const STATUS_READY: u32 = 1 << 0;
const STATUS_FATAL: u32 = 1 << 1;

/// Controller status: the whole NVM subsystem was reset, which no host of ours asks for.
const STATUS_SUBSYSTEM_RESET: u32 = 1 << 4;

/// Whether a controller with this status has been through more than a reset by its host, which its cache outlives. All ones
/// is what a drive without power reads as.
pub(super) fn has_lost_cache(status: u32) -> bool {
    status & (STATUS_FATAL | STATUS_SUBSYSTEM_RESET) != 0
}

/// Has SPDK report to `shared` what happens to its controller.
pub(super) fn register(shared: &Arc<Shared>) {
    let context = Arc::as_ptr(shared).cast_mut().cast::<c_void>();
    let command_us = u64::try_from(shared.timeouts.command.as_micros()).unwrap_or(u64::MAX);
    // SAFETY: the context outlives the controller, which `Controller::drop` detaches while it still holds the context.
    unsafe { basalt_removal_register(shared.raw(), Some(on_removed), context) };
    // SAFETY: as above.
    unsafe { spdk_nvme_ctrlr_register_aer_callback(shared.raw(), Some(on_event), context) };
    // SAFETY: as above.
    unsafe { basalt_timeout_register(shared.raw(), command_us, ADMIN_TIMEOUT_US, Some(on_timeout), context) };
}

/// # Safety
/// `context` is what `register` gave, and its controller lives.
unsafe fn shared<'a>(context: *mut c_void) -> &'a Shared {
    // SAFETY: by the contract above; nobody has it mutably.
    unsafe { &*context.cast::<Shared>() }
}

unsafe extern "C" fn on_removed(context: *mut c_void, _controller: *mut spdk_nvme_ctrlr) {
    // SAFETY: SPDK gives back what `register` gave.
    let shared = unsafe { shared(context) };
    shared.removed.store(true, Ordering::Release);
    shared.request_reset(shared.state().generation, "it has been removed");
}

unsafe extern "C" fn on_event(context: *mut c_void, completion: *const spdk_nvme_cpl) {
    // SAFETY: SPDK gives back what `register` gave.
    let shared = unsafe { shared(context) };
    // SAFETY: SPDK gives a completion that lives during the call.
    let status = unsafe { basalt_completion_status(completion) };
    if status != 0 {
        return;
    }
    // SAFETY: as above.
    let event = unsafe { basalt_completion_dword0(completion) };
    // NVM Express Base Specification, Asynchronous Event Request, completion dword 0.
    let (kind, information) = (event & 7, (event >> 8) & 0xff);
    let what = match (kind, information) {
        (0, _) => "an error event",
        (1, 0) => "its reliability is degraded",
        (1, 1) => "its temperature is beyond a threshold",
        (1, 2) => "its spare blocks are below their threshold",
        (2, 0) => "its namespaces have changed",
        _ => "an event",
    };
    tracing::warn!("{}: {what} (event {kind}/{information:02x})", shared.name);
    shared.changed.store(true, Ordering::Release);
}

unsafe extern "C" fn on_timeout(
    context: *mut c_void,
    controller: *mut spdk_nvme_ctrlr,
    queue_pair: *mut spdk_nvme_qpair,
    command: u16,
) {
    // SAFETY: SPDK gives back what `register` gave.
    let shared = unsafe { shared(context) };
    let state = shared.state();
    if state.phase != Phase::Ready {
        return;
    }
    if queue_pair.is_null() {
        shared.request_reset(state.generation, "an admin command timed out");
        return;
    }
    // Over a fabric the register is read by a command, which would have to be waited for.
    if !shared.is_fabrics {
        // SAFETY: the controller lives; all ones are what a drive that was pulled reads as.
        let status = unsafe { basalt_controller_status(controller) };
        let why = match (status & STATUS_FATAL != 0, status & STATUS_READY != 0) {
            (true, _) => Some("a command timed out, and the controller says that it has failed"),
            // Somebody else has reset it: what it had been told is forgotten, an abort as well.
            (false, false) => Some("a command timed out, and the controller is not enabled any more"),
            (false, true) => None,
        };
        if has_lost_cache(status) {
            shared.cache_lost.store(true, Ordering::Release);
        }
        if let Some(why) = why {
            shared.request_reset(state.generation, why);
            return;
        }
    }
    tracing::warn!("{}: a command timed out; aborting it", shared.name);
    // SAFETY: the queue pair is being polled by this thread. Whether the abort works shows in the command's own completion;
    // when it does not come, the queue asks for a reset.
    unsafe {
        spdk_nvme_ctrlr_cmd_abort(controller, queue_pair, command, Some(on_aborted), std::ptr::null_mut());
    }
}

unsafe extern "C" fn on_aborted(_context: *mut c_void, _completion: *const spdk_nvme_cpl) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_outlives_a_reset_by_its_host_and_nothing_else() {
        // Ready; not enabled, as after a function-level reset.
        assert!(!has_lost_cache(STATUS_READY) && !has_lost_cache(0));
        assert!(has_lost_cache(STATUS_FATAL) && has_lost_cache(STATUS_READY | STATUS_FATAL));
        assert!(has_lost_cache(STATUS_READY | STATUS_SUBSYSTEM_RESET) && has_lost_cache(u32::MAX));
    }
}
