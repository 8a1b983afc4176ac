//! The commands on made-up machines: what is refused and in which words, what is bound, and what is undone.

use clap::Parser;

use super::*;
use crate::format::{gpt, layout, superblock::Superblock};
use crate::pci::fake::{DISK_SIZE, Machine};

const BDF: &str = "0000:01:00.0";

#[derive(Parser)]
struct Line {
    #[command(subcommand)]
    command: DeviceCommand,
}

/// Runs a command line; the report, and what was told meanwhile.
fn run(machine: &Machine, line: &str) -> (Report, String) {
    let words = ["device"].into_iter().chain(line.split_whitespace());
    let command = Line::try_parse_from(words).unwrap_or_else(|error| panic!("{line}: {error}")).command;
    let mut told = String::new();
    let mut tell = |text: &str| told += &format!("{text}\n");
    let report = super::run(&machine.system(), &command, &mut tell, &|bdf| Err(format!("{bdf} was asked")));
    (report, told)
}

fn machine() -> Machine {
    let machine = Machine::new();
    machine.add_disk(BDF, "nvme0", "SN 1");
    machine
}

/// Refused with code 3, in these words, with nothing written; and forcing with the right serial number does as `forced` says.
#[track_caller]
fn refused(machine: &Machine, words: &[&str], forced: Exit) {
    let (report, told) = run(machine, &format!("bind {BDF}"));
    let error = report.error.unwrap_or_else(|| panic!("it was bound: {}{told}", report.out));
    assert_eq!(report.exit, Exit::Refused, "{error}");
    for word in ["Fake Disk", "SN 1", "Nothing was changed"].iter().chain(words) {
        assert!(error.contains(word), "no {word:?} in: {error}");
    }
    assert_eq!(machine.kernel.borrow().writes, [], "{error}");
    assert_eq!(machine.driver_of(BDF).as_deref(), Some("nvme"));
    let command = DeviceCommand::Bind(BindArgs {
        bdf: BDF.parse().unwrap(),
        driver: None,
        hugepages: 0,
        force: true,
        serial: Some("SN 1".into()),
        dry_run: false,
        json: false,
    });
    let report = super::run(&machine.system(), &command, &mut |_| {}, &|_| Err(String::new()));
    assert_eq!(report.exit, forced, "forced: {report:?}");
    let driver = if forced == Exit::Done { "vfio-pci" } else { "nvme" };
    assert_eq!(machine.driver_of(BDF).as_deref(), Some(driver));
}

#[test]
fn a_blank_drive_is_bound_and_given_back_and_both_twice() {
    let machine = machine();
    let (report, told) = run(&machine, &format!("bind {BDF}"));
    assert_eq!((report.exit, &report.error), (Exit::Done, &None));
    assert!(report.out.contains("is bound to vfio-pci"), "{}", report.out);
    assert!(told.contains("raise the 2 MiB pages on NUMA node 0 from 0 to 256"), "{told}");
    assert_eq!(machine.driver_of(BDF).as_deref(), Some("vfio-pci"));
    let hugepages = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages";
    assert_eq!(machine.read(hugepages), "256");
    assert!(machine.read("/proc/self/mountinfo").contains("/dev/hugepages rw - hugetlbfs"));
    // Writing the same values again would be harmless; not writing is what idempotent means here.
    let count = machine.kernel.borrow().writes.len();
    let (report, _) = run(&machine, &format!("bind {BDF}"));
    assert_eq!(report.exit, Exit::Done);
    assert!(report.out.contains("already; nothing to do"), "{}", report.out);
    assert_eq!(machine.kernel.borrow().writes.len(), count);
    for said in ["is back with nvme", "already; nothing to do"] {
        let (report, _) = run(&machine, &format!("unbind {BDF}"));
        assert_eq!(report.exit, Exit::Done, "{report:?}");
        assert!(report.out.contains(said), "{}", report.out);
        assert_eq!(machine.driver_of(BDF).as_deref(), Some("nvme"));
        assert_eq!(machine.read(&format!("/sys/bus/pci/devices/{BDF}/driver_override")), "");
    }
}

