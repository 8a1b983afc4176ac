//! The bug zoo: each mistake in `src/planted.rs` is made, alone, and the simulation must find a promise broken. A simulation
//! that never fails proves as little as one that was never run. What finds nothing without a mistake is run as well.
//!
//! `cargo test --features planted-bugs --test sim_zoo -- --nocapture` prints who caught what. `BASALT_ZOO=SkipsFlush` hunts that one
//! alone, and `BASALT_ZOO_TRIES=200` goes on for so long where that is more than what is allowed.

#![cfg(test)]
#![cfg(feature = "planted-bugs")]

mod sim_harness;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use basalt::device::sim::random::Random;
use basalt::device::sim::{FaultKind, FaultOp, Keep, SimDisk, Tear};
use basalt::planted::{BUGS, Bug, plant};
use basalt::sim::world::{WorldConfig, run};
use basalt::sim::{collisions, promise};
use sim_harness::{damage, dump, exhaustive, faults, starts};

/// Who hunts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Hunter {
    /// Random worlds, each try from its own seed.
    Worlds,
    /// The same in the modes that acknowledge at once.
    RelaxedWorlds,
    /// The same with thousands of keys.
    CrowdedWorlds,
    /// The same with values that are nearly all long.
    LongWorlds,
    /// The same on disks that are written many times over.
    FullWorlds,
    /// The same beside a scrubber that never comes to rest.
    ScrubbedWorlds,
    /// The same on disks whose writes fail all the time.
    FailingWorlds,
    /// Dumps beside writers and garbage collection.
    Dumps,
    /// Keys that the index can't tell apart.
    Collisions,
    /// Starts in a row that are cut short, hundreds a try.
    CutStarts,
    /// A flush that fails, at each place of a workload of its own.
    FailedFlushes,
    /// FLUSHALL crashed at every event; each try tears writes otherwise.
    CrashPoints,
    /// Bits flipped: a hundred a try.
    FlippedBits,
    /// Blocks lost: ten a try.
    LostBlocks,
}

/// What the simulated disk says where commands in flight would have an order that no device keeps.
const OVERLAP: &str = "overlaps the in-flight";

/// Requests of a world.
const REQUESTS: usize = 1_000;

/// Who catches a mistake, and in how many tries at most.
fn hunter(bug: Bug) -> (Hunter, u64) {
    match bug {
        Bug::SkipsHolds => (Hunter::RelaxedWorlds, 5),
        Bug::PreparesEarly => (Hunter::Worlds, 60),
        Bug::SplitsIndexWrongly => (Hunter::CrowdedWorlds, 4),
        Bug::TrustsIdentity => (Hunter::Collisions, 2),
        Bug::BuriesChunksUnderReader | Bug::OldBytesWinOverEdit => (Hunter::LongWorlds, 10),
        Bug::SkipsLongHolds => (Hunter::LongWorlds, 20),
        Bug::MoveForgetsExpiry
        | Bug::DropsTombstones
        | Bug::MovesHeldKeys
        | Bug::RoundsLiveBytesDown
        | Bug::FreesExtentUnderReader
        | Bug::ReusesWhileTrimming
        | Bug::UnitFollowsLater => (Hunter::FullWorlds, 20),
        Bug::UnitOvertakesLog => (Hunter::FullWorlds, 250),
        Bug::ReadsIntoWrites => (Hunter::ScrubbedWorlds, 40),
        Bug::FreesExtentUnderScrubber => (Hunter::ScrubbedWorlds, 10),
        Bug::FreesEarly | Bug::DropsCommitRecords => (Hunter::FullWorlds, 40),
        Bug::SkipsFlushAfterRelocation | Bug::IgnoresFailedWrite | Bug::RelocationLeavesKeys => {
            (Hunter::FailingWorlds, 10)
        }
        Bug::LeaksCheckpointExtents | Bug::CheckpointSurvivesRelocation => (Hunter::FailingWorlds, 40),
        Bug::PinMissesOverwrites | Bug::FreesPinnedExtents => (Hunter::Dumps, 12),
        Bug::FixedSuperblockOrder => (Hunter::CutStarts, 15),
        Bug::IgnoresFailedFlush => (Hunter::FailedFlushes, 2),
        Bug::ForgetsClear => (Hunter::CrashPoints, 3),
        Bug::TrustsValues => (Hunter::FlippedBits, 5),
        Bug::AcceptsGaps => (Hunter::LostBlocks, 15),
        _ => (Hunter::Worlds, 15),
    }
}

