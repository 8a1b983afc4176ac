//! SPDK's environment: memory, PCI bus and log, initialised once in a process and never again.

#![expect(unsafe_code, reason = "calls into SPDK")]

use std::ffi::{CString, c_char};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use spdk_sys::{basalt_env_init, basalt_env_options, basalt_log_to, basalt_spdk_version};

use crate::device::DeviceError;
use crate::device::transport_id::TransportId;
use crate::pci::Bdf;

/// How much memory SPDK gets without another wish. Hugepages that hold less are used as they are, down to the least.
const MEMORY_SIZE_DEFAULT: u64 = 512 << 20;
pub(super) const MEMORY_SIZE_MIN: u64 = 128 << 20;

/// What SPDK and DPDK keep for themselves, of the memory: the rest is for DMA buffers.
const MEMORY_SIZE_OF_SPDK: u64 = 64 << 20;

/// How the environment is to be set up. Only the first device of a process has a say.
#[derive(Debug, Clone, Default)]
pub struct EnvOptions {
    /// Bytes of memory for SPDK and all DMA buffers.
    pub memory_size: Option<u64>,
    /// Ordinary pages even where hugepages are free.
    pub no_hugepages: bool,
    /// Hexadecimal mask of the cores that DPDK may think of as its own. It starts no threads there.
    pub core_mask: Option<String>,
}

/// The environment of this process.
#[derive(Debug, Clone)]
pub(super) struct Env {
    has_hugepages: bool,
    is_told_to: bool,
    memory_size: u64,
    pci: Option<Bdf>,
}

static ENV: Mutex<Option<Result<Env, String>>> = Mutex::new(None);

impl Env {
    /// The environment, initialised for `device` if it was not yet.
    pub(super) fn get(device: &TransportId, options: &EnvOptions) -> Result<Env, DeviceError> {
        let mut env = ENV.lock().unwrap_or_else(PoisonError::into_inner);
        let env = env.get_or_insert_with(|| Env::init(device.pci_address(), options));
        let env = env.clone().map_err(|cause| DeviceError::EngineUnavailable { engine: "spdk", cause })?;
        match device.pci_address() {
            Some(address) if env.pci != Some(address) => Err(DeviceError::EngineUnavailable {
                engine: "spdk",
                cause: format!(
                    "SPDK looks at the PCI bus once in a process, and {address} was not among what it looked for; restart"
                ),
            }),
            _ => Ok(env),
        }
    }

    /// A sentence for the user.
    pub(super) fn note(&self) -> String {
        let size = self.memory_size >> 20;
        match (self.has_hugepages, self.is_told_to) {
            (true, _) => format!("SPDK has {size} MiB of hugepages"),
            (false, true) => format!("SPDK has {size} MiB of ordinary pages"),
            (false, false) => format!(
                "SPDK has {size} MiB of ordinary pages, since there are not enough free hugepages; more of them (sysctl \
                 vm.nr_hugepages={}) make it faster",
                MEMORY_SIZE_DEFAULT >> 21
            ),
        }
    }

    /// Bytes that the DMA buffers of one of `queue_count` queues may take.
    pub(super) fn pool_size(&self, queue_count: usize) -> usize {
        ((self.memory_size - MEMORY_SIZE_OF_SPDK) as usize / queue_count.max(1)).clamp(16 << 20, 128 << 20)
    }

    fn init(pci: Option<Bdf>, options: &EnvOptions) -> Result<Env, String> {
        let wanted = options.memory_size.unwrap_or(MEMORY_SIZE_DEFAULT);
        if wanted < MEMORY_SIZE_MIN {
            return Err(format!(
                "{} MiB of memory are too few for SPDK; the least is {} MiB",
                wanted >> 20,
                MEMORY_SIZE_MIN >> 20
            ));
        }
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        let free = match options.no_hugepages {
            true => 0,
            false => free_hugepage_size(&read("/proc/meminfo"), &read("/proc/mounts")),
        };
        let (has_hugepages, memory_size) = match free {
            free if free >= wanted => (true, wanted),
            // Somebody who asked for a size gets it or hears of it.
            free if free >= MEMORY_SIZE_MIN && options.memory_size.is_none() => (true, free),
            _ => (false, wanted),
        };
        if pci.is_some() && !has_hugepages && !has_iommu(Path::new("/sys/kernel/iommu_groups")) {
            return Err(format!(
                "a PCIe controller needs hugepages where there is no IOMMU, and {} MiB of them are free on a mounted hugetlbfs \
                 ({} MiB are needed): basalt device bind sets them up, or sysctl vm.nr_hugepages={}",
                free >> 20,
                MEMORY_SIZE_MIN >> 20,
                wanted >> 21
            ));
        }
        log_to_tracing();
        let name = CString::new("basalt").unwrap_or_default();
        let mask = options.core_mask.clone().unwrap_or_else(first_core_mask);
        let mask = CString::new(mask).map_err(|_| "the core mask has a zero byte".to_owned())?;
        let addresses: Vec<CString> =
            pci.iter().filter_map(|address| CString::new(address.to_string()).ok()).collect();
        let allowed: Vec<*const c_char> = addresses.iter().map(|address| address.as_ptr()).collect();
        let raw = basalt_env_options {
            name: name.as_ptr(),
            core_mask: mask.as_ptr(),
            memory_mib: (memory_size >> 20).min(i32::MAX as u64) as i32,
            no_huge: !has_hugepages,
            no_pci: pci.is_none(),
            pci_allowed: allowed.as_ptr(),
            pci_allowed_count: allowed.len(),
        };
        // SAFETY: the strings and the list outlive the call, which copies them; this runs once, under the lock of `ENV`.
        let code = unsafe { basalt_env_init(&raw) };
        if code != 0 {
            let cause = std::io::Error::from_raw_os_error(code.saturating_neg());
            let pages = if has_hugepages { "hugepages" } else { "ordinary pages" };
            return Err(format!(
                "SPDK could not be initialised with {} MiB of {pages} ({cause}); its log above says more, and basalt doctor \
                 checks what it needs",
                memory_size >> 20
            ));
        }
        Ok(Env { has_hugepages, is_told_to: options.no_hugepages, memory_size, pci })
    }
}

