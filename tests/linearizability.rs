//! Each key is linearizable, across kill -9 too: concurrent clients on few keys, every call and answer recorded, and a
//! checker that looks for one order that explains them all.

#![cfg(test)]

mod common;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::linear::{Answer, Event, Op, check};
use common::{Client, Options, Reply, Rng, count_from_env, temp_dir};

const CLIENTS: u64 = 8;
const KEYS: usize = 4;

fn event(call: u64, end: u64, op: Op, answer: Answer) -> Event {
    Event { call, end, op, answer }
}

#[test]
fn the_checker_accepts_what_has_an_order() {
    let get = |call, end, value| event(call, end, Op::Get, Answer::Value(value));
    let set = |call, end, value| event(call, end, Op::Set(value), Answer::Ok);
    let lost = |call, end, value| event(call, end, Op::Set(value), Answer::Unknown);
    let swap = |call, end, read, new| event(call, end, Op::Swap { read, new }, Answer::Ok);
    let good: &[(&str, Vec<Event>)] = &[
        ("nothing", vec![]),
        ("one after the other", vec![set(0, 1, 5), get(2, 3, Some(5))]),
        ("a read during a write sees either: old", vec![set(0, 1, 1), set(2, 9, 2), get(3, 4, Some(1))]),
        ("a read during a write sees either: new", vec![set(0, 1, 1), set(2, 9, 2), get(3, 4, Some(2))]),
        ("two writes at once settle in one order", vec![set(0, 9, 1), set(0, 9, 2), get(10, 11, Some(1))]),
        ("a lost write that happened", vec![lost(0, 5, 1), get(6, 7, Some(1)), get(8, 9, Some(1))]),
        ("a lost write that did not", vec![lost(0, 5, 1), get(6, 7, None), get(8, 9, None)]),
        (
            "a delete counts once",
            vec![
                set(0, 1, 1),
                event(2, 9, Op::Delete, Answer::Count(1)),
                event(2, 9, Op::Delete, Answer::Count(0)),
            ],
        ),
        (
            "increments at once",
            vec![
                event(0, 9, Op::Increment, Answer::Count(2)),
                event(0, 9, Op::Increment, Answer::Count(1)),
                get(10, 11, Some(2)),
            ],
        ),
        ("a swap on what it read", vec![set(0, 1, 1), swap(2, 5, Some(1), 7), get(6, 7, Some(7))]),
        (
            "a lost swap that found another value",
            vec![
                set(0, 1, 1),
                event(2, 9, Op::Swap { read: Some(3), new: 4 }, Answer::Unknown),
                get(10, 11, Some(1)),
            ],
        ),
    ];
    for (name, history) in good {
        assert_eq!(check(history), Ok(()), "{name}");
    }
}

#[test]
fn the_checker_refuses_what_has_none() {
    let get = |call, end, value| event(call, end, Op::Get, Answer::Value(value));
    let set = |call, end, value| event(call, end, Op::Set(value), Answer::Ok);
    let lost = |call, end, value| event(call, end, Op::Set(value), Answer::Unknown);
    let swap = |call, end, read, new| event(call, end, Op::Swap { read, new }, Answer::Ok);
    let bad: &[(&str, Vec<Event>)] = &[
        ("a stale read", vec![set(0, 1, 1), set(2, 3, 2), get(4, 5, Some(1))]),
        ("a value from nowhere", vec![get(0, 1, Some(9))]),
        ("a lost acknowledged write", vec![set(0, 1, 1), get(2, 3, None)]),
        ("a read that goes back", vec![set(0, 9, 1), get(1, 2, Some(1)), get(3, 4, None)]),
        (
            "an outcome that changed after the restart",
            vec![lost(0, 5, 1), get(6, 7, None), get(8, 9, Some(1))],
        ),
        ("a lost write seen, then gone", vec![lost(0, 5, 1), get(6, 7, Some(1)), get(8, 9, None)]),
        (
            "a deleted key that comes back",
            vec![set(0, 1, 1), event(2, 3, Op::Delete, Answer::Count(1)), get(4, 5, Some(1))],
        ),
        (
            "two increments with one result",
            vec![event(0, 9, Op::Increment, Answer::Count(1)), event(0, 9, Op::Increment, Answer::Count(1))],
        ),
        ("two swaps on one value", vec![set(0, 1, 1), swap(2, 9, Some(1), 2), swap(2, 9, Some(1), 3)]),
    ];
    for (name, history) in bad {
        assert!(check(history).is_err(), "{name}");
    }
}

