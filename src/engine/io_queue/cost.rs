//! What a command costs a device, and the bounds that follow from it: by what `basalt qualify` measured, or by what is assumed of a
//! device that nobody measured.
//!
//! A cost is *device time*: the nanoseconds in which a busy device does this command and no other, that is, one over its throughput.
//! Two measured points (small transfers and large ones) give a fixed part for each command and a part for each byte. Commands in
//! flight whose costs add up to what a single command takes keep a device busy; all beyond that is a queue inside the device, which
//! nobody can overtake. So a bound of some hundred microseconds costs no throughput, and says how long a read stands in such a queue.

use serde::{Deserialize, Serialize};

use crate::limits::DEVICE_DEPTH;

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

/// No queue has fewer commands in flight, whatever was measured.
const DEPTH_MIN: u32 = 16;

/// The shortest piece that background transfers are cut into, in bytes: shorter ones cost more commands than they save time.
const PIECE_SIZE_MIN: usize = 64 << 10;

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
    read_depth: DEVICE_DEPTH as u32,
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
    FigureRange { is_whole: true, ..range("read_depth", (1.0, 65_536.0)) },
];

impl FigureRange {
    /// Whether a device may have so much of it. What is no number is in no range either.
    pub fn allows(&self, value: f64) -> bool {
        (self.least..=self.most).contains(&value) && (!self.is_whole || value.fract() == 0.0)
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
    /// Bytes of the pieces that background transfers are cut into, a power of two.
    pub(super) piece_size: usize,
}

impl Bounds {
    /// For each of so many queues on a device that was measured so, in equal parts.
    pub(super) fn new(profile: &DeviceProfile, queue_count: u32) -> Bounds {
        let queues = u64::from(queue_count.max(1));
        let (least, most) = BACKGROUND_US;
        let background_us = profile.read_latency_p99_us.clamp(least, most) as u64;
        let background_ns = (background_us * 1_000 / queues).max(1);
        let write = Line::through(profile.write_iops, profile.write_bytes_per_second);
        // Two pieces fit the bound, so that one is under way while the next is prepared.
        let fits = |size: &usize| write.cost_ns(*size as u64) * 2 <= background_ns;
        let sizes = (PIECE_SIZE_MIN.ilog2()..=20).rev().map(|bits| 1usize << bits);
        let piece_size = sizes.clone().find(fits).unwrap_or(PIECE_SIZE_MIN);
        let (least, most) = COMMIT_DEADLINE_US;
        let depth = profile.read_depth.saturating_mul(DEPTH_FACTOR).div_ceil(queue_count.max(1));
        Bounds {
            read: Line::through(profile.read_iops, profile.read_bytes_per_second),
            write,
            background_ns,
            commit_ns: background_ns * COMMIT_FACTOR,
            commit_deadline_us: profile.durable_write_latency_p50_us.clamp(least, most) as u64,
            depth: depth.max(DEPTH_MIN) as usize,
            piece_size,
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
        self.write.cost_ns(self.piece_size as u64)
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
        assert!(assumed.depth >= DEVICE_DEPTH, "what is not known bounds nothing");
        assert_eq!(assumed.piece_size, 128 << 10);
        let fast = DeviceProfile { write_bytes_per_second: 5e9, write_iops: 1e6, ..ASSUMED };
        assert_eq!(Bounds::new(&fast, 1).piece_size, 1 << 20);
        // What one queue may have is a part of what all may, but never nothing.
        assert_eq!(Bounds::new(&fast, 4).background_ns, 125_000);
        assert_eq!(Bounds::new(&fast, 4).piece_size, 256 << 10);
        assert_eq!(Bounds::new(&fast, 64).piece_size, PIECE_SIZE_MIN);
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
}
