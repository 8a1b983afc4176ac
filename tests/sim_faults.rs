//! One fault in one place of a fixed workload, for every place and every kind of fault, once and from then on: every request
//! is answered, what was acknowledged is there after a power cut and a restart, and what was unknown has settled to one outcome.
//!
//! `BASALT_FAULT_WORKLOADS=5 cargo test --release --test sim_faults` is the long run.

#![cfg(test)]

use std::collections::BTreeMap;

use basalt::device::sim::random::{Random, mix};
use basalt::device::sim::{CrashChoice, Fault, FaultKind, FaultOp, Image, Keep, SimConfig, SimDisk};
use basalt::engine::action::{Action, Command, Expiry, Fold, SetReply};
use basalt::engine::batch::BatchReply;
use basalt::engine::durability::Durability;
use basalt::engine::op::{Clock, Key, OpError, Reply};
use basalt::sim::node::{BootFailure, Outcome, Request, SimNode, format};

const SHARDS: u16 = 2;
const CLIENTS: usize = 3;
const REQUESTS: usize = 36;
/// Polls after which a request without an answer counts as forgotten.
const POLLS_MAX: usize = 20_000;

type Value = Option<Vec<u8>>;

fn config() -> SimConfig {
    SimConfig {
        block_count: (14 << 20) / 4096,
        depth: 8,
        transfer_size_max: 64 << 10,
        ..SimConfig::default()
    }
}

fn boot(disk: &SimDisk) -> Result<SimNode, BootFailure> {
    SimNode::boot(disk, 2, Durability::Always, Clock { unix_ms: 1_000_000, monotonic_us: 0 }, 7)
}

fn set(value: &[u8]) -> Action {
    Action::Set { value: value.to_vec().into(), expiry: Expiry::Clear, condition: None, reply: SetReply::Ok }
}

/// What a client is told of each of its keys. Every client has its own, and one request at a time.
struct Client {
    known: BTreeMap<Key, Value>,
    /// The changes of the request that is open, or whose outcome is unknown: none of them happened, or all.
    open: Vec<(Key, Value)>,
    /// No more is asked after an unknown outcome: what follows would depend on it.
    is_unknown: bool,
    waits: bool,
}

struct Run {
    clients: Vec<Client>,
    answered: usize,
    refused: usize,
    unknown: usize,
}

fn key(client: usize, number: usize) -> Key {
    Key::from(format!("c{client}:{number}"))
}

fn request(random: &mut Random, client: usize, known: &BTreeMap<Key, Value>) -> (Request, Vec<(Key, Value)>) {
    let value = |random: &mut Random| {
        let size = if random.chance(1, 5) { random.index(30_000) } else { random.index(500) };
        let mut value = vec![0; size];
        random.fill(&mut value);
        value
    };
    let one = key(client, random.index(5));
    match random.below(10) {
        0..=3 => {
            let value = value(random);
            (Request::Single(one.clone(), set(&value)), vec![(one, Some(value))])
        }
        4 => {
            let more = value(random);
            let mut after = known.get(&one).cloned().flatten().unwrap_or_default();
            after.extend_from_slice(&more);
            (Request::Single(one.clone(), Action::Append(more.into())), vec![(one, Some(after))])
        }
        5 => (Request::Single(one.clone(), Action::Delete), vec![(one, None)]),
        6 | 7 => (Request::Single(one, Action::Get), Vec::new()),
        _ => {
            let changes: Vec<(Key, Value)> = (0..4)
                .map(|number| (key(client, number), random.chance(3, 4).then(|| value(random))))
                .collect();
            let commands = changes.iter().map(|(key, value)| Command {
                actions: vec![(key.clone(), value.as_ref().map_or(Action::Delete, |value| set(value)))],
                fold: Fold::One,
            });
            (Request::Batch(commands.collect(), Vec::new()), changes)
        }
    }
}

/// Whether an error says for certain that nothing happened.
fn is_definite(what: &str, error: &OpError) -> bool {
    match error {
        OpError::OutcomeUnknown { .. } => false,
        // Each failed write costs an extent.
        OpError::DeviceFull | OpError::ReserveExhausted if what.starts_with("Write") => true,
        OpError::ReadOnly { .. } | OpError::Damaged { .. } | OpError::ReadFailed { .. } => true,
        other => panic!("{what}: an error that no fault explains: {other}"),
    }
}

