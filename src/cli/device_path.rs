//! What a device is called on the command line, and opening it with the engine that was asked for.

use std::path::{Path, PathBuf};
#[cfg(feature = "spdk")]
use std::time::Duration;

use super::engine_name::EngineName;
use super::{SpdkArgs, note};
use crate::device::file::{DirectIo, FileOptions};
use crate::device::kernel::{KernelEngine, KernelNamespace};
use crate::device::signature::{self, Finding};
#[cfg(feature = "spdk")]
use crate::device::spdk::{EnvOptions, SpdkNamespace, SpdkOptions, Timeouts};
use crate::device::transport_id::TransportId;
use crate::device::uring::UringNamespace;
use crate::device::uring_options::UringOptions;
use crate::device::{Device, DeviceError, Namespace, blocking};
use crate::engine::device_format::{OpenError, read_superblock};
use crate::pci::{Bdf, controller, system::System};

/// What is served, and looked at, where nobody names a device.
pub(super) const DEVICE_DEFAULT: &str = "./basalt.img";

/// A device opened with one of the engines.
pub(super) enum AnyNamespace {
    Uring(UringNamespace),
    Kernel(KernelNamespace),
    #[cfg(feature = "spdk")]
    Spdk(SpdkNamespace),
}

/// Runs generic code on whichever engine a device was opened with.
macro_rules! with_namespace {
    ($any:expr, $name:ident => $body:expr) => {
        match $any {
            $crate::cli::device_path::AnyNamespace::Uring($name) => $body,
            $crate::cli::device_path::AnyNamespace::Kernel($name) => $body,
            #[cfg(feature = "spdk")]
            $crate::cli::device_path::AnyNamespace::Spdk($name) => $body,
        }
    };
}
pub(super) use with_namespace;

/// How a device is to be opened.
#[derive(Debug, Clone, Copy, Default)]
#[cfg_attr(
    not(feature = "spdk"),
    expect(dead_code, reason = "what concerns SPDK is read where it is built in")
)]
pub(super) struct OpenOptions<'a> {
    pub(super) engine: Option<EngineName>,
    /// Create a file of this size, which must not exist yet.
    pub(super) create_size: Option<u64>,
    /// What the user calls a file that has another name for now.
    pub(super) name: Option<&'a Path>,
    pub(super) spdk: Option<&'a SpdkArgs>,
    /// Queues that will be open at a time.
    pub(super) queue_count: usize,
}

/// The NVMe namespace that a device's name means; `None` for files and block devices.
pub(super) fn transport_id(path: &Path) -> Option<Result<TransportId, DeviceError>> {
    let text = path.to_string_lossy();
    // A file may be called like anything, and who has one means it.
    if !TransportId::is_meant_by(&text) || path.exists() {
        return None;
    }
    Some(
        TransportId::parse(&text).map_err(|error| DeviceError::Unusable {
            name: text.into_owned(),
            cause: error.cause().to_owned(),
        }),
    )
}

/// Opens a device. Without a wish for an engine, an NVMe controller's name means `spdk`, and everything else io_uring, or
/// `sync` where that is forbidden.
pub(super) fn open(path: &Path, options: OpenOptions<'_>) -> Result<AnyNamespace, DeviceError> {
    if let Some(id) = transport_id(path) {
        return open_controller(&id?, options);
    }
    let file_options = FileOptions {
        create_size: options.create_size,
        direct: DirectIo::Required,
        name: options.name.map(|name| name.display().to_string()),
    };
    let open_kernel =
        |engine| KernelNamespace::open_with_options(engine, path, &file_options).map(AnyNamespace::Kernel);
    let open_uring = |uring_options| {
        UringNamespace::open_with_options(path, &file_options, uring_options).map(AnyNamespace::Uring)
    };
    let namespace = match options.engine {
        Some(EngineName::Spdk) => {
            return Err(DeviceError::Unusable {
                name: path.display().to_string(),
                cause: not_for_spdk(path),
            });
        }
        Some(EngineName::Kernel(engine)) => open_kernel(engine)?,
        Some(EngineName::Uring(uring_options)) => open_uring(uring_options)?,
        None => match open_uring(UringOptions::default()) {
            Ok(namespace) => namespace,
            Err(DeviceError::EngineUnavailable { cause, .. }) => {
                note(format!("io_uring is not available ({cause}); using the slower sync engine"));
                open_kernel(KernelEngine::Sync)?
            }
            Err(error) => return Err(error),
        },
    };
    let notes = match &namespace {
        AnyNamespace::Uring(namespace) => namespace.notes(),
        AnyNamespace::Kernel(namespace) => namespace.notes(),
        #[cfg(feature = "spdk")]
        AnyNamespace::Spdk(_) => Vec::new(),
    };
    for text in notes {
        note(text);
    }
    Ok(namespace)
}

