//! `basalt inspect`: what it shows is what is on the device, in both forms, and it writes nothing.

#![cfg(test)]

mod common;

use std::os::unix::fs::FileExt;
use std::path::Path;

use common::node::{Ended, path_text};
use common::{Options, Reply, basalt, call, temp_dir};
use serde_json::Value;

fn inspect(what: &[&str], device: &Path, more: &[&str]) -> Ended {
    basalt(&[&["inspect"], what, &["--device", path_text(device)], more].concat())
}

#[track_caller]
fn json(what: &[&str], device: &Path) -> Value {
    let ended = inspect(what, device, &["--json"]).expect_code(0, &format!("inspect {what:?}"));
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {}", ended.text()))
}

#[test]
fn every_view_shows_what_is_there() {
    let directory = temp_dir();
    let path = directory.path().join("inspect.img");
    basalt(&[
        "format",
        "--device",
        path_text(&path),
        "--size",
        "64MiB",
        "--shards",
        "16",
        "--label",
        "shelf 7",
    ])
    .expect_code(0, "format");
    let options = Options::new(&path);
    let node = options.start();
    let mut client = node.client();
    let long = vec![b'v'; 3_000];
    assert_eq!(call!(client, "SET", "plain", "first"), Reply::ok());
    assert_eq!(call!(client, "SET", "plain", long, "PXAT", "4102444800000"), Reply::ok());
    assert_eq!(call!(client, "SET", "gone", "x"), Reply::ok());
    assert_eq!(call!(client, "DEL", "gone").int(), 1);
    assert_eq!(call!(client, "SET", b"\x00\xff", "binary"), Reply::ok());
    assert_eq!(call!(client, "MSET", "batch:a", "1", "batch:b", "2"), Reply::ok());
    node.stop();
    let before = std::fs::read(&path).unwrap();

    let superblock = json(&["superblock"], &path);
    assert_eq!(superblock["label"], "shelf 7");
    assert_eq!(superblock["device_size_bytes"], 64 << 20);
    assert_eq!(superblock["shard_count"], 16);
    assert_eq!(superblock["boot"], 1);
    let copies = superblock["copies"].as_array().unwrap();
    assert!(copies.len() == 4 && copies.iter().all(|copy| copy["error"].is_null()), "{superblock}");
    let text = inspect(&["superblock"], &path, &[]).expect_code(0, "as text").stdout;
    assert!(text.contains("shelf 7") && text.contains("67108864 bytes"), "{text}");

    let key = json(&["key", "plain"], &path);
    assert_eq!((&key["state"], &key["slot"]), (&"present".into(), &7_143.into()), "{key}");
    let newest = &key["newest"];
    assert_eq!(newest["value_bytes"], 3_000);
    assert_eq!(newest["expires_at_ms"], 4_102_444_800_000u64);
    let others = key["others"].as_array().unwrap();
    assert!(others.len() == 1 && others[0]["why"] == "older" && others[0]["value_bytes"] == 5, "{key}");
    assert!(newest["sequence"].as_u64() > others[0]["sequence"].as_u64(), "{key}");
    let gone = json(&["key", "gone"], &path);
    assert!(gone["state"] == "absent" && gone["newest"].is_null(), "{gone}");
    assert_eq!(gone["others"].as_array().unwrap().len(), 2, "{gone}");
    let part = json(&["key", "batch:a"], &path);
    assert!(part["state"] == "present" && part["newest"]["batch"].is_string(), "{part}");
    assert_eq!(json(&["key", "never"], &path)["state"], "absent");
    let escaped = inspect(&["key", r"\x00\xff", "--escaped"], &path, &[]).expect_code(0, "an escaped key");
    assert!(escaped.stdout.contains("present"), "{}", escaped.stdout);
    inspect(&["key", r"\q", "--escaped"], &path, &[]).expect_code(2, "no escape");

    // The place that is shown is where the bytes are.
    let extent_number = newest["extent"].as_u64().unwrap();
    let extents = json(&["extents"], &path);
    let extents = extents["extents"].as_array().unwrap();
    assert_eq!(extents.len() as u64, superblock["extent_count"].as_u64().unwrap());
    let extent = &extents[extent_number as usize];
    assert_eq!((&extent["state"], &extent["shard"]), (&"open".into(), &key["shard"]), "{extent}");
    let at = extent["offset_bytes"].as_u64().unwrap() + newest["offset_bytes"].as_u64().unwrap();
    let record = &before[at as usize..][..newest["size_bytes"].as_u64().unwrap() as usize];
    assert!(record.ends_with(&long), "the record is not where it is said to be");
    let bytes = |field: &str| extent[field].as_u64().unwrap();
    assert!(bytes("live_bytes") >= 3_000, "{extent}");
    assert_eq!(bytes("live_bytes") + bytes("carried_bytes") + bytes("dead_bytes"), bytes("used_bytes"));
    assert!(extents.iter().any(|one| one["state"] == "free" && one["used_bytes"] == 0));

    let number = extent_number.to_string();
    let contents = json(&["extent", &number], &path);
    let records: Vec<&Value> = contents["frames"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|f| f["records"].as_array().unwrap())
        .collect();
    let of_key = records.iter().filter(|record| record["key"] == "plain").count();
    assert_eq!(of_key, 2, "{contents}");
    let text = inspect(&["extent", &number], &path, &[]).expect_code(0, "as text").stdout;
    assert!(text.contains("put 'plain'") && text.contains("clean stop"), "{text}");
    let missing = inspect(&["extent", "4000000"], &path, &[]).expect_code(2, "no such extent");
    assert!(missing.stderr.contains("extents 0 to "), "{}", missing.stderr);
    assert!(std::fs::read(&path).unwrap() == before, "inspect wrote to the image");

    // Damage is shown where it is.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(b"!", at + newest["size_bytes"].as_u64().unwrap() - 1).unwrap();
    file.write_all_at(&[0x55; 4096], 1 << 20).unwrap();
    drop(file);
    assert_eq!(json(&["key", "plain"], &path)["state"], "damaged");
    let contents = json(&["extent", &number], &path);
    let damage: usize =
        contents["frames"].as_array().unwrap().iter().map(|f| f["damage"].as_array().unwrap().len()).sum();
    assert_eq!(damage, 1, "{contents}");
    let superblock = json(&["superblock"], &path);
    assert!(superblock["copies"][0]["error"].is_string(), "{superblock}");
}

