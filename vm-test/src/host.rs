//! Programs of the host, each with a time limit and its output kept for the error message.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::error::{Result, VmError};

/// A line for the person who runs the cases. Written past the test harness, which would keep it until a test fails.
pub fn say(text: impl std::fmt::Display) {
    // A closed terminal is no reason to stop.
    let _ = writeln!(std::io::stderr().lock(), "vm-test: {text}");
}

/// What a program printed and how it ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs a program to its end, whatever that is.
pub fn run(command: &mut Command, limit: Duration) -> Result<Ended> {
    let name = show(command);
    let temporary = || tempfile::tempfile().map_err(VmError::os("make a temporary file for", &name));
    // Files take any amount of output without a thread that empties a pipe.
    let (mut out, mut err) = (temporary()?, temporary()?);
    let handle = |file: &File| file.try_clone().map_err(VmError::os("share the output of", &name));
    command.stdin(Stdio::null()).stdout(handle(&out)?).stderr(handle(&err)?);
    let mut child = command.spawn().map_err(VmError::os("start", &name))?;
    let status = wait(&mut child, limit);
    if status.is_none() {
        end(&mut child);
    }
    let (stdout, stderr) = (read_all(&mut out), read_all(&mut err));
    match status {
        Some(status) => Ok(Ended { code: status.code(), stdout, stderr }),
        None => Err(VmError::TimedOut { what: name, limit, context: format!("{stdout}\n{stderr}") }),
    }
}

/// Runs a program that must succeed and returns its standard output.
pub fn output(command: &mut Command, limit: Duration) -> Result<String> {
    let Ended { code, stdout, stderr } = run(command, limit)?;
    if code == Some(0) {
        return Ok(stdout);
    }
    let status = code.map_or_else(|| "killed by a signal".into(), |code| format!("exit code {code}"));
    Err(VmError::Program { program: show(command), status, output: format!("{stdout}{stderr}") })
}

/// Waits for a child. `None` when it is still running after the limit.
pub fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    loop {
        // An error means that there is no such child any more, which the deadline turns into an answer.
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// SIGKILL, and reaps it. A child that is gone already makes both of these errors, which is fine.
pub fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}

/// A command that the kernel kills when the thread that started it ends: an interrupted run leaves no machine behind.
pub fn tied_to_this_thread(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Whether there is a program of this name.
pub fn find_program(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|candidate| candidate.is_file())
}

fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

fn read_all(file: &mut File) -> String {
    let mut bytes = Vec::new();
    // What can't be read is missing from a message, no more.
    let _ = file.rewind().and_then(|()| file.read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_hangs_is_ended_and_named() {
        let error = run(Command::new("sleep").arg("600"), Duration::from_millis(50)).unwrap_err();
        assert!(matches!(&error, VmError::TimedOut { what, .. } if what == "sleep 600"), "{error}");
    }

    #[test]
    fn a_program_that_fails_shows_what_it_said() {
        let failed = output(Command::new("sh").args(["-c", "echo why >&2; exit 3"]), Duration::from_secs(60));
        let text = failed.unwrap_err().to_string();
        assert!(text.contains("exit code 3") && text.contains("why"), "{text}");
        let said = output(Command::new("sh").args(["-c", "echo done"]), Duration::from_secs(60)).unwrap();
        assert_eq!(said, "done\n");
    }
}
