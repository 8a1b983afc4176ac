//! A bounded ring from one thread to one other, with head and tail as in io_uring.
//!
//! The consumer owns the head, the producer owns the tail. Both run freely over all of `u32` and wrap there; how many
//! entries there are is their wrapping difference, and an index is masked only where it picks a slot. Each side works on
//! a private copy of its own index and on a cached copy of its peer's, so that the shared words are touched only to
//! publish and when the cache says empty or full.
//!
//! Invariants:
//! - Slots `head..tail` hold initialised values and belong to the consumer; all others are uninitialised memory and
//!   belong to the producer. A slot changes hands only by a Release store of an index that the other side then loads
//!   with Acquire.
//! - `tail - head` never exceeds the capacity.
//! - The peer's cached index is never ahead of the real one, so a side that trusts its cache sees too little room or
//!   too few entries, never too much.
//! - Each value that went in comes out, or is dropped, exactly once: what is left when both sides are gone is dropped
//!   by the side that leaves last.
//! - A refused value goes back to the caller. A producer that was refused is *starved*, and the ring remembers it until
//!   the consumer has made room and asked (see [`Consumer::take_starved`]).
#![expect(unsafe_code, reason = "slots change hands through the indices, which the borrow checker can't see")]

use std::fmt;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::sync::{Arc, AtomicBool, AtomicU32, Ordering, UnsafeCell, fence};

/// Where both indices begin: so close to the end that every ring wraps during its first few entries. A mistake in
/// wrapping arithmetic then shows in the first test and not after four billion entries.
const INDEX_START: u32 = u32::MAX - 2;

/// The largest capacity: the difference of two `u32` indices must tell a full ring from an empty one.
const CAPACITY_MAX: usize = 1 << 31;

/// Makes a ring of `capacity` entries.
///
/// # Panics
/// When `capacity` is not a power of two from 2 to 2^31.
pub fn channel<T>(capacity: usize) -> (Producer<T>, Consumer<T>) {
    assert!(
        capacity.is_power_of_two() && (2..=CAPACITY_MAX).contains(&capacity),
        "the capacity of a ring is a power of two from 2 to 2^31, not {capacity}"
    );
    let slots = (0..capacity).map(|_| UnsafeCell::new(MaybeUninit::uninit())).collect();
    let shared = Arc::new(Shared {
        head: Line(AtomicU32::new(INDEX_START)),
        tail: Line(AtomicU32::new(INDEX_START)),
        starved: Line(AtomicBool::new(false)),
        one_left: AtomicBool::new(false),
        slots,
    });
    let producer = Producer {
        tail: INDEX_START,
        published: INDEX_START,
        head_cached: INDEX_START,
        shared: shared.clone(),
        _not_sync: PhantomData,
    };
    let consumer = Consumer { head: INDEX_START, tail_cached: INDEX_START, shared, _not_sync: PhantomData };
    (producer, consumer)
}

/// The ring had no room: here is the value back. A normal result, to be passed on as back-pressure.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Full<T>(pub T);

impl<T> fmt::Debug for Full<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Full(..)")
    }
}

impl<T> fmt::Display for Full<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the ring is full")
    }
}

/// The writing side of a ring. `Send`, but neither `Sync` nor `Clone`: there is exactly one.
///
/// Dropping it publishes what was staged, so that the consumer still finds everything that was accepted.
pub struct Producer<T> {
    /// The next slot to fill. Ahead of `published` by what is staged.
    tail: u32,
    /// The tail as the consumer knows it.
    published: u32,
    /// The consumer's head as last seen.
    head_cached: u32,
    shared: Arc<Shared<T>>,
    _not_sync: PhantomData<std::cell::Cell<()>>,
}

impl<T> Producer<T> {
    /// Puts a value in and publishes it, with everything staged before.
    #[inline]
    pub fn push(&mut self, value: T) -> Result<(), Full<T>> {
        let result = self.stage(value);
        // Also when it was refused: what was staged before must not wait for a push that succeeds.
        self.publish();
        result
    }

