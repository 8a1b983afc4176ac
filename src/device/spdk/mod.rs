//! The `spdk` engine: NVMe controllers that this process owns, over PCIe or TCP, through SPDK's NVMe driver.
//!
//! [`SpdkNamespace`] is a controller's namespace; each reactor opens a [`SpdkQueue`] on it, which is a queue pair of its own.
//!
//! Durability: a device without a volatile write cache is durable at completion and is sent no Flush; every other one is
//! sent a Flush after each group of writes. FUA is not relied on.

mod claim;
mod completions;
mod controller;
mod dma;
mod env;
mod events;
mod health;
mod identify;
mod namespace;
mod queue;
mod recovery;
mod status;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::sync::Arc;

use controller::Controller;
pub use controller::Timeouts;
use env::Env;
pub use env::EnvOptions;
pub use identify::{Identity, NamespaceIdentity, identify};
pub use queue::SpdkQueue;

use super::transport_id::TransportId;
use super::{DeviceError, Geometry, Health, Namespace};
use crate::limits;

/// How to open a namespace.
#[derive(Debug, Clone, Default)]
pub struct SpdkOptions {
    /// Memory and cores.
    pub env: EnvOptions,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// Queues that will be open at a time; they share the memory.
    pub queue_count: usize,
}

/// A namespace that this process has claimed.
pub struct SpdkNamespace {
    name: String,
    geometry: Geometry,
    notes: Vec<String>,
    pool_size: usize,
    controller: Arc<Controller>,
    /// Last, and so dropped last: the next one may connect when this one is off the controller.
    _claim: File,
}

impl SpdkNamespace {
    /// Connects to the controller and claims the namespace.
    pub fn open(device: &TransportId, options: &SpdkOptions) -> Result<SpdkNamespace, DeviceError> {
        let env = Env::get(device, &options.env)?;
        let controller = Controller::connect(device, limits::DEVICE_DEPTH as u32, options.timeouts)?;
        let claim = claim::claim(device, controller.shared.namespace_id)?;
        let name = device.to_string();
        if let Some(cause) = namespace::refusal(&controller.namespace) {
            return Err(DeviceError::Unusable { name, cause });
        }
        let queue_size = namespace::queue_size(&controller.info.raw);
        let geometry = namespace::geometry(&controller.info.raw, &controller.namespace, queue_size);
        let mut notes = vec![
            env.note(),
            format!(
                "{name} is {} (serial {}), namespace {}: {}",
                controller.info.model,
                controller.info.serial,
                controller.shared.namespace_id,
                namespace::durability_note(&geometry)
            ),
        ];
        if !controller.shared.is_fabrics {
            notes.extend(env::version_note());
        }
        if let Some(health) = controller.shared.health.get().filter(|health| health.critical_warning != 0) {
            notes.push(health::warning(&health));
        }
        Ok(SpdkNamespace {
            name,
            geometry,
            notes,
            pool_size: env.pool_size(options.queue_count),
            controller: Arc::new(controller),
            _claim: claim,
        })
    }

    /// What the user should know about how it was opened.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Model and serial number of the controller.
    pub fn model_and_serial(&self) -> (&str, &str) {
        (&self.controller.info.model, &self.controller.info.serial)
    }
}

impl Namespace for SpdkNamespace {
    type Queue = SpdkQueue;

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn open_queue(&self) -> Result<SpdkQueue, DeviceError> {
        SpdkQueue::open(Arc::clone(&self.controller), self.geometry.clone(), self.pool_size)
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn health(&self) -> Option<Health> {
        self.controller.shared.health.get()
    }
}

impl std::fmt::Debug for SpdkNamespace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SpdkNamespace").field("name", &self.name).finish_non_exhaustive()
    }
}
