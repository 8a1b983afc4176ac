//! Every interleaving, and every order in which writes may become visible, of small programs over the ring and the
//! park/wake handshake.
//!
//! Run with `RUSTFLAGS="--cfg loom" cargo test --release --test loom_ring` (the sanitizer script does, with a target
//! directory of its own). Without that flag this file is empty.
//!
//! A model that passes says something only if it can fail: each was seen failing with the ordering or fence that it is
//! about taken away.
#![cfg(loom)]

use std::sync::atomic::{AtomicUsize as StdAtomicUsize, Ordering as StdOrdering};

use basalt::ring::park::{Wake, pair};
use basalt::ring::{Consumer, channel};
use loom::sync::{Condvar, Mutex};
use loom::thread;

/// Explores with at most `preemptions` forced switches: three find every bug that the mutations plant, and more cost
/// minutes. `LOOM_MAX_PREEMPTIONS` overrides.
fn check(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(preemptions));
    builder.check(model);
}

/// Takes `count` values, asserting that they come in order.
fn expect_in_order(consumer: &mut Consumer<Box<u32>>, count: u32) {
    let mut next = 0;
    while next < count {
        match consumer.pop() {
            Some(value) => {
                assert_eq!(*value, next);
                next += 1;
            }
            None => thread::yield_now(),
        }
    }
}

/// The indices begin three below the end of `u32`, so five entries cross it, in a ring of two.
#[test]
fn capacity_two_wraps_and_keeps_order() {
    check(3, || {
        let (mut producer, mut consumer) = channel(2);
        let writer = thread::spawn(move || {
            for value in 0..5 {
                let mut value = Box::new(value);
                while let Err(refused) = producer.push(value) {
                    value = refused.0;
                    thread::yield_now();
                }
            }
        });
        expect_in_order(&mut consumer, 5);
        assert!(consumer.pop().is_none());
        writer.join().unwrap();
    });
}

/// A batch is seen whole or not at all, and complete in its slots.
#[test]
fn a_batch_is_published_at_once() {
    check(3, || {
        let (mut producer, mut consumer) = channel(4);
        let writer = thread::spawn(move || {
            (0..3).for_each(|value| producer.stage(Box::new(value)).unwrap());
            producer.publish();
        });
        let seen = consumer.len();
        assert!(seen == 0 || seen == 3, "saw {seen} of a batch of 3");
        let mut next = 0;
        consumer.drain(2, |value| {
            assert_eq!(*value, next);
            next += 1;
        });
        writer.join().unwrap();
        consumer.drain(4, |value| {
            assert_eq!(*value, next);
            next += 1;
        });
        assert_eq!(next, 3);
    });
}

/// Slots given back by a drain are written again while the consumer goes on.
#[test]
fn drained_slots_are_reused() {
    check(3, || {
        let (mut producer, mut consumer) = channel(2);
        producer.push(Box::new(0_u32)).unwrap();
        producer.push(Box::new(1)).unwrap();
        let writer = thread::spawn(move || {
            let mut next = 2;
            while next < 4 {
                match producer.stage(Box::new(next)) {
                    Ok(()) => next += 1,
                    Err(_) => {
                        producer.publish();
                        thread::yield_now();
                    }
                }
            }
        });
        let mut next = 0;
        while next < 4 {
            let taken = consumer.drain(2, |value| {
                assert_eq!(*value, next);
                next += 1;
            });
            if taken == 0 {
                thread::yield_now();
            }
        }
        writer.join().unwrap();
    });
}

/// Counts drops; not loom's atomics, since only the final sum matters.
struct Counted(std::sync::Arc<StdAtomicUsize>, loom::cell::UnsafeCell<u8>);

impl Counted {
    fn new(dropped: &std::sync::Arc<StdAtomicUsize>) -> Self {
        Counted(dropped.clone(), loom::cell::UnsafeCell::new(0))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        // An access that loom checks: dropping a value that the other side may still be writing is a race.
        self.1.with_mut(|_| ());
        self.0.fetch_add(1, StdOrdering::Relaxed);
    }
}

/// Both sides leave while values are inside, in every order: each value is dropped once.
#[test]
fn values_left_inside_are_dropped_once() {
    check(3, || {
        let dropped = std::sync::Arc::new(StdAtomicUsize::new(0));
        let (mut producer, mut consumer) = channel(2);
        producer.push(Counted::new(&dropped)).ok().unwrap();
        let written = dropped.clone();
        let writer = thread::spawn(move || {
            // Left staged: dropping the producer publishes it.
            producer.stage(Counted::new(&written)).ok().unwrap();
            drop(producer);
        });
        drop(consumer.pop());
        drop(consumer);
        writer.join().unwrap();
        assert_eq!(dropped.load(StdOrdering::Relaxed), 2);
    });
}

