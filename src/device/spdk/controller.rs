//! One NVMe controller: connecting, its admin queue, its end.
//!
//! A thread of its own polls the admin queue, which sends keep-alives and hears of events; that call of SPDK's is
//! thread-safe, and nothing on a reactor waits for it. The same thread resets the controller when it must be.
//!
//! Invariants:
//! - The controller is detached after the last queue pair has been freed and the admin thread has ended: each
//!   queue holds the [`Controller`], and its drop joins the thread first.
//! - A reset happens only while no queue pair exists ([`Phase::Quiescing`] and `attached` 0): SPDK wants every other
//!   thread off the controller. Before that, over PCIe, it is disabled ([`Phase::Disabling`]), so that freeing the pairs asks
//!   nothing of a controller that may not answer.
//! - A controller that was taken out is detached at once, for the kernel waits for that; who holds a queue pair, or is
//!   counted as if it did, keeps it.
//! - The phase word is the one thing that queues look at on each poll.

#![expect(unsafe_code, reason = "calls into SPDK, which the admin thread shares with the queues")]

use std::ffi::{CString, c_char};
use std::mem::MaybeUninit;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use spdk_sys::*;

use super::health::{HealthLog, HealthPage};
use super::{events, recovery};
use crate::device::DeviceError;
use crate::device::file::FlushPoison;
use crate::device::transport_id::TransportId;
use crate::limits;

/// How long things may take. The defaults are the kernel's own, where it has such a figure.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// A command that takes longer is aborted.
    pub command: Duration,
    /// A command that is still there this long after it should have been aborted has its controller reset.
    pub abort: Duration,
    /// Attempts to reset or reconnect go on this long; then the device is gone.
    pub recovery: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            command: Duration::from_secs(30),
            abort: Duration::from_secs(5),
            recovery: Duration::from_secs(60),
        }
    }
}

/// The controller ends a connection that it has not heard of for this long.
const KEEP_ALIVE_MS: u32 = 10_000;

/// Bounds SPDK's own admin commands, at connecting and resetting.
const ADMIN_TIMEOUT_MS: u32 = 10_000;

/// SPDK's retries of one command with a status that allows it.
const TRANSPORT_RETRY_COUNT: u8 = 4;

/// Requests that SPDK keeps for each command in flight: it splits one at the drive's optimal boundary.
pub(super) const REQUESTS_PER_COMMAND: u32 = 2;

/// What queues may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Queue pairs may exist.
    Ready,
    /// Every queue gives its queue pair back; then the controller is reset.
    Quiescing,
    /// The controller will not come back.
    Gone,
    /// The controller is being disabled, before `Quiescing`: queues let it be.
    Disabling,
}

/// The phase, and how often the controller has been reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct State {
    pub(super) phase: Phase,
    pub(super) generation: u64,
}

impl State {
    fn pack(self) -> u64 {
        self.generation << 2 | self.phase as u64
    }

    fn unpack(word: u64) -> State {
        let phase = match word & 3 {
            0 => Phase::Ready,
            1 => Phase::Quiescing,
            2 => Phase::Gone,
            _ => Phase::Disabling,
        };
        State { phase, generation: word >> 2 }
    }
}

/// What the controller says of itself.
#[derive(Debug, Clone)]
pub(super) struct ControllerInfo {
    pub(super) raw: basalt_controller_info,
    pub(super) model: String,
    pub(super) serial: String,
}

/// The controller as its threads share it.
pub(super) struct Shared {
    controller: NonNull<spdk_nvme_ctrlr>,
    pub(super) name: String,
    pub(super) namespace_id: u32,
    pub(super) timeouts: Timeouts,
    pub(super) is_fabrics: bool,
    pub(super) poison: FlushPoison,
    state: AtomicU64,
    /// Queue pairs that exist.
    attached: AtomicUsize,
    /// The controller was taken away.
    pub(super) removed: AtomicBool,
    /// And so it is not there for SPDK any more either.
    detached: AtomicBool,
    /// The controller failed by itself: what it had in its cache may be gone.
    pub(super) cache_lost: AtomicBool,
    /// A queue pair of this generation has completed a command.
    pub(super) has_worked: AtomicBool,
    /// An event came: the namespace may have changed.
    pub(super) changed: AtomicBool,
    pub(super) stopping: AtomicBool,
    /// What the controller last said of itself.
    pub(super) health: HealthLog,
    /// What the namespace was when it was opened; it must be the same after a reset.
    pub(super) identity: Identity,
    admin: Mutex<Option<std::thread::Thread>>,
}

