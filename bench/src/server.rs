//! A node beside redis-server: throughput and what it costs under redis-benchmark, latency under an open loop, and rest.
//!
//! Six servers stand side by side, three of ours and three of the peer's, by what they promise of a write. Only the one that
//! is measured has clients. Within each run the two sides of a row take turns, and begin alternately.

mod cases;
mod cpu;
mod load;
mod process;
mod redis_benchmark;
mod rows;
mod wire;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use self::cases::{CLIENTS, Case, LOADED, OPEN, Promise};
use self::process::Server;
use self::rows::{BOTH, Figures, OURS, PEER, QUANTILES, Sides};
use crate::machine::first_line;
use crate::report::{Report, figure};
use crate::{Failure, Plan, progress};

/// Of the device of each node.
const DEVICE_SIZE: &str = "4GiB";
/// Of each node: a quarter of it caches records, which is room for everything that is loaded.
const MEMORY: &str = "2GiB";
/// Keys of each kind that are read and compared after each run.
const SAMPLES: u64 = 500;
/// How long redis-server may go on rewriting its log before something else is measured.
const REWRITE: Duration = Duration::from_secs(60);
/// How long one run of redis-benchmark may take, although the machine has become slower than the run before said.
const COMMAND: Duration = Duration::from_secs(180);
/// How long the last reply of an open loop may take.
const REPLY: Duration = Duration::from_secs(20);

/// How long things are measured.
struct Lengths {
    closed: Duration,
    open: Duration,
    idle: Duration,
}

/// Measures both.
pub fn run(plan: &Plan, report: &mut Report) -> Result<(), Failure> {
    for program in ["redis-server", "redis-benchmark"] {
        let version = first_line(program, &["--version"])
            .ok_or_else(|| format!("{program} is missing: run scripts/setup-test-tools"))?;
        report.versions.push(version.split_whitespace().take(3).collect::<Vec<_>>().join(" "));
    }
    let version = first_line(&plan.basalt.to_string_lossy(), &["--version"])
        .ok_or_else(|| format!("{} cannot be run", plan.basalt.display()))?;
    if !report.versions.contains(&version) {
        report.versions.push(version);
    }
    let lengths = match plan.quick {
        true => Lengths {
            closed: Duration::from_secs(2),
            open: Duration::from_secs(4),
            idle: Duration::from_secs(5),
        },
        false => Lengths {
            closed: Duration::from_millis(2500),
            open: Duration::from_secs(6),
            idle: Duration::from_secs(10),
        },
    };
    let mut bench = Bench {
        directory: plan.directory.join("server"),
        servers: Vec::new(),
        lengths,
        figures: Figures::new(plan.quick),
    };
    bench.start(&plan.basalt)?;
    for run in 0..plan.runs {
        let started = Instant::now();
        progress(&format!("server: run {} of {}", run + 1, plan.runs));
        bench.rest()?;
        for index in 0..bench.figures.throughput.len() {
            bench.throughput(index, run)?;
        }
        for index in 0..bench.figures.latency.len() {
            bench.latency(index, run)?;
        }
        bench.verify()?;
        let took = started.elapsed().as_secs();
        progress(&format!("server: run {} of {} took {took} s", run + 1, plan.runs));
    }
    bench.figures.tell(report);
    Ok(())
}

/// Who begins: in turns over runs and rows, so that neither side always follows the other's leftovers.
fn order(run: u16, row: usize) -> [usize; 2] {
    if (usize::from(run) + row).is_multiple_of(2) { [OURS, PEER] } else { [PEER, OURS] }
}

struct Bench {
    directory: PathBuf,
    /// By promise.
    servers: Vec<Sides<Server>>,
    lengths: Lengths,
    figures: Figures,
}

impl Bench {
    fn server(&self, promise: Promise, side: usize) -> &Server {
        &self.servers[promise as usize][side]
    }

