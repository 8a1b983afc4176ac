//! The engine: shards, each an index and a log on the device, driven by the reactor that owns them.
//!
//! Invariants:
//! - Nothing here names sockets, threads, clocks, randomness or SPDK: time and seeds come in as arguments.
//! - An operation is answered once, and a write only when its durability mode allows it.

pub mod action;
pub mod op;