/// What a namespace is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) block_size: u32,
    pub(super) block_count: u64,
    pub(super) nguid: [u8; 16],
    pub(super) eui64: u64,
}

// SAFETY: the pointer is to a controller that lives until `Controller::drop`. The calls made through it from several
// threads are those that SPDK locks (admin completions, allocating and freeing queue pairs, identify data); a reset is made
// by the admin thread alone, while no queue pair exists.
unsafe impl Send for Shared {}
// SAFETY: as above; everything else in it is atomic, locked or constant.
unsafe impl Sync for Shared {}

impl Shared {
    pub(super) fn raw(&self) -> *mut spdk_nvme_ctrlr {
        self.controller.as_ptr()
    }

    pub(super) fn controller(&self) -> NonNull<spdk_nvme_ctrlr> {
        self.controller
    }

    pub(super) fn state(&self) -> State {
        State::unpack(self.state.load(Ordering::Acquire))
    }

    /// The admin thread alone leaves `Quiescing`.
    pub(super) fn settle(&self, state: State) {
        self.state.store(state.pack(), Ordering::Release);
    }

    pub(super) fn attached_count(&self) -> usize {
        self.attached.load(Ordering::SeqCst)
    }

    /// Announces a queue pair of this generation. `false` when it must not be made any more.
    pub(super) fn attach(&self, generation: u64) -> bool {
        self.attached.fetch_add(1, Ordering::SeqCst);
        // The admin thread counts after it announced `Quiescing`: one of both sees the other.
        let is_current =
            self.state.load(Ordering::SeqCst) == State { phase: Phase::Ready, generation }.pack();
        if !is_current {
            self.detach();
        }
        is_current
    }

    /// A queue pair has been freed, or was not made.
    pub(super) fn detach(&self) {
        self.attached.fetch_sub(1, Ordering::SeqCst);
        if self.state().phase == Phase::Quiescing {
            self.wake_admin();
        }
    }

    /// Has the controller reset, unless that has happened since `generation` or is under way.
    pub(super) fn request_reset(&self, generation: u64, why: &str) {
        let from = State { phase: Phase::Ready, generation }.pack();
        let phase = if self.is_fabrics { Phase::Quiescing } else { Phase::Disabling };
        let to = State { phase, generation }.pack();
        if self.state.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            let what = if self.removed.load(Ordering::Acquire) { "letting go of" } else { "resetting" };
            tracing::warn!("{}: {why}; {what} the controller", self.name);
            self.wake_admin();
        }
    }

    /// Whether the bus says that the controller is being taken away.
    pub(super) fn is_being_removed(&self) -> bool {
        // SAFETY: the admin thread asks, which alone detaches the controller while that thread runs.
        !self.detached.load(Ordering::Acquire) && unsafe { basalt_is_removed(self.raw()) }
    }

    /// Lets SPDK forget the controller, once. Not while a queue pair exists, nor after a queue pair could be made.
    pub(super) fn let_go(&self) {
        if !self.detached.swap(true, Ordering::AcqRel) {
            // SAFETY: by the contract above no queue pair uses it, and it is detached once.
            unsafe { spdk_nvme_detach(self.raw()) };
        }
    }

    fn wake_admin(&self) {
        if let Some(thread) = &*self.admin.lock().unwrap_or_else(PoisonError::into_inner) {
            thread.unpark();
        }
    }

    /// The namespace, looked up anew: a reset may have moved it. `None` when it is not active.
    pub(super) fn namespace(&self) -> Option<NonNull<spdk_nvme_ns>> {
        active_namespace(self.raw(), self.namespace_id)
    }

    /// Sends keep-alives, hears of events and completions. `false` when the controller has failed.
    pub(super) fn poll_admin(&self) -> bool {
        // SAFETY: the controller lives; SPDK locks this call.
        unsafe { spdk_nvme_ctrlr_process_admin_completions(self.raw()) >= 0 }
    }
}

