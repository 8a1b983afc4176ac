//! Long values on the real node: chunks, holes, tails, kills, damage and small extents.

#![cfg(test)]

mod common;

use std::os::unix::fs::FileExt;
use std::time::Duration;

use common::node::{check, path_text};
use common::{Client, Node, Options, Reply, Rng, basalt, call, temp_dir};

const MIB: usize = 1 << 20;

/// A figure of INFO.
fn figure(client: &mut Client, section: &str, name: &str) -> u64 {
    let text = String::from_utf8(call!(client, "INFO", section).bytes().expect("INFO is a text")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
    line.unwrap_or_else(|| panic!("INFO {section} has no {name}:\n{text}")).parse().unwrap()
}

#[track_caller]
fn assert_value(client: &mut Client, key: &str, wanted: &[u8]) {
    let found = call!(client, "GET", key).bytes().unwrap_or_default();
    let differs = found.iter().zip(wanted).position(|(a, b)| a != b);
    assert!(found == wanted, "{key}: {} bytes of {}, other at {differs:?}", found.len(), wanted.len());
}

#[test]
fn values_of_all_lengths_come_back_and_give_their_space_back() {
    let directory = temp_dir();
    let options = Options::new(directory.path().join("long.img")).size("1GiB").arg("--memory").arg("2GiB");
    let node = options.start();
    let mut client = node.client();
    let mut rng = Rng::new(1);
    let values: Vec<(String, Vec<u8>)> = [250 * 1024, 250 * 1024 + 1, MIB, 16 * MIB + 1, 100 * MIB]
        .into_iter()
        .map(|size| (format!("long:{size}"), rng.bytes(size)))
        .collect();
    for (key, value) in &values {
        assert_eq!(call!(client, "SET", key, value), Reply::ok());
        assert_value(&mut client, key, value);
    }
    let (key, value) = values.last().unwrap();
    let read = figure(&mut client, "device", "device_bytes_read");
    assert_eq!(
        call!(client, "GETRANGE", key, "50000000", "50000999"),
        Reply::bulk(&value[50_000_000..50_001_000])
    );
    let read = figure(&mut client, "device", "device_bytes_read") - read;
    assert!(read <= 2 * 260_000, "{read} bytes were read for a range of 1000");
    assert_eq!(call!(client, "GETRANGE", key, "-5", "-1"), Reply::bulk(&value[value.len() - 5..]));
    assert_eq!(call!(client, "STRLEN", key).int(), value.len() as i64);
    let written = figure(&mut client, "device", "device_bytes_written");
    assert_eq!(call!(client, "EXPIRE", key, "1000").int(), 1);
    assert_eq!(call!(client, "PERSIST", key).int(), 1);
    let written = figure(&mut client, "device", "device_bytes_written") - written;
    assert!(written < 200_000, "{written} bytes were written to change an expiry");
    assert!(call!(client, "INCR", key).error().starts_with("ERR value is not an integer"));
    node.stop();
    check(&options.device).expect_code(0, "check of long values");
    let node = options.start();
    let mut client = node.client();
    for (key, value) in &values {
        assert_value(&mut client, key, value);
    }
    // Twice the device over: the chunks of what is replaced are garbage.
    for round in 0..16u8 {
        let other = vec![round; 100 * MIB];
        assert_eq!(call!(client, "SET", key, other), Reply::ok(), "round {round}");
    }
    assert_value(&mut client, key, &vec![15; 100 * MIB]);
    assert_eq!(call!(client, "GETDEL", key), Reply::bulk(vec![15; 100 * MIB]));
    call!(client, "FLUSHALL");
    assert_eq!(call!(client, "COMPACT"), Reply::ok());
    assert!(figure(&mut client, "device", "live_bytes") < 1_000);
    assert!(figure(&mut client, "device", "available_bytes") > 700 << 20);
    node.stop();
    check(&options.device).expect_code(0, "check after it was emptied");
}

#[test]
fn holes_are_not_stored_and_tails_cost_what_they_bring() {
    let directory = temp_dir();
    let node =
        Options::new(directory.path().join("hole.img")).size("2GiB").arg("--memory").arg("4GiB").start();
    let mut client = node.client();
    let written = |client: &mut Client| figure(client, "device", "device_bytes_written");
    let before = written(&mut client);
    assert_eq!(call!(client, "SETRANGE", "hole", "419430400", "far away").int(), 419_430_408);
    assert!(written(&mut client) - before < 200_000, "{} bytes for a hole", written(&mut client) - before);
    assert_eq!(
        call!(client, "GETRANGE", "hole", "419430390", "-1"),
        Reply::bulk(b"\0\0\0\0\0\0\0\0\0\0far away")
    );
    assert_eq!(call!(client, "SETRANGE", "hole", "200000000", "between").int(), 419_430_408);
    assert_eq!(call!(client, "GETRANGE", "hole", "199999999", "200000007"), Reply::bulk(b"\0between\0"));
    assert!(call!(client, "SETRANGE", "hole", "536870912", "x").is_error(), "beyond 512 MiB");
    let value = Rng::new(2).bytes(100 * MIB);
    assert_eq!(call!(client, "SET", "tail", &value), Reply::ok());
    let before = written(&mut client);
    let mut model = value;
    for nth in 0..100u32 {
        let tail = nth.to_string().repeat(50);
        model.extend_from_slice(tail.as_bytes());
        assert_eq!(call!(client, "APPEND", "tail", tail).int(), model.len() as i64);
    }
    let cost = (written(&mut client) - before) / 100;
    // A block or two with headers and manifest, and now and then a piece that short tails are made one with.
    assert!(cost < 16 << 10, "{cost} bytes were written for each tail of 100");
    let before = written(&mut client);
    assert_eq!(call!(client, "SETRANGE", "tail", "30000000", "changed").int(), model.len() as i64);
    model[30_000_000..30_000_007].copy_from_slice(b"changed");
    let cost = written(&mut client) - before;
    assert!(cost < 600_000, "{cost} bytes were written for a change of 7");
    assert_value(&mut client, "tail", &model);
    node.stop();
}

/// The longest value that Redis has.
#[test]
fn half_a_gibibyte_makes_the_round_trip() {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:")).unwrap();
    let available: u64 = available.trim().trim_end_matches("kB").trim().parse().unwrap();
    if available < 8 << 20 {
        eprintln!("needs 8 GiB of memory, {available} KiB are available");
        return;
    }
    let directory = temp_dir();
    let options = Options::new(directory.path().join("half.img")).size("3GiB").arg("--memory").arg("4GiB");
    let node = options.start();
    let mut client = node.client();
    client.set_timeout(Duration::from_secs(300));
    let mut value = Rng::new(3).bytes(512 * MIB);
    assert_eq!(call!(client, "SET", "half", &value), Reply::ok());
    assert!(node.rss() < 2 << 30, "{} bytes are resident", node.rss());
    assert_value(&mut client, "half", &value);
    assert!(call!(client, "APPEND", "half", "x").error().contains("is longer than the 536870912 bytes"));
    assert_eq!(call!(client, "SETRANGE", "half", "536870909", "end").int(), 536_870_912);
    value[536_870_909..].copy_from_slice(b"end");
    node.kill9();
    // With less memory it can't be read in one piece, and says so; parts of it can.
    let node = Options { extra: vec!["--memory".into(), "1GiB".into()], ..options.clone() }.start();
    let mut small = node.client();
    small.set_timeout(Duration::from_secs(300));
    let reply = call!(small, "GET", "half");
    assert!(reply.error().starts_with("OOM a value of 536870912 bytes"), "{}", reply.brief());
    assert_eq!(call!(small, "GETRANGE", "half", "-3", "-1"), Reply::bulk("end"));
    assert_eq!(call!(small, "STRLEN", "half").int(), 512 << 20);
    node.stop();
    let node = options.start();
    client = node.client();
    client.set_timeout(Duration::from_secs(300));
    assert_value(&mut client, "half", &value);
    node.stop();
}

#[test]
fn extents_of_a_mebibyte_hold_a_value_of_sixty_four() {
    let directory = temp_dir();
    let options = Options::new(directory.path().join("small.img")).size("255MiB").arg("--memory").arg("2GiB");
    let node = options.start();
    let mut client = node.client();
    let extent_size = "\"extent_size_bytes\":1048576";
    let value = Rng::new(4).bytes(64 * MIB);
    for round in 0..4 {
        assert_eq!(call!(client, "SET", "long", &value), Reply::ok(), "round {round}");
    }
    assert_value(&mut client, "long", &value);
    node.kill9();
    let shown = basalt(&["inspect", "superblock", "--device", path_text(&options.device), "--json"]);
    assert!(shown.stdout.replace(' ', "").contains(extent_size), "{}", shown.stdout);
    let node = options.start();
    assert_value(&mut node.client(), "long", &value);
    node.stop();
    check(&options.device).expect_code(0, "check of small extents");
}

/// What a value of a round looks like: every byte says which.
fn round_value(round: u32, size: usize) -> Vec<u8> {
    round.to_le_bytes().iter().copied().cycle().take(size).collect()
}

#[test]
fn a_kill_while_long_values_are_written_leaves_the_old_or_the_new_one() {
    let directory = temp_dir();
    let options = Options::new(directory.path().join("kill.img")).size("512MiB").arg("--memory").arg("1GiB");
    let mut rng = Rng::from_env("kills under long values");
    const SIZE: usize = 6 * MIB;
    let mut acked = 0u32;
    let node = options.start();
    assert_eq!(call!(node.client(), "SET", "long", round_value(0, SIZE)), Reply::ok());
    node.stop();
    for kill in 0..8 {
        let node = options.start();
        let mut client = node.client();
        let found = call!(client, "GET", "long").bytes().expect("the key is there");
        let round = u32::from_le_bytes(found[..4].try_into().unwrap());
        assert!(
            round >= acked && round <= acked + 1,
            "kill {kill}: {round} is there, {acked} was acknowledged"
        );
        assert!(found == round_value(round, found.len()), "kill {kill}: a value of two halves");
        assert!(found.len() == SIZE || found.len() == SIZE + 4_000, "{} bytes", found.len());
        let address = node.address;
        let writer = std::thread::spawn(move || {
            let mut client = Client::connect(address).unwrap();
            let (mut last, mut next) = (round, round + 1);
            loop {
                let value = round_value(next, SIZE);
                let set: [&[u8]; 3] = [b"SET", b"long", &value];
                match client.try_call(&set) {
                    Ok(reply) if reply == Reply::ok() => last = next,
                    _ => return last,
                }
                let tail = round_value(next, 4_000);
                let append: [&[u8]; 3] = [b"APPEND", b"long", &tail];
                if client.try_call(&append).is_err() {
                    return last;
                }
                next += 1;
            }
        });
        std::thread::sleep(Duration::from_millis(50 + rng.below(600)));
        node.kill9();
        acked = writer.join().unwrap();
    }
    let node = options.start();
    node.stop();
    check(&options.device).expect_code(0, "check after the kills");
    println!("{acked} rounds");
    assert!(acked > 0, "nothing was ever written between two kills");
}

/// Changes a byte of the image where these bytes stand.
fn damage(device: &std::path::Path, marker: &[u8]) {
    let image = std::fs::read(device).unwrap();
    let places: Vec<usize> = memchr::memmem::find_iter(&image, marker).collect();
    assert!(!places.is_empty(), "the marker is not in the image");
    let file = std::fs::OpenOptions::new().write(true).open(device).unwrap();
    for place in places {
        file.write_all_at(&[marker[0] ^ 1], place as u64).unwrap();
    }
}

fn start_with_values(options: &Options, value: &[u8]) -> Node {
    let node = options.start();
    let mut client = node.client();
    assert_eq!(call!(client, "SET", "hit", value), Reply::ok());
    assert_eq!(call!(client, "SET", "spared", &value[..3 * MIB]), Reply::ok());
    assert_eq!(call!(client, "SET", "short", "value"), Reply::ok());
    node
}

#[test]
fn damage_in_one_chunk_is_told_by_its_key_and_leaves_the_rest() {
    let directory = temp_dir();
    let options =
        Options::new(directory.path().join("damage.img")).size("256MiB").arg("--memory").arg("1GiB");
    let marker = b"the bytes in the middle of one of the chunks";
    let mut value = Rng::new(5).bytes(8 * MIB);
    value[5 * MIB..5 * MIB + marker.len()].copy_from_slice(marker);
    start_with_values(&options, &value).stop();
    damage(&options.device, marker);
    let device = path_text(&options.device);
    let ended = basalt(&["check", "--device", device, "--json"]).expect_code(4, "check of a damaged chunk");
    assert!(ended.stdout.contains("\"hit\"") && !ended.stdout.contains("spared"), "{}", ended.stdout);
    let ended = basalt(&["inspect", "key", "hit", "--device", device]);
    assert!(ended.stdout.contains("chunks: 33, 1 of them can't be read"), "{}", ended.stdout);
    let saved = directory.path().join("saved.resp");
    let ended = basalt(&["salvage", "--device", device, "--to", path_text(&saved)]);
    assert_eq!(ended.code, Some(4), "{}", ended.text());
    assert!(ended.text().contains("hit"), "{}", ended.text());
    let node = options.start();
    let mut client = node.client();
    assert!(
        call!(client, "GET", "hit").error().starts_with("IOERR the stored record of this key is damaged")
    );
    assert_eq!(call!(client, "GETRANGE", "hit", "0", "999999"), Reply::bulk(&value[..1_000_000]));
    assert!(call!(client, "GETRANGE", "hit", "5242880", "5242890").is_error());
    assert!(call!(client, "SETRANGE", "hit", "5242880", "x").is_error(), "what is beside it can't be kept");
    assert_eq!(call!(client, "SETRANGE", "hit", "0", "x").int(), value.len() as i64);
    assert_value(&mut client, "spared", &value[..3 * MIB]);
    assert_eq!(call!(client, "GET", "short"), Reply::bulk("value"));
    assert_eq!(call!(client, "DEL", "hit").int(), 1);
    assert_eq!(call!(client, "GET", "hit"), Reply::Nil);
    node.stop();
    // What was saved loads elsewhere.
    let other = Options::new(directory.path().join("other.img")).size("256MiB").arg("--memory").arg("1GiB");
    let node = other.start();
    let port = node.port().to_string();
    let loaded = ["restore", "--from", path_text(&saved), "--port", &port];
    basalt(&loaded).expect_code(0, "restore of what was saved");
    assert_value(&mut node.client(), "spared", &value[..3 * MIB]);
    assert_eq!(call!(node.client(), "GET", "hit"), Reply::Nil);
    node.stop();
}

#[test]
fn dumps_and_batches_carry_long_values() {
    let directory = temp_dir();
    let options = Options::new(directory.path().join("dump.img")).size("512MiB").arg("--memory").arg("2GiB");
    let value = Rng::new(6).bytes(20 * MIB);
    let node = start_with_values(&options, &value);
    let mut client = node.client();
    assert_eq!(call!(client, "MSET", "{b}1", &value[..MIB], "other", &value[MIB..2 * MIB]), Reply::ok());
    let both = call!(client, "MGET", "other", "{b}1").array();
    assert_eq!(both, [Reply::bulk(&value[MIB..2 * MIB]), Reply::bulk(&value[..MIB])]);
    for command in
        [&["MULTI"][..], &["EXPIRE", "hit", "1000"], &["APPEND", "other", "tail"], &["STRLEN", "other"]]
    {
        client.call(&command.iter().map(|part| part.as_bytes()).collect::<Vec<_>>());
    }
    assert_eq!(call!(client, "EXEC").array(), [Reply::Int(1), Reply::Int(1_048_580), Reply::Int(1_048_580)]);
    let file = directory.path().join("dump.resp");
    let port = node.port().to_string();
    basalt(&["dump", "--to", path_text(&file), "--port", &port]).expect_code(0, "dump of long values");
    let other =
        Options::new(directory.path().join("restored.img")).size("512MiB").arg("--memory").arg("2GiB");
    let restored = other.start();
    let port = restored.port().to_string();
    basalt(&["restore", "--from", path_text(&file), "--port", &port])
        .expect_code(0, "restore of long values");
    let mut client = restored.client();
    assert_value(&mut client, "hit", &value);
    assert!(call!(client, "TTL", "hit").int() > 900);
    assert_value(&mut client, "{b}1", &value[..MIB]);
    assert_eq!(call!(client, "STRLEN", "other").int(), 1_048_580);
    restored.stop();
    node.stop();
}