impl Hunter {
    fn name(self) -> &'static str {
        match self {
            Hunter::Worlds => "random worlds",
            Hunter::RelaxedWorlds => "relaxed worlds",
            Hunter::CrowdedWorlds => "crowded worlds",
            Hunter::LongWorlds => "long worlds",
            Hunter::FullWorlds => "full worlds",
            Hunter::ScrubbedWorlds => "scrubbed worlds",
            Hunter::FailingWorlds => "failing worlds",
            Hunter::Dumps => "dumps",
            Hunter::Collisions => "collisions",
            Hunter::CutStarts => "cut starts",
            Hunter::FailedFlushes => "failed flushes",
            Hunter::CrashPoints => "crash points",
            Hunter::FlippedBits => "flipped bits",
            Hunter::LostBlocks => "lost blocks",
        }
    }

    /// One try. Panics where something is wrong.
    fn hunt(self, nth: u64) {
        match self {
            Hunter::Worlds => {
                run(WorldConfig::from_seed(nth, REQUESTS));
            }
            Hunter::RelaxedWorlds => {
                run(WorldConfig::relaxed_from_seed(nth, REQUESTS));
            }
            Hunter::CrowdedWorlds => {
                run(WorldConfig::crowded_from_seed(nth, 100));
            }
            Hunter::FullWorlds => {
                run(WorldConfig::full_from_seed(nth, 2 * REQUESTS));
            }
            Hunter::ScrubbedWorlds => {
                run(WorldConfig::scrubbed_from_seed(nth, 2 * REQUESTS));
            }
            Hunter::FailingWorlds => {
                run(WorldConfig::failing_from_seed(nth, REQUESTS));
            }
            Hunter::LongWorlds => {
                run(WorldConfig::long_from_seed(nth, REQUESTS));
            }
            Hunter::Dumps => {
                let ballast = [40, 3_000, 9_000][nth as usize % 3];
                dump::World::new(nth, ballast).run(REQUESTS, nth);
            }
            Hunter::Collisions => {
                collisions::run(nth);
            }
            Hunter::CutStarts => {
                starts::cut_short(nth, 400);
            }
            Hunter::FailedFlushes => {
                let kind = FaultKind::Error(Keep::None);
                faults::sweep(FaultOp::Flush, kind, nth, &mut faults::Totals::default());
            }
            Hunter::CrashPoints => {
                let tear = [Tear::Block, Tear::Sector512, Tear::Byte][nth as usize % 3];
                exhaustive::every_crash_point(tear, &[vec![exhaustive::Op::Clear]]);
            }
            Hunter::FlippedBits => {
                let canonical = damage::canonical();
                let disk = SimDisk::from_image(damage::config(), 3, canonical.image.clone());
                let mut random = Random::new(nth);
                for _ in 0..100 {
                    canonical.flip_a_bit(&disk, &mut random, &mut damage::Findings::default());
                }
            }
            Hunter::LostBlocks => {
                let canonical = damage::canonical();
                for block in canonical.written.iter().skip(10 * nth as usize).take(10) {
                    canonical.zero_a_block(*block, &mut damage::Findings::default());
                }
            }
        }
    }

    /// One try with a mistake, or none. Gives what is said where it panics.
    fn try_with(self, bug: Option<Bug>, nth: u64) -> Result<(), String> {
        plant(bug);
        let outcome = catch_unwind(AssertUnwindSafe(|| self.hunt(nth)));
        plant(None);
        outcome.map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
        })
    }
}

/// What became of one mistake.
struct Catch {
    bug: Bug,
    hunter: Hunter,
    tries: u64,
    /// The promise that was found broken, or what is wrong instead.
    outcome: Result<String, String>,
}