/// Once the producer is seen to be gone, everything it accepted is there.
#[test]
fn an_abandoned_consumer_finds_the_last_words() {
    check(3, || {
        let (mut producer, mut consumer) = channel(2);
        let writer = thread::spawn(move || {
            producer.push(Box::new(0_u32)).unwrap();
            producer.stage(Box::new(1)).unwrap();
        });
        while !consumer.is_abandoned() {
            thread::yield_now();
        }
        assert_eq!(consumer.len(), 2);
        expect_in_order(&mut consumer, 2);
        writer.join().unwrap();
    });
}

/// A producer whose consumer is gone sees it, and what it pushes is dropped with the ring.
#[test]
fn an_abandoned_producer_gives_up() {
    check(3, || {
        let dropped = std::sync::Arc::new(StdAtomicUsize::new(0));
        let (mut producer, consumer) = channel(2);
        let reader = thread::spawn(move || drop(consumer));
        producer.push(Counted::new(&dropped)).ok().unwrap();
        while !producer.is_abandoned() {
            thread::yield_now();
        }
        drop(producer);
        reader.join().unwrap();
        assert_eq!(dropped.load(StdOrdering::Relaxed), 1);
    });
}

/// What an eventfd is: sticky, waits until it is rung, and is cleared by the wait.
struct Bell(Mutex<bool>, Condvar);

impl Bell {
    fn new() -> Self {
        Bell(Mutex::new(false), Condvar::new())
    }

    fn wait(&self) {
        let mut rung = self.0.lock().unwrap();
        while !*rung {
            rung = self.1.wait(rung).unwrap();
        }
        *rung = false;
    }
}

impl Wake for Bell {
    fn wake(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_one();
    }
}

/// The consumer sleeps whenever it finds nothing. A lost wake-up is a deadlock, which loom reports.
#[test]
fn a_sleeping_consumer_is_always_woken() {
    check(3, || {
        let (mut producer, mut consumer) = channel(2);
        let (mut parker, waker) = pair(Bell::new());
        let writer = thread::spawn(move || {
            for value in 0..2_u32 {
                producer.push(value).unwrap();
                waker.wake();
            }
        });
        for expected in 0..2 {
            let value = loop {
                if let Some(value) = consumer.pop() {
                    break value;
                }
                parker.park(|| !consumer.is_empty(), Bell::wait);
            };
            assert_eq!(value, expected);
        }
        writer.join().unwrap();
    });
}

/// Two wakers, of which one may find the announcement already taken by the other.
#[test]
fn two_wakers_and_one_sleeper() {
    check(2, || {
        let (mut parker, waker) = pair(Bell::new());
        let rings: Vec<_> = (0..2_u32)
            .map(|value| {
                let (mut producer, consumer) = channel(2);
                let waker = waker.clone();
                thread::spawn(move || {
                    producer.push(value).unwrap();
                    waker.wake();
                });
                consumer
            })
            .collect();
        let mut rings = rings;
        let mut sum = 0;
        let mut count = 0;
        while count < 2 {
            let before = count;
            for ring in &mut rings {
                if let Some(value) = ring.pop() {
                    sum += value;
                    count += 1;
                }
            }
            if count == before {
                parker.park(|| rings.iter().any(|ring| !ring.is_empty()), Bell::wait);
            }
        }
        assert_eq!(sum, 1);
    });
}

/// A refused producer sleeps until there is room; the consumer wakes it only if it was starved.
#[test]
fn a_starved_producer_is_always_woken() {
    check(3, || {
        let (mut producer, mut consumer) = channel(2);
        let (mut parker, waker) = pair(Bell::new());
        producer.push(0_u32).unwrap();
        producer.push(1).unwrap();
        let reader = thread::spawn(move || {
            let mut next = 0;
            while next < 3 {
                let taken = consumer.drain(2, |value| {
                    assert_eq!(value, next);
                    next += 1;
                });
                if taken == 0 {
                    thread::yield_now();
                } else if consumer.take_starved() {
                    waker.wake();
                }
            }
        });
        while producer.push(2).is_err() {
            parker.park(|| producer.has_room(), Bell::wait);
        }
        reader.join().unwrap();
    });
}

/// Either the producer finds room or the consumer finds it starved, with nothing but the ring's own fences.
#[test]
fn a_refusal_is_never_overlooked() {
    check(3, || {
        let (mut producer, mut consumer) = channel(2);
        producer.push(0_u32).unwrap();
        producer.push(1).unwrap();
        let reader = thread::spawn(move || {
            assert_eq!(consumer.drain(2, drop), 2);
            (consumer.take_starved(), consumer)
        });
        let refused = producer.push(2).is_err();
        let (starved, _consumer) = reader.join().unwrap();
        assert!(starved || !refused);
    });
}

/// Nothing ever went in: both sides leave at once, and the memory is freed once.
#[test]
fn an_unused_ring_is_freed() {
    check(3, || {
        let (producer, consumer) = channel::<u8>(2);
        let other = thread::spawn(move || drop(producer));
        drop(consumer);
        other.join().unwrap();
    });
}
