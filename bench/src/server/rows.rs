//! What was measured, as rows and notes of the report.

use super::cases::{self, CLIENTS, Case, LATENCIES, LOADED, LatencyCase, OPEN, Promise};
use super::{DEVICE_SIZE, MEMORY};
use crate::report::{Better, Report, Row, Runs, figure};

const SECTION: &str = "server";
/// Of latencies.
pub const QUANTILES: [(&str, f64); 3] = [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)];

/// Ours, and the peer's.
pub type Sides<T> = [T; 2];
/// Its place.
pub const OURS: usize = 0;
/// Its place.
pub const PEER: usize = 1;
/// Both places.
pub const BOTH: [usize; 2] = [OURS, PEER];

/// What one side did under redis-benchmark.
#[derive(Default)]
pub struct Throughput {
    /// Requests per second.
    pub rate: Runs,
    /// Operations for a second of the server's processor time.
    pub per_cpu_second: Runs,
}

/// What one side did under the open loop.
#[derive(Default)]
pub struct Latency {
    /// In milliseconds, for each of `QUANTILES`.
    pub quantiles: [Runs; 3],
    /// Of the load itself, p99 in milliseconds.
    pub lateness: Runs,
    /// Runs in which lateness was much of the latency.
    pub late: u32,
    /// Requests per second.
    pub offered: Runs,
}

/// The figures of all runs.
pub struct Figures {
    /// Percent of a core.
    pub idle: Sides<Runs>,
    /// Under redis-benchmark.
    pub throughput: Vec<(Case, Sides<Throughput>)>,
    /// Under the open loop.
    pub latency: Vec<(LatencyCase, Sides<Latency>)>,
    /// The largest share of reads in a measurement that a node had to ask its device for.
    pub uncached: f64,
}

impl Figures {
    /// None yet.
    pub fn new(quick: bool) -> Figures {
        Figures {
            idle: Sides::default(),
            throughput: cases::cases(quick).into_iter().map(|case| (case, Sides::default())).collect(),
            latency: LATENCIES.map(|case| (case, Sides::default())).into(),
            uncached: 0.0,
        }
    }

    /// Everything as rows and notes.
    pub fn tell(self, report: &mut Report) {
        for (case, [ours, peer]) in self.throughput {
            let (_, _, peer_name, _) = case.promise.sides();
            let row = |name, unit, ours, peer, goal: Option<f64>| {
                with_goal(Row::new(SECTION, name, unit, Better::Higher, ours, (peer_name, peer)), goal)
            };
            let name = case.name();
            report.rows.push(row(name.clone(), "requests/s", ours.rate, peer.rate, case.rate_goal()));
            let (ours, peer) = (ours.per_cpu_second, peer.per_cpu_second);
            report.rows.push(row(name + " (CPU)", "ops/CPU-s", ours, peer, case.cpu_goal()));
        }
        let mut notes = Vec::new();
        for (case, [ours, peer]) in self.latency {
            let (_, _, peer_name, _) = Promise::Always.sides();
            notes.push(lateness_note(case, &ours, &peer, peer_name));
            for ((quantile, value), (ours, peer)) in
                QUANTILES.into_iter().zip(ours.quantiles.into_iter().zip(peer.quantiles))
            {
                let name = format!("{}: {quantile}", case.name());
                let row = Row::new(SECTION, name, "ms", Better::Lower, ours, (peer_name, peer));
                report.rows.push(with_goal(row, case.goal(value)));
            }
        }
        report.rows.push(idle_row(self.idle));
        report.notes.extend(setup_notes(self.uncached));
        report.notes.extend(notes);
    }
}

fn with_goal(row: Row, goal: Option<f64>) -> Row {
    match goal {
        Some(goal) => row.with_goal(goal),
        None => row,
    }
}

/// Its goal is for the figure, not for the ratio: less than a hundredth of a core.
fn idle_row([ours, peer]: Sides<Runs>) -> Row {
    let name = "idle node, CPU (goal: itself below 1 %)";
    let (_, _, peer_name, _) = Promise::Always.sides();
    let row = Row::new(SECTION, name, "% of a core", Better::Lower, ours, (peer_name, peer));
    let met = row.ours < 1.0;
    Row { goal: Some(1.0), met: Some(met), ..row }
}

