//! One fault in one place of a fixed workload, for every place and every kind of fault, once and from then on: every request
//! is answered, what was acknowledged is there after a power cut and a restart, and what was unknown has settled to one outcome.
//!
//! `BASALT_FAULT_WORKLOADS=5 cargo test --release --test sim_faults` is the long run.

#![cfg(test)]

mod sim_harness;

use basalt::device::sim::random::Random;
use basalt::device::sim::{Fault, FaultKind, FaultOp, Keep, SimDisk};
use basalt::engine::action::{Action, Expiry, SetReply};
use basalt::engine::durability::Durability;
use basalt::engine::op::{Clock, OpError, Reply};
use basalt::sim::node::{Outcome, Request, SimNode, format};
use sim_harness::faults::{POLLS_MAX, SHARDS, Totals, boot, config, key, set, sweep};

fn sweep_all(op: FaultOp, kinds: &[FaultKind]) -> Totals {
    let workloads: u64 =
        std::env::var("BASALT_FAULT_WORKLOADS").map_or(1, |text| text.parse().expect("a number"));
    let mut totals = Totals::default();
    for kind in kinds {
        let before = totals.struck;
        for workload in 0..workloads {
            sweep(op, *kind, workload, &mut totals);
        }
        assert!(totals.struck > before, "{kind:?} never struck");
    }
    println!("{op:?}: {totals:?}");
    totals
}

#[test]
fn a_failing_read_never_gives_a_wrong_answer() {
    sweep_all(
        FaultOp::Read,
        &[FaultKind::Error(Keep::None), FaultKind::Aborted(Keep::None), FaultKind::WrongRead],
    );
}

#[test]
fn a_failing_write_takes_nothing_that_was_acknowledged() {
    let kinds = [
        FaultKind::Error(Keep::None),
        FaultKind::Error(Keep::All),
        FaultKind::Error(Keep::Holes(3)),
        FaultKind::Aborted(Keep::Prefix(512)),
    ];
    let totals = sweep_all(FaultOp::Write, &kinds);
    assert!(totals.unknown > 0 && totals.refused > 0, "{totals:?}");
}

#[test]
fn a_failing_flush_acknowledges_nothing_more() {
    let totals = sweep_all(
        FaultOp::Flush,
        &[FaultKind::Error(Keep::None), FaultKind::FlushLost, FaultKind::Aborted(Keep::None)],
    );
    assert!(totals.unknown > 0 && totals.refused > 0, "{totals:?}");
}

#[test]
fn refusals_delays_and_losses_of_the_device_end_in_answers() {
    sweep_all(FaultOp::Any, &[FaultKind::Full, FaultKind::Slow(60), FaultKind::Gone, FaultKind::Never]);
    sweep_all(FaultOp::Allocate, &[FaultKind::Full]);
}

/// After a failed flush nothing is known of the keys that were on their way, and that must hold for everything that is asked of
/// them later: counting, scanning and watching end, and neither list nor count what may not be there.
#[test]
fn keys_with_an_expiry_that_were_on_their_way_when_the_flush_failed_are_let_go_of() {
    let expiring = |value: &[u8], at| Action::Set {
        value: value.to_vec().into(),
        expiry: Expiry::At(at),
        condition: None,
        reply: SetReply::Ok,
    };
    let disk = SimDisk::new(config(), 1);
    format(&disk, SHARDS, 1);
    let mut node = boot(&disk).expect("a fresh disk boots");
    let now = node.clock.unix_ms;
    let (new, old, kept) = (key(0, 0), key(0, 1), key(0, 2));
    for (key, action) in [(&old, expiring(b"old", now + 50)), (&kept, set(b"kept"))] {
        let done = node.run(&disk, Request::Single(key.clone(), action));
        assert_eq!(done, Some(Outcome::Reply(Reply::Ok)));
    }
    disk.inject(Fault { nth: 0, op: FaultOp::Flush, kind: FaultKind::Error(Keep::None), sticky: true });
    node.start(1, Request::Single(new, expiring(b"new", now + 50)));
    node.start(2, Request::Single(old.clone(), Action::Delete));
    let mut unknown = 0;
    for _ in 0..POLLS_MAX {
        node.step();
        for (_, outcome) in node.take_done() {
            assert!(matches!(outcome, Outcome::Reply(Reply::Error(OpError::OutcomeUnknown { .. }))));
            unknown += 1;
        }
        if unknown == 2 {
            break;
        }
    }
    assert_eq!(unknown, 2, "both are answered");
    node.clock.unix_ms += 1_000;
    node.clock.monotonic_us += 1_000_000;
    node.step();
    assert!(matches!(node.run(&disk, Request::Watch(old)), Some(Outcome::Watching(_))));
    for request in [Request::Count, Request::Keys] {
        let outcome = node.run(&disk, request.clone());
        assert!(
            matches!(outcome, Some(Outcome::Done(Err(OpError::OutcomeUnknown { .. })))),
            "{request:?} answers {outcome:?}"
        );
    }
    let outcome = node.run(&disk, Request::Single(kept, Action::Get));
    assert_eq!(outcome, Some(Outcome::Reply(Reply::Bulk("kept".into()))), "reads go on");
}

