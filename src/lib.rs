//! Basalt: a storage node that keeps a log-structured key-value engine directly on one device and serves it to
//! Redis clients. ARCHITECTURE.md is the map.

pub mod cli;
pub mod device;
pub mod engine;
pub mod format;
pub mod limits;
pub mod measure;
pub mod net;
pub mod node;
pub mod owned;
pub mod pci;
pub mod planted;
pub mod probe;
pub mod reactor;
pub mod ring;
pub mod sim;
pub mod size;
pub mod sys;