#[test]
fn a_dry_run_shows_every_step_and_takes_none() {
    let machine = machine();
    machine.remove("/sys/bus/pci/drivers/vfio-pci");
    machine.kernel.borrow_mut().is_root = false;
    let (report, _) = run(&machine, &format!("bind {BDF}"));
    assert_eq!(report.exit, Exit::Failed);
    assert!(report.error.unwrap().contains(&format!("sudo basalt device bind {BDF}")));
    let (report, told) = run(&machine, &format!("bind {BDF} --dry-run --hugepages 64MiB"));
    assert_eq!(report.exit, Exit::Done, "{report:?}");
    assert_eq!(report.out, "dry run: 6 steps, none taken");
    let steps = [
        "load the module vfio-pci",
        "nr_hugepages",
        "hugetlbfs",
        "driver/unbind",
        "driver_override",
        "drivers_probe",
    ];
    for (line, step) in told.lines().zip(steps) {
        assert!(line.contains(step), "no {step} in {line}");
    }
    assert_eq!(machine.kernel.borrow().writes, []);
    assert_eq!(machine.kernel.borrow().loaded, Vec::<String>::new());
}

#[test]
fn mounts_are_refused_by_name_with_the_command_that_ends_them() {
    let machine = machine();
    machine.add_partition("nvme0n1", 1, 2048, 4096);
    machine.mount("259:1", "/srv/my\\040data", "ext4", "/dev/nvme0n1p1");
    refused(
        &machine,
        &["/dev/nvme0n1p1 is mounted at /srv/my data (ext4)", "umount '/srv/my data'\n  basalt device bind"],
        Exit::Refused,
    );
}

#[test]
fn the_disk_that_the_machine_runs_from_is_never_given_away() {
    for at in ["/", "/boot/efi"] {
        let machine = machine();
        machine.add_partition("nvme0n1", 1, 2048, 4096);
        machine.mount("259:1", at, "ext4", "/dev/nvme0n1p1");
        refused(&machine, &["this machine runs from it", "choose another drive"], Exit::Refused);
        let (report, _) = run(&machine, &format!("bind {BDF}"));
        assert!(!report.error.unwrap().contains("umount"));
    }
}

#[test]
fn swap_on_a_partition_is_refused() {
    let machine = machine();
    machine.add_partition("nvme0n1", 2, 2048, 4096);
    machine.append("/proc/swaps", "/dev/nvme0n1p2 partition 1024 0 -2\n");
    refused(&machine, &["/dev/nvme0n1p2 is swap space in use", "swapoff /dev/nvme0n1p2"], Exit::Refused);
}

#[test]
fn a_stack_of_volumes_is_freed_from_the_top() {
    let machine = machine();
    machine.add_partition("nvme0n1", 3, 2048, 4096);
    machine.add_mapped("nvme0n1p3", 0, "luks-data", "CRYPT-LUKS2-x");
    machine.add_mapped("dm-0", 1, "my--group-root", "LVM-abc");
    machine.mount("253:1", "/data", "xfs", "/dev/mapper/my--group-root");
    machine.append("/proc/swaps", "/dev/dm-1 partition 1024 0 -2\n");
    refused(
        &machine,
        &[
            "is used by the encrypted volume luks-data (/dev/dm-0)",
            "umount /data\n  swapoff /dev/dm-1\n  vgchange --activate n my-group\n  cryptsetup close luks-data\n  basalt",
        ],
        Exit::Refused,
    );
}

#[test]
fn an_md_member_and_a_multipath_member_are_refused() {
    let machine = machine();
    machine.write("/sys/class/block/nvme0n1/holders/md0", "");
    machine.write("/sys/class/block/md0/md/level", "raid1");
    machine.add_mapped("nvme0n1", 5, "mpatha", "mpath-3600");
    refused(
        &machine,
        &["RAID array /dev/md0", "mdadm --stop /dev/md0", "multipath -f mpatha"],
        Exit::Refused,
    );
}

#[test]
fn what_is_on_it_is_refused_and_can_be_forced_with_the_serial_number() {
    let machine = machine();
    machine.put("nvme0n1", 0, b"XFSB");
    refused(
        &machine,
        &["/dev/nvme0n1: an XFS file system", "wipefs --all /dev/nvme0n1", "--force --serial 'SN 1'"],
        Exit::Done,
    );
}