/// The checker's own scale: a long history with known order passes, and one changed result in its middle is found.
#[test]
fn the_checker_finds_one_wrong_answer_in_a_long_history() {
    let mut rng = Rng::new(7);
    let mut state = None;
    let mut history = Vec::new();
    for moment in 0..5_000u64 {
        // The true order is `moment`; intervals around it overlap with about seven others.
        let (call, end) = (moment * 10 - rng.below(40).min(moment * 10), moment * 10 + rng.below(40));
        let (op, answer) = match rng.below(3) {
            0 => (Op::Get, Answer::Value(state)),
            1 => {
                state = Some(moment as i64 * 1_000);
                (Op::Set(moment as i64 * 1_000), Answer::Ok)
            }
            _ => {
                state = Some(state.unwrap_or(0) + 1);
                (Op::Increment, Answer::Count(state.unwrap_or(0)))
            }
        };
        history.push(event(call, end, op, answer));
    }
    assert_eq!(check(&history), Ok(()));
    let victim = history.iter().rposition(|e| e.op == Op::Increment).unwrap();
    history[victim].answer = Answer::Count(1);
    assert!(check(&history).is_err());
}

/// What one client did, and to which key.
type Record = (usize, Event);

/// Runs one client until its connection ends or it is told to stop.
fn client(address: SocketAddr, id: u64, mut rng: Rng, start: Instant, stop: &AtomicBool) -> Vec<Record> {
    let mut record = Vec::new();
    let Ok(mut client) = Client::connect(address) else { return record };
    let now = || start.elapsed().as_nanos() as u64;
    // Unique values tell which write a read saw; the gap leaves room for increments.
    let mut value = (id as i64 + 1) * 1_000_000_000_000 + now() as i64 / 1_000_000 * 1_000_000;
    while !stop.load(Ordering::Relaxed) {
        let index = rng.below(KEYS as u64) as usize;
        let key = format!("lin:{index}");
        let key = key.as_bytes();
        value += 10_000;
        let text = value.to_string();
        let text = text.as_bytes();
        let call = now();
        let (op, outcome) = match rng.below(10) {
            0..=3 => (Op::Get, client.try_call(&[b"GET", key])),
            4..=5 => (Op::Set(value), client.try_call(&[b"SET", key, text])),
            6 => (Op::Delete, client.try_call(&[b"DEL", key])),
            7 => (Op::Increment, client.try_call(&[b"INCR", key])),
            _ => match swap(&mut client, key, value, text) {
                // Refused by WATCH: what remains is a read, which ended before EXEC; the later end is still true.
                Ok((read, Some(false))) => {
                    (Op::Get, Ok(read.map_or(Reply::Nil, |n| Reply::bulk(n.to_string()))))
                }
                Ok((read, Some(true))) => (Op::Swap { read, new: value }, Ok(Reply::ok())),
                Ok((read, None)) => {
                    (Op::Swap { read, new: value }, Err(std::io::ErrorKind::UnexpectedEof.into()))
                }
                Err(e) => (Op::Get, Err(e)),
            },
        };
        let answer = outcome.as_ref().map_or(Answer::Unknown, |reply| answer_of(op, reply));
        record.push((index, Event { call, end: now(), op, answer }));
        if outcome.is_err() {
            break;
        }
    }
    record
}

/// What was read, and whether the swap was done; `None` when the connection ended after EXEC was sent.
fn swap(
    client: &mut Client,
    key: &[u8],
    new: i64,
    text: &[u8],
) -> std::io::Result<(Option<i64>, Option<bool>)> {
    client.try_call(&[b"WATCH", key])?;
    let read = number_of(&client.try_call(&[b"GET", key])?);
    client.try_call(&[b"MULTI"])?;
    client.try_call(&[b"SET", key, text])?;
    match client.try_call(&[b"EXEC"]) {
        Ok(Reply::Nil) => Ok((read, Some(false))),
        Ok(Reply::Array(items)) if items == [Reply::ok()] => Ok((read, Some(true))),
        Ok(other) => panic!("EXEC for {new} answered {}", other.brief()),
        Err(_) => Ok((read, None)),
    }
}

