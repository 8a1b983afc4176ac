//! `basalt device` on a real bus: controllers change hands between the kernel's driver and those for user space.

use std::time::Duration;

use vm_test::engine::{Engine, wait_for_devices};
use vm_test::error::Result;
use vm_test::image;
use vm_test::machine::{Machine, Namespace};
use vm_test::vm::Vm;

use crate::case;

const LIMIT: Duration = Duration::from_secs(300);

const ADDRESS: &str = "0000:00:04.0";

fn machine(directory: &std::path::Path) -> Result<Machine> {
    let drive = image::create(directory.join("drive.img"), 256 << 20)?;
    let machine = Machine { memory_mib: 2048, ..Machine::with_namespaces(vec![Namespace::new(drive)]) };
    Engine::Uring.prepare(machine)
}

/// The driver that has the controller; empty when none has.
fn driver(vm: &Vm) -> Result<String> {
    let link = vm.run(&format!("readlink /sys/bus/pci/devices/{ADDRESS}/driver | sed 's|.*/||'"))?;
    Ok(link.trim().to_owned())
}

fn basalt(vm: &Vm, code: i32, arguments: &str) -> Result<String> {
    vm.expect(code, &format!("basalt {arguments}"), LIMIT)
}

#[test]
fn a_drive_leaves_the_kernel_and_comes_back() -> Result<()> {
    case("binding", |directory| {
        let machine = Machine { iommu: true, ..machine(directory)? };
        assert_eq!(machine.address(0), ADDRESS);
        let vm = Vm::boot(&machine)?;
        wait_for_devices(&vm)?;
        let list = basalt(&vm, 0, "device list")?;
        assert!(list.contains(ADDRESS) && list.contains("BASALT0") && list.contains("nvme0n1"), "{list}");

        // In use: refused whatever is said.
        vm.run("mkswap /dev/nvme0n1 && swapon /dev/nvme0n1")?;
        let refused = basalt(&vm, 3, &format!("device bind {ADDRESS} --force --serial BASALT0"))?;
        assert!(refused.contains("swapoff"), "the refusal says how to free it: {refused}");
        vm.run("swapoff /dev/nvme0n1")?;
        // Carries data: refused until forced with the right serial number.
        let refused = basalt(&vm, 3, &format!("device bind {ADDRESS}"))?;
        assert!(refused.contains("swap") && refused.contains("--force --serial BASALT0"), "{refused}");
        basalt(&vm, 3, &format!("device bind {ADDRESS} --force --serial OTHER"))?;
        basalt(&vm, 0, &format!("device bind {ADDRESS} --force --serial BASALT0 --dry-run"))?;
        assert_eq!(driver(&vm)?, "nvme");

        basalt(&vm, 0, &format!("device bind {ADDRESS} --force --serial BASALT0"))?;
        assert_eq!(driver(&vm)?, "vfio-pci");
        let group = vm.run(&format!(
            "ls /dev/vfio/$(basename $(readlink /sys/bus/pci/devices/{ADDRESS}/iommu_group))"
        ))?;
        assert!(group.starts_with("/dev/vfio/"), "{group}");
        let pages: u32 = vm.run("cat /proc/sys/vm/nr_hugepages")?.trim().parse().expect("a count");
        assert!(pages >= 256, "512 MiB in pages of 2 MiB, not {pages}");
        vm.expect(1, "[ -e /dev/nvme0n1 ]", LIMIT)?;
        // Again: nothing to do.
        basalt(&vm, 0, &format!("device bind {ADDRESS}"))?;

        basalt(&vm, 0, &format!("device unbind {ADDRESS}"))?;
        assert_eq!(driver(&vm)?, "nvme");
        wait_for_devices(&vm)?;
        vm.run("swapon /dev/nvme0n1 && swapoff /dev/nvme0n1")?;
        vm.stop()
    })
}

#[test]
fn a_drive_without_a_driver_is_bound_too() -> Result<()> {
    case("binding-without-driver", |directory| {
        let vm = Vm::boot(&Machine { iommu: true, kernel_nvme: false, ..machine(directory)? })?;
        assert_eq!(driver(&vm)?, "");
        basalt(&vm, 0, &format!("device bind {ADDRESS}"))?;
        assert_eq!(driver(&vm)?, "vfio-pci");
        vm.stop()
    })
}

#[test]
fn without_an_iommu_uio_takes_the_drive_and_that_is_said() -> Result<()> {
    case("binding-uio", |directory| {
        let vm = Vm::boot(&machine(directory)?)?;
        wait_for_devices(&vm)?;
        let said = basalt(&vm, 0, &format!("device bind {ADDRESS}"))?;
        assert_eq!(driver(&vm)?, "uio_pci_generic", "{said}");
        assert!(said.contains("IOMMU"), "what that means is said: {said}");
        basalt(&vm, 0, &format!("device unbind {ADDRESS}"))?;
        assert_eq!(driver(&vm)?, "nvme");
        vm.stop()
    })
}
