//! FLUSHALL of shards that lost records of unknown keys, while the device fails, the node dies, or nobody waits for it.

use basalt::device::sim::{Fault, FaultKind, FaultOp, Keep};

use super::*;

/// A world that does not know which keys it lost, of every shard.
fn world_in_doubt(seed: u64) -> World {
    let mut world = World::new(seed);
    for number in 0..20 {
        world.set(&key(number), 3_000);
    }
    let lost: Vec<_> = (0..6).map(|number| world.set(&format!("lost:{number}"), 3_000)).collect();
    seal(&mut world);
    world.kill();
    lost.iter().for_each(|value| damage_frame(&mut world, value, "record"));
    assert!(world.boot(), "seed {seed}");
    assert!(world.verify("in doubt") > 20, "seed {seed}: not every shard lost something");
    world
}

fn set_request(key: &str, value: &[u8]) -> Request {
    let (expiry, condition) = (Expiry::Clear, None);
    let action = Action::Set { value: value.to_vec().into(), expiry, condition, reply: SetReply::Ok };
    Request::Single(Key::from(key.to_owned()), action)
}

/// A frame whose write fails takes along what was appended behind it, a FLUSHALL that had begun an extent perhaps.
#[test]
fn a_flushall_that_goes_elsewhere_with_the_frame_before_it_keeps_what_follows() {
    let (mut moved, mut struck) = (0, 0);
    for variant in 0..64 {
        let (steps, nth, keep) =
            (variant % 8, variant / 8 % 4, [Keep::None, Keep::All][variant as usize / 32]);
        let told = format!("{steps} steps, write {nth}, {keep:?}");
        let mut world = world_in_doubt(1);
        let names: Vec<String> = (0..8).map(|number| format!("before:{number}")).collect();
        let values: Vec<_> = names.iter().map(|name| world.value(name, 100)).collect();
        world.disk.inject(Fault { nth, op: FaultOp::Write, kind: FaultKind::Error(keep), sticky: false });
        let node = world.node.as_mut().expect("it runs");
        for (id, (name, value)) in (0..).zip(names.iter().zip(&values)) {
            node.start(id, set_request(name, value));
        }
        for _ in 0..steps {
            node.step();
            node.clock.monotonic_us += 100;
        }
        node.start(1_000, Request::Clear);
        let mut left = names.len() + 1;
        for _ in 0..2_000 {
            node.step();
            node.clock.monotonic_us += 100;
            left -= node.take_done().len();
        }
        assert_eq!(left, 0, "{told}: all are answered");
        struck += world.disk.faults_struck();
        world.disk.clear_faults();
        world.doubtful.clear();
        world.values.values_mut().for_each(|value| *value = None);
        for (name, value) in names.iter().zip(&values) {
            let key = Key::from(name.clone());
            if world.run(Request::Single(key.clone(), Action::Get)) == Outcome::Reply(Reply::Nil) {
                moved += 1;
                world.values.insert(key, None);
            } else {
                world.values.insert(key, Some(value.clone()));
            }
        }
        for number in 0..20 {
            world.set(&key(number), 100);
        }
        assert_eq!(world.verify(&told), 0, "{told}");
        for _ in 0..2 {
            seal(&mut world);
            world.compact();
        }
        assert_eq!(world.verify(&told), 0, "{told}: after a collection");
        let report = world.check();
        assert!(report.is_clean(), "{told}: {:?}", report.damage);
        world.is_damaged = false;
        world.restart(false);
        assert_eq!(world.verify(&told), 0, "{told}: after a restart");
    }
    assert!(moved > 0 && struck > 32, "{moved} keys were before the FLUSHALL, {struck} writes failed");
}

#[test]
fn a_flushall_of_a_node_that_accepts_nothing_more_is_answered() {
    for steps in 0..12 {
        let mut world = world_in_doubt(1);
        let node = world.node.as_mut().expect("it runs");
        let failed = FaultKind::Error(Keep::None);
        world.disk.inject(Fault { nth: 0, op: FaultOp::Flush, kind: failed, sticky: true });
        // Both shards get some before the first group ends, and while it is under way.
        for id in 0..8 {
            node.start(id, set_request(&key(id), b"first"));
        }
        for _ in 0..steps {
            node.step();
        }
        for id in 8..16 {
            node.start(id, set_request(&key(id), b"second"));
        }
        for _ in 0..1_000 {
            node.step();
            node.clock.monotonic_us += 100;
        }
        assert_eq!(node.take_done().len(), 16, "{steps} steps");
        let outcome = node.run(&world.disk, Request::Clear);
        assert!(matches!(outcome, Some(Outcome::Done(Err(_)))), "{steps} steps: {outcome:?}");
    }
}

