//! Commands for the guest over its second serial port, with exit codes.
//!
//! `guest/init` is the other end. The host sends `NUMBER LENGTH LIMIT COMMAND` and a line end; the guest answers
//! `=NUMBER CODE SIZE`, a line end and SIZE bytes, which are the command's standard output and standard error. One command runs at
//! a time. A line whose command has another length was cut on the way: the guest does nothing and answers `?`, and it is sent
//! again.

use std::io::{Read, Write};
use std::process::{ChildStdin, ChildStdout};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// The guest's first words.
const HELLO: &str = "basalt-guest\n";

/// What the guest says to a line that was cut on the way, and how often a line is sent.
const REFUSAL: &str = "?";
const SENDS_MAX: usize = 4;

/// How long the answer may take beyond the limit that the guest itself keeps.
const GRACE: Duration = Duration::from_secs(30);

/// The exit code of a command that ran into its limit.
pub(crate) const KILLED: i32 = 137;

/// What a command in the guest came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its exit code; `KILLED` when it ran into its limit.
    pub code: i32,
    /// What it printed, on either output.
    pub output: String,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Silence {
    /// The port was closed: the machine is gone.
    Closed,
    /// Nothing in time.
    TimedOut,
    /// This came, which is not an answer to what was asked.
    Garbled(String),
}

/// The host's end of the serial port.
#[derive(Debug)]
pub struct Serial {
    to_guest: ChildStdin,
    from_guest: Receiver<Vec<u8>>,
    received: Vec<u8>,
    last_number: u64,
}

impl Serial {
    /// On QEMU's standard input and output.
    pub fn new(to_guest: ChildStdin, from_guest: ChildStdout) -> Serial {
        Serial { to_guest, from_guest: follow(from_guest), received: Vec::new(), last_number: 0 }
    }

    /// Waits for the guest's first words.
    pub fn wait_for_hello(&mut self, limit: Duration) -> Result<(), Silence> {
        let deadline = Instant::now() + limit;
        // Firmware may print before the guest does.
        while !self.line(deadline)?.ends_with(HELLO) {}
        Ok(())
    }

    /// Runs a command in the guest; the guest kills it after `limit`.
    pub fn run(&mut self, command: &str, limit: Duration) -> Result<Answer, Silence> {
        assert!(!command.contains('\n'), "a command is one line: {command:?}");
        // The guest's shell would leave out what is around it.
        let command = command.trim();
        self.last_number += 1;
        let number = self.last_number;
        let line = format!("{number} {} {} {command}\n", command.len(), limit.as_secs().max(1));
        let mut deadline = Instant::now();
        let mut head = String::new();
        for _ in 0..SENDS_MAX {
            self.to_guest.write_all(line.as_bytes()).map_err(|_| Silence::Closed)?;
            self.to_guest.flush().map_err(|_| Silence::Closed)?;
            deadline = Instant::now() + limit + GRACE;
            head = self.line(deadline)?;
            if head.trim_end() != REFUSAL {
                break;
            }
        }
        let (code, size) = parse_head(&head, number).ok_or_else(|| {
            Silence::Garbled(format!(
                "{head:?} instead of an answer to number {number}, then {:?}",
                String::from_utf8_lossy(&self.received)
            ))
        })?;
        while self.received.len() < size {
            self.receive(deadline)?;
        }
        let output: Vec<u8> = self.received.drain(..size).collect();
        Ok(Answer { code, output: String::from_utf8_lossy(&output).into_owned() })
    }

    /// The next line, with its end.
    fn line(&mut self, deadline: Instant) -> Result<String, Silence> {
        loop {
            if let Some(at) = self.received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.received.drain(..=at).collect();
                return Ok(String::from_utf8_lossy(&line).into_owned());
            }
            self.receive(deadline)?;
        }
    }

    fn receive(&mut self, deadline: Instant) -> Result<(), Silence> {
        match self.from_guest.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(bytes) => self.received.extend(bytes),
            Err(RecvTimeoutError::Timeout) => return Err(Silence::TimedOut),
            Err(RecvTimeoutError::Disconnected) => return Err(Silence::Closed),
        }
        Ok(())
    }
}

/// `=NUMBER CODE SIZE`.
fn parse_head(line: &str, number: u64) -> Option<(i32, usize)> {
    let mut words = line.strip_prefix('=')?.trim_end().split(' ');
    let is_ours = words.next()?.parse() == Ok(number);
    let (code, size) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    (is_ours && words.next().is_none()).then_some((code, size))
}

