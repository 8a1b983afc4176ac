//! Clients that are wrong, hostile or slow: the node lives, its memory stays bounded, and other clients' data is right.

#![cfg(test)]

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use common::resp::encode;
use common::{Client, Node, Options, Reply, Rng, call, temp_dir, wait_until};

/// What the node may grow by under abuse that holds a few connections: buffers and pools, not what clients declare.
const GROWTH_MAX: u64 = 256 << 20;

/// A node with an honest client's data on it.
fn start() -> (tempfile::TempDir, Node, Client) {
    start_with("2GiB")
}

fn start_with(size: &'static str) -> (tempfile::TempDir, Node, Client) {
    let directory = temp_dir();
    let node = Options::new(directory.path().join("abuse.img")).size(size).start();
    let mut honest = node.client();
    for index in 0..200 {
        assert_eq!(call!(honest, "SET", format!("honest:{index}"), vec![b'h'; index * 10]), Reply::ok());
    }
    (directory, node, honest)
}

/// The honest client's connection still works and its data is what it wrote.
#[track_caller]
fn finish(node: Node, mut honest: Client) {
    for index in 0..200 {
        let found = call!(honest, "GET", format!("honest:{index}"));
        assert_eq!(found, Reply::Bulk(vec![b'h'; index * 10]), "honest:{index}");
    }
    assert_eq!(call!(node.client(), "PING"), Reply::Simple("PONG".into()), "a new connection is served");
    node.stop();
}

/// What the node answers to raw bytes until it closes the connection or is silent.
fn answer_to(node: &Node, bytes: &[u8], patience: Duration) -> (Vec<u8>, bool) {
    let mut stream = TcpStream::connect(node.address).unwrap();
    stream.set_read_timeout(Some(patience)).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
    // The node may close in the middle of it, which is an answer too.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let mut chunk = [0u8; 4096];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return (answer, true),
            Ok(count) => answer.extend_from_slice(&chunk[..count]),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return (answer, false);
            }
            Err(_) => return (answer, true),
        }
    }
}

#[test]
fn malformed_requests_get_a_protocol_error_and_a_closed_connection() {
    let (_directory, node, honest) = start();
    let table: &[&[u8]] = &[
        b"*-5\r\n*1\r\n:1\r\n",
        b"*1\r\n:5\r\n",
        b"*1\r\n+PING\r\n",
        b"*2\r\n$3\r\nGET\r\n*1\r\n",
        b"*1\r\n$-1\r\n",
        b"*1\r\n$-5\r\nPING\r\n",
        b"*1\r\n$abc\r\nPING\r\n",
        b"*abc\r\n",
        b"*1\r\n$99999999999999999999\r\n",
        b"*99999999999999999999\r\n",
        b"*1\r\n$9223372036854775807\r\n",
        b"*2147483648\r\n",
        b"*1\r\n$\r\nPING\r\n",
        b"*1x\r\n$4\r\nPING\r\n",
    ];
    for bytes in table {
        let (answer, closed) = answer_to(&node, bytes, Duration::from_secs(10));
        let shown = String::from_utf8_lossy(bytes);
        assert!(
            closed,
            "{shown:?}: the connection is still open after {:?}",
            String::from_utf8_lossy(&answer)
        );
        assert!(
            answer.starts_with(b"-ERR Protocol error"),
            "{shown:?} was answered with {:?}",
            String::from_utf8_lossy(&answer)
        );
    }
    finish(node, honest);
}

#[test]
fn random_bytes_never_hurt_the_node() {
    let (_directory, node, honest) = start();
    let before = node.rss();
    let mut rng = Rng::from_env("random bytes");
    for round in 0..300 {
        let size = rng.below(400) as usize;
        let mut bytes = rng.bytes(size);
        if round % 3 != 0 {
            // Near misses reach deeper than noise: a valid command with a few bytes changed.
            bytes = encode(&[b"SET", b"noise", &bytes]);
            for _ in 0..=rng.below(3) {
                // The name of the command stays: a random FLUSHALL is unlikely, but it would be an honest one.
                let at = rng.below(bytes.len() as u64) as usize;
                bytes[at] = rng.next() as u8;
            }
        }
        let _ = answer_to(&node, &bytes, Duration::from_millis(1));
    }
    assert!(node.rss() < before + GROWTH_MAX, "from {before} to {} bytes resident", node.rss());
    finish(node, honest);
}

