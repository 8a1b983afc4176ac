//! Basalt in a virtual machine: a framework for cases that need a kernel, an NVMe controller or a power cut of their own.
//!
//! A case is an ordinary Rust test in `tests/cases`, run by `vm-test/run`. It describes a [`machine::Machine`], boots it
//! ([`vm::Vm`]), runs commands in the guest over a serial port, reaches the node in it through a forwarded TCP port, and
//! breaks things through QEMU's monitor ([`monitor::Monitor`]) or by cutting the power ([`write_log`]).
//!
//! Invariants:
//! - Nothing waits without a limit, and no machine outlives the test that booted it.
//! - A boot is retried once; a case never is.
//! - Nothing is installed on the host, and nothing of the guest reaches beyond it.

mod binary;
mod cpio;
pub mod engine;
pub mod error;
mod guest_image;
pub mod host;
pub mod image;
pub mod machine;
pub mod monitor;
pub mod node;
mod packages;
mod serial;
pub mod vm;
pub mod write_log;
