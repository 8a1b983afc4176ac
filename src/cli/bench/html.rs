//! The figures as one HTML page: plots as inline SVG, nothing loaded from anywhere.

use std::fmt::Write;

use super::report::{DurablePoint, Point, Report};
use super::table;
use crate::size;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 340.0;
/// Room around a plot for its axes: left, right, top, bottom.
const MARGINS: (f64, f64, f64, f64) = (64.0, 32.0, 12.0, 46.0);

/// Colours of the engines, told apart by colour-blind people too (Okabe and Ito).
const COLORS: [&str; 8] =
    ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8a8a8a", "#b8a800"];

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1c1f23; --faint: #d8dce1; --paper: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --faint: #3a4048; --paper: #14171a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 760px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
.grid { stroke: var(--faint); } .legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; }
.legend i { display: inline-block; width: 1.4rem; height: 0.25rem; margin-right: 0.4rem; vertical-align: middle; }
pre { overflow-x: auto; font-size: 12px; } .quiet { opacity: 0.75; }
";

/// The page.
pub(super) fn page(report: &Report) -> String {
    let mut engines: Vec<&str> = Vec::new();
    let names =
        report.points.iter().map(|one| &one.engine).chain(report.durable.iter().map(|one| &one.engine));
    for name in names {
        if !engines.contains(&name.as_str()) {
            engines.push(name);
        }
    }
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>basalt bench device</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>I/O engines on {}</h1>\n",
        escape(&report.device)
    );
    let machine = &report.machine;
    let _ = writeln!(
        out,
        "<p>{}, {} processors{}. {} used. Medians of {} runs of {} s for each point. Basalt {}.</p>",
        escape(&machine.kernel),
        machine.processors,
        machine.block_device.as_ref().map_or(String::new(), |name| {
            let cache = machine.write_cache.as_ref().map_or(String::new(), |cache| format!(" ({cache})"));
            escape(&format!(", on {name}{cache}"))
        }),
        size::show(report.size_bytes),
        report.runs,
        report.seconds,
        report.version
    );
    let _ = write!(out, "<div class=\"legend\">");
    for (index, engine) in engines.iter().enumerate() {
        let _ = write!(out, "<span><i style=\"background:{}\"></i>{}</span>", color(index), escape(engine));
    }
    out.push_str("</div>\n");
    let mut seen: Vec<(&str, usize)> = Vec::new();
    for point in &report.points {
        let key = (point.workload, point.block_size);
        if seen.contains(&key) {
            continue;
        }
        seen.push(key);
        let _ = writeln!(out, "<h2>{}, {}</h2>", key.0, size::show(key.1 as u64));
        let points: Vec<&Point> =
            report.points.iter().filter(|one| (one.workload, one.block_size) == key).collect();
        out.push_str(&curves(&points, &engines));
    }
    if !seen.is_empty() {
        out.push_str("<p class=\"quiet\">Latency over throughput: one line for each engine, a dot for each queue depth. Solid is the \
            median, dashed the 99th percentile. Lower and further right is better.</p>\n");
    }
    let mut sizes: Vec<usize> = report.durable.iter().map(|one| one.block_size).collect();
    sizes.sort_unstable();
    sizes.dedup();
    for block_size in sizes {
        let _ = writeln!(out, "<h2>Durable writes, one at a time, {}</h2>", size::show(block_size as u64));
        let points: Vec<&DurablePoint> =
            report.durable.iter().filter(|one| one.block_size == block_size).collect();
        out.push_str(&bars(&points, &engines));
    }
    if !report.notes.is_empty() {
        out.push_str("<h2>Notes</h2>\n<ul>\n");
        for text in &report.notes {
            let _ = writeln!(out, "<li>{}</li>", escape(text));
        }
        out.push_str("</ul>\n");
    }
    let _ = writeln!(out, "<h2>Figures</h2>\n<pre>{}</pre>\n</body>\n</html>", escape(&table::table(report)));
    out
}

fn color(index: usize) -> &'static str {
    COLORS[index % COLORS.len()]
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A number with thousands set apart.
fn grouped(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Microseconds as a person reads them.
fn micros(value: f64) -> String {
    match value {
        v if v < 10.0 => format!("{v:.1} µs"),
        v if v < 1000.0 => format!("{v:.0} µs"),
        v if v < 10_000.0 => format!("{:.1} ms", v / 1000.0),
        v => format!("{:.0} ms", v / 1000.0),
    }
}

/// Round steps from 0 to beyond `max`, about five of them.
fn linear_ticks(max: f64) -> Vec<f64> {
    let rough = (max / 5.0).max(f64::MIN_POSITIVE);
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power).into_iter().find(|step| *step >= rough);
    let step = step.unwrap_or(rough);
    (0..=(max / step).ceil() as usize).map(|index| index as f64 * step).collect()
}

