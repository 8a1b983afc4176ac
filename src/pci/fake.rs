//! A machine for tests: a tree of files in a temporary directory, and a kernel that answers writes to it the way the real
//! one does, or fails where a test wants it to.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::system::{Kernel, ProcessFacts, System};

/// Bytes of every disk.
pub const DISK_SIZE: u64 = 64 << 20;

/// What the kernel does and remembers.
pub struct FakeKernel {
    root: PathBuf,
    /// Writes, in order: path and text.
    pub writes: Vec<(String, String)>,
    /// Modules that can be loaded.
    pub modules: HashSet<String>,
    /// Modules that were.
    pub loaded: Vec<String>,
    /// Paths in /dev that somebody has claimed.
    pub claimed: HashSet<String>,
    /// Writes to paths that end so fail with this error number, so many times.
    pub failing: HashMap<String, (i32, u32)>,
    /// A write to a path that ends so makes the device vanish.
    pub vanish_at: Option<String>,
    /// Drivers that refuse every device.
    pub refusing: HashSet<String>,
    /// Pages that the machine can find.
    pub pages_max: u64,
    pub is_root: bool,
    pub memlock: Option<u64>,
}

/// The machine.
pub struct Machine {
    directory: tempfile::TempDir,
    pub kernel: Rc<RefCell<FakeKernel>>,
}

struct Handle(Rc<RefCell<FakeKernel>>);

impl Machine {
    /// With /proc, the drivers nvme and vfio-pci, VFIO's parts, and enough memory; without devices.
    pub fn new() -> Machine {
        let directory = tempfile::tempdir().unwrap();
        let kernel = FakeKernel {
            root: directory.path().to_owned(),
            writes: Vec::new(),
            modules: HashSet::new(),
            loaded: Vec::new(),
            claimed: HashSet::new(),
            failing: HashMap::new(),
            vanish_at: None,
            refusing: HashSet::new(),
            pages_max: u64::MAX,
            is_root: true,
            memlock: None,
        };
        let machine = Machine { directory, kernel: Rc::new(RefCell::new(kernel)) };
        machine.mount("259:9", "/", "ext4", "/dev/sda1");
        machine.write("/proc/swaps", "Filename\tType\tSize\tUsed\tPriority\n");
        machine.write("/proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n");
        for driver in ["nvme", "vfio-pci"] {
            machine.write(&format!("/sys/bus/pci/drivers/{driver}/bind"), "");
            machine.write(&format!("/sys/bus/pci/drivers/{driver}/unbind"), "");
        }
        machine.write("/sys/bus/pci/drivers_probe", "");
        machine.write("/sys/module/vfio_iommu_type1/refcnt", "0");
        machine.set_hugepages(Some(0), 0, 0);
        machine
    }

    pub fn system(&self) -> System {
        System::new(self.directory.path(), Handle(Rc::clone(&self.kernel)))
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join(path.trim_start_matches('/'))
    }

    pub fn write(&self, path: &str, text: impl AsRef<[u8]>) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    pub fn append(&self, path: &str, text: &str) {
        let old = std::fs::read_to_string(self.path(path)).unwrap_or_default();
        self.write(path, old + text);
    }

