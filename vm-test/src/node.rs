//! Nodes under test: in a guest, and on the host for the images that a guest left.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::error::{Result, VmError};
use crate::host::{Ended, end, run, tied_to_this_thread};
use crate::serial::KILLED;
use crate::vm::Vm;

/// For a start, a stop or a command that ends by itself: about hangs, not about speed. A guest that was calibrated on a busy
/// machine may take its clock to be several times as fast as it is.
const LIMIT: Duration = Duration::from_secs(600);

/// For a node to say what it must say.
const SAYING_LIMIT: Duration = Duration::from_secs(120);

/// The port of the first node of a guest.
pub const PORT: u16 = 6379;

/// A node in a guest. Dropping it leaves it running.
#[derive(Debug)]
pub struct GuestNode<'a> {
    vm: &'a Vm,
    /// The name of its files in the guest.
    name: String,
    /// Where the host reaches it.
    pub address: SocketAddr,
    /// What it said when it was ready.
    pub ready_line: String,
}

impl<'a> GuestNode<'a> {
    /// Starts `basalt serve` with these further arguments on a port of the guest that is forwarded.
    pub fn start(vm: &'a Vm, port: u16, arguments: &str) -> Result<GuestNode<'a>> {
        let name = format!("/tmp/node-{port}");
        let serve = format!(
            "basalt serve --listen 10.0.2.15:{port} --allow-remote-clients {arguments} >{name}.out 2>{name}.err"
        );
        // Two shells: the outer one notes the exit code, the inner one its own id, which the node takes over.
        let node = format!("sh -c 'echo $$ >{name}.pid; exec {serve}'; echo $? >{name}.code");
        vm.run(&format!("rm -f {name}.*; ({node}) </dev/null >/dev/null 2>&1 &"))?;
        let node = GuestNode { vm, name, address: vm.host_address(port), ready_line: String::new() };
        let ready = vm.try_run(
            &format!(
                "while [ ! -e {0}.code ]; do grep -h 'listening on' {0}.out 2>/dev/null && exit 0; sleep 0.1; done; exit 1",
                node.name
            ),
            LIMIT,
        )?;
        if ready.code == 0 {
            return Ok(GuestNode { ready_line: ready.output.trim_end().to_string(), ..node });
        }
        let how = if ready.code == KILLED { format!("not ready within {LIMIT:?}") } else { "ended".into() };
        let what = format!("`{serve}` in the guest: {how}");
        Err(VmError::Node { what, output: node.said()? })
    }

    /// SIGTERM, and a clean end.
    pub fn stop(self) -> Result<()> {
        self.vm.run(&format!("kill -TERM $(cat {}.pid)", self.name))?;
        let code = self.exit_code()?;
        if code == 0 {
            return Ok(());
        }
        Err(VmError::Node { what: format!("SIGTERM ended the node with {code}"), output: self.said()? })
    }

    /// SIGKILL.
    pub fn kill9(self) -> Result<()> {
        self.vm.run(&format!("kill -KILL $(cat {}.pid)", self.name))?;
        self.exit_code().map(drop)
    }

    fn exit_code(&self) -> Result<i32> {
        let wait = format!("while [ ! -e {0}.code ]; do sleep 0.1; done; cat {0}.code", self.name);
        let text = self.vm.expect(0, &wait, LIMIT)?;
        Ok(text.trim().parse().unwrap_or(-1))
    }

    /// Whether it still runs.
    pub fn is_running(&self) -> Result<bool> {
        Ok(self.vm.try_run(&format!("[ ! -e {}.code ]", self.name), LIMIT)?.code == 0)
    }

    /// Waits until it has said this so many times.
    pub fn wait_for(&self, words: &str, count: usize) -> Result<()> {
        let wait =
            format!("while [ $(grep -c '{words}' {0}.err) -lt {count} ]; do sleep 0.1; done", self.name);
        match self.vm.try_run(&wait, SAYING_LIMIT)?.code {
            0 => Ok(()),
            _ => {
                let what = format!("the node has not said '{words}' {count} times within {SAYING_LIMIT:?}");
                Err(VmError::Node { what, output: self.said()? })
            }
        }
    }

    /// What it has printed.
    pub fn said(&self) -> Result<String> {
        self.vm.run(&format!(
            "cat {0}.out {0}.err; echo exit code: $(cat {0}.code 2>&1); dmesg | tail -n 5",
            self.name
        ))
    }
}

/// A node on the host.
#[derive(Debug)]
pub struct HostNode {
    child: Child,
    /// Where it listens.
    pub address: SocketAddr,
}

impl HostNode {
    /// Serves an image, with io_uring unless the machine forbids it.
    pub fn start(program: &Path, image: &Path) -> Result<HostNode> {
        let mut command = tied_to_this_thread(program);
        command.args(["serve", "--listen", "127.0.0.1:0", "--device"]).arg(image);
        let log =
            tempfile::NamedTempFile::new().map_err(VmError::os("make a file in", std::env::temp_dir()))?;
        let stderr = log.reopen().map_err(VmError::os("open", log.path()))?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr);
        let mut child = command.spawn().map_err(VmError::os("start", program))?;
        let (sender, lines) = channel();
        let stdout = child.stdout.take();
        // From here on, dropping ends the child.
        let mut node = HostNode { child, address: SocketAddr::from(([127, 0, 0, 1], 0)) };
        std::thread::spawn(move || {
            // The receiver is gone once the node is ready; the pipe still has to be emptied.
            for line in
                stdout.map(BufReader::new).into_iter().flat_map(BufRead::lines).map_while(|line| line.ok())
            {
                let _ = sender.send(line);
            }
        });
        let deadline = Instant::now() + LIMIT;
        let mut output = String::new();
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    if let Some(address) = address_in(&line) {
                        node.address = address;
                        return Ok(node);
                    }
                    output += &line;
                }
                Err(reason) => {
                    let what = match reason {
                        RecvTimeoutError::Timeout => {
                            format!("{} was not served within {LIMIT:?}", image.display())
                        }
                        RecvTimeoutError::Disconnected => format!("{} could not be served", image.display()),
                    };
                    output += &std::fs::read_to_string(log.path()).unwrap_or_default();
                    return Err(VmError::Node { what, output });
                }
            }
        }
    }
}

impl Drop for HostNode {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// `basalt check` of an image on the host, which must find nothing wrong.
pub fn check(program: &Path, image: &Path) -> Result<()> {
    let Ended { code, stdout, stderr } =
        run(std::process::Command::new(program).args(["check", "--device"]).arg(image), LIMIT)?;
    if code == Some(0) {
        return Ok(());
    }
    let what = format!("`basalt check` of {} ended with {code:?}", image.display());
    Err(VmError::Node { what, output: stdout + &stderr })
}

/// The address in a ready line: what follows `listening on `.
fn address_in(line: &str) -> Option<SocketAddr> {
    line.split_once("listening on ")?.1.split_whitespace().next()?.parse().ok()
}
