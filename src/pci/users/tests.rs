//! Uses that nothing claims exclusively, and names that hide what they are.

use super::*;
use crate::pci::controller;
use crate::pci::fake::Machine;

const BDF: &str = "0000:01:00.0";

fn machine() -> Machine {
    let machine = Machine::new();
    machine.add_disk(BDF, "nvme0", "S1");
    machine
}

fn users(machine: &Machine) -> Vec<User> {
    let system = machine.system();
    of_controller(&system, &controller::find(&system, BDF.parse().unwrap()).unwrap())
}

/// The only use that is found.
#[track_caller]
fn only(machine: &Machine) -> (UserKind, String, String) {
    let found = users(machine);
    assert_eq!(found.len(), 1, "{found:?}");
    (found[0].kind, found[0].what.clone(), found[0].free.join("; "))
}

#[test]
fn an_idle_drive_has_no_users() {
    let machine = machine();
    machine.add_partition("nvme0n1", 1, 2048, 4096);
    machine.mount("259:0123", "/other", "ext4", "/dev/nvme0n10");
    machine.mount("0:44", "/tmp", "tmpfs", "nvme0n1");
    machine.append("/proc/swaps", "/dev/nvme0n1p12 partition 1 0 -2\n");
    machine.open_in_process(1000, "ourselves", "/dev/nvme0n1");
    machine.open_in_process(50, "other", "/dev/nvme0n10");
    assert_eq!(users(&machine), []);
}

#[test]
fn a_btrfs_over_several_devices_is_found_on_each() {
    let machine = machine();
    for device in ["nvme0n1", "sda"] {
        machine.write(&format!("/sys/fs/btrfs/1234-uuid/devices/{device}/size"), "");
    }
    machine.mount("0:45", "/", "btrfs", "/dev/sda");
    let found = users(&machine);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].what.contains("belongs to the Btrfs 1234-uuid, mounted at /"), "{found:?}");
    assert!(found[0].is_system);
    // Named itself, it is a mount like any other, under an anonymous number.
    machine.mount("0:45", "/home", "btrfs", "/dev/nvme0n1");
    assert_eq!(only(&machine).1, "/dev/nvme0n1 is mounted at /home (btrfs)");
}

#[test]
fn a_mapped_device_is_known_by_any_of_its_names() {
    for source in ["/dev/mapper/vg-root", "/dev/dm-3", "/dev/vg/root"] {
        let machine = machine();
        machine.add_mapped("nvme0n1", 3, "vg-root", "LVM-x");
        machine.link("/dev/vg/root", "../dm-3");
        machine.mount("0:50", "/", "btrfs", source);
        let found = users(&machine);
        assert!(
            found.iter().any(|user| user.kind == UserKind::Mount && user.is_system),
            "{source}: {found:?}"
        );
    }
}

#[test]
fn bcachefs_names_all_its_devices_at_once() {
    let machine = machine();
    machine.mount("0:51", "/data", "bcachefs", "/dev/sda:/dev/nvme0n1");
    assert_eq!(only(&machine).2, "umount /data");
}

#[test]
fn a_loop_device_on_it_and_what_is_mounted_from_there() {
    let machine = machine();
    machine.write("/sys/class/block/loop4/loop/backing_file", "/dev/nvme0n1\n");
    machine.write("/sys/class/block/loop4/dev", "7:4\n");
    machine.mount("7:4", "/loop", "ext4", "/dev/loop4");
    let found = users(&machine);
    let free: Vec<&str> = found.iter().flat_map(|user| &user.free).map(String::as_str).collect();
    assert_eq!(free, ["umount /loop", "losetup --detach /dev/loop4"]);
    machine.write("/sys/class/block/loop4/loop/backing_file", "/srv/chroot/dev/nvme0n1\n");
    assert_eq!(users(&machine).len(), 2, "the /dev of a chroot");
    machine.write("/sys/class/block/loop4/loop/backing_file", "/srv/disk.img\n");
    assert_eq!(users(&machine), []);
}