/// What [`open`] would use for a path without a wish for an engine, without opening it.
pub(super) fn engine_default(path: &Path) -> EngineName {
    match transport_id(path) {
        Some(_) => EngineName::Spdk,
        None if UringNamespace::is_available() => EngineName::Uring(UringOptions::default()),
        None => EngineName::Kernel(KernelEngine::Sync),
    }
}

/// Why the engine `spdk` can't drive a path, and what would be named instead.
fn not_for_spdk(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let controllers = controller::list(&System::host());
    let owner = controllers.iter().find(|one| {
        one.namespaces
            .iter()
            .any(|namespace| namespace.name == name || namespace.path_name.as_deref() == Some(&name))
    });
    match owner {
        Some(controller) => format!(
            "the kernel drives it, and the spdk engine takes its whole controller from the kernel: `basalt device bind {bdf}`, \
             then name it '{bdf}'",
            bdf = controller.bdf
        ),
        None => "the spdk engine drives NVMe controllers, by PCI address or transport id, and neither files nor the kernel's \
                 block devices; leave --engine out"
            .to_owned(),
    }
}

fn open_controller(id: &TransportId, options: OpenOptions<'_>) -> Result<AnyNamespace, DeviceError> {
    let unusable = |cause: &str| DeviceError::Unusable { name: id.to_string(), cause: cause.to_owned() };
    if options.engine.is_some_and(|engine| engine != EngineName::Spdk) {
        return Err(unusable("only the spdk engine drives it; leave --engine out"));
    }
    if options.create_size.is_some() {
        return Err(unusable("its size is what it is; leave --size out"));
    }
    if let Some(bdf) = id.pci_address() {
        is_for_user_space(&System::host(), bdf).map_err(|cause| unusable(&cause))?;
    }
    open_spdk(id, options)
}

/// Whether SPDK can have a controller at all: what the bus says is plainer than what SPDK would say.
fn is_for_user_space(system: &System, bdf: Bdf) -> Result<(), String> {
    let controller = controller::find(system, bdf).map_err(|error| error.to_string())?;
    let bind =
        format!("`basalt device bind {bdf}` gives it to user space, unless it is in use or carries data");
    match controller.driver.as_deref() {
        Some(_) if controller.is_user_space() => Ok(()),
        Some(driver) => Err(format!("the kernel's driver {driver} has it; {bind}")),
        None => Err(format!("no driver has it; {bind}")),
    }
}

#[cfg(feature = "spdk")]
fn open_spdk(id: &TransportId, options: OpenOptions<'_>) -> Result<AnyNamespace, DeviceError> {
    let SpdkArgs { spdk_memory, no_hugepages, command_timeout } = options.spdk.cloned().unwrap_or_default();
    let mut timeouts = Timeouts::default();
    if let Some(seconds) = command_timeout {
        timeouts.command = Duration::from_secs(seconds.into());
    }
    let env = EnvOptions { memory_size: spdk_memory, no_hugepages, ..EnvOptions::default() };
    let options = SpdkOptions { env, timeouts, queue_count: options.queue_count.max(1) };
    let namespace = SpdkNamespace::open(id, &options)?;
    for text in namespace.notes() {
        note(text);
    }
    Ok(AnyNamespace::Spdk(namespace))
}