#[test]
fn an_ext4_file_system_on_the_whole_disk_is_found() {
    let machine = machine();
    let mut superblock = vec![0; 0x68];
    superblock[0] = 1;
    superblock[0x38..0x3a].copy_from_slice(&[0x53, 0xef]);
    superblock[0x60] = 0x40;
    machine.put("nvme0n1", 1024, &superblock);
    refused(&machine, &["an ext4 file system"], Exit::Done);
}

#[test]
fn an_empty_partition_and_a_known_one_are_data() {
    let machine = machine();
    machine.add_partition("nvme0n1", 1, 2048, 4096);
    machine.add_partition("nvme0n1", 2, 8192, 65536);
    machine.put("nvme0n1", 8192 * 512, b"LUKS\xba\xbe\x00\x02");
    refused(
        &machine,
        &[
            "the partition nvme0n1p1 (2.0 MiB)",
            "a LUKS2 encrypted volume on nvme0n1p2",
            "wipefs --all /dev/nvme0n1p1 /dev/nvme0n1p2 /dev/nvme0n1",
        ],
        Exit::Done,
    );
}

#[test]
fn a_second_namespace_in_use_keeps_the_whole_controller() {
    let machine = machine();
    machine.add_namespace(BDF, "nvme0", 2);
    machine.mount("259:10", "/data", "ext4", "/dev/nvme0n2");
    refused(&machine, &["/dev/nvme0n2 is mounted at /data"], Exit::Refused);
    let machine = self::machine();
    machine.add_namespace(BDF, "nvme0", 2);
    machine.put("nvme0n2", 0, b"XFSB");
    refused(&machine, &["/dev/nvme0n2: an XFS file system"], Exit::Done);
}

#[test]
fn an_exclusive_claim_without_a_name_is_refused() {
    let machine = machine();
    machine.kernel.borrow_mut().claimed.insert("/dev/nvme0n1".into());
    refused(
        &machine,
        &["claimed by something that has no name", "fuser --verbose /dev/nvme0n1"],
        Exit::Refused,
    );
}

#[test]
fn a_mount_that_only_another_mount_namespace_has_is_named() {
    let machine = machine();
    machine.link("/proc/self/ns/mnt", "mnt:[1]");
    machine.link("/proc/40/ns/mnt", "mnt:[1]");
    machine.link("/proc/41/ns/mnt", "mnt:[2]");
    machine.mount_for("41", "259:0", "/inside", "ext4", "/dev/nvme0n1");
    machine.kernel.borrow_mut().claimed.insert("/dev/nvme0n1".into());
    refused(
        &machine,
        &["in the mount namespace of process 41", "nsenter --target 41 --mount umount /inside"],
        Exit::Refused,
    );
    let (report, _) = run(&machine, &format!("bind {BDF}"));
    assert!(!report.error.unwrap().contains("has no name"), "the claim is explained by the mount");
}

#[test]
fn what_cannot_be_known_is_refused() {
    let machine = machine();
    machine.remove("/dev/nvme0n1");
    refused(&machine, &["can't be opened", "on the host"], Exit::Refused);
    let machine = self::machine();
    machine.remove("/proc/self/mountinfo");
    refused(&machine, &["mountinfo can't be read"], Exit::Refused);
    let machine = self::machine();
    machine.write(&format!("/sys/bus/pci/devices/{BDF}/nvme/nvme0/state"), "resetting\n");
    refused(&machine, &["not ready (state resetting)"], Exit::Refused);
    let machine = self::machine();
    machine.remove("/sys/class/block/nvme0n1");
    refused(&machine, &["shows no block device"], Exit::Refused);
    let machine = self::machine();
    machine.link("/proc/self/ns/pid", "pid:[4026532000]");
    refused(&machine, &["from inside a container"], Exit::Refused);
    machine.link("/proc/self/ns/pid", "pid:[4026531836]");
    assert_eq!(run(&machine, &format!("bind {BDF}")).0.exit, Exit::Done);
}

