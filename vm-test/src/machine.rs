//! What a virtual machine consists of, and QEMU's command line for it.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// One namespace, backed by a raw image on the host.
#[derive(Debug, Clone)]
pub struct Namespace {
    /// Its bytes.
    pub image: PathBuf,
    /// Bytes of one block.
    pub block_size: u32,
    /// Whether Identify tells of a volatile write cache. Only the log of writes makes it one that can be lost.
    pub volatile_cache: bool,
    /// Every write and flush is noted here, for [`crate::write_log`].
    pub write_log: Option<PathBuf>,
}

impl Namespace {
    /// With 512-byte blocks and a volatile cache, as most drives of consumers have.
    pub fn new(image: impl Into<PathBuf>) -> Namespace {
        Namespace { image: image.into(), block_size: 512, volatile_cache: true, write_log: None }
    }

    /// With blocks of another size.
    pub fn block_size(mut self, block_size: u32) -> Namespace {
        self.block_size = block_size;
        self
    }

    /// Notes every write in a log.
    pub fn write_log(mut self, log: impl Into<PathBuf>) -> Namespace {
        self.write_log = Some(log.into());
        self
    }
}

/// One NVMe controller.
#[derive(Debug, Clone)]
pub struct Controller {
    /// Its namespaces, numbered from 1.
    pub namespaces: Vec<Namespace>,
    /// In a slot that it can be taken out of; its address is then on bus 1 and up.
    pub removable: bool,
}

/// A virtual machine.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Bytes, in MiB.
    pub memory_mib: u32,
    /// Processors.
    pub cpu_count: u32,
    /// Whether there is an IOMMU: user space then drives controllers through vfio-pci.
    pub iommu: bool,
    /// Whether the guest's kernel drives NVMe controllers at first. Without it, nothing but a case touches them.
    pub kernel_nvme: bool,
    /// Controllers; the first sits at 0000:00:04.0 unless it is removable, the next one at 05.0.
    pub controllers: Vec<Controller>,
    /// TCP ports of the guest that the host reaches.
    pub ports: Vec<u16>,
    /// Programs of the host that the guest has in /bin, with their libraries.
    pub programs: Vec<PathBuf>,
}

impl Default for Machine {
    fn default() -> Machine {
        Machine {
            memory_mib: 1024,
            cpu_count: 2,
            iommu: false,
            kernel_nvme: true,
            controllers: Vec::new(),
            ports: Vec::new(),
            programs: Vec::new(),
        }
    }
}

/// The slot of the first controller on the root bus.
const FIRST_SLOT: usize = 4;

/// How the guest's processor is had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The host's processor.
    Kvm,
    /// Emulation. No AVX: programs for the guest are built for x86-64-v2.
    Tcg,
}

/// Where one run of a machine has its files.
#[derive(Debug, Clone)]
pub struct Paths<'a> {
    /// The kernel.
    pub kernel: &'a Path,
    /// The guest's file system.
    pub initrd: &'a Path,
    /// QEMU's monitor, a socket.
    pub monitor: &'a Path,
}

impl Machine {
    /// A machine with one controller that has these namespaces.
    pub fn with_namespaces(namespaces: Vec<Namespace>) -> Machine {
        Machine { controllers: vec![Controller { namespaces, removable: false }], ..Machine::default() }
    }

    /// The PCI address of a controller in the guest.
    pub fn address(&self, controller: usize) -> String {
        if self.controllers[controller].removable {
            // Bus numbers go to the root ports in their order, from 1.
            let before = self.controllers[..controller].iter().filter(|one| one.removable).count();
            format!("0000:{:02x}:00.0", before + 1)
        } else {
            format!("0000:00:{:02x}.0", FIRST_SLOT + controller)
        }
    }

    /// QEMU's arguments, but for the serial ports. `host_ports` are those that the guest's ports appear on.
    pub fn arguments(
        &self,
        accelerator: Accelerator,
        paths: &Paths,
        host_ports: &[u16],
        shell: bool,
    ) -> Vec<String> {
        let mut arguments: Vec<String> = Vec::new();
        let mut add = |words: &[&str]| arguments.extend(words.iter().map(|word| (*word).to_string()));
        match accelerator {
            Accelerator::Kvm => add(&["-accel", "kvm", "-cpu", "host"]),
            Accelerator::Tcg => add(&["-accel", "tcg,thread=multi", "-cpu", "max,la57=off"]),
        }
        add(&["-M", "q35,kernel_irqchip=split"]);
        if self.iommu {
            // 39 address bits, the default, are too few for the addresses that DPDK chooses.
            add(&["-device", "intel-iommu,intremap=on,caching-mode=on,aw-bits=48"]);
        }
        add(&["-m", &format!("{}M", self.memory_mib), "-smp", &self.cpu_count.to_string()]);
        add(&["-nodefaults", "-display", "none", "-no-reboot"]);
        add(&["-kernel", &path(paths.kernel), "-initrd", &path(paths.initrd)]);
        add(&["-append", &self.kernel_line(shell)]);
        add(&["-qmp", &format!("unix:{},server=on,wait=off", path(paths.monitor))]);
        let forwards: Vec<String> = self
            .ports
            .iter()
            .zip(host_ports)
            .map(|(guest, host)| format!(",hostfwd=tcp:127.0.0.1:{host}-:{guest}"))
            .collect();
        // Restricted: the guest reaches nothing outside.
        add(&["-netdev", &format!("user,id=net0,restrict=on{}", forwards.concat())]);
        add(&["-device", "virtio-net-pci,netdev=net0,romfile="]);
        for (number, controller) in self.controllers.iter().enumerate() {
            for argument in controller_arguments(number, controller) {
                add(&[&argument]);
            }
        }
        arguments
    }

