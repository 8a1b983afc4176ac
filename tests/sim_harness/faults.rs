//! A fixed workload on a disk that fails once, or from then on: every request is answered, what was acknowledged is there
//! after a power cut and a restart, and what was unknown has settled to one outcome.

use std::collections::BTreeMap;

use basalt::device::sim::random::{Random, mix};
use basalt::device::sim::{CrashChoice, Fault, FaultKind, FaultOp, Image, SimConfig, SimDisk};
use basalt::engine::action::{Action, Command, Expiry, Fold, SetReply};
use basalt::engine::batch::BatchReply;
use basalt::engine::durability::Durability;
use basalt::engine::op::{Clock, Key, OpError, Reply};
use basalt::sim::node::{BootFailure, Outcome, Request, SimNode, format};
use basalt::sim::promise::{Promise, broken};

pub const SHARDS: u16 = 2;
pub const CLIENTS: usize = 3;
pub const REQUESTS: usize = 36;
/// Polls after which a request without an answer counts as forgotten.
pub const POLLS_MAX: usize = 20_000;

pub type Value = Option<Vec<u8>>;

pub fn config() -> SimConfig {
    SimConfig {
        block_count: (14 << 20) / 4096,
        depth: 8,
        transfer_size_max: 64 << 10,
        ..SimConfig::default()
    }
}

pub fn boot(disk: &SimDisk) -> Result<SimNode, BootFailure> {
    SimNode::boot(disk, 2, Durability::Always, Clock { unix_ms: 1_000_000, monotonic_us: 0 }, 7)
}

pub fn set(value: &[u8]) -> Action {
    Action::Set { value: value.to_vec().into(), expiry: Expiry::Clear, condition: None, reply: SetReply::Ok }
}

/// What a client is told of each of its keys. Every client has its own, and one request at a time.
pub struct Client {
    known: BTreeMap<Key, Value>,
    /// The changes of the request that is open, or whose outcome is unknown: none of them happened, or all.
    open: Vec<(Key, Value)>,
    /// No more is asked after an unknown outcome: what follows would depend on it.
    is_unknown: bool,
    waits: bool,
}

pub struct Run {
    clients: Vec<Client>,
    answered: usize,
    refused: usize,
    unknown: usize,
}

pub fn key(client: usize, number: usize) -> Key {
    Key::from(format!("c{client}:{number}"))
}

pub fn request(
    random: &mut Random,
    client: usize,
    known: &BTreeMap<Key, Value>,
) -> (Request, Vec<(Key, Value)>) {
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
pub fn is_definite(what: &str, error: &OpError) -> bool {
    match error {
        OpError::OutcomeUnknown { .. } => false,
        // Each failed write costs an extent.
        OpError::DeviceFull | OpError::ReserveExhausted if what.starts_with("Write") => true,
        OpError::ReadOnly { .. } | OpError::Damaged { .. } | OpError::ReadFailed { .. } => true,
        other => broken(Promise::Refusals, &format!("{what}: an error that no fault explains: {other}")),
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
                            if !is_definite(what, &error) {
                                broken(
                                    Promise::WholeOrNot,
                                    &format!("{what}: one part unknown, the batch applied"),
                                );
                            }
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
                    if found.is_some() && !client.known.values().any(|value| *value == found) {
                        broken(Promise::Answers, &format!("{what}: a GET gives what nobody wrote"));
                    }
                }
                client.known.extend(client.open.drain(..));
                return;
            }
            other => broken(Promise::Answers, &format!("{what}: {other:?}")),
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
            if polls == POLLS_MAX {
                broken(Promise::Answered, &format!("{what}: a request was never answered"));
            }
        }
    }

    /// After a restart without faults.
    fn verify(&self, what: &str, disk: &SimDisk) {
        let mut node = boot(disk).unwrap_or_else(|error| {
            broken(Promise::Undamaged, &format!("{what}: no start after the fault: {error:?}"))
        });
        if !node.damage.is_empty() {
            broken(Promise::Undamaged, &format!("{what}: called damaged: {:?}", node.damage));
        }
        for (at, client) in self.clients.iter().enumerate() {
            let mut found = BTreeMap::new();
            for number in 0..5 {
                let key = key(at, number);
                let value = match node.run(disk, Request::Single(key.clone(), Action::Get)) {
                    Some(Outcome::Reply(Reply::Nil)) => None,
                    Some(Outcome::Reply(Reply::Bulk(value))) => Some(value.to_vec()),
                    other => broken(Promise::Answers, &format!("{what}: {key:?} answers {other:?}")),
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
            let may_be = fits(&[]) || (client.is_unknown && fits(&client.open));
            if !may_be {
                let told = brief(&told);
                let what = format!(
                    "{what}: client {at} finds {found_brief:?} (bytes), neither what it was told, {told:?}, nor its open request done, {open:?}"
                );
                broken(Promise::Acknowledged, &what);
            }
        }
    }
}

/// A disk with one life behind it.
pub fn base(seed: u64) -> (Image, Vec<BTreeMap<Key, Value>>) {
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
pub struct Totals {
    pub runs: u64,
    pub struck: u64,
    pub refused: usize,
    pub unknown: usize,
    pub boots_failed: u64,
}

/// Puts one kind of fault at every place until it no longer strikes.
pub fn sweep(op: FaultOp, kind: FaultKind, workload: u64, totals: &mut Totals) {
    let (image, known) = base(workload);
    for sticky in [false, true] {
        // A queue that stays full is back-pressure without end, and a command that never completes is a driver's to
        // time out: neither has an answer to wait for.
        if sticky && matches!(kind, FaultKind::Full | FaultKind::Never) {
            continue;
        }
        for nth in 0.. {
            let what = format!("{op:?} number {nth} {kind:?}{}", if sticky { " from then on" } else { "" });
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
                        if failed > 0 {
                            let what = format!("{what}: one failed write is nobody's business but the log's");
                            broken(Promise::Refusals, &what);
                        }
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
