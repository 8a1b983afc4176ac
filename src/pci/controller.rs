//! NVMe controllers and their namespaces, as sysfs lists them.

use serde::Serialize;

use super::Bdf;
use super::system::System;

/// PCI class of NVMe controllers: mass storage, non-volatile memory, NVMe I/O (PCI Code and ID Assignment, 1.1).
const CLASS_NVME: &str = "0x010802";

/// Drivers that hand a device to user space.
pub const USER_SPACE_DRIVERS: [&str; 3] = ["vfio-pci", "uio_pci_generic", "igb_uio"];

/// Bytes of the unit in which sysfs counts sizes, whatever the block size.
const SYSFS_SIZE_UNIT: u64 = 512;

/// One NVMe controller on PCI.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Controller {
    /// Its address.
    pub bdf: Bdf,
    /// Vendor and device id, such as `144d:a808`.
    pub pci_id: String,
    /// The driver that has it.
    pub driver: Option<String>,
    /// The driver that it is reserved for.
    pub driver_override: Option<String>,
    /// The NUMA node that it is attached to.
    pub numa_node: Option<u64>,
    /// Its IOMMU group; none when there is no IOMMU, also in VFIO's no-IOMMU mode.
    pub iommu_group: Option<String>,
    /// The kernel's name, such as `nvme0`, while the kernel's driver has it.
    pub name: Option<String>,
    /// From Identify, while the kernel's driver has it.
    pub model: Option<String>,
    /// From Identify, while the kernel's driver has it.
    pub serial: Option<String>,
    /// From Identify, while the kernel's driver has it.
    pub firmware: Option<String>,
    /// `live` when it works; the kernel's word otherwise.
    pub state: Option<String>,
    /// Those that the kernel's driver has found.
    pub namespaces: Vec<Namespace>,
}

/// A namespace that the kernel shows as a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Namespace {
    /// The block device to use, such as `nvme0n1`.
    pub name: String,
    /// The hidden path below it, such as `nvme0c0n1`, when the kernel's multipath is between.
    pub path_name: Option<String>,
    /// Namespace id.
    pub nsid: Option<u64>,
    /// Major and minor number; none when the block device can't be found.
    pub dev: Option<String>,
    /// Bytes.
    pub size: u64,
    /// Bytes of one logical block.
    pub block_size: u64,
    /// Partitions that the kernel sees.
    pub partitions: Vec<Partition>,
}

/// A partition as the kernel sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Partition {
    /// Such as `nvme0n1p1`.
    pub name: String,
    /// Major and minor number.
    pub dev: String,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// Why there is no controller at an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotFound {
    /// Nothing has this address.
    #[error("there is no PCI device {0}; `basalt device list` shows the NVMe controllers of this machine")]
    Nothing(Bdf),
    /// Something else has it.
    #[error("{0} is no NVMe controller (its PCI class is {1}); `basalt device list` shows those there are")]
    OtherClass(Bdf, String),
}

/// Every NVMe controller on PCI.
pub fn list(system: &System) -> Vec<Controller> {
    let names = system.list("/sys/bus/pci/devices");
    let mut found: Vec<_> = names.iter().filter_map(|name| find(system, name.parse().ok()?).ok()).collect();
    found.sort_by_key(|controller| controller.bdf);
    found
}