#[test]
fn another_serial_number_is_refused_also_without_force() {
    let machine = machine();
    for line in [format!("bind {BDF} --serial other"), format!("bind {BDF} --force --serial SN")] {
        let (report, _) = run(&machine, &line);
        assert_eq!(report.exit, Exit::Refused, "{line}");
        assert!(report.error.unwrap().contains("is 'SN 1', not '"));
    }
    assert_eq!(machine.kernel.borrow().writes, []);
    let alone = Line::try_parse_from(["device", "bind", BDF, "--force"]);
    assert!(alone.is_err_and(|error| error.to_string().contains("--serial")));
}

#[test]
fn only_nvme_controllers_are_bound() {
    let machine = machine();
    machine.write("/sys/bus/pci/devices/0000:02:00.0/class", "0x020000\n");
    let (report, _) = run(&machine, "bind 0000:02:00.0");
    assert_eq!(report.exit, Exit::Refused);
    assert!(report.error.unwrap().contains("no NVMe controller"));
    let (report, _) = run(&machine, "bind 0000:03:00.0");
    assert_eq!(report.exit, Exit::Failed);
    assert!(report.error.unwrap().contains("device list"));
}

fn superblock() -> Superblock {
    Superblock {
        uuid: [7; 16],
        secret: [1; 16],
        layout: layout::choose(DISK_SIZE, 16).unwrap(),
        block_size: 4096,
        shard_count: 16,
        index: Default::default(),
        features: 0,
        generation: 2,
        parent: 0,
        boot: 5,
        created_ms: 0,
        label: "cache".into(),
    }
}

/// A Basalt device as `format` leaves it, with the partition that the kernel sees.
fn formatted() -> Machine {
    let machine = machine();
    let superblock = superblock();
    let table = gpt::encode(&superblock.uuid, DISK_SIZE, 512);
    machine.put("nvme0n1", 0, &table.start);
    machine.put("nvme0n1", DISK_SIZE - table.end.len() as u64, &table.end);
    for copy in 0..4 {
        machine.put("nvme0n1", superblock.layout.superblock_offset(copy), &superblock.encode(copy));
    }
    machine.add_partition("nvme0n1", 1, 2048, DISK_SIZE / 512 - 4096);
    machine
}

#[test]
fn a_basalt_device_is_bound_without_force() {
    let machine = formatted();
    let (report, told) = run(&machine, &format!("bind {BDF}"));
    assert_eq!(report.exit, Exit::Done, "{report:?}{told}");
    assert_eq!(machine.driver_of(BDF).as_deref(), Some("vfio-pci"));
}

#[test]
fn a_basalt_device_that_something_else_has_taken_over_is_data() {
    // Partitioned anew: the far superblock copies are all still there.
    let machine = formatted();
    machine.put("nvme0n1", 1024 + 56, b"another name");
    refused(&machine, &["what was the Basalt device 07070707"], Exit::Done);
    let machine = formatted();
    machine.add_partition("nvme0n1", 2, 40000, 4096);
    refused(&machine, &["what was the Basalt device", "the partition nvme0n1p2"], Exit::Done);
    // A file system made in its partition destroys the first copy, and two others still agree.
    let machine = formatted();
    machine.put("nvme0n1", 1 << 20, b"XFSB");
    refused(&machine, &["an XFS file system on nvme0n1p1"], Exit::Done);
    let machine = formatted();
    machine.mount("259:1", "/mnt", "ext4", "/dev/nvme0n1p1");
    refused(&machine, &["mounted at /mnt"], Exit::Refused);
}

#[test]
fn failing_half_way_undoes_everything() {
    for (end, errno, said) in [
        ("/driver/unbind", libc::EROFS, "bind on the host"),
        ("/driver_override", libc::EPERM, "needs root"),
        ("/nr_hugepages", libc::EIO, "nr_hugepages"),
    ] {
        let machine = machine();
        machine.kernel.borrow_mut().failing.insert(end.into(), (errno, 1));
        let (report, _) = run(&machine, &format!("bind {BDF}"));
        let error = report.error.unwrap();
        assert_eq!(report.exit, Exit::Failed, "{end}: {error}");
        assert!(error.contains(said), "{end}: {error}");
        as_before(&machine, &error);
    }
}

