//! Short programs, crashed at every event, with every subset of the writes that were not flushed, and some of the recoveries
//! crashed again.

use std::collections::BTreeMap;

use basalt::device::sim::random::{Random, mix};
use basalt::device::sim::{Image, Keep, SimConfig, SimDisk, Tear};
use basalt::engine::action::{Action, Command, Expiry, Fold, SetReply};
use basalt::engine::batch::BatchReply;
use basalt::engine::durability::Durability;
use basalt::engine::op::{Clock, Key, Reply};
use basalt::format::slot::shard_of;
use basalt::sim::node::{BootFailure, Outcome, Request, SimNode, format};
use basalt::sim::promise::{Promise, broken};

pub const SHARDS: u16 = 2;

/// Unflushed writes up to which every subset is tried.
pub const SUBSETS_OF: usize = 8;

/// Subsets tried where there are more.
pub const SUBSETS_SAMPLED: u64 = 96;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    PutSmall,
    PutBlocks,
    Overwrite,
    Delete,
    BatchAcross,
    BatchWithin,
    Sync,
    Clear,
    /// Two values that no extent holds together: the second opens another.
    RollExtent,
    Restart,
}

pub const OPS: [Op; 10] = [
    Op::PutSmall,
    Op::PutBlocks,
    Op::Overwrite,
    Op::Delete,
    Op::BatchAcross,
    Op::BatchWithin,
    Op::Sync,
    Op::Clear,
    Op::RollExtent,
    Op::Restart,
];

/// One request and what it changes, as a whole or not at all.
pub type Step = (Request, Vec<(Key, Option<Vec<u8>>)>);

pub type Model = BTreeMap<Key, Option<Vec<u8>>>;

/// Keys by the shard that they are in.
pub fn key(shard: u16, number: usize) -> Key {
    let wanted = |key: &Key| shard_of(key, SHARDS).0 == shard;
    (0..).map(|i| Key::from(format!("k{number}-{i}"))).find(wanted).unwrap()
}

pub fn keys() -> Vec<Key> {
    (0..SHARDS).flat_map(|shard| (0..6).map(move |number| key(shard, number))).collect()
}

pub fn value(op: Op, position: usize, size: usize) -> Vec<u8> {
    (0..size).map(|i| mix(op as u64 * 31 + position as u64 * 7 + i as u64) as u8).collect()
}

/// The steps of an operation: each is one request and what it changes, as a whole or not at all.
pub fn steps(op: Op, position: usize) -> Vec<Step> {
    let set = |bytes: &[u8]| Action::Set {
        value: bytes.to_vec().into(),
        expiry: Expiry::Clear,
        condition: None,
        reply: SetReply::Ok,
    };
    let put =
        |key: Key, bytes: Vec<u8>| (Request::Single(key.clone(), set(&bytes)), vec![(key, Some(bytes))]);
    let batch = |changes: Vec<(Key, Option<Vec<u8>>)>| {
        let commands = changes.iter().map(|(key, value)| Command {
            actions: vec![(key.clone(), value.as_ref().map_or(Action::Delete, |bytes| set(bytes)))],
            fold: Fold::One,
        });
        (Request::Batch(commands.collect(), Vec::new()), changes)
    };
    match op {
        Op::PutSmall => vec![put(key(0, 1), value(op, position, 20))],
        Op::PutBlocks => vec![put(key(1, 1), value(op, position, 10_000))],
        Op::Overwrite => vec![put(key(0, 0), value(op, position, 3_000))],
        Op::Delete => vec![(Request::Single(key(1, 0), Action::Delete), vec![(key(1, 0), None)])],
        Op::BatchAcross => vec![batch(vec![
            (key(0, 2), Some(value(op, position, 100))),
            (key(1, 2), Some(value(op, position, 5_000))),
            (key(1, 0), None),
        ])],
        Op::BatchWithin => vec![batch(vec![
            (key(0, 3), Some(value(op, position, 4_500))),
            (key(0, 0), None),
            (key(0, 4), Some(value(op, position, 10))),
        ])],
        Op::Sync => vec![(Request::Sync, Vec::new())],
        Op::Clear => vec![(Request::Clear, keys().into_iter().map(|key| (key, None)).collect())],
        Op::RollExtent => (0..2).map(|i| put(key(0, 5), value(op, position + i, 600_000))).collect(),
        Op::Restart => Vec::new(),
    }
}

