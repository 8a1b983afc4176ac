//! Damage that is written over: the space of damaged records comes back once nothing depends on them, the check says so, and what is
//! lost or may be stays an error. Nothing older than the newest comes back, whatever was freed, and whenever the node is killed.

#![cfg(test)]

#[path = "sim_superseded/flushall.rs"]
mod flushall;

use std::collections::{BTreeMap, BTreeSet};

use basalt::device::sim::random::Random;
use basalt::device::sim::{CrashChoice, SimConfig, SimDisk};
use basalt::engine::action::{Action, Command, Expiry, Fold, SetReply};
use basalt::engine::check::{Report, check};
use basalt::engine::durability::Durability;
use basalt::engine::op::{Clock, Key, OpError, Reply};
use basalt::probe;
use basalt::sim::node::{BootFailure, Outcome, Request, SimNode, format};
use basalt::sim::promise::{Promise, broken};

const BLOCK: u64 = 4096;
const SHARDS: u16 = 2;

/// A node on a disk, and what it must answer.
struct World {
    disk: SimDisk,
    node: Option<SimNode>,
    unix_ms: u64,
    versions: u64,
    values: BTreeMap<Key, Option<Vec<u8>>>,
    /// Keys that may answer an error: they were not written since something was damaged, or since a start came upon it.
    doubtful: BTreeSet<Key>,
    is_damaged: bool,
    /// Longer values are kept in chunks.
    chunk_size: Option<u64>,
}

fn config() -> SimConfig {
    SimConfig { block_count: (96 << 20) / BLOCK, transfer_size_max: 256 << 10, ..SimConfig::default() }
}

fn set_action(value: &[u8], expiry: Expiry) -> Action {
    Action::Set { value: value.to_vec().into(), expiry, condition: None, reply: SetReply::Ok }
}

impl World {
    fn new(seed: u64) -> World {
        let disk = SimDisk::new(config(), seed);
        format(&disk, SHARDS, seed);
        let mut world = World {
            disk,
            node: None,
            unix_ms: 1_000_000,
            versions: 0,
            values: BTreeMap::new(),
            doubtful: BTreeSet::new(),
            is_damaged: false,
            chunk_size: None,
        };
        assert!(world.boot(), "a new disk boots");
        world
    }

    /// False where it is refused because of damage.
    fn boot(&mut self) -> bool {
        if self.is_damaged {
            self.on_damage();
        }
        let clock = Clock { unix_ms: self.unix_ms, monotonic_us: 0 };
        match SimNode::boot(&self.disk, 1, Durability::Always, clock, 7) {
            Ok(mut node) => {
                node.set_survivors_apart(true);
                node.set_trim(true);
                self.chunk_size.iter().for_each(|size| node.set_chunk_size(*size));
                self.node = Some(node);
                true
            }
            Err(BootFailure::Damaged(_)) => false,
            Err(failure) => panic!("{failure:?}"),
        }
    }

    fn stop(&mut self) {
        assert!(self.node.take().expect("it runs").stop(&self.disk), "a clean stop");
    }

    fn kill(&mut self) {
        drop(self.node.take());
        self.disk.crash(&mut CrashChoice::Nothing);
    }

    fn run(&mut self, request: Request) -> Outcome {
        let node = self.node.as_mut().expect("it runs");
        node.clock.unix_ms = self.unix_ms;
        node.run(&self.disk, request).expect("it is answered")
    }

    /// A value that begins with what no other value has.
    fn value(&mut self, key: &str, size: usize) -> Vec<u8> {
        self.versions += 1;
        let mut value = format!("<{key} {:06}>", self.versions).into_bytes();
        value.resize(size, b'.');
        value
    }

    fn set_until(&mut self, key: &str, size: usize, expiry: Expiry) -> Vec<u8> {
        let value = self.value(key, size);
        let key = Key::from(key.to_owned());
        let request = Request::Single(key.clone(), set_action(&value, expiry));
        assert_eq!(self.run(request), Outcome::Reply(Reply::Ok));
        self.doubtful.remove(&key);
        self.values.insert(key, Some(value.clone()));
        value
    }

    fn set(&mut self, key: &str, size: usize) -> Vec<u8> {
        self.set_until(key, size, Expiry::Clear)
    }

