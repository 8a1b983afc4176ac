//! The figures as text.

use std::fmt::Write;

use super::report::Report;
use crate::size;

/// Everything, as tables.
pub(super) fn table(report: &Report) -> String {
    let mut out = String::new();
    let machine = &report.machine;
    let under = match (&machine.block_device, &machine.write_cache) {
        (Some(name), Some(cache)) => format!(" on {name} ({cache})"),
        (Some(name), None) => format!(" on {name}"),
        _ => String::new(),
    };
    let _ = writeln!(
        out,
        "{}{under}, {} used; {}, {} processors; medians of {} runs of {} s",
        report.device,
        size::show(report.size_bytes),
        machine.kernel,
        machine.processors,
        report.runs,
        report.seconds
    );
    let mut sections: Vec<(&str, usize)> = Vec::new();
    for point in &report.points {
        if !sections.contains(&(point.workload, point.block_size)) {
            sections.push((point.workload, point.block_size));
        }
    }
    for (workload, block_size) in sections {
        let _ = writeln!(out, "\n{workload}, {}", size::show(block_size as u64));
        let _ = writeln!(
            out,
            "  {:<24} {:>5} {:>9} {:>9} {:>8} {:>8} {:>8} {:>9} {:>8} {:>8}",
            "engine", "depth", "IOPS", "MiB/s", "p50 us", "p99 us", "p99.9 us", "max us", "switches", "calls"
        );
        for point in
            report.points.iter().filter(|one| (one.workload, one.block_size) == (workload, block_size))
        {
            let latency = point.latency_us;
            let calls = point.system_calls_per_io.map_or("-".to_owned(), |calls| format!("{calls:.2}"));
            let _ = writeln!(
                out,
                "  {:<24} {:>5} {:>9.0} {:>9.1} {:>8.0} {:>8.0} {:>8.0} {:>9.0} {:>8.2} {calls:>8}",
                point.engine,
                point.depth,
                point.iops,
                point.bytes_per_second / f64::from(1 << 20),
                latency.p50,
                latency.p99,
                latency.p999,
                latency.max,
                point.context_switches_per_io
            );
        }
    }
    if !report.durable.is_empty() {
        let _ = writeln!(out, "\ndurable, one write at a time");
        let _ = writeln!(
            out,
            "  {:<24} {:<20} {:>9} {:>9} {:>8} {:>8} {:>9} {:>9}",
            "engine", "space, by", "size", "writes/s", "p50 us", "p99 us", "write p50", "flush p50"
        );
        for point in &report.durable {
            let flush = point.flush_us.map_or("-".to_owned(), |flush| format!("{:.0}", flush.p50));
            let _ = writeln!(
                out,
                "  {:<24} {:<20} {:>9} {:>9.0} {:>8.0} {:>8.0} {:>9.0} {flush:>9}",
                point.engine,
                point.kind,
                size::show(point.block_size as u64),
                point.writes_per_second,
                point.total_us.p50,
                point.total_us.p99,
                point.write_us.p50
            );
        }
    }
    out.push_str(
        "\nswitches and calls are context switches of the whole process and system calls for each operation.",
    );
    out
}