pub fn config(tear: Tear) -> SimConfig {
    SimConfig { block_count: (14 << 20) / 4096, tear, transfer_size_max: 256 << 10, ..SimConfig::default() }
}

pub fn boot(disk: &SimDisk) -> Result<SimNode, BootFailure> {
    SimNode::boot(disk, 1, Durability::Always, Clock { unix_ms: 1_000_000, monotonic_us: 0 }, 7)
}

/// A disk with two keys on it that was stopped cleanly.
pub fn base(tear: Tear) -> (Image, Model) {
    let disk = SimDisk::new(config(tear), 1);
    format(&disk, SHARDS, 1);
    let mut node = boot(&disk).unwrap();
    let mut model: Model = keys().into_iter().map(|key| (key, None)).collect();
    for shard in 0..SHARDS {
        let bytes = value(Op::Restart, usize::from(shard), 300);
        let request = Request::Single(key(shard, 0), Action::Append(bytes.clone().into()));
        node.run(&disk, request).unwrap();
        model.insert(key(shard, 0), Some(bytes));
    }
    assert!(node.stop(&disk));
    disk.crash(&mut basalt::device::sim::CrashChoice::Nothing);
    (disk.snapshot(), model)
}

/// Runs a program until it ends or the power goes. What was acknowledged is in `model`; what was open comes back.
pub fn run(disk: &SimDisk, program: &[Op], model: &mut Model) -> Option<Step> {
    let mut node = match boot(disk) {
        Ok(node) => node,
        Err(BootFailure::Gone) => return None,
        Err(other) => broken(Promise::Answers, &format!("{program:?}: {other:?}")),
    };
    for (position, op) in program.iter().enumerate() {
        for (request, changes) in steps(*op, position) {
            match node.run(disk, request.clone()) {
                // The answer of a step that the cut overtook never reached anyone.
                _ if disk.is_off() => return Some((request, changes)),
                Some(Outcome::Reply(Reply::Ok | Reply::Int(_)) | Outcome::Done(Ok(()))) => {}
                Some(Outcome::Batch(BatchReply::Replies(_))) => {}
                other => broken(Promise::Answers, &format!("{program:?}: {other:?}")),
            }
            model.extend(changes);
        }
        if *op == Op::Restart {
            if !node.stop(disk) || disk.is_off() {
                return None;
            }
            node = match boot(disk) {
                Ok(node) => node,
                Err(BootFailure::Gone) => return None,
                Err(other) => broken(Promise::Answers, &format!("{program:?}: {other:?}")),
            };
        }
    }
    None
}

/// Boots an image and holds it against what it may be. Returns the number of images that were looked at.
pub fn verify(
    disk: &SimDisk,
    model: &Model,
    open: Option<&Step>,
    random: &mut Random,
    depth: usize,
    what: &dyn Fn() -> String,
) -> u64 {
    let mut images = 1;
    if depth > 0 && random.chance(1, 40) {
        // The recovery itself is cut, and what that leaves must recover to the same.
        let image = SimDisk::from_image(disk.config(), random.next_u64(), disk.snapshot());
        image.power_cut_at(1 + random.below(40));
        // Whether it came to its end before the cut makes no difference.
        let _ = boot(&image);
        let crashed = image.crash_image(random.next_u64());
        images += verify(&crashed, model, open, random, depth - 1, what);
    }
    let mut node = match boot(disk) {
        Ok(node) => node,
        Err(failure) => broken(Promise::Undamaged, &format!("{}: does not boot: {failure:?}", what())),
    };
    let (mut done, mut undone) = (0, 0);
    let changes: BTreeMap<&Key, &Option<Vec<u8>>> = open
        .map(|(_, changes)| changes.iter().map(|(key, value)| (key, value)).collect())
        .unwrap_or_default();
    let mut count = 0;
    for (key, acknowledged) in model {
        let found = match node.run(disk, Request::Single(key.clone(), Action::Get)) {
            Some(Outcome::Reply(Reply::Nil)) => None,
            Some(Outcome::Reply(Reply::Bulk(bytes))) => Some(bytes.to_vec()),
            other => broken(Promise::Answers, &format!("{}: GET {key:?}: {other:?}", what())),
        };
        count += u64::from(found.is_some());
        match changes.get(key) {
            Some(change) if found == **change && found == *acknowledged => {}
            Some(change) if found == **change => done += 1,
            _ if found == *acknowledged => undone += u32::from(changes.contains_key(key)),
            _ => {
                let size = found.map(|bytes| bytes.len());
                broken(Promise::Acknowledged, &format!("{}: {key:?} has {size:?} bytes", what()));
            }
        }
    }
    // FLUSHALL is one record a shard; everything else happened as a whole or not at all.
    let is_clear = open.is_some_and(|(request, _)| matches!(request, Request::Clear));
    if !is_clear && done > 0 && undone > 0 {
        broken(Promise::WholeOrNot, &format!("{}: {done} changes done, {undone} not", what()));
    }
    match node.run(disk, Request::Count) {
        Some(Outcome::Count(counted)) if counted == count => images,
        other => {
            let what = format!("{}: {count} keys are there, the node counts {other:?}", what());
            broken(Promise::Counts, &what)
        }
    }
}

