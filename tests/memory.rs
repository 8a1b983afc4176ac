//! The ceiling of a node's memory: what it refuses, what it gives up, and that no client gets it higher.

#![cfg(test)]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use common::resp::{encode, encode_into};
use common::{Client, Node, Options, Reply, basalt, call, temp_dir, wait_until};

const CEILING: u64 = 256 << 20;

/// What may be resident beyond the ceiling, in percent.
const EXCESS_PERCENT: u64 = 5;

fn start(directory: &std::path::Path) -> Node {
    Options::new(directory.join("memory.img")).size("2GiB").arg("--memory").arg("256MiB").start()
}

/// A figure of INFO.
fn figure(client: &mut Client, section: &str, name: &str) -> u64 {
    let text = call!(client, "INFO", section).bytes().expect("INFO is a text");
    let text = String::from_utf8(text).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
    line.unwrap_or_else(|| panic!("INFO {section} has no {name}:\n{text}")).parse().unwrap()
}

#[track_caller]
fn assert_below_ceiling(node: &Node, when: &str) {
    let resident = node.rss();
    assert!(resident <= CEILING + CEILING / 100 * EXCESS_PERCENT, "{when}: {resident} bytes are resident");
}

#[test]
fn the_parts_are_reported_and_add_up() {
    let directory = temp_dir();
    let node = start(directory.path());
    let mut client = node.client();
    for index in 0..2_000 {
        assert_eq!(call!(client, "SET", format!("key:{index}"), vec![b'v'; 1_000]), Reply::ok());
    }
    for index in 0..2_000 {
        call!(client, "GET", format!("key:{index}"));
    }
    let mut get = |name: &str| figure(&mut client, "memory", name);
    assert_eq!(get("maxmemory"), CEILING);
    assert!(get("memory_cache") > 2_000_000 && get("memory_cache") <= get("memory_cache_max"));
    assert!(get("memory_index") > 2_000 * 20 && get("memory_connections") > 100);
    let parts = ["index", "cache", "log", "reads", "connections", "other"];
    let sum: u64 = parts.iter().map(|part| get(&format!("memory_{part}"))).sum();
    let used = get("used_memory");
    assert!(sum.abs_diff(used) < 1 << 20, "the parts come to {sum}, used_memory is {used}");
    assert!(used <= CEILING && get("used_memory_rss") > used / 2);
    assert_eq!(figure(&mut client, "stats", "cache_hits"), 2_000, "what was just written is in the cache");
    let read = figure(&mut client, "device", "device_bytes_read");
    call!(client, "GET", "key:7");
    assert_eq!(figure(&mut client, "device", "device_bytes_read"), read, "a hit reads nothing");
    node.stop();
}

fn key(index: usize) -> String {
    format!("key:{index}")
}

/// Writes keys that expire, many at a time, until one is refused: which one.
fn fill(client: &mut Client, from: usize, count: usize) -> Option<usize> {
    const STEP: usize = 1_000;
    for first in (from..from + count).step_by(STEP) {
        let mut bytes = Vec::new();
        for index in first..first + STEP {
            encode_into(&mut bytes, &[b"SET", key(index).as_bytes(), b"v", b"EX", b"1000000"]);
        }
        client.send(&bytes).unwrap();
        let mut refused = None;
        for index in first..first + STEP {
            match client.read().unwrap() {
                Reply::Error(text) => {
                    assert!(text.starts_with("OOM command not allowed"), "{text}");
                    refused = refused.or(Some(index));
                }
                reply => assert_eq!(reply, Reply::ok()),
            }
        }
        if refused.is_some() {
            return refused;
        }
    }
    None
}