/// 1, 2 and 5 times the powers of ten that enclose both.
fn log_ticks(min: f64, max: f64) -> Vec<f64> {
    let powers = min.log10().floor() as i32..=max.log10().ceil() as i32;
    let all: Vec<f64> =
        powers.flat_map(|power| [1.0, 2.0, 5.0].map(|factor| factor * 10_f64.powi(power))).collect();
    let first = all.iter().rposition(|tick| *tick <= min).unwrap_or(0);
    let last = all.iter().position(|tick| *tick >= max).unwrap_or(all.len() - 1);
    all[first..=last.max(first + 1)].to_vec()
}

/// Values along one side of a plot.
struct Axis {
    ticks: Vec<f64>,
    is_log: bool,
    /// Where its ends are.
    from: f64,
    to: f64,
}

impl Axis {
    fn at(&self, value: f64) -> f64 {
        let (min, max) = (self.ticks[0], self.ticks[self.ticks.len() - 1]);
        let share = match self.is_log {
            true => (value.max(min) / min).ln() / (max / min).ln(),
            false => (value - min) / (max - min),
        };
        self.from + share * (self.to - self.from)
    }
}

fn smallest(values: impl Iterator<Item = f64>) -> f64 {
    values.fold(f64::INFINITY, f64::min).max(0.01)
}

/// Latency over throughput.
fn curves(points: &[&Point], engines: &[&str]) -> String {
    let (left, right, top, bottom) = MARGINS;
    let fewest = smallest(points.iter().map(|one| one.iops));
    let most = points.iter().map(|one| one.iops).fold(1.0, f64::max);
    // An engine that is ten times another would press that one into a corner.
    let is_log = most > 10.0 * fewest;
    let ticks = if is_log { log_ticks(fewest, most) } else { linear_ticks(most) };
    let x = Axis { ticks, is_log, from: left, to: WIDTH - right };
    let low = smallest(points.iter().map(|one| one.latency_us.p50));
    let high = points.iter().map(|one| one.latency_us.p99).fold(low * 1.1, f64::max);
    let y = Axis { ticks: log_ticks(low, high), is_log: true, from: HEIGHT - bottom, to: top };
    let mut out = format!(
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"latency over throughput\">\n"
    );
    for tick in &x.ticks {
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{at:.1}\" y1=\"{}\" x2=\"{at:.1}\" y2=\"{}\"/><text x=\"{at:.1}\" y=\"{}\" \
             text-anchor=\"middle\">{}</text>",
            y.from,
            y.to,
            y.from + 18.0,
            grouped(*tick),
            at = x.at(*tick)
        );
    }
    for tick in &y.ticks {
        let _ = writeln!(
            out,
            "<line class=\"grid\" x1=\"{}\" y1=\"{at:.1}\" x2=\"{}\" y2=\"{at:.1}\"/><text x=\"{}\" y=\"{:.1}\" \
             text-anchor=\"end\">{}</text>",
            x.from,
            x.to,
            x.from - 6.0,
            y.at(*tick) + 4.0,
            micros(*tick),
            at = y.at(*tick)
        );
    }
    let _ = writeln!(
        out,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">operations per second</text>",
        f64::midpoint(x.from, x.to),
        HEIGHT - 8.0
    );
    for (index, engine) in engines.iter().enumerate() {
        let mut own: Vec<&&Point> = points.iter().filter(|one| one.engine == *engine).collect();
        own.sort_by_key(|one| one.depth);
        for (is_median, dashes) in [(true, ""), (false, " stroke-dasharray=\"5 4\"")] {
            let figure = |one: &Point| if is_median { one.latency_us.p50 } else { one.latency_us.p99 };
            let path: Vec<String> =
                own.iter().map(|one| format!("{:.1},{:.1}", x.at(one.iops), y.at(figure(one)))).collect();
            let _ = writeln!(
                out,
                "<polyline fill=\"none\" stroke=\"{}\" stroke-width=\"2\"{dashes} points=\"{}\"/>",
                color(index),
                path.join(" ")
            );
        }
        for one in own {
            let _ = writeln!(
                out,
                "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\" fill=\"{}\"><title>{}, depth {}: {} per second, median {}, 99 % \
                 {}</title></circle>",
                x.at(one.iops),
                y.at(one.latency_us.p50),
                color(index),
                escape(engine),
                one.depth,
                grouped(one.iops),
                micros(one.latency_us.p50),
                micros(one.latency_us.p99)
            );
        }
    }
    out.push_str("</svg>\n");
    out
}