    fn kernel_line(&self, shell: bool) -> String {
        // Emulated on a busy machine, the timer may miss the kernel's test of it, which then panics.
        let mut line = "console=ttyS0 quiet panic=-1 init_on_alloc=0 mitigations=off nokaslr tsc=reliable no_timer_check"
            .to_string();
        if self.iommu {
            line += " intel_iommu=on";
        }
        if !self.kernel_nvme {
            line += " initcall_blacklist=nvme_init";
        }
        if shell {
            line += " basalt.shell";
        }
        line
    }
}

fn controller_arguments(number: usize, controller: &Controller) -> Vec<String> {
    let mut arguments = Vec::new();
    if controller.removable {
        let slot = FIRST_SLOT + number;
        let port = format!("pcie-root-port,id=port{number},chassis={slot},addr={slot:02x}.0");
        arguments.extend(["-device".into(), port]);
    }
    for (index, namespace) in controller.namespaces.iter().enumerate() {
        for node in block_nodes(&namespace_name(number, index), namespace) {
            arguments.extend(["-blockdev".into(), node.to_string()]);
        }
    }
    for device in devices(number, controller) {
        arguments.extend(["-device".into(), device.to_string()]);
    }
    arguments
}

/// A controller and its namespaces, as QEMU's `-device` takes them.
fn devices(number: usize, controller: &Controller) -> Vec<Value> {
    let name = format!("nvme{number}");
    let mut device = json!({"driver": "nvme", "id": name, "serial": format!("BASALT{number}")});
    if controller.removable {
        device["bus"] = format!("port{number}").into();
    } else {
        device["bus"] = "pcie.0".into();
        device["addr"] = format!("{:02x}.0", FIRST_SLOT + number).into();
    }
    let mut devices = vec![device];
    for (index, namespace) in controller.namespaces.iter().enumerate() {
        let id = namespace_name(number, index);
        devices.push(json!({
            "driver": "nvme-ns",
            "drive": format!("{id}-drive"),
            "id": id,
            "bus": name,
            "nsid": index + 1,
            "logical_block_size": namespace.block_size,
            "physical_block_size": namespace.block_size,
            "write-cache": if namespace.volatile_cache { "on" } else { "off" },
        }));
    }
    devices
}

/// The name of a namespace among QEMU's devices, as the guest's kernel names it too.
pub fn namespace_name(controller: usize, index: usize) -> String {
    format!("nvme{controller}n{}", index + 1)
}

/// QEMU's block nodes under a namespace; the topmost is `NAME-drive`.
fn block_nodes(name: &str, namespace: &Namespace) -> Vec<Value> {
    let drive = format!("{name}-drive");
    let file = |node: &str, file: &Path| json!({"driver": "file", "node-name": node, "filename": path(file)});
    match &namespace.write_log {
        None => vec![file(&drive, &namespace.image)],
        Some(log) => {
            let (data, noted) = (format!("{name}-data"), format!("{name}-log"));
            vec![
                file(&data, &namespace.image),
                file(&noted, log),
                json!({
                    "driver": "blklogwrites",
                    "node-name": drive,
                    "file": data,
                    "log": noted,
                    "log-sector-size": crate::write_log::SECTOR_SIZE,
                }),
            ]
        }
    }
}

fn path(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_the_command_line() {
        let namespaces = || vec![Namespace::new("a.img")];
        let controller = |removable| Controller { namespaces: namespaces(), removable };
        let machine = Machine {
            controllers: vec![controller(false), controller(true), controller(false), controller(true)],
            ..Machine::default()
        };
        let addresses: Vec<String> = (0..4).map(|number| machine.address(number)).collect();
        assert_eq!(addresses, ["0000:00:04.0", "0000:01:00.0", "0000:00:06.0", "0000:02:00.0"]);
        let paths = Paths { kernel: Path::new("k"), initrd: Path::new("i"), monitor: Path::new("m") };
        let line = machine.arguments(Accelerator::Tcg, &paths, &[], false).join(" ");
        for part in ["\"addr\":\"04.0\"", "\"port1\"", "\"addr\":\"06.0\"", "\"port3\"", "\"id\":\"nvme2n1\""]
        {
            assert!(line.contains(part), "{part} is not in {line}");
        }
    }

    #[test]
    fn the_kernel_is_told_what_to_keep_off() {
        let line =
            |iommu, kernel_nvme| Machine { iommu, kernel_nvme, ..Machine::default() }.kernel_line(false);
        assert!(!line(false, true).contains("iommu") && !line(false, true).contains("nvme"));
        assert!(line(true, true).contains("intel_iommu=on") && !line(true, true).contains("nvme"));
        assert!(line(false, false).contains("initcall_blacklist=nvme_init"));
    }
}