fn setup_notes(uncached: f64) -> Vec<String> {
    let keys = LOADED.iter().filter(|keys| !keys.distinct);
    let keys: Vec<String> =
        keys.map(|keys| format!("{} of {} B", figure(keys.count as f64), keys.value_size)).collect();
    vec![
        format!(
            "server: clients run on the same cores as the servers; basalt serve --size {DEVICE_SIZE} --memory {MEMORY} on \
             an image, redis-server with --save '' and otherwise its defaults; always stands beside appendfsync always, \
             interval=1000 beside everysec, never beside no AOF at all; reads are of the servers that promise most"
        ),
        format!(
            "server: redis-benchmark takes any of the keys of a size ({}), all of which exist; CPU is user and system time \
             of the server's threads, without children that rewrite a log",
            keys.join(", ")
        ),
        format!(
            "server: of basalt's measured reads at most {} % were not in its cache (the worst measurement)",
            figure(uncached * 100.0)
        ),
    ]
}

/// What the open loop offered, and whether it kept up.
fn lateness_note(case: LatencyCase, ours: &Latency, peer: &Latency, peer_name: &str) -> String {
    let mut note = format!(
        "server: {}: {} B, {CLIENTS} connections, Poisson arrivals, {} requests/s (median) to both sides; p99 of the load's own \
         lateness, which is part of the latency, {} ms for basalt and {} ms for {peer_name}",
        case.name(),
        OPEN.value_size,
        figure(ours.offered.median()),
        figure(ours.lateness.median()),
        figure(peer.lateness.median()),
    );
    if ours.late + peer.late > 0 {
        note.push_str(&format!(
            "; LATE: in {} of {} runs of basalt and {} of {} of {peer_name} that was more than a quarter of the latency's p99",
            ours.late,
            ours.offered.0.len(),
            peer.late,
            peer.offered.0.len(),
        ));
    }
    note
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idleness_is_judged_by_itself_and_not_by_the_peers() {
        let row = |ours: f64, peer: f64| idle_row([Runs(vec![ours]), Runs(vec![peer])]);
        assert_eq!(row(0.9, 0.1).met, Some(true));
        assert_eq!(row(1.0, 50.0).met, Some(false));
        assert_eq!(row(0.9, 0.1).goal, Some(1.0));
    }

    #[test]
    fn a_late_load_is_marked() {
        let side = |late| Latency { late, offered: Runs(vec![100.0, 300.0, 200.0]), ..Latency::default() };
        let note = |ours, peer| lateness_note(LATENCIES[0], &side(ours), &side(peer), "redis always");
        assert!(!note(0, 0).contains("LATE") && note(0, 0).contains("200 requests/s"));
        assert!(note(1, 0).contains("LATE: in 1 of 3 runs of basalt and 0 of 3 of redis always"));
        assert!(note(0, 2).contains("LATE: in 0 of 3 runs of basalt and 2 of 3 of redis always"));
    }

    fn figures(rates: Sides<f64>) -> Figures {
        let throughput = |case| {
            let side =
                |rate: f64| Throughput { rate: Runs(vec![rate]), per_cpu_second: Runs(vec![rate * 2.0]) };
            (case, rates.map(side))
        };
        let latency = |case| {
            let side = |p99: f64| Latency {
                quantiles: [Runs(vec![p99 / 2.0]), Runs(vec![p99]), Runs(vec![p99 * 2.0])],
                ..Latency::default()
            };
            (case, rates.map(side))
        };
        Figures {
            idle: [Runs(vec![0.5]), Runs(vec![0.2])],
            throughput: cases::cases(true).into_iter().map(throughput).collect(),
            latency: LATENCIES.map(latency).into(),
            uncached: 0.0,
        }
    }

    #[test]
    fn rows_carry_the_goals_and_the_peer_with_the_same_promise() {
        let machine = crate::machine::Machine::here(std::path::Path::new("/"));
        let mut report =
            Report { machine, command: String::new(), versions: vec![], rows: vec![], notes: vec![] };
        figures([2.0, 1.0]).tell(&mut report);
        let find = |name: &str| report.rows.iter().find(|row| row.name == name).unwrap();
        assert_eq!(report.rows.iter().filter(|row| row.goal.is_some()).count(), 7);
        let set = find("SET always, 256 B, 50 clients, -P 1");
        assert_eq!((set.peer.as_str(), set.goal, set.met), ("redis always", Some(3.0), Some(false)));
        let set = find("SET interval=1000, 256 B, 50 clients, -P 16");
        assert_eq!((set.peer.as_str(), set.goal, set.met), ("redis everysec", Some(1.5), Some(true)));
        let get = find("GET, 256 B, 50 clients, -P 16 (CPU)");
        assert_eq!((get.ours, get.peer_value, get.goal, get.met), (4.0, 2.0, Some(1.5), Some(true)));
        let tail = find("SET always, open loop at 50 %: p99");
        assert_eq!((tail.ours, tail.goal, tail.met), (2.0, Some(0.5), Some(false)));
        assert_eq!(find("SET always, open loop at 50 %: p99.9").goal, None);
        assert_eq!(find("SET never, 256 B, 50 clients, -P 1").peer, "redis without AOF");
    }
}
