//! The figures as one HTML page: a bar for each ratio, its goal beside it, and the table. Nothing is loaded from anywhere.

use std::fmt::Write;

use crate::report::{Better, Report, Row, figure, table};

const WIDTH: f64 = 900.0;
/// Where bars begin and end: names to the left, figures to the right.
const FROM: f64 = 420.0;
const TO: f64 = 740.0;
const LINE: f64 = 24.0;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1c1f23; --faint: #d8dce1; --paper: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --faint: #3a4048; --paper: #14171a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 940px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
svg { width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
.line { stroke: var(--faint); } .goal { stroke: var(--ink); stroke-width: 2; }
.good { fill: #009e73; } .bad { fill: #d55e00; } .plain { fill: #0072b2; }
pre { overflow-x: auto; font-size: 12px; } .quiet { opacity: 0.75; }
";

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// How many times as good as the peer: above 1 is better, whichever way the figure counts.
fn advantage(better: Better, ratio: f64) -> f64 {
    match better {
        Better::Higher => ratio,
        Better::Lower if ratio > 0.0 => 1.0 / ratio,
        Better::Lower => 1.0,
    }
}

/// The page.
pub fn page(report: &Report) -> String {
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>Basalt beside its peers</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>Basalt beside its peers</h1>\n\
         <p>{}. Repeat it with <code>{}</code>. Medians; all sides took turns.</p>\n",
        escape(&report.machine.text()),
        escape(&report.command)
    );
    out.push_str(
        "<p class=\"quiet\">Bars show how many times as good as the peer: right of 1 is better, whichever way a figure counts. A tick is \
         the goal: green bars reach theirs, orange ones do not, blue ones have none.</p>\n",
    );
    let mut sections: Vec<&str> = report.rows.iter().map(|row| row.section).collect();
    sections.dedup();
    for section in sections {
        let rows: Vec<&Row> = report.rows.iter().filter(|row| row.section == section).collect();
        let _ = writeln!(out, "<h2>{}</h2>", escape(section));
        out.push_str(&bars(&rows));
    }
    let _ = writeln!(out, "<h2>Figures</h2>\n<pre>{}</pre>\n</body>\n</html>", escape(&table(report)));
    out
}

fn bars(rows: &[&Row]) -> String {
    let all = || rows.iter().map(|row| advantage(row.better, row.ratio).clamp(0.01, 100.0));
    let (low, high) = (all().fold(0.5, f64::min).ln(), all().fold(2.0, f64::max).ln());
    let x = |value: f64| FROM + (value.clamp(0.01, 100.0).ln() - low) / (high - low) * (TO - FROM);
    let height = LINE * rows.len() as f64 + 10.0;
    let mut out =
        format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"ratios to peers\">\n");
    let one = x(1.0);
    let _ = writeln!(out, "<line class=\"line\" x1=\"{one:.1}\" y1=\"0\" x2=\"{one:.1}\" y2=\"{height}\"/>");
    for (at, row) in rows.iter().enumerate() {
        let y = LINE * at as f64 + 4.0;
        let end = x(advantage(row.better, row.ratio));
        let class = match row.met {
            Some(true) => "good",
            Some(false) => "bad",
            None => "plain",
        };
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text><rect class=\"{class}\" x=\"{:.1}\" y=\"{y:.1}\" width=\"{:.1}\" \
             height=\"{:.1}\"/><text x=\"{:.1}\" y=\"{:.1}\">{:.2} &#215; {} ({} {})</text>",
            FROM - 8.0,
            y + LINE * 0.55,
            escape(&row.name),
            one.min(end),
            (end - one).abs().max(1.0),
            LINE * 0.7,
            one.max(end).max(FROM) + 8.0,
            y + LINE * 0.55,
            row.ratio,
            escape(&row.peer),
            figure(row.ours),
            escape(row.unit)
        );
        if let Some(goal) = row.goal {
            let tick = x(advantage(row.better, goal));
            let _ = writeln!(
                out,
                "<line class=\"goal\" x1=\"{tick:.1}\" y1=\"{:.1}\" x2=\"{tick:.1}\" y2=\"{:.1}\"/>",
                y - 2.0,
                y + LINE * 0.8
            );
        }
    }
    out.push_str("</svg>\n");
    out
}
