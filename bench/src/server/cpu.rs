//! What a server costs: processor time of a process, all of its threads, those that ended too.

use std::collections::BTreeMap;

use crate::Failure;

/// User and system time of a process so far, in seconds.
pub fn seconds(pid: u32) -> Result<f64, Failure> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .map_err(|error| format!("/proc/{pid}/stat cannot be read ({error}): the server is gone"))?;
    let ticks = ticks(&stat).ok_or_else(|| format!("/proc/{pid}/stat is not as proc(5) says: {stat}"))?;
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// `utime` and `stime`, in clock ticks. Children that were waited for (`cutime`) are left out: what a child of long before
/// cost would count for the measurement in which it ends.
fn ticks(stat: &str) -> Option<u64> {
    // The name in parentheses may hold anything, so fields are counted from its end.
    let (_, after_name) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at)?.parse::<u64>().ok();
    Some(ticks(11)? + ticks(12)?)
}

/// Processor time of each thread of a process so far, in nanoseconds: finer than `seconds`, but nothing is known of threads
/// that have ended.
pub fn threads(pid: u32) -> Result<Threads, Failure> {
    let mut threads = Threads::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let entry = entry?;
        // A thread may end between being listed and being read.
        let Ok(text) = std::fs::read_to_string(entry.path().join("schedstat")) else { continue };
        let time = run_time(&text).ok_or_else(|| format!("schedstat is not as expected: {text}"))?;
        threads.insert(entry.file_name().to_string_lossy().into_owned(), time);
    }
    Ok(threads)
}

/// By the thread's number.
pub type Threads = BTreeMap<String, u64>;

/// The first field: nanoseconds on a processor.
fn run_time(schedstat: &str) -> Option<u64> {
    schedstat.split_whitespace().next()?.parse().ok()
}

/// Seconds that threads used between two moments.
pub fn used(before: &Threads, after: &Threads) -> f64 {
    let used =
        |(thread, time): (&String, &u64)| time.saturating_sub(before.get(thread).copied().unwrap_or(0));
    after.iter().map(used).sum::<u64>() as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_from_the_end_of_the_name() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 400 25 7000 8000 20 0 4 0 100";
        assert_eq!(ticks(&format!("4711 (redis-server) {rest}")), Some(425));
        assert_eq!(ticks(&format!("4711 (a) b (c 1 2) {rest}")), Some(425));
        assert_eq!(ticks("4711 (cut off) S 1 2"), None);
        assert_eq!(ticks(""), None);
    }

    #[test]
    fn this_process_has_cost_something_after_work() {
        let before = seconds(std::process::id()).unwrap();
        let mut sum = 0u64;
        // Until it shows: ticks are coarse, and nothing is said about how long that takes.
        while seconds(std::process::id()).unwrap() <= before {
            sum = std::hint::black_box((0..1_000_000u64).fold(sum, |a, b| a ^ b.wrapping_mul(31)));
        }
        assert!(seconds(u32::MAX).unwrap_err().to_string().contains("the server is gone"));
    }

    #[test]
    fn threads_that_come_count_and_those_that_go_take_nothing_away() {
        assert_eq!(run_time("2500000000 17 42\n"), Some(2_500_000_000));
        assert_eq!(run_time("\n"), None);
        let threads =
            |all: &[(&str, u64)]| all.iter().map(|(t, ns)| ((*t).to_owned(), *ns)).collect::<Threads>();
        let before = threads(&[("1", 1_000_000_000), ("2", 7_000_000_000)]);
        let after = threads(&[("1", 1_500_000_000), ("3", 250_000_000)]);
        assert_eq!(used(&before, &after), 0.75);
        // This one is seen as well: it works until it is.
        let before = self::threads(std::process::id()).unwrap();
        while used(&before, &self::threads(std::process::id()).unwrap()) == 0.0 {
            std::hint::spin_loop();
        }
    }
}
