//! What one reactor sleeps on: its eventfd and every descriptor that its work registered.

use std::time::Duration;

use super::poller::{Event, Poller, PollerError};
use super::wake::{EventFd, Parker, Waker};
use crate::ring::park;

/// Made before the reactor's thread is started, so that everyone can have its waker, then moved there.
pub struct Sleeper {
    parker: Parker,
    poller: Poller,
}

impl Sleeper {
    /// Opens an eventfd and an epoll instance.
    pub fn new() -> Result<Self, PollerError> {
        let eventfd = EventFd::new().map_err(PollerError::of("create an eventfd"))?;
        let poller = Poller::new(&eventfd)?;
        let (parker, _waker) = park::pair(eventfd);
        Ok(Sleeper { parker, poller })
    }

    /// Wakes this reactor, from any thread.
    pub fn waker(&self) -> Waker {
        self.parker.waker()
    }

    /// Where descriptors are registered, for work that is set up before it runs.
    pub fn poller(&mut self) -> &mut Poller {
        &mut self.poller
    }

    /// Replaces `events` by what is ready now. No waiting, and no system call while nothing is registered.
    pub fn check_events(&mut self, events: &mut Vec<Event>) -> Result<(), PollerError> {
        self.poller.check(events)
    }

    /// Announces the sleep, asks `last_look` what is left to do and sleeps as it says: until a descriptor is ready, a waker
    /// is used, or the time is over. `events` is replaced by what is ready. Returns whether it slept.
    pub fn sleep(
        &mut self,
        events: &mut Vec<Event>,
        last_look: impl FnOnce(&mut Poller) -> Rest,
    ) -> Result<bool, PollerError> {
        events.clear();
        let announced = self.parker.announce();
        let timeout = match last_look(&mut self.poller) {
            Rest::No => return Ok(false),
            Rest::For(timeout) => Some(timeout),
            Rest::UntilWoken => None,
        };
        self.poller.wait(announced.action(), events, timeout)?;
        Ok(true)
    }
}

/// How long to sleep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// Not at all: there is work.
    No,
    /// At most this long.
    For(Duration),
    /// Until something happens.
    UntilWoken,
}
