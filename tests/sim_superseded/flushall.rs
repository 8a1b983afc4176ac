//! FLUSHALL of shards that lost records of unknown keys, while the device fails, the node dies, or nobody waits for it.

use basalt::device::sim::{Fault, FaultKind, FaultOp, Keep};

use super::*;

fn set_request(key: &str, value: &[u8]) -> Request {
    Request::Single(Key::from(key.to_owned()), set_action(value, Expiry::Clear))
}

/// What is damaged of a frame that a value is in, by where the value begins.
fn damage_frame(world: &mut World, value: &[u8], what: &str) {
    for place in world.places(value) {
        match what {
            "record" => world.disk.flip_bit(place - 1, 2),
            "frame" => world.disk.flip_bit(place / BLOCK * BLOCK + 20, 1),
            _ => world.disk.make_unreadable(place / BLOCK),
        }
    }
    world.on_damage();
}

#[test]
fn a_flushall_writes_off_what_was_lost() {
    for variant in 0..16 {
        let what = ["record", "frame", "block", "record"][variant % 4];
        let (clean, at_once) = (variant & 4 > 0, variant & 8 > 0);
        let moved = variant % 4 == 3;
        let told = format!("{what}, clean: {clean}, at once: {at_once}, moved: {moved}");
        let mut world = World::new(1);
        for number in 0..20 {
            world.set(&key(number), 3_000);
        }
        let lost = world.set("lost", 3_000);
        seal(&mut world);
        if moved {
            world.compact();
        }
        let used = world.check().extents_used;
        // Nothing but the log says what there is.
        world.kill();
        damage_frame(&mut world, &lost, what);
        assert!(world.boot(), "{told}");
        let errors = world.verify(&told);
        // Behind a damaged header of a frame its records are whole.
        assert_eq!(errors > 0, what != "frame", "{told}: {errors} errors");
        assert!(!world.check().is_clean(), "{told}");
        // Its log has come no further when it is cleared, or it has.
        if !at_once {
            seal(&mut world);
        }
        world.clear();
        world.set("kept", 100);
        assert_eq!(world.verify(&told), 0, "{told}: in doubt behind a FLUSHALL");
        for _ in 0..3 {
            seal(&mut world);
            world.compact();
        }
        let report = world.check();
        assert!(report.is_clean() && report.superseded.is_empty(), "{told}: {:?}", report.damage);
        assert!(report.extents_used <= used, "{told}: {} extents, {used} before", report.extents_used);
        world.is_damaged = false;
        world.restart(clean);
        assert_eq!(world.verify(&told), 0, "{told}: after a restart");
        world.compact();
        assert_eq!(world.verify(&told), 0, "{told}: after a restart and a collection");
    }
}

/// What came behind a FLUSHALL, in its own frame, and was lost.
#[test]
fn what_is_lost_behind_a_flushall_is_not_dead() {
    // Writes that come too soon are before it.
    let kept: usize =
        (0..8).map(|steps| PARTS.iter().filter(|part| is_behind_clear(steps, part)).count()).sum();
    assert!(kept >= 2 * PARTS.len(), "{kept} times writes were behind the FLUSHALL");
}

/// False where some writes were before the FLUSHALL.
fn is_behind_clear(steps: usize, (part, at): &(&str, i64)) -> bool {
    let mut world = World::new(1);
    for number in 0..20 {
        world.set(&key(number), 3_000);
    }
    let names: Vec<String> = (0..8).map(|number| format!("behind:{number}")).collect();
    let mut values = Vec::new();
    let mut requests = Vec::new();
    for name in &names {
        let value = world.value(name, 100);
        requests.push(set_request(name, &value));
        values.push(value);
    }
    let node = world.node.as_mut().expect("it runs");
    node.start(1_000, Request::Clear);
    for _ in 0..steps {
        node.step();
    }
    for (id, request) in (0..).zip(requests) {
        node.start(id, request);
    }
    let mut left = names.len() + 1;
    for _ in 0..10_000 {
        node.step();
        node.clock.monotonic_us += 100;
        left -= node.take_done().len();
    }
    assert_eq!(left, 0, "{part}: all are answered");
    world.values.values_mut().for_each(|value| *value = None);
    for (name, value) in names.iter().zip(&values) {
        let key = Key::from(name.clone());
        if world.run(Request::Single(key.clone(), Action::Get)) == Outcome::Reply(Reply::Nil) {
            return false;
        }
        world.values.insert(key, Some(value.clone()));
    }
    assert_eq!(world.verify(part), 0);
    // The last of a frame would not be behind anything that could tell.
    seal(&mut world);
    world.kill();
    for place in world.places(&values[3]) {
        world.disk.flip_bit(place.checked_add_signed(*at).unwrap(), 2);
    }
    world.on_damage();
    assert!(world.boot(), "{part}");
    assert!(world.verify(part) >= 1, "{part}: what is lost is served");
    true
}

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
