//! Damage on a simulated disk that holds several lives of a node: flipped bits of everything that is not free, swapped, stale,
//! zeroed and unreadable blocks. Availability may suffer; no answer may be wrong, and the check must know of it.
//!
//! `BASALT_MUTATIONS=1000000 cargo test --release --test sim_damage` is the long run.

#![cfg(test)]

mod sim_harness;

use basalt::device::sim::SimDisk;
use basalt::device::sim::random::Random;
use sim_harness::damage::{BLOCK, Findings, canonical, config, mutations};

/// Bits of everything that carries something: metadata, keys, values, and the padding between.
#[test]
fn a_flipped_bit_never_gives_a_wrong_answer() {
    let canonical = canonical();
    let mut random = Random::new(21);
    let mut findings = Findings::default();
    let disk = SimDisk::from_image(config(), 3, canonical.image.clone());
    for _ in 0..mutations(1_500) {
        canonical.flip_a_bit(&disk, &mut random, &mut findings);
    }
    println!("{findings:?}");
    assert!(findings.keys_in_error > 0 && findings.clean > 0, "{findings:?}");
    assert_eq!(findings.refused, 0, "one flipped bit must not take the node");
    assert!(findings.salvaged_in_doubt > 0 && findings.salvaged_in_whole > 0, "{findings:?}");
    assert_eq!(findings.salvage_refused, 0, "{findings:?}");
}

#[test]
fn a_lost_or_misplaced_block_never_gives_a_wrong_answer() {
    let canonical = canonical();
    let mut random = Random::new(22);
    let mut findings = Findings::default();
    let mut differs = 0;
    for round in 0..mutations(8 * canonical.written.len() as u64) / 4 {
        // Every written block once, then at random.
        let count = canonical.written.len();
        let block = canonical.written[usize::try_from(round).unwrap_or(0) % count];
        let other = canonical.written[random.index(count)];
        canonical.zero_a_block(block, &mut findings);
        canonical.mutate(
            &format!("block {block} unreadable"),
            |disk| disk.make_unreadable(block),
            &mut findings,
        );
        canonical.mutate(
            &format!("blocks {block} and {other} swapped"),
            |disk| disk.swap_blocks(block, other),
            &mut findings,
        );
        let stale = canonical.stale.read_raw(block * BLOCK, BLOCK as usize);
        canonical.mutate(
            &format!("block {block} stale"),
            |disk| {
                differs += u64::from(disk.read_raw(block * BLOCK, BLOCK as usize) != stale);
                disk.overwrite(block * BLOCK, &stale);
            },
            &mut findings,
        );
    }
    println!("{findings:?}, {differs} stale blocks");
    let is_whole = mutations(u64::MAX) / 4 >= canonical.written.len() as u64;
    assert!(!is_whole || findings.units_missing > 0, "no unit of survivors was lost: {findings:?}");
    assert!(findings.keys_in_error > 0 && findings.served > 0 && differs > 0, "{findings:?}");
}