/// Every program of up to so many operations.
pub fn programs(length: usize) -> Vec<Vec<Op>> {
    let mut all: Vec<Vec<Op>> = vec![Vec::new()];
    let mut last = all.clone();
    for _ in 0..length {
        last = last
            .iter()
            .flat_map(|program| OPS.iter().map(|op| program.iter().copied().chain([*op]).collect()))
            .collect();
        all.extend(last.iter().cloned());
    }
    all
}

/// How much was tried.
pub struct Tried {
    pub images: u64,
    /// Those of them that came of a crash of the recovery.
    pub nested: u64,
}

pub fn every_crash_point(tear: Tear, programs: &[Vec<Op>]) -> Tried {
    let (image, model_base) = base(tear);
    let mut random = Random::new(11);
    let (mut images, mut nested, mut boundaries) = (0, 0, 0);
    for program in programs {
        let disk = SimDisk::from_image(config(tear), 3, image.clone());
        run(&disk, program, &mut model_base.clone());
        let events = disk.events();
        // One more than there are: then the program came to its end, and was told so.
        for cut in 0..=events + 1 {
            boundaries += 1;
            let disk = SimDisk::from_image(config(tear), 3, image.clone());
            disk.power_cut_at(cut);
            let mut model = model_base.clone();
            let open = run(&disk, program, &mut model);
            let writes = disk.unflushed();
            let mut check = |choices: &[(u64, Keep)]| {
                let image = disk.image_with(choices);
                let what = || format!("{program:?} cut at event {cut} of {events}, kept {choices:?}");
                let seen = verify(&image, &model, open.as_ref(), &mut random, 2, &what);
                images += seen;
                nested += seen - 1;
            };
            let subsets = if writes.len() <= SUBSETS_OF { 1 << writes.len() } else { SUBSETS_SAMPLED };
            for subset in 0..subsets {
                let mask = if writes.len() <= SUBSETS_OF { subset } else { mix(cut * 1_000 + subset) };
                let kept: Vec<(u64, Keep)> = writes
                    .iter()
                    .enumerate()
                    .filter(|(at, _)| mask >> (at % 64) & 1 == 1)
                    .map(|(_, write)| (write.id, Keep::All))
                    .collect();
                check(&kept);
                // And once more with one of them torn.
                if let Some(torn) = kept.len().checked_sub(1) {
                    let mut kept = kept;
                    let at = mix(cut + subset) as usize % (torn + 1);
                    let size =
                        writes.iter().find(|write| write.id == kept[at].0).map_or(4096, |write| write.size);
                    let mut choice = Random::new(mix(cut * 77 + subset));
                    kept[at].1 = Keep::random(&mut choice, size as usize, tear.size(4096));
                    check(&kept);
                }
            }
        }
    }
    println!(
        "{tear:?}: {boundaries} crash points, {images} images, {nested} of them after a crash of the recovery"
    );
    Tried { images, nested }
}