impl Run {
    fn new() -> Run {
        let client = || Client { known: BTreeMap::new(), open: Vec::new(), is_unknown: false, waits: false };
        Run {
            clients: std::iter::repeat_with(client).take(CLIENTS).collect(),
            answered: 0,
            refused: 0,
            unknown: 0,
        }
    }

    fn on_done(&mut self, what: &str, id: u64, outcome: Outcome) {
        let client = &mut self.clients[id as usize % CLIENTS];
        client.waits = false;
        self.answered += 1;
        let error = match outcome {
            Outcome::Reply(Reply::Error(error))
            | Outcome::Batch(BatchReply::Failed(error))
            | Outcome::Done(Err(error)) => error,
            Outcome::Batch(BatchReply::Replies(replies)) => {
                // As with Redis, a command of a batch that fails leaves its keys alone; the others apply.
                for (reply, change) in replies.into_iter().zip(client.open.drain(..)) {
                    match reply {
                        Reply::Error(error) => {
                            assert!(is_definite(what, &error), "{what}: one part unknown, the batch applied");
                        }
                        _ => client.known.extend([change]),
                    }
                }
                return;
            }
            Outcome::Reply(reply) => {
                // What a GET says must be what is known; it has no changes, and is the only one that answers like this.
                if let (Reply::Bulk(_) | Reply::Nil, true) = (&reply, client.open.is_empty()) {
                    let found = if let Reply::Bulk(value) = &reply { Some(value.to_vec()) } else { None };
                    assert!(
                        client.known.values().any(|value| *value == found) || found.is_none(),
                        "{what}: a GET gives what nobody wrote"
                    );
                }
                client.known.extend(client.open.drain(..));
                return;
            }
            other => panic!("{what}: {other:?}"),
        };
        if is_definite(what, &error) {
            self.refused += 1;
            client.open.clear();
        } else {
            self.unknown += 1;
            client.is_unknown = true;
        }
    }

    /// Runs the workload. Every request that was started is answered, whatever the disk does.
    fn work(&mut self, what: &str, disk: &SimDisk, node: &mut SimNode, seed: u64) {
        for number in 0..REQUESTS as u64 {
            let at = number as usize % CLIENTS;
            self.settle(what, disk, node, |run| run.clients[at].waits);
            // From a seed of its own, so that a fault does not change what the others ask.
            let mut random = Random::new(mix(seed ^ number << 32));
            let (request, changes) = request(&mut random, at, &self.clients[at].known);
            if self.clients[at].is_unknown {
                continue;
            }
            self.clients[at].open = changes;
            self.clients[at].waits = true;
            node.start(number, request);
        }
        self.settle(what, disk, node, |run| run.clients.iter().any(|client| client.waits));
    }

    fn settle(&mut self, what: &str, disk: &SimDisk, node: &mut SimNode, waits: impl Fn(&Run) -> bool) {
        let mut polls = 0;
        while waits(self) {
            node.step();
            node.clock.monotonic_us += 100;
            for (id, outcome) in node.take_done() {
                self.on_done(what, id, outcome);
            }
            polls += 1;
            if polls == POLLS_MAX / 2 {
                // What never completes is aborted by a reset of the controller, as a driver's timeout does it.
                disk.reset_controller();
            }
            assert!(polls < POLLS_MAX, "{what}: a request was never answered");
        }
    }