#[track_caller]
fn as_before(machine: &Machine, error: &str) {
    assert_eq!(machine.driver_of(BDF).as_deref(), Some("nvme"), "{error}");
    let reserved = machine.read(&format!("/sys/bus/pci/devices/{BDF}/driver_override"));
    assert!(reserved.is_empty() || reserved == "(null)", "{error}");
    let pages = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages";
    assert_eq!(machine.read(pages), "0", "{error}");
    assert!(!machine.read("/proc/self/mountinfo").contains("hugetlbfs"), "{error}");
    assert!(error.contains("as it was") || error.contains("nothing was changed"), "{error}");
}

#[test]
fn a_driver_that_does_not_take_the_drive_is_undone() {
    let machine = machine();
    machine.kernel.borrow_mut().refusing.insert("vfio-pci".into());
    let (report, _) = run(&machine, &format!("bind {BDF}"));
    let error = report.error.unwrap();
    assert_eq!(report.exit, Exit::Failed);
    assert!(error.contains("vfio-pci did not take") && error.contains("is with nvme again"), "{error}");
    as_before(&machine, &error);
}

#[test]
fn an_undo_that_fails_is_told() {
    let machine = machine();
    machine.kernel.borrow_mut().failing.insert("/driver_override".into(), (libc::EIO, 9));
    machine.kernel.borrow_mut().failing.insert("/drivers/nvme/bind".into(), (libc::EBUSY, 9));
    let (report, _) = run(&machine, &format!("bind {BDF}"));
    let error = report.error.unwrap();
    assert!(error.contains("could not be undone: 0000:01:00.0 was taken from nvme"), "{error}");
    assert!(error.contains("the drive needs you"), "{error}");
}

#[test]
fn a_drive_that_goes_away_half_way_is_no_crash() {
    for end in ["/driver/unbind", "/driver_override", "/drivers_probe"] {
        let machine = machine();
        machine.kernel.borrow_mut().vanish_at = Some(end.into());
        let (report, _) = run(&machine, &format!("bind {BDF} --hugepages 0"));
        let error = report.error.unwrap();
        assert_eq!(report.exit, Exit::Failed, "{error}");
        assert!(error.contains("went away") && error.contains("the device is gone"), "{error}");
    }
}

#[test]
fn without_an_iommu_the_no_iommu_mode_or_uio_is_taken_aloud() {
    let mode = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode";
    let machine = machine();
    machine.remove(&format!("/sys/bus/pci/devices/{BDF}/iommu_group"));
    machine.write(mode, "N");
    let (report, _) = run(&machine, &format!("bind {BDF}"));
    assert_eq!(report.exit, Exit::Done, "{report:?}");
    assert!(report.out.contains("no-IOMMU mode: nothing keeps a faulty program"), "{}", report.out);
    assert_eq!(machine.read(mode), "1");
    assert_eq!(machine.driver_of(BDF).as_deref(), Some("vfio-pci"));

    let machine = self::machine();
    machine.remove(&format!("/sys/bus/pci/devices/{BDF}/iommu_group"));
    machine.kernel.borrow_mut().modules.insert("uio_pci_generic".into());
    let (report, _) = run(&machine, &format!("bind {BDF}"));
    assert_eq!(report.exit, Exit::Done, "{report:?}");
    assert!(
        report.out.contains("CONFIG_VFIO_NOIOMMU") && report.out.contains("two programs"),
        "{}",
        report.out
    );
    assert_eq!(machine.driver_of(BDF).as_deref(), Some("uio_pci_generic"));

    // Asked for by name, it is that driver or none.
    let machine = self::machine();
    machine.remove(&format!("/sys/bus/pci/devices/{BDF}/iommu_group"));
    machine.kernel.borrow_mut().modules.insert("uio_pci_generic".into());
    let (report, _) = run(&machine, &format!("bind {BDF} --driver vfio-pci"));
    assert_eq!(report.exit, Exit::Failed);
    as_before(&machine, &report.error.unwrap());
    // The setting is taken back when a later step fails.
    let machine = self::machine();
    machine.remove(&format!("/sys/bus/pci/devices/{BDF}/iommu_group"));
    machine.write(mode, "N");
    machine.kernel.borrow_mut().refusing.insert("vfio-pci".into());
    let (report, _) = run(&machine, &format!("bind {BDF}"));
    as_before(&machine, &report.error.unwrap());
    assert_eq!(machine.read(mode), "N");
}