#[test]
fn checkpoints_are_shown_with_what_a_start_makes_of_them() {
    let directory = temp_dir();
    let path = directory.path().join("checkpoints.img");
    basalt(&["format", "--device", path_text(&path), "--size", "64MiB"]).expect_code(0, "format");
    assert_eq!(json(&["checkpoint"], &path)["checkpoints"].as_array().unwrap().len(), 0);
    let text = inspect(&["checkpoint"], &path, &[]).expect_code(0, "none").stdout;
    assert!(text.contains("a start reads the whole log"), "{text}");

    // One reactor, and so one checkpoint for all shards at a time.
    let options = Options::new(&path).arg("--reactors").arg("1");
    let node = options.start();
    let mut client = node.client();
    for number in 0..50 {
        assert_eq!(call!(client, "SET", format!("key:{number}"), "value"), Reply::ok());
    }
    assert_eq!(call!(client, "SET", "soon", "value", "PXAT", "4102444800000"), Reply::ok());
    assert_eq!(call!(client, "SET", "long", vec![b'l'; 600_000]), Reply::ok());
    node.stop();
    let found = json(&["checkpoint"], &path);
    let all = found["checkpoints"].as_array().unwrap();
    let used: Vec<&Value> = all.iter().filter(|one| one["state"] == "used").collect();
    assert_eq!(used.len(), 1, "{found}");
    let sum = |field: &str| -> u64 {
        used[0]["shards"].as_array().unwrap().iter().map(|shard| shard[field].as_u64().unwrap()).sum()
    };
    assert_eq!(
        (sum("keys"), sum("expiring_keys"), sum("long_values"), sum("chunks")),
        (52, 1, 1, 3),
        "{found}"
    );
    let text = inspect(&["checkpoint"], &path, &[]).expect_code(0, "as text").stdout;
    assert!(text.contains("a start uses it") && text.contains("52 keys"), "{text}");

    // A flipped bit in it, and no start uses it.
    let extents = json(&["extents"], &path);
    let number = used[0]["extents"][0].as_u64().unwrap();
    let at = extents["extents"][number as usize]["offset_bytes"].as_u64().unwrap();
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at + 4096 + 100).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at + 4096 + 100).unwrap();
    drop(file);
    let found = json(&["checkpoint"], &path);
    let state = found["checkpoints"].as_array().unwrap().iter().find(|one| one["extents"][0] == number);
    assert_eq!(state.map(|one| &one["state"]), Some(&"incomplete".into()), "{found}");
}