/// What was told to be deallocated and came back with an unknown outcome may happen later, to whatever is there by then.
#[test]
fn an_extent_that_may_still_be_deallocated_is_not_used_before_a_restart() {
    let disk = SimDisk::new(config(), 5);
    format(&disk, SHARDS, 5);
    let mut node = boot(&disk).expect("a fresh disk boots");
    node.set_trim(true);
    let aborted = FaultKind::Aborted(Keep::None);
    disk.inject(Fault { nth: 0, op: FaultOp::Deallocate, kind: aborted, sticky: false });
    let mut random = Random::new(5);
    let mut put = |node: &mut SimNode| {
        let mut value = vec![0; 30_000];
        random.fill(&mut value);
        let request = Request::Single(key(0, random.index(5)), set(&value));
        assert_eq!(node.run(&disk, request), Some(Outcome::Reply(Reply::Ok)));
    };
    for _ in 0..2_000 {
        if disk.faults_struck() > 0 {
            break;
        }
        put(&mut node);
    }
    assert_eq!(disk.faults_struck(), 1, "nothing was deallocated");
    let freed = |node: &SimNode| node.stats().map(|stats| stats.gc.extents_freed).sum::<u64>();
    // Others still come back, and the node lives on what is left.
    (0..1_000).for_each(|_| put(&mut node));
    assert!(freed(&node) > 5);
    let before = node.available_extents();
    assert!(node.stop(&disk));
    let node = boot(&disk).expect("it boots again");
    assert!(node.available_extents() > before, "{} extents, as before", node.available_extents());
}

/// A frame whose write failed may be on the device all the same, and then it is there twice. Of the extents with it, the one that is
/// retired must not take the other's records along.
#[test]
fn a_frame_that_is_there_twice_is_not_retired_with_one_of_them() {
    let disk = SimDisk::new(config(), 5);
    format(&disk, 1, 5);
    let boot = || {
        let clock = Clock { unix_ms: 1_000_000, monotonic_us: 0 };
        SimNode::boot(&disk, 1, Durability::Always, clock, 7).expect("it boots")
    };
    let put = |node: &mut SimNode, number: usize, value: &[u8]| {
        let outcome = node.run(&disk, Request::Single(key(0, number), set(value)));
        assert_eq!(outcome, Some(Outcome::Reply(Reply::Ok)));
    };
    let mut node = boot();
    put(&mut node, 0, b"before");
    let failed_but_there = FaultKind::Error(Keep::All);
    disk.inject(Fault { nth: 0, op: FaultOp::Write, kind: failed_but_there, sticky: false });
    put(&mut node, 1, b"twice");
    assert_eq!(disk.faults_struck(), 1, "no write failed");
    // The rest of the extent that the frame went to is garbage soon, and so is all of it for who takes the frame where it was first.
    (0..60).for_each(|_| put(&mut node, 2, &[7; 30_000]));
    drop(node);
    let mut node = boot();
    put(&mut node, 3, b"after");
    // What is garbage in whole goes without anybody's asking.
    for _ in 0..5_000 {
        node.step();
        node.clock.monotonic_us += 100;
    }
    put(&mut node, 3, b"after");
    drop(node);
    let mut node = boot();
    for (number, value) in [(0, "before"), (1, "twice"), (3, "after")] {
        let outcome = node.run(&disk, Request::Single(key(0, number), Action::Get));
        assert_eq!(outcome, Some(Outcome::Reply(Reply::Bulk(value.into()))), "key {number}");
    }
}
