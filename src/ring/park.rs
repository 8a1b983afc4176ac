//! Sleeping without losing a wake-up.
//!
//! One thread has a [`Parker`], any number of others have [`Waker`]s of it. The sleeper announces that it is about to
//! sleep and then looks for work *once more*; a waker first publishes its work and then looks whether the sleeper has
//! announced itself. Between its write and its look each side has a SeqCst fence. Fences are totally ordered: if the
//! sleeper's is first, the waker sees the announcement and wakes it; if the waker's is first, the sleeper's last look
//! finds the work. Either way nobody sleeps while work is waiting, and a wake-up costs one fence and one load while the
//! sleeper is awake.
//!
//! How a thread is woken is a [`Wake`]: an eventfd in the program, a condition variable in the models. It must be sticky:
//! a wake that comes before the sleep ends that sleep at once. A wake-up may be spurious; it is never lost.

use super::sync::{Arc, AtomicBool, Ordering, fence};

/// The action that ends a sleep.
pub trait Wake: Send + Sync {
    /// Ends the sleep that is going on, or the next one. Must not block.
    fn wake(&self);
}

/// Makes the two sides.
pub fn pair<W: Wake>(action: W) -> (Parker<W>, Waker<W>) {
    let shared = Arc::new(Shared { asleep: AtomicBool::new(false), action });
    (Parker { shared: shared.clone() }, Waker { shared })
}

/// The sleeping side.
pub struct Parker<W> {
    shared: Arc<Shared<W>>,
}

impl<W: Wake> Parker<W> {
    /// Announces that this thread is about to sleep, until the guard is dropped. Between this and the sleep everything that
    /// wakers may have published must be looked at once more.
    pub fn announce(&mut self) -> Announced<'_, W> {
        self.shared.asleep.store(true, Ordering::Relaxed);
        // The announcement comes before the last look: pairs with the fence in `Waker::wake`.
        fence(Ordering::SeqCst);
        Announced(&self.shared)
    }

    /// Announces the sleep, asks `has_work` one last time and, if there is none, runs `sleep`. Returns what `sleep` returned,
    /// or `None` when there was work. `has_work` must look at everything that is published before a wake.
    pub fn park<R>(&mut self, has_work: impl FnOnce() -> bool, sleep: impl FnOnce(&W) -> R) -> Option<R> {
        let announced = self.announce();
        if has_work() { None } else { Some(sleep(announced.action())) }
    }

    /// A waker of this thread.
    pub fn waker(&self) -> Waker<W> {
        Waker { shared: self.shared.clone() }
    }
}

/// The waking side.
pub struct Waker<W> {
    shared: Arc<Shared<W>>,
}

impl<W: Wake> Waker<W> {
    /// Wakes the sleeper if it sleeps or is about to. To be called after the work for it was published.
    #[inline]
    pub fn wake(&self) {
        // Pairs with the fence in `Parker::announce`: see the top of this file.
        fence(Ordering::SeqCst);
        if self.shared.asleep.load(Ordering::Relaxed) {
            self.wake_sleeper();
        }
    }

    #[cold]
    fn wake_sleeper(&self) {
        // One of several wakers is enough: whoever clears the announcement does it.
        if self.shared.asleep.swap(false, Ordering::Relaxed) {
            self.shared.action.wake();
        }
    }
}

impl<W> Clone for Waker<W> {
    fn clone(&self) -> Self {
        Waker { shared: self.shared.clone() }
    }
}

struct Shared<W> {
    /// The sleeper sleeps, or is about to look for work for the last time.
    asleep: AtomicBool,
    action: W,
}

/// An announced sleep, taken back when this is dropped: after the sleep, instead of it, or by a panic.
pub struct Announced<'a, W>(&'a Shared<W>);

impl<W> Announced<'_, W> {
    /// What to sleep on.
    pub fn action(&self) -> &W {
        &self.0.action
    }
}

impl<W> Drop for Announced<'_, W> {
    fn drop(&mut self) {
        // Relaxed: a waker that still sees the announcement wakes once for nothing, which is allowed.
        self.0.asleep.store(false, Ordering::Relaxed);
    }
}
