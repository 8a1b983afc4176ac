//! Each check on a made-up machine, well and unwell.

use super::machine::{FileProbe, Refusal};
use super::*;
use crate::pci::fake::Machine;

fn good_file() -> FileProbe {
    FileProbe { directory: "here".into(), uring: Ok(()), sync: Ok(Vec::new()), free_size: Some(8 << 30) }
}

/// A machine on which nothing is missing.
fn good() -> Machine {
    let machine = Machine::new();
    machine.add_disk("0000:01:00.0", "nvme0", "S1");
    machine.link("/sys/bus/pci/devices/0000:01:00.0/driver", "../../drivers/vfio-pci");
    machine.remove("/sys/bus/pci/devices/0000:01:00.0/nvme");
    machine.set_hugepages(Some(0), 512, 512);
    machine.mount("0:40", "/dev/hugepages", "hugetlbfs", "none");
    machine.write("/sys/devices/system/cpu/isolated", "2-3\n");
    machine.write("/sys/devices/system/cpu/nohz_full", "2-3\n");
    machine.write("/proc/cpuinfo", "processor : 0\nflags : fpu sse4_1 pclmulqdq\n");
    machine
}

fn all(machine: &Machine, file: &FileProbe, with_spdk: bool) -> Vec<Check> {
    examine(&machine.system(), file, with_spdk)
}

#[track_caller]
fn worst(checks: &[Check], name: &str) -> (Status, String) {
    let found = checks.iter().filter(|check| check.name == name).max_by_key(|check| check.status);
    let check = found.unwrap_or_else(|| panic!("no check {name}"));
    let remedy = check.remedy.clone().unwrap_or_default();
    assert_eq!(check.status == Status::Ok, remedy.is_empty(), "{check:?}");
    (check.status, format!("{} -> {remedy}", check.what))
}

#[test]
fn a_good_machine_is_well() {
    let checks = all(&good(), &good_file(), true);
    let bad: Vec<_> = checks.iter().filter(|check| check.status != Status::Ok).collect();
    assert!(bad.is_empty(), "{bad:?}");
}

/// What is broken, the check that notices, how bad that is with `--spdk`, and words of what it says.
type Case = (fn(&Machine), &'static str, Status, &'static str);

#[test]
fn each_thing_that_spdk_needs_is_missed_with_its_remedy() {
    let cases: &[Case] = &[
        (|m| m.set_hugepages(Some(0), 0, 0), "huge pages", Status::Fail, "hugepages=256"),
        (
            |m| m.set_hugepages(Some(0), 512, 0),
            "huge pages",
            Status::Fail,
            "0 bytes of 1.0 GiB on NUMA node 0",
        ),
        (|m| m.set_hugepages(Some(0), 512, 9), "huge pages", Status::Warn, "18.0 MiB of 1.0 GiB"),
        (|m| m.remove("/sys/devices/system/node"), "huge pages", Status::Fail, "CONFIG_HUGETLBFS"),
        (
            |m| m.write("/dev/hugepages/spdk_pid4map_0", ""),
            "leftover pages",
            Status::Warn,
            "rm /dev/hugepages/spdk_pid4map_0",
        ),
        (|m| m.write("/proc/self/mountinfo", ""), "hugetlbfs", Status::Fail, "mount -t hugetlbfs"),
        (|m| m.write("/.dockerenv", ""), "container", Status::Fail, "on the host"),
        (|m| m.write("/proc/1/environ", "PATH=/\0container=lxc\0"), "container", Status::Fail, "on the host"),
        (|m| m.write("/proc/1/cgroup", "0::/kubepods/x\n"), "container", Status::Fail, "on the host"),
        (|m| m.remove("/sys/kernel/iommu_groups"), "IOMMU", Status::Warn, "intel_iommu=on"),
        (
            |m| {
                m.remove("/sys/kernel/iommu_groups");
                m.write("/proc/cmdline", "quiet intel_iommu=off");
            },
            "IOMMU",
            Status::Warn,
            "take intel_iommu=off away",
        ),
        (
            |m| m.write("/sys/kernel/iommu_groups/7/name", "vfio-noiommu\n"),
            "IOMMU",
            Status::Warn,
            "off, or there is none",
        ),
        (
            |m| m.remove("/sys/bus/pci/drivers/vfio-pci"),
            "drivers",
            Status::Fail,
            "neither vfio-pci nor uio_pci_generic",
        ),
        (|m| m.remove("/sys/bus/pci/devices"), "NVMe drives", Status::Fail, "no NVMe controller"),
        (|m| m.remove("/sys/devices/system/cpu/isolated"), "isolated cores", Status::Ok, "nohz_full=2-3"),
        (
            |m| {
                m.remove("/sys/devices/system/cpu/isolated");
                m.remove("/sys/devices/system/cpu/nohz_full");
            },
            "isolated cores",
            Status::Warn,
            "isolcpus=LIST",
        ),
        (
            |m| {
                m.set_hugepages(Some(1), 512, 512);
                m.set_hugepages(Some(0), 0, 0);
            },
            "NUMA",
            Status::Warn,
            "0000:01:00.0 is on node 0, which has no huge pages",
        ),
        (
            |m| {
                let mut kernel = m.kernel.borrow_mut();
                kernel.is_root = false;
                kernel.memlock = Some(8 << 20);
            },
            "locked memory",
            Status::Fail,
            "LimitMEMLOCK=infinity",
        ),
        (|m| m.kernel.borrow_mut().is_root = false, "permissions", Status::Fail, "chown $USER /dev/vfio/7"),
    ];
    for (at, (breakage, name, status, words)) in cases.iter().enumerate() {
        let machine = good();
        breakage(&machine);
        let checks = all(&machine, &good_file(), true);
        let (found, said) = worst(&checks, name);
        assert_eq!(found, *status, "case {at}, {name}: {said}");
        assert!(said.contains(words), "case {at}, {name}: {said}");
        let without = all(&machine, &good_file(), false);
        assert!(
            without.iter().all(|check| check.status != Status::Fail),
            "case {at}: a file needs none of this"
        );
    }
}

