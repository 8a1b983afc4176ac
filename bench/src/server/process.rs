//! Servers as child processes: started, awaited until they answer, and killed when they are dropped.

use std::ffi::OsStr;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::cpu;
use super::wire::Client;
use crate::{Failure, progress};

/// How long a start may take: a new image is written once.
const START: Duration = Duration::from_secs(180);
/// After how long a start says that it is still under way.
const QUIET: Duration = Duration::from_secs(2);
/// How often another port is tried for a server that can't choose one.
const PORTS: u32 = 20;
/// How much of a log an error quotes.
const LOG_LINES: usize = 20;

/// What a redis-server promises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aof {
    /// `appendfsync always`
    Always,
    /// `appendfsync everysec`
    EverySecond,
    /// `appendonly no`
    Off,
}

/// A server that answers.
pub struct Server {
    /// As rows name it.
    pub name: &'static str,
    /// Where it listens.
    pub address: SocketAddr,
    child: Child,
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill, and waiting takes no time.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// A node on a new image of its own.
    pub fn basalt(
        name: &'static str,
        program: &Path,
        arguments: &[&str],
        directory: &Path,
    ) -> Result<Server, Failure> {
        let files = Files::new(name, directory)?;
        let mut command = dying_with_us(program);
        command
            .args(["serve", "--listen", "127.0.0.1:0", "--device"])
            .arg(directory.join(format!("{}.img", files.stem)))
            .args(arguments);
        spawn(name, &mut command, &files, listening_port)
    }

    /// A redis-server with data of its own.
    pub fn redis(name: &'static str, aof: Aof, directory: &Path) -> Result<Server, Failure> {
        let files = Files::new(name, directory)?;
        let data = directory.join(&files.stem);
        std::fs::create_dir_all(&data)?;
        let mut last = None;
        // It takes no port 0: a free one is looked for, and another one if somebody else was faster.
        for _ in 0..PORTS {
            let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
            let mut command = dying_with_us("redis-server");
            command
                .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--dir"])
                .arg(&data);
            match aof {
                Aof::Always => command.args(["--appendonly", "yes", "--appendfsync", "always"]),
                Aof::EverySecond => command.args(["--appendonly", "yes", "--appendfsync", "everysec"]),
                Aof::Off => command.args(["--appendonly", "no"]),
            };
            match spawn(name, &mut command, &files, |log| {
                log.contains("Ready to accept connections").then_some(port)
            }) {
                Err(_) if files.log().contains("Address already in use") => last = Some(port),
                done => return done,
            }
        }
        Err(format!("{name} found no free port, the last one tried was {last:?}").into())
    }

    /// A client of it.
    pub fn client(&self) -> Result<Client, Failure> {
        Client::connect(self.address).map_err(|error| format!("{}: {error}", self.name).into())
    }

    /// Processor time that it has used.
    pub fn cpu_seconds(&self) -> Result<f64, Failure> {
        cpu::seconds(self.child.id()).map_err(|error| format!("{}: {error}", self.name).into())
    }

    /// The same of each thread.
    pub fn cpu_of_threads(&self) -> Result<cpu::Threads, Failure> {
        cpu::threads(self.child.id()).map_err(|error| format!("{}: {error}", self.name).into())
    }
}

