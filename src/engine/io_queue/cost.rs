//! What a command costs a device, and the bounds that follow from it: by what `basalt qualify` measured, or by what is assumed of a
//! device that nobody measured.
//!
//! A cost is *device time*: the nanoseconds in which a busy device does this command and no other, that is, one over its throughput.
//! Two measured points (small transfers and large ones) give a fixed part for each command and a part for each byte. Commands in
//! flight whose costs add up to what a single command takes keep a device busy; all beyond that is a queue inside the device, which
//! nobody can overtake. So a bound of some hundred microseconds costs no throughput, and says how long a read stands in such a queue.

use serde::{Deserialize, Serialize};

use crate::limits::{DEVICE_DEPTH, REACTOR_COUNT_MAX};

/// Bytes of the transfers that `read_iops` and `write_iops` count.
pub const SMALL_SIZE: u64 = 4 << 10;

/// Bytes of the transfers that bandwidths are measured with.
pub const LARGE_SIZE: u64 = 256 << 10;

/// What background work may have in flight beside clients' commands, in device time: between these, and where a single read of the
/// device takes longer, as long as that.
const BACKGROUND_US: (f64, f64) = (500.0, 5_000.0);

/// How long a write of a group waits before it goes first: what a durable write takes by itself, between these.
const COMMIT_DEADLINE_US: (f64, f64) = (200.0, 5_000.0);

/// The writes of groups may have so many times as much in flight as the background while reads want the device as well.
const COMMIT_FACTOR: u64 = 4;

/// Commands in flight for each one that the device needs to be busy, since completions are only seen once a loop.
const DEPTH_FACTOR: u32 = 2;

/// No fewer commands are in flight on a device, whatever was measured.
const DEPTH_MIN: u32 = 16;

/// Nor on one of several queues: a reactor that is busy alone has a few all the same.
const QUEUE_DEPTH_MIN: u32 = 4;

/// The pieces that background transfers are cut into are no shorter, in bytes.
const PIECE_SIZE_MIN: usize = 8 << 10;

/// Nor, where a piece does not fit the bound, shorter than it takes for its bytes to cost as much as the command itself, up to this:
/// cutting more would cost more device time than it saves anybody who waits.
const PIECE_SIZE_WORTH: usize = 64 << 10;

/// What a device can do, as `basalt qualify` measures it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceProfile {
    /// Random reads a second, of 4 KiB each.
    pub read_iops: f64,
    /// Random writes a second, of 4 KiB each.
    pub write_iops: f64,
    /// Bytes a second that are read in order, 256 KiB at a time.
    pub read_bytes_per_second: f64,
    /// Bytes a second that are written in order, 256 KiB at a time.
    pub write_bytes_per_second: f64,
    /// What one random read of 4 KiB takes when nothing else is under way, in microseconds: the median.
    pub read_latency_p50_us: f64,
    /// The same, which one in a hundred takes longer than.
    pub read_latency_p99_us: f64,
    /// What one block takes to be written and flushed when nothing else is under way, in microseconds: the median.
    pub durable_write_latency_p50_us: f64,
    /// The same, which one in a hundred takes longer than.
    pub durable_write_latency_p99_us: f64,
    /// Random reads in flight that give nearly as many a second as any number does.
    pub read_depth: u32,
}

/// What is taken for granted of a device that was not measured: less than most drives can do. A faster one is kept busy all the
/// same (at a tenth of a millisecond a command, half a millisecond of these figures is 5 GB/s); a slower one needs its own.
pub const ASSUMED: DeviceProfile = DeviceProfile {
    read_iops: 100_000.0,
    write_iops: 50_000.0,
    read_bytes_per_second: 1e9,
    write_bytes_per_second: 1e9,
    read_latency_p50_us: 100.0,
    read_latency_p99_us: 500.0,
    durable_write_latency_p50_us: 1_000.0,
    durable_write_latency_p99_us: 5_000.0,
    // What is not known bounds nothing, whatever the number of queues.
    read_depth: (DEVICE_DEPTH * REACTOR_COUNT_MAX) as u32,
};

/// A figure, and what a device may have of it: costs and bounds are derived from them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FigureRange {
    /// Its name, as in [`DeviceProfile`].
    pub name: &'static str,
    /// The least that is believed.
    pub least: f64,
    /// The most that is believed.
    pub most: f64,
    /// It is a number of things: no part of one.
    pub is_whole: bool,
}

/// The most reads in flight that are believed to be needed.
const DEPTH_MAX: f64 = 65_536.0;

const _: () = assert!(ASSUMED.read_depth as f64 <= DEPTH_MAX);

