//! What is measured: which rows there are, and what each should reach.

use super::process::Aof;
use super::wire::Keyspace;

/// What servers promise of a write that they have acknowledged. Each of ours stands beside a redis-server with the same promise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promise {
    /// It is durable.
    Always,
    /// It is durable a second later.
    Second,
    /// Nothing.
    Nothing,
}

impl Promise {
    /// All, by their numbers.
    pub const ALL: [Promise; 3] = [Promise::Always, Promise::Second, Promise::Nothing];

    /// Our name, our `--durability`, the peer's name and its settings.
    pub fn sides(self) -> (&'static str, &'static str, &'static str, Aof) {
        match self {
            Promise::Always => ("basalt always", "always", "redis always", Aof::Always),
            Promise::Second => ("basalt interval=1000", "interval=1000", "redis everysec", Aof::EverySecond),
            Promise::Nothing => ("basalt never", "never", "redis without AOF", Aof::Off),
        }
    }
}

const SMALL: Keyspace = Keyspace { name: "small", count: 100_000, value_size: 16, distinct: false };
/// The size that goals are about.
pub const MIDDLE: Keyspace = Keyspace { name: "middle", count: 100_000, value_size: 256, distinct: false };
/// Fewer, so that all of them fit the cache.
const LARGE: Keyspace = Keyspace { name: "large", count: 25_000, value_size: 4096, distinct: false };
/// What the open loop reads and writes: it verifies values, and no other client writes them.
pub const OPEN: Keyspace = Keyspace { name: "open", count: 100_000, value_size: 256, distinct: true };
/// All that servers are loaded with.
pub const LOADED: [Keyspace; 4] = [SMALL, MIDDLE, LARGE, OPEN];

/// Connections that goals are about.
pub const CLIENTS: u32 = 50;
const CLIENTS_MANY: u32 = 500;

/// A measurement under redis-benchmark, which gives a row of requests per second and one of operations per CPU-second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Case {
    /// Who stands beside whom.
    pub promise: Promise,
    /// GET instead of SET.
    pub read: bool,
    /// Keys and the size of their values.
    pub keys: Keyspace,
    /// Connections.
    pub clients: u32,
    /// Commands sent before a connection waits.
    pub pipeline: u32,
}

impl Case {
    /// As rows name it. A read costs the same whatever is promised of writes.
    pub fn name(&self) -> String {
        let (_, durability, ..) = self.promise.sides();
        let operation = if self.read { "GET".to_owned() } else { format!("SET {durability}") };
        let size = match self.keys.value_size {
            size if size % 1024 == 0 => format!("{} KiB", size / 1024),
            size => format!("{size} B"),
        };
        format!("{operation}, {size}, {} clients, -P {}", self.clients, self.pipeline)
    }

    fn has_goals(&self) -> bool {
        self.keys == MIDDLE && self.clients == CLIENTS
    }

    /// What requests per second should be, by the peer's.
    pub fn rate_goal(&self) -> Option<f64> {
        match (self.read, self.promise, self.pipeline) {
            _ if !self.has_goals() => None,
            (true, _, 1) => Some(1.0),
            (false, Promise::Always, 1) => Some(3.0),
            (false, Promise::Always, _) => Some(1.2),
            (false, Promise::Second, 16) => Some(1.5),
            _ => None,
        }
    }

    /// What operations per CPU-second should be, by the peer's.
    pub fn cpu_goal(&self) -> Option<f64> {
        (self.has_goals() && self.read && self.pipeline == 16).then_some(1.5)
    }
}

/// The rows of a run. The quick ones hold every goal, both pipelines of each promise, and a taste of the rest.
pub fn cases(quick: bool) -> Vec<Case> {
    let mut all = Vec::new();
    for (read, promise) in [
        (true, Promise::Always),
        (false, Promise::Always),
        (false, Promise::Second),
        (false, Promise::Nothing),
    ] {
        for (keys, clients) in [(SMALL, CLIENTS), (MIDDLE, CLIENTS), (LARGE, CLIENTS), (MIDDLE, CLIENTS_MANY)]
        {
            for pipeline in [1, 16] {
                let case = Case { promise, read, keys, clients, pipeline };
                let taste = promise == Promise::Always
                    && ((clients == CLIENTS_MANY && pipeline == 16) || (keys == LARGE && pipeline == 1));
                if !quick || case.has_goals() || taste {
                    all.push(case);
                }
            }
        }
    }
    all
}

/// A measurement of latency under an open loop.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatencyCase {
    /// GET instead of SET.
    pub read: bool,
    /// What is offered to both sides, in percent of what the slower one does under redis-benchmark in the same run.
    pub percent: u32,
}

/// All of them.
pub const LATENCIES: [LatencyCase; 4] = [
    LatencyCase { read: false, percent: 50 },
    LatencyCase { read: false, percent: 80 },
    LatencyCase { read: true, percent: 50 },
    LatencyCase { read: true, percent: 80 },
];

impl LatencyCase {
    /// As rows name it, before the quantile.
    pub fn name(self) -> String {
        let operation = if self.read { "GET" } else { "SET always" };
        format!("{operation}, open loop at {} %", self.percent)
    }

    /// The measurement that says how much can be offered.
    pub fn closed_loop(self) -> Case {
        Case { promise: Promise::Always, read: self.read, keys: MIDDLE, clients: CLIENTS, pipeline: 1 }
    }

    /// What this quantile should be, by the peer's.
    pub fn goal(self, quantile: f64) -> Option<f64> {
        (!self.read && self.percent == 50 && quantile == 0.99).then_some(0.5)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn quick_or_not_every_goal_is_measured_once() {
        for quick in [true, false] {
            let all = cases(quick);
            let goals = |goal: fn(&Case) -> Option<f64>| {
                let mut goals: Vec<(String, f64)> =
                    all.iter().filter_map(|case| Some((case.name(), goal(case)?))).collect();
                goals.sort_by(|a, b| a.0.cmp(&b.0));
                goals
            };
            let named = |rows: &[(&str, f64)]| -> Vec<(String, f64)> {
                rows.iter().map(|(name, goal)| ((*name).to_owned(), *goal)).collect()
            };
            assert_eq!(
                goals(Case::rate_goal),
                named(&[
                    ("GET, 256 B, 50 clients, -P 1", 1.0),
                    ("SET always, 256 B, 50 clients, -P 1", 3.0),
                    ("SET always, 256 B, 50 clients, -P 16", 1.2),
                    ("SET interval=1000, 256 B, 50 clients, -P 16", 1.5),
                ])
            );
            assert_eq!(goals(Case::cpu_goal), named(&[("GET, 256 B, 50 clients, -P 16", 1.5)]));
            for latency in LATENCIES {
                assert!(all.contains(&latency.closed_loop()), "{}", latency.name());
            }
            let names: BTreeSet<String> = all.iter().map(Case::name).collect();
            assert_eq!(names.len(), all.len());
        }
        assert!(cases(true).iter().all(|case| cases(false).contains(case)));
    }

    #[test]
    fn keys_are_told_apart_and_their_values_fit_a_command_line() {
        let names: BTreeSet<&str> = LOADED.iter().map(|keys| keys.name).collect();
        assert_eq!(names.len(), LOADED.len());
        assert!(cases(false).iter().all(|case| LOADED.contains(&case.keys) && !case.keys.distinct));
        assert!(LOADED.contains(&OPEN) && OPEN.distinct);
    }
}
