//! The admin thread of a controller: keep-alives while all is well, and the reset when it is not.
//!
//! A reset goes: announce it; disable a drive; every queue sees that at its next poll, frees its queue pair and keeps the
//! buffers of what was in flight; then the controller is reset, again and again for a bounded time; then the queues make new
//! queue pairs, and what was in flight is told as aborted, its outcome unknown. Without success the device is gone, for good.

#![expect(unsafe_code, reason = "calls into SPDK")]

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use spdk_sys::{
    basalt_controller_status, basalt_disconnect, basalt_reconnect, spdk_nvme_ctrlr_fail,
    spdk_nvme_ctrlr_reset,
};

use super::controller::{Identity, Phase, Shared, State, namespace_info};
use super::events::has_lost_cache;
use super::health::HealthWatch;

/// How often the admin queue is looked at.
const ADMIN_INTERVAL: Duration = Duration::from_millis(10);

/// How often a waiting reset looks whether the last queue pair has gone.
const QUIESCE_INTERVAL: Duration = Duration::from_millis(1);

/// How often the queues of a controller that has gone are looked at.
const GONE_INTERVAL: Duration = Duration::from_millis(200);

/// Pauses between attempts, doubled from the first to the last.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// The admin thread.
pub(super) fn run_admin(shared: &Shared) {
    let mut is_disabled = false;
    let mut trouble = Trouble::default();
    let mut health = HealthWatch::new();
    while !shared.stopping.load(Ordering::Acquire) {
        let state = shared.state();
        match state.phase {
            Phase::Ready => {
                if shared.is_being_removed() {
                    shared.removed.store(true, Ordering::Release);
                    shared.request_reset(state.generation, "it is being removed");
                    continue;
                }
                if !shared.poll_admin() {
                    shared.request_reset(state.generation, "the admin queue has failed");
                    continue;
                }
                if shared.changed.swap(false, Ordering::AcqRel) {
                    health.hurry();
                    if let Err(cause) = verify(shared) {
                        // Queues find out by their state; nothing is reset, since the controller itself is well.
                        tracing::error!("{}: {cause}", shared.name);
                        shared.settle(State { phase: Phase::Gone, ..state });
                        continue;
                    }
                }
                // SAFETY: the controller is there while the phase is `Ready`, and this thread polls its admin queue and
                // alone detaches it.
                unsafe { health.step(&shared.name, shared.controller(), &shared.health) };
                std::thread::park_timeout(ADMIN_INTERVAL);
            }
            Phase::Disabling => {
                // SAFETY: the controller lives; what is not there any more reads as all ones.
                let status = unsafe { basalt_controller_status(shared.raw()) };
                if has_lost_cache(status) {
                    shared.cache_lost.store(true, Ordering::Release);
                }
                // SAFETY: the controller lives; queues poll their pairs at most, which SPDK allows meanwhile.
                is_disabled = unsafe { basalt_disconnect(shared.raw()) } == 0;
                shared.settle(State { phase: Phase::Quiescing, ..state });
            }
            Phase::Quiescing => {
                let since =
                    trouble.begin(shared.has_worked.swap(false, Ordering::AcqRel), shared.timeouts.recovery);
                recover(shared, state.generation, is_disabled, since);
                trouble.end();
                is_disabled = false;
            }
            Phase::Gone => {
                shared.health.set(None);
                // The kernel waits for the drive that was taken out; it stays with queues that have not noticed yet.
                let is_out = shared.removed.load(Ordering::Acquire) || shared.is_being_removed();
                if is_out && shared.attached_count() == 0 {
                    shared.removed.store(true, Ordering::Release);
                    shared.let_go();
                }
                std::thread::park_timeout(GONE_INTERVAL);
            }
        }
    }
}

/// How long the controller has been of no use. A reset that is followed by another before any command has completed was no
/// end of it.
#[derive(Default)]
struct Trouble {
    since: Option<Instant>,
    ended: Option<Instant>,
}