/// A bar for each engine and kind of space: the median, and a thin line up to the 99th percentile.
fn bars(points: &[&DurablePoint], engines: &[&str]) -> String {
    const ROW: f64 = 20.0;
    const LABEL: f64 = 220.0;
    const VALUE: f64 = 70.0;
    let low = smallest(points.iter().map(|one| one.total_us.p50));
    let high = points.iter().map(|one| one.total_us.p99).fold(low * 1.1, f64::max);
    let x = Axis { ticks: log_ticks(low / 2.0, high), is_log: true, from: LABEL, to: WIDTH - VALUE };
    let mut kinds: Vec<&str> = Vec::new();
    for point in points {
        if !kinds.contains(&point.kind) {
            kinds.push(point.kind);
        }
    }
    let height = (points.len() + kinds.len()) as f64 * ROW + kinds.len() as f64 * 8.0 + 4.0;
    let mut out = format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"latency of durable writes\">\n"
    );
    let mut at = 2.0;
    for kind in kinds {
        let _ = writeln!(
            out,
            "<text x=\"{LABEL}\" y=\"{:.1}\" font-weight=\"600\">{kind}</text>",
            at + ROW - 6.0
        );
        at += ROW;
        for point in points.iter().filter(|one| one.kind == kind) {
            let index = engines.iter().position(|engine| *engine == point.engine).unwrap_or(0);
            let (p50, p99) = (x.at(point.total_us.p50), x.at(point.total_us.p99));
            let middle = at + ROW / 2.0;
            let _ = writeln!(
                out,
                "<g><title>{name}, {kind}: median {median}, 99 % {}, {} per second</title><text x=\"{}\" y=\"{text:.1}\" \
                 text-anchor=\"end\">{name}</text><rect x=\"{LABEL}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{}\" \
                 fill=\"{fill}\"/><line x1=\"{p50:.1}\" y1=\"{middle:.1}\" x2=\"{p99:.1}\" y2=\"{middle:.1}\" \
                 stroke=\"{fill}\"/><text x=\"{:.1}\" y=\"{text:.1}\">{median}</text></g>",
                micros(point.total_us.p99),
                grouped(point.writes_per_second),
                LABEL - 8.0,
                at + 3.0,
                p50 - LABEL,
                ROW - 6.0,
                p99 + 6.0,
                name = escape(&point.engine),
                median = micros(point.total_us.p50),
                text = middle + 4.0,
                fill = color(index)
            );
            at += ROW;
        }
        at += 8.0;
    }
    out.push_str("</svg>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_enclose_and_are_few() {
        for max in [1.0, 7.3, 999.0, 123_456.0] {
            let ticks = linear_ticks(max);
            assert!(ticks[0] == 0.0 && ticks[ticks.len() - 1] >= max && ticks.len() <= 7, "{max}: {ticks:?}");
        }
        for (min, max) in [(0.3, 0.31), (1.0, 10.0), (3.0, 40_000.0), (5.0, 5.0)] {
            let ticks = log_ticks(min, max);
            assert!(
                ticks[0] <= min && ticks[ticks.len() - 1] >= max && ticks.len() >= 2,
                "{min} {max}: {ticks:?}"
            );
            assert!(ticks.is_sorted() && ticks.len() < 20);
        }
    }

    #[test]
    fn numbers_and_names_are_readable_and_harmless() {
        assert_eq!(
            (grouped(0.0), grouped(999.6), grouped(1_234_567.0)),
            ("0".into(), "1,000".into(), "1,234,567".into())
        );
        assert_eq!(
            (micros(1.25), micros(250.4), micros(1500.0)),
            ("1.2 µs".into(), "250 µs".into(), "1.5 ms".into())
        );
        assert_eq!(escape("<a href=\"x\">&"), "&lt;a href=&quot;x&quot;&gt;&amp;");
    }
}
