//! The real binary as a child process: started on a free port, killed or stopped by its id, always reaped.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::resp::Client;

/// How long a start, a stop or a one-shot command may take before the test gives up: about hangs, not about speed.
const DEADLINE: Duration = Duration::from_secs(60);

/// A directory on the disk that holds the build: O_DIRECT, which the engines use, does not work on tmpfs.
pub fn temp_dir() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("e2e-")
        .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
        .expect("a temporary directory in the build directory")
}

/// How a node is started.
#[derive(Debug, Clone)]
pub struct Options {
    pub device: PathBuf,
    pub engine: Option<&'static str>,
    pub size: Option<&'static str>,
    pub durability: Option<String>,
    pub listen: String,
    pub extra: Vec<String>,
}

impl Options {
    pub fn new(device: impl AsRef<Path>) -> Options {
        Options {
            device: device.as_ref().to_path_buf(),
            engine: None,
            size: Some("256MiB"),
            durability: None,
            listen: "127.0.0.1:0".into(),
            extra: Vec::new(),
        }
    }

    pub fn engine(mut self, engine: &'static str) -> Options {
        self.engine = Some(engine);
        self
    }

    pub fn size(mut self, size: &'static str) -> Options {
        self.size = Some(size);
        self
    }

    pub fn durability(mut self, mode: &str) -> Options {
        self.durability = Some(mode.into());
        self
    }

    pub fn listen(mut self, listen: impl Into<String>) -> Options {
        self.listen = listen.into();
        self
    }

    pub fn arg(mut self, arg: &str) -> Options {
        self.extra.push(arg.into());
        self
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_basalt"));
        command.arg("serve").arg("--device").arg(&self.device).args(["--listen", &self.listen]);
        // An image keeps the size that it was made with; asking again is for the first start only.
        if let Some(size) = self.size.filter(|_| !self.device.exists()) {
            command.args(["--size", size]);
        }
        if let Some(engine) = self.engine {
            command.args(["--engine", engine]);
        }
        if let Some(mode) = &self.durability {
            command.args(["--durability", mode]);
        }
        // Two, however many cores there are: what is between reactors is to be met everywhere.
        if !self.extra.iter().any(|arg| arg.starts_with("--cores") || arg.starts_with("--reactors")) {
            command.args(["--reactors", "2"]);
        }
        command.args(&self.extra);
        command
    }

    /// An NVMe namespace, driven by SPDK on ordinary pages, so that nobody's hugepages are touched.
    pub fn controller(transport_id: &str) -> Options {
        Options { size: None, ..Options::new(transport_id) }.arg("--no-hugepages")
    }

    /// `basalt format` of the device.
    #[track_caller]
    pub fn format(&self, more: &[&str]) -> Ended {
        let mut args = vec!["format", "--device", path_text(&self.device)];
        args.extend(self.extra.iter().map(String::as_str).chain(more.iter().copied()));
        basalt(&args)
    }

    /// `basalt check` of the device.
    #[track_caller]
    pub fn check(&self) -> Ended {
        let mut args = vec!["check", "--device", path_text(&self.device)];
        args.extend(self.extra.iter().map(String::as_str).filter(|arg| *arg == "--no-hugepages"));
        basalt(&args)
    }

    /// Starts the node and waits for its ready line; anything else fails the test with what the node said.
    #[track_caller]
    pub fn start(&self) -> Node {
        match self.try_start() {
            Ok(node) => node,
            Err(failure) => panic!("the node did not start: {failure}"),
        }
    }

    /// Starts the node and waits until it is ready or has exited.
    pub fn try_start(&self) -> Result<Node, StartFailure> {
        Node::spawn(self.command())?.wait_ready()
    }

    /// Starts the node without waiting, to be killed while it recovers.
    pub fn spawn(&self) -> Result<Starting, StartFailure> {
        Node::spawn(self.command())
    }
}

/// A node that did not become ready.
#[derive(Debug)]
pub struct StartFailure {
    /// `None` when it was still running (and was killed).
    pub code: Option<i32>,
    pub what: String,
    pub stdout: String,
    pub stderr: String,
}

