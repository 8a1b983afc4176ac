//! The load against small servers of which everything is known.

use super::*;
use std::net::{Shutdown, TcpListener};
use std::sync::{Arc, Mutex};
use std::thread;

const KEYS: Keyspace = Keyspace { name: "t", count: 50, value_size: 40, distinct: true };
const STALL: Duration = Duration::from_millis(200);

fn load(address: SocketAddr) -> Load {
    Load {
        address,
        connections: 4,
        rate: 2000.0,
        duration: Duration::from_millis(600),
        patience: Duration::from_secs(300),
        read: true,
        keys: KEYS,
        seed: 1,
    }
}

/// A server with a thread for each connection that answers with what `reply` makes of the request's ordinal number, over all
/// connections, and the key's. While `reply` runs, nobody is answered.
fn serve(reply: impl FnMut(u64, u64) -> Option<Vec<u8>> + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let shared = Arc::new(Mutex::new((0, reply)));
    thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, shared) = (stream.unwrap(), Arc::clone(&shared));
            thread::spawn(move || {
                let mut input = Vec::new();
                let mut buffer = [0; 1 << 16];
                while let Ok(size @ 1..) = stream.read(&mut buffer) {
                    input.extend_from_slice(&buffer[..size]);
                    let (mut output, mut taken) = (Vec::new(), 0);
                    while let Some((key, size)) = next_request(&input[taken..]) {
                        taken += size;
                        let mut shared = shared.lock().unwrap();
                        shared.0 += 1;
                        let ordinal = shared.0;
                        match (shared.1)(ordinal, key) {
                            Some(bytes) => output.extend_from_slice(&bytes),
                            // No more replies, but requests can still be written.
                            None => {
                                drop(shared);
                                stream.shutdown(Shutdown::Write).unwrap();
                                while let Ok(1..) = stream.read(&mut buffer) {}
                                return;
                            }
                        }
                    }
                    input.drain(..taken);
                    if stream.write_all(&output).is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}

/// The number of the key in the first whole request, and how long that is.
fn next_request(input: &[u8]) -> Option<(u64, usize)> {
    let text = std::str::from_utf8(&input[..input.len().min(64)]).unwrap();
    let colon = text.find("t:")? + 2;
    let key = text.get(colon..colon + 12)?.parse().unwrap();
    let encoders: [fn(&Keyspace, u64, &mut Vec<u8>); 2] = [Keyspace::get, Keyspace::set];
    for encode in encoders {
        let mut expected = Vec::new();
        encode(&KEYS, key, &mut expected);
        if input.starts_with(&expected) {
            return Some((key, expected.len()));
        }
    }
    None
}

fn value(key: u64) -> Option<Vec<u8>> {
    let mut reply = Vec::new();
    KEYS.bulk(key, &mut reply);
    Some(reply)
}

/// How many took at least so long.
fn at_least(histogram: &Histogram<u64>, duration: Duration) -> u64 {
    histogram.count_between(nanoseconds(duration), u64::MAX)
}

/// A load that waits for a reply before it sends on would see four slow requests, one for each connection. Of those that were
/// due while the server stood still, 2000 a second, half had to wait for half of the stall or longer; a slow machine makes it
/// more, never fewer.
#[test]
fn a_stall_is_charged_to_every_request_that_was_due() {
    let address = serve(|ordinal, key| {
        if ordinal == 200 {
            thread::sleep(STALL);
        }
        value(key)
    });
    let outcome = run(&load(address)).unwrap();
    let due = outcome.latency.len();
    assert!((1000..1400).contains(&due), "{due} requests were due, not 1200 or so");
    let slow = at_least(&outcome.latency, STALL / 2);
    assert!(slow > 120, "only {slow} of {due} requests show a stall during which 400 were due");
    assert!(slow <= due && at_least(&outcome.latency, STALL) >= 1);
}

#[test]
fn the_same_seed_makes_the_same_requests_due() {
    let counts = [1, 1, 2].map(|seed| run(&Load { seed, ..load(serve(|_, key| value(key))) }).unwrap());
    let counts = counts.map(|outcome| outcome.latency.len());
    assert!(counts[0] == counts[1] && counts[0] != counts[2], "{counts:?}");
}

#[test]
fn writes_are_answered_with_ok_and_nothing_else() {
    let writes = |reply: &'static [u8]| Load { read: false, ..load(serve(move |_, _| Some(reply.to_vec()))) };
    assert!(run(&writes(b"+OK\r\n")).unwrap().latency.len() > 1000);
    let error = run(&writes(b"-OOM device is full\r\n")).err().unwrap().to_string();
    assert!(error.contains("t:") && error.contains("OOM device is full"), "{error}");
    let error = run(&writes(b"+OK\r\n+OK\r\n")).err().unwrap().to_string();
    assert!(error.contains("nobody asked for") || error.contains("instead of"), "{error}");
}

#[test]
fn a_value_of_another_key_ends_the_run() {
    let address = serve(|ordinal, key| value(if ordinal == 100 { (key + 1) % KEYS.count } else { key }));
    let error = run(&load(address)).err().unwrap().to_string();
    assert!(error.contains("instead of"), "{error}");
}

#[test]
fn a_server_that_goes_away_or_never_answers_ends_the_run() {
    let address = serve(|ordinal, key| if ordinal < 100 { value(key) } else { None });
    let leaving = Load { patience: Duration::from_secs(20), ..load(address) };
    let error = run(&leaving).err().unwrap().to_string();
    assert!(error.contains("closed a connection"), "{error}");
    let silent = Load { patience: Duration::from_millis(50), ..load(serve(|_, _| Some(Vec::new()))) };
    let error = run(&silent).err().unwrap().to_string();
    assert!(error.contains("were not answered 50ms after"), "{error}");
}

/// No machine handles a request in 20 ns, so that most are sent long after they were due.
#[test]
fn a_load_that_cannot_be_kept_up_says_so() {
    let impossible =
        Load { rate: 50e6, duration: Duration::from_millis(4), ..load(serve(|_, key| value(key))) };
    let outcome = run(&impossible).unwrap();
    assert!(outcome.latency.len() > 100_000 && !outcome.kept_up());
    assert!(outcome.lateness.max() > nanoseconds(Duration::from_millis(1)));
}

#[test]
fn lateness_counts_where_it_is_much_of_the_latency() {
    let outcome = |latency: u64, lateness: u64| {
        let mut outcome = Outcome { latency: histogram().unwrap(), lateness: histogram().unwrap() };
        outcome.latency.record_n(latency, 1000).unwrap();
        outcome.lateness.record_n(1, 980).unwrap();
        outcome.lateness.record_n(lateness, 20).unwrap();
        outcome
    };
    assert!(outcome(4000, 999).kept_up());
    assert!(!outcome(4000, 1100).kept_up());
}