/// The controller at an address.
pub fn find(system: &System, bdf: Bdf) -> Result<Controller, NotFound> {
    let device = device_path(bdf);
    match system.read(&format!("{device}/class")) {
        None => return Err(NotFound::Nothing(bdf)),
        Some(class) if class != CLASS_NVME => return Err(NotFound::OtherClass(bdf, class)),
        Some(_) => {}
    }
    let read = |attribute: &str| system.read(&format!("{device}/{attribute}"));
    let id = |attribute| read(attribute).map_or("?".into(), |id| id.trim_start_matches("0x").to_owned());
    let name = system.list(&format!("{device}/nvme")).into_iter().find(|name| name.starts_with("nvme"));
    let identify = |attribute: &str| read(&format!("nvme/{}/{attribute}", name.as_ref()?));
    let namespaces = name.iter().flat_map(|name| namespaces(system, &device, name)).collect();
    Ok(Controller {
        bdf,
        pci_id: format!("{}:{}", id("vendor"), id("device")),
        driver: driver(system, bdf),
        driver_override: read("driver_override").filter(|text| text != "(null)"),
        // -1 where the firmware does not say.
        numa_node: system.number(&format!("{device}/numa_node")),
        iommu_group: iommu_group(system, bdf),
        model: identify("model"),
        serial: identify("serial"),
        firmware: identify("firmware_rev"),
        state: identify("state"),
        name,
        namespaces,
    })
}

/// Where sysfs keeps a device.
pub fn device_path(bdf: Bdf) -> String {
    format!("/sys/bus/pci/devices/{bdf}")
}

/// The driver that has a device.
pub fn driver(system: &System, bdf: Bdf) -> Option<String> {
    system.link_name(&format!("{}/driver", device_path(bdf)))
}

/// The group of devices that the IOMMU can't tell apart. VFIO makes a group of its own in no-IOMMU mode, which protects
/// nothing and is not one here.
pub fn iommu_group(system: &System, bdf: Bdf) -> Option<String> {
    let group = system.link_name(&format!("{}/iommu_group", device_path(bdf)))?;
    let name = system.read(&format!("/sys/kernel/iommu_groups/{group}/name"));
    (name.as_deref() != Some("vfio-noiommu")).then_some(group)
}

impl Controller {
    /// Bytes of all namespaces, where the kernel knows them.
    pub fn size(&self) -> Option<u64> {
        (!self.namespaces.is_empty()).then(|| self.namespaces.iter().map(|one| one.size).sum())
    }

    /// Whether a driver for user space has it.
    pub fn is_user_space(&self) -> bool {
        self.driver.as_deref().is_some_and(|driver| USER_SPACE_DRIVERS.contains(&driver))
    }

    /// Model and serial number, or the PCI ids where the kernel does not know them.
    pub fn describe(&self) -> String {
        let model = self.model.clone().unwrap_or_else(|| format!("PCI id {}", self.pci_id));
        let serial = self.serial.as_ref().map_or("unknown", |serial| serial);
        format!("{} ({model}, serial number {serial})", self.bdf)
    }
}

/// Block devices below a controller: `nvme0n1`, or with multipath the hidden `nvme0c1n1` whose visible device is `nvme0n1`.
fn namespaces(system: &System, device: &str, controller: &str) -> Vec<Namespace> {
    let directory = format!("{device}/nvme/{controller}");
    let names = system.list(&directory);
    names
        .iter()
        .filter_map(|name| Some((name, visible_name(name)?)))
        .map(|(name, visible)| {
            let block = format!("/sys/class/block/{visible}");
            let own = format!("{directory}/{name}");
            // Before Linux 4.15, and with the block class hidden, only the path below the controller is there.
            let number = |attribute: &str| {
                system
                    .number(&format!("{block}/{attribute}"))
                    .or_else(|| system.number(&format!("{own}/{attribute}")))
            };
            Namespace {
                path_name: (*name != visible).then(|| name.clone()),
                nsid: number("nsid"),
                dev: system.read(&format!("{block}/dev")),
                size: number("size").unwrap_or(0) * SYSFS_SIZE_UNIT,
                block_size: number("queue/logical_block_size").unwrap_or(SYSFS_SIZE_UNIT),
                partitions: partitions(system, &visible),
                name: visible,
            }
        })
        .collect()
}

