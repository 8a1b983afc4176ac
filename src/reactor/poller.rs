//! Readiness of file descriptors: the epoll instance of one reactor.
//!
//! Everything is level-triggered: what is ready is reported again until it has been dealt with. So who doesn't want an
//! event for now (a connection that is not read from, because its replies wait) must take it out of its interest with
//! [`Poller::modify`], or the reactor can't sleep.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll;
use rustix::io::Errno;

use super::wake::{EventFd, timespec};

/// Events that one call may bring; the rest comes with the next call, since epoll takes turns.
const EVENT_COUNT_MAX: usize = 256;

/// The key of the reactor's own eventfd.
const WAKE_KEY: u64 = u64::MAX;

/// What a descriptor is watched for. Hang-ups and errors are always reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Only hang-ups and errors.
    None,
    /// Readable.
    Read,
    /// Writable.
    Write,
    /// Both.
    ReadWrite,
}

/// What a descriptor is ready for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// As given to `register`.
    pub key: u64,
    /// A read would not block: there is data, or the end of it, or an error to collect.
    pub readable: bool,
    /// A write would not block.
    pub writable: bool,
    /// The peer has gone, or the descriptor has an error.
    pub hangup: bool,
}

/// An operation on the poller that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cannot {action}: {source}")]
pub struct PollerError {
    /// What was tried.
    pub action: &'static str,
    /// The kernel's answer.
    pub source: Errno,
}

impl PollerError {
    pub(super) fn of(action: &'static str) -> impl FnOnce(Errno) -> Self {
        move |source| PollerError { action, source }
    }
}

/// The epoll instance of one reactor.
pub struct Poller {
    epoll: OwnedFd,
    registered_count: usize,
}

impl Poller {
    pub(super) fn new(wake: &EventFd) -> Result<Self, PollerError> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(PollerError::of("create an epoll instance"))?;
        epoll::add(&epoll, wake, epoll::EventData::new_u64(WAKE_KEY), epoll::EventFlags::IN)
            .map_err(PollerError::of("watch the eventfd"))?;
        Ok(Poller { epoll, registered_count: 0 })
    }

    /// Watches a descriptor. Its events carry `key`.
    ///
    /// # Panics
    /// When `key` is `u64::MAX`, which is taken.
    pub fn register(&mut self, fd: impl AsFd, key: u64, interest: Interest) -> Result<(), PollerError> {
        assert_ne!(key, WAKE_KEY, "u64::MAX is the reactor's own key");
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(key), flags(interest))
            .map_err(PollerError::of("watch a descriptor"))?;
        self.registered_count += 1;
        Ok(())
    }

    /// Changes what a descriptor is watched for, or its key.
    ///
    /// # Panics
    /// When `key` is `u64::MAX`, which is taken.
    pub fn modify(&mut self, fd: impl AsFd, key: u64, interest: Interest) -> Result<(), PollerError> {
        assert_ne!(key, WAKE_KEY, "u64::MAX is the reactor's own key");
        epoll::modify(&self.epoll, fd, epoll::EventData::new_u64(key), flags(interest))
            .map_err(PollerError::of("change what a descriptor is watched for"))
    }

    /// Stops watching a descriptor. To be done before it is closed: a duplicate elsewhere would keep it watched.
    pub fn deregister(&mut self, fd: impl AsFd) -> Result<(), PollerError> {
        epoll::delete(&self.epoll, fd).map_err(PollerError::of("stop watching a descriptor"))?;
        self.registered_count -= 1;
        Ok(())
    }

    /// Replaces `events` by what is ready, without waiting. Costs no system call while nothing is registered.
    pub(super) fn check(&mut self, events: &mut Vec<Event>) -> Result<(), PollerError> {
        events.clear();
        if self.registered_count == 0 {
            return Ok(());
        }
        self.collect(events, Some(Duration::ZERO)).map(|_woken| ())
    }

    /// Waits until something is ready or `timeout` is over, and replaces `events` by it. Clears the eventfd if it was that.
    pub(super) fn wait(
        &mut self,
        wake: &EventFd,
        events: &mut Vec<Event>,
        timeout: Option<Duration>,
    ) -> Result<(), PollerError> {
        events.clear();
        if self.collect(events, timeout)? {
            wake.clear();
        }
        Ok(())
    }

    /// Returns whether the eventfd was among what is ready.
    fn collect(&self, events: &mut Vec<Event>, timeout: Option<Duration>) -> Result<bool, PollerError> {
        let timeout = timeout.map(timespec);
        // On the stack and never initialised, so it costs nothing. Kept in the poller it would stop it from being `Send`.
        let mut buffer = [MaybeUninit::uninit(); EVENT_COUNT_MAX];
        let ready = match epoll::wait(&self.epoll, &mut buffer, timeout.as_ref()) {
            Ok((ready, _rest)) => ready,
            // A signal: the caller looks around and sleeps again.
            Err(Errno::INTR) => return Ok(false),
            Err(source) => return Err(PollerError { action: "wait for events", source }),
        };
        let mut woken = false;
        for &mut epoll::Event { flags, data } in ready {
            if data.u64() == WAKE_KEY {
                woken = true;
            } else {
                events.push(event(data.u64(), flags));
            }
        }
        Ok(woken)
    }
}

fn flags(interest: Interest) -> epoll::EventFlags {
    use epoll::EventFlags as Flags;
    match interest {
        Interest::None => Flags::empty(),
        Interest::Read => Flags::IN | Flags::RDHUP,
        Interest::Write => Flags::OUT,
        Interest::ReadWrite => Flags::IN | Flags::OUT | Flags::RDHUP,
    }
}

fn event(key: u64, flags: epoll::EventFlags) -> Event {
    use epoll::EventFlags as Flags;
    let hangup = flags.intersects(Flags::HUP | Flags::ERR);
    Event {
        key,
        // A peer that only stopped sending still wants its replies: that is the end of the data, not a hang-up.
        readable: hangup || flags.intersects(Flags::IN | Flags::RDHUP),
        writable: flags.contains(Flags::OUT),
        hangup,
    }
}