/// The namespace when it is active.
pub(super) fn active_namespace(controller: *mut spdk_nvme_ctrlr, id: u32) -> Option<NonNull<spdk_nvme_ns>> {
    // SAFETY: the controller lives; an id beyond its namespaces gives null.
    let namespace = NonNull::new(unsafe { spdk_nvme_ctrlr_get_ns(controller, id) })?;
    // SAFETY: it is a namespace of a controller that lives.
    unsafe { spdk_nvme_ns_is_active(namespace.as_ptr()) }.then_some(namespace)
}

/// What Identify says about a namespace.
pub(super) fn namespace_info(namespace: NonNull<spdk_nvme_ns>) -> basalt_namespace_info {
    let mut info = MaybeUninit::<basalt_namespace_info>::zeroed();
    // SAFETY: the namespace is one of a controller that lives.
    unsafe { basalt_namespace_info(namespace.as_ptr(), info.as_mut_ptr()) };
    // SAFETY: the shim has filled it in whole, and zeros are a value of it anyway.
    unsafe { info.assume_init() }
}

impl Identity {
    pub(super) fn of(info: &basalt_namespace_info) -> Identity {
        let basalt_namespace_info { block_size, block_count, nguid, eui64, .. } = *info;
        Identity { block_size, block_count, nguid, eui64 }
    }
}

/// Detaches a controller that did not get as far as its [`Controller`].
pub(super) struct Attached(pub(super) Option<NonNull<spdk_nvme_ctrlr>>);

impl Drop for Attached {
    fn drop(&mut self) {
        if let Some(controller) = self.0.take() {
            // SAFETY: it was connected by this thread and nothing else knows it.
            unsafe { spdk_nvme_detach(controller.as_ptr()) };
        }
    }
}

/// A connected controller. Dropped after its queues, it detaches.
pub(super) struct Controller {
    pub(super) shared: Arc<Shared>,
    pub(super) info: ControllerInfo,
    pub(super) namespace: basalt_namespace_info,
    thread: Option<JoinHandle<()>>,
}

impl Controller {
    /// Connects and starts the admin thread.
    pub(super) fn connect(
        device: &TransportId,
        queue_size: u32,
        timeouts: Timeouts,
    ) -> Result<Controller, DeviceError> {
        let name = device.to_string();
        let unusable = |cause: String| DeviceError::Unusable { name: name.clone(), cause };
        let controller = connect(device, queue_size).ok_or_else(|| unusable(unreachable_cause(device)))?;
        let mut attached = Attached(Some(controller));
        let info = controller_info(controller);
        let namespace_id = choose_namespace(controller, device.namespace).map_err(unusable)?;
        let namespace = active_namespace(controller.as_ptr(), namespace_id).map(namespace_info);
        let namespace =
            namespace.ok_or_else(|| unusable(format!("it has no active namespace {namespace_id}")))?;
        let shared = Arc::new(Shared {
            controller,
            name: name.clone(),
            namespace_id,
            timeouts,
            is_fabrics: info.raw.is_fabrics,
            poison: FlushPoison::default(),
            state: AtomicU64::new(State { phase: Phase::Ready, generation: 0 }.pack()),
            attached: AtomicUsize::new(0),
            removed: AtomicBool::new(false),
            detached: AtomicBool::new(false),
            cache_lost: AtomicBool::new(false),
            has_worked: AtomicBool::new(false),
            changed: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            health: HealthLog::default(),
            identity: Identity::of(&namespace),
            admin: Mutex::new(None),
        });
        // SAFETY: the controller lives, and nobody else polls it yet.
        shared.health.set(unsafe { HealthPage::read(controller) });
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("nvme-admin".to_owned())
            .spawn(move || recovery::run_admin(&for_thread))
            .map_err(|source| DeviceError::Os { name, action: "start the admin thread of", source })?;
        *shared.admin.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread.thread().clone());
        events::register(&shared);
        attached.0 = None;
        Ok(Controller { shared, info, namespace, thread: Some(thread) })
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A panic there has been reported by its hook; there is nothing to add.
            let _ = thread.join();
        }
        debug_assert_eq!(self.shared.attached_count(), 0, "each queue pair holds its controller");
        self.shared.let_go();
    }
}

