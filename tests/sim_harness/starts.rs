//! Starts that are cut short, one after the other, each at any moment: superblocks half written over half written ones.

use basalt::device::sim::random::Random;
use basalt::device::sim::{CrashChoice, SimConfig, SimDisk, Tear};
use basalt::engine::action::{Action, Expiry, SetReply};
use basalt::engine::durability::Durability;
use basalt::engine::op::{Clock, Key, Reply};
use basalt::sim::node::{BootFailure, Outcome, Request, SimNode, format};
use basalt::sim::promise::{Promise, broken};

/// How many starts came to their end, and how many did not.
#[derive(Debug, Default)]
pub struct Starts {
    pub whole: u64,
    pub cut: u64,
}

/// So many starts, of which the last is not cut. Panics where one does not come to its end for any other reason than a cut.
pub fn cut_short(seed: u64, count: u64) -> Starts {
    let mut random = Random::new(seed);
    let tear = [Tear::Block, Tear::Sector512, Tear::Byte][random.index(3)];
    let disk = SimDisk::new(SimConfig { block_count: (14 << 20) / 4096, tear, ..SimConfig::default() }, seed);
    format(&disk, 1, seed);
    let boot = |seed| {
        let clock = Clock { unix_ms: 1_000_000, monotonic_us: 0 };
        SimNode::boot(&disk, 1, Durability::Always, clock, seed)
    };
    let key = Key::from_static(b"key");
    let set = Action::Set {
        value: "there from the beginning".into(),
        expiry: Expiry::Clear,
        condition: None,
        reply: SetReply::Ok,
    };
    let mut first = boot(seed).expect("a fresh disk boots");
    assert_eq!(first.run(&disk, Request::Single(key.clone(), set)), Some(Outcome::Reply(Reply::Ok)));
    assert!(first.stop(&disk));
    // What a start after a crash has: most are cut in the first half, where superblocks are replaced, and some come to their end.
    disk.crash(&mut CrashChoice::seeded(random.next_u64()));
    let before = disk.events();
    drop(boot(random.next_u64()).expect("a disk with what was acknowledged boots"));
    let events = disk.events() - before;
    disk.crash(&mut CrashChoice::seeded(random.next_u64()));
    let mut starts = Starts::default();
    for nth in 1..=count {
        if nth < count {
            let within = if random.below(4) == 0 { 2 * events } else { events / 2 };
            disk.power_cut_at(disk.events() + random.below(within));
        }
        match boot(random.next_u64()) {
            Ok(_) if disk.is_off() => starts.cut += 1,
            Err(BootFailure::Gone) => starts.cut += 1,
            Ok(mut node) => {
                starts.whole += 1;
                disk.power_cut_at(u64::MAX);
                let found = node.run(&disk, Request::Single(key.clone(), Action::Get));
                if found != Some(Outcome::Reply(Reply::Bulk("there from the beginning".into()))) {
                    broken(Promise::Acknowledged, &format!("seed {seed}, start {nth}: {found:?}"));
                }
                if !node.damage.is_empty() {
                    broken(Promise::Undamaged, &format!("seed {seed}, start {nth}: {:?}", node.damage));
                }
            }
            Err(failure) => broken(Promise::Undamaged, &format!("seed {seed}, start {nth}: {failure:?}")),
        }
        disk.power_cut_at(0);
        disk.crash(&mut CrashChoice::seeded(random.next_u64()));
    }
    starts
}
