//! How a sleeping thread of this program is woken: an eventfd, which epoll and poll can wait for beside sockets.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::ring::park::{self, Wake};

/// Wakes one thread, from any other.
pub type Waker = park::Waker<EventFd>;

/// Lets one thread sleep until its `Waker` is used.
pub type Parker = park::Parker<EventFd>;

/// A counter in the kernel that stays readable until it is cleared, which makes a wake sticky.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// Opens one.
    pub fn new() -> Result<Self, Errno> {
        eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map(EventFd)
    }

    /// Takes back every wake so far.
    pub fn clear(&self) {
        // The only error that can happen is EAGAIN: nothing to take back.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }

    /// Sleeps until a wake, or for `timeout`, and takes the wake back. A signal also ends the sleep.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<(), Errno> {
        let timeout = timeout.map(timespec);
        match poll(&mut [PollFd::new(&self.0, PollFlags::IN)], timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {
                self.clear();
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

impl Wake for EventFd {
    #[expect(clippy::host_endian_bytes, reason = "the kernel reads the counter as its own u64")]
    fn wake(&self) {
        // The only error that can happen is EAGAIN, at 2^64 - 2 wakes that nobody took back: it is readable then.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The kernel's form of a timeout. Above the longest that epoll takes on every kernel (24 days) it is cut: waking once
/// in 24 days for nothing is harmless.
pub(super) fn timespec(timeout: Duration) -> Timespec {
    const TIMEOUT_MAX: Duration = Duration::from_millis(i32::MAX as u64 - 1);
    let timeout = timeout.min(TIMEOUT_MAX);
    Timespec { tv_sec: timeout.as_secs().cast_signed(), tv_nsec: timeout.subsec_nanos().into() }
}