#[test]
fn uio_behind_an_iommu_works_only_when_it_passes_everything() {
    let machine = machine();
    machine.kernel.borrow_mut().modules.insert("uio_pci_generic".into());
    let line = format!("bind {BDF} --driver uio_pci_generic");
    let (report, _) = run(&machine, &line);
    assert_eq!(report.exit, Exit::Failed);
    assert!(report.error.unwrap().contains("iommu=pt"));
    machine.write("/sys/kernel/iommu_groups/7/type", "identity\n");
    let (report, _) = run(&machine, &line);
    assert_eq!(report.exit, Exit::Done, "{report:?}");
    assert_eq!(machine.driver_of(BDF).as_deref(), Some("uio_pci_generic"));
}

#[test]
fn a_shared_iommu_group_is_named_before_anything_changes() {
    let machine = machine();
    machine.add_disk("0000:02:00.0", "nvme1", "S2");
    let (report, _) = run(&machine, &format!("bind {BDF}"));
    assert_eq!(report.exit, Exit::Failed);
    let error = report.error.unwrap();
    assert!(error.contains("0000:02:00.0 (driver nvme)") && error.contains("group 7"), "{error}");
    assert_eq!(machine.kernel.borrow().writes, []);
    machine.remove("/sys/bus/pci/devices/0000:02:00.0/driver");
    assert_eq!(run(&machine, &format!("bind {BDF}")).0.exit, Exit::Done);
}

#[test]
fn modules_are_loaded_only_when_the_driver_is_not_there() {
    let machine = machine();
    assert_eq!(run(&machine, &format!("bind {BDF}")).0.exit, Exit::Done);
    assert_eq!(machine.kernel.borrow().loaded, Vec::<String>::new());
    let machine = self::machine();
    machine.remove("/sys/bus/pci/drivers/vfio-pci");
    let (report, _) = run(&machine, &format!("bind {BDF}"));
    as_before(&machine, &report.error.unwrap());
    machine.kernel.borrow_mut().modules.insert("vfio-pci".into());
    assert_eq!(run(&machine, &format!("bind {BDF}")).0.exit, Exit::Done);
    assert_eq!(machine.kernel.borrow().loaded, ["vfio-pci"]);
}

#[test]
fn huge_pages_are_never_more_than_the_machine_can_spare() {
    let machine = machine();
    let (report, _) = run(&machine, &format!("bind {BDF} --hugepages 7GiB"));
    assert_eq!(report.exit, Exit::Failed);
    as_before(&machine, &report.error.unwrap());
    machine.kernel.borrow_mut().pages_max = 100;
    let (report, _) = run(&machine, &format!("bind {BDF}"));
    assert_eq!(report.exit, Exit::Done);
    assert!(report.out.contains("found room for 100 of 256 pages on NUMA node 0"), "{}", report.out);
}

#[test]
fn a_drive_that_a_process_drives_is_not_taken_from_it() {
    let machine = machine();
    assert_eq!(run(&machine, &format!("bind {BDF}")).0.exit, Exit::Done);
    machine.open_in_process(99, "reactor_0", "/dev/vfio/7");
    machine.write("/sys/kernel/iommu_groups/7/type", "identity\n");
    for line in [format!("unbind {BDF}"), format!("bind {BDF} --driver uio_pci_generic")] {
        let (report, _) = run(&machine, &line);
        assert_eq!(report.exit, Exit::Refused, "{line}: {report:?}");
        let error = report.error.unwrap();
        assert!(error.contains("process 99 (reactor_0) drives it through /dev/vfio/7"), "{error}");
        assert_eq!(machine.driver_of(BDF).as_deref(), Some("vfio-pci"));
    }
    assert_eq!(run(&machine, &format!("bind {BDF}")).0.exit, Exit::Done, "bound already");
}