pub(super) fn connect(device: &TransportId, queue_size: u32) -> Option<NonNull<spdk_nvme_ctrlr>> {
    let text = CString::new(device.controller()).ok()?;
    let mut id = MaybeUninit::<spdk_nvme_transport_id>::zeroed();
    // SAFETY: both outlive the call, which fills in the zeroed structure.
    let parsed = unsafe { spdk_nvme_transport_id_parse(id.as_mut_ptr(), text.as_ptr()) };
    if parsed != 0 {
        return None;
    }
    let options = basalt_connect_options {
        io_queue_size: queue_size,
        io_queue_requests: queue_size * REQUESTS_PER_COMMAND,
        io_queue_count: limits::REACTOR_COUNT_MAX as u32 + 1,
        keep_alive_timeout_ms: KEEP_ALIVE_MS,
        admin_timeout_ms: ADMIN_TIMEOUT_MS,
        transport_retry_count: TRANSPORT_RETRY_COUNT,
    };
    // SAFETY: the structures outlive the call; the environment is initialised, since devices are opened after it.
    NonNull::new(unsafe { basalt_connect(id.as_ptr(), &options) })
}

pub(super) fn unreachable_cause(device: &TransportId) -> String {
    match device.pci_address() {
        Some(address) => format!(
            "SPDK finds no controller that it may have there: bind {address} to vfio-pci first (basalt device bind {address}), \
             and stop whatever else uses it"
        ),
        None => {
            "no NVMe/TCP target answers there, or it does not let this host in; SPDK's log above says which"
                .to_owned()
        }
    }
}

pub(super) fn controller_info(controller: NonNull<spdk_nvme_ctrlr>) -> ControllerInfo {
    let mut info = MaybeUninit::<basalt_controller_info>::zeroed();
    // SAFETY: the controller is connected.
    unsafe { basalt_controller_info(controller.as_ptr(), info.as_mut_ptr()) };
    // SAFETY: the shim has filled it in whole, and zeros are a value of it anyway.
    let raw = unsafe { info.assume_init() };
    ControllerInfo { model: text(&raw.model), serial: text(&raw.serial), raw }
}

/// A C string in an array.
pub(super) fn text(chars: &[c_char]) -> String {
    let bytes: Vec<u8> = chars.iter().take_while(|c| **c != 0).map(|c| *c as u8).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The numbers of the namespaces that are active, bounded.
pub(super) fn active_namespaces(controller: NonNull<spdk_nvme_ctrlr>) -> Vec<u32> {
    let mut active = Vec::new();
    // SAFETY: the controller is connected.
    let mut next = unsafe { spdk_nvme_ctrlr_get_first_active_ns(controller.as_ptr()) };
    while next != 0 && active.len() < 1024 {
        active.push(next);
        // SAFETY: as above.
        next = unsafe { spdk_nvme_ctrlr_get_next_active_ns(controller.as_ptr(), next) };
    }
    active
}

/// The namespace that was asked for, or the only one.
fn choose_namespace(controller: NonNull<spdk_nvme_ctrlr>, wanted: Option<u32>) -> Result<u32, String> {
    let active = active_namespaces(controller);
    let list = active.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    match (wanted, active.as_slice()) {
        (_, []) => Err("it has no active namespace".to_owned()),
        (Some(wanted), active) if active.contains(&wanted) => Ok(wanted),
        (Some(wanted), _) => Err(format!("it has no active namespace {wanted}; it has {list}")),
        (None, [only]) => Ok(*only),
        (None, _) => Err(format!("it has the namespaces {list}: say which, with ns:N")),
    }
}
