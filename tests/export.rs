//! Getting data out: what `salvage` saves of images that are whole, damaged, cut short or of no use, and that nothing is ever
//! written to them.

#![cfg(test)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::exported::parse;
use common::node::{Ended, path_text, run};
use common::tools::tool;
use common::{Client, Options, Reply, Rng, basalt, call, temp_dir};

type Values = BTreeMap<Vec<u8>, Vec<u8>>;

/// Far enough away to outlive every run.
const FAR: &str = "4102444800000";

fn salvage(device: &Path, to: &Path, more: &[&str]) -> Ended {
    let args = [&["salvage", "--device", path_text(device), "--to", path_text(to)], more].concat();
    basalt(&args)
}

fn json(ended: &Ended) -> serde_json::Value {
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {}", ended.text()))
}

#[track_caller]
fn read_back(client: &mut Client, values: &Values) {
    for (key, value) in values {
        let found = call!(client, "GET", key);
        assert!(found == Reply::bulk(value), "{}: {}", key.escape_ascii(), found.brief());
    }
    assert_eq!(call!(client, "DBSIZE").int(), values.len() as i64);
}

/// An image with everything that is hard about keys: any bytes, expiries past and to come, overwrites, deletions, batches.
struct Image {
    directory: tempfile::TempDir,
    path: PathBuf,
    values: Values,
}

fn image() -> Image {
    let directory = temp_dir();
    let path = directory.path().join("image.img");
    let node = Options::new(&path).size("64MiB").start();
    let mut client = node.client();
    let mut rng = Rng::new(5);
    let mut values = Values::new();
    let every_byte: Vec<u8> = (0..=255).collect();
    for index in 0..300usize {
        let mut key = format!("key:{index:03}:").into_bytes();
        key.extend_from_slice(&every_byte[index % 256..]);
        for size in [100, [0, 60, 5_000, 90_000][index % 4]] {
            let value = rng.bytes(size);
            assert_eq!(call!(client, "SET", key, value), Reply::ok());
            values.insert(key.clone(), value);
        }
    }
    for key in values.keys().step_by(7).cloned().collect::<Vec<_>>() {
        assert_eq!(call!(client, "DEL", key).int(), 1);
        values.remove(&key);
    }
    for (index, key) in values.keys().enumerate().filter(|(index, _)| index % 5 == 0) {
        assert_eq!(call!(client, "PEXPIREAT", key, FAR).int(), 1, "{index}");
    }
    assert_eq!(call!(client, "SET", "gone", "x", "PX", "1"), Reply::ok());
    assert_eq!(call!(client, "MSET", "batch:a", "1", "batch:b", "2", "batch:c", "3"), Reply::ok());
    for (key, value) in [("batch:a", "1"), ("batch:b", "2"), ("batch:c", "3")] {
        values.insert(key.into(), value.into());
    }
    common::wait_until("the key expires", 10, || call!(client, "GET", "gone") == Reply::Nil);
    node.stop();
    Image { directory, path, values }
}

fn load_with_redis_cli(file: &Path, port: u16) {
    let mut command = tool("redis-cli");
    command.args(["-h", "127.0.0.1", "-p", &port.to_string(), "--pipe"]);
    let ended = run(command, Some(std::fs::File::open(file).unwrap())).expect_code(0, "redis-cli --pipe");
    assert!(ended.stdout.contains("errors: 0"), "{}", ended.text());
}

#[test]
fn a_whole_image_is_saved_in_whole_and_loads_with_redis_cli() {
    let Image { directory, path, values } = image();
    let before = std::fs::read(&path).unwrap();
    let to = directory.path().join("keys.resp");
    let ended = salvage(&path, &to, &["--json"]).expect_code(0, "salvage of a whole image");
    let report = json(&ended);
    assert_eq!(report["keys_saved"], values.len() as u64, "{report}");
    assert!(report["complete"] == true && report["keys_lost"] == 0, "{report}");
    assert!(std::fs::read(&path).unwrap() == before, "salvage wrote to the image");
    assert!(!directory.path().join("keys.resp.part").exists());

    let saved = parse(&std::fs::read(&to).unwrap());
    let saved_values: Values = saved.iter().map(|(key, (value, _))| (key.clone(), value.clone())).collect();
    assert!(saved_values == values, "other keys or values than were written");
    let expiring = saved.values().filter(|(_, expiry)| expiry.as_deref() == Some(FAR.as_bytes())).count();
    assert!(expiring > 40 && saved.values().filter(|(_, expiry)| expiry.is_some()).count() == expiring);

    let node = Options::new(directory.path().join("other.img")).size("64MiB").start();
    load_with_redis_cli(&to, node.port());
    read_back(&mut node.client(), &values);
    node.stop();

    // To standard output the same, and the summary goes elsewhere.
    let ended = basalt(&["salvage", "--device", path_text(&path), "--to", "-"]);
    let ended = ended.expect_code(0, "salvage to standard output");
    assert!(ended.stderr.contains("nothing was lost") && !ended.stdout.contains("nothing was lost"));
    assert!(ended.stdout.starts_with('*'));
}

#[test]
fn a_file_that_is_there_is_kept() {
    let Image { directory, path, .. } = image();
    let to = directory.path().join("precious");
    std::fs::write(&to, "letters").unwrap();
    let refused = salvage(&path, &to, &[]).expect_code(3, "a file is there");
    assert!(refused.stderr.contains("precious") && refused.stderr.contains("--force"), "{}", refused.stderr);
    assert_eq!(std::fs::read(&to).unwrap(), b"letters");
    // Nor is it lost for a device that can't be read.
    let nothing = directory.path().join("nothing.img");
    std::fs::write(&nothing, "no device\n".repeat(100_000)).unwrap();
    salvage(&nothing, &to, &["--force"]).expect_code(8, "what is no device");
    assert_eq!(std::fs::read(&to).unwrap(), b"letters");
    salvage(&path, &to, &["--force"]).expect_code(0, "told to replace it");
    assert!(!parse(&std::fs::read(&to).unwrap()).is_empty());
}

