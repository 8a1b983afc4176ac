//! Every program of up to two operations, crashed at every event, with every subset of the writes that were not flushed
//! (sampled where there are many), torn in three ways, and some of the recoveries crashed again.
//!
//! `BASALT_PROGRAM_LENGTH=3 cargo test --release --test sim_exhaustive` is the long run.

#![cfg(test)]

mod sim_harness;

use basalt::device::sim::Tear;
use sim_harness::exhaustive::{every_crash_point, programs};

fn run(tear: Tear) {
    let length = std::env::var("BASALT_PROGRAM_LENGTH").map_or(2, |text| text.parse().unwrap());
    let tried = every_crash_point(tear, &programs(length));
    let images_min = if length < 2 { 100 } else { 20_000 };
    assert!(
        tried.images >= images_min && tried.nested >= images_min / 100,
        "only {} images, {} nested",
        tried.images,
        tried.nested
    );
}

#[test]
fn every_crash_point_with_writes_torn_at_blocks() {
    run(Tear::Block);
}

#[test]
fn every_crash_point_with_writes_torn_at_512_bytes() {
    run(Tear::Sector512);
}

#[test]
fn every_crash_point_with_writes_torn_at_any_byte() {
    run(Tear::Byte);
}
