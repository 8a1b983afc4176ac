//! What a controller says of itself, for people: connect, ask, detach.

#![expect(unsafe_code, reason = "calls into SPDK")]

use spdk_sys::{basalt_controller_info, basalt_namespace_info};

use super::controller::{
    Attached, active_namespace, active_namespaces, connect, controller_info, namespace_info, text,
    unreachable_cause,
};
use super::env::{Env, MEMORY_SIZE_MIN};
use super::health::HealthPage;
use super::{EnvOptions, claim};
use crate::device::transport_id::TransportId;
use crate::device::{DeviceError, Health};
use crate::limits;

/// A controller and its namespaces.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Model.
    pub model: String,
    /// Serial number.
    pub serial: String,
    /// Firmware revision.
    pub firmware: String,
    /// NVMe qualified name of the subsystem; empty where it names none.
    pub subsystem: String,
    /// Whether completed writes may be lost with the power until a Flush.
    pub volatile_write_cache: bool,
    /// Those that are active.
    pub namespaces: Vec<NamespaceIdentity>,
    /// Wear and health, where it tells.
    pub health: Option<Health>,
}

/// One namespace.
#[derive(Debug, Clone, Copy)]
pub struct NamespaceIdentity {
    /// As in `ns:N`.
    pub id: u32,
    /// Bytes.
    pub size: u64,
    /// Bytes of one block.
    pub block_size: u32,
    /// Bytes of metadata with each block.
    pub metadata_size: u32,
    /// Bytes that one command carries at most.
    pub transfer_size_max: u32,
    /// Bytes; 0 for none.
    pub optimal_boundary_size: u64,
    /// Whether blocks can be given up.
    pub deallocate: bool,
    /// NGUID; zeros for none.
    pub nguid: [u8; 16],
    /// EUI-64; 0 for none.
    pub eui64: u64,
}

impl NamespaceIdentity {
    fn new(id: u32, info: &basalt_namespace_info) -> NamespaceIdentity {
        let block_size = info.block_size;
        NamespaceIdentity {
            id,
            size: info.block_count * u64::from(block_size),
            block_size,
            metadata_size: info.metadata_size,
            transfer_size_max: info.transfer_size_max,
            optimal_boundary_size: u64::from(info.optimal_boundary) * u64::from(block_size),
            deallocate: info.supports_deallocate,
            nguid: info.nguid,
            eui64: info.eui64,
        }
    }
}

/// Asks a controller. It must be free: connecting to one over PCIe resets it.
pub fn identify(device: &TransportId) -> Result<Identity, DeviceError> {
    // Asking takes hardly any memory.
    let memory = EnvOptions { memory_size: Some(MEMORY_SIZE_MIN), ..EnvOptions::default() };
    Env::get(device, &memory)?;
    let _claim = claim::claim(device, 0)?;
    let name = device.to_string();
    let unreachable = || DeviceError::Unusable { name, cause: unreachable_cause(device) };
    let controller = connect(device, limits::DEVICE_DEPTH as u32).ok_or_else(unreachable)?;
    let _attached = Attached(Some(controller));
    let info = controller_info(controller);
    let basalt_controller_info { volatile_write_cache, .. } = info.raw;
    let namespaces = active_namespaces(controller).into_iter().filter_map(|id| {
        let namespace = active_namespace(controller.as_ptr(), id)?;
        Some(NamespaceIdentity::new(id, &namespace_info(namespace)))
    });
    let namespaces = namespaces.collect();
    // SAFETY: it is detached after this, and this thread alone has it.
    let health = unsafe { HealthPage::read(controller) };
    Ok(Identity {
        model: info.model,
        serial: info.serial,
        firmware: text(&info.raw.firmware),
        subsystem: text(&info.raw.subsystem),
        volatile_write_cache,
        namespaces,
        health,
    })
}
