//! Hundreds of starts in a row that are cut short at any moment: the node starts again, with what it had.

#![cfg(test)]

mod sim_harness;

use sim_harness::starts::{Starts, cut_short};

#[test]
fn starts_that_are_cut_short_one_after_the_other_leave_a_node_that_starts() {
    let mut all = Starts::default();
    for seed in 0..12 {
        let one = cut_short(seed, 400);
        all.whole += one.whole;
        all.cut += one.cut;
    }
    println!("{all:?}");
    assert!(all.cut > 1_000 && all.whole > 100, "{all:?}");
}