    pub fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.path(path)).unwrap().trim().to_owned()
    }

    pub fn link(&self, path: &str, target: &str) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let _ = std::fs::remove_file(&path);
        symlink(target, path).unwrap();
    }

    pub fn remove(&self, path: &str) {
        let path = self.path(path);
        if path.is_symlink() || path.is_file() {
            std::fs::remove_file(path).unwrap();
        } else {
            std::fs::remove_dir_all(path).unwrap();
        }
    }

    pub fn driver_of(&self, bdf: &str) -> Option<String> {
        self.kernel.borrow().driver_of(bdf)
    }

    /// A controller with the kernel's driver, an IOMMU group and one blank namespace, `NAMEn1` with the number 259:0 (or
    /// the next ten).
    pub fn add_disk(&self, bdf: &str, name: &str, serial: &str) {
        let device = format!("/sys/bus/pci/devices/{bdf}");
        self.write(&format!("{device}/class"), "0x010802\n");
        self.write(&format!("{device}/vendor"), "0x1234\n");
        self.write(&format!("{device}/device"), "0x5678\n");
        self.write(&format!("{device}/numa_node"), "0\n");
        self.write(&format!("{device}/driver_override"), "(null)\n");
        self.link(&format!("{device}/driver"), "../../drivers/nvme");
        self.link(&format!("{device}/iommu_group"), "../../../../kernel/iommu_groups/7");
        self.write(&format!("/sys/kernel/iommu_groups/7/devices/{bdf}"), "");
        self.write("/sys/kernel/iommu_groups/7/type", "DMA-FQ\n");
        for (attribute, text) in
            [("model", "Fake Disk   "), ("serial", serial), ("firmware_rev", "1.0"), ("state", "live")]
        {
            self.write(&format!("{device}/nvme/{name}/{attribute}"), text);
        }
        self.add_namespace(bdf, name, 1);
    }

    /// Another namespace.
    pub fn add_namespace(&self, bdf: &str, name: &str, id: u32) {
        let disk = format!("{name}n{id}");
        let disks = self.list_disks();
        self.write(&format!("/sys/bus/pci/devices/{bdf}/nvme/{name}/{disk}/nsid"), id.to_string());
        let block = format!("/sys/class/block/{disk}");
        self.write(&format!("{block}/dev"), format!("259:{}", disks * 10));
        self.write(&format!("{block}/nsid"), id.to_string());
        self.write(&format!("{block}/size"), (DISK_SIZE / 512).to_string());
        self.write(&format!("{block}/queue/logical_block_size"), "512");
        self.write(&format!("/dev/{disk}"), "");
        File::options()
            .write(true)
            .open(self.path(&format!("/dev/{disk}")))
            .unwrap()
            .set_len(DISK_SIZE)
            .unwrap();
    }

    fn list_disks(&self) -> usize {
        std::fs::read_dir(self.path("/sys/class/block")).map_or(0, Iterator::count)
    }

    /// Puts the kernel's multipath between: the path below the controller is hidden, the disk is the subsystem's.
    pub fn make_multipath(&self, bdf: &str, name: &str, subsystem: u32) {
        let controller = format!("/sys/bus/pci/devices/{bdf}/nvme/{name}");
        let instance = name.trim_start_matches("nvme");
        std::fs::rename(
            self.path(&format!("{controller}/{name}n1")),
            self.path(&format!("{controller}/nvme{subsystem}c{instance}n1")),
        )
        .unwrap();
        let head = format!("nvme{subsystem}n1");
        for directory in ["/sys/class/block", "/dev"] {
            let from = self.path(&format!("{directory}/{name}n1"));
            std::fs::rename(from, self.path(&format!("{directory}/{head}"))).unwrap();
        }
    }

    /// A partition that the kernel sees, in 512-byte units.
    pub fn add_partition(&self, disk: &str, number: u32, start: u64, size: u64) {
        let name = format!("{disk}p{number}");
        let minor: u32 = self.read(&format!("/sys/class/block/{disk}/dev"))[4..].parse().unwrap();
        for directory in [format!("/sys/class/block/{disk}/{name}"), format!("/sys/class/block/{name}")] {
            self.write(&format!("{directory}/partition"), number.to_string());
            self.write(&format!("{directory}/dev"), format!("259:{}", minor + number));
            self.write(&format!("{directory}/start"), start.to_string());
            self.write(&format!("{directory}/size"), size.to_string());
        }
        self.write(&format!("/dev/{name}"), "");
    }

    /// A line of our own mountinfo.
    pub fn mount(&self, dev: &str, at: &str, fs: &str, source: &str) {
        self.mount_for("self", dev, at, fs, source);
    }

    /// A line of a process's mountinfo.
    pub fn mount_for(&self, process: &str, dev: &str, at: &str, fs: &str, source: &str) {
        let line = format!("30 1 {dev} / {at} rw shared:1 - {fs} {source} rw\n");
        self.append(&format!("/proc/{process}/mountinfo"), &line);
    }

    /// A device-mapper device on top of another block device.
    pub fn add_mapped(&self, below: &str, dm: u32, name: &str, uuid: &str) {
        let block = format!("/sys/class/block/dm-{dm}");
        self.write(&format!("/sys/class/block/{below}/holders/dm-{dm}"), "");
        self.write(&format!("{block}/dev"), format!("253:{dm}"));
        self.write(&format!("{block}/dm/name"), name);
        self.write(&format!("{block}/dm/uuid"), uuid);
    }

    pub fn open_in_process(&self, process: u32, command: &str, path: &str) {
        self.write(&format!("/proc/{process}/comm"), command);
        self.link(&format!("/proc/{process}/fd/5"), path);
    }

    pub fn set_hugepages(&self, node: Option<u32>, total: u64, free: u64) {
        let place = match node {
            Some(node) => format!("/sys/devices/system/node/node{node}/hugepages"),
            None => {
                self.remove("/sys/devices/system/node");
                "/sys/kernel/mm/hugepages".to_owned()
            }
        };
        self.write(&format!("{place}/hugepages-2048kB/nr_hugepages"), total.to_string());
        self.write(&format!("{place}/hugepages-2048kB/free_hugepages"), free.to_string());
    }

    /// Puts bytes on a disk.
    pub fn put(&self, disk: &str, offset: u64, bytes: &[u8]) {
        use std::os::unix::fs::FileExt;
        let file = File::options().write(true).open(self.path(&format!("/dev/{disk}"))).unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }
}