    /// Starts and loads all servers.
    fn start(&mut self, basalt: &Path) -> Result<(), Failure> {
        for promise in Promise::ALL {
            let (ours, durability, peer, aof) = promise.sides();
            progress(&format!("server: starting {ours} and {peer}"));
            let arguments = ["--durability", durability, "--size", DEVICE_SIZE, "--memory", MEMORY];
            let ours = Server::basalt(ours, basalt, &arguments, &self.directory)?;
            let peer = Server::redis(peer, aof, &self.directory)?;
            self.servers.push([ours, peer]);
        }
        for (promise, side) in Promise::ALL.into_iter().flat_map(|promise| BOTH.map(|side| (promise, side))) {
            let server = self.server(promise, side);
            progress(&format!("server: loading {}", server.name));
            let named = |error: Failure| format!("{}: {error}", server.name);
            let mut client = server.client()?;
            // Over one connection it would wait for the device at every 16 KiB.
            let hurried = (promise, side) == (Promise::Always, PEER);
            if hurried {
                client.configure("appendfsync", "no").map_err(named)?;
            }
            for keys in &LOADED {
                client.load(keys).map_err(named)?;
            }
            if hurried {
                client.configure("appendfsync", "always").map_err(named)?;
            }
        }
        self.verify()
    }

    /// Whether every server holds what it should: a read that misses, and a write that is lost, would be fast, too.
    fn verify(&self) -> Result<(), Failure> {
        let wanted: u64 = LOADED.iter().map(|keys| keys.count).sum();
        for server in self.servers.iter().flatten() {
            let named = |error: Failure| format!("{}: {error}", server.name);
            let mut client = server.client()?;
            let count = client.key_count().map_err(named)?;
            if count != wanted {
                return Err(format!("{} holds {count} keys instead of {wanted}", server.name).into());
            }
            for keys in &LOADED {
                client.verify(keys, SAMPLES).map_err(named)?;
            }
        }
        Ok(())
    }

    /// Waits until what came before is over: rewritten logs, and pages that nobody has flushed.
    fn settle(&self) -> Result<(), Failure> {
        let deadline = Instant::now() + REWRITE;
        for [_, peer] in &self.servers {
            let mut client = peer.client()?;
            while client.info("aof_rewrite_in_progress")?.as_deref() == Some("1") {
                if Instant::now() > deadline {
                    let seconds = REWRITE.as_secs();
                    return Err(format!("{} rewrites its log for {seconds} s already", peer.name).into());
                }
                thread::sleep(Duration::from_millis(100));
            }
        }
        Ok(rustix::fs::syncfs(File::open(&self.directory)?)?)
    }

    /// Processor time of servers without clients.
    fn rest(&mut self) -> Result<(), Failure> {
        self.settle()?;
        // What follows a write in the background is not rest yet.
        thread::sleep(Duration::from_secs(2));
        // Clock ticks are too coarse for so little; and threads that end within seconds have little to tell.
        let cpu = |bench: &Bench| -> Result<Sides<cpu::Threads>, Failure> {
            let of = |side| bench.server(Promise::Always, side).cpu_of_threads();
            Ok([of(OURS)?, of(PEER)?])
        };
        let (before, start) = (cpu(self)?, Instant::now());
        thread::sleep(self.lengths.idle);
        let (after, elapsed) = (cpu(self)?, start.elapsed().as_secs_f64());
        for side in BOTH {
            self.figures.idle[side].0.push(cpu::used(&before[side], &after[side]) / elapsed * 100.0);
        }
        let [ours, peer] = BOTH.map(|side| figure(self.figures.idle[side].0.last().copied().unwrap_or(0.0)));
        progress(&format!("server: idle: {ours} % of a core beside {peer} %"));
        Ok(())
    }

    /// A row under redis-benchmark, once for each side.
    fn throughput(&mut self, index: usize, run: u16) -> Result<(), Failure> {
        let case = self.figures.throughput[index].0;
        for side in order(run, index) {
            let named = |error| format!("{}, {}: {error}", self.server(case.promise, side).name, case.name());
            // The rate of the run before says how many requests take how long; before the first, a try.
            let rate = match self.figures.throughput[index].1[side].rate.0.last() {
                Some(rate) => *rate,
                None => self.try_out(&case, side).map_err(named)?,
            };
            self.settle()?;
            let measured =
                self.measure(&case, side, rate * self.lengths.closed.as_secs_f64()).map_err(named)?;
            let figures = &mut self.figures.throughput[index].1[side];
            figures.rate.0.push(measured.rate);
            figures.per_cpu_second.0.push(measured.per_cpu_second);
            self.figures.uncached = self.figures.uncached.max(measured.uncached);
        }
        let of = |side: usize| self.figures.throughput[index].1[side].rate.0.last().copied().unwrap_or(0.0);
        let (ours, peer, ratio) = (figure(of(OURS)), figure(of(PEER)), of(OURS) / of(PEER));
        progress(&format!("server: {}: {ours} beside {peer} requests/s ({ratio:.2})", case.name()));
        Ok(())
    }

