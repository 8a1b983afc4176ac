//! The health log page of a controller: asked for by the admin thread now and then, and after each event.

#![expect(unsafe_code, reason = "an admin command whose buffer the controller writes to")]

use std::ffi::c_void;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use spdk_sys::*;

use crate::device::Health;

/// How often the page is asked for. A drive refreshes it at about this pace.
const INTERVAL: Duration = Duration::from_secs(60);

/// How long after an event it is asked for.
const EVENT_PAUSE: Duration = Duration::from_secs(1);

/// How long a page may take.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// The namespace of a log page that is the controller's.
const ALL_NAMESPACES: u32 = u32::MAX;

/// The status word of a command that is still under way.
const UNDER_WAY: u32 = u32::MAX;

/// A log page on its way. The controller may write to the buffer until the completion has been seen: a page that is dropped
/// before leaves both to it.
pub(super) struct HealthPage {
    /// What the callback stores the status in. Made by `Box::into_raw`.
    status: NonNull<AtomicU32>,
    /// Memory of SPDK's, for the page.
    buffer: NonNull<c_void>,
}

unsafe extern "C" fn on_log_page(context: *mut c_void, completion: *const spdk_nvme_cpl) {
    // SAFETY: `HealthPage::ask` gave it; it is freed after this has stored the status, or never.
    let status = unsafe { &*context.cast::<AtomicU32>() };
    // SAFETY: SPDK gives a completion that lives during the call.
    status.store(unsafe { basalt_completion_status(completion) }, Ordering::Release);
}

impl HealthPage {
    /// Sends the command. `None` when it can't be sent now.
    ///
    /// # Safety
    /// The controller lives until the page has come or been dropped.
    unsafe fn ask(controller: NonNull<spdk_nvme_ctrlr>) -> Option<HealthPage> {
        let lcore = SPDK_ENV_LCORE_ID_ANY as i32;
        let size = BASALT_HEALTH_PAGE_SIZE as usize;
        // SAFETY: the environment is initialised; failure is a null result.
        let buffer = unsafe { spdk_zmalloc(size, 4096, std::ptr::null_mut(), lcore, SPDK_MALLOC_DMA) };
        let page = HealthPage {
            buffer: NonNull::new(buffer)?,
            status: NonNull::from(Box::leak(Box::new(AtomicU32::new(UNDER_WAY)))),
        };
        // SAFETY: the controller lives by the contract above; the buffer and the status outlive the command, see `Drop`.
        let sent = unsafe {
            spdk_nvme_ctrlr_cmd_get_log_page(
                controller.as_ptr(),
                spdk_nvme_log_page::SPDK_NVME_LOG_HEALTH_INFORMATION as u8,
                ALL_NAMESPACES,
                buffer,
                BASALT_HEALTH_PAGE_SIZE,
                0,
                Some(on_log_page),
                page.status.as_ptr().cast(),
            )
        };
        if sent != 0 {
            // Nobody will call back: it may be freed.
            page.status().store(0, Ordering::Release);
            return None;
        }
        Some(page)
    }

    fn status(&self) -> &AtomicU32 {
        // SAFETY: it lives as long as this does.
        unsafe { self.status.as_ref() }
    }

    /// What it says, once it has come: `Some(None)` from a controller that gives none.
    fn take(&self) -> Option<Option<Health>> {
        let status = self.status().load(Ordering::Acquire);
        if status == UNDER_WAY {
            return None;
        }
        let mut raw = basalt_health::default();
        // SAFETY: the buffer has the bytes of a page, and the command has completed.
        unsafe { basalt_health_decode(self.buffer.as_ptr(), &mut raw) };
        Some((status == 0).then_some(Health {
            critical_warning: raw.critical_warning,
            temperature_kelvin: raw.temperature_kelvin,
            available_spare_percent: raw.available_spare_percent,
            used_percent: raw.used_percent,
            unsafe_shutdowns: raw.unsafe_shutdowns,
            media_errors: raw.media_errors,
            power_on_hours: raw.power_on_hours,
        }))
    }