    /// After a restart without faults.
    fn verify(&self, what: &str, disk: &SimDisk) {
        let mut node =
            boot(disk).unwrap_or_else(|error| panic!("{what}: no start after the fault: {error:?}"));
        assert!(node.damage.is_empty(), "{what}: called damaged: {:?}", node.damage);
        for (at, client) in self.clients.iter().enumerate() {
            let mut found = BTreeMap::new();
            for number in 0..5 {
                let key = key(at, number);
                let value = match node.run(disk, Request::Single(key.clone(), Action::Get)) {
                    Some(Outcome::Reply(Reply::Nil)) => None,
                    Some(Outcome::Reply(Reply::Bulk(value))) => Some(value.to_vec()),
                    other => panic!("{what}: {key:?} answers {other:?}"),
                };
                found.insert(key, value);
            }
            let fits = |changes: &[(Key, Value)]| {
                found.iter().all(|(key, found)| {
                    let changed =
                        changes.iter().rev().find(|(changed, _)| changed == key).map(|(_, value)| value);
                    *found == changed.or(client.known.get(key)).cloned().flatten()
                })
            };
            let brief = |changes: &[(Key, Value)]| {
                changes
                    .iter()
                    .map(|(key, value)| (key.clone(), value.as_ref().map(Vec::len)))
                    .collect::<Vec<_>>()
            };
            let told: Vec<_> = client.known.clone().into_iter().collect();
            let (found_brief, open) =
                (brief(&found.clone().into_iter().collect::<Vec<_>>()), brief(&client.open));
            assert!(
                fits(&[]) || (client.is_unknown && fits(&client.open)),
                "{what}: client {at} finds {found_brief:?} (bytes), neither what it was told, {:?}, nor its open request done, {open:?}",
                brief(&told)
            );
        }
    }
}

/// A disk with one life behind it.
fn base(seed: u64) -> (Image, Vec<BTreeMap<Key, Value>>) {
    let disk = SimDisk::new(config(), 1);
    format(&disk, SHARDS, 1);
    let mut run = Run::new();
    let mut node = boot(&disk).expect("a fresh disk boots");
    run.work("without a fault", &disk, &mut node, seed ^ 0xba5e);
    assert_eq!(run.refused + run.unknown, 0);
    drop(node);
    disk.crash(&mut CrashChoice::Everything);
    (disk.snapshot(), run.clients.into_iter().map(|client| client.known).collect())
}

#[derive(Debug, Default)]
struct Totals {
    runs: u64,
    struck: u64,
    refused: usize,
    unknown: usize,
    boots_failed: u64,
}

/// Puts one kind of fault at every place until it no longer strikes.
fn sweep(op: FaultOp, kind: FaultKind, totals: &mut Totals) {
    let workloads: u64 =
        std::env::var("BASALT_FAULT_WORKLOADS").map_or(1, |text| text.parse().expect("a number"));
    for workload in 0..workloads {
        let (image, known) = base(workload);
        for sticky in [false, true] {
            // A queue that stays full is back-pressure without end, and a command that never completes is a driver's to
            // time out: neither has an answer to wait for.
            if sticky && matches!(kind, FaultKind::Full | FaultKind::Never) {
                continue;
            }
            for nth in 0.. {
                let what =
                    format!("{op:?} number {nth} {kind:?}{}", if sticky { " from then on" } else { "" });
                let disk = SimDisk::from_image(config(), 5, image.clone());
                let mut run = Run::new();
                for (client, known) in run.clients.iter_mut().zip(&known) {
                    client.known = known.clone();
                }
                let fault = Fault { nth, op, kind, sticky };
                // Recovery waits for each command, however long it takes.
                if kind != FaultKind::Never {
                    disk.inject(fault);
                }
                match boot(&disk) {
                    Ok(mut node) => {
                        if kind == FaultKind::Never {
                            disk.inject(fault);
                        }
                        run.work(&what, &disk, &mut node, workload);
                        if op == FaultOp::Write && !sticky {
                            let failed = run.refused + run.unknown;
                            assert_eq!(
                                failed, 0,
                                "{what}: one failed write is nobody's business but the log's"
                            );
                        }
                        disk.clear_faults();
                        node.stop(&disk);
                    }
                    Err(BootFailure::Gone | BootFailure::Open(_) | BootFailure::Damaged(_)) => {
                        totals.boots_failed += 1;
                    }
                }
                totals.runs += 1;
                totals.refused += run.refused;
                totals.unknown += run.unknown;
                let is_struck = disk.faults_struck() > 0;
                disk.clear_faults();
                disk.crash(&mut CrashChoice::seeded(nth));
                run.verify(&what, &disk);
                if !is_struck {
                    break;
                }
                totals.struck += 1;
            }
        }
    }
}

fn sweep_all(op: FaultOp, kinds: &[FaultKind]) -> Totals {
    let mut totals = Totals::default();
    for kind in kinds {
        let before = totals.struck;
        sweep(op, *kind, &mut totals);
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
