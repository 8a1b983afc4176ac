//! Giving a controller to a driver for user space, and back.
//!
//! Invariants:
//! - Whether anybody uses the device was asked before; nothing here asks again.
//! - Every step that changed something is on the journal before the next begins, and a step that fails has the journal
//!   undone from its end. Modules stay loaded: by themselves they bind to nothing.
//! - A step whose result is there already is not taken, so running twice changes nothing.

mod journal;

use std::sync::atomic::AtomicBool;

use serde::Serialize;

use super::Bdf;
use super::controller::{self, Controller, device_path};
use super::hugepages::{self, PAGE_SIZE};
use super::system::System;
use journal::Journal;
pub use journal::{Failure, Mode};

const NO_IOMMU_MODE: &str = "/sys/module/vfio/parameters/enable_unsafe_noiommu_mode";

/// Where huge pages are mounted when nothing has mounted any.
const HUGETLBFS: &str = "/dev/hugepages";

/// Share of the available memory that may become huge pages without another wish.
const HUGEPAGES_PERCENT_MAX: u64 = 75;

/// Drivers that hand a device to user space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
pub enum Driver {
    /// VFIO: DMA goes through the IOMMU where there is one.
    #[value(name = "vfio-pci")]
    #[serde(rename = "vfio-pci")]
    VfioPci,
    /// UIO: needs no IOMMU and protects nothing.
    #[value(name = "uio_pci_generic")]
    #[serde(rename = "uio_pci_generic")]
    UioPciGeneric,
}

impl Driver {
    /// The kernel's name.
    pub fn name(self) -> &'static str {
        match self {
            Driver::VfioPci => "vfio-pci",
            Driver::UioPciGeneric => "uio_pci_generic",
        }
    }
}

/// What binding ended with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Bound {
    /// The driver that has the device now.
    pub driver: String,
    /// It was so before.
    pub was_bound: bool,
    /// The steps that were taken, or would be.
    pub steps: Vec<String>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// What is wished for.
#[derive(Debug, Clone, Copy)]
pub struct Wish {
    /// The driver; the best that works when none is named.
    pub driver: Option<Driver>,
    /// Bytes of 2 MiB pages that the device's node should have; 0 leaves them as they are.
    pub hugepages_size: u64,
}

/// Gives a controller to user space.
pub fn bind(
    system: &System,
    controller: &Controller,
    wish: Wish,
    mode: Mode,
    stop: &AtomicBool,
    tell: &mut dyn FnMut(&str),
) -> Result<Bound, Failure> {
    let mut journal = Journal::new(system, mode, stop, tell);
    let result = bind_steps(&mut journal, controller, wish);
    journal.finish(result)
}

/// Gives a controller back to the kernel's driver.
pub fn unbind(
    system: &System,
    controller: &Controller,
    mode: Mode,
    stop: &AtomicBool,
    tell: &mut dyn FnMut(&str),
) -> Result<Bound, Failure> {
    let mut journal = Journal::new(system, mode, stop, tell);
    let result = unbind_steps(&mut journal, controller);
    journal.finish(result)
}

fn bind_steps(
    journal: &mut Journal<'_>,
    controller: &Controller,
    wish: Wish,
) -> Result<(String, bool), String> {
    let current = controller.driver.as_deref();
    let is_wanted = |name: &str| wish.driver.is_none_or(|driver| driver.name() == name);
    if let Some(current) = current.filter(|name| controller.is_user_space() && is_wanted(name)) {
        set_up_hugepages(journal, controller, wish.hugepages_size)?;
        return Ok((current.to_owned(), true));
    }
    check_group(journal.system, controller)?;
    let driver = prepare_driver(journal, controller, wish.driver)?;
    set_up_hugepages(journal, controller, wish.hugepages_size)?;
    hand_over(journal, controller, driver.name(), driver.name())?;
    Ok((driver.name().to_owned(), false))
}

fn unbind_steps(journal: &mut Journal<'_>, controller: &Controller) -> Result<(String, bool), String> {
    let kernels = "nvme";
    let is_there = controller.driver.as_deref() == Some(kernels);
    if is_there && controller.driver_override.is_none() {
        return Ok((kernels.to_owned(), true));
    }
    if !is_there {
        load_driver(journal, kernels, kernels)?;
    }
    // A line of its own clears the reservation.
    hand_over(journal, controller, kernels, "\n")?;
    Ok((kernels.to_owned(), false))
}