#[test]
fn an_index_at_its_bound_refuses_new_keys_and_nothing_else() {
    let directory = temp_dir();
    let node = start(directory.path());
    let mut client = node.client();
    // Of keys that expire there are fewer before it is full.
    let count =
        fill(&mut client, 0, 4_000_000).expect("4 million keys that expire do not fit half of 256 MiB");
    assert!(count > 500_000, "refused after {count} keys");
    assert_below_ceiling(&node, "with a full index");
    assert_eq!(call!(client, "SET", key(0), "overwritten"), Reply::ok());
    assert_eq!(call!(client, "GET", key(0)), Reply::bulk("overwritten"));
    // It does not expire any more, which may have made a little room.
    assert!(fill(&mut client, 4_000_000, 1_000_000).is_some());
    assert!(
        call!(client, "SET", key(0), "expires", "EX", "100").error().starts_with("OOM"),
        "an expiry is memory"
    );
    assert!(call!(client, "MSET", key(0), "a", key(count), "b").error().starts_with("OOM"));
    assert_eq!(call!(client, "GET", key(0)), Reply::bulk("overwritten"), "a batch is refused as a whole");
    for index in 1..20_000 {
        assert_eq!(call!(client, "DEL", key(index)).int(), 1);
    }
    // The node looks at its memory once a loop.
    wait_until("room in the index", 10, || call!(client, "SET", key(count), "fits again") == Reply::ok());
    node.stop();
    // A ceiling that the keys do not fit is refused at the start, not passed.
    let image = directory.path().join("memory.img");
    let node = Options::new(&image).arg("--memory").arg("1GiB").start();
    let mut client = node.client();
    assert_eq!(fill(&mut client, 5_000_000, 300_000), None, "1 GiB has room");
    node.stop();
    let image = image.to_str().unwrap();
    let ended = basalt(&["serve", "--device", image, "--listen", "127.0.0.1:0", "--memory", "256MiB"])
        .expect_code(1, "an index that is too large");
    assert!(ended.stderr.contains("start with --memory"), "{}", ended.stderr);
    let ended = basalt(&["serve", "--device", image, "--memory", "1MiB"]).expect_code(2, "too little memory");
    assert!(ended.stderr.contains("is too little"), "{}", ended.stderr);
}

/// Sends as much as the node takes, and keeps the connection.
fn push(address: std::net::SocketAddr, chunk: &[u8], size: usize) -> Option<TcpStream> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_write_timeout(Some(Duration::from_millis(30))).unwrap();
    let mut sent = 0;
    while sent < size {
        match stream.write(chunk) {
            Ok(0) | Err(_) => break,
            // Requests that are cut anywhere would be no requests any more.
            Ok(count) => {
                sent += count + stream.write_all(&chunk[count..]).map_or(size, |()| chunk.len() - count)
            }
        }
    }
    Some(stream)
}

#[test]
fn no_client_raises_memory_above_the_ceiling() {
    let directory = temp_dir();
    let node = start(directory.path());
    let mut honest = node.client();
    for index in 0..100 {
        assert_eq!(call!(honest, "SET", format!("honest:{index}"), vec![b'h'; 1_000]), Reply::ok());
    }
    for index in 0..32 {
        assert_eq!(call!(honest, "SET", format!("long:{index}"), vec![b'l'; 1 << 20]), Reply::ok());
    }
    // Transactions that are never executed, arguments that never end, replies that nobody reads: gigabytes each.
    let queued = encode(&[b"SET", b"queued", &vec![b'q'; 1 << 20]]);
    let transactions: Vec<_> = (0..60)
        .filter_map(|_| {
            let mut stream = push(node.address, &encode(&[b"MULTI"]), 1)?;
            stream.set_write_timeout(Some(Duration::from_millis(30))).unwrap();
            for _ in 0..30 {
                if stream.write_all(&queued).is_err() {
                    break;
                }
            }
            Some(stream)
        })
        .collect();
    assert_below_ceiling(&node, "under transactions that are never executed");
    let halves: Vec<_> = (0..60)
        .filter_map(|_| {
            let mut stream = push(node.address, b"*3\r\n$3\r\nSET\r\n$4\r\nhalf\r\n$16000000\r\n", 1)?;
            let _ = stream.write_all(&vec![b'x'; 12 << 20]);
            Some(stream)
        })
        .collect();
    assert_below_ceiling(&node, "under values that never end");
    drop((transactions, halves));
    let mget: Vec<Vec<u8>> = std::iter::once(b"MGET".to_vec())
        .chain((0..32).map(|index| format!("long:{index}").into_bytes()))
        .collect();
    let mget = encode(&mget.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let readers: Vec<_> = (0..60).filter_map(|_| push(node.address, &mget, mget.len() * 4)).collect();
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(50));
        assert_below_ceiling(&node, "under replies that nobody reads");
    }
    drop(readers);
    // Who got through it is served, and so is everybody new, once there is memory again.
    let mut client = None;
    wait_until("the node to serve again", 20, || {
        let Ok(mut stream) = TcpStream::connect(node.address) else { return false };
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let _ = stream.write_all(b"PING\r\n");
        let mut answer = [0; 7];
        if stream.read_exact(&mut answer).is_ok() && &answer == b"+PONG\r\n" {
            client = Some(node.client());
        }
        client.is_some()
    });
    let mut client = client.unwrap();
    for index in 0..100 {
        assert_eq!(call!(client, "GET", format!("honest:{index}")), Reply::bulk(vec![b'h'; 1_000]));
    }
    assert!(figure(&mut client, "stats", "evicted_clients") > 0, "gigabytes were asked for");
    assert_below_ceiling(&node, "in the end");
    node.stop();
}