fn number_of(reply: &Reply) -> Option<i64> {
    match reply {
        Reply::Nil => None,
        Reply::Bulk(bytes) => {
            let number = std::str::from_utf8(bytes).ok().and_then(|text| text.parse().ok());
            Some(number.unwrap_or_else(|| panic!("not a value that was written: {}", reply.brief())))
        }
        other => panic!("GET answered {}", other.brief()),
    }
}

fn answer_of(op: Op, reply: &Reply) -> Answer {
    match (op, reply) {
        (Op::Get, reply) => Answer::Value(number_of(reply)),
        (Op::Set(_) | Op::Swap { .. }, Reply::Simple(ok)) if ok == "OK" => Answer::Ok,
        (Op::Delete | Op::Increment, Reply::Int(count)) => Answer::Count(*count),
        (op, other) => panic!("{op:?} answered {}", other.brief()),
    }
}

#[test]
fn every_key_is_linearizable_across_kills() {
    let directory = temp_dir();
    linearizable_across_kills(&Options::new(directory.path().join("lin.img")));
}

/// Over NVMe/TCP on loopback: the target outlives the node, and does what the node had sent.
#[cfg(feature = "spdk")]
#[test]
fn every_key_is_linearizable_across_kills_spdk() {
    use common::nvmf_target::{Backing, Target};
    let target = Target::start(&[Backing::Malloc { size_mib: 1024, block_size: 4096 }]);
    let options = Options::controller(&target.transport_id(0));
    options.format(&[]).expect_code(0, "format");
    linearizable_across_kills(&options);
}

fn linearizable_across_kills(options: &Options) {
    let mut rng = Rng::from_env("linearizability");
    let rounds = count_from_env("BASALT_LINEAR_ROUNDS", 4);
    let start = Instant::now();
    let mut histories: Vec<Vec<Event>> = vec![Vec::new(); KEYS];
    let (mut unknown, mut answered) = (0, 0);
    for round in 0..rounds {
        let node = options.start();
        let address = node.address;
        let stop = AtomicBool::new(false);
        let last = round + 1 == rounds;
        let records: Vec<Record> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..CLIENTS)
                .map(|id| {
                    let (rng, stop) = (Rng::new(rng.next()), &stop);
                    scope.spawn(move || client(address, id, rng, start, stop))
                })
                .collect();
            std::thread::sleep(Duration::from_millis(300 + rng.below(700)));
            // The last round ends with its clients, so that a history without any kill is part of the check.
            if last {
                stop.store(true, Ordering::Relaxed);
            } else {
                node.kill9();
            }
            workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
        });
        let dead = start.elapsed().as_nanos() as u64;
        for (key, mut event) in records {
            if event.answer == Answer::Unknown {
                assert!(!last, "an answer is missing although nothing was killed: {event:?}");
                event.end = dead;
                unknown += 1;
            } else {
                answered += 1;
            }
            histories[key].push(event);
        }
    }
    // Reads after one more restart pin what the last state was.
    let node = options.start();
    let mut reader = node.client();
    for (index, history) in histories.iter_mut().enumerate() {
        let call = start.elapsed().as_nanos() as u64;
        let value = number_of(&reader.call(&[b"GET", format!("lin:{index}").as_bytes()]));
        let end = start.elapsed().as_nanos() as u64;
        history.push(event(call, end, Op::Get, Answer::Value(value)));
    }
    println!("{answered} answered, {unknown} without an answer, {rounds} rounds");
    assert!(answered > 200, "too few operations to say anything: {answered}");
    assert!(unknown > 0, "no operation was in flight at any kill: nothing was learnt about pending ones");
    for (index, history) in histories.iter().enumerate() {
        if let Err(story) = check(history) {
            panic!("lin:{index}: {story}");
        }
    }
    node.stop();
    options.check().expect_code(0, "check after the run");
}