/// VFIO opens a group only when every device in it is free of the kernel's drivers.
fn check_group(system: &System, controller: &Controller) -> Result<(), String> {
    let Some(group) = &controller.iommu_group else { return Ok(()) };
    let others = system.list(&format!("/sys/kernel/iommu_groups/{group}/devices"));
    let in_the_way: Vec<String> = others
        .iter()
        .filter_map(|name| name.parse::<Bdf>().ok())
        .filter(|&other| other != controller.bdf)
        .filter_map(|other| Some((other, controller::driver(system, other)?)))
        // Bridges and stubs do no DMA of their own.
        .filter(|(_, driver)| !matches!(driver.as_str(), "vfio-pci" | "pci-stub" | "pcieport"))
        .map(|(other, driver)| format!("{other} (driver {driver})"))
        .collect();
    if in_the_way.is_empty() {
        return Ok(());
    }
    Err(format!(
        "the IOMMU can't tell {} from {}: they share group {group}, which user space gets as a whole or not at all; \
         move the drive to another slot, or turn on ACS in the firmware",
        controller.bdf,
        in_the_way.join(", ")
    ))
}

/// Chooses a driver and makes it ready.
fn prepare_driver(
    journal: &mut Journal<'_>,
    controller: &Controller,
    wish: Option<Driver>,
) -> Result<Driver, String> {
    let system = journal.system;
    if let Some(group) = &controller.iommu_group {
        if wish == Some(Driver::UioPciGeneric) {
            let kind = system.read(&format!("/sys/kernel/iommu_groups/{group}/type"));
            if kind.as_deref() != Some("identity") {
                return Err(
                    "the IOMMU is on, and with uio_pci_generic the drive could not reach memory through it: leave out \
                     --driver, or start the kernel with iommu=pt"
                        .to_owned(),
                );
            }
            return prepare_uio(journal);
        }
        load_driver(journal, Driver::VfioPci.name(), "vfio-pci")?;
        if !system.exists("/sys/module/vfio_iommu_type1") {
            // Part of newer kernels' vfio, or of iommufd: its absence shows when the device is opened.
            journal.load_if_there("vfio_iommu_type1");
        }
        return Ok(Driver::VfioPci);
    }
    if wish == Some(Driver::UioPciGeneric) {
        return prepare_uio(journal);
    }
    match prepare_no_iommu(journal) {
        Ok(()) => Ok(Driver::VfioPci),
        Err(text) if wish.is_some() => Err(text),
        Err(text) => {
            journal.note(format!("{text}; trying uio_pci_generic instead"));
            prepare_uio(journal)
        }
    }
}

const UNPROTECTED: &str = "nothing keeps a faulty program or drive from writing anywhere in memory, and only root can use \
                           it: turn the IOMMU on (VT-d or AMD-Vi in the firmware; intel_iommu=on or amd_iommu=on for the \
                           kernel) where data matters";

fn prepare_uio(journal: &mut Journal<'_>) -> Result<Driver, String> {
    load_driver(journal, "uio_pci_generic", "uio_pci_generic")?;
    journal.note(format!(
        "uio_pci_generic works without an IOMMU: {UNPROTECTED}; it also lets two programs open the drive at once"
    ));
    Ok(Driver::UioPciGeneric)
}

fn prepare_no_iommu(journal: &mut Journal<'_>) -> Result<(), String> {
    load_driver(journal, "vfio-pci", "vfio-pci")?;
    let setting = journal.system.read(NO_IOMMU_MODE);
    match setting.as_deref() {
        Some("Y" | "1") => {}
        Some(old) => {
            let old = old.to_owned();
            journal.write(NO_IOMMU_MODE, "1", "turn on VFIO's no-IOMMU mode", Some(&old))?;
        }
        // What a module has can't be seen before it is loaded.
        None if journal.is_dry() && !journal.system.exists("/sys/module/vfio") => {
            journal.would(
                "turn on VFIO's no-IOMMU mode, or take uio_pci_generic if the kernel was built without it",
            );
        }
        None => {
            return Err("this machine shows no IOMMU for the drive, and its kernel was built without VFIO's no-IOMMU \
                        mode (CONFIG_VFIO_NOIOMMU)"
                .to_owned());
        }
    }
    journal
        .note(format!("there is no IOMMU for this drive, so VFIO runs in its no-IOMMU mode: {UNPROTECTED}"));
    Ok(())
}