    /// Puts a value in without telling the consumer: [`publish`](Self::publish) does, once for many. When the ring is full
    /// the value comes back, and what was staged stays staged.
    #[inline]
    pub fn stage(&mut self, value: T) -> Result<(), Full<T>> {
        if self.tail.wrapping_sub(self.head_cached) == self.shared.capacity() && !self.has_room() {
            return Err(Full(value));
        }
        self.shared.slot(self.tail).with_mut(|slot| {
            // SAFETY: `tail - head <= tail - head_cached < capacity`, so the slot at `tail` is outside `head..tail` and
            // belongs to this side, of which there is one (`&mut self`). The Acquire load that brought `head_cached` saw
            // the consumer finish with it. The pointer is to a live, aligned `MaybeUninit<T>`, which has T's layout.
            unsafe { slot.cast::<T>().write(value) }
        });
        self.tail = self.tail.wrapping_add(1);
        Ok(())
    }

    /// Shows the consumer everything that was staged.
    #[inline]
    pub fn publish(&mut self) {
        if self.published != self.tail {
            // Release: the consumer that loads this tail also sees the slots below it.
            self.shared.tail.0.store(self.tail, Ordering::Release);
            self.published = self.tail;
        }
    }

    /// Whether there is room for at least one value. When not, this side counts as starved from then on.
    #[cold]
    #[inline(never)]
    pub fn has_room(&mut self) -> bool {
        if self.refresh_room() {
            return true;
        }
        // Still counted as starved: the consumer has yet to ask, or just has and wakes this side after that. A producer that
        // retries in a loop pays for the fence once.
        if self.shared.starved.0.load(Ordering::Relaxed) {
            return false;
        }
        // Starvation handshake, with `Consumer::take_starved`: this side sets the flag, fences and looks at the head; the
        // other moves the head, fences and looks at the flag. The fences are totally ordered, so one of the two sees the
        // other's write and a starved producer is never forgotten.
        self.shared.starved.0.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.refresh_room()
    }

    fn refresh_room(&mut self) -> bool {
        // Acquire: what the consumer read from the freed slots happened before they are written again.
        self.head_cached = self.shared.head.0.load(Ordering::Acquire);
        self.tail.wrapping_sub(self.head_cached) < self.shared.capacity()
    }

    /// Entries that were published or staged and not yet taken.
    pub fn len(&self) -> usize {
        self.tail.wrapping_sub(self.shared.head.0.load(Ordering::Acquire)) as usize
    }

    /// Whether the consumer has taken everything, staged entries included.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Entries that are staged and not yet published.
    pub fn staged(&self) -> usize {
        self.tail.wrapping_sub(self.published) as usize
    }

    /// Entries that the ring can hold.
    pub fn capacity(&self) -> usize {
        self.shared.slots.len()
    }

    /// Whether the consumer is gone. What is pushed from now on is only ever dropped.
    pub fn is_abandoned(&self) -> bool {
        self.shared.one_left.load(Ordering::Acquire)
    }
}

impl<T> Drop for Producer<T> {
    fn drop(&mut self) {
        self.publish();
        self.shared.leave();
    }
}

/// The reading side of a ring. `Send`, but neither `Sync` nor `Clone`: there is exactly one.
pub struct Consumer<T> {
    /// The next slot to read. Equal to the shared head except inside `drain`.
    head: u32,
    /// The producer's tail as last seen.
    tail_cached: u32,
    shared: Arc<Shared<T>>,
    _not_sync: PhantomData<std::cell::Cell<()>>,
}

impl<T> Consumer<T> {
    /// Takes the oldest value.
    #[inline]
    pub fn pop(&mut self) -> Option<T> {
        if self.head == self.tail_cached && !self.refresh_entries() {
            return None;
        }
        let value = self.take();
        self.publish();
        Some(value)
    }

    /// Takes up to `max` values, oldest first, and gives their slots back at once at the end. Returns how many there were.
    #[inline]
    pub fn drain(&mut self, max: usize, mut each: impl FnMut(T)) -> usize {
        // One look at the tail decides how much this call takes: a fast producer can't keep it here.
        if self.tail_cached.wrapping_sub(self.head) < u32::try_from(max).unwrap_or(u32::MAX) {
            self.refresh_entries();
        }
        let count = (self.tail_cached.wrapping_sub(self.head) as usize).min(max);
        for _ in 0..count {
            // The private head moves before `each` runs: should it panic, the value isn't dropped a second time.
            let value = self.take();
            each(value);
        }
        if count > 0 {
            self.publish();
        }
        count
    }