impl Trouble {
    /// Another reset begins. Returns when the trouble began.
    fn begin(&mut self, has_worked: bool, limit: Duration) -> Instant {
        // A node that was idle for so long had no command that could have completed.
        let was_well = has_worked || self.ended.is_none_or(|ended| ended.elapsed() > limit);
        let now = Instant::now();
        if was_well {
            self.since = None;
        }
        *self.since.get_or_insert(now)
    }

    fn end(&mut self) {
        self.ended = Some(Instant::now());
    }
}

/// Waits for the queues, resets, verifies. Ends in another phase, unless the device is being closed.
fn recover(shared: &Shared, generation: u64, is_disabled: bool, since: Instant) {
    let started = Instant::now();
    let limit = shared.timeouts.recovery;
    while shared.attached_count() > 0 {
        if shared.stopping.load(Ordering::Acquire) {
            return;
        }
        if since.elapsed() > limit {
            gone(shared, generation, "a queue did not give its queue pair back");
            return;
        }
        std::thread::park_timeout(QUIESCE_INTERVAL);
    }
    if since.elapsed() > limit {
        gone(shared, generation, "it was reset again and again, and no command has completed since");
        return;
    }
    let mut pause = PAUSE_MIN;
    let mut attempts = 0;
    loop {
        if shared.stopping.load(Ordering::Acquire) {
            return;
        }
        if shared.removed.load(Ordering::Acquire) || shared.is_being_removed() {
            shared.removed.store(true, Ordering::Release);
            gone(shared, generation, "the controller has been removed");
            return;
        }
        attempts += 1;
        let code = if is_disabled && attempts == 1 {
            // SAFETY: the controller lives and is disabled; no queue pair exists, and none is made before the phase is
            // `Ready` again.
            unsafe { basalt_reconnect(shared.raw()) }
        } else {
            // SAFETY: as above.
            unsafe { spdk_nvme_ctrlr_reset(shared.raw()) }
        };
        if code == 0 {
            match verify(shared) {
                Ok(()) => {
                    tracing::warn!(
                        "{}: back after {} ms and {attempts} attempt(s); what was in flight has an unknown outcome",
                        shared.name,
                        started.elapsed().as_millis()
                    );
                    shared.settle(State { phase: Phase::Ready, generation: generation + 1 });
                }
                Err(cause) => gone(shared, generation, &cause),
            }
            return;
        }
        if since.elapsed() > limit {
            gone(shared, generation, &format!("{attempts} attempts to reach it again failed"));
            return;
        }
        std::thread::park_timeout(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

fn gone(shared: &Shared, generation: u64, why: &str) {
    tracing::error!("{}: {why}; the device is given up until a restart", shared.name);
    // SAFETY: the controller lives; failing it makes SPDK refuse whatever is still sent.
    unsafe { spdk_nvme_ctrlr_fail(shared.raw()) };
    shared.settle(State { phase: Phase::Gone, generation });
}

/// The namespace is still there and still the same, or the same and larger: what was added is not used before a restart.
fn verify(shared: &Shared) -> Result<(), String> {
    let Some(namespace) = shared.namespace() else {
        return Err(format!("namespace {} is not there any more", shared.namespace_id));
    };
    let (found, expected) = (Identity::of(&namespace_info(namespace)), shared.identity);
    if found.block_count >= expected.block_count
        && (Identity { block_count: expected.block_count, ..found }) == expected
    {
        return Ok(());
    }
    Err(format!(
        "another namespace has its number now ({} blocks of {} bytes instead of {} of {}, or another identifier)",
        found.block_count, found.block_size, expected.block_count, expected.block_size
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resets_that_help_nothing_are_one_trouble() {
        let limit = Duration::from_secs(3_600);
        let mut trouble = Trouble::default();
        let first = trouble.begin(false, limit);
        trouble.end();
        assert_eq!(trouble.begin(false, limit), first, "nothing has completed since");
        trouble.end();
        std::thread::sleep(Duration::from_millis(2));
        let second = trouble.begin(true, limit);
        assert!(second > first, "commands completed in between");
        trouble.end();
        std::thread::sleep(Duration::from_millis(2));
        assert!(
            trouble.begin(false, Duration::from_millis(1)) > second,
            "it was well for longer than the limit"
        );
    }
}