#[test]
fn bcache_keeps_no_holder() {
    let machine = machine();
    machine.link("/sys/class/block/nvme0n1/bcache/dev", "../../../block/bcache0");
    machine.write("/sys/class/block/bcache0/dev", "251:0");
    machine.mount("251:0", "/cached", "ext4", "/dev/bcache0");
    let found = users(&machine);
    assert_eq!(found.iter().map(|user| user.kind).collect::<Vec<_>>(), [UserKind::Mount, UserKind::Holder]);
    let machine = self::machine();
    machine.write("/sys/class/block/nvme0n1/bcache/block_size", "4.0k");
    assert!(only(&machine).2.contains("/sys/class/block/nvme0n1/bcache/set/stop"));
}

#[test]
fn a_virtual_machine_on_the_raw_disk_is_found_by_what_it_has_open() {
    for path in ["/dev/nvme0n1", "/dev/nvme0", "/dev/nvme0n1p1", "/chroot/dev/nvme0n1"] {
        let machine = machine();
        machine.add_partition("nvme0n1", 1, 2048, 4096);
        machine.open_in_process(77, "qemu-system-x86", path);
        let (kind, what, free) = only(&machine);
        assert_eq!((kind, free.as_str()), (UserKind::Process, "kill 77"));
        assert!(what.contains("process 77 (qemu-system-x86)"), "{what}");
    }
}

#[test]
fn a_generic_character_device_counts_as_well() {
    let machine = machine();
    machine.write(&format!("/sys/bus/pci/devices/{BDF}/nvme/nvme0/ng0n2/dev"), "");
    machine.open_in_process(77, "fio", "/dev/ng0n2");
    assert_eq!(only(&machine).0, UserKind::Process);
}

#[test]
fn an_exported_namespace_or_controller_is_found() {
    let target = "/sys/kernel/config/nvmet/subsystems/nqn.x";
    let machine = machine();
    machine.write(&format!("{target}/namespaces/3/device_path"), "/dev/nvme0n1\n");
    machine.write(&format!("{target}/namespaces/3/enable"), "1\n");
    assert_eq!(only(&machine).2, format!("echo 0 > {target}/namespaces/3/enable"));
    machine.write(&format!("{target}/namespaces/3/enable"), "0\n");
    machine.write(&format!("{target}/passthru/device_path"), "/dev/nvme0\n");
    machine.write(&format!("{target}/passthru/enable"), "1\n");
    assert_eq!(only(&machine).0, UserKind::NvmeTarget);
}

#[test]
fn users_of_a_multipath_disk_are_those_of_its_visible_device() {
    let machine = machine();
    machine.make_multipath(BDF, "nvme0", 5);
    machine.mount("259:0", "/data", "ext4", "/dev/nvme5n1");
    assert_eq!(only(&machine).1, "/dev/nvme5n1 is mounted at /data (ext4)");
}

#[test]
fn virtual_functions_depend_on_their_controller() {
    let machine = machine();
    machine.write(&format!("/sys/bus/pci/devices/{BDF}/sriov_numvfs"), "4\n");
    assert_eq!(only(&machine).0, UserKind::VirtualFunction);
    machine.write(&format!("/sys/bus/pci/devices/{BDF}/sriov_numvfs"), "0\n");
    assert_eq!(users(&machine), []);
}

#[test]
fn a_loop_in_sysfs_ends() {
    let machine = machine();
    machine.add_mapped("nvme0n1", 0, "a", "LVM-a");
    machine.add_mapped("dm-0", 0, "a", "LVM-a");
    assert!(users(&machine).len() <= STACK_DEPTH_MAX + 2);
}

#[test]
fn names_of_volume_groups_are_unescaped() {
    for (mapped, group) in [("vg-root", "vg"), ("my--group-a--b", "my-group"), ("plain", "plain")] {
        assert_eq!(volume_group(mapped), group);
    }
}