const fn range(name: &'static str, (least, most): (f64, f64)) -> FigureRange {
    FigureRange { name, least, most, is_whole: false }
}

const RATES: (f64, f64) = (1.0, 1e9);
const BANDWIDTHS: (f64, f64) = (1e4, 1e12);
const LATENCIES_US: (f64, f64) = (0.1, 6e7);

/// Every figure of a profile.
pub const FIGURES: [FigureRange; 9] = [
    range("read_iops", RATES),
    range("write_iops", RATES),
    range("read_bytes_per_second", BANDWIDTHS),
    range("write_bytes_per_second", BANDWIDTHS),
    range("read_latency_p50_us", LATENCIES_US),
    range("read_latency_p99_us", LATENCIES_US),
    range("durable_write_latency_p50_us", LATENCIES_US),
    range("durable_write_latency_p99_us", LATENCIES_US),
    FigureRange { is_whole: true, ..range("read_depth", (1.0, DEPTH_MAX)) },
];

impl FigureRange {
    /// Whether a device may have so much of it. What is no number is in no range either.
    pub fn allows(&self, value: f64) -> bool {
        (self.least..=self.most).contains(&value) && (!self.is_whole || value.fract() == 0.0)
    }
}

/// A figure that no device has.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{name} is {value}, which no device has: between {least} and {most} is")]
pub struct ImplausibleFigure {
    /// The figure.
    pub name: &'static str,
    /// What it was said to be.
    pub value: f64,
    /// The least that is believed.
    pub least: f64,
    /// The most that is believed.
    pub most: f64,
}

impl DeviceProfile {
    /// The figures, in the order of [`FIGURES`], with the least that each may be beside the others.
    fn figures(&self) -> [(f64, f64); FIGURES.len()] {
        let any = f64::NEG_INFINITY;
        [
            (self.read_iops, any),
            (self.write_iops, any),
            (self.read_bytes_per_second, any),
            (self.write_bytes_per_second, any),
            (self.read_latency_p50_us, any),
            (self.read_latency_p99_us, self.read_latency_p50_us),
            (self.durable_write_latency_p50_us, any),
            (self.durable_write_latency_p99_us, self.durable_write_latency_p50_us),
            (f64::from(self.read_depth), any),
        ]
    }

    /// Whether every figure is one that a device may have.
    pub fn check(&self) -> Result<(), ImplausibleFigure> {
        for (range, (value, beside)) in FIGURES.iter().zip(self.figures()) {
            if !range.allows(value) || value < beside {
                let FigureRange { name, least, most, .. } = *range;
                return Err(ImplausibleFigure { name, value, least: least.max(beside), most });
            }
        }
        Ok(())
    }
}

/// Device time of one command of a kind: a fixed part, and one for its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Line {
    command_ns: u64,
    mib_ns: u64,
}

impl Line {
    /// Through what was measured with small transfers and with large ones.
    fn through(iops: f64, bytes_per_second: f64) -> Line {
        let small_ns = 1e9 / iops;
        let large_ns = 1e9 * LARGE_SIZE as f64 / bytes_per_second;
        // A small transfer that takes longer than a large one is all fixed part.
        let byte_ns = ((large_ns - small_ns) / (LARGE_SIZE - SMALL_SIZE) as f64).max(0.0);
        let command_ns = (small_ns - byte_ns * SMALL_SIZE as f64).max(0.0);
        Line { command_ns: command_ns as u64, mib_ns: (byte_ns * (1u64 << 20) as f64) as u64 }
    }

    fn cost_ns(self, size: u64) -> u64 {
        // No transfer is longer than some MiB, and no device so slow that this would overflow.
        (self.command_ns + ((self.mib_ns * size) >> 20)).max(1)
    }

    /// The longest piece of which two fit the bound, so that one is under way while the next is prepared; where that would be
    /// mostly commands, one that is not.
    fn piece_size(self, bound_ns: u64) -> usize {
        let sizes = || (PIECE_SIZE_MIN.ilog2()..=20).map(|bits| 1usize << bits);
        let worth = sizes().find(|size| self.cost_ns(*size as u64) >= 2 * self.command_ns);
        let least = worth.unwrap_or(PIECE_SIZE_WORTH).min(PIECE_SIZE_WORTH);
        let fitting = sizes().rev().find(|size| self.cost_ns(*size as u64) * 2 <= bound_ns);
        fitting.map_or(least, |size| size.max(least))
    }
}