#[test]
fn an_oversized_value_is_refused_and_the_connection_goes_on() {
    // So small that its longest value is shorter than RESP's longest argument.
    let (_directory, node, honest) = start_with("128MiB");
    let before = node.rss();
    let mut client = node.client();
    let limit = call!(client, "CONFIG", "GET", "proto-max-bulk-len").array().swap_remove(1).bytes().unwrap();
    let limit: usize = String::from_utf8(limit).unwrap().parse().unwrap();
    let value = vec![b'x'; limit + 1];
    let reply = call!(client, "SET", "too-long", value);
    let wanted = format!("ERR value of {} bytes is longer than", limit + 1);
    assert!(reply.error().starts_with(&wanted), "{reply:?}");
    assert_eq!(call!(client, "GET", "too-long"), Reply::Nil);
    assert_eq!(call!(client, "SET", "fits", &value[..1 << 20]), Reply::ok());
    assert_eq!(call!(client, "STRLEN", "fits").int(), 1 << 20);
    let reply = call!(client, "SETRANGE", "fits", limit.to_string(), "x");
    assert!(reply.is_error(), "growing past the limit: {}", reply.brief());
    assert_eq!(call!(client, "STRLEN", "fits").int(), 1 << 20, "a refused change changed nothing");
    let reply = call!(client, "SET", vec![b'k'; 70_000], "v");
    assert!(reply.error().contains("key of 70000 bytes is longer than"), "{}", reply.brief());
    drop(client);
    // Refused before they are buffered: many at once cost nothing that stays.
    let head = b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$500000000\r\n";
    let mut liars: Vec<TcpStream> = (0..50).map(|_| TcpStream::connect(node.address).unwrap()).collect();
    for liar in &mut liars {
        liar.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
        let _ = liar.write_all(head);
        let _ = liar.write_all(&value[..4 << 20]);
    }
    assert!(node.rss() < before + GROWTH_MAX, "from {before} to {} bytes resident", node.rss());
    drop(liars);
    finish(node, honest);
}

#[test]
fn declared_lengths_cost_nothing_until_bytes_arrive() {
    let (_directory, node, honest) = start();
    let before = node.rss();
    let mut liars = Vec::new();
    for index in 0..100 {
        let mut liar = TcpStream::connect(node.address).unwrap();
        let head: &[u8] = match index % 3 {
            0 => b"*1000000\r\n",
            1 => b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$16777216\r\nonly a few bytes",
            _ => b"*2\r\n$3\r\nGET\r\n$60000\r\n",
        };
        liar.write_all(head).unwrap();
        liars.push(liar);
    }
    std::thread::sleep(Duration::from_millis(500));
    assert!(node.rss() < before + GROWTH_MAX, "from {before} to {} bytes resident", node.rss());
    drop(liars);
    finish(node, honest);
}

#[test]
fn a_million_arguments_are_served_or_refused_in_words() {
    let (_directory, node, mut honest) = start();
    let before = node.rss();
    let mut client = node.client();
    let mut args: Vec<&[u8]> = vec![b"DEL"];
    args.resize(1_000_000, b"none");
    match client.try_call(&args) {
        Ok(Reply::Int(0)) | Ok(Reply::Error(_)) => {}
        // A protocol error closes; the words came first.
        Ok(other) => panic!("DEL of absent keys answered {}", other.brief()),
        Err(e) => panic!("no words at all: {e}"),
    }
    assert_eq!(call!(honest, "PING"), Reply::Simple("PONG".into()));
    let (answer, closed) = answer_to(&node, b"*1048577\r\n$4\r\nPING\r\n", Duration::from_secs(10));
    assert!(
        answer.starts_with(b"-ERR") && closed,
        "beyond the bound: {:?}",
        String::from_utf8_lossy(&answer)
    );
    drop(client);
    assert!(node.rss() < before + 2 * GROWTH_MAX, "from {before} to {} bytes resident", node.rss());
    finish(node, honest);
}