#[test]
fn a_damaged_value_is_named_and_an_older_one_is_offered() {
    let Image { directory, path, values } = image();
    let image = std::fs::read(&path).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let (mut lost, mut damaged) = (0, BTreeSet::new());
    for (key, value) in values.iter().filter(|(_, value)| value.len() >= 5_000).step_by(11) {
        // A value is there once, or the flip would not reach the newest.
        let places: Vec<usize> = memchr::memmem::find_iter(&image, &value[100..164]).collect();
        if let [at] = places.as_slice() {
            file.write_all_at(&[image[*at] ^ 1], *at as u64).unwrap();
            damaged.insert(key.clone());
            lost += 1;
        }
    }
    assert!(lost >= 5, "only {lost} values were damaged");
    drop(file);
    let to = directory.path().join("keys.resp");
    let ended = salvage(&path, &to, &["--json"]).expect_code(4, "salvage of damaged values");
    let report = json(&ended);
    let saved = parse(&std::fs::read(&to).unwrap());
    for (key, value) in &values {
        match saved.get(key) {
            Some((found, _)) if found == value => assert!(!damaged.contains(key)),
            // What was written to it first, from which the newest differs in size.
            Some((found, _)) => assert!(damaged.contains(key) && found.len() == 100),
            None => assert!(damaged.contains(key)),
        }
        let named = ended.stderr.contains(&format!("key '{}'", key.escape_ascii()));
        assert_eq!(named, damaged.contains(key), "{}: {}", key.escape_ascii(), ended.stderr);
    }
    assert_eq!(
        report["keys_older"].as_u64().unwrap() + report["keys_lost"].as_u64().unwrap(),
        lost,
        "{report}"
    );
    assert!(report["keys_older"].as_u64().unwrap() > 0, "{report}");

    let ended = salvage(&path, &to, &["--force", "--only-certain"]).expect_code(4, "only what is certain");
    let saved = parse(&std::fs::read(&to).unwrap());
    let certain: Values = saved.into_iter().map(|(key, (value, _))| (key, value)).collect();
    let undamaged: Values = values
        .iter()
        .filter(|(key, _)| !damaged.contains(*key))
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    assert!(certain == undamaged, "{}", ended.text());
}

#[test]
fn half_of_a_device_and_a_last_superblock_are_enough_for_what_is_there() {
    let Image { directory, path, values } = image();
    let image = std::fs::read(&path).unwrap();
    let to = directory.path().join("keys.resp");
    let half = directory.path().join("half.img");
    std::fs::write(&half, &image[..image.len() / 2]).unwrap();
    let report = json(&salvage(&half, &to, &["--json"]).expect_code(4, "half of a device"));
    assert!(report["regions_lost"].as_u64() > Some(0) && report["complete"] == false, "{report}");
    let saved = parse(&std::fs::read(&to).unwrap());
    assert!(!saved.is_empty() && saved.len() < values.len() + 50, "{} keys", saved.len());
    let report = json(&salvage(&half, &to, &["--json", "--force", "--only-certain"]).expect_code(4, "half"));
    assert_eq!(
        report["keys_saved"], 0,
        "nothing can be certain where newer extents may be missing: {report}"
    );

    // Three of four superblock copies are gone: no quorum, but what is left says all that is needed.
    let mut torn = image;
    let size = torn.len();
    for at in [1 << 20, (1 << 20) + (512 << 10), size - (2 << 20)] {
        torn[at..at + 4096].fill(0x55);
    }
    let last = directory.path().join("last.img");
    std::fs::write(&last, &torn).unwrap();
    let ended = salvage(&last, &to, &["--force"]).expect_code(0, "one superblock copy");
    assert!(ended.stderr.contains("no two of its 4 copies agree"), "{}", ended.stderr);
    assert_eq!(parse(&std::fs::read(&to).unwrap()).len(), values.len());
}

#[test]
fn the_start_of_another_device_over_this_one_is_refused_and_what_is_left_is_saved() {
    let Image { directory, path, values } = image();
    // Of the same size, and of a smaller one whose far copies would stand elsewhere; both newer than this one.
    for size in ["64MiB", "32MiB"] {
        let other = directory.path().join(format!("other-{size}.img"));
        for _ in 0..4 {
            Options::new(&other).size(size).start().stop();
        }
        let (mixed, to) = (directory.path().join("mixed.img"), directory.path().join("mixed.resp"));
        std::fs::copy(&path, &mixed).unwrap();
        let start = &std::fs::read(&other).unwrap()[..2 << 20];
        let file = std::fs::OpenOptions::new().write(true).open(&mixed).unwrap();
        file.write_all_at(start, 0).unwrap();
        let before = std::fs::read(&mixed).unwrap();
        let words = "superblocks are of several devices";
        let device = path_text(&mixed);
        for command in
            [vec!["serve", "--listen", "127.0.0.1:0", "--device", device], vec!["check", "--device", device]]
        {
            let ended = basalt(&command);
            assert!(ended.code != Some(0) && ended.stderr.contains(words), "{}", ended.text());
        }
        let ended = salvage(&mixed, &to, &["--json", "--force"]);
        assert!(ended.text().contains(words), "{}", ended.text());
        assert_eq!(json(&ended)["keys_saved"], values.len() as u64, "{}", ended.text());
        assert!(std::fs::read(&mixed).unwrap() == before, "something was written to the image");
    }
}
