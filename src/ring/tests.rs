//! The ring against a queue that is obviously right, its edges one by one, and two threads at full speed.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::{Full, channel};

/// Counts how many of its kind were dropped.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn counted(count: usize) -> (Arc<AtomicUsize>, Vec<Counted>) {
    let dropped = Arc::new(AtomicUsize::new(0));
    let values = (0..count).map(|_| Counted(dropped.clone())).collect();
    (dropped, values)
}

#[test]
fn full_gives_the_value_back_and_room_comes_with_a_pop() {
    let (mut producer, mut consumer) = channel(2);
    assert_eq!(producer.push(1), Ok(()));
    assert_eq!(producer.push(2), Ok(()));
    assert_eq!(producer.push(3), Err(Full(3)));
    assert_eq!(consumer.pop(), Some(1));
    assert_eq!(producer.push(3), Ok(()));
    assert_eq!((consumer.pop(), consumer.pop(), consumer.pop()), (Some(2), Some(3), None));
}

#[test]
fn staged_values_are_hidden_until_published() {
    let (mut producer, mut consumer) = channel(4);
    producer.stage(1).unwrap();
    producer.stage(2).unwrap();
    assert_eq!((consumer.pop(), consumer.len(), producer.staged()), (None, 0, 2));
    producer.publish();
    assert_eq!((consumer.len(), producer.staged(), consumer.pop()), (2, 0, Some(1)));
}

#[test]
fn staged_values_count_against_the_capacity() {
    let (mut producer, mut consumer) = channel(2);
    producer.stage(1).unwrap();
    producer.stage(2).unwrap();
    assert_eq!(producer.stage(3), Err(Full(3)));
    assert_eq!(producer.staged(), 2, "a refusal publishes nothing");
    assert_eq!(producer.push(3), Err(Full(3)));
    assert_eq!(consumer.pop(), Some(1), "push publishes what was staged, even when it is refused itself");
}

#[test]
fn drain_takes_at_most_max_in_order() {
    let (mut producer, mut consumer) = channel(8);
    (0..6).for_each(|value| producer.push(value).unwrap());
    let mut taken = Vec::new();
    assert_eq!(consumer.drain(4, |value| taken.push(value)), 4);
    assert_eq!(consumer.drain(0, |value| taken.push(value)), 0);
    assert_eq!(consumer.drain(usize::MAX, |value| taken.push(value)), 2);
    assert_eq!(taken, [0, 1, 2, 3, 4, 5]);
}

#[test]
fn a_refused_producer_is_starved_until_the_consumer_asks() {
    let (mut producer, mut consumer) = channel(2);
    assert!(!consumer.take_starved());
    producer.push(1).unwrap();
    producer.push(2).unwrap();
    assert!(!consumer.take_starved(), "full, but nobody was refused");
    producer.push(3).unwrap_err();
    consumer.pop();
    assert!(consumer.take_starved());
    assert!(!consumer.take_starved(), "asked once");
}

#[test]
fn what_is_left_is_dropped_once_whoever_leaves_first() {
    for producer_first in [true, false] {
        let (dropped, values) = counted(4);
        let (mut producer, mut consumer) = channel(4);
        for value in values {
            producer.stage(value).unwrap();
        }
        if producer_first {
            drop(producer);
            assert!(consumer.is_abandoned());
            assert!(consumer.pop().is_some(), "staged values are published by the drop");
            assert_eq!(dropped.load(Ordering::Relaxed), 1);
            drop(consumer);
        } else {
            producer.publish();
            drop(consumer.pop());
            drop(consumer);
            assert!(producer.is_abandoned());
            assert_eq!(dropped.load(Ordering::Relaxed), 1);
            drop(producer);
        }
        assert_eq!(dropped.load(Ordering::Relaxed), 4);
    }
}

#[test]
fn a_panic_inside_drain_drops_nothing_twice() {
    let (dropped, values) = counted(3);
    let (mut producer, mut consumer) = channel(4);
    values.into_iter().for_each(|value| assert!(producer.push(value).is_ok()));
    catch_unwind(AssertUnwindSafe(|| consumer.drain(3, |_| panic!("planned")))).unwrap_err();
    assert_eq!(dropped.load(Ordering::Relaxed), 1);
    // The producer is the last to leave and must not see the value that the closure took.
    drop(consumer);
    drop(producer);
    assert_eq!(dropped.load(Ordering::Relaxed), 3);
}

#[test]
fn zero_sized_values_travel() {
    let (mut producer, mut consumer) = channel(2);
    producer.push(()).unwrap();
    assert_eq!((consumer.pop(), consumer.pop()), (Some(()), None));
}