#[test]
fn a_reader_that_never_reads_is_held_back() {
    let (_directory, node, mut honest) = start();
    assert_eq!(call!(honest, "SET", "long", vec![b'l'; 1 << 20]), Reply::ok());
    let before = node.rss();
    let command = encode(&[b"GET", b"long"]).repeat(100);
    let mut readers: Vec<TcpStream> = (0..10).map(|_| TcpStream::connect(node.address).unwrap()).collect();
    let mut sent = 0;
    for _ in 0..20 {
        for reader in &mut readers {
            reader.set_nonblocking(true).unwrap();
            // Refused by a full socket is what back-pressure looks like from here.
            sent += reader.write(&command).unwrap_or(0);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(sent > command.len() * 10, "the readers never asked for anything");
    // 10 readers asked for gigabytes; the node may hold what its bounds say, and serves others meanwhile.
    assert!(node.rss() < before + GROWTH_MAX, "from {before} to {} bytes resident", node.rss());
    assert_eq!(call!(honest, "STRLEN", "long").int(), 1 << 20);
    drop(readers);
    call!(honest, "DEL", "long");
    finish(node, honest);
}

/// A request of a few kilobytes can't ask for gigabytes, by naming many long values or one of them many times.
#[test]
fn one_command_or_transaction_reads_a_bounded_size() {
    let (_directory, node, honest) = start();
    let mut client = node.client();
    let keys: Vec<String> = (0..96).map(|index| format!("long:{index}")).collect();
    for key in &keys {
        assert_eq!(call!(client, "SET", key, vec![b'l'; 1 << 20]), Reply::ok());
    }
    let before = node.rss();
    let mget = |keys: &[&str]| -> Vec<Vec<u8>> {
        std::iter::once("MGET").chain(keys.iter().copied()).map(|arg| arg.as_bytes().to_vec()).collect()
    };
    let names: Vec<&str> = keys.iter().map(String::as_str).collect();
    let few = client.try_call(&mget(&names[..48]).iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
    assert!(matches!(&few, Reply::Array(items) if items.len() == 48), "{}", few.brief());
    drop(few);
    for many in [names.clone(), vec![names[0]; 2_000]] {
        let reply = client.try_call(&mget(&many).iter().map(Vec::as_slice).collect::<Vec<_>>()).unwrap();
        assert!(reply.is_error(), "{} values: {}", many.len(), reply.brief());
        assert!(reply.error().contains("67108864 bytes"), "{}", reply.brief());
    }
    assert_eq!(call!(client, "MULTI"), Reply::ok());
    call!(client, "SET", "written", "yes");
    for _ in 0..200 {
        call!(client, "GET", names[0]);
    }
    call!(client, "GETDEL", names[0]);
    let Reply::Array(replies) = call!(client, "EXEC") else { panic!("no array") };
    assert_eq!(replies[0], Reply::ok());
    assert!(matches!(replies[1], Reply::Bulk(_)) && replies[200].is_error());
    drop(replies);
    assert_eq!(call!(client, "STRLEN", names[0]).int(), 1 << 20, "what can't be told is not deleted");
    assert!(node.rss() < before + GROWTH_MAX, "from {before} to {} bytes resident", node.rss());
    call!(client, "FLUSHALL");
    drop((client, honest));
    node.stop();
}

/// Commands whose arguments are long where they are compared with much: they are refused, not left to hold the reactor.
#[test]
fn patterns_and_watches_cost_no_more_than_their_bounds() {
    let (_directory, node, honest) = start();
    let mut client = node.client();
    let pattern = format!("[{}]*", "x".repeat(1 << 20));
    for reply in [call!(client, "KEYS", &pattern), call!(client, "SCAN", "0", "MATCH", &pattern)] {
        assert!(reply.is_error() && reply.error().contains("pattern"), "{}", reply.brief());
    }
    let many: Vec<String> = (0..5_000).map(|index| format!("w{index}")).collect();
    let watch: Vec<&[u8]> =
        std::iter::once("WATCH").chain(many.iter().map(String::as_str)).map(str::as_bytes).collect();
    assert!(client.try_call(&watch).unwrap().is_error(), "more than a connection may watch");
    assert_eq!(client.try_call(&watch[..4_097]).unwrap(), Reply::ok());
    assert_eq!(client.try_call(&watch[..4_097]).unwrap(), Reply::ok(), "the same again are no more");
    finish(node, honest);
}

#[test]
fn a_writer_that_never_reads_does_not_stop_the_others() {
    let (_directory, node, mut honest) = start();
    let mut writer = TcpStream::connect(node.address).unwrap();
    writer.set_nonblocking(true).unwrap();
    let command = encode(&[b"SET", b"flood", &[b'f'; 1000]]).repeat(1000);
    let until = Instant::now() + Duration::from_secs(1);
    while Instant::now() < until {
        if writer.write(&command).is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
        call!(honest, "INCR", "meanwhile").int();
    }
    drop(writer);
    call!(honest, "DEL", "meanwhile", "flood");
    finish(node, honest);
}

#[test]
fn a_storm_of_connections_passes() {
    let (_directory, node, honest) = start();
    let before = node.rss();
    for round in 0..3 {
        let mut clients: Vec<Client> = (0..500).map(|_| node.client()).collect();
        for client in &mut clients {
            client.send(&encode(&[b"PING"])).unwrap();
        }
        for client in &mut clients {
            assert_eq!(client.read().unwrap(), Reply::Simple("PONG".into()));
        }
        // Half of them leave in the middle of a command.
        for client in clients.iter_mut().step_by(2) {
            client.send(b"*3\r\n$3\r\nSET\r\n$4\r\nhalf\r\n$10\r\nabc").unwrap();
        }
        drop(clients);
        assert!(node.rss() < before + GROWTH_MAX, "round {round}: from {before} to {}", node.rss());
    }
    let mut client = node.client();
    assert_eq!(call!(client, "GET", "half"), Reply::Nil, "half a command does nothing");
    // Sockets that were closed are given back: descriptors don't pile up.
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", node.pid())).unwrap().count();
    wait_until("the node to close what its clients closed", 20, || descriptors() < 200);
    finish(node, honest);
}

/// A node that is out of descriptors goes on accepting once there are some again, although nothing else happens then.
#[test]
fn connections_beyond_the_descriptors_wait_and_are_served() {
    let (_directory, node, honest) = start();
    let limit = |count: usize| {
        let status = Command::new("prlimit")
            .args([format!("--pid={}", node.pid()), format!("--nofile={count}:")])
            .status()
            .expect("prlimit of util-linux");
        assert!(status.success());
    };
    let before = std::fs::read_to_string(format!("/proc/{}/limits", node.pid())).unwrap();
    let before: usize = before
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .and_then(|line| line.split_whitespace().nth(3)?.parse().ok())
        .expect("a limit of open files");
    limit(std::fs::read_dir(format!("/proc/{}/fd", node.pid())).unwrap().count());
    let mut waiting: Vec<Client> = (0..4).map(|_| node.client()).collect();
    wait_until("the node to refuse", 20, || node.stderr().contains("cannot accept"));
    limit(before);
    for client in &mut waiting {
        assert_eq!(call!(client, "PING"), Reply::Simple("PONG".into()));
    }
    drop(waiting);
    finish(node, honest);
}

#[test]
fn a_transaction_left_half_open_does_nothing() {
    let (_directory, node, honest) = start();
    let mut client = node.client();
    client.send(&encode(&[b"MULTI"])).unwrap();
    client.send(&encode(&[b"SET", b"honest:1", b"overwritten"])).unwrap();
    assert_eq!(client.read().unwrap(), Reply::ok());
    assert_eq!(client.read().unwrap(), Reply::Simple("QUEUED".into()));
    drop(client);
    let mut client = node.client();
    assert_eq!(call!(client, "WATCH", "honest:2"), Reply::ok());
    drop(client);
    finish(node, honest);
}
