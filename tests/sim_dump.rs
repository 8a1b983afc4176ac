//! Dumps beside writers: money moves between accounts on all shards, extents are collected, and every dump has the same sum and
//! every account once.

#![cfg(test)]

mod sim_harness;

use basalt::engine::action::{Command, Fold};
use basalt::engine::memory::MemoryBudget;
use basalt::engine::op::{Key, OpError};
use basalt::sim::node::{Outcome, Request, SimNode};
use sim_harness::dump::{World, balance};

fn worlds() -> u64 {
    std::env::var("BASALT_SEEDS").ok().map_or(40, |text| text.parse().expect("a number"))
}

#[test]
fn a_dump_is_of_one_moment_whatever_is_written_and_collected() {
    let (mut dumps, mut lost, mut freed) = (0, 0, 0);
    for seed in 0..worlds() {
        let mut world = World::new(seed, [40, 3_000, 9_000][seed as usize % 3]);
        world.run(1_500, seed);
        dumps += world.dumps;
        lost += world.lost;
        freed +=
            basalt::probe::take().filter(|(name, _)| *name == "extent freed").map(|(_, n)| n).sum::<u64>();
    }
    println!("{dumps} dumps, {lost} given up, {freed} extents freed");
    assert!(dumps > 2 * worlds() && freed > worlds(), "{dumps} dumps, {freed} extents freed");
}

/// What stands in the way of writes, or is emptied under it, is given up and says so; another dump can follow.
#[test]
fn a_dump_gives_way() {
    let mut world = World::new(3, 100);
    world.start(Request::Dump, None);
    world.start(Request::Clear, None);
    world.start(Request::Dump, None);
    for _ in 0..5_000 {
        world.node.step();
        world.node.clock.monotonic_us += 50;
    }
    let mut outcomes = Vec::new();
    for (id, outcome) in world.node.take_done() {
        outcomes.push((id, matches!(outcome, Outcome::Dump(_)), outcome));
    }
    assert_eq!(outcomes.len(), 3, "{outcomes:?}");
    assert!(
        outcomes.iter().any(|(id, _, outcome)| *id == 2 && *outcome == Outcome::Done(Ok(()))),
        "{outcomes:?}"
    );

    let mut world = World::new(4, 100);
    let is_busy = |outcome: &Outcome| *outcome == Outcome::Done(Err(OpError::DumpBusy));
    world.start(Request::Dump, None);
    world.start(Request::Dump, None);
    let mut busy = 0;
    for _ in 0..5_000 {
        world.node.step();
        world.node.clock.monotonic_us += 50;
        busy += world.node.take_done().iter().filter(|(_, outcome)| is_busy(outcome)).count();
    }
    assert!(busy <= 1, "both dumps were refused");
    // No room for what was overwritten: writes go on, the dump does not. There are enough keys that it takes a while.
    for hundred in 0..40 {
        let keys = (0..100).map(|number| (Key::from(format!("more:{hundred}:{number}")), balance(1, 10)));
        let command = Command { actions: keys.collect(), fold: Fold::Ok };
        let done = world.node.run(&world.disk, Request::Batch(vec![command], Vec::new()));
        assert!(matches!(done, Some(Outcome::Batch(_))));
    }
    world.node.set_memory(MemoryBudget { index_may_grow: false, ..MemoryBudget::default() });
    world.open.clear();
    for _ in 0..20 {
        world.start(Request::Dump, None);
        for _ in 0..50 {
            world.write();
            world.node.step();
            world.node.clock.monotonic_us += 50;
        }
        let outcome = |node: &mut SimNode| node.take_done();
        for _ in 0..8_000 {
            world.node.step();
            world.node.clock.monotonic_us += 50;
            for (_, outcome) in outcome(&mut world.node) {
                world.lost += u64::from(matches!(outcome, Outcome::Done(Err(OpError::DumpLost { .. }))));
                world.dumps += u64::from(matches!(outcome, Outcome::Dump(_)));
            }
        }
    }
    assert!(world.lost > 0, "no dump was given up for want of memory");
    world.node.set_memory(MemoryBudget::default());
    let whole = world.node.run(&world.disk, Request::Dump);
    assert!(matches!(whole, Some(Outcome::Dump(_))), "{whole:?}");
}
