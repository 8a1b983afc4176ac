//! An NVMe/TCP target on loopback: SPDK's own nvmf_tgt as a child process, set up over its JSON-RPC socket.
//!
//! Each target has a socket and a port of its own and runs on ordinary pages, so that any number can be there at once and
//! nobody's hugepages are touched.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long the target may take to start or to answer: about hangs, not about speed.
const DEADLINE: Duration = Duration::from_secs(60);

/// What a subsystem exports.
#[derive(Debug, Clone)]
pub enum Backing {
    /// Memory of the target, which dies with it.
    Malloc { size_mib: u64, block_size: u32 },
    /// A file, through Linux AIO.
    File { path: PathBuf, block_size: u32 },
    /// Memory that fails when it is told to.
    Faulty { size_mib: u64, block_size: u32 },
    /// Memory that takes its time for reads and writes.
    Slow { size_mib: u64, block_size: u32, delay: Duration },
}

impl Backing {
    fn memory_mib(&self) -> u64 {
        match self {
            Backing::Malloc { size_mib, .. }
            | Backing::Faulty { size_mib, .. }
            | Backing::Slow { size_mib, .. } => *size_mib,
            Backing::File { .. } => 0,
        }
    }
}

/// What a target needs of memory beside what it exports.
const MEMORY_MIB: u64 = 512;

/// A running target.
pub struct Target {
    child: Child,
    directory: tempfile::TempDir,
    port: u16,
    backings: Vec<Backing>,
}