#[test]
fn bad_capacities_are_refused() {
    for capacity in [0, 1, 3, 6, (1 << 31) + 1, 1 << 32] {
        assert!(catch_unwind(|| channel::<u8>(capacity)).is_err(), "took {capacity}");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Push,
    Stage,
    Publish,
    Pop,
    Drain(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => Just(Step::Push),
        5 => Just(Step::Stage),
        2 => Just(Step::Publish),
        4 => Just(Step::Pop),
        2 => (0..20_usize).prop_map(Step::Drain),
    ];
    prop::collection::vec(step, 0..if cfg!(miri) { 60 } else { 400 })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 8 } else { 256 },
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// Boxes, so that a value that is lost or taken twice also shows as a leak or a double free.
    #[test]
    fn behaves_like_a_queue(capacity_log2 in 1..6_u32, steps in steps()) {
        let capacity = 1_usize << capacity_log2;
        let (mut producer, mut consumer) = channel(capacity);
        let (mut visible, mut staged) = (VecDeque::new(), VecDeque::new());
        for (number, step) in steps.into_iter().enumerate() {
            let full = visible.len() + staged.len() == capacity;
            match step {
                Step::Push | Step::Stage => {
                    let push = matches!(step, Step::Push);
                    let value = Box::new(number);
                    let result = if push { producer.push(value) } else { producer.stage(value) };
                    prop_assert_eq!(result, if full { Err(Full(Box::new(number))) } else { Ok(()) });
                    if !full {
                        staged.push_back(number);
                    }
                    if push {
                        visible.append(&mut staged);
                    }
                }
                Step::Publish => {
                    producer.publish();
                    visible.append(&mut staged);
                }
                Step::Pop => prop_assert_eq!(consumer.pop().map(|value| *value), visible.pop_front()),
                Step::Drain(max) => {
                    let mut taken = Vec::new();
                    let count = consumer.drain(max, |value| taken.push(*value));
                    prop_assert_eq!(count, taken.len());
                    let expected: Vec<_> = visible.drain(..max.min(visible.len())).collect();
                    prop_assert_eq!(taken, expected);
                }
            }
            prop_assert_eq!(consumer.len(), visible.len());
            prop_assert_eq!(producer.len(), visible.len() + staged.len());
            prop_assert_eq!(producer.staged(), staged.len());
        }
    }
}

#[test]
fn two_threads_lose_and_reorder_nothing() {
    let count: u64 = if cfg!(miri) { 200 } else { 200_000 };
    for (capacity, count) in [(2, count / 10), (8, count), (1024, count)] {
        let (mut producer, mut consumer) = channel(capacity);
        let writer = std::thread::spawn(move || {
            let mut next = 0;
            while next < count {
                // Alternates between batches and single values.
                let batch = next % 23;
                let mut refused = false;
                for _ in 0..=batch {
                    if next < count && !refused {
                        refused = producer.stage(Box::new(next)).is_err();
                        next += u64::from(!refused);
                    }
                }
                producer.publish();
                if refused {
                    std::thread::yield_now();
                }
            }
        });
        let mut expected = 0;
        while expected < count {
            let mut taken = 0;
            if expected % 3 == 0 {
                if let Some(value) = consumer.pop() {
                    assert_eq!(*value, expected);
                    taken = 1;
                }
            } else {
                taken = consumer.drain(7, |value| {
                    assert_eq!(*value, expected);
                    expected += 1;
                });
                expected -= taken as u64;
            }
            expected += taken as u64;
            if taken == 0 {
                assert!(!(consumer.is_abandoned() && consumer.is_empty()), "values were lost");
                std::thread::yield_now();
            }
        }
        writer.join().unwrap();
        assert_eq!(consumer.pop(), None);
        assert!(consumer.is_abandoned());
    }
}

#[test]
fn both_sides_leave_at_once_with_values_inside() {
    let rounds = if cfg!(miri) { 10 } else { 1_000 };
    for round in 0..rounds {
        let (dropped, values) = counted(6);
        let (mut producer, mut consumer) = channel(8);
        let mut values = values.into_iter();
        values.by_ref().take(3).for_each(|value| assert!(producer.push(value).is_ok()));
        let writer = std::thread::spawn(move || {
            values.for_each(|value| assert!(producer.stage(value).is_ok()));
        });
        consumer.drain(round % 5, drop);
        drop(consumer);
        writer.join().unwrap();
        assert_eq!(dropped.load(Ordering::Relaxed), 6);
    }
}
