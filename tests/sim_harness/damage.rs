//! An image of several lives of a node, and what becomes of it when it is damaged.

use std::collections::{BTreeMap, BTreeSet};

use basalt::device::sim::random::Random;
use basalt::device::sim::{CrashChoice, Image, SimConfig, SimDisk};
use basalt::engine::action::{Action, Command, Expiry, Fold, SetReply};
use basalt::engine::batch::BatchReply;
use basalt::engine::check::check;
use basalt::engine::durability::Durability;
use basalt::engine::op::{Clock, Key, OpError, Reply};
use basalt::engine::salvage::{Finding, Saved, Sink, salvage};
use basalt::probe;
use basalt::sim::node::{Outcome, Request, SimNode, format};
use basalt::sim::promise::{Promise, broken};

pub const SHARDS: u16 = 2;
pub const BLOCK: u64 = 4096;
pub const TAIL: &str = "tail:";

pub type Model = BTreeMap<Key, Option<Vec<u8>>>;

pub struct Canonical {
    /// After the last clean stop.
    pub image: Image,
    /// As it was one life earlier: where stale blocks come from.
    pub stale: SimDisk,
    pub model: Model,
    pub written: Vec<u64>,
}

pub fn config() -> SimConfig {
    SimConfig { block_count: (14 << 20) / BLOCK, transfer_size_max: 256 << 10, ..SimConfig::default() }
}

pub fn boot(disk: &SimDisk) -> Option<SimNode> {
    SimNode::boot(disk, 1, Durability::Always, Clock { unix_ms: 1_000_000, monotonic_us: 0 }, 7).ok()
}

pub fn set(value: &[u8]) -> Action {
    Action::Set { value: value.to_vec().into(), expiry: Expiry::Clear, condition: None, reply: SetReply::Ok }
}

/// One life of a node: writes, overwrites, deletes and batches.
pub fn live(disk: &SimDisk, random: &mut Random, model: &mut Model) -> SimNode {
    let mut node = boot(disk).expect("an intact disk boots");
    // Many of the values are kept in chunks.
    node.set_chunk_size(200);
    let value = |random: &mut Random| {
        let size = if random.chance(1, 12) { random.index(20_000) } else { random.index(300) };
        let mut value = vec![0; size];
        random.fill(&mut value);
        value
    };
    for _ in 0..40 {
        let key = |random: &mut Random| Key::from(format!("key:{:02}", random.index(24)));
        let (mut changes, mut commands) = (Vec::new(), Vec::new());
        for _ in 0..if random.chance(1, 3) { 3 } else { 1 } {
            let (key, value) = (key(random), (!random.chance(1, 4)).then(|| value(random)));
            let action = value.as_ref().map_or(Action::Delete, |value| set(value));
            commands.push(Command { actions: vec![(key.clone(), action)], fold: Fold::One });
            changes.push((key, value));
        }
        let outcome = node.run(disk, Request::Batch(commands, Vec::new()));
        assert!(matches!(outcome, Some(Outcome::Batch(BatchReply::Replies(_)))), "{outcome:?}");
        model.extend(changes);
    }
    node
}

/// Leaves extents that are nearly all garbage, and has what is live in them moved: most of it is in units then.
fn collect(disk: &SimDisk, node: &mut SimNode, random: &mut Random) {
    node.set_survivors_apart(true);
    node.set_trim(true);
    for nth in 0..30 {
        let key = Key::from(format!("{TAIL}filler{}", nth % 4));
        let mut value = vec![0; 150_000];
        random.fill(&mut value);
        let filled = node.run(disk, Request::Single(key, set(&value)));
        assert_eq!(filled, Some(Outcome::Reply(Reply::Ok)));
    }
    for nth in 0..4 {
        let key = Key::from(format!("{TAIL}filler{nth}"));
        node.run(disk, Request::Single(key, Action::Delete));
    }
    assert_eq!(node.run(disk, Request::Compact), Some(Outcome::Done(Ok(()))));
}

