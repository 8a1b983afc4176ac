//! Bindings to the NVMe driver of SPDK: what `build.rs` names, generated at build time, and a C shim over SPDK's macros,
//! bit fields and version differences.
//!
//! Only with the feature `link`; without it the crate is empty, so that a workspace builds without SPDK. How the functions
//! may be called is written in SPDK's own headers; Basalt's safe layer over them is `basalt::device::spdk`.

#[cfg(feature = "link")]
#[expect(
    missing_docs,
    non_camel_case_types,
    unsafe_code,
    clippy::allow_attributes,
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    reason = "generated from C headers, with their names"
)]
mod bindings {
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}

#[cfg(feature = "link")]
pub use bindings::*;
