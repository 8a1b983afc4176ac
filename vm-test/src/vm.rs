//! A running guest: booted with a limit and one retry, used over its serial port, stopped or cut off.

use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::error::{Result, VmError};
use crate::guest_image;
use crate::host::{end, say, wait};
use crate::machine::{Accelerator, Machine, Paths};
use crate::monitor::Monitor;
use crate::packages::Packages;
use crate::serial::{Answer, Serial, Silence};

/// Until the first byte on the console. Under KVM, a guest that says nothing by then is stuck in the processor's
/// virtualisation; an emulated one is only slow on a busy machine.
fn first_line_limit(accelerator: Accelerator) -> Duration {
    Duration::from_secs(match accelerator {
        Accelerator::Kvm => 30,
        Accelerator::Tcg => 120,
    })
}

/// From the first byte to the first command.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// For a command that has nothing to wait for.
const COMMAND_LIMIT: Duration = Duration::from_secs(300);

/// For a guest to power itself off.
const STOP_LIMIT: Duration = Duration::from_secs(120);

/// How often a boot is tried.
const BOOT_COUNT_MAX: u32 = 2;

/// A guest that runs.
#[derive(Debug)]
pub struct Vm {
    machine: Machine,
    qemu: Child,
    serial: Mutex<Serial>,
    host_ports: Vec<u16>,
    directory: TempDir,
}

impl Vm {
    /// Boots a machine.
    pub fn boot(machine: &Machine) -> Result<Vm> {
        let packages = Packages::get()?;
        Vm::boot_with(machine, &packages, accelerator(&packages)?)
    }

    fn boot_with(machine: &Machine, packages: &Packages, accelerator: Accelerator) -> Result<Vm> {
        for attempt in 1.. {
            match Vm::try_boot(machine, packages, accelerator) {
                Err(error) if attempt < BOOT_COUNT_MAX => say(format!("booting once more, since {error}")),
                result => return result,
            }
        }
        unreachable!("the last attempt returns")
    }

