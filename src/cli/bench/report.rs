//! What a benchmark found, as figures: medians of its runs.

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::device::{Deallocate, Geometry};
use crate::measure::durable::Durable;
use crate::measure::load::Measured;

/// Everything that was measured, and on what. Its JSON is the format of `--json`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) version: &'static str,
    pub(super) device: String,
    pub(super) machine: Machine,
    pub(super) seconds: f64,
    pub(super) runs: usize,
    /// Bytes that were read and written.
    pub(super) size_bytes: u64,
    pub(super) engines: Vec<Engine>,
    pub(super) points: Vec<Point>,
    pub(super) durable: Vec<DurablePoint>,
    pub(super) notes: Vec<String>,
}

/// The machine, as far as it matters here.
#[derive(Debug, Serialize)]
pub(super) struct Machine {
    pub(super) kernel: String,
    pub(super) processors: usize,
    /// The block device beneath, and what the kernel thinks of its cache.
    pub(super) block_device: Option<String>,
    pub(super) write_cache: Option<String>,
}

/// What an engine says of itself on this device.
#[derive(Debug, Serialize)]
pub(super) struct Engine {
    name: &'static str,
    block_size: u32,
    transfer_size_max: u32,
    memory_alignment: u32,
    atomic_size: u32,
    volatile_cache: bool,
    registered_buffers: bool,
    pub(super) blocks_on_transfer: bool,
    blocks_on_append: bool,
    blocks_on_flush: bool,
    blocks_on_size_change: bool,
    deallocate: &'static str,
}

impl Engine {
    pub(super) fn new(geometry: &Geometry) -> Engine {
        Engine {
            name: geometry.engine,
            block_size: geometry.block_size,
            transfer_size_max: geometry.transfer_size_max,
            memory_alignment: geometry.memory_alignment,
            atomic_size: geometry.atomic_size,
            volatile_cache: geometry.volatile_cache,
            registered_buffers: geometry.registered_buffers,
            blocks_on_transfer: geometry.blocks.transfer,
            blocks_on_append: geometry.blocks.append,
            blocks_on_flush: geometry.blocks.flush,
            blocks_on_size_change: geometry.blocks.size_change,
            deallocate: match geometry.deallocate {
                Deallocate::None => "none",
                Deallocate::Advisory => "advisory",
                Deallocate::Zeroes => "zeroes",
            },
        }
    }
}

/// Latencies in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Latency {
    pub(super) mean: f64,
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) p999: f64,
    pub(super) max: f64,
}

impl Latency {
    /// `None` of nothing.
    fn of(histogram: &Histogram<u64>) -> Option<Latency> {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1000.0;
        (!histogram.is_empty()).then(|| Latency {
            mean: histogram.mean() / 1000.0,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            max: histogram.max() as f64 / 1000.0,
        })
    }

    /// The median of each figure over the runs that have one.
    fn median(runs: &[Option<Latency>]) -> Option<Latency> {
        let each = |figure: fn(&Latency) -> f64| median(runs.iter().flatten().map(figure).collect());
        Some(Latency {
            mean: each(|one| one.mean)?,
            p50: each(|one| one.p50)?,
            p90: each(|one| one.p90)?,
            p99: each(|one| one.p99)?,
            p999: each(|one| one.p999)?,
            max: each(|one| one.max)?,
        })
    }
}

/// Reads or writes at one depth through one engine.
#[derive(Debug, Serialize)]
pub(super) struct Point {
    pub(super) engine: String,
    pub(super) workload: &'static str,
    pub(super) block_size: usize,
    pub(super) depth: usize,
    pub(super) iops: f64,
    pub(super) iops_min: f64,
    pub(super) iops_max: f64,
    pub(super) bytes_per_second: f64,
    pub(super) latency_us: Latency,
    pub(super) read_latency_us: Option<Latency>,
    pub(super) write_latency_us: Option<Latency>,
    pub(super) context_switches_per_io: f64,
    pub(super) system_calls_per_io: Option<f64>,
}

