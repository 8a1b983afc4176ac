//! Bindings to the NVMe driver of SPDK.
//!
//! This crate is where the generated bindings and the C shim for SPDK's macros and inline functions live.
//! It holds none yet: Basalt's `spdk` feature is off by default and the node runs on files and kernel block
//! devices without it.
