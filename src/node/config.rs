//! What a node is told at its start.

use crate::engine::durability::Durability;
use crate::engine::io_queue::IoPolicy;
use crate::engine::io_queue::cost::DeviceProfile;
use crate::limits::{CONNECTION_COUNT_MAX, MEMORY_SIZE_DEFAULT, SCRUB_RATE_DEFAULT};
use crate::reactor::SpinPolicy;

use super::shared::ProfileSource;

/// Settings of a node beyond its device and its port.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// When a write is acknowledged.
    pub durability: Durability,
    /// Whether the device is told which extents are free; `None` leaves it to the kind of device.
    pub trim: Option<bool>,
    /// Bytes that a reactor writes between two checkpoints; `None` leaves it to the size of the device, 0 is never.
    pub checkpoint_interval: Option<u64>,
    /// The core that each reactor is pinned to; `None` leaves it to the kernel.
    pub cores: Vec<Option<usize>>,
    /// How long an idle reactor polls before it sleeps.
    pub spin: SpinPolicy,
    /// Connections that the whole node serves.
    pub connection_count_max: usize,
    /// Bytes of memory that the node may take, at least [`super::memory::memory_size_min`].
    pub memory_size_max: u64,
    /// Bytes a second that are read again to find damage; 0 for none.
    pub scrub_rate: u64,
    /// In which order commands go to the device.
    pub io_policy: IoPolicy,
    /// What the device can do, where that was measured.
    pub io_profile: Option<DeviceProfile>,
    /// Of which disk.
    pub io_profile_source: ProfileSource,
    /// In-process callers that will be given a [`super::Client`].
    pub client_count: usize,
}

impl Default for NodeConfig {
    fn default() -> Self {
        NodeConfig {
            durability: Durability::Always,
            trim: None,
            checkpoint_interval: None,
            cores: vec![None],
            spin: SpinPolicy::default(),
            connection_count_max: CONNECTION_COUNT_MAX,
            memory_size_max: MEMORY_SIZE_DEFAULT,
            scrub_rate: SCRUB_RATE_DEFAULT,
            io_policy: IoPolicy::default(),
            io_profile: None,
            io_profile_source: ProfileSource::Assumed,
            client_count: 0,
        }
    }
}