/// Where a server writes what it says.
struct Files {
    stem: String,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Files {
    fn new(name: &str, directory: &Path) -> Result<Files, Failure> {
        std::fs::create_dir_all(directory)?;
        let stem: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let file = |ending: &str| directory.join(format!("{stem}.{ending}"));
        Ok(Files { stdout: file("out"), stderr: file("err"), stem })
    }

    /// Both, as one text.
    fn log(&self) -> String {
        let read = |path: &Path| std::fs::read(path).map(|text| String::from_utf8_lossy(&text).into_owned());
        read(&self.stdout).unwrap_or_default() + &read(&self.stderr).unwrap_or_default()
    }

    fn excerpt(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }
}

/// A program that is killed when the thread that starts it ends, as it does with this program, however that ends; dropping
/// alone would not do it for signals. `setpriv` becomes the program, so that its process is the server's.
fn dying_with_us(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Starts a server and waits until its log says on which port it answers.
fn spawn(
    name: &'static str,
    command: &mut Command,
    files: &Files,
    port_of: impl Fn(&str) -> Option<u16>,
) -> Result<Server, Failure> {
    let program = command.get_program().to_string_lossy().into_owned();
    let child = command
        .stdin(Stdio::null())
        .stdout(File::create(&files.stdout)?)
        .stderr(File::create(&files.stderr)?)
        .spawn()
        .map_err(|error| format!("{name}: {program} cannot be run: {error}"))?;
    // From here on it is killed, whatever happens.
    let mut server = Server { name, address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), child };
    let start = Instant::now();
    let mut said = false;
    loop {
        if let Some(port) = port_of(&files.log()) {
            server.address.set_port(port);
            return Ok(server);
        }
        if let Some(status) = server.child.try_wait()? {
            return Err(format!("{name} did not start ({status}):\n{}", files.excerpt()).into());
        }
        if start.elapsed() > START {
            let log = files.excerpt();
            return Err(format!("{name} did not start within {} s:\n{log}", START.as_secs()).into());
        }
        if start.elapsed() > QUIET && !said {
            said = true;
            progress(&format!("server: waiting for {name} to start"));
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// The port of the ready line, once it is there in whole.
fn listening_port(log: &str) -> Option<u16> {
    let complete = &log[..log.rfind('\n')?];
    let (_, after) = complete.rsplit_once("listening on ")?;
    after.split_whitespace().next()?.rsplit_once(':')?.1.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::ExitStatusExt;

    /// A program that takes the place of basalt.
    fn program(directory: &Path, script: &str) -> PathBuf {
        let path = directory.join("program");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn start(directory: &Path, program: &Path) -> Result<Server, Failure> {
        Server::basalt("basalt interval=1000", program, &["--durability", "never"], directory)
    }

    #[test]
    fn the_port_is_taken_from_a_whole_ready_line() {
        let line = "basalt 0.1.0: ready, 1 GiB of memory, listening on 127.0.0.1:4711";
        assert_eq!(listening_port(&format!("{line}\n")), Some(4711));
        assert_eq!(listening_port(line), None);
        assert_eq!(listening_port("basalt 0.1.0: still reading\n"), None);
        assert_eq!(listening_port(""), None);
    }

    #[test]
    fn a_server_that_does_not_start_is_quoted() {
        let directory = tempfile::tempdir().unwrap();
        let failing = program(directory.path(), "echo starting; echo 'no room on the device' >&2; exit 7");
        let error = start(directory.path(), &failing).err().unwrap().to_string();
        for part in ["basalt interval=1000 did not start", "starting", "no room on the device", "7"] {
            assert!(error.contains(part), "{part} is not in {error}");
        }
        let error = start(directory.path(), Path::new("/no/such/program")).err().unwrap().to_string();
        assert!(error.contains("did not start") && error.contains("/no/such/program"), "{error}");
    }

    #[test]
    fn a_server_gets_its_arguments_and_ends_with_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let waiting = program(
            directory.path(),
            "echo \"$@\" >&2; sleep 0.1; echo 'ready, listening on 127.0.0.1:4711'; exec sleep 600",
        );
        let server = start(directory.path(), &waiting).unwrap();
        assert_eq!(server.address, "127.0.0.1:4711".parse().unwrap());
        let said = std::fs::read_to_string(directory.path().join("basalt-interval-1000.err")).unwrap();
        assert!(said.contains("serve --listen 127.0.0.1:0") && said.contains("--durability never"), "{said}");
        let process = PathBuf::from(format!("/proc/{}", server.child.id()));
        assert!(process.exists() && server.cpu_seconds().is_ok());
        drop(server);
        assert!(!process.exists());
    }

    #[test]
    fn a_server_does_not_outlive_a_program_that_is_killed() {
        let directory = tempfile::tempdir().unwrap();
        let waiting = program(directory.path(), "echo 'listening on 127.0.0.1:4711'; exec sleep 20");
        // The end of the thread stands for the end of the program: nothing is dropped by it.
        let server = thread::spawn(move || start(directory.path(), &waiting).unwrap());
        let status = server.join().unwrap().child.wait().unwrap();
        assert_eq!(status.signal(), Some(9), "{status}");
    }
}