/// The block device that people see for an entry below a controller; `None` for what is no namespace.
fn visible_name(entry: &str) -> Option<String> {
    let (instance, rest) = entry.strip_prefix("nvme")?.split_at_checked(entry[4..].find(['c', 'n'])?)?;
    let rest = match rest.strip_prefix('c') {
        Some(path) => &path[path.find('n')?..],
        None => rest,
    };
    let number = rest.strip_prefix('n')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (is_number(instance) && is_number(number)).then(|| format!("nvme{instance}n{number}"))
}

fn partitions(system: &System, disk: &str) -> Vec<Partition> {
    let block = format!("/sys/class/block/{disk}");
    let children = system.list(&block).into_iter().filter(|name| name.starts_with(disk));
    children
        .filter(|name| system.exists(&format!("{block}/{name}/partition")))
        .map(|name| {
            let number = |attribute| system.number(&format!("{block}/{name}/{attribute}")).unwrap_or(0);
            Partition {
                dev: system.read(&format!("{block}/{name}/dev")).unwrap_or_default(),
                offset: number("start") * SYSFS_SIZE_UNIT,
                size: number("size") * SYSFS_SIZE_UNIT,
                name,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::fake::Machine;

    #[test]
    fn names_below_a_controller_lead_to_the_visible_block_device() {
        for (entry, visible) in [
            ("nvme0n1", Some("nvme0n1")),
            ("nvme10n12", Some("nvme10n12")),
            ("nvme0c3n1", Some("nvme0n1")),
            ("nvme0", None),
            ("ng0n1", None),
            ("nvme0n1p1", None),
            ("hwmon3", None),
            ("nvmen1", None),
            ("nvme0cn", None),
        ] {
            assert_eq!(visible_name(entry).as_deref(), visible, "{entry}");
        }
    }

    #[test]
    fn a_controller_is_described_from_sysfs() {
        let machine = Machine::new();
        machine.add_disk("0000:01:00.0", "nvme0", "S1");
        machine.add_partition("nvme0n1", 1, 2048, 4096);
        machine.write("/sys/bus/pci/devices/0000:00:1f.0/class", "0x060100\n");
        let found = list(&machine.system());
        assert_eq!(found.len(), 1);
        let one = &found[0];
        assert_eq!(one.serial.as_deref(), Some("S1"));
        assert_eq!(one.model.as_deref(), Some("Fake Disk"));
        assert_eq!((one.driver.as_deref(), one.numa_node), (Some("nvme"), Some(0)));
        assert_eq!(one.iommu_group.as_deref(), Some("7"));
        assert_eq!(one.namespaces.len(), 1);
        let namespace = &one.namespaces[0];
        assert_eq!((namespace.name.as_str(), namespace.dev.as_deref()), ("nvme0n1", Some("259:0")));
        assert_eq!(namespace.size, crate::pci::fake::DISK_SIZE);
        let partition = &namespace.partitions[0];
        assert_eq!(
            (partition.name.as_str(), partition.offset, partition.size),
            ("nvme0n1p1", 1 << 20, 2 << 20)
        );
        let other = find(&machine.system(), "0000:00:1f.0".parse().unwrap()).unwrap_err();
        assert!(other.to_string().contains("0x060100"), "{other}");
        let nothing = find(&machine.system(), "0000:09:00.0".parse().unwrap()).unwrap_err();
        assert!(nothing.to_string().contains("no PCI device 0000:09:00.0"), "{nothing}");
    }

    #[test]
    fn a_multipath_namespace_is_found_through_its_hidden_path() {
        let machine = Machine::new();
        machine.add_disk("0000:01:00.0", "nvme3", "S1");
        machine.make_multipath("0000:01:00.0", "nvme3", 0);
        let one = &list(&machine.system())[0];
        let namespace = &one.namespaces[0];
        assert_eq!(namespace.name, "nvme0n1");
        assert_eq!(namespace.path_name.as_deref(), Some("nvme0c3n1"));
        assert_eq!(namespace.dev.as_deref(), Some("259:0"));
    }
}