/// The first version of SPDK that disables a controller apart from resetting it, as year and month.
const DISCONNECT_VERSION: u32 = 2301;

/// What an old SPDK can't do for a drive.
pub(super) fn version_note() -> Option<String> {
    // SAFETY: it only returns a number.
    let version = unsafe { basalt_spdk_version() };
    (version < DISCONNECT_VERSION).then(|| {
        format!(
            "SPDK {}.{:02} can't let go of a drive that does not answer any more: the node would hang until it is killed; SPDK \
             23.01 and newer reset such a drive",
            version / 100,
            version % 100
        )
    })
}

/// Bytes of free hugepages of the default size; 0 when no hugetlbfs is mounted to map them from.
fn free_hugepage_size(meminfo: &str, mounts: &str) -> u64 {
    let figure = |name: &str| -> u64 {
        meminfo
            .lines()
            .filter_map(|line| line.strip_prefix(name))
            .find_map(|rest| rest.trim_start_matches(':').split_whitespace().next()?.parse().ok())
            .unwrap_or(0)
    };
    let is_mounted = mounts.lines().any(|line| line.split(' ').nth(2) == Some("hugetlbfs"));
    if is_mounted { figure("HugePages_Free") * (figure("Hugepagesize") << 10) } else { 0 }
}

/// Whether there is an IOMMU. Where there is none, VFIO makes groups of its own, and names them.
fn has_iommu(groups: &Path) -> bool {
    let is_real = |group: &std::fs::DirEntry| {
        std::fs::read_to_string(group.path().join("name")).map_or(true, |name| name.trim() != "vfio-noiommu")
    };
    std::fs::read_dir(groups).is_ok_and(|groups| groups.flatten().any(|group| is_real(&group)))
}

/// A core that this process may run on: DPDK wants one, although nothing of it stays there.
fn first_core_mask() -> String {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let first = cores.iter().map(|core| core.id).min().unwrap_or(0);
    let (words, bit) = (first / 4, first % 4);
    format!("0x{:x}{}", 1 << bit, "0".repeat(words))
}

fn log_to_tracing() {
    // SAFETY: the sink is a plain function that lives as long as the program.
    unsafe { basalt_log_to(Some(log_line)) };
}

extern "C" fn log_line(level: i32, text: *const c_char, length: usize) {
    // SAFETY: the shim gives a buffer of that length, valid during the call.
    let bytes = unsafe { std::slice::from_raw_parts(text.cast::<u8>(), length) };
    let text = String::from_utf8_lossy(bytes);
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        match level {
            0 => tracing::error!(target: "spdk", "{line}"),
            1 => tracing::warn!(target: "spdk", "{line}"),
            // Its notices are details of its start.
            2 => tracing::debug!(target: "spdk", "{line}"),
            _ => tracing::trace!(target: "spdk", "{line}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hugepages_count_only_where_they_can_be_mapped() {
        let meminfo =
            "MemFree: 1 kB\nHugePages_Total:  300\nHugePages_Free:      256\nHugepagesize:       2048 kB\n";
        let mounts = "proc /proc proc rw 0 0\nhugetlbfs /dev/hugepages hugetlbfs rw 0 0\n";
        assert_eq!(free_hugepage_size(meminfo, mounts), 512 << 20);
        assert_eq!(free_hugepage_size(meminfo, "tmpfs /dev/hugepages tmpfs rw 0 0\n"), 0);
        assert_eq!(free_hugepage_size("", mounts), 0);
    }

    #[test]
    fn groups_of_vfio_without_an_iommu_are_none() {
        let directory = tempfile::tempdir().unwrap();
        assert!(!has_iommu(directory.path()) && !has_iommu(&directory.path().join("none")));
        std::fs::create_dir(directory.path().join("0")).unwrap();
        std::fs::write(directory.path().join("0/name"), "vfio-noiommu\n").unwrap();
        assert!(!has_iommu(directory.path()));
        std::fs::create_dir(directory.path().join("1")).unwrap();
        assert!(has_iommu(directory.path()));
    }

    #[test]
    fn too_little_memory_is_told_before_anything_is_touched() {
        let options = EnvOptions { memory_size: Some(64 << 20), ..EnvOptions::default() };
        assert!(Env::init(None, &options).unwrap_err().contains("too few"));
    }
}