pub fn canonical() -> Canonical {
    let disk = SimDisk::new(config(), 1);
    format(&disk, SHARDS, 1);
    let mut random = Random::new(11);
    let mut model: Model = (0..24).map(|n| (Key::from(format!("key:{n:02}")), None)).collect();
    let mut node = live(&disk, &mut random, &mut model);
    collect(&disk, &mut node, &mut random);
    assert!(node.stop(&disk));
    // This life ends by a kill, so that the next one starts behind an unclean stop.
    drop(live(&disk, &mut random, &mut model));
    disk.crash(&mut CrashChoice::Nothing);
    let stale = SimDisk::from_image(config(), 2, disk.snapshot());
    let mut node = live(&disk, &mut random, &mut model);
    // What the first collection kept may all have been written over since.
    collect(&disk, &mut node, &mut random);
    // The last frames of a log, lost together, can't be told from frames that never completed. Keys that nobody asks for
    // lie there, so that two blocks at once do not reach the others.
    for number in 0..8 {
        let key = Key::from(format!("{TAIL}{number}"));
        assert_eq!(node.run(&disk, Request::Single(key, set(b"tail"))), Some(Outcome::Reply(Reply::Ok)));
    }
    assert!(node.stop(&disk));
    disk.crash(&mut CrashChoice::Nothing);
    let mut written = disk.written_blocks();
    written.retain(|block| disk.read_raw(block * BLOCK, BLOCK as usize).iter().any(|byte| *byte != 0));
    Canonical { image: disk.snapshot(), stale, model, written }
}

/// What a damaged disk came to.
#[derive(Debug, Default, Clone, Copy)]
pub struct Findings {
    pub refused: u64,
    pub served: u64,
    pub keys_in_error: u64,
    pub clean: u64,
    /// Keys that a salvage gave and said to be in doubt, or old.
    pub salvaged_in_doubt: u64,
    pub salvaged_in_whole: u64,
    pub salvage_refused: u64,
    /// Images in which a unit of survivors was durable and is not there.
    pub units_missing: u64,
}

/// What a salvage gives.
#[derive(Default)]
pub struct Basket {
    saved: BTreeMap<Key, Vec<u8>>,
    flagged: BTreeSet<Key>,
    has_suspects: bool,
}

impl Sink for Basket {
    fn save(&mut self, saved: &Saved<'_>) -> std::io::Result<()> {
        let before = self.saved.insert(Key::copy_from_slice(saved.key), saved.value.to_vec());
        assert!(before.is_none(), "a key was given twice");
        Ok(())
    }

    fn find(&mut self, finding: Finding) {
        match finding {
            Finding::Older(one) | Finding::InDoubt(one) | Finding::Lost(one) => {
                self.flagged.insert(one.key);
            }
            Finding::Region(_) => self.has_suspects = true,
            _ => {}
        }
    }

    fn progress(&mut self, _: u64, _: u64) {}
}

impl Canonical {
    /// What a salvage gives without saying that it may be wrong is right; what it calls complete is.
    fn salvage(&self, what: &str, disk: &SimDisk, findings: &mut Findings) {
        // In turns: a salvage takes as long as a boot.
        let only_certain = findings.served % 2 == 1;
        let mut basket = Basket::default();
        let Ok(report) = salvage(disk.open_queue(), only_certain, 1_000_000, &mut basket) else {
            findings.salvage_refused += 1;
            return;
        };
        assert_eq!(report.keys_saved, basket.saved.len() as u64, "{what}: {report:?}");
        for (key, value) in basket.saved.iter().filter(|(key, _)| !key.starts_with(TAIL.as_bytes())) {
            let is_vouched_for = !basket.has_suspects && !basket.flagged.contains(key);
            if is_vouched_for || only_certain {
                let expected = self.model.get(key).and_then(Option::as_ref);
                if Some(value) != expected {
                    broken(Promise::NoWrongAnswer, &format!("{what}: a salvage of {key:?}, {report:?}"));
                }
            } else {
                findings.salvaged_in_doubt += 1;
            }
        }
        if report.is_complete() {
            findings.salvaged_in_whole += 1;
            let is_missing = |key: &Key| !basket.saved.contains_key(key);
            let missing = self.model.iter().find(|(key, value)| value.is_some() && is_missing(key));
            if missing.is_some() {
                let what = format!("{what}: {missing:?} is missing and nothing is said, {report:?}");
                broken(Promise::NoWrongAnswer, &what);
            }
        }
    }