#[test]
fn a_drive_without_a_driver_is_bound_with_a_word_of_warning() {
    let machine = machine();
    machine.remove(&format!("/sys/bus/pci/devices/{BDF}/driver"));
    machine.remove(&format!("/sys/bus/pci/devices/{BDF}/nvme"));
    let (report, told) = run(&machine, &format!("bind {BDF}"));
    assert_eq!(report.exit, Exit::Done, "{report:?}");
    assert!(told.contains("could not be looked at"), "{told}");
    assert_eq!(machine.driver_of(BDF).as_deref(), Some("vfio-pci"));
}

#[test]
fn a_drive_that_is_bound_another_way_stays_bound_that_way() {
    let machine = machine();
    let device = format!("/sys/bus/pci/devices/{BDF}");
    // VFIO makes a group of its own in no-IOMMU mode, which is no protection and must not be shown as such.
    machine.write("/sys/kernel/iommu_groups/7/name", "vfio-noiommu\n");
    machine.link(&format!("{device}/driver"), "../../drivers/uio_pci_generic");
    machine.remove(&format!("{device}/nvme"));
    let (report, _) = run(&machine, &format!("bind {BDF} --hugepages 0"));
    assert_eq!(report.exit, Exit::Done);
    assert!(report.out.contains("bound to uio_pci_generic already"), "{}", report.out);
    let (report, _) = run(&machine, "list --json");
    let value: serde_json::Value = serde_json::from_str(&report.out).unwrap();
    assert_eq!(value["controllers"][0]["iommu_group"], serde_json::Value::Null);
    // In the same mode, another device in the group is no obstacle either.
    let machine = self::machine();
    machine.write("/sys/kernel/iommu_groups/7/name", "vfio-noiommu\n");
    machine.write("/sys/module/vfio/parameters/enable_unsafe_noiommu_mode", "Y");
    let (report, _) = run(&machine, &format!("bind {BDF}"));
    assert!(report.out.contains("no IOMMU for this drive"), "{report:?}");
}

#[test]
fn another_driver_is_left_alone() {
    let machine = machine();
    machine.link(&format!("/sys/bus/pci/devices/{BDF}/driver"), "../../drivers/xen-pciback");
    machine.remove(&format!("/sys/bus/pci/devices/{BDF}/nvme"));
    for line in [format!("bind {BDF}"), format!("unbind {BDF}")] {
        let (report, _) = run(&machine, &line);
        assert_eq!(report.exit, Exit::Refused, "{report:?}");
        assert!(report.error.unwrap().contains("xen-pciback"));
    }
}

#[test]
fn the_list_shows_drives_their_users_and_their_contents() {
    let machine = formatted();
    machine.add_disk("0000:02:00.0", "nvme1", "S2");
    machine.add_partition("nvme1n1", 1, 2048, 4096);
    let dev = machine.read("/sys/class/block/nvme1n1p1/dev");
    machine.mount(&dev, "/boot", "ext4", "/dev/nvme1n1p1");
    machine.add_disk("0000:03:00.0", "nvme2", "S3");
    assert_eq!(run(&machine, "bind 0000:03:00.0 --dry-run").0.exit, Exit::Failed, "one group");
    machine.link("/sys/bus/pci/devices/0000:03:00.0/driver", "../../drivers/vfio-pci");
    machine.remove("/sys/bus/pci/devices/0000:03:00.0/nvme");
    machine.open_in_process(99, "reactor_0", "/dev/vfio/7");
    let (report, _) = run(&machine, "list");
    let out = report.out;
    let first: Vec<&str> = out.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(first, [BDF, "Fake", "Disk", "SN", "1", "1.0", "64.0", "MiB", "nvme", "0", "7", "nvme0n1"]);
    for text in [
        "the Basalt device 'cache' 07070707-0707-0707-0707-070707070707, started 5 times",
        "/dev/nvme1n1p1 is mounted at /boot (ext4) (this machine runs from it)",
        "bound to vfio-pci for user space",
        "process 99 (reactor_0)",
        "1234:5678",
    ] {
        assert!(out.contains(text), "no {text:?} in\n{out}");
    }
    let (report, _) = run(&machine, "list --json");
    let value: serde_json::Value = serde_json::from_str(&report.out).unwrap();
    let drives = value["controllers"].as_array().unwrap();
    assert_eq!(drives.len(), 3);
    assert_eq!(drives[0]["namespaces"][0]["basalt"]["label"], "cache");
    assert_eq!(drives[0]["size"], DISK_SIZE);
    assert_eq!(drives[1]["users"][0]["kind"], "mount");
    assert_eq!(drives[2]["driver"], "vfio-pci");
}