    /// Deletes a key; one that may be in doubt is written first.
    fn delete(&mut self, key: &str) {
        let name = Key::from(key.to_owned());
        let outcome = self.run(Request::Single(name.clone(), Action::Delete));
        match outcome {
            Outcome::Reply(Reply::Int(_)) => {}
            Outcome::Reply(Reply::Error(OpError::Damaged { .. })) if self.doubtful.contains(&name) => return,
            other => panic!("a delete of {key} answers {other:?}"),
        }
        self.doubtful.remove(&name);
        self.values.insert(name, None);
    }

    /// Fills extents with what is garbage at once, so that what came before is in sealed ones.
    fn fill(&mut self, count: usize) {
        for nth in 0..count {
            self.set(&format!("filler:{}", nth % 7), 60_000);
        }
    }

    /// FLUSHALL: no key is there, and none is in doubt.
    fn clear(&mut self) {
        assert_eq!(self.run(Request::Clear), Outcome::Done(Ok(())));
        self.values.values_mut().for_each(|value| *value = None);
        self.doubtful.clear();
    }

    fn compact(&mut self) {
        assert_eq!(self.run(Request::Compact), Outcome::Done(Ok(())));
    }

    fn check(&self) -> Report {
        check(&mut self.disk.open_queue(), &mut |_, _| {}).expect("the check runs")
    }

