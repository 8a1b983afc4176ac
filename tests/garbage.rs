//! Space comes back: devices that are overwritten many times over, emptied and filled again, from outside.

#![cfg(test)]

mod common;

use std::os::unix::fs::MetadataExt;

use common::resp::encode_into;
use common::{Client, Node, Options, Reply, Rng, call, temp_dir};

const VALUE_SIZE: usize = 4 << 10;

fn key(index: usize) -> String {
    format!("key:{index:06}")
}

/// A figure of INFO.
fn figure(client: &mut Client, name: &str) -> u64 {
    let info = call!(client, "INFO").bytes().expect("INFO");
    let info = String::from_utf8_lossy(&info).into_owned();
    let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::to_owned));
    let text = line.unwrap_or_else(|| panic!("INFO has no {name}"));
    text.trim().parse().unwrap_or_else(|_| panic!("{name} is {text}"))
}

/// Requests that are sent before their replies are read.
const PIPELINE: usize = 100;

/// Writes new values to these keys and remembers those that were taken. The first error ends it, behind its pipeline.
fn put(
    client: &mut Client,
    expected: &mut Vec<Vec<u8>>,
    indexes: impl IntoIterator<Item = usize>,
    rng: &mut Rng,
) -> Option<Reply> {
    let mut indexes = indexes.into_iter().peekable();
    let mut error = None;
    while indexes.peek().is_some() && error.is_none() {
        let mut sent = Vec::new();
        let mut bytes = Vec::new();
        for index in indexes.by_ref().take(PIPELINE) {
            let value = rng.bytes(VALUE_SIZE);
            encode_into(&mut bytes, &[b"SET", key(index).as_bytes(), &value]);
            sent.push((index, value));
        }
        client.send(&bytes).expect("the node takes requests");
        for (index, value) in sent {
            let reply = client.read().expect("the node answers");
            if reply == Reply::ok() {
                expected.resize(expected.len().max(index + 1), Vec::new());
                expected[index] = value;
            } else {
                error.get_or_insert(reply);
            }
        }
    }
    error
}

/// Deletes these keys, which are there.
fn delete(client: &mut Client, indexes: impl IntoIterator<Item = usize>) {
    let mut indexes = indexes.into_iter().peekable();
    while indexes.peek().is_some() {
        let mut bytes = Vec::new();
        let mut count = 0;
        for index in indexes.by_ref().take(PIPELINE) {
            encode_into(&mut bytes, &[b"DEL", key(index).as_bytes()]);
            count += 1;
        }
        client.send(&bytes).expect("the node takes requests");
        for _ in 0..count {
            assert_eq!(client.read().expect("the node answers").int(), 1, "a delete that found its key");
        }
    }
}

fn verify(client: &mut Client, expected: &[Vec<u8>]) {
    for (index, value) in expected.iter().enumerate() {
        assert_eq!(call!(client, "GET", key(index)).bytes().as_ref(), Some(value), "key {index}");
    }
    assert_eq!(call!(client, "DBSIZE").int(), expected.len() as i64);
}

fn small_device(directory: &std::path::Path) -> Options {
    Options::new(directory.join("garbage.img")).size("64MiB")
}

fn restart(options: &Options, node: Node) -> Node {
    node.stop();
    options.check().expect_code(0, "check of the image");
    options.start()
}

#[test]
fn a_device_is_overwritten_many_times_over() {
    let directory = temp_dir();
    let options = small_device(directory.path());
    let node = options.start();
    let mut client = node.client();
    let mut rng = Rng::from_env("overwrite");
    let mut expected = Vec::new();
    assert_eq!(put(&mut client, &mut expected, 0..6_000, &mut rng), None);
    // Some 120 MiB more, on 64 MiB of which a third is live.
    let indexes: Vec<usize> = (0..30_000).map(|_| rng.below(6_000) as usize).collect();
    assert_eq!(put(&mut client, &mut expected, indexes, &mut rng), None);
    verify(&mut client, &expected);
    assert!(figure(&mut client, "gc_extents_freed") > 50);
    assert!(
        figure(&mut client, "gc_bytes_moved") > 0,
        "random overwrites leave live records in every extent"
    );
    drop(client);
    let node = restart(&options, node);
    verify(&mut node.client(), &expected);
    // What was collected stays collected after a crash as well.
    node.kill9();
    let node = options.start();
    verify(&mut node.client(), &expected);
    node.stop();
}

#[test]
fn a_full_device_can_be_emptied_and_filled_again() {
    let directory = temp_dir();
    let options = small_device(directory.path());
    let mut node = options.start();
    let mut rng = Rng::from_env("refill");
    let mut counts = Vec::new();
    for round in 0..4 {
        let mut client = node.client();
        let mut expected = Vec::new();
        let error = put(&mut client, &mut expected, 0..20_000, &mut rng).expect("an end of the device");
        assert!(error.error().starts_with("OOM device is full"), "{error:?}");
        let count = call!(client, "DBSIZE").int() as usize;
        counts.push(count);
        if round % 2 == 0 {
            let taken: Vec<usize> =
                (0..expected.len()).filter(|index| !expected[*index].is_empty()).collect();
            assert_eq!(taken.len(), count);
            delete(&mut client, taken);
        } else {
            assert_eq!(call!(client, "FLUSHALL"), Reply::ok());
        }
        assert_eq!(call!(client, "DBSIZE").int(), 0);
        drop(client);
        if round == 1 {
            node = restart(&options, node);
            assert_eq!(call!(node.client(), "DBSIZE").int(), 0, "what was deleted stays deleted");
        }
    }
    // Records of deletes may still be there; most of the device must not be theirs.
    let (first, least) = (counts[0], counts[1..].iter().min().copied().unwrap_or(0));
    assert!(first > 5_000 && least * 10 > first * 8, "values that went in, round by round: {counts:?}");
    node.stop();
}

#[test]
fn compact_gives_back_what_is_dead_and_trim_gives_it_to_the_file_system() {
    let directory = temp_dir();
    let options = small_device(directory.path()).arg("--trim").arg("on");
    let node = options.start();
    let mut client = node.client();
    let mut rng = Rng::from_env("compact");
    let mut expected = Vec::new();
    assert_eq!(put(&mut client, &mut expected, 0..5_000, &mut rng), None);
    let taken = || std::fs::metadata(&options.device).expect("the image").blocks() * 512;
    // A file may be made with all of its blocks, or get them as it is written: either way the values are there.
    let (before, available) = (taken(), figure(&mut client, "available_bytes"));
    assert!(before > 16 << 20, "{before} bytes are taken");
    delete(&mut client, 1_000..5_000);
    expected.truncate(1_000);
    assert_eq!(call!(client, "COMPACT"), Reply::ok());
    let freed = figure(&mut client, "available_bytes") - available;
    assert!(freed > 12 << 20, "{freed} bytes came back");
    assert!(figure(&mut client, "gc_bytes_trimmed") >= 12 << 20);
    let after = taken();
    assert!(after + (12 << 20) <= before, "the file took {before} bytes, and takes {after}");
    verify(&mut client, &expected);
    drop(client);
    let node = restart(&options, node);
    verify(&mut node.client(), &expected);
    node.stop();
}