const LISTED_COUNT: usize = 400_000;

/// A node with keys whose names take more memory than one listing may have.
fn start_with_many_keys(directory: &std::path::Path) -> (Node, Client) {
    let options = Options::new(directory.join("memory.img")).size("2GiB").durability("never");
    let node = options.arg("--memory").arg("256MiB").start();
    let mut client = node.client();
    let names: Vec<String> = (0..LISTED_COUNT).map(key).collect();
    for names in names.chunks(1_000) {
        let mut line: Vec<&[u8]> = vec![b"MSET"];
        line.extend(names.iter().flat_map(|name| [name.as_bytes(), b"v".as_slice()]));
        client.send(&encode(&line)).unwrap();
        assert_eq!(client.read().unwrap(), Reply::ok());
    }
    (node, client)
}

#[test]
fn more_keys_than_memory_holds_are_listed_in_steps_only() {
    let directory = temp_dir();
    let (node, mut client) = start_with_many_keys(directory.path());
    for _ in 0..2 {
        match call!(client, "KEYS", "*") {
            Reply::Error(text) => {
                assert!(text.starts_with("OOM more than ") && text.ends_with("use SCAN"), "{text}");
            }
            _ => panic!("a reply beyond what memory has for it"),
        }
        assert_below_ceiling(&node, "after KEYS");
    }
    // What the refused ones had found has been given back.
    let few = call!(client, "KEYS", "key:1234?").array();
    assert_eq!(few.len(), 10);
    let (mut cursor, mut found) = ("0".to_owned(), 0);
    loop {
        let step = call!(client, "SCAN", cursor, "COUNT", "10000").array();
        let [next, keys]: [Reply; 2] = step.try_into().expect("a cursor and keys");
        found += keys.array().len();
        cursor = String::from_utf8(next.bytes().expect("a cursor")).unwrap();
        if cursor == "0" {
            break;
        }
    }
    assert_eq!(found, LISTED_COUNT);
    assert_eq!(figure(&mut client, "stats", "evicted_clients"), 0, "nobody else has to pay for it");
    node.stop();
}

#[test]
fn a_step_of_a_scan_ends_at_some_bytes_of_keys() {
    const SIZE: usize = 60_000;
    const COUNT: usize = 300;
    let directory = temp_dir();
    let node = start(directory.path());
    let mut client = node.client();
    for index in 0..COUNT {
        assert_eq!(call!(client, "SET", format!("{index:0SIZE$}"), "v"), Reply::ok());
    }
    let (mut cursor, mut found) = ("0".to_owned(), 0);
    loop {
        let step = call!(client, "SCAN", cursor, "COUNT", "10000").array();
        let [next, keys]: [Reply; 2] = step.try_into().expect("a cursor and keys");
        let count = keys.array().len();
        assert!(count * SIZE < 9 << 20, "{count} keys of {SIZE} bytes in one step of a scan");
        found += count;
        cursor = String::from_utf8(next.bytes().expect("a cursor")).unwrap();
        if cursor == "0" {
            break;
        }
    }
    assert_eq!(found, COUNT);
    node.stop();
}

#[test]
fn a_listing_that_nobody_waits_for_ends() {
    let directory = temp_dir();
    let (node, mut client) = start_with_many_keys(directory.path());
    let mut read = || figure(&mut client, "device", "device_bytes_read");
    let before = read();
    assert_eq!(call!(node.client(), "KEYS", "nothing*"), Reply::Array(vec![]));
    let whole = read() - before;
    let before = read();
    let mut lines = encode(&[b"PING"]);
    lines.extend(encode(&[b"KEYS", b"nothing*"]));
    // A socket that is closed with something to read in it is reset, so that the node learns of it at once.
    let stream = push(node.address, &lines, lines.len()).expect("a connection");
    wait_until("the listing to begin", 20, || read() > before);
    drop(stream);
    let mut last = read();
    wait_until("the listing to end", 60, || {
        std::thread::sleep(Duration::from_millis(200));
        std::mem::replace(&mut last, read()) == last
    });
    assert!(last - before < whole / 10 * 9, "{} of {whole} bytes were read for nobody", last - before);
    node.stop();
}