    /// Moves the value at the head out. The caller has made sure that there is one.
    #[inline]
    fn take(&mut self) -> T {
        debug_assert_ne!(self.head, self.tail_cached, "took from an empty ring");
        let value = self.shared.slot(self.head).with_mut(|slot| {
            // SAFETY: `head != tail_cached`, so the slot at `head` lies in `head..tail`: initialised, and owned by this
            // side, of which there is one (`&mut self`). The Acquire load that brought `tail_cached` saw it written. The
            // head moves on below, so it is read once.
            unsafe { slot.cast::<T>().read() }
        });
        self.head = self.head.wrapping_add(1);
        value
    }

    /// Gives the slots below the head back.
    #[inline]
    fn publish(&mut self) {
        // Release: the producer that loads this head sees that the slots below it have been read.
        self.shared.head.0.store(self.head, Ordering::Release);
    }

    fn refresh_entries(&mut self) -> bool {
        // Acquire: the slots below this tail are seen as they were written.
        self.tail_cached = self.shared.tail.0.load(Ordering::Acquire);
        self.head != self.tail_cached
    }

    /// Whether the producer was refused since this was last asked. To be asked after entries were taken: on `true` there is
    /// room again, and the producer must be woken if it sleeps.
    pub fn take_starved(&mut self) -> bool {
        // The other half of the handshake in `Producer::has_room`.
        fence(Ordering::SeqCst);
        self.shared.starved.0.load(Ordering::Relaxed) && self.shared.starved.0.swap(false, Ordering::Relaxed)
    }

    /// Entries that were published and not yet taken.
    pub fn len(&self) -> usize {
        self.shared.tail.0.load(Ordering::Acquire).wrapping_sub(self.head) as usize
    }

    /// Whether there is nothing to take.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Entries that the ring can hold.
    pub fn capacity(&self) -> usize {
        self.shared.slots.len()
    }

    /// Whether the producer is gone. Everything it ever accepted is visible by then: abandoned and, asked after that,
    /// empty means finished.
    pub fn is_abandoned(&self) -> bool {
        self.shared.one_left.load(Ordering::Acquire)
    }
}

impl<T> Drop for Consumer<T> {
    fn drop(&mut self) {
        // The head lags behind only if a closure given to `drain` panicked.
        self.publish();
        self.shared.leave();
    }
}

/// 128 bytes: two cache lines of x86, which fetches lines in pairs, and one of some ARM cores.
#[repr(align(128))]
struct Line<T>(T);

struct Shared<T> {
    /// Written by the consumer.
    head: Line<AtomicU32>,
    /// Written by the producer.
    tail: Line<AtomicU32>,
    /// Set by a refused producer, cleared by the consumer.
    starved: Line<AtomicBool>,
    /// One of the two sides is gone. Shares its line with what never changes, since it changes once.
    one_left: AtomicBool,
    slots: Box<[UnsafeCell<MaybeUninit<T>>]>,
}

// SAFETY: a slot is touched by one thread at a time (the invariants at the top); everything else is atomic or never
// changes. Values move from one thread to the other, hence `T: Send`.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above. No `&T` is ever shared between the threads, so `T: Sync` is not needed.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    #[inline]
    fn capacity(&self) -> u32 {
        // At most 2^31 (see `channel`), so nothing is cut off.
        self.slots.len() as u32
    }

    #[inline]
    fn slot(&self, index: u32) -> &UnsafeCell<MaybeUninit<T>> {
        // The capacity is a power of two, so the mask keeps the index in bounds, and the compiler knows it.
        &self.slots[index as usize & (self.slots.len() - 1)]
    }

    /// Called by each side as its last act, with its index published. The one that comes second drops what is left.
    fn leave(&self) {
        // Release: the other side may rely on all that this one did. Acquire: this one relies on all that the other did.
        if !self.one_left.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut head = self.head.0.load(Ordering::Relaxed);
        let tail = self.tail.0.load(Ordering::Relaxed);
        while head != tail {
            let left = self.slot(head).with_mut(|slot| {
                // SAFETY: the other side is gone and its last act happened before this one, so this thread is alone with
                // the ring. `head..tail` is initialised, and nobody reads it after this loop.
                unsafe { slot.cast::<T>().read() }
            });
            head = head.wrapping_add(1);
            drop(left);
        }
    }
}