impl std::fmt::Display for StartFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (code, out, err) = (self.code, &self.stdout, &self.stderr);
        write!(f, "{}, exit code {code:?}\n--- stdout\n{out}\n--- stderr\n{err}", self.what)
    }
}

/// A child that has not said yet that it is ready.
#[derive(Debug)]
pub struct Starting {
    node: Node,
    lines: mpsc::Receiver<String>,
}

impl Starting {
    pub fn kill9(self) {
        self.node.kill9();
    }

    fn wait_ready(mut self) -> Result<Node, StartFailure> {
        let deadline = Instant::now() + DEADLINE;
        let mut stdout = String::new();
        let what = loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    stdout.push_str(&line);
                    if let Some(address) = address_in(&line) {
                        self.node.address = address;
                        self.node.ready_line = line.trim_end().to_string();
                        return Ok(self.node);
                    }
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break "it ended before its ready line".into(),
                Err(mpsc::RecvTimeoutError::Timeout) => break format!("no ready line in {DEADLINE:?}"),
            }
        };
        // A node that closed its output without exiting must not hang the test.
        let code = self.node.wait_exit(Duration::from_secs(5)).and_then(|status| status.code());
        Err(StartFailure { code, what, stdout, stderr: self.node.stderr() })
    }
}

/// A running node.
#[derive(Debug)]
pub struct Node {
    child: Child,
    stderr: Option<File>,
    pub address: SocketAddr,
    pub ready_line: String,
}

impl Node {
    /// Starts `basalt` with exactly these arguments, in a directory.
    #[track_caller]
    pub fn start_in(directory: &Path, args: &[&str]) -> Node {
        match Node::try_start_in(directory, args) {
            Ok(node) => node,
            Err(failure) => panic!("basalt {args:?} did not start: {failure}"),
        }
    }