    /// Damages a copy and asks it everything.
    pub fn mutate(&self, what: &str, damage: impl FnOnce(&SimDisk), findings: &mut Findings) {
        let disk = SimDisk::from_image(config(), 3, self.image.clone());
        damage(&disk);
        probe::take().for_each(drop);
        let is_clean = check(&mut disk.open_queue(), &mut |_, _| {}).is_ok_and(|report| report.is_clean());
        let is_unit_missing = probe::take().any(|(name, _)| name == "durable unit missing");
        findings.units_missing += u64::from(is_unit_missing);
        findings.clean += u64::from(is_clean);
        self.salvage(what, &disk, findings);
        let Some(mut node) = boot(&disk) else {
            assert!(!is_clean, "{what}: the check finds nothing and the node does not start");
            findings.refused += 1;
            return;
        };
        findings.served += 1;
        let mut errors = 0;
        for (key, expected) in &self.model {
            match node.run(&disk, Request::Single(key.clone(), Action::Get)) {
                Some(Outcome::Reply(Reply::Bulk(value))) if Some(value.as_ref()) == expected.as_deref() => {}
                Some(Outcome::Reply(Reply::Nil)) if expected.is_none() => {}
                Some(Outcome::Reply(Reply::Error(OpError::Damaged { .. } | OpError::ReadFailed { .. }))) => {
                    errors += 1;
                }
                other => broken(Promise::NoWrongAnswer, &format!("{what}: {key:?} answers {other:?}")),
            }
        }
        let live: Vec<&Key> =
            self.model.iter().filter(|(_, value)| value.is_some()).map(|(k, _)| k).collect();
        match node.run(&disk, Request::Keys) {
            Some(Outcome::Keys(mut keys)) => {
                keys.retain(|key| !key.starts_with(TAIL.as_bytes()));
                keys.sort();
                if !keys.iter().eq(live.iter().copied()) {
                    broken(Promise::NoWrongAnswer, &format!("{what}: a scan lists {keys:?}"));
                }
            }
            Some(Outcome::Done(Err(OpError::Damaged { .. } | OpError::ReadFailed { .. }))) => errors += 1,
            other => broken(Promise::NoWrongAnswer, &format!("{what}: a scan answers {other:?}")),
        }
        if errors > 0 && is_clean {
            let what = format!("{what}: {errors} answers are errors and the check finds nothing");
            broken(Promise::NoWrongAnswer, &what);
        }
        findings.keys_in_error += errors;
        // What is written from now on is there, in doubt or not.
        let (key, value) = (Key::from_static(b"key:00"), b"written after the damage");
        let wrote = node.run(&disk, Request::Single(key.clone(), set(value)));
        assert_eq!(wrote, Some(Outcome::Reply(Reply::Ok)), "{what}: a write");
        assert!(node.stop(&disk), "{what}: a clean stop");
        let mut node = boot(&disk).unwrap_or_else(|| panic!("{what}: it does not start a second time"));
        match node.run(&disk, Request::Single(key, Action::Get)) {
            Some(Outcome::Reply(Reply::Bulk(found))) if *found == *value => {}
            other => panic!("{what}: what was written after the damage answers {other:?}"),
        }
    }

    /// Flips one bit of `intact`, the image as it is, somewhere where it may matter.
    pub fn flip_a_bit(&self, intact: &SimDisk, random: &mut Random, findings: &mut Findings) {
        let block = self.written[random.index(self.written.len())];
        let bytes = intact.read_raw(block * BLOCK, BLOCK as usize);
        let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        // Most of a block is padding or value; the bytes that are not zero in its first 256 are headers and keys.
        let within = match random.below(8) {
            0 => random.index(BLOCK as usize),
            1..=4 => random.index(used.clamp(1, 256)),
            _ => random.index(used.max(1)),
        };
        let (at, bit) = (block * BLOCK + within as u64, random.below(8) as u32);
        let what = format!("block {block}, byte {within}, bit {bit}");
        self.mutate(&what, |disk| disk.flip_bit(at, bit), findings);
    }

    /// Has a block read as zeros.
    pub fn zero_a_block(&self, block: u64, findings: &mut Findings) {
        let what = format!("block {block} zeroed");
        self.mutate(&what, |disk| disk.overwrite(block * BLOCK, &[0; 4096]), findings);
    }
}

pub fn mutations(default: u64) -> u64 {
    std::env::var("BASALT_MUTATIONS").ok().map_or(default, |text| text.parse().expect("a number"))
}