#[test]
fn a_flushall_that_nobody_waits_for_writes_off_what_was_lost() {
    for durability in [Durability::Never, Durability::Bytes(1 << 30), Durability::Interval(3_600_000)] {
        let mut world = world_in_doubt(1);
        let node = world.node.as_mut().expect("it runs");
        node.set_durability(durability);
        for _ in 0..100 {
            node.step();
        }
        world.clear();
        let node = world.node.as_mut().expect("it runs");
        for _ in 0..10_000 {
            node.step();
            node.clock.monotonic_us += 100;
        }
        world.kill();
        let report = world.check();
        assert!(report.is_clean(), "{durability:?}: {:?}", report.damage);
    }
}

/// Before a FLUSHALL is answered everything that was there is, or nothing is; whatever comes after it stays.
#[test]
fn a_node_that_dies_anywhere_around_a_flushall_keeps_what_followed() {
    let (mut before, mut after, mut written_off) = (0, 0, 0);
    for cut in 0..200 {
        let told = format!("cut {cut}");
        let mut world = world_in_doubt(1);
        let old = world.values.clone();
        world.disk.power_cut_at(world.disk.events() + 1 + cut * 3 / 2);
        let (disk, mut is_cleared, mut fate) = (world.disk.clone(), false, None);
        let node = world.node.as_mut().expect("it runs");
        let mut done = match node.run(&disk, Request::Clear) {
            None => 0,
            Some(outcome) => {
                assert_eq!(outcome, Outcome::Done(Ok(())), "{told}");
                is_cleared = true;
                world.values.values_mut().for_each(|value| *value = None);
                1_000
            }
        };
        let mut left = done;
        while left > 0 && !disk.is_off() {
            left -= 1;
            let name = if left % 4 == 0 { key(left % 20) } else { format!("filler:{}", left % 7) };
            let value = world.value(&name, if left % 4 == 0 { 500 } else { 60_000 });
            let node = world.node.as_mut().expect("it runs");
            let id = Key::from(name.clone());
            match node.run(&disk, set_request(&name, &value)) {
                Some(_) => drop(world.values.insert(id, Some(value))),
                None => fate = Some((id, value)),
            }
            if left % 50 == 0 && !disk.is_off() {
                node_compacts(&mut world);
            }
        }
        done -= left;
        drop(world.node.take());
        let mut choice = CrashChoice::seeded(cut);
        world.disk.crash(&mut choice);
        let is_clean = world.check().is_clean();
        written_off += usize::from(is_clean);
        if is_cleared {
            world.is_damaged = false;
            world.doubtful.clear();
        }
        assert!(world.boot(), "{told}");
        if !is_cleared {
            before += 1;
            for (id, value) in old {
                match world.run(Request::Single(id.clone(), Action::Get)) {
                    Outcome::Reply(Reply::Bulk(found)) => assert_eq!(Some(found.as_ref()), value.as_deref()),
                    Outcome::Reply(Reply::Nil | Reply::Error(OpError::Damaged { .. })) => {}
                    other => panic!("{told}: {id:?} answers {other:?}"),
                }
            }
            continue;
        }
        after += 1;
        if let Some((id, value)) = fate {
            let now = world.run(Request::Single(id.clone(), Action::Get));
            if now == Outcome::Reply(Reply::Bulk(value.clone().into())) {
                world.values.insert(id, Some(value));
            }
        }
        assert_eq!(world.verify(&told), 0, "{told}: {done} writes");
        // What the end came in the way of is written off the next time.
        if !is_clean {
            world.clear();
        }
        seal(&mut world);
        world.compact();
        assert!(world.check().is_clean(), "{told}");
        world.restart(false);
        assert_eq!(world.verify(&told), 0, "{told}: {done} writes, and a restart");
    }
    assert!(before > 5 && after > 50 && written_off > 20, "{before}, {after}, {written_off}");
}

fn node_compacts(world: &mut World) {
    let disk = world.disk.clone();
    if let Some(outcome) = world.node.as_mut().expect("it runs").run(&disk, Request::Compact) {
        assert_eq!(outcome, Outcome::Done(Ok(())));
    }
}