fn catch(bug: Bug) -> Catch {
    let (hunter, tries_max) = hunter(bug);
    let tries_max = common_tries(tries_max);
    for nth in 0..tries_max {
        if let Err(said) = hunter.try_with(Some(bug), nth) {
            let outcome = match promise::parse(&said) {
                Some((promise, _)) => Ok(promise.to_owned()),
                // The simulated disk looks after itself.
                None if said.contains(OVERLAP) => Ok("commands in flight do not overlap".into()),
                None => Err(format!("a panic that names no promise: {said}")),
            };
            return Catch { bug, hunter, tries: nth + 1, outcome };
        }
    }
    Catch { bug, hunter, tries: tries_max, outcome: Err("nothing noticed".into()) }
}

fn common_tries(allowed: u64) -> u64 {
    let wanted = std::env::var("BASALT_ZOO_TRIES").map_or(0, |text| text.parse().expect("a number"));
    allowed.max(wanted)
}

/// Calls `work` for each of these, on as many threads as there are cores.
fn on_all_cores<T: Sync, R: Send>(all: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::new());
    let cores = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                while let Some((at, one)) = all.iter().enumerate().nth(next.fetch_add(1, Ordering::Relaxed)) {
                    let result = work(one);
                    done.lock().unwrap().push((at, result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap();
    done.sort_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, result)| result).collect()
}

#[test]
fn every_planted_mistake_is_caught_and_nothing_else_is() {
    let only = std::env::var("BASALT_ZOO").ok();
    let bugs: Vec<Bug> = BUGS
        .iter()
        .copied()
        .filter(|bug| only.as_ref().is_none_or(|only| *only == format!("{bug:?}")))
        .collect();
    assert!(!bugs.is_empty(), "no mistake is called {only:?}");
    // Panics are expected here by the dozen.
    std::panic::set_hook(Box::new(|_| {}));
    println!("\n        mistake                      by           tries  the promise that was broken");
    let catches = on_all_cores(&bugs, |bug| {
        let catch = catch(*bug);
        let (promise, is_caught) = match &catch.outcome {
            Ok(promise) => (promise.as_str(), true),
            Err(what) => (what.as_str(), false),
        };
        let what: String = promise.chars().take(300).collect();
        let (name, hunter, tries) = (format!("{bug:?}"), catch.hunter.name(), catch.tries);
        // In one piece: the other threads print too.
        let verdict = if is_caught { "CAUGHT" } else { "MISSED" };
        println!("{verdict}  {name:<28} {hunter:<14} {tries:>3}  {what}");
        catch
    });
    // The same tries, and no mistake.
    let tries: BTreeSet<(Hunter, u64)> =
        catches.iter().flat_map(|one| (0..one.tries).map(|nth| (one.hunter, nth))).collect();
    let tries: Vec<(Hunter, u64)> = tries.into_iter().collect();
    let outcomes = on_all_cores(&tries, |(hunter, nth)| hunter.try_with(None, *nth));
    let _ = std::panic::take_hook();
    let wrong: Vec<_> =
        tries.iter().zip(outcomes).filter_map(|(one, outcome)| Some((one, outcome.err()?))).collect();
    assert!(wrong.is_empty(), "found without any mistake: {wrong:?}");
    println!("{} tries without a mistake found nothing", tries.len());
    let missed: Vec<Bug> = catches.iter().filter(|one| one.outcome.is_err()).map(|one| one.bug).collect();
    assert!(missed.is_empty(), "not caught, or not as a broken promise: {missed:?}");
}

/// The table in ARCHITECTURE.md names every mistake, who hunts it and how long. (No assertion: the other test silences panics.)
#[test]
fn the_documentation_says_who_hunts_what() -> Result<(), String> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/ARCHITECTURE.md");
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let (_, section) = text.split_once("### The bug zoo").ok_or("there is no section on the bug zoo")?;
    let rows: Vec<&str> = section.lines().filter(|line| line.starts_with("| `")).collect();
    for bug in BUGS {
        let (hunter, tries) = hunter(*bug);
        let (start, end) = (format!("| `{bug:?}` |"), format!("| {} |", hunter.name()));
        let is_its = |row: &&str| {
            row.starts_with(&start) && row.contains(&end) && row.contains(&format!(" of {tries} |"))
        };
        if !rows.iter().any(is_its) {
            return Err(format!("no row for {bug:?}, hunted by {} in {tries} tries", hunter.name()));
        }
    }
    if rows.len() == BUGS.len() {
        Ok(())
    } else {
        Err(format!("{} rows, {} mistakes", rows.len(), BUGS.len()))
    }
}