impl Point {
    /// The medians of some runs; `None` when none of them did anything.
    pub(super) fn new(
        engine: String,
        workload: &'static str,
        block_size: usize,
        depth: usize,
        runs: &[Measured],
    ) -> Option<Point> {
        let rates: Vec<f64> = runs.iter().map(|run| run.count as f64 / run.elapsed.as_secs_f64()).collect();
        let latency = |histogram: &dyn Fn(&Measured) -> Option<Latency>| {
            Latency::median(&runs.iter().map(histogram).collect::<Vec<_>>())
        };
        let switches = runs.iter().filter(|run| run.count > 0);
        let iops = median(rates.clone())?;
        Some(Point {
            engine,
            workload,
            block_size,
            depth,
            iops,
            iops_min: rates.iter().copied().fold(f64::INFINITY, f64::min),
            iops_max: rates.iter().copied().fold(0.0, f64::max),
            bytes_per_second: iops * block_size as f64,
            latency_us: latency(&|run| Latency::of(&run.latencies()))?,
            read_latency_us: latency(&|run| Latency::of(&run.reads)),
            write_latency_us: latency(&|run| Latency::of(&run.writes)),
            context_switches_per_io: median(
                switches.map(|run| run.context_switches as f64 / run.count as f64).collect(),
            )?,
            system_calls_per_io: median(runs.iter().filter_map(|run| run.system_calls_per_io).collect()),
        })
    }
}

/// Writes that were made durable one by one.
#[derive(Debug, Serialize)]
pub(super) struct DurablePoint {
    pub(super) engine: String,
    pub(super) kind: &'static str,
    pub(super) block_size: usize,
    pub(super) writes_per_second: f64,
    /// From submission until it was durable.
    pub(super) total_us: Latency,
    /// Of which the write.
    pub(super) write_us: Latency,
    /// Of which the flush; a FUA write has none.
    pub(super) flush_us: Option<Latency>,
}

impl DurablePoint {
    /// The medians of some runs; `None` when none of them did anything.
    pub(super) fn new(
        engine: String,
        kind: &'static str,
        block_size: usize,
        runs: &[Durable],
    ) -> Option<DurablePoint> {
        let latency = |histogram: fn(&Durable) -> &Histogram<u64>| {
            Latency::median(&runs.iter().map(|run| Latency::of(histogram(run))).collect::<Vec<_>>())
        };
        let rates = runs.iter().map(|run| run.total.len() as f64 / run.elapsed.as_secs_f64()).collect();
        Some(DurablePoint {
            engine,
            kind,
            block_size,
            writes_per_second: median(rates)?,
            total_us: latency(|run| &run.total)?,
            write_us: latency(|run| &run.write)?,
            flush_us: latency(|run| &run.flush),
        })
    }
}

/// The middle one; of an even number, the mean of the middle two.
pub(super) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count.is_multiple_of(2) => Some(f64::midpoint(values[middle - 1], values[middle])),
        _ => Some(values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::measure::latencies;

    #[test]
    fn medians_are_of_each_figure() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn a_point_has_the_median_run_of_each_figure_and_the_extremes() {
        let run = |count: u64, micros: u64, calls| {
            let mut reads = latencies();
            (0..count).for_each(|_| reads.record(micros * 1000).unwrap());
            Measured {
                count,
                elapsed: Duration::from_secs(2),
                reads,
                writes: latencies(),
                context_switches: count / 2,
                system_calls_per_io: calls,
            }
        };
        let runs = [run(100, 10, None), run(300, 30, Some(2.0)), run(200, 20, None)];
        let point = Point::new("uring".into(), "randread", 4096, 4, &runs).unwrap();
        assert_eq!((point.iops, point.iops_min, point.iops_max), (100.0, 50.0, 150.0));
        assert_eq!(point.bytes_per_second, 409_600.0);
        assert!((point.latency_us.p50 - 20.0).abs() < 0.1 && (point.latency_us.max - 20.0).abs() < 0.1);
        assert_eq!((point.context_switches_per_io, point.system_calls_per_io), (0.5, Some(2.0)));
        assert!(point.write_latency_us.is_none() && point.read_latency_us.is_some());
        assert!(Point::new("uring".into(), "randread", 4096, 4, &[run(0, 0, None)]).is_none());
    }
}
