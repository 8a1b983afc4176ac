//! The load that nodes are killed under, and the model that says what must be there afterwards.
//!
//! Each worker owns its units (a key, a counter, a group of keys written together, its share in the transfers), sends
//! pipelines of writes to them and notes what was sent and what was acknowledged. After a restart each unit must be in the
//! last acknowledged state or in one that was in flight; whichever it is, it is the only one from then on.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use super::resp::{Client, Reply, encode_into};
use super::rng::Rng;

pub const WORKERS: usize = 8;
const STRINGS: usize = 24;
const COUNTERS: usize = 4;
const GROUPS: usize = 3;
const GROUP_KEYS: usize = 6;
const ACCOUNTS: usize = 12;
const UNITS: usize = STRINGS + COUNTERS + GROUPS + 1;

/// What the values weigh: within one block, about a block, several blocks, and long.
const SIZES: [usize; 6] = [40, 300, 3_000, 4_096, 20_000, 200 << 10];

/// What a unit is in; `None` is "absent".
type State = Option<u64>;

/// One unit: the states it may be in after a kill.
#[derive(Debug, Clone)]
struct Unit {
    /// From the last state known to be durable to the last one sent, in order.
    states: Vec<State>,
    /// The index in `states` of the last acknowledged one.
    acked: usize,
}

impl Unit {
    fn sent(&self) -> State {
        self.states[self.states.len() - 1]
    }

    fn pending(&self) -> usize {
        self.states.len() - 1 - self.acked
    }

    fn settle(&mut self, state: State) {
        self.states = vec![state];
        self.acked = 0;
    }
}

/// When an acknowledged write may be counted on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promise {
    /// At once.
    Acknowledged,
    /// After `forget_window` was called with nothing in flight.
    Window,
}

/// What was exercised: a run that never met the situation proves nothing about it.
#[derive(Debug, Clone, Default)]
pub struct Coverage {
    pub acked: usize,
    pub kills: usize,
    pub kills_with_pending: usize,
    pub kills_with_pending_batch: usize,
    pub pending_that_happened: usize,
    pub pending_that_did_not: usize,
    pub lost_in_window: usize,
    pub large_values_verified: usize,
    pub absent_verified: usize,
}

/// One transfer: from, to, amount.
type Transfer = (usize, usize, i64);

#[derive(Debug, Clone)]
struct Worker {
    id: usize,
    rng: Rng,
    units: Vec<Unit>,
    /// By the number that the transfer's log key carries.
    transfers: HashMap<u64, Transfer>,
    next_version: u64,
    acked_count: usize,
}

/// All workers' models. A clone is for another way in which the same kill may have gone.
#[derive(Debug, Clone)]
pub struct Load {
    workers: Vec<Worker>,
    promise: Promise,
    /// The device may fail: an answer that says so ends its worker as a lost connection does, with what it sent pending.
    pub device_may_fail: bool,
    pub coverage: Coverage,
}

enum Kind {
    String,
    Counter,
    Group,
    Transfer,
}

fn kind(unit: usize) -> Kind {
    match unit {
        u if u < STRINGS => Kind::String,
        u if u < STRINGS + COUNTERS => Kind::Counter,
        u if u < STRINGS + COUNTERS + GROUPS => Kind::Group,
        _ => Kind::Transfer,
    }
}

fn key(worker: usize, unit: usize) -> String {
    match kind(unit) {
        Kind::String => format!("w{worker}:string:{unit}"),
        Kind::Counter => format!("w{worker}:counter:{unit}"),
        Kind::Group => format!("w{worker}:group:{unit}"),
        Kind::Transfer => format!("w{worker}:transfers"),
    }
}

fn group_key(worker: usize, unit: usize, index: usize) -> String {
    format!("{}:{index}", key(worker, unit))
}

fn account(index: usize) -> String {
    format!("account:{index}")
}

