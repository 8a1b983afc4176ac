//! This crate's ring beside `rtrb` (also single-producer single-consumer) and `crossbeam_queue::ArrayQueue` (the queue for
//! many producers and consumers that it replaces): one value at a time, batches of 16, and a request-response round trip.
//!
//! `cargo bench --bench ring` (`-- --quick` for a look). The contenders take turns within each run, so that a machine that
//! slows down slows all of them; figures are the median over the runs, with the extremes beside it.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::hint::spin_loop;
use std::sync::{Arc, Barrier};
use std::time::Instant;

use basalt::reactor::cores::{pin_current, usable};
use basalt::ring;

const CAPACITY: usize = 1024;
const BATCH: usize = 16;

/// What a contender must be able to do. `false` and `0` mean: try again.
trait Sender: Send + 'static {
    fn push(&mut self, value: u64) -> bool;
    /// Pushes `first`, `first + 1`, ... up to `count` values and publishes them. Returns how many fitted.
    fn push_batch(&mut self, first: u64, count: usize) -> usize;
}

trait Receiver: Send + 'static {
    fn pop(&mut self) -> Option<u64>;
    fn pop_batch(&mut self, count: usize, each: impl FnMut(u64)) -> usize;
}

impl Sender for ring::Producer<u64> {
    fn push(&mut self, value: u64) -> bool {
        ring::Producer::push(self, value).is_ok()
    }

    fn push_batch(&mut self, first: u64, count: usize) -> usize {
        let fitted = (first..first + count as u64).take_while(|&value| self.stage(value).is_ok()).count();
        self.publish();
        fitted
    }
}

impl Receiver for ring::Consumer<u64> {
    fn pop(&mut self) -> Option<u64> {
        ring::Consumer::pop(self)
    }

    fn pop_batch(&mut self, count: usize, each: impl FnMut(u64)) -> usize {
        self.drain(count, each)
    }
}

impl Sender for rtrb::Producer<u64> {
    fn push(&mut self, value: u64) -> bool {
        rtrb::Producer::push(self, value).is_ok()
    }

    fn push_batch(&mut self, first: u64, count: usize) -> usize {
        let count = self.slots().min(count);
        match self.write_chunk_uninit(count) {
            Ok(chunk) => chunk.fill_from_iter(first..first + count as u64),
            Err(_) => 0,
        }
    }
}

impl Receiver for rtrb::Consumer<u64> {
    fn pop(&mut self) -> Option<u64> {
        rtrb::Consumer::pop(self).ok()
    }

    fn pop_batch(&mut self, count: usize, each: impl FnMut(u64)) -> usize {
        let count = self.slots().min(count);
        match self.read_chunk(count) {
            Ok(chunk) => {
                chunk.into_iter().for_each(each);
                count
            }
            Err(_) => 0,
        }
    }
}

type Shared = Arc<crossbeam_queue::ArrayQueue<u64>>;

impl Sender for Shared {
    fn push(&mut self, value: u64) -> bool {
        crossbeam_queue::ArrayQueue::push(self, value).is_ok()
    }

    fn push_batch(&mut self, first: u64, count: usize) -> usize {
        (first..first + count as u64).take_while(|&value| Sender::push(self, value)).count()
    }
}

impl Receiver for Shared {
    fn pop(&mut self) -> Option<u64> {
        crossbeam_queue::ArrayQueue::pop(self)
    }

    fn pop_batch(&mut self, count: usize, mut each: impl FnMut(u64)) -> usize {
        (0..count).map_while(|_| Receiver::pop(self)).map(&mut each).count()
    }
}

fn ours() -> (impl Sender, impl Receiver) {
    ring::channel(CAPACITY)
}

fn rtrb() -> (impl Sender, impl Receiver) {
    rtrb::RingBuffer::new(CAPACITY)
}

fn array_queue() -> (impl Sender, impl Receiver) {
    let queue = Arc::new(crossbeam_queue::ArrayQueue::new(CAPACITY));
    (queue.clone(), queue)
}

/// Runs `here` and `there` at the same time on two cores and returns millions of operations per second.
fn race(cores: [usize; 2], count: u64, here: impl FnOnce(), there: impl FnOnce() + Send + 'static) -> f64 {
    let barrier = Arc::new(Barrier::new(2));
    let ready = barrier.clone();
    let thread = std::thread::spawn(move || {
        pin_current(cores[1]).expect("a usable core");
        ready.wait();
        there();
    });
    barrier.wait();
    let start = Instant::now();
    here();
    let elapsed = start.elapsed();
    thread.join().expect("the other thread panicked");
    count as f64 / elapsed.as_secs_f64() / 1e6
}