impl FakeKernel {
    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    pub fn driver_of(&self, bdf: &str) -> Option<String> {
        let link = std::fs::read_link(self.at(&format!("/sys/bus/pci/devices/{bdf}/driver"))).ok()?;
        Some(link.file_name().unwrap().to_string_lossy().into_owned())
    }

    /// What only exists with the kernel's own driver goes and comes with it.
    fn set_driver(&self, bdf: &str, driver: Option<&str>) -> io::Result<()> {
        let device = self.at(&format!("/sys/bus/pci/devices/{bdf}"));
        if !device.exists() {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        let _ = std::fs::remove_file(device.join("driver"));
        if let Some(driver) = driver {
            symlink(format!("../../drivers/{driver}"), device.join("driver"))?;
        }
        let (shown, hidden) = (device.join("nvme"), device.join(".nvme"));
        match driver == Some("nvme") {
            true if hidden.exists() => std::fs::rename(hidden, shown),
            false if shown.exists() => std::fs::rename(shown, hidden),
            _ => Ok(()),
        }
    }

    fn attach(&self, bdf: &str, driver: &str) -> io::Result<()> {
        let reserved =
            std::fs::read_to_string(self.at(&format!("/sys/bus/pci/devices/{bdf}/driver_override")))?;
        let reserved = reserved.trim();
        let matches =
            if reserved.is_empty() || reserved == "(null)" { driver == "nvme" } else { driver == reserved };
        if !matches
            || self.refusing.contains(driver)
            || !self.at(&format!("/sys/bus/pci/drivers/{driver}")).exists()
        {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        self.set_driver(bdf, Some(driver))
    }

    fn act(&mut self, path: &str, text: &str) -> io::Result<()> {
        if let Some((_, rest)) = path.split_once("/sys/bus/pci/drivers/") {
            let (driver, action) = rest.split_once('/').unwrap();
            return if action == "bind" { self.attach(text, driver) } else { self.set_driver(text, None) };
        }
        if path.ends_with("/driver/unbind") {
            return match self.driver_of(text) {
                Some(_) => self.set_driver(text, None),
                None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
            };
        }
        if path.ends_with("/drivers_probe") {
            let device = self.at(&format!("/sys/bus/pci/devices/{text}"));
            let reserved = std::fs::read_to_string(device.join("driver_override"))?;
            let reserved = reserved.trim();
            let driver = if reserved.is_empty() || reserved == "(null)" { "nvme" } else { reserved };
            // The real one reports success when no driver takes the device.
            let _ = self.attach(text, driver);
            return Ok(());
        }
        let text = match path.ends_with("/nr_hugepages") {
            true => text.parse::<u64>().unwrap().min(self.pages_max).to_string(),
            false => text.to_owned(),
        };
        if path.ends_with("/nr_hugepages") {
            std::fs::write(self.at(&path.replace("/nr_", "/free_")), &text)?;
        }
        let file = self.at(path);
        if !file.exists() {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        }
        std::fs::write(file, text)
    }
}

impl Kernel for Handle {
    fn write(&self, path: &Path, text: &str) -> io::Result<()> {
        let mut kernel = self.0.borrow_mut();
        let path = format!("/{}", path.strip_prefix(&kernel.root).unwrap().display());
        kernel.writes.push((path.clone(), text.to_owned()));
        if kernel.vanish_at.as_ref().is_some_and(|end| path.ends_with(end)) {
            std::fs::remove_dir_all(kernel.at("/sys/bus/pci/devices"))?;
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        let failing = kernel.failing.iter_mut().find(|(end, (_, times))| path.ends_with(*end) && *times > 0);
        if let Some((_, (errno, times))) = failing {
            *times -= 1;
            return Err(io::Error::from_raw_os_error(*errno));
        }
        kernel.act(&path, text)
    }

    fn load_module(&self, name: &str) -> Result<(), String> {
        let mut kernel = self.0.borrow_mut();
        if !kernel.modules.contains(name) {
            return Err(format!("`modprobe {name}` failed: not found"));
        }
        kernel.loaded.push(name.to_owned());
        let driver = kernel.at(&format!("/sys/bus/pci/drivers/{name}"));
        std::fs::create_dir_all(&driver).unwrap();
        std::fs::write(driver.join("bind"), "").unwrap();
        Ok(())
    }

    fn claim(&self, path: &Path, _dev: &str) -> io::Result<File> {
        let kernel = self.0.borrow();
        if kernel.claimed.iter().any(|claimed| path.ends_with(claimed.trim_start_matches('/'))) {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        File::open(path)
    }

    fn open(&self, path: &Path, _dev: &str) -> io::Result<File> {
        match self.0.borrow().is_root {
            true => File::open(path),
            false => Err(io::Error::from_raw_os_error(libc::EACCES)),
        }
    }

    fn mount_hugetlbfs(&self, path: &Path) -> io::Result<()> {
        let kernel = self.0.borrow();
        let at = path.strip_prefix(&kernel.root).unwrap().display().to_string();
        let file = kernel.at("/proc/self/mountinfo");
        let old = std::fs::read_to_string(&file)?;
        std::fs::write(file, format!("{old}31 1 0:50 / /{at} rw - hugetlbfs none rw\n"))
    }

    fn unmount(&self, path: &Path) -> io::Result<()> {
        let kernel = self.0.borrow();
        let at = format!(" /{} ", path.strip_prefix(&kernel.root).unwrap().display());
        let file = kernel.at("/proc/self/mountinfo");
        let old = std::fs::read_to_string(&file)?;
        let kept: Vec<&str> = old.lines().filter(|line| !line.contains(&at)).collect();
        std::fs::write(file, kept.join("\n") + "\n")
    }

    fn process(&self) -> ProcessFacts {
        let kernel = self.0.borrow();
        ProcessFacts { pid: 1000, is_root: kernel.is_root, memlock: kernel.memlock, open_files: None }
    }
}