    fn try_boot(machine: &Machine, packages: &Packages, accelerator: Accelerator) -> Result<Vm> {
        // Sockets have short names at most, hence not beside the build.
        let directory = tempfile::Builder::new()
            .prefix("basalt-vm-")
            .tempdir()
            .map_err(VmError::os("make a directory in", std::env::temp_dir()))?;
        let host_ports = free_ports(machine.ports.len())?;
        let mut command = qemu(machine, packages, accelerator, directory.path(), &host_ports, false)?;
        let console = directory.path().join("console.log");
        let errors = directory.path().join("qemu.log");
        let log = std::fs::File::create(&errors).map_err(VmError::os("create", &errors))?;
        command.arg("-serial").arg(format!("file:{}", console.display())).args(["-serial", "stdio"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut qemu = command.spawn().map_err(VmError::os("start", "qemu-system-x86_64"))?;
        let (Some(to_guest), Some(from_guest)) = (qemu.stdin.take(), qemu.stdout.take()) else {
            unreachable!("both were asked for as pipes")
        };
        let serial = Mutex::new(Serial::new(to_guest, from_guest));
        // From here on, dropping ends QEMU.
        let mut vm = Vm { machine: machine.clone(), qemu, serial, host_ports, directory };
        vm.wait_for_first_line(&console, first_line_limit(accelerator))?;
        let hello = vm.serial.get_mut().unwrap_or_else(PoisonError::into_inner).wait_for_hello(BOOT_LIMIT);
        hello.map_err(|silence| vm.silence("the guest to come up", silence, BOOT_LIMIT))?;
        Ok(vm)
    }

    fn wait_for_first_line(&mut self, console: &Path, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        while std::fs::metadata(console).map_or(0, |metadata| metadata.len()) == 0 {
            if let Ok(Some(status)) = self.qemu.try_wait() {
                let what = format!("QEMU ended at once ({status})");
                return Err(VmError::MachineEnded { what, console: self.console() });
            }
            if Instant::now() > deadline {
                return Err(self.silence("the guest's first line", Silence::TimedOut, limit));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// What this machine consists of.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Where the host reaches a port of the guest. A connection is accepted even while nothing listens in the guest.
    pub fn host_address(&self, guest_port: u16) -> SocketAddr {
        let at = self.machine.ports.iter().position(|port| *port == guest_port);
        let at = at.expect("only ports of the machine's description are asked for");
        (Ipv4Addr::LOCALHOST, self.host_ports[at]).into()
    }

    /// Runs a command in the guest, whatever its exit code.
    pub fn try_run(&self, command: &str, limit: Duration) -> Result<Answer> {
        let answer = self.serial.lock().unwrap_or_else(PoisonError::into_inner).run(command, limit);
        answer.map_err(|silence| self.silence(&format!("`{command}` in the guest"), silence, limit))
    }

    /// Runs a command in the guest that must end with this exit code, and returns what it printed.
    pub fn expect(&self, wanted: i32, command: &str, limit: Duration) -> Result<String> {
        let Answer { code, output } = self.try_run(command, limit)?;
        if code == wanted {
            return Ok(output);
        }
        Err(VmError::Guest { command: command.to_owned(), code, wanted, output })
    }

    /// Runs a command in the guest that must succeed.
    pub fn run(&self, command: &str) -> Result<String> {
        self.expect(0, command, COMMAND_LIMIT)
    }

    /// QEMU's monitor.
    pub fn monitor(&self) -> Result<Monitor> {
        Monitor::connect(&self.monitor_socket())
    }

    fn monitor_socket(&self) -> PathBuf {
        self.directory.path().join("monitor")
    }

    /// What QEMU and the guest's kernel have said.
    pub fn console(&self) -> String {
        let read = |name| std::fs::read(self.directory.path().join(name)).unwrap_or_default();
        let text = |name| String::from_utf8_lossy(&read(name)).replace('\r', "");
        format!("--- QEMU\n{}--- console\n{}", text("qemu.log"), text("console.log"))
    }

    /// Stops the guest cleanly.
    pub fn stop(mut self) -> Result<()> {
        // The answer to this one never comes: the port is closed instead.
        let off = self.try_run("sync; poweroff -f; sleep 1000", STOP_LIMIT);
        if let Err(VmError::TimedOut { .. }) | Ok(_) = off {
            let what = "the guest did not power itself off".into();
            return Err(VmError::MachineEnded { what, console: self.console() });
        }
        match wait(&mut self.qemu, STOP_LIMIT) {
            Some(status) if status.success() => Ok(()),
            ended => {
                let what = format!("QEMU ended badly after the guest had powered off: {ended:?}");
                Err(VmError::MachineEnded { what, console: self.console() })
            }
        }
    }

    /// Ends the machine at once. What its drives had not been told to flush is still in their images: only
    /// [`crate::write_log`] makes a power cut of it.
    pub fn kill(&mut self) {
        end(&mut self.qemu);
    }

    fn silence(&self, what: &str, silence: Silence, limit: Duration) -> VmError {
        let what = what.to_owned();
        match silence {
            Silence::TimedOut => VmError::TimedOut { what, limit, context: self.console() },
            Silence::Closed => {
                let what = format!("the machine ended while waiting for: {what}");
                VmError::MachineEnded { what, console: self.console() }
            }
            Silence::Garbled(came) => {
                let what = format!("the serial port gave {came} while waiting for: {what}");
                VmError::MachineEnded { what, console: self.console() }
            }
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A shell in a guest for a person, on this terminal.
pub fn shell(machine: &Machine) -> Result<()> {
    let packages = Packages::get()?;
    let accelerator = accelerator(&packages)?;
    let directory = tempfile::tempdir().map_err(VmError::os("make a directory in", std::env::temp_dir()))?;
    let host_ports = free_ports(machine.ports.len())?;
    for (guest, host) in machine.ports.iter().zip(&host_ports) {
        say(format!("port {guest} of the guest is 127.0.0.1:{host} here (listen on 10.0.2.15 there)"));
    }
    let mut command = qemu(machine, &packages, accelerator, directory.path(), &host_ports, true)?;
    command.args(["-serial", "mon:stdio"]);
    let status = command.status().map_err(VmError::os("start", "qemu-system-x86_64"))?;
    if status.success() {
        return Ok(());
    }
    let what = format!("QEMU ended badly: {status}");
    Err(VmError::MachineEnded { what, console: String::new() })
}

fn qemu(
    machine: &Machine,
    packages: &Packages,
    accelerator: Accelerator,
    directory: &Path,
    host_ports: &[u16],
    shell: bool,
) -> Result<std::process::Command> {
    let initrd = directory.join("guest.cpio");
    guest_image::write(&initrd, packages, &machine.programs)?;
    let (kernel, monitor) = (packages.kernel()?, directory.join("monitor"));
    let paths = Paths { kernel: &kernel, initrd: &initrd, monitor: &monitor };
    let mut command = packages.qemu();
    command.args(machine.arguments(accelerator, &paths, host_ports, shell));
    Ok(command)
}

/// KVM where a trial boot under it succeeds, else emulation; tried once a process, and said.
fn accelerator(packages: &Packages) -> Result<Accelerator> {
    static CHOICE: OnceLock<Accelerator> = OnceLock::new();
    static TRIAL: Mutex<()> = Mutex::new(());
    let _one_at_a_time = TRIAL.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(choice) = CHOICE.get() {
        return Ok(*choice);
    }
    let (choice, why) = match kvm_trial(packages) {
        Ok(()) => (Accelerator::Kvm, "a trial boot under it succeeded".to_string()),
        Err(why) => (Accelerator::Tcg, why),
    };
    say(match choice {
        Accelerator::Kvm => format!("using KVM: {why}"),
        Accelerator::Tcg => {
            format!("emulating the processor (TCG), since {why}: slow, and no measure of speed")
        }
    });
    Ok(*CHOICE.get_or_init(|| choice))
}

/// A writable /dev/kvm proves nothing: where the host is itself a guest, it may open and then hang in the guest's kernel.
fn kvm_trial(packages: &Packages) -> std::result::Result<(), String> {
    let mut flags = String::new();
    let read = std::fs::File::open("/proc/cpuinfo").and_then(|mut file| file.read_to_string(&mut flags));
    if read.is_err() || !flags.split_whitespace().any(|flag| flag == "vmx" || flag == "svm") {
        return Err("/proc/cpuinfo shows neither vmx nor svm".into());
    }
    let kvm = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    kvm.map_err(|error| format!("/dev/kvm cannot be opened ({error})"))?;
    let machine = Machine { memory_mib: 256, ..Machine::default() };
    let vm = Vm::try_boot(&machine, packages, Accelerator::Kvm);
    vm.map(drop).map_err(|_| "a trial boot under KVM failed".into())
}

/// Ports that nothing listens on now. Another program may take one before QEMU does, which the retry is for.
fn free_ports(count: usize) -> Result<Vec<u16>> {
    let bind = || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(VmError::os("listen on", "127.0.0.1"));
    // All at once, so that they differ.
    let listeners: Vec<TcpListener> = (0..count).map(|_| bind()).collect::<Result<_>>()?;
    let port = |listener: &TcpListener| listener.local_addr().map(|address| address.port());
    listeners.iter().map(|one| port(one).map_err(VmError::os("listen on", "127.0.0.1"))).collect()
}
