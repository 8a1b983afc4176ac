//! The smoke test of the link group: transports register themselves in constructors that static linking likes to drop.

#![expect(unsafe_code, reason = "calls into SPDK")]

use spdk_sys::{basalt_spdk_version, spdk_nvme_transport_available_by_name};

fn is_available(name: &std::ffi::CStr) -> bool {
    // SAFETY: the name ends in a zero byte, and the list of transports was filled before main.
    unsafe { spdk_nvme_transport_available_by_name(name.as_ptr()) }
}

#[test]
fn the_pcie_and_tcp_transports_are_linked_in() {
    assert!(is_available(c"PCIE"));
    assert!(is_available(c"TCP"));
    assert!(!is_available(c"NONE"));
}

#[test]
fn the_library_is_the_version_of_the_headers() {
    // SAFETY: it reads a constant.
    let version = unsafe { basalt_spdk_version() };
    assert!(version >= 2007, "{version}");
}