    /// About how many requests per second it is, from runs that grow until they are long enough to tell. Warms up, too.
    fn try_out(&self, case: &Case, side: usize) -> Result<f64, Failure> {
        let mut count = f64::from(case.clients * case.pipeline) * 10.0;
        loop {
            let rate = self.measure(case, side, count)?.rate;
            if count / rate >= 0.2 {
                return Ok(rate);
            }
            count *= 5.0;
        }
    }

    /// So many requests of one row.
    fn measure(&self, case: &Case, side: usize, count: f64) -> Result<Measured, Failure> {
        let server = self.server(case.promise, side);
        let count = count.round() as u64;
        let run = redis_benchmark::Run {
            address: server.address,
            clients: case.clients,
            pipeline: case.pipeline,
            count,
            read: case.read,
            keys: case.keys,
        };
        let misses = || -> Result<f64, Failure> {
            let misses = server.client()?.info("cache_misses")?;
            Ok(misses.and_then(|misses| misses.parse().ok()).unwrap_or(0.0))
        };
        let (misses_before, cpu_before) = (misses()?, server.cpu_seconds()?);
        let rate = run.requests_per_second(COMMAND)?;
        let cpu = server.cpu_seconds()? - cpu_before;
        let uncached = if case.read { (misses()? - misses_before) / count as f64 } else { 0.0 };
        // A tick of the clock is the least that can be told.
        Ok(Measured { rate, per_cpu_second: count as f64 / cpu.max(0.01), uncached })
    }

    /// Rows under the open loop, once for each side.
    fn latency(&mut self, index: usize, run: u16) -> Result<(), Failure> {
        let case = self.figures.latency[index].0;
        let closed = case.closed_loop();
        let reference = self.figures.throughput.iter().find(|(other, _)| *other == closed);
        let (_, reference) = reference.ok_or("no closed loop says what an open one may offer")?;
        let of = |side: usize| reference[side].rate.0.last().copied().unwrap_or(0.0);
        let rate = of(OURS).min(of(PEER)) * f64::from(case.percent) / 100.0;
        let mut tails = [0.0; 2];
        for side in order(run, index) {
            self.settle()?;
            let server = self.server(Promise::Always, side);
            let load = load::Load {
                address: server.address,
                connections: CLIENTS as usize,
                rate,
                duration: self.lengths.open,
                patience: REPLY,
                read: case.read,
                keys: OPEN,
                // The same for both sides.
                seed: u64::from(run) << 8 | index as u64,
            };
            let outcome =
                load::run(&load).map_err(|error| format!("{}, {}: {error}", server.name, case.name()))?;
            let figures = &mut self.figures.latency[index].1[side];
            let milliseconds = |nanoseconds: u64| nanoseconds as f64 / 1e6;
            for (runs, (_, quantile)) in figures.quantiles.iter_mut().zip(QUANTILES) {
                runs.0.push(milliseconds(outcome.latency.value_at_quantile(quantile)));
            }
            tails[side] = milliseconds(outcome.latency.value_at_quantile(0.99));
            figures.lateness.0.push(milliseconds(outcome.lateness.value_at_quantile(0.99)));
            figures.late += u32::from(!outcome.kept_up());
            figures.offered.0.push(rate);
        }
        let (name, rate, ours, peer) = (case.name(), figure(rate), figure(tails[OURS]), figure(tails[PEER]));
        progress(&format!("server: {name}, {rate} requests/s: p99 {ours} beside {peer} ms"));
        Ok(())
    }
}

/// One measurement under redis-benchmark.
struct Measured {
    rate: f64,
    per_cpu_second: f64,
    /// The share of reads for which a node had to ask its device.
    uncached: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_begin_equally_often() {
        for row in 0..3 {
            let first: Vec<usize> = (0..4).map(|run| order(run, row)[0]).collect();
            assert_eq!(first.iter().filter(|side| **side == OURS).count(), 2, "{first:?}");
        }
        assert!((0..4).all(|run| order(run, 0)[0] != order(run, 0)[1] && order(run, 0) != order(run, 1)));
    }
}
