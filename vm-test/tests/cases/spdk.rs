//! SPDK on the controllers themselves: what the other cases show over the kernel's block devices must be true here as well.
//! The controllers are bound by `basalt device bind`.

use vm_test::engine::Engine::Spdk;
use vm_test::error::Result;
use vm_test::write_log::Survivors;

use crate::power_cut::Drive;
use crate::{count_from_env, faults, power_cut, shapes, smoke};

#[test]
fn smoke() -> Result<()> {
    smoke::serves_and_restarts(Spdk)
}

#[test]
fn power_cut() -> Result<()> {
    let cuts = count_from_env("BASALT_POWER_CUTS", 6);
    let drive = Drive { engine: Spdk, block_size: 512, serve: "--cores 0,1" };
    power_cut::loses_nothing("power-cut-spdk", drive, cuts)
}

#[test]
fn power_cut_with_4096_byte_blocks_and_one_reactor() -> Result<()> {
    let cuts = count_from_env("BASALT_POWER_CUTS", 4).div_ceil(2);
    let drive = Drive { engine: Spdk, block_size: 4096, serve: "--cores 0" };
    power_cut::loses_nothing("power-cut-spdk-4096", drive, cuts)
}

#[test]
fn power_cut_of_a_node_that_does_not_flush_is_caught() -> Result<()> {
    power_cut::is_caught("power-cut-spdk-planted", Spdk, "--durability never", Survivors::Flushed)
}

#[test]
fn two_namespaces_of_different_block_sizes() -> Result<()> {
    shapes::two_namespaces(Spdk)
}

#[test]
fn an_image_moves_between_host_and_guest() -> Result<()> {
    shapes::moves_between_host_and_guest(Spdk, 512)?;
    shapes::moves_between_host_and_guest(Spdk, 4096)
}

#[test]
fn an_unreadable_block_is_an_error_of_its_key() -> Result<()> {
    faults::unreadable_block(Spdk)
}

#[test]
fn nothing_is_acknowledged_after_a_write_fault() -> Result<()> {
    faults::failing(Spdk, "write")
}

#[test]
fn nothing_is_acknowledged_after_a_flush_error() -> Result<()> {
    faults::failing(Spdk, "flush")
}

#[test]
fn controller_resets_under_load() -> Result<()> {
    faults::resets_under_load("0")?;
    faults::resets_under_load("0,1")
}

#[test]
fn errors_after_the_drive_was_removed() -> Result<()> {
    faults::removal(Spdk)
}
