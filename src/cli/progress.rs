//! Progress on standard error for what takes longer than two seconds.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::size;

/// Nothing is shown before this.
const QUIET: Duration = Duration::from_secs(2);

/// How often it is shown again, on a terminal and elsewhere.
const INTERVALS: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(5)];

/// Shows how far something is.
pub(super) struct Progress {
    what: &'static str,
    started: Instant,
    shown: Option<Instant>,
    is_terminal: bool,
}

impl Progress {
    pub(super) fn new(what: &'static str) -> Progress {
        Progress { what, started: Instant::now(), shown: None, is_terminal: std::io::stderr().is_terminal() }
    }

    /// Bytes done and to do.
    pub(super) fn show(&mut self, done: u64, total: u64) {
        self.show_as(done, total, &size::show);
    }

    /// Things done and to do.
    pub(super) fn show_count(&mut self, done: u64, total: u64, what: &str) {
        self.show_as(done, total, &|count| format!("{count} {what}"));
    }

    fn show_as(&mut self, done: u64, total: u64, text_of: &dyn Fn(u64) -> String) {
        let elapsed = self.started.elapsed();
        let interval = INTERVALS[usize::from(!self.is_terminal)];
        if elapsed < QUIET || self.shown.is_some_and(|shown| shown.elapsed() < interval) {
            return;
        }
        self.shown = Some(Instant::now());
        let percent = if total == 0 { 100.0 } else { done as f64 * 100.0 / total as f64 };
        let left = if done == 0 {
            String::new()
        } else {
            let seconds = elapsed.as_secs_f64() * (total.saturating_sub(done)) as f64 / done as f64;
            format!(", about {seconds:.0} s left")
        };
        let text =
            format!("basalt: {}: {} of {} ({percent:.0} %){left}", self.what, text_of(done), text_of(total));
        let mut out = std::io::stderr().lock();
        let _ = if self.is_terminal { write!(out, "\r\x1b[K{text}") } else { writeln!(out, "{text}") };
        let _ = out.flush();
    }

    /// Ends the line, if one was shown.
    pub(super) fn end(&self) {
        if self.is_terminal && self.shown.is_some() {
            let _ = writeln!(std::io::stderr().lock());
        }
    }
}
