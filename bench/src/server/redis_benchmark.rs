//! redis-benchmark, as a subprocess: as fast as its connections can, each waiting for its replies.

use std::io::Read;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::wire::Keyspace;
use crate::Failure;

/// What is asked of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// The server.
    pub address: SocketAddr,
    /// Connections.
    pub clients: u32,
    /// Commands that each sends before it waits.
    pub pipeline: u32,
    /// Commands in all.
    pub count: u64,
    /// Reads instead of writes.
    pub read: bool,
    /// Keys, of which it takes any.
    pub keys: Keyspace,
}

impl Run {
    /// Runs it; commands per second. It stops at the first error that a server answers, and then so does this.
    pub fn requests_per_second(&self, patience: Duration) -> Result<f64, Failure> {
        let mut command = Command::new("redis-benchmark");
        command
            .args(["-h", &self.address.ip().to_string(), "-p", &self.address.port().to_string()])
            .args(["-c", &self.clients.to_string(), "-P", &self.pipeline.to_string()])
            .args(["-n", &self.count.to_string(), "-r", &self.keys.count.to_string(), "--csv"])
            .args([if self.read { "GET" } else { "SET" }, &self.keys.key_with("__rand_int__")]);
        if !self.read {
            let mut value = Vec::new();
            self.keys.value(0, &mut value);
            command.arg(String::from_utf8(value)?);
        }
        let output = output_within(&mut command, patience)?;
        Ok(parse(&output).ok_or_else(|| format!("redis-benchmark printed no figures: {output:?}"))?)
    }
}

/// What a program prints, once it has ended well. What it prints has to fit a pipe.
fn output_within(command: &mut Command, patience: Duration) -> Result<String, Failure> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{name} cannot be run: {error}"))?;
    let deadline = Instant::now() + patience;
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                child.kill()?;
                child.wait()?;
                return Err(format!("{name} did not end within {} s", patience.as_secs()).into());
            }
            None => thread::sleep(Duration::from_millis(5)),
        }
    };
    let (mut printed, mut said) = (String::new(), String::new());
    if let (Some(mut stdout), Some(mut stderr)) = (child.stdout.take(), child.stderr.take()) {
        stdout.read_to_string(&mut printed)?;
        stderr.read_to_string(&mut said)?;
    }
    if !status.success() {
        return Err(format!("{name} failed ({status}): {}", said.trim()).into());
    }
    Ok(printed)
}

/// The column `rps` of the only line below the header.
fn parse(csv: &str) -> Option<f64> {
    let mut lines = csv.lines().filter(|line| !line.is_empty());
    let column = fields(lines.next()?).iter().position(|name| name == "rps")?;
    let rate = fields(lines.next()?).get(column)?.parse().ok()?;
    (lines.next().is_none() && f64::is_finite(rate) && rate > 0.0).then_some(rate)
}

/// The fields of a line; commas within quotes belong to the field.
fn fields(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    for character in line.chars() {
        match character {
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            _ => fields.last_mut().expect("there is a first field").push(character),
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "\"test\",\"rps\",\"avg_latency_ms\",\"min_latency_ms\"";

    #[test]
    fn figures_are_taken_from_their_column() {
        let csv = format!("{HEADER}\n\"SET s:__rand_int__ a,b,7\",\"115606.94\",\"3.622\",\"0.512\"\n");
        assert_eq!(parse(&csv), Some(115_606.94));
        assert_eq!(parse("\"rps\",\"test\"\n\"5.5\",\"GET\"\n"), Some(5.5));
    }

    #[test]
    fn what_is_no_figure_is_not_taken_for_one() {
        let line = |rate: &str| format!("{HEADER}\n\"GET\",\"{rate}\",\"1\",\"1\"\n");
        for csv in [
            String::new(),
            format!("{HEADER}\n"),
            "\"test\",\"requests\"\n\"GET\",\"7\"\n".to_owned(),
            line("inf"),
            line("nan"),
            line("0.00"),
            line("-5"),
            line("many"),
            line("1") + "\"GET\",\"2\",\"1\",\"1\"\n",
        ] {
            assert_eq!(parse(&csv), None, "{csv}");
        }
    }

    #[test]
    fn a_program_that_fails_or_hangs_is_no_measurement() {
        let run = |script: &str, patience: u64| {
            output_within(Command::new("sh").args(["-c", script]), Duration::from_millis(patience))
        };
        assert_eq!(run("echo figures", 600_000).unwrap(), "figures\n");
        let error = run("echo figures; echo WRONGTYPE >&2; exit 1", 600_000).unwrap_err().to_string();
        assert!(error.contains("WRONGTYPE") && error.contains("sh failed"), "{error}");
        let error = run("exec sleep 600", 50).unwrap_err().to_string();
        assert!(error.contains("did not end"), "{error}");
        let missing = output_within(&mut Command::new("no-such-program"), Duration::from_secs(1));
        assert!(missing.unwrap_err().to_string().contains("no-such-program"));
    }
}