fn single(cores: [usize; 2], count: u64, (mut tx, mut rx): (impl Sender, impl Receiver)) -> f64 {
    let receive = move || {
        for expected in 0..count {
            assert_eq!(wait(|| rx.pop()), expected);
        }
    };
    let send = move || (0..count).for_each(|value| wait(|| tx.push(value).then_some(())));
    race(cores, count, receive, send)
}

fn batch(cores: [usize; 2], count: u64, (mut tx, mut rx): (impl Sender, impl Receiver)) -> f64 {
    let receive = move || {
        let mut expected = 0;
        while expected < count {
            let taken = rx.pop_batch(BATCH, |value| {
                assert_eq!(value, expected);
                expected += 1;
            });
            if taken == 0 {
                spin_loop();
            }
        }
    };
    let send = move || {
        let mut next = 0;
        while next < count {
            let fitted = tx.push_batch(next, BATCH.min((count - next) as usize));
            next += fitted as u64;
            if fitted == 0 {
                spin_loop();
            }
        }
    };
    race(cores, count, receive, send)
}

fn round_trip(
    cores: [usize; 2],
    count: u64,
    (mut ask, mut asked): (impl Sender, impl Receiver),
    (mut answer, mut answered): (impl Sender, impl Receiver),
) -> f64 {
    let here = move || {
        for value in 0..count {
            wait(|| ask.push(value).then_some(()));
            assert_eq!(wait(|| answered.pop()), value + 1);
        }
    };
    let there = move || {
        for _ in 0..count {
            let value = wait(|| asked.pop());
            wait(|| answer.push(value + 1).then_some(()));
        }
    };
    race(cores, count, here, there)
}

#[inline]
fn wait<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    loop {
        if let Some(value) = attempt() {
            return value;
        }
        spin_loop();
    }
}

fn main() {
    let quick = std::env::args().any(|argument| argument == "--quick");
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or(" unknown");
    let cores = usable().unwrap_or_default();
    println!("cpu: {}, usable cores: {}", model.trim_start_matches([' ', '\t', ':']), cores.len());
    println!("command: cargo bench --bench ring{}", if quick { " -- --quick" } else { "" });
    let [first, second, ..] = cores[..] else {
        println!("SKIPPED: two threads at full speed need two cores");
        return;
    };
    let cores = [first, second];
    pin_current(first).expect("a usable core");
    println!("threads pinned to cores {first} and {second}, rings of {CAPACITY}, u64 values\n");

    let runs = if quick { 5 } else { 11 };
    let scale = if quick { 1 } else { 4 };
    type Contender = fn([usize; 2], u64) -> f64;
    let tests: [(&str, u64, [Contender; 3]); 3] = [
        (
            "one at a time",
            500_000 * scale,
            [
                |cores, count| single(cores, count, ours()),
                |cores, count| single(cores, count, rtrb()),
                |cores, count| single(cores, count, array_queue()),
            ],
        ),
        (
            "batches of 16",
            1_000_000 * scale,
            [
                |cores, count| batch(cores, count, ours()),
                |cores, count| batch(cores, count, rtrb()),
                |cores, count| batch(cores, count, array_queue()),
            ],
        ),
        (
            "round trip",
            30_000 * scale,
            [
                |cores, count| round_trip(cores, count, ours(), ours()),
                |cores, count| round_trip(cores, count, rtrb(), rtrb()),
                |cores, count| round_trip(cores, count, array_queue(), array_queue()),
            ],
        ),
    ];
    let names = ["basalt", "rtrb", "ArrayQueue"];
    println!("{:<14} {:<11} {:>8} {:>8} {:>8}  M ops/s over {runs} runs", "", "", "min", "median", "max");
    let began = Instant::now();
    for (test, count, contenders) in tests {
        let mut figures = [const { Vec::new() }; 3];
        // A crowded machine gets fewer runs rather than a longer wait, but never fewer than five.
        for run in 0..runs {
            if run >= 5 && began.elapsed().as_secs() >= 12 {
                break;
            }
            for (figure, contender) in figures.iter_mut().zip(contenders) {
                figure.push(contender(cores, count));
            }
        }
        figures.iter_mut().for_each(|figure| figure.sort_by(f64::total_cmp));
        let median = |figure: &[f64]| figure[figure.len() / 2];
        for (name, figure) in names.iter().zip(&figures) {
            let (min, max) = (figure[0], figure[figure.len() - 1]);
            let ratio = median(&figures[0]) / median(figure);
            println!(
                "{test:<14} {name:<11} {min:>8.2} {:>8.2} {max:>8.2}  basalt / {name}: {ratio:.2}",
                median(figure)
            );
        }
    }
    println!("\ntook {:.1} s", began.elapsed().as_secs_f64());
}