#[test]
fn drives_are_told_apart_by_what_keeps_them() {
    let machine = good();
    machine.add_disk("0000:02:00.0", "nvme1", "S2");
    let checks = all(&machine, &good_file(), true);
    let (status, said) = worst(&checks, "NVMe drives");
    assert_eq!(status, Status::Warn);
    assert!(said.contains("basalt device bind 0000:02:00.0"), "{said}");
    // The only drive is the one that the machine runs from.
    let machine = Machine::new();
    machine.add_disk("0000:02:00.0", "nvme1", "S2");
    machine.mount("259:0", "/", "ext4", "/dev/nvme1n1");
    let checks = all(&machine, &good_file(), true);
    let (status, said) = worst(&checks, "NVMe drives");
    assert_eq!(status, Status::Fail);
    assert!(said.contains("add another drive"), "{said}");
}

#[test]
fn an_image_that_does_not_fit_is_foretold() {
    let with = |free_size| FileProbe { free_size, ..good_file() };
    for (free, status, part) in [
        (Some(8 << 30), Status::Ok, "8.0 GiB free"),
        (Some((4 << 30) - 1), Status::Warn, "an image of 4.0 GiB"),
        (None, Status::Warn, "not known"),
    ] {
        let (found, text) = worst(&all(&good(), &with(free), false), "free space");
        assert_eq!(found, status, "{free:?}: {text}");
        assert!(text.contains(part), "{free:?}: {text}");
    }
}

#[test]
fn what_a_file_needs_decides() {
    let refused = |why: &str| Err(Refusal::File(why.to_owned()));
    let no_ring = || Err(Refusal::NoRing("forbidden".into()));
    let at = |uring, sync| FileProbe { directory: "here".into(), uring, sync, free_size: Some(8 << 30) };
    for (file, name, status, words) in [
        (
            at(refused("refuses O_DIRECT"), Ok(vec!["slow".into()])),
            "image file",
            Status::Fail,
            "--engine sync",
        ),
        (
            at(refused("denied"), Err("denied".into())),
            "image file",
            Status::Fail,
            "no image can be made in here: denied",
        ),
        (at(no_ring(), Ok(Vec::new())), "image file", Status::Ok, "O_DIRECT"),
        (at(no_ring(), Ok(vec!["slow".into()])), "image file", Status::Warn, "page cache"),
        (at(no_ring(), Ok(Vec::new())), "io_uring", Status::Warn, "Linux 5.11"),
    ] {
        let (found, said) = worst(&all(&good(), &file, false), name);
        assert_eq!(found, status, "{file:?}: {said}");
        assert!(said.contains(words), "{said}");
    }
    let machine = good();
    let file = at(no_ring(), Ok(Vec::new()));
    machine.write("/proc/self/status", "Name:\tx\nSeccomp:\t2\n");
    assert!(worst(&all(&machine, &file, false), "io_uring").1.contains("seccomp"));
    machine.write("/proc/sys/kernel/io_uring_disabled", "2\n");
    assert!(worst(&all(&machine, &file, false), "io_uring").1.contains("sysctl kernel.io_uring_disabled=0"));
}

#[test]
fn memory_is_what_the_machine_and_the_control_group_leave() {
    let machine = good();
    machine.write("/proc/meminfo", "MemAvailable: 1000 kB\n");
    assert_eq!(worst(&all(&machine, &good_file(), false), "memory").0, Status::Fail);
    machine.write("/proc/meminfo", "MemAvailable: 500000 kB\n");
    assert_eq!(worst(&all(&machine, &good_file(), false), "memory").0, Status::Warn);
    let machine = good();
    machine.write("/sys/fs/cgroup/memory.max", "67108864\n");
    let (status, said) = worst(&all(&machine, &good_file(), false), "memory");
    assert_eq!(status, Status::Fail);
    assert!(said.contains("64.0 MiB may be used (limit of the control group)"), "{said}");
    machine.write("/proc/cpuinfo", "processor : 0\nflags : fpu\n");
    assert_eq!(worst(&all(&machine, &good_file(), false), "CPU").0, Status::Warn);
}

#[test]
fn the_report_is_read_by_people_and_by_scripts() {
    let checks = all(&good(), &good_file(), true);
    let shown = text(&checks, true, true);
    assert!(shown.contains("For NVMe through SPDK:") && shown.ends_with("Ready for SPDK."), "{shown}");
    let value: serde_json::Value = serde_json::from_str(&json(&checks, true)).unwrap();
    assert_eq!(value["ok"], true);
    assert_eq!(value["checks"].as_array().unwrap().len(), checks.len());
    assert_eq!(value["checks"][0]["status"], "ok");
}

/// On the machine that runs the tests: an image can be made where the tests are built.
#[test]
fn a_real_directory_is_tried_and_left_clean() {
    let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let file = machine::probe(directory.path());
    assert!(file.sync.is_ok(), "{file:?}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    let nowhere = machine::probe(&directory.path().join("missing"));
    assert!(matches!(nowhere.uring, Err(Refusal::File(_))) && nowhere.sync.is_err(), "{nowhere:?}");
}