/// The value of a version: it names itself, and every byte of the rest depends on key and version.
fn value(key: &str, version: u64) -> Vec<u8> {
    let of_key = key.bytes().fold(version, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let mut rng = Rng::new(of_key);
    // Long values are rarer, so that they don't crowd out everything else.
    let size = SIZES[[0, 0, 1, 1, 2, 2, 3, 4, 4, 5][rng.below(10) as usize]];
    let mut bytes = format!("{key}|{version}|").into_bytes();
    bytes.extend(rng.bytes(size));
    bytes
}

impl Load {
    pub fn new(rng: &mut Rng, promise: Promise) -> Load {
        let unit = Unit { states: vec![None], acked: 0 };
        let worker = |id| Worker {
            id,
            rng: Rng::new(rng.next()),
            units: vec![unit.clone(); UNITS],
            transfers: HashMap::new(),
            next_version: 1,
            acked_count: 0,
        };
        Load {
            workers: (0..WORKERS).map(worker).collect(),
            promise,
            device_may_fail: false,
            coverage: Coverage::default(),
        }
    }

    /// Runs every worker until `stop` or until its connection ends, while `meanwhile` does what the test is about.
    pub fn run(&mut self, address: SocketAddr, stop: &AtomicBool, meanwhile: impl FnOnce()) {
        let (promise, may_fail) = (self.promise, self.device_may_fail);
        let clients: Vec<Option<Client>> = self.workers.iter().map(|_| open(address)).collect();
        std::thread::scope(|scope| {
            for (worker, client) in self.workers.iter_mut().zip(clients) {
                scope.spawn(move || client.map(|client| worker.run(client, promise, may_fail, stop)));
            }
            meanwhile();
        });
        self.coverage.acked = self.workers.iter().map(|w| w.acked_count).sum();
    }

    /// Call after the node was killed, before the restart.
    pub fn note_kill(&mut self) {
        let pending = |batches_only: bool| {
            let units = self.workers.iter().flat_map(|w| w.units.iter().enumerate());
            units
                .filter(|(_, u)| u.pending() > 0)
                .any(|(index, _)| !batches_only || matches!(kind(index), Kind::Group | Kind::Transfer))
        };
        self.coverage.kills += 1;
        self.coverage.kills_with_pending += usize::from(pending(false));
        self.coverage.kills_with_pending_batch += usize::from(pending(true));
    }

    /// Whether every write that was sent has been answered: it is not where a connection has broken.
    pub fn is_answered(&self) -> bool {
        self.workers.iter().flat_map(|worker| &worker.units).all(|unit| unit.pending() == 0)
    }

    /// Everything acknowledged is durable from now on: SAVE was answered, or the window has passed in quiet.
    pub fn forget_window(&mut self) {
        for unit in self.workers.iter_mut().flat_map(|w| &mut w.units) {
            assert_eq!(unit.pending(), 0, "only when nothing is in flight");
            unit.settle(unit.sent());
        }
    }

    /// Reads everything back. Whatever a unit is found in is what it must stay in.
    pub fn verify(&mut self, client: &mut Client) {
        let mut balances = vec![0i64; ACCOUNTS];
        let mut keys = 0;
        for worker in &mut self.workers {
            keys += worker.verify(client, &mut self.coverage, &mut balances);
        }
        for (index, balance) in balances.iter().enumerate() {
            let key = account(index);
            let found = client.call(&[b"GET", key.as_bytes()]).bytes();
            keys += usize::from(found.is_some());
            let found: i64 = found.map_or(0, |b| String::from_utf8_lossy(&b).parse().expect("an integer"));
            assert_eq!(found, *balance, "{key}: a transfer was done by half, or twice, or lost");
        }
        self.verify_count(client, keys);
    }

    /// DBSIZE, KEYS and SCAN agree with the model to the key.
    fn verify_count(&self, client: &mut Client, keys: usize) {
        assert_eq!(client.call(&[b"DBSIZE"]).int(), keys as i64, "DBSIZE");
        assert_eq!(client.call(&[b"KEYS", b"*"]).array().len(), keys, "KEYS *");
        let mut scanned = std::collections::HashSet::new();
        let mut cursor = b"0".to_vec();
        loop {
            let mut reply = client.call(&[b"SCAN", &cursor, b"COUNT", b"100"]).array();
            let page = reply.pop().expect("SCAN answers with keys").array();
            cursor = reply.pop().and_then(Reply::bytes).expect("SCAN answers with a cursor");
            scanned.extend(page.into_iter().map(|key| key.bytes().expect("a key is a string")));
            if cursor == b"0" {
                break;
            }
        }
        assert_eq!(scanned.len(), keys, "SCAN over everything");
    }
}

/// A connection that has been answered on. One after the other: what forwards ports to a virtual machine may reset some of
/// several that are opened at once.
fn open(address: SocketAddr) -> Option<Client> {
    let mut client = Client::connect(address).ok()?;
    client.try_call(&[b"PING"]).ok()?;
    Some(client)
}

fn is_device_failure(reply: &Reply) -> bool {
    matches!(reply, Reply::Error(text) if text.starts_with("IOERR") || text.starts_with("READONLY"))
}

impl Worker {
    fn run(&mut self, mut client: Client, promise: Promise, may_fail: bool, stop: &AtomicBool) {
        while !stop.load(Ordering::Relaxed) {
            let mut bytes = Vec::new();
            let mut expected = Vec::new();
            for _ in 0..1 + self.rng.below(6) {
                self.write(&mut bytes, &mut expected);
            }
            if client.send(&bytes).is_err() {
                return;
            }
            for (unit, replies) in expected {
                let count = replies.len();
                for (index, wanted) in replies.into_iter().enumerate() {
                    let Ok(reply) = client.read() else { return };
                    if may_fail && is_device_failure(&reply) {
                        return;
                    }
                    let found = format!("worker {}, unit {unit}, reply {index} of {count}", self.id);
                    wanted.verify(&reply, &found);
                }
                let unit = &mut self.units[unit];
                unit.acked += 1;
                if promise == Promise::Acknowledged {
                    unit.states.drain(..unit.acked);
                    unit.acked = 0;
                }
                self.acked_count += 1;
            }
        }
    }

    /// Adds one write to a pipeline: its bytes, and what its replies must be.
    fn write(&mut self, bytes: &mut Vec<u8>, expected: &mut Vec<(usize, Vec<Wanted>)>) {
        let kind_of_write = self.rng.below(100);
        let version = self.next_version;
        self.next_version += 1;
        let (unit, next, replies) = match kind_of_write {
            0..50 => {
                let unit = self.rng.below(STRINGS as u64) as usize;
                let key = key(self.id, unit);
                encode_into(bytes, &[b"SET", key.as_bytes(), &value(&key, version)]);
                (unit, Some(version), vec![Wanted::Is(Reply::ok())])
            }
            50..60 => {
                let unit = self.rng.below(STRINGS as u64) as usize;
                encode_into(bytes, &[b"DEL", key(self.id, unit).as_bytes()]);
                let there = i64::from(self.units[unit].sent().is_some());
                (unit, None, vec![Wanted::Is(Reply::Int(there))])
            }
            60..75 => {
                let unit = STRINGS + self.rng.below(COUNTERS as u64) as usize;
                encode_into(bytes, &[b"INCR", key(self.id, unit).as_bytes()]);
                let sum = self.units[unit].sent().unwrap_or(0) + 1;
                (unit, Some(sum), vec![Wanted::Is(Reply::Int(sum as i64))])
            }
            75..88 => self.write_group(bytes, version),
            _ => self.write_transfer(bytes, version),
        };
        self.units[unit].states.push(next);
        expected.push((unit, replies));
    }

    /// Keys without a common hash tag, hence on several shards: by MSET, or deleted together in MULTI.
    fn write_group(&mut self, bytes: &mut Vec<u8>, version: u64) -> (usize, State, Vec<Wanted>) {
        let unit = STRINGS + COUNTERS + self.rng.below(GROUPS as u64) as usize;
        let keys: Vec<String> = (0..GROUP_KEYS).map(|index| group_key(self.id, unit, index)).collect();
        if self.rng.chance(20) {
            encode_into(bytes, &[b"MULTI"]);
            for key in &keys {
                encode_into(bytes, &[b"DEL", key.as_bytes()]);
            }
            encode_into(bytes, &[b"EXEC"]);
            let there = i64::from(self.units[unit].sent().is_some());
            let replies = multi(vec![Reply::Int(there); GROUP_KEYS]);
            return (unit, None, replies);
        }
        let values: Vec<Vec<u8>> = keys.iter().map(|key| value(key, version)).collect();
        let mut args: Vec<&[u8]> = vec![b"MSET"];
        for (key, value) in keys.iter().zip(&values) {
            args.extend([key.as_bytes(), value]);
        }
        encode_into(bytes, &args);
        (unit, Some(version), vec![Wanted::Is(Reply::ok())])
    }

    /// Two shared accounts and this worker's log of transfers change together.
    fn write_transfer(&mut self, bytes: &mut Vec<u8>, version: u64) -> (usize, State, Vec<Wanted>) {
        let unit = UNITS - 1;
        let from = self.rng.below(ACCOUNTS as u64) as usize;
        let to = (from + 1 + self.rng.below(ACCOUNTS as u64 - 1) as usize) % ACCOUNTS;
        let amount = 1 + self.rng.below(100) as i64;
        encode_into(bytes, &[b"MULTI"]);
        encode_into(bytes, &[b"DECRBY", account(from).as_bytes(), amount.to_string().as_bytes()]);
        encode_into(bytes, &[b"INCRBY", account(to).as_bytes(), amount.to_string().as_bytes()]);
        encode_into(bytes, &[b"SET", key(self.id, unit).as_bytes(), version.to_string().as_bytes()]);
        encode_into(bytes, &[b"EXEC"]);
        self.transfers.insert(version, (from, to, amount));
        let mut replies = multi(vec![Reply::ok(); 3]);
        replies[4] = Wanted::Transfer;
        (unit, Some(version), replies)
    }

    /// How many keys of this worker are there; what its transfers came to is added to the balances.
    fn verify(&mut self, client: &mut Client, coverage: &mut Coverage, balances: &mut [i64]) -> usize {
        let mut keys = 0;
        for unit in 0..UNITS {
            let found = self.find(client, unit, coverage);
            let model = &mut self.units[unit];
            let (states, acked) = (&model.states, model.acked);
            let Some(at) = states.iter().rposition(|state| *state == found) else {
                let key = key(self.id, unit);
                panic!(
                    "{key} is in state {found:?}; acknowledged: {:?}, in flight: {:?}, possible before: {:?}",
                    states[acked],
                    &states[acked + 1..],
                    &states[..acked]
                );
            };
            coverage.pending_that_happened += at.saturating_sub(acked);
            coverage.pending_that_did_not += states.len() - 1 - at.max(acked);
            coverage.lost_in_window += acked.saturating_sub(at);
            keys += match (found, kind(unit)) {
                (None, _) => 0,
                (Some(_), Kind::Group) => GROUP_KEYS,
                (Some(_), _) => 1,
            };
            model.settle(found);
        }
        // Transfers are numbered in the order in which this worker sent them: those after the last one found never happened.
        let last = self.units[UNITS - 1].sent().unwrap_or(0);
        self.transfers.retain(|version, _| *version <= last);
        for (from, to, amount) in self.transfers.values() {
            balances[*from] -= amount;
            balances[*to] += amount;
        }
        keys
    }

    /// The state that a unit is in, with its values verified to the byte.
    fn find(&self, client: &mut Client, unit: usize, coverage: &mut Coverage) -> State {
        let keys: Vec<String> = match kind(unit) {
            Kind::Group => (0..GROUP_KEYS).map(|index| group_key(self.id, unit, index)).collect(),
            _ => vec![key(self.id, unit)],
        };
        let mut states = Vec::new();
        for key in &keys {
            let found = client.call(&[b"GET", key.as_bytes()]).bytes();
            coverage.absent_verified += usize::from(found.is_none());
            states.push(found.map(|bytes| match kind(unit) {
                Kind::Counter | Kind::Transfer => {
                    String::from_utf8_lossy(&bytes).parse().expect("a counter holds an integer")
                }
                Kind::String | Kind::Group => {
                    coverage.large_values_verified += usize::from(bytes.len() > 100_000);
                    version_of(key, &bytes)
                }
            }));
        }
        let first = states[0];
        assert!(
            states.iter().all(|state| *state == first),
            "half a batch: {keys:?} are in states {states:?}"
        );
        first
    }
}

/// The version that a value names, when the value is that version's to the byte.
fn version_of(key: &str, bytes: &[u8]) -> u64 {
    let head = String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).into_owned();
    let mut parts = head.split('|');
    let (name, version) = (parts.next(), parts.next().and_then(|text| text.parse().ok()));
    let Some(version) = version.filter(|_| name == Some(key)) else {
        panic!("{key} holds what was never written to it: {head:?}")
    };
    assert!(
        value(key, version) == bytes,
        "{key}: the bytes of version {version} are not those that were written"
    );
    version
}

/// What a reply must be.
enum Wanted {
    Is(Reply),
    /// EXEC of a transfer: two balances that others change too, then OK.
    Transfer,
}

impl Wanted {
    fn verify(&self, reply: &Reply, what: &str) {
        match (self, reply) {
            (Wanted::Is(wanted), reply) => {
                assert!(wanted == reply, "{what}: wanted {}, got {}", wanted.brief(), reply.brief());
            }
            (Wanted::Transfer, Reply::Array(items)) if items.len() == 3 => {
                let right = matches!(items[..2], [Reply::Int(_), Reply::Int(_)]) && items[2] == Reply::ok();
                assert!(right, "{what}: EXEC of a transfer answered {items:?}");
            }
            (Wanted::Transfer, reply) => panic!("{what}: EXEC of a transfer answered {}", reply.brief()),
        }
    }
}

/// The replies around a transaction whose commands answer `results`.
fn multi(results: Vec<Reply>) -> Vec<Wanted> {
    let mut replies = vec![Wanted::Is(Reply::ok())];
    replies.extend(results.iter().map(|_| Wanted::Is(Reply::Simple("QUEUED".into()))));
    replies.push(Wanted::Is(Reply::Array(results)));
    replies
}