/// What the scheduler of one queue goes by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    read: Line,
    write: Line,
    /// Device time that background commands may have in flight beside clients' commands.
    pub(super) background_ns: u64,
    /// Device time that the writes of groups may have in flight beside reads.
    pub(super) commit_ns: u64,
    /// Microseconds that a write of a group waits before it goes first.
    pub(super) commit_deadline_us: u64,
    /// Commands in flight.
    pub(super) depth: usize,
    /// Bytes of the pieces that background reads are cut into, a power of two.
    pub(super) read_piece_size: usize,
    /// The same of writes.
    pub(super) write_piece_size: usize,
}

impl Bounds {
    /// For each of so many queues on a device that was measured so, in equal parts.
    pub(super) fn new(profile: &DeviceProfile, queue_count: u32) -> Bounds {
        let queues = u64::from(queue_count.max(1));
        let (least, most) = BACKGROUND_US;
        let background_us = profile.read_latency_p99_us.clamp(least, most) as u64;
        let background_ns = (background_us * 1_000 / queues).max(1);
        let write = Line::through(profile.write_iops, profile.write_bytes_per_second);
        let read = Line::through(profile.read_iops, profile.read_bytes_per_second);
        let (least, most) = COMMIT_DEADLINE_US;
        let depth = profile.read_depth.saturating_mul(DEPTH_FACTOR).max(DEPTH_MIN);
        Bounds {
            read_piece_size: read.piece_size(background_ns),
            write_piece_size: write.piece_size(background_ns),
            read,
            write,
            background_ns,
            commit_ns: background_ns * COMMIT_FACTOR,
            commit_deadline_us: profile.durable_write_latency_p50_us.clamp(least, most) as u64,
            depth: depth.div_ceil(queue_count.max(1)).max(QUEUE_DEPTH_MIN) as usize,
        }
    }

    pub(super) fn read_ns(&self, size: u64) -> u64 {
        self.read.cost_ns(size)
    }

    pub(super) fn write_ns(&self, size: u64) -> u64 {
        self.write.cost_ns(size)
    }

    /// Of a command that moves nothing, as a flush.
    pub(super) fn flush_ns(&self) -> u64 {
        self.write.cost_ns(0)
    }

