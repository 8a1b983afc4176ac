//! Loads on a device and what they measure: for `bench device` and `qualify`.
//!
//! Closed loops through the same seam that the engine uses, so that what is measured is what a node gets of an I/O engine. No
//! two writes that are in flight overlap.

pub mod durable;
pub mod load;
pub mod selftest;

use std::time::Duration;

use hdrhistogram::Histogram;

use crate::device::blocking;
use crate::device::{Device, Io, IoDone, IoError, IoOp, Refusal, Token};

/// Latencies in nanoseconds, to three digits, from 1 ns to about 17 minutes.
pub type Latencies = Histogram<u64>;

/// An empty histogram.
pub fn latencies() -> Latencies {
    Histogram::new_with_max(1 << 40, 3).expect("constant bounds that are valid")
}

/// Counts one latency.
fn record(histogram: &mut Latencies, latency: Duration) {
    histogram.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
}

/// Bytes that neither compress nor repeat soon.
pub fn fill(bytes: &mut [u8], seed: u64) {
    crate::device::sim::random::Random::new(seed).fill(bytes);
}

/// How long a load polls before it sleeps, as a reactor does.
const SPIN: Duration = Duration::from_micros(20);

/// Runs one operation to its end.
pub fn run_one<D: Device>(device: &mut D, op: IoOp) -> Result<IoDone, IoError> {
    let mut io = Io { token: Token(0), op };
    while let Err(rejected) = device.submit(io) {
        match rejected.why {
            Refusal::Failed(error) => return Err(error),
            Refusal::Full => io = rejected.io,
        }
        device.poll(&mut Vec::new());
    }
    let mut done = Vec::new();
    let mut idle = None;
    while device.poll(&mut done) == 0 {
        rest(device, &mut idle);
    }
    let done = done.remove(0);
    done.status.clone().map(|()| done)
}

/// Polls on for a while, then sleeps until something has finished. `idle` is since when nothing was found.
fn rest<D: Device>(device: &D, idle: &mut Option<std::time::Instant>) {
    let since = *idle.get_or_insert_with(std::time::Instant::now);
    if since.elapsed() < SPIN {
        std::hint::spin_loop();
    } else {
        blocking::wait(device);
    }
}
