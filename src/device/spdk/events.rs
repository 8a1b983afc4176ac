//! What SPDK calls back with about a controller: events, timeouts, removal, log pages.
//!
//! Callbacks run inside a poll, on whichever thread polls; they store a word or send an abort, and return.

#![expect(unsafe_code, reason = "callbacks from SPDK")]

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use spdk_sys::*;

use super::controller::{Health, Phase, Shared};

/// The admin queue's own timeout.
const ADMIN_TIMEOUT_US: u64 = 30_000_000;

/// How long a log page may take.
const LOG_PAGE_WAIT: Duration = Duration::from_secs(10);

/// The namespace of a log page that is the controller's.
const ALL_NAMESPACES: u32 = u32::MAX;

/// Controller status: ready, and fatal.
const STATUS_READY: u32 = 1 << 0;
const STATUS_FATAL: u32 = 1 << 1;

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

/// A log page on its way.
struct LogPage {
    /// `u32::MAX` until the completion's status is there.
    status: AtomicU32,
}

unsafe extern "C" fn on_log_page(context: *mut c_void, completion: *const spdk_nvme_cpl) {
    // SAFETY: `read_health` gave it, and keeps it until this has run.
    let page = unsafe { &*context.cast::<LogPage>() };
    // SAFETY: SPDK gives a completion that lives during the call.
    let status = unsafe { basalt_completion_status(completion) };
    page.status.store(status, Ordering::Release);
}

/// Reads the health log page. `wait` is called until it is there, and lets the admin queue be polled. `None` when the
/// controller does not give it.
///
/// # Safety
/// The controller lives until this returns.
pub(super) unsafe fn read_health(controller: NonNull<spdk_nvme_ctrlr>, wait: impl Fn()) -> Option<Health> {
    let lcore = SPDK_ENV_LCORE_ID_ANY as i32;
    let size = BASALT_HEALTH_PAGE_SIZE as usize;
    // SAFETY: the environment is initialised; failure is a null result.
    let buffer = unsafe { spdk_zmalloc(size, 4096, std::ptr::null_mut(), lcore, SPDK_MALLOC_DMA) };
    if buffer.is_null() {
        return None;
    }
    let page = Box::into_raw(Box::new(LogPage { status: AtomicU32::new(u32::MAX) }));
    // SAFETY: the controller lives; page and buffer live until the completion has been seen, or for ever.
    let sent = unsafe {
        spdk_nvme_ctrlr_cmd_get_log_page(
            controller.as_ptr(),
            spdk_nvme_log_page::SPDK_NVME_LOG_HEALTH_INFORMATION as u8,
            ALL_NAMESPACES,
            buffer,
            BASALT_HEALTH_PAGE_SIZE,
            0,
            Some(on_log_page),
            page.cast(),
        )
    };
    let deadline = Instant::now() + LOG_PAGE_WAIT;
    let status = loop {
        if sent != 0 {
            break 1;
        }
        // SAFETY: it is freed below only.
        let status = unsafe { &*page }.status.load(Ordering::Acquire);
        if status != u32::MAX {
            break status;
        }
        if Instant::now() > deadline {
            // The controller may still write to the buffer: both are left to it.
            return None;
        }
        wait();
    };
    let mut raw = basalt_health::default();
    // SAFETY: the buffer has the bytes of a page.
    unsafe { basalt_health_decode(buffer, &mut raw) };
    // SAFETY: the command has completed or was never sent: nobody else has the buffer.
    unsafe { spdk_free(buffer) };
    // SAFETY: as above, of the box.
    drop(unsafe { Box::from_raw(page) });
    (status == 0).then_some(Health {
        critical_warning: raw.critical_warning,
        temperature_kelvin: raw.temperature_kelvin,
        available_spare_percent: raw.available_spare_percent,
        used_percent: raw.used_percent,
        unsafe_shutdowns: raw.unsafe_shutdowns,
        media_errors: raw.media_errors,
        power_on_hours: raw.power_on_hours,
    })
}