    /// Where the record with this value is: of every copy of it.
    fn places(&self, value: &[u8]) -> Vec<u64> {
        let end = value.iter().position(|byte| *byte == b'>').expect("a value of this world");
        let mut found = Vec::new();
        let mut before: (u64, Vec<u8>) = (0, Vec::new());
        for block in self.disk.written_blocks() {
            let bytes = self.disk.read_raw(block * BLOCK, BLOCK as usize);
            // It may begin in one block and end in the next.
            let is_next = before.0 + 1 == block;
            let kept = if is_next { before.1.clone() } else { Vec::new() };
            let start = block * BLOCK - kept.len() as u64;
            let whole = [kept, bytes.clone()].concat();
            found.extend(memchr::memmem::find_iter(&whole, &value[..=end]).map(|at| start + at as u64));
            before = (block, bytes[bytes.len() - 40..].to_vec());
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    /// From now on, whatever was not written since may be an error.
    fn on_damage(&mut self) {
        self.is_damaged = true;
        self.doubtful = self.values.keys().cloned().collect();
    }

    /// How many keys answer an error. None answers anything else than it must.
    #[track_caller]
    fn verify(&mut self, what: &str) -> usize {
        let mut errors = 0;
        for (key, value) in self.values.clone() {
            match self.run(Request::Single(key.clone(), Action::Get)) {
                Outcome::Reply(Reply::Bulk(found)) if Some(found.as_ref()) == value.as_deref() => {}
                Outcome::Reply(Reply::Nil) if value.is_none() => {}
                Outcome::Reply(Reply::Error(OpError::Damaged { .. } | OpError::ReadFailed { .. }))
                    if self.doubtful.contains(&key) =>
                {
                    errors += 1;
                }
                other => {
                    let other = match other {
                        Outcome::Reply(Reply::Bulk(found)) => {
                            String::from_utf8_lossy(&found[..found.len().min(30)]).into_owned()
                        }
                        other => format!("{other:?}"),
                    };
                    broken(Promise::NoWrongAnswer, &format!("{what}: {key:?} answers {other}"))
                }
            }
        }
        errors
    }

    /// An end of this life, and the next one, by a clean stop or by a kill.
    fn restart(&mut self, clean: bool) {
        if clean {
            self.stop();
        } else {
            self.kill();
        }
        assert!(self.boot(), "it starts again");
    }
}

/// Everything that is damaged is in extents that are full.
fn seal(world: &mut World) {
    world.fill(60);
}

fn key(number: u64) -> String {
    format!("key:{number:02}")
}

/// What is damaged of a record, by where its value begins.
const PARTS: &[(&str, i64)] = &[("value", 20), ("key", -1), ("sequence", -20)];

#[test]
fn what_was_written_over_gives_its_space_back_and_is_no_damage() {
    for (part, at) in PARTS {
        for variant in 0..8 {
            let (clean, deletes, moved) = (variant & 1 > 0, variant & 2 > 0, variant & 4 > 0);
            let what = format!("{part}, clean: {clean}, deletes: {deletes}, moved: {moved}");
            let mut world = World::new(1);
            for number in 0..20 {
                world.set(&key(number), 3_000);
            }
            let lost = world.set("lost", 3_000);
            seal(&mut world);
            // Then it is among survivors, else in an extent of the log with much garbage.
            if moved {
                world.compact();
            }
            world.stop();
            let used = world.check().extents_used;
            for place in world.places(&lost) {
                world.disk.flip_bit(place.checked_add_signed(*at).unwrap(), 2);
            }
            world.on_damage();
            let report = world.check();
            assert!(!report.is_clean() && report.superseded.is_empty(), "{what}: {report:?}");
            assert!(world.boot());
            assert!(world.verify(&what) >= 1, "{what}: the damaged record is served");
            // As long as it is the newest, it stays an error, and its extent stays.
            probe::take().for_each(drop);
            world.compact();
            let is_met = |name: &str| {
                name == "collection met a lost record" || name == "collection passed over damage"
            };
            let met = probe::take().any(|(name, _)| is_met(name));
            assert!(met != moved, "{what}: collected: {met}");
            assert!(world.verify(&what) >= 1, "{what}: served after a collection");
            world.restart(clean);
            world.compact();
            assert!(world.verify(&what) >= 1, "{what}: served after a collection and a restart");
            assert!(!world.check().is_clean(), "{what}: a key is lost and the check finds nothing");

            if deletes {
                world.set("lost", 10);
                world.delete("lost");
            } else {
                world.set("lost", 10);
            }
            let report = world.check();
            if *part == "value" {
                // Its key is known, so nothing is left to do.
                assert!(report.is_clean() && report.superseded.len() == 1, "{what}: {report:?}");
            } else {
                assert!(!report.is_clean(), "{what}: whose record it was is not known from the log");
            }
            seal(&mut world);
            world.compact();
            let report = world.check();
            assert!(report.is_clean() && report.superseded.is_empty(), "{what}: {report:?}");
            assert_eq!(world.verify(&what), 0, "{what}");
            world.restart(clean);
            assert_eq!(world.verify(&what), 0, "{what}");
            assert!(world.check().extents_used <= used + 2, "{what}: space was not given back");
        }
    }
}

/// The log alone says which key a damaged value is of, and does not where more of a record is damaged.
#[test]
fn what_the_log_alone_cannot_name_stays() {
    for (part, at) in PARTS {
        let mut world = World::new(2);
        for number in 0..20 {
            world.set(&key(number), 3_000);
        }
        let lost = world.set("lost", 3_000);
        seal(&mut world);
        world.kill();
        let places = world.places(&lost);
        places.iter().for_each(|place| world.disk.flip_bit(place.checked_add_signed(*at).unwrap(), 2));
        world.on_damage();
        assert!(world.boot(), "{part}");
        assert!(world.verify(part) >= 1, "{part}: the damaged record is served");
        world.set("lost", 10);
        seal(&mut world);
        world.compact();
        world.verify(part);
        assert_eq!(world.places(&lost).is_empty(), *part == "value", "{part}: what was collected");
        let report = world.check();
        assert!(report.superseded.is_empty(), "{part}: {report:?}");
        assert_eq!(report.is_clean(), *part == "value", "{part}: {report:?}");
        world.kill();
        assert!(world.boot(), "{part}");
        // Whatever was in doubt still is.
        assert_eq!(world.verify(part) == 0, *part == "value", "{part}");
    }
}

/// Has every checkpoint start with something else, so that the log alone says what there is.
fn destroy_checkpoints(disk: &SimDisk) -> usize {
    let mut count = 0;
    for block in disk.written_blocks() {
        if disk.read_raw(block * BLOCK, 8) == b"BASALTcp" {
            disk.overwrite(block * BLOCK, &[0; 64]);
            count += 1;
        }
    }
    count
}

/// A delete that can't be read is kept as long as a record is there that it hides, and goes with it.
#[test]
fn a_damaged_delete_goes_after_what_it_hides() {
    const NAME: &str = "a name that stands nowhere else";
    let mut world = World::new(3);
    // Extents that are live, so that nothing of them is collected.
    for number in 0..60 {
        world.set(&format!("live:{number}"), 60_000);
        if number == 20 {
            world.set(NAME, 3_000);
        }
    }
    world.delete(NAME);
    seal(&mut world);
    world.stop();
    let named = |world: &World| {
        let mut places = Vec::new();
        for block in world.disk.written_blocks() {
            let bytes = world.disk.read_raw(block * BLOCK, BLOCK as usize);
            places.extend(memchr::memmem::find_iter(&bytes, NAME).map(|at| block * BLOCK + at as u64));
        }
        places
    };
    let value = world.places(format!("<{NAME} 000022>").as_bytes());
    assert_eq!(value.len(), 1, "the value is there once");
    let places = named(&world);
    let deletes: Vec<u64> = places.into_iter().filter(|place| value[0].abs_diff(*place) > 200).collect();
    assert!(!deletes.is_empty(), "the delete is on the device");
    deletes.iter().for_each(|place| world.disk.flip_bit(*place, 1));
    world.on_damage();
    assert!(world.boot());
    assert_eq!(world.verify("from the checkpoint"), 0);
    seal(&mut world);
    world.compact();
    assert_eq!(world.verify("collected"), 0);
    world.stop();
    let checked = SimDisk::from_image(config(), 9, world.disk.snapshot());
    let kept = std::mem::replace(&mut world.disk, checked);
    assert!(destroy_checkpoints(&world.disk) > 0, "there is a checkpoint");
    world.on_damage();
    assert!(world.boot());
    assert!(world.verify("from the log alone") > 0, "nobody can know that the key was deleted");
    world.kill();

    // What it hides goes, and then it does.
    world.disk = kept;
    assert!(world.boot());
    for number in 0..60 {
        world.delete(&format!("live:{number}"));
    }
    for _ in 0..4 {
        seal(&mut world);
        world.compact();
    }
    let report = world.check();
    assert!(report.is_clean() && report.superseded.is_empty(), "{report:?}");
    world.stop();
    destroy_checkpoints(&world.disk);
    assert!(world.boot());
    assert_eq!(world.verify("in the end"), 0);
}

/// Damages something of a record that is there, alive or dead.
fn damage(world: &mut World, values: &[Vec<u8>], random: &mut Random) -> Option<&'static str> {
    let places = world.places(&values[random.index(values.len())]);
    let at = *places.get(random.index(places.len().max(1)))?;
    let block = at / BLOCK;
    let parts = ["value", "key", "sequence", "frame", "padding", "block"];
    let part = parts[random.index(parts.len())];
    match part {
        "value" => world.disk.flip_bit(at + 20, 1),
        "key" => world.disk.flip_bit(at - 1, 1),
        "sequence" => world.disk.flip_bit(at - 20, 1),
        "frame" => world.disk.flip_bit(block * BLOCK + 20, 1),
        "padding" => world.disk.flip_bit((block + 1) * BLOCK - 1, 1),
        _ => world.disk.make_unreadable(block),
    }
    world.on_damage();
    Some(part)
}

/// Writers, damage, collections, clean stops and kills in any order: answers are right, or errors as long as a key was not
/// written again.
#[test]
fn damage_and_collection_in_any_order_never_give_a_wrong_answer() {
    let seeds = std::env::var("BASALT_SEEDS").map_or(20, |text| text.parse().expect("a number"));
    let (mut clean, mut refused, mut errors, mut clears) = (0, 0, 0, 0);
    let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
    'seeds: for seed in 0..seeds {
        let mut random = Random::new(seed);
        let mut world = World::new(seed);
        // A key that was never written may have been, as far as anybody knows behind damage.
        world.values.extend((0..24).map(|number| (Key::from(key(number)), None)));
        // Every other world has values in chunks, from its first restart on.
        world.chunk_size = (seed % 2 == 1).then_some(2_000);
        let mut values = Vec::new();
        for round in 0..12 {
            for _ in 0..30 {
                let name = key(random.below(24));
                match random.below(10) {
                    0..=1 => world.delete(&name),
                    2 => {
                        let ends_ms = world.unix_ms + 1 + random.below(20);
                        world.set_until(&name, 500, Expiry::At(ends_ms));
                        // It has ended by then.
                        world.values.insert(Key::from(name), None);
                        world.unix_ms += 30;
                    }
                    _ => values.push(world.set(&name, 100 + random.index(12_000))),
                }
            }
            if random.chance(1, 2) {
                seal(&mut world);
            }
            if random.chance(1, 12) {
                world.clear();
                clears += 1;
            }
            if random.chance(1, 2) {
                world.compact();
            }
            // The last frames of a log can't be told from what was in flight: nobody asks for them.
            for number in 0..8 {
                world.set(&format!("tail:{number}"), 10);
            }
            if random.chance(1, 3) && round < 10 {
                let is_up = random.chance(1, 2);
                if !is_up {
                    if random.chance(1, 2) { world.stop() } else { world.kill() }
                }
                for _ in 0..1 + random.below(3) {
                    if let Some(part) = damage(&mut world, &values, &mut random) {
                        *seen.entry(part).or_default() += 1;
                    }
                }
                if !is_up && !world.boot() {
                    refused += 1;
                    continue 'seeds;
                }
            } else if random.chance(1, 3) {
                if random.chance(1, 2) {
                    world.stop()
                } else {
                    world.kill()
                }
                if !world.boot() {
                    refused += 1;
                    continue 'seeds;
                }
            }
            errors += world.verify(&format!("seed {seed}, round {round}"));
        }
        let names: Vec<String> = world
            .values
            .keys()
            .map(|key| String::from_utf8(key.to_vec()).expect("keys of this world are text"))
            .collect();
        for name in &names {
            world.set(name, 50);
        }
        for _ in 0..3 {
            seal(&mut world);
            world.compact();
        }
        assert_eq!(world.verify(&format!("seed {seed}, written again")), 0);
        let report = world.check();
        let is_whole = report.is_clean() && report.superseded.is_empty();
        clean += u64::from(is_whole);
        let is_told = report.damage.iter().all(|one| one.key.is_none());
        assert!(is_told, "seed {seed}: every key was written since: {:?}", report.damage);
        if random.chance(1, 2) {
            world.stop()
        } else {
            world.kill()
        }
        if world.boot() {
            let what = format!("seed {seed}, in the end");
            let found = world.verify(&what);
            assert!(found == 0 || !is_whole, "{what}: {found} errors, and the check finds nothing");
        } else {
            refused += 1;
        }
    }
    let probes: BTreeMap<_, _> = probe::take().collect();
    println!(
        "{clean} of {seeds} clean in the end, {refused} refused, {errors} errors, {clears} cleared, {seen:?}"
    );
    println!("{probes:?}");
    for name in ["collection passed over damage", "collection met a lost record"] {
        assert!(probes.contains_key(name), "{name} never happened");
    }
    assert!(clean > 0 && errors > 0, "{clean} clean, {errors} errors");
}