/// Loads a driver unless the kernel has it, as a module or built in.
fn load_driver(journal: &mut Journal<'_>, driver: &str, module: &str) -> Result<(), String> {
    let directory = format!("/sys/bus/pci/drivers/{driver}");
    if journal.system.exists(&directory) {
        return Ok(());
    }
    journal.load(module)?;
    if !journal.is_dry() && !journal.system.exists(&directory) {
        return Err(format!("the module {module} was loaded and still there is no driver {driver}"));
    }
    Ok(())
}

/// Raises the 2 MiB pages of the device's node to so many bytes, and mounts them when nothing has.
fn set_up_hugepages(journal: &mut Journal<'_>, controller: &Controller, size: u64) -> Result<(), String> {
    if size == 0 {
        return Ok(());
    }
    let system = journal.system;
    let Some(pool) = hugepages::pool_for(system, controller.numa_node) else {
        return Err(
            "this kernel has no 2 MiB huge pages; `--hugepages 0` binds without setting any up".to_owned()
        );
    };
    let wanted = size.div_ceil(PAGE_SIZE);
    if pool.total < wanted {
        let more = (wanted - pool.total) * PAGE_SIZE;
        let available = memory_available(system);
        if available.is_some_and(|available| more > available / 100 * HUGEPAGES_PERCENT_MAX) {
            return Err(format!(
                "{} MiB of huge pages are more than this machine can spare of its {} MiB of available memory: give less \
                 with --hugepages, or 0 to leave them as they are",
                more >> 20,
                available.unwrap_or(0) >> 20
            ));
        }
        let node = pool.node.map_or(String::new(), |node| format!(" on NUMA node {node}"));
        let path = format!("{}/nr_hugepages", pool.path);
        let what = format!("raise the 2 MiB pages{node} from {} to {wanted}", pool.total);
        journal.write(&path, &wanted.to_string(), &what, Some(&pool.total.to_string()))?;
        let got = system.number(&path).unwrap_or(0);
        if !journal.is_dry() && got < wanted {
            journal.note(format!(
                "the kernel found room for {got} of {wanted} pages{node}, because memory is fragmented: stop what you can \
                 and bind again, or reserve them at boot with hugepages={wanted} on the kernel's command line"
            ));
        }
    } else if pool.free < wanted {
        journal.note(format!(
            "of the {} huge pages there, {} are free: `basalt doctor` tells what killed processes left behind",
            pool.total, pool.free
        ));
    }
    if hugepages::mounts(system).is_empty() {
        journal.mount_hugetlbfs(HUGETLBFS)?;
    }
    Ok(())
}

fn memory_available(system: &System) -> Option<u64> {
    let text = system.read("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? << 10)
}

/// Takes the device from its driver, reserves it and has the kernel give it to `driver`.
fn hand_over(
    journal: &mut Journal<'_>,
    controller: &Controller,
    driver: &str,
    reserve: &str,
) -> Result<(), String> {
    let (system, bdf) = (journal.system, controller.bdf);
    let device = device_path(bdf);
    let reservation = format!("{device}/driver_override");
    if !system.exists(&reservation) {
        return match system.exists(&device) {
            true => Err("this kernel has no driver_override: it is older than Linux 3.16".to_owned()),
            false => Err(format!("{bdf} went away")),
        };
    }
    let is_bound = controller.driver.as_deref() == Some(driver);
    if let Some(old) = controller.driver.as_deref().filter(|_| !is_bound) {
        journal.release(bdf, old)?;
    }
    let old = controller.driver_override.as_deref().unwrap_or("\n");
    let what = match reserve {
        "\n" => format!("end the reservation of {bdf}"),
        name => format!("reserve {bdf} for {name}"),
    };
    if old != reserve {
        journal.write(&reservation, reserve, &what, Some(old))?;
    }
    if !is_bound {
        journal.probe(bdf, driver)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