impl Target {
    /// Starts a target with one subsystem for each backing.
    #[track_caller]
    pub fn start(backings: &[Backing]) -> Target {
        let directory = tempfile::tempdir().expect("a directory for the socket");
        let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr());
        let port = port.expect("a free port").port();
        let child = spawn(directory.path(), backings);
        let mut target = Target { child, directory, port, backings: backings.to_vec() };
        target.set_up();
        target
    }

    /// The name of the subsystem of a backing, for `--device`.
    pub fn transport_id(&self, index: usize) -> String {
        format!("trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:{} subnqn:{}", self.port, nqn(index))
    }

    /// SIGKILL; connections are reset, and what only the target held is lost.
    pub fn kill(&mut self) {
        self.child.kill().expect("the target can be killed");
        self.child.wait().expect("the target can be reaped");
    }

    /// Starts a killed target again, at the same port and with the same subsystems.
    pub fn restart(&mut self) {
        let _ = std::fs::remove_file(self.socket());
        self.child = spawn(self.directory.path(), &self.backings);
        self.set_up();
    }

    /// Takes the namespace of a subsystem away from its hosts.
    pub fn remove_namespace(&self, index: usize) {
        self.call("nvmf_subsystem_remove_ns", json!({ "nqn": nqn(index), "nsid": 1 }));
    }

    /// SIGSTOP: nothing is answered, and no connection ends.
    pub fn pause(&self) {
        self.signal(rustix::process::Signal::STOP);
    }

    pub fn resume(&self) {
        self.signal(rustix::process::Signal::CONT);
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).expect("a child has an id");
        rustix::process::kill_process(pid, signal).expect("the target can be signalled");
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("rpc")
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }

    #[track_caller]
    fn set_up(&mut self) {
        let deadline = Instant::now() + DEADLINE;
        while UnixStream::connect(self.socket()).is_err() || !self.is_ready() {
            if let Some(status) = self.child.try_wait().expect("the target can be waited for") {
                panic!("nvmf_tgt ended with {status}:\n{}", self.log());
            }
            assert!(Instant::now() < deadline, "nvmf_tgt does not answer:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
        // Looking for partitions, the target would find the table that Basalt writes and claim the device for its partition.
        self.call("bdev_set_options", json!({ "bdev_auto_examine": false }));
        self.call("framework_start_init", json!({}));
        self.call("nvmf_create_transport", json!({ "trtype": "TCP" }));
        for (index, backing) in self.backings.clone().iter().enumerate() {
            let name = self.create(&format!("bdev{index}"), backing);
            let serial = format!("BASALT{index:014}");
            let params = json!({ "nqn": nqn(index), "allow_any_host": true, "serial_number": serial });
            self.call("nvmf_create_subsystem", params);
            // The identifiers of a restarted target must be the same, or it would be another device.
            let nguid = format!("{:032X}", 0xBA5A_0000 + index as u64);
            let namespace = json!({ "nsid": 1, "bdev_name": name, "nguid": nguid });
            self.call("nvmf_subsystem_add_ns", json!({ "nqn": nqn(index), "namespace": namespace }));
            let listener = json!({ "nqn": nqn(index), "listen_address": self.address() });
            self.call("nvmf_subsystem_add_listener", listener);
        }
    }

    /// Creates what a subsystem exports and returns its name.
    #[track_caller]
    fn create(&self, name: &str, backing: &Backing) -> String {
        match backing {
            Backing::File { path, block_size } => {
                let params = json!({ "name": name, "filename": path, "block_size": block_size });
                self.call("bdev_aio_create", params);
                name.to_owned()
            }
            Backing::Malloc { size_mib, block_size } => {
                let blocks = (size_mib << 20) / u64::from(*block_size);
                let params = json!({ "name": name, "num_blocks": blocks, "block_size": block_size });
                self.call("bdev_malloc_create", params);
                name.to_owned()
            }
            Backing::Faulty { size_mib, block_size } => {
                self.create(name, &Backing::Malloc { size_mib: *size_mib, block_size: *block_size });
                self.call("bdev_error_create", json!({ "base_name": name }));
                format!("EE_{name}")
            }
            Backing::Slow { size_mib, block_size, delay } => {
                self.create(name, &Backing::Malloc { size_mib: *size_mib, block_size: *block_size });
                let (slow, delay_us) = (format!("slow_{name}"), delay.as_micros() as u64);
                let params = json!({
                    "base_bdev_name": name, "name": slow, "avg_read_latency": delay_us, "p99_read_latency": delay_us,
                    "avg_write_latency": delay_us, "p99_write_latency": delay_us,
                });
                self.call("bdev_delay_create", params);
                slow
            }
        }
    }

    /// Has the next `count` commands of a kind (`read`, `write`, `flush`) on a faulty backing fail.
    pub fn inject_failures(&self, index: usize, kind: &str, count: u32) {
        let name = format!("EE_bdev{index}");
        let params = json!({ "name": name, "io_type": kind, "error_type": "failure", "num": count });
        self.call("bdev_error_inject_error", params);
    }

    /// Nothing fails any more.
    pub fn clear_failures(&self, index: usize) {
        let params =
            json!({ "name": format!("EE_bdev{index}"), "io_type": "clear", "error_type": "failure" });
        self.call("bdev_error_inject_error", params);
    }

    /// Ends every connection to a subsystem and lets hosts connect anew.
    pub fn drop_connections(&self, index: usize) {
        let listener = json!({ "nqn": nqn(index), "listen_address": self.address() });
        self.call("nvmf_subsystem_remove_listener", listener.clone());
        self.call("nvmf_subsystem_add_listener", listener);
    }

    /// Looks at the size of a file again, which may have grown.
    pub fn rescan(&self, index: usize) {
        self.call("bdev_aio_rescan", json!({ "name": format!("bdev{index}") }));
    }

    /// Starts a killed target again with something else behind the first subsystem.
    pub fn restart_with(&mut self, backing: Backing) {
        self.backings[0] = backing;
        self.restart();
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    fn address(&self) -> Value {
        json!({ "trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": self.port.to_string() })
    }

    fn is_ready(&self) -> bool {
        self.try_call("rpc_get_methods", json!({})).is_some_and(|answer| answer.get("result").is_some())
    }

    #[track_caller]
    fn call(&self, method: &str, params: Value) -> Value {
        let answer = self.try_call(method, params.clone());
        match answer {
            Some(mut answer) if answer.get("result").is_some() => answer["result"].take(),
            answer => panic!("{method} {params}: {answer:?}\n{}", self.log()),
        }
    }

    fn try_call(&self, method: &str, params: Value) -> Option<Value> {
        let mut stream = UnixStream::connect(self.socket()).ok()?;
        stream.set_read_timeout(Some(DEADLINE)).ok()?;
        let mut request = json!({ "jsonrpc": "2.0", "id": 1, "method": method });
        if params.as_object().is_some_and(|params| !params.is_empty()) {
            request["params"] = params;
        }
        stream.write_all(request.to_string().as_bytes()).ok()?;
        let (mut answer, mut part) = (Vec::new(), [0; 4096]);
        loop {
            let count = stream.read(&mut part).ok().filter(|count| *count > 0)?;
            answer.extend_from_slice(&part[..count]);
            if let Ok(value) = serde_json::from_slice(&answer) {
                return Some(value);
            }
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn nqn(index: usize) -> String {
    format!("nqn.2016-06.io.spdk:basalt{index}")
}

fn spawn(directory: &Path, backings: &[Backing]) -> Child {
    let memory_mib = MEMORY_MIB + backings.iter().map(Backing::memory_mib).sum::<u64>();
    let log = std::fs::OpenOptions::new().create(true).append(true).open(directory.join("log"));
    let log = log.expect("a log file for the target");
    Command::new(program())
        .args([
            "--wait-for-rpc",
            "--no-huge",
            "-s",
            &memory_mib.to_string(),
            "--no-pci",
            "--disable-cpumask-locks",
            "-m",
            &format!("[{}]", core()),
            "-r",
        ])
        .arg(directory.join("rpc"))
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("a second handle of the log"))
        .stderr(log)
        .spawn()
        .expect("nvmf_tgt can be started")
}

/// The core that targets poll: the last one that this process may use, since most other things run on the first.
pub fn core() -> usize {
    core_affinity::get_core_ids().unwrap_or_default().iter().map(|core| core.id).max().unwrap_or(0)
}

/// `BASALT_NVMF_TGT`, or what `scripts/setup-spdk --with-target` finds or builds.
pub fn program() -> PathBuf {
    if let Some(path) = std::env::var_os("BASALT_NVMF_TGT") {
        return path.into();
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/setup-spdk");
    let output =
        Command::new(script).arg("--with-target").output().expect("scripts/setup-spdk can be started");
    let found = String::from_utf8_lossy(&output.stdout).lines().last().unwrap_or_default().to_owned();
    assert!(output.status.success(), "scripts/setup-spdk: {}", String::from_utf8_lossy(&output.stderr));
    Path::new(&found).join("build/bin/nvmf_tgt")
}