    /// Starts `basalt` with exactly these arguments, in a directory, until it is ready or has exited.
    pub fn try_start_in(directory: &Path, args: &[&str]) -> Result<Node, StartFailure> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_basalt"));
        command.args(args).current_dir(directory);
        Node::spawn(command)?.wait_ready()
    }

    fn spawn(mut command: Command) -> Result<Starting, StartFailure> {
        // Unlinked at once: a file takes any amount of log without a thread that empties a pipe.
        let stderr = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).expect("a file for stderr");
        let for_child = stderr.try_clone().expect("a second handle of the stderr file");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(for_child);
        let mut child = command.spawn().expect("the basalt binary can be started");
        let stdout = child.stdout.take().expect("stdout is piped");
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            let mut reader = BufReader::new(stdout);
            let mut line = String::new();
            while reader.read_line(&mut line).is_ok_and(|count| count > 0) {
                // The receiver is gone once the node is ready; the pipe still has to be emptied.
                let _ = sender.send(std::mem::take(&mut line));
            }
        });
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        Ok(Starting { node: Node { child, stderr: Some(stderr), address, ready_line: String::new() }, lines })
    }

    #[track_caller]
    pub fn client(&self) -> Client {
        match Client::connect(self.address) {
            Ok(client) => client,
            Err(e) => panic!("cannot connect to the node at {}: {e}\n{}", self.address, self.stderr()),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// SIGKILL: nothing of the node's own code runs any more.
    pub fn kill9(mut self) {
        self.child.kill().expect("the child can be killed");
        self.child.wait().expect("the child can be reaped");
    }

    /// SIGTERM (or another signal), and the exit that follows.
    #[track_caller]
    pub fn stop_with(mut self, signal: Signal) -> ExitStatus {
        let pid = Pid::from_raw(self.child.id() as i32).expect("a child has an id");
        kill_process(pid, signal).expect("the child can be signalled");
        match self.wait_exit(DEADLINE) {
            Some(status) => status,
            None => panic!("no exit within {DEADLINE:?} of {signal:?}\n{}", self.stderr()),
        }
    }

    /// SIGTERM; a clean stop is part of what every test expects.
    #[track_caller]
    pub fn stop(self) {
        let stderr = self.stderr.as_ref().and_then(|f| f.try_clone().ok());
        let status = self.stop_with(Signal::TERM);
        assert_eq!(status.code(), Some(0), "SIGTERM is a clean stop\n{}", read_all(stderr.as_ref()));
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    pub fn stderr(&self) -> String {
        read_all(self.stderr.as_ref())
    }

    /// Resident memory in bytes.
    pub fn rss(&self) -> u64 {
        let path = format!("/proc/{}/status", self.pid());
        let status = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).expect("a running process has VmRSS");
        let kib: u64 = line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("VmRSS in kB");
        kib << 10
    }

    /// Processor time used so far by all threads.
    pub fn cpu_time(&self) -> Duration {
        let path = format!("/proc/{}/stat", self.pid());
        let stat = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        // The name, in parentheses, may hold anything; utime and stime are the 12th and 13th field after it.
        let (_, after) = stat.rsplit_once(") ").expect("a process has a name");
        let field = |n: usize| after.split(' ').nth(n).and_then(|t| t.parse::<u64>().ok()).expect("a number");
        let ticks = field(11) + field(12);
        Duration::from_millis(ticks * 1_000 / rustix::param::clock_ticks_per_second())
    }

    fn wait_exit(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait().expect("the child can be waited for") {
                return Some(status);
            }
            if Instant::now() > deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // A child that has exited and been reaped makes both of these errors, which is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Result of a command that ends by itself.
#[derive(Debug)]
pub struct Ended {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// Both outputs, for messages and for "says somewhere".
    pub fn text(&self) -> String {
        format!("{}\n{}", self.stdout, self.stderr)
    }

    #[track_caller]
    pub fn expect_code(self, code: i32, what: &str) -> Ended {
        assert_eq!(self.code, Some(code), "{what}\n--- stdout\n{}\n--- stderr\n{}", self.stdout, self.stderr);
        self
    }
}

/// Runs `basalt` with arguments that make it end by itself, in `directory`.
#[track_caller]
pub fn basalt_in(directory: &Path, args: &[&str]) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_basalt"));
    command.args(args).current_dir(directory);
    // Only a hang takes this long: a check reads the whole device, however slow the machine is.
    run_within(command, None, DEADLINE * 5)
}

/// Runs `basalt` with arguments that make it end by itself.
#[track_caller]
pub fn basalt(args: &[&str]) -> Ended {
    basalt_in(Path::new(env!("CARGO_TARGET_TMPDIR")), args)
}

/// `basalt check` on an image, with its exit code.
#[track_caller]
pub fn check(device: &Path) -> Ended {
    basalt(&["check", "--device", path_text(device)])
}

pub fn path_text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// Runs any command to its end, with a deadline; its input is `stdin` when there is one.
#[track_caller]
pub fn run(command: Command, stdin: Option<File>) -> Ended {
    run_within(command, stdin, DEADLINE * 3)
}

#[track_caller]
fn run_within(mut command: Command, stdin: Option<File>, limit: Duration) -> Ended {
    let out = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).expect("a file for stdout");
    let err = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).expect("a file for stderr");
    command.stdin(stdin.map_or_else(Stdio::null, Stdio::from));
    command.stdout(out.try_clone().expect("a second handle"));
    command.stderr(err.try_clone().expect("a second handle"));
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(e) => panic!("{:?} cannot be started: {e}", command.get_program()),
    };
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait().expect("the child can be waited for") {
            break status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            let (out, err) = (read_all(Some(&out)), read_all(Some(&err)));
            panic!("{command:?} did not end in {limit:?}\n--- stdout\n{out}\n--- stderr\n{err}");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    Ended { code: status.code(), stdout: read_all(Some(&out)), stderr: read_all(Some(&err)) }
}

/// The address in a ready line: what follows `listening on `.
fn address_in(line: &str) -> Option<SocketAddr> {
    let (_, after) = line.split_once("listening on ")?;
    let token = after.split_whitespace().next()?;
    token.trim_end_matches([',', ';', '.', ')']).parse().ok()
}

/// All of a file whose handle another process shares: the position is shared too, hence reads by offset.
fn read_all(file: Option<&File>) -> String {
    use std::os::unix::fs::FileExt;
    let Some(file) = file else { return String::new() };
    let mut bytes = Vec::new();
    let mut chunk = [0u8; 8 << 10];
    while let Ok(count) = file.read_at(&mut chunk, bytes.len() as u64) {
        if count == 0 {
            break;
        }
        bytes.extend_from_slice(&chunk[..count]);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