/// Reads on a thread of its own, so that whoever waits can do so with a limit.
fn follow(mut from: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut chunk = [0u8; 4096];
        while let Ok(count) = from.read(&mut chunk) {
            if count == 0 || sender.send(chunk[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    /// A guest made of the host's own shell, which runs the loop of `guest/init` on its standard input and output.
    fn shell_guest(directory: &std::path::Path) -> Serial {
        let init = include_str!("../guest/init");
        let from = init.find("echo \"basalt-guest\"").unwrap();
        let end = init.find("echo \"guest: the serial port was closed\"").unwrap();
        let script = init[from..end]
            .replace("<&3", "")
            .replace(">&3", "")
            .replace("/run/", &format!("{}/", directory.display()));
        shell(&script)
    }

    /// It ends when its input does, and nobody waits for it.
    #[expect(clippy::zombie_processes, reason = "a test process does not live long")]
    fn shell(script: &str) -> Serial {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        Serial::new(child.stdin.take().unwrap(), child.stdout.take().unwrap())
    }

    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn a_line_that_was_cut_on_the_way_is_not_obeyed_and_sent_again() {
        let directory = tempfile::tempdir().unwrap();
        let mut guest = shell_guest(directory.path());
        guest.wait_for_hello(LIMIT).unwrap();
        for cut in ["1 9 60 echo lon\n", "&\n", "ho long\n"] {
            guest.to_guest.write_all(cut.as_bytes()).unwrap();
            guest.to_guest.flush().unwrap();
            assert_eq!(guest.line(Instant::now() + LIMIT).as_deref(), Ok("?\n"), "{cut:?}");
        }
        assert_eq!(guest.run("echo long", LIMIT), Ok(Answer { code: 0, output: "long\n".into() }));
        let mut guest = shell("read a; echo '?'; read number rest; echo \"=$number 0 0\"; read b");
        assert_eq!(guest.run("true", LIMIT), Ok(Answer { code: 0, output: String::new() }));
        let mut deaf = shell("while read a; do echo '?'; done");
        assert!(matches!(deaf.run("true", LIMIT), Err(Silence::Garbled(_))));
    }

    #[test]
    fn commands_give_their_output_and_code() {
        let directory = tempfile::tempdir().unwrap();
        let mut guest = shell_guest(directory.path());
        guest.wait_for_hello(LIMIT).unwrap();
        let answer = |code, output: &str| Ok(Answer { code, output: output.into() });
        assert_eq!(guest.run("echo 'a  b' \\; $((2 + 3))", LIMIT), answer(0, "a  b ; 5\n"));
        assert_eq!(guest.run("printf 'no end, ='; echo 1 >&2; exit 7", LIMIT), answer(7, "no end, =1\n"));
        assert_eq!(guest.run("true", LIMIT), answer(0, ""));
        assert_eq!(guest.run("sleep 100", Duration::from_secs(1)).map(|answer| answer.code), Ok(KILLED));
        let long = guest.run("seq 1 20000", LIMIT).unwrap();
        assert!(long.output.starts_with("1\n2\n") && long.output.ends_with("20000\n"));
    }

    #[test]
    fn a_guest_that_ends_or_says_nothing_is_told_apart() {
        assert_eq!(shell("echo basalt").wait_for_hello(LIMIT), Err(Silence::Closed));
        let mut mute = shell("echo basalt-guest; read -r line; read -r line");
        mute.wait_for_hello(LIMIT).unwrap();
        assert_eq!(mute.line(Instant::now() + Duration::from_millis(20)), Err(Silence::TimedOut));
        let mut noisy = shell("echo basalt-guest; read -r line; echo kernel panic");
        noisy.wait_for_hello(LIMIT).unwrap();
        assert_eq!(
            noisy.run("true", LIMIT),
            Err(Silence::Garbled("\"kernel panic\\n\" instead of an answer to number 1, then \"\"".into()))
        );
    }

    #[test]
    fn answers_to_something_else_are_refused() {
        assert_eq!(parse_head("=4 0 17\n", 4), Some((0, 17)));
        for line in ["=5 0 17\n", "4 0 17\n", "=4 0\n", "=4 0 17 8\n", "=4 x 1\n", ""] {
            assert_eq!(parse_head(line, 4), None, "{line:?}");
        }
    }
}