    /// Reads the page and polls the admin queue meanwhile. `None` when the controller does not give it.
    ///
    /// # Safety
    /// The controller lives, and no other thread polls it.
    pub(super) unsafe fn read(controller: NonNull<spdk_nvme_ctrlr>) -> Option<Health> {
        // SAFETY: by the contract above.
        let page = unsafe { HealthPage::ask(controller) }?;
        let deadline = Instant::now() + WAIT_MAX;
        while Instant::now() < deadline {
            // SAFETY: as above. A failure shows in the page not coming.
            unsafe { spdk_nvme_ctrlr_process_admin_completions(controller.as_ptr()) };
            if let Some(health) = page.take() {
                return health;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        None
    }
}

impl Drop for HealthPage {
    fn drop(&mut self) {
        if self.status().load(Ordering::Acquire) == UNDER_WAY {
            return;
        }
        // SAFETY: the command has completed or was never sent: nobody else has the buffer.
        unsafe { spdk_free(self.buffer.as_ptr()) };
        // SAFETY: as above; it was made as a box and is freed once.
        drop(unsafe { Box::from_raw(self.status.as_ptr()) });
    }
}

/// What a drive warns of, in words.
pub(super) fn warning(health: &Health) -> String {
    // NVM Express Base Specification, SMART / Health Information log page, Critical Warning.
    let meanings = [
        "its spare blocks are below their threshold",
        "its temperature is beyond a threshold",
        "its reliability is degraded",
        "it has become read-only",
        "the backup of its volatile memory has failed",
        "its persistent memory has become unreliable",
    ];
    let told = meanings.iter().enumerate().filter(|(bit, _)| health.critical_warning & (1 << bit) != 0);
    let told: Vec<&str> = told.map(|(_, meaning)| *meaning).collect();
    format!(
        "the drive warns of itself: {} (critical warning {:#04x}, {} % used, {} media errors)",
        if told.is_empty() { "it does not say of what".to_owned() } else { told.join(", ") },
        health.critical_warning,
        health.used_percent,
        health.media_errors
    )
}

/// What the controller last said.
#[derive(Default)]
pub(super) struct HealthLog(Mutex<Option<Health>>);

impl HealthLog {
    pub(super) fn get(&self) -> Option<Health> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set(&self, health: Option<Health>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = health;
    }
}

/// When the admin thread asks, and what it waits for.
pub(super) struct HealthWatch {
    page: Option<HealthPage>,
    due: Instant,
}

impl HealthWatch {
    /// The page has just been read.
    pub(super) fn new() -> HealthWatch {
        HealthWatch { page: None, due: Instant::now() + INTERVAL }
    }

    /// An event came: asked soon, though not once for each of a controller that does not stop to tell.
    pub(super) fn hurry(&mut self) {
        self.due = self.due.min(Instant::now() + EVENT_PAUSE);
    }

    /// Asks when it is time, and takes an answer into `log`. Waits for nothing.
    ///
    /// # Safety
    /// The controller lives until it is dropped, and the admin queue is polled.
    pub(super) unsafe fn step(&mut self, name: &str, controller: NonNull<spdk_nvme_ctrlr>, log: &HealthLog) {
        if let Some(page) = &self.page {
            // A page that a reset has taken back ends with an error and is asked for again a minute later.
            if let Some(found) = page.take() {
                self.page = None;
                let before = log.get().map_or(0, |health| health.critical_warning);
                if let Some(health) = found.filter(|health| health.critical_warning & !before != 0) {
                    tracing::warn!("{name}: {}", warning(&health));
                }
                log.set(found);
            }
        } else if Instant::now() >= self.due {
            self.due = Instant::now() + INTERVAL;
            // SAFETY: by the contract above.
            self.page = unsafe { HealthPage::ask(controller) };
        }
    }
}