#[test]
fn without_root_the_list_says_what_it_could_not_read() {
    let machine = machine();
    machine.remove("/dev/nvme0n1");
    let (report, _) = run(&machine, "list");
    assert_eq!(report.exit, Exit::Done);
    assert!(report.out.contains("contents not read"), "{}", report.out);
    let empty = run(&Machine::new(), "list").0;
    assert!(empty.out.contains("no NVMe controller"), "{}", empty.out);
}

#[test]
fn refusals_and_results_are_json_where_a_script_asks() {
    let machine = machine();
    machine.put("nvme0n1", 0, b"XFSB");
    let (report, _) = run(&machine, &format!("bind {BDF} --json"));
    let value: serde_json::Value = serde_json::from_str(&report.out).unwrap();
    assert_eq!((report.exit, &value["refused"]), (Exit::Refused, &true.into()));
    assert_eq!(value["data"][0], "/dev/nvme0n1: an XFS file system");
    assert!(value["error"].as_str().is_some_and(|text| text.contains("carries data")), "{value}");
    for line in ["bind", "unbind", "identify"].map(|command| format!("{command} 0000:09:00.0")) {
        let (plain, _) = run(&machine, &line);
        assert!(plain.out.is_empty(), "{line}: {}", plain.out);
        let (report, _) = run(&machine, &format!("{line} --json"));
        let value: serde_json::Value = serde_json::from_str(&report.out).unwrap();
        assert_eq!((report.exit, &report.error), (Exit::Failed, &plain.error), "{line}");
        assert_eq!(value["bdf"], "0000:09:00.0");
        assert_eq!(value["error"].as_str(), plain.error.as_deref(), "{line}");
    }
    let (report, _) = run(&machine, &format!("unbind {BDF} --json"));
    let value: serde_json::Value = serde_json::from_str(&report.out).unwrap();
    assert_eq!((&value["driver"], &value["was_bound"]), (&"nvme".into(), &true.into()));
}

#[test]
fn identify_tells_what_sysfs_knows_and_why_it_knows_nothing() {
    let machine = machine();
    for (attribute, value) in [
        ("queue/write_cache", "write back"),
        ("queue/fua", "1"),
        ("queue/max_hw_sectors_kb", "512"),
        ("queue/chunk_sectors", "256"),
    ] {
        machine.write(&format!("/sys/class/block/nvme0n1/{attribute}"), value);
    }
    let (report, _) = run(&machine, &format!("identify {BDF}"));
    for text in ["SN 1", "flushes are needed", "largest transfer   512.0 KiB", "boundary           128.0 KiB"]
    {
        assert!(report.out.contains(text), "no {text:?} in\n{}", report.out);
    }
    let (report, _) = run(&machine, &format!("identify {BDF} --json"));
    let value: serde_json::Value = serde_json::from_str(&report.out).unwrap();
    assert_eq!(value["namespaces"][0]["transfer_size_max"], 512 << 10);
    assert_eq!(run(&machine, &format!("bind {BDF}")).0.exit, Exit::Done);
    let (report, _) = run(&machine, &format!("identify {BDF}"));
    assert_eq!((report.exit, report.error.unwrap()), (Exit::Failed, format!("{BDF} was asked")));
    machine.remove(&format!("/sys/bus/pci/devices/{BDF}/driver"));
    let (report, _) = run(&machine, &format!("identify {BDF}"));
    assert!(report.error.unwrap().contains(&format!("basalt device bind {BDF}")), "{}", report.out);
}

#[cfg(not(feature = "spdk"))]
#[test]
fn a_build_without_spdk_says_what_identifying_a_bound_controller_needs() {
    let Err(why) = super::identify::through_spdk(BDF.parse().unwrap()) else { panic!("it was identified") };
    for words in ["--features spdk", "scripts/setup-spdk", &format!("basalt device unbind {BDF}")] {
        assert!(why.contains(words), "no {words:?} in {why}");
    }
    assert!(!why.trim_end_matches('.').contains(". "), "one sentence: {why}");
}
