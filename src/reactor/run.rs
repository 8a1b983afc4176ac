//! The loop of one reactor: poll, spin for a while when there is nothing to do, sleep.

use std::time::{Duration, Instant};

use super::poller::{Event, Poller, PollerError};
use super::sleeper::{Rest, Sleeper};

/// What a reactor does all day. One value per reactor; it owns its sockets, shards, device queue and mesh end.
pub trait Work {
    /// Goes once through everything: rings in, device completions, engine steps, sockets, device submit, rings out.
    ///
    /// `events` is what descriptors are ready for; each is reported again by the next pass until it has been dealt with.
    /// `poller` is where descriptors are registered and taken back. Must not block, and must return `Idle` only when it
    /// looked at everything: every ring, control queue and completion, and every push that was refused before. A poll that
    /// says `Idle` after the reactor announced its sleep is what makes that sleep safe.
    fn poll(&mut self, poller: &mut Poller, events: &[Event]) -> Progress;

    /// How long until `poll` has something to do even if nothing happens: the next timer. `None` when there is no timer.
    fn deadline(&self) -> Option<Duration>;

    /// Whether the loop is to end. Asked after each poll.
    fn finished(&self) -> bool;
}

/// What one poll found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Something was done: poll again at once.
    Busy,
    /// There was nothing to do.
    Idle,
}

/// How long a reactor goes on polling while there is nothing to do, before it sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpinPolicy {
    /// For this long. Zero sleeps at the first idle pass.
    For(Duration),
    /// Never sleeps: for devices without an interrupt to wait for.
    Forever,
}

impl Default for SpinPolicy {
    /// 20 microseconds. Going to sleep and being woken costs some 5 to 10: waiting up to about twice that is never much
    /// worse than knowing the future, catches the answer of a neighbouring reactor or a fast NVMe drive without a system
    /// call, and costs an otherwise idle node nothing that can be measured.
    fn default() -> Self {
        SpinPolicy::For(Duration::from_micros(20))
    }
}

/// What a loop did, for figures and tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RunStats {
    /// Polls of the work.
    pub pass_count: u64,
    /// Polls that found something.
    pub busy_count: u64,
    /// Times that it slept.
    pub sleep_count: u64,
}

/// Polls the work until it is finished. Returns early only when the kernel refuses to wait for events.
pub fn run(work: &mut impl Work, sleeper: &mut Sleeper, spin: SpinPolicy) -> Result<RunStats, PollerError> {
    let mut stats = RunStats::default();
    let mut events = Vec::new();
    let mut idle_since = None;
    loop {
        sleeper.check_events(&mut events)?;
        match pass(work, sleeper.poller(), &events, &mut stats) {
            Pass::Finished => return Ok(stats),
            Pass::Busy => {
                idle_since = None;
                continue;
            }
            Pass::Idle => {}
        }
        match spin {
            SpinPolicy::Forever => {
                std::hint::spin_loop();
                continue;
            }
            SpinPolicy::For(limit) => {
                // The clock is read only while there is nothing else to do.
                if !limit.is_zero() && idle_since.get_or_insert_with(Instant::now).elapsed() < limit {
                    std::hint::spin_loop();
                    continue;
                }
            }
        }
        let mut finished = false;
        let slept = sleeper.sleep(&mut events, |poller| match pass(work, poller, &[], &mut stats) {
            Pass::Busy => Rest::No,
            Pass::Finished => {
                finished = true;
                Rest::No
            }
            Pass::Idle => match work.deadline() {
                Some(Duration::ZERO) => Rest::No,
                Some(left) => Rest::For(left),
                None => Rest::UntilWoken,
            },
        })?;
        if finished {
            return Ok(stats);
        }
        stats.sleep_count += u64::from(slept);
        idle_since = None;
    }
}

enum Pass {
    Finished,
    Busy,
    Idle,
}

fn pass(work: &mut impl Work, poller: &mut Poller, events: &[Event], stats: &mut RunStats) -> Pass {
    let progress = work.poll(poller, events);
    stats.pass_count += 1;
    stats.busy_count += u64::from(progress == Progress::Busy);
    match progress {
        _ if work.finished() => Pass::Finished,
        Progress::Busy => Pass::Busy,
        Progress::Idle => Pass::Idle,
    }
}
