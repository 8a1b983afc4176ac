//! Bytes on the device: every on-disk type with its encoding and decoding side by side. No I/O here.

pub mod slot;