    /// Of a deallocation, which some devices take their time for: as much as a piece of background work.
    pub(super) fn deallocate_ns(&self) -> u64 {
        self.write.cost_ns(self.write_piece_size as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_what_was_measured() {
        // 10 us a small read, 100 us a large one.
        let line = Line::through(100_000.0, LARGE_SIZE as f64 * 10_000.0);
        for (size, ns) in [(SMALL_SIZE, 10_000), (LARGE_SIZE, 100_000), (2 * LARGE_SIZE, 191_428)] {
            let cost = line.cost_ns(size);
            assert!(cost.abs_diff(ns) <= ns / 500, "{size} bytes cost {cost} ns instead of {ns}");
        }
        // Bandwidth without any cost of a command, and the other way round: nothing is negative.
        let line = Line::through(1e9, 1e9);
        assert_eq!(line.command_ns, 0);
        assert!(line.cost_ns(LARGE_SIZE).abs_diff(LARGE_SIZE) < LARGE_SIZE / 50);
        let line = Line::through(1_000.0, 1e12);
        assert_eq!((line.cost_ns(512), line.cost_ns(1 << 20)), (1_000_000, 1_000_000));
    }

    #[test]
    fn bounds_follow_the_profile() {
        let assumed = Bounds::new(&ASSUMED, 1);
        assert_eq!((assumed.background_ns, assumed.commit_deadline_us), (500_000, 1_000));
        assert_eq!((assumed.read_piece_size, assumed.write_piece_size), (128 << 10, 128 << 10));
        let fast = DeviceProfile { write_bytes_per_second: 5e9, write_iops: 1e6, ..ASSUMED };
        let fast = Bounds::new(&fast, 1);
        assert_eq!((fast.read_piece_size, fast.write_piece_size), (128 << 10, 1 << 20));
        let fast = DeviceProfile { write_bytes_per_second: 5e9, write_iops: 1e6, ..ASSUMED };
        // What one queue may have is a part of what all may, but never nothing.
        assert_eq!(Bounds::new(&fast, 4).background_ns, 125_000);
        assert_eq!(Bounds::new(&fast, 4).write_piece_size, 256 << 10);
        assert_eq!(Bounds::new(&fast, 64).write_piece_size, 16 << 10);
        let slow = DeviceProfile {
            read_latency_p99_us: 12_000.0,
            durable_write_latency_p50_us: 9_000.0,
            read_depth: 4,
            ..ASSUMED
        };
        let slow = Bounds::new(&slow, 1);
        assert_eq!((slow.background_ns, slow.commit_deadline_us), (5_000_000, 5_000));
        assert_eq!(slow.depth, DEPTH_MIN as usize);
        let deep = Bounds::new(&DeviceProfile { read_depth: 64, ..ASSUMED }, 4);
        assert_eq!(deep.depth, 32);
    }

    #[test]
    fn a_figure_is_in_its_range_or_not_allowed() {
        for figure in FIGURES {
            for (value, is_allowed) in [
                (figure.least, true),
                (figure.most, true),
                (figure.least / 2.0, false),
                (figure.most * 2.0, false),
                (-figure.least, false),
                (f64::NAN, false),
                (f64::INFINITY, false),
                (figure.least + 0.5, !figure.is_whole),
            ] {
                assert_eq!(figure.allows(value), is_allowed, "{}: {value}", figure.name);
            }
        }
    }

    #[test]
    fn what_the_queues_have_adds_up_to_what_the_device_has() {
        let measured = DeviceProfile { read_depth: 40, ..ASSUMED };
        for queues in 1..=REACTOR_COUNT_MAX as u32 {
            let (all, one) = (Bounds::new(&measured, 1), Bounds::new(&measured, queues));
            let count = queues as usize;
            assert!(one.background_ns * u64::from(queues) <= all.background_ns, "{queues}: {one:?}");
            assert!(one.commit_ns * u64::from(queues) <= all.commit_ns, "{queues}: {one:?}");
            let most = (all.depth + count).max(count * QUEUE_DEPTH_MIN as usize);
            assert!(one.depth * count <= most && one.depth * count >= all.depth, "{queues}: {one:?}");
            // A device that needs few commands has no more because there are many queues.
            let slow = Bounds::new(&DeviceProfile { read_depth: 1, ..ASSUMED }, queues);
            assert!(slow.depth * count <= (DEPTH_MIN * 2).max(queues * QUEUE_DEPTH_MIN) as usize, "{slow:?}");
            // Nothing is known of this one, and so nothing is divided.
            assert!(Bounds::new(&ASSUMED, queues).depth >= DEVICE_DEPTH, "{queues}");
        }
    }

    #[test]
    fn pieces_are_as_short_as_is_worth_it() {
        // Commands take 20 us, and 4 KiB another 100 us: two pieces fit half a millisecond.
        let (iops, bytes_per_second) = (8_333.0, LARGE_SIZE as f64 / 6.42e-3);
        let slow = DeviceProfile { read_iops: iops, read_bytes_per_second: bytes_per_second, ..ASSUMED };
        let slow = Bounds::new(&slow, 1);
        assert_eq!((slow.read_piece_size, slow.write_piece_size), (PIECE_SIZE_MIN, 128 << 10));
        assert!(slow.read_ns(PIECE_SIZE_MIN as u64) * 2 <= slow.background_ns, "{slow:?}");
        // Commands take 400 us: nothing fits, and a piece shorter than 16 KiB would be mostly command.
        let (iops, bytes_per_second) = (2_000.0, LARGE_SIZE as f64 / 6.9e-3);
        let slow = DeviceProfile { write_iops: iops, write_bytes_per_second: bytes_per_second, ..ASSUMED };
        assert_eq!(Bounds::new(&slow, 1).write_piece_size, 16 << 10);
        // A disk whose commands cost the same whatever they move: cutting saves nothing.
        let seeks = DeviceProfile {
            read_iops: 100.0,
            write_iops: 100.0,
            read_bytes_per_second: 1.5e8,
            write_bytes_per_second: 1.5e8,
            ..ASSUMED
        };
        assert_eq!(Bounds::new(&seeks, 1).read_piece_size, PIECE_SIZE_WORTH);
    }

    #[test]
    fn figures_that_no_device_has_are_named() {
        assert_eq!(ASSUMED.check(), Ok(()));
        for (profile, name) in [
            (DeviceProfile { read_iops: 0.0, ..ASSUMED }, "read_iops"),
            (DeviceProfile { write_iops: f64::INFINITY, ..ASSUMED }, "write_iops"),
            (DeviceProfile { read_bytes_per_second: f64::NAN, ..ASSUMED }, "read_bytes_per_second"),
            (DeviceProfile { write_bytes_per_second: -1.0, ..ASSUMED }, "write_bytes_per_second"),
            (DeviceProfile { read_latency_p99_us: 1e9, ..ASSUMED }, "read_latency_p99_us"),
            (DeviceProfile { read_depth: 0, ..ASSUMED }, "read_depth"),
            // One in a hundred does not take less time than one in two.
            (DeviceProfile { read_latency_p99_us: 99.0, ..ASSUMED }, "read_latency_p99_us"),
            (DeviceProfile { durable_write_latency_p99_us: 9.0, ..ASSUMED }, "durable_write_latency_p99_us"),
        ] {
            let error = profile.check().unwrap_err();
            assert_eq!(error.name, name);
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