#[test]
fn all_of_a_frame_behind_a_lost_header_is_moved() {
    // A pass of a collection gets through the first, not through the second.
    for per_frame in [40, 600] {
        let mut world = World::new(1);
        let lost = world.set("lost", 3_000);
        let mut values = Vec::new();
        for round in 0..3 {
            let mut actions = Vec::new();
            for number in 0..per_frame {
                let key = Key::from(format!("m{round}:{number:03}"));
                let value = world.value(&format!("m{round}:{number:03}"), 100);
                actions.push((key.clone(), set_action(&value, Expiry::Clear)));
                values.push(value.clone());
                world.values.insert(key, Some(value));
            }
            let batch = Request::Batch(vec![Command { actions, fold: Fold::Ok }], Vec::new());
            world.run(batch);
        }
        seal(&mut world);
        world.stop();
        for place in world.places(&lost) {
            world.disk.flip_bit(place / BLOCK * BLOCK + 20, 1);
        }
        world.on_damage();
        assert!(world.boot());
        let used = world.check().extents_used;
        world.set("lost", 10);
        for _ in 0..4 {
            seal(&mut world);
            world.compact();
        }
        let report = world.check();
        assert!(report.is_clean(), "{per_frame} in a frame: {:?}", report.damage);
        assert!(
            report.extents_used < used,
            "{per_frame} in a frame: {used} extents, then {}",
            report.extents_used
        );
        assert_eq!(world.verify("moved"), 0);
    }
}