#[cfg(not(feature = "spdk"))]
fn open_spdk(id: &TransportId, _options: OpenOptions<'_>) -> Result<AnyNamespace, DeviceError> {
    Err(DeviceError::EngineUnavailable {
        engine: "spdk",
        cause: format!(
            "'{id}' names an NVMe controller, and this build can't drive one; run scripts/setup-spdk, then build with \
             `cargo build --release --features spdk`"
        ),
    })
}

impl AnyNamespace {
    /// Model and serial number of a controller that the engine owns: who has it formatted all the same says the latter.
    pub(super) fn model_and_serial(&self) -> Option<(&str, &str)> {
        match self {
            #[cfg(feature = "spdk")]
            AnyNamespace::Spdk(namespace) => Some(namespace.model_and_serial()),
            AnyNamespace::Uring(_) | AnyNamespace::Kernel(_) => None,
        }
    }
}

/// The name that a new file is formatted under before it gets its own.
pub(super) fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".unfinished");
    name.into()
}

/// What is on a device that would be lost by formatting it.
pub(super) fn findings<N: Namespace>(namespace: &N) -> Result<Vec<String>, String> {
    let mut queue = namespace.open_queue().map_err(|error| error.to_string())?;
    match read_superblock(&mut queue) {
        Ok(quorum) => {
            let superblock = quorum.superblock;
            let label =
                if superblock.label.is_empty() { String::new() } else { format!(" '{}'", superblock.label) };
            let uuid = uuid::Uuid::from_bytes(superblock.uuid);
            return Ok(vec![format!(
                "a Basalt device{label} (UUID {uuid}, started {})",
                crate::size::count(superblock.boot, "time")
            )]);
        }
        Err(OpenError::Superblock(crate::format::superblock::NoQuorum::NotFormatted)) => {}
        Err(OpenError::Io(error)) => return Err(error.to_string()),
        Err(error) => return Ok(vec![format!("what was a Basalt device: {error}")]),
    }
    let geometry = queue.geometry().clone();
    let block = u64::from(geometry.block_size);
    let found = signature::probe(
        |offset, length| {
            // The probe asks for any bytes; the device gives whole blocks.
            let first = offset / block * block;
            let size = (offset + length).next_multiple_of(block) - first;
            let bytes = blocking::read(&mut queue, first, size as usize).map_err(std::io::Error::other)?;
            let skip = (offset - first) as usize;
            Ok(bytes[skip..skip + length as usize].to_vec())
        },
        geometry.size(),
    );
    match found {
        Ok(found) => {
            Ok(found.iter().map(|Finding { what, offset }| format!("{what} (at byte {offset})")).collect())
        }
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::fake::Machine;

    #[test]
    fn a_controller_that_spdk_can_not_have_is_refused_by_what_the_bus_says() {
        const BDF: &str = "0000:01:00.0";
        let machine = Machine::new();
        machine.add_disk(BDF, "nvme0", "S1");
        let ask = |text: &str| is_for_user_space(&machine.system(), text.parse().unwrap());
        assert!(ask("0000:00:04.0").unwrap_err().contains("no PCI device 0000:00:04.0"));
        let why = ask(BDF).unwrap_err();
        assert!(why.contains("driver nvme has it") && why.contains(&format!("device bind {BDF}")), "{why}");
        machine.link(&format!("/sys/bus/pci/devices/{BDF}/driver"), "../../drivers/vfio-pci");
        assert_eq!(ask(BDF), Ok(()));
        machine.remove(&format!("/sys/bus/pci/devices/{BDF}/driver"));
        assert!(ask(BDF).unwrap_err().contains("no driver has it"));
    }
}
